# This file is part of meas_deeplearn.
#
# Developed for the LSST Data Management System.
# This product includes software developed by the LSST Project
# (https://www.lsst.org).
# See the COPYRIGHT file at the top-level directory of this distribution
# for details of code ownership.
#
# This program is free software: you can redistribute it and/or modify
# it under the terms of the GNU General Public License as published by
# the Free Software Foundation, either version 3 of the License, or
# (at your option) any later version.
#
# This program is distributed in the hope that it will be useful,
# but WITHOUT ANY WARRANTY; without even the implied warranty of
# MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE.  See the
# GNU General Public License for more details.
#
# You should have received a copy of the GNU General Public License
# along with this program.  If not, see <https://www.gnu.org/licenses/>.

"""Select objects by expressions on the columns of a table.

Expressions are data: they are parsed and walked here, never evaluated as
code, so that a configuration file cannot run anything.
"""

from __future__ import annotations

__all__ = ("SelectionError", "column_names", "select_objects")

import ast
import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import astropy.units as u
import numpy as np
from astropy.table import Table


class SelectionError(ValueError):
    """Raised for an expression that cannot be understood or applied."""


def _compute_magnitude(flux: np.ndarray) -> np.ndarray:
    """Return the AB magnitude of flux densities in nJy, NaN if negative."""
    flux = np.asarray(flux, dtype=np.float64)
    return u.nJy.to(u.ABmag, np.where(flux > 0, flux, np.nan))


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "mag": _compute_magnitude,
    "abs": np.abs,
    "log10": np.log10,
    "sqrt": np.sqrt,
    "isfinite": np.isfinite,
}
"""Functions that an expression may call; ``mag`` is the AB magnitude of a
flux density in nJy."""

_OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Not: np.logical_not,
    ast.And: np.logical_and,
    ast.Or: np.logical_or,
}


def column_names(expressions: Iterable[str]) -> set[str]:
    """Return the columns that expressions use.

    Parameters
    ----------
    expressions
        Expressions as for `select_objects`.

    Raises
    ------
    SelectionError
        Raised if an expression is no expression.
    """
    return {
        node.id
        for expression in expressions
        for node in ast.walk(_parse(expression))
        if isinstance(node, ast.Name) and node.id not in FUNCTIONS
    }


def select_objects(table: Table, expressions: Iterable[str]) -> np.ndarray:
    """Return which rows satisfy all expressions, bool, shape ``(N,)``.

    Parameters
    ----------
    table
        Table of objects.
    expressions
        Comparisons of columns and numbers, such as
        ``18 < mag(i_cModelFlux) < 23`` or ``refExtendedness > 0.5``; with
        arithmetic, ``and``, ``or``, ``not`` and the `FUNCTIONS`.  A
        comparison with a value that is missing or NaN is false.

    Raises
    ------
    SelectionError
        Raised if an expression cannot be parsed, uses anything else, names a
        column that is not in the table, or is not a condition.
    """
    selected = np.ones(len(table), dtype=bool)
    for expression in expressions:
        with np.errstate(invalid="ignore", divide="ignore"):
            result = np.asarray(_evaluate(_parse(expression), table, expression))
        if result.dtype != bool:
            raise SelectionError(f"The selection {expression!r} is not a condition, such as 'column > 1'.")
        selected &= result
    return selected


def _parse(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as err:
        raise SelectionError(f"The selection {expression!r} is not an expression: {err.msg}.") from err


def _evaluate(node: ast.expr, table: Table, expression: str) -> Any:
    """Return the value of one node of an expression."""

    def value_of(child: ast.expr) -> Any:
        return _evaluate(child, table, expression)

    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name):
            return _get_column(table, name, expression)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](value_of(left), value_of(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](value_of(operand))
        case ast.BoolOp(op=op, values=values):
            return _reduce(_OPERATORS[type(op)], [value_of(child) for child in values])
        case ast.Compare(left=left, ops=ops, comparators=others) if {type(op) for op in ops} <= set(
            _OPERATORS
        ):
            sides = [value_of(child) for child in (left, *others)]
            pairs = zip(ops, sides[:-1], sides[1:], strict=True)
            return _reduce(np.logical_and, [_OPERATORS[type(op)](a, b) for op, a, b in pairs])
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(value_of(child) for child in args))
    raise SelectionError(
        f"The selection {expression!r} may not use {ast.unparse(node)!r}; it may use columns, numbers, "
        f"arithmetic, comparisons, 'and', 'or', 'not' and the functions {', '.join(FUNCTIONS)}."
    )


def _reduce(function: Callable[..., Any], values: list[Any]) -> Any:
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return result


def _get_column(table: Table, name: str, expression: str) -> np.ndarray:
    if name not in table.colnames:
        close = difflib.get_close_matches(name, table.colnames)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise SelectionError(f"The selection {expression!r} needs a column {name!r} that is missing.{hint}")
    column = table[name]
    if getattr(column, "mask", None) is not None:
        column = column.filled(np.nan) if column.dtype.kind == "f" else column.filled()
    return np.asarray(column)

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

"""Tests of the selection of objects by expressions."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.table import MaskedColumn, Table

from lsst.meas.deeplearn.object_selection import SelectionError, column_names, select_objects


@pytest.fixture
def table() -> Table:
    """Return objects of known magnitudes: 20, 25, none, 20."""
    return Table(
        {
            "i_cModelFlux": [36307.8, 363.078, -1.0, 36307.8],
            "g_cModelFlux": [36307.8, np.nan, 10.0, 14454.4],
            "refExtendedness": [1.0, 1.0, 1.0, 0.0],
            "detect_isPrimary": [True, True, True, False],
        }
    )


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("mag(i_cModelFlux) < 23", [True, False, False, True]),
        ("18 < mag(i_cModelFlux) < 23 and refExtendedness > 0.5", [True, False, False, False]),
        ("mag(g_cModelFlux) - mag(i_cModelFlux) > 0.9", [False, False, False, True]),
        ("detect_isPrimary", [True, True, True, False]),
        ("not detect_isPrimary or i_cModelFlux < 0", [False, False, True, True]),
        ("abs(-i_cModelFlux) / 2 ** 1 >= 100 + 1", [True, True, False, True]),
        ("isfinite(g_cModelFlux)", [True, False, True, True]),
    ],
)
def test_expressions(table: Table, expression: str, expected: list[bool]) -> None:
    """Conditions mean what they say; comparisons with NaN are false."""
    np.testing.assert_array_equal(select_objects(table, [expression]), expected)


def test_conditions_are_joined(table: Table) -> None:
    """All conditions must hold, and no condition selects everything."""
    both = select_objects(table, ["refExtendedness > 0.5", "mag(i_cModelFlux) < 23"])
    np.testing.assert_array_equal(both, [True, False, False, False])
    assert select_objects(table, []).all()
    assert column_names(["a > mag(b)", "c < 1"]) == {"a", "b", "c"}


def test_masked_values_are_missing(table: Table) -> None:
    """A masked value satisfies no comparison."""
    table["size"] = MaskedColumn([1.0, 2.0, 3.0, 4.0], mask=[True, False, False, False])
    np.testing.assert_array_equal(select_objects(table, ["size > 0"]), [False, True, True, True])


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "i_cModelFlux.sum() > 0",
        "[x for x in (1, 2)]",
        "refExtendedness[0] > 0",
        "(lambda: 1)() > 0",
        "refExtendedness is 1",
    ],
)
def test_nothing_is_executed(table: Table, expression: str) -> None:
    """Anything but arithmetic and comparisons is refused."""
    with pytest.raises(SelectionError, match="may not use"):
        select_objects(table, [expression])


def test_errors_name_the_cure(table: Table) -> None:
    """A missing column is named with the nearest; a number is no condition."""
    with pytest.raises(SelectionError, match="Did you mean i_cModelFlux"):
        select_objects(table, ["i_cmodelFlux > 1"])
    with pytest.raises(SelectionError, match="not a condition"):
        select_objects(table, ["i_cModelFlux"])
    with pytest.raises(SelectionError, match="not an expression"):
        select_objects(table, ["i_cModelFlux >"])


def test_empty_table(table: Table) -> None:
    """An empty table has an empty selection."""
    assert len(select_objects(table[:0], ["mag(i_cModelFlux) < 23"])) == 0

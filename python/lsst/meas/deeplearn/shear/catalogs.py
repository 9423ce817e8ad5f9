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


"""Response of shear catalogues, and their blinding."""

from __future__ import annotations

__all__ = ("MeanShear", "compute_mean_shear", "make_blinding", "sum_catalog", "unblind")

import dataclasses
import hashlib

import numpy as np
from astropy.table import Column, Table

from .bias import ShearSums
from .shapes import STEPS

BLINDED_COLUMNS = ("g1", "g2")
"""Columns that a blinding factor multiplies."""


@dataclasses.dataclass(frozen=True, eq=False)
class MeanShear:
    """The mean shear of a catalogue, and its response."""

    shear: np.ndarray
    """Mean shear (g1, g2)."""

    shear_errors: np.ndarray
    """Their standard errors by the jackknife, NaN for one block."""

    response: np.ndarray
    """Response of the mean ellipticity to shear, shape ``(2, 2)``."""

    response_errors: np.ndarray
    """Its standard errors, shape ``(2, 2)``."""

    n_objects: int
    """Number of objects without artificial shear."""


def sum_catalog(
    *,
    e: np.ndarray,
    meta_step: np.ndarray,
    blocks: np.ndarray,
    selected: np.ndarray,
    step: float,
) -> ShearSums:
    """Add up the rows of a shear catalogue.

    Parameters
    ----------
    e
        Ellipticities, shape ``(N, 2)``.
    meta_step
        Artificial shear of each row, one of `STEPS`.
    blocks
        Number of the part of the sky of each row, int.
    selected
        Which rows to add, bool.  Rows of every artificial shear must have
        been selected by their own measurements.
    step
        Size of the artificial shear.

    Raises
    ------
    ValueError
        Raised if an artificial shear is unknown, or if one has no rows.
    """
    names = np.asarray(meta_step).astype(str)
    if unknown := sorted(set(names.tolist()) - set(STEPS)):
        raise ValueError(f"metaStep is one of {', '.join(STEPS)}, not {unknown}.")
    numbers, where = np.unique(np.asarray(blocks), return_inverse=True)
    values = np.zeros((len(numbers), 1, len(STEPS), 4))
    usable = selected & np.isfinite(e).all(axis=1)
    for k, name in enumerate(STEPS):
        rows = usable & (names == name)
        if not rows.any():
            raise ValueError(f"No selected row of the catalogue has metaStep {name}.")
        columns = np.column_stack([e[rows], np.ones((rows.sum(), 2))])
        np.add.at(values[:, 0, k], where.ravel()[rows], columns)
    return ShearSums(np.zeros((1, 4)), step, numbers, values)


def compute_mean_shear(sums: ShearSums) -> MeanShear:
    """Return the mean shear of a catalogue.

    Parameters
    ----------
    sums
        Sums in blocks, from `sum_catalog`.
    """
    values = sums.values[:, 0]  # (B, 5, 4)
    n = len(values)

    def compute(total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Shear and response of sums, (5, 4).
        mean = total[:, :2] / total[:, 2:3]
        response = np.stack([mean[1] - mean[2], mean[3] - mean[4]], axis=1) / (2 * sums.step)
        return np.linalg.solve(response, mean[0]), response

    total = values.sum(axis=0)
    shear, response = compute(total)
    errors = [np.full_like(array, np.nan) for array in (shear, response)]
    if n > 1:
        left_out = [compute(total - block) for block in values]
        errors = [
            (n - 1) / np.sqrt(n) * np.std(np.array([result[k] for result in left_out]), axis=0, ddof=1)
            for k in (0, 1)
        ]
    return MeanShear(shear, errors[0], response, errors[1], int(total[0, 3]))


def make_blinding(phrase: str, *, limit: float = 0.1) -> Table:
    """Return the hidden factor of a blinded catalogue.

    Parameters
    ----------
    phrase
        Any text; the same one gives the same factor.
    limit
        Largest deviation of the factor from one.
    """
    digest = hashlib.sha256(phrase.encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    table = Table()
    table["factor"] = Column(
        [1 + limit * (2 * fraction - 1)],
        description=f"What {' and '.join(BLINDED_COLUMNS)} were multiplied by",
    )
    return table


def unblind(catalog: Table, blinding: Table) -> Table:
    """Return a catalogue without its hidden factor.

    Parameters
    ----------
    catalog
        Catalogue of `ShearCatalogTask`.
    blinding
        The factor that was hidden, from `make_blinding`.

    Raises
    ------
    ValueError
        Raised if a table is of another kind, or if the catalogue was not
        blinded by this factor.
    """
    if "factor" not in blinding.colnames or len(blinding) != 1:
        raise ValueError("Not a blinding: it must have one row with a column factor.")
    if not {*BLINDED_COLUMNS, "is_blinded"} <= set(catalog.colnames):
        raise ValueError("Not a catalogue of ShearCatalogTask: it has no columns g1, g2 and is_blinded.")
    if not catalog["is_blinded"].all():
        raise ValueError("The catalogue is not blinded.")
    result = catalog.copy()
    for name in BLINDED_COLUMNS:
        result[name] /= float(blinding["factor"][0])
    result["is_blinded"] = False
    return result

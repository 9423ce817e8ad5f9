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

"""What a search for lenses finds: completeness, and yield on the sky."""

from __future__ import annotations

__all__ = (
    "CANDIDATE_DENSITY",
    "CLEAR_ARC_SNR",
    "CLEAR_EINSTEIN_RADIUS",
    "LENS_DENSITY",
    "CompletenessMap",
    "SkyYield",
    "compute_completeness_map",
    "compute_sky_yield",
    "describe_scores",
)

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..metrics import Fraction, compute_auroc, compute_tpr_at_fpr, compute_wilson_interval

LENS_DENSITY = 2.1
"""Lenses per square degree that LSST can find in its best single exposures
(Collett 2015, ApJ 811, 20, with LensPop)."""

CANDIDATE_DENSITY = 1e4
"""Galaxies per square degree that a lens finder looks at, of the order of
those bright enough to be lenses."""

CLEAR_EINSTEIN_RADIUS = 1.4
"""Einstein radius in arcsec above which a lens with clear arcs is clear."""

CLEAR_ARC_SNR = 20.0
"""Signal to noise above which arcs are clear."""


@dataclasses.dataclass(frozen=True)
class SkyYield:
    """What a search finds on a square degree of the sky."""

    precision: Fraction
    """Fraction of lenses among what is found; ``n`` is that of the
    true-positive rate."""

    lenses: float
    """Lenses found per square degree."""

    contaminants: Fraction
    """Others found per square degree; ``n`` is the number of negatives."""


def compute_sky_yield(
    tpr: Fraction,
    fpr: Fraction,
    *,
    lens_density: float = LENS_DENSITY,
    candidate_density: float = CANDIDATE_DENSITY,
) -> SkyYield:
    r"""Return precision and contaminants at the prevalence of the sky.

    With densities :math:`\rho_l` of lenses and :math:`\rho` of all objects
    that are looked at, the precision is

    .. math:: \frac{t \rho_l}{t \rho_l + f (\rho - \rho_l)}

    for rates t and f of true and false positives.

    Parameters
    ----------
    tpr, fpr
        The rates.
    lens_density
        Lenses that are looked at, per square degree.
    candidate_density
        All objects that are looked at, per square degree.

    Returns
    -------
    found
        The interval of the precision takes both rates at their worse and
        their better end.

    Raises
    ------
    ValueError
        Raised if there are more lenses than objects.
    """
    if not 0 < lens_density <= candidate_density:
        raise ValueError(
            f"There cannot be {lens_density:g} lenses among {candidate_density:g} objects of a square degree."
        )
    others = candidate_density - lens_density

    def precision(t: float, f: float) -> float:
        found = t * lens_density + f * others
        return t * lens_density / found if found > 0 else math.nan

    return SkyYield(
        precision=Fraction(
            precision(tpr.value, fpr.value),
            precision(tpr.low, fpr.high),
            precision(tpr.high, fpr.low),
            tpr.n,
        ),
        lenses=tpr.value * lens_density,
        contaminants=Fraction(fpr.value * others, fpr.low * others, fpr.high * others, fpr.n),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class CompletenessMap:
    """Fraction of lenses that are found, by two of their properties.

    Cells hold their lower edges but not their upper ones.
    """

    x_edges: np.ndarray
    """Edges of the cells in the first property, shape ``(X + 1,)``."""

    y_edges: np.ndarray
    """Edges of the cells in the second property, shape ``(Y + 1,)``."""

    n_found: np.ndarray
    """Number found, shape ``(Y, X)``."""

    n: np.ndarray
    """Number of lenses, shape ``(Y, X)``."""

    @property
    def value(self) -> np.ndarray:
        """Fraction found, shape ``(Y, X)``; NaN without lenses."""
        return self.n_found / np.where(self.n > 0, self.n, np.nan)

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the intervals of Wilson, each of shape ``(Y, X)``."""
        return compute_wilson_interval(self.n_found, self.n)


def compute_completeness_map(
    found: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    *,
    x_edges: Sequence[float] | np.ndarray,
    y_edges: Sequence[float] | np.ndarray,
) -> CompletenessMap:
    """Return the completeness in cells of two properties of lenses.

    Parameters
    ----------
    found
        Whether each lens is found, shape ``(N,)``.
    x, y
        Properties, such as the Einstein radius in arcsec and the signal to
        noise of the arcs, shape ``(N,)``.  Lenses outside all cells, or with
        NaN, do not count.
    x_edges, y_edges
        Edges of the cells, ascending.

    Raises
    ------
    ValueError
        Raised if edges do not ascend.
    """
    edges = [np.asarray(values, dtype=np.float64) for values in (x_edges, y_edges)]
    if any(len(values) < 2 or (np.diff(values) <= 0).any() for values in edges):
        raise ValueError("The edges of cells must be at least two, and ascend.")
    columns, rows = (
        np.searchsorted(edge, np.asarray(values, dtype=np.float64), side="right") - 1
        for edge, values in zip(edges, (x, y), strict=True)
    )
    shape = (len(edges[1]) - 1, len(edges[0]) - 1)
    # NaN sorts behind the last edge.
    inside = (columns >= 0) & (columns < shape[1]) & (rows >= 0) & (rows < shape[0])
    cells = rows[inside] * shape[1] + columns[inside]
    size = math.prod(shape)
    n = np.bincount(cells, minlength=size).reshape(shape)
    n_found = np.bincount(cells[np.asarray(found, dtype=bool)[inside]], minlength=size).reshape(shape)
    return CompletenessMap(x_edges=edges[0], y_edges=edges[1], n_found=n_found, n=n)


def describe_scores(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    einstein_radius: np.ndarray,
    arc_snr: np.ndarray,
    fprs: Sequence[float] = (1e-2, 1e-3),
) -> dict[str, Any]:
    """Return the figures of merit of a lens finder, as types JSON has.

    Parameters
    ----------
    scores
        Scores, shape ``(N,)``.
    labels
        Whether an example is a lens, shape ``(N,)``.
    einstein_radius
        Einstein radius in arcsec of the lenses, shape ``(N,)``.
    arc_snr
        Signal to noise of the arcs, shape ``(N,)``.
    fprs
        False-positive rates.

    Returns
    -------
    figures
        ``n_lenses``, ``n_non_lenses``, ``auroc`` with its standard error,
        and for each rate the true-positive rate with its interval of 95 per
        cent: of all lenses, and of the clear ones, with an Einstein radius
        above `CLEAR_EINSTEIN_RADIUS` and arcs of signal to noise above
        `CLEAR_ARC_SNR`.
    """
    labels = np.asarray(labels, dtype=bool)
    clear = ~labels | (
        (np.asarray(einstein_radius) > CLEAR_EINSTEIN_RADIUS) & (np.asarray(arc_snr) > CLEAR_ARC_SNR)
    )
    figures: dict[str, Any] = {}
    for name, chosen in (("all", np.ones_like(clear)), ("clear", clear)):
        auroc, error = compute_auroc(scores[chosen], labels[chosen])
        figures[name] = {
            "n_lenses": int(labels[chosen].sum()),
            "n_non_lenses": int((~labels[chosen]).sum()),
            "auroc": auroc,
            "auroc_error": error,
        }
        if name == "clear":
            figures[name]["above"] = {"einstein_radius": CLEAR_EINSTEIN_RADIUS, "arc_snr": CLEAR_ARC_SNR}
        for fpr in fprs:
            tpr = compute_tpr_at_fpr(scores[chosen], labels[chosen], fpr)
            figures[name][f"tpr_at_fpr_{fpr:g}"] = [tpr.value, tpr.low, tpr.high]
    return figures

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


"""Figures of merit of a classifier, with their errors."""

from __future__ import annotations

__all__ = ("Fraction", "compute_auroc", "compute_tpr_at_fpr", "describe_scores")

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

CONFIDENCE = 0.95
"""Confidence level of intervals."""


@dataclasses.dataclass(frozen=True)
class Fraction:
    """A fraction of a sample with its confidence interval."""

    value: float
    """The fraction; NaN of an empty sample."""

    low: float
    """Lower end of the interval."""

    high: float
    """Upper end of the interval."""

    n: int
    """Size of the sample."""

    @classmethod
    def from_counts(cls, k: int, n: int) -> Fraction:
        """Make from counts, with the interval of Wilson (1927).

        Parameters
        ----------
        k
            Number of successes.
        n
            Number of trials.
        """
        if n == 0:
            return cls(math.nan, math.nan, math.nan, 0)
        z = norm.ppf(0.5 + CONFIDENCE / 2)
        center = (k + z**2 / 2) / (n + z**2)
        half = z / (n + z**2) * math.sqrt(k * (n - k) / n + z**2 / 4)
        return cls(k / n, max(center - half, 0.0), min(center + half, 1.0), n)


def compute_auroc(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    r"""Return the area under the ROC curve and its standard error.

    The probability that a positive scores higher than a negative, ties
    counting half (Mann & Whitney); error of Hanley & McNeil (1982).

    Parameters
    ----------
    scores
        Scores, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.

    Returns
    -------
    auroc, error
        NaN if either class is empty.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    n1, n0 = int(labels.sum()), int((~labels).sum())
    if n1 == 0 or n0 == 0:
        return math.nan, math.nan
    area = (rankdata(scores)[labels].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (n1 - 1) * (q1 - area**2) + (n0 - 1) * (q2 - area**2)
    return float(area), math.sqrt(max(variance, 0.0) / (n1 * n0))


def compute_tpr_at_fpr(scores: np.ndarray, labels: np.ndarray, fpr: float) -> Fraction:
    """Return the true-positive rate at a false-positive rate.

    At most ``floor(fpr * n)`` of the n negatives score as high as the
    threshold or higher: the threshold is just above the negative that follows
    these.  An ``fpr`` of 0 is TPR0 of Metcalf et al. (2019).

    Parameters
    ----------
    scores
        Scores, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.
    fpr
        False-positive rate, in [0, 1).

    Returns
    -------
    tpr
        The interval is that of the positives; the threshold has the error
        of its false positives as well.  NaN if either class is empty.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    negatives = np.sort(scores[~labels])[::-1]
    if len(negatives) == 0:
        return Fraction(math.nan, math.nan, math.nan, int(labels.sum()))
    threshold = negatives[min(int(fpr * len(negatives) + 1e-9), len(negatives) - 1)]
    return Fraction.from_counts(int((scores[labels] > threshold).sum()), int(labels.sum()))


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
        above 1 arcsec and arcs of signal to noise above 20.
    """
    labels = np.asarray(labels, dtype=bool)
    clear = ~labels | ((np.asarray(einstein_radius) > 1.0) & (np.asarray(arc_snr) > 20.0))
    figures: dict[str, Any] = {}
    for name, chosen in (("all", np.ones_like(clear)), ("clear", clear)):
        auroc, error = compute_auroc(scores[chosen], labels[chosen])
        figures[name] = {
            "n_lenses": int(labels[chosen].sum()),
            "n_non_lenses": int((~labels[chosen]).sum()),
            "auroc": auroc,
            "auroc_error": error,
        }
        for fpr in fprs:
            tpr = compute_tpr_at_fpr(scores[chosen], labels[chosen], fpr)
            figures[name][f"tpr_at_fpr_{fpr:g}"] = [tpr.value, tpr.low, tpr.high]
    return figures

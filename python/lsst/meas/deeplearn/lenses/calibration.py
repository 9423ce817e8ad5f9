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

"""How good predicted probabilities are.

Probabilities come from scores by `.likelihood_ratio.ScoreCalibration` and the
fraction of lenses among the objects at hand.
"""

from __future__ import annotations

__all__ = (
    "Reliability",
    "compute_brier_score",
    "compute_calibration_error",
    "compute_calibration_noise",
    "compute_log_loss",
    "compute_reliability",
)

import dataclasses
import math

import numpy as np
from scipy.special import xlog1py, xlogy

from ..metrics import check_scores, compute_wilson_interval


@dataclasses.dataclass(frozen=True, eq=False)
class Reliability:
    """Fraction of positives against what was predicted, in bins."""

    predicted: np.ndarray
    """Mean predicted probability of each bin, shape ``(B,)``; NaN where it
    is empty."""

    observed: np.ndarray
    """Fraction of positives, shape ``(B,)``; NaN where it is empty."""

    low: np.ndarray
    """Lower ends of the intervals of Wilson, shape ``(B,)``."""

    high: np.ndarray
    """Upper ends, shape ``(B,)``."""

    n: np.ndarray
    """Number of examples, shape ``(B,)``."""


def compute_reliability(probabilities: np.ndarray, labels: np.ndarray, *, n_bins: int = 10) -> Reliability:
    """Return the reliability diagram of predicted probabilities.

    Parameters
    ----------
    probabilities
        Predicted probabilities of being positive, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.
    n_bins
        Number of bins of equal width from 0 to 1.

    Raises
    ------
    ValueError
        Raised if shapes differ, or for a probability that is none.
    """
    probabilities, labels = _check_probabilities(probabilities, labels)
    bins = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    n = np.bincount(bins, minlength=n_bins)
    k = np.bincount(bins, weights=labels, minlength=n_bins)
    filled = np.where(n > 0, n, np.nan)
    low, high = compute_wilson_interval(k, n)
    predicted = np.bincount(bins, weights=probabilities, minlength=n_bins) / filled
    return Reliability(predicted=predicted, observed=k / filled, low=low, high=high, n=n)


def compute_calibration_error(probabilities: np.ndarray, labels: np.ndarray, *, n_bins: int = 10) -> float:
    """Return the expected calibration error.

    The mean distance between prediction and observation over the bins of
    `compute_reliability`, weighted by their sizes (Naeini et al. 2015; Guo
    et al. 2017, arXiv:1706.04599, equation 3).  Of perfect probabilities it
    is not 0 but what `compute_calibration_noise` returns.

    Parameters
    ----------
    probabilities
        Predicted probabilities of being positive, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.
    n_bins
        Number of bins of equal width from 0 to 1.

    Returns
    -------
    error
        NaN without examples.
    """
    reliability = compute_reliability(probabilities, labels, n_bins=n_bins)
    if not (total := reliability.n.sum()):
        return math.nan
    distance = np.abs(reliability.observed - reliability.predicted)
    return float(np.nansum(distance * reliability.n) / total)


def compute_calibration_noise(probabilities: np.ndarray, *, n_bins: int = 10) -> float:
    """Return the mean calibration error of perfect probabilities.

    In each bin of `compute_calibration_error` the number of positives then
    scatters by the square root of the sum of p (1 - p), and its mean distance
    from what is expected is that times the square root of 2 / pi, if normal.

    Parameters
    ----------
    probabilities
        Predicted probabilities of being positive, shape ``(N,)``.
    n_bins
        Number of bins of equal width from 0 to 1.

    Returns
    -------
    error
        NaN without examples.
    """
    probabilities, _ = _check_probabilities(probabilities, np.zeros(len(probabilities), dtype=bool))
    if not len(probabilities):
        return math.nan
    bins = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    variance = np.bincount(bins, weights=probabilities * (1 - probabilities))
    return float(np.sqrt(2 / np.pi * variance).sum() / len(probabilities))


def compute_brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared error of probabilities (Brier 1950).

    Parameters
    ----------
    probabilities
        Predicted probabilities of being positive, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.

    Returns
    -------
    score
        From 0, the best, to 1; NaN without examples.
    """
    probabilities, labels = _check_probabilities(probabilities, labels)
    return float(np.mean((probabilities - labels) ** 2)) if len(labels) else math.nan


def compute_log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean negative logarithm of the probability of the truth.

    Parameters
    ----------
    probabilities
        Predicted probabilities of being positive, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.

    Returns
    -------
    loss
        From 0, the best, to infinity, which is the price of a certainty that
        is wrong; NaN without examples.
    """
    probabilities, labels = _check_probabilities(probabilities, labels)
    if not len(labels):
        return math.nan
    return float(-np.mean(xlogy(labels, probabilities) + xlog1py(1.0 - labels, -probabilities)))


def _check_probabilities(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = check_scores(probabilities, labels)
    if ((probabilities < 0) | (probabilities > 1)).any():
        raise ValueError("Probabilities are from 0 to 1; these are not.  Logits must be calibrated first.")
    return probabilities, labels

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

"""Probabilities from scores: calibration, and how good it is.

The output of a network is not the probability of a lens: it is fitted to a
sample in which lenses are not rare, and often overconfident.  A calibration is
fitted to examples that the network was not trained on, and is a dict of
types that JSON has, so that it can go into the record of a model package.
"""

from __future__ import annotations

__all__ = (
    "Reliability",
    "apply_calibration",
    "compute_brier_score",
    "compute_calibration_error",
    "compute_log_loss",
    "compute_reliability",
    "fit_isotonic",
    "fit_platt",
    "shift_prior",
)

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, log_expit, logit, xlog1py, xlogy

from .metrics import check_classes, check_scores, compute_wilson_interval


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
    r"""Return the expected calibration error.

    The mean distance between prediction and observation over the bins of
    `compute_reliability`, weighted by their sizes (Naeini et al. 2015; Guo
    et al. 2017, arXiv:1706.04599, equation 3).  Of a perfect classifier it is
    not 0 but up to :math:`0.4 \sqrt{B / N}` for B bins of N examples, by
    their noise.

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


def fit_platt(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    r"""Fit a calibration that is a logistic function of the score.

    :math:`p = 1 / (1 + \exp(-a s - b))`, by maximum likelihood with the
    targets of Platt (1999), :math:`(n_1 + 1) / (n_1 + 2)` and
    :math:`1 / (n_0 + 2)`, so that classes that are apart give finite slopes.

    Parameters
    ----------
    scores
        Scores of examples that the classifier was not trained on, shape
        ``(N,)``; logits rather than probabilities.
    labels
        Whether an example is positive, shape ``(N,)``.

    Returns
    -------
    calibration
        For `apply_calibration`; types that JSON has.

    Raises
    ------
    ValueError
        Raised if scores are NaN or a class is empty.
    """
    scores, labels = check_scores(scores, labels)
    n1, n0 = check_classes(labels)
    target = np.where(labels, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    center, scale = scores.mean(), scores.std() or 1.0
    x = (scores - center) / scale

    def compute_loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters[0] * x + parameters[1]
        residual = expit(z) - target
        loss = -(target * log_expit(z) + (1 - target) * log_expit(-z)).mean()
        return loss, np.array([(residual * x).mean(), residual.mean()])

    slope, intercept = minimize(compute_loss, np.array([1.0, 0.0]), jac=True, method="BFGS").x
    return {
        "method": "platt",
        "slope": float(slope / scale),
        "intercept": float(intercept - slope * center / scale),
        "prevalence": n1 / (n1 + n0),
        "n": n1 + n0,
    }


def fit_isotonic(scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Fit a calibration that is any ascending function of the score.

    Isotonic regression (Zadrozny & Elkan 2002).  Certainty is not for sale:
    probabilities stay between 1 / (n + 2) and (n + 1) / (n + 2).

    Parameters
    ----------
    scores
        Scores of examples that the classifier was not trained on, shape
        ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.

    Returns
    -------
    calibration
        For `apply_calibration`; types that JSON has.

    Raises
    ------
    ValueError
        Raised if scores are NaN or infinite, or a class is empty.
    """
    scores, labels = check_scores(scores, labels)
    n1, n0 = check_classes(labels)
    if not np.isfinite(scores).all():
        raise ValueError("An isotonic calibration needs finite scores.")
    # Equal scores have one probability.
    values, inverse = np.unique(scores, return_inverse=True)
    weights = np.bincount(inverse)
    mean = np.bincount(inverse, weights=labels) / weights
    fit = isotonic_regression(mean, weights=weights)
    # The ends of each step.
    first, last = fit.blocks[:-1], fit.blocks[1:] - 1
    knots = np.unique(np.concatenate([first, last]))
    n = n1 + n0
    return {
        "method": "isotonic",
        "scores": values[knots].astype(float).tolist(),
        "probabilities": np.clip(fit.x[knots], 1 / (n + 2), (n + 1) / (n + 2)).tolist(),
        "prevalence": n1 / n,
        "n": n,
    }


def apply_calibration(
    calibration: Mapping[str, Any], scores: np.ndarray, *, prevalence: float | None = None
) -> np.ndarray:
    """Return calibrated probabilities.

    Parameters
    ----------
    calibration
        What `fit_platt` or `fit_isotonic` returned, or that read back from
        JSON.
    scores
        Scores of the same classifier, shape ``(N,)``.
    prevalence
        Fraction of positives among the objects at hand, such as that of
        lenses on the sky; that of the examples of the fit by default.

    Returns
    -------
    probabilities
        NaN for scores of NaN.

    Raises
    ------
    ValueError
        Raised for an unknown method.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if calibration["method"] == "platt":
        probabilities = expit(calibration["slope"] * scores + calibration["intercept"])
    elif calibration["method"] == "isotonic":
        probabilities = np.interp(scores, calibration["scores"], calibration["probabilities"])
    else:
        raise ValueError(f"There is no calibration {calibration['method']!r}; there are platt and isotonic.")
    if prevalence is None:
        return np.asarray(probabilities)
    return shift_prior(probabilities, calibration["prevalence"], prevalence)


def shift_prior(probabilities: np.ndarray, prevalence: float, new_prevalence: float) -> np.ndarray:
    """Return probabilities for another fraction of positives.

    Odds are multiplied by the ratio of the prior odds (Saerens et al. 2002,
    Neural Computation 14, 21, equation 4), which holds if each class looks
    the same in both samples.

    Parameters
    ----------
    probabilities
        Probabilities, shape ``(N,)``.
    prevalence
        Fraction of positives for which they hold, in (0, 1).
    new_prevalence
        Fraction of positives for which they are wanted, in (0, 1).

    Raises
    ------
    ValueError
        Raised if a prevalence is not between 0 and 1.
    """
    if not (0 < prevalence < 1 and 0 < new_prevalence < 1):
        raise ValueError(f"Prevalences of {prevalence} and {new_prevalence} leave nothing to decide.")
    with np.errstate(divide="ignore"):
        return np.asarray(expit(logit(probabilities) + logit(new_prevalence) - logit(prevalence)))


def _check_probabilities(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = check_scores(probabilities, labels)
    if ((probabilities < 0) | (probabilities > 1)).any():
        raise ValueError("Probabilities are from 0 to 1; these are not.  Logits must be calibrated first.")
    return probabilities, labels

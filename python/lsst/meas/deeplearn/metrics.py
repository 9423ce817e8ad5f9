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

"""Figures of merit of a classifier, with their errors.

Scores are numbers of any scale, higher for what looks more like a positive;
labels say what is one.  Nothing here knows images, networks or files.
Intervals have the confidence level `CONFIDENCE`.
"""

from __future__ import annotations

__all__ = (
    "Fraction",
    "OperatingPoint",
    "RocCurve",
    "check_classes",
    "check_scores",
    "compute_auroc",
    "compute_auroc_difference",
    "compute_auroc_interval",
    "compute_operating_point",
    "compute_roc",
    "compute_tpr_at_fpr",
    "compute_wilson_interval",
    "describe_fpr_limit",
)

import dataclasses
import math

import numpy as np
from scipy.stats import norm, rankdata

CONFIDENCE = 0.95
"""Confidence level of intervals."""

N_BOOTSTRAP = 4000
"""Samples of a bootstrap."""

FPR_PRECISION = 0.1
"""Relative error of a false-positive rate that counts as well measured."""


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
        low, high = compute_wilson_interval(np.array(k), np.array(n))
        return cls(k / n if n else math.nan, float(low), float(high), n)


def compute_wilson_interval(k: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Return the confidence intervals of fractions.

    Those of Wilson (1927, J. Am. Stat. Assoc. 22, 209),

    .. math:: \frac{k + z^2/2 \pm z\sqrt{k (n - k) / n + z^2 / 4}}{n + z^2},

    which hold for few trials and for fractions of 0 and 1 as well.

    Parameters
    ----------
    k
        Numbers of successes.
    n
        Numbers of trials, of the same shape.

    Returns
    -------
    low, high
        Ends of the intervals; NaN where there are no trials.
    """
    z = norm.ppf(0.5 + CONFIDENCE / 2)
    k, n = np.asarray(k, dtype=np.float64), np.where(np.asarray(n) > 0, n, np.nan)
    center = (k + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(k * (n - k) / n + z**2 / 4)
    # Rounding leaves something of 0 and 1.
    low, high = np.where(k == 0, 0.0, center - half), np.where(k == n, 1.0, center + half)
    return np.where(np.isnan(n), np.nan, low), np.where(np.isnan(n), np.nan, high)


# The ROC curve


@dataclasses.dataclass(frozen=True, eq=False)
class RocCurve:
    """Rates of true and false positives for all thresholds."""

    fpr: np.ndarray
    """False-positive rates, ascending from 0 to 1, shape ``(T,)``; NaN
    without negatives."""

    tpr: np.ndarray
    """True-positive rates, shape ``(T,)``; NaN without positives."""

    threshold: np.ndarray
    """Scores from which on examples count as positive, descending from
    infinity, shape ``(T,)``."""

    n_positive: int
    """Number of positives."""

    n_negative: int
    """Number of negatives."""

    def compute_precision(self, prevalence: float) -> np.ndarray:
        """Return the precision at each threshold.

        Parameters
        ----------
        prevalence
            Fraction of positives among the objects of the sky, which is not
            that of the test set.

        Returns
        -------
        precision
            Fraction of true positives among all positives, shape ``(T,)``;
            NaN where there are none.
        """
        with np.errstate(invalid="ignore"):
            true = self.tpr * prevalence
            return np.asarray(true / (true + self.fpr * (1 - prevalence)))


def compute_roc(scores: np.ndarray, labels: np.ndarray) -> RocCurve:
    """Return the receiver operating characteristic.

    There is a point for each distinct score: examples of equal score pass a
    threshold together, so ties never help.

    Parameters
    ----------
    scores
        Scores, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.

    Returns
    -------
    roc
        The curve, with ends at (0, 0) and (1, 1).

    Raises
    ------
    ValueError
        Raised if shapes differ or scores are NaN.
    """
    scores, labels = check_scores(scores, labels)
    order = np.argsort(-scores, kind="stable")
    ordered, positive = scores[order], labels[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True)[: len(ordered)])
    n1, n0 = int(labels.sum()), int((~labels).sum())
    with np.errstate(invalid="ignore"):
        tpr = np.concatenate([[0], np.cumsum(positive)[last]]) / np.float64(n1)
        fpr = np.concatenate([[0], np.cumsum(~positive)[last]]) / np.float64(n0)
    threshold = np.concatenate([[np.inf], ordered[last]])
    return RocCurve(fpr=fpr, tpr=tpr, threshold=threshold, n_positive=n1, n_negative=n0)


def compute_auroc(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    r"""Return the area under the ROC curve and its standard error.

    The probability that a positive scores higher than a negative, ties
    counting half (Mann & Whitney); error of DeLong, DeLong & Clarke-Pearson
    (1988, Biometrics 44, 837) by the midranks of Sun & Xu (2014).

    Parameters
    ----------
    scores
        Scores, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.

    Returns
    -------
    auroc, error
        NaN if either class is empty; the error is NaN if one has a single
        member, and 0 if the classes are apart.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    if labels.all() or not labels.any():
        return math.nan, math.nan
    positive, negative = _compute_placements(scores, labels)
    if min(len(positive), len(negative)) < 2:
        return float(positive.mean()), math.nan
    variance = positive.var(ddof=1) / len(positive) + negative.var(ddof=1) / len(negative)
    return float(positive.mean()), math.sqrt(variance)


def compute_auroc_interval(scores: np.ndarray, labels: np.ndarray) -> Fraction:
    """Return the area under the ROC curve and its confidence interval.

    Parameters
    ----------
    scores
        Scores, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.

    Returns
    -------
    auroc
        The interval is normal, cut off at 0 and 1; where the classes are
        apart, it is that of Wilson for as many trials as the smaller class
        has members.  NaN if either class is empty, and ends of NaN if one has
        a single member.
    """
    labels = np.asarray(labels, dtype=bool)
    auroc, error = compute_auroc(scores, labels)
    smaller = int(min(labels.sum(), (~labels).sum()))
    if auroc in (0.0, 1.0):
        return Fraction.from_counts(round(auroc * smaller), smaller)
    half = float(norm.ppf(0.5 + CONFIDENCE / 2)) * error
    if math.isnan(half):
        return Fraction(auroc, math.nan, math.nan, smaller)
    return Fraction(auroc, max(auroc - half, 0.0), min(auroc + half, 1.0), smaller)


def compute_auroc_difference(
    scores: np.ndarray, others: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """Return how much larger one AUROC is than another, and the error.

    Both classifiers have seen the same examples, so that much of the error
    of each is common to both (DeLong et al. 1988).

    Parameters
    ----------
    scores, others
        Scores of either classifier, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.

    Returns
    -------
    difference, error
        NaN if either class has less than two members.
    """
    labels = np.asarray(labels, dtype=bool)
    if min(labels.sum(), (~labels).sum()) < 2:
        return math.nan, math.nan
    one, other = (
        _compute_placements(np.asarray(scores), labels),
        _compute_placements(np.asarray(others), labels),
    )
    differences = [a - b for a, b in zip(one, other, strict=True)]
    variance = sum(values.var(ddof=1) / len(values) for values in differences)
    return float(differences[0].mean()), math.sqrt(variance)


def _compute_placements(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the fraction of negatives below each positive, and the fraction
    of positives above each negative, ties counting half.
    """
    ranks = rankdata(scores)
    n1, n0 = labels.sum(), (~labels).sum()
    positive = (ranks[labels] - rankdata(scores[labels])) / n0
    negative = 1 - (ranks[~labels] - rankdata(scores[~labels])) / n1
    return positive, negative


# Operating points


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """What a classifier does at a threshold."""

    threshold: float
    """Examples that score higher count as positive."""

    tpr: Fraction
    """True-positive rate.  The interval contains both that of Wilson for the
    positives and that of a bootstrap of positives and negatives, which moves
    the threshold."""

    fpr: Fraction
    """False-positive rate at the threshold, with the interval of Wilson."""

    limit: str
    """What the number of negatives does not allow, as `describe_fpr_limit`
    says it; empty if there are enough."""


def compute_operating_point(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    fpr: float | None = None,
    false_positives: int | None = None,
    seed: int = 1,
) -> OperatingPoint:
    r"""Return the true-positive rate at a rate or number of false positives.

    The threshold is the negative with the (k + 1)-th highest score: the k
    above it are the false positives.  In a bootstrap of n negatives its rank
    is that of the same order statistic of n uniform numbers, so that it is
    drawn as :math:`\lfloor n u \rfloor` with u from Beta(k + 1, n - k), and
    the number of positives above it from a binomial distribution; this is
    the stratified bootstrap without its cost.

    Parameters
    ----------
    scores
        Scores, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.
    fpr
        False-positive rate, in [0, 1); :math:`k = \lfloor n f \rfloor`.
    false_positives
        Largest number k of false positives, instead of ``fpr``.  0 is TPR0
        of Metcalf et al. (2019, A&A 625, A119), the highest rate before any
        false positive; 9 is their TPR10, that with less than ten.  Both are
        defined for their test sets of 100,000: in a set of other size they
        are other rates.
    seed
        Seed of the bootstrap.

    Returns
    -------
    point
        All rates are NaN if either class is empty.

    Raises
    ------
    ValueError
        Raised if shapes differ or scores are NaN, or if not exactly one of
        ``fpr`` and ``false_positives`` is given.
    """
    scores, labels = check_scores(scores, labels)
    positives, negatives = scores[labels], np.sort(scores[~labels])[::-1]
    n1, n0 = len(positives), len(negatives)
    if (fpr is None) == (false_positives is None):
        raise ValueError("Give either a false-positive rate or a number of false positives.")
    if fpr is not None:
        k, limit = int(fpr * n0 + 1e-9), describe_fpr_limit(fpr, n0)
    else:
        assert false_positives is not None
        k, limit = false_positives, ""
    if n0 == 0:
        empty = Fraction.from_counts(0, 0)
        return OperatingPoint(math.nan, dataclasses.replace(empty, n=n1), empty, limit)
    k = min(k, n0 - 1)
    threshold = negatives[k]
    above = int((positives > threshold).sum())
    tpr = Fraction.from_counts(above, n1)
    if n1:
        rng = np.random.default_rng(seed)
        rank = np.minimum((n0 * rng.beta(k + 1, n0 - k, N_BOOTSTRAP)).astype(int), n0 - 1)
        rate = 1 - np.searchsorted(np.sort(positives), negatives[rank], side="right") / n1
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(rng.binomial(n1, rate) / n1, [tail, 1 - tail])
        tpr = Fraction(tpr.value, min(tpr.low, float(low)), max(tpr.high, float(high)), n1)
    return OperatingPoint(
        float(threshold), tpr, Fraction.from_counts(int((negatives > threshold).sum()), n0), limit
    )


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
        The interval is that of `OperatingPoint`.  NaN if either class is
        empty.
    """
    return compute_operating_point(scores, labels, fpr=fpr).tpr


def describe_fpr_limit(fpr: float, n_negative: int) -> str:
    r"""Say whether there are enough negatives for a false-positive rate.

    The number of false positives is a Poisson variable, so that f is known
    to a relative error of :math:`1 / \sqrt{f n}` with n negatives.

    Parameters
    ----------
    fpr
        The false-positive rate.
    n_negative
        The number of negatives.

    Returns
    -------
    limit
        A sentence, or nothing if the error is at most `FPR_PRECISION`.
    """
    if fpr <= 0:
        return ""
    needed = round(1 / (fpr * FPR_PRECISION**2))
    if n_negative >= needed:
        return ""
    text = f"FPR {fpr:g} needs {needed:.3g} negatives for {FPR_PRECISION:.0%}; you have {n_negative:.3g}"
    if fpr * n_negative < 1:
        return f"{text}, less than one of which is a false positive: this is the rate at none."
    return f"{text}, which give it to {1 / math.sqrt(fpr * n_negative):.0%}."


def check_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores as float64 and labels as bool.

    Parameters
    ----------
    scores
        Scores, shape ``(N,)``.
    labels
        Whether an example is positive, shape ``(N,)``.

    Raises
    ------
    ValueError
        Raised if shapes differ or scores are NaN.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"Scores of shape {scores.shape} do not fit labels of shape {labels.shape}.")
    if n_bad := int(np.isnan(scores).sum()):
        raise ValueError(f"{n_bad} of {len(scores)} scores are NaN; leave them out, and say how many.")
    return scores, labels


def check_classes(labels: np.ndarray) -> tuple[int, int]:
    """Return the numbers of positives and negatives.

    Parameters
    ----------
    labels
        Whether an example is positive, bool, shape ``(N,)``.

    Raises
    ------
    ValueError
        Raised if there are none of either.
    """
    n1, n0 = int(labels.sum()), int((~labels).sum())
    if n1 == 0 or n0 == 0:
        raise ValueError(f"Both classes are needed, but there are {n1} positives and {n0} negatives.")
    return n1, n0

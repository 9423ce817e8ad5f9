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

Scores are numbers of any scale, higher for what looks more like a lens;
labels say what is one.  Nothing here knows images, networks or files.
Intervals have the confidence level `CONFIDENCE`.
"""

from __future__ import annotations

__all__ = (
    "CompletenessMap",
    "Fraction",
    "LogisticModel",
    "OperatingPoint",
    "RocCurve",
    "SkyYield",
    "check_classes",
    "check_scores",
    "compute_auroc",
    "compute_auroc_difference",
    "compute_auroc_interval",
    "compute_completeness_map",
    "compute_operating_point",
    "compute_probe_auroc",
    "compute_roc",
    "compute_sky_yield",
    "compute_tpr_at_fpr",
    "compute_wilson_interval",
    "describe_fpr_limit",
    "describe_scores",
    "fit_logistic",
)

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit
from scipy.stats import norm, rankdata

CONFIDENCE = 0.95
"""Confidence level of intervals."""

N_BOOTSTRAP = 4000
"""Samples of a bootstrap."""

FPR_PRECISION = 0.1
"""Relative error of a false-positive rate that counts as well measured."""

LENS_DENSITY = 2.1
"""Lenses per square degree that LSST can find in its best single exposures
(Collett 2015, ApJ 811, 20, with LensPop)."""

CANDIDATE_DENSITY = 1e4
"""Galaxies per square degree that a lens finder looks at, of the order of
those bright enough to be lenses."""


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


# Completeness


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


# Logistic regression, for baselines and probes


@dataclasses.dataclass(frozen=True, eq=False)
class LogisticModel:
    """A logistic regression."""

    mean: np.ndarray
    """Values subtracted from the features, shape ``(F,)``."""

    scale: np.ndarray
    """Values that divide them then, shape ``(F,)``."""

    weights: np.ndarray
    """Weights of the scaled features, shape ``(F,)``."""

    intercept: float
    """What is added to their sum."""

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the logits of examples, shape ``(N,)``.

        Parameters
        ----------
        features
            Shape ``(N, F)``.
        """
        return np.asarray(((features - self.mean) / self.scale) @ self.weights + self.intercept)


def fit_logistic(features: np.ndarray, labels: np.ndarray, *, penalty: float = 1e-3) -> LogisticModel:
    r"""Fit a logistic regression to scaled features.

    The mean negative log-likelihood, with both classes of equal weight, plus
    :math:`\lambda |w|^2 / 2` is smallest; features are scaled to zero mean
    and unit variance first.

    Parameters
    ----------
    features
        Shape ``(N, F)``.
    labels
        Whether an example is positive, shape ``(N,)``.
    penalty
        The :math:`\lambda` of ridge regression.

    Raises
    ------
    ValueError
        Raised if features are not finite or a class is empty.
    """
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=bool)
    n1, n0 = check_classes(labels)
    if not np.isfinite(features).all():
        raise ValueError("Features must be finite.")
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    x = (features - mean) / scale
    share = np.where(labels, 0.5 / n1, 0.5 / n0)

    def compute_loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, intercept = parameters[:-1], parameters[-1]
        z = x @ weights + intercept
        residual = share * (expit(z) - labels)
        loss = -(share * log_expit(np.where(labels, z, -z))).sum() + penalty / 2 * (weights @ weights)
        return loss, np.append(residual @ x + penalty * weights, residual.sum())

    start = np.zeros(x.shape[1] + 1)
    best = minimize(compute_loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return LogisticModel(mean=mean, scale=scale, weights=best[:-1], intercept=float(best[-1]))


def compute_probe_auroc(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    n_folds: int = 5,
    penalty: float = 1e-2,
    seed: int = 1,
) -> tuple[float, float]:
    """Return how well a linear classifier tells two samples apart.

    A logistic regression is fitted to all folds but one and tried on that
    one, in turn.  0.5 means that nothing linear in the features does.

    Parameters
    ----------
    features
        Shape ``(N, F)``.
    labels
        Which sample each example is of, shape ``(N,)``.
    groups
        Examples of the same group go into the same fold, such as stamps of
        the same galaxy; shape ``(N,)``.  None are by default.
    n_folds
        Number of folds; less if there are less groups.
    penalty
        Of `fit_logistic`.
    seed
        Seed of the folds.

    Returns
    -------
    auroc, error
        Mean over the folds and its standard error, the larger of what those
        of the folds and the scatter between them say.  NaN if no fold has
        both samples on either side.

    Raises
    ------
    ValueError
        Raised if features are not finite.
    """
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=bool)
    _, group = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    n_groups = int(group.max(initial=-1)) + 1
    n_folds = min(n_folds, n_groups)
    fold = (np.random.default_rng(seed).permutation(n_groups) % max(n_folds, 1))[group]
    areas, errors = [], []
    for k in range(n_folds):
        train, test = fold != k, fold == k
        if any(labels[part].all() or not labels[part].any() for part in (train, test)):
            continue
        model = fit_logistic(features[train], labels[train], penalty=penalty)
        area, error = compute_auroc(model.predict(features[test]), labels[test])
        areas.append(area)
        errors.append(error)
    if not areas:
        return math.nan, math.nan
    error = math.sqrt(np.sum(np.square(errors))) / len(errors)
    # Examples of one group are not independent.
    scatter = float(np.std(areas, ddof=1)) / math.sqrt(len(areas)) if len(areas) > 1 else 0.0
    return float(np.mean(areas)), max(error, scatter)


# The summary of the training


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

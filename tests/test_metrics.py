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


"""Tests of the figures of merit, against hand-computed and independent
answers.
"""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from lsst.meas.deeplearn import metrics
from lsst.meas.deeplearn.lenses import calibration, completeness, logistic_regression
from lsst.meas.deeplearn.lenses.likelihood_ratio import ScoreCalibration
from lsst.meas.deeplearn.metrics import Fraction

HAND_SCORES = np.array([0.1, 0.4, 0.35, 0.8])
HAND_LABELS = np.array([False, False, True, True])
"""The example of the manual of scikit-learn: AUROC 0.75."""


def make_scores(
    n_positive: int = 300, n_negative: int = 500, *, separation: float = 1.5, decimals: int = 1, seed: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores with many ties, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n_positive + n_negative) < n_positive)
    return np.round(rng.normal(separation * labels, 1.0), decimals), labels


def compute_pair_probability(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the AUROC by comparing all pairs."""
    difference = scores[labels][:, None] - scores[~labels][None, :]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


# The ROC curve


def test_roc_by_hand() -> None:
    """Four scores give the five points that one counts on paper."""
    roc = metrics.compute_roc(HAND_SCORES, HAND_LABELS)
    np.testing.assert_allclose(roc.fpr, [0, 0, 0.5, 0.5, 1])
    np.testing.assert_allclose(roc.tpr, [0, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(roc.threshold, [np.inf, 0.8, 0.4, 0.35, 0.1])
    assert (roc.n_positive, roc.n_negative) == (2, 2)


def test_roc_ties_move_together() -> None:
    """Examples of equal score pass a threshold together."""
    roc = metrics.compute_roc(np.array([1.0, 1.0, 1.0, 0.0]), np.array([True, False, True, False]))
    np.testing.assert_allclose(roc.fpr, [0, 0.5, 1])
    np.testing.assert_allclose(roc.tpr, [0, 1, 1])


@pytest.mark.parametrize("labels", [np.ones(3, dtype=bool), np.zeros(3, dtype=bool)])
def test_empty_class(labels: np.ndarray) -> None:
    """Rates of a class that is empty are NaN, the others hold."""
    scores = np.array([0.1, 0.2, 0.3])
    roc = metrics.compute_roc(scores, labels)
    empty, full = (roc.fpr, roc.tpr) if labels.all() else (roc.tpr, roc.fpr)
    assert np.isnan(empty).all()
    np.testing.assert_allclose(full, [0, 1 / 3, 2 / 3, 1])
    assert all(math.isnan(value) for value in metrics.compute_auroc(scores, labels))
    point = metrics.compute_operating_point(scores, labels, fpr=0.1)
    assert math.isnan(point.tpr.value)
    assert point.tpr.n == labels.sum()


def test_no_examples() -> None:
    """Nothing in, NaN out."""
    scores, labels = np.empty(0), np.empty(0, dtype=bool)
    assert len(metrics.compute_roc(scores, labels).fpr) == 1
    assert math.isnan(calibration.compute_brier_score(scores, labels))
    assert math.isnan(calibration.compute_log_loss(scores, labels))
    assert math.isnan(calibration.compute_calibration_error(scores, labels))
    assert math.isnan(calibration.compute_calibration_noise(scores))


def test_error_of_perfect_probabilities() -> None:
    """What chance alone makes of the calibration error is foretold."""
    rng = np.random.default_rng(4)
    p = rng.beta(0.4, 0.6, 1000)
    errors = [calibration.compute_calibration_error(p, rng.random(1000) < p) for _ in range(400)]
    assert calibration.compute_calibration_noise(p) == pytest.approx(np.mean(errors), rel=0.03)


def test_nan_scores_are_refused() -> None:
    """NaN is neither high nor low, so it must be left out first."""
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        metrics.compute_roc(np.array([0.5, np.nan]), np.array([True, False]))
    with pytest.raises(ValueError, match="do not fit"):
        metrics.compute_roc(np.array([0.5]), np.array([True, False]))


def test_auroc_with_ties_is_that_of_all_pairs() -> None:
    """Ties count half; the area is that under the curve."""
    scores, labels = make_scores()
    assert len(np.unique(scores)) < 100
    auroc, _ = metrics.compute_auroc(scores, labels)
    roc = metrics.compute_roc(scores, labels)
    assert auroc == pytest.approx(compute_pair_probability(scores, labels), abs=1e-12)
    assert auroc == pytest.approx(np.trapezoid(roc.tpr, roc.fpr), abs=1e-12)
    assert metrics.compute_auroc(HAND_SCORES, HAND_LABELS)[0] == 0.75


def test_against_scikit_learn() -> None:
    """The ROC, losses and calibrations are those of scikit-learn."""
    sk = pytest.importorskip("sklearn.metrics")
    from sklearn.isotonic import IsotonicRegression

    scores, labels = make_scores()
    fpr, tpr, threshold = sk.roc_curve(labels, scores, drop_intermediate=False)
    roc = metrics.compute_roc(scores, labels)
    np.testing.assert_allclose(roc.fpr, fpr, atol=1e-12)
    np.testing.assert_allclose(roc.tpr, tpr, atol=1e-12)
    np.testing.assert_allclose(roc.threshold, threshold)
    assert metrics.compute_auroc(scores, labels)[0] == pytest.approx(sk.roc_auc_score(labels, scores))
    probabilities = 1 / (1 + np.exp(-scores))
    assert calibration.compute_log_loss(probabilities, labels) == pytest.approx(
        sk.log_loss(labels, probabilities)
    )
    assert calibration.compute_brier_score(probabilities, labels) == pytest.approx(
        sk.brier_score_loss(labels, probabilities)
    )
    fitted = ScoreCalibration.from_scores(scores, labels, min_count=0)
    fraction = fitted.n_lens / (fitted.n_lens + fitted.n_not)
    expected = IsotonicRegression().fit_transform(scores, labels)
    np.testing.assert_allclose(fraction[fitted.find_bins(scores)], expected, atol=1e-12)


def test_auroc_error_by_hand() -> None:
    """DeLong's variance is that of the fractions of pairs that one counts."""
    # Of the positives 1 and 2 of 3 negatives are below; of the negatives
    # none, one and both of the positives above... the fractions are these.
    scores, labels = np.array([0.0, 2.0, 4.0, 1.0, 3.0]), np.array([False, False, False, True, True])
    auroc, error = metrics.compute_auroc(scores, labels)
    assert auroc == 0.5
    variance = np.var([1 / 3, 2 / 3], ddof=1) / 2 + np.var([1, 0.5, 0], ddof=1) / 3
    assert error == pytest.approx(math.sqrt(variance))


def test_auroc_error_is_the_scatter() -> None:
    """Over repeated samples the area scatters as much as its error says."""
    results = [metrics.compute_auroc(*make_scores(80, 120, seed=seed)) for seed in range(300)]
    areas, errors = np.array(results).T
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.12)


def test_auroc_interval() -> None:
    """Classes that are apart leave room for doubt, and few examples more."""
    scores, labels = make_scores()
    found, (auroc, error) = (
        metrics.compute_auroc_interval(scores, labels),
        metrics.compute_auroc(scores, labels),
    )
    assert (found.value, found.low) == (auroc, pytest.approx(auroc - 1.96 * error, abs=1e-4))
    apart = metrics.compute_auroc_interval(np.arange(30.0), np.arange(30) >= 20)
    assert (apart.value, apart.high) == (1.0, 1.0)
    assert apart.low == Fraction.from_counts(10, 10).low
    assert metrics.compute_auroc_interval(-np.arange(30.0), np.arange(30) >= 20).high < 0.3
    one = metrics.compute_auroc_interval(np.array([1.0, 0.0, 2.0]), np.array([True, False, False]))
    assert one.value == 0.5
    assert math.isnan(one.low)


def test_auroc_difference() -> None:
    """Classifiers that share their noise differ by less than their errors."""
    rng = np.random.default_rng(3)
    differences = []
    for _ in range(200):
        labels = rng.random(300) < 0.4
        common = rng.normal(labels, 1.0)
        one, other = common + 0.3 * rng.normal(size=300), common + 0.3 * rng.normal(size=300)
        differences.append(metrics.compute_auroc_difference(one, other, labels))
    values, errors = np.array(differences).T
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)
    assert np.mean(errors) == pytest.approx(values.std(), rel=0.15)
    assert np.mean(errors) < 0.5 * metrics.compute_auroc(one, labels)[1]
    assert math.isnan(metrics.compute_auroc_difference(one[:1], one[:1], labels[:1])[0])


def test_shuffled_labels() -> None:
    """Without information the area is 0.5 within its error."""
    scores, labels = make_scores(2000, 2000)
    auroc, error = metrics.compute_auroc(scores, np.random.default_rng(4).permutation(labels))
    assert abs(auroc - 0.5) < 3 * error
    assert error < 0.02


# Operating points


def test_tpr0_and_tpr10_of_the_challenge() -> None:
    """TPR0 is before any false positive, TPR10 with less than ten."""
    negatives = np.arange(100.0)
    # One positive just above each of the twenty highest negatives.
    scores = np.concatenate([negatives, negatives[-20:] + 0.5])
    labels = np.arange(120) >= 100
    tpr0 = metrics.compute_operating_point(scores, labels, false_positives=0)
    assert tpr0.tpr.value == 1 / 20
    assert tpr0.fpr.value == 0
    assert tpr0.threshold == 99.0
    tpr10 = metrics.compute_operating_point(scores, labels, false_positives=9)
    assert tpr10.tpr.value == 10 / 20
    assert tpr10.fpr.value == 0.09


def test_discrete_ranking_has_no_tpr0() -> None:
    """A negative in the highest class leaves nothing before it."""
    scores, labels = np.array([1.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False])
    assert metrics.compute_operating_point(scores, labels, false_positives=0).tpr.value == 0
    assert metrics.compute_tpr_at_fpr(scores, labels, 0.5).value == 1.0
    # More false positives than there are negatives but one.
    assert metrics.compute_operating_point(scores, labels, false_positives=9).fpr.value == 0.5


@pytest.mark.parametrize("fpr", [0.1, 0.01])
def test_threshold_keeps_the_rate(fpr: float) -> None:
    """At most the asked fraction of negatives is above the threshold."""
    scores, labels = make_scores(1000, 2000)
    point = metrics.compute_operating_point(scores, labels, fpr=fpr)
    assert point.fpr.value == np.mean(scores[~labels] > point.threshold) <= fpr
    assert point.tpr.value == np.mean(scores[labels] > point.threshold)
    assert point.tpr.low < point.tpr.value < point.tpr.high


def test_interval_covers_the_truth() -> None:
    """The interval holds the true rate in more than nine of ten samples even
    where four negatives set the threshold; Wilson alone does in few.
    """
    from scipy.stats import norm

    truth = norm.sf(norm.isf(0.02), loc=2.0)
    covered = {"point": 0, "wilson": 0}
    for seed in range(400):
        scores, labels = make_scores(2000, 200, separation=2.0, decimals=9, seed=seed)
        tpr = metrics.compute_operating_point(scores, labels, fpr=0.02).tpr
        wilson = Fraction.from_counts(round(tpr.value * 2000), 2000)
        covered["point"] += tpr.low <= truth <= tpr.high
        covered["wilson"] += wilson.low <= truth <= wilson.high
    assert covered["point"] > 0.9 * 400
    assert covered["wilson"] < 0.5 * 400


def test_rank_bootstrap_is_the_bootstrap() -> None:
    """Drawing the rank of the threshold is drawing the negatives anew."""
    rng = np.random.default_rng(5)
    n, k = 50, 4
    direct = np.sort(rng.integers(n, size=(20000, n)), axis=1)[:, k]
    ranks = (n * rng.beta(k + 1, n - k, 20000)).astype(int)
    assert ranks.mean() == pytest.approx(direct.mean(), abs=0.1)
    assert ranks.std() == pytest.approx(direct.std(), rel=0.03)


def test_operating_point_needs_one_target() -> None:
    """A rate or a number, not both."""
    for targets in ({}, {"fpr": 0.1, "false_positives": 1}):
        with pytest.raises(ValueError, match="either"):
            metrics.compute_operating_point(HAND_SCORES, HAND_LABELS, **targets)


def test_limits_are_stated() -> None:
    """Too few negatives are said to be too few."""
    text = metrics.describe_fpr_limit(1e-4, 20000)
    assert text == "FPR 0.0001 needs 1e+06 negatives for 10%; you have 2e+04, which give it to 71%."
    assert "at none" in metrics.describe_fpr_limit(1e-4, 5000)
    assert metrics.describe_fpr_limit(1e-4, 1_000_000) == ""
    assert metrics.describe_fpr_limit(0.0, 10) == ""


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # Newcombe (1998, Statistics in Medicine 17, 857), table I.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(k: int, n: int, low: float, high: float) -> None:
    """The intervals are those printed in the literature."""
    fraction = Fraction.from_counts(k, n)
    assert (fraction.low, fraction.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
    assert fraction.value == k / n


# The sky


def test_sky_yield_by_hand() -> None:
    """The table of the lens density and the rates, worked out on paper."""
    tpr, fpr = Fraction(0.5, 0.4, 0.6, 100), Fraction(1e-3, 5e-4, 2e-3, 10000)
    found = completeness.compute_sky_yield(tpr, fpr, lens_density=2.0, candidate_density=10002.0)
    assert found.lenses == 1.0
    assert found.contaminants.value == pytest.approx(10.0)
    assert found.precision.value == pytest.approx(1 / 11)
    assert found.precision.low == pytest.approx(0.8 / 20.8)
    assert found.precision.high == pytest.approx(1.2 / 6.2)
    with pytest.raises(ValueError, match="cannot be"):
        completeness.compute_sky_yield(tpr, fpr, lens_density=2.0, candidate_density=1.0)


def test_precision_along_the_curve() -> None:
    """At the prevalence of the sample, precision is counted directly."""
    scores, labels = make_scores()
    roc = metrics.compute_roc(scores, labels)
    precision = roc.compute_precision(labels.mean())
    assert math.isnan(precision[0])
    for k in (5, 20, -1):
        assert precision[k] == pytest.approx(labels[scores >= roc.threshold[k]].mean())


# Completeness


def test_completeness_map_by_hand() -> None:
    """Lenses are counted in their cells; edges belong to the upper cell."""
    cells = completeness.compute_completeness_map(
        np.array([True, False, True, True, False]),
        np.array([0.5, 0.9, 1.0, 5.0, np.nan]),
        np.array([10.0, 19.0, 20.0, 10.0, 10.0]),
        x_edges=[0.5, 1.0, 2.0],
        y_edges=[10, 20, 40],
    )
    np.testing.assert_array_equal(cells.n, [[2, 0], [0, 1]])
    np.testing.assert_array_equal(cells.n_found, [[1, 0], [0, 1]])
    np.testing.assert_array_equal(cells.value, [[0.5, np.nan], [np.nan, 1.0]])
    low, high = cells.interval
    assert (low[0, 0], high[0, 0]) == (Fraction.from_counts(1, 2).low, Fraction.from_counts(1, 2).high)
    assert np.isnan(low[0, 1])
    with pytest.raises(ValueError, match="ascend"):
        completeness.compute_completeness_map(
            np.ones(1), np.ones(1), np.ones(1), x_edges=[1, 1], y_edges=[0, 1]
        )


# Calibration


def test_calibration_error_by_hand() -> None:
    """Two bins, each off by a tenth."""
    probabilities = np.array([0.2] * 10 + [0.8] * 10)
    labels = np.array([True] * 3 + [False] * 7 + [True] * 7 + [False] * 3)
    assert calibration.compute_calibration_error(probabilities, labels) == pytest.approx(0.1)
    assert calibration.compute_brier_score(probabilities, labels) == pytest.approx(
        (6 * 0.64 + 14 * 0.04) / 20
    )
    assert calibration.compute_log_loss(probabilities, labels) == pytest.approx(
        -(6 * math.log(0.2) + 14 * math.log(0.8)) / 20
    )
    reliability = calibration.compute_reliability(probabilities, labels)
    assert reliability.n.tolist() == [0, 0, 10, 0, 0, 0, 0, 0, 10, 0]
    assert reliability.observed[2] == 0.3
    assert np.isnan(reliability.predicted[0])


def test_losses_at_certainty() -> None:
    """Certainty costs nothing if right, and everything if wrong."""
    assert calibration.compute_log_loss(np.array([1.0, 0.0]), np.array([True, False])) == 0
    assert calibration.compute_log_loss(np.array([1.0]), np.array([False])) == math.inf
    with pytest.raises(ValueError, match="from 0 to 1"):
        calibration.compute_log_loss(np.array([-3.0]), np.array([True]))


# Linear classifiers


def test_logistic_regression_recovers_its_law() -> None:
    """The direction is that of the law that made the labels."""
    rng = np.random.default_rng(9)
    features = rng.normal([5.0, -3.0, 0.0], [2.0, 0.1, 1.0], (20000, 3))
    z = 1.0 * (features[:, 0] - 5) - 10.0 * (features[:, 1] + 3)
    labels = rng.random(20000) < 1 / (1 + np.exp(-z))
    model = logistic_regression.fit_logistic(features, labels, penalty=1e-6)
    np.testing.assert_allclose(model.weights / model.scale, [1.0, -10.0, 0.0], atol=0.35)
    np.testing.assert_allclose(model.predict(features), z, atol=0.4)
    with pytest.raises(ValueError, match="finite"):
        logistic_regression.fit_logistic(np.full((2, 1), np.nan), np.array([True, False]))


def test_probe() -> None:
    """Noise has a probe of 0.5, a shift of one feature has that of the shift
    (Phi(1 / sqrt(2)) = 0.760), and a constant feature does no harm.
    """
    rng = np.random.default_rng(10)
    labels = rng.random(2000) < 0.5
    features = np.column_stack([rng.normal(size=(2000, 5)), np.ones(2000)])
    auroc, error = logistic_regression.compute_probe_auroc(features, labels)
    assert abs(auroc - 0.5) < 4 * error
    features[:, 2] += labels
    auroc, error = logistic_regression.compute_probe_auroc(features, labels)
    assert abs(auroc - 0.760) < 4 * error
    assert math.isnan(logistic_regression.compute_probe_auroc(features, np.ones(2000, dtype=bool))[0])


def test_probe_respects_groups() -> None:
    """What only names the galaxy does not help for other galaxies."""
    rng = np.random.default_rng(11)
    host = np.repeat(np.arange(60), 10)
    labels = rng.permutation(60)[host] < 30
    features = np.eye(60)[host]
    leaking, _ = logistic_regression.compute_probe_auroc(features, labels)
    honest, _ = logistic_regression.compute_probe_auroc(features, labels, groups=host)
    assert leaking > 0.95
    assert honest == pytest.approx(0.5, abs=0.05)


def test_summary_of_the_training() -> None:
    """The summary has the figures of all and of the clear lenses."""
    scores, labels = make_scores(100, 200)
    radius = np.where(np.arange(300) % 2, 0.8, 1.5)
    summary = completeness.describe_scores(scores, labels, einstein_radius=radius, arc_snr=np.full(300, 30.0))
    assert summary["all"]["n_lenses"] == 100
    assert summary["clear"]["n_lenses"] == (labels & (radius > 1)).sum()
    assert summary["clear"]["n_non_lenses"] == 200
    for part, fpr in itertools.product(("all", "clear"), ("0.01", "0.001")):
        value, low, high = summary[part][f"tpr_at_fpr_{fpr}"]
        assert low <= value <= high
    json.dumps(summary)

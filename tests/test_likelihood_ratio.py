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

"""Tests of the likelihood ratios of scores."""

import json

import numpy as np
import pytest
from scipy.special import expit, logit

from lsst.meas.deeplearn.lenses.calibration import compute_calibration_error
from lsst.meas.deeplearn.lenses.likelihood_ratio import ScoreCalibration


def test_score_calibration() -> None:
    """Likelihood ratios of Gaussian scores agree with the analytic ones, and
    so do their errors.
    """
    rng = np.random.default_rng(8)
    is_lens = rng.random(20000) < 0.5
    scores = rng.normal(2.0 * is_lens, 1.0)
    scores[:5] = np.nan
    calibration = ScoreCalibration.from_scores(scores, is_lens, min_count=20)
    assert calibration.n_lens.sum() + calibration.n_not.sum() == 20000 - 5
    assert (np.diff(calibration.log_ratios) > 0).all()
    assert min(calibration.n_lens.min(), calibration.n_not.min()) >= 20
    x = np.linspace(-1, 3, 9)
    # N(x; 2, 1) / N(x; 0, 1) = exp(2 x - 2)
    np.testing.assert_allclose(calibration.compute_log_ratio(x), 2 * x - 2, atol=0.9)
    assert calibration.compute_log_ratio(np.array([np.nan])) == 0
    # The mean of the likelihood ratio over other things is 1.
    ratio = np.exp(calibration.compute_log_ratio(rng.normal(size=100000)))
    assert ratio.mean() == pytest.approx(1.0, abs=0.2)
    drawn = calibration.draw_log_ratio(np.array([0.0, 9.0, np.nan]), rng, 2000)
    bins = calibration.find_bins(np.array([0.0, 9.0]))
    np.testing.assert_allclose(drawn.std(axis=0)[:2], calibration.errors[bins], rtol=0.1)
    assert (drawn[:, 2] == 0).all()
    with pytest.raises(ValueError, match="too few"):
        ScoreCalibration.from_scores(scores[:20], is_lens[:20])


def test_calibrated_probabilities() -> None:
    """Fitted on one half, the other half is calibrated to two per cent, at
    the prevalence of the fit and at that of a sky with fewer lenses.
    """
    rng = np.random.default_rng(6)
    truth = rng.uniform(0.02, 0.98, 40000)
    labels = rng.random(40000) < truth
    scores = 3.0 * logit(truth) + 2.0  # overconfident
    half = np.arange(40000) < 20000
    calibration = ScoreCalibration.from_scores(scores[half], labels[half])
    assert compute_calibration_error(expit(scores[~half]), labels[~half]) > 0.1
    rare = ~labels | (rng.random(40000) < 0.05)
    for part in (~half, ~half & rare):
        odds = calibration.compute_log_ratio(scores[part]) + logit(labels[part].mean())
        assert compute_calibration_error(expit(odds), labels[part]) < 0.02


def test_score_calibration_from_roc() -> None:
    """A point of a ROC curve makes two bins, as SWAP treats a classifier."""
    calibration = ScoreCalibration.from_roc([0.5], [0.9], [0.1], n_lens=100000, n_not=100000)
    np.testing.assert_allclose(
        calibration.compute_log_ratio(np.array([0.4, 0.5, 0.9])), np.log([1 / 9, 9, 9]), rtol=1e-3
    )
    unordered = ScoreCalibration.from_roc([0.9, 0.5], [0.5, 0.9], [0.01, 0.1], n_lens=1000, n_not=1000)
    assert unordered.thresholds.tolist() == [0.5, 0.9]
    # A curve that is not convex is replaced by its hull.
    hull = ScoreCalibration.from_roc([0.2, 0.5, 0.8], [0.9, 0.6, 0.5], [0.5, 0.4, 0.1], n_lens=100, n_not=100)
    assert hull.thresholds.tolist() == [0.2, 0.8]
    for rates in ([0.5, 0.9], [0.1, 0.2]), ([0.9, 0.5], [0.2, 1.1]), ([0.9, np.nan], [0.2, 0.1]):
        with pytest.raises(ValueError, match="ROC"):
            ScoreCalibration.from_roc([0.5, 0.9], *rates, n_lens=10, n_not=10)


def test_score_calibration_to_dict() -> None:
    """A calibration survives the record of a model package; a damaged one is
    refused.
    """
    calibration = ScoreCalibration.from_roc([0.2, 0.5], [0.95, 0.9], [0.3, 0.1], n_lens=100, n_not=200)
    again = ScoreCalibration.from_dict(json.loads(json.dumps(calibration.to_dict())))
    x = np.linspace(0, 1, 7)
    np.testing.assert_array_equal(again.compute_log_ratio(x), calibration.compute_log_ratio(x))
    for key, value in {"n_lens": [1.0], "thresholds": [0.5, 0.2], "n_not": ["a", "b", "c"]}.items():
        with pytest.raises(ValueError, match="calibration"):
            ScoreCalibration.from_dict(calibration.to_dict() | {key: value})
    with pytest.raises(ValueError, match="thresholds, n_lens and n_not"):
        ScoreCalibration.from_dict({})

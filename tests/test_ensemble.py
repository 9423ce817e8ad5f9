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


"""Tests of what the networks of an ensemble say together."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.special import expit, logit

from lsst.meas.deeplearn.lenses.ensemble import combine_logits, find_calibration
from lsst.meas.deeplearn.lenses.likelihood_ratio import ScoreCalibration
from lsst.meas.deeplearn.model_package import ModelPackageError
from lsst.meas.deeplearn.tests import make_test_model

CALIBRATION = ScoreCalibration(np.array([0.0, 3.0]), np.array([10, 90, 900]), np.array([9000, 900, 9]))


def test_one_network() -> None:
    """One network has no scatter, and its own likelihood ratio."""
    logits = np.array([[-2.0, 1.0, 4.0]])
    scores = combine_logits(logits, [CALIBRATION], prevalence=1e-3)
    np.testing.assert_allclose(scores.score, expit(logits[0]))
    assert np.isnan(scores.score_err).all()
    ratios = np.array([10.5 / 9000.5, 90.5 / 900.5, 900.5 / 9.5]) * 9910.5 / 1001.5
    np.testing.assert_allclose(scores.log_likelihood_ratio, np.log(ratios))
    np.testing.assert_allclose(scores.probability / (1 - scores.probability), ratios * 1e-3 / 0.999)
    # What the counts of a bin leave open is the error of the log odds.
    sigma = scores.probability_err / (scores.probability * (1 - scores.probability))
    np.testing.assert_allclose(sigma, CALIBRATION.errors)


def test_several_networks() -> None:
    """Logits and log ratios are averaged; errors have the scatter in them."""
    logits = np.array([[1.0, 4.0], [2.0, -1.0]])
    scores = combine_logits(logits, [CALIBRATION] * 2, prevalence=0.5)
    np.testing.assert_allclose(scores.score, expit([1.5, 1.5]))
    np.testing.assert_allclose(scores.score_err, abs(np.diff(expit(logits), axis=0))[0] / np.sqrt(2))
    ratios = CALIBRATION.compute_log_ratio(logits)
    np.testing.assert_allclose(scores.log_likelihood_ratio, ratios.mean(axis=0))
    np.testing.assert_allclose(logit(scores.probability), ratios.mean(axis=0), rtol=1e-6)
    sigma = scores.probability_err / (scores.probability * (1 - scores.probability))
    np.testing.assert_allclose(sigma[0], CALIBRATION.errors[1])
    assert sigma[1] > 2.0


def test_uncalibrated_networks() -> None:
    """If one network is not calibrated, there are no probabilities."""
    scores = combine_logits(np.zeros((2, 3)), [CALIBRATION, None], prevalence=0.5)
    assert np.isfinite(scores.score).all()
    for name in ("log_likelihood_ratio", "probability", "probability_err"):
        assert np.isnan(getattr(scores, name)).all()


def test_logits_that_are_nan() -> None:
    """An object without a logit gets NaN, the others do not."""
    scores = combine_logits(np.array([[1.0, np.nan], [1.0, 1.0]]), [CALIBRATION] * 2, prevalence=0.5)
    for field in dataclasses.fields(scores):
        assert np.isnan(getattr(scores, field.name)).tolist() == [False, True]


def test_no_objects() -> None:
    """No objects have no scores."""
    assert combine_logits(np.zeros((3, 0)), [CALIBRATION] * 3, prevalence=0.5).probability.shape == (0,)


def test_calibration_travels_in_the_record() -> None:
    """The calibration is found in the record, and a damaged one is refused."""
    model = make_test_model()
    assert find_calibration(model) is None
    calibrated = dataclasses.replace(model, record={"calibration": CALIBRATION.to_dict()})
    found = find_calibration(calibrated)
    assert found is not None
    np.testing.assert_array_equal(found.thresholds, CALIBRATION.thresholds)
    with pytest.raises(ModelPackageError, match=r"record of model test 1.*thresholds, n_lens and n_not"):
        find_calibration(dataclasses.replace(model, record={"calibration": {"thresholds": [1]}}))

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


"""Tests of the conditions of galaxy models."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lsst.meas.deeplearn.galaxies.conditions import ConditionError, ConditionSpace


def make_conditions(n: int = 500, seed: int = 0) -> np.ndarray:
    """Return conditions of random galaxies."""
    rng = np.random.default_rng(seed)
    return np.column_stack([10 ** rng.uniform(-1, 0, n), rng.uniform(18, 25, n), rng.uniform(0.1, 2.0, n)])


def test_scaling() -> None:
    """Scaled conditions have zero mean and unit variance, and go back."""
    conditions = make_conditions()
    space = ConditionSpace.fit(conditions)
    scaled = space.to_scaled(conditions)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.std(axis=0), 1)
    np.testing.assert_allclose(space.from_scaled(scaled), conditions)


def test_settings_round_trip() -> None:
    """Settings survive JSON."""
    space = ConditionSpace.fit(make_conditions())
    assert ConditionSpace.from_settings(json.loads(json.dumps(space.to_settings()))) == space


def test_hull() -> None:
    """Training conditions are inside, those beyond them are outside."""
    conditions = make_conditions()
    space = ConditionSpace.fit(conditions)
    assert space.is_inside(conditions).all()
    assert space.is_inside(np.array([[0.3, 22.0, 1.0]])).all()
    outside = np.array(
        [[2.0, 22, 1], [0.05, 22, 1], [0.3, 26, 1], [0.3, 17, 1], [0.3, 22, 3], [0.3, 22, 0.01]]
    )
    assert not space.is_inside(outside).any()


def test_clip() -> None:
    """Clipped conditions are on the hull, others are left alone."""
    space = ConditionSpace.fit(make_conditions())
    conditions = np.array([[0.3, 22.0, 1.0], [5.0, 22.0, 1.0], [0.3, 30.0, 9.0]])
    clipped = space.clip(conditions)
    np.testing.assert_array_equal(clipped[0], conditions[0])
    assert space.is_inside(clipped).all()
    np.testing.assert_allclose(space._compute_excess(space.to_scaled(clipped[1:])), 0, atol=1e-9)
    assert 0.8 < clipped[1, 0] < 1.1
    np.testing.assert_allclose(space.clip(clipped), clipped)


@pytest.mark.parametrize(
    "bad", [[np.nan, 22, 1], [0.0, 22, 1], [-0.3, 22, 1], [0.3, np.inf, 1], [0.3, 22, -0.1]]
)
def test_impossible_conditions(bad: list[float]) -> None:
    """What no galaxy has is outside, and cannot be scaled or clipped."""
    space = ConditionSpace.fit(make_conditions())
    conditions = np.array([[0.3, 22.0, 1.0], bad])
    np.testing.assert_array_equal(space.is_inside(conditions), [True, False])
    for method in (space.to_scaled, space.clip):
        with pytest.raises(ConditionError, match="row 1"):
            method(conditions)


def test_needs_a_volume() -> None:
    """A training set of one redshift is refused."""
    conditions = make_conditions()
    conditions[:, 2] = 1.0
    with pytest.raises(ConditionError, match="different half-light radii"):
        ConditionSpace.fit(conditions)
    with pytest.raises(ConditionError, match="at least five"):
        ConditionSpace.fit(make_conditions(3))

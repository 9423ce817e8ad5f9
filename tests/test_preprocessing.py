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


"""Tests of the pixel scaling of models."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.cutouts import CutoutExtractor
from lsst.meas.deeplearn.preprocessing import Preprocessing, compute_noise
from lsst.meas.deeplearn.tests import make_test_coadds

SETTINGS = [
    Preprocessing(),
    Preprocessing(noise=(3.0, 4.0)),
    Preprocessing(noise=(3.0, 4.0), mean=(-1.0, 0.5), clip=20.0),
    Preprocessing(softening=5.0),
]


def _make_stamps(n: int = 5, *, scale: float = 30.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make image, variance and bad pixels of stamps in two bands."""
    rng = np.random.default_rng(12)
    image = rng.normal(scale=scale, size=(n, 2, 9, 9)).astype(np.float32)
    variance = rng.uniform(4.0, 9.0, size=image.shape).astype(np.float32)
    bad = rng.uniform(size=image.shape) < 0.1
    return np.where(bad, np.nan, image), np.where(bad, np.nan, variance), bad


@pytest.mark.parametrize("preprocessing", SETTINGS)
def test_settings_go_through_json(preprocessing: Preprocessing) -> None:
    """Settings are the same after a round trip through JSON."""
    text = json.dumps(preprocessing.to_settings())
    assert Preprocessing.from_settings(json.loads(text)) == preprocessing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clipping": 3}, r"Unknown preprocessing settings \['clipping'\]; there are \['clip', 'mean'"),
        ({"noise": "varianz"}, "'variance' or a value for each band, not 'varianz'"),
        ({"noise": [1.0, 0.0]}, "noise must be positive"),
        ({"noise": [1.0, float("nan")]}, "noise must be positive"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"clip": float("nan")}, "clip must be positive"),
        ({"softening": -1.0}, "softening must be positive"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    """Settings that do not exist or cannot be applied are refused."""
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_settings(settings)


@pytest.mark.parametrize("name", ["noise", "mean"])
def test_another_number_of_bands(name: str) -> None:
    """A value for each band is needed; one does not stand for all."""
    image, variance, bad = _make_stamps()
    for values in ((1.0,), (1.0, 2.0, 3.0)):
        preprocessing = Preprocessing(**{name: values})
        with pytest.raises(ValueError, match=f"There are 2 bands, but {len(values)} values for the {name}"):
            preprocessing.scale(image, variance=variance, bad=bad)


def test_scaling_by_the_variance() -> None:
    """Pixels are in units of the median noise of the stamp and band."""
    image, variance, bad = _make_stamps()
    x = Preprocessing().scale(image, variance=variance, bad=bad)
    assert x.dtype == np.float32
    assert x.shape == image.shape
    for k in range(len(image)):
        for b in range(2):
            good = ~bad[k, b]
            noise = np.sqrt(np.median(variance[k, b][good]))
            np.testing.assert_allclose(x[k, b][good], image[k, b][good] / noise, rtol=1e-6)
    assert (x[bad] == 0).all()


def test_scaling_by_constants() -> None:
    """Mean and noise of the training set, clip and stretch apply in turn."""
    image, variance, bad = _make_stamps(scale=100.0)
    mean, noise = np.array([10.0, -20.0])[:, None, None], np.array([3.0, 4.0])[:, None, None]
    preprocessing = Preprocessing(noise=(3.0, 4.0), mean=(10.0, -20.0), clip=20.0, softening=2.0)
    x = preprocessing.scale(image, variance=variance, bad=bad)
    expected = np.arcsinh(np.clip((image - mean) / noise, -20.0, 20.0) / 2.0)
    np.testing.assert_allclose(x[~bad], expected[~bad], rtol=1e-5, atol=1e-6)
    assert (x[bad] == 0).all()
    assert x.dtype == np.float32
    assert np.abs(x).max() == pytest.approx(np.arcsinh(10.0))


def test_lanusse_clip() -> None:
    """By default pixels beyond 250 times the noise are clipped."""
    image = np.array([-1e6, 1e6, 300.0, 10.0], np.float32).reshape(1, 1, 2, 2)
    x = Preprocessing().scale(image, variance=np.full_like(image, 4.0), bad=np.zeros(image.shape, bool))
    assert x.ravel().tolist() == [-250.0, 250.0, 150.0, 5.0]


@pytest.mark.parametrize("preprocessing", SETTINGS)
def test_stamp_without_good_pixels(preprocessing: Preprocessing) -> None:
    """A stamp that is all bad is all zero, without warnings."""
    image, variance, bad = _make_stamps()
    bad[1] = True
    bad[2, 0] = True
    with np.errstate(all="raise"):
        x = preprocessing.scale(image, variance=variance, bad=bad)
    assert np.isfinite(x).all()
    assert not x[1].any()
    assert not x[2, 0].any()
    assert x[2, 1].any()


@pytest.mark.parametrize("preprocessing", SETTINGS)
def test_stamps_do_not_influence_each_other(preprocessing: Preprocessing) -> None:
    """A stamp is scaled the same in any company, and stays as it was."""
    image, variance, bad = _make_stamps()
    before = image.copy()
    whole = preprocessing.scale(image, variance=variance, bad=bad)
    for k in range(len(image)):
        part = preprocessing.scale(image[k : k + 1], variance=variance[k : k + 1], bad=bad[k : k + 1])
        np.testing.assert_array_equal(part[0], whole[k])
    np.testing.assert_array_equal(image, before)
    assert preprocessing.scale(image[:0], variance=variance[:0], bad=bad[:0]).shape == (0, 2, 9, 9)


def test_apply_to_cutouts() -> None:
    """Cutouts are scaled with their own variance and bad pixels."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("gr", noise=7.0))
    ra, dec = coadd.pixel_to_sky(x=np.array([700.0, 601.0]), y=np.array([1300.0, 1201.0]))
    cutouts = CutoutExtractor(coadd, size=31).extract(ids=np.array([1, 2]), ra=ra, dec=dec)
    x = Preprocessing().apply(cutouts)
    np.testing.assert_allclose(x[0], cutouts.image[0] / 7.0, rtol=1e-6)
    assert x[0].std() == pytest.approx(1.0, abs=0.05)
    assert (x[cutouts.bad] == 0).all()


def test_noise() -> None:
    """The noise is the root of the median variance of good pixels, or 1."""
    variance = np.full((2, 1, 3, 3), 4.0, np.float32)
    variance[0, 0, 0] = 1e6
    bad = np.zeros(variance.shape, bool)
    bad[1] = True
    np.testing.assert_array_equal(compute_noise(variance, bad), [[2.0], [1.0]])
    bad[0, 0, 1:] = True
    np.testing.assert_array_equal(compute_noise(variance, bad), [[1000.0], [1.0]])

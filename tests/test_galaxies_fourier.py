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


"""Tests of images of galaxies in Fourier space."""

from __future__ import annotations

import galsim
import numpy as np
import pytest

from lsst.meas.deeplearn.galaxies.fourier import (
    compute_noise_power,
    compute_transform,
    draw_noise,
    draw_transform,
    invert_transform,
    make_gaussian_transform,
    make_mode_weights,
    truncate_transform,
)


def test_draws_what_galsim_draws() -> None:
    """A smooth profile comes out as in GalSim, off centre and all."""
    profile = galsim.Gaussian(sigma=0.2).shear(g1=0.3, g2=0.1).shift(0.11, -0.23)
    found = invert_transform(draw_transform(profile, size=64, pixel_scale=0.1))
    # The centre of an odd image is a pixel.
    expected = profile.drawImage(nx=65, ny=65, scale=0.1, method="no_pixel").array[:64, :64]
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


def test_transform_round_trip() -> None:
    """An image without Nyquist frequencies is its transform's image."""
    image = invert_transform(compute_transform(np.random.default_rng(0).standard_normal((3, 16, 16))))
    np.testing.assert_allclose(invert_transform(compute_transform(image)), image, atol=1e-12)
    np.testing.assert_allclose(compute_transform(image)[:, 0, 0], image.sum(axis=(1, 2)), atol=1e-12)


def test_truncation_keeps_the_flux_and_the_profile() -> None:
    """Larger pixels of a resolved profile are those that GalSim draws."""
    profile = galsim.Gaussian(sigma=0.3).shift(0.05, 0.1)
    fine = invert_transform(draw_transform(profile, size=128, pixel_scale=0.05))
    coarse = invert_transform(truncate_transform(compute_transform(fine), 64))
    expected = invert_transform(draw_transform(profile, size=64, pixel_scale=0.1))
    np.testing.assert_allclose(coarse, expected, atol=1e-9)
    assert coarse.sum() == pytest.approx(1)


def test_gaussian_transform() -> None:
    """It is that of GalSim."""
    expected = draw_transform(galsim.Gaussian(fwhm=0.2), size=32, pixel_scale=0.1)
    np.testing.assert_allclose(make_gaussian_transform(0.2, size=32, pixel_scale=0.1), expected, atol=1e-4)
    assert make_gaussian_transform(0.0, size=32, pixel_scale=0.1)[1, 1] == 1


def test_mode_weights_count_pixels() -> None:
    """Sums over modes are sums over pixels (Parseval)."""
    image = invert_transform(compute_transform(np.random.default_rng(0).standard_normal((16, 16))))
    power = make_mode_weights(16) * np.abs(compute_transform(image)) ** 2 / 16**2
    assert power.sum() == pytest.approx((image**2).sum())


@pytest.mark.parametrize("correlated", [False, True])
def test_noise_has_its_correlation(correlated: bool) -> None:
    """Drawn noise has the variance and correlation it is asked for."""
    kernel = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
    correlation = np.zeros((5, 5))
    # White noise smoothed by the kernel.
    padded = np.pad(kernel, 2)
    for dy in range(5):
        for dx in range(5):
            correlation[dy, dx] = (kernel * padded[dy : dy + 3, dx : dx + 3]).sum()
    power = compute_noise_power(correlation if correlated else None, 32)
    noise = draw_noise(power, np.random.default_rng(1), 2000)
    expected = correlation / correlation[2, 2] if correlated else np.eye(5)[2][:, None] * np.eye(5)[2]
    # The Nyquist frequencies, 6 % of the modes, have no noise.
    assert noise.var() == pytest.approx(1, abs=0.01 if correlated else 0.07)
    for dy, dx in ((0, 1), (1, 0), (1, 1), (2, 0)):
        product = (noise * np.roll(noise, (dy, dx), axis=(1, 2))).mean()
        assert product == pytest.approx(expected[2 + dy, 2 + dx], abs=0.01 if correlated else 0.04)
    assert (compute_transform(noise)[:, 16] == 0).all()


@pytest.mark.parametrize("size", [5, 2])
def test_odd_grids_are_refused(size: int) -> None:
    """Grids must be even."""
    with pytest.raises(ValueError, match="even number of pixels"):
        draw_transform(galsim.Gaussian(sigma=1), size=size, pixel_scale=0.1)

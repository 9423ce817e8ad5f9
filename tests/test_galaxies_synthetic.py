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


"""Tests of training sets of known truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import galsim
import numpy as np
import pytest

from lsst.meas.deeplearn.galaxies.cosmos import GalaxySet, GalaxySetError
from lsst.meas.deeplearn.galaxies.fourier import compute_transform, draw_transform, make_gaussian_transform
from lsst.meas.deeplearn.galaxies.parametric import (
    Components,
    GalaxyParameters,
    draw_parameters,
    make_galaxy,
    make_knotty_galaxy,
    make_smooth_galaxy,
)
from lsst.meas.deeplearn.galaxies.synthetic import (
    compute_component_transform,
    draw_to_magnitude,
    make_synthetic_set,
)


@pytest.fixture(scope="module")
def synthetic() -> GalaxySet:
    """Return forty synthetic galaxies on a small grid."""
    return make_synthetic_set(40, seed=3, size=64, n_psfs=4, max_magnitude=23.5)


def compute_whiteness(galaxies: GalaxySet) -> np.ndarray:
    """Return the power of images in units of that of their noise.

    Where galaxies have next to none: in the corners of Fourier space.
    """
    size = galaxies.size
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    corner = (k > 0.55) & (np.arange(size // 2 + 1) < size // 2)
    corner[size // 2] = False
    power = np.abs(compute_transform(galaxies.image)[:, corner]) ** 2 / size**2
    return np.asarray((power / galaxies.noise_power[corner] / galaxies.noise_variance[:, None]).mean(axis=1))


@pytest.mark.parametrize("make", [make_smooth_galaxy, make_knotty_galaxy, make_galaxy])
def test_components_are_drawn_as_by_galsim(make: Callable[[GalaxyParameters], Components]) -> None:
    """Their transform is that of the profile of GalSim."""
    for parameters in draw_parameters(5, seed=2):
        components = make(parameters)
        found = compute_component_transform(components, size=128, pixel_scale=0.06)
        expected = draw_transform(components.make_profile(), size=128, pixel_scale=0.06)
        np.testing.assert_allclose(found, expected, atol=3e-4)


def test_no_galaxy_is_as_bright() -> None:
    """A limit that no galaxy of the population meets is an error."""
    with pytest.raises(GalaxySetError, match="no galaxies as bright"):
        draw_to_magnitude(3, 1, max_magnitude=1.0)


def test_synthetic_truth_is_what_galsim_draws(synthetic: GalaxySet) -> None:
    """The truth is the profile with the Gaussian PSF, drawn by GalSim."""
    parameters = [p for p in draw_parameters(64, seed=[3, 0, 0]) if p.magnitude <= 23.5][:2]
    smooth = make_synthetic_set(
        2, seed=0, size=64, n_psfs=1, parameters=parameters, make_components=make_smooth_galaxy
    )
    assert smooth.truth is not None
    for truth, galaxy in zip(smooth.truth, parameters, strict=True):
        profile = galsim.Convolve(
            make_smooth_galaxy(galaxy).make_profile(), galsim.Gaussian(fwhm=smooth.truth_fwhm)
        )
        expected = profile.drawImage(nx=65, ny=65, scale=0.06, method="no_pixel").array[:64, :64]
        np.testing.assert_allclose(truth, expected, atol=0.02 * expected.max())


def test_synthetic_images_are_truth_with_psf_and_noise(synthetic: GalaxySet) -> None:
    """In Fourier space the image is truth times PSF, and noise."""
    assert synthetic.truth is not None
    size = synthetic.size
    resolution = make_gaussian_transform(synthetic.truth_fwhm, size=size, pixel_scale=0.06)
    psf = compute_transform(synthetic.psf)[synthetic.psf_index]
    low = (slice(None), slice(0, 12), slice(1, 12))
    model = compute_transform(synthetic.truth)[low] * (psf[low] / resolution[low[1:]])
    residual = compute_transform(synthetic.image)[low] - model
    variance = synthetic.noise_power[low[1:]] * synthetic.noise_variance[:, None, None] * size**2
    # The border cuts off what the PSF would bring in again.
    assert np.median((np.abs(residual) ** 2 / variance).mean(axis=(1, 2))) == pytest.approx(1, abs=0.15)
    np.testing.assert_allclose(np.median(compute_whiteness(synthetic)), 1, atol=0.1)


def test_synthetic_sets_follow_the_seed(synthetic: GalaxySet) -> None:
    """The same seed makes the same set, another one another."""
    kwargs = {"size": 32, "n_psfs": 2}
    one, same, other = (make_synthetic_set(5, seed=seed, **kwargs) for seed in (1, 1, 2))  # type: ignore[arg-type]
    np.testing.assert_array_equal(one.image, same.image)
    assert not np.array_equal(one.image, other.image)
    bare = make_synthetic_set(5, seed=1, keep_truth=False, **kwargs)  # type: ignore[arg-type]
    np.testing.assert_array_equal(bare.image, one.image)
    assert bare.truth is None
    assert bare[:2].truth is None


def test_split(synthetic: GalaxySet) -> None:
    """Galaxies are on one side or the other, neighbours on the same."""
    rest, held_out = synthetic.split(0.25, seed=1)
    assert sorted([*rest.ids, *held_out.ids]) == list(range(40))
    assert len(held_out) > 2
    near = dataclasses.replace(synthetic, sky=np.tile([[150.01, 2.01], [150.26, 2.01]], (20, 1)))
    for part in near.split(0.5, seed=0):
        assert len(np.unique(part.ids % 2)) == 1
    with pytest.raises(GalaxySetError, match="leaves a side empty"):
        near.split(1e-9)

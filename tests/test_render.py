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


"""Tests of the batched drawing of galaxies."""

from __future__ import annotations

import dataclasses

import galsim
import numpy as np
import pytest
import torch

from lsst.meas.deeplearn.galaxies.render import FineImages, Renderer, draw_with_kernels

SCALE, SIZE = 0.2, 63
PSF = galsim.Moffat(beta=2.5, fwhm=0.7).shear(g1=0.02, g2=-0.02)
ACCURATE = galsim.GSParams(
    folding_threshold=1e-4, maxk_threshold=1e-5, kvalue_accuracy=1e-7, xvalue_accuracy=1e-7
)


def make_profiles(n: int) -> list[galsim.GSObject]:
    """Return galaxies of unit flux that fit into their images."""
    rng = np.random.default_rng(1)
    profiles = []
    for k in range(n):
        galaxy = galsim.Sersic([1.0, 1.5, 2.5][k % 3], half_light_radius=rng.uniform(0.1, 0.4))
        galaxy = galaxy.shear(q=rng.uniform(0.3, 1.0), beta=rng.uniform(0, np.pi) * galsim.radians)
        knot = galsim.Gaussian(sigma=0.06, flux=0.2).shift(*rng.uniform(-0.3, 0.3, 2))
        profiles.append((galaxy + knot).withFlux(1.0))
    return profiles


def draw(profile: galsim.GSObject) -> np.ndarray:
    """Return the stamp that GalSim draws with high accuracy."""
    image = profile.withGSParams(ACCURATE).drawImage(nx=SIZE, ny=SIZE, scale=SCALE, method="no_pixel")
    return np.asarray(image.array)


@pytest.mark.parametrize("shear", [(0.0, 0.0), (0.05, 0.0), (-0.03, 0.04), (0.3, -0.2)])
@pytest.mark.parametrize("pixel", [False, True])
def test_profiles_agree_with_galsim(shear: tuple[float, float], pixel: bool) -> None:
    """Every pixel is that of GalSim to 2e-4 of the peak, at any offset."""
    psf = galsim.Convolve(PSF, galsim.Pixel(SCALE)) if pixel else PSF
    profiles = make_profiles(6)
    images = FineImages.from_profiles(profiles)
    offset = np.random.default_rng(2).uniform(-0.3, 0.3, (6, 2))
    renderer = Renderer(psf, images, size=SIZE, pixel_scale=SCALE, shear=shear)
    stamps = renderer.draw(images, offset=offset)
    for stamp, profile, shift in zip(stamps, profiles, offset, strict=True):
        sheared = profile.shear(g1=shear[0], g2=shear[1]).shift(*shift)
        expected = draw(galsim.Convolve(sheared, psf))
        np.testing.assert_allclose(stamp, expected, atol=2e-4 * expected.max())


def test_images_agree_with_galsim() -> None:
    """So do images with an interpolant, such as those of a network."""
    images = FineImages(
        np.stack([p.drawImage(nx=65, ny=65, scale=0.06).array for p in make_profiles(4)]), 0.06
    )
    interpolant = galsim.Quintic()
    renderer = Renderer(
        PSF, images, size=SIZE, pixel_scale=SCALE, shear=(0.02, -0.01), interpolant=interpolant
    )
    for stamp, image in zip(renderer.draw(images), images.array, strict=True):
        profile = galsim.InterpolatedImage(galsim.Image(image, scale=0.06), x_interpolant=interpolant)
        expected = draw(galsim.Convolve(profile.shear(g1=0.02, g2=-0.01), PSF))
        np.testing.assert_allclose(stamp, expected, atol=2e-4 * expected.max())


def test_deconvolution() -> None:
    """What images are convolved with does not matter, if it is known."""
    profiles = make_profiles(3)
    round_psf, other = galsim.Gaussian(fwhm=0.4), galsim.Moffat(beta=4.0, fwhm=0.5).shear(g1=0.1)
    stamps = []
    for known in (round_psf, other):
        drawn = [
            galsim.Convolve(p, known).drawImage(nx=81, ny=81, scale=0.15, method="no_pixel").array
            for p in profiles
        ]
        images = FineImages(np.stack(drawn), 0.15, known)
        renderer = Renderer(PSF, images, size=SIZE, pixel_scale=SCALE, shear=(0.1, 0.1))
        stamps.append(renderer.draw(images))
    np.testing.assert_allclose(stamps[0], stamps[1], atol=1e-3 * stamps[0].max())


def test_kernels_of_their_own() -> None:
    """Each galaxy has its kernel, whose centre is where it is drawn.

    GalSim draws the whole PSF: of its flux a kernel of 61 pixels has 0.9997
    to 0.9999, and the rest is what the two differ by, but for 1e-5.
    """
    profiles = make_profiles(4)
    images = FineImages.from_profiles(profiles)
    smoothed = [galsim.Convolve(profile, images.psf) for profile in profiles]
    psfs = [
        galsim.Convolve(galsim.Moffat(beta=3, fwhm=fwhm), galsim.Pixel(SCALE)).shift(dx, 0.05)
        for fwhm, dx in ((0.65, 0.0), (0.7, 0.09), (0.8, -0.1), (0.9, 0.03))
    ]
    kernels = np.stack(
        [5.0 * psf.drawImage(nx=61, ny=61, scale=SCALE, method="no_pixel", dtype=float).array for psf in psfs]
    )
    bare = dataclasses.replace(images, psf=None)
    stamps = draw_with_kernels(bare, kernels, size=45, pixel_scale=SCALE)
    assert stamps.shape == (4, 45, 45)
    for stamp, profile, psf, kernel in zip(stamps, smoothed, psfs, kernels, strict=True):
        observed = galsim.Convolve(profile, psf).withGSParams(ACCURATE)
        expected = observed.drawImage(nx=45, ny=45, scale=SCALE, method="no_pixel").array
        share = kernel.sum() / 5.0
        assert share > 0.9996
        np.testing.assert_allclose(share * stamp, expected, atol=1e-5 * expected.max())


def test_rotation() -> None:
    """Images turn counter-clockwise, as profiles do."""
    profiles = make_profiles(2)
    turned = FineImages.from_profiles([p.rotate(90 * galsim.degrees) for p in profiles])
    rotated = FineImages.from_profiles(profiles).rotate(1)
    np.testing.assert_allclose(rotated.array, turned.array, atol=1e-4 * turned.array.max())
    np.testing.assert_array_equal(rotated.rotate(3).array, FineImages.from_profiles(profiles).array)


def test_precision_and_batches() -> None:
    """Double precision and other batches give the same stamps to 1e-5."""
    images = FineImages.from_profiles(make_profiles(3))
    many = FineImages(np.resize(images.array, (40, 81, 81)), images.pixel_scale, images.psf)
    settings = {"size": SIZE, "pixel_scale": SCALE, "shear": (0.02, 0.03)}
    single = Renderer(PSF, images, **settings).draw(many)
    double = Renderer(PSF, images, dtype=torch.float64, **settings).draw(images)
    np.testing.assert_allclose(single, np.resize(double, single.shape), atol=1e-5 * double.max())
    assert Renderer(PSF, images, **settings).draw(FineImages(many.array[:0], 0.15, images.psf)).shape == (
        0,
        SIZE,
        SIZE,
    )


def test_bad_input() -> None:
    """Even sides, impossible shears and other images are refused."""
    images = FineImages.from_profiles(make_profiles(1))
    with pytest.raises(ValueError, match="equal odd sides"):
        FineImages(np.zeros((1, 64, 64)), 0.1)
    with pytest.raises(ValueError, match="odd number of pixels"):
        Renderer(PSF, images, size=64, pixel_scale=SCALE)
    with pytest.raises(ValueError, match="smaller than 1"):
        Renderer(PSF, images, size=SIZE, pixel_scale=SCALE, shear=(0.8, 0.8))
    renderer = Renderer(PSF, images, size=SIZE, pixel_scale=SCALE)
    with pytest.raises(ValueError, match="0.1 arcsec"):
        renderer.draw(FineImages(images.array, 0.1, images.psf))

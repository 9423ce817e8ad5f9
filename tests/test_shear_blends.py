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


"""Tests of detection in the loop of metacalibration."""

from __future__ import annotations

import galsim
import numpy as np
import pytest

from lsst.meas.deeplearn.galaxies.render import FineImages, Renderer
from lsst.meas.deeplearn.shear.bias import fit_bias
from lsst.meas.deeplearn.shear.blends import MetaDetection, compute_blended_sums, draw_scene
from lsst.meas.deeplearn.shear.metacal import Metacalibration
from lsst.meas.deeplearn.shear.morphologies import ParametricGalaxies
from lsst.meas.deeplearn.shear.simulation import GalaxySample, Scene, make_arms

SCALE, SIZE = 0.2, 120
PSF = galsim.Moffat(beta=2.5, fwhm=0.7).shear(g1=0.02, g2=-0.02)
SCENE = Scene(PSF, SCALE, noise_sigma=0.2)


def draw(images: FineImages, galaxies: GalaxySample, shear: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Draw a scene."""
    renderer = Renderer(PSF, images, size=63, pixel_scale=SCALE, shear=shear)
    return draw_scene(images, galaxies, renderer, shear, size=SIZE, pixel_scale=SCALE)


def make_scene() -> tuple[GalaxySample, np.ndarray]:
    """Return four bright galaxies, far from each other, and their image."""
    galaxies = GalaxySample.draw(np.arange(4), seed=2, magnitude=(20.0, 20.5))
    galaxies.offset[:] = [(-25.3, -25.1), (25.2, -24.6), (-24.7, 25.4), (25.0, 25.0)]
    return galaxies, draw(ParametricGalaxies("sersic").draw(galaxies), galaxies)


def make_detector(target_fwhm: float = 0.85) -> MetaDetection:
    """Return a detector for these scenes."""
    return MetaDetection(SCENE.draw_psf(), pixel_scale=SCALE, size=SIZE, target_fwhm=target_fwhm)


def test_scene_is_that_of_galsim() -> None:
    """Galaxies are where they should be, sheared with their positions."""
    galaxies, _ = make_scene()
    shear = (0.05, 0.02)
    profiles = [
        galsim.Exponential(half_light_radius=0.3).shift(*offset * SCALE) for offset in galaxies.offset
    ]
    scene = galsim.Convolve(galsim.Add(profiles).shear(g1=shear[0], g2=shear[1]), PSF)
    # The centre of an even image is between pixels for GalSim.
    expected = scene.drawImage(nx=SIZE + 1, ny=SIZE + 1, scale=SCALE, method="no_pixel").array[:-1, :-1]
    galaxies.magnitude[:] = 31.4
    round_images = FineImages.from_profiles(4 * [galsim.Exponential(half_light_radius=0.3)])
    image = draw(round_images, galaxies, shear)
    np.testing.assert_allclose(image, expected, atol=1e-3 * expected.max())


def test_shapes_are_those_of_metacalibration() -> None:
    """Lonely galaxies are found where they are, in all versions; their shapes
    are those of metacalibration of a stamp.
    """
    galaxies, image = make_scene()
    sigma = 1e-3 * image.max()
    found = make_detector().measure(image, np.zeros_like(image), noise_sigma=sigma)
    assert [len(detections.x) for detections in found] == 5 * [4]
    # Row by row, as the galaxies are.
    orders = [np.lexsort((detections.x, detections.y > 0)) for detections in found]
    engine = Metacalibration(pixel_scale=SCALE, stamp_size=49, target_fwhm=0.85)
    middle = SIZE // 2
    for detections, order in zip(found, orders, strict=True):
        places = np.stack([detections.x, detections.y], axis=1)[order]
        np.testing.assert_allclose(places, galaxies.offset, atol=0.02)
    stamps = []
    for x, y in galaxies.offset:
        column, row = round(x) + middle, round(y) + middle
        stamps.append(image[row - 24 : row + 25, column - 24 : column + 25])
    psf = Scene(PSF, SCALE, stamp_size=49).draw_psf()
    shapes = engine.measure(np.array(stamps), psf, noise_sigma=sigma)
    e = np.array([detections.e[order] for detections, order in zip(found, orders, strict=True)])
    snr = np.array([detections.snr[order] for detections, order in zip(found, orders, strict=True)])
    np.testing.assert_allclose(np.swapaxes(e, 0, 1), shapes.e, atol=1e-3)
    np.testing.assert_allclose(snr.T, shapes.snr, rtol=2e-3)
    for plus, minus, k in ((1, 2, 0), (3, 4, 1)):
        expected = shapes.e[:, plus, k] - shapes.e[:, minus, k]
        np.testing.assert_allclose(e[plus, :, k] - e[minus, :, k], expected, rtol=0.02)


def test_noise_does_not_respond_to_shear() -> None:
    """Noise that is sheared gets a direction; that of the fixnoise is the
    opposite, so that both together do not respond.
    """
    detector = make_detector()
    # What one pixel does tells the mean of white noise.
    pixel = np.zeros((1, SIZE, SIZE), dtype=np.float32)
    pixel[0, SIZE // 2, SIZE // 2] = 1.0

    k = 2 * np.pi * np.fft.fftfreq(SIZE)

    def compute_response(flux: np.ndarray) -> float:
        """Return how the mean of f_x^2 - f_y^2 follows g1."""
        power = np.abs(np.fft.fft2(flux.astype(np.float64))) ** 2
        direction = []
        for version, g1 in ((1, detector.step), (2, -detector.step)):
            # Derivatives along S u.
            along_x, along_y = ((1 - g1) * k[None, :]) ** 2, ((1 + g1) * k[:, None]) ** 2
            difference, total = ((along_x + sign * along_y) * power[0, version] for sign in (-1, 1))
            direction.append(difference.sum() / total.sum())
        return float(direction[0] - direction[1]) / (2 * detector.step)

    parts = [detector.smooth(pixel), detector.smooth_fixnoise(pixel)]  # (1, 5, y, x)
    for part in parts:
        assert np.sqrt((part[:, 0] ** 2).sum()) == pytest.approx(detector.flux_sigma, rel=1e-3)
    one, other = map(compute_response, parts)
    assert one == pytest.approx(1.03, abs=0.02)
    assert other == pytest.approx(-one, rel=1e-4)


def test_blended_sums() -> None:
    """The same scene gives the same sums among others; the bias is small
    without noise.
    """
    sums = {
        numbers: compute_blended_sums(
            ParametricGalaxies("sersic"),
            Scene(PSF, SCALE, noise_sigma=1e-3),
            make_arms((0.02,)),
            density=60.0,
            magnitude=(20.0, 24.0),
            target_fwhm=0.85,
            seed=1,
            blocks=numbers,
            size=SIZE,
            n_realizations=1,
        )
        for numbers in ((0, 1, 2), (2,))
    }
    many, one = sums[0, 1, 2], sums[2,]
    for name in ("metadetection", "no_detection"):
        np.testing.assert_array_equal(many[name].values[2], one[name].values[0])
    bias = fit_bias(many["metadetection"])
    assert bias.n_objects > 3
    assert abs(bias.values["m1"]) < 0.01
    assert abs(bias.values["m2"]) < 0.01


def test_bad_input() -> None:
    """PSFs that metacalibration cannot use, images of another size and arms
    with PSFs of their own are refused.
    """
    with pytest.raises(ValueError, match="too wide"):
        make_detector(target_fwhm=0.6)
    with pytest.raises(ValueError, match="120 x 120 pixels, not"):
        make_detector().smooth(np.zeros((1, 60, 60)))
    with pytest.raises(ValueError, match="without psf_shears"):
        compute_blended_sums(
            ParametricGalaxies("sersic"),
            SCENE,
            make_arms((0.02,), (0.05,)),
            density=10.0,
            magnitude=(20.0, 22.0),
            target_fwhm=0.85,
            seed=1,
            blocks=[0],
        )

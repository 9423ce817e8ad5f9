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

from lsst.meas.deeplearn.shear.bias import ShearSums, fit_bias
from lsst.meas.deeplearn.shear.blends import MetaDetection, compute_blended_sums, draw_scene
from lsst.meas.deeplearn.shear.metacal import Metacalibration
from lsst.meas.deeplearn.shear.morphologies import ParametricGalaxies
from lsst.meas.deeplearn.shear.simulation import GalaxySample, Scene, make_arms

SCALE, SIZE = 0.2, 121
PSF = galsim.Moffat(beta=2.5, fwhm=0.7).shear(g1=0.02, g2=-0.02)
SCENE = Scene(PSF, SCALE, noise_sigma=0.2)


def make_scene() -> tuple[GalaxySample, np.ndarray]:
    """Return four bright galaxies, far from each other, and their image."""
    galaxies = GalaxySample.draw(np.arange(4), seed=2, magnitude=(20.0, 20.5))
    galaxies.offset[:] = [(-25.3, -25.1), (25.2, -24.6), (-24.7, 25.4), (25.0, 25.0)]
    images = ParametricGalaxies("sersic").draw(galaxies)
    return galaxies, draw_scene(images, galaxies, SCENE, np.zeros(4), size=SIZE)


def test_scene_is_that_of_galsim() -> None:
    """Galaxies are where they should be, sheared with their positions."""
    galaxies, _ = make_scene()
    arm = (0.05, 0.02, 0.0, 0.0)
    profiles = [
        galsim.Exponential(half_light_radius=0.3).shift(*offset * SCALE) for offset in galaxies.offset
    ]
    scene = galsim.Convolve(galsim.Add(profiles).shear(g1=arm[0], g2=arm[1]), PSF)
    expected = scene.drawImage(nx=SIZE, ny=SIZE, scale=SCALE, method="no_pixel").array
    galaxies.magnitude[:] = 31.4
    images = ParametricGalaxies("sersic").draw(galaxies)
    round_images = type(images).from_profiles(4 * [galsim.Exponential(half_light_radius=0.3)])
    image = draw_scene(round_images, galaxies, SCENE, arm, size=SIZE)
    np.testing.assert_allclose(image, expected, atol=1e-3 * expected.max())


def test_shapes_are_those_of_metacalibration() -> None:
    """Lonely galaxies are found where they are, in all versions; their shapes
    are those of metacalibration of a stamp.
    """
    galaxies, image = make_scene()
    detector = MetaDetection(SCENE.draw_psf(), pixel_scale=SCALE, size=SIZE, target_fwhm=0.85)
    found = detector.measure(image, np.zeros_like(image), noise_sigma=1e-3 * image.max())
    assert [len(detections.x) for detections in found] == 5 * [4]
    # Row by row, as the galaxies are.
    orders = [np.lexsort((detections.x, detections.y > 0)) for detections in found]
    engine = Metacalibration(pixel_scale=SCALE, stamp_size=49, target_fwhm=0.85, regularization=0.0)
    middle = SIZE // 2
    np.testing.assert_allclose(found[0].x[orders[0]], galaxies.offset[:, 0], atol=0.02)
    np.testing.assert_allclose(found[0].y[orders[0]], galaxies.offset[:, 1], atol=0.02)
    stamps = []
    for x, y in galaxies.offset:
        column, row = round(x) + middle, round(y) + middle
        stamps.append(image[row - 24 : row + 25, column - 24 : column + 25])
    psf = Scene(PSF, SCALE, stamp_size=49).draw_psf()
    shapes = engine.measure(np.array(stamps), psf)
    e = []
    for detections, order in zip(found, orders, strict=True):
        # The regulariser of the detector.
        factor = (detections.snr + 10.0) / detections.snr
        e.append((detections.e * factor[:, None])[order])
    np.testing.assert_allclose(np.swapaxes(e, 0, 1), shapes.e, atol=1e-3)
    response = (e[1] - e[2])[:, 0] / 0.02
    expected = (shapes.e[:, 1] - shapes.e[:, 2])[:, 0] / 0.02
    np.testing.assert_allclose(response, expected, rtol=0.03)


def test_blended_sums() -> None:
    """A sparse scene has a bias consistent with zero, and the same seed gives
    the same sums.
    """
    parts = [
        compute_blended_sums(
            ParametricGalaxies("sersic"),
            SCENE,
            make_arms((0.02,)),
            density=15.0,
            magnitude=(20.0, 22.0),
            target_fwhm=0.85,
            seed=1,
            block=block,
            size=SIZE,
        )
        for block in (0, 1, 2, 2)
    ]
    np.testing.assert_array_equal(parts[2]["metadetection"].values, parts[3]["metadetection"].values)
    bias = fit_bias(ShearSums.concatenate([part["no_detection"] for part in parts[:3]]))
    assert bias.n_objects > 3
    assert bias.response[0, 0] == pytest.approx(bias.response[1, 1], rel=0.3)

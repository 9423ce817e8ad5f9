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


"""Tests of what is mistaken for lensed arcs."""

from __future__ import annotations

import galsim
import numpy as np
import pytest

from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.lenses.contaminants import PAINTERS, paint_contaminants
from lsst.meas.deeplearn.lenses.simulate_lenses_task import NonLensConfig, SimulateLensesConfig

SIZE = 55
FLUX = np.array([2e3, 6e3, 1e4])  # nJy in g, r, i
IN_ONE_BAND = ("trail", "cosmic_ray", "bleed", "ghost")
GALAXIES = ("companion", "satellite", "spiral", "ring", "merger", "edge_on")


def make_cutouts(n: int, *, noise: float = 10.0, angle: float = 0.0) -> Cutouts:
    """Make stamps of flattened galaxies, whose major axes are at an angle in
    degrees, and the same PSF everywhere.
    """
    psf = galsim.Moffat(beta=3.0, fwhm=0.75)
    kernel = psf.drawImage(nx=25, ny=25, scale=0.2).array
    galaxy = galsim.Exponential(half_light_radius=0.8).shear(q=0.6, beta=angle * galsim.degrees)
    galaxy = galsim.Convolve(galaxy, psf).drawImage(nx=SIZE, ny=SIZE, scale=0.2).array
    shape = (n, 3, SIZE, SIZE)
    image = np.random.default_rng(1).normal(0, noise, shape) + galaxy * FLUX[:, None, None]
    return Cutouts(
        bands=("g", "r", "i"),
        pixel_scale=0.2,
        ids=np.arange(n),
        ra=np.full(n, 150.0),
        dec=np.full(n, 2.0),
        x=np.zeros(n),
        y=np.zeros(n),
        image=image.astype(np.float32),
        variance=np.full(shape, noise**2, dtype=np.float32),
        bad=np.zeros(shape, dtype=bool),
        psf=np.broadcast_to(kernel / kernel.sum(), (n, 3, 25, 25)).astype(np.float32),
        off_edge=np.zeros(n, dtype=bool),
        missing_band=np.zeros((n, 3), dtype=bool),
        missing_cell=np.zeros((n, 3), dtype=bool),
    )


def paint(painter: str, n: int = 40, **kwargs: float) -> np.ndarray:
    """Return the light that a painter adds, shape ``(N, B, y, x)``."""
    cutouts = make_cutouts(n, **kwargs)
    painted = paint_contaminants(cutouts, painter, np.tile(FLUX, (n, 1)), seed=3)
    return (painted.image - cutouts.image).astype(np.float64)


def make_radius() -> np.ndarray:
    """Return the distance of each pixel from the centre in arcsec."""
    y, x = (np.mgrid[:SIZE, :SIZE] - SIZE // 2) * 0.2
    return np.asarray(np.hypot(x, y))


def test_every_painter_can_be_configured() -> None:
    """The configuration knows all painters, and the default uses each."""
    choices = {name for name in NonLensConfig.painter.allowed if name is not None}
    assert choices == set(PAINTERS)
    kinds = SimulateLensesConfig().nonLenses
    assert {kind.painter for kind in kinds.values()} - {None} == set(PAINTERS)
    assert sum(kind.fraction for kind in kinds.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("painter", PAINTERS)
def test_paint_is_light(painter: str) -> None:
    """Something finite is added to each galaxy, the same for a seed."""
    light = paint(painter, 8)
    assert np.isfinite(light).all()
    assert (np.abs(light).max(axis=(1, 2, 3)) > 1.0).all()
    np.testing.assert_array_equal(light, paint(painter, 8))


@pytest.mark.parametrize("painter", PAINTERS)
def test_unusable_pixels_do_no_harm(painter: str) -> None:
    """Bad pixels stay as they are, and spoil no others; stamps without any
    good pixel, and fluxes that are not numbers, are survived.
    """
    cutouts = make_cutouts(3)
    cutouts.image[0, 1, 20:30, :] = np.nan
    cutouts.variance[0, 1, 20:30, :] = np.nan
    cutouts.bad[0, 1, 20:30, :] = True
    cutouts.image[1], cutouts.variance[1], cutouts.bad[1] = np.nan, np.nan, True
    flux = np.tile(FLUX, (3, 1))
    flux[2, 0] = np.nan
    painted = paint_contaminants(cutouts, painter, flux, gain={"g": 1.0, "r": 1.0, "i": 1.0}, seed=1)
    np.testing.assert_array_equal(np.isnan(painted.image), np.isnan(cutouts.image))
    np.testing.assert_array_equal(painted.bad, cutouts.bad)


@pytest.mark.parametrize("painter", IN_ONE_BAND)
def test_artefacts_are_in_one_band(painter: str) -> None:
    """A detector leaves its marks in one band only."""
    n_bands = (np.abs(paint(painter)).max(axis=(2, 3)) > 1e-2).sum(axis=1)
    assert (n_bands == 1).all()


@pytest.mark.parametrize("painter", [*GALAXIES, "spike"])
def test_sources_are_in_all_bands(painter: str) -> None:
    """What shines is in all bands, and nowhere negative but for ringing."""
    light = paint(painter)
    assert (light.max(axis=(2, 3)) > 0.1).all()
    assert (light.min(axis=(1, 2, 3)) > -0.03 * light.max(axis=(1, 2, 3))).all()


@pytest.mark.parametrize("painter", ["spiral", "ring"])
def test_discs_are_concentric_and_blue(painter: str) -> None:
    """Rings and arms are around the galaxy, and bluer than it."""
    light = paint(painter)
    y, x = (np.mgrid[:SIZE, :SIZE] - SIZE // 2) * 0.2
    total = light.sum(axis=(1, 2, 3))
    for axis in (x, y):
        assert np.median(np.abs((light.sum(axis=1) * axis).sum(axis=(1, 2)) / total)) < 0.2
    flux = light.sum(axis=(2, 3))
    color = -2.5 * np.log10(flux[:, 0] / flux[:, 2])
    assert np.median(color) < -2.5 * np.log10(FLUX[0] / FLUX[2]) - 0.5


def test_ring_has_a_hole() -> None:
    """A ring is dark at its centre, and goes all the way round."""
    light, radius = paint("ring").sum(axis=1), make_radius()
    angle = np.arctan2(*(np.mgrid[:SIZE, :SIZE] - SIZE // 2))
    assert (light[:, radius < 0.3].mean(axis=1) < 0.5 * light.max(axis=(1, 2))).all()
    sectors = np.array(
        [light[:, np.abs(angle - k * np.pi / 4) < np.pi / 8].sum(axis=1) for k in range(-3, 4)]
    )
    assert (sectors.min(axis=0) > 0.1 * sectors.max(axis=0)).all()


def test_spiral_turns() -> None:
    """The direction of the arms changes with the distance."""
    light, radius = paint("spiral").sum(axis=1), make_radius()
    phi = np.arctan2(*(np.mgrid[:SIZE, :SIZE] - SIZE // 2))
    inner, outer = (
        np.angle((light * np.exp(2j * phi))[:, (radius > low) & (radius < high)].sum(axis=1))
        for low, high in ((1.2, 1.6), (2.0, 2.6))
    )
    turn = np.abs(np.angle(np.exp(1j * (outer - inner)))) / 2
    assert np.median(turn) > np.radians(25)


def test_edge_on_disc_is_thin_and_along_the_galaxy() -> None:
    """Discs of the galaxy lie along its major axis."""
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    light = paint("edge_on", angle=30.0).sum(axis=1)
    total = light.sum(axis=(1, 2))
    centred = np.hypot(*((light * axis).sum(axis=(1, 2)) / total for axis in (x, y))) < 1.5
    xx, yy, xy = (
        (light * product).sum(axis=(1, 2))[centred] / total[centred] for product in (x * x, y * y, x * y)
    )
    angle = np.degrees(0.5 * np.arctan2(2 * xy, xx - yy))
    np.testing.assert_allclose(angle, 30.0, atol=6.0)
    mean, half = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    assert (np.sqrt((mean - half) / (mean + half)) < 0.5).all()
    assert 0.4 < centred.mean() < 0.8


def test_merger_has_a_second_galaxy() -> None:
    """The light of the second galaxy and the tails is like the first's."""
    flux = paint("merger").sum(axis=(2, 3))[:, 2] / FLUX[2]
    assert 0.4 < np.median(flux) < 1.6


def test_trail_is_straight_and_crosses() -> None:
    """A trail goes from edge to edge."""
    light = np.abs(paint("trail")).max(axis=1)
    edge = np.concatenate([light[:, 0], light[:, -1], light[:, :, 0], light[:, :, -1]], axis=1)
    bright = edge > 0.5 * light.max(axis=(1, 2))[:, None]
    assert (bright.sum(axis=1) >= 2).all()


def test_paint_has_poisson_noise() -> None:
    """With a gain, variance and noise grow by the light over the gain."""
    n = 100
    cutouts = make_cutouts(n)
    flux = np.tile(FLUX, (n, 1))
    light = paint_contaminants(cutouts, "ring", flux, seed=3).image - cutouts.image
    gain = {"g": 2.0, "i": 0.5}
    noisy = paint_contaminants(cutouts, "ring", flux, gain=gain, seed=3)
    added = noisy.variance - cutouts.variance
    for band, expected in ((0, 0.5), (1, 0.0), (2, 2.0)):
        np.testing.assert_allclose(added[:, band], expected * light[:, band].clip(0), rtol=1e-3, atol=0.1)
    noise = (noisy.image - cutouts.image - light)[:, 2]
    bright = light[:, 2] > 5.0
    pull = noise[bright] / np.sqrt(2.0 * light[:, 2][bright])
    assert pull.std() == pytest.approx(1.0, abs=0.02)
    assert not (noisy.image - cutouts.image - light)[:, 1].any()


def test_unknown_painter_is_refused() -> None:
    """The message lists the painters; nothing is painted on nothing."""
    with pytest.raises(ValueError, match="edge_on"):
        paint_contaminants(make_cutouts(1), "unicorn", FLUX[None])
    assert len(paint_contaminants(make_cutouts(2)[:0], "ring", FLUX[None][:0])) == 0

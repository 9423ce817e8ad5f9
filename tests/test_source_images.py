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


"""Tests of images of galaxies as sources."""

from __future__ import annotations

from pathlib import Path

import galsim
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from lsst.meas.deeplearn.lenses.lens_population import (
    assign_source_images,
    complete_lens_population,
    rotate_lenses,
    sample_lens_population,
)
from lsst.meas.deeplearn.lenses.simulation import render_arcs
from lsst.meas.deeplearn.lenses.source_images import SourceImages, read_cosmos_images

SCALE = 0.05  # arcsec


def make_image(*, radius: float = 0.4, q: float = 0.5, beta: float = 0.0, dx: float = 0.0) -> np.ndarray:
    """Make the image of a galaxy of known profile."""
    galaxy = galsim.Sersic(1.0, half_light_radius=radius, trunc=2.0).shear(q=q, beta=beta * galsim.degrees)
    return np.asarray(galaxy.shift(dx, 0).drawImage(nx=101, ny=101, scale=SCALE, method="no_pixel").array)


def make_lenses(n: int = 6, *, angle: float = 0.0) -> tuple[Table, Table]:
    """Make lenses whose sources are profiles, and the same as images."""
    lenses = sample_lens_population(n, seed=4)
    lenses["source_knot_flux"] = 0.0
    for name, value in {"half_light_radius": 0.3, "axis_ratio": 0.5, "sersic_index": 1.0}.items():
        lenses[f"source_{name}"] = value
    lenses["source_position_angle"] = angle
    with_images = assign_source_images(lenses, np.array([77]), fraction=1.0, seed=1)
    with_images["source_image_angle"] = angle
    # The circle with half of the light is not the ellipse.
    image = SourceImages.from_arrays(make_image()[None], SCALE)
    with_images["source_half_light_radius"] *= image.half_light_radius[0] / 0.4
    return lenses, with_images


@pytest.mark.parametrize("angle", [0.0, 35.0])
def test_image_of_a_profile_is_lensed_like_it(angle: float) -> None:
    """An image, off its centre and of another size and scale, makes the arcs
    of the profile that it shows.
    """
    lenses, with_images = make_lenses(angle=angle)
    images = SourceImages.from_arrays(17.0 * make_image(dx=0.3)[None], SCALE)
    kwargs = {"bands": "i", "pixel_scale": 0.2, "size": 35}
    expected = render_arcs(lenses, **kwargs)
    arcs = render_arcs(with_images, images=images, **kwargs)
    peak = expected.max(axis=(1, 2, 3))
    assert np.median(np.abs(arcs - expected).max(axis=(1, 2, 3)) / peak) < 0.05
    np.testing.assert_allclose(arcs.sum(axis=(1, 2, 3)), expected.sum(axis=(1, 2, 3)), rtol=0.05)


def test_images_and_profiles_mix() -> None:
    """Sources with and without image can be in one table."""
    lenses, with_images = make_lenses(4)
    with_images["source_image"][1:3] = -1
    with_images["source_half_light_radius"][1:3] = lenses["source_half_light_radius"][1:3]
    images = SourceImages.from_arrays(make_image()[None], SCALE)
    kwargs = {"bands": "gi", "pixel_scale": 0.2, "size": 31}
    arcs = render_arcs(with_images, images=images, **kwargs)
    np.testing.assert_allclose(arcs[1:3], render_arcs(lenses[1:3], **kwargs), rtol=1e-4, atol=1e-3)
    assert not np.allclose(arcs[0], render_arcs(lenses[:1], **kwargs)[0], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="must be given"):
        render_arcs(with_images, **kwargs)


def test_rotation_turns_images_too() -> None:
    """A lens turned as a whole turns its image."""
    _, lenses = make_lenses(3)
    images = SourceImages.from_arrays(make_image(dx=0.2)[None], SCALE)
    kwargs = {"bands": "i", "pixel_scale": 0.2, "size": 31, "images": images}
    plain = render_arcs(lenses, **kwargs)
    turned = render_arcs(rotate_lenses(lenses, np.full(3, 90.0)), **kwargs)
    np.testing.assert_allclose(turned, np.rot90(plain, -1, axes=(2, 3)), atol=2e-3 * plain.max())


def test_images_keep_their_ids() -> None:
    """Sources have the IDs of their images, and only usable ones."""
    lenses = sample_lens_population(200, seed=1)
    chosen = assign_source_images(lenses, np.array([5, -1, 9]), fraction=0.5, seed=2)
    with_image = np.asarray(chosen["source_image"] >= 0)
    assert 0.35 < with_image.mean() < 0.65
    assert set(chosen["source_id"][with_image]) == {5, 9}
    assert (chosen["source_id"][~with_image] == lenses["source_id"][~with_image]).all()
    none = assign_source_images(lenses, np.array([-1]), fraction=0.5, seed=2)
    assert (none["source_image"] == -1).all()


def test_half_light_radius_is_measured() -> None:
    """A round galaxy has the radius that it was made with."""
    images = SourceImages.from_arrays(np.stack([make_image(q=1.0, radius=r) for r in (0.2, 0.4)]), SCALE)
    np.testing.assert_allclose(images.half_light_radius, [0.2, 0.4], atol=0.025)
    np.testing.assert_allclose(images.image.sum(axis=(1, 2)), 1.0, rtol=1e-5)


def test_table_round_trip() -> None:
    """Nothing is lost in a table."""
    images = SourceImages.from_arrays(make_image()[None], SCALE, np.array([2**40]))
    again = SourceImages.from_table(images.to_table())
    assert again.ids[0] == 2**40
    np.testing.assert_allclose(again.image, images.image, rtol=1e-6)
    with pytest.raises(ValueError, match="pixel_scale"):
        SourceImages.from_table(images.to_table()["source_id", "image"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.ones((2, 4, 5)), "shape"),
        (np.full((1, 9, 9), np.nan), "finite"),
        (np.zeros((1, 9, 9)), "no light"),
        (np.ones((1, 9, 9)), "edge"),
    ],
)
def test_impossible_images_are_refused(image: np.ndarray, message: str) -> None:
    """Images that cannot be sources are refused."""
    with pytest.raises(ValueError, match=message):
        SourceImages.from_arrays(image, SCALE)


def make_cosmos_catalog(folder: Path) -> Path:
    """Make a real-galaxy catalogue of three galaxies, one of them huge, with
    neighbours, in GalSim's layout.
    """
    rng = np.random.default_rng(1)
    stamps = []
    for radius, flux in ((0.3, 100.0), (0.45, 100.0), (6.0, 4e4)):
        galaxy = galsim.Exponential(half_light_radius=radius, flux=flux)
        neighbour = galsim.Gaussian(sigma=0.15, flux=60.0).shift(2.5, 2.5)
        stamp = galsim.Add(galaxy, neighbour).drawImage(nx=201, ny=201, scale=0.03).array
        stamps.append(stamp + rng.normal(0, 2.7e-3, stamp.shape))
    psf = galsim.Gaussian(sigma=0.05).drawImage(nx=31, ny=31, scale=0.03).array
    for name, arrays in (("images", stamps), ("psfs", [psf] * 3)):
        hdus = [fits.PrimaryHDU(), *(fits.ImageHDU(np.asarray(array, np.float32)) for array in arrays)]
        fits.HDUList(hdus).writeto(folder / f"{name}.fits")
    catalog = Table(
        {
            "IDENT": [101, 102, 103],
            "MAG": [22.0] * 3,
            "BAND": ["F814W"] * 3,
            "WEIGHT": [1.0] * 3,
            "GAL_FILENAME": ["images.fits"] * 3,
            "PSF_FILENAME": ["psfs.fits"] * 3,
            "NOISE_FILENAME": ["none.fits"] * 3,
            "GAL_HDU": [1, 2, 3],
            "PSF_HDU": [1, 2, 3],
            "PIXEL_SCALE": [0.03] * 3,
            "NOISE_MEAN": [0.0] * 3,
            "NOISE_VARIANCE": [2.7e-3**2] * 3,
        }
    )
    catalog.write(folder / "catalog.fits")
    return folder / "catalog.fits"


def test_cosmos_galaxies_are_isolated(tmp_path: Path) -> None:
    """Neighbours and noise are cut off; galaxies too large are left out."""
    images = read_cosmos_images(make_cosmos_catalog(tmp_path), size=128)
    assert images.ids.tolist() == [101, 102]
    np.testing.assert_allclose(images.half_light_radius, [0.3, 0.45], rtol=0.12)
    y, x = np.indices((128, 128))
    for k in range(2):
        r = np.hypot(x - images.center[k, 0], y - images.center[k, 1])
        assert np.abs(images.image[k][r > 60]).max() < 1e-5
    with pytest.raises(ValueError, match="fits into"):
        read_cosmos_images(tmp_path / "catalog.fits", indices=[2])


def test_catalogue_is_completed() -> None:
    """A catalogue with the least columns gives multiply imaged sources."""
    prior = sample_lens_population(50, seed=1, bands="gri")
    names = ["einstein_radius", "source_half_light_radius"]
    names += [f"{kind}_mag_{band}" for kind in ("lens", "source") for band in "gri"]
    lenses = complete_lens_population(prior[names], bands="gri", seed=2)
    assert (np.hypot(lenses["source_x"], lenses["source_y"]) < lenses["einstein_radius"]).all()
    arcs = render_arcs(lenses, bands="gri", pixel_scale=0.2, size=45)
    assert (arcs.sum(axis=(1, 2, 3)) > 0).all()
    # What is there is kept.
    full = complete_lens_population(prior, bands="gri", seed=2)
    for name in ("source_id", "source_x", "gamma1", "source_knot_flux"):
        np.testing.assert_array_equal(full[name], prior[name])


def test_senseless_catalogues_are_refused() -> None:
    """Missing columns and impossible values are named."""
    prior = sample_lens_population(5, seed=1, bands="gri")
    with pytest.raises(ValueError, match="source_mag_z"):
        complete_lens_population(prior, bands="griz", seed=1)
    prior["einstein_radius"][2] = -1.0
    with pytest.raises(ValueError, match="einstein_radius"):
        complete_lens_population(prior, bands="gri", seed=1)

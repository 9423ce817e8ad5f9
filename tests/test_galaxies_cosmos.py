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


"""Tests of training sets of galaxies."""

from __future__ import annotations

import os
from pathlib import Path

import galsim
import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from lsst.meas.deeplearn.galaxies.cosmos import (
    COSMOS_ZERO_POINT,
    GalaxySet,
    GalaxySetError,
    read_cosmos_set,
)
from lsst.meas.deeplearn.galaxies.fourier import compute_transform

DATA = Path(os.environ.get("MEAS_DEEPLEARN_GALAXY_DATA", "none"))
"""Folder with the catalogues of GalSim; tests are skipped without."""

HALF_LIGHT_RADII = (0.15, 0.25, 0.35)
MAGNITUDE = 20.0


def make_test_catalog(folder: Path) -> Path:
    """Write a COSMOS catalogue of three exponential galaxies.

    Their stamps are of different sizes and not centred; the second one has a
    corner of zeros, and the third one a larger one.
    """
    flux = 10 ** (-0.4 * (MAGNITUDE - COSMOS_ZERO_POINT))
    psf = galsim.Convolve(galsim.Gaussian(fwhm=0.1), galsim.Pixel(0.03))
    noise = galsim.getCOSMOSNoise(rng=galsim.BaseDeviate(5), variance=7.5e-6)
    images, psfs = fits.HDUList(), fits.HDUList()
    for i, radius in enumerate(HALF_LIGHT_RADII):
        galaxy = galsim.Exponential(half_light_radius=radius, flux=flux).shear(g1=0.2).shift(0.07, -0.04)
        stamp = galsim.Image(180, 151 + 10 * i, scale=0.03, dtype=np.float32)
        galsim.Convolve(galaxy, psf).drawImage(stamp, method="no_pixel")
        stamp.addNoise(noise)
        if i > 0:
            stamp.array[: 20 * i, : 20 * i] = 0
        images.append(fits.ImageHDU(stamp.array) if i else fits.PrimaryHDU(stamp.array))
        psf_stamp = psf.drawImage(nx=37, ny=39, scale=0.03, method="no_pixel").array
        psfs.append(fits.ImageHDU(psf_stamp) if i else fits.PrimaryHDU(psf_stamp))
    images.writeto(folder / "images.fits")
    psfs.writeto(folder / "psfs.fits")
    n = len(HALF_LIGHT_RADII)
    correlation = Path(galsim.meta_data.share_dir) / "acs_I_unrot_sci_20_cf.fits"
    (folder / "cf.fits").write_bytes(correlation.read_bytes())
    catalog = Table(
        {
            "IDENT": 10 + np.arange(n),
            "RA": 150 + 0.2 * np.arange(n),
            "DEC": np.full(n, 2.0),
            "MAG": np.full(n, MAGNITUDE),
            "BAND": ["F814W"] * n,
            "WEIGHT": np.ones(n),
            "GAL_FILENAME": ["images.fits"] * n,
            "PSF_FILENAME": ["psfs.fits"] * n,
            "GAL_HDU": np.arange(n),
            "PSF_HDU": np.arange(n),
            "PIXEL_SCALE": np.full(n, 0.03),
            "NOISE_MEAN": np.zeros(n),
            "NOISE_VARIANCE": np.full(n, 7.5e-6),
            "NOISE_FILENAME": ["cf.fits"] * n,
            "stamp_flux": np.full(n, flux),
        }
    )
    path = folder / "real_galaxy_catalog_test.fits"
    catalog.write(path)
    fit = Table({"IDENT": catalog["IDENT"], "mag_auto": catalog["MAG"], "zphot": np.full(n, 0.7)})
    fit["hlr"] = np.column_stack([HALF_LIGHT_RADII, np.zeros((n, 2))])
    fit["flux"] = np.tile([flux, 0, 0, 0], (n, 1))
    fit["viable_sersic"], fit["use_bulgefit"] = np.ones(n, dtype=int), np.zeros(n, dtype=int)
    fit.write(folder / "real_galaxy_catalog_test_fits.fits")
    return path


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


def test_reads_a_catalog(tmp_path: Path) -> None:
    """Flux, size, centre, PSF, noise and conditions are those put in."""
    galaxies = read_cosmos_set(make_test_catalog(tmp_path), exclusion_level="none")
    # The third stamp has more zeros than can be repaired.
    assert galaxies.ids.tolist() == [10, 11]
    np.testing.assert_allclose(galaxies.conditions, [[0.15, 20, 0.7], [0.25, 20, 0.7]])
    np.testing.assert_allclose(galaxies.sky, [[150, 2], [150.2, 2]])
    assert (galaxies.size, galaxies.pixel_scale) == (128, 0.06)
    for image, psf, radius in zip(galaxies.image, galaxies.psf, HALF_LIGHT_RADII, strict=False):
        galaxy = galsim.Exponential(half_light_radius=radius).shear(g1=0.2)
        expected = galsim.Convolve(galaxy, galsim.Gaussian(fwhm=0.1), galsim.Pixel(0.03))
        model = expected.drawImage(nx=129, ny=129, scale=0.06, method="no_pixel").array[:128, :128]
        error = np.sqrt(galaxies.noise_variance[0] * galaxies.noise_power.mean())
        assert np.abs(image - model).max() < 6 * error
        assert model.max() > 20 * error
        assert image.sum() == pytest.approx(1, abs=0.02)
        assert psf.sum() == pytest.approx(1, abs=1e-4)
        assert np.unravel_index(psf.argmax(), psf.shape) == (64, 64)
    np.testing.assert_allclose(compute_whiteness(galaxies), 1, atol=0.1)


@pytest.mark.skipif(not (DATA / "real_galaxy_images.fits").exists(), reason="needs COSMOS images")
def test_reads_real_galaxies() -> None:
    """The example galaxies of GalSim have the noise that is said."""
    galaxies = read_cosmos_set(DATA / "real_galaxy_catalog_23.5_example.fits")
    assert len(galaxies) >= 85
    assert np.median(compute_whiteness(galaxies)) == pytest.approx(1, abs=0.05)
    assert np.median(galaxies.image.sum(axis=(1, 2))) == pytest.approx(1, abs=0.1)
    rest, held_out = galaxies.split(0.2)
    assert len(rest) + len(held_out) == len(galaxies)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"pixel_scale": 0.05}, "no multiple"), ({}, "galsim_download_cosmos")]
)
def test_wrong_catalogs_are_refused(tmp_path: Path, kwargs: dict[str, float], message: str) -> None:
    """A missing catalogue and a pixel scale that does not fit say so."""
    with pytest.raises(GalaxySetError, match=message):
        read_cosmos_set(tmp_path / "no.fits", **kwargs)  # type: ignore[arg-type]


def test_catalog_without_fits_is_refused(tmp_path: Path) -> None:
    """The message says how to get the files."""
    path = make_test_catalog(tmp_path)
    (tmp_path / "real_galaxy_catalog_test_fits.fits").unlink()
    with pytest.raises(GalaxySetError, match="galsim_download_cosmos"):
        read_cosmos_set(path)

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

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS

from lsst.daf.butler import Butler
from lsst.meas.deeplearn import fits_coadds
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.fits_coadds import import_fits_coadds, make_moffat_kernel, read_fits_image
from lsst.meas.deeplearn.repository import make_tangent_wcs

SCALE = 0.25
NOISE = 2.0
FWHM = 4.0
ZERO_POINT = 30.0
SHAPE = (220, 330)
NJY = 10 ** (-0.4 * (ZERO_POINT - 31.4))
"""Flux density of one count."""

STARS = [(x + 0.3, y - 0.2, 400.0 * (1 + (x + y) % 7)) for x in (40, 110, 180, 260) for y in (35, 105, 180)]
"""Position and counts of the stars."""


def _write(
    path: Path, data: np.ndarray, header: dict[str, Any] | None = None, wcs: WCS | None = None
) -> Path:
    hdu = fits.PrimaryHDU(data.astype(np.float32))
    if wcs is not None:
        hdu.header.update(wcs.to_header())
    hdu.header.update(header or {})
    hdu.writeto(path)
    return path


def _make_wcs() -> WCS:
    return make_tangent_wcs(ra=200.0, dec=-10.0, pixel_scale=SCALE, x=100.0, y=80.0)


def _make_counts(seed: int = 1) -> np.ndarray:
    image = np.random.default_rng(seed).normal(50.0, NOISE, SHAPE)
    y, x = np.indices(SHAPE)
    scale = 0.5 * FWHM / np.sqrt(2 ** (1 / 3) - 1)
    for x_star, y_star, counts in STARS:
        profile = (1 + ((x - x_star) ** 2 + (y - y_star) ** 2) / scale**2) ** -3.0
        image += counts * profile * 2 / (np.pi * scale**2)
    return image


def _write_field(folder: Path, bands: str = "gr", **header: Any) -> dict[str, Path]:
    return {
        band: _write(
            folder / f"{band}.fits", _make_counts(seed), {"MZP_AB": ZERO_POINT} | header, _make_wcs()
        )
        for seed, band in enumerate(bands)
    }


def test_import(tmp_path: Path) -> None:
    """Stars get into the repository with their coordinates and fluxes."""
    lines: list[str] = []
    root = tmp_path / "repo"
    import_fits_coadds(root, _write_field(tmp_path), sky_map="field", run="field/coadds", report=lines.append)
    assert "10 stars" in lines[0]
    butler = Butler.from_config(str(root), collections="field/coadds")
    table = butler.get("object", skymap="field", tract=0)
    assert len(table) == len(STARS)
    sky = _make_wcs().pixel_to_world([star[0] for star in STARS], [star[1] for star in STARS])
    row, distance, _ = sky.match_to_catalog_sky(SkyCoord(table["coord_ra"], table["coord_dec"]))
    assert distance.arcsec.max() < 0.2 * SCALE * 4
    truth = np.array([counts for _, _, counts in STARS]) * NJY
    for band in "gr":
        np.testing.assert_allclose(table[f"{band}_psfFlux"][row], truth, rtol=0.1)
    coadd = butler.get("deep_coadd", skymap="field", tract=0, patch=0, band="g")
    assert coadd.bbox.shape == (300, 450)
    assert coadd.bbox.start == (0, 0)
    multiband = MultibandCoadd.from_coadds({"g": coadd})
    assert multiband.pixel_scale == pytest.approx(SCALE, rel=1e-3)
    # The image is padded to whole cells.
    assert np.isfinite(multiband.planes["g"].image).sum() == np.prod(SHAPE)
    assert np.nanmedian(multiband.planes["g"].image) == pytest.approx(0, abs=0.3 * NOISE * NJY)
    assert np.nanmedian(np.sqrt(multiband.planes["g"].variance)) == pytest.approx(NOISE * NJY, rel=0.05)


def test_import_twice(tmp_path: Path) -> None:
    """A second field goes into the same repository, the first not again."""
    images = _write_field(tmp_path, "g")
    root = tmp_path / "repo"
    import_fits_coadds(root, images, sky_map="a", run="a/coadds")
    import_fits_coadds(root, images, sky_map="b", run="b/coadds")
    with pytest.raises(ValueError, match="choose another"):
        import_fits_coadds(root, images, sky_map="a", run="a/coadds")


def test_patches_of_a_large_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image becomes patches that overlap, with each object once."""
    monkeypatch.setattr(fits_coadds, "CELL_SIZE", 50)
    images = _write_field(tmp_path, "g")
    monkeypatch.setattr(fits_coadds, "MAX_PATCH_CELLS", 4)
    monkeypatch.setattr(fits_coadds, "INNER_CELLS", 4)
    import_fits_coadds(tmp_path / "repo", images, sky_map="field", run="run")
    butler = Butler.from_config(str(tmp_path / "repo"), collections="run")
    assert len(butler.query_datasets("deep_coadd")) == 4
    table = butler.get("object", skymap="field", tract=0)
    sky = _make_wcs().pixel_to_world([star[0] for star in STARS], [star[1] for star in STARS])
    row, distance, _ = sky.match_to_catalog_sky(SkyCoord(table["coord_ra"], table["coord_dec"]))
    assert distance.arcsec.max() < 0.2
    assert sorted(row) == list(range(len(STARS)))


def test_psf_from_stars(tmp_path: Path) -> None:
    """The PSF made from stars is that of the stars."""
    image = read_fits_image(_write_field(tmp_path, "g")["g"])
    assert "PSF from 10 stars" in "; ".join(image.remarks)
    np.testing.assert_allclose(image.psf, make_moffat_kernel(FWHM), atol=0.05 * image.psf.max())


def test_psf_from_elsewhere(tmp_path: Path) -> None:
    """The PSF is that of a file or a width, if given, or of the header."""
    path = _write_field(tmp_path, "g", IQIMAGE=1.1)["g"]
    kernel = make_moffat_kernel(5.0, 41)
    psf = _write(tmp_path / "psf.fits", kernel * 7)
    assert read_fits_image(path, psf=psf).psf.shape == (35, 35)
    np.testing.assert_allclose(read_fits_image(path, psf=psf).psf, make_moffat_kernel(5.0), atol=1e-4)
    np.testing.assert_allclose(
        read_fits_image(path, psf_fwhm=1.0).psf, make_moffat_kernel(1.0 / SCALE), rtol=1e-6
    )
    empty = np.random.default_rng(1).normal(0, 1, SHAPE)
    field = _write(tmp_path / "empty.fits", empty, {"MZP_AB": 30.0, "IQIMAGE": 1.1}, _make_wcs())
    np.testing.assert_allclose(read_fits_image(field).psf, make_moffat_kernel(1.1 / SCALE), rtol=1e-6)
    field = _write(tmp_path / "unknown.fits", empty, {"MZP_AB": 30.0}, _make_wcs())
    with pytest.raises(ValueError, match="Give the width of the PSF"):
        read_fits_image(field)


def test_weights(tmp_path: Path) -> None:
    """Weights give the variance, and tell where there are no data."""
    path = _write_field(tmp_path, "g")["g"]
    weight = np.full(SHAPE, 1 / 9.0)
    weight[:20] = 0
    image = read_fits_image(path, weight=_write(tmp_path / "weight.fits", weight))
    assert np.isnan(image.image[:20]).all()
    assert np.isnan(image.variance[:20]).all()
    np.testing.assert_allclose(image.variance[20:], 9 * NJY**2, rtol=1e-5)
    assert any("1.5" in remark for remark in image.remarks)


def test_no_background_subtraction(tmp_path: Path) -> None:
    """The background stays if it shall."""
    image = read_fits_image(_write_field(tmp_path, "g")["g"], background_size=0)
    assert np.median(image.image) == pytest.approx(50 * NJY, rel=0.01)


def test_saturated_pixels(tmp_path: Path) -> None:
    """Pixels above the saturation level of the header are masked."""
    image = read_fits_image(_write_field(tmp_path, "g", SATURATE=100.0)["g"], psf_fwhm=1.0)
    assert 0 < image.saturated.sum() < 200


@pytest.mark.parametrize(("unit", "njy"), [("nJy", 1.0), ("uJy", 1e3)])
def test_unit_instead_of_zero_point(tmp_path: Path, unit: str, njy: float) -> None:
    """A BUNIT of flux density makes a zero point unnecessary."""
    path = _write(tmp_path / "g.fits", _make_counts(), {"BUNIT": unit}, _make_wcs())
    image = read_fits_image(path, background_size=0)
    assert np.median(image.image) == pytest.approx(50 * njy, rel=0.01)


def test_given_zero_point_goes_first(tmp_path: Path) -> None:
    """The zero point of the user is taken instead of that of the header."""
    image = read_fits_image(_write_field(tmp_path, "g")["g"], zero_point=31.4, background_size=0)
    assert np.median(image.image) == pytest.approx(50, rel=0.01)


def test_bad_files(tmp_path: Path) -> None:
    """What is wrong with a file is said."""
    counts, header = _make_counts(), {"MZP_AB": ZERO_POINT}
    wcs = _make_wcs()
    cases = {
        "no celestial WCS": _write(tmp_path / "1.fits", counts, header),
        "no zero point": _write(tmp_path / "2.fits", counts, wcs=wcs),
        "no pixel with data": _write(tmp_path / "3.fits", np.full(SHAPE, np.nan), header, wcs),
        "no two-dimensional image": _write(tmp_path / "4.fits", np.zeros((2, *SHAPE)), header, wcs),
    }
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message):
            read_fits_image(path)
    even = _write(tmp_path / "even.fits", np.ones((20, 20)))
    good = _write(tmp_path / "good.fits", counts, header, wcs)
    with pytest.raises(ValueError, match="odd sides"):
        read_fits_image(good, psf=even)
    with pytest.raises(ValueError, match="220, 330"):
        read_fits_image(good, weight=even)
    with pytest.raises(OSError, match="nowhere"):
        read_fits_image(tmp_path / "nowhere.fits")
    with pytest.raises(ValueError, match="no images"):
        import_fits_coadds(tmp_path / "repo", {}, sky_map="a", run="a")


def test_images_of_different_grids(tmp_path: Path) -> None:
    """Images that do not share their pixels are refused, nothing written."""
    images = _write_field(tmp_path, "g")
    header = {"MZP_AB": ZERO_POINT}
    shifted = make_tangent_wcs(ra=200.0, dec=-10.0, pixel_scale=SCALE, x=100.5, y=80.0)
    images["r"] = _write(tmp_path / "shifted.fits", _make_counts(), header, shifted)
    with pytest.raises(ValueError, match=r"differ by 0\.5 pixels"):
        import_fits_coadds(tmp_path / "repo", images, sky_map="a", run="a")
    images["r"] = _write(tmp_path / "small.fits", _make_counts()[:200], header, _make_wcs())
    with pytest.raises(ValueError, match="Resample them to one grid"):
        import_fits_coadds(tmp_path / "repo", images, sky_map="a", run="a")
    assert not (tmp_path / "repo").exists()

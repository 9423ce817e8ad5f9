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

import astropy.units as u
import numpy as np
import pytest
from astropy.table import Table
from scipy.spatial import cKDTree

from lsst.daf.butler import Butler
from lsst.images import Box
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.detection import (
    BAND_COLUMNS,
    OBJECT_COLUMNS,
    compute_adaptive_moments,
    detect_objects,
    make_object_ids,
    select_primary,
)
from lsst.meas.deeplearn.tests import make_test_coadds, make_test_repository

# Isolated stars on the test coadd, which starts at x = 600, y = 1200.
STARS = [
    (x + dx, y + dy, flux)
    for (x, y), dx, dy, flux in zip(
        [(x, y) for y in (1240, 1310, 1370, 1450) for x in (640, 720, 800, 860)],
        np.linspace(-0.5, 0.5, 16),
        np.linspace(0.4, -0.4, 16),
        np.geomspace(500, 20000, 16),
        strict=True,
    )
]


def _detect(bands: str = "gri", stars: list[tuple[float, float, float]] = STARS, **kwargs: object) -> Table:
    coadds = make_test_coadds("gri", sources=stars, **kwargs)
    return detect_objects(MultibandCoadd.from_coadds(coadds, bands), tract=7, patch=3)


def _match(table: Table, stars: list[tuple[float, float, float]] = STARS) -> np.ndarray:
    """Return the row of each star, having checked that there is one."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("g"))
    x, y = coadd.sky_to_pixel(ra=table["coord_ra"], dec=table["coord_dec"])
    distance, row = cKDTree(np.stack([x, y], axis=1)).query([star[:2] for star in stars])
    assert distance.max() < 0.5
    return row


def test_detect_stars() -> None:
    """Every star is found once, in its place, with its flux within errors."""
    table = _detect()
    assert len(table) == len(STARS)
    stars = table[_match(table)]
    truth = np.array([flux for _, _, flux in STARS])
    for band in "gri":
        pull = (stars[f"{band}_psfFlux"] - truth) / stars[f"{band}_psfFluxErr"]
        assert np.abs(pull).max() < 4
        assert 0.4 < np.std(pull) < 1.8
        total = (stars[f"{band}_cModelFlux"] - truth) / stars[f"{band}_cModelFluxErr"]
        assert np.abs(total).max() < 4.5
        np.testing.assert_allclose(stars[f"{band}_ixx"][-8:], stars[f"{band}_ixxPSF"][-8:], rtol=0.1)
    assert set(stars["refBand"]) == {"i"}
    np.testing.assert_array_equal(stars["refExtendedness"][-8:], 0)
    assert not stars["detect_fromBlend"].any()


def test_detect_galaxy() -> None:
    """A galaxy is extended, and its total flux exceeds its PSF flux."""
    coadds = make_test_coadds("gri")
    y, x = np.mgrid[1200:1500, 600:900]
    galaxy = np.exp(-0.5 * (((x - 750.3) / 5) ** 2 + ((y - 1349.8) / 3) ** 2))
    for coadd in coadds.values():
        coadd.image.array += (20000 * galaxy / galaxy.sum()).astype(np.float32)
    (row,) = detect_objects(MultibandCoadd.from_coadds(coadds))
    assert row["refExtendedness"] == 1
    assert row["i_cModelFlux"] == pytest.approx(20000, rel=0.03)
    assert row["i_kronFlux"] == pytest.approx(20000, rel=0.03)
    assert row["i_psfFlux"] < 0.6 * row["i_cModelFlux"]
    assert row["shape_xx"] == pytest.approx(25, rel=0.05)
    assert row["shape_yy"] == pytest.approx(9, rel=0.05)


def test_deblend() -> None:
    """Two stars that touch are two objects, marked as deblended."""
    stars = [(750.0, 1350.0, 5000.0), (757.0, 1350.0, 3000.0)]
    table = _detect(stars=stars)
    assert len(table) == 2
    assert table["detect_fromBlend"].all()
    assert table["i_psfFlux"][_match(table, stars)[0]] == pytest.approx(5000, rel=0.1)


@pytest.mark.parametrize("correlate", [False, True])
def test_noise_gives_no_objects(correlate: bool) -> None:
    """There is nothing to detect in noise, even if pixels are correlated."""
    coadds = make_test_coadds("gri")
    for coadd in coadds.values():
        if correlate:
            image = coadd.image.array
            image[:] = (image + np.roll(image, 1, 0) + np.roll(image, 1, 1) + np.roll(image, 1, (0, 1))) / 2
    assert len(detect_objects(MultibandCoadd.from_coadds(coadds))) == 0


def test_empty_table_has_all_columns(tmp_path: Path) -> None:
    """A patch without objects gives all columns, which survive the butler."""
    table = _detect(stars=[])
    assert len(table) == 0
    assert table.colnames == _detect().colnames
    assert len(table.colnames) == len(OBJECT_COLUMNS) + 3 * len(BAND_COLUMNS)
    assert len(select_primary([table, table])) == 0


def test_no_data_at_all() -> None:
    """A patch whose pixels are all masked gives an empty table."""
    coadds = make_test_coadds("gri", mask_boxes={"NO_DATA": Box.from_shape((300, 300), start=(1200, 600))})
    assert len(detect_objects(MultibandCoadd.from_coadds(coadds))) == 0


def test_missing_band() -> None:
    """In a missing band there are NaNs and flags."""
    table = _detect(bands="griz")
    assert len(table) == len(STARS)
    for name, kind, _, _ in BAND_COLUMNS:
        if kind is np.bool_:
            assert table[f"z_{name}"].all()
        else:
            assert np.isnan(table[f"z_{name}"]).all()


def test_missing_cell_in_one_band() -> None:
    """Objects in a cell that one band lacks are measured in the others."""
    coadds = make_test_coadds("gri", sources=STARS)
    coadds["g"] = make_test_coadds("g", sources=STARS, missing_cells=[(0, 1)])["g"]
    table = detect_objects(MultibandCoadd.from_coadds(coadds))
    assert len(table) == len(STARS)
    stars = table[_match(table)]
    inside = np.array([x > 760 and y < 1340 for x, y, _ in STARS])
    assert inside.any()
    for name in ("g_psfFlux_flag", "g_cModel_flag", "g_invalidPsfFlag", "g_pixelFlags_nodata"):
        np.testing.assert_array_equal(stars[name], inside)
    np.testing.assert_array_equal(np.isnan(stars["g_psfFlux"]), inside)
    np.testing.assert_array_equal(np.isnan(stars["g_cModelFlux"]), inside)
    assert np.isfinite(stars["r_psfFlux"]).all()


def test_pixel_flags() -> None:
    """Mask planes become flags of the objects that they touch."""
    x, y, _ = STARS[5]
    center = Box.from_shape((3, 3), start=(round(y) - 1, round(x) - 1))
    table = _detect(mask_boxes={"SATURATED": center})
    stars = table[_match(table)]
    for name in ("i_pixelFlags_saturated", "i_pixelFlags_saturatedCenter"):
        assert list(np.flatnonzero(stars[name])) == [5]
    assert not stars["i_pixelFlags_interpolated"].any()


def test_reference_band() -> None:
    """The reference band is the first one in which an object is clear."""
    coadds = make_test_coadds("gri", sources=STARS)
    coadds["i"] = make_test_coadds("i", noise=5.0)["i"]
    table = detect_objects(MultibandCoadd.from_coadds(coadds), reference_bands=("i", "r", "g"))
    assert set(table["refBand"]) == {"r"}


def test_object_ids_are_unique() -> None:
    """IDs are positive and differ between patches and tracts."""
    ids = np.concatenate([make_object_ids(t, p, 5) for t in (0, 1, 20000) for p in (0, 1, 99)])
    assert len(np.unique(ids)) == 45
    assert ids.min() > 0
    assert ids.dtype == np.int64
    with pytest.raises(ValueError, match="No object IDs"):
        make_object_ids(0, 1 << 13, 1)


def test_columns_are_described() -> None:
    """All columns have a description, and fluxes a unit."""
    table = _detect()
    assert all(column.description for column in table.itercols())
    assert table["i_cModelFlux"].unit == u.nJy
    assert table["coord_ra"].unit == u.deg
    assert "Not a model fit" in table["i_cModelFlux"].description


def test_adaptive_moments_of_gaussian() -> None:
    """An elliptical Gaussian has its own moments, wherever it is."""
    offset = np.arange(-15, 16)
    truth = np.array([[4.0, 4.0, 0.0], [9.0, 3.0, 1.5], [5.0, 12.0, -3.0]])
    shift = np.array([[0.0, 0.0], [0.4, -0.3], [-0.2, 0.5]])
    stamps = []
    for (xx, yy, xy), (dx, dy) in zip(truth, shift, strict=True):
        x, y = offset[None, :] - dx, offset[:, None] - dy
        stamps.append(np.exp(-0.5 * (yy * x**2 - 2 * xy * x * y + xx * y**2) / (xx * yy - xy**2)))
    moments = compute_adaptive_moments(np.array(stamps), shift[:, 0], shift[:, 1])
    np.testing.assert_allclose(np.stack(moments, axis=1), truth, atol=0.01)


def test_adaptive_moments_of_nothing() -> None:
    """Moments of an empty or negative stamp are NaN."""
    stamps = np.stack([np.zeros((31, 31)), np.full((31, 31), -1.0)])
    for moment in compute_adaptive_moments(stamps, np.zeros(2), np.zeros(2)):
        assert np.isnan(moment).all()


def test_select_primary_keeps_each_object_once(tmp_path: Path) -> None:
    """An object in the overlap of two patches is in the tract once."""
    butler = make_test_repository(tmp_path / "repo", n_sources=60)
    tract = butler.get("object", skymap="test", tract=0)
    patches = [butler.get("object_patch", skymap="test", tract=0, patch=patch) for patch in (0, 1)]
    assert len(np.unique(tract["objectId"])) == len(tract)
    assert "detect_isPrimary" not in tract.colnames
    assert 0 < len(tract) < sum(map(len, patches))
    positions = np.stack([tract["coord_ra"], tract["coord_dec"]], axis=1) * 3600 / 0.2
    distance, _ = cKDTree(positions).query(positions, k=2)
    assert distance[:, 1].min() > 1.5
    assert tract["i_psfFlux"].unit == u.nJy
    assert (
        Butler.from_config(str(tmp_path / "repo"), collections="test/coadds")
        .get("object_patch", skymap="test", tract=0, patch=0)["refBand"]
        .dtype.kind
        in "UO"
    )


def test_position_angle_of_a_right_angle() -> None:
    """A bar along the y axis, whose angle is pi / 2 rounded up, is measured.

    Single precision rounds pi / 2 up, and sep refuses ellipses beyond it.
    """
    coadds = make_test_coadds(noise=0.0)
    for coadd in coadds.values():
        coadd.image.array[140:161, 149:152] = 1000.0
    table = detect_objects(MultibandCoadd.from_coadds(coadds), tract=0, patch=0)
    assert len(table) == 1
    assert np.isfinite(table["i_cModelFlux"]).all()

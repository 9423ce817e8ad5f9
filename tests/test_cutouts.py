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


"""Tests of the stamps of objects, their quality flags and resampling."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from astropy.table import Table, vstack
from scipy.special import erf

from lsst.daf.butler import Butler, DatasetType
from lsst.images import Box
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.cutouts import CutoutExtractor, Cutouts
from lsst.meas.deeplearn.tests import make_test_coadd, make_test_coadds

ARRAYS = [field.name for field in dataclasses.fields(Cutouts) if field.name not in ("bands", "pixel_scale")]


def _extract(coadd: MultibandCoadd, x: Any, y: Any, *, size: int = 11, **kwargs: Any) -> Cutouts:
    """Cut out the stamps at pixel positions."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    ra, dec = coadd.pixel_to_sky(x=x, y=y)
    return CutoutExtractor(coadd, size=size, **kwargs).extract(ids=np.arange(len(x)), ra=ra, dec=dec)


def _make_cutouts(image: np.ndarray, *, pixel_scale: float = 0.2, **kwargs: Any) -> Cutouts:
    """Wrap images of shape (N, B, S, S) as cutouts without blemish."""
    n, n_bands = image.shape[:2]
    arrays: dict[str, Any] = {
        "ids": np.arange(n),
        **{name: np.zeros(n) for name in ("ra", "dec", "x", "y")},
        "image": image.astype(np.float32),
        "variance": np.ones(image.shape, np.float32),
        "bad": np.zeros(image.shape, bool),
        "psf": np.zeros((n, n_bands, 0, 0), np.float32),
        "off_edge": np.zeros(n, bool),
        "missing_band": np.zeros((n, n_bands), bool),
        "missing_cell": np.zeros((n, n_bands), bool),
    }
    return Cutouts(bands=tuple("grizy"[:n_bands]), pixel_scale=pixel_scale, **(arrays | kwargs))


def _assert_equal(a: Cutouts, b: Cutouts) -> None:
    """Raise unless two sets of cutouts are the same."""
    assert a.bands == b.bands
    assert a.pixel_scale == pytest.approx(b.pixel_scale)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype, name


def _make_star(size: int, sigma: float, *, x: float, y: float, pixel: float) -> np.ndarray:
    """Integrate a Gaussian of unit flux over pixels.

    ``sigma``, the position from the centre of the stamp and the side of a
    pixel share a unit.
    """
    edges = (np.arange(size + 1) - size / 2) * pixel
    return np.outer(*(np.diff(0.5 * erf((edges - a) / (np.sqrt(2) * sigma))) for a in (y, x)))


def test_stamps_are_pixels_of_the_coadd() -> None:
    """Stamps hold the pixels about the nearest pixel, in all planes."""
    coadds = make_test_coadds("gr", mask_boxes={"SATURATED": Box.from_shape((3, 2), start=(1303, 699))})
    coadd = MultibandCoadd.from_coadds(coadds)
    cutouts = _extract(coadd, [700.4, 850.0], [1299.6, 1400.0])
    assert len(cutouts) == 2
    assert cutouts.size == 11
    assert cutouts.bands == ("g", "r")
    assert cutouts.pixel_scale == coadd.pixel_scale
    np.testing.assert_allclose(cutouts.x, [700.4, 850.0], atol=1e-6)
    np.testing.assert_allclose(cutouts.y, [1299.6, 1400.0], atol=1e-6)
    for b, band in enumerate("gr"):
        for k, (column, row) in enumerate([(100, 100), (250, 200)]):
            pixels = slice(row - 5, row + 6), slice(column - 5, column + 6)
            np.testing.assert_array_equal(cutouts.image[k, b], coadds[band].image.array[pixels])
            np.testing.assert_array_equal(cutouts.variance[k, b], coadds[band].variance.array[pixels])
    # Rows 1303 to 1305 and columns 699 and 700 around pixel (700, 1300).
    expected = np.zeros((11, 11), bool)
    expected[8:11, 4:6] = True
    np.testing.assert_array_equal(cutouts.bad[0, 0], expected)
    assert not cutouts.bad[1].any()
    np.testing.assert_allclose(cutouts.masked_fraction, [[6 / 121] * 2, [0, 0]])
    assert not cutouts.off_edge.any()
    assert not cutouts.missing_band.any()
    assert not cutouts.missing_cell.any()


@pytest.mark.parametrize("dx", [-0.49, 0.0, 0.3])
@pytest.mark.parametrize("dy", [-0.2, 0.49])
def test_star_is_where_its_coordinates_say(dx: float, dy: float) -> None:
    """The sky position of a star is its centroid in the stamp and its PSF."""
    star = (200 + dx, 150 + dy, 1e4)
    coadds = {"i": make_test_coadd("i", start=(0, 0), sources=[star], noise=0.0)}
    coadd = MultibandCoadd.from_coadds(coadds)
    cutouts = _extract(coadd, [star[0]], [star[1]], size=21, psf_size=21)
    r = np.arange(21) - 10
    # The PSF is shifted by a Lanczos kernel, as in afw.
    for stamp, tolerance in ((cutouts.image[0, 0], 1e-4), (cutouts.psf[0, 0], 0.012)):
        assert (stamp * r).sum() / stamp.sum() == pytest.approx(dx, abs=tolerance)
        assert (stamp * r[:, None]).sum() / stamp.sum() == pytest.approx(dy, abs=tolerance)
    np.testing.assert_allclose(cutouts.image[0, 0] / 1e4, cutouts.psf[0, 0], atol=3e-4)


@pytest.mark.parametrize(
    ("x", "y", "column", "row"),
    [(600, 1200, 0, 0), (899, 1499, 299, 299), (602.2, 1350, 2, 150), (899.49, 1199.51, 299, 0)],
)
def test_stamps_at_the_edge_are_padded(x: float, y: float, column: int, row: int) -> None:
    """What lies outside the coadd is NaN and bad, and the stamp flagged."""
    coadds = make_test_coadds("g")
    cutouts = _extract(MultibandCoadd.from_coadds(coadds), [x], [y])
    padded = np.pad(coadds["g"].image.array, 5, constant_values=np.nan)
    np.testing.assert_array_equal(cutouts.image[0, 0], padded[row : row + 11, column : column + 11])
    np.testing.assert_array_equal(cutouts.bad, np.isnan(cutouts.image))
    np.testing.assert_array_equal(cutouts.bad, np.isnan(cutouts.variance))
    assert cutouts.off_edge.all()
    assert 0 < cutouts.masked_fraction[0, 0] < 1


def test_stamp_larger_than_the_patch() -> None:
    """A patch smaller than the stamp is padded on all sides."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("g", shape=(10, 20)))
    cutouts = _extract(coadd, [609.0], [1204.0], size=31)
    assert (~cutouts.bad).sum() == 200
    assert cutouts.off_edge.all()


@pytest.mark.parametrize(("x", "y"), [(599.4, 1300), (899.6, 1300), (700, 1199.4), (700, 1499.6), (9e4, 9e4)])
def test_object_outside_the_patch(x: float, y: float) -> None:
    """An object outside is off the edge and has no pixels at all."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("gr", missing_cells=[(0, 0)]))
    cutouts = _extract(coadd, [x], [y], psf_size=5)
    assert cutouts.off_edge.all()
    assert cutouts.bad.all()
    assert cutouts.bad_psf.all()
    assert np.isnan(cutouts.image).all()
    assert (cutouts.masked_fraction == 1).all()
    assert not cutouts.missing_cell.any()
    assert not cutouts.missing_band.any()


@pytest.mark.parametrize(("ra", "dec"), [(np.nan, 2.0), (150.0, np.nan), (150.0, -999.0), (330.0, -2.0)])
def test_object_without_a_place(ra: float, dec: float) -> None:
    """Coordinates that make no sense spoil no other object."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("g"))
    good_ra, good_dec = coadd.pixel_to_sky(x=np.array([700.0]), y=np.array([1300.0]))
    extractor = CutoutExtractor(coadd, size=11, psf_size=5)
    cutouts = extractor.extract(ids=np.array([7, 8]), ra=np.append(ra, good_ra), dec=np.append(dec, good_dec))
    assert cutouts.off_edge.tolist() == [True, False]
    assert cutouts.bad.all(axis=(1, 2, 3)).tolist() == [True, False]
    assert cutouts.bad_psf[:, 0].tolist() == [True, False]
    assert np.isnan([cutouts.x[0], cutouts.y[0]]).all()
    assert cutouts.ids.tolist() == [7, 8]


def test_no_objects() -> None:
    """No objects give empty arrays of the right shapes."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("gr"))
    cutouts = _extract(coadd, [], [], psf_size=5)
    assert len(cutouts) == 0
    assert cutouts.image.shape == cutouts.bad.shape == (0, 2, 11, 11)
    assert cutouts.psf.shape == (0, 2, 5, 5)
    assert cutouts.masked_fraction.shape == cutouts.bad_psf.shape == (0, 2)
    assert len(cutouts.resample(0.25, 7)) == 0


def test_missing_band() -> None:
    """A missing band is bad and NaN, the others are not touched."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("gi"), "gri")
    cutouts = _extract(coadd, [700.0], [1300.0], psf_size=5)
    assert cutouts.missing_band.tolist() == [[False, True, False]]
    assert cutouts.bad.all(axis=(2, 3)).tolist() == [[False, True, False]]
    assert np.isnan(cutouts.image).all(axis=(2, 3)).tolist() == [[False, True, False]]
    assert cutouts.bad_psf.tolist() == [[False, True, False]]
    assert not cutouts.missing_cell.any()
    assert not cutouts.off_edge.any()


def test_missing_cell() -> None:
    """The cell of the centre counts, though others spoil pixels."""
    coadds = {"g": make_test_coadd("g", missing_cells=[(0, 1)]), "r": make_test_coadd("r")}
    coadd = MultibandCoadd.from_coadds(coadds)
    # The missing cell has columns from 750 and rows below 1350.
    cutouts = _extract(coadd, [749.4, 749.6, 800.0, 800.0], [1300.0, 1300.0, 1349.4, 1349.6], psf_size=5)
    assert cutouts.missing_cell[:, 0].tolist() == [False, True, True, False]
    assert not cutouts.missing_cell[:, 1].any()
    np.testing.assert_allclose(cutouts.masked_fraction[:, 0], np.array([5, 6, 6, 5]) / 11)
    assert not cutouts.masked_fraction[:, 1].any()
    np.testing.assert_array_equal(cutouts.bad_psf, cutouts.missing_cell)


@pytest.mark.parametrize("plane", ["NO_DATA", "SATURATED"])
def test_masked_fraction_is_exact(plane: str) -> None:
    """The masked fraction counts the pixels of a stamp."""
    box = Box.from_shape((300, 96), start=(1200, 600))
    coadd = MultibandCoadd.from_coadds({"g": make_test_coadd("g", mask_boxes={plane: box})})
    cutouts = _extract(coadd, [650.0, 695.0, 705.0], [1300.0] * 3)
    np.testing.assert_allclose(cutouts.masked_fraction[:, 0], [1, 6 / 11, 0])
    assert cutouts.masked_fraction.dtype == np.float32
    clean = _extract(coadd, [650.0], [1300.0], bad_planes=["DETECTED"])
    assert clean.masked_fraction == 0


def test_nan_block_is_bad() -> None:
    """A block of NaN is bad without any mask plane."""
    coadd = make_test_coadd("g")
    coadd.image.array[95:98, 95:99] = np.nan
    cutouts = _extract(MultibandCoadd.from_coadds({"g": coadd}), [700.0], [1300.0])
    assert cutouts.bad.sum() == 12
    np.testing.assert_array_equal(cutouts.bad, np.isnan(cutouts.image))


@pytest.mark.parametrize("size", [0, -3, 44])
def test_sizes_must_be_odd(size: int) -> None:
    """Stamps have a central pixel."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("g"))
    with pytest.raises(ValueError, match=f"odd number of pixels on a side, not {size}"):
        CutoutExtractor(coadd, size=size)
    if size:
        with pytest.raises(ValueError, match="odd number of pixels"):
            CutoutExtractor(coadd, size=11, psf_size=size)
    with pytest.raises(ValueError, match="odd number of pixels"):
        _make_cutouts(np.zeros((1, 1, 11, 11))).resample(0.3, size)


def test_unknown_mask_plane() -> None:
    """A misspelt mask plane is found before any object is cut."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("g"))
    with pytest.raises(ValueError, match=r"No coadd has mask planes \['SATURATION'\]"):
        CutoutExtractor(coadd, size=11, bad_planes=["SATURATION"])


def test_taking_some_and_joining_is_the_identity() -> None:
    """Parts of cutouts, joined, are the whole; so with batches."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("gr", missing_cells=[(1, 1)]))
    rng = np.random.default_rng(2)
    x, y = rng.uniform(595, 905, 20), rng.uniform(1195, 1505, 20)
    cutouts = _extract(coadd, x, y, psf_size=5)
    assert cutouts.off_edge.any()
    assert cutouts.missing_cell.any()
    _assert_equal(Cutouts.concatenate([cutouts[:7], cutouts[7:]]), cutouts)
    _assert_equal(
        Cutouts.concatenate([_extract(coadd, x[:9], y[:9], psf_size=5)])[:9].select_bands("gr"), cutouts[:9]
    )
    chosen = cutouts[cutouts.off_edge]
    assert len(chosen) == cutouts.off_edge.sum()
    assert chosen.off_edge.all()
    np.testing.assert_array_equal(cutouts[np.array([3, 1])].ids, [3, 1])


def test_select_bands() -> None:
    """Bands can be taken in another order."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("gri"))
    cutouts = _extract(coadd, [700.0], [1300.0], psf_size=5)
    _assert_equal(
        cutouts.select_bands(["i", "g"]),
        _extract(MultibandCoadd.from_coadds(make_test_coadds("gri"), "ig"), [700.0], [1300.0], psf_size=5),
    )
    with pytest.raises(ValueError, match="Cutouts of bands g, r, i have no z"):
        cutouts.select_bands(["g", "z"])


def test_unlike_cutouts_cannot_be_joined() -> None:
    """Joining needs the same bands, sizes and pixel scale."""
    cutouts = _make_cutouts(np.zeros((2, 3, 11, 11)))
    for other in (
        _make_cutouts(np.zeros((2, 2, 11, 11))),
        _make_cutouts(np.zeros((2, 3, 13, 13))),
        _make_cutouts(np.zeros((2, 3, 11, 11)), pixel_scale=0.21),
        _make_cutouts(np.zeros((2, 3, 11, 11)), psf=np.zeros((2, 3, 5, 5), np.float32)),
    ):
        with pytest.raises(
            ValueError, match="Cutouts of g,r.* cannot join those of g,r,i, 11 pixels of 0.2000"
        ):
            Cutouts.concatenate([cutouts, other])
    with pytest.raises(ValueError, match="no cutouts to join"):
        Cutouts.concatenate([])


@pytest.fixture(scope="module")
def butler(tmp_path_factory: pytest.TempPathFactory) -> Butler:
    """Make a repository with a dataset type for tables."""
    root = str(tmp_path_factory.mktemp("repository"))
    Butler.makeRepo(root)
    butler = Butler.from_config(root, run="test", writeable=True)
    butler.registry.registerDatasetType(DatasetType("table", (), "ArrowAstropy", universe=butler.dimensions))
    return butler


def _round_trip(butler: Butler, table: Table, run: str) -> Table:
    butler.collections.register(run)
    return butler.get(butler.put(table, "table", run=run))


@pytest.mark.parametrize("psf_size", [0, 1, 7])
@pytest.mark.parametrize("n", [1, 4])
def test_table_goes_through_a_repository(butler: Butler, psf_size: int, n: int) -> None:
    """Cutouts become a table, a file of the butler, and cutouts again."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("gi", missing_cells=[(1, 1)]), "gri")
    x, y = [700.0, 601.0, 800.0, 1e4], [1300.0, 1300.0, 1400.0, 1300.0]
    cutouts = _extract(coadd, x[:n], y[:n], psf_size=psf_size)
    table = _round_trip(butler, cutouts.to_table(), f"run_{psf_size}_{n}")
    _assert_equal(Cutouts.from_table(table), cutouts)
    assert table["image"].unit == "nJy"
    assert table["pixel_scale"].unit == "arcsec"
    assert all(table[name].description for name in table.colnames)


@pytest.mark.parametrize("psf_size", [0, 7])
def test_empty_table_goes_through_a_repository(butler: Butler, psf_size: int) -> None:
    """An empty table is written and read, but is no cutouts."""
    cutouts = _extract(MultibandCoadd.from_coadds(make_test_coadds("g")), [], [], psf_size=psf_size)
    table = _round_trip(butler, cutouts.to_table(), f"empty_{psf_size}")
    assert len(table) == 0
    with pytest.raises(ValueError, match="table of cutouts is empty"):
        Cutouts.from_table(table)


def test_tables_of_patches_can_be_stacked() -> None:
    """Rows of several tables make one set of cutouts, if they are alike."""
    rng = np.random.default_rng(1)
    parts = [_make_cutouts(rng.normal(size=(n, 2, 5, 5))) for n in (2, 3)]
    _assert_equal(Cutouts.from_table(vstack([part.to_table() for part in parts])), Cutouts.concatenate(parts))
    other_scale = _make_cutouts(np.zeros((1, 2, 5, 5)), pixel_scale=0.25)
    other_bands = _make_cutouts(np.zeros((1, 2, 5, 5))).select_bands("rg")
    for other in (other_scale, other_bands):
        with pytest.raises(ValueError, match="mixes cutouts of bands"):
            Cutouts.from_table(vstack([parts[0].to_table(), other.to_table()]))


def test_other_tables_are_refused() -> None:
    """A table of something else is refused with the columns it lacks."""
    table = _make_cutouts(np.zeros((1, 2, 5, 5))).to_table()
    table.remove_columns(["variance", "bands"])
    with pytest.raises(
        ValueError, match=r"Not a table of cutouts: it has no columns \['bands', 'variance'\]"
    ):
        Cutouts.from_table(table)


SCALES = [(0.168, 0.2, 53, 41), (0.186, 0.2, 49, 45), (0.263, 0.2, 45, 45), (0.2, 0.263, 61, 45)]


@pytest.mark.parametrize(("old", "new", "old_size", "new_size"), SCALES)
def test_resampling_conserves_flux(old: float, new: float, old_size: int, new_size: int) -> None:
    """A source keeps its flux, wherever it is between the pixels."""
    sigma = 0.7 / 2.355
    for x, y in [(0.0, 0.0), (0.3, -0.8), (-0.11, 0.37)]:
        star = _make_star(old_size, sigma, x=x, y=y, pixel=old)
        resampled = _make_cutouts(star[None, None], pixel_scale=old).resample(new, new_size)
        assert resampled.pixel_scale == new
        assert resampled.size == new_size
        assert resampled.image.dtype == resampled.variance.dtype == np.float32
        assert resampled.image.sum() == pytest.approx(1.0, abs=1e-5)


def test_resampling_conserves_flux_in_boxes() -> None:
    """Boxes of whole old and new pixels keep their flux, whatever is there."""
    image = np.random.default_rng(8).normal(size=(1, 1, 45, 45))
    resampled = _make_cutouts(image).resample(0.6, 15).image[0, 0]
    np.testing.assert_allclose(resampled, image[0, 0].reshape(15, 3, 15, 3).sum(axis=(1, 3)), atol=1e-5)
    finer = _make_cutouts(image).resample(0.04, 225).image[0, 0]
    np.testing.assert_allclose(finer.reshape(45, 5, 45, 5).sum(axis=(1, 3)), image[0, 0], atol=1e-5)


@pytest.mark.parametrize(("old", "new", "old_size", "new_size"), SCALES)
@pytest.mark.parametrize("seeing", [0.6, 0.9])
@pytest.mark.parametrize(("x", "y"), [(0.0, 0.0), (0.07, -0.09), (1.23, 0.8)])
def test_resampled_star_is_a_star(
    old: float, new: float, old_size: int, new_size: int, seeing: float, x: float, y: float
) -> None:
    """A star becomes the star that the new pixels would have seen.

    With stars of three pixels or more the profile is right to 0.1% of the
    peak; less well sampled stars, 0.6 arcsec on pixels of 0.263, come within
    1.2%.  The place is right to a thousandth of a pixel.
    """
    sigma = seeing / 2.355
    star = _make_star(old_size, sigma, x=x, y=y, pixel=old)
    resampled = _make_cutouts(star[None, None], pixel_scale=old).resample(new, new_size).image[0, 0]
    expected = _make_star(new_size, sigma, x=x, y=y, pixel=new)
    tolerance = 0.001 if seeing / old >= 3 else 0.012
    np.testing.assert_allclose(resampled, expected, atol=tolerance * expected.max())
    r = (np.arange(new_size) - new_size // 2) * new
    assert (resampled * r).sum() == pytest.approx(x, abs=0.001 * new)
    assert (resampled * r[:, None]).sum() == pytest.approx(y, abs=0.001 * new)


def test_resampling_a_constant_surface_brightness() -> None:
    """A sky of constant brightness stays so, in flux per pixel."""
    resampled = _make_cutouts(np.full((1, 2, 45, 45), 7.0)).resample(0.25, 31)
    np.testing.assert_allclose(resampled.image, 7.0 * (0.25 / 0.2) ** 2, rtol=1e-5)


@pytest.mark.parametrize(("new", "size"), [(0.25, 31), (0.4, 21)])
def test_resampled_variance(new: float, size: int) -> None:
    """The variance is that of resampled white noise."""
    noise = np.random.default_rng(6).normal(scale=3.0, size=(400, 1, 45, 45))
    cutouts = _make_cutouts(noise, variance=np.full(noise.shape, 9.0, np.float32))
    resampled = cutouts.resample(new, size)
    # Differs between pixels, as they lie differently on the old ones.
    measured = resampled.image.var(axis=0)
    ratio = measured / resampled.variance[0]
    assert ratio.mean() == pytest.approx(1.0, abs=0.01)
    assert ratio.std() == pytest.approx(np.sqrt(2 / 400), rel=0.15)


def test_bad_pixels_spoil_those_that_they_touch() -> None:
    """A new pixel is bad if it overlaps a bad one, and only then."""
    bad = np.zeros((1, 2, 45, 45), bool)
    bad[0, 0, 22, 22] = True
    bad[0, 1, :, 0] = True
    image = np.where(bad, np.nan, 1.0)
    cutouts = _make_cutouts(image, bad=bad, variance=np.where(bad, np.nan, 1.0).astype(np.float32))
    resampled = cutouts.resample(0.24, 37)  # Spans 44.4 of the 45 old pixels.
    assert np.argwhere(resampled.bad[0, 0]).tolist() == [[18, 18]]
    assert resampled.bad[0, 1, :, 0].all()
    assert not resampled.bad[0, 1, :, 1:].any()
    assert np.isfinite(resampled.image).all()
    assert np.isfinite(resampled.variance).all()
    finer = cutouts.resample(0.1, 89)
    # The bad pixel reaches from 43 to 45 new pixels of half its side.
    assert np.argwhere(finer.bad[0, 0]).min() == 43
    assert np.argwhere(finer.bad[0, 0]).max() == 45


def test_resampling_to_the_same_pixels() -> None:
    """The same pixels are left alone, and fewer of them are cut out."""
    image = np.random.default_rng(7).normal(size=(2, 2, 21, 21))
    cutouts = _make_cutouts(image)
    assert cutouts.resample(0.2, 21) is cutouts
    np.testing.assert_allclose(cutouts.resample(0.2, 11).image, cutouts.image[:, :, 5:-5, 5:-5], atol=1e-6)


def test_resampling_beyond_the_stamp_is_refused() -> None:
    """Stamps that would need pixels beyond the old ones are refused."""
    with pytest.raises(ValueError, match=r"45 pixels of 0.2000 arcsec do not fit .* cut larger ones"):
        _make_cutouts(np.zeros((1, 1, 45, 45)), pixel_scale=0.168).resample(0.2, 45)


@pytest.mark.parametrize(("old", "new", "old_size", "new_size"), SCALES)
def test_resampled_psf(old: float, new: float, old_size: int, new_size: int) -> None:
    """The PSF goes along: unit sum, the width of the star in new pixels."""
    sigma = 0.8 / 2.355
    psf = _make_star(25, sigma, x=0.0, y=0.0, pixel=old)[None, None].astype(np.float32)
    missing = np.full_like(psf, np.nan)
    cutouts = _make_cutouts(
        np.zeros((2, 1, old_size, old_size)), pixel_scale=old, psf=np.concatenate([psf, missing])
    )
    resampled = cutouts.resample(new, new_size)
    size = resampled.psf.shape[-1]
    # As large as fits, and odd.
    assert size % 2 == 1
    assert size * new <= 25 * old < (size + 2) * new
    assert resampled.psf[0].sum() == pytest.approx(1.0, abs=1e-4)
    expected = _make_star(size, sigma, x=0.0, y=0.0, pixel=new)
    np.testing.assert_allclose(resampled.psf[0, 0], expected, atol=0.002 * expected.max())
    r = (np.arange(size) - size // 2) * new
    width = np.sqrt((resampled.psf[0, 0] * r**2).sum())
    assert width == pytest.approx(np.hypot(sigma, new / np.sqrt(12)), rel=0.002)
    assert resampled.bad_psf[:, 0].tolist() == [False, True]


def test_batches_of_objects() -> None:
    """Objects taken in batches are the same as all at once."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds("g", shape=(1200, 1200), n_cells=(8, 8), noise=0.0))
    extractor = CutoutExtractor(coadd, size=45, psf_size=25)
    rng = np.random.default_rng(9)
    ra, dec = coadd.pixel_to_sky(x=rng.uniform(600, 1800, 500), y=rng.uniform(1200, 2400, 500))
    whole = extractor.extract(ids=np.arange(500), ra=ra, dec=dec)
    parts = [
        extractor.extract(ids=np.arange(500)[rows], ra=ra[rows], dec=dec[rows])
        for rows in (slice(0, 200), slice(200, 500))
    ]
    _assert_equal(Cutouts.concatenate(parts), whole)


def test_crop() -> None:
    """Cropping keeps the central pixels of all planes."""
    image = np.arange(2 * 7 * 7, dtype=np.float32).reshape(1, 2, 7, 7)
    cutouts = _make_cutouts(image)
    cropped = cutouts.crop(3)
    assert cropped.size == 3
    np.testing.assert_array_equal(cropped.image, image[..., 2:5, 2:5])
    assert cropped.variance.shape == cropped.bad.shape == (1, 2, 3, 3)
    assert cutouts.crop(7) is cutouts
    for size, message in ((9, "cannot be cropped"), (4, "odd")):
        with pytest.raises(ValueError, match=message):
            cutouts.crop(size)

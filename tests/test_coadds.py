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


"""Tests of coadds.py with the coadds of lsst.images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
import pytest
from scipy.ndimage import convolve1d

from lsst.daf.butler import Butler, DatasetType
from lsst.images import (
    YX,
    BoundsError,
    Box,
    GeneralFrame,
    Image,
    Mask,
    MaskedImage,
    MaskPlane,
    MaskSchema,
    SkyProjection,
    TractFrame,
)
from lsst.images.cells import CellCoadd, CellGrid, PatchDefinition
from lsst.images.psfs import GaussianPointSpreadFunction
from lsst.meas.deeplearn.coadds import (
    LEGACY_MASK_PLANES,
    CellPsf,
    CoaddPlanes,
    MultibandCoadd,
    canonical_mask_plane,
    shift_kernel,
)
from lsst.meas.deeplearn.repository import PATCH_DIMENSIONS, make_cell_coadd, make_tangent_wcs
from lsst.meas.deeplearn.tests import make_test_coadd, make_test_coadds, make_test_repository
from lsst.pipe.base import InMemoryDatasetHandle

PATCH_ID = {"skymap": "test", "tract": 0, "patch": 0}


def _as_masked_image(coadd: CellCoadd, unit: u.UnitBase | None = u.nJy) -> MaskedImage:
    """Strip a cell coadd of its cells, and give it another unit."""
    return MaskedImage(
        Image(coadd.image.array, bbox=coadd.bbox, unit=unit),
        mask=coadd.mask,
        variance=Image(coadd.variance.array, bbox=coadd.bbox, unit=None if unit is None else unit**2),
        sky_projection=coadd.sky_projection,
    )


def _make_masked_image(mask_planes: dict[str, np.ndarray]) -> MaskedImage:
    """Make an image of 20 x 20 pixels with any mask planes."""
    box = Box.from_shape((20, 20))
    projection = SkyProjection.from_fits_wcs(
        make_tangent_wcs(ra=150.0, dec=2.0, pixel_scale=0.2, x=10.0, y=10.0), GeneralFrame(unit=u.pix)
    )
    mask = Mask(0, schema=MaskSchema([MaskPlane(name, "") for name in mask_planes]), bbox=box)
    for name, plane in mask_planes.items():
        mask.set(name, plane)
    image = Image(np.zeros(box.shape, np.float32), bbox=box, unit=u.nJy)
    return MaskedImage(image, mask=mask, sky_projection=projection)


def _make_gaussian(size: int, sigma: float, *, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """Sample a Gaussian of unit flux at pixel centres, 0 being the middle."""
    r = np.arange(size) - size // 2
    gaussian = np.exp(-0.5 * ((r[:, None] - y) ** 2 + (r[None, :] - x) ** 2) / sigma**2)
    return gaussian / (2 * np.pi * sigma**2)


def _make_coadd_of_psfs(sigmas: np.ndarray, cell_size: int = 50, **kwargs: Any) -> MultibandCoadd:
    """Make a coadd whose cells have Gaussian PSFs of given widths."""
    box = Box.from_shape([n * cell_size for n in sigmas.shape], start=(75, 75))
    kernels = np.array([[_make_gaussian(35, sigma) for sigma in row] for row in sigmas])
    coadd = make_cell_coadd(
        np.zeros(box.shape),
        np.ones(box.shape),
        kernels,
        band="i",
        patch=PatchDefinition(
            id=0,
            index=YX(y=0, x=0),
            inner_bbox=box,
            cells=CellGrid(bbox=box, cell_shape=YX(y=cell_size, x=cell_size)),
        ),
        sky_projection=make_test_coadd().sky_projection,
        **kwargs,
    )
    return MultibandCoadd.from_coadds({"i": coadd})


def test_planes_are_those_of_the_coadds() -> None:
    """Image, variance, mask and geometry are taken over, without copies."""
    coadds = make_test_coadds("gri")
    multiband = MultibandCoadd.from_coadds(coadds)
    assert multiband.bands == ("g", "r", "i")
    assert multiband.missing_bands == ()
    assert multiband.bbox == coadds["g"].bbox
    assert multiband.inner_bbox == coadds["g"].patch.inner_bbox
    for band, coadd in coadds.items():
        planes = multiband.planes[band]
        assert np.shares_memory(planes.image, coadd.image.array)
        assert np.shares_memory(planes.variance, coadd.variance.array)
        assert planes.image.dtype == planes.variance.dtype == np.float32
        assert planes.missing_cells == ()


def test_masked_image_gives_the_same_planes() -> None:
    """A MaskedImage differs from the CellCoadd only by PSF and geometry."""
    coadds = make_test_coadds("gr", mask_boxes={"SATURATED": Box.from_shape((9, 5), start=(1210, 620))})
    cells = MultibandCoadd.from_coadds(coadds)
    images = MultibandCoadd.from_coadds({band: _as_masked_image(coadd) for band, coadd in coadds.items()})
    assert images.bbox == cells.bbox
    assert images.inner_bbox is None
    assert images.pixel_scale == cells.pixel_scale
    for band in "gr":
        np.testing.assert_array_equal(images.planes[band].image, cells.planes[band].image)
        np.testing.assert_array_equal(images.planes[band].variance, cells.planes[band].variance)
        np.testing.assert_array_equal(
            images.compute_bad_pixels(band, ["SAT"]), cells.compute_bad_pixels(band, ["SAT"])
        )
        assert images.compute_psf_kernel(band, x=700.0, y=1300.0, size=9) is None


def test_bands_keep_their_order_and_may_be_missing() -> None:
    """Bands come as asked for, and those without a coadd are missing."""
    multiband = MultibandCoadd.from_coadds(make_test_coadds("gri"), ["i", "z", "g"])
    assert multiband.bands == ("i", "z", "g")
    assert multiband.missing_bands == ("z",)
    assert list(multiband.planes) == ["i", "g"]


def test_no_band_at_all_is_refused() -> None:
    """A patch without any of the bands is an error that names them."""
    with pytest.raises(ValueError, match="None of the bands z, y has a coadd"):
        MultibandCoadd.from_coadds(make_test_coadds("g"), ["z", "y"])
    coadd = make_test_coadd()
    with pytest.raises(ValueError, match="None of the bands z"):
        MultibandCoadd("z", {}, bbox=coadd.bbox, sky_projection=coadd.sky_projection)


@pytest.mark.parametrize(("unit", "factor"), [(u.nJy, 1.0), (u.uJy, 1e3), (u.mJy, 1e6), (u.Jy, 1e9)])
def test_flux_densities_become_nanojansky(unit: u.UnitBase, factor: float) -> None:
    """Image and variance are converted from any unit of flux density."""
    coadd = make_test_coadd("i", unit=unit, noise=3.0)
    planes = MultibandCoadd.from_coadds({"i": coadd}).planes["i"]
    np.testing.assert_allclose(planes.image, factor * coadd.image.array, rtol=1e-6)
    np.testing.assert_allclose(planes.variance, factor**2 * 9.0, rtol=1e-6)
    assert planes.image.dtype == planes.variance.dtype == np.float32


@pytest.mark.parametrize("unit", [None, u.adu, u.electron, u.nJy / u.arcsec**2, u.dimensionless_unscaled])
def test_other_units_are_refused(unit: u.UnitBase | None) -> None:
    """What cannot become nJy is refused with the band, unit and cure."""
    image = _as_masked_image(make_test_coadd("r"), unit)
    with pytest.raises(ValueError, match=r"The r coadd has pixels in .*convertible to nJy.*Calibrate it"):
        MultibandCoadd.from_coadds({"r": image})


def test_other_types_are_refused() -> None:
    """Something that is no coadd is refused with the types that are."""
    with pytest.raises(
        TypeError, match=r"The r coadd is a lsst\.images.*Image; expected an lsst.images Cell"
    ):
        MultibandCoadd.from_coadds({"r": make_test_coadd().image})


def test_coadd_without_sky_projection_is_refused() -> None:
    """Without a WCS no object has a place."""
    image = Image(np.zeros((9, 9), np.float32), unit=u.nJy)
    masked_image = MaskedImage(image, mask_schema=MaskSchema([MaskPlane("SAT", "")]))
    with pytest.raises(ValueError, match="The r coadd has no sky projection"):
        MultibandCoadd.from_coadds({"r": masked_image})


def test_other_box_is_refused() -> None:
    """Bands that do not cover the same pixels are refused."""
    coadds = {"g": make_test_coadd("g"), "r": make_test_coadd("r", start=(1200, 601))}
    with pytest.raises(ValueError, match="must share one pixel grid: g covers .* and r covers"):
        MultibandCoadd.from_coadds(coadds)


@pytest.mark.parametrize(
    ("change", "refused"),
    [("none", False), ("0.001 pixels", False), ("0.1 pixels", True), ("rotated", True), ("transposed", True)],
)
def test_other_wcs_is_refused(change: str, refused: bool) -> None:
    """WCSs of two bands must agree everywhere, not on a diagonal only."""
    wcs = make_tangent_wcs(ra=150.0, dec=2.0, pixel_scale=0.2, x=100.0, y=100.0)
    match change:
        case "0.001 pixels":
            wcs.wcs.crpix[0] += 0.001
        case "0.1 pixels":
            wcs.wcs.crpix[1] += 0.1
        case "rotated":
            angle = 1e-3
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            wcs.wcs.cd = turn @ wcs.wcs.cd
        case "transposed":
            wcs.wcs.cd = wcs.wcs.cd[:, ::-1]
    kwargs = {"shape": (60, 60), "start": (40, 40)}
    frame = TractFrame(skymap="test", tract=0, bbox=make_test_coadd(**kwargs).bbox)
    first = make_tangent_wcs(ra=150.0, dec=2.0, pixel_scale=0.2, x=100.0, y=100.0)
    coadds = {
        band: make_test_coadd(band, sky_projection=SkyProjection.from_fits_wcs(w, frame), **kwargs)
        for band, w in {"g": first, "r": wcs}.items()
    }
    if refused:
        with pytest.raises(ValueError, match="the WCSs of g and r differ by"):
            MultibandCoadd.from_coadds(coadds)
    else:
        assert MultibandCoadd.from_coadds(coadds).bands == ("g", "r")


@pytest.mark.parametrize(
    ("legacy", "name"),
    [
        ("SAT", "SATURATED"),
        ("INTRP", "INTERPOLATED"),
        ("CR", "COSMIC_RAY"),
        ("EDGE", "DETECTION_EDGE"),
        ("UNMASKEDNAN", "UNMASKED_NAN"),
        ("NO_DATA", "NO_DATA"),
    ],
)
def test_mask_planes_have_two_names(legacy: str, name: str) -> None:
    """A plane is found by both names, whichever the coadd has."""
    pixels = np.zeros((20, 20), bool)
    pixels[3, 4] = True
    assert canonical_mask_plane(legacy) == canonical_mask_plane(name) == name
    for stored in (legacy, name):
        multiband = MultibandCoadd.from_coadds(
            {"i": _make_masked_image({"DETECTED": ~pixels, stored: pixels})}
        )
        for asked in (legacy, name):
            np.testing.assert_array_equal(multiband.compute_mask("i", [asked]), pixels)


def test_mask_plane_under_both_names() -> None:
    """Planes that mean the same are joined, none hides the other."""
    a, b = np.zeros((2, 20, 20), bool)
    a[1, 2], b[3, 4] = True, True
    multiband = MultibandCoadd.from_coadds({"i": _make_masked_image({"SAT": a, "SATURATED": b})})
    np.testing.assert_array_equal(multiband.compute_mask("i", ["SAT"]), a | b)


def test_mask_of_many_planes() -> None:
    """Planes beyond the first byte of the mask are found, and joined."""
    planes = {}
    for n in range(19):
        planes[f"PLANE{n}"] = np.zeros((20, 20), bool)
        planes[f"PLANE{n}"][n, n] = True
    multiband = MultibandCoadd.from_coadds({"i": _make_masked_image(planes)})
    mask = multiband.compute_mask("i", ["PLANE0", "PLANE7", "PLANE8", "PLANE18"])
    assert np.argwhere(mask)[:, 0].tolist() == [0, 7, 8, 18]
    assert not multiband.compute_mask("i", []).any()


def test_unknown_and_absent_mask_planes() -> None:
    """An unknown name is an error; a plane that only others have is empty."""
    multiband = MultibandCoadd.from_coadds(make_test_coadds("i"))
    for name in ("BAD", "STREAK", "VIGNETTED", "SUSPECT", "CROSSTALK", "INJECTED", "HIGH_VARIANCE"):
        assert not multiband.compute_mask("i", [name]).any()
    with pytest.raises(
        ValueError, match=r"No coadd has mask planes \['SATURATE'\]; the i coadd has .*'CLIPPED'"
    ):
        multiband.compute_mask("i", ["SAT", "SATURATE"])


def test_legacy_names_are_unambiguous() -> None:
    """No lsst.images name of one plane is the afw name of another."""
    for old, new in LEGACY_MASK_PLANES.items():
        assert canonical_mask_plane(new) == new, old


def test_bad_pixels() -> None:
    """Masked, not finite and without variance are bad, and nothing else."""
    coadd = make_test_coadd("i", mask_boxes={"NO_DATA": Box.from_shape((1, 2), start=(1200, 600))})
    image, variance = coadd.image.array, coadd.variance.array
    image[1, :3] = np.nan, np.inf, -np.inf
    variance[2, :4] = np.nan, np.inf, 0.0, -1.0
    image[3, 3], variance[3, 3] = np.nan, np.nan
    bad = MultibandCoadd.from_coadds({"i": coadd}).compute_bad_pixels("i", ["NO_DATA"])
    expected = np.zeros(coadd.bbox.shape, dtype=bool)
    expected[0, :2] = expected[1, :3] = expected[2, :4] = expected[3, 3] = True
    np.testing.assert_array_equal(bad, expected)


def test_missing_cells_are_bad_whatever_they_hold() -> None:
    """Pixels of cells without input images are bad, even if finite."""
    coadd = make_test_coadd("i", missing_cells=[(0, 1)])
    coadd.image.array[...] = 1.0
    coadd.variance.array[...] = 1.0
    multiband = MultibandCoadd.from_coadds({"i": coadd})
    (box,) = multiband.planes["i"].missing_cells
    assert box == Box.from_shape((150, 150), start=(1200, 750))
    expected = np.zeros(coadd.bbox.shape, dtype=bool)
    expected[:150, 150:] = True
    np.testing.assert_array_equal(multiband.compute_bad_pixels("i", []), expected)


def test_part_of_a_cell_coadd() -> None:
    """A cut-out of a cell coadd knows its own missing cells and PSFs."""
    coadd = make_test_coadd("i", missing_cells=[(0, 0), (1, 1)])
    part = MultibandCoadd.from_coadds({"i": coadd[Box.from_shape((60, 80), start=(1320, 730))]})
    assert part.bbox.shape == (60, 80)
    assert part.planes["i"].missing_cells == (
        Box.from_shape((150, 150), start=(1200, 600)),
        Box.from_shape((150, 150), start=(1350, 750)),
    )
    bad = part.compute_bad_pixels("i", [])
    assert bad[:30, :20].all()
    assert bad[30:, 20:].all()
    assert not bad[:30, 20:].any()
    assert not bad[30:, :20].any()
    assert part.compute_psf_kernel("i", x=735.0, y=1325.0, size=5) is None
    assert part.compute_psf_kernel("i", x=760.0, y=1325.0, size=5) is not None
    corner = MultibandCoadd.from_coadds({"i": coadd[Box.from_shape((9, 9), start=(1210, 760))]})
    assert corner.planes["i"].missing_cells == ()


def test_sky_and_pixels_go_round() -> None:
    """Sky and pixels are inverse, and agree with the FITS WCS."""
    multiband = MultibandCoadd.from_coadds(make_test_coadds("g"))
    rng = np.random.default_rng(5)
    x, y = rng.uniform(600, 900, 50), rng.uniform(1200, 1500, 50)
    ra, dec = multiband.pixel_to_sky(x=x, y=y)
    wcs = make_tangent_wcs(ra=150.0, dec=2.0, pixel_scale=0.2, x=1000.0, y=1000.0)
    np.testing.assert_allclose(np.stack([ra, dec]), wcs.pixel_to_world_values(x, y), atol=1e-10, rtol=0)
    np.testing.assert_allclose(multiband.sky_to_pixel(ra=ra, dec=dec), (x, y), atol=1e-7, rtol=0)


def test_places_that_are_not_on_the_sky() -> None:
    """NaN, latitudes beyond the pole and the far side of the sky are NaN."""
    multiband = MultibandCoadd.from_coadds(make_test_coadds("g"))
    ra = np.array([150.0, np.nan, 150.0, 150.0, np.inf, 330.0, 150.0])
    dec = np.array([2.0, 2.0, np.nan, -999.0, 0.0, -2.0, 90.0])
    x, y = multiband.sky_to_pixel(ra=ra, dec=dec)
    assert np.isnan(x).tolist() == np.isnan(y).tolist() == [False, True, True, True, True, True, False]
    assert (x[0], y[0]) == pytest.approx((1000.0, 1000.0), abs=1e-6)


def test_no_places() -> None:
    """Empty arrays of positions give empty arrays."""
    multiband = MultibandCoadd.from_coadds(make_test_coadds("g"))
    empty = np.empty(0)
    for result in (*multiband.sky_to_pixel(ra=empty, dec=empty), *multiband.pixel_to_sky(x=empty, y=empty)):
        assert result.shape == (0,)
    assert multiband.compute_psf_kernels("g", x=empty, y=empty, size=5).shape == (0, 5, 5)


@pytest.mark.parametrize("scale", [0.168, 0.2, 0.263])
@pytest.mark.parametrize("dec", [-30.0, 2.0, 80.0])
def test_pixel_scale(scale: float, dec: float) -> None:
    """The pixel scale is that of the WCS at the centre of the patch."""
    wcs = make_tangent_wcs(ra=10.0, dec=dec, pixel_scale=scale, x=749.5, y=1349.5)
    box = Box.from_shape((300, 300), start=(1200, 600))
    projection = SkyProjection.from_fits_wcs(wcs, TractFrame(skymap="test", tract=0, bbox=box))
    multiband = MultibandCoadd.from_coadds({"i": make_test_coadd(sky_projection=projection)})
    assert multiband.pixel_scale == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("dx", [-0.5, -0.2, 0.0, 0.37])
@pytest.mark.parametrize("dy", [0.0, 0.5, -0.41])
def test_shift_is_that_of_afw(dx: float, dy: float) -> None:
    """The shift is the Lanczos-5 convolution of lsst.afw.math.offsetImage."""
    kernel = np.random.default_rng(3).uniform(size=(21, 25))
    expected = kernel
    for axis, shift in ((0, dy), (1, dx)):
        k = np.arange(-5, 6) - shift
        weights = np.where(np.abs(k) < 5, np.sinc(k) * np.sinc(k / 5), 0.0)
        expected = convolve1d(expected, weights / weights.sum(), axis=axis, mode="constant")
    shifted = shift_kernel(kernel, dx=dx, dy=dy)
    assert shifted.shape == kernel.shape
    np.testing.assert_allclose(shifted, expected, atol=1e-14)


def test_many_shifts_are_like_single_ones() -> None:
    """Arrays of shifts give what each shift gives by itself."""
    kernel = _make_gaussian(21, 1.7)
    dx, dy = np.random.default_rng(4).uniform(-0.5, 0.5, size=(2, 7))
    many = shift_kernel(kernel, dx=dx, dy=dy, size=15)
    assert many.shape == (7, 15, 15)
    for n in range(7):
        single = shift_kernel(kernel, dx=dx[n], dy=dy[n])
        np.testing.assert_allclose(many[n], single[3:-3, 3:-3], atol=1e-15)


@pytest.mark.parametrize("sigma", [1.2, 1.7, 2.5])
@pytest.mark.parametrize(("dx", "dy"), [(0.0, 0.0), (0.5, -0.5), (0.25, 0.4)])
def test_psf_is_a_shifted_gaussian(sigma: float, dx: float, dy: float) -> None:
    """A PSF image is centred on the object, to 0.3% of its peak."""
    multiband = _make_coadd_of_psfs(np.full((1, 1), sigma))
    psf = multiband.compute_psf_kernel("i", x=100 + dx, y=90 + dy, size=25)
    assert psf is not None
    # A star half a pixel off is on the stamp of the next pixel.
    x, y = dx - np.floor(dx + 0.5), dy - np.floor(dy + 0.5)
    expected = _make_gaussian(25, sigma, x=x, y=y)
    np.testing.assert_allclose(psf, expected, atol=3e-3 * expected.max())
    assert psf.sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("size", [3, 11, 35, 51])
def test_psf_fits_any_stamp(size: int) -> None:
    """Kernels are cropped or padded about their centre, not renormalised."""
    multiband = _make_coadd_of_psfs(np.full((1, 1), 2.0))
    large = multiband.compute_psf_kernel("i", x=100.3, y=99.8, size=61)
    psf = multiband.compute_psf_kernel("i", x=100.3, y=99.8, size=size)
    assert psf is not None
    assert large is not None
    assert psf.shape == (size, size)
    margin = (61 - size) // 2
    np.testing.assert_allclose(psf, large[margin : 61 - margin, margin : 61 - margin], atol=1e-15)


def test_psf_is_that_of_the_cell() -> None:
    """Each object gets the PSF of the cell that holds its nearest pixel."""
    sigmas = np.array([[1.5, 2.0, 2.5], [1.7, 2.2, 2.7]])
    multiband = _make_coadd_of_psfs(sigmas)
    # Cells of 50 pixels start at 75; pixel 125 reaches from 124.5 to 125.5.
    x = np.array([75.0, 124.49, 124.5, 150.0, 174.5, 224.0])
    y = np.array([80.0, 124.49, 124.49, 125.0, 124.5, 174.4])
    cells = [(0, 0), (0, 0), (0, 1), (1, 1), (1, 2), (1, 2)]
    psfs = multiband.compute_psf_kernels("i", x=x, y=y, size=31)
    for psf, cell, a, b in zip(psfs, cells, x, y, strict=True):
        expected = _make_gaussian(31, sigmas[cell], x=a - np.floor(a + 0.5), y=b - np.floor(b + 0.5))
        np.testing.assert_allclose(psf, expected, atol=3e-3 * expected.max())
        single = multiband.compute_psf_kernel("i", x=a, y=b, size=31)
        np.testing.assert_allclose(psf, single, atol=1e-15)


def test_no_psf_in_missing_cells_and_outside() -> None:
    """There is no PSF in a missing cell and beyond the cells."""
    multiband = _make_coadd_of_psfs(np.full((2, 2), 2.0), missing_cells=[(1, 0)])
    for x, y, present in [
        (80, 80, True),
        (80, 130, False),
        (130, 130, True),
        (60, 80, False),
        (180, 80, False),
    ]:
        psf = multiband.compute_psf_kernel("i", x=float(x), y=float(y), size=9)
        assert (psf is not None) is present, (x, y)
    psfs = multiband.compute_psf_kernels("i", x=np.array([80.0, 80.0]), y=np.array([80.0, 130.0]), size=9)
    assert np.isfinite(psfs).all(axis=(1, 2)).tolist() == [True, False]


def test_psf_model_that_is_not_of_cells() -> None:
    """Any PSF model of lsst.images can be sampled."""
    box = Box.from_shape((400, 200), start=(10, 20))
    psf = CellPsf.from_images(GaussianPointSpreadFunction(2.0, bounds=box, stamp_size=25), box)
    star = psf.compute_stars(x=np.array([130.25]), y=np.array([399.9]), size=25)[0]
    expected = _make_gaussian(25, 2.0, x=0.25, y=-0.1)
    np.testing.assert_allclose(star, expected, atol=2e-3 * expected.max())


@pytest.mark.parametrize("order", [1, -1])
def test_psf_beside_a_hole(order: int) -> None:
    """A hole at the centre of a cell spoils no other object of the cell.

    The result does not depend on the order of the objects.
    """

    def evaluate(*, x: float, y: float) -> np.ndarray:
        if np.hypot(x - 75, y - 75) < 20:
            raise BoundsError("No input images.")
        return _make_gaussian(15, 1.5)

    grid = CellGrid(bbox=Box.from_shape((150, 150)), cell_shape=YX(y=150, x=150))
    psf = CellPsf(evaluate, grid, failures=(BoundsError,))
    x = np.array([75.0, 10.0, 140.0])[::order]
    found = np.isfinite(psf.compute_stars(x=x, y=x, size=9)).all(axis=(1, 2))
    assert found[::order].tolist() == [False, True, True]


def test_other_errors_of_the_psf_are_not_hidden() -> None:
    """Only the exceptions that mean a missing PSF are taken for one."""

    def evaluate(*, x: float, y: float) -> np.ndarray:
        raise RuntimeError("Broken model.")

    grid = CellGrid(bbox=Box.from_shape((150, 150)), cell_shape=YX(y=150, x=150))
    with pytest.raises(RuntimeError, match="Broken model"):
        CellPsf(evaluate, grid, failures=(BoundsError,)).compute_kernel(x=1.0, y=1.0)


def test_planes_without_psf() -> None:
    """Planes may be put together by hand, without a PSF."""
    coadd = make_test_coadd("i")
    planes = CoaddPlanes(coadd.image.array, coadd.variance.array, coadd.mask, psf=None)
    multiband = MultibandCoadd("i", {"i": planes}, bbox=coadd.bbox, sky_projection=coadd.sky_projection)
    assert multiband.compute_psf_kernel("i", x=700.0, y=1300.0, size=9) is None
    assert np.isnan(multiband.compute_psf_kernels("i", x=np.zeros(2), y=np.zeros(2), size=9)).all()


class _RecordingHandle:
    """A deferred handle that records what is read through it."""

    def __init__(self, handle: Any) -> None:
        self.handle, self.ref, self.dataId = handle, handle.ref, handle.dataId
        self.reads: list[str | None] = []

    def get(self, *, component: str | None = None, parameters: dict[str, Any] | None = None) -> Any:
        self.reads.append(component)
        return self.handle.get(component=component, parameters=parameters)


@pytest.fixture(scope="module")
def butler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Butler]:
    """Make a repository of one patch, one cell of which is missing."""
    root = tmp_path_factory.mktemp("repository")
    with make_test_repository(root, n_patches=(1, 1), n_sources=3, missing_cells=[(0, 0)]) as butler:
        yield butler


def test_read_from_a_repository(butler: Butler) -> None:
    """Reading a repository gives the coadds, only those asked for."""
    handles = [
        _RecordingHandle(butler.getDeferred("deep_coadd", PATCH_ID, band=band)) for band in ("g", "r", "i")
    ]
    multiband = MultibandCoadd.read(handles, ["i", "z", "g"])
    assert multiband.bands == ("i", "z", "g")
    assert multiband.missing_bands == ("z",)
    # All planes at once, and once a pixel for the definition of the patch.
    assert [handle.reads for handle in handles] == [["components"], [], ["components", None]]
    for band in ("i", "g"):
        coadd = butler.get("deep_coadd", PATCH_ID, band=band)
        assert multiband.bbox == coadd.bbox
        assert multiband.inner_bbox == coadd.patch.inner_bbox
        assert multiband.inner_bbox != coadd.bbox
        np.testing.assert_array_equal(multiband.planes[band].image, coadd.image.array)
        np.testing.assert_array_equal(multiband.planes[band].variance, coadd.variance.array)
        np.testing.assert_array_equal(multiband.compute_mask(band, ["NO_DATA"]), coadd.mask.get("NO_DATA"))
        assert multiband.planes[band].missing_cells == (Box.from_shape((50, 50), start=(0, 0)),)
        assert multiband.compute_psf_kernel(band, x=20.0, y=20.0, size=9) is None
        assert multiband.compute_psf_kernel(band, x=70.0, y=20.0, size=9) is not None


def test_read_masked_images_from_a_repository(tmp_path: Path) -> None:
    """Datasets of storage class MaskedImageV2 are read as well."""
    with make_test_repository(tmp_path, bands="g", n_patches=(1, 1), n_sources=1) as butler:
        image = _as_masked_image(butler.get("deep_coadd", PATCH_ID, band="g"))
        dimensions = ("band", *PATCH_DIMENSIONS)
        dataset_type = DatasetType("plain_coadd", dimensions, "MaskedImageV2", universe=butler.dimensions)
        butler.registry.registerDatasetType(dataset_type)
        butler.put(image, dataset_type, PATCH_ID, band="g")
        multiband = MultibandCoadd.read([butler.getDeferred("plain_coadd", PATCH_ID, band="g")], ["g"])
        np.testing.assert_array_equal(multiband.planes["g"].image, image.image.array)
        assert multiband.planes["g"].psf is None
        assert multiband.inner_bbox is None


def test_read_from_memory() -> None:
    """Handles of coadds in memory do instead of a repository."""
    coadds = make_test_coadds("gr")
    handles = [
        InMemoryDatasetHandle(coadd, storageClass="CellCoadd", dataId={"band": band})
        for band, coadd in coadds.items()
    ]
    multiband = MultibandCoadd.read(handles, "rg")
    assert multiband.bands == ("r", "g")
    assert multiband.inner_bbox == coadds["g"].patch.inner_bbox
    for band, coadd in coadds.items():
        np.testing.assert_array_equal(multiband.planes[band].image, coadd.image.array)


def test_no_handle_at_all() -> None:
    """A patch without coadds is refused as in memory."""
    with pytest.raises(ValueError, match="None of the bands g, r has a coadd"):
        MultibandCoadd.read([], ["g", "r"])


def test_two_coadds_of_a_band() -> None:
    """Two coadds of one band are not of one patch."""
    handles = [
        InMemoryDatasetHandle(make_test_coadd(start=(0, x)), storageClass="CellCoadd", dataId={"band": "i"})
        for x in (0, 300)
    ]
    with pytest.raises(ValueError, match="of the same band"):
        MultibandCoadd.read(handles, "i")


def test_cell_coadd_without_patch() -> None:
    """A cell coadd need not know its patch."""
    coadd = make_test_coadd("i")
    bare = CellCoadd(
        coadd.image,
        mask=coadd.mask,
        variance=coadd.variance,
        sky_projection=coadd.sky_projection,
        psf=coadd.psf,
    )
    assert MultibandCoadd.from_coadds({"i": bare}).inner_bbox is None

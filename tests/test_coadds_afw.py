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


"""Tests of coadds.py with the exposures of lsst.afw.

The first half needs no afw: small stand-ins have the few methods that are
used.  The second half is skipped where afw cannot be imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from astropy.table import Table

from lsst.daf.butler import Butler, DatasetType
from lsst.images import Box, Image, MaskedImage, get_legacy_deep_coadd_mask_planes
from lsst.images.cells import CellCoadd, CellPointSpreadFunction
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.cutouts import CutoutExtractor
from lsst.meas.deeplearn.lenses.lens_finder_task import LensFinderConfig, LensFinderTask
from lsst.meas.deeplearn.model_package import ingest_model
from lsst.meas.deeplearn.repository import PATCH_DIMENSIONS
from lsst.meas.deeplearn.tests import make_test_coadd, make_test_coadds, make_test_model, make_test_repository
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor

DEFAULT_PLANES = ("BAD", "SAT", "INTRP", "CR", "EDGE", "DETECTED", "DETECTED_NEGATIVE", "SUSPECT") + (
    "NO_DATA",
    "VIGNETTED",
    "STREAK",
)
"""Planes that every new afw mask has, in the order of their bits."""

ZERO_POINT = 27.0
"""Magnitude of one count, for coadds that are not in nJy."""

NJY_PER_COUNT = 10 ** (0.4 * (31.4 - ZERO_POINT))


def _make_coadds(
    bands: str = "gri", *, missing_cells: Collection[tuple[int, int]] = ((0, 1),), **kwargs: Any
) -> dict[str, CellCoadd]:
    """Make coadds of cells of 50 pixels, each with a PSF of its own."""
    rng = np.random.default_rng(20)
    coadds = make_test_coadds(bands, n_cells=(6, 6), missing_cells=missing_cells, **kwargs)
    r = np.arange(21) - 10
    for band, coadd in coadds.items():
        sigma = rng.uniform(1.3, 2.2, size=(6, 6, 1, 1))
        kernels = np.exp(-0.5 * (r[:, None] ** 2 + r[None, :] ** 2) / sigma**2)
        kernels /= kernels.sum(axis=(2, 3), keepdims=True)
        for cell in missing_cells:
            kernels[cell] = np.nan
        coadds[band] = CellCoadd(
            coadd.image,
            mask=coadd.mask,
            variance=coadd.variance,
            sky_projection=coadd.sky_projection,
            band=band,
            psf=CellPointSpreadFunction(kernels, coadd.psf.bounds),
            patch=coadd.patch,
        )
    return coadds


def _assert_same(
    legacy: MultibandCoadd, cells: MultibandCoadd, *, rtol: float = 0.0, psf: bool = True
) -> None:
    """Raise unless two coadds have the same pixels, PSFs and cutouts."""
    assert legacy.bands == cells.bands
    assert legacy.bbox == cells.bbox
    assert legacy.pixel_scale == pytest.approx(cells.pixel_scale, rel=1e-9)
    rng = np.random.default_rng(21)
    x = rng.uniform(cells.bbox.x.min - 5, cells.bbox.x.max + 5, 40)
    y = rng.uniform(cells.bbox.y.min - 5, cells.bbox.y.max + 5, 40)
    ra, dec = cells.pixel_to_sky(x=x, y=y)
    np.testing.assert_allclose(legacy.sky_to_pixel(ra=ra, dec=dec), (x, y), atol=1e-6, rtol=0)
    for band in cells.bands:
        a, b = legacy.planes[band], cells.planes[band]
        np.testing.assert_allclose(a.image, b.image, rtol=rtol)
        np.testing.assert_allclose(a.variance, b.variance, rtol=rtol)
        for plane in b.mask.schema.names:
            np.testing.assert_array_equal(
                legacy.compute_mask(band, [plane]), cells.compute_mask(band, [plane]), err_msg=plane
            )
        np.testing.assert_array_equal(
            legacy.compute_bad_pixels(band, ["SAT"]), cells.compute_bad_pixels(band, ["SAT"])
        )
        if psf:
            assert a.missing_cells == b.missing_cells
            np.testing.assert_allclose(
                legacy.compute_psf_kernels(band, x=x, y=y, size=15),
                cells.compute_psf_kernels(band, x=x, y=y, size=15),
                atol=1e-12,
            )
    first, second = (
        CutoutExtractor(coadd, size=21, psf_size=15 if psf else 0).extract(ids=np.arange(40), ra=ra, dec=dec)
        for coadd in (legacy, cells)
    )
    for name in ("bad", "off_edge", "missing_band", *(["missing_cell"] if psf else [])):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    np.testing.assert_allclose(first.image, second.image, rtol=rtol)
    np.testing.assert_allclose(first.psf, second.psf, atol=1e-7)


def _make_config(**kwargs: Any) -> LensFinderConfig:
    config = LensFinderConfig()
    config.inference.device = "cpu"
    config.selection = []
    config.update(**kwargs)
    return config


def _assert_same_candidates(legacy: Table, cells: Table) -> None:
    """Raise unless objects have the same scores and flags."""
    assert len(legacy) == len(cells) > 0
    legacy, cells = legacy[np.argsort(legacy["objectId"])], cells[np.argsort(cells["objectId"])]
    assert np.isfinite(cells["score"]).any()
    for name in ("score", "ringfinder_snr"):
        np.testing.assert_allclose(legacy[name], cells[name], atol=1e-4, rtol=1e-4, err_msg=name)
    for name in cells.colnames:
        # An afw coadd does not know the inner region of its patch.
        if name.startswith("flag_") or name == "ringfinder_is_lens":
            np.testing.assert_array_equal(legacy[name], cells[name], err_msg=name)


def _find_lenses(coadd: MultibandCoadd) -> Table:
    """Run the task on some objects, one of them in a missing cell."""
    x, y = np.array([640.0, 700.0, 675.0, 830.2, 605.0]), np.array([1300.0, 1340.0, 1225.0, 1420.7, 1300.0])
    ra, dec = coadd.pixel_to_sky(x=x, y=y)
    objects = Table({"objectId": np.arange(5), "coord_ra": ra, "coord_dec": dec})
    return LensFinderTask(config=_make_config()).run(coadd, objects, [make_test_model()]).candidates


# ---------------------------------------------------------------------------
# Stand-ins for the classes of afw, and tests with them.
# ---------------------------------------------------------------------------


class _InvalidPsfError(Exception):
    """Stands for `lsst.afw.detection.InvalidPsfError`."""


class _Point2D:
    """Stands for `lsst.geom.Point2D`, which makes integers of float32."""

    def __init__(self, x: Any, y: Any) -> None:
        assert type(x) is type(y) is float
        self.x, self.y = x, y


class _Interval:
    def __init__(self, begin: int, end: int) -> None:
        self.begin, self.end = begin, end


class _Box2I:
    def __init__(self, box: Box) -> None:
        self.x, self.y = _Interval(box.x.start, box.x.stop), _Interval(box.y.start, box.y.stop)


class _Array:
    """Stands for images and masks."""

    def __init__(self, array: np.ndarray, box: Box, planes: Mapping[str, int] | None = None) -> None:
        self.array, self.box, self.planes = array, box, planes

    def getX0(self) -> int:
        return self.box.x.start

    def getY0(self) -> int:
        return self.box.y.start

    def getMaskPlaneDict(self) -> dict[str, int]:
        assert self.planes is not None
        return dict(self.planes)


class _MaskedImage:
    def __init__(self, image: _Array, mask: _Array, variance: _Array) -> None:
        self.image, self.mask, self.variance = image, mask, variance

    def getImage(self) -> _Array:
        return self.image

    def getMask(self) -> _Array:
        return self.mask

    def getVariance(self) -> _Array:
        return self.variance


class _PhotoCalib:
    def __init__(self, mean: float = 0.0) -> None:
        self.mean = mean

    def getCalibrationMean(self) -> float:
        return self.mean

    def calibrateImage(self, masked_image: _MaskedImage) -> _MaskedImage:
        image, variance = masked_image.image, masked_image.variance
        return _MaskedImage(
            _Array(image.array * np.float32(self.mean), image.box),
            masked_image.mask,
            _Array(variance.array * np.float32(self.mean**2), variance.box),
        )


class _SkyWcs:
    """Stands for `lsst.afw.geom.SkyWcs`; has the AST object in it."""

    def __init__(self, coadd: CellCoadd) -> None:
        self.frame_dict = coadd.sky_projection._pixel_to_sky._ast_mapping

    def getFitsApproximation(self) -> None:
        return None

    def getFrameDict(self) -> Any:
        return self.frame_dict


class _Psf:
    """Stands for a PSF that varies continuously, with a hole."""

    def __init__(self, evaluate: Callable[[float, float], np.ndarray]) -> None:
        self.evaluate, self.calls = evaluate, 0

    def computeKernelImage(self, position: _Point2D) -> types.SimpleNamespace:
        self.calls += 1
        return types.SimpleNamespace(array=self.evaluate(position.x, position.y))


class _Index2D(NamedTuple):
    """Stands for `lsst.skymap.Index2D`."""

    x: int
    y: int


class _StitchedPsf:
    """Stands for `lsst.cell_coadds.StitchedPsf`."""

    def __init__(
        self, kernels: Mapping[_Index2D, np.ndarray], box: Box, cell_size: int, padding: int = 0
    ) -> None:
        self.images, self.box, self.padding = dict(kernels), box, padding
        self.grid = types.SimpleNamespace(
            bbox=_Box2I(box), cell_size=types.SimpleNamespace(x=cell_size, y=cell_size), padding=padding
        )

    @classmethod
    def from_cells(cls, psf: CellPointSpreadFunction) -> _StitchedPsf:
        kernels = {_Index2D(cell.j, cell.i): psf[cell].array for cell in psf.bounds.cell_indices()}
        return cls(kernels, psf.grid.bbox, psf.grid.cell_shape.x)

    def computeKernelImage(self, position: _Point2D) -> types.SimpleNamespace:
        x, y = np.floor(position.x + 0.5), np.floor(position.y + 0.5)
        if not self.box.padded(self.padding).contains(x=x, y=y):
            raise _InvalidPsfError("No inputs exists at position.")
        # Positions in the padding belong to the nearest cell.
        x, y = np.clip(x, self.box.x.min, self.box.x.max), np.clip(y, self.box.y.min, self.box.y.max)
        size = self.grid.cell_size.x
        index = _Index2D(int(x - self.box.x.start) // size, int(y - self.box.y.start) // size)
        if index not in self.images:
            raise _InvalidPsfError("No inputs exists at position.")
        return types.SimpleNamespace(array=self.images[index])


class _Exposure:
    """Stands for `lsst.afw.image.ExposureF`."""

    def __init__(self, masked_image: _MaskedImage, box: Box, *, photo_calib: Any, wcs: Any, psf: Any) -> None:
        self.masked_image, self.box = masked_image, box
        self.photo_calib, self.wcs, self.psf = photo_calib, wcs, psf

    def getMaskedImage(self) -> _MaskedImage:
        return self.masked_image

    def getBBox(self) -> _Box2I:
        return _Box2I(self.box)

    def getPhotoCalib(self) -> Any:
        return self.photo_calib

    def getWcs(self) -> Any:
        return self.wcs

    def getPsf(self) -> Any:
        return self.psf


def _make_fake(
    coadd: CellCoadd, *, scale: float = 1.0, planes: Collection[str] = (), **kwargs: Any
) -> _Exposure:
    """Dress a cell coadd up as an exposure, in units of ``scale`` nJy."""
    names = {plane.name: old for old, plane in get_legacy_deep_coadd_mask_planes().items()}
    bits = {
        name: n for n, name in enumerate([*DEFAULT_PLANES, "CLIPPED", "REJECTED", "INEXACT_PSF", *planes])
    }
    mask = np.zeros(coadd.bbox.shape, dtype=np.int32)
    for name in coadd.mask.schema.names:
        mask |= np.where(coadd.mask.get(name), np.int32(1 << bits[names[name]]), np.int32(0))
    masked_image = _MaskedImage(
        _Array(coadd.image.array / np.float32(scale), coadd.bbox),
        _Array(mask, coadd.bbox, bits),
        _Array(coadd.variance.array / np.float32(scale**2), coadd.bbox),
    )
    arguments = {
        "photo_calib": _PhotoCalib(scale),
        "wcs": _SkyWcs(coadd),
        "psf": _StitchedPsf.from_cells(coadd.psf),
    }
    return _Exposure(masked_image, coadd.bbox, **(arguments | kwargs))


@pytest.fixture
def _fake_afw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the two names that are imported from afw be stand-ins."""
    modules = {
        "lsst.afw": {},
        "lsst.afw.detection": {"InvalidPsfError": _InvalidPsfError},
        "lsst.geom": {"Point2D": _Point2D},
    }
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("_fake_afw")
def test_exposure_is_like_its_cell_coadd() -> None:
    """An exposure made of a cell coadd gives the same pixels and scores."""
    coadds = _make_coadds(mask_boxes={"SATURATED": Box.from_shape((30, 20), start=(1290, 790))})
    cells = MultibandCoadd.from_coadds(coadds)
    legacy = MultibandCoadd.from_coadds({band: _make_fake(coadd) for band, coadd in coadds.items()})
    _assert_same(legacy, cells)
    assert legacy.inner_bbox is None
    _assert_same_candidates(_find_lenses(legacy), _find_lenses(cells))


@pytest.mark.usefixtures("_fake_afw")
def test_zero_point_is_applied() -> None:
    """Counts become nJy by the PhotoCalib, in image and variance."""
    coadds = _make_coadds("gr")
    fakes = {band: _make_fake(coadd, scale=NJY_PER_COUNT) for band, coadd in coadds.items()}
    assert np.nanmean(fakes["g"].masked_image.variance.array) < 0.1
    _assert_same(MultibandCoadd.from_coadds(fakes), MultibandCoadd.from_coadds(coadds), rtol=1e-5)


@pytest.mark.usefixtures("_fake_afw")
@pytest.mark.parametrize("photo_calib", [None, _PhotoCalib(), _PhotoCalib(-1.0), _PhotoCalib(np.nan)])
def test_exposure_without_calibration_is_refused(photo_calib: _PhotoCalib | None) -> None:
    """No PhotoCalib, or the default one of mean 0, would blank the image."""
    exposure = _make_fake(make_test_coadd("r"), photo_calib=photo_calib)
    with pytest.raises(ValueError, match=r"The r coadd has no photometric calibration to nJy \(PhotoCalib\)"):
        MultibandCoadd.from_coadds({"r": exposure})


@pytest.mark.usefixtures("_fake_afw")
def test_exposure_without_wcs_is_refused() -> None:
    """Without a WCS no object has a place."""
    with pytest.raises(ValueError, match="The r coadd has no WCS, so objects cannot be placed"):
        MultibandCoadd.from_coadds({"r": _make_fake(make_test_coadd("r"), wcs=None)})


@pytest.mark.usefixtures("_fake_afw")
def test_exposure_without_psf() -> None:
    """An exposure may have no PSF, and then no object has one."""
    multiband = MultibandCoadd.from_coadds({"r": _make_fake(make_test_coadd("r"), psf=None)})
    assert multiband.planes["r"].psf is None
    assert multiband.planes["r"].missing_cells == ()


@pytest.mark.usefixtures("_fake_afw")
def test_exposure_without_psf_needs_no_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels are converted by lsst.images alone."""
    monkeypatch.delitem(sys.modules, "lsst.afw.detection")
    MultibandCoadd.from_coadds({"r": _make_fake(make_test_coadd("r"), psf=None)})


@pytest.mark.usefixtures("_fake_afw")
def test_mask_planes_of_no_stock_map() -> None:
    """Planes that no map of lsst.images has are kept under their names."""
    exposure = _make_fake(make_test_coadd("r"), planes=["CROSSTALK", "LEGACY_X", "SATURATED"])
    mask = exposure.masked_image.mask
    for n, name in enumerate(("SAT", "SATURATED", "STREAK", "VIGNETTED", "BAD", "CROSSTALK", "LEGACY_X")):
        mask.array[n, n] |= 1 << mask.planes[name]
    multiband = MultibandCoadd.from_coadds({"r": exposure})
    for names, rows in [
        # A process may have a plane under its new name besides the old.
        (["SAT"], [0, 1]),
        (["SATURATED"], [0, 1]),
        (["STREAK", "VIGNETTED"], [2, 3]),
        (["BAD", "CROSSTALK", "LEGACY_X"], [4, 5, 6]),
        (["DETECTED"], []),
    ]:
        assert np.argwhere(multiband.compute_mask("r", names))[:, 0].tolist() == rows, names
    with pytest.raises(ValueError, match="No coadd has mask planes"):
        multiband.compute_mask("r", ["LEGACY_Y"])


@pytest.mark.usefixtures("_fake_afw")
def test_all_bits_of_the_mask() -> None:
    """A mask may use all 32 bits, the last of which is the sign."""
    planes = [f"PLANE{n}" for n in range(32 - len(DEFAULT_PLANES) - 3)]
    exposure = _make_fake(make_test_coadd("r"), planes=planes)
    exposure.masked_image.mask.array[5, 6] = np.int32(-(2**31))
    multiband = MultibandCoadd.from_coadds({"r": exposure})
    assert np.argwhere(multiband.compute_mask("r", planes[-1:])).tolist() == [[5, 6]]
    assert not multiband.compute_mask("r", planes[:-1]).any()


def _make_gaussian(sigma: float, size: int = 25) -> np.ndarray:
    r = np.arange(size) - size // 2
    kernel = np.exp(-0.5 * (r[:, None] ** 2 + r[None, :] ** 2) / sigma**2)
    return kernel / kernel.sum()


@pytest.mark.usefixtures("_fake_afw")
def test_psf_with_holes() -> None:
    """Where a PSF cannot be evaluated there is none, elsewhere there is.

    The centres of the left cells of 150 pixels are in the hole, and the
    kernels are of different sizes.
    """

    def evaluate(x: float, y: float) -> np.ndarray:
        if 640 < x < 710:
            raise _InvalidPsfError("No inputs.")
        return _make_gaussian(2.0, 33) if x < 675 else _make_gaussian(1.5, 25)

    psf = _Psf(evaluate)
    multiband = MultibandCoadd.from_coadds({"r": _make_fake(make_test_coadd("r"), psf=psf)})
    x = np.array([610.0, 680.0, 720.0, 800.0, 890.0])
    psfs = multiband.compute_psf_kernels("r", x=x, y=np.full(5, 1300.0), size=15)
    assert np.isfinite(psfs).all(axis=(1, 2)).tolist() == [True, False, True, True, True]
    for k, sigma in [(0, 2.0), (2, 1.5), (3, 1.5), (4, 1.5)]:
        expected = _make_gaussian(sigma, 33)[9:-9, 9:-9]
        np.testing.assert_allclose(psfs[k], expected, atol=1e-6)
    assert multiband.planes["r"].missing_cells == ()
    # Objects of a cell share one evaluation, but for those beside a hole.
    assert psf.calls == 1 + 3 + 1


@pytest.mark.usefixtures("_fake_afw")
def test_other_errors_of_a_psf_are_not_hidden() -> None:
    """A broken PSF is an error, not a missing PSF."""

    def evaluate(x: float, y: float) -> np.ndarray:
        raise RuntimeError("Broken.")

    multiband = MultibandCoadd.from_coadds({"r": _make_fake(make_test_coadd("r"), psf=_Psf(evaluate))})
    with pytest.raises(RuntimeError, match=r"Broken\."):
        multiband.compute_psf_kernel("r", x=700.0, y=1300.0, size=9)


@pytest.mark.usefixtures("_fake_afw")
def test_cells_with_padding() -> None:
    """Positions in the padding of a grid of cells have the nearest PSF."""
    kernels = {
        _Index2D(x=j, y=i): _make_gaussian(1.3 + 0.1 * i + 0.03 * j) for i in range(4) for j in range(4)
    }
    del kernels[_Index2D(x=2, y=1)]
    psf = _StitchedPsf(kernels, Box.from_shape((200, 200), start=(1250, 650)), cell_size=50, padding=50)
    multiband = MultibandCoadd.from_coadds({"r": _make_fake(make_test_coadd("r"), psf=psf)})
    assert multiband.planes["r"].missing_cells == (Box.from_shape((50, 50), start=(1300, 750)),)
    for x, y, index in [(620, 1270, (0, 0)), (620, 1320, (0, 1)), (880, 1480, (3, 3)), (700, 1351, (1, 2))]:
        found = multiband.compute_psf_kernel("r", x=float(x), y=float(y), size=25)
        np.testing.assert_allclose(found, kernels[_Index2D(*index)], atol=1e-12)
    assert multiband.compute_psf_kernel("r", x=760.0, y=1320.0, size=25) is None


# ---------------------------------------------------------------------------
# Tests with afw itself.
# ---------------------------------------------------------------------------


@pytest.fixture
def afw_image() -> Iterator[Any]:
    """Import lsst.afw.image, and restore its mask planes afterwards.

    New planes go into a dictionary of the process, of 32 at most.
    """
    module = pytest.importorskip("lsst.afw.image")
    before = set(module.MaskX(1, 1).getMaskPlaneDict())
    yield module
    for name in set(module.MaskX(1, 1).getMaskPlaneDict()) - before:
        module.MaskX.removeMaskPlane(name)


def _make_exposure(
    afw_image: Any, coadd: CellCoadd, *, photo_calib: Any = None, scale: float = 1.0, psf: Any = None
) -> Any:
    """Make an ExposureF of the pixels of a cell coadd, divided by a scale."""
    masked_image = MaskedImage(
        Image((coadd.image.array / scale).astype(np.float32), bbox=coadd.bbox),
        mask=coadd.mask,
        variance=Image((coadd.variance.array / scale**2).astype(np.float32), bbox=coadd.bbox),
    )
    exposure = afw_image.ExposureF(masked_image.to_legacy(plane_map=get_legacy_deep_coadd_mask_planes()))
    exposure.setWcs(coadd.sky_projection.to_legacy())
    exposure.setFilter(afw_image.FilterLabel.fromBand(coadd.band))
    exposure.setPhotoCalib(afw_image.PhotoCalib(1.0) if photo_calib is None else photo_calib)
    if psf is not None:
        exposure.setPsf(psf)
    return exposure


def _to_legacy(coadd: CellCoadd) -> Any:
    """Convert a cell coadd by lsst.images, with all that it converts."""
    pytest.importorskip("lsst.cell_coadds")
    return coadd.to_legacy(plane_map=get_legacy_deep_coadd_mask_planes())


def test_real_exposure_is_like_its_cell_coadd(afw_image: Any, tmp_path: Path) -> None:
    """CellCoadd.to_legacy gives the same pixels, PSFs, cutouts and scores.

    So does the exposure after it went through a FITS file.
    """
    coadds = _make_coadds(mask_boxes={"SATURATED": Box.from_shape((30, 20), start=(1290, 790))})
    cells = MultibandCoadd.from_coadds(coadds)
    expected = _find_lenses(cells)
    exposures = {band: _to_legacy(coadd) for band, coadd in coadds.items()}
    legacy = MultibandCoadd.from_coadds(exposures)
    _assert_same(legacy, cells)
    _assert_same_candidates(_find_lenses(legacy), expected)

    read = {}
    for band, exposure in exposures.items():
        exposure.writeFits(str(tmp_path / f"{band}.fits"))
        read[band] = afw_image.ExposureF(str(tmp_path / f"{band}.fits"))
    legacy = MultibandCoadd.from_coadds(read)
    _assert_same(legacy, cells)
    _assert_same_candidates(_find_lenses(legacy), expected)


def test_real_cell_coadd_beside_exposures(afw_image: Any) -> None:
    """Bands may come from both worlds, as they share a grid."""
    coadds = _make_coadds("gr")
    mixed = MultibandCoadd.from_coadds({"g": _to_legacy(coadds["g"]), "r": coadds["r"]})
    _assert_same(mixed, MultibandCoadd.from_coadds(coadds))


def test_real_zero_point_is_applied(afw_image: Any) -> None:
    """A coadd with zero point 27 becomes nJy."""
    coadds = _make_coadds("gr")
    photo_calib = afw_image.makePhotoCalibFromCalibZeroPoint(10 ** (0.4 * ZERO_POINT))
    assert photo_calib.getCalibrationMean() == pytest.approx(NJY_PER_COUNT, rel=1e-4)
    exposures = {
        band: _make_exposure(
            afw_image, coadd, photo_calib=photo_calib, scale=photo_calib.getCalibrationMean()
        )
        for band, coadd in coadds.items()
    }
    # Stale metadata do not matter.
    exposures["g"].getMetadata()["BUNIT"] = "adu"
    counts = exposures["g"].image.array.copy()
    cells = MultibandCoadd.from_coadds(coadds)
    _assert_same(MultibandCoadd.from_coadds(exposures), cells, rtol=1e-5, psf=False)
    # The exposure itself is left as it was.
    np.testing.assert_array_equal(exposures["g"].image.array, counts)


def test_real_calibration_that_varies(afw_image: Any) -> None:
    """A spatially varying PhotoCalib is applied pixel by pixel."""
    afw_math = pytest.importorskip("lsst.afw.math")
    coadd = make_test_coadd("r", noise=10.0, background=100.0)
    field = afw_math.ChebyshevBoundedField(coadd.bbox.to_legacy(), np.array([[50.0, 5.0], [3.0, 0.0]]))
    photo_calib = afw_image.PhotoCalib(field)
    exposure = _make_exposure(afw_image, coadd, photo_calib=photo_calib)
    planes = MultibandCoadd.from_coadds({"r": exposure}).planes["r"]
    y, x = (axis.ravel().astype(float) for axis in np.mgrid[1200:1500, 600:900])
    factor = photo_calib.getLocalCalibrationArray(x, y).reshape(300, 300)
    assert np.ptp(factor) > 10
    np.testing.assert_allclose(planes.image, factor * coadd.image.array, rtol=1e-5)
    np.testing.assert_allclose(planes.variance, factor**2 * coadd.variance.array, rtol=1e-5)


def test_real_exposure_that_lacks_something(afw_image: Any) -> None:
    """No or a default PhotoCalib, and no WCS, are refused; no PSF is not."""
    coadd = make_test_coadd("r")
    exposure = _make_exposure(afw_image, coadd, photo_calib=afw_image.PhotoCalib())
    with pytest.raises(ValueError, match="The r coadd has no photometric calibration"):
        MultibandCoadd.from_coadds({"r": exposure})
    bare = afw_image.ExposureF(exposure.getMaskedImage())
    with pytest.raises(ValueError, match="The r coadd has no photometric calibration"):
        MultibandCoadd.from_coadds({"r": bare})
    bare.setPhotoCalib(afw_image.PhotoCalib(1.0))
    with pytest.raises(ValueError, match="The r coadd has no WCS"):
        MultibandCoadd.from_coadds({"r": bare})
    bare.setWcs(exposure.getWcs())
    assert MultibandCoadd.from_coadds({"r": bare}).planes["r"].psf is None


def test_real_mask_planes_of_no_stock_map(afw_image: Any) -> None:
    """Every plane of the process is kept, under old, new and own names."""
    coadd = make_test_coadd("r")
    names = ("SAT", "SATURATED", "STREAK", "VIGNETTED", "BAD", "CROSSTALK", "LEGACY_X", "UNMASKEDNAN", "EDGE")
    for name in names:
        afw_image.MaskX.addMaskPlane(name)
    exposure = _make_exposure(afw_image, coadd)
    for n, name in enumerate(names):
        exposure.mask.array[n, n] |= exposure.mask.getPlaneBitMask(name)
    multiband = MultibandCoadd.from_coadds({"r": exposure})
    for asked, rows in [
        (["SAT"], [0, 1]),
        (["SATURATED"], [0, 1]),
        (["STREAK", "VIGNETTED"], [2, 3]),
        (["BAD", "CROSSTALK", "LEGACY_X"], [4, 5, 6]),
        (["UNMASKED_NAN"], [7]),
        (["DETECTION_EDGE"], [8]),
        (["EDGE"], [8]),
        (["NO_DATA"], []),
    ]:
        assert np.argwhere(multiband.compute_mask("r", asked))[:, 0].tolist() == rows, asked


def test_real_gaussian_psf(afw_image: Any) -> None:
    """PSF images are those of ``computeImage``.

    That of `lsst.afw.detection.GaussianPsf` itself integrates the Gaussian
    over pixels; any other class shifts its kernel, as we do.
    """
    afw_detection = pytest.importorskip("lsst.afw.detection")
    geom = pytest.importorskip("lsst.geom")
    psf = afw_detection.GaussianPsf(25, 25, 1.8)
    exposure = _make_exposure(afw_image, make_test_coadd("r"), psf=psf)
    multiband = MultibandCoadd.from_coadds({"r": exposure})
    kernel = pytest.importorskip("lsst.afw.math").FixedKernel(
        psf.computeKernelImage(psf.getAveragePosition())
    )
    kernel_psf = pytest.importorskip("lsst.meas.algorithms").KernelPsf(kernel)
    for x, y in [(700.0, 1300.0), (655.25, 1444.6), (700.5, 1300.49)]:
        found = multiband.compute_psf_kernel("r", x=x, y=y, size=25)
        expected = kernel_psf.computeImage(geom.Point2D(x, y)).array
        assert found is not None
        np.testing.assert_allclose(found, expected, atol=1e-6 * expected.max())


def test_real_coadd_psf_with_holes(afw_image: Any) -> None:
    """A CoaddPsf has no PSF where it has no input images, and elsewhere has.

    The holes take the centres of the cells on which the PSF is sampled, and
    the corners of the patch.
    """
    geom = pytest.importorskip("lsst.geom")
    afw_table = pytest.importorskip("lsst.afw.table")
    afw_detection = pytest.importorskip("lsst.afw.detection")
    algorithms = pytest.importorskip("lsst.meas.algorithms")
    coadd = make_test_coadd("r")
    wcs = coadd.sky_projection.to_legacy()
    schema = afw_table.ExposureTable.makeMinimalSchema()
    schema.addField("weight", type="D", doc="Weight in the coadd.")
    catalog = afw_table.ExposureCatalog(schema)
    for n, (x, sigma) in enumerate([(610, 1.5), (840, 2.5)]):
        record = catalog.getTable().makeRecord()
        record.setPsf(afw_detection.GaussianPsf(31, 31, sigma))
        record.setWcs(wcs)
        record.setBBox(geom.Box2I(geom.Point2I(x, 1210), geom.Extent2I(50, 280)))
        record["id"] = n
        record["weight"] = 1.0
        catalog.append(record)
    psf = algorithms.CoaddPsf(catalog, wcs)
    for corner in [(600.0, 1200.0), (674.5, 1274.5), (899.0, 1499.0)]:
        with pytest.raises(afw_detection.InvalidPsfError):
            psf.computeKernelImage(geom.Point2D(*corner))
    multiband = MultibandCoadd.from_coadds({"r": _make_exposure(afw_image, coadd, psf=psf)})
    x = np.array([600.0, 620.0, 650.0, 700.0, 800.0, 850.0, 880.0, 895.0])
    psfs = multiband.compute_psf_kernels("r", x=x, y=np.full(8, 1300.0), size=25)
    assert np.isfinite(psfs).all(axis=(1, 2)).tolist() == [False, True, True, False, False, True, True, False]
    for k, sigma in [(1, 1.5), (2, 1.5), (5, 2.5), (6, 2.5)]:
        expected = _make_gaussian(sigma, 31)[3:-3, 3:-3]
        np.testing.assert_allclose(psfs[k], expected, atol=0.02 * expected.max())
        assert psfs[k].sum() == pytest.approx(1.0, abs=0.01)
    ra, dec = multiband.pixel_to_sky(x=x, y=np.full(8, 1300.0))
    cutouts = CutoutExtractor(multiband, size=11, psf_size=25).extract(ids=np.arange(8), ra=ra, dec=dec)
    np.testing.assert_array_equal(cutouts.bad_psf[:, 0], np.isnan(psfs).any(axis=(1, 2)))
    assert not cutouts.missing_cell.any()


@pytest.fixture
def repository(afw_image: Any, tmp_path: Path) -> Path:
    """Return a repository that has each coadd in both storage classes."""
    pytest.importorskip("lsst.obs.base")
    root = tmp_path / "repo"
    with make_test_repository(root, n_sources=40) as butler:
        dataset_type = DatasetType(
            "deepCoadd_calexp", ("band", *PATCH_DIMENSIONS), "ExposureF", universe=butler.dimensions
        )
        butler.registry.registerDatasetType(dataset_type)
        for ref in butler.query_datasets("deep_coadd", "test/coadds"):
            butler.put(_to_legacy(butler.get(ref)), dataset_type, ref.dataId, run="test/coadds")
        ingest_model(butler, make_test_model(), run="models/test", dataset_type="deeplens_model")
    return root


def test_real_exposures_in_a_repository(repository: Path) -> None:
    """The task finds the same in ExposureF datasets as in CellCoadds."""
    tables = {}
    for name, storage_class in [("deep_coadd", "CellCoadd"), ("deepCoadd_calexp", "ExposureF")]:
        config = _make_config(coaddStorageClass=storage_class)
        config.connections.coadds = name
        butler = SimplePipelineExecutor.prep_butler(
            str(repository), inputs=["test/coadds", "models/test"], output=f"lenses/{storage_class}"
        )
        executor = SimplePipelineExecutor.from_task_class(LensFinderTask, config=config, butler=butler)
        executor.run(register_dataset_types=True)
        refs = sorted(butler.query_datasets("lens_candidates"), key=lambda ref: ref.dataId["patch"])
        tables[name] = [butler.get(ref) for ref in refs]
    assert len(tables["deep_coadd"]) == 2
    for legacy, cells in zip(tables["deepCoadd_calexp"], tables["deep_coadd"], strict=True):
        _assert_same_candidates(legacy, cells)


def test_real_pipetask_with_exposures(repository: Path) -> None:
    """The command pipetask run works on ExposureF datasets."""
    task = "lsst.meas.deeplearn.lenses.lens_finder_task.LensFinderTask"
    options = {
        "coaddStorageClass": "'ExposureF'",
        "connections.coadds": "deepCoadd_calexp",
        "selection": "['i_psfFlux > 0']",
        "inference.device": "cpu",
    }
    process = subprocess.run(
        [str(Path(sys.executable).parent / "pipetask"), "run", "-b", str(repository), "-t", f"{task}:finder"]
        + ["-i", "test/coadds,models/test", "--output-run", "lenses/pipetask"]
        + [word for key, value in options.items() for word in ("-c", f"finder:{key}={value}")]
        + ["-d", "skymap='test' AND tract=0 AND patch=1", "-j", "1", "--register-dataset-types"],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    butler = Butler.from_config(str(repository))
    table = butler.get("lens_candidates", skymap="test", tract=0, patch=1, collections="lenses/pipetask")
    assert np.isfinite(table["score"]).any()

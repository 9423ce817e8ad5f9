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

"""One patch of coadds, bands in order, from lsst.images or lsst.afw."""

from __future__ import annotations

__all__ = ("CellPsf", "CoaddPlanes", "MultibandCoadd", "canonical_mask_plane", "shift_kernel")

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord

from lsst.images import (
    YX,
    BoundsError,
    Box,
    GeneralFrame,
    Mask,
    MaskedImage,
    MaskPlane,
    SkyProjection,
    get_legacy_deep_coadd_mask_planes,
    get_legacy_difference_image_mask_planes,
    get_legacy_non_cell_coadd_mask_planes,
    get_legacy_optional_mask_planes,
    get_legacy_template_mask_planes,
    get_legacy_visit_image_mask_planes,
)
from lsst.images.cells import (
    CellCoadd,
    CellGrid,
    CellGridBounds,
    CellIJ,
    CellPointSpreadFunction,
    PatchDefinition,
)

if TYPE_CHECKING:
    from lsst.daf.butler import DeferredDatasetHandle
    from lsst.images.psfs import PointSpreadFunction
    from lsst.pipe.base import InMemoryDatasetHandle

LEGACY_MASK_PLANES: Mapping[str, str] = {
    old: plane.name
    for planes in (
        get_legacy_visit_image_mask_planes(),
        get_legacy_difference_image_mask_planes(),
        get_legacy_template_mask_planes(),
        get_legacy_optional_mask_planes(),
        get_legacy_non_cell_coadd_mask_planes(),
        get_legacy_deep_coadd_mask_planes(),
    )
    for old, plane in planes.items()
}
"""Name in lsst.images of every mask plane of afw that LSST images have.

Coadds inherit planes from visits, so those of visits are among them.
"""

PSF_CELL_SIZE = 150
"""Side in pixels of the cells on which a continuous PSF model is sampled."""

SAME_GRID_TOLERANCE = 0.01
"""Largest distance in pixels between the WCSs of bands of one patch."""

_UNREACHABLE = 1e100

_LANCZOS = 5
"""Order of the Lanczos interpolation of PSF kernels."""


def canonical_mask_plane(name: str) -> str:
    """Return the lsst.images name of a mask plane given under either scheme.

    Parameters
    ----------
    name
        Name of a plane as in lsst.images (``SATURATED``) or in afw (``SAT``).
    """
    return LEGACY_MASK_PLANES.get(name, name)


def shift_kernel(
    kernel: np.ndarray,
    *,
    dx: np.ndarray | float,
    dy: np.ndarray | float,
    size: int | None = None,
) -> np.ndarray:
    """Shift a PSF kernel image by fractions of a pixel.

    Lanczos interpolation of order 5, as ``lsst.afw.math.offsetImage`` does
    for ``computeImage``, so that PSF images agree with those of the stack
    without having it.  As there, the centroid is up to 0.012 pixels off.

    Parameters
    ----------
    kernel
        PSF image centred on a pixel, of odd sides, shape ``(y, x)``; or one
        for each shift, shape ``(N, y, x)``.
    dx, dy
        Shifts in pixels, at most 0.5 in absolute value; numbers, or arrays
        of shape ``(N,)``.
    size
        Odd side of the shifted images; those of the kernel by default.

    Returns
    -------
    shifted
        Shape ``(y, x)``, or ``(N, y, x)`` for arrays of shifts.
    """
    height, width = kernel.shape[-2:]
    along_y = _make_shift_matrices(dy, height, size or height)
    along_x = _make_shift_matrices(dx, width, size or width)
    return np.asarray(along_y @ kernel @ np.swapaxes(along_x, -1, -2))


def _make_shift_matrices(shift: np.ndarray | float, old: int, new: int) -> np.ndarray:
    """Return the weights of old pixels in shifted ones along one axis.

    Parameters
    ----------
    shift
        Shifts in pixels, a number or shape ``(N,)``.
    old, new
        Odd numbers of pixels, both with the same central one.

    Returns
    -------
    matrices
        Shape ``([N,] new, old)``.
    """
    offset = np.arange(-_LANCZOS, _LANCZOS + 1) - np.asarray(shift, dtype=np.float64)[..., None]
    weights = np.where(np.abs(offset) < _LANCZOS, np.sinc(offset) * np.sinc(offset / _LANCZOS), 0.0)
    weights /= weights.sum(axis=-1, keepdims=True)
    weights = np.concatenate([weights, np.zeros_like(weights[..., :1])], axis=-1)
    distance = (np.arange(new) - new // 2)[:, None] - (np.arange(old) - old // 2)
    return weights[..., np.where(np.abs(distance) <= _LANCZOS, distance + _LANCZOS, -1)]


class CellPsf:
    """The PSF of a coadd, evaluated once in each cell of a grid.

    Parameters
    ----------
    evaluate
        Function of keywords ``x`` and ``y`` (pixels of the coadd) that
        returns the kernel image centred on a pixel, of any odd shape.
    grid
        Cells in which the kernel counts as constant.
    failures
        Exceptions by which ``evaluate`` says that it has no PSF at a place.
    missing_cells
        Boxes of the cells that have no input images.

    Notes
    -----
    Cell coadds have one PSF in each cell by construction.  The PSF of an afw
    coadd changes from pixel to pixel and takes milliseconds to evaluate; it
    is evaluated at the centre of each cell.
    """

    def __init__(
        self,
        evaluate: Callable[..., np.ndarray],
        grid: CellGrid,
        failures: tuple[type[Exception], ...] = (),
        missing_cells: Iterable[Box] = (),
    ) -> None:
        self.missing_cells = tuple(missing_cells)
        self._evaluate = evaluate
        self._grid = grid
        self._failures = failures
        self._kernels: dict[tuple[int, int], np.ndarray | None] = {}

    @classmethod
    def from_images(cls, psf: PointSpreadFunction, bbox: Box) -> CellPsf:
        """Wrap a PSF model of lsst.images.

        Parameters
        ----------
        psf
            The PSF of a coadd of lsst.images.
        bbox
            Pixels of the coadd, for the cells of a PSF that brings none.
        """
        bounds = psf.bounds if isinstance(psf, CellPointSpreadFunction) else _make_cells(bbox)

        def evaluate(*, x: float, y: float) -> np.ndarray:
            return np.asarray(psf.compute_kernel_image(x=x, y=y).array, dtype=np.float64)

        return cls(evaluate, bounds.grid, failures=(BoundsError,), missing_cells=bounds.missing_boxes())

    @classmethod
    def from_legacy(cls, psf: Any, bbox: Box) -> CellPsf:
        """Wrap an `lsst.afw.detection.Psf`.

        Parameters
        ----------
        psf
            The PSF of an afw coadd.
        bbox
            Pixels of the coadd, for the cells of a PSF that brings none.

        Notes
        -----
        ``lsst.images.psfs.PointSpreadFunction.from_legacy`` is not used: it
        needs packages that a repository of coadds does not, and fails for
        every position of a ``CoaddPsf`` that has a hole at a corner.
        """
        from lsst.afw.detection import InvalidPsfError
        from lsst.geom import Point2D

        def evaluate(*, x: float, y: float) -> np.ndarray:
            # Point2D truncates float32 to integers.
            return np.array(psf.computeKernelImage(Point2D(float(x), float(y))).array, dtype=np.float64)

        # A StitchedPsf comes from a cell coadd, and knows its cells.
        bounds = _get_legacy_cells(psf) if hasattr(psf, "grid") else _make_cells(bbox)
        return cls(evaluate, bounds.grid, failures=(InvalidPsfError,), missing_cells=bounds.missing_boxes())

    def compute_kernel(self, *, x: float, y: float) -> np.ndarray | None:
        """Return the kernel image of the cell that holds a position.

        Parameters
        ----------
        x, y
            Position in pixels of the coadd.

        Returns
        -------
        kernel
            PSF centred on a pixel, or `None` where the coadd has no PSF.
        """
        pixel = YX(y=math.floor(y + 0.5), x=math.floor(x + 0.5))
        kernel = self._get_cell_kernel(*self._grid.index_of(x=pixel.x, y=pixel.y).as_tuple())
        # The centre of a cell may be the one place without input images.
        return self._try(x=pixel.x, y=pixel.y) if kernel is None else kernel

    def _get_cell_kernel(self, i: int, j: int) -> np.ndarray | None:
        """Return the kernel at the centre of a cell."""
        if (i, j) not in self._kernels:
            center = self._grid.bbox_of(CellIJ(i=i, j=j))
            self._kernels[i, j] = self._try(x=center.x.center, y=center.y.center)
        return self._kernels[i, j]

    def compute_stars(self, *, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
        """Return the images of stars at positions.

        Parameters
        ----------
        x, y
            Positions in pixels of the coadd, shape ``(N,)``.
        size
            Odd side of the images in pixels.

        Returns
        -------
        stars
            Shape ``(N, size, size)``; NaN where the coadd has no PSF.
        """
        if not len(x):
            return np.empty((0, size, size))
        column, row = np.floor(x + 0.5).astype(np.int64), np.floor(y + 0.5).astype(np.int64)
        dx, dy = x - column, y - row
        box, cell = self._grid.bbox, self._grid.cell_shape
        cells = np.stack([(row - box.y.start) // cell.y, (column - box.x.start) // cell.x], axis=1)
        unique, number = np.unique(cells, axis=0, return_inverse=True)
        kernels = [self._get_cell_kernel(i, j) for i, j in unique.tolist()]
        side = max((n for kernel in kernels if kernel is not None for n in kernel.shape), default=1)
        side = min(side, size + 2 * _LANCZOS)  # No other pixels count.
        stack = np.full((len(kernels), side, side), np.nan)
        for k, kernel in enumerate(kernels):
            if kernel is not None:
                stack[k] = _pad_or_crop(kernel, side)
        stars = shift_kernel(stack[number], dx=dx, dy=dy, size=size)
        # The centre of a cell may be the one place without input images.
        for k in np.flatnonzero(np.isnan(stack[number, 0, 0])).tolist():
            if (kernel := self._try(x=int(column[k]), y=int(row[k]))) is not None:
                stars[k] = shift_kernel(kernel, dx=dx[k], dy=dy[k], size=size)
        return stars

    def _try(self, *, x: float, y: float) -> np.ndarray | None:
        try:
            kernel = self._evaluate(x=x, y=y)
        except self._failures:
            return None
        return kernel if np.isfinite(kernel).all() else None


def _make_cells(bbox: Box) -> CellGridBounds:
    """Cover a box with cells, the last ones reaching beyond it."""
    shape = [-(-size // PSF_CELL_SIZE) * PSF_CELL_SIZE for size in bbox.shape]
    grid = CellGrid(bbox=Box.from_shape(shape, start=bbox.start), cell_shape=YX(PSF_CELL_SIZE, PSF_CELL_SIZE))
    return CellGridBounds(grid=grid, bbox=grid.bbox)


def _get_legacy_cells(psf: Any) -> CellGridBounds:
    """Return the cells of an `lsst.cell_coadds.StitchedPsf`."""
    # CellGrid.from_legacy refuses grids that are padded at their borders.
    cell_shape = YX(y=psf.grid.cell_size.y, x=psf.grid.cell_size.x)
    grid = CellGrid(bbox=Box.from_legacy(psf.grid.bbox), cell_shape=cell_shape)
    every = {CellIJ(i=i, j=j) for i in range(grid.grid_size.i) for j in range(grid.grid_size.j)}
    present = {CellIJ.from_legacy(index) for index in psf.images.keys()}
    return CellGridBounds(grid=grid, bbox=grid.bbox, missing=frozenset(every - present))


@dataclasses.dataclass(frozen=True, eq=False)
class CoaddPlanes:
    """The planes of one band of a patch."""

    image: np.ndarray
    """Pixel values in nJy, shape ``(y, x)``."""

    variance: np.ndarray
    """Variance in nJy squared, shape ``(y, x)``."""

    mask: Mask
    """Mask planes, under their lsst.images or afw names."""

    psf: CellPsf | None
    """PSF model, or `None` if the coadd came without one."""

    missing_cells: tuple[Box, ...] = ()
    """Boxes of the cells that have no input images."""


class MultibandCoadd:
    """The coadds of one patch, bands in order, all on one pixel grid.

    Parameters
    ----------
    bands
        Names of the bands, in the order in which arrays will hold them.
    planes
        Planes of each band; a band without planes is a missing band.
    bbox
        Bounding box of the patch in pixels of the tract.
    sky_projection
        Map between these pixels and the sky.
    inner_bbox
        The part of the patch that no other patch of the tract covers, where
        it is known.

    Raises
    ------
    ValueError
        Raised if no band has planes.
    """

    def __init__(
        self,
        bands: Sequence[str],
        planes: Mapping[str, CoaddPlanes],
        *,
        bbox: Box,
        sky_projection: SkyProjection[Any],
        inner_bbox: Box | None = None,
    ) -> None:
        if not planes:
            raise ValueError(f"None of the bands {', '.join(bands)} has a coadd.")
        self.bands = tuple(bands)
        self.planes = dict(planes)
        self.bbox = bbox
        self.sky_projection = sky_projection
        self.inner_bbox = inner_bbox

    @classmethod
    def from_coadds(cls, coadds: Mapping[str, Any], bands: Sequence[str] | None = None) -> MultibandCoadd:
        """Make from coadds in memory.

        Parameters
        ----------
        coadds
            `lsst.images.cells.CellCoadd`, `lsst.images.MaskedImage` or
            `lsst.afw.image.ExposureF` of each band.
        bands
            Bands to take, in this order; all of ``coadds`` by default.
            A band that is not in ``coadds`` is a missing band.

        Raises
        ------
        TypeError
            Raised if a coadd has none of these types.
        ValueError
            Raised if a coadd is not calibrated to flux densities, has no sky
            projection, or does not share the grid of the others.
        """
        bands = tuple(coadds if bands is None else bands)
        planes: dict[str, CoaddPlanes] = {}
        first: tuple[str, MaskedImage] | None = None
        inner_bbox = None
        for band in bands:
            if band not in coadds:
                continue
            masked_image, psf = _adapt(coadds[band], band)
            if first is None:
                first = band, masked_image
                inner_bbox = _get_inner_bbox(coadds[band])
            else:
                _check_same_grid(*first, band, masked_image)
            to_njy = _compute_njy_factor(masked_image, band)
            planes[band] = CoaddPlanes(
                image=_scaled(masked_image.image.array, to_njy),
                variance=_scaled(masked_image.variance.array, to_njy**2),
                mask=masked_image.mask,
                psf=psf,
                missing_cells=() if psf is None else _overlapping(psf.missing_cells, masked_image.bbox),
            )
        if first is None:
            raise ValueError(f"None of the bands {', '.join(bands)} has a coadd.")
        projection = first[1].sky_projection
        assert projection is not None  # As _adapt has checked.
        return cls(bands, planes, bbox=first[1].bbox, sky_projection=projection, inner_bbox=inner_bbox)

    @classmethod
    def read(
        cls,
        handles: Iterable[DeferredDatasetHandle | InMemoryDatasetHandle],
        bands: Sequence[str],
    ) -> MultibandCoadd:
        """Read the coadds of a patch, each plane once.

        Parameters
        ----------
        handles
            Deferred handles of coadds with a ``band`` in their data ID.
        bands
            Bands to take, in this order; others are not read.

        Raises
        ------
        ValueError
            Raised as by `from_coadds`, or if two coadds are of one band.
        """
        handles = tuple(handles)
        coadds = {str(handle.dataId["band"]): handle for handle in handles}
        if len(coadds) < len(handles):
            raise ValueError("Some coadds are of the same band; those of one patch are needed, one each.")
        present = [band for band in bands if band in coadds]
        # The bands share one patch, whose definition takes a read of its own.
        read = {band: _read(coadds[band], with_patch=band == present[0]) for band in present}
        return cls.from_coadds(read, bands)

    @property
    def missing_bands(self) -> tuple[str, ...]:
        """Bands for which this patch has no coadd."""
        return tuple(band for band in self.bands if band not in self.planes)

    @property
    def pixel_scale(self) -> float:
        """Side of a pixel at the centre of the patch, in arcsec."""
        x, y = self.bbox.x.center, self.bbox.y.center
        corner, right, up = self.sky_projection.pixel_to_sky(
            x=np.array([x, x + 1.0, x]), y=np.array([y, y, y + 1.0])
        )
        return float(np.sqrt(corner.separation(right).arcsec * corner.separation(up).arcsec))

    def sky_to_pixel(self, *, ra: np.ndarray, dec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions ``(x, y)`` in pixels of sky coordinates.

        Parameters
        ----------
        ra, dec
            ICRS coordinates in degrees, shape ``(N,)``.

        Returns
        -------
        x, y
            Positions in pixels of the tract; NaN for coordinates that are no
            place on the sky, and for places that the projection cannot reach.
        """
        ra, dec = np.asarray(ra, dtype=np.float64), np.asarray(dec, dtype=np.float64)
        x, y = np.full((2, len(ra)), np.nan)
        on_sky = np.isfinite(ra) & (np.abs(dec) <= 90)
        if on_sky.any():  # The projection takes no empty arrays.
            sky = SkyCoord(ra=ra[on_sky] * u.deg, dec=dec[on_sky] * u.deg)
            xy = self.sky_projection.sky_to_pixel(sky)
            x[on_sky], y[on_sky] = xy.x, xy.y
        # The projection says "unreachable" by the lowest number there is.
        reached = (np.abs(x) < _UNREACHABLE) & (np.abs(y) < _UNREACHABLE)
        return np.where(reached, x, np.nan), np.where(reached, y, np.nan)

    def pixel_to_sky(self, *, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ICRS coordinates ``(ra, dec)`` in degrees of pixels.

        Parameters
        ----------
        x, y
            Positions in pixels of the tract, shape ``(N,)``.
        """
        if len(x) == 0:  # The projection takes no empty arrays.
            return np.empty(0), np.empty(0)
        sky = self.sky_projection.pixel_to_sky(x=np.asarray(x, np.float64), y=np.asarray(y, np.float64))
        return np.asarray(sky.ra.deg), np.asarray(sky.dec.deg)

    def compute_mask(self, band: str, names: Iterable[str]) -> np.ndarray:
        """Return which pixels have any of the named mask planes set.

        Parameters
        ----------
        band
            A band that is not missing.
        names
            Mask planes, under their lsst.images or afw names.

        Raises
        ------
        ValueError
            Raised for a name that neither this coadd nor any LSST coadd
            knows; a plane that merely this coadd lacks is not set anywhere.
        """
        mask = self.planes[band].mask
        meanings = {name: canonical_mask_plane(name) for name in mask.schema.names}
        wanted = {canonical_mask_plane(name) for name in names}
        if unknown := wanted - set(meanings.values()) - set(LEGACY_MASK_PLANES.values()):
            raise ValueError(
                f"No coadd has mask planes {sorted(unknown)}; the {band} coadd has {sorted(meanings)}."
            )
        # A mask may have a plane under both of its names.
        present = [name for name, meaning in meanings.items() if meaning in wanted]
        # A loop over bytes: a reduction over the short last axis is slow.
        result = np.zeros(self.bbox.shape, dtype=bool)
        for byte, bits in enumerate(mask.schema.bitmask(*present)):
            if bits:
                result |= (mask.array[..., byte] & bits) != 0
        return result

    def compute_bad_pixels(self, band: str, names: Iterable[str]) -> np.ndarray:
        """Return which pixels hold no usable measurement.

        These are the pixels with one of the named mask planes, those whose
        value or variance is not finite or whose variance is not positive,
        and those of missing cells.

        Parameters
        ----------
        band
            A band that is not missing.
        names
            Mask planes, under their lsst.images or afw names.
        """
        planes = self.planes[band]
        good = np.isfinite(planes.image)
        good &= planes.variance > 0
        good &= planes.variance < np.inf
        bad = self.compute_mask(band, names)
        bad |= ~good
        for cell in planes.missing_cells:
            bad[cell.intersection(self.bbox).slice_within(self.bbox)] = True
        return bad

    def compute_psf_kernel(self, band: str, *, x: float, y: float, size: int) -> np.ndarray | None:
        """Return the image of a star at a position, on a stamp of odd size.

        Parameters
        ----------
        band
            A band that is not missing.
        x, y
            Position in pixels of the tract.  The stamp is centred on the
            nearest pixel, the star on the position itself.
        size
            Side of the stamp in pixels.

        Returns
        -------
        kernel
            Shape ``(size, size)``, of unit sum but for what the stamp cuts
            off; `None` where the coadd has no PSF.
        """
        (star,) = self.compute_psf_kernels(band, x=np.array([x]), y=np.array([y]), size=size)
        return star if np.isfinite(star).all() else None

    def compute_psf_kernels(self, band: str, *, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
        """Return the images of stars at many positions.

        Parameters
        ----------
        band
            A band that is not missing.
        x, y
            Positions in pixels of the tract, shape ``(N,)``.
        size
            Side of the stamps in pixels, odd.

        Returns
        -------
        kernels
            As from `compute_psf_kernel`, shape ``(N, size, size)``; NaN where
            the coadd has no PSF.
        """
        psf = self.planes[band].psf
        if psf is None:
            return np.full((len(x), size, size), np.nan)
        return psf.compute_stars(x=np.asarray(x, np.float64), y=np.asarray(y, np.float64), size=size)


def _pad_or_crop(kernel: np.ndarray, size: int) -> np.ndarray:
    """Change the size of an odd-sided stamp about its central pixel."""
    out = np.zeros((size, size), dtype=kernel.dtype)
    ry, rx = (min(n, size) // 2 for n in kernel.shape)
    cy, cx = (n // 2 for n in kernel.shape)
    c = size // 2
    out[c - ry : c + ry + 1, c - rx : c + rx + 1] = kernel[cy - ry : cy + ry + 1, cx - rx : cx + rx + 1]
    return out


def _read(handle: DeferredDatasetHandle | InMemoryDatasetHandle, *, with_patch: bool) -> Any:
    """Read the planes that are used here, and no others, from one dataset."""
    ref = getattr(handle, "ref", None)
    if ref is None or ref.datasetType.storageClass_name != "CellCoadd":
        return handle.get()
    names = ["image", "mask", "variance", "psf", "sky_projection"]
    planes = handle.get(component="components", parameters={"components": names})
    patch = None
    if with_patch:  # There is no component for it.
        box = planes["image"].bbox
        one_pixel = Box.from_shape((1, 1), start=(box.y.start, box.x.start))
        patch = _get_patch(handle.get(parameters={"bbox": one_pixel}))
    return CellCoadd(
        planes["image"],
        mask=planes["mask"],
        variance=planes["variance"],
        sky_projection=planes["sky_projection"],
        psf=planes["psf"],
        patch=patch,
    )


def _get_patch(coadd: CellCoadd) -> PatchDefinition | None:
    try:
        return coadd.patch
    except AttributeError:
        return None


def _get_inner_bbox(coadd: Any) -> Box | None:
    patch = _get_patch(coadd) if isinstance(coadd, CellCoadd) else None
    return None if patch is None else patch.inner_bbox


def _adapt(coadd: Any, band: str) -> tuple[MaskedImage, CellPsf | None]:
    """Return pixels and PSF of a coadd of any type."""
    if hasattr(coadd, "getMaskedImage"):
        masked_image, psf = _adapt_legacy(coadd, band), coadd.getPsf()
        return masked_image, None if psf is None else CellPsf.from_legacy(psf, masked_image.bbox)
    if not isinstance(coadd, MaskedImage):
        raise TypeError(
            f"The {band} coadd is a {type(coadd).__module__}.{type(coadd).__qualname__}; expected an "
            "lsst.images CellCoadd or MaskedImage, or an lsst.afw.image.ExposureF."
        )
    if coadd.sky_projection is None:
        raise ValueError(f"The {band} coadd has no sky projection, so objects cannot be placed on it.")
    return coadd, CellPsf.from_images(coadd.psf, coadd.bbox) if isinstance(coadd, CellCoadd) else None


def _adapt_legacy(exposure: Any, band: str) -> MaskedImage:
    """Convert an `lsst.afw.image.ExposureF` coadd to nJy and lsst.images."""
    photo_calib = exposure.getPhotoCalib()
    # A default PhotoCalib has mean zero, and would calibrate to all zeros.
    if photo_calib is None or not photo_calib.getCalibrationMean() > 0:
        raise ValueError(f"The {band} coadd has no photometric calibration to nJy (PhotoCalib).")
    if exposure.getWcs() is None:
        raise ValueError(f"The {band} coadd has no WCS, so objects cannot be placed on it.")
    legacy = photo_calib.calibrateImage(exposure.getMaskedImage())
    box = Box.from_legacy(exposure.getBBox())
    return MaskedImage.from_legacy(
        legacy,
        unit=u.nJy,
        plane_map=_make_plane_map(legacy.getMask().getMaskPlaneDict()),
        sky_projection=SkyProjection.from_legacy(
            exposure.getWcs(), GeneralFrame(unit=u.pix), pixel_bounds=box
        ),
    )


def _make_plane_map(legacy_planes: Iterable[str]) -> dict[str, MaskPlane]:
    """Map every plane of an afw mask to one of the same name.

    Renaming them here would lose pixels: a process may have planes of both
    names, such as SAT and SATURATED, and no stock map has all planes.
    """
    return {name: MaskPlane(name, f"Legacy plane {name}.") for name in legacy_planes}


def _overlapping(boxes: Iterable[Box], bbox: Box) -> tuple[Box, ...]:
    return tuple(
        box
        for box in boxes
        if all(a.start < b.stop and b.start < a.stop for a, b in ((box.y, bbox.y), (box.x, bbox.x)))
    )


def _compute_njy_factor(masked_image: MaskedImage, band: str) -> float:
    """Return the factor from the unit of a coadd to nJy."""
    unit = masked_image.unit
    try:
        return float((1.0 * u.Unit(unit)).to_value(u.nJy))
    except (u.UnitConversionError, TypeError) as err:
        raise ValueError(
            f"The {band} coadd has pixels in {unit if unit is not None else 'no unit'}; flux densities "
            "convertible to nJy are needed.  Calibrate it first."
        ) from err


def _scaled(array: np.ndarray, factor: float) -> np.ndarray:
    array = np.asarray(array, dtype=np.float32)
    return array if factor == 1.0 else array * np.float32(factor)


def _check_same_grid(first_band: str, first: MaskedImage, band: str, other: MaskedImage) -> None:
    """Raise ValueError if two coadds of a patch do not share one grid."""
    if first.bbox != other.bbox:
        raise ValueError(
            f"The coadds of one patch must share one pixel grid: {first_band} covers {first.bbox} and "
            f"{band} covers {other.bbox}."
        )
    assert first.sky_projection is not None
    assert other.sky_projection is not None
    # The four corners.
    x = np.array([first.bbox.x.min, first.bbox.x.max] * 2, dtype=np.float64)
    y = np.repeat([first.bbox.y.min, first.bbox.y.max], 2).astype(np.float64)
    xy = other.sky_projection.sky_to_pixel(first.sky_projection.pixel_to_sky(x=x, y=y))
    distance = float(np.hypot(xy.x - x, xy.y - y).max())
    if not distance < SAME_GRID_TOLERANCE:
        raise ValueError(
            f"The coadds of one patch must share one pixel grid: the WCSs of {first_band} and {band} "
            f"differ by {distance:.3g} pixels."
        )

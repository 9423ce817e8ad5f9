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

"""Import of plain FITS images as coadds of a butler repository.

So that users of any survey can run the tasks of this package.
"""

from __future__ import annotations

__all__ = ("FitsImage", "estimate_psf_kernel", "import_fits_coadds", "make_moffat_kernel", "read_fits_image")

import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import astropy.units as u
import astropy.wcs
import numpy as np
import sep
from astropy.io import fits
from astropy.table import Table
from scipy.spatial import cKDTree

from lsst.daf.butler import Butler
from lsst.images import Box
from lsst.images.cells import CellCoadd, PatchDefinition

from .coadds import MultibandCoadd, shift_kernel
from .detection import detect_objects, select_primary
from .repository import CellSkyMap, make_cell_coadd, register_dataset_types, register_sky_map

_LOG = logging.getLogger(__name__)

CELL_SIZE = 150
"""Side of a cell in pixels, that of Rubin's sky maps."""

MAX_PATCH_CELLS = 26
"""Largest side in cells of an image that becomes one patch."""

INNER_CELLS = 20
"""Side in cells of the inner regions of the patches of a larger image."""

PSF_SIZE = 35
"""Side of PSF images in pixels."""

MIN_STARS = 5
"""Smallest number of stars from which a PSF is made."""

MIN_STAR_SN = 40.0
"""Smallest signal to noise of stars that the PSF is made from."""

SAME_GRID_TOLERANCE = 0.01
"""Largest distance in pixels between the WCSs of images of one field."""

ZERO_POINT_KEYWORDS = ("MZP_AB", "MAGZP_AB", "ZP_AB")
"""Header keywords of the AB magnitude of one count."""

FWHM_KEYWORDS = ("IQIMAGE", "PSF_FWHM", "SEEING")
"""Header keywords of the width of the PSF in arcsec."""


@dataclasses.dataclass
class FitsImage:
    """An image that was read from a FITS file, in nJy."""

    image: np.ndarray
    """Pixel values in nJy, float32, shape ``(y, x)``."""

    variance: np.ndarray
    """Variance in nJy squared, float32, same shape; NaN without data."""

    saturated: np.ndarray
    """Which pixels are saturated, same shape."""

    psf: np.ndarray
    """Image of a star at the centre of a stamp, of unit sum."""

    wcs: astropy.wcs.WCS
    """Celestial WCS."""

    remarks: list[str]
    """What was estimated and how, for the user."""


def import_fits_coadds(
    root: Path | str,
    images: Mapping[str, Path | str],
    *,
    sky_map: str,
    run: str,
    tract: int = 0,
    zero_points: Mapping[str, float] | float | None = None,
    weights: Mapping[str, Path | str] | None = None,
    psfs: Mapping[str, Path | str] | None = None,
    psf_fwhm: Mapping[str, float] | float | None = None,
    background_size: int = 256,
    instrument: str = "FitsCam",
    report: Callable[[str], object] | None = None,
) -> None:
    """Import images of a field as coadds, and detect the objects in them.

    Writes ``deep_coadd``, ``object_patch`` and ``object``.  An image of more
    than 3900 pixels becomes several patches that overlap.

    Parameters
    ----------
    root
        Folder of the repository; made if there is none.
    images
        FITS file of each band.  All have the same pixels and a celestial WCS.
    sky_map
        Name of the sky map to make; a name stands for one field.
    run
        Name of the RUN collection.
    tract
        ID of the tract.
    zero_points
        AB magnitude of one count, for all bands or each.  By default it is
        taken from the header, `ZERO_POINT_KEYWORDS`, or from a ``BUNIT`` that
        is a unit of flux density.
    weights
        FITS file of the inverse variance, in counts^-2, by band.  In a band
        that has none, the noise of the sky is measured.
    psfs
        FITS file with the image of a star, by band.  In a band that has none,
        ``psf_fwhm`` is used, or else the stars in the image, or else one of
        `FWHM_KEYWORDS`.
    psf_fwhm
        Width of the PSF in arcsec, for all bands or each; the PSF is a Moffat
        profile of index 3.
    background_size
        Size in pixels of the mesh of the background that is subtracted, or 0
        to subtract none.
    instrument
        Name of an instrument to which the bands shall belong.
    report
        Called with lines of text on what is done; by default they are logged.

    Raises
    ------
    OSError
        Raised if a file cannot be read.
    ValueError
        Raised if an image has no WCS, no zero point or no data, if images
        have different pixels, or if the collection has coadds of this tract.
    """
    report = report or _LOG.info
    if not images:
        raise ValueError("There are no images to import.")
    planes = {}
    for band, path in images.items():
        planes[band] = read_fits_image(
            path,
            zero_point=_get_of_band(zero_points, band),
            weight=(weights or {}).get(band),
            psf=(psfs or {}).get(band),
            psf_fwhm=_get_of_band(psf_fwhm, band),
            background_size=background_size,
        )
        report(f"Read {band} from {path}: {'; '.join(planes[band].remarks)}.")
    _check_same_grid(planes, images)
    geometry, offset = _make_sky_map(sky_map, next(iter(planes.values())), tract)
    if not (Path(root) / "butler.yaml").exists():
        Butler.makeRepo(str(root))
    with Butler.from_config(str(root), run=run, writeable=True) as butler:
        register_sky_map(butler, geometry, instrument=instrument, bands=images)
        register_dataset_types(butler)
        tract_id = {"skymap": sky_map, "tract": tract}
        if butler.query_datasets("deep_coadd", run, data_id=tract_id, explain=False):
            raise ValueError(
                f"The collection {run} has coadds of tract {tract} of {sky_map}; choose another."
            )
        tables: list[Table] = []
        for patch in map(geometry.make_patch, geometry.patch_ids):
            coadds = {band: _make_coadd(band, planes[band], geometry, patch, offset) for band in planes}
            multiband = MultibandCoadd.from_coadds(coadds)
            tables.append(detect_objects(multiband, tract=tract, patch=patch.id))
            for band, coadd in coadds.items():
                butler.put(coadd, "deep_coadd", tract_id, patch=patch.id, band=band)
            butler.put(tables[-1], "object_patch", tract_id, patch=patch.id)
            report(f"Wrote patch {patch.id} with {len(tables[-1])} objects.")
        butler.put(select_primary(tables), "object", tract_id)
    report(f"The coadds are in {root}, collection {run}, sky map {sky_map}, tract {tract}.")


def read_fits_image(
    path: Path | str,
    *,
    zero_point: float | None = None,
    weight: Path | str | None = None,
    psf: Path | str | None = None,
    psf_fwhm: float | None = None,
    background_size: int = 256,
) -> FitsImage:
    """Read an image and what it takes to measure on it.

    Parameters
    ----------
    path
        FITS file, whose first image is read.  Pixels that are not finite or
        exactly 0 have no data; those above the keyword ``SATURATE`` are
        saturated.
    zero_point, weight, psf, psf_fwhm, background_size
        As in `import_fits_coadds`, for this band.

    Raises
    ------
    OSError
        Raised if a file cannot be read.
    ValueError
        Raised as by `import_fits_coadds`.
    """
    counts, header = _read_plane(path)
    remarks = []
    with warnings.catch_warnings():
        # Old keywords, such as RADECSYS, are understood, with a warning.
        warnings.simplefilter("ignore", astropy.wcs.FITSFixedWarning)
        wcs = astropy.wcs.WCS(header).celestial
    if not wcs.has_celestial:
        raise ValueError(f"{path} has no celestial WCS, so its objects have no coordinates.")
    factor = _compute_njy_per_count(path, header, zero_point)
    usable = np.isfinite(counts) & (counts != 0)
    if weight is not None:
        inverse_variance, _ = _read_plane(weight)
        if inverse_variance.shape != counts.shape:
            raise ValueError(f"{weight} has {inverse_variance.shape} pixels, and {path} {counts.shape}.")
        usable &= np.isfinite(inverse_variance) & (inverse_variance > 0)
    if not usable.any():
        raise ValueError(f"{path} has no pixel with data: all are NaN, 0 or of zero weight.")
    image = np.where(usable, counts * factor, 0.0).astype(np.float32)
    bad = ~usable
    size = background_size or 256
    background = sep.Background(image, mask=bad, bw=size, bh=size)
    sky = background.back(dtype=np.float32)
    noise = background.globalrms
    if weight is not None:
        variance = factor**2 / np.where(usable, inverse_variance, 1.0)
        ratio = math.sqrt(float(np.median(variance[usable]))) / noise
        remarks.append(f"variance from weights, which give {ratio:.2f} of the noise that is seen")
    else:
        variance = np.square(background.rms(dtype=np.float32))
        remarks.append(f"variance from the noise of the sky, {noise:.3g} nJy")
    scale = float(np.sqrt(np.prod(astropy.wcs.utils.proj_plane_pixel_scales(wcs)))) * 3600
    saturated = usable & (counts >= header.get("SATURATE", np.inf))
    kernel, remark = _get_psf_kernel(path, header, image - sky, noise, bad | saturated, scale, psf, psf_fwhm)
    remarks.append(remark)
    if background_size:
        image -= sky
        remarks.append(f"background of {background.globalback:.3g} nJy subtracted")
    image[bad] = np.nan
    variance = np.where(usable, variance, np.nan).astype(np.float32)
    return FitsImage(image, variance, saturated, kernel, wcs, remarks)


def estimate_psf_kernel(
    image: np.ndarray, noise: float, bad: np.ndarray, size: int = PSF_SIZE
) -> tuple[np.ndarray, int] | None:
    """Return the mean image of the stars in an image.

    Stars are the round and isolated objects of clear detection around the
    most frequent of small half-light radii.

    Parameters
    ----------
    image
        Image without background.
    noise
        Noise of its pixels.
    bad
        Unusable and saturated pixels.
    size
        Odd side of the stamp to return.

    Returns
    -------
    kernel, n_stars
        Median image of the stars, of unit sum, and their number; `None` if
        there are less than `MIN_STARS`.
    """
    objects = sep.extract(image, 5.0, err=noise, mask=bad)
    if len(objects) < MIN_STARS:
        return None
    x, y = objects["x"], objects["y"]
    # The same aperture for all, so that all stars have the same radius.
    aperture = 4 * float(np.median(objects["a"]))
    flux, err, _ = sep.sum_circle(image, x, y, aperture, err=noise)
    radius, _ = sep.flux_radius(image, x, y, np.full(len(x), aperture), 0.5, normflux=flux, subpix=5)
    half = size // 2
    height, width = image.shape
    inside = (x > half + 1) & (y > half + 1) & (x < width - half - 2) & (y < height - half - 2)
    distance = cKDTree(np.stack([x, y], axis=1)).query(np.stack([x, y], axis=1), k=2)[0][:, 1]
    near_bad = sep.sum_circle(bad.astype(np.float32), x, y, half / 2)[0] > 0
    candidate = inside & (flux > MIN_STAR_SN * err) & (objects["b"] > 0.85 * objects["a"])
    candidate &= (distance > half / 2) & ~near_bad & (objects["flag"] == 0) & (radius > 0.5)
    index = np.flatnonzero(candidate)
    if len(index) < MIN_STARS:
        return None
    # Of the radii up to the median, that which most others are near to.
    log_radius = np.log(radius[index])
    n_near = (np.abs(log_radius[:, None] - log_radius) < 0.06).sum(axis=1)
    n_near[log_radius > np.median(log_radius)] = 0
    stars = index[np.abs(log_radius - log_radius[n_near.argmax()]) < 0.06]
    if len(stars) < MIN_STARS:
        return None
    stamps = []
    for k in stars:
        column, row = round(x[k]), round(y[k])
        stamp = image[row - half : row + half + 1, column - half : column + half + 1]
        stamp = shift_kernel(stamp.astype(np.float64), dx=column - x[k], dy=row - y[k])
        stamps.append(stamp / flux[k])
    kernel = np.median(stamps, axis=0)
    offset = np.arange(-half, half + 1)
    distance = np.hypot(offset[:, None], offset)
    kernel -= np.median(kernel[distance > 0.9 * half])
    # Beyond this there is more noise than starlight.
    kernel[distance > min(half, 5 * np.median(radius[stars]))] = 0.0
    kernel = np.maximum(kernel, 0.0)
    return kernel / kernel.sum(), len(stars)


def make_moffat_kernel(fwhm: float, size: int = PSF_SIZE) -> np.ndarray:
    """Return the image of a star, a Moffat profile of index 3.

    Parameters
    ----------
    fwhm
        Width in pixels.
    size
        Odd side of the stamp.
    """
    offset = np.arange(-(size // 2), size // 2 + 1) / (0.5 * fwhm / math.sqrt(2 ** (1 / 3) - 1))
    kernel = (1 + offset[:, None] ** 2 + offset**2) ** -3.0
    return kernel / kernel.sum()


def _read_plane(path: Path | str) -> tuple[np.ndarray, fits.Header]:
    """Return the first two-dimensional image of a FITS file."""
    with fits.open(path) as hdus:
        for hdu in hdus:
            if hdu.is_image and hdu.header.get("NAXIS") == 2 and hdu.data is not None:
                return np.asarray(hdu.data, dtype=np.float64), hdu.header
    raise ValueError(f"{path} has no two-dimensional image.")


def _get_of_band(values: Mapping[str, float] | float | None, band: str) -> float | None:
    return values.get(band) if isinstance(values, Mapping) else values


def _compute_njy_per_count(path: Path | str, header: fits.Header, zero_point: float | None) -> float:
    """Return the flux density in nJy of one count."""
    if zero_point is None:
        keyword = next((name for name in ZERO_POINT_KEYWORDS if name in header), None)
        if keyword is None:
            try:
                return float((1.0 * u.Unit(header["BUNIT"])).to_value(u.nJy))
            except (KeyError, ValueError, TypeError, u.UnitConversionError):
                raise ValueError(
                    f"{path} has no zero point: none of {', '.join(ZERO_POINT_KEYWORDS)} in its header, and "
                    "no BUNIT of flux density.  Give the AB magnitude of one count."
                ) from None
        zero_point = float(header[keyword])
    return float(10 ** (-0.4 * (zero_point - 31.4)))


def _get_psf_kernel(
    path: Path | str,
    header: fits.Header,
    image: np.ndarray,
    noise: float,
    bad: np.ndarray,
    pixel_scale: float,
    psf: Path | str | None,
    psf_fwhm: float | None,
) -> tuple[np.ndarray, str]:
    """Return the PSF from where it can be had, and a remark on that."""
    if psf is not None:
        return _read_psf_kernel(psf), f"PSF from {psf}"
    if psf_fwhm is None:
        if (estimate := estimate_psf_kernel(image, noise, bad)) is not None:
            return estimate[0], f"PSF from {estimate[1]} stars"
        keyword = next((name for name in FWHM_KEYWORDS if name in header), None)
        if keyword is None:
            raise ValueError(
                f"{path} has less than {MIN_STARS} stars to make a PSF from, and none of "
                f"{', '.join(FWHM_KEYWORDS)} in its header.  Give the width of the PSF, or its image."
            )
        psf_fwhm = float(header[keyword])
    return make_moffat_kernel(psf_fwhm / pixel_scale), f"PSF of {psf_fwhm:.2f} arcsec"


def _read_psf_kernel(path: Path | str) -> np.ndarray:
    """Return the PSF image of a file on an odd stamp, of unit sum."""
    kernel, _ = _read_plane(path)
    if not np.isfinite(kernel).all() or not kernel.sum() > 0:
        raise ValueError(f"{path} is no image of a PSF: it has pixels that are not finite, or no flux.")
    if min(kernel.shape) < 5 or any(n % 2 == 0 for n in kernel.shape):
        raise ValueError(f"The PSF in {path} has {kernel.shape} pixels; odd sides, 5 at least, are needed.")
    size = min(*kernel.shape, PSF_SIZE)
    rows, columns = (slice((n - size) // 2, (n + size) // 2) for n in kernel.shape)
    return kernel[rows, columns] / kernel[rows, columns].sum()


def _check_same_grid(planes: Mapping[str, FitsImage], paths: Mapping[str, Path | str]) -> None:
    """Raise ValueError if images do not have the same pixels."""
    first = next(iter(planes))
    height, width = planes[first].image.shape
    corners = np.array([0.0, width - 1, 0.0, width - 1]), np.array([0.0, 0.0, height - 1, height - 1])
    sky = planes[first].wcs.pixel_to_world(*corners)
    for band, other in planes.items():
        if other.image.shape != (height, width):
            raise ValueError(
                f"{paths[first]} has {(height, width)} pixels, and {paths[band]} {other.image.shape}.  "
                "Resample them to one grid."
            )
        x, y = other.wcs.world_to_pixel(sky)
        distance = float(np.hypot(x - corners[0], y - corners[1]).max())
        if not distance < SAME_GRID_TOLERANCE:
            raise ValueError(
                f"The WCSs of {paths[first]} and {paths[band]} differ by {distance:.3g} pixels.  Resample "
                "the images to one grid."
            )


def _make_sky_map(name: str, plane: FitsImage, tract: int) -> tuple[CellSkyMap, int]:
    """Return a sky map that covers an image, and the border around it."""
    n_cells = [-(-n // CELL_SIZE) for n in plane.image.shape]
    if max(n_cells) <= MAX_PATCH_CELLS:
        return CellSkyMap(name, plane.wcs, (1, 1), (n_cells[0], n_cells[1]), 0, CELL_SIZE, tract), 0
    wcs = plane.wcs.deepcopy()
    wcs.wcs.crpix = wcs.wcs.crpix + CELL_SIZE
    if wcs.sip is not None:
        sip = wcs.sip
        wcs.sip = astropy.wcs.Sip(sip.a, sip.b, sip.ap, sip.bp, sip.crpix + CELL_SIZE)
    n_patches = tuple(-(-n // INNER_CELLS) for n in n_cells)
    sky_map = CellSkyMap(
        name, wcs, (n_patches[0], n_patches[1]), (INNER_CELLS, INNER_CELLS), 1, CELL_SIZE, tract
    )
    return sky_map, CELL_SIZE


def _make_coadd(
    band: str, plane: FitsImage, sky_map: CellSkyMap, patch: PatchDefinition, offset: int
) -> CellCoadd:
    """Cut the coadd of a patch out of an image, padded where it ends."""
    box = patch.outer_bbox
    image_box = Box.from_shape(plane.image.shape, start=(offset, offset))
    overlap = box.intersection(image_box)
    target, source = overlap.slice_within(box), overlap.slice_within(image_box)
    image, variance = np.full(box.shape, np.nan), np.full(box.shape, np.nan)
    saturated = np.zeros(box.shape, dtype=bool)
    image[target], variance[target] = plane.image[source], plane.variance[source]
    saturated[target] = plane.saturated[source]
    no_data = np.isnan(image)
    n_cells = patch.cells.grid_size.as_tuple()
    empty = no_data.reshape(n_cells[0], CELL_SIZE, n_cells[1], CELL_SIZE).all(axis=(1, 3))
    return make_cell_coadd(
        image,
        variance,
        np.broadcast_to(plane.psf, (*n_cells, *plane.psf.shape)),
        band=band,
        patch=patch,
        sky_projection=sky_map.sky_projection,
        mask_planes={"NO_DATA": no_data, "SATURATED": saturated},
        missing_cells=[(int(i), int(j)) for i, j in np.argwhere(empty)],
    )

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

"""Detect objects on the coadds of a patch and measure them in all bands.

This makes object tables where no pipeline has made them: for the demo and
for images from outside.  The columns are those of the DP2 ``object`` table,
with its names and units; where a quantity is measured in another way than
there, the description of the column says how.
"""

from __future__ import annotations

__all__ = ("detect_objects", "select_primary")

import dataclasses
from collections.abc import Iterable, Sequence

import astropy.units as u
import numpy as np
import sep
from astropy.table import Column, Table, vstack
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import gaussian_filter

from .coadds import MultibandCoadd

SMOOTHING = 0.5
"""Width of the kernel of detection in units of that of the PSF."""

DEBLEND_CONTRAST = 5e-4
"""Share of the flux of a blend that makes a peak an object of its own."""

STAMP_SIZE = 31
"""Side in pixels of the stamps on which stars and moments are fitted."""

BATCH_SIZE = 512
"""Number of stamps held in memory at once."""

KRON_FACTOR = 2.5
"""Size of the elliptical aperture in Kron radii, as in SExtractor and DP2."""

MIN_APERTURE = 3.5
"""Smallest elliptical aperture, in units of the measured rms size."""

MIN_REFERENCE_SN = 10.0
"""Signal-to-noise ratio that makes a band the reference band."""

MIN_EXTENDED_EXCESS = 0.05
"""How much more flux a galaxy has than its PSF flux, as a fraction."""

MOMENTS_ITERATIONS = 15
"""Number of updates of adaptive moments; each halves the distance to go."""

OBJECT_COLUMNS: tuple[tuple[str, type, u.UnitBase | None, str], ...] = (
    ("objectId", np.int64, None, "Unique id, made of tract, patch and a running number"),
    ("tract", np.int64, None, "Skymap tract ID"),
    ("patch", np.int64, None, "Skymap patch ID"),
    ("coord_ra", np.float64, u.deg, "ICRS right ascension of the centroid on the combined bands"),
    ("coord_dec", np.float64, u.deg, "ICRS declination of the centroid on the combined bands"),
    ("refBand", np.str_, None, "Reference band, the first in order of priority with a clear detection"),
    ("refExtendedness", np.float32, None, "Whether point-like (0) or extended (1), in the reference band"),
    ("shape_xx", np.float32, u.pix**2, "Gaussian-weighted adaptive moments. Reference band."),
    ("shape_yy", np.float32, u.pix**2, "Gaussian-weighted adaptive moments. Reference band."),
    ("shape_xy", np.float32, u.pix**2, "Gaussian-weighted adaptive moments. Reference band."),
    ("shape_flag", np.bool_, None, "The adaptive moments failed. Reference band."),
    ("footprintArea", np.int32, u.pix, "Number of pixels of the detection footprint, after deblending"),
    ("detect_fromBlend", np.bool_, None, "The object was deblended from a neighbour"),
    ("detect_isPrimary", np.bool_, None, "In the inner region of its patch"),
)
"""Name, type, unit and description of the columns of an object."""

BAND_COLUMNS: tuple[tuple[str, type, u.UnitBase | None, str], ...] = (
    ("psfFlux", np.float32, u.nJy, "Flux with the PSF model as a weight function. Forced."),
    ("psfFluxErr", np.float32, u.nJy, "Uncertainty of psfFlux from the variance plane"),
    (
        "cModelFlux",
        np.float32,
        u.nJy,
        "Total flux. Not a model fit: the pixels of the footprint, and those of no object within 2.5 Kron "
        "radii; the same in all bands",
    ),
    ("cModelFluxErr", np.float32, u.nJy, "Uncertainty of cModelFlux from the variance plane"),
    ("kronFlux", np.float32, u.nJy, "Flux within 2.5 Kron radii, the radius measured in this band"),
    ("kronFluxErr", np.float32, u.nJy, "Uncertainty of kronFlux from the variance plane"),
    ("kronRad", np.float32, u.pix, "Kron radius (sqrt(a*b)), measured in this band"),
    ("ap06Flux", np.float32, u.nJy, "Flux within 6.0-pixel radius aperture. Forced."),
    ("ap06FluxErr", np.float32, u.nJy, "Uncertainty of ap06Flux from the variance plane"),
    ("ixx", np.float32, u.pix**2, "Gaussian-weighted adaptive moments about the centroid"),
    ("iyy", np.float32, u.pix**2, "Gaussian-weighted adaptive moments about the centroid"),
    ("ixy", np.float32, u.pix**2, "Gaussian-weighted adaptive moments about the centroid"),
    ("i_flag", np.bool_, None, "The adaptive moments failed"),
    ("ixxPSF", np.float32, u.pix**2, "Gaussian-weighted adaptive moments of the PSF at the object"),
    ("iyyPSF", np.float32, u.pix**2, "Gaussian-weighted adaptive moments of the PSF at the object"),
    ("ixyPSF", np.float32, u.pix**2, "Gaussian-weighted adaptive moments of the PSF at the object"),
    (
        "extendedness",
        np.float32,
        None,
        "Whether point-like (0) or extended (1): psfFlux against ap06Flux, corrected for the PSF outside",
    ),
    ("psfFlux_flag", np.bool_, None, "There is no PSF, or too few good pixels to use it"),
    ("cModel_flag", np.bool_, None, "No good pixel, so that cModelFlux is NaN"),
    ("invalidPsfFlag", np.bool_, None, "The coadd has no PSF here (usually no inputs)"),
    ("pixelFlags_nodata", np.bool_, None, "A pixel of the footprint has no data"),
    ("pixelFlags_saturated", np.bool_, None, "A pixel of the footprint is saturated"),
    ("pixelFlags_saturatedCenter", np.bool_, None, "A pixel next to the centroid is saturated"),
    ("pixelFlags_interpolated", np.bool_, None, "A pixel of the footprint is interpolated"),
    ("pixelFlags_interpolatedCenter", np.bool_, None, "A pixel next to the centroid is interpolated"),
    ("pixelFlags_inexact_psf", np.bool_, None, "The PSF is discontinuous in the footprint"),
    ("pixelFlags_inexact_psfCenter", np.bool_, None, "The PSF is discontinuous next to the centroid"),
)
"""The same for the columns of a band, without the name of the band."""

PIXEL_FLAGS = {"saturated": "SATURATED", "interpolated": "INTERPOLATED", "inexact_psf": "INEXACT_PSF"}
"""Mask planes that become flags for the footprint and for the centre."""


@dataclasses.dataclass
class Footprints:
    """Objects found on the combined bands, in indices of the arrays."""

    x: np.ndarray
    """Centroids along x, shape ``(N,)``."""

    y: np.ndarray
    """Centroids along y, shape ``(N,)``."""

    a: np.ndarray
    """Major rms sizes in pixels, smoothing included, shape ``(N,)``."""

    b: np.ndarray
    """Minor rms sizes in pixels, smoothing included, shape ``(N,)``."""

    theta: np.ndarray
    """Angles of the major axes from the x axis in radians, shape ``(N,)``."""

    aperture: np.ndarray
    """Sizes of the elliptical apertures in units of ``a``, shape ``(N,)``."""

    blended: np.ndarray
    """Whether it was deblended, shape ``(N,)``."""

    segments: np.ndarray
    """Which object a pixel belongs to, from 1, or 0, int32 ``(y, x)``."""

    def __post_init__(self) -> None:
        self._pixels = np.flatnonzero(self.segments)
        self._owner = self.segments.ravel()[self._pixels]

    def __len__(self) -> int:
        return len(self.x)

    def sum_pixels(self, plane: np.ndarray) -> np.ndarray:
        """Return the sums of a plane over each footprint.

        Parameters
        ----------
        plane
            Values of the pixels, shape ``(y, x)``.
        """
        return np.bincount(self._owner, plane.ravel()[self._pixels], minlength=len(self) + 1)[1:]


def detect_objects(
    coadd: MultibandCoadd,
    *,
    tract: int = 0,
    patch: int = 0,
    reference_bands: Sequence[str] = ("i", "r", "z", "g", "y", "u"),
    threshold: float = 5.0,
    min_area: int = 5,
) -> Table:
    """Detect the objects of a patch and measure them in all bands.

    Objects are found on the inverse-variance weighted mean of the bands,
    smoothed with a Gaussian half as wide as the PSF, and deblended.  For
    stars this has 0.8 of the signal to noise of the whole width, but it keeps
    neighbours apart, of which deep coadds are full.

    Parameters
    ----------
    coadd
        The patch, with the background subtracted.
    tract, patch
        IDs, which go into the table and the object IDs.
    reference_bands
        Bands from which the reference band of an object is chosen, best
        first; others follow in their own order.
    threshold
        Significance of a detection in units of the noise, as measured on the
        smoothed image.
    min_area
        Smallest number of connected pixels above the threshold.

    Returns
    -------
    table
        A row an object, the columns `OBJECT_COLUMNS` and, for each band, its
        name, an underscore and `BAND_COLUMNS`.  What cannot be measured is
        NaN, and so is everything in a missing band.
    """
    bad = {band: coadd.compute_bad_pixels(band, ("NO_DATA",)) for band in coadd.planes}
    footprints = find_footprints(coadd, bad, threshold=threshold, min_area=min_area)
    n = len(footprints)
    x, y = footprints.x + coadd.bbox.x.start, footprints.y + coadd.bbox.y.start
    # The transforms of lsst.images refuse to map no points.
    ra, dec = coadd.pixel_to_sky(x=x, y=y) if n else (np.zeros(0), np.zeros(0))
    values: dict[str, np.ndarray] = {
        "objectId": make_object_ids(tract, patch, n),
        "tract": np.full(n, tract),
        "patch": np.full(n, patch),
        "coord_ra": ra,
        "coord_dec": dec,
        "footprintArea": footprints.sum_pixels(np.ones(coadd.bbox.shape, dtype=np.float32)),
        "detect_fromBlend": footprints.blended,
        "detect_isPrimary": np.ones(n, dtype=bool)
        if coadd.inner_bbox is None
        else np.asarray(coadd.inner_bbox.contains(x=np.round(x), y=np.round(y)), dtype=bool),
    }
    for band in coadd.bands:
        if band in coadd.planes:
            measured = measure_band(coadd, band, bad[band], footprints)
        else:
            measured = {name: np.full(n, _get_failure(kind)) for name, kind, _, _ in BAND_COLUMNS}
        values |= {f"{band}_{name}": array for name, array in measured.items()}
    values |= choose_reference(values, _sort_bands(coadd.bands, reference_bands), n)
    columns = [
        *OBJECT_COLUMNS,
        *(
            (f"{band}_{name}", kind, unit, f"{description.removesuffix('.')}. {band}-band.")
            for band in coadd.bands
            for name, kind, unit, description in BAND_COLUMNS
        ),
    ]
    table = Table()
    for name, kind, unit, description in columns:
        dtype = "U1" if kind is np.str_ and n == 0 else kind
        table[name] = Column(np.asarray(values[name]).astype(dtype), unit=unit, description=description)
    return table


def select_primary(tables: Iterable[Table]) -> Table:
    """Return the objects of a tract, each once.

    Parameters
    ----------
    tables
        Objects of each patch, from `detect_objects`.

    Returns
    -------
    table
        Those in the inner region of their patch, without the column
        ``detect_isPrimary``.
    """
    table = vstack([table[table["detect_isPrimary"]] for table in tables], metadata_conflicts="silent")
    table.remove_column("detect_isPrimary")
    return table


def make_object_ids(tract: int, patch: int, n: int) -> np.ndarray:
    """Return the IDs of the objects of a patch, unique and positive.

    Parameters
    ----------
    tract
        ID of the tract, less than 2^26.
    patch
        ID of the patch, less than 2^13.
    n
        Number of objects, less than 2^24.
    """
    if not (0 <= tract < 1 << 26 and 0 <= patch < 1 << 13 and n < 1 << 24):
        raise ValueError(f"No object IDs for {n} objects of tract {tract}, patch {patch}.")
    return (tract << 37) + (patch << 24) + 1 + np.arange(n, dtype=np.int64)


def find_footprints(
    coadd: MultibandCoadd, bad: dict[str, np.ndarray], *, threshold: float, min_area: int
) -> Footprints:
    """Find and deblend objects on the combination of all bands.

    Parameters
    ----------
    coadd
        The patch.
    bad
        Unusable pixels of each band.
    threshold, min_area
        As in `detect_objects`.
    """
    weight = np.zeros(coadd.bbox.shape, dtype=np.float32)
    weighted = np.zeros_like(weight)
    for band, planes in coadd.planes.items():
        band_weight = np.where(bad[band], 0.0, 1.0 / np.where(bad[band], 1.0, planes.variance))
        weight += band_weight
        weighted += band_weight * np.where(bad[band], 0.0, planes.image)
    no_data = weight <= 0
    sigma = SMOOTHING * _compute_psf_sigma(coadd)
    # The kernel G of unit sum has sum(G^2) = 1 / (4 pi sigma^2), and G^2 is
    # proportional to a Gaussian narrower by sqrt(2).
    smooth_weight = np.maximum(gaussian_filter(weight, sigma), 1e-6 * weight.max() + 1e-30)
    smooth = gaussian_filter(weighted, sigma) / smooth_weight
    error = np.sqrt(gaussian_filter(weight, sigma / np.sqrt(2)) / (4 * np.pi)) / (sigma * smooth_weight)
    # Coadds have correlated noise; below the median there are no objects.
    ratio = (smooth / np.maximum(error, 1e-30))[~no_data][::7]
    excess = float(np.diff(np.percentile(ratio, [15.87, 50.0]))[0]) if ratio.size else 1.0
    error = np.maximum(error, 1e-30) * np.float32(max(excess, 1.0))
    sep.set_extract_pixstack(max(300_000, weight.size // 2))
    sep.set_sub_object_limit(4096)
    objects, segments = sep.extract(
        smooth,
        threshold,
        err=error,
        mask=no_data,
        minarea=min_area,
        filter_kernel=None,
        deblend_cont=DEBLEND_CONTRAST,
        segmentation_map=True,
    )
    mean = np.where(no_data, 0.0, weighted / np.where(no_data, 1.0, weight)).astype(np.float32)
    shape = {name: np.asarray(objects[name], dtype=np.float64) for name in ("x", "y", "a", "b", "theta")}
    shape["a"], shape["b"] = np.fmax(shape["a"], 0.5), np.fmax(shape["b"], 0.5)
    # In single precision a right angle is more than sep takes for one.
    shape["theta"] = np.clip(np.nan_to_num(shape["theta"]), -np.pi / 2, np.pi / 2)
    aperture = _compute_aperture(mean, no_data, segments, **shape)
    return Footprints(
        **shape, aperture=aperture, blended=(objects["flag"] & sep.OBJ_MERGED) > 0, segments=segments
    )


def measure_band(
    coadd: MultibandCoadd, band: str, bad: np.ndarray, footprints: Footprints
) -> dict[str, np.ndarray]:
    """Measure objects in one band.

    Parameters
    ----------
    coadd
        The patch.
    band
        A band that is not missing.
    bad
        Unusable pixels of the band.
    footprints
        The objects.

    Returns
    -------
    values
        Arrays of shape ``(N,)`` for all of `BAND_COLUMNS`.
    """
    planes = coadd.planes[band]
    image = np.where(bad, 0.0, planes.image).astype(np.float32)
    variance = np.where(bad, 0.0, planes.variance).astype(np.float32)
    values = _fit_stars_and_moments(coadd, band, image, variance, bad, footprints)
    values |= _sum_apertures(image, variance, bad, footprints)
    values |= _compute_pixel_flags(coadd, band, bad, footprints)
    # The fraction of a star's flux within the 6-pixel aperture is known.
    with np.errstate(invalid="ignore", divide="ignore"):
        total = values["ap06Flux"] / values.pop("ap06PSF")
        is_extended = total > (1 + MIN_EXTENDED_EXCESS) * values["psfFlux"]
        is_known = np.isfinite(total) & np.isfinite(values["psfFlux"])
    values["extendedness"] = np.where(is_known, is_extended, np.nan)
    return values


def choose_reference(values: dict[str, np.ndarray], bands: Sequence[str], n: int) -> dict[str, np.ndarray]:
    """Choose the reference band of each object and copy its measurements.

    Parameters
    ----------
    values
        Columns of all bands.
    bands
        Bands in order of priority.
    n
        Number of objects.

    Returns
    -------
    values
        Columns of the reference band.  It is the first with a PSF flux of
        `MIN_REFERENCE_SN` times its error, else that with the highest ratio.
    """
    ratio = np.zeros((n, len(bands)))
    for k, band in enumerate(bands):
        with np.errstate(invalid="ignore"):
            ratio[:, k] = np.nan_to_num(values[f"{band}_psfFlux"] / values[f"{band}_psfFluxErr"], nan=-np.inf)
    clear = ratio > MIN_REFERENCE_SN
    index = np.where(clear.any(axis=1), clear.argmax(axis=1), ratio.argmax(axis=1))

    def take(name: str) -> np.ndarray:
        return np.choose(index, [values[f"{band}_{name}"] for band in bands])

    return {
        "refBand": np.array(bands)[index],
        "refExtendedness": take("extendedness"),
        "shape_xx": take("ixx"),
        "shape_yy": take("iyy"),
        "shape_xy": take("ixy"),
        "shape_flag": take("i_flag"),
    }


def compute_adaptive_moments(
    stamps: np.ndarray, dx: np.ndarray, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Gaussian-weighted second moments about given positions.

    The weight function is a Gaussian with twice the weighted moments, as in
    Bernstein & Jarvis (2002) section 3.1, so that a Gaussian object gives its
    own moments.

    Parameters
    ----------
    stamps
        Images, shape ``(N, S, S)`` with S odd.
    dx, dy
        Positions in pixels from the centres of the stamps, shape ``(N,)``.

    Returns
    -------
    xx, yy, xy
        Moments in pixels squared, shape ``(N,)``; NaN if they do not converge
        to an object smaller than the stamp.
    """
    radius = stamps.shape[-1] // 2
    offsets = np.arange(-radius, radius + 1, dtype=np.float32)
    x = offsets[None, :] - dx[:, None].astype(np.float32)
    y = offsets[None, :] - dy[:, None].astype(np.float32)
    xx, yy = np.full(len(stamps), 4.0), np.full(len(stamps), 4.0)
    xy = np.zeros(len(stamps))
    with np.errstate(all="ignore"):
        for _ in range(MOMENTS_ITERATIONS):
            det = xx * yy - xy**2
            p, q, r = (np.float32(-0.5) * (m / det).astype(np.float32) for m in (yy, xx, -2 * xy))
            weighted = np.exp(
                (p[:, None] * x**2)[:, None, :]
                + (q[:, None] * y**2)[:, :, None]
                + (r[:, None] * y)[:, :, None] * x[:, None, :]
            )
            weighted *= stamps
            rows, columns = weighted.sum(axis=2), weighted.sum(axis=1)
            norm = rows.sum(axis=1)
            xx = 2 * (columns * x**2).sum(axis=1) / norm
            yy = 2 * (rows * y**2).sum(axis=1) / norm
            xy = 2 * ((weighted @ x[:, :, None])[:, :, 0] * y).sum(axis=1) / norm
            xx, yy, xy = (m.astype(np.float64) for m in (xx, yy, xy))
        failed = ~((xx * yy - xy**2 > 1e-3) & (xx > 0) & (xx + yy < radius**2 / 2))
    return tuple(np.where(failed, np.nan, m) for m in (xx, yy, xy))  # type: ignore[return-value]


def _fit_stars_and_moments(
    coadd: MultibandCoadd,
    band: str,
    image: np.ndarray,
    variance: np.ndarray,
    bad: np.ndarray,
    footprints: Footprints,
) -> dict[str, np.ndarray]:
    """Measure what needs stamps: PSF fluxes and adaptive moments."""
    n, size = len(footprints), STAMP_SIZE
    names = ("psfFlux", "psfFluxErr", "ixx", "iyy", "ixy", "ixxPSF", "iyyPSF", "ixyPSF", "ap06PSF")
    values = {name: np.full(n, np.nan) for name in names}
    column, row = np.floor(footprints.x + 0.5).astype(int), np.floor(footprints.y + 0.5).astype(int)
    dx, dy = footprints.x - column, footprints.y - row
    padded = [np.pad(plane, size // 2) for plane in (image, variance, footprints.segments)]
    padded.append(np.pad(bad, size // 2, constant_values=True))
    windows = [sliding_window_view(plane, (size, size)) for plane in padded]
    invalid_psf = np.zeros(n, dtype=bool)
    offsets = np.arange(-(size // 2), size // 2 + 1)
    for start in range(0, n, BATCH_SIZE):
        batch = np.arange(start, min(start + BATCH_SIZE, n))
        stamps, variances, segments, bads = (window[row[batch], column[batch]] for window in windows)
        good = ~bads & ((segments == 0) | (segments == batch[:, None, None] + 1))
        psf = coadd.compute_psf_kernels(
            band,
            x=footprints.x[batch] + coadd.bbox.x.start,
            y=footprints.y[batch] + coadd.bbox.y.start,
            size=size,
        ).astype(np.float32)
        invalid_psf[batch] = ~np.isfinite(psf).all(axis=(1, 2))
        psf[invalid_psf[batch]] = 0.0
        weight = np.where(good, psf / np.where(good, variances, 1.0), 0.0)
        information = np.einsum("nyx,nyx->n", weight, psf)
        # A fit to the wings of a star alone says little about its flux.
        usable = np.einsum("nyx,nyx->n", psf**2, good) > 0.5 * np.einsum("nyx,nyx->n", psf, psf)
        usable &= ~invalid_psf[batch]
        fit = batch[usable]
        values["psfFlux"][fit] = np.einsum("nyx,nyx->n", weight, stamps)[usable] / information[usable]
        values["psfFluxErr"][fit] = 1 / np.sqrt(information[usable])
        moments = compute_adaptive_moments(np.where(good, stamps, 0.0), dx[batch], dy[batch])
        for name, array in zip(("ixx", "iyy", "ixy"), moments, strict=True):
            values[name][batch] = array
        moments = compute_adaptive_moments(psf, dx[batch], dy[batch])
        for name, array in zip(("ixxPSF", "iyyPSF", "ixyPSF"), moments, strict=True):
            values[name][batch] = array
        distance = np.hypot(
            offsets[None, None, :] - dx[batch, None, None], offsets[None, :, None] - dy[batch, None, None]
        )
        # Pixels on the rim of the aperture count in part.
        values["ap06PSF"][batch] = np.einsum("nyx,nyx->n", psf, np.clip(6.5 - distance, 0.0, 1.0))
    values["ap06PSF"][invalid_psf] = np.nan
    return values | {
        "psfFlux_flag": np.isnan(values["psfFlux"]),
        "i_flag": np.isnan(values["ixx"]),
        "invalidPsfFlag": invalid_psf,
    }


def _sum_apertures(
    image: np.ndarray, variance: np.ndarray, bad: np.ndarray, footprints: Footprints
) -> dict[str, np.ndarray]:
    """Measure total fluxes, and those in a circle."""
    f, segments = footprints, footprints.segments
    own = {"segmap": segments, "seg_id": np.arange(1, len(f) + 1, dtype=np.int32)}
    ellipse = (f.x, f.y, f.a, f.b, f.theta)
    failed = f.sum_pixels(~bad) == 0
    values: dict[str, np.ndarray] = {"cModel_flag": failed}

    free = [np.where(segments == 0, plane, np.float32(0.0)) for plane in (image, variance)]

    def sum_total(name: str, aperture: np.ndarray) -> None:
        # The footprint, and what belongs to nobody in the ellipse around it.
        flux, err, _ = sep.sum_ellipse(free[0], *ellipse, aperture, var=free[1])
        values[name] = np.where(failed, np.nan, flux + f.sum_pixels(image))
        values[f"{name}Err"] = np.where(failed, np.nan, np.sqrt(err**2 + f.sum_pixels(variance)))

    sum_total("cModelFlux", f.aperture)
    radius = _compute_aperture(image, bad, segments, f.x, f.y, f.a, f.b, f.theta)
    sum_total("kronFlux", radius)
    values["kronRad"] = np.where(failed, np.nan, radius / KRON_FACTOR * np.sqrt(f.a * f.b))
    circle = sep.sum_circle(image, f.x, f.y, 6.0, var=variance, mask=bad, **own)
    values["ap06Flux"], values["ap06FluxErr"] = (np.where(failed, np.nan, array) for array in circle[:2])
    return values


def _compute_aperture(
    image: np.ndarray,
    bad: np.ndarray,
    segments: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    theta: np.ndarray,
) -> np.ndarray:
    """Return 2.5 Kron radii in units of the major rms size."""
    own = {"segmap": segments, "seg_id": np.arange(1, len(x) + 1, dtype=np.int32)}
    radius, _ = sep.kron_radius(image, x, y, a, b, theta, 6.0, mask=bad, **own)
    # Where noise makes the sums negative the radius has no meaning.
    radius = np.where(np.isfinite(radius), np.clip(radius, 0.0, 6.0), 0.0)
    return np.maximum(KRON_FACTOR * radius, MIN_APERTURE)


def _compute_pixel_flags(
    coadd: MultibandCoadd, band: str, bad: np.ndarray, footprints: Footprints
) -> dict[str, np.ndarray]:
    """Return the flags of footprints and of the 3 x 3 pixels at centres."""
    height, width = bad.shape
    column, row = np.floor(footprints.x + 0.5).astype(int), np.floor(footprints.y + 0.5).astype(int)
    step = np.arange(-1, 2)
    rows = np.clip(row[:, None, None] + step[:, None], 0, height - 1)
    columns = np.clip(column[:, None, None] + step, 0, width - 1)
    flags = {"pixelFlags_nodata": footprints.sum_pixels(bad) > 0}
    for name, plane_name in PIXEL_FLAGS.items():
        plane = coadd.compute_mask(band, (plane_name,))
        flags[f"pixelFlags_{name}"] = footprints.sum_pixels(plane) > 0
        flags[f"pixelFlags_{name}Center"] = plane[rows, columns].any(axis=(1, 2))
    return flags


def _compute_psf_sigma(coadd: MultibandCoadd) -> float:
    """Return the mean rms size of the PSFs at the centre, in pixels."""
    sizes = []
    for band in coadd.planes:
        kernel = coadd.compute_psf_kernel(band, x=coadd.bbox.x.center, y=coadd.bbox.y.center, size=STAMP_SIZE)
        if kernel is not None:
            zero = np.array([coadd.bbox.x.center % 1.0])
            zero = zero - np.floor(zero + 0.5)
            xx, yy, _ = compute_adaptive_moments(kernel[None].astype(np.float32), zero, zero)
            sizes.append(float(np.sqrt((xx[0] + yy[0]) / 2)))
    return float(np.nanmean(sizes)) if np.isfinite(sizes).any() else 1.7


def _sort_bands(bands: Sequence[str], first: Sequence[str]) -> list[str]:
    return [*(band for band in first if band in bands), *(band for band in bands if band not in first)]


def _get_failure(kind: type) -> float | bool:
    """Return what stands for no measurement: NaN, or a flag that is set."""
    return True if kind is np.bool_ else np.nan

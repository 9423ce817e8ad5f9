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

"""Stamps of many objects as arrays, with what is known of their quality."""

from __future__ import annotations

__all__ = ("DEFAULT_BAD_PLANES", "CutoutExtractor", "Cutouts")

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import astropy.units as u
import numpy as np
from astropy.table import Column, Table
from scipy.interpolate import make_interp_spline

from .coadds import MultibandCoadd

DEFAULT_BAD_PLANES = ("NO_DATA", "SATURATED", "BAD")
"""Mask planes whose pixels carry no usable measurement."""

BLOCK = 128
"""Number of stamps that are moved at once, so that they stay in the cache."""


@dataclasses.dataclass(eq=False)
class Cutouts:
    """Stamps of N objects in B bands, and their quality.

    Stamps have an odd side of S pixels and are centred on the pixel nearest
    to the object.  Pixels outside the coadd and in missing bands are NaN and
    bad; those in missing cells are bad.
    """

    bands: tuple[str, ...]
    """Names of the bands, in the order of the second axis."""

    pixel_scale: float
    """Side of a pixel in arcsec."""

    ids: np.ndarray
    """Object IDs, int64, shape ``(N,)``."""

    ra: np.ndarray
    """ICRS right ascension in degrees, shape ``(N,)``."""

    dec: np.ndarray
    """ICRS declination in degrees, shape ``(N,)``."""

    x: np.ndarray
    """Column of the object in pixels of the coadd, shape ``(N,)``."""

    y: np.ndarray
    """Row of the object in pixels of the coadd, shape ``(N,)``."""

    image: np.ndarray
    """Pixel values in nJy, float32, shape ``(N, B, S, S)``."""

    variance: np.ndarray
    """Variance in nJy squared, float32, shape ``(N, B, S, S)``."""

    bad: np.ndarray
    """Whether a pixel is unusable, bool, shape ``(N, B, S, S)``."""

    psf: np.ndarray
    """PSF kernels on K x K pixels, float32, shape ``(N, B, K, K)``; NaN where
    the coadd has none.  K may be 0."""

    off_edge: np.ndarray
    """Whether a part of the stamp lies outside the coadd, shape ``(N,)``."""

    missing_band: np.ndarray
    """Whether the coadd lacks the band, bool, shape ``(N, B)``."""

    missing_cell: np.ndarray
    """Whether the centre is in a cell without data, bool, shape ``(N, B)``."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> int:
        """Side of the stamps in pixels."""
        return self.image.shape[-1]

    @property
    def masked_fraction(self) -> np.ndarray:
        """Fraction of bad pixels, float32, shape ``(N, B)``."""
        return self.bad.mean(axis=(2, 3), dtype=np.float32)

    @property
    def bad_psf(self) -> np.ndarray:
        """Whether the coadd has no PSF there, bool, shape ``(N, B)``."""
        return ~np.isfinite(self.psf).all(axis=(2, 3))

    def __getitem__(self, index: np.ndarray | slice) -> Cutouts:
        """Return the cutouts of some of the objects."""
        arrays: dict[str, Any] = {name: getattr(self, name)[index] for name in _ARRAY_NAMES}
        return dataclasses.replace(self, **arrays)

    def select_bands(self, bands: Sequence[str]) -> Cutouts:
        """Return the cutouts of some of the bands, in their order.

        Parameters
        ----------
        bands
            Names of the bands.

        Raises
        ------
        ValueError
            Raised if a band is not among those of the cutouts.
        """
        if tuple(bands) == self.bands:
            return self
        if missing := [band for band in bands if band not in self.bands]:
            raise ValueError(f"Cutouts of bands {', '.join(self.bands)} have no {', '.join(missing)}.")
        order = [self.bands.index(band) for band in bands]
        arrays: dict[str, Any] = {name: getattr(self, name)[:, order] for name in _BAND_ARRAY_NAMES}
        return dataclasses.replace(self, bands=tuple(bands), **arrays)

    @classmethod
    def concatenate(cls, parts: Sequence[Cutouts]) -> Cutouts:
        """Join cutouts of the same bands, sizes and pixel scale.

        Parameters
        ----------
        parts
            Cutouts, at least one.

        Raises
        ------
        ValueError
            Raised if there are none, or if they differ in these.
        """
        if not parts:
            raise ValueError("There are no cutouts to join.")
        first = parts[0]
        for part in parts[1:]:
            if (part.bands, part.size, part.psf.shape[1:]) != (
                first.bands,
                first.size,
                first.psf.shape[1:],
            ) or not np.isclose(part.pixel_scale, first.pixel_scale, rtol=1e-3):
                raise ValueError(f"Cutouts of {part._geometry} cannot join those of {first._geometry}.")
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAY_NAMES
        }
        return dataclasses.replace(first, **arrays)

    @property
    def _geometry(self) -> str:
        """What cutouts must share, for messages."""
        return (
            f"{','.join(self.bands)}, {self.size} pixels of {self.pixel_scale:.4f} arcsec with "
            f"{self.psf.shape[-1]} pixels for the PSF"
        )

    def crop(self, size: int) -> Cutouts:
        """Return the central pixels of the stamps.

        Parameters
        ----------
        size
            Odd side of the new stamps in pixels, at most the old one.

        Raises
        ------
        ValueError
            Raised if the new stamps would be larger.
        """
        _check_odd(size)
        if size > self.size:
            raise ValueError(f"Stamps of {self.size} pixels cannot be cropped to {size}; cut larger ones.")
        if size == self.size:
            return self
        border = (self.size - size) // 2
        center = np.s_[..., border : border + size, border : border + size]
        arrays: dict[str, Any] = {name: getattr(self, name)[center] for name in ("image", "variance", "bad")}
        return dataclasses.replace(self, **arrays)

    def resample(self, pixel_scale: float, size: int) -> Cutouts:
        """Return the stamps on pixels of another size, flux conserved.

        The cumulative flux along each axis is interpolated by a natural
        quintic spline and differenced at the edges of the new pixels, so that
        the flux in any box of whole old and new pixels is the same.

        Parameters
        ----------
        pixel_scale
            Side of the new pixels in arcsec.
        size
            Odd side of the new stamps in pixels.

        Returns
        -------
        cutouts
            Stamps whose variance neglects the correlation between pixels.
            Bad pixels count as zero flux, and spoil each new pixel that they
            overlap; where they hide flux, their neighbours miss up to a tenth
            of it.

        Raises
        ------
        ValueError
            Raised if the new stamps would reach beyond the old ones.
        """
        _check_odd(size)
        ratio = pixel_scale / self.pixel_scale
        if size * ratio > self.size * (1 + 1e-6):
            raise ValueError(
                f"Stamps of {size} pixels of {pixel_scale:.4f} arcsec do not fit into stamps of {self.size} "
                f"pixels of {self.pixel_scale:.4f} arcsec; cut larger ones."
            )
        if size == self.size and abs(ratio - 1) < 1e-6:
            return self
        weights, overlap = _make_resampling_matrices(self.size, size, ratio)
        image = np.where(self.bad, 0.0, self.image).astype(np.float32)
        variance = np.where(self.bad, 0.0, self.variance).astype(np.float32)
        bad = overlap @ self.bad.astype(np.float32) @ overlap.T > 1e-6
        image = weights @ image @ weights.T
        variance = weights**2 @ variance @ (weights**2).T
        psf = self.psf
        if k := psf.shape[-1]:
            # The largest odd size that fits.
            new_k = max((int(k / ratio + 1e-6) - 1) // 2 * 2 + 1, 1)
            psf_weights, _ = _make_resampling_matrices(k, new_k, ratio)
            psf = psf_weights @ psf @ psf_weights.T
        return dataclasses.replace(
            self, pixel_scale=pixel_scale, image=image, variance=variance, bad=bad, psf=psf
        )

    def to_table(self) -> Table:
        """Return a table, a row an object, that needs no metadata.

        Each row repeats the bands and the pixel scale, so that tables of
        several patches can be stacked and read in part.
        """
        table = Table()
        for name, unit, description in _COLUMNS:
            if name == "psf" and self.psf.shape[-1] == 0:
                continue  # Parquet has no arrays without elements.
            table[name] = Column(getattr(self, name), unit=unit, description=description)
        table["bands"] = Column([",".join(self.bands)] * len(self), dtype=str)
        table["bands"].description = "Bands, in the order of the second axis of the arrays"
        table["pixel_scale"] = Column(
            np.full(len(self), self.pixel_scale), unit=u.arcsec, description="Side of a pixel"
        )
        return table

    @classmethod
    def from_table(cls, table: Table) -> Cutouts:
        """Make from a table written by `to_table`.

        Parameters
        ----------
        table
            Table with a row for each object, at least one.

        Raises
        ------
        ValueError
            Raised if the table is empty, lacks columns, or mixes bands or
            pixel scales.
        """
        if missing := {*_ARRAY_NAMES, "bands", "pixel_scale"} - {"psf"} - set(table.colnames):
            raise ValueError(f"Not a table of cutouts: it has no columns {sorted(missing)}.")
        if len(table) == 0:
            raise ValueError("The table of cutouts is empty.")
        bands = {str(name) for name in table["bands"]}
        scales = np.asarray(table["pixel_scale"], dtype=np.float64)
        if len(bands) > 1 or np.ptp(scales) > 1e-3 * scales[0]:
            raise ValueError(
                f"The table mixes cutouts of bands {sorted(bands)} and pixel scales from {scales.min():.4f} "
                f"to {scales.max():.4f} arcsec."
            )
        arrays: dict[str, Any] = {
            name: np.asarray(table[name]) for name in _ARRAY_NAMES if name in table.colnames
        }
        if "psf" not in arrays:
            arrays["psf"] = np.empty((*arrays["image"].shape[:2], 0, 0), dtype=np.float32)
        return cls(bands=tuple(bands.pop().split(",")), pixel_scale=float(scales[0]), **arrays)


_COLUMNS: tuple[tuple[str, u.UnitBase | None, str], ...] = (
    ("ids", None, "Object ID"),
    ("ra", u.deg, "ICRS right ascension"),
    ("dec", u.deg, "ICRS declination"),
    ("x", u.pix, "Column in pixels of the coadd"),
    ("y", u.pix, "Row in pixels of the coadd"),
    ("image", u.nJy, "Pixel values, (band, y, x)"),
    ("variance", u.nJy**2, "Variance, (band, y, x)"),
    ("bad", None, "Whether the pixel is unusable, (band, y, x)"),
    ("psf", None, "PSF kernel, (band, y, x)"),
    ("off_edge", None, "Whether a part of the stamp lies outside the coadd"),
    ("missing_band", None, "Whether the coadd lacks the band, (band)"),
    ("missing_cell", None, "Whether the centre is in a cell without data, (band)"),
)


_ARRAY_NAMES = tuple(name for name, _, _ in _COLUMNS)
_BAND_ARRAY_NAMES = ("image", "variance", "bad", "psf", "missing_band", "missing_cell")


class CutoutExtractor:
    """Cuts the stamps of objects out of the planes of a patch.

    The planes are looked at once, so that objects can be taken in batches.

    Parameters
    ----------
    coadd
        The patch.
    size
        Odd side of the stamps in pixels.
    psf_size
        Odd side of the PSF kernels in pixels, or 0 for none.
    bad_planes
        Mask planes whose pixels are bad; see
        `MultibandCoadd.compute_bad_pixels`.

    Raises
    ------
    ValueError
        Raised if a size is even or a mask plane is unknown.
    """

    def __init__(
        self,
        coadd: MultibandCoadd,
        *,
        size: int,
        psf_size: int = 0,
        bad_planes: Iterable[str] = DEFAULT_BAD_PLANES,
    ) -> None:
        _check_odd(size)
        if psf_size:
            _check_odd(psf_size)
        self._coadd = coadd
        self._size = size
        self._psf_size = psf_size
        bad_planes = tuple(bad_planes)
        self._bad = {band: coadd.compute_bad_pixels(band, bad_planes) for band in coadd.planes}
        self._pixel_scale = coadd.pixel_scale

    def extract(
        self, *, ids: np.ndarray, ra: np.ndarray, dec: np.ndarray, psf_size: int | None = None
    ) -> Cutouts:
        """Cut out the stamps of some objects.

        Parameters
        ----------
        ids
            Object IDs, shape ``(N,)``.
        ra, dec
            ICRS coordinates in degrees, shape ``(N,)``.  Objects outside the
            patch, and those without valid coordinates, get stamps that are
            bad and off the edge.
        psf_size
            Odd side of the PSF kernels in pixels, if it is not that of the
            extractor; 1 is enough to know whether there is a PSF.
        """
        side = self._psf_size if psf_size is None else psf_size
        coadd, size, bands = self._coadd, self._size, self._coadd.bands
        n = len(ids)
        ra, dec = np.asarray(ra, dtype=np.float64), np.asarray(dec, dtype=np.float64)
        x, y = coadd.sky_to_pixel(ra=ra, dec=dec)
        height, width = coadd.bbox.shape
        inside = _is_inside(x - coadd.bbox.x.start, width) & _is_inside(y - coadd.bbox.y.start, height)
        # Lower left pixels of the stamps, as indices into the planes.
        left = _to_index(x, inside) - coadd.bbox.x.start - size // 2
        bottom = _to_index(y, inside) - coadd.bbox.y.start - size // 2
        off_edge = ~inside | (left < 0) | (bottom < 0) | (left + size > width) | (bottom + size > height)

        shape = (n, len(bands), size, size)
        image = np.empty(shape, dtype=np.float32)
        variance = np.empty(shape, dtype=np.float32)
        bad = np.empty(shape, dtype=bool)
        # What no plane fills in.
        for stamps, outside in ((image, np.nan), (variance, np.nan), (bad, True)):
            stamps[off_edge] = outside
            stamps[:, [band not in coadd.planes for band in bands]] = outside
        psf = np.full((n, len(bands), side, side), np.nan, dtype=np.float32)
        missing_cell = np.zeros((n, len(bands)), dtype=bool)
        for b, band in enumerate(bands):
            if band not in coadd.planes:
                continue
            planes = coadd.planes[band]
            for stamps, plane in (
                (image, planes.image),
                (variance, planes.variance),
                (bad, self._bad[band]),
            ):
                _gather(stamps[:, b], plane, bottom=bottom, left=left, inside=inside, off_edge=off_edge)
            if side:
                psf[inside, b] = coadd.compute_psf_kernels(band, x=x[inside], y=y[inside], size=side)
            for cell in planes.missing_cells:
                missing_cell[:, b] |= inside & cell.contains(x=x, y=y)
        missing_band = np.zeros((n, len(bands)), dtype=bool)
        missing_band[:] = [band in coadd.missing_bands for band in bands]
        return Cutouts(
            bands=bands,
            pixel_scale=self._pixel_scale,
            ids=np.asarray(ids, dtype=np.int64),
            ra=ra,
            dec=dec,
            x=x,
            y=y,
            image=image,
            variance=variance,
            bad=bad,
            psf=psf,
            off_edge=off_edge,
            missing_band=missing_band,
            missing_cell=missing_cell,
        )


def _gather(
    stamps: np.ndarray,
    plane: np.ndarray,
    *,
    bottom: np.ndarray,
    left: np.ndarray,
    inside: np.ndarray,
    off_edge: np.ndarray,
) -> None:
    """Fill in the stamps of objects that lie on a plane.

    Parameters
    ----------
    stamps
        Stamps to fill in, shape ``(N, size, size)``.
    plane
        Pixels of the patch, shape ``(y, x)``.
    bottom, left
        Lower left pixels of the stamps, shape ``(N,)``.
    inside, off_edge
        Whether the centre of the stamp is on the plane, and whether a part
        of it is not, shape ``(N,)``.
    """
    size = stamps.shape[-1]
    height, width = plane.shape
    if not off_edge.all():
        windows = np.lib.stride_tricks.sliding_window_view(plane, (size, size))
        whole = np.flatnonzero(~off_edge)
        for start in range(0, len(whole), BLOCK):
            block = whole[start : start + BLOCK]
            stamps[block] = windows[bottom[block], left[block]]
    for k in np.flatnonzero(inside & off_edge):
        i, j = bottom[k], left[k]
        rows = slice(max(i, 0), min(i + size, height))
        columns = slice(max(j, 0), min(j + size, width))
        part = np.s_[rows.start - i : rows.stop - i, columns.start - j : columns.stop - j]
        stamps[k][part] = plane[rows, columns]


def _check_odd(size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"Stamps have an odd number of pixels on a side, not {size}.")


def _is_inside(offset: np.ndarray, size: int) -> np.ndarray:
    """Return whether positions lie on pixels 0 to size - 1."""
    return (offset >= -0.5) & (offset < size - 0.5)


def _to_index(position: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the nearest pixels as integers, 0 where not valid."""
    return np.floor(np.where(valid, position, 0.0) + 0.5).astype(np.int64)


def _make_resampling_matrices(old_size: int, new_size: int, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of old pixels in new ones along one axis.

    Parameters
    ----------
    old_size, new_size
        Numbers of pixels; both axes have the same centre.
    ratio
        Size of a new pixel in old pixels.

    Returns
    -------
    weights
        Flux of each old pixel that goes to each new one, shape
        ``(new_size, old_size)``.
    overlap
        Length that they share, in old pixels, same shape.
    """
    old_edges = np.arange(old_size + 1, dtype=np.float64)
    new_edges = old_size / 2 + (np.arange(new_size + 1) - new_size / 2) * ratio
    new_edges = np.clip(new_edges, 0.0, old_size)
    cumulative = np.vstack([np.zeros(old_size), np.tril(np.ones((old_size, old_size)))])
    if old_size > 1:
        # Natural ends; the usual ones amplify the noise of the last pixels.
        ends = [(3, np.zeros(old_size)), (4, np.zeros(old_size))]
        spline = make_interp_spline(old_edges, cumulative, k=5, bc_type=(ends, ends))
    else:
        spline = make_interp_spline(old_edges, cumulative, k=1)
    weights = np.diff(spline(new_edges), axis=0)
    overlap = np.minimum(new_edges[1:, None], old_edges[None, 1:]) - np.maximum(
        new_edges[:-1, None], old_edges[None, :-1]
    )
    return weights.astype(np.float32), np.clip(overlap, 0.0, None).astype(np.float32)

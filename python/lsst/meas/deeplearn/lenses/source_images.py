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


"""Images of galaxies as sources of lensed arcs."""

from __future__ import annotations

__all__ = ("SourceImages", "read_cosmos_images")

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import astropy.units as u
import galsim
import numpy as np
from astropy.table import Column, Table
from scipy import ndimage

DETECTION_SNR = 3.0
"""Smoothed signal to noise of the pixels that belong to a galaxy."""


@dataclasses.dataclass(frozen=True, eq=False)
class SourceImages:
    """Images of N galaxies without noise, or nearly so.

    A galaxy is taken around the centroid of its light.
    """

    ids: np.ndarray
    """ID of each galaxy, int64, shape ``(N,)``.  Galaxies go into training or
    test examples by their ID.
    """

    image: np.ndarray
    """Share of the light in each pixel, float32, shape ``(N, S, S)``."""

    pixel_scale: np.ndarray
    """Side of a pixel in arcsec, shape ``(N,)``."""

    center: np.ndarray
    """Column and row of the centroid in pixels, shape ``(N, 2)``."""

    half_light_radius: np.ndarray
    """Radius in arcsec of the circle around the centroid with half of the
    light, shape ``(N,)``.
    """

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def from_arrays(
        cls, image: np.ndarray, pixel_scale: float | np.ndarray, ids: np.ndarray | None = None
    ) -> SourceImages:
        """Make from images of any flux.

        Parameters
        ----------
        image
            Images, shape ``(N, S, S)``, with all light inside.
        pixel_scale
            Side of a pixel in arcsec, one for all or one for each.
        ids
            IDs; by default running numbers.

        Raises
        ------
        ValueError
            Raised if images are not square and finite, have no light, or
            have light at their edges.
        """
        image = np.asarray(image, dtype=np.float64)
        if image.ndim != 3 or image.shape[1] != image.shape[2] or len(image) == 0:
            raise ValueError(f"Images of sources have the shape (N, S, S), not {image.shape}.")
        if not np.isfinite(image).all():
            raise ValueError("Images of sources have pixels that are not finite.")
        flux = image.sum(axis=(1, 2))
        if (flux <= 0).any():
            raise ValueError(f"{(flux <= 0).sum()} images of sources have no light.")
        image = image / flux[:, None, None]
        edge = np.abs(image).sum(axis=(1, 2)) - np.abs(image[:, 1:-1, 1:-1]).sum(axis=(1, 2))
        if (edge > 0.05).any():
            raise ValueError(
                f"{(edge > 0.05).sum()} images of sources have more than 5 per cent of their light in the "
                "pixels at the edge; cut them out larger, or clean them of noise."
            )
        size = image.shape[-1]
        grid = np.arange(size)
        center = np.stack([image.sum(axis=1) @ grid, image.sum(axis=2) @ grid], axis=1)
        scale = np.broadcast_to(np.asarray(pixel_scale, dtype=np.float64), len(image))
        radius = np.array([_find_half_light_radius(*row) for row in zip(image, center, strict=True)])
        return cls(
            ids=np.arange(len(image)) if ids is None else np.asarray(ids, dtype=np.int64),
            image=image.astype(np.float32),
            pixel_scale=scale,
            center=center,
            half_light_radius=radius * scale,
        )

    @classmethod
    def from_table(cls, table: Table) -> SourceImages:
        """Make from a table with the columns of `to_table`.

        Parameters
        ----------
        table
            Table with a row for each galaxy.

        Raises
        ------
        ValueError
            Raised if columns are missing, and as by `from_arrays`.
        """
        if missing := {"source_id", "image", "pixel_scale"} - set(table.colnames):
            raise ValueError(f"Not a table of images of sources: it has no columns {sorted(missing)}.")
        return cls.from_arrays(
            np.asarray(table["image"]), np.asarray(table["pixel_scale"]), np.asarray(table["source_id"])
        )

    def to_table(self) -> Table:
        """Return a table that a butler can store as ``ArrowAstropy``."""
        table = Table()
        table["source_id"] = Column(self.ids, description="ID of the galaxy")
        table["image"] = Column(self.image, description="Share of the light in each pixel, (y, x)")
        table["pixel_scale"] = Column(self.pixel_scale, unit=u.arcsec, description="Side of a pixel")
        return table


def _find_half_light_radius(image: np.ndarray, center: np.ndarray) -> float:
    """Return the radius in pixels that holds half of the light."""
    y, x = np.indices(image.shape)
    radius = np.hypot(x - center[0], y - center[1]).ravel()
    order = np.argsort(radius)
    inside = np.cumsum(image.ravel()[order])
    return max(float(radius[order][np.searchsorted(np.maximum.accumulate(inside), 0.5)]), 0.5)


def read_cosmos_images(
    path: Path | str, *, size: int = 128, indices: Sequence[int] | None = None
) -> SourceImages:
    """Read galaxies of a GalSim real-galaxy catalogue, such as COSMOS.

    Neighbours and the noise around galaxies are cut off: what remains are the
    pixels that belong to the galaxy at the centre after smoothing, fading
    into nothing at the border, smoothed by a Gaussian of one pixel.  The PSF
    of HST stays in the images; it is small where sources are as compact as the
    prior has them.

    Parameters
    ----------
    path
        The catalogue, ``real_galaxy_catalog_*.fits``, with its images beside
        it.
    size
        Side of the images in pixels; galaxies that are larger are left out.
    indices
        Rows of the catalogue; all by default.

    Raises
    ------
    ValueError
        Raised if no galaxy is usable.
    """
    catalog = galsim.RealGalaxyCatalog(str(path))
    images, scales, ids = [], [], []
    for index in range(catalog.nobjects) if indices is None else indices:
        stamp = catalog.getGalImage(index)
        noise = math.sqrt(catalog.variance[index])
        galaxy = _isolate(np.asarray(stamp.array, dtype=np.float64), noise, size)
        if galaxy is not None:
            images.append(galaxy)
            scales.append(float(catalog.pixel_scale[index]))
            ids.append(int(catalog.ident[index]))
    if not images:
        raise ValueError(f"No galaxy of {path} fits into {size} pixels.")
    return SourceImages.from_arrays(np.array(images), np.array(scales), np.array(ids))


def _isolate(image: np.ndarray, noise: float, size: int) -> np.ndarray | None:
    """Return the galaxy at the centre on S x S pixels; None if it does not
    fit.
    """
    sigma = 2.0
    smooth = ndimage.gaussian_filter(image, sigma, mode="constant")
    labels, _ = ndimage.label(smooth > DETECTION_SNR * noise / np.sqrt(4 * np.pi) / sigma)
    middle = tuple(n // 2 for n in image.shape)
    around = tuple(slice(max(m - 3, 0), m + 4) for m in middle)
    peak = np.unravel_index(smooth[around].argmax(), smooth[around].shape)
    own = labels[around][peak]
    if own == 0:
        return None
    # Stamps of the catalogue often end within the galaxy: fade there too.
    member = labels == own
    inner = np.zeros_like(member)
    inner[3:-3, 3:-3] = True
    fade = np.clip(
        2 * ndimage.gaussian_filter((member & inner).astype(float), 2.0, mode="constant") - 0.5, 0, 1
    )
    galaxy = ndimage.gaussian_filter(image, 1.0) * fade
    used = [np.flatnonzero(member.any(axis=axis)) for axis in (1, 0)]
    low = [(rows[0] + rows[-1] + 1) // 2 - size // 2 for rows in used]
    if any(rows[-1] - rows[0] + 1 > size - 8 for rows in used):
        return None
    padded = np.pad(galaxy, size)
    return np.asarray(padded[tuple(slice(start + size, start + 2 * size) for start in low)])

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

"""Stamps as worse data would have them, to see what a lens finder bears."""

from __future__ import annotations

__all__ = ("add_noise", "blur", "change_zero_point", "mask_stripe", "remove_band", "shift_centers")

import dataclasses
import math

import numpy as np
from scipy import ndimage

from ..cutouts import Cutouts

DEFAULT_SEEING = 0.7
"""Width of the PSF in arcsec at half of its maximum where none is known."""


def shift_centers(cutouts: Cutouts, largest: int, rng: np.random.Generator) -> Cutouts:
    """Return stamps whose centres are off by whole pixels.

    Parameters
    ----------
    cutouts
        The stamps.
    largest
        Largest error along each axis in pixels; uniform.
    rng
        Random numbers.
    """
    n, size = len(cutouts), cutouts.size
    dy, dx = rng.integers(0, 2 * largest + 1, size=(2, n))
    margin = ((0, 0), (0, 0), (largest, largest), (largest, largest))

    def cut(values: np.ndarray, fill: float | bool) -> np.ndarray:
        padded = np.pad(values, margin, constant_values=fill)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
        return windows[np.arange(n), :, dy, dx]  # (N, B, S, S)

    return dataclasses.replace(
        cutouts,
        image=cut(cutouts.image, np.nan),
        variance=cut(cutouts.variance, np.nan),
        bad=cut(cutouts.bad, True),
    )


def add_noise(cutouts: Cutouts, factor: float, rng: np.random.Generator) -> Cutouts:
    """Return stamps of smaller depth.

    Parameters
    ----------
    cutouts
        The stamps.
    factor
        Ratio of the new noise and the old, at least 1, in all bands: the
        square root of the ratio of exposure times.
    rng
        Random numbers.
    """
    variance = np.where(cutouts.bad, 0.0, cutouts.variance)
    noise = rng.standard_normal(cutouts.image.shape) * np.sqrt(variance * (factor**2 - 1))
    image = (cutouts.image + noise).astype(np.float32)
    return dataclasses.replace(cutouts, image=image, variance=cutouts.variance * factor**2)


def blur(cutouts: Cutouts, factor: float, rng: np.random.Generator) -> Cutouts:
    """Return stamps with a wider PSF and the same noise.

    A Gaussian is convolved with them that would widen a Gaussian PSF of the
    same effective area, and the noise that it took away is added as white
    noise.

    Parameters
    ----------
    cutouts
        The stamps.
    factor
        Ratio of the widths of the new and old PSF, at least 1.
    rng
        Random numbers.
    """
    image = np.where(cutouts.bad, 0.0, cutouts.image).astype(np.float32)
    variance = np.where(cutouts.bad, 0.0, cutouts.variance)
    for b in range(len(cutouts.bands)):
        width = _estimate_psf_sigma(cutouts.psf[:, b], cutouts.pixel_scale) * math.sqrt(factor**2 - 1)
        if not width > 0:
            continue
        image[:, b] = ndimage.gaussian_filter(image[:, b], (0, width, width))
        point = np.zeros(2 * math.ceil(4 * width) + 1)
        point[len(point) // 2] = 1
        kept = (ndimage.gaussian_filter(point, width) ** 2).sum() ** 2
        noise = rng.standard_normal(image[:, b].shape) * np.sqrt(variance[:, b] * (1 - kept))
        image[:, b] += noise.astype(np.float32)
    return dataclasses.replace(cutouts, image=image)


def mask_stripe(cutouts: Cutouts, fraction: float, rng: np.random.Generator) -> Cutouts:
    """Return stamps with bad rows, as a bleed trail leaves them.

    Parameters
    ----------
    cutouts
        The stamps.
    fraction
        Fraction of the rows that are bad, at a random place in each stamp.
    rng
        Random numbers.
    """
    size = cutouts.size
    height = round(fraction * size)
    first = rng.integers(0, size - height + 1, len(cutouts))
    rows = np.arange(size)
    stripe = (rows >= first[:, None]) & (rows < first[:, None] + height)  # (N, S)
    return dataclasses.replace(cutouts, bad=cutouts.bad | stripe[:, None, :, None])


def change_zero_point(cutouts: Cutouts, band: int, error: float) -> Cutouts:
    """Return stamps of which one band is calibrated too faint.

    Image and noise change alike, so that networks that see pixels in units of
    their noise see no change.

    Parameters
    ----------
    cutouts
        The stamps.
    band
        Index of the band.
    error
        Magnitudes by which it is too faint.
    """
    factor = 10 ** (-0.4 * error)
    image, variance = cutouts.image.copy(), cutouts.variance.copy()
    image[:, band] *= factor
    variance[:, band] *= factor**2
    return dataclasses.replace(cutouts, image=image, variance=variance)


def remove_band(cutouts: Cutouts, band: int) -> Cutouts:
    """Return stamps that lack a band.

    Parameters
    ----------
    cutouts
        The stamps.
    band
        Index of the band, all of whose pixels become bad.
    """
    bad, missing = cutouts.bad.copy(), cutouts.missing_band.copy()
    bad[:, band] = missing[:, band] = True
    return dataclasses.replace(cutouts, bad=bad, missing_band=missing)


def _estimate_psf_sigma(psf: np.ndarray, pixel_scale: float) -> float:
    """Return the sigma in pixels of the Gaussian of the same effective area,
    the median over stamps.
    """
    default = DEFAULT_SEEING / pixel_scale / math.sqrt(8 * math.log(2))
    if psf.size == 0:
        return default
    area = psf.sum(axis=(1, 2)) ** 2 / (psf**2).sum(axis=(1, 2))
    area = area[np.isfinite(area) & (area > 0)]
    return math.sqrt(float(np.median(area)) / (4 * math.pi)) if len(area) else default

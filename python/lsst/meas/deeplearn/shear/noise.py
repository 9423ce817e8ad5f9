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


"""The correlation of the noise in a coadd."""

from __future__ import annotations

__all__ = ("measure_noise_correlation",)

import numpy as np

MIN_PIXELS = 10_000
"""Number of pixels without objects below which noise is taken as white."""

MIN_SIGNIFICANCE = 5.0
"""Significance that the largest correlation must have."""


def measure_noise_correlation(
    image: np.ndarray, variance: np.ndarray, empty: np.ndarray, *, reach: int = 3
) -> np.ndarray | None:
    """Return the correlation of the noise of two pixels by their distance.

    Parameters
    ----------
    image, variance
        Pixel values and their variances, shape ``(y, x)``.
    empty
        Which pixels are good and have no object in them, bool.
    reach
        Largest distance along an axis in pixels.

    Returns
    -------
    correlation
        With zero distance at the centre, where it is one, shape
        ``(2 reach + 1, 2 reach + 1)``; `None` if it is that of white noise,
        or if there are fewer than `MIN_PIXELS` pixels to tell.

    Notes
    -----
    Objects too faint to be detected count as noise, as they do when shapes
    are measured.
    """
    n = int(empty.sum())
    if n < MIN_PIXELS:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.where(empty, image / np.sqrt(variance), np.nan)
    low, median, high = np.nanquantile(scaled, (0.159, 0.5, 0.841))
    # Outliers are objects or artefacts.
    scaled = scaled - median
    scaled[np.abs(scaled) > 2.5 * (high - low)] = np.nan
    known = np.isfinite(scaled)
    scaled[~known] = 0.0
    correlation = np.zeros((2 * reach + 1,) * 2)
    for dy in range(reach + 1):
        for dx in range(-reach, reach + 1):
            here = (slice(dy, None), slice(max(dx, 0), scaled.shape[1] + min(dx, 0)))
            there = (slice(None, scaled.shape[0] - dy), slice(max(-dx, 0), scaled.shape[1] - max(dx, 0)))
            pairs = (known[here] & known[there]).sum()
            value = (scaled[here] * scaled[there]).sum() / max(pairs, 1)
            correlation[reach + dy, reach + dx] = correlation[reach - dy, reach - dx] = value
    correlation /= correlation[reach, reach]
    others = np.delete(correlation.ravel(), correlation.size // 2)
    return correlation if np.abs(others).max() > MIN_SIGNIFICANCE / np.sqrt(n) else None

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


"""Images of galaxies between their Fourier transform and a grid of pixels.

Grids have an even number of pixels S on a side, and the origin at pixel S / 2
of both axes.  Transforms are those of `numpy.fft.rfft2` with the phase of
that origin taken out, shape ``(S, S / 2 + 1)``; their Nyquist frequencies,
which a real image cannot shift, are zero.  So an image sampled on a finer
grid comes to a coarser one by leaving out the frequencies that it lacks:
nothing is aliased, and noise stays independent from mode to mode.
"""

from __future__ import annotations

__all__ = (
    "compute_noise_power",
    "compute_transform",
    "draw_noise",
    "draw_transform",
    "invert_transform",
    "make_gaussian_transform",
    "make_mode_weights",
    "truncate_transform",
)

import math

import galsim
import numpy as np


def compute_transform(image: np.ndarray) -> np.ndarray:
    """Return the transform of an image whose origin is at pixel S / 2.

    Parameters
    ----------
    image
        Flux in each pixel, shape ``(..., S, S)``, S even.

    Returns
    -------
    transform
        Shape ``(..., S, S / 2 + 1)``; its first element is the flux.
    """
    transform = np.fft.rfft2(np.fft.ifftshift(image, axes=(-2, -1)))
    return _drop_nyquist(transform)


def invert_transform(transform: np.ndarray) -> np.ndarray:
    """Return the image of a transform.

    Parameters
    ----------
    transform
        Shape ``(..., S, S / 2 + 1)``.

    Returns
    -------
    image
        Flux in each pixel, shape ``(..., S, S)``, origin at S / 2.
    """
    size = transform.shape[-2]
    return np.fft.fftshift(np.fft.irfft2(transform, s=(size, size)), axes=(-2, -1))


def draw_transform(profile: galsim.GSObject, *, size: int, pixel_scale: float) -> np.ndarray:
    """Return the transform of a profile at the frequencies of a grid.

    The profile is not convolved with a pixel.

    Parameters
    ----------
    profile
        A light profile, its centre at the origin.
    size
        Even number of pixels S on a side.
    pixel_scale
        Side of a pixel in arcsec.

    Returns
    -------
    transform
        Shape ``(S, S / 2 + 1)``.
    """
    _check_even(size)
    half = size // 2
    image = galsim.ImageCD(galsim.BoundsI(0, half, -half, half - 1))
    profile.drawKImage(image=image, scale=2 * math.pi / (size * pixel_scale), recenter=False)
    return _drop_nyquist(np.fft.ifftshift(image.array, axes=0))


def truncate_transform(transform: np.ndarray, size: int) -> np.ndarray:
    """Return the transform of the same image on a grid of larger pixels.

    Parameters
    ----------
    transform
        Shape ``(..., S, S / 2 + 1)``.
    size
        Even number of pixels on a side of the new grid, at most S.
    """
    _check_even(size)
    half = size // 2
    low = np.concatenate([transform[..., :half, : half + 1], transform[..., -half:, : half + 1]], axis=-2)
    return _drop_nyquist(low)


def make_gaussian_transform(fwhm: float, *, size: int, pixel_scale: float) -> np.ndarray:
    """Return the transform of a round Gaussian of unit flux.

    Parameters
    ----------
    fwhm
        Full width at half maximum in arcsec; 0 is a point.
    size
        Even number of pixels on a side.
    pixel_scale
        Side of a pixel in arcsec.
    """
    sigma = fwhm / (2 * math.sqrt(2 * math.log(2)))
    ky = 2 * math.pi * np.fft.fftfreq(size, pixel_scale)[:, None]
    kx = 2 * math.pi * np.fft.rfftfreq(size, pixel_scale)
    return _drop_nyquist(np.exp(-0.5 * (kx**2 + ky**2) * sigma**2))


def make_mode_weights(size: int) -> np.ndarray:
    """Return how many modes of a real image each element stands for.

    Parameters
    ----------
    size
        Even number of pixels S on a side.

    Returns
    -------
    weights
        2, 1 where the conjugate is also in the array, and 0 at the Nyquist
        frequencies; shape ``(S, S / 2 + 1)``.
    """
    weights = np.full((size, size // 2 + 1), 2.0)
    weights[:, 0] = 1.0
    return _drop_nyquist(weights)


def compute_noise_power(correlation: np.ndarray | None, size: int) -> np.ndarray:
    r"""Return the power of noise in each mode for unit variance in a pixel.

    Parameters
    ----------
    correlation
        Correlation of two pixels by their distance along y and x, zero
        distance at the centre, odd sides; `None` for white noise.
    size
        Even number of pixels S on a side.

    Returns
    -------
    power
        Expectation of :math:`|n_k|^2 / S^2`, shape ``(S, S / 2 + 1)``; 1 for
        white noise.  Correlations measured on a finite image may give some
        modes less than none: they get one thousandth of the mean.
    """
    _check_even(size)
    if correlation is None:
        return np.ones((size, size // 2 + 1))
    correlation = np.asarray(correlation, dtype=np.float64)
    reach = min(correlation.shape[0] // 2, size // 2 - 1)
    center = correlation.shape[0] // 2
    inside = slice(center - reach, center + reach + 1)
    grid = np.zeros((size, size))
    grid[size // 2 - reach : size // 2 + reach + 1, size // 2 - reach : size // 2 + reach + 1] = correlation[
        inside, inside
    ]
    power = np.fft.rfft2(np.fft.ifftshift(grid / correlation[center, center])).real
    return np.maximum(power, 1e-3)


def draw_noise(power: np.ndarray, rng: np.random.Generator, n: int | None = None) -> np.ndarray:
    """Return images of Gaussian noise.

    Parameters
    ----------
    power
        Power in each mode as of `compute_noise_power`, shape
        ``(S, S / 2 + 1)``.
    rng
        Source of random numbers.
    n
        Number of images; `None` for one without that axis.
    """
    size = power.shape[-2]
    white = rng.standard_normal((size, size) if n is None else (n, size, size))
    return invert_transform(_drop_nyquist(np.fft.rfft2(white)) * np.sqrt(power))


def _drop_nyquist(transform: np.ndarray) -> np.ndarray:
    """Set the Nyquist frequencies of both axes to zero."""
    half = transform.shape[-2] // 2
    transform = np.array(transform)
    transform[..., half, :] = 0
    transform[..., half] = 0
    return transform


def _check_even(size: int) -> None:
    if size < 4 or size % 2:
        raise ValueError(f"A grid has an even number of pixels on a side, at least 4, not {size}.")

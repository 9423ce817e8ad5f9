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


r"""Drawing many galaxies under a shear and a PSF, as matrix products.

A galaxy is given by the pixels of a fine image I, which is band limited.
Sheared by S, with a PSF P, it has at the points X the brightness

.. math::
    \sum_k \left(\frac{\delta k}{2 \pi}\right)^2 P(k)
        \sum_x I(x) \, e^{-i (S k) \cdot x} \, e^{i k \cdot X}
    \quad S = \frac{1}{\sqrt{1 - g^2}}
        \begin{pmatrix} 1 + g_1 & g_2 \\ g_2 & 1 - g_1 \end{pmatrix} ,

which GalSim gets by interpolating a Fourier transform.  Here the sums are
done as they stand, one axis after the other, on modes k that lie on a grid
which is slanted so that both sums factorise: nothing is interpolated, and all
of it is products with small matrices.
"""

from __future__ import annotations

__all__ = ("FineImages", "Renderer", "draw_with_kernels")

import dataclasses
import math
from collections.abc import Sequence

import galsim
import numpy as np
import torch
from torch import Tensor

# PSFs are taken to be zero where they are below this share of their maximum.
_NEGLIGIBLE = 1e-4

# That share beyond the Nyquist frequency of the stamps, where PSFs made from
# pixels have what their interpolation adds.
_ARTEFACT = 3e-4

# Images that a processor draws at once.
_BATCH_SIZE = 32

# For the images that all else is drawn from.
_ACCURATE = galsim.GSParams(folding_threshold=1e-3, maxk_threshold=1e-4, maximum_fft_size=16384)


@dataclasses.dataclass(frozen=True, eq=False)
class FineImages:
    """Galaxies as band-limited images, from which they are drawn."""

    array: np.ndarray
    """Images centred on a pixel, float32, shape ``(N, y, x)``; their side is
    odd."""

    pixel_scale: float
    """Side of a pixel in arcsec."""

    psf: galsim.GSObject | None = None
    """What the images are convolved with, which drawing takes out; `None` if
    with nothing."""

    def __post_init__(self) -> None:
        shape = np.shape(self.array)
        if len(shape) != 3 or shape[1] != shape[2] or shape[1] % 2 == 0:
            raise ValueError(f"Images are (N, y, x) with equal odd sides, not {shape}.")

    def __len__(self) -> int:
        return len(self.array)

    def rotate(self, turns: int) -> FineImages:
        """Return the galaxies turned counter-clockwise by 90 degrees.

        Parameters
        ----------
        turns
            How often to turn.
        """
        # From rows up, which is how pixels lie on the sky here, y is axis 1.
        return dataclasses.replace(self, array=np.rot90(self.array, turns, axes=(2, 1)))

    def mirror(self) -> FineImages:
        """Return the galaxies with x and minus x exchanged."""
        return dataclasses.replace(self, array=self.array[..., ::-1])

    @classmethod
    def from_profiles(
        cls,
        profiles: Sequence[galsim.GSObject],
        *,
        size: int = 81,
        pixel_scale: float = 0.15,
        fwhm: float = 0.4,
    ) -> FineImages:
        """Draw profiles by GalSim, once.

        Parameters
        ----------
        profiles
            Galaxies around the origin.
        size
            Odd number of pixels on a side.  What lies beyond is cut off:
            before any shear, so that it does no harm to its measurement.
        pixel_scale
            Side of a pixel in arcsec.
        fwhm
            Width in arcsec of the Gaussian that the images are smoothed with,
            so that pixels sample them.

        Notes
        -----
        The defaults hold what a PSF wider than 0.5 arcsec lets through.
        """
        smoothing = galsim.Gaussian(fwhm=fwhm)
        array = np.empty((len(profiles), size, size), dtype=np.float32)
        for image, profile in zip(array, profiles, strict=True):
            drawn = galsim.Convolve(profile, smoothing, gsparams=_ACCURATE).drawImage(
                nx=size, ny=size, scale=pixel_scale, method="no_pixel", dtype=np.float64
            )
            image[:] = drawn.array
        return cls(array, pixel_scale, smoothing)


class Renderer:
    """Draws images under one shear and one PSF.

    Parameters
    ----------
    psf
        The PSF, with the response of the pixel in it.
    images
        Galaxies of the kind that will be drawn: their size, pixels and
        smoothing count.
    size
        Side of the drawn stamps in pixels; odd.
    pixel_scale
        Side of these pixels in arcsec.
    shear
        Shear (g1, g2) of the galaxies.
    interpolant
        What is between the pixels of the images; by default they are band
        limited.
    device
        Device of torch.
    dtype
        Arithmetic; single precision is good to 1e-6 of the peak.

    Raises
    ------
    ValueError
        Raised if the side is not odd, or if the shear is not below 1.

    Notes
    -----
    GalSim draws an ``InterpolatedImage`` with the interpolant of its own to
    2e-4 of the peak the same; most of the difference is that of GalSim with
    itself at higher accuracy.
    """

    def __init__(
        self,
        psf: galsim.GSObject,
        images: FineImages,
        *,
        size: int,
        pixel_scale: float,
        shear: Sequence[float] = (0.0, 0.0),
        interpolant: galsim.Interpolant | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if size < 1 or size % 2 == 0:
            raise ValueError(f"Stamps have an odd number of pixels on a side, not {size}.")
        g1, g2 = shear
        if not math.hypot(g1, g2) < 1:
            raise ValueError(f"A shear is smaller than 1, not ({g1}, {g2}).")
        self._kind = _describe(images)
        self._device, self._dtype = torch.device(device), dtype
        self._batch_size = _BATCH_SIZE if self._device.type == "cpu" else 4096
        norm = 1 / math.sqrt(1 - g1**2 - g2**2)
        a, b = norm * (1 + g1), norm * g2
        x = _make_axis(images.array.shape[1], images.pixel_scale)
        points = _make_axis(size, pixel_scale)
        # Images of the galaxy in neighbouring periods do not overlap.
        dk = 2 * math.pi / (size * pixel_scale + len(x) * images.pixel_scale)
        n = _find_last_mode(psf, dk, math.pi / pixel_scale)
        # Modes kx = u - slant * ky, ky: with (b, 1 - g1) the second row of S,
        # S k = (a u, b u + ky / a), as its determinant is 1.
        slant = b / a
        u, ky = dk * np.arange(-n, n + 1), dk * np.arange(n + 1)
        transfer = _draw_modes(psf, dk, n, (1.0, 0.0, -slant, 1.0))  # (u, ky)
        kx, ky_image = a * u[:, None], b * u[:, None] + ky / a
        if images.psf is not None:
            known = _draw_modes(images.psf, dk, n, (a, b, 0.0, 1 / a))
            usable = np.abs(known) > _NEGLIGIBLE * images.psf.flux
            transfer = np.where(usable, transfer / np.where(usable, known, 1.0), 0.0)
        if interpolant is not None:
            transfer = transfer * _evaluate(interpolant, images.pixel_scale * kx)
            transfer = transfer * _evaluate(interpolant, images.pixel_scale * ky_image)
        # Beyond its Nyquist frequency the image has no modes.
        if interpolant is None:
            nyquist = math.pi / images.pixel_scale
            transfer = np.where(np.maximum(np.abs(kx), np.abs(ky_image)) < nyquist, transfer, 0.0)
        # A mode and its conjugate in the other half of the plane; surface
        # brightness becomes flux in a pixel.
        transfer[:, 1:] *= 2
        transfer = transfer * (dk / (2 * math.pi) * pixel_scale) ** 2
        self._to_u = self._to_real(np.exp(-1j * np.outer(x, a * u)))  # (x, 2 u)
        self._slant_image = self._to_complex(np.exp(-1j * np.outer(x, b * u)))  # (y, u)
        self._to_ky = self._to_complex(np.exp(-1j * np.outer(x, ky / a)))  # (y, ky)
        self._transfer = self._to_complex(transfer)
        self._from_u = self._to_complex(np.exp(1j * np.outer(u, points)))  # (u, X)
        self._slant_stamp = self._to_complex(np.exp(-1j * slant * np.outer(ky, points)))  # (ky, X)
        # The real part is taken by a product of real matrices.
        self._from_ky = self._to_real(np.exp(-1j * np.outer(points, ky))).T.contiguous()  # (2 ky, Y)
        self._is_slanted = b != 0
        self._modes_x = self._to_complex(1j * u)
        self._modes_y = self._to_complex(1j * ky)
        self._slant = slant

    def draw(self, images: FineImages, *, offset: np.ndarray | None = None) -> np.ndarray:
        """Draw galaxies.

        Parameters
        ----------
        images
            Galaxies, of the kind that the renderer was made for.
        offset
            Positions (x, y) from the centre of the stamps in arcsec, after
            the shear, shape ``(N, 2)``.

        Returns
        -------
        stamps
            Flux in each pixel in the units of the sum of the pixels of an
            image, float32, shape ``(N, y, x)``.

        Raises
        ------
        ValueError
            Raised if the images have another size, pixel scale or smoothing.
        """
        if (kind := _describe(images)) != self._kind:
            raise ValueError(f"This renderer is for {self._kind}, not for {kind}.")
        parts = []
        shifts = None if offset is None else np.asarray(offset, dtype=np.float64)
        for start in range(0, len(images), self._batch_size):
            batch = slice(start, start + self._batch_size)
            array = np.ascontiguousarray(images.array[batch])
            pixels = torch.as_tensor(array, dtype=self._dtype, device=self._device)
            parts.append(self._draw(pixels, None if shifts is None else shifts[batch]).cpu().numpy())
        size = self._from_u.shape[1]
        return np.concatenate(parts) if parts else np.empty((0, size, size), dtype=np.float32)

    def _draw(self, pixels: Tensor, shifts: np.ndarray | None) -> Tensor:
        """Return stamps ``(N, y, x)``."""
        n, side, _ = pixels.shape
        modes = torch.view_as_complex((pixels @ self._to_u).unflatten(2, (-1, 2)))  # (N, y, u)
        if self._is_slanted:
            modes = modes * self._slant_image
        modes = modes.transpose(1, 2) @ self._to_ky  # (N, u, ky)
        modes *= self._transfer
        if shifts is not None:
            dx, dy = torch.as_tensor(shifts, dtype=self._dtype, device=self._device).T[..., None]
            modes *= torch.exp(-dx * self._modes_x)[:, :, None]
            modes *= torch.exp((self._slant * dx - dy) * self._modes_y)[:, None, :]
        modes = modes.transpose(1, 2) @ self._from_u  # (N, ky, X)
        if self._is_slanted:
            modes *= self._slant_stamp
        real = torch.view_as_real(modes.transpose(1, 2).contiguous()).flatten(2)  # (N, X, 2 ky)
        return (real @ self._from_ky).transpose(1, 2).contiguous().to(torch.float32)

    def _to_complex(self, array: np.ndarray) -> Tensor:
        dtype = torch.complex64 if self._dtype == torch.float32 else torch.complex128
        return torch.as_tensor(array, dtype=dtype, device=self._device)

    def _to_real(self, array: np.ndarray) -> Tensor:
        """Return complex columns as real and imaginary ones, in turn."""
        return torch.view_as_real(self._to_complex(array)).flatten(1)


def draw_with_kernels(
    images: FineImages, kernels: np.ndarray, *, size: int, pixel_scale: float
) -> np.ndarray:
    """Draw galaxies, each with a PSF of its own that is known in pixels.

    Parameters
    ----------
    images
        The galaxies, without smoothing that is to be taken out.
    kernels
        PSFs with the response of the pixel, sampled at the pixels of the
        stamps, centred where the galaxies shall be, shape ``(N, y, x)`` with
        odd sides.  Each is scaled to a sum of 1.
    size
        Side of the drawn stamps in pixels; odd.
    pixel_scale
        Side of these pixels in arcsec.

    Returns
    -------
    stamps
        Flux in each pixel, float32, shape ``(N, size, size)``.

    Notes
    -----
    A PSF that pixels sample well has nothing beyond their Nyquist frequency,
    so that the product of the transforms up to there is the image, to 1e-5 of
    the peak.  Interpolating the kernel, as a GalSim ``InterpolatedImage``
    does, costs some 1e-3 of the peak at 0.2 arcsec and 0.7 arcsec seeing.
    """
    side, reach = images.array.shape[1], kernels.shape[-1]
    # Galaxies of neighbouring periods stay outside of the stamp.
    period = 0.5 * (side * images.pixel_scale + (size + reach) * pixel_scale)
    n = math.ceil(0.5 * period / pixel_scale) - 1
    k = 2 * math.pi / period * np.arange(-n, n + 1)
    points = _make_axis(size, pixel_scale)
    of_images = _make_waves(_make_axis(side, images.pixel_scale), k)
    of_kernels = _make_waves(_make_axis(reach, pixel_scale), k)
    to_y = torch.as_tensor(np.exp(1j * np.outer(k, points)), dtype=torch.complex64)  # (ky, Y)
    # A mode and its conjugate in the other half of the plane; surface
    # brightness becomes flux in a pixel.
    weight = (pixel_scale / period) ** 2 * np.where(k[n:] > 0, 2.0, 1.0)
    to_x = _split_columns(weight * np.exp(-1j * np.outer(points, k[n:]))).T.contiguous()  # (2 kx, X)
    normal = kernels / kernels.sum(axis=(1, 2), keepdims=True)
    stamps = np.empty((len(images), size, size), dtype=np.float32)
    for start in range(0, len(images), _BATCH_SIZE):
        batch = slice(start, start + _BATCH_SIZE)
        modes = _compute_modes(images.array[batch], *of_images) * _compute_modes(normal[batch], *of_kernels)
        rows = (modes @ to_y).transpose(1, 2).contiguous()  # (N, Y, kx)
        stamps[batch] = (torch.view_as_real(rows).flatten(2) @ to_x).numpy()
    return stamps


def _make_waves(x: np.ndarray, k: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return what makes modes of pixels at ``x``: for the columns, whose
    modes are not negative, shape ``(x, 2 kx)``, and for the rows.
    """
    waves = np.exp(-1j * np.outer(x, k))
    return _split_columns(waves[:, len(k) // 2 :]), torch.as_tensor(waves, dtype=torch.complex64)


def _split_columns(array: np.ndarray) -> Tensor:
    """Return complex columns as real and imaginary ones, in turn."""
    return torch.view_as_real(torch.as_tensor(array, dtype=torch.complex64)).flatten(1)


def _compute_modes(array: np.ndarray, columns: Tensor, rows: Tensor) -> Tensor:
    """Return the modes of images, shape ``(N, kx, ky)``."""
    pixels = torch.as_tensor(np.ascontiguousarray(array), dtype=torch.float32)
    half = torch.view_as_complex((pixels @ columns).unflatten(2, (-1, 2)))  # (N, y, kx)
    return half.transpose(1, 2) @ rows


def _make_axis(size: int, scale: float) -> np.ndarray:
    """Return coordinates of pixels from the centre."""
    return (np.arange(size) - size // 2) * scale


def _find_last_mode(psf: galsim.GSObject, dk: float, nyquist: float) -> int:
    """Return up to which multiple of dk along the axes the PSF counts."""
    n = math.ceil(2.5 * psf.maxk / dk)
    limit = np.where(np.abs(dk * np.arange(-n, n + 1)) > nyquist, _ARTEFACT, _NEGLIGIBLE) * psf.flux
    last = 1
    for nx, ny in ((2 * n + 1, 1), (1, 2 * n + 1)):
        along = np.abs(psf.drawKImage(nx=nx, ny=ny, scale=dk).array.ravel())
        last = max(last, int(np.abs(np.flatnonzero(along > limit) - n).max(initial=1)))
    return last


def _draw_modes(
    profile: galsim.GSObject, dk: float, n: int, matrix: tuple[float, float, float, float]
) -> np.ndarray:
    """Return the Fourier transform of a profile at modes of a slanted grid,
    which the transpose of a matrix makes of a square one; shape ``(u, ky)``.
    """
    image = galsim.ImageCD(galsim.BoundsI(-n, n, 0, n))
    drawn = profile.transform(*matrix).drawKImage(image=image, scale=dk, recenter=False)
    values: np.ndarray = drawn.array.T
    return values.copy()


def _describe(images: FineImages) -> str:
    """Return what a renderer must know of images."""
    size = images.array.shape[1]
    return f"images of {size} x {size} pixels of {images.pixel_scale} arcsec convolved with {images.psf!r}"


def _evaluate(interpolant: galsim.Interpolant, k: np.ndarray) -> np.ndarray:
    """Return the Fourier transform of an interpolant."""
    values: np.ndarray = interpolant.kval(k.ravel() if k.size else k)
    return np.asarray(values).reshape(k.shape)

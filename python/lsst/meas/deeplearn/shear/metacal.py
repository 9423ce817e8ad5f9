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

r"""Metacalibration of Gaussian-weighted moments, as a matrix product.

Metacalibration (Huff & Mandelbaum 2017, arXiv:1702.02600; Sheldon & Huff
2017, arXiv:1702.02601) deconvolves an image from its PSF, shears it, convolves
it with a wider PSF, and measures it again.  If the measurement is a set of
moments with a fixed weight, all of this is linear in the pixels.  With I, P
and T the Fourier transforms of the image, its PSF and the new PSF, and F that
of the weight times a polynomial in x and y, a moment is

.. math::
    M = \int \frac{d^2 k}{(2 \pi)^2}
        F^*(S^{-T} k) \, T(S^{-T} k) \, \frac{I(k)}{P(k)},
    \quad S = \frac{1}{\sqrt{1 - g^2}}
        \begin{pmatrix} 1 + g_1 & g_2 \\ g_2 & 1 - g_1 \end{pmatrix} .

So moments under several shears are sums over pixels or Fourier modes.  A
Gaussian weight keeps F and T analytic: nothing is ever interpolated.
"""

from __future__ import annotations

__all__ = ("MOMENTS", "THIRD_MOMENTS", "Metacalibration", "compute_target_fwhm")

import math

import numpy as np
import torch
from torch import Tensor

from .shapes import STEPS, Shapes

MOMENTS = ("0", "x", "y", "xx-yy", "2xy", "xx+yy")
"""The polynomials of the moments, in the order of the arrays."""

THIRD_MOMENTS = ("xxx", "xxy", "xyy", "yyy")
"""Those that are taken without shear only, to find how moments change as the
object moves.
"""

MAX_AMPLIFICATION = 2.0
"""Largest ratio of the new PSF to the old one at any Fourier mode.

A Moffat PSF reaches 1.5 if the new one is 7% wider, and 2.1 if it is 6%
narrower.
"""

MAX_NYQUIST = 0.05
"""Largest PSF amplitude at the Nyquist frequency that counts as sampled.

A Gaussian has 0.03 with a FWHM of 2 pixels and 0.13 with one of 1.5.
"""

CENTROID_SNR = 3.0
"""Signal to noise below which moments are not taken about the centroid."""

SHIFT_SNR = 10.0
"""Signal to noise below which the artificial shear is more about the centre
of the stamp than about a noisy centroid.
"""

_FWHM = math.sqrt(8 * math.log(2))

# Kernels are zero where they are below this share of their maximum.
_NEGLIGIBLE = 1e-6

_N_SHEARED = len(STEPS) * len(MOMENTS)

# Moments whose filters are real and imaginary.
_EVEN = [first + m for first in range(0, _N_SHEARED, len(MOMENTS)) for m in (0, 3, 4, 5)]
_ODD = [first + m for first in range(0, _N_SHEARED, len(MOMENTS)) for m in (1, 2)] + [30, 31, 32, 33]

# What turning a stamp back, after torch.rot90, makes of its moments.
_ROTATED_FROM = [first + m for first in range(0, _N_SHEARED, len(MOMENTS)) for m in (0, 2, 1, 3, 4, 5)]
_ROTATED_FROM += [33, 32, 31, 30]
_ROTATED_SIGN = np.array(len(STEPS) * [1.0, -1.0, 1.0, -1.0, -1.0, 1.0] + [-1.0, 1.0, -1.0, 1.0])

# Pairs of moments whose covariance is needed: of the flux with itself, and of
# x and y with all moments of odd order.
_PAIRS = np.array([(0, 0), (1, 1), (1, 2), (2, 2), *((i, j) for i in (1, 2) for j in (30, 31, 32, 33))])


class Metacalibration:
    r"""Shapes of stamps and their response to shear, by metacalibration.

    Parameters
    ----------
    pixel_scale
        Side of a pixel in arcsec.
    stamp_size
        Odd side of the stamps in pixels.
    target_fwhm
        Width in arcsec of the Gaussian PSF that images are brought to; it
        must be somewhat wider than the PSF, see `compute_target_fwhm`.
    weight_fwhm
        Width in arcsec of the Gaussian weight.
    step
        Size of the artificial shear.
    regularization
        What is added to the flux in the denominator of the ellipticity, in
        units of the noise of the flux.
    weight_snr
        Signal to noise at which the weight of an object is one half; 0 gives
        weights of one.
    device
        Device of torch.
    dtype
        Arithmetic of the sums over pixels; `torch.float32` and
        `torch.float64` agree to 1e-6 in the response.

    Raises
    ------
    ValueError
        Raised if a parameter is out of its range.

    Notes
    -----
    The ellipticity is

    .. math::
        e_1 = \frac{M_{xx-yy} - (M_x^2 - M_y^2) / M_0}{\sigma_w^2 D}, \quad
        e_2 = \frac{M_{2xy} - 2 M_x M_y / M_0}{\sigma_w^2 D}, \quad
        D = M_0 + r \, \sigma(M_0),

    for a weight of standard deviation :math:`\sigma_w`.  The weight stays at
    the centre of the stamp, but moments are taken about the weighted mean
    position, which for a Gaussian object removes the effect of being off the
    centre.

    Where an object is in its stamp does not depend on its shear, because
    stamps are cut around objects.  The artificial shear must leave it there
    too: it is a shear about the centroid, by the first order of a shift.
    Without that, m would be -1e-3 for objects anywhere in the central pixel.
    What the noise of the centroid and that of the moments do together is
    taken out, for white noise.

    The regulariser r keeps faint objects from blowing up: the flux is the
    best measured of all moments, where the size often comes out as zero.
    """

    def __init__(
        self,
        *,
        pixel_scale: float,
        stamp_size: int,
        target_fwhm: float,
        weight_fwhm: float = 1.2,
        step: float = 0.01,
        regularization: float = 10.0,
        weight_snr: float = 0.0,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if stamp_size < 1 or stamp_size % 2 == 0:
            raise ValueError(f"Stamps have an odd number of pixels on a side, not {stamp_size}.")
        if min(pixel_scale, target_fwhm, weight_fwhm, step) <= 0 or min(regularization, weight_snr) < 0:
            raise ValueError("Widths and the step must be positive, regularization and weight_snr too or 0.")
        self.pixel_scale = pixel_scale
        self.stamp_size = stamp_size
        self.target_fwhm = target_fwhm
        self.weight_fwhm = weight_fwhm
        self.step = step
        self.regularization = regularization
        self.weight_snr = weight_snr
        self._device = torch.device(device)
        self._dtype = dtype
        # As much as the cache of a core holds; a GPU wants more.
        self._batch_size = 128 if self._device.type == "cpu" else 16384
        self._grid_size = _find_fast_size(stamp_size)
        k = 2 * np.pi * np.fft.fftfreq(self._grid_size, d=pixel_scale)
        # Half of the plane: the other one is conjugate.
        filters = self._make_filters(*np.meshgrid(k[: self._grid_size // 2], k))  # (34, y, x)
        peak = np.abs(filters).max(axis=(1, 2), keepdims=True)
        used = (np.abs(filters) > _NEGLIGIBLE * peak).any(axis=(0, 1))
        # All that follows is about the modes up to some k along x and y.
        self._n_modes = int(np.flatnonzero(used)[-1]) + 1
        self._filters = filters[:, self._rows, : self._n_modes]
        self._k2 = k[: self._n_modes] ** 2 + k[self._rows, None] ** 2  # (y, x)

    def compute_moments(self, images: np.ndarray, psf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the moments of stamps under all artificial shears.

        Parameters
        ----------
        images
            Stamps, shape ``(N, y, x)``.
        psf
            Image of a star centred on a pixel, with the response of the
            pixel in it: one for all stamps, shape ``(y, x)``, or one each,
            shape ``(N, y, x)``.  Its odd side is at most that of the stamps.

        Returns
        -------
        moments
            Moments in flux times arcsec to the power of their order,
            float64, shape ``(N, 34)``: `MOMENTS` for each of `STEPS`, sheared
            about the centre of the stamp, then `THIRD_MOMENTS`.  NaN for a
            PSF of its own that is not usable.
        noise
            Covariances of moments for white noise of one in each pixel, of
            which the first is the variance of the flux; shape ``(12,)`` or
            ``(N, 12)``.

        Raises
        ------
        ValueError
            Raised if a shape does not fit, or if the one PSF is undersampled
            or too wide.
        """
        moments, noise = self._compute_moments(self._to_tensor(images), psf)
        return moments.cpu().numpy(), noise.cpu().numpy()

    def measure(
        self,
        images: np.ndarray,
        psf: np.ndarray,
        *,
        noise_sigma: np.ndarray | float = 0.0,
        fixnoise: np.ndarray | None = None,
    ) -> Shapes:
        """Return the shapes of stamps.

        Parameters
        ----------
        images, psf
            As for `compute_moments`.
        noise_sigma
            Standard deviation of the noise in a pixel, one for all stamps or
            shape ``(N,)``.
        fixnoise
            Another realisation of the noise of each stamp, shape
            ``(N, y, x)``.  It is sheared in a frame that is turned by 90
            degrees and added, so that the noise as a whole does not respond
            to the artificial shear (Sheldon & Huff 2017, section 2.3).
            Without it the response is wrong by up to a percent.

        Raises
        ------
        ValueError
            Raised as by `compute_moments`.
        """
        moments, noise = self._compute_moments(self._to_tensor(images), psf)
        if fixnoise is not None:
            more, more_noise = self._compute_moments(self._to_tensor(fixnoise), psf, turned=True)
            moments += more
            noise = _add_noise(noise, more_noise)
        sigma = torch.as_tensor(np.asarray(noise_sigma, dtype=np.float64), device=self._device)
        return self._compute_shapes(moments, noise * sigma[..., None] ** 2)

    def compute_shapes(self, moments: np.ndarray, noise: np.ndarray) -> Shapes:
        """Return the shapes that follow from moments.

        Parameters
        ----------
        moments
            Moments as from `compute_moments`, shape ``(N, 34)``.
        noise
            Their covariances as from `compute_moments`, times the variance of
            the noise in a pixel, shape ``(12,)`` or ``(N, 12)``.
        """
        tensors = (torch.as_tensor(array, device=self._device) for array in (moments, noise))
        return self._compute_shapes(*tensors)

    def compute_moment_covariance(self, psf: np.ndarray, *, fixnoise: bool = True) -> np.ndarray:
        """Return the covariance of the moments of white noise.

        Moments are linear, so that those of a noisy stamp are those of the
        noiseless one and a draw from this Gaussian distribution; see
        `draw_noise_moments`.

        Parameters
        ----------
        psf
            The PSF, shape ``(y, x)``.
        fixnoise
            Whether to include that of the noise that is added to keep the
            response right.

        Returns
        -------
        covariance
            For noise of one in each pixel, float64, shape ``(34, 34)``.
        """
        kernels = self.make_kernels(psf).reshape(len(self._filters), -1)
        covariance: np.ndarray = kernels @ kernels.T
        if fixnoise:
            turned = kernels[_ROTATED_FROM] * _ROTATED_SIGN[:, None]
            covariance += turned @ turned.T
        return covariance

    def draw_noise_moments(
        self, psf: np.ndarray, normal: np.ndarray, *, fixnoise: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return moments of white noise that never was an image.

        Parameters
        ----------
        psf
            The PSF, shape ``(y, x)``.
        normal
            Standard normal numbers, shape ``(..., 34)``.
        fixnoise
            As for `compute_moment_covariance`.

        Returns
        -------
        moments
            For noise of one in each pixel, of the same shape as ``normal``.
        noise
            The covariances that `compute_shapes` wants, shape ``(12,)``.
        """
        covariance = self.compute_moment_covariance(psf, fixnoise=fixnoise)
        eigenvalues, vectors = np.linalg.eigh(covariance)
        moments: np.ndarray = normal @ (vectors * np.sqrt(np.clip(eigenvalues, 0.0, None))).T
        noise = covariance[tuple(_PAIRS.T)]
        if fixnoise:
            noise[0] /= 2  # Both halves are equal, and only one is in the image.
        return moments, noise

    def make_kernels(self, psf: np.ndarray) -> np.ndarray:
        """Return the images whose products with a stamp are its moments.

        Parameters
        ----------
        psf
            The PSF, shape ``(y, x)``.

        Returns
        -------
        kernels
            Float64, shape ``(34, y, x)``.

        Raises
        ------
        ValueError
            Raised as by `compute_moments`.
        """
        basis = self._make_basis(psf)
        kernels = self._add_differences(torch.as_tensor(basis.reshape(len(basis), -1).T.copy()))
        return kernels.numpy().T.reshape(basis.shape)

    def _make_filters(self, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
        """Return what multiplies the modes of a deconvolved stamp.

        The last four shears are differences from the first in units of the
        step, so that rounding errors cancel in the response.  Moments of
        odd order are imaginary; their imaginary part is returned.
        """
        weight_var, target_var = (self.weight_fwhm / _FWHM) ** 2, (self.target_fwhm / _FWHM) ** 2
        filters = []
        for g1, g2 in np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]) * self.step:
            # The inverse of the shear matrix; it is symmetric.
            norm = 1 / math.sqrt(1 - g1**2 - g2**2)
            qx, qy = norm * ((1 - g1) * kx - g2 * ky), norm * ((1 + g1) * ky - g2 * kx)
            gauss = 2 * np.pi * weight_var * np.exp(-0.5 * (weight_var + target_var) * (qx**2 + qy**2))
            xx, yy = (weight_var * (1 - weight_var * q**2) for q in (qx, qy))
            polynomials = [np.ones_like(qx), weight_var * qx, weight_var * qy]
            polynomials += [xx - yy, -2 * weight_var**2 * qx * qy, xx + yy]
            filters.append(gauss * np.stack(polynomials))
        basis = np.stack(filters)
        basis[1:] = (basis[1:] - basis[:1]) / self.step
        third = [
            weight_var**2 * (3 * kx - weight_var * kx**3),
            weight_var**2 * (ky - weight_var * kx**2 * ky),
            weight_var**2 * (kx - weight_var * kx * ky**2),
            weight_var**2 * (3 * ky - weight_var * ky**3),
        ]
        # The Gaussian without shear is the first filter.
        joined = np.concatenate([basis.reshape(-1, *kx.shape), basis[0, 0] * np.stack(third)])
        # d^2 k / (2 pi)^2 for the modes of the stamp.
        return joined / (self._grid_size * self.pixel_scale) ** 2

    def _make_basis(self, psf: np.ndarray) -> np.ndarray:
        """Return the kernels of the moments and of their differences."""
        size = self._grid_size
        self._check_size(psf)
        kernel = torch.as_tensor(np.asarray(psf, dtype=np.float64), device=self._device)
        modes, edge = self._transform(kernel[None], self._make_grid(1, torch.float64))
        if message := self._find_fault(_compute_power(modes), edge)[1]:
            raise ValueError(message)
        low = modes.cpu().numpy().reshape(self._k2.shape)
        quotient = np.zeros((len(self._filters), size, size // 2 + 1), dtype=np.complex128)
        quotient[:, self._rows, : self._n_modes] = self._filters / low
        quotient[_ODD] *= 1j
        # A forward transform: the other sign than for a function of x.
        kernels = np.fft.irfft2(np.conj(quotient), s=(size, size), norm="forward")
        # The PSF, which was divided by, has its centre where stamps have it.
        return kernels[:, : self.stamp_size, : self.stamp_size].copy()

    def _compute_moments(
        self, stamps: Tensor, psf: np.ndarray, *, turned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return moments and their noise as float64 tensors.

        If ``turned``, they are those of the stamps turned by 90 degrees,
        processed, and turned back.
        """
        psf = np.asarray(psf)
        if psf.ndim == 2:
            kernels = self._make_basis(psf)
            turned_back = kernels[_ROTATED_FROM] * _ROTATED_SIGN[:, None, None] if turned else kernels
            products = (turned_back[_PAIRS[:, 0]] * turned_back[_PAIRS[:, 1]]).sum(axis=(1, 2))
            noise = torch.as_tensor(products, device=self._device)
            if turned:
                # It is the same to turn the kernels the other way.
                kernels = np.rot90(kernels, -1, axes=(1, 2))
            matrix = self._to_tensor(kernels.reshape(-1, self.stamp_size**2))
            moments = stamps.reshape(len(stamps), -1) @ matrix.T
        elif psf.ndim == 3 and len(psf) == len(stamps):
            if turned:
                stamps = torch.rot90(stamps, 1, (1, 2))
            moments, noise = self._compute_moments_of_each(stamps, psf, turned=turned)
        else:
            raise ValueError(f"{len(stamps)} stamps need one PSF or one each, not PSFs of shape {psf.shape}.")
        moments = self._add_differences(moments.to(torch.float64))
        if turned:
            moments = moments[:, _ROTATED_FROM] * torch.as_tensor(_ROTATED_SIGN, device=self._device)
        return moments, noise

    def _add_differences(self, moments: Tensor) -> Tensor:
        """Return the moments of all versions, of which some are differences;
        in place.
        """
        sheared = moments[:, :_N_SHEARED].unflatten(1, (len(STEPS), len(MOMENTS)))
        sheared[:, 1:] = sheared[:, :1] + self.step * sheared[:, 1:]
        return moments

    def _compute_moments_of_each(
        self, stamps: Tensor, psf: np.ndarray, *, turned: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the moments, before sums of differences, by Fourier modes;
        the noise is turned back, the moments are not.
        """
        self._check_size(psf)
        # A mode and its conjugate in the other half of the plane.
        filters = 2 * self._filters
        filters[..., 0] /= 2
        even, odd = (filters[order].reshape(-1, self._k2.size) for order in (_EVEN, _ODD))
        to_even, to_odd = self._to_tensor(even.T), self._to_tensor(-odd.T)
        first, second = filters, self._filters
        if turned:
            first, second = (f[_ROTATED_FROM] * _ROTATED_SIGN[:, None, None] for f in (first, second))
        to_noise = self._to_tensor((first[_PAIRS[:, 0]] * second[_PAIRS[:, 1]]).reshape(len(_PAIRS), -1).T)
        n = len(stamps)
        moments = torch.empty((n, len(filters)), dtype=self._dtype, device=self._device)
        noise = torch.empty((n, len(_PAIRS)), dtype=self._dtype, device=self._device)
        grids = [self._make_grid(min(n, self._batch_size)) for _ in range(2)]
        for start in range(0, n, self._batch_size):
            batch = slice(start, min(start + self._batch_size, n))
            psf_modes, edge = self._transform(self._to_tensor(psf[batch]), grids[0])
            power = _compute_power(psf_modes)
            # Stamps and PSFs have the same centre, so its phase cancels.
            quotient = self._transform(stamps[batch], grids[1])[0].div_(psf_modes)  # (N, modes)
            moments[batch, _EVEN] = quotient.real @ to_even
            moments[batch, _ODD] = quotient.imag @ to_odd
            noise[batch] = power.reciprocal() @ to_noise
            moments[batch][self._find_fault(power, edge)[0]] = torch.nan
        return moments, self._grid_size**2 * noise.to(torch.float64)

    def _make_grid(self, n: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return zeros for `_transform` to work in."""
        shape = (n, self._grid_size, self._grid_size)
        return torch.zeros(shape, dtype=self._dtype if dtype is None else dtype, device=self._device)

    def _transform(self, stamps: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Fourier modes of stamps or smaller images of stars.

        Parameters
        ----------
        stamps
            Images with the same centre as the stamps, shape ``(N, y, x)``.
        grid
            Zeros around the images, for at least as many of the same shape.

        Returns
        -------
        modes
            Those of low frequency, shape ``(N, modes)``.
        edge
            Those of the highest frequency along x, shape ``(N, y)``.
        """
        side, size, n = stamps.shape[-1], self._grid_size, self._n_modes
        start = (self.stamp_size - side) // 2
        grid = grid[: len(stamps)]
        grid[:, start : start + side, start : start + side] = stamps
        modes = torch.fft.rfft2(grid)
        low = torch.cat([modes[:, :n, :n], modes[:, size - n + 1 :, :n]], dim=1)
        return low.flatten(1), modes[:, :, -1]

    @property
    def _rows(self) -> np.ndarray:
        """Rows of the Fourier plane with modes of low frequency."""
        return np.r_[: self._n_modes, self._grid_size - self._n_modes + 1 : self._grid_size]

    def _check_size(self, psf: np.ndarray) -> None:
        """Raise ValueError if a PSF does not fit into the stamps."""
        height, width = np.shape(psf)[-2:]
        if height != width or width % 2 == 0 or width > self.stamp_size:
            raise ValueError(
                f"PSFs of {height} x {width} pixels do not fit: their side must be odd and at most that of "
                f"the stamps, {self.stamp_size}."
            )

    def _find_fault(self, power: Tensor, edge: Tensor) -> tuple[Tensor, str]:
        """Return which PSFs are not usable, and what is wrong with one."""
        target = np.exp(-((self.target_fwhm / _FWHM) ** 2) * self._k2.ravel())
        ratio = torch.as_tensor(target, dtype=power.dtype, device=power.device) / power
        flux = power[:, 0]
        amplification = torch.sqrt(ratio.amax(dim=1) * flux)
        at_edge = torch.sqrt(_compute_power(edge).amax(dim=1) / flux)
        unknown = ~torch.isfinite(amplification)
        undersampled = at_edge > MAX_NYQUIST
        wide = amplification > MAX_AMPLIFICATION
        message = ""
        if unknown.any():
            message = "The PSF has pixels that are not finite, or no flux."
        elif undersampled.any():
            message = (
                f"The PSF is undersampled: at the Nyquist frequency it has {float(at_edge.max()):.2f} of its "
                f"amplitude, more than {MAX_NYQUIST}.  Use smaller pixels."
            )
        elif wide.any():
            message = (
                f"The PSF is too wide for a target PSF of {self.target_fwhm:.3f} arcsec: modes would be "
                f"amplified by {float(amplification.max()):.1f}, more than {MAX_AMPLIFICATION}.  Choose a "
                "wider one, see compute_target_fwhm."
            )
        return unknown | undersampled | wide, message

    def _compute_shapes(self, moments: Tensor, noise: Tensor) -> Shapes:
        """Return the shapes; see the notes of the class."""
        noise = noise.expand(len(moments), -1)
        flux_sigma = torch.sqrt(noise[:, :1])
        weight_var, target_var = (self.weight_fwhm / _FWHM) ** 2, (self.target_fwhm / _FWHM) ** 2
        regularizer = self.regularization * flux_sigma
        shifted, noise_squares = self._shift_to_centroid(moments, noise)
        flux, x, y, plus, cross, trace = shifted.unbind(-1)  # (N, 5) each
        squares = torch.stack([x**2 - y**2, 2 * x * y, x**2 + y**2]) - noise_squares
        squares /= _soften(flux, CENTROID_SNR * flux_sigma)
        denominator = flux + regularizer
        e1 = (plus - squares[0]) / (weight_var * denominator)
        e2 = (cross - squares[1]) / (weight_var * denominator)
        star = 2 / (1 / weight_var + 1 / target_var)
        size = (trace - squares[2]) / (star * flux)
        size = torch.where(flux > 0, size, torch.nan)
        snr = flux / flux_sigma
        e = torch.stack([e1, e2], dim=-1)
        bad = ~(torch.isfinite(e).all(dim=2) & (denominator > 0)).all(dim=1)
        e[bad] = torch.nan
        weight = torch.ones_like(snr)
        if self.weight_snr > 0:
            faint = torch.clamp(self.weight_snr / snr, min=0.0)
            weight = torch.where(snr > 0, 1 / (1 + faint**2), 0.0)
        weight[bad] = 0.0
        return Shapes(self.step, *(values.cpu().numpy() for values in (e, snr, size, weight, bad)))

    def _shift_to_centroid(self, moments: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return moments as if images had been sheared about the centroid.

        That differs by a shift of the order of the step, so that first
        derivatives, without shear, are enough.  The shift is noisy, and so
        are the derivatives: where they meet, the mean of what noise alone
        does is taken out.

        Returns
        -------
        moments
            Shape ``(N, 5, 6)``.
        noise_squares
            What is to be taken out of x^2 - y^2, 2 x y and x^2 + y^2 of these
            moments, shape ``(3, N, 5)``.
        """
        var = (self.weight_fwhm / _FWHM) ** 2
        sheared = moments[:, :_N_SHEARED].unflatten(1, (len(STEPS), len(MOMENTS)))
        flux, x, y, plus, cross, trace = sheared[:, 0].unbind(1)  # (N,) each
        # One step of Newton's method leads from zero to x / slope, y / slope.
        softened = _soften(flux, SHIFT_SNR * torch.sqrt(noise[:, 0]))
        slope = torch.maximum(softened - trace / (2 * var), 0.2 * softened)

        # The shift is shear times centroid, so that products with derivatives
        # along x and y are needed that go with g1 and with g2.
        _, xx, xy, yy = noise[:, :4].unbind(1)
        along_x, along_y = _differentiate(x, y, moments[:, _N_SHEARED:], var)  # (N, 4)
        x_along_x, x_along_y = _differentiate(xx, xy, noise[:, 4:8], var)
        y_along_x, y_along_y = _differentiate(xy, yy, noise[:, 8:], var)
        even_g1 = x[:, None] * along_x - y[:, None] * along_y - (x_along_x - y_along_y)
        even_g2 = x[:, None] * along_y + y[:, None] * along_x - (x_along_y + y_along_x)

        # The derivatives of x and y: a symmetric matrix.
        a, b, c = (trace + plus) / 2 - var * flux, cross / 2, (trace - plus) / 2 - var * flux
        odd_g1 = torch.stack([x * a - y * b, x * b - y * c], dim=1)  # (N, 2)
        odd_g2 = torch.stack([x * b + y * a, x * c + y * b], dim=1)
        # The means of the changes of x^2, y^2 and 2 x y by noise alone.
        squares_g1 = (2 * (xx * a - xy * b), 2 * (xy * b - yy * c), 2 * (xx * b - xy * c + xy * a - yy * b))
        squares_g2 = (2 * (xx * b + xy * a), 2 * (xy * c + yy * b), 2 * (xx * c + 2 * xy * b + yy * a))

        shears = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
        g1, g2 = self.step * torch.tensor(shears, dtype=torch.float64, device=self._device).T  # (5,) each
        scale = 1 / (var * slope[:, None])
        by_g1 = torch.cat([even_g1[:, :1], odd_g1, even_g1[:, 1:]], dim=1) * scale  # (N, 6)
        by_g2 = torch.cat([even_g2[:, :1], odd_g2, even_g2[:, 1:]], dim=1) * scale
        shifted = sheared + g1[:, None] * by_g1[:, None] + g2[:, None] * by_g2[:, None]
        square_x, square_y, twice_xy = (
            (first[:, None] * g1 + second[:, None] * g2) * scale
            for first, second in zip(squares_g1, squares_g2, strict=True)
        )
        return shifted, torch.stack([square_x - square_y, twice_xy, square_x + square_y])

    def _to_tensor(self, images: np.ndarray) -> Tensor:
        return torch.as_tensor(images, dtype=self._dtype, device=self._device)


def _add_noise(noise: Tensor, more: Tensor) -> Tensor:
    """Return covariances of a sum, of which the flux counts the first."""
    return torch.cat([noise[..., :1], noise[..., 1:] + more[..., 1:]], dim=-1)


def _soften(flux: Tensor, limit: Tensor) -> Tensor:
    """Return fluxes that objects may be divided by to find their centroids.

    The regularizer of ellipticities would be too much of a good thing: it
    would leave the object off the centre.
    """
    return torch.sqrt(flux**2 + limit**2)


def _differentiate(x: Tensor, y: Tensor, third: Tensor, var: float) -> tuple[Tensor, Tensor]:
    """Return what moving the weight does to the moments of even order.

    Parameters
    ----------
    x, y, third
        Moments of odd order, shape ``(N,)`` and ``(N, 4)``.
    var
        Variance of the weight in arcsec squared.

    Returns
    -------
    along_x, along_y
        Derivatives of the moments 0, xx-yy, 2xy and xx+yy times ``var``,
        shape ``(N, 4)``.
    """
    xxx, xxy, xyy, yyy = third.unbind(1)
    along_x = [x, xxx - xyy - 2 * var * x, 2 * (xxy - var * y), xxx + xyy - 2 * var * x]
    along_y = [y, xxy - yyy + 2 * var * y, 2 * (xyy - var * x), xxy + yyy - 2 * var * y]
    return torch.stack(along_x, dim=1), torch.stack(along_y, dim=1)


def _compute_power(modes: Tensor) -> Tensor:
    """Return squared amplitudes; faster than the square of `abs`."""
    real, imag = modes.real, modes.imag
    return real * real + imag * imag


def _find_fast_size(size: int) -> int:
    """Return the next even number with no prime factor above 5."""
    size += size % 2
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 2


def compute_target_fwhm(psf: np.ndarray, pixel_scale: float) -> float:
    """Return a width that suits the new PSF of metacalibration, in arcsec.

    It is 1.2 times the FWHM of the widest PSF, from the area of the pixels
    that are brighter than half of its maximum, which is wide enough for
    atmospheric profiles of some ellipticity.

    Parameters
    ----------
    psf
        Image of a star centred on a pixel, shape ``(y, x)`` or
        ``(N, y, x)``.
    pixel_scale
        Side of a pixel in arcsec.
    """
    psf = np.asarray(psf, dtype=np.float64).reshape(-1, *np.shape(psf)[-2:])
    size = psf.shape[-1]
    widths = []
    for kernel in psf[np.isfinite(psf).all(axis=(1, 2))]:
        # Sinc interpolation, as a few pixels say little about an area.
        modes = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(kernel)))
        fine = np.abs(np.fft.ifft2(np.pad(modes, 2 * size)))
        widths.append(math.sqrt(4 / np.pi * (fine > 0.5 * fine.max()).sum()) / 5)
    if not widths:
        raise ValueError("There is no PSF of which to compute a width.")
    return 1.2 * max(widths) * pixel_scale

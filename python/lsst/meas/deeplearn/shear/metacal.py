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
it with a wider PSF, and measures it again.  If the new PSF and the weight of
the measurement are Gaussian, with variances :math:`\sigma_T^2` and
:math:`\sigma_W^2`, all moments follow from one function: with I and P the
Fourier transforms of the image and its PSF,

.. math::
    f(x) = \int \frac{d^2 k}{(2 \pi)^2}
        2 \pi \sigma_W^2 e^{-s^2 k^2 / 2} \, \frac{I(k)}{P(k)} \, e^{i k x},
    \quad s^2 = \sigma_W^2 + \sigma_T^2 ,

is the weighted flux with the weight at x.  Its gradient is the weighted
centroid, and its second derivatives are the second moments.  Its maximum is
where the centroid does not move any more; what is measured there does not
depend on where in its stamp the object is.  A shear S of the object turns
:math:`k^2` into :math:`k S^{-2} k`; to third order in the shear the sheared f
has derivatives that are sums of those of f.  So derivatives of f at the
centre of the stamp, which are sums over pixels or Fourier modes, are all that
is needed, and noise can be added to them as well as to pixels.
"""

from __future__ import annotations

__all__ = ("DERIVATIVES", "Metacalibration", "compute_target_fwhm")

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.linalg import matrix_power
from scipy.signal import convolve2d
from torch import Tensor

from ..galaxies.fourier import compute_noise_power
from .shapes import STEPS, Shapes

ORDER = 6
"""Order up to which derivatives are measured."""

DERIVATIVES = tuple((order - b, b) for order in range(ORDER + 1) for b in range(order + 1))
"""How often f is differentiated along x and y; the moments."""

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
"""Signal to noise below which the weight does not go all the way to the
maximum of f.
"""

MAX_SHIFT = 0.6
"""How far from the centre of the stamp the weight may go, in units of s."""

_FWHM = math.sqrt(8 * math.log(2))

# Kernels are zero where they are below this share of their maximum.
_NEGLIGIBLE = 1e-6

# Order of all derivatives; those that are not measured follow from the others
# if f is a polynomial of the sixth order times a Gaussian of this variance,
# in units of s^2: galaxies are somewhat larger than a star.
_FULL_ORDER = 8
_TYPICAL_VARIANCE = 1.6

# The artificial shears, but none, of an image, and of noise that is sheared in
# a frame turned by 90 degrees.
_ORDERS = ([0, 1, 2, 3], [1, 0, 3, 2])

# Number of derivatives up to the second order.
_N_QUADRATIC = 6

# Those of them that shapes follow from.
_EVEN_QUADRATIC = (0, 3, 4, 5)

# Derivatives of the versions that shapes follow from.
_VERSION_ORDER = 4

# Moments whose filters are real and imaginary.
_EVEN = [i for i, (a, b) in enumerate(DERIVATIVES) if (a + b) % 2 == 0]
_ODD = [i for i, (a, b) in enumerate(DERIVATIVES) if (a + b) % 2 == 1]

# What turning a stamp back, after torch.rot90, makes of its moments.
_ROTATED_FROM = [DERIVATIVES.index((b, a)) for a, b in DERIVATIVES]
_ROTATED_SIGN = np.array([(-1.0) ** a for a, b in DERIVATIVES])

# Parts in which pixels are added up.
_N_PARTS = 4

# Stamps that are multiplied at once, as much as a cache holds, and objects
# whose moments are.
_STAMPS, _OBJECTS = 512, 2048


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
    noise_correlation
        Correlation of the noise of two pixels by their distance along y and
        x, zero distance at the centre; `None` if it is white.
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
    The ellipticity is that at the maximum of f,

    .. math::
        e_1 = \sigma_W^2 \frac{f_{xx} - f_{yy}}{D}, \quad
        e_2 = \sigma_W^2 \frac{2 f_{xy}}{D}, \quad
        D = f + r \, \sigma(f) .

    The regulariser r keeps faint objects from blowing up: the flux is the
    best measured of all moments, where the size often comes out as zero.
    Two steps of Newton's method lead to the maximum, the second one in every
    version; they are shortened where the flux is not above `CENTROID_SNR`.
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
        noise_correlation: np.ndarray | None = None,
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
        self._batch_size = 96 if self._device.type == "cpu" else 16384
        self._grid_size = _find_fast_size(stamp_size)
        k = 2 * np.pi * np.fft.fftfreq(self._grid_size, d=pixel_scale)
        # Half of the plane: the other one is conjugate.
        self._weight_var, self._target_var = (weight_fwhm / _FWHM) ** 2, (target_fwhm / _FWHM) ** 2
        filters = self._make_filters(*np.meshgrid(k[: self._grid_size // 2], k))  # (28, y, x)
        peak = np.abs(filters).max(axis=(1, 2), keepdims=True)
        used = (np.abs(filters) > _NEGLIGIBLE * peak).any(axis=(0, 1))
        # All that follows is about the modes up to some k along x and y.
        n_modes = int(np.flatnonzero(used)[-1]) + 1
        # Matrix products are fastest with a multiple of 16 columns, here of
        # real and imaginary parts.
        self._n_modes = min(n_modes + -n_modes % 8, self._grid_size // 2)
        self._filters = filters[:, self._rows, : self._n_modes].reshape(len(filters), -1)
        self._k2 = (k[: self._n_modes] ** 2 + k[self._rows, None] ** 2).ravel()
        self._noise_power, self._turned_noise_power = (
            compute_noise_power(correlation, self._grid_size)[self._rows, : self._n_modes].ravel()
            for correlation in (
                noise_correlation,
                None if noise_correlation is None else np.rot90(noise_correlation),
            )
        )
        self._complete = self._to_dtype(_make_completion(), dtype)
        versions = _make_versions(step)
        # What a shear changes is small, and need not be computed in double
        # precision.
        self._changes = self._to_dtype((versions[1:] - versions[0]).swapaxes(0, 1), dtype)  # (15, 4, 81)
        self._unsheared = versions[0].argmax(axis=1)
        self._shears = self._to_double(_make_shears(step))

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
            `DERIVATIVES` of the weighted flux at the centre of the stamp, in
            units of s to the power of minus their order, float64, shape
            ``(N, 28)``.  NaN for a PSF of its own that is not usable.
        variance
            Variance of the first of them for noise of one in each pixel;
            shape ``(N,)``.

        Raises
        ------
        ValueError
            Raised if a shape does not fit, or if the one PSF is undersampled
            or too wide.
        """
        moments, variance = self._compute_moments(self._to_tensor(images), psf)
        return moments.cpu().numpy(), variance.cpu().numpy()

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
        moments, variance = self._compute_moments(self._to_tensor(images), psf)
        if fixnoise is not None:
            more, _ = self._compute_moments(self._to_tensor(fixnoise), psf, turned=True)
            moments = torch.cat([moments, more], dim=1)
        sigma = torch.as_tensor(np.asarray(noise_sigma, dtype=np.float64), device=self._device)
        return self._compute_shapes(moments, variance * sigma**2)

    def compute_shapes(self, moments: np.ndarray, variance: np.ndarray | float) -> Shapes:
        """Return the shapes that follow from moments.

        Parameters
        ----------
        moments
            Moments as from `compute_moments`, shape ``(N, 28)``, or, followed
            by those of the noise that is added and sheared the other way,
            ``(N, 56)``.
        variance
            Variance of the first of them, shape ``(N,)`` or one for all.
        """
        variances = np.full(len(moments), variance, dtype=np.float64)
        return self._compute_shapes(self._to_double(moments), self._to_double(variances))

    def compute_moment_covariance(self, psf: np.ndarray, *, fixnoise: bool = True) -> np.ndarray:
        """Return the covariance of the moments of noise.

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
            For noise of one in each pixel, float64, shape ``(28, 28)``, or
            ``(56, 56)`` with that noise, which comes second.
        """
        inverse = 1 / np.abs(self._transform_psf(psf)) ** 2
        covariance = self._compute_covariance(inverse * self._noise_power)
        if not fixnoise:
            return covariance
        turned = self._compute_covariance(inverse * self._turned_noise_power)
        turned = np.outer(_ROTATED_SIGN, _ROTATED_SIGN) * turned[np.ix_(_ROTATED_FROM, _ROTATED_FROM)]
        return np.block([[covariance, np.zeros_like(covariance)], [np.zeros_like(turned), turned]])

    def draw_noise_moments(
        self, psf: np.ndarray, normal: np.ndarray, *, fixnoise: bool = True
    ) -> tuple[np.ndarray, float]:
        """Return moments of noise that never was an image.

        Parameters
        ----------
        psf
            The PSF, shape ``(y, x)``.
        normal
            Standard normal numbers, shape ``(..., 28)``, or ``(..., 56)``
            with fixnoise.
        fixnoise
            As for `compute_moment_covariance`.

        Returns
        -------
        moments
            For noise of one in each pixel, of the same shape as ``normal``.
        variance
            That of the first moment by the noise of the image alone.
        """
        covariance = self.compute_moment_covariance(psf, fixnoise=fixnoise)
        eigenvalues, vectors = np.linalg.eigh(covariance)
        moments: np.ndarray = normal @ (vectors * np.sqrt(np.clip(eigenvalues, 0.0, None))).T
        return moments, float(covariance[0, 0])

    def make_kernels(self, psf: np.ndarray) -> np.ndarray:
        """Return the images whose products with a stamp are its moments.

        Parameters
        ----------
        psf
            The PSF, shape ``(y, x)``.

        Returns
        -------
        kernels
            Float64, shape ``(28, y, x)``.

        Raises
        ------
        ValueError
            Raised as by `compute_moments`.
        """
        size, n_modes = self._grid_size, self._n_modes
        quotient = np.zeros((len(DERIVATIVES), size, size // 2 + 1), dtype=np.complex128)
        quotient[:, self._rows, :n_modes] = (self._filters / self._transform_psf(psf)).reshape(
            len(DERIVATIVES), -1, n_modes
        )
        quotient[_ODD] *= 1j
        # A forward transform: the other sign than for a function of x.
        kernels = np.fft.irfft2(np.conj(quotient), s=(size, size), norm="forward")
        # Their centre is the first pixel.
        kernels = np.roll(kernels, self.stamp_size // 2, axis=(1, 2))
        return kernels[:, : self.stamp_size, : self.stamp_size].copy()

    def _make_filters(self, kx: np.ndarray, ky: np.ndarray) -> np.ndarray:
        """Return what multiplies the modes of a deconvolved stamp.

        Moments of odd order are imaginary; their imaginary part is returned.
        """
        s2 = self._weight_var + self._target_var
        gauss = 2 * np.pi * self._weight_var * np.exp(-0.5 * s2 * (kx**2 + ky**2))
        # d^2 k / (2 pi)^2 for the modes of the stamp.
        gauss /= (self._grid_size * self.pixel_scale) ** 2
        x, y = math.sqrt(s2) * kx, math.sqrt(s2) * ky
        return np.stack([(-1) ** ((a + b) // 2) * x**a * y**b * gauss for a, b in DERIVATIVES])

    def _transform_psf(self, psf: np.ndarray) -> np.ndarray:
        """Return the modes of a PSF, complex128, shape ``(modes,)``."""
        self._check_size(psf)
        star = self._to_double(psf)[None]
        real, imag = self._transform(star, *self._make_waves(star.shape[-1], torch.float64))
        if message := self._find_fault(star, 1 / (real**2 + imag**2))[1]:
            raise ValueError(message)
        result: np.ndarray = torch.complex(real, imag)[0].cpu().numpy()
        return result

    def _compute_covariance(self, power: np.ndarray) -> np.ndarray:
        """Return the covariance of moments of noise with a power spectrum,
        divided by that of the PSF, shape ``(modes,)``.
        """
        weighted = self._double_modes() * power * self._grid_size**2
        covariance: np.ndarray = weighted @ self._filters.T
        covariance[np.ix_(_EVEN, _ODD)] = covariance[np.ix_(_ODD, _EVEN)] = 0.0
        return covariance

    def _double_modes(self) -> np.ndarray:
        """Return the filters, for sums over half of the Fourier plane."""
        # A mode and its conjugate in the other half of the plane.
        filters = 2 * self._filters
        filters[:, :: self._n_modes] /= 2
        return filters

    def _compute_moments(
        self, stamps: Tensor, psf: np.ndarray, *, turned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return moments and the variance of the first as float64 tensors.

        If ``turned``, they are those of the stamps turned by 90 degrees,
        processed, and turned back.
        """
        psf = np.asarray(psf)
        if psf.ndim == 2:
            kernels = self.make_kernels(psf)
            if turned:
                # It is the same to turn the kernels the other way.
                kernels = np.rot90(kernels, -1, axes=(1, 2))
            matrix = self._to_tensor(kernels.reshape(len(kernels), -1))
            moments = torch.cat([_multiply(part.flatten(1), matrix) for part in stamps.split(_STAMPS)])
            alone = self.compute_moment_covariance(psf, fixnoise=False)[0, 0]
            variance = torch.full((len(stamps),), alone, dtype=torch.float64, device=self._device)
        elif psf.ndim == 3 and len(psf) == len(stamps):
            moments, variance = self._compute_moments_of_each(
                torch.rot90(stamps, 1, (1, 2)) if turned else stamps, psf
            )
        else:
            raise ValueError(f"{len(stamps)} stamps need one PSF or one each, not PSFs of shape {psf.shape}.")
        if turned:
            moments = moments[:, _ROTATED_FROM] * self._to_double(_ROTATED_SIGN)
        return moments, variance

    def _compute_moments_of_each(self, stamps: Tensor, psf: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return moments by Fourier modes."""
        self._check_size(psf)
        filters = self._double_modes()
        to_even, to_odd = self._to_tensor(filters[_EVEN].T), self._to_tensor(-filters[_ODD].T)
        to_variance = self._to_tensor(filters[0] * self._filters[0] * self._noise_power * self._grid_size**2)
        n = len(stamps)
        moments = torch.empty((n, len(filters)), dtype=torch.float64, device=self._device)
        variance = torch.empty(n, dtype=torch.float64, device=self._device)
        waves = [self._make_waves(side, self._dtype) for side in (stamps.shape[-1], psf.shape[-1])]
        for start in range(0, n, self._batch_size):
            batch = slice(start, min(start + self._batch_size, n))
            stars = self._to_tensor(psf[batch])
            a, b = self._transform(stamps[batch], *waves[0])
            c, d = self._transform(stars, *waves[1])
            # (a + i b) / (c + i d) by real numbers, which is faster.
            power = (c * c).addcmul_(d, d)
            inverse = power.reciprocal()
            real, imag = (a * c).addcmul_(b, d), (b * c).addcmul_(a, d, value=-1)
            moments[batch, _EVEN] = (real.mul_(inverse) @ to_even).to(torch.float64)
            moments[batch, _ODD] = (imag.mul_(inverse) @ to_odd).to(torch.float64)
            variance[batch] = (inverse @ to_variance).to(torch.float64)
            moments[batch].masked_fill_(self._find_fault(stars, inverse)[0][:, None], torch.nan)
        return moments, variance

    def _make_waves(self, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the matrices of `_transform` for images of odd side."""
        phase = 2 * np.pi / self._grid_size * np.outer(np.arange(side) - side // 2, np.arange(self._n_modes))
        cos, sin = np.cos(phase), np.sin(phase)  # (pixels, n)
        return self._to_dtype(np.hstack([cos, -sin]), dtype), self._to_dtype(np.hstack([cos, sin]).T, dtype)

    def _transform(self, images: Tensor, along_x: Tensor, along_y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Fourier modes of images about their central pixel.

        As matrix products: few modes are needed, so that it is faster than a
        fast Fourier transform.

        Parameters
        ----------
        images
            Stamps or images of stars, shape ``(N, y, x)``.
        along_x, along_y
            From `_make_waves`.

        Returns
        -------
        real, imag
            Modes of low frequency, shape ``(N, modes)``.
        """
        # (N, cosine or sine along y, ky, real or imaginary, kx)
        waves = (along_y @ (images @ along_x)).view(len(images), 2, self._n_modes, 2, self._n_modes)
        (cos_real, cos_imag), (sin_real, sin_imag) = (wave.unbind(2) for wave in waves.unbind(1))
        # Rows of ky, and then of minus ky.
        real = torch.cat([cos_real + sin_imag, (cos_real - sin_imag)[:, 1:]], dim=1)
        imag = torch.cat([cos_imag - sin_real, (cos_imag + sin_real)[:, 1:]], dim=1)
        return real.flatten(1), imag.flatten(1)

    @property
    def _rows(self) -> np.ndarray:
        """Rows of the Fourier plane with modes of low frequency, ky and then
        minus ky.
        """
        return np.r_[: self._n_modes, -1 : -self._n_modes : -1]

    def _check_size(self, psf: np.ndarray) -> None:
        """Raise ValueError if a PSF does not fit into the stamps."""
        height, width = np.shape(psf)[-2:]
        if height != width or width % 2 == 0 or width > self.stamp_size:
            raise ValueError(
                f"PSFs of {height} x {width} pixels do not fit: their side must be odd and at most that of "
                f"the stamps, {self.stamp_size}."
            )

    def _find_fault(self, stars: Tensor, inverse: Tensor) -> tuple[Tensor, str]:
        """Return which PSFs, with one over the power of their modes, are not
        usable, and what is wrong with one.
        """
        target = self._to_dtype(np.exp(-self._target_var * self._k2), inverse.dtype)
        flux = torch.rsqrt(inverse[:, 0])
        amplification = torch.sqrt((target * inverse).amax(dim=1)) * flux
        # The highest frequency along x, at the lowest along y.
        signs = 1.0 - 2.0 * (torch.arange(stars.shape[-1], dtype=stars.dtype, device=stars.device) % 2)
        at_edge = torch.abs(stars.sum(dim=1) @ signs) / flux
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

    def _compute_shapes(self, moments: Tensor, variance: Tensor) -> Shapes:
        """Return the shapes; see the notes of the class."""
        parts = [
            self._measure(moments[start : start + _OBJECTS].T, torch.sqrt(variance[start : start + _OBJECTS]))
            for start in range(0, max(len(moments), 1), _OBJECTS)
        ]
        arrays = (torch.cat(columns).cpu().numpy() for columns in zip(*parts, strict=True))
        return Shapes(self.step, *arrays)

    def _measure(self, moments: Tensor, flux_sigma: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of `Shapes` for moments of shape ``(28, N)``, or
        ``(56, N)`` with those of noise that is sheared the other way.
        """
        # Where the weight is need not be known better than the moments.
        grids = [self._complete @ part for part in moments.to(self._dtype).split(len(DERIVATIVES))]  # (81, N)
        limit = (CENTROID_SNR * flux_sigma).to(self._dtype)
        # Every version takes both steps by itself, as if it were an image:
        # the first one from the centre.
        centered = _add(self._make_versions(grids, _N_QUADRATIC, self._dtype))
        x, y = (step.clamp(-MAX_SHIFT, MAX_SHIFT) for step in _step_to_maximum(centered, limit))  # (5, N)
        # Most of the way is the same for all.
        start = torch.stack([x[0], y[0]])
        near = self._make_versions(
            [_translate(grid, *start) for grid in grids], len(self._changes), torch.float64
        )
        # A shear moves the points where derivatives have become known.
        start = start.to(torch.float64)
        known = [matrices @ start for matrices in (self._shears, torch.linalg.inv(self._shears))]  # (5, 2, N)
        shifts = [(x - point[:, 0], y - point[:, 1]) for point in known]

        def evaluate(
            step_x: Tensor | float, step_y: Tensor | float, rows: Sequence[int], dtype: torch.dtype
        ) -> Tensor:
            # (rows, 5, N)
            return _add(
                [
                    _expand(part.to(dtype), (dx + step_x).to(dtype), (dy + step_y).to(dtype), rows)
                    for part, (dx, dy) in zip(near, shifts, strict=False)
                ]
            )

        step_x, step_y = _step_to_maximum(evaluate(0.0, 0.0, range(_N_QUADRATIC), self._dtype), limit)
        flux, xx, xy, yy = evaluate(step_x, step_y, _EVEN_QUADRATIC, torch.float64)

        share = self._weight_var / (self._weight_var + self._target_var)
        denominator = flux + self.regularization * flux_sigma
        e = share * torch.stack([xx - yy, 2 * xy]) / denominator  # (2, 5, N)
        # The trace of a star is 2 (1 - share) times its flux.
        size = (share * (xx + yy) + 2 * flux) / (2 * (1 - share) * flux)
        size = torch.where(flux > 0, size, torch.nan)
        snr = flux / flux_sigma
        bad = ~(torch.isfinite(e).all(dim=0) & (denominator > 0)).all(dim=0)  # (N,)
        e[:, :, bad] = torch.nan
        weight = torch.ones_like(snr)
        if self.weight_snr > 0:
            faint = torch.clamp(self.weight_snr / snr, min=0.0)
            weight = torch.where(snr > 0, 1 / (1 + faint**2), 0.0)
        weight[:, bad] = 0.0
        return e.permute(2, 1, 0), snr.T, size.T, weight.T, bad

    def _make_versions(self, grids: list[Tensor], n_rows: int, dtype: torch.dtype) -> list[Tensor]:
        """Return the derivatives of all versions, shape ``(n_rows, 5, N)``,
        of an image and of noise that is sheared the other way.
        """
        result = []
        for grid, order in zip(grids, _ORDERS, strict=False):
            unsheared = grid[self._unsheared[:n_rows]].to(dtype)[:, None]
            changes = self._changes[:n_rows, order].flatten(0, 1) @ grid
            sheared = unsheared + changes.view(n_rows, -1, grid.shape[1])
            result.append(torch.cat([unsheared, sheared], dim=1))
        return result

    def _to_tensor(self, images: np.ndarray) -> Tensor:
        return torch.as_tensor(images, dtype=self._dtype, device=self._device)

    def _to_double(self, array: np.ndarray) -> Tensor:
        return self._to_dtype(array, torch.float64)

    def _to_dtype(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array), dtype=dtype, device=self._device)


def _multiply(stamps: Tensor, kernels: Tensor) -> Tensor:
    """Return the products of stamps, shape ``(N, pixels)``, with kernels,
    shape ``(K, pixels)``, as float64.
    """
    # Faster with stamps on the right.  Sums over parts are in double
    # precision, or errors of single precision would be 1.2 (48 stamps) to 2
    # times (4 stamps) as large.
    parts = zip(kernels.chunk(_N_PARTS, dim=1), stamps.chunk(_N_PARTS, dim=1), strict=True)
    return torch.stack([(a @ b.T).to(torch.float64) for a, b in parts]).sum(dim=0).T


def _add(parts: list[Tensor]) -> Tensor:
    """Return one part, or the sum of two."""
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _step_to_maximum(derivatives: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Return where Newton's method sees the maximum of a function with these
    derivatives, ``(6, ...)``; nearer, if its value is not above a limit.
    """
    flux, x, y, xx, xy, yy = derivatives
    softened = torch.sqrt(flux**2 + limit**2)
    # The negative Hessian: its mean, and what is different along two axes.
    mean = torch.maximum(softened - flux - (xx + yy) / 2, 0.2 * softened)
    plus, cross = (yy - xx) / 2, -xy
    scale = (0.7 * mean / torch.hypot(plus, cross).clamp(min=1e-30)).clamp(max=1.0)
    plus, cross = scale * plus, scale * cross
    determinant = mean**2 - plus**2 - cross**2
    return ((mean - plus) * x - cross * y) / determinant, ((mean + plus) * y - cross * x) / determinant


def _expand(derivatives: Tensor, dx: Tensor, dy: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some of the derivatives near by, shape ``(rows, 5, N)``, from
    those up to the fourth order, shape ``(15, 5, N)``.
    """
    powers = [[d**n / math.factorial(n) if n > 1 else d for n in range(5)] for d in (dx, dy)]
    result = derivatives[list(rows)]
    for i, j in DERIVATIVES[1 : len(derivatives)]:
        term = powers[0][i] if j == 0 else powers[1][j] if i == 0 else powers[0][i] * powers[1][j]
        for row, (a, b) in zip(result, (DERIVATIVES[row] for row in rows), strict=True):
            if a + b + i + j <= _VERSION_ORDER:
                row.addcmul_(term, derivatives[DERIVATIVES.index((a + i, b + j))])
    return result


def _translate(grid: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Return derivatives at another place by Taylor's theorem, shape
    ``(81, N)``.
    """
    side = _FULL_ORDER + 1
    square = grid.view(side, side, -1)
    for shift in (dx, dy):
        result, term = square.clone(), square
        for order in range(1, side):
            term = term[1:, : side - order] * (shift / order)
            result[: len(term), : side - order] += term
        square = result.transpose(0, 1)
    return square.reshape(side**2, -1)


def _make_completion() -> np.ndarray:
    """Return the matrix from moments to all derivatives on a square grid, of
    which those that are not measured follow from `_TYPICAL_VARIANCE`.
    """
    side = _FULL_ORDER + 1
    order = np.add.outer(np.arange(side), np.arange(side))
    factorial = np.array([math.factorial(n) for n in range(side)])
    scale = np.outer(factorial, factorial)

    def make_gaussian(sign: float) -> np.ndarray:
        # The Taylor series of a Gaussian, or of its inverse.
        even = np.arange(0, side, 2)
        series = np.zeros(side)
        series[even] = (sign / (2 * _TYPICAL_VARIANCE)) ** (even // 2) / factorial[even // 2]
        return np.outer(series, series)

    columns = []
    for a, b in DERIVATIVES:
        series = np.zeros((side, side))
        series[a, b] = 1 / scale[a, b]
        polynomial = convolve2d(series, make_gaussian(1.0))[:side, :side] * (order <= ORDER)
        columns.append(scale * convolve2d(polynomial, make_gaussian(-1.0))[:side, :side])
    return np.stack(columns, axis=-1).reshape(side**2, -1) * (order.reshape(-1, 1) <= _FULL_ORDER)


def _make_shears(step: float) -> np.ndarray:
    """Return the matrices of the artificial shears, shape ``(5, 2, 2)``."""
    shears = step * np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
    norm = math.sqrt(1 - step**2)
    matrices = [np.array([[1 + g1, g2], [g2, 1 - g1]]) / norm for g1, g2 in shears[1:]]
    return np.array([np.eye(2), *matrices])


def _make_versions(step: float) -> np.ndarray:
    """Return the matrices from derivatives on a square grid to those of all
    versions up to `_VERSION_ORDER`, shape ``(5, 15, 81)``.
    """
    side = _FULL_ORDER + 1
    rows = []
    for inverse in np.linalg.inv(_make_shears(step)):
        # exp(-s^2 k (S^-2 - 1) k / 2), with derivatives in place of i k.
        change = matrix_power(inverse, 2) - np.eye(2)
        exponent = np.array(
            [[0.0, 0.0, change[1, 1] / 2], [0.0, change[0, 1], 0.0], [change[0, 0] / 2, 0, 0]]
        )
        series, power = np.ones((1, 1)), np.ones((1, 1))
        for n in (1, 2, 3):
            power = convolve2d(power, exponent) / n
            series = np.pad(series, (0, len(power) - len(series))) + power
        along = [np.array([[0.0, row[1]], [row[0], 0.0]]) for row in inverse]
        for a, b in DERIVATIVES[: (_VERSION_ORDER + 1) * (_VERSION_ORDER + 2) // 2]:
            operator = series
            for factor in a * [along[0]] + b * [along[1]]:
                operator = convolve2d(operator, factor)
            row = np.zeros((side, side))
            m = min(side, len(operator))
            row[:m, :m] = operator[:m, :m]
            rows.append(row.ravel())
    return np.array(rows).reshape(len(STEPS), -1, side**2)


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

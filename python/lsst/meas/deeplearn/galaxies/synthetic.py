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

"""Training sets of known truth, made as if COSMOS had observed them."""

from __future__ import annotations

__all__ = (
    "compute_component_transform",
    "draw_to_magnitude",
    "make_hst_psfs",
    "make_synthetic_set",
    "read_cosmos_correlation",
)

import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import galsim
import numpy as np
from astropy.io import fits
from scipy import fft

from lsst.utils.logging import PeriodicLogger

from .conditions import CONDITION_NAMES
from .cosmos import COSMOS_NOISE_VARIANCE, COSMOS_PIXEL_SCALE, COSMOS_ZERO_POINT, GalaxySet, GalaxySetError
from .fourier import draw_transform, invert_transform, make_gaussian_transform
from .parametric import Components, GalaxyParameters, draw_parameters, make_galaxy

_LOG = logging.getLogger(__name__)

EXPONENTIAL_HALF_LIGHT_RADIUS = 1.6783469900166605
"""Half-light radius of an exponential disk in units of its scale length."""


@functools.lru_cache(maxsize=1)
def _tabulate_bulge() -> tuple[np.ndarray, np.ndarray]:
    """Return the transform of a de Vaucouleurs profile.

    As function of the logarithm of wave number times half-light radius.
    """
    log_k = np.linspace(-7, 8, 1501)
    profile = galsim.DeVaucouleurs(half_light_radius=1.0)
    return log_k, np.array([profile.kValue(math.exp(k), 0.0).real for k in log_k])


def compute_component_transform(components: Components, *, size: int, pixel_scale: float) -> np.ndarray:
    """Return the transform of a galaxy at the frequencies of a grid.

    What `fourier.draw_transform` makes of its profile within 1e-4, a hundred
    times faster.

    Parameters
    ----------
    components
        What the galaxy is the sum of.
    size
        Even number of pixels S on a side.
    pixel_scale
        Side of a pixel in arcsec.

    Returns
    -------
    transform
        Complex64, shape ``(S, S / 2 + 1)``.
    """
    c = components
    ky = (2 * math.pi * fft.fftfreq(size, pixel_scale)).astype(np.float32)
    kx = (2 * math.pi * fft.rfftfreq(size, pixel_scale)).astype(np.float32)
    cos, sin = math.cos(c.position_angle), math.sin(c.position_angle)
    major = (sin * ky[:, None] + cos * kx) ** 2
    minor = (cos * ky[:, None] - sin * kx) ** 2
    total = np.zeros(major.shape, dtype=np.complex64)
    if c.disk_flux > 0:
        scale = (c.disk_radius / EXPONENTIAL_HALF_LIGHT_RADIUS) ** 2
        square = 1 + (scale / c.disk_axis_ratio) * major + (scale * c.disk_axis_ratio) * minor
        total += c.disk_flux / (square * np.sqrt(square))
    if c.bulge_flux > 0:
        square = major / c.bulge_axis_ratio + minor * c.bulge_axis_ratio
        log_k = math.log(c.bulge_radius) + 0.5 * np.log(np.maximum(square, 1e-12))
        total += (c.bulge_flux * np.interp(log_k, *_tabulate_bulge())).astype(np.float32)
    if len(c.flux):
        along_y, along_x = (
            np.exp(-1j * np.outer(position, k) - 0.5 * np.outer(c.sigma, k) ** 2).astype(np.complex64)
            for position, k in ((c.y, ky), (c.x, kx))
        )
        total += (c.flux[:, None].astype(np.float32) * along_y).T @ along_x
    total[size // 2] = 0
    total[:, size // 2] = 0
    return total


def make_synthetic_set(
    n: int,
    *,
    seed: int,
    size: int = 128,
    pixel_scale: float = 0.06,
    truth_fwhm: float = 0.13,
    n_psfs: int = 50,
    noise_variance: float = COSMOS_NOISE_VARIANCE,
    max_magnitude: float = 25.2,
    make_components: Callable[[GalaxyParameters], Components] = make_galaxy,
    parameters: Sequence[GalaxyParameters] | None = None,
    keep_truth: bool = True,
) -> GalaxySet:
    """Make galaxies of known truth as if COSMOS had observed them.

    Parameters
    ----------
    n
        Number of galaxies.
    seed
        Seed of galaxies, PSFs and noise.
    size
        Even number of pixels on a side.
    pixel_scale
        Side of a pixel in arcsec.
    truth_fwhm
        Width in arcsec of the PSF of the truth.
    n_psfs
        Number of different PSFs: those of the telescope with aberrations.
    noise_variance
        Variance of the noise in a pixel of 0.03 arcsec, in squared counts
        per second; its correlation is that of COSMOS.
    max_magnitude
        Galaxies that are fainter are drawn anew.
    make_components
        What makes a galaxy from parameters; the baselines of `parametric` can
        be drawn in this way.
    parameters
        The galaxies, instead of those drawn from the population; ``n`` is
        their number then.
    keep_truth
        Whether to keep the truth, which takes as much memory as the images.

    Notes
    -----
    ``ids`` are consecutive numbers; positions on the sky are unknown.
    """
    if parameters is None:
        parameters = draw_to_magnitude(n, seed, max_magnitude)
    if len(parameters) != n:
        raise GalaxySetError(f"There are parameters of {len(parameters)} galaxies, not of {n}.")
    rng = np.random.default_rng([seed, 2])
    psf = make_hst_psfs(n_psfs, rng, size=size, pixel_scale=pixel_scale)
    psf_index = rng.integers(n_psfs, size=n)
    # The grid is doubled, so that what leaves it does not come in again.
    wide_psf = np.stack([_compute_wide_transform(p) for p in psf])
    wide_truth = make_gaussian_transform(truth_fwhm, size=2 * size, pixel_scale=pixel_scale)
    wide_truth = wide_truth.astype(np.float32)
    power = (pixel_scale / COSMOS_PIXEL_SCALE) ** 2 * _resample_power(
        read_cosmos_correlation(), size, pixel_scale
    )
    amplitude = _drop_nyquist(np.sqrt(power)).astype(np.float32)
    variance = noise_variance * 10 ** (
        0.8 * (np.array([p.magnitude for p in parameters]) - COSMOS_ZERO_POINT)
    )
    image = np.empty((n, size, size), dtype=np.float32)
    truth = np.empty((n, size, size), dtype=np.float32) if keep_truth else None
    progress = PeriodicLogger(_LOG)
    for i, galaxy in enumerate(parameters):
        components = make_components(galaxy)
        transform = compute_component_transform(components, size=2 * size, pixel_scale=pixel_scale)
        if truth is not None:
            truth[i] = _invert_wide_transform(transform * wide_truth)
        white = fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
        noise = np.float32(math.sqrt(variance[i])) * fft.irfft2(white * amplitude)
        image[i] = _invert_wide_transform(transform * wide_psf[psf_index[i]]) + noise
        progress.log("Made %d of %d galaxies.", i + 1, n)
    return GalaxySet(
        pixel_scale=pixel_scale,
        ids=np.arange(n),
        image=image,
        psf=psf.astype(np.float32),
        psf_index=psf_index,
        noise_power=power.astype(np.float32),
        noise_variance=variance,
        conditions=np.array([galaxy.conditions for galaxy in parameters]).reshape(n, len(CONDITION_NAMES)),
        sky=np.full((n, 2), np.nan),
        truth=truth,
        truth_fwhm=truth_fwhm if keep_truth else 0.0,
    )


def _compute_wide_transform(image: np.ndarray) -> np.ndarray:
    """Return the transform of an image on a grid of twice the side."""
    wide = np.pad(image.astype(np.float32), image.shape[-1] // 2)
    return _drop_nyquist(np.asarray(fft.rfft2(fft.ifftshift(wide))))


def _invert_wide_transform(transform: np.ndarray) -> np.ndarray:
    """Return the middle of the image of a transform, half of its side."""
    size = transform.shape[-2] // 2
    image = fft.irfft2(transform)
    half = size // 2
    # The origin is at pixel 0; what is wanted lies in its four corners.
    index = np.arange(-half, half)
    middle: np.ndarray = image[np.ix_(index, index)]
    return middle


def _drop_nyquist(transform: np.ndarray) -> np.ndarray:
    half = transform.shape[-2] // 2
    transform[..., half, :] = 0
    transform[..., half] = 0
    return transform


def draw_to_magnitude(n: int, seed: int, max_magnitude: float) -> list[GalaxyParameters]:
    """Draw galaxies of the population that are bright enough.

    Parameters
    ----------
    n
        Number of galaxies.
    seed
        Seed.
    max_magnitude
        Galaxies that are fainter are drawn anew.

    Raises
    ------
    GalaxySetError
        Raised if there are none as bright.
    """
    chosen: list[GalaxyParameters] = []
    for attempt in range(1000):
        drawn = draw_parameters(max(n, 64), seed=[seed, 0, attempt])
        chosen += [galaxy for galaxy in drawn if galaxy.magnitude <= max_magnitude]
        if len(chosen) >= n:
            return chosen[:n]
    raise GalaxySetError(f"The population has no galaxies as bright as magnitude {max_magnitude}.")


def make_hst_psfs(n: int, rng: np.random.Generator, *, size: int, pixel_scale: float) -> np.ndarray:
    """Make PSFs like those of the ACS camera of HST in F814W.

    The pupil of 2.4 m with an obscuration of a third; random defocus,
    astigmatism and coma of some hundredths of a wave; charge diffusion as a
    Gaussian of 0.07 arcsec FWHM; the pixels of 0.05 arcsec and, after
    drizzling, of 0.03 arcsec.

    Parameters
    ----------
    n
        Number of PSFs.
    rng
        Source of random numbers.
    size
        Even number of pixels on a side.
    pixel_scale
        Side of a pixel in arcsec.

    Returns
    -------
    psf
        Images of unit flux, shape ``(n, size, size)``.
    """
    detector = galsim.Convolve(galsim.Pixel(0.05), galsim.Pixel(0.03), galsim.Gaussian(fwhm=0.07))
    fixed = draw_transform(detector, size=size, pixel_scale=pixel_scale)
    psfs = []
    for _ in range(n):
        defocus, *others = rng.normal(0, [0.04, 0.02, 0.02, 0.015, 0.015]).tolist()
        optics = galsim.OpticalPSF(
            lam=814, diam=2.4, obscuration=0.33, defocus=defocus, astig1=others[0], astig2=others[1],
            coma1=others[2], coma2=others[3], oversampling=1.0, pad_factor=1.0,
        )  # fmt: skip
        transform = draw_transform(optics, size=size, pixel_scale=pixel_scale) * fixed
        psfs.append(invert_transform(transform / transform[0, 0].real))
    return np.stack(psfs)


def read_cosmos_correlation() -> np.ndarray:
    """Read the noise correlation of COSMOS images that comes with GalSim.

    Returns
    -------
    correlation
        By distance in pixels of 0.03 arcsec, zero distance at the centre.
    """
    return np.asarray(
        fits.getdata(Path(galsim.meta_data.share_dir) / "acs_I_unrot_sci_20_cf.fits"), dtype=np.float64
    )


def _resample_power(correlation: np.ndarray, size: int, pixel_scale: float) -> np.ndarray:
    """Return the powers of COSMOS noise at the frequencies of a grid.

    The correlation is summed by the definition of its transform, so that the
    grid need not be a multiple of the pixels of COSMOS.
    """
    reach = correlation.shape[0] // 2
    offsets = np.arange(-reach, reach + 1)
    step = 2 * math.pi * COSMOS_PIXEL_SCALE
    along_y = np.exp(-1j * step * np.outer(np.fft.fftfreq(size, pixel_scale), offsets))
    along_x = np.exp(-1j * step * np.outer(np.fft.rfftfreq(size, pixel_scale), offsets))
    power = (along_y @ correlation @ along_x.T).real / correlation[reach, reach]
    return np.maximum(power, 1e-3)

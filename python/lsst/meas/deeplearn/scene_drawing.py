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


"""Drawing the made-up sky of `.scene` with GalSim."""

from __future__ import annotations

__all__ = (
    "compute_transfer",
    "draw_galaxies",
    "draw_galaxies_in_bands",
    "draw_psf_kernel",
    "draw_stars",
    "make_psf",
)

import functools
import math
from collections.abc import Callable

import galsim
import numpy as np
from scipy.special import gamma

from .scene import (
    AB_ZERO_POINT,
    ARMS,
    BULGE,
    DISK,
    PIXEL_SCALE,
    PSF_BETA,
    SPHEROID_INDEX,
    SURVEY,
    BandSettings,
    Galaxies,
    Stars,
)

FAINT_MAGNITUDE = 23.2
"""Galaxies fainter than this in i are drawn from a library of stamps."""

ARMS_MAGNITUDE = 22.0
"""Galaxies fainter than this in i are too small to show spiral arms."""

GSPARAMS = galsim.GSParams(folding_threshold=1e-2, kvalue_accuracy=1e-4, maximum_fft_size=8192)
"""Accuracy of drawing: a thousandth of the peak."""


def make_psf(fwhm: float, g1: float = 0.0, g2: float = 0.0, beta: float = PSF_BETA) -> galsim.GSObject:
    """Return a PSF with the response of the pixel in it, a Moffat profile.

    Parameters
    ----------
    fwhm
        Width in arcsec.
    g1, g2
        Reduced shear of its ellipse.
    beta
        Index of the profile.
    """
    return galsim.Moffat(beta=beta, fwhm=fwhm).shear(g1=g1, g2=g2)


def draw_psf_kernel(psf: galsim.GSObject, size: int, *, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """Return the image of a star on a stamp of odd size.

    Parameters
    ----------
    psf
        The PSF, from `make_psf`.
    size
        Odd side of the stamp in pixels.
    dx, dy
        Position in pixels from the centre of the stamp.

    Returns
    -------
    kernel
        Shape ``(size, size)``, of unit sum when ``dx`` and ``dy`` are 0.
    """
    kernel = _draw(psf, size, dx, dy).astype(np.float64)
    return kernel / (kernel.sum() if dx == dy == 0 else 1.0)


def draw_galaxies(
    image: np.ndarray,
    galaxies: Galaxies,
    band: str,
    get_psf: Callable[[float, float], galsim.GSObject],
    settings: BandSettings | None = None,
) -> None:
    """Add galaxies to an image.

    Parameters
    ----------
    image
        Image in nJy, which is changed.
    galaxies
        The galaxies.
    band
        Name of the band.
    get_psf
        Returns the PSF at a position (x, y) in pixels.
    settings
        What the coadds are like in this band; by default as `SURVEY` says.

    Notes
    -----
    Galaxies fainter than `FAINT_MAGNITUDE` have one component, the mean PSF
    of the band, and rounded shapes and positions, so that one stamp serves
    many.
    """
    settings = settings or SURVEY[band]
    fluxes = galaxies.compute_fluxes(band) * 10 ** (-0.4 * settings.galaxy_offset)
    threshold = 0.15 * settings.sky_noise
    faint = galaxies.magnitude > FAINT_MAGNITUDE
    for k in np.flatnonzero(faint):
        x, y = galaxies.x[k], galaxies.y[k]
        main = BULGE if galaxies.fraction[k, BULGE] > 0.5 else DISK
        flux = fluxes[k].sum()
        stamp = _draw_faint(
            settings.psf_fwhm,
            settings.psf_beta,
            SPHEROID_INDEX if main == BULGE else 1.0,
            round(math.log10(galaxies.half_light_radius[k, main]) / 0.15),
            round(galaxies.axis_ratio[k, main] / 0.2),
            round(galaxies.position_angle[k] / (np.pi / 6)) % 6,
            math.floor(2 * (x - math.floor(x + 0.5))),
            math.floor(2 * (y - math.floor(y + 0.5))),
        )
        _add_stamp(image, stamp, x, y, flux)
    for k in np.flatnonzero(~faint):
        x, y = galaxies.x[k], galaxies.y[k]
        profile, radius = _make_profile(galaxies, int(k), fluxes[k], threshold)
        profile = galsim.Convolve(profile, get_psf(x, y), gsparams=GSPARAMS)
        stamp = _draw(profile, 2 * radius + 1, x - math.floor(x + 0.5), y - math.floor(y + 0.5))
        _add_stamp(image, stamp, x, y, 1.0)


def compute_transfer(profile: galsim.GSObject, side: int) -> np.ndarray:
    """Return the Fourier transform of a profile at the modes of an image.

    Parameters
    ----------
    profile
        The profile.
    side
        Even number of pixels on a side of the image.

    Returns
    -------
    transfer
        The modes of `numpy.fft.rfft2`, complex64, shape
        ``(side, side / 2 + 1)``; those of the Nyquist frequency are 0.
    """
    step = 2 * math.pi / (side * PIXEL_SCALE)
    modes = profile.drawKImage(galsim.ImageCF(side, side, scale=step)).array
    transfer = np.zeros((side, side // 2 + 1), dtype=np.complex64)
    transfer[:, :-1] = np.fft.ifftshift(modes[:, side // 2 :], axes=0)
    transfer[side // 2] = 0
    return transfer


def draw_galaxies_in_bands(
    galaxies: Galaxies, fluxes: np.ndarray, transfer: np.ndarray, size: int
) -> np.ndarray:
    """Draw galaxies on a small image in several bands at once.

    Parameters
    ----------
    galaxies
        The galaxies.
    fluxes
        Fluxes in nJy as `Galaxies.compute_fluxes` returns them, shape
        ``(N, B, 3)``.
    transfer
        `compute_transfer` of the PSF in each band, on an image that is larger
        than this one, shape ``(B, side, side / 2 + 1)``.
    size
        Side of the image in pixels.

    Returns
    -------
    image
        Image in nJy, float32, shape ``(B, size, size)``.

    Notes
    -----
    A part of a galaxy has one shape in all bands, whose Fourier transform is
    computed once.  The larger image repeats itself: what a galaxy has beyond
    its edge comes back at the other side.
    """
    side = transfer.shape[1]
    spectrum = np.zeros_like(transfer)
    for k in range(len(galaxies)):
        angle, flux = galaxies.position_angle[k], fluxes[k].astype(np.float32)  # (B, 3)
        if galaxies.magnitude[k] > ARMS_MAGNITUDE:
            flux = np.stack([flux[:, BULGE], flux[:, DISK] + flux[:, ARMS], 0 * flux[:, ARMS]], axis=1)
        radius, q = galaxies.half_light_radius[k], galaxies.axis_ratio[k]
        for part in np.flatnonzero(flux.any(axis=0)):
            if part == ARMS:
                profile = _make_arms(int(galaxies.seed[k]), 1.0, radius[DISK], q[DISK], angle)
            else:
                index = float(galaxies.sersic_index[k]) if part == BULGE else 1.0
                profile = _make_sersic(index, 1.0, radius[part], q[part], angle)
            profile = profile.shift(galaxies.x[k] * PIXEL_SCALE, galaxies.y[k] * PIXEL_SCALE)
            spectrum += flux[:, part, None, None] * compute_transfer(profile, side)
    return np.fft.irfft2(spectrum * transfer, s=(side, side)).astype(np.float32)[:, :size, :size]


def draw_stars(
    image: np.ndarray,
    stars: Stars,
    band: str,
    get_psf: Callable[[float, float], galsim.GSObject],
    settings: BandSettings | None = None,
) -> None:
    """Add stars to an image.

    Parameters
    ----------
    image
        Image in nJy, which is changed.
    stars
        The stars.
    band, get_psf, settings
        As for `draw_galaxies`.
    """
    settings = settings or SURVEY[band]
    beta = settings.psf_beta
    for x, y, magnitude in zip(stars.x, stars.y, stars.magnitudes[band], strict=True):
        flux = 10 ** (-0.4 * (magnitude - AB_ZERO_POINT))
        # Where the Moffat profile falls below a part of the noise.
        center = flux * (beta - 1) / (math.pi * settings.psf_scale**2)
        contrast = max(center / (0.2 * settings.sky_noise), 1.0)
        radius = int(np.clip(settings.psf_scale * contrast ** (0.5 / beta), 8, 400))
        stamp = _draw(get_psf(x, y), 2 * radius + 1, x - math.floor(x + 0.5), y - math.floor(y + 0.5))
        _add_stamp(image, stamp, x, y, flux)


@functools.cache
def _draw_faint(
    psf_fwhm: float,
    psf_beta: float,
    index: float,
    log_radius: int,
    axis_ratio: int,
    angle: int,
    dx: int,
    dy: int,
) -> np.ndarray:
    """Draw a galaxy of unit flux with rounded parameters, see the caller."""
    radius, q = 10 ** (0.15 * log_radius), max(0.2 * axis_ratio, 0.2)
    profile = _make_sersic(index, 1.0, radius, q, angle * np.pi / 6)
    profile = galsim.Convolve(profile, make_psf(psf_fwhm, beta=psf_beta), gsparams=GSPARAMS)
    size = 2 * int(np.clip(10 + 3 * radius / PIXEL_SCALE, 12, 40)) + 1
    return _draw(profile, size, 0.5 * dx + 0.25, 0.5 * dy + 0.25)


def _make_profile(
    galaxies: Galaxies, k: int, fluxes: np.ndarray, threshold: float
) -> tuple[galsim.GSObject, int]:
    """Return the profile of a galaxy and the radius of its stamp."""
    angle = galaxies.position_angle[k]
    parts, radius = [], 12.0
    if galaxies.magnitude[k] > ARMS_MAGNITUDE:
        fluxes = np.array([fluxes[BULGE], fluxes[DISK] + fluxes[ARMS], 0.0])
    for part, index in ((BULGE, galaxies.sersic_index[k]), (DISK, 1.0)):
        flux, size, q = fluxes[part], galaxies.half_light_radius[k, part], galaxies.axis_ratio[k, part]
        if flux > 0:
            parts.append(_make_sersic(index, flux, size, q, angle))
            radius = max(radius, 8 + _compute_visible_radius(index, flux, size, q, threshold))
    if fluxes[ARMS] > 0:
        size, q = galaxies.half_light_radius[k, DISK], galaxies.axis_ratio[k, DISK]
        parts.append(_make_arms(int(galaxies.seed[k]), fluxes[ARMS], size, q, angle))
        radius = max(radius, 8 + 3.5 * size / PIXEL_SCALE)
    return galsim.Sum(parts), int(min(radius, 500))


def _make_sersic(index: float, flux: float, radius: float, q: float, angle: float) -> galsim.GSObject:
    """Return a Sersic profile, the radius being that of the major axis."""
    circular = radius * math.sqrt(q)
    if index == 1.0:
        profile = galsim.Exponential(half_light_radius=circular, flux=flux, gsparams=GSPARAMS)
    else:
        profile = galsim.Sersic(index, half_light_radius=circular, flux=flux, gsparams=GSPARAMS)
    return profile.shear(q=q, beta=angle * galsim.radians)


def _make_arms(seed: int, flux: float, radius: float, q: float, angle: float) -> galsim.GSObject:
    """Return two logarithmic spiral arms with knots, on an inclined disk."""
    rng = np.random.default_rng(seed)
    size = 65
    axis = np.linspace(-3.5, 3.5, size)
    x, y = np.meshgrid(axis, axis)
    r, phi = np.hypot(x, y) + 1e-3, np.arctan2(y, x)
    winding = rng.uniform(1.5, 4.0) * rng.choice([-1, 1])
    phase = 2 * (phi - winding * np.log(r)) + rng.uniform(0, 2 * np.pi)
    disk = np.exp(-1.3 * r) * np.clip(r / 0.4, 0, 1)
    light = disk * np.exp(2.5 * (np.cos(phase) - 1))
    for _ in range(rng.poisson(12)):
        # Knots lie where the arms are bright.
        row, column = np.unravel_index(rng.choice(size**2, p=light.ravel() / light.sum()), light.shape)
        width = rng.uniform(0.06, 0.15)
        distance2 = (x - axis[column]) ** 2 + (y - axis[row]) ** 2
        light = light + rng.uniform(0.2, 1.0) * disk[row, column] * np.exp(-distance2 / (2 * width**2))
    # As with Sersic profiles, shearing keeps the area.
    image = galsim.Image(light * (r < 3.5), scale=7 / (size - 1) * radius * math.sqrt(q))
    arms = galsim.InterpolatedImage(image, x_interpolant="cubic", flux=flux, gsparams=GSPARAMS)
    return arms.shear(q=q, beta=angle * galsim.radians)


def _compute_visible_radius(index: float, flux: float, radius: float, q: float, threshold: float) -> float:
    """Return the radius in pixels where a profile falls below a threshold.

    From the surface brightness of Graham & Driver (2005), equation 1.
    """
    b = 2 * index - 1 / 3 + 0.009876 / index
    area = 2 * np.pi * index * np.exp(b) * b ** (-2 * index) * gamma(2 * index) * q
    brightness = flux / area / (radius / PIXEL_SCALE) ** 2
    growth = max(1 + math.log(max(brightness / threshold, 1e-9)) / b, 0.1)
    return radius / PIXEL_SCALE * growth**index


def _draw(profile: galsim.GSObject, size: int, dx: float, dy: float) -> np.ndarray:
    """Return the values of a profile at pixels, times their area."""
    image = profile.drawImage(
        nx=size, ny=size, scale=PIXEL_SCALE, method="no_pixel", offset=(dx, dy), dtype=np.float32
    )
    return image.array


def _add_stamp(image: np.ndarray, stamp: np.ndarray, x: float, y: float, factor: float) -> None:
    """Add a stamp to the part of an image that it overlaps."""
    bottom = math.floor(y + 0.5) - stamp.shape[0] // 2
    left = math.floor(x + 0.5) - stamp.shape[1] // 2
    rows = slice(max(bottom, 0), max(min(bottom + stamp.shape[0], image.shape[0]), 0))
    columns = slice(max(left, 0), max(min(left + stamp.shape[1], image.shape[1]), 0))
    if rows.start < rows.stop and columns.start < columns.stop:
        part = stamp[rows.start - bottom : rows.stop - bottom, columns.start - left : columns.stop - left]
        image[rows, columns] += np.float32(factor) * part

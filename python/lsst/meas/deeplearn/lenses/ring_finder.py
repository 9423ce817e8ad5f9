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


"""RingFinder: blue arcs about red galaxies, by their colour and shape."""

from __future__ import annotations

__all__ = ("Residuals", "RingFinderConfig", "RingFinderResult", "compute_residuals", "find_rings")

import dataclasses

import numpy as np
from scipy import fft, ndimage

from lsst.pex.config import Config, Field, FieldValidationError

from ..cutouts import Cutouts

AB_ZERO_POINT = 31.4
"""AB magnitude of 1 nJy."""

BATCH_SIZE = 128
"""Objects whose arrays are in memory together."""

IN_PLANE = ndimage.generate_binary_structure(3, 1) & (np.arange(3) == 1)[:, None, None]
"""Neighbours of a pixel in a stack of images, those that share a side."""


class RingFinderConfig(Config):
    """Settings of RingFinder."""

    # What is subtracted from what, and where.
    blueBand = Field[str](
        doc="Band in which lensed sources stand out; the name of a band of the cutouts.",
        default="g",
    )
    redBand = Field[str](
        doc="Band that predicts the light of the lens; the name of a band of the cutouts.",
        default="i",
    )
    innerRadius = Field[float](
        doc="Inner radius (arcsec) of the annulus in which fluxes are scaled and the S/N is measured, and "
        "smallest distance of the centre of an arc from the lens.",
        default=0.5,
    )
    outerRadius = Field[float](
        doc="Outer radius (arcsec) of the same annulus, and largest distance of the centre of an arc from "
        "the lens.  Stamps must reach this far.",
        default=2.7,
    )

    # Regions of the residual.
    snrThreshold = Field[float](
        doc="Residual above which pixels belong to a region, in units of the noise that a pixel of "
        "noisePixelScale has before the PSFs are matched.",
        default=1.2,
    )
    noisePixelScale = Field[float](
        doc="Side (arcsec) of the pixels whose noise snrThreshold refers to; the default is CFHTLS's.",
        default=0.187,
    )
    minArea = Field[float](
        doc="Smallest area (arcsec^2) of a region; the default is 10 CFHTLS pixels of 0.187 arcsec.",
        default=0.35,
    )
    minMinorAxis = Field[float](
        doc="Smallest minor axis (arcsec) of a region: the square root of the smaller second moment.",
        default=0.2,
    )
    maxMagnitude = Field[float](
        doc="Faintest AB magnitude of a region in the residual of the blue band, at the depth of limitNoise.",
        default=25.5,
    )
    maxSurfaceBrightness = Field[float](
        doc="Faintest mean surface brightness (AB mag/arcsec^2) of a region in that residual, at the depth "
        "of limitNoise.",
        default=26.3,
    )
    limitNoise = Field[float](
        doc="Noise (nJy) of the residual in a pixel of noisePixelScale for which these two limits hold; the "
        "default is CFHTLS's.  At other depths they are fainter or brighter by the ratio of the noise, so "
        "that they mean the same signal to noise.  0 keeps them as they are.",
        default=2.8,
    )
    maxTilt = Field[float](
        doc="Largest angle (degrees) between the major axis of a region and the tangential direction.",
        default=30.0,
    )

    # The decision.
    maxAxisRatio = Field[float](
        doc="Axis ratio below which one region alone makes a lens; two or more need no elongation.",
        default=0.7,
    )

    # Bad pixels.
    maxBadWeight = Field[float](
        doc="Fraction of the weight of the PSF that may fall on bad pixels, or outside the stamp, before a "
        "pixel of the matched images counts as bad.",
        default=0.05,
    )
    minUsableFraction = Field[float](
        doc="Fraction of the annulus that must be usable; objects with less have no S/N.",
        default=0.5,
    )

    def validate(self) -> None:
        super().validate()
        if self.limitNoise < 0.0:
            raise FieldValidationError(RingFinderConfig.limitNoise, self, "The noise must not be negative.")
        if not 0.0 <= self.innerRadius < self.outerRadius:
            raise FieldValidationError(
                RingFinderConfig.outerRadius,
                self,
                f"The annulus must have 0 <= innerRadius < outerRadius, not {self.innerRadius} and "
                f"{self.outerRadius} arcsec.",
            )


@dataclasses.dataclass(frozen=True, eq=False)
class RingFinderResult:
    """What RingFinder says of N objects."""

    snr: np.ndarray
    """S/N of the blue residual in the annulus, float32, shape ``(N,)``; NaN
    where it cannot be computed."""

    is_lens: np.ndarray
    """Whether the regions of the residual look like arcs, shape ``(N,)``."""

    n_regions: np.ndarray
    """Number of regions that look like arcs, int32, shape ``(N,)``."""

    alpha: np.ndarray
    """Ratio of blue to red flux in the annulus, float32, shape ``(N,)``; NaN
    where it cannot be computed."""

    psf_matched: np.ndarray
    """Whether the PSFs of the two bands were matched, shape ``(N,)``; if not,
    the centre of a lens may leave a residual ring of its own."""


@dataclasses.dataclass(frozen=True, eq=False)
class Residuals:
    """The images blue - alpha red of N objects, and their noise."""

    image: np.ndarray
    """Residual in nJy, shape ``(N, S, S)``; NaN where pixels are bad, and for
    objects for which it cannot be computed."""

    noise: np.ndarray
    """Standard deviation of each pixel in nJy, shape ``(N, S, S)``."""

    alpha: np.ndarray
    """Ratio of blue to red flux in the annulus, shape ``(N,)``; NaN where it
    cannot be computed."""

    psf_matched: np.ndarray
    """Whether the PSFs of the two bands were matched, shape ``(N,)``."""

    x: np.ndarray
    """Column of each pixel relative to the object, in arcsec, shape
    ``(N, 1, S)``."""

    y: np.ndarray
    """Row of each pixel relative to the object, in arcsec, shape
    ``(N, S, 1)``."""

    _variance: np.ndarray
    """Variance before matching, scaled to the residual, ``(N, 2, S, S)``."""

    _kernels: np.ndarray
    """Transforms of the matching kernels, shape ``(N, 2, L, L // 2 + 1)``."""

    def compute_sum_noise(self, masks: np.ndarray, objects: np.ndarray | slice) -> np.ndarray:
        """Return the noise of sums of the residual over pixels, in nJy.

        Matching makes neighbouring pixels share noise.  The noise of the
        pixels of the coadds counts as independent.

        Parameters
        ----------
        masks
            Pixels to sum over, shape ``(M, S, S)``.
        objects
            Index of the object of each mask, shape ``(M,)``.
        """
        size = masks.shape[-1]
        kernels = self._kernels[objects].conj()
        # Weight of each pixel of the original images in the sum.
        weights = _convolve(masks.astype(np.float64)[:, None], kernels, size)  # (M, 2, S, S)
        return np.sqrt(np.einsum("mbyx,mbyx,mbyx->m", weights, weights, self._variance[objects]))


def find_rings(cutouts: Cutouts, config: RingFinderConfig | None = None) -> RingFinderResult:
    """Find arcs of lensed blue sources about red lenses.

    The algorithm is RingFinder (Gavazzi et al. 2014, ApJ 785, 144) as coded
    in LensPop (Collett 2015, ApJ 811, 20).  Both bands are brought to the
    same PSF by convolving each with the PSF of the other; the red image,
    scaled to the blue flux in the annulus, is subtracted from the blue one;
    connected pixels above a threshold are regions, and those with the
    brightness, size, distance and orientation of arcs are counted.

    Parameters
    ----------
    cutouts
        Stamps with the blue and the red band among theirs.
    config
        Settings; the published ones by default.

    Returns
    -------
    result
        S/N and decision.  An object that lacks one of the bands, has a bad
        pixel at its centre, too few good pixels in the annulus, or no red
        flux there has NaN and is no lens.

    Raises
    ------
    ValueError
        Raised if the stamps lack one of the bands altogether, or are smaller
        than the annulus.

    Notes
    -----
    The S/N is LensPop's ``SNfunc``: pixels are sorted by their S/N, and the
    sum of the first k over its noise is taken where k makes it largest.
    Noise alone makes it about 3.5, and about 15 where PSFs are not matched.

    Where this differs from LensPop:

    * The annulus is in arcsec.  LensPop's ``RingFinder`` class compares
      radii in pixels with the limits in arcsec.
    * LensPop draws images with the matched PSF and adds independent noise.
      Here real pixels are convolved, so their noise falls and becomes
      correlated.  The S/N is that of the convolved images, with their
      variance and covariance; k is chosen as if there were no covariance.
      Noise that is correlated on the coadd already is underestimated.
      Regions are those above LensPop's threshold, in the noise before the
      convolution.
    * This threshold and the smallest area are for pixels of one size, that
      of CFHTLS, so that the same sky gives the same regions at any pixel
      scale.
    * The limits on magnitude and surface brightness move with the noise.
      They are those of CFHTLS; as they are, they would drop most of the arcs
      that regions of ten years of LSST show (a threshold of 1.2 sigma is 27.4
      mag/arcsec^2 there, and 26.6 in CFHTLS).
    * The axis ratio that decides about one region is that of this region;
      LensPop takes that of the last region that it looked at.
    * Bad pixels are left out, and objects without a PSF in one of the bands
      are not matched, and flagged.

    As in LensPop, a closed ring of even brightness is one region about the
    centre, and is not counted: a galaxy that is bluer outside leaves the
    same.  Its S/N is high.
    """
    config = RingFinderConfig() if config is None else config
    n = len(cutouts)
    result = RingFinderResult(
        snr=np.full(n, np.nan, dtype=np.float32),
        is_lens=np.zeros(n, dtype=bool),
        n_regions=np.zeros(n, dtype=np.int32),
        alpha=np.full(n, np.nan, dtype=np.float32),
        psf_matched=np.zeros(n, dtype=bool),
    )
    _check_stamps(cutouts, config)
    for start in range(0, n, BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        residuals = compute_residuals(cutouts[batch], config)
        result.snr[batch] = _compute_snr(residuals, config)
        result.is_lens[batch], result.n_regions[batch] = _find_arcs(residuals, cutouts.pixel_scale, config)
        result.alpha[batch] = residuals.alpha
        result.psf_matched[batch] = residuals.psf_matched
    return result


def compute_residuals(cutouts: Cutouts, config: RingFinderConfig | None = None) -> Residuals:
    """Subtract the red image, scaled, from the blue one, PSFs matched.

    Parameters
    ----------
    cutouts
        Stamps with the blue and the red band among theirs.
    config
        Settings; the published ones by default.

    Returns
    -------
    residuals
        Images and their noise; these are all in memory, so pass a part of
        the cutouts at a time.

    Raises
    ------
    ValueError
        Raised as by `find_rings`.
    """
    config = RingFinderConfig() if config is None else config
    _check_stamps(cutouts, config)
    n, size, scale = len(cutouts), cutouts.size, cutouts.pixel_scale
    pair = [cutouts.bands.index(config.blueBand), cutouts.bands.index(config.redBand)]
    image = cutouts.image[:, pair].astype(np.float64)  # (N, 2, S, S)
    variance = cutouts.variance[:, pair].astype(np.float64)
    with np.errstate(invalid="ignore"):
        bad = cutouts.bad[:, pair] | ~np.isfinite(image) | ~(np.isfinite(variance) & (variance > 0))
    bad = bad.any(axis=1, keepdims=True)
    image[np.broadcast_to(bad, image.shape)] = 0.0
    variance[np.broadcast_to(bad, image.shape)] = 0.0

    # Each band is convolved with the PSF of the other.
    kernels, psf_matched, shift_x, shift_y = _make_kernels(cutouts, pair)
    length = fft.next_fast_len(size + kernels.shape[-1] // 2, real=True)
    transforms = fft.rfft2(_center_at_origin(kernels, length))
    matched = _convolve(image, transforms, size)
    matched_variance = _convolve(variance, fft.rfft2(_center_at_origin(kernels**2, length)), size)
    covered = _convolve(~bad, transforms, size).min(axis=1) >= 1.0 - config.maxBadWeight
    usable = covered & ~bad[:, 0] & (matched_variance > 0).all(axis=1)  # (N, S, S)

    # Stamps are centred on the pixel nearest to the object.
    pixels = np.arange(size) - size // 2
    x = (pixels - (_subpixel(cutouts.x) + shift_x)[:, None])[:, None, :] * scale
    y = (pixels - (_subpixel(cutouts.y) + shift_y)[:, None])[:, :, None] * scale
    radius = np.hypot(x, y)
    annulus = (radius > config.innerRadius) & (radius < config.outerRadius)
    usable_annulus = usable & annulus
    blue, red = np.where(usable_annulus[:, None], matched, 0.0).sum(axis=(2, 3)).T
    valid = (
        ~cutouts.missing_band[:, pair].any(axis=1)
        & ~bad[:, 0, size // 2, size // 2]
        & (usable_annulus.sum(axis=(1, 2)) >= config.minUsableFraction * annulus.sum(axis=(1, 2)))
        & (red > 0)
    )
    alpha = np.full(n, np.nan)
    alpha[valid] = blue[valid] / red[valid]
    factor = np.stack([np.ones(n), alpha**2], axis=1)[:, :, None, None]
    residual = np.where(usable, matched[:, 0] - alpha[:, None, None] * matched[:, 1], np.nan)
    noise = np.sqrt((factor * matched_variance.clip(min=0.0)).sum(axis=1))
    return Residuals(
        image=residual,
        noise=noise,
        alpha=alpha,
        psf_matched=psf_matched,
        x=x,
        y=y,
        _variance=variance * factor,
        _kernels=transforms,
    )


def _check_stamps(cutouts: Cutouts, config: RingFinderConfig) -> None:
    """Raise ValueError if RingFinder cannot work on these stamps."""
    if missing := {config.blueBand, config.redBand} - set(cutouts.bands):
        raise ValueError(
            f"RingFinder compares bands {config.blueBand} and {config.redBand}, but the cutouts have "
            f"{', '.join(cutouts.bands)}: {', '.join(sorted(missing))} missing.  Configure blueBand and "
            "redBand, or cut these bands too."
        )
    if cutouts.size * cutouts.pixel_scale < 2 * config.outerRadius:
        raise ValueError(
            f"Stamps of {cutouts.size} pixels of {cutouts.pixel_scale:.3f} arcsec are smaller than the "
            f"annulus of RingFinder, {2 * config.outerRadius:.1f} arcsec across; cut larger ones."
        )


def _subpixel(position: np.ndarray) -> np.ndarray:
    """Return the offsets of positions from the nearest pixel."""
    return np.nan_to_num(position - np.floor(position + 0.5))


def _make_kernels(cutouts: Cutouts, pair: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the kernels that match the PSFs of two bands.

    Parameters
    ----------
    cutouts
        Stamps with PSFs; objects with none in one of the bands get kernels
        that change nothing.
    pair
        Indices of the bands.

    Returns
    -------
    kernels
        Kernels of unit sum, each the PSF of the other band, shape
        ``(N, 2, K, K)``.
    psf_matched
        Whether they match the PSFs, shape ``(N,)``.
    shift_x, shift_y
        By how many pixels they move objects, shape ``(N,)``: PSFs are
        centred on the object, not on its pixel.
    """
    n, size = len(cutouts), cutouts.psf.shape[-1] | 1
    kernels = np.zeros((n, 2, size, size))
    psf = cutouts.psf[:, pair[::-1]].astype(np.float64)
    psf_matched = np.zeros(n, dtype=bool)
    if psf.size:
        total = psf.sum(axis=(2, 3))
        psf_matched = (np.isfinite(total) & (total > 0)).all(axis=1)
        kernels[psf_matched] = psf[psf_matched] / total[psf_matched, :, None, None]
    kernels[~psf_matched, :, size // 2, size // 2] = 1.0
    pixels = np.arange(size) - size // 2
    shift_x = (kernels.sum(axis=2) @ pixels).mean(axis=1)
    shift_y = (kernels.sum(axis=3) @ pixels).mean(axis=1)
    return kernels, psf_matched, shift_x, shift_y


def _center_at_origin(kernels: np.ndarray, length: int) -> np.ndarray:
    """Pad images to a side and roll their centre to the first pixel."""
    size = kernels.shape[-1]
    padded = np.zeros((*kernels.shape[:-2], length, length))
    padded[..., :size, :size] = kernels
    return np.roll(padded, (-(size // 2), -(size // 2)), axis=(-2, -1))


def _convolve(images: np.ndarray, transforms: np.ndarray, size: int) -> np.ndarray:
    """Convolve images with kernels given by their Fourier transforms."""
    length = transforms.shape[-2]
    product = fft.rfft2(images, s=(length, length)) * transforms
    return fft.irfft2(product, s=(length, length))[..., :size, :size]


def _compute_snr(residuals: Residuals, config: RingFinderConfig) -> np.ndarray:
    """Return the S/N of the residual in the annulus, shape ``(N,)``."""
    n = len(residuals.alpha)
    snr = np.full(n, np.nan)
    radius = np.hypot(residuals.x, residuals.y)
    inside = (
        (radius > config.innerRadius) & (radius < config.outerRadius) & np.isfinite(residuals.image)
    ).reshape(n, -1)
    image, noise = residuals.image.reshape(n, -1), residuals.noise.reshape(n, -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(inside, image / noise, -np.inf)  # (N, S * S)
    # No more pixels than the annulus of any object has.
    count = int(inside.sum(axis=1).max(initial=0))
    valid = np.flatnonzero(inside.any(axis=1))
    if not len(valid):
        return snr
    order = np.argsort(-ratio[valid], axis=1)[:, :count]
    flux = np.cumsum(np.where(inside, image, 0.0)[valid[:, None], order], axis=1)
    variance = np.cumsum(np.where(inside, noise**2, 0.0)[valid[:, None], order], axis=1)
    last = (flux / np.sqrt(variance)).argmax(axis=1)
    threshold = ratio[valid, order[np.arange(len(valid)), last]]
    masks = (ratio[valid] >= threshold[:, None]).reshape(len(valid), *residuals.image.shape[1:])
    total = np.where(masks, residuals.image[valid], 0.0).sum(axis=(1, 2))
    snr[valid] = total / residuals.compute_sum_noise(masks, valid)
    return snr


def _find_arcs(
    residuals: Residuals, pixel_scale: float, config: RingFinderConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the decision and the number of arcs, each of shape ``(N,)``."""
    n, size, _ = residuals.image.shape
    noise = np.sqrt(residuals._variance.sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        snr = residuals.image / noise
    deeper = _compute_depth(noise, pixel_scale, config)
    above = snr * (config.noisePixelScale / pixel_scale) > config.snrThreshold
    labels, n_labels = ndimage.label(above, structure=IN_PLANE)
    pixels = np.flatnonzero(labels)
    label = labels.ravel()[pixels] - 1
    flux_of_pixel = residuals.image.ravel()[pixels]
    k, row, column = np.unravel_index(pixels, labels.shape)
    x, y = residuals.x[k, 0, column], residuals.y[k, row, 0]

    def total(weights: np.ndarray) -> np.ndarray:
        return np.bincount(label, weights=weights, minlength=n_labels)

    owner = np.zeros(n_labels, dtype=np.intp)
    owner[label] = k
    area = np.bincount(label, minlength=n_labels) * pixel_scale**2
    flux = total(flux_of_pixel)
    x_mean, y_mean = total(flux_of_pixel * x) / flux, total(flux_of_pixel * y) / flux
    radius = np.hypot(x_mean, y_mean)
    xx = total(flux_of_pixel * x**2) / flux - x_mean**2
    yy = total(flux_of_pixel * y**2) / flux - y_mean**2
    xy = total(flux_of_pixel * x * y) / flux - x_mean * y_mean
    mean, half_difference = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    minor = np.sqrt((mean - half_difference).clip(min=0.0))
    major = np.sqrt((mean + half_difference).clip(min=0.0))
    position_angle = np.arctan2(2 * xy, xx - yy) / 2
    # The angle between the major axis and the tangent, 0 to 90 degrees.
    tilt = np.degrees(np.arccos(np.abs(np.sin(position_angle - np.arctan2(y_mean, x_mean))).clip(max=1.0)))
    with np.errstate(divide="ignore"):
        is_arc = (
            (area >= config.minArea)
            & (radius > config.innerRadius)
            & (radius < config.outerRadius)
            & (minor >= config.minMinorAxis)
            & (AB_ZERO_POINT - 2.5 * np.log10(flux) <= config.maxMagnitude + deeper[owner])
            & (AB_ZERO_POINT - 2.5 * np.log10(flux / area) <= config.maxSurfaceBrightness + deeper[owner])
            & (tilt <= config.maxTilt)
        )
    arcs = np.flatnonzero(is_arc)
    n_regions = np.bincount(owner[arcs], minlength=n)
    elongated = np.bincount(owner[arcs], weights=minor[arcs] < config.maxAxisRatio * major[arcs], minlength=n)
    return (n_regions >= 2) | ((n_regions == 1) & (elongated > 0)), n_regions


def _compute_depth(noise: np.ndarray, pixel_scale: float, config: RingFinderConfig) -> np.ndarray:
    """Return by how many magnitudes objects are deeper than the limits."""
    if config.limitNoise == 0.0:
        return np.zeros(len(noise))
    good = np.where(noise > 0, noise, np.nan).reshape(len(noise), -1)
    typical = np.array([np.nanmedian(row) if np.isfinite(row).any() else config.limitNoise for row in good])
    return np.asarray(-2.5 * np.log10(typical * config.noisePixelScale / pixel_scale / config.limitNoise))

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

"""Scenes of galaxies that overlap, with detection in the loop.

Galaxies at random positions are sheared with the whole scene.  As in
metadetection (Sheldon et al. 2020, arXiv:1911.02505), every artificially
sheared version of the scene is detected and measured anew, so that the
response includes that of detection and blending.  Nothing is deblended.
"""

from __future__ import annotations

__all__ = ("Detections", "MetaDetection", "compute_blended_sums", "draw_scene")

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import fft

from ..galaxies.fourier import compute_noise_power
from ..galaxies.render import FineImages, Renderer
from .bias import ShearSums
from .metacal import Metacalibration
from .morphologies import Morphology
from .shapes import STEPS
from .simulation import GalaxySample, Scene, Stream, correlate_noise, make_rng

SHARPNESS = (0.3, 1.0)
"""Curvature of a maximum along its longest axis, in units of that of a star,
at which weights are 0 and 1.

Where two objects blend, a maximum flattens until it is none any more.
"""

_FWHM = math.sqrt(8 * math.log(2))

# Modes count whose amplitude is more than this after smoothing.
_NEGLIGIBLE = 1e-6

# How many pixels away from a maximum count in its derivatives.
_REACH = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """What was found in a version of an image."""

    x: np.ndarray
    """Columns in pixels from the centre of the image, before the artificial
    shear, shape ``(N,)``."""

    y: np.ndarray
    """Rows likewise."""

    e: np.ndarray
    """Ellipticities, shape ``(N, 2)``."""

    snr: np.ndarray
    """Signal to noise of the weighted flux, shape ``(N,)``."""

    weight: np.ndarray
    """Weight, which rises from 0 to 1 with the signal to noise and the
    sharpness of the maximum: it is 0 where shear makes objects appear, so
    that sums over objects are smooth in shear."""


class MetaDetection:
    r"""Detects and measures an image under five artificial shears.

    Parameters
    ----------
    psf
        Image of a star centred on a pixel, shape ``(y, x)``; odd side.
    pixel_scale
        Side of a pixel in arcsec.
    size
        Even side of the images in pixels.
    target_fwhm, weight_fwhm, step, regularization
        As for `lsst.meas.deeplearn.shear.metacal.Metacalibration`, of which
        this is the same measurement.
    min_snr
        Signal to noise above which a maximum is an object; its weight is 1
        at twice as much.
    noise_correlation
        As for `lsst.meas.deeplearn.shear.metacal.Metacalibration`.

    Raises
    ------
    ValueError
        Raised if the PSF is undersampled, or wider than the target.

    Notes
    -----
    An image that is deconvolved from its PSF, sheared, convolved with the
    target PSF and smoothed with the weight is the weighted flux f at every
    place.  Its local maxima are the objects, and its second derivatives there
    their shapes.  With S the artificial shear, I and P the transforms of
    image and PSF, and :math:`s^2` the sum of the variances of target and
    weight,

    .. math::
        f(S u) = \int \frac{d^2 k}{(2 \pi)^2} \, 2 \pi \sigma_W^2
            e^{-s^2 |S^{-1} k|^2 / 2} \, \frac{I(k)}{P(k)} \, e^{i k u} ,

    so that all versions are products of the same Fourier modes, on the same
    pixels u; only derivatives have to be turned into those along x = S u.
    Opposite borders of the image are neighbours.
    """

    def __init__(
        self,
        psf: np.ndarray,
        *,
        pixel_scale: float,
        size: int,
        target_fwhm: float,
        weight_fwhm: float = 1.2,
        step: float = 0.01,
        regularization: float = 10.0,
        min_snr: float = 5.0,
        noise_correlation: np.ndarray | None = None,
    ) -> None:
        self.step = step
        self.size = size
        self.min_snr = min_snr
        self.regularization = regularization
        self._pixel_scale = pixel_scale
        weight_var, target_var = (weight_fwhm / _FWHM) ** 2, (target_fwhm / _FWHM) ** 2
        self._weight_var, self._s2 = weight_var, weight_var + target_var
        self._differences = _make_differences(math.sqrt(self._s2) / pixel_scale)
        # It has the same demands on a PSF.
        Metacalibration(
            pixel_scale=pixel_scale, stamp_size=len(psf), target_fwhm=target_fwhm, weight_fwhm=weight_fwhm
        ).make_kernels(psf)
        k = 2 * math.pi * fft.fftfreq(size, pixel_scale)
        kx, ky = np.meshgrid(np.abs(k[: size // 2 + 1]), k)
        smooth = -0.5 * self._s2 * (kx**2 + ky**2) > math.log(_NEGLIGIBLE)
        modes = np.stack([kx[smooth], ky[smooth]])  # (2, K)
        inverse_psf = 1 / _transform(psf, pixel_scale * modes)
        correlation = np.ones((1, 1)) if noise_correlation is None else noise_correlation
        shears = step * np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
        self._inverses = np.array([_make_inverse_shear(g1, g2) for g1, g2 in shears])
        self._filters, self._noise_filters = np.zeros((2, len(STEPS), *smooth.shape), dtype=np.complex64)
        for k_version, inverse in enumerate(self._inverses):
            sheared = inverse @ modes
            gauss = 2 * math.pi * weight_var * np.exp(-0.5 * self._s2 * (sheared**2).sum(axis=0))
            gauss /= pixel_scale**2
            self._filters[k_version, smooth] = gauss * inverse_psf
            # Noise that is sheared in a frame turned by 90 degrees is sheared
            # the other way, and the PSF is turned.
            opposite = pixel_scale * inverse @ sheared
            power = np.clip(_transform(correlation, opposite).real, 0.0, None)
            turned_psf = _transform(psf, np.array([[0, 1], [-1, 0]]) @ opposite)
            self._noise_filters[k_version, smooth] = gauss * np.sqrt(power) / np.abs(turned_psf)
        both = np.where((kx > 0) & (kx < kx.max()), 2, 1)
        noise_power = compute_noise_power(noise_correlation, size)
        self.flux_sigma = float(np.sqrt((both * noise_power * np.abs(self._filters[0]) ** 2).sum()) / size)
        """Standard deviation of the weighted flux for noise of one in a
        pixel."""

    def smooth(self, images: np.ndarray) -> np.ndarray:
        """Return the weighted flux at every place in all versions.

        Parameters
        ----------
        images
            Images, shape ``(N, y, x)``.

        Returns
        -------
        flux
            Float32, shape ``(N, 5, y, x)``.
        """
        return self._apply(self._filters, images)

    def smooth_fixnoise(self, noise: np.ndarray) -> np.ndarray:
        """Return what another realisation of the noise adds to the weighted
        flux, so that the noise as a whole does not respond to shear.

        Parameters
        ----------
        noise
            White noise, shape ``(N, y, x)``.

        Returns
        -------
        flux
            Float32, shape ``(N, 5, y, x)``.
        """
        return self._apply(self._noise_filters, noise)

    def measure(self, image: np.ndarray, fixnoise: np.ndarray, *, noise_sigma: float) -> list[Detections]:
        """Return what is detected in each of the versions of an image.

        Parameters
        ----------
        image
            The image, shape ``(y, x)``.
        fixnoise
            White noise as for `smooth_fixnoise`, as strong as that of the
            image.
        noise_sigma
            Standard deviation of the noise in a pixel.
        """
        flux = self.smooth(image[None]) + self.smooth_fixnoise(fixnoise[None])
        return self.detect(flux, noise_sigma=noise_sigma)[0]

    def detect(self, flux: np.ndarray, *, noise_sigma: float) -> list[list[Detections]]:
        """Return the maxima of weighted fluxes, between the pixels.

        Parameters
        ----------
        flux
            As from `smooth`.
        noise_sigma
            Standard deviation of the noise in a pixel.

        Returns
        -------
        detections
            One for each version of each image.
        """
        sigma = noise_sigma * self.flux_sigma
        image, version, row, column = _find_maxima(flux, self.min_snr * sigma)
        middle = self.size // 2
        derivatives = _differentiate(flux, self._differences, image, version, row, column)  # (28, N)
        x, y = np.zeros(len(row)), np.zeros(len(row))
        for _ in range(3):
            _, fx, fy, fxx, fxy, fyy = _expand(derivatives, x, y)
            determinant = np.where(fxx * fyy - fxy**2 > 0, fxx * fyy - fxy**2, np.inf)
            x = np.clip(x - (fyy * fx - fxy * fy) / determinant, -1.0, 1.0)
            y = np.clip(y - (fxx * fy - fxy * fx) / determinant, -1.0, 1.0)
        value, _, _, fxx, fxy, fyy = _expand(derivatives, x, y)
        inverse = self._inverses[version]
        hessian = np.moveaxis(np.array([[fxx, fxy], [fxy, fyy]]), -1, 0) / self._pixel_scale**2  # (N, 2, 2)
        hessian = inverse @ hessian @ inverse
        plus, cross = hessian[:, 0, 0] - hessian[:, 1, 1], 2 * hessian[:, 0, 1]
        curvature = -0.5 * (np.trace(hessian, axis1=1, axis2=2) + np.hypot(plus, cross))
        e = (
            np.stack([plus, cross], axis=1)
            * (self._weight_var / (value + self.regularization * sigma))[:, None]
        )
        snr = value / sigma
        low, high = SHARPNESS
        weight = _rise(snr / self.min_snr - 1) * _rise((self._s2 * curvature / value - low) / (high - low))
        # Objects are sorted by image and version.
        edges = np.searchsorted(image * len(STEPS) + version, np.arange(len(flux) * len(STEPS) + 1))
        columns = (column - middle + x, row - middle + y, e, snr, weight)
        found = [
            Detections(*(values[a:b] for values in columns)) for a, b in zip(edges, edges[1:], strict=False)
        ]
        return [found[k : k + len(STEPS)] for k in range(0, len(found), len(STEPS))]

    def _apply(self, filters: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Return images with each of the filters, ``(N, 5, y, x)``."""
        if np.shape(images)[1:] != (self.size, self.size):
            raise ValueError(f"Images have {self.size} x {self.size} pixels, not {np.shape(images)[1:]}.")
        modes = fft.rfft2(np.asarray(images, dtype=np.float32))
        result: np.ndarray = fft.irfft2(modes[:, None] * filters, s=(self.size, self.size))
        return result


def draw_scene(
    images: FineImages,
    galaxies: GalaxySample,
    renderer: Renderer,
    shear: Sequence[float],
    *,
    size: int,
    pixel_scale: float,
) -> np.ndarray:
    """Draw galaxies into one image, sheared about its centre.

    Parameters
    ----------
    images
        Galaxies of unit flux.
    galaxies
        The same galaxies, with positions as offsets from the centre of the
        image, before shear.
    renderer
        What draws stamps of them with this shear.
    shear
        The shear (g1, g2).
    size
        Side of the image in pixels; its centre is pixel ``size // 2``.
    pixel_scale
        Side of a pixel in arcsec.

    Returns
    -------
    image
        In nJy, float32, shape ``(y, x)``.
    """
    position = galaxies.offset @ np.linalg.inv(_make_inverse_shear(*shear))
    pixel = np.rint(position).astype(int)
    stamps = renderer.draw(images, offset=(position - pixel) * pixel_scale)
    stamps *= galaxies.flux.astype(np.float32)[:, None, None]
    side = stamps.shape[1]
    half = side // 2
    # Stamps may stick out of the image.
    wide = np.zeros((size + 2 * side,) * 2, dtype=np.float32)
    middle = side + size // 2
    for stamp, (x, y) in zip(stamps, pixel + middle, strict=True):
        if half <= min(x, y) and max(x, y) < len(wide) - half:
            wide[y - half : y + half + 1, x - half : x + half + 1] += stamp
    return wide[side : side + size, side : side + size]


def compute_blended_sums(
    morphology: Morphology,
    scene: Scene,
    arms: np.ndarray,
    *,
    density: float,
    magnitude: np.ndarray | tuple[float, float],
    target_fwhm: float,
    seed: int,
    blocks: Sequence[int],
    size: int = 200,
    margin: int = 20,
    min_snr: float = 10.0,
    n_realizations: int = 4,
) -> dict[str, ShearSums]:
    """Simulate scenes of galaxies in all arms, detect and measure them.

    Parameters
    ----------
    morphology
        What galaxies look like.
    scene
        PSF, pixels, noise and the size of the stamps of galaxies.
    arms
        From `lsst.meas.deeplearn.shear.simulation.make_arms`; the PSF must be
        the same in all of them.
    density
        Number of galaxies in a square arcmin.
    magnitude
        As for `GalaxySample.draw`.
    target_fwhm
        As for `MetaDetection`.
    seed
        Seed of the simulation.
    blocks
        Numbers of the scenes; the galaxies and the noise of each follow from
        its number and the seed.
    size
        Even side of the images in pixels.
    margin
        Width in pixels of the border of the images without galaxies: all
        that are drawn count, so that no border of the field shows up as
        noise.
    min_snr
        Signal to noise above which an object counts.
    n_realizations
        Realisations of the noise of each scene; each is taken with both
        signs.

    Returns
    -------
    sums
        ``"metadetection"`` has the response of detection, selection and
        weights; ``"no_detection"`` lacks it: only the ellipticity of objects
        that are found in all versions at the same place responds.

    Raises
    ------
    ValueError
        Raised if the arms have PSFs of their own, or if the PSF cannot be
        used.
    """
    if arms[:, 2:].any():
        raise ValueError("Blended scenes are simulated with one PSF: make arms without psf_shears.")
    detector = MetaDetection(
        scene.draw_psf(),
        pixel_scale=scene.pixel_scale,
        size=size,
        target_fwhm=target_fwhm,
        min_snr=min_snr,
        noise_correlation=scene.noise_correlation,
    )
    renderers: list[Renderer] = []
    side = size - 2 * margin
    values: dict[str, list[np.ndarray]] = {"metadetection": [], "no_detection": []}
    for block in blocks:
        rng = make_rng(Stream.POSITION, seed, block)
        n = rng.poisson(density * (side * scene.pixel_scale / 60) ** 2)
        galaxies = GalaxySample.draw(block * 100_000 + np.arange(n), seed=seed, magnitude=magnitude)
        galaxies.offset[:] = rng.uniform(-side / 2, side / 2, (n, 2))
        images = morphology.draw(galaxies)
        renderers = renderers or [
            Renderer(scene.psf, images, size=scene.stamp_size, pixel_scale=scene.pixel_scale, shear=(g1, g2))
            for g1, g2 in arms[:, :2]
        ]
        # The scene as it is, and turned by 90 degrees, in all arms.
        drawn = np.array(
            [
                draw_scene(*turned, renderer, arm[:2], size=size, pixel_scale=scene.pixel_scale)
                for renderer, arm in zip(renderers, arms, strict=True)
                for turned in ((images, galaxies), (images.rotate(1), _turn(galaxies)))
            ]
        )
        flux = detector.smooth(drawn)  # (2 A, 5, y, x)
        totals = {name: np.zeros((len(arms), 2, len(STEPS), 4)) for name in values}
        for _ in range(n_realizations):
            noise, fixnoise = scene.noise_sigma * rng.standard_normal((2, 1, size, size), dtype=np.float32)
            if scene.noise_correlation is not None:
                noise = correlate_noise(noise, scene.noise_correlation)
            noise_flux = detector.smooth(noise) + detector.smooth_fixnoise(fixnoise)
            # What is linear in the noise cancels.
            for noisy in (flux + noise_flux, flux - noise_flux):
                for total, found in zip(
                    zip(*(totals[name].reshape(-1, len(STEPS), 4) for name in values), strict=True),
                    detector.detect(noisy, noise_sigma=scene.noise_sigma),
                    strict=True,
                ):
                    total[0][:] += [_sum(detections.e, detections.weight) for detections in found]
                    total[1][:] += [_sum(e, weight) for e, weight in _match(found)]
        for name in values:
            values[name].append(totals[name].sum(axis=1))
    return {
        name: ShearSums(np.asarray(arms), detector.step, np.array(blocks), np.array(rows))
        for name, rows in values.items()
    }


def _make_inverse_shear(g1: float, g2: float) -> np.ndarray:
    """Return the inverse of the matrix of a shear, which has determinant 1."""
    return np.array([[1 - g1, -g2], [-g2, 1 + g1]]) / math.sqrt(1 - g1**2 - g2**2)


def _transform(image: np.ndarray, modes: np.ndarray) -> np.ndarray:
    """Return the Fourier transform of an image about its central pixel, at
    modes in radian per pixel, shape ``(2, K)``.
    """
    along_y, along_x = (np.arange(n) - n // 2 for n in image.shape)
    half = np.exp(-1j * np.outer(modes[1], along_y)) @ image  # (K, x)
    result: np.ndarray = (half * np.exp(-1j * np.outer(modes[0], along_x))).sum(axis=1)
    return result


def _turn(galaxies: GalaxySample) -> GalaxySample:
    """Return galaxies at places turned by 90 degrees."""
    x, y = galaxies.offset.T
    return dataclasses.replace(galaxies, offset=np.stack([-y, x], axis=1))


def _rise(value: np.ndarray) -> np.ndarray:
    """Return a smooth step from 0 at 0 to 1 at 1."""
    clipped = np.clip(value, 0.0, 1.0)
    step: np.ndarray = clipped**2 * (3 - 2 * clipped)
    return step


def _sum(e: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the sums of `lsst.meas.deeplearn.shear.bias.ShearSums`."""
    return np.array([*(weight[:, None] * e).sum(axis=0), weight.sum(), len(e)])


def _match(found: list[Detections], radius: float = 2.0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ellipticities in all versions of what is found near the same
    place in all of them, with the weights of the first.
    """
    first = np.stack([found[0].x, found[0].y], axis=1)
    everywhere = np.ones(len(first), dtype=bool)
    indices = []
    for detections in found:
        there = np.stack([detections.x, detections.y], axis=1)
        if not len(there) or not len(first):
            return [(np.empty((0, 2)), np.empty(0)) for _ in found]
        distance = np.linalg.norm(first[:, None] - there, axis=2)
        indices.append(distance.argmin(axis=1))
        everywhere &= distance.min(axis=1) < radius
    weight = found[0].weight[everywhere]
    return [
        (detections.e[index[everywhere]], weight) for detections, index in zip(found, indices, strict=True)
    ]


def _find_maxima(flux: np.ndarray, limit: float) -> tuple[np.ndarray, ...]:
    """Return the indices of pixels above a limit that none of their
    neighbours exceeds, away from the border.
    """
    inner = flux[..., _REACH:-_REACH, _REACH:-_REACH]
    *maps, row, column = np.nonzero(inner > limit)
    indices = (*maps, row + _REACH, column + _REACH)
    value = flux[indices]
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)):
        *maps, row, column = indices
        higher = value >= flux[(*maps, row + dy, column + dx)]
        indices, value = tuple(index[higher] for index in indices), value[higher]
    return indices


def _make_differences(scale: float) -> np.ndarray:
    """Return what pixels are multiplied with for the derivatives of order 0
    to 6 at the middle one, shape ``(7, pixels)``.

    The modes of a function that was smoothed with a Gaussian of this standard
    deviation in pixels get their derivatives as well as can be.
    """
    k = np.linspace(-np.pi, np.pi, 401)
    strength = np.exp(-((scale * k) ** 2) / 4)[:, None] + 1e-9
    waves = np.exp(1j * k[:, None] * np.arange(-_REACH, _REACH + 1))
    derivatives = (1j * k[:, None]) ** np.arange(7)
    solution: np.ndarray = np.linalg.lstsq(strength * waves, strength * derivatives, rcond=None)[0]
    return solution.real.T


def _differentiate(flux: np.ndarray, differences: np.ndarray, *indices: np.ndarray) -> np.ndarray:
    """Return derivatives up to the sixth order in pixels at each of N places,
    shape ``(28, N)``.
    """
    *maps, row, column = (index[:, None, None] for index in indices)
    offsets = np.arange(-_REACH, _REACH + 1)
    pixels = flux[(*maps, row + offsets[:, None], column + offsets)].astype(np.float64)  # (N, y, x)
    derivatives = differences @ pixels @ differences.T  # (N, b, a)
    return np.stack([derivatives[:, b, a] for a, b in _ORDERS])


_ORDERS = tuple((order - b, b) for order in range(7) for b in range(order + 1))


def _expand(derivatives: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return derivatives up to the second order near by, shape ``(6, N)``."""
    terms = {(i, j): dx**i * dy**j / math.factorial(i) / math.factorial(j) for i, j in _ORDERS}
    return np.array(
        [
            sum(derivatives[k] * terms[i - a, j - b] for k, (i, j) in enumerate(_ORDERS) if i >= a and j >= b)
            for a, b in _ORDERS[:6]
        ]
    )

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

import galsim
import numpy as np
from scipy.ndimage import maximum_filter

from ..galaxies.render import FineImages, Renderer
from .bias import ShearSums
from .morphologies import Morphology
from .shapes import STEPS
from .simulation import GalaxySample, Scene, Stream, correlate_noise, make_psf_from_kernel, make_rng

_FWHM = math.sqrt(8 * math.log(2))


@dataclasses.dataclass(frozen=True, eq=False)
class Detections:
    """What was found in an image."""

    x: np.ndarray
    """Columns in pixels from the centre of the image, shape ``(N,)``."""

    y: np.ndarray
    """Rows likewise."""

    e: np.ndarray
    """Ellipticities, shape ``(N, 2)``."""

    snr: np.ndarray
    """Signal to noise of the weighted flux, shape ``(N,)``."""

    weight: np.ndarray
    """Weight, which rises from 0 to 1 with the signal to noise and the
    distance from the border: objects that are found in one version and not in
    another would be most of the noise of the response."""


class MetaDetection:
    """Detects and measures an image under five artificial shears.

    Parameters
    ----------
    psf
        Image of a star centred on a pixel, shape ``(y, x)``.
    pixel_scale
        Side of a pixel in arcsec.
    size
        Odd side of the images in pixels.
    target_fwhm, weight_fwhm, step, regularization
        As for `lsst.meas.deeplearn.shear.metacal.Metacalibration`, of which
        this is the same measurement.
    min_snr
        Signal to noise above which a maximum is an object.
    border
        Width in pixels of the border of the image in which nothing counts;
        weights rise over as much.

    Notes
    -----
    An image that is deconvolved from its PSF, sheared, convolved with the
    target PSF and smoothed with the weight is the weighted flux at every
    place.  Its local maxima are the objects, and its second derivatives there
    their shapes.
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
        border: int = 20,
    ) -> None:
        self.step = step
        self.min_snr = min_snr
        self.border = border
        self.regularization = regularization
        self._pixel_scale = pixel_scale
        self._weight_var = (weight_fwhm / _FWHM) ** 2
        self._psf = make_psf_from_kernel(psf, pixel_scale)
        target = galsim.Gaussian(fwhm=math.hypot(target_fwhm, weight_fwhm))
        images = self._make_images(np.zeros((1, size, size), dtype=np.float32))
        self._renderers = [
            Renderer(target, images, size=size, pixel_scale=pixel_scale, shear=(g1, g2))
            for g1, g2 in step * np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
        ]

    def measure(self, image: np.ndarray, noise: np.ndarray, *, noise_sigma: float) -> list[Detections]:
        """Return what is detected in each of the versions of an image.

        Parameters
        ----------
        image
            The image, shape ``(y, x)``.
        noise
            Another realisation of its noise, which is sheared in a frame
            turned by 90 degrees and added.
        noise_sigma
            Standard deviation of the smoothed noise of the image; see
            `compute_noise`.
        """
        images, turned = self._make_images(image[None]), self._make_images(np.rot90(noise)[None])
        found = []
        for renderer in self._renderers:
            smooth = renderer.draw(images)[0] + np.rot90(renderer.draw(turned)[0], -1)
            found.append(self._detect(smooth.astype(np.float64), noise_sigma))
        return found

    def compute_noise(self, noise: np.ndarray) -> float:
        """Return the standard deviation of smoothed noise.

        Parameters
        ----------
        noise
            Images of noise, shape ``(N, y, x)``.
        """
        smooth = self._renderers[0].draw(self._make_images(noise))
        inner = slice(self.border, -self.border)
        return float(smooth[:, inner, inner].std())

    def _make_images(self, array: np.ndarray) -> FineImages:
        return FineImages(np.ascontiguousarray(array, dtype=np.float32), self._pixel_scale, self._psf)

    def _detect(self, smooth: np.ndarray, noise_sigma: float) -> Detections:
        """Return the maxima of a smooth image, between the pixels."""
        highest = (smooth == maximum_filter(smooth, size=3)) & (smooth > self.min_snr * noise_sigma)
        inner = slice(self.border, -self.border)
        keep = np.zeros_like(highest)
        keep[inner, inner] = highest[inner, inner]
        rows, columns = np.nonzero(keep)
        derivatives = _fit_polynomial(smooth, rows, columns)  # (28, N)
        dx, dy = np.zeros(len(rows)), np.zeros(len(rows))
        for _ in range(3):
            _, fx, fy, fxx, fxy, fyy = _expand(derivatives, dx, dy)
            determinant = np.where(fxx * fyy - fxy**2 > 0, fxx * fyy - fxy**2, np.inf)
            dx = np.clip(dx - (fyy * fx - fxy * fy) / determinant, -1.0, 1.0)
            dy = np.clip(dy - (fxx * fy - fxy * fx) / determinant, -1.0, 1.0)
        flux, _, _, fxx, fxy, fyy = _expand(derivatives, dx, dy)
        denominator = (flux + self.regularization * noise_sigma) * self._pixel_scale**2 / self._weight_var
        middle = smooth.shape[0] // 2

        def distance(pixel: np.ndarray, shift: np.ndarray) -> np.ndarray:
            # From the nearer border, in pixels.
            return middle - np.abs(pixel - middle + shift)

        return Detections(
            x=columns - middle + dx,
            y=rows - middle + dy,
            e=np.stack([fxx - fyy, 2 * fxy], axis=1) / denominator[:, None],
            snr=flux / noise_sigma,
            weight=_rise(flux / noise_sigma / self.min_snr - 1)
            * _rise(distance(columns, dx) / self.border - 1)
            * _rise(distance(rows, dy) / self.border - 1),
        )


def draw_scene(
    images: FineImages, galaxies: GalaxySample, scene: Scene, arm: Sequence[float], *, size: int
) -> np.ndarray:
    """Draw galaxies into one image, sheared about its centre.

    Parameters
    ----------
    images
        Galaxies of unit flux.
    galaxies
        The same galaxies, with positions as offsets from the centre of the
        image, before shear.
    scene
        PSF, pixels and the size of the stamps that are added up.
    arm
        Row of `lsst.meas.deeplearn.shear.simulation.make_arms`.
    size
        Odd side of the image in pixels.

    Returns
    -------
    image
        In nJy, float32, shape ``(y, x)``.
    """
    g1, g2 = arm[:2]
    matrix = np.array([[1 + g1, g2], [g2, 1 - g1]]) / math.sqrt(1 - g1**2 - g2**2)
    position = galaxies.offset @ matrix
    pixel = np.rint(position).astype(int)
    renderer = Renderer(
        scene.get_psf(arm), images, size=scene.stamp_size, pixel_scale=scene.pixel_scale, shear=(g1, g2)
    )
    stamps = renderer.draw(images, offset=(position - pixel) * scene.pixel_scale)
    stamps *= galaxies.flux.astype(np.float32)[:, None, None]
    half = scene.stamp_size // 2
    # Stamps may stick out of the image.
    wide = np.zeros((size + 2 * scene.stamp_size,) * 2, dtype=np.float32)
    middle = len(wide) // 2
    for stamp, (x, y) in zip(stamps, pixel + middle, strict=True):
        if half <= min(x, y) and max(x, y) < len(wide) - half:
            wide[y - half : y + half + 1, x - half : x + half + 1] += stamp
    inner = slice(scene.stamp_size, scene.stamp_size + size)
    return wide[inner, inner]


def compute_blended_sums(
    morphology: Morphology,
    scene: Scene,
    arms: np.ndarray,
    *,
    density: float,
    magnitude: tuple[float, float],
    target_fwhm: float,
    seed: int,
    block: int,
    size: int = 201,
    min_snr: float = 10.0,
) -> dict[str, ShearSums]:
    """Simulate a scene of galaxies in all arms, detect and measure them.

    Parameters
    ----------
    morphology
        What galaxies look like.
    scene
        PSF, pixels, noise and the size of the stamps of galaxies.
    arms
        From `lsst.meas.deeplearn.shear.simulation.make_arms`.
    density
        Number of galaxies in a square arcmin.
    magnitude
        Limits of their AB magnitudes.
    target_fwhm
        As for `MetaDetection`.
    seed
        Seed of the simulation.
    block
        Number of the scene; galaxies and noise follow from it and the seed.
    size
        Odd side of the image in pixels.
    min_snr
        Signal to noise above which an object counts.

    Returns
    -------
    sums
        ``"metadetection"`` has the response of detection, selection and
        weights; ``"no_detection"`` lacks it: only the ellipticity of objects
        that are found in all versions at the same place responds.
    """
    rng = make_rng(Stream.POSITION, seed, block)
    side = size + scene.stamp_size
    n = rng.poisson(density * (side * scene.pixel_scale / 60) ** 2)
    galaxies = GalaxySample.draw(block * 100_000 + np.arange(n), seed=seed, magnitude=magnitude)
    galaxies.offset[:] = rng.uniform(-side / 2, side / 2, (n, 2))
    images = morphology.draw(galaxies)
    noise = rng.standard_normal((3, size + 1, size + 1), dtype=np.float32)
    if scene.noise_correlation is not None:
        noise = correlate_noise(noise, scene.noise_correlation)
    noise = scene.noise_sigma * noise[:, :size, :size]
    values: dict[str, list[np.ndarray]] = {"metadetection": [], "no_detection": []}
    for arm in arms:
        detector = MetaDetection(
            scene.draw_psf(arm),
            pixel_scale=scene.pixel_scale,
            size=size,
            target_fwhm=target_fwhm,
            min_snr=min_snr,
        )
        sigma = detector.compute_noise(noise[2:])
        totals = {name: np.zeros((len(STEPS), 4)) for name in values}
        for mirrored in (False, True):
            # The scene turned by 90 degrees, with the same noise.
            turned = _turn(galaxies) if mirrored else galaxies
            image = draw_scene(images.rotate(1) if mirrored else images, turned, scene, arm, size=size)
            found = detector.measure(image + noise[0], noise[1], noise_sigma=sigma)
            for k, detections in enumerate(found):
                totals["metadetection"][k] += _sum(detections.e, detections.weight)
            for k, (e, weight) in enumerate(_match(found)):
                totals["no_detection"][k] += _sum(e, weight)
        for name, total in totals.items():
            values[name].append(total)
    return {
        name: ShearSums(np.asarray(arms), detector.step, np.array([block]), np.array(rows)[None])
        for name, rows in values.items()
    }


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


def _fit_polynomial(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return derivatives up to the sixth order in pixels, from the 7 x 7
    pixels around each of N places, shape ``(28, N)``.
    """
    offsets = np.arange(-3, 4)
    pixels = image[rows[:, None, None] + offsets[:, None], columns[:, None, None] + offsets]  # (N, y, x)
    inverse = np.linalg.inv(np.vander(offsets, increasing=True))
    coefficients = np.einsum("by,nyx,ax->abn", inverse, pixels, inverse)
    return np.stack([math.factorial(a) * math.factorial(b) * coefficients[a, b] for a, b in _ORDERS])


_ORDERS = tuple((order - b, b) for order in range(7) for b in range(order + 1))


def _expand(derivatives: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Return derivatives up to the second order near by, shape ``(6, N)``."""
    result = []
    for a, b in _ORDERS[:6]:
        terms = [
            derivatives[k] * dx ** (i - a) * dy ** (j - b) / math.factorial(i - a) / math.factorial(j - b)
            for k, (i, j) in enumerate(_ORDERS)
            if i >= a and j >= b
        ]
        result.append(np.sum(terms, axis=0))
    return np.array(result)

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

"""Simulated stamps of galaxies with known shear.

Every galaxy is drawn in all arms, which differ in shear or PSF, with the same
noise, and turned by 90 degrees as well; what is left in the difference
between arms is the answer to shear.  Galaxies and noise follow from the ID of
the galaxy and a seed alone, so that the order and the number of processes
that draw them do not matter.
"""

from __future__ import annotations

__all__ = (
    "GalaxySample",
    "Scene",
    "Stream",
    "correlate_noise",
    "draw_normal",
    "draw_stamps",
    "make_arms",
    "make_noise",
    "make_psf_from_kernel",
    "make_rng",
)

import dataclasses
from collections.abc import Sequence
from enum import IntEnum

import galsim
import numpy as np

from ..galaxies.fourier import compute_noise_power
from ..galaxies.render import FineImages, Renderer
from ..scene import AB_ZERO_POINT, compute_half_light_radius


class Stream(IntEnum):
    """What random numbers are for; each has a stream of its own."""

    GALAXY = 0
    KNOTS = 1
    NOISE = 2
    FIXNOISE = 3
    MOMENTS = 4
    MORPHOLOGY = 5
    POSITION = 6


@dataclasses.dataclass(eq=False)
class GalaxySample:
    """What N galaxies of every morphology have in common."""

    seed: int
    """Seed of the sample."""

    ids: np.ndarray
    """IDs, int64, not negative, shape ``(N,)``."""

    magnitude: np.ndarray
    """AB magnitudes, shape ``(N,)``."""

    redshift: np.ndarray
    """Redshifts, shape ``(N,)``."""

    half_light_radius: np.ndarray
    """Half-light radii in arcsec, on the intermediate axis, shape ``(N,)``."""

    axis_ratio: np.ndarray
    """Minor over major axis, shape ``(N,)``."""

    position_angle: np.ndarray
    """Angle from x to the major axis in radians, shape ``(N,)``."""

    sersic_index: np.ndarray
    """Sersic index of the galaxy as a single component, shape ``(N,)``."""

    bulge_fraction: np.ndarray
    """Share of the light in the bulge, shape ``(N,)``."""

    offset: np.ndarray
    """Position (x, y) from the centre of the stamp in pixels, shape
    ``(N, 2)``."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def flux(self) -> np.ndarray:
        """Fluxes in nJy."""
        flux: np.ndarray = 10 ** (-0.4 * (self.magnitude - AB_ZERO_POINT))
        return flux

    def __getitem__(self, index: np.ndarray | slice) -> GalaxySample:
        names = [field.name for field in dataclasses.fields(self) if field.name != "seed"]
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in names})

    @classmethod
    def draw(
        cls, ids: np.ndarray, *, seed: int, magnitude: np.ndarray | tuple[float, float] = (20.0, 25.0)
    ) -> GalaxySample:
        """Draw galaxies as LSST sees them.

        Parameters
        ----------
        ids
            IDs, shape ``(N,)``.
        seed
            Seed of the sample.
        magnitude
            Limits of the AB magnitudes in i, which are distributed as counts
            of galaxies, or magnitudes to draw from, such as those of a
            catalogue, shape ``(M,)`` with M > 2.

        Notes
        -----
        Counts, redshifts and sizes are those of
        `lsst.meas.deeplearn.scene`.  One galaxy in four is of an early type,
        with a Sersic index of 2.5 to 4, the others of a late type with 0.8 to
        1.6; indices are rounded to 0.1, which GalSim is fast with.
        """
        ids = np.asarray(ids, dtype=np.int64)
        rngs = [make_rng(Stream.GALAXY, seed, number) for number in ids]
        uniform = np.array([rng.random(8) for rng in rngs]).reshape(-1, 8)
        normal = np.array([rng.standard_normal(2) for rng in rngs]).reshape(-1, 2)
        chances = np.array([rng.gamma(3.0) for rng in rngs])
        if len(magnitude) == 2:
            low, high = (10 ** (0.31 * limit) for limit in magnitude)
            magnitudes = np.log10(low + (high - low) * uniform[:, 0]) / 0.31
        else:
            magnitudes = np.sort(magnitude)[(uniform[:, 0] * len(magnitude)).astype(int)]
        redshift = np.clip(chances * np.maximum(0.0417 * magnitudes - 0.744, 0.035), 0.01, 4.0)
        early = uniform[:, 1] < 0.25
        radius = np.where(
            early,
            compute_half_light_radius(redshift, magnitudes, early=True),
            compute_half_light_radius(redshift, magnitudes, early=False),
        )
        axis_ratio = np.where(early, 0.5 + 0.5 * uniform[:, 2], 0.2 + 0.8 * uniform[:, 2])
        index = np.where(early, 2.5 + 1.5 * uniform[:, 3], 0.8 + 0.8 * uniform[:, 3])
        bulge = np.where(early, 0.4 + 0.5 * uniform[:, 4], 0.3 * uniform[:, 4] ** 2)
        return cls(
            seed=seed,
            ids=ids,
            magnitude=magnitudes,
            redshift=redshift,
            # Radii of the relations are along the major axis.
            half_light_radius=np.clip(radius * np.sqrt(axis_ratio) * 10 ** (0.15 * normal[:, 0]), 0.08, 1.5),
            axis_ratio=axis_ratio,
            position_angle=np.pi * uniform[:, 5],
            sersic_index=np.round(index, 1),
            bulge_fraction=bulge,
            offset=uniform[:, 6:8] - 0.5,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """What the stamps of a simulation have in common."""

    psf: galsim.GSObject
    """The PSF with the response of the pixel in it."""

    pixel_scale: float
    """Side of a pixel in arcsec."""

    stamp_size: int = 63
    """Odd side of the stamps in pixels."""

    noise_sigma: float = 0.0
    """Standard deviation of the noise in a pixel, in nJy."""

    noise_correlation: np.ndarray | None = None
    """Correlation of the noise of two pixels by their distance along y and x,
    zero distance at the centre; `None` if it is white."""

    n_orientations: int = 2
    """Number of ways in which each galaxy is drawn, up to 4: as it is, turned
    by 90 degrees, mirrored, and turned and mirrored.  Turns take out its
    shape from the mean, mirrors its response to the other component."""

    psf_size_error: float = 0.0
    """Relative error of the size of the PSF that `draw_psf` returns."""

    def draw_psf(self, arm: Sequence[float] = (0.0, 0.0, 0.0, 0.0)) -> np.ndarray:
        """Return the image of a star in the middle of a stamp, as it is known
        to estimators.

        Parameters
        ----------
        arm
            Row of `make_arms`.
        """
        size = self.stamp_size
        psf = self.get_psf(arm)
        if self.psf_size_error:
            psf = psf.dilate(1 + self.psf_size_error)
        image = psf.drawImage(nx=size, ny=size, scale=self.pixel_scale, method="no_pixel", dtype=np.float64)
        return np.asarray(image.array)

    def get_psf(self, arm: Sequence[float]) -> galsim.GSObject:
        """Return the PSF of an arm.

        Parameters
        ----------
        arm
            Row of `make_arms`.
        """
        g1, g2 = arm[2:]
        return self.psf.shear(g1=g1, g2=g2) if g1 or g2 else self.psf


def make_arms(shears: Sequence[float] = (0.01, 0.02, 0.05), psf_shears: Sequence[float] = ()) -> np.ndarray:
    """Return the shears and PSFs of the arms of a simulation.

    Parameters
    ----------
    shears
        Sizes of the shear; each is applied to both components with both
        signs.
    psf_shears
        Sizes of an additional shear of the PSF, likewise, in arms where the
        galaxies have none.

    Returns
    -------
    arms
        Columns g1, g2, psf_g1, psf_g2; shape ``(A, 4)``.
    """
    rows = [
        tuple(sign * size if k == component else 0.0 for k in range(4))
        for sizes, components in ((shears, (0, 1)), (psf_shears, (2, 3)))
        for size in sizes
        for component in components
        for sign in (1, -1)
    ]
    return np.array(rows).reshape(-1, 4)


def make_psf_from_kernel(kernel: np.ndarray, pixel_scale: float) -> galsim.GSObject:
    """Return a PSF with given pixels, such as those of a coadd.

    Parameters
    ----------
    kernel
        Image of a star centred on a pixel, shape ``(y, x)``.
    pixel_scale
        Side of a pixel in arcsec.
    """
    image = galsim.Image(np.asarray(kernel, dtype=np.float64), scale=pixel_scale)
    return galsim.InterpolatedImage(image, x_interpolant="lanczos15", normalization="flux")


def draw_stamps(images: FineImages, galaxies: GalaxySample, scene: Scene, arm: Sequence[float]) -> np.ndarray:
    """Draw galaxies without noise in one arm.

    Parameters
    ----------
    images
        Galaxies of unit flux in the middle of their images, before shear.
    galaxies
        The same galaxies; their fluxes and offsets are used here.
    scene
        PSF and pixels.
    arm
        Row of `make_arms`.

    Returns
    -------
    stamps
        Float32 in nJy, shape ``(N, n_orientations, y, x)``.  The
        offset turns with the galaxy.
    """
    renderer = Renderer(
        scene.get_psf(arm),
        images,
        size=scene.stamp_size,
        pixel_scale=scene.pixel_scale,
        shear=(arm[0], arm[1]),
    )
    flux = galaxies.flux.astype(np.float32)[:, None, None]
    x, y = galaxies.offset.T * scene.pixel_scale
    turned = images.rotate(1)
    orientations = [
        (images, x, y),
        (turned, -y, x),
        (images.mirror(), -x, y),
        (turned.mirror(), y, x),
    ]
    stamps = [
        flux * renderer.draw(images, offset=np.stack([x, y], axis=1))
        for images, x, y in orientations[: scene.n_orientations]
    ]
    return np.stack(stamps, axis=1)


def make_noise(galaxies: GalaxySample, scene: Scene, *, fixnoise: bool = False) -> np.ndarray:
    """Return the noise of the stamps of galaxies, the same in all arms.

    Parameters
    ----------
    galaxies
        The galaxies.
    scene
        Size of the stamps, and level of the noise.
    fixnoise
        Whether to return the realisation that metacalibration adds, instead
        of the one that is in the images.

    Returns
    -------
    noise
        Float32 in nJy, shape ``(N, n_orientations, y, x)``.
    """
    stream = Stream.FIXNOISE if fixnoise else Stream.NOISE
    # Correlated noise is made on an even grid.
    side = scene.stamp_size + (scene.noise_correlation is not None)
    noise = np.empty((len(galaxies), scene.n_orientations, side, side), dtype=np.float32)
    for k, number in enumerate(galaxies.ids):
        make_rng(stream, galaxies.seed, number).standard_normal(out=noise[k], dtype=np.float32)
    noise *= np.float32(scene.noise_sigma)
    if scene.noise_correlation is None:
        return noise
    return correlate_noise(noise, scene.noise_correlation)[..., :-1, :-1]


def correlate_noise(noise: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """Return noise with a correlation, made of white noise.

    Parameters
    ----------
    noise
        White noise, float32, of an even number S of pixels on a side, shape
        ``(..., S, S)``.
    correlation
        As in `Scene`.

    Notes
    -----
    Opposite borders of an image are correlated as well.
    """
    size = noise.shape[-1]
    modes = np.fft.rfft2(noise) * np.sqrt(compute_noise_power(correlation, size))
    return np.fft.irfft2(modes, s=(size, size)).astype(np.float32)


def draw_normal(galaxies: GalaxySample, shape: Sequence[int]) -> np.ndarray:
    """Return normal numbers for the noise of what is measured on galaxies.

    Parameters
    ----------
    galaxies
        The galaxies.
    shape
        Shape of the numbers for each of them.

    Returns
    -------
    normal
        Float64, shape ``(N, *shape)``.
    """
    rngs = [make_rng(Stream.MOMENTS, galaxies.seed, number) for number in galaxies.ids]
    return np.array([rng.standard_normal(shape) for rng in rngs]).reshape(len(rngs), *shape)


def make_rng(stream: Stream, seed: int, number: int) -> np.random.Generator:
    """Return the random numbers of one galaxy for one purpose.

    Parameters
    ----------
    stream
        Purpose.
    seed
        Seed of the simulation.
    number
        Number of the galaxy.
    """
    return np.random.default_rng([int(stream), int(seed), int(number)])

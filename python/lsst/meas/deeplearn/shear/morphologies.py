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


"""The ladder of galaxies, from a Sersic profile to what a network has learnt.

Every step draws the same sample: a galaxy has the same magnitude, redshift
and half-light radius, whatever it looks like.
"""

from __future__ import annotations

__all__ = (
    "PARAMETRIC",
    "CvaeGalaxies",
    "Morphology",
    "ParametricGalaxies",
    "RealGalaxies",
    "make_profile",
)

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import galsim
import numpy as np
from scipy.special import gammainc, gammaincinv

from ..galaxies.fourier import compute_transform, invert_transform, truncate_transform
from ..galaxies.render import FineImages
from .simulation import GalaxySample, Stream, make_rng

if TYPE_CHECKING:
    from ..model_package import ModelPackage

BULGE_SIZE = 0.4
"""Half-light radius of a bulge in units of that of the disk."""

KNOT_FRACTION = 0.3
"""Share of the light of a disk that is in knots."""

N_KNOTS = 20
"""Number of knots of a disk."""

MAX_DILATION = 2.0
"""How much larger or smaller than it was observed a real galaxy may be."""

HST_HALF_LIGHT_RADIUS = 0.07
"""Half-light radius in arcsec of the PSF of HST in F814W."""


class Morphology(Protocol):
    """Anything that draws the galaxies of a sample."""

    def draw(self, galaxies: GalaxySample) -> FineImages:
        """Return the galaxies with a flux of 1, without PSF and shear.

        Parameters
        ----------
        galaxies
            The galaxies.
        """


class ParametricGalaxies:
    """Galaxies of analytic components.

    Parameters
    ----------
    name
        One of `PARAMETRIC`.
    """

    def __init__(self, name: str) -> None:
        if name not in PARAMETRIC:
            raise ValueError(f"Parametric galaxies are {', '.join(PARAMETRIC)}, not {name}.")
        self.name = name

    def draw(self, galaxies: GalaxySample) -> FineImages:
        """Return the galaxies with a flux of 1, without PSF and shear.

        Parameters
        ----------
        galaxies
            The galaxies.
        """
        return FineImages.from_profiles([make_profile(galaxies, k, self.name) for k in range(len(galaxies))])


class RealGalaxies:
    """Galaxies that Hubble has seen, deconvolved from its PSF by GalSim.

    Parameters
    ----------
    catalog
        A catalogue of `galsim.RealGalaxy`.

    Notes
    -----
    Each galaxy of a sample gets the image of nearest magnitude among a tenth
    of the catalogue, and at least 10, that its ID chooses.  It has the flux
    of the sample and is dilated to its half-light radius, by up to
    `MAX_DILATION`; its shape and orientation are those of the image.  The
    noise of the images stays in them.
    """

    def __init__(self, catalog: galsim.RealGalaxyCatalog) -> None:
        self._catalog = catalog
        self._magnitude = np.asarray(catalog.mag, dtype=np.float64)
        self._radii: dict[int, float] = {}

    def draw(self, galaxies: GalaxySample) -> FineImages:
        """Return the galaxies with a flux of 1, without PSF and shear.

        Parameters
        ----------
        galaxies
            The galaxies.
        """
        return FineImages.from_profiles([self.make_profile(galaxies, k) for k in range(len(galaxies))])

    def make_profile(self, galaxies: GalaxySample, k: int) -> galsim.GSObject:
        """Return a galaxy of unit flux.

        Parameters
        ----------
        galaxies
            The galaxies.
        k
            Index of the galaxy.
        """
        rng = make_rng(Stream.MORPHOLOGY, galaxies.seed, int(galaxies.ids[k]))
        n = len(self._magnitude)
        chosen = rng.choice(n, size=min(max(n // 10, 10), n), replace=False)
        nearest = int(chosen[np.argmin(np.abs(self._magnitude[chosen] - galaxies.magnitude[k]))])
        if nearest not in self._radii:
            observed = self._catalog.getGalImage(nearest).calculateHLR()
            # As if both were Gaussian.
            self._radii[nearest] = math.sqrt(max(observed**2 - HST_HALF_LIGHT_RADIUS**2, 0.05**2))
        dilation = galaxies.half_light_radius[k] / self._radii[nearest]
        galaxy = galsim.RealGalaxy(self._catalog, index=nearest, noise_pad_size=0).withFlux(1.0)
        return galaxy.dilate(min(max(dilation, 1 / MAX_DILATION), MAX_DILATION))


class CvaeGalaxies:
    """Galaxies that a trained network makes for the conditions of a sample.

    Parameters
    ----------
    package
        The model.  Conditions outside its training set are clipped to it.
    device
        Device of torch.

    Notes
    -----
    Galaxies are mirrored and turned by multiples of 90 degrees at random.
    """

    def __init__(self, package: ModelPackage, *, device: str = "cpu") -> None:
        from ..galaxies.cvae_sampling import CvaeSampler

        self._sampler = CvaeSampler(package, outside="clip", device=device)

    def draw(self, galaxies: GalaxySample) -> FineImages:
        """Return the galaxies with a flux of 1, without PSF and shear.

        Parameters
        ----------
        galaxies
            The galaxies.
        """
        conditions = np.stack([galaxies.half_light_radius, galaxies.magnitude, galaxies.redshift], axis=1)
        rngs = [make_rng(Stream.MORPHOLOGY, galaxies.seed, int(number)) for number in galaxies.ids]
        seeds = [int(rng.integers(2**62)) for rng in rngs]
        images = self._sampler.draw(conditions, seeds)
        for k, rng in enumerate(rngs):
            turned = np.rot90(images[k], rng.integers(4))
            images[k] = turned[::-1] if rng.random() < 0.5 else turned
        size = (images.shape[1] - 1) // 2
        ratio = 1
        # No PSF from the ground sees modes beyond pixels of this size.
        while size % 2 == 0 and 2 * ratio * self._sampler.pixel_scale <= 0.15:
            ratio, size = 2 * ratio, size // 2
        if ratio > 1:
            images = _coarsen(images, ratio)
        return FineImages(images, ratio * self._sampler.pixel_scale)


def _coarsen(images: np.ndarray, ratio: int) -> np.ndarray:
    """Return images of odd size with larger pixels around the same centre."""
    side = images.shape[1] - 1
    padded = np.pad(images, [(0, 0), (side // 2, side // 2 - 1), (side // 2, side // 2 - 1)])
    modes = truncate_transform(compute_transform(padded), 2 * side // ratio)
    small = invert_transform(modes).astype(np.float32)
    half, middle = side // (2 * ratio), side // ratio
    inner = slice(middle - half, middle + half + 1)
    return small[:, inner, inner]


def make_profile(galaxies: GalaxySample, k: int, morphology: str) -> galsim.GSObject:
    """Return a galaxy of unit flux.

    Parameters
    ----------
    galaxies
        The galaxies.
    k
        Index of the galaxy.
    morphology
        One of `PARAMETRIC`.  All have the same half-light radius and axis
        ratio.
    """
    profile = PARAMETRIC[morphology](galaxies, k)
    return profile.shear(q=galaxies.axis_ratio[k], beta=galaxies.position_angle[k] * galsim.radians)


def _make_sersic(galaxies: GalaxySample, k: int) -> galsim.GSObject:
    """Return a Sersic profile, seen face on."""
    return galsim.Sersic(float(galaxies.sersic_index[k]), half_light_radius=galaxies.half_light_radius[k])


def _make_bulge_and_disk(galaxies: GalaxySample, k: int) -> galsim.GSObject:
    """Return a de Vaucouleurs bulge and an exponential disk, face on."""
    bulge, disk, _ = _make_components(galaxies, k)
    return bulge + disk


def _make_bulge_disk_and_knots(galaxies: GalaxySample, k: int) -> galsim.GSObject:
    """Return a bulge, and a disk with a part of its light in points."""
    bulge, disk, radius = _make_components(galaxies, k)
    seed = int(make_rng(Stream.KNOTS, galaxies.seed, int(galaxies.ids[k])).integers(1, 2**31))
    knots = galsim.RandomKnots(
        N_KNOTS,
        half_light_radius=radius,
        flux=KNOT_FRACTION * disk.flux,
        rng=galsim.BaseDeviate(seed),
    )
    galaxy = bulge + (1 - KNOT_FRACTION) * disk + knots
    # Knots have moved the centroid, which is what objects are found at.
    return galaxy.shift(-galaxy.centroid)


PARAMETRIC: Mapping[str, Callable[[GalaxySample, int], galsim.GSObject]] = {
    "sersic": _make_sersic,
    "bulge_disk": _make_bulge_and_disk,
    "knots": _make_bulge_disk_and_knots,
}
"""Galaxies seen face on, from the simplest to the most complex."""


def _make_components(galaxies: GalaxySample, k: int) -> tuple[galsim.GSObject, galsim.GSObject, float]:
    """Return bulge, disk and the half-light radius of the disk in arcsec."""
    fraction = float(galaxies.bulge_fraction[k])
    radius = float(galaxies.half_light_radius[k]) / _compute_half_light_radius(round(fraction, 3))
    bulge = galsim.DeVaucouleurs(half_light_radius=BULGE_SIZE * radius, flux=fraction)
    return bulge, galsim.Exponential(half_light_radius=radius, flux=1 - fraction), radius


@functools.cache
def _compute_half_light_radius(bulge_fraction: float) -> float:
    """Return the half-light radius of bulge and disk in that of the disk."""
    low, high = BULGE_SIZE, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        light = sum(
            # Graham & Driver (2005), equation 2.
            flux * gammainc(2 * n, gammaincinv(2 * n, 0.5) * (middle / radius) ** (1 / n))
            for flux, n, radius in ((bulge_fraction, 4.0, BULGE_SIZE), (1 - bulge_fraction, 1.0, 1.0))
        )
        low, high = (middle, high) if light < 0.5 else (low, middle)
    return (low + high) / 2

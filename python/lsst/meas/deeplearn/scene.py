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

"""A made-up deep sky: galaxies, groups and stars.

Redshift, magnitude, type, size and colour of a galaxy go together, by simple
relations that are stated where they are used.  The sky is for trying software
out and for training; no cosmology should be measured on it.
"""

from __future__ import annotations

__all__ = (
    "SURVEY",
    "BandSettings",
    "Galaxies",
    "Sky",
    "Stars",
    "compute_half_light_radius",
    "sample_early_types",
    "sample_galaxies",
    "sample_groups",
    "sample_stars",
)

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from astropy.cosmology import FlatLambdaCDM

PIXEL_SCALE = 0.2
"""Side of an LSST pixel in arcsec."""

AB_ZERO_POINT = 31.4
"""AB magnitude of 1 nJy."""

PSF_BETA = 3.5
"""Index of the Moffat profile of the PSF."""

COSMOLOGY = FlatLambdaCDM(H0=70.0, Om0=0.3)
"""Cosmology of the sky."""


@dataclasses.dataclass(frozen=True)
class BandSettings:
    """What a ten-year LSST coadd is like in one band.

    Depth, seeing and number of visits are those of Ivezic et al. (2019, ApJ
    873, 111), tables 1 and 2; the zero points are those of the LSST system
    throughputs, version 1.9.
    """

    depth: float
    """AB magnitude of a star with a signal to noise of 5."""

    psf_fwhm: float
    """Width of the PSF in arcsec, pixel included."""

    n_visits: int
    """Number of visits of 30 s."""

    zero_point: float
    """AB magnitude of one electron per second."""

    wavelengths: tuple[float, float]
    """Limits of the band in Angstrom."""

    psf_beta: float = PSF_BETA
    """Index of the Moffat profile of the PSF."""

    galaxy_offset: float = 0.0
    """AB magnitudes that galaxies are fainter by than their templates say."""

    def with_visits(self, number: float) -> BandSettings:
        """Return the settings of a coadd of another number of visits.

        Parameters
        ----------
        number
            Number of visits; the depth is that of the number itself, the
            rest that of the nearest integer.
        """
        depth = self.depth + 1.25 * math.log10(number / self.n_visits)
        return dataclasses.replace(self, depth=depth, n_visits=max(round(number), 1))

    @property
    def gain(self) -> float:
        """Electrons of the whole coadd per nJy."""
        return 30.0 * self.n_visits * 10 ** (0.4 * (self.zero_point - AB_ZERO_POINT))

    @property
    def saturation(self) -> float:
        """Flux of a pixel in nJy that fills it, 100 000 electrons, in a
        visit.
        """
        return 1e5 / (self.gain / self.n_visits)

    @property
    def psf_scale(self) -> float:
        """Scale of the Moffat profile of the PSF in pixels."""
        return self.psf_fwhm / PIXEL_SCALE / (2 * math.sqrt(2 ** (1 / self.psf_beta) - 1))

    @property
    def sky_noise(self) -> float:
        """Noise of a pixel of the sky in nJy, before it is correlated.

        Follows from depth and PSF: with a Moffat profile of index beta and
        scale s a star has the noise of pi s^2 (2 beta - 1) / (beta - 1)^2
        pixels.
        """
        beta = self.psf_beta
        n_effective = math.pi * self.psf_scale**2 * (2 * beta - 1) / (beta - 1) ** 2
        return 10 ** (-0.4 * (self.depth - AB_ZERO_POINT)) / 5 / math.sqrt(n_effective)


SURVEY = {
    "u": BandSettings(26.1, 0.92, 56, 26.52, (3240.0, 3950.0)),
    "g": BandSettings(27.4, 0.87, 80, 28.51, (4050.0, 5520.0)),
    "r": BandSettings(27.5, 0.83, 184, 28.36, (5520.0, 6910.0)),
    "i": BandSettings(26.8, 0.80, 184, 28.17, (6910.0, 8180.0)),
    "z": BandSettings(26.1, 0.78, 160, 27.78, (8180.0, 9220.0)),
    "y": BandSettings(24.9, 0.76, 160, 26.82, (9220.0, 10600.0)),
}
"""Ten-year LSST coadds, by band."""


@dataclasses.dataclass(frozen=True)
class Sky:
    """What one sky has that another has not."""

    survey: Mapping[str, BandSettings] = dataclasses.field(default_factory=SURVEY.copy)
    """The coadds, by band."""

    galaxy_size: float = 1.0
    """Factor on the half-light radii of galaxies."""

    spheroid_indices: tuple[float, ...] = (4.0,)
    """Sersic indices of the spheroids of early types, in equal numbers."""

    massive_density: float = 0.6
    """Galaxies per square arcmin that are like lenses but have no arcs;
    without them brightness and colour alone would tell the lenses.
    """

    massive_brightening: float = 0.0
    """AB magnitudes by which these are brighter at most, uniform; they are as
    much larger as brighter galaxies are.
    """

    massive_disk_fraction: float = 0.0
    """Fraction of these that have a disk, with up to half of the light."""

    @classmethod
    def sample(cls, seed: int) -> Sky:
        """Draw a sky unlike others.

        Networks that have seen a single sky know no other: many of these are
        to train on.  Exposures are from a twentieth to the whole of ten
        years, uniform in the logarithm; seeing is 0.8 to 1.35 times the
        usual, and 5 per cent more or less in each band; the index of the PSF
        is one of 2.5, 3, 3.5 and 4; galaxies are brighter or fainter by 0.1
        mag in each band, and 0.7 to 1.4 times as large; galaxies like lenses
        are five times as many as usual.

        Parameters
        ----------
        seed
            Seed.
        """
        rng = np.random.default_rng([seed, *b"sky"])
        exposure = 20 ** rng.uniform(-1, 0)
        seeing, beta = rng.uniform(0.8, 1.35), rng.choice([2.5, 3.0, 3.5, 4.0])
        survey = {}
        for band, usual in SURVEY.items():
            settings = usual.with_visits(usual.n_visits * exposure)
            survey[band] = dataclasses.replace(
                settings,
                depth=settings.depth + rng.normal(0, 0.1),
                psf_fwhm=settings.psf_fwhm * seeing * rng.uniform(0.95, 1.05),
                psf_beta=float(beta),
                galaxy_offset=rng.normal(0, 0.1),
            )
        return cls(
            survey=survey,
            galaxy_size=2 ** rng.uniform(-0.5, 0.5),
            spheroid_indices=(2.5, 3.0, 4.0, 5.0),
            massive_density=3.0,
        )

    def change(self, galaxies: Galaxies, rng: np.random.Generator) -> None:
        """Give galaxies the sizes and profiles that they have here.

        Parameters
        ----------
        galaxies
            Galaxies as the functions of this module draw them; changed.
        rng
            Random numbers.
        """
        galaxies.half_light_radius *= self.galaxy_size
        early = galaxies.sersic_index == SPHEROID_INDEX
        galaxies.sersic_index[early] = rng.choice(self.spheroid_indices, early.sum())


# Flux densities per frequency of two stellar populations, by wavelength in
# Angstrom, drawn by hand after the E and Im templates of Coleman, Wu &
# Weedman (1980): an old one with a 4000 A break, and a young one that ends
# below Lyman alpha.
_WAVELENGTH = np.array(
    [800, 912, 1216, 1500, 2000, 2500, 3000, 3600, 3900, 4100, 4800, 5500, 6200, 7500, 8700, 12000]
)
_OLD = np.array(
    [1e-5, 1e-3, 5e-3, 8e-3, 0.010, 0.022, 0.045, 0.11, 0.16, 0.33, 0.51, 0.75, 1.00, 1.42, 1.80, 2.40]
)
_YOUNG = np.array(
    [1e-5, 1e-3, 0.40, 0.80, 0.90, 0.95, 0.95, 0.95, 0.98, 1.08, 1.25, 1.38, 1.46, 1.58, 1.66, 1.80]
)

# Stars from F to late M: g - r, r - i and i - z of the stellar locus.
_LOCUS = np.array(
    [
        [0.25, 0.08, 0.03],
        [0.45, 0.15, 0.06],
        [0.85, 0.32, 0.17],
        [1.35, 0.60, 0.33],
        [1.45, 1.20, 0.60],
        [1.55, 1.80, 0.95],
    ]
)

SPHEROID_INDEX = 4.0
"""Sersic index of early types."""

BULGE, DISK, ARMS = range(3)
"""The parts of a galaxy."""


@dataclasses.dataclass
class Galaxies:
    """Galaxies as the sum of a bulge, a disk and spiral arms."""

    x: np.ndarray
    """Columns in pixels of the tract, shape ``(N,)``."""

    y: np.ndarray
    """Rows in pixels of the tract, shape ``(N,)``."""

    redshift: np.ndarray
    """Redshifts, shape ``(N,)``."""

    magnitude: np.ndarray
    """AB magnitudes in i, shape ``(N,)``."""

    half_light_radius: np.ndarray
    """Half-light radii along the major axis in arcsec, of bulge and of disk
    and arms, shape ``(N, 2)``.
    """

    axis_ratio: np.ndarray
    """Minor over major axis of bulge and of disk, shape ``(N, 2)``."""

    position_angle: np.ndarray
    """Angle from x to the major axis in radians, shape ``(N,)``."""

    sersic_index: np.ndarray
    """Sersic index of the bulge, shape ``(N,)``."""

    fraction: np.ndarray
    """Share of the flux in i of bulge, disk and arms, shape ``(N, 3)``."""

    young: np.ndarray
    """Share of young stars in the light at 5000 Angstrom, same shape."""

    seed: np.ndarray
    """Seed of the spiral arms, shape ``(N,)``."""

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: np.ndarray) -> Galaxies:
        return Galaxies(
            **{field.name: getattr(self, field.name)[index] for field in dataclasses.fields(self)}
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Galaxies]) -> Galaxies:
        """Join galaxies.

        Parameters
        ----------
        parts
            Galaxies, at least one part.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def compute_fluxes(self, band: str) -> np.ndarray:
        """Return the fluxes in nJy of bulge, disk and arms.

        Parameters
        ----------
        band
            Name of the band.

        Returns
        -------
        fluxes
            Shape ``(N, 3)``.
        """
        total = 10 ** (-0.4 * (self.magnitude - AB_ZERO_POINT))
        redshift = self.redshift[:, None]
        color = _compute_light(band, redshift, self.young) / _compute_light("i", redshift, self.young)
        return total[:, None] * self.fraction * color


@dataclasses.dataclass
class Stars:
    """Stars."""

    x: np.ndarray
    """Columns in pixels of the tract, shape ``(N,)``."""

    y: np.ndarray
    """Rows in pixels of the tract, shape ``(N,)``."""

    magnitudes: dict[str, np.ndarray]
    """AB magnitudes by band, shape ``(N,)``."""

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: np.ndarray) -> Stars:
        return Stars(
            self.x[index],
            self.y[index],
            {band: magnitude[index] for band, magnitude in self.magnitudes.items()},
        )


def sample_galaxies(rng: np.random.Generator, shape: tuple[int, int]) -> Galaxies:
    """Draw the galaxies of the field.

    Parameters
    ----------
    rng
        Random numbers.
    shape
        Number of pixels along y and x.

    Notes
    -----
    * Counts: 46 x 10^(0.31 (i - 25)) per square arcmin brighter than i, as
      in the LSST Science Book (2009), equation 3.7, from 22 to 27 mag;
      brighter than 22 they fall with a slope of 0.45.
    * Redshift: p(z | i) = z^2 exp(-z / z0), z0 = 0.0417 i - 0.744, equation
      3.8 there, z0 at least 0.035.
    * Type: early with a probability that falls from 0.40 at i = 19 to 0.05
      at 25.4, at redshifts below 1.5.
    """
    area = shape[0] * shape[1] * (PIXEL_SCALE / 60) ** 2
    at_22, at_27 = (46 * 10 ** (0.31 * (i - 25)) for i in (22, 27))
    n = rng.poisson(area * at_27)
    # Inverse of the cumulative counts.
    number = at_27 * (1 - rng.random(n))
    magnitude = np.where(
        number > at_22, 25 + np.log10(number / 46) / 0.31, 22 + np.log10(number / at_22) / 0.45
    )
    magnitude = np.maximum(magnitude, 16.5)
    redshift = np.minimum(
        rng.gamma(3.0, np.maximum(0.0417 * magnitude - 0.744, 0.035)), 0.15 + 0.03 * np.exp(magnitude - 17)
    )
    redshift = np.clip(redshift, 0.01, 4.0)
    early = rng.random(n) < np.clip(0.40 - 0.055 * (magnitude - 19), 0.05, 0.40)
    early &= redshift < 1.5
    x, y = rng.uniform(-0.5, shape[1] - 0.5, n), rng.uniform(-0.5, shape[0] - 0.5, n)
    return Galaxies.concatenate(
        [
            sample_early_types(rng, x[early], y[early], redshift[early], magnitude[early]),
            sample_late_types(rng, x[~early], y[~early], redshift[~early], magnitude[~early]),
        ]
    )


def sample_early_types(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, redshift: np.ndarray, magnitude: np.ndarray
) -> Galaxies:
    """Draw the shapes and colours of early-type galaxies.

    Half of them are de Vaucouleurs spheroids, half have a disk with up to
    half of the light.  Nearly all stars are old.

    Parameters
    ----------
    rng
        Random numbers.
    x, y
        Positions in pixels.
    redshift
        Redshifts.
    magnitude
        AB magnitudes in i.
    """
    n = len(x)
    radius = compute_half_light_radius(redshift, magnitude, early=True) * 10 ** rng.normal(0, 0.12, n)
    disk = np.where(rng.random(n) < 0.5, rng.uniform(0.1, 0.5, n), 0.0)
    young = np.abs(rng.normal(0, 0.01, n)) + 0.01 * redshift
    return Galaxies(
        x=x,
        y=y,
        redshift=redshift,
        magnitude=magnitude,
        half_light_radius=np.clip(np.stack([radius, 1.3 * radius], axis=1), 0.05, 12.0),
        axis_ratio=np.clip(rng.normal([0.78, 0.6], [0.13, 0.2], (n, 2)), 0.25, 0.98),
        position_angle=rng.uniform(0, np.pi, n),
        sersic_index=np.full(n, SPHEROID_INDEX),
        fraction=np.stack([1 - disk, disk, np.zeros(n)], axis=1),
        young=young[:, None] * np.array([1.0, 2.0, 1.0]),
        seed=rng.integers(2**31, size=n),
    )


def sample_late_types(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, redshift: np.ndarray, magnitude: np.ndarray
) -> Galaxies:
    """Draw the shapes and colours of late-type galaxies.

    Disks have a thickness of a fifth and random inclinations, so that some
    are seen edge-on; a bulge has on average a fifth of the light of bright
    ones, and spiral arms and knots a third of the light of the disk.  Bulges
    are old, disks mixed and the bluer the fainter, arms young.

    Parameters
    ----------
    rng, x, y, redshift, magnitude
        As for `sample_early_types`.
    """
    n = len(x)
    radius = compute_half_light_radius(redshift, magnitude, early=False) * 10 ** rng.normal(0, 0.17, n)
    bulge = np.clip(rng.exponential(np.clip(0.2 - 0.03 * (magnitude - 21), 0.03, 0.25)), 0, 0.7)
    arms = np.clip(rng.normal(0.35, 0.15, n), 0.0, 0.7) * (1 - bulge)
    young = np.clip(rng.normal(0.45 + 0.05 * (magnitude - 21), 0.18), 0.08, 0.95)
    return Galaxies(
        x=x,
        y=y,
        redshift=redshift,
        magnitude=magnitude,
        half_light_radius=np.clip(np.stack([0.25 * radius, radius], axis=1), 0.05, 12.0),
        axis_ratio=np.stack(
            [np.clip(rng.normal(0.8, 0.1, n), 0.5, 1.0), np.sqrt(0.04 + 0.96 * rng.random(n) ** 2)], axis=1
        ),
        position_angle=rng.uniform(0, np.pi, n),
        sersic_index=np.full(n, 2.5),
        fraction=np.stack([bulge, 1 - bulge - arms, arms], axis=1),
        young=np.stack([0.3 * young, young, np.minimum(young + 0.35, 1.0)], axis=1),
        seed=rng.integers(2**31, size=n),
    )


def sample_groups(rng: np.random.Generator, shape: tuple[int, int]) -> Galaxies:
    """Draw groups and clusters of red galaxies.

    One per 12 square arcmin, far more than on the sky, at redshifts from 0.2
    to 0.7: a central galaxy and 5 to 30 members, fainter by an exponential
    distribution, within a few hundred kpc, one in five of a late type.

    Parameters
    ----------
    rng, shape
        As for `sample_galaxies`.
    """
    area = shape[0] * shape[1] * (PIXEL_SCALE / 60) ** 2
    parts = [sample_early_types(rng, *np.zeros((4, 0)))]
    for _ in range(rng.poisson(area / 12)):
        redshift, n = rng.uniform(0.2, 0.7), rng.integers(5, 31)
        scale = COSMOLOGY.arcsec_per_kpc_proper(redshift).value / PIXEL_SCALE
        radius = np.minimum(rng.exponential(200.0, n), 700.0) * scale
        angle = rng.uniform(0, 2 * np.pi, n)
        x = rng.uniform(0, shape[1]) + np.r_[0.0, radius[1:] * np.cos(angle[1:])]
        y = rng.uniform(0, shape[0]) + np.r_[0.0, radius[1:] * np.sin(angle[1:])]
        brightest = float(COSMOLOGY.distmod(redshift).value) - 23.5 + rng.normal(0, 0.4)
        magnitude = brightest + np.r_[0.0, np.minimum(1.0 + rng.gamma(2.0, 0.9, n - 1), 5.0)]
        members = rng.normal(redshift, 0.002, n), magnitude
        late = (rng.random(n) < 0.2) & (np.arange(n) > 0)
        inside = (x > 0) & (x < shape[1] - 1) & (y > 0) & (y < shape[0] - 1)
        for sample, chosen in ((sample_early_types, ~late), (sample_late_types, late)):
            index = np.flatnonzero(chosen & inside)
            parts.append(sample(rng, x[index], y[index], *(values[index] for values in members)))
    return Galaxies.concatenate(parts)


def sample_stars(rng: np.random.Generator, shape: tuple[int, int], bands: Sequence[str]) -> Stars:
    """Draw the stars of the field.

    1.7 x 10^(0.13 (i - 22)) per square arcmin brighter than i, from 14.5 to
    26 mag, as at a galactic latitude of about 45 degrees; colours along the
    locus from F to M stars, the redder the fainter.

    Parameters
    ----------
    rng, shape
        As for `sample_galaxies`.
    bands
        Bands of the magnitudes; u and y follow g and z.
    """
    area = shape[0] * shape[1] * (PIXEL_SCALE / 60) ** 2
    low, high = (1.7 * 10 ** (0.13 * (i - 22)) for i in (14.5, 26.0))
    n = rng.poisson(area * (high - low))
    i = 22 + np.log10(rng.uniform(low, high, n) / 1.7) / 0.13
    red = np.clip(rng.normal(0.25 + 0.07 * (i - 16), 0.25), 0, 1) * (len(_LOCUS) - 1)
    g_r, r_i, i_z = (
        np.interp(red, np.arange(len(_LOCUS)), color) + rng.normal(0, 0.02, n) for color in _LOCUS.T
    )
    magnitudes = {"u": i + r_i + 2 * g_r + 0.7, "g": i + r_i + g_r, "r": i + r_i, "i": i, "z": i - i_z}
    magnitudes["y"] = magnitudes["z"] - 0.5 * i_z
    return Stars(
        rng.uniform(-0.5, shape[1] - 0.5, n),
        rng.uniform(-0.5, shape[0] - 0.5, n),
        {band: magnitudes[band] for band in bands},
    )


def compute_half_light_radius(redshift: np.ndarray, magnitude: np.ndarray, *, early: bool) -> np.ndarray:
    """Return the mean half-light radius of galaxies, in arcsec.

    Along the major axis; a luminosity L* (M_r = -21.2) has 3 kpc if early
    and 6 kpc if late, which goes as L^0.4 (1 + z)^-0.8, between the galaxies
    of van der Wel et al. (2014) and the smaller ones of LensPop, and as
    L^0.25 (1 + z)^-0.75.

    Parameters
    ----------
    redshift
        Redshifts.
    magnitude
        AB magnitudes in i.
    early
        Whether they are early types.
    """
    young = np.full_like(redshift, 0.02 if early else 0.5)
    k_correction = _compute_light("i", redshift, young) / _compute_light("r", np.zeros_like(redshift), young)
    # The flux per frequency gains a factor 1 + z.
    absolute = magnitude - COSMOLOGY.distmod(redshift).value + 2.5 * np.log10((1 + redshift) * k_correction)
    luminosity = 10 ** (-0.4 * (absolute + 21.2))
    if early:
        kpc = 3.0 * np.maximum(luminosity, 0.1) ** 0.4 * (1 + redshift) ** -0.8
    else:
        kpc = 6.0 * luminosity**0.25 * (1 + redshift) ** -0.75
    return kpc * COSMOLOGY.arcsec_per_kpc_proper(redshift).value


def _compute_light(band: str, redshift: np.ndarray, young: np.ndarray) -> np.ndarray:
    """Return mean flux densities in a band, in arbitrary units.

    Parameters
    ----------
    band
        Name of the band.
    redshift, young
        Redshifts, and shares of young stars at 5000 Angstrom, which broadcast
        against each other.
    """
    log_wavelength = np.log(_WAVELENGTH)
    observed = np.linspace(*SURVEY[band].wavelengths, 8)
    rest = np.log(observed / (1 + redshift[..., None]))

    def average(population: np.ndarray) -> np.ndarray:
        log_light = np.log(population / np.exp(np.interp(np.log(5000), log_wavelength, np.log(population))))
        return np.exp(np.interp(rest, log_wavelength, log_light)).mean(axis=-1)

    return (1 - young) * average(_OLD) + young * average(_YOUNG)

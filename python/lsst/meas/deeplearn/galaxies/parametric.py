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


"""Parametric galaxies of known truth, and the population they are drawn from.

The population is a joint distribution of magnitude, half-light radius,
redshift, axis ratio and bulge fraction, fitted to the COSMOS
catalogue of GalSim (81,499 galaxies with F814W < 25.2; Leauthaud et al. 2007,
Mandelbaum et al. 2014).  The fit ships with this module, the catalogue does
not.  Knots and spiral arms are not in that catalogue; how many there are is
our choice, stated at `draw_parameters`.
"""

from __future__ import annotations

__all__ = (
    "PARAMETER_NAMES",
    "Components",
    "GalaxyParameters",
    "GalaxyPopulation",
    "draw_parameters",
    "make_galaxy",
    "make_knotty_galaxy",
    "make_smooth_galaxy",
    "read_population_table",
)

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import galsim
import numpy as np
from scipy.optimize import brentq
from scipy.special import gammainc, gammaincinv, ndtr, ndtri
from scipy.stats import rankdata

from ._cosmos_population import COMPONENT_COVARIANCES, COMPONENT_MEANS, COMPONENT_WEIGHTS, QUANTILES

PARAMETER_NAMES = (
    "magnitude",
    "half_light_radius",
    "redshift",
    "axis_ratio",
    "bulge_fraction",
)
"""What a population is a joint distribution of: AB magnitude in F814W,
half-light radius in arcsec, redshift, minor over major axis, and fraction of
the flux in a de Vaucouleurs bulge."""

NORMAL_SCORES = np.linspace(-3.6, 3.6, 37)
"""Normal scores at which the quantiles of each parameter are tabulated."""

KNOT_SIZE = 0.03
"""Half-light radius of a knot in arcsec."""

ARM_POINTS = 16
"""Number of Gaussians that make up a spiral arm."""

ARM_WIDTH = 0.22
"""Sigma of these Gaussians in units of their distance from the centre."""

_ACCURATE = galsim.GSParams(maximum_fft_size=8192)


@dataclasses.dataclass(frozen=True, eq=False)
class GalaxyPopulation:
    """A joint distribution of galaxy parameters.

    Each parameter is mapped to a normal score by its own quantiles, and the
    scores follow a mixture of Gaussians: the marginal distributions come out
    as measured, whatever their shape, and the mixture has to describe the
    dependence only.
    """

    quantiles: np.ndarray
    """Value of each of `PARAMETER_NAMES` at `NORMAL_SCORES`, shape
    ``(D, Q)``."""

    weights: np.ndarray
    """Weight of each component, shape ``(K,)``."""

    means: np.ndarray
    """Mean normal scores of each component, shape ``(K, D)``."""

    covariances: np.ndarray
    """Covariance of the scores in each component, shape ``(K, D, D)``."""

    @classmethod
    def make_cosmos(cls) -> GalaxyPopulation:
        """Return the fit to the COSMOS catalogue that ships with the code."""
        k, d = np.shape(COMPONENT_MEANS)
        covariances = np.zeros((k, d, d))
        rows, columns = np.tril_indices(d)
        covariances[:, rows, columns] = covariances[:, columns, rows] = COMPONENT_COVARIANCES
        return cls(
            quantiles=np.array(QUANTILES),
            weights=np.array(COMPONENT_WEIGHTS) / np.sum(COMPONENT_WEIGHTS),
            means=np.array(COMPONENT_MEANS),
            covariances=covariances,
        )

    @classmethod
    def fit(
        cls, values: np.ndarray, *, components: int = 8, iterations: int = 100, seed: int = 0
    ) -> GalaxyPopulation:
        """Fit to a catalogue, by expectation maximisation.

        Parameters
        ----------
        values
            Parameters in the order of `PARAMETER_NAMES`, shape ``(N, D)``.
        components
            Number of Gaussians.
        iterations
            Number of iterations.
        seed
            Seed of the first guess.
        """
        n, d = values.shape
        rng = np.random.default_rng(seed)
        # Ties, as of bulge fractions of 0, are spread over their range.
        order = rankdata(values + 1e-9 * rng.standard_normal(values.shape), axis=0)
        scores = ndtri((order - 0.5) / n)
        means = scores[rng.choice(n, components, replace=False)]
        covariances = np.broadcast_to(np.eye(d), (components, d, d)).copy()
        weights = np.full(components, 1 / components)
        for _ in range(iterations):
            log_p = np.log(weights) + _log_gaussians(scores, means, covariances)  # (N, K)
            share = np.exp(log_p - log_p.max(axis=1, keepdims=True))
            share /= share.sum(axis=1, keepdims=True)
            total = share.sum(axis=0)
            weights, means = total / n, share.T @ scores / total[:, None]
            for k in range(components):
                offset = scores - means[k]
                covariances[k] = (share[:, k, None] * offset).T @ offset / total[k] + 1e-3 * np.eye(d)
        quantiles = np.quantile(values, ndtr(NORMAL_SCORES), axis=0).T
        return cls(quantiles=quantiles, weights=weights, means=means, covariances=covariances)

    def sample(self, n: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Draw galaxies.

        Parameters
        ----------
        n
            Number of galaxies.
        rng
            Source of random numbers.

        Returns
        -------
        parameters
            Arrays of shape ``(n,)`` by the names of the parameters.
        """
        chosen = rng.choice(len(self.weights), size=n, p=self.weights)
        factors = np.linalg.cholesky(self.covariances)
        normal = rng.standard_normal((n, self.means.shape[1]))
        scores = self.means[chosen] + np.einsum("nij,nj->ni", factors[chosen], normal)
        columns = zip(scores.T, self.quantiles, strict=True)
        values = [np.interp(column, NORMAL_SCORES, quantiles) for column, quantiles in columns]
        return dict(zip(PARAMETER_NAMES, values, strict=True))


def _log_gaussians(scores: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> np.ndarray:
    """Return the logarithm of each density at each point, ``(N, K)``."""
    result = np.empty((len(scores), len(means)))
    for k, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        factor = np.linalg.cholesky(covariance)
        white = np.linalg.solve(factor, (scores - mean).T)
        log_norm = np.log(np.diag(factor)).sum() + 0.5 * len(mean) * math.log(2 * math.pi)
        result[:, k] = -0.5 * (white**2).sum(axis=0) - log_norm
    return result


def read_population_table(path: str) -> np.ndarray:
    """Read the parameters of the galaxies that a population is fitted to.

    Parameters
    ----------
    path
        The table of fits of a GalSim COSMOS catalogue (a file
        ``real_galaxy_catalog_*_fits.fits`` of ``galsim_download_cosmos``).

    Returns
    -------
    values
        In the order of `PARAMETER_NAMES`, shape ``(N, 5)``, of the galaxies
        with a usable Sersic fit.
    """
    from astropy.io import fits

    table = fits.getdata(path, 1)
    axis_ratio = np.asarray(table["sersicfit"])[:, 3]
    radius, bulge = np.asarray(table["hlr"])[:, 0], np.asarray(table["fit_dvc_btt"])
    good = (np.asarray(table["viable_sersic"]) == 1) & np.isfinite(bulge)
    good &= (radius > 0.03) & (radius < 2.5) & (axis_ratio > 0.1)
    values = [table["mag_auto"], radius, table["zphot"], axis_ratio, np.clip(bulge, 0, 1)]
    return np.column_stack([np.asarray(value, dtype=np.float64)[good] for value in values])


@dataclasses.dataclass(frozen=True)
class GalaxyParameters:
    """All that determines a parametric galaxy."""

    magnitude: float
    """AB magnitude."""

    half_light_radius: float
    """Radius in arcsec with half of the flux of bulge and disk together, of
    the circle with the area of the ellipse."""

    redshift: float
    """Redshift; it acts through the knots."""

    axis_ratio: float = 1.0
    """Minor over major axis of the disk; the bulge is half as flattened."""

    position_angle: float = 0.0
    """Direction of the major axis in radians, counter-clockwise from x."""

    bulge_fraction: float = 0.0
    """Fraction of the flux in a de Vaucouleurs bulge."""

    bulge_radius_ratio: float = 0.4
    """Half-light radius of the bulge over that of the disk."""

    knot_fraction: float = 0.0
    """Fraction of the flux of the disk in knots."""

    n_knots: int = 0
    """Number of knots."""

    arm_fraction: float = 0.0
    """Fraction of the flux of the disk in spiral arms."""

    n_arms: int = 2
    """Number of arms."""

    pitch_angle: float = 0.3
    """Angle in radians between an arm and the circle; its sign is the
    direction of winding."""

    seed: int = 0
    """Seed of the positions of knots and arms."""

    def __post_init__(self) -> None:
        bounds = {
            "magnitude": (-math.inf, math.inf),
            "half_light_radius": (1e-6, math.inf),
            "redshift": (0.0, math.inf),
            "axis_ratio": (0.05, 1.0),
            "bulge_fraction": (0.0, 1.0),
            "bulge_radius_ratio": (1e-3, 1e3),
        }
        for name, (low, high) in bounds.items():
            if not (low <= getattr(self, name) <= high and math.isfinite(getattr(self, name))):
                raise ValueError(f"No galaxy has {name} = {getattr(self, name)}.")
        if min(self.knot_fraction, self.arm_fraction) < 0 or self.knot_fraction + self.arm_fraction > 1:
            raise ValueError(
                f"Knots and arms have fractions {self.knot_fraction} and {self.arm_fraction} of the disk; "
                "they must be positive and at most 1 together."
            )

    @property
    def conditions(self) -> tuple[float, float, float]:
        """Half-light radius (arcsec), magnitude and redshift."""
        return self.half_light_radius, self.magnitude, self.redshift


def draw_parameters(
    n: int, *, seed: int | Sequence[int], population: GalaxyPopulation | None = None
) -> list[GalaxyParameters]:
    """Draw galaxies of known truth.

    Parameters
    ----------
    n
        Number of galaxies.
    seed
        Seed; the same seed gives the same galaxies.
    population
        Joint distribution of their parameters; that of COSMOS by default.

    Notes
    -----
    Bulge to disk radii are log-normal about 0.4 with a scatter of 0.15 dex.
    Disks have 4 to 48 knots; their fraction of the flux of the disk is a beta
    distribution with a mean of 0.1 at redshift 0, rising to 0.35 at 2.5, in
    the sense of the clumps of Guo et al. (2015, ApJ 800, 39).  Of the disks
    with a bulge fraction below 0.6 and an axis ratio above 0.3, 45 % have
    arms, two in three of them two and the others three, with pitch angles of
    10 to 35 degrees and 15 to 50 % of the flux of the disk.
    """
    rng = np.random.default_rng(seed)
    drawn = (population or GalaxyPopulation.make_cosmos()).sample(n, rng)
    galaxies = []
    for i in range(n):
        bulge_fraction = float(np.clip(drawn["bulge_fraction"][i], 0, 1))
        axis_ratio = float(np.clip(drawn["axis_ratio"][i], 0.05, 1))
        redshift = float(drawn["redshift"][i])
        mean = 0.1 + 0.25 * min(redshift / 2.5, 1.0)
        knot_fraction = float(rng.beta(4 * mean, 4 * (1 - mean)))
        has_arms = rng.uniform() < 0.45 and bulge_fraction < 0.6 and axis_ratio > 0.3
        arm_fraction = float(rng.uniform(0.15, 0.5)) if has_arms else 0.0
        galaxies.append(
            GalaxyParameters(
                magnitude=float(drawn["magnitude"][i]),
                half_light_radius=float(drawn["half_light_radius"][i]),
                redshift=redshift,
                axis_ratio=axis_ratio,
                position_angle=float(rng.uniform(0, math.pi)),
                bulge_fraction=bulge_fraction,
                bulge_radius_ratio=float(0.4 * 10 ** (0.15 * rng.standard_normal())),
                knot_fraction=min(knot_fraction, 1 - arm_fraction),
                n_knots=int(rng.integers(4, 49)),
                arm_fraction=arm_fraction,
                n_arms=2 if rng.uniform() < 2 / 3 else 3,
                pitch_angle=float(math.radians(rng.uniform(10, 35)) * rng.choice([-1, 1])),
                seed=int(rng.integers(2**31)),
            )
        )
    return galaxies


@dataclasses.dataclass(frozen=True, eq=False)
class Components:
    """What a galaxy is the sum of, for a total flux of 1.

    Bulge and disk are at the origin, with the same position angle.
    """

    bulge_flux: float
    """Flux of the de Vaucouleurs bulge."""

    bulge_radius: float
    """Its half-light radius in arcsec, of the circle with its area."""

    bulge_axis_ratio: float
    """Its minor over major axis."""

    disk_flux: float
    """Flux of the exponential disk."""

    disk_radius: float
    """Its half-light radius in arcsec, of the circle with its area."""

    disk_axis_ratio: float
    """Its minor over major axis."""

    position_angle: float
    """Direction of the major axes in radians, counter-clockwise from x."""

    x: np.ndarray
    """Positions of round Gaussians in arcsec, shape ``(K,)``."""

    y: np.ndarray
    """Positions of round Gaussians in arcsec, shape ``(K,)``."""

    flux: np.ndarray
    """Fluxes of the Gaussians, shape ``(K,)``."""

    sigma: np.ndarray
    """Sizes of the Gaussians in arcsec, shape ``(K,)``."""

    def make_profile(self) -> galsim.GSObject:
        """Return the galaxy as a profile of GalSim."""
        beta = self.position_angle * galsim.radians
        parts: list[galsim.GSObject] = []
        if self.bulge_flux > 0:
            bulge = galsim.DeVaucouleurs(half_light_radius=self.bulge_radius, flux=self.bulge_flux)
            parts.append(bulge.shear(q=self.bulge_axis_ratio, beta=beta))
        if self.disk_flux > 0:
            disk = galsim.Exponential(half_light_radius=self.disk_radius, flux=self.disk_flux)
            parts.append(disk.shear(q=self.disk_axis_ratio, beta=beta))
        for x, y, flux, sigma in zip(self.x, self.y, self.flux, self.sigma, strict=True):
            if flux > 0:
                parts.append(galsim.Gaussian(sigma=sigma, flux=flux).shift(x, y))
        return galsim.Sum(parts, gsparams=_ACCURATE)


def make_smooth_galaxy(parameters: GalaxyParameters) -> Components:
    """Return bulge and disk: the parametric baseline.

    Parameters
    ----------
    parameters
        The galaxy; its knots and arms are part of the disk.
    """
    return _make_components(parameters, 1 - parameters.bulge_fraction, [])


def make_knotty_galaxy(
    parameters: GalaxyParameters, *, fraction: float = 0.25, n_knots: int = 30
) -> Components:
    """Return the baseline with part of its flux in knots.

    Parameters
    ----------
    parameters
        The galaxy; its own knots and arms are part of the disk.
    fraction
        Fraction of all of the flux in knots of equal flux, which are
        distributed as the light of the disk.
    n_knots
        Number of knots.
    """
    rng = np.random.default_rng([parameters.seed, 1])
    knots = _Points(*_draw_disk_points(n_knots, rng), np.full(n_knots, fraction / n_knots), KNOT_SIZE)
    smooth = 1 - fraction
    components = _make_components(parameters, smooth * (1 - parameters.bulge_fraction), [knots])
    return dataclasses.replace(components, bulge_flux=smooth * parameters.bulge_fraction)


def make_galaxy(parameters: GalaxyParameters) -> Components:
    """Return bulge, disk, knots and arms.

    Parameters
    ----------
    parameters
        The galaxy.
    """
    p, rng = parameters, np.random.default_rng([parameters.seed, 0])
    in_disk = 1 - p.bulge_fraction
    smooth, points = 1.0, []
    if p.knot_fraction > 0 and p.n_knots > 0:
        x, y = _draw_disk_points(p.n_knots, rng)
        share = rng.exponential(size=p.n_knots)
        points.append(_Points(x, y, in_disk * p.knot_fraction * share / share.sum(), KNOT_SIZE))
        smooth -= p.knot_fraction
    if p.arm_fraction > 0:
        points.append(_draw_arms(p, in_disk * p.arm_fraction, rng))
        smooth -= p.arm_fraction
    return _make_components(p, in_disk * smooth, points)


class _Points(NamedTuple):
    """Round Gaussians in the plane of a disk."""

    x: np.ndarray
    """Positions in units of the half-light radius of the face-on disk."""

    y: np.ndarray
    """Positions in the same units."""

    flux: np.ndarray
    """Fluxes."""

    size: np.ndarray | float
    """Half-light radii in arcsec; negative ones are in units of that of the
    disk."""


def _make_components(p: GalaxyParameters, disk_flux: float, points: list[_Points]) -> Components:
    radius = p.half_light_radius / _compute_radius_ratio(p)
    root = math.sqrt(p.axis_ratio)
    cos, sin = math.cos(p.position_angle), math.sin(p.position_angle)
    x, y, flux, size = (
        np.concatenate([np.broadcast_to(part[i], part.x.shape) for part in points]) if points else np.empty(0)
        for i in range(4)
    )
    size = np.where(size < 0, -size * radius, size)
    major, minor = radius * x / root, radius * y * root
    return Components(
        bulge_flux=p.bulge_fraction,
        bulge_radius=p.bulge_radius_ratio * radius,
        bulge_axis_ratio=0.5 * (1 + p.axis_ratio),
        disk_flux=disk_flux,
        disk_radius=radius,
        disk_axis_ratio=p.axis_ratio,
        position_angle=p.position_angle,
        x=cos * major - sin * minor,
        y=sin * major + cos * minor,
        flux=flux,
        sigma=size / math.sqrt(2 * math.log(2)),
    )


def _compute_radius_ratio(p: GalaxyParameters) -> float:
    """Return the half-light radius of the galaxy over that of the disk."""

    def excess(x: float) -> float:
        # The flux inside x radii of the disk, less one half.
        bulge = _sersic_flux_inside(x / p.bulge_radius_ratio, 4)
        return p.bulge_fraction * bulge + (1 - p.bulge_fraction) * _sersic_flux_inside(x, 1) - 0.5

    if p.bulge_fraction == 0:
        return 1.0
    edges = min(1.0, p.bulge_radius_ratio), max(1.0, p.bulge_radius_ratio)
    return float(brentq(excess, 0.99 * edges[0], 1.01 * edges[1]))


def _sersic_flux_inside(x: float, n: float) -> float:
    """Return the fraction of flux inside x half-light radii."""
    return float(gammainc(2 * n, gammaincinv(2 * n, 0.5) * x ** (1 / n)))


def _draw_disk_points(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw points distributed as the light of a face-on disk.

    In units of its half-light radius; the outermost one in a thousand is
    left out.
    """
    radius = gammaincinv(2, rng.uniform(0, 0.999, n)) / gammaincinv(2, 0.5)
    angle = rng.uniform(0, 2 * math.pi, n)
    return radius * np.cos(angle), radius * np.sin(angle)


def _draw_arms(p: GalaxyParameters, flux: float, rng: np.random.Generator) -> _Points:
    """Draw logarithmic spirals with the radial profile of the disk."""
    quantiles = (np.arange(ARM_POINTS) + 0.5) / ARM_POINTS
    radius = np.tile(gammaincinv(2, 0.97 * quantiles) / gammaincinv(2, 0.5), p.n_arms)
    start = rng.uniform(0, 2 * math.pi) + np.repeat(2 * math.pi * np.arange(p.n_arms) / p.n_arms, ARM_POINTS)
    angle = start + np.log(radius) / math.tan(p.pitch_angle) + 0.1 * rng.standard_normal(len(radius))
    share = rng.gamma(3.0, size=len(radius))
    size = -ARM_WIDTH * radius * math.sqrt(2 * math.log(2))
    return _Points(radius * np.cos(angle), radius * np.sin(angle), flux * share / share.sum(), size)

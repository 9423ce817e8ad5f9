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

"""Strong lenses drawn from a prior, and galaxies that may be their hosts.

Positions and orientations are those of the pixel grid: x along columns, y
along rows, angles counter-clockwise from the x axis.
"""

from __future__ import annotations

__all__ = (
    "assign_source_images",
    "choose_hosts",
    "complete_lens_population",
    "compute_einstein_radius",
    "compute_flux",
    "rotate_lenses",
    "sample_lens_population",
)

from collections.abc import Mapping, Sequence

import astropy.units as u
import numpy as np
import torch
from astropy.cosmology import FlatLambdaCDM
from astropy.table import Column, Table
from scipy.spatial import cKDTree

from .lens_equation import compute_caustics, is_inside_polygon

COSMOLOGY = FlatLambdaCDM(H0=70.0, Om0=0.3)
"""Cosmology of the LensPop tables."""

SPEED_OF_LIGHT = 299792.458
"""In km/s."""

AB_ZERO_POINT = 31.4
"""AB magnitude of 1 nJy."""

MAX_KNOTS = 4
"""Largest number of knots of star formation in a source."""

_LENS_COLUMNS = ("einstein_radius", "axis_ratio", "position_angle", "gamma1", "gamma2")

# Medians in the LensPop table; i - z and z - y are not in it (see
# sample_lens_population).
_LENS_COLORS = {
    "redshift": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5],
    "g-r": [1.11, 1.48, 1.78, 1.95, 1.86, 1.87, 2.00, 2.46, 2.78, 2.85, 2.77, 2.35, 1.55, 1.19],
    "r-i": [0.40, 0.53, 0.63, 0.73, 1.07, 1.33, 1.54, 1.37, 1.25, 1.25, 1.37, 1.73, 2.22, 2.22],
    "i-z": [0.30, 0.31, 0.33, 0.37, 0.42, 0.48, 0.60, 0.75, 0.88, 0.97, 1.00, 1.00, 1.00, 1.00],
    "z-y": [0.15, 0.17, 0.20, 0.22, 0.24, 0.26, 0.28, 0.30, 0.35, 0.42, 0.50, 0.58, 0.65, 0.70],
}
_SOURCE_COLORS = {
    "redshift": [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75, 4.5],
    "g-r": [0.93, 0.57, 0.16, -0.09, -0.03, 0.11, 0.32, 0.60, 0.90],
    "r-i": [0.31, 0.73, 0.26, 0.15, -0.07, -0.08, -0.02, 0.05, 0.19],
    "i-z": [0.20, 0.25, 0.35, 0.15, 0.10, 0.00, 0.00, 0.00, 0.05],
    "z-y": [0.10, 0.10, 0.15, 0.20, 0.10, 0.05, 0.00, 0.00, 0.00],
}
_SOURCE_COLOR_SCATTER = {
    "redshift": _SOURCE_COLORS["redshift"],
    "g-r": [0.32, 0.50, 0.23, 0.08, 0.08, 0.20, 0.35, 0.32, 0.60],
    "r-i": [0.19, 0.24, 0.17, 0.20, 0.08, 0.12, 0.06, 0.12, 0.26],
    "i-z": [0.10] * 9,
    "z-y": [0.10] * 9,
}
_LENS_MAGNITUDE = {
    "redshift": _LENS_COLORS["redshift"],
    # Absolute i magnitude at 250 km/s, with the K correction in it.
    "i": [
        *(-23.63, -23.60, -23.51, -23.35, -23.22, -23.06, -22.82),
        *(-22.45, -22.04, -21.71, -21.41, -21.25, -20.91, -20.47),
    ],
}


def compute_flux(magnitude: np.ndarray) -> np.ndarray:
    """Return the flux density in nJy of AB magnitudes.

    Parameters
    ----------
    magnitude
        AB magnitude.
    """
    return 10 ** (-0.4 * (np.asarray(magnitude, dtype=np.float64) - AB_ZERO_POINT))


def compute_einstein_radius(
    *, velocity_dispersion: np.ndarray, lens_redshift: np.ndarray, source_redshift: np.ndarray
) -> np.ndarray:
    r"""Return the Einstein radius of an isothermal lens, in arcsec.

    .. math:: \theta_E = 4 \pi (\sigma / c)^2 D_{ls} / D_s

    Parameters
    ----------
    velocity_dispersion
        Velocity dispersion in km/s.
    lens_redshift, source_redshift
        Redshifts; the radius is 0 where the source is not behind the lens.
    """
    lens = COSMOLOGY.comoving_distance(np.asarray(lens_redshift)).value
    source = COSMOLOGY.comoving_distance(np.asarray(source_redshift)).value
    ratio = np.clip(1 - lens / source, 0, None)
    return 4 * np.pi * (velocity_dispersion / SPEED_OF_LIGHT) ** 2 * ratio * u.rad.to(u.arcsec)


def sample_lens_population(
    n: int,
    *,
    seed: int,
    bands: Sequence[str] = ("g", "r", "i", "z"),
    min_einstein_radius: float = 0.5,
    max_einstein_radius: float = 3.0,
    uniform_radius: bool = False,
    min_magnification: float = 3.0,
    shear_scale: float = 0.05,
) -> Table:
    r"""Draw strong lenses as LSST could discover them.

    Parameters
    ----------
    n
        Number of lenses.
    seed
        Seed; the same seed gives the same lenses.
    bands
        Bands of the magnitudes, of g, r, i, z and y.
    min_einstein_radius, max_einstein_radius
        Limits in arcsec.
    uniform_radius
        Whether the logarithm of the Einstein radius is uniform within the
        limits, instead of the prior, which has one in 20 above 2 arcsec.  The
        lens galaxies are those of the prior, as if groups of galaxies around
        them had the other mass.
    min_magnification
        Where a source that is only doubly imaged may be: where a round lens
        magnifies a point more than this.  With 2 it is anywhere within the
        cut (see `compute_caustics`).
    shear_scale
        Scale of the Rayleigh distribution of the external shear.

    Returns
    -------
    population
        A row a lens.  The units and meaning of the columns are in their
        descriptions.

    Raises
    ------
    ValueError
        Raised for a band that is not one of these, or limits that hold no
        lens.

    Notes
    -----
    These are simple functions fitted to the 13,126 lenses of the LensPop
    table ``LSST_optimal_coadd``, the lenses that LSST could discover (please
    cite Collett 2015, ApJ 811, 20).  It is a distribution after selection
    (magnification above 3, resolved, signal to noise above 20):

    * Lens redshift: Gamma distribution of shape 3.48 and scale 0.158 (maximum
      likelihood; Kolmogorov-Smirnov distance 0.009).
    * Velocity dispersion: normal, mean 244 + 30 z km/s, scatter 41 km/s
      (least squares).
    * Source redshift: ln(z_s - z_l) normal, mean 0.119 + 0.382 z_l, scatter
      0.523 (least squares).
    * Einstein radius: that of the isothermal sphere, which LensPop's equal
      to 0.3 per cent; radii outside the limits are drawn again.
    * Axis ratio q: 1 - q Rayleigh of scale 0.38 - 5.7e-4 sigma / (km/s),
      q above 0.2, as in LensPop (Collett 2015); the table has 0.256 to
      0.192 from 180 to 330 km/s, and this gives 0.277 to 0.192.
    * Source i magnitude: normal, mean 25.96 - 1.20 L + 0.15 L^2 with L the
      logarithm of the Einstein radius in arcsec, scatter 1.04 mag, brighter
      than 28.
    * Source half-light radius: ln(R / arcsec) normal, mean -1.29 - 0.394 m -
      0.104 m^2 with m = i - 25, scatter 0.588, and R within 0.06 to 1.2
      arcsec: smaller ones, a sixth of the table, are not resolved.
    * Colours g - r and r - i: medians in bins of redshift, with their
      scatter, for lenses and sources; absolute magnitude and size of the
      lens: the same with slopes of -4.92 mag and 1.23 in ln(sigma).

    Not from the table: position angles, uniform; shear, Rayleigh; positions
    of the source, uniform where it is multiply imaged and magnified as
    ``min_magnification`` says; i - z and z - y, typical of the types and
    redshifts; Sersic index of the source, log-normal about 1 with scatter
    0.3, within 0.6 and 2.5 (LensPop has 1); half of the sources have one to
    four knots with a tenth to half of the light.
    """
    if unknown := set(bands) - set("grizy"):
        raise ValueError(f"The prior has magnitudes in g, r, i, z and y, not {sorted(unknown)}.")
    if min_magnification < 2.0:
        raise ValueError(f"Multiply imaged sources are magnified by 2 or more, not by {min_magnification}.")
    if not 0.0 < min_einstein_radius < max_einstein_radius or min_einstein_radius > 3.5:
        raise ValueError(
            f"No lens of the prior has an Einstein radius from {min_einstein_radius} to "
            f"{max_einstein_radius} arcsec."
        )
    rng = np.random.default_rng(seed)
    lenses = _sample_deflectors(n, rng, min_einstein_radius, max_einstein_radius)
    z_l, z_s, sigma = lenses["lens_redshift"], lenses["source_redshift"], lenses["velocity_dispersion"]
    log_sigma = np.log(sigma / 250.0)
    lens_i = np.interp(z_l, _LENS_MAGNITUDE["redshift"], _LENS_MAGNITUDE["i"]) - 4.92 * log_sigma
    lens_i = lens_i + COSMOLOGY.distmod(z_l).value + rng.normal(0, 0.14, n)
    if uniform_radius:
        radius = np.exp(rng.uniform(np.log(min_einstein_radius), np.log(max_einstein_radius), n))
        sigma = sigma * np.sqrt(radius / lenses["einstein_radius"])
        lenses["einstein_radius"] = radius
    log_radius = np.log(lenses["einstein_radius"])
    source_i = 25.96 - 1.20 * log_radius + 0.15 * log_radius**2
    source_i = np.minimum(source_i + rng.normal(0, 1.04, n), 28.0)
    m = source_i - 25.0
    half_light_radius = np.exp(-1.29 - 0.394 * m - 0.104 * m**2 + rng.normal(0, 0.588, n))
    kpc = np.exp(1.39 + 1.23 * log_sigma + rng.normal(0, 0.25, n))
    lens_scale = COSMOLOGY.angular_diameter_distance(z_l).to_value(u.kpc) * u.arcsec.to(u.rad)

    table = Table()
    _add(table, "source_id", rng.integers(2**62, size=n), None, "Random ID of the source")
    _add(table, "einstein_radius", lenses["einstein_radius"], u.arcsec, "On the intermediate axis")
    _add(table, "lens_redshift", z_l, None, "Redshift of the lens")
    _add(table, "source_redshift", z_s, None, "Redshift of the source")
    _add(table, "velocity_dispersion", sigma, u.km / u.s, "Velocity dispersion of the lens")
    _add(table, "axis_ratio", lenses["axis_ratio"], None, "Minor over major axis of the mass")
    _add(table, "position_angle", rng.uniform(0, 180, n), u.deg, "Major axis of the mass, from x to y")
    shear = np.minimum(rng.rayleigh(shear_scale, n), 0.3)
    angle = rng.uniform(0, 2 * np.pi, n)
    _add(table, "gamma1", shear * np.cos(angle), None, "External shear, positive along x")
    _add(table, "gamma2", shear * np.sin(angle), None, "External shear, positive along the diagonal")
    lens_mag = _make_magnitudes(lens_i, z_l, _LENS_COLORS, None, rng)
    for band in bands:
        _add(table, f"lens_mag_{band}", lens_mag[band], u.ABmag, f"Total {band} magnitude of the lens galaxy")
    _add(table, "lens_half_light_radius", kpc / lens_scale, u.arcsec, "Half-light radius of the lens galaxy")
    source_mag = _make_magnitudes(source_i, z_s, _SOURCE_COLORS, _SOURCE_COLOR_SCATTER, rng)
    for band in bands:
        description = f"Total {band} magnitude of the source without lensing"
        _add(table, f"source_mag_{band}", source_mag[band], u.ABmag, description)
    half_light_radius = np.clip(half_light_radius, 0.06, 1.2)
    description = "Half-light radius of the source on the intermediate axis"
    _add(table, "source_half_light_radius", half_light_radius, u.arcsec, description)
    flattening = np.minimum(rng.rayleigh(0.28, n), 0.8)
    _add(table, "source_axis_ratio", 1 - flattening, None, "Minor over major axis of the source")
    _add(table, "source_position_angle", rng.uniform(0, 180, n), u.deg, "Major axis, from x to y")
    index = np.clip(np.exp(rng.normal(0, 0.3, n)), 0.6, 2.5)
    _add(table, "source_sersic_index", index, None, "Sersic index of the source")
    _add_knots(table, rng)
    _add_source_positions(table, rng, shrink=2.0 / min_magnification)
    return table


def _add(table: Table, name: str, values: np.ndarray, unit: u.UnitBase | None, description: str) -> None:
    table[name] = Column(values, unit=unit, description=description)


def _sample_deflectors(
    n: int, rng: np.random.Generator, min_radius: float, max_radius: float
) -> dict[str, np.ndarray]:
    """Draw lenses until enough have an Einstein radius within limits."""
    parts: list[np.ndarray] = []
    while sum(part.shape[1] for part in parts) < n:
        m = 2 * n + 100
        z_l = np.clip(rng.gamma(3.48, 0.158, m), 0.05, 1.6)
        sigma = rng.normal(244 + 30 * z_l, 41)
        z_s = z_l + np.exp(rng.normal(0.119 + 0.382 * z_l, 0.523))
        radius = compute_einstein_radius(velocity_dispersion=sigma, lens_redshift=z_l, source_redshift=z_s)
        flattening = rng.rayleigh(np.clip(0.38 - 5.7e-4 * sigma, 0.05, None))
        keep = (sigma > 100) & (radius > min_radius) & (radius < max_radius) & (flattening < 0.8) & (z_s < 7)
        parts.append(np.stack([z_l, z_s, sigma, radius, 1 - flattening])[:, keep])
    names = ("lens_redshift", "source_redshift", "velocity_dispersion", "einstein_radius", "axis_ratio")
    return dict(zip(names, np.concatenate(parts, axis=1)[:, :n], strict=True))


def _make_magnitudes(
    i: np.ndarray,
    redshift: np.ndarray,
    colors: Mapping[str, list[float]],
    scatter: Mapping[str, list[float]] | None,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Return magnitudes in all bands from those in i and the redshift."""
    color = {}
    for name in ("g-r", "r-i", "i-z", "z-y"):
        width = 0.08 if scatter is None else np.interp(redshift, scatter["redshift"], scatter[name])
        color[name] = np.interp(redshift, colors["redshift"], colors[name]) + rng.normal(0, width, len(i))
    r, z = i + color["r-i"], i - color["i-z"]
    return {"g": r + color["g-r"], "r": r, "i": i, "z": z, "y": z - color["z-y"]}


def _add_knots(table: Table, rng: np.random.Generator) -> None:
    """Add the knots of star formation of the sources."""
    n = len(table)
    number = np.where(rng.random(n) < 0.5, rng.integers(1, MAX_KNOTS + 1, n), 0)
    share = rng.dirichlet(np.ones(MAX_KNOTS), n) * (np.arange(MAX_KNOTS) < number[:, None])
    total = np.clip(share.sum(axis=1, keepdims=True), 1e-6, None)
    flux = share / total * rng.uniform(0.1, 0.5, (n, 1))
    # Within the ellipse of the disc, at radii as its exponential light.
    radius = np.minimum(rng.gamma(2.0, 1 / 1.678, (n, MAX_KNOTS)), 2.5)
    radius = radius * table["source_half_light_radius"].data[:, None]
    phi = rng.uniform(0, 2 * np.pi, (n, MAX_KNOTS))
    root = np.sqrt(table["source_axis_ratio"].data)[:, None]
    major, minor = radius * np.cos(phi) / root, radius * np.sin(phi) * root
    angle = np.deg2rad(table["source_position_angle"].data)[:, None]
    x, y = major * np.cos(angle) - minor * np.sin(angle), major * np.sin(angle) + minor * np.cos(angle)
    _add(table, "source_knot_x", x, u.arcsec, "Offset of knots from the centre of the source")
    _add(table, "source_knot_y", y, u.arcsec, "Offset of knots from the centre of the source")
    _add(table, "source_knot_flux", flux, None, "Fraction of the light in knots; 0 for none")


def _add_source_positions(table: Table, rng: np.random.Generator, shrink: float) -> None:
    """Place sources uniformly within the caustic and the cut, shrunk."""
    lens = {name: torch.tensor(np.asarray(table[name], dtype=np.float64)) for name in _LENS_COLUMNS}
    caustic, cut = compute_caustics(
        einstein_radius=lens["einstein_radius"],
        axis_ratio=lens["axis_ratio"],
        position_angle=torch.deg2rad(lens["position_angle"]),
        gamma1=lens["gamma1"],
        gamma2=lens["gamma2"],
    )
    cut = cut * shrink
    both = torch.cat([caustic, cut], dim=1)
    low, high = both.amin(dim=1).numpy(), both.amax(dim=1).numpy()
    position = np.zeros((len(table), 2))
    todo = np.arange(len(table))
    while len(todo):
        trial = rng.uniform(low[todo], high[todo])
        x, y = torch.from_numpy(trial).unbind(-1)
        inside = is_inside_polygon(x, y, caustic[todo]) | is_inside_polygon(x, y, cut[todo])
        position[todo[inside.numpy()]] = trial[inside.numpy()]
        todo = todo[~inside.numpy()]
    _add(table, "source_x", position[:, 0], u.arcsec, "Position of the source relative to the lens, along x")
    _add(table, "source_y", position[:, 1], u.arcsec, "Position of the source relative to the lens, along y")


def choose_hosts(
    population: Table,
    magnitudes: Mapping[str, np.ndarray],
    *,
    seed: int,
    max_lenses: int,
    neighbors: int = 8,
) -> np.ndarray:
    """Choose for each lens a galaxy that looks like its deflector.

    It is one of those nearest in magnitude and colours, so that the lenses
    keep the distribution of the prior as far as the galaxies allow.

    Parameters
    ----------
    population
        Lenses of `sample_lens_population`.
    magnitudes
        AB magnitudes of the galaxies by band, each of shape ``(N,)``; the
        bands that ``population`` has too are compared.
    seed
        Seed of the choice.
    max_lenses
        Largest number of lenses on one galaxy.
    neighbors
        Number of nearest galaxies to choose from.

    Returns
    -------
    hosts
        Row of a galaxy for each lens, or -1 where all that are near have
        their lenses already.

    Raises
    ------
    ValueError
        Raised if lenses and galaxies share no two bands.
    """
    bands = [band for band in "grizy" if band in magnitudes and f"lens_mag_{band}" in population.colnames]
    if len(bands) < 2:
        raise ValueError(f"Choosing hosts needs two bands that lenses have; they have {sorted(magnitudes)}.")
    lens = _make_color_features({band: np.asarray(population[f"lens_mag_{band}"]) for band in bands})
    host = _make_color_features({band: np.asarray(magnitudes[band], dtype=np.float64) for band in bands})
    neighbors = min(neighbors, len(host))
    _, index = cKDTree(host).query(lens, k=neighbors)
    index = np.random.default_rng(seed).permuted(index.reshape(len(lens), neighbors), axis=1)
    used = np.zeros(len(host), dtype=np.int64)
    chosen = np.full(len(lens), -1)
    for k, row in enumerate(index):
        free = row[used[row] < max_lenses]
        if len(free):
            chosen[k] = free[0]
            used[free[0]] += 1
    return chosen


def _make_color_features(magnitudes: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return magnitude and colours scaled by how well they must agree."""
    bands = list(magnitudes)
    reference = magnitudes["i" if "i" in magnitudes else bands[-1]]
    colors = [magnitudes[a] - magnitudes[b] for a, b in zip(bands, bands[1:], strict=False)]
    features = np.stack([reference / 0.5, *(color / 0.3 for color in colors)], axis=1)
    return np.nan_to_num(features, nan=1e3, posinf=1e3, neginf=-1e3)


def rotate_lenses(population: Table, angle: np.ndarray) -> Table:
    """Return lenses turned as a whole, with their sources.

    Parameters
    ----------
    population
        Lenses of `sample_lens_population`.
    angle
        Angles in degrees, counter-clockwise, shape ``(N,)``.
    """
    turned = population.copy()
    for name, period in (
        ("position_angle", 180),
        ("source_position_angle", 180),
        ("source_image_angle", 360),
    ):
        if name in turned.colnames:
            turned[name] = (turned[name] + angle) % period
    pairs = (("gamma1", "gamma2", 2), ("source_x", "source_y", 1), ("source_knot_x", "source_knot_y", 1))
    for x, y, spin in pairs:
        phi = np.deg2rad(spin * np.asarray(angle)).reshape(-1, *[1] * (population[x].ndim - 1))
        turned[x] = np.cos(phi) * population[x] - np.sin(phi) * population[y]
        turned[y] = np.sin(phi) * population[x] + np.cos(phi) * population[y]
    return turned


def assign_source_images(population: Table, ids: np.ndarray, *, fraction: float, seed: int) -> Table:
    """Return lenses of which some have sources that look like images.

    Parameters
    ----------
    population
        Lenses of `sample_lens_population`.
    ids
        IDs of the images, which become those of the sources; -1 for images
        that may not be used.
    fraction
        Fraction of the sources that look like images.
    seed
        Seed.

    Returns
    -------
    population
        The lenses with the columns ``source_image``, the row of the image or
        -1, and ``source_image_angle`` in degrees.  Size and magnitudes remain
        those of the source.
    """
    rng = np.random.default_rng(seed)
    n, usable = len(population), np.flatnonzero(ids >= 0)
    image = np.full(n, -1)
    if len(usable):
        image = np.where(rng.random(n) < fraction, rng.choice(usable, n), -1)
    population = population.copy()
    _add(population, "source_image", image, None, "Row of the image that the source looks like, or -1")
    _add(
        population, "source_image_angle", rng.uniform(0, 360, n), u.deg, "Rotation of that image, from x to y"
    )
    population["source_id"] = np.where(image >= 0, ids[image], population["source_id"])
    return population


def complete_lens_population(table: Table, *, bands: Sequence[str], seed: int) -> Table:
    """Return lenses of a catalogue with all columns that rendering needs.

    Parameters
    ----------
    table
        A row a lens with ``einstein_radius`` and ``source_half_light_radius``
        in arcsec, and ``source_mag_<band>`` and ``lens_mag_<band>`` in AB
        magnitudes.  Other columns of `sample_lens_population` are used where
        they are there.
    bands
        Bands of the magnitudes.
    seed
        Seed of what is drawn: orientations, and positions of sources where
        they are multiply imaged with a magnification of 3 or more.

    Returns
    -------
    population
        The lenses, round and without shear, with round exponential sources
        without knots where the table does not say otherwise.

    Raises
    ------
    ValueError
        Raised if needed columns are missing, or values make no sense.
    """
    magnitudes = [f"{kind}_mag_{band}" for kind in ("lens", "source") for band in bands]
    needed = ["einstein_radius", "source_half_light_radius", *magnitudes]
    if missing := sorted(set(needed) - set(table.colnames)):
        raise ValueError(f"The catalogue of lenses has no columns {missing}.")
    n, rng = len(table), np.random.default_rng(seed)
    defaults = {
        "source_id": np.arange(n),
        "axis_ratio": np.ones(n),
        "position_angle": rng.uniform(0, 180, n),
        "gamma1": np.zeros(n),
        "gamma2": np.zeros(n),
        "source_axis_ratio": np.ones(n),
        "source_position_angle": rng.uniform(0, 180, n),
        "source_sersic_index": np.ones(n),
        **{f"source_knot_{name}": np.zeros((n, 1)) for name in ("x", "y", "flux")},
    }
    population = Table({name: np.asarray(table[name], dtype=np.float64) for name in needed})
    for name, values in defaults.items():
        population[name] = np.asarray(table[name]) if name in table.colnames else values
    positive = ("einstein_radius", "source_half_light_radius", "axis_ratio", "source_axis_ratio")
    for name in population.colnames:
        values = population[name]
        if not np.isfinite(values).all() or (name in positive and (values <= 0).any()):
            raise ValueError(f"The column {name} of the catalogue of lenses has values that make no sense.")
    if {"source_x", "source_y"} <= set(table.colnames):
        for name in ("source_x", "source_y"):
            population[name] = np.asarray(table[name], dtype=np.float64)
    else:
        _add_source_positions(population, rng, shrink=2.0 / 3.0)
    return population

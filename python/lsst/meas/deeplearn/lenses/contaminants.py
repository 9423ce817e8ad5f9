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


"""What is mistaken for lensed arcs, painted on real galaxies.

Rings, spiral arms and mergers are too rare, or too hard to choose by
catalogue columns, for a training set.  Here the light that makes a red galaxy
look like one of them is drawn at random and rendered as arcs are, with the
PSF and the noise of the coadd; artefacts are added to the pixels as detector
and optics leave them.

Positions are those of the pixel grid, with the galaxy at the centre of its
stamp.
"""

from __future__ import annotations

__all__ = ("PAINTERS", "Painter", "paint_contaminants")

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from astropy.table import Table
from torch import Tensor

from ..cutouts import Cutouts
from .lens_equation import compute_sersic_brightness, rotate
from .lens_population import compute_flux, sample_lens_population
from .simulation import Brightness, add_light, compute_source_brightness, render_light, to_tensor

type Painter = Callable[[Cutouts, np.ndarray, np.random.Generator], np.ndarray]
"""Function of N galaxies, their total fluxes in nJy, shape ``(N, B)``, and a
generator of random numbers, that returns the light to add in nJy, shape
``(N, B, S, S)``.
"""

DISC_COLORS = {
    "u-g": (1.1, 0.15),
    "g-r": (0.45, 0.15),
    "r-i": (0.22, 0.08),
    "i-z": (0.14, 0.06),
    "z-y": (0.08, 0.05),
}
"""Mean and scatter of the colours of star-forming discs at redshifts below
0.3."""


def paint_contaminants(
    cutouts: Cutouts,
    painter: str,
    flux: np.ndarray,
    *,
    gain: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Cutouts:
    """Make galaxies look like something that is mistaken for a lens.

    Parameters
    ----------
    cutouts
        The galaxies, with their PSF kernels.
    painter
        Name of one of `PAINTERS`.
    flux
        Total fluxes of the galaxies in nJy, shape ``(N, B)``; to these the
        brightness of what is painted is related.
    gain
        Photo-electrons per nJy by band; see `add_light`.
    seed
        Seed.

    Raises
    ------
    ValueError
        Raised for a name that is not one of `PAINTERS`.
    """
    if painter not in PAINTERS:
        raise ValueError(f"There is no painter {painter!r}, but {sorted(PAINTERS)}.")
    if len(cutouts) == 0:
        return cutouts
    rng = np.random.default_rng(seed)
    light = PAINTERS[painter](cutouts, np.clip(np.nan_to_num(flux), 0, None), rng)
    return add_light(cutouts, light, gain=gain, seed=int(rng.integers(2**62)))


def _render(cutouts: Cutouts, brightness: Brightness, flux: np.ndarray) -> np.ndarray:
    """Return light through the PSF of the coadd."""
    return render_light(
        brightness, flux, pixel_scale=cutouts.pixel_scale, size=cutouts.size, psf=cutouts.psf
    )[0]


# Colours.


def _make_fluxes(
    flux_i: np.ndarray, bands: Sequence[str], rng: np.random.Generator, reddening: float = 0.0
) -> np.ndarray:
    """Return fluxes (N, B) of stellar discs from those in i.

    Each colour is redder by ``reddening`` times its mean.
    """
    color = {
        name: mean * (1 + reddening) + rng.normal(0, scatter, len(flux_i))
        for name, (mean, scatter) in DISC_COLORS.items()
    }
    magnitude = {"i": np.zeros(len(flux_i))}
    magnitude["r"] = color["r-i"]
    magnitude["g"] = magnitude["r"] + color["g-r"]
    magnitude["u"] = magnitude["g"] + color["u-g"]
    magnitude["z"] = -color["i-z"]
    magnitude["y"] = magnitude["z"] - color["z-y"]
    return np.stack([flux_i * 10 ** (-0.4 * magnitude[band]) for band in bands], axis=1)


def _get_reference(cutouts: Cutouts, values: np.ndarray) -> np.ndarray:
    """Return the values in i, or in the reddest band there is."""
    return values[:, cutouts.bands.index("i") if "i" in cutouts.bands else -1]


def _measure_angle(cutouts: Cutouts) -> np.ndarray:
    """Return the direction of the major axes of the galaxies in radians."""
    x, y = _make_grid(cutouts)
    weight = np.exp(-0.5 * (x**2 + y**2) / 4.0**2)
    image = _get_reference(cutouts, np.where(cutouts.bad, 0.0, np.nan_to_num(cutouts.image))) * weight
    moments = [(image * product).sum(axis=(1, 2)) for product in (x * x - y * y, 2 * x * y)]
    return np.asarray(0.5 * np.arctan2(moments[1], moments[0]))


# Galaxies.


def _paint_companions(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint one or two sources beside the galaxy, like those of lenses but not
    lensed, as bright as if they were, or up to 3 mag brighter, as galaxies in
    front of them are.
    """
    light = np.zeros(cutouts.image.shape, dtype=np.float32)
    for rows in (np.arange(len(cutouts)), np.flatnonzero(rng.random(len(cutouts)) < 0.4)):
        if (n := len(rows)) == 0:
            continue
        sources = sample_lens_population(n, seed=int(rng.integers(2**62)), bands=cutouts.bands)
        distance = np.asarray(sources["einstein_radius"]) * rng.uniform(0.7, 1.8, n)
        phi = rng.uniform(0, 2 * np.pi, n)
        sources["source_x"], sources["source_y"] = distance * np.cos(phi), distance * np.sin(phi)
        source_flux = np.stack([compute_flux(sources[f"source_mag_{b}"]) for b in cutouts.bands], axis=1)
        light[rows] += _render(
            cutouts[rows],
            functools.partial(_compute_unlensed, sources),
            source_flux * rng.uniform(3, 12, (n, 1)) * 10 ** rng.choice([0.0, 0.4, 0.8, 1.2], (n, 1)),
        )
    return light


def _compute_unlensed(sources: Table, x: Tensor, y: Tensor, part: slice) -> Tensor:
    """Return the light of sources without a lens."""
    return compute_source_brightness(sources[part], x, y)


def _paint_satellites(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint two to five small galaxies around the galaxy, of its colour."""
    light = np.zeros(cutouts.image.shape, dtype=np.float32)
    number = rng.integers(2, 6, len(cutouts))
    for k in range(number.max()):
        rows = np.flatnonzero(number > k)
        share = rng.uniform(0.015, 0.12, (len(rows), 1)) * rng.lognormal(
            0, 0.06, (len(rows), len(cutouts.bands))
        )
        galaxies = _Sersic.draw(len(rows), rng, distance=(0.9, 4.0), radius=(0.15, 0.4), index=(0.8, 2.0))
        light[rows] += _render(cutouts[rows], galaxies, flux[rows] * share)
    return light


def _paint_spiral(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint a disc with arms of young stars, of which the galaxy is the bulge,
    inclined by up to 60 degrees.
    """
    n = len(cutouts)
    scale = np.exp(rng.uniform(np.log(0.4), np.log(1.8), n))  # arcsec
    disc = _Disc(
        scale=scale,
        axis_ratio=rng.uniform(0.5, 1.0, n),
        position_angle=_measure_angle(cutouts),
        phase=rng.uniform(0, 2 * np.pi, n),
        arms=rng.choice([2, 3, 4], n, p=[0.7, 0.15, 0.15]),
        pitch=np.radians(rng.uniform(12, 28, n)) * rng.choice([-1, 1], n),
        sharpness=rng.uniform(2.0, 6.0, n),
        clumps=rng.normal(0, 1, (n, 6)),
    )
    total = _get_reference(cutouts, flux) * np.exp(rng.uniform(np.log(0.15), np.log(2.5), n))
    young = rng.uniform(0.2, 0.7, n)
    light = _render(cutouts, disc.compute_smooth, _make_fluxes(total * (1 - young), cutouts.bands, rng, 0.4))
    return light + _render(cutouts, disc.compute_arms, _make_fluxes(total * young, cutouts.bands, rng, -0.3))


def _paint_ring(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint a ring of young stars around the galaxy, as around Hoag's object:
    concentric, and wider than an Einstein ring.
    """
    n = len(cutouts)
    radius = rng.uniform(1.0, 3.0, n)  # arcsec
    ring = _Ring(
        radius=radius,
        width=radius * rng.uniform(0.12, 0.25, n),
        axis_ratio=rng.uniform(0.6, 1.0, n),
        position_angle=_measure_angle(cutouts),
        clumps=rng.normal(0, 1, (n, 6)),
    )
    total = _get_reference(cutouts, flux) * rng.uniform(0.15, 0.6, n)
    return _render(cutouts, ring, _make_fluxes(total, cutouts.bands, rng, -0.2))


def _paint_merger(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint a second galaxy of similar brightness, and tidal tails."""
    n = len(cutouts)
    direction, distance = rng.uniform(0, 2 * np.pi, n), rng.uniform(1.2, 3.0, n)
    x, y = distance * np.cos(direction), distance * np.sin(direction)
    second = _Sersic.draw(n, rng, distance=(0, 0), radius=(0.4, 0.9), index=(1.0, 2.5))
    second.x, second.y = x, y
    share = rng.uniform(0.35, 1.1, (n, 1))
    # Of the same kind, or rich in gas.
    flux_i = _get_reference(cutouts, flux)
    blue = rng.random((n, 1)) < 0.5
    second_flux = np.where(blue, _make_fluxes(flux_i, cutouts.bands, rng, 0.3), flux) * share
    light = _render(cutouts, second, second_flux)
    sense = rng.choice([-1, 1], n)
    for x_0, y_0, away in ((0 * x, 0 * y, direction + np.pi), (x, y, direction)):
        tail = _Tail(
            x=x_0,
            y=y_0,
            start=away - sense * rng.uniform(0.2, 0.9, n),
            sense=sense,
            radius=rng.uniform(0.6, 1.1, n),
            growth=rng.uniform(0.35, 0.7, n),
            length=rng.uniform(1.5, 2.8, n),
            width=rng.uniform(0.15, 0.3, n),
        )
        tail_flux = _make_fluxes(flux_i * rng.uniform(0.08, 0.3, n), cutouts.bands, rng, 0.4)
        light += _render(cutouts, tail, tail_flux)
    return light


def _paint_edge_on(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint a disc seen from its edge: that of the galaxy, or one beside it,
    which looks like an arc without curvature.
    """
    n = len(cutouts)
    beside = rng.random(n) < 0.4
    phi, distance = rng.uniform(0, 2 * np.pi, n), np.where(beside, rng.uniform(1.2, 3.0, n), 0.0)
    scale = np.where(beside, rng.uniform(0.4, 0.9, n), rng.uniform(0.8, 1.7, n))
    disc = _EdgeOnDisc(
        x=distance * np.cos(phi),
        y=distance * np.sin(phi),
        position_angle=np.where(beside, rng.uniform(0, np.pi, n), _measure_angle(cutouts)),
        scale=scale,
        height=scale * rng.uniform(0.1, 0.2, n),
    )
    share = np.where(beside, rng.uniform(0.05, 0.4, n), rng.uniform(0.4, 1.5, n))
    return _render(
        cutouts, disc, _make_fluxes(_get_reference(cutouts, flux) * share, cutouts.bands, rng, 0.5)
    )


class _Profile:
    """Parameters of N profiles; arrays whose first axis is that of objects."""

    def __init__(self, **parameters: np.ndarray) -> None:
        self.__dict__.update(parameters)

    def get(self, part: slice, like: Tensor) -> dict[str, Tensor]:
        """Return the parameters of some objects, each of shape (N, 1, 1).

        Parameters
        ----------
        part
            Which objects.
        like
            Tensor of the wanted type and device.
        """
        return {
            name: to_tensor(values[part], like) for name, values in self.__dict__.items() if values.ndim == 1
        }


def _normalize(light: Tensor, x: Tensor) -> Tensor:
    """Return light whose integral over the frame is 1."""
    spacing = (x.flatten()[1] - x.flatten()[0]) ** 2
    return light / (light.sum(dim=(1, 2), keepdim=True) * spacing).clamp(min=1e-20)


def _modulate(clumps: np.ndarray, phi: Tensor, log_radius: Tensor | float, like: Tensor) -> Tensor:
    """Return a factor around 1 that makes light clumpy: a few waves in angle
    and radius with random phases and weights.
    """
    wave = torch.zeros_like(phi)
    for k in range(clumps.shape[1]):
        weight = to_tensor(clumps[:, k], like)
        wave = wave + weight * torch.cos((k + 2) * phi + (k % 3) * 3.0 * log_radius + 9.0 * weight)
    return torch.exp(0.25 * wave)


class _Sersic(_Profile):
    """Sersic profiles at positions."""

    x: np.ndarray
    y: np.ndarray

    @classmethod
    def draw(
        cls,
        n: int,
        rng: np.random.Generator,
        *,
        distance: tuple[float, float],
        radius: tuple[float, float],
        index: tuple[float, float],
    ) -> _Sersic:
        """Draw galaxies at random, uniformly within ranges.

        Parameters
        ----------
        n
            Number of galaxies.
        rng
            Generator of random numbers.
        distance, radius
            Distance from the centre and half-light radius in arcsec.
        index
            Sersic index.
        """
        phi, r = rng.uniform(0, 2 * np.pi, n), rng.uniform(*distance, n)
        return cls(
            x=r * np.cos(phi),
            y=r * np.sin(phi),
            half_light_radius=rng.uniform(*radius, n),
            axis_ratio=rng.uniform(0.5, 1.0, n),
            position_angle=rng.uniform(0, np.pi, n),
            sersic_index=rng.uniform(*index, n),
        )

    def __call__(self, x: Tensor, y: Tensor, part: slice) -> Tensor:
        p = self.get(part, x)
        return compute_sersic_brightness(x - p.pop("x"), y - p.pop("y"), **p)


class _Disc(_Profile):
    """Exponential discs with logarithmic spiral arms."""

    clumps: np.ndarray

    def _make_polar(self, x: Tensor, y: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return radius in scale lengths and azimuth in the disc's plane."""
        u, v = rotate(x, y, p["position_angle"])
        v = v / p["axis_ratio"]
        return torch.hypot(u, v) / p["scale"], torch.atan2(v, u)

    def compute_smooth(self, x: Tensor, y: Tensor, part: slice) -> Tensor:
        """Return the light of the disc.

        Parameters
        ----------
        x, y
            Positions in arcsec, shape ``(N, y, x)``.
        part
            Which objects.
        """
        radius, _ = self._make_polar(x, y, self.get(part, x))
        return _normalize(torch.exp(-radius), x)

    def compute_arms(self, x: Tensor, y: Tensor, part: slice) -> Tensor:
        """Return the light of the arms.

        Parameters
        ----------
        x, y
            Positions in arcsec, shape ``(N, y, x)``.
        part
            Which objects.
        """
        p = self.get(part, x)
        radius, phi = self._make_polar(x, y, p)
        log_radius = torch.log(radius.clamp(min=0.05))
        along = p["arms"] * (phi - log_radius / torch.tan(p["pitch"])) + p["phase"]
        arm = torch.exp(p["sharpness"] * (torch.cos(along) - 1))
        # Arms begin at the end of the bulge, and fade as the disc does.
        inner = radius**3 / (radius**3 + 0.7)
        clumps = _modulate(self.clumps[part], phi, log_radius, x)
        return _normalize(torch.exp(-0.8 * radius) * inner * arm * clumps, x)


class _Ring(_Profile):
    """Rings with a Gaussian cross section."""

    clumps: np.ndarray

    def __call__(self, x: Tensor, y: Tensor, part: slice) -> Tensor:
        p = self.get(part, x)
        u, v = rotate(x, y, p["position_angle"])
        v = v / p["axis_ratio"]
        radius = torch.hypot(u, v)
        ring = torch.exp(-0.5 * ((radius - p["radius"]) / p["width"]) ** 2)
        return _normalize(ring * _modulate(self.clumps[part], torch.atan2(v, u), 0.0, x), x)


class _Tail(_Profile):
    """Tidal tails: pieces of logarithmic spirals that fade and widen."""

    def __call__(self, x: Tensor, y: Tensor, part: slice) -> Tensor:
        p = self.get(part, x)
        u, v = x - p["x"], y - p["y"]
        radius = torch.hypot(u, v)
        # Angle along the tail, from a little before its start.
        margin = 0.5
        phi = torch.remainder(p["sense"] * (torch.atan2(v, u) - p["start"]) + margin, 2 * math.pi) - margin
        track = p["radius"] * torch.exp(p["growth"] * phi)
        width = p["width"] * (1 + 0.5 * phi.clamp(min=0))
        light = torch.exp(-0.5 * ((radius - track) / width) ** 2) * torch.exp(-phi.clamp(min=0))
        ends = torch.sigmoid((phi + 0.15) / 0.08) * torch.sigmoid((p["length"] - phi) / 0.25)
        return _normalize(light * ends, x)


class _EdgeOnDisc(_Profile):
    """Exponential discs seen edge-on, of isothermal height."""

    def __call__(self, x: Tensor, y: Tensor, part: slice) -> Tensor:
        p = self.get(part, x)
        u, v = rotate(x - p["x"], y - p["y"], p["position_angle"])
        height = 1 / torch.cosh((v / p["height"]).clamp(-30, 30)) ** 2
        return _normalize(torch.exp(-u.abs() / p["scale"]) * height, x)


# Artefacts.


def _make_noise_unit(cutouts: Cutouts) -> np.ndarray:
    """Return the noise of a pixel, (N, B), 0 in bands without data."""
    with np.errstate(invalid="ignore"):
        variance = np.where(cutouts.variance > 0, cutouts.variance, np.nan)
    middle = np.nanmedian(np.where(np.isfinite(variance), variance, 0.0), axis=(2, 3))
    return np.sqrt(middle)


def _make_grid(cutouts: Cutouts) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y in pixels from the centre, (1, 1, S) and (1, S, 1)."""
    axis = np.arange(cutouts.size) - cutouts.size // 2
    return axis[None, None, :], axis[None, :, None]


def _put_in_one_band(cutouts: Cutouts, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return images (N, y, x), in units of the noise, in a random band."""
    n, n_bands = cutouts.image.shape[:2]
    chosen = rng.integers(n_bands, size=n)
    light = np.zeros(cutouts.image.shape, dtype=np.float32)
    light[np.arange(n), chosen] = images * _make_noise_unit(cutouts)[np.arange(n), chosen, None, None]
    return light


def _paint_trail(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint the straight trail of a satellite in one band, wide as the PSF."""
    x, y = _make_grid(cutouts)
    n = len(cutouts)
    angle, offset, width, peak = (
        rng.uniform(low, high, (n, 1, 1))
        for low, high in ((0, np.pi), (-0.3 * cutouts.size, 0.3 * cutouts.size), (1.4, 2.5), (3, 20))
    )
    across = x * np.cos(angle) + y * np.sin(angle) - offset
    return _put_in_one_band(cutouts, peak * np.exp(-0.5 * (across / width) ** 2), rng)


def _paint_cosmic_ray(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint one to four tracks of charged particles in one band, sharper than
    the PSF.
    """
    x, y = _make_grid(cutouts)
    n = len(cutouts)
    images = np.zeros((n, cutouts.size, cutouts.size))
    number = rng.integers(1, 5, n)
    for k in range(4):
        angle, length = rng.uniform(0, np.pi, (n, 1, 1)), rng.gamma(2.0, 2.0, (n, 1, 1))
        x_0, y_0 = rng.uniform(-12, 12, (2, n, 1, 1))
        along = (x - x_0) * np.cos(angle) + (y - y_0) * np.sin(angle)
        across = (y - y_0) * np.cos(angle) - (x - x_0) * np.sin(angle)
        beyond = np.clip(np.abs(along) - length / 2, 0, None)
        peak = rng.uniform(5, 60, (n, 1, 1)) * (number > k)[:, None, None]
        images += peak * np.exp(-0.5 * (across**2 + beyond**2) / 0.45**2)
    return _put_in_one_band(cutouts, images, rng)


def _paint_bleed(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint columns with too much or too little charge in one band, from an
    edge of the stamp to somewhere on it.
    """
    x, y = _make_grid(cutouts)
    n, half = len(cutouts), cutouts.size // 2
    column = rng.integers(-half // 2, half // 2 + 1, (n, 1, 1))
    width = rng.integers(1, 4, (n, 1, 1))
    end, upwards = rng.integers(-half // 2, half + 1, (n, 1, 1)), rng.random((n, 1, 1)) < 0.5
    peak = rng.choice([1.0, -1.0], (n, 1, 1), p=[0.7, 0.3]) * rng.uniform(4, 40, (n, 1, 1))
    inside = (x >= column) & (x < column + width) & (np.where(upwards, y, -y) <= end)
    return _put_in_one_band(cutouts, peak * inside, rng)


def _paint_spikes(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint the diffraction spikes and the halo of a bright star just off the
    stamp, in all bands.
    """
    x, y = _make_grid(cutouts)
    n, half = len(cutouts), cutouts.size // 2
    # One of the four spikes of the star comes near the galaxy.
    orientation = rng.uniform(0, np.pi / 2, (n, 1, 1))
    towards = orientation + rng.integers(4, size=(n, 1, 1)) * np.pi / 2
    distance = half * rng.uniform(1.1, 1.8, (n, 1, 1))
    miss = rng.uniform(-8, 8, (n, 1, 1))
    u = x + distance * np.cos(towards) - miss * np.sin(towards)
    v = y + distance * np.sin(towards) + miss * np.cos(towards)
    spikes = np.zeros(np.broadcast_shapes(u.shape, v.shape))
    for k in range(2):
        angle = orientation + k * np.pi / 2
        along = np.abs(u * np.cos(angle) + v * np.sin(angle))
        across = v * np.cos(angle) - u * np.sin(angle)
        spikes += (np.maximum(along, 3) / half) ** -2 * np.exp(-0.5 * (across / (1.2 + 0.02 * along)) ** 2)
    halo = (np.maximum(np.hypot(u, v), 3) / half) ** -3
    image = spikes * rng.uniform(5, 40, (n, 1, 1)) + halo * rng.uniform(1, 5, (n, 1, 1))
    # A star of G to M colour, in units of the noise in i.
    bands = cutouts.bands
    star = _make_fluxes(np.ones(n), bands, rng, rng.uniform(-0.2, 1.5))
    reference = _get_reference(cutouts, _make_noise_unit(cutouts))
    return (image[:, None] * (star * reference[:, None])[..., None, None]).astype(np.float32)


def _paint_ghost(cutouts: Cutouts, flux: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint the out-of-focus ring of a star that optics reflect, in one band,
    of which a piece crosses the stamp.
    """
    x, y = _make_grid(cutouts)
    n, half = len(cutouts), cutouts.size // 2
    radius = rng.uniform(0.8, 4.0, (n, 1, 1)) * half
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    distance = radius + rng.uniform(-0.6, 0.6, (n, 1, 1)) * half
    r = np.hypot(x - distance * np.cos(angle), y - distance * np.sin(angle))
    soft = rng.uniform(0.8, 2.0, (n, 1, 1))
    disc = 1 / (1 + np.exp(np.clip((r - radius) / soft, -50, 50)))
    hole = 1 / (1 + np.exp(np.clip((r - radius * rng.uniform(0.4, 0.65, (n, 1, 1))) / soft, -50, 50)))
    return _put_in_one_band(cutouts, rng.uniform(0.7, 4, (n, 1, 1)) * (disc - hole), rng)


PAINTERS: Mapping[str, Painter] = {
    "companion": _paint_companions,
    "satellite": _paint_satellites,
    "spiral": _paint_spiral,
    "ring": _paint_ring,
    "merger": _paint_merger,
    "edge_on": _paint_edge_on,
    "trail": _paint_trail,
    "cosmic_ray": _paint_cosmic_ray,
    "bleed": _paint_bleed,
    "spike": _paint_spikes,
    "ghost": _paint_ghost,
}
"""What paints each kind."""

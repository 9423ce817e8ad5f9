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


"""A made-up set in the layout of the Bologna lens finding challenge.

As Metcalf et al. (2019, A&A 625, A119) describe the ground-based one: stamps
of 101 x 101 pixels of 0.2 arcsec in u, g, r and i, with the PSF and the noise
of KiDS, half of them lenses, masked areas set to 100.  It differs in what is
on the sky: lenses are isothermal ellipsoids with shear and sources are those
of `.lens_population`, where theirs are halos of the Millennium simulation and
shapelets of galaxies of the Hubble Ultra Deep Field; all galaxies are drawn,
where 15 per cent of theirs are galaxies of KiDS; the noise has no correlation
and no weight maps.  A lens has an Einstein radius of 1.5 times the seeing in r
and arcs of a signal to noise of `MIN_ARC_SNR`.  Figures of merit of the two
sets are not the same thing.
"""

from __future__ import annotations

__all__ = ("KIDS", "KidsBand", "simulate_challenge", "write_challenge")

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import galsim
import numpy as np
from astropy.io import fits
from astropy.table import Table

from ..cutouts import Cutouts
from ..scene import (
    AB_ZERO_POINT,
    PIXEL_SCALE,
    Galaxies,
    draw_galaxies,
    draw_psf_kernel,
    make_psf,
    sample_early_types,
    sample_galaxies,
    sample_late_types,
)
from .challenge import BRANCHES, MASKED
from .lens_population import sample_lens_population

SIZE = 101
"""Side of the stamps in pixels."""

PSF_SIZE = 35
"""Side of the PSF kernels in pixels."""

MIN_ARC_SNR = 20.0
"""Smallest signal to noise of arcs in the best band, as LensPop has it."""

NEIGHBOR_MAGNITUDE = 24.5
"""Galaxies beside the lens are drawn if they are brighter than this in i;
fainter ones are below the noise of KiDS."""

MASKED_SHARE = 0.1
"""Share of the stamps with a masked area."""


@dataclasses.dataclass(frozen=True)
class KidsBand:
    """What a coadd of the Kilo-Degree Survey is like in one band."""

    depth: float
    """AB magnitude of 5 sigma in an aperture of 2 arcsec."""

    psf_fwhm: float
    """Width of the PSF in arcsec."""

    @property
    def sky_noise(self) -> float:
        """Noise of a pixel in nJy."""
        n_pixels = np.pi / PIXEL_SCALE**2
        return float(10 ** (-0.4 * (self.depth - AB_ZERO_POINT)) / 5 / np.sqrt(n_pixels))


KIDS: Mapping[str, KidsBand] = {
    "u": KidsBand(24.2, 1.00),
    "g": KidsBand(25.1, 0.86),
    "r": KidsBand(24.9, 0.68),
    "i": KidsBand(23.6, 0.81),
}
"""Medians of the third data release (de Jong et al. 2017, A&A 604, A134)."""


def simulate_challenge(n: int, *, seed: int, first_id: int = 100000) -> tuple[Cutouts, Table]:
    """Make objects of the challenge.

    Parameters
    ----------
    n
        Number of objects, half of which are lenses.
    seed
        Seed.
    first_id
        ID of the first object.

    Returns
    -------
    cutouts
        Stamps in nJy; masked pixels are bad.
    catalog
        ``ID``, ``is_lens``, ``Einstein_area`` in square arcsec,
        ``numb_pix_lensed_image`` (pixels of the arcs above the noise, best
        band) and ``flux_lensed_image_in_sigma`` (their flux over the noise of
        a pixel), as the training key has them.
    """
    from .simulation import compute_arc_snr, paint_lenses

    rng = np.random.default_rng(seed)
    bands = tuple(KIDS)
    # Arcs first, so that those with and without them are the same galaxies:
    # of enough candidates that half or more are bright enough.
    candidates, psfs = _draw_lenses(3 * n + 20, rng), _draw_psfs(3 * n + 20, rng)
    noise = np.array([KIDS[band].sky_noise for band in bands], dtype=np.float32)
    # Depth differs from field to field.
    noise = noise * rng.uniform(0.85, 1.2, (len(candidates), 1)).astype(np.float32)
    empty = _make_empty(psfs, noise, first_id)
    arcs = paint_lenses(empty, candidates)[0].image
    bright = compute_arc_snr(arcs, empty.variance, empty.bad).max(axis=1) >= MIN_ARC_SNR
    chosen = np.flatnonzero(bright)[:n]
    if len(chosen) < n:
        raise RuntimeError(f"Only {len(chosen)} of {len(candidates)} lenses have arcs that can be seen.")
    is_lens = rng.permutation(n) < n // 2
    arcs = np.where(is_lens[:, None, None, None], arcs[chosen], 0.0)
    sigma = arcs / noise[chosen, :, None, None]
    image = arcs + rng.standard_normal(arcs.shape) * noise[chosen, :, None, None]
    for k, row in enumerate(chosen):
        galaxies = _draw_galaxies(candidates[int(row)], rng)
        for b, band in enumerate(bands):
            stamp = np.zeros((SIZE, SIZE), dtype=np.float32)
            draw_galaxies(stamp, galaxies, band, functools.partial(_get, psfs[row][b]))
            image[k, b] += stamp
    catalog = Table(
        {
            "ID": first_id + np.arange(n),
            "is_lens": is_lens.astype(int),
            "Einstein_area": np.where(is_lens, np.pi * candidates["einstein_radius"][chosen] ** 2, 0.0),
            "numb_pix_lensed_image": (sigma > 1).sum(axis=(2, 3)).max(axis=1),
            "flux_lensed_image_in_sigma": np.where(sigma > 1, sigma, 0).sum(axis=(2, 3)).max(axis=1),
        }
    )
    bad = np.broadcast_to(_draw_masks(n, rng), image.shape).copy()
    objects = dataclasses.replace(empty[chosen], ids=np.asarray(catalog["ID"]))
    return dataclasses.replace(objects, image=image.astype(np.float32), bad=bad), catalog


def _draw_psfs(n: int, rng: np.random.Generator) -> list[list[galsim.GSObject]]:
    """Return the PSF of each object in each band."""
    return [
        [
            make_psf(band.psf_fwhm * rng.uniform(0.9, 1.15), *rng.normal(0, 0.02, 2).tolist())
            for band in KIDS.values()
        ]
        for _ in range(n)
    ]


def _get(psf: galsim.GSObject, x: float, y: float) -> galsim.GSObject:
    """Return the same PSF everywhere."""
    return psf


def _make_empty(psfs: list[list[galsim.GSObject]], noise: np.ndarray, first_id: int) -> Cutouts:
    """Return stamps of nothing."""
    n, bands = len(psfs), tuple(KIDS)
    image = np.zeros((n, len(bands), SIZE, SIZE), dtype=np.float32)
    center, none = np.full(n, (SIZE - 1) / 2), np.zeros((n, len(bands)), dtype=bool)
    return Cutouts(
        bands=bands,
        pixel_scale=PIXEL_SCALE,
        ids=first_id + np.arange(n),
        ra=np.zeros(n),
        dec=np.zeros(n),
        x=center,
        y=center,
        image=image,
        variance=np.broadcast_to(noise[..., None, None] ** 2, image.shape).copy(),
        bad=np.zeros(image.shape, dtype=bool),
        psf=np.array([[draw_psf_kernel(psf, PSF_SIZE) for psf in row] for row in psfs], dtype=np.float32),
        off_edge=none[:, 0],
        missing_band=none,
        missing_cell=none,
    )


def _draw_lenses(n: int, rng: np.random.Generator) -> Table:
    """Return lenses whose sources are bright enough for a shallow survey."""
    lenses = sample_lens_population(
        15 * n + 200,
        seed=int(rng.integers(2**62)),
        bands=("g", "r", "i"),
        min_einstein_radius=1.5 * KIDS["r"].psf_fwhm,
    )
    # Arcs must stand out of the noise, and bright sources are rare.
    brightest = np.argsort(np.asarray(lenses["source_mag_i"]))[: 4 * n]
    lenses = lenses[rng.permutation(brightest)[:n]]
    nowhere = np.zeros(n)
    sources = sample_late_types(
        rng,
        nowhere,
        nowhere,
        np.asarray(lenses["source_redshift"]),
        np.asarray(lenses["source_mag_i"]),
    )
    # The prior has no u band: u - g of a late type of that redshift.
    flux = {band: sources.compute_fluxes(band).sum(axis=1) for band in "ug"}
    lenses["source_mag_u"] = lenses["source_mag_g"] - 2.5 * np.log10(flux["u"] / flux["g"])
    return lenses


def _draw_galaxies(lens: Table.Row, rng: np.random.Generator) -> Galaxies:
    """Return the lens galaxy and those beside it."""
    center = np.array([(SIZE - 1) / 2])
    galaxy = sample_early_types(
        rng, center, center, np.array([lens["lens_redshift"]]), np.array([lens["lens_mag_i"]])
    )
    galaxy.position_angle[:] = np.radians(lens["position_angle"] + rng.normal(0, 10))
    field = sample_galaxies(rng, (SIZE, SIZE))
    field = field[field.magnitude < NEIGHBOR_MAGNITUDE]
    return Galaxies.concatenate([galaxy, field])


def _draw_masks(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return masked areas, shape ``(N, 1, y, x)``: discs of bright stars."""
    pixels = np.arange(SIZE)
    x, y = rng.uniform(0, SIZE, (2, n))
    radius = np.where(rng.random(n) < MASKED_SHARE, rng.uniform(5, 25, n), 0.0)
    r2 = (pixels - x[:, None])[:, None, :] ** 2 + (pixels - y[:, None])[:, :, None] ** 2
    return np.asarray((r2 < radius[:, None, None] ** 2)[:, None])


def write_challenge(root: Path | str, cutouts: Cutouts) -> None:
    """Write stamps as the challenge has them.

    Parameters
    ----------
    root
        Folder; files of the same objects are replaced.
    cutouts
        From `simulate_challenge`.
    """
    image = np.where(cutouts.bad, MASKED, cutouts.image / 3631e9).astype(np.float32)
    for b, band in enumerate(cutouts.bands):
        path = Path(root) / "Public" / BRANCHES["ground"].files[band]
        path.parent.mkdir(parents=True, exist_ok=True)
        for number, stamp in zip(cutouts.ids.tolist(), image[:, b], strict=True):
            fits.writeto(path.with_name(f"{path.name}{number}.fits"), stamp, overwrite=True)

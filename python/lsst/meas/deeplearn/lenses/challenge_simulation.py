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
and arcs of a signal to noise of `MIN_ARC_SNR`; the galaxy of a non-lens has
the redshift and the magnitude of that of a lens.  Figures of merit of the two
sets are not the same thing.
"""

from __future__ import annotations

__all__ = ("KIDS", "simulate_challenge", "write_challenge")

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table, vstack

from ..cutouts import Cutouts
from ..scene import (
    AB_ZERO_POINT,
    PIXEL_SCALE,
    SURVEY,
    BandSettings,
    Galaxies,
    sample_early_types,
    sample_galaxies,
    sample_late_types,
)
from ..scene_drawing import (
    compute_transfer,
    draw_galaxies_in_bands,
    draw_psf_kernel,
    make_psf,
)
from .challenge import BRANCHES, MASKED
from .lens_population import sample_lens_population

SIZE = 101
"""Side of the stamps in pixels."""

PSF_SIZE = 35
"""Side of the PSF kernels in pixels."""

FOURIER_SIZE = 144
"""Side in pixels of the images on which galaxies are drawn: light of a galaxy
at the edge comes back at the other one if it is further than 8.6 arcsec from
its centre."""

MIN_ARC_SNR = 20.0
"""Smallest signal to noise of arcs in the best band, as LensPop has it."""

NEIGHBOR_MAGNITUDE = 24.5
"""Galaxies beside the lens are drawn if they are brighter than this in i;
fainter ones are below the noise of KiDS."""

MASKED_SHARE = 0.1
"""Share of the stamps with a masked area."""

OBJECTS_PER_FIELD = 25
"""Number of objects that share PSF and depth."""

ARC_MARGIN = 1.5
"""Arcs are painted to twice the Einstein radius and this many arcsec along
each axis; of a hundred, one reaches further with a tenth of the noise."""


def _make_kids_band(band: str, depth: float, psf_fwhm: float) -> BandSettings:
    """Return what coadds are like whose depth is that of 5 sigma in an
    aperture of 2 arcsec.
    """
    settings = dataclasses.replace(SURVEY[band], psf_fwhm=psf_fwhm, depth=depth)
    aperture_noise = 10 ** (-0.4 * (depth - AB_ZERO_POINT)) / 5
    noise = aperture_noise * PIXEL_SCALE / math.sqrt(math.pi)
    return dataclasses.replace(settings, depth=depth + 2.5 * math.log10(settings.sky_noise / noise))


KIDS: Mapping[str, BandSettings] = {
    "u": _make_kids_band("u", 24.2, 1.00),
    "g": _make_kids_band("g", 25.1, 0.86),
    "r": _make_kids_band("r", 24.9, 0.68),
    "i": _make_kids_band("i", 23.6, 0.81),
}
"""Medians of the third data release (de Jong et al. 2017, A&A 604, A134)."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Field:
    """A part of the survey."""

    kernels: np.ndarray
    """Images of the PSFs, float32, shape ``(B, K, K)``."""

    transfer: np.ndarray
    """Their Fourier transforms; see `.scene_drawing.compute_transfer`."""

    noise: np.ndarray
    """Noise of a pixel in nJy, float32, shape ``(B,)``."""

    @classmethod
    def sample(cls, rng: np.random.Generator) -> _Field:
        """Draw a field; seeing and depth differ from field to field.

        Parameters
        ----------
        rng
            Random numbers.
        """
        psfs = [
            make_psf(band.psf_fwhm * rng.uniform(0.9, 1.15), *rng.normal(0, 0.02, 2).tolist())
            for band in KIDS.values()
        ]
        return cls(
            kernels=np.array([draw_psf_kernel(psf, PSF_SIZE) for psf in psfs], dtype=np.float32),
            transfer=np.array([compute_transfer(psf, FOURIER_SIZE) for psf in psfs]),
            noise=np.float32(rng.uniform(0.85, 1.2))
            * np.array([band.sky_noise for band in KIDS.values()], dtype=np.float32),
        )


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
    rng = np.random.default_rng(seed)
    fields = [_Field.sample(rng) for _ in range(math.ceil(n / OBJECTS_PER_FIELD))]
    is_lens = rng.permutation(n) < n // 2
    lenses, arcs = _draw_lenses(n - n // 2, fields, rng)
    # Each of these gives its arcs to a lens, and its galaxy to a non-lens too.
    chosen = np.where(is_lens, np.cumsum(is_lens), np.cumsum(~is_lens)) - 1
    lenses = lenses[chosen]
    arcs = np.where(is_lens[:, None, None, None], arcs[chosen], np.float32(0))
    noise = np.array([fields[number].noise for number in lenses["field"]])[..., None, None]
    sigma = arcs / noise
    image = arcs + noise * rng.standard_normal(arcs.shape, dtype=np.float32)
    galaxies, stamp = _draw_galaxies(lenses, rng)
    fluxes = np.stack([galaxies.compute_fluxes(band) for band in KIDS], axis=1)
    for k, number in enumerate(lenses["field"]):
        here = np.flatnonzero(stamp == k)
        image[k] += draw_galaxies_in_bands(galaxies[here], fluxes[here], fields[number].transfer, SIZE)
    catalog = Table(
        {
            "ID": first_id + np.arange(n),
            "is_lens": is_lens.astype(int),
            "Einstein_area": np.where(is_lens, np.pi * lenses["einstein_radius"] ** 2, 0.0),
            "numb_pix_lensed_image": (sigma > 1).sum(axis=(2, 3)).max(axis=1),
            "flux_lensed_image_in_sigma": np.where(sigma > 1, sigma, 0).sum(axis=(2, 3)).max(axis=1),
        }
    )
    center, none = np.full(n, (SIZE - 1) / 2), np.zeros((n, len(KIDS)), dtype=bool)
    cutouts = Cutouts(
        bands=tuple(KIDS),
        pixel_scale=PIXEL_SCALE,
        ids=np.asarray(catalog["ID"]),
        ra=np.zeros(n),
        dec=np.zeros(n),
        x=center,
        y=center,
        image=image,
        variance=np.broadcast_to(noise**2, image.shape).copy(),
        bad=np.broadcast_to(_draw_masks(n, rng), image.shape).copy(),
        psf=np.array([fields[number].kernels for number in lenses["field"]]),
        off_edge=none[:, 0],
        missing_band=none,
        missing_cell=none,
    )
    return cutouts, catalog


def _draw_lenses(n: int, fields: Sequence[_Field], rng: np.random.Generator) -> tuple[Table, np.ndarray]:
    """Return lenses whose arcs can be seen, with the number of their field,
    and their arcs, shape ``(N, B, y, x)``.
    """
    tables: list[Table] = []
    images: list[np.ndarray] = []
    while (missing := n - sum(map(len, tables))) > 0:
        lenses = _draw_candidates(2 * missing + 10, rng)
        lenses["field"] = rng.integers(len(fields), size=len(lenses))
        arcs, snr = _paint_arcs(lenses, fields)
        bright = np.flatnonzero(snr >= MIN_ARC_SNR)[:missing]
        tables.append(lenses[bright])
        images.append(arcs[bright])
    return vstack(tables), np.concatenate(images)


def _draw_candidates(n: int, rng: np.random.Generator) -> Table:
    """Return lenses whose sources are bright enough for a shallow survey."""
    lenses = sample_lens_population(
        math.ceil(3.75 * n) + 50,
        seed=int(rng.integers(2**62)),
        bands=("g", "r", "i"),
        min_einstein_radius=1.5 * KIDS["r"].psf_fwhm,
    )
    # Arcs must stand out of the noise, and bright sources are rare.
    brightest = np.argsort(np.asarray(lenses["source_mag_i"]))[:n]
    lenses = lenses[rng.permutation(brightest)]
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


def _paint_arcs(lenses: Table, fields: Sequence[_Field]) -> tuple[np.ndarray, np.ndarray]:
    """Return the arcs of lenses, and their signal to noise in the best
    band.
    """
    from .simulation import compute_arc_snr, render_arcs

    arcs = np.zeros((len(lenses), len(KIDS), SIZE, SIZE), dtype=np.float32)
    snr = np.zeros(len(lenses))
    radius = np.asarray(lenses["einstein_radius"])
    # Small lenses need small images; few at a time stay in the cache.
    for part in np.array_split(np.argsort(radius), math.ceil(len(lenses) / 8)):
        half = min(math.ceil((2 * radius[part].max() + ARC_MARGIN) / PIXEL_SCALE), SIZE // 2)
        inner = slice(SIZE // 2 - half, SIZE // 2 + half + 1)
        places = [fields[number] for number in lenses["field"][part]]
        stamps = render_arcs(
            lenses[part],
            bands=tuple(KIDS),
            pixel_scale=PIXEL_SCALE,
            size=2 * half + 1,
            psf=np.array([place.kernels for place in places]),
        )
        variance = np.array([place.noise for place in places])[..., None, None] ** 2
        arcs[part, :, inner, inner] = stamps
        snr[part] = compute_arc_snr(stamps, np.broadcast_to(variance, stamps.shape)).max(axis=1)
    return arcs, snr


def _draw_galaxies(lenses: Table, rng: np.random.Generator) -> tuple[Galaxies, np.ndarray]:
    """Return the lens galaxies and those beside them, and the number of the
    stamp that each is on.
    """
    n = len(lenses)
    center = np.full(n, (SIZE - 1) / 2)
    redshift, magnitude = np.asarray(lenses["lens_redshift"]), np.asarray(lenses["lens_mag_i"])
    hosts = sample_early_types(rng, center, center, redshift, magnitude)
    hosts.position_angle[:] = np.radians(lenses["position_angle"] + rng.normal(0, 10, n))
    # The stamps side by side.
    others = sample_galaxies(rng, (SIZE, n * SIZE))
    others = others[others.magnitude < NEIGHBOR_MAGNITUDE]
    stamp = np.floor((others.x + 0.5) / SIZE).astype(np.int64)
    others.x -= stamp * SIZE
    return Galaxies.concatenate([hosts, others]), np.concatenate([np.arange(n), stamp])


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
    image = np.where(cutouts.bad, MASKED, cutouts.image / np.float32(3631e9)).astype(">f4")
    # All files have the same header, and writing it takes longest.
    header = fits.PrimaryHDU(image[0, 0]).header.tostring().encode()
    padding = bytes(-image[0, 0].nbytes % 2880)
    for b, band in enumerate(cutouts.bands):
        path = Path(root) / "Public" / BRANCHES["ground"].files[band]
        path.parent.mkdir(parents=True, exist_ok=True)
        for number, stamp in zip(cutouts.ids.tolist(), image[:, b], strict=True):
            path.with_name(f"{path.name}{number}.fits").write_bytes(header + stamp.tobytes() + padding)

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

"""Real and generated galaxies, observed alike and compared.

What differs between two samples must be the galaxies, not how they were
drawn: the naive comparison of stamps with profiles doubles the distances.
So all galaxies but the real ones go through `observe`, with the PSFs, the
noise and the stamps of the real ones.
"""

from __future__ import annotations

__all__ = (
    "FEATURES",
    "Sample",
    "compare_samples",
    "compute_conditioning",
    "compute_isotropy",
    "compute_nearest",
    "make_cosmos_samples",
    "make_synthetic_samples",
    "observe",
)

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import galsim
import numpy as np
from astropy.table import Table
from scipy.spatial import KDTree

from .conditions import CONDITION_NAMES
from .cosmos import GalaxySet, read_cosmos_set
from .fourier import compute_transform, draw_noise, draw_transform, invert_transform
from .morphology import STATISTICS, compute_c2st, compute_distance, measure_morphology
from .parametric import Components, GalaxyParameters, make_knotty_galaxy, make_smooth_galaxy
from .synthetic import compute_component_transform, draw_to_magnitude, make_synthetic_set

if TYPE_CHECKING:
    from .cvae_sampling import CvaeSampler

FEATURES = tuple(name for name in STATISTICS if name not in ("e1", "e2"))
"""Statistics that a classifier may use: those that no turn changes."""

MAX_DRAWS = 25
"""Number of generated galaxies for each real one that classifiers see."""

KNOT_FRACTION, N_KNOTS = 0.25, 30
"""Knots of the second baseline, which has not been tuned."""


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Galaxies of one kind, observed with PSF and noise."""

    image: np.ndarray
    """Images for a flux of 1, shape ``(N, S, S)``."""

    galaxy: np.ndarray
    """Row of the real galaxy whose conditions, PSF and noise each has, shape
    ``(N,)``."""

    noise: np.ndarray
    """Standard deviation of the noise in a pixel, shape ``(N,)``."""

    def measure(self, pixel_scale: float) -> Table:
        """Return `measure_morphology` of the images, with ``galaxy``.

        Parameters
        ----------
        pixel_scale
            Side of a pixel in arcsec.
        """
        table = measure_morphology(self.image, noise=self.noise, pixel_scale=pixel_scale)
        table["galaxy"] = self.galaxy
        return table


def observe(transform: np.ndarray, galaxies: GalaxySet, rows: np.ndarray, rng: np.random.Generator) -> Sample:
    """Observe galaxies in place of others.

    Parameters
    ----------
    transform
        Transforms of the galaxies before the PSF, for a flux of 1, shape
        ``(N, S, S / 2 + 1)``.
    galaxies
        Those whose PSF, noise and stamp they get.
    rows
        Which of them, shape ``(N,)``.
    rng
        Source of the noise.
    """
    image = np.empty((len(rows), galaxies.size, galaxies.size), dtype=np.float32)
    psf = compute_transform(galaxies.psf)
    noise = np.sqrt(galaxies.noise_variance)
    for i, row in enumerate(rows):
        clean = invert_transform(transform[i] * psf[galaxies.psf_index[row]])
        if galaxies.extent is not None:
            clean = clean * _make_window(galaxies.extent[row], galaxies.size)
        image[i] = clean + noise[row] * draw_noise(galaxies.noise_power, rng)
    return Sample(image, np.asarray(rows), noise[rows] * np.sqrt(galaxies.noise_power.mean()))


def _make_window(extent: np.ndarray, size: int) -> np.ndarray:
    """Return the part of each pixel of a grid that is inside a stamp."""
    edges = np.arange(size + 1) - 0.5
    low, high = extent[:2], extent[2:]
    covered = [
        np.clip(np.minimum(edges[1:], b) - np.maximum(edges[:-1], a), 0, 1)
        for a, b in zip(low, high, strict=True)
    ]
    return np.outer(*covered)


def _generate(
    sampler: CvaeSampler, galaxies: GalaxySet, rows: np.ndarray, seed: int, rng: np.random.Generator
) -> Sample:
    seeds = np.random.SeedSequence([seed, 3]).generate_state(len(rows))
    parts = []
    for start in range(0, len(rows), 256):
        part = slice(start, start + 256)
        transform = sampler.draw_transforms(galaxies.conditions[rows[part]], seeds[part])
        parts.append(observe(transform, galaxies, rows[part], rng))
    return Sample(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Sample)))


def make_synthetic_samples(
    sampler: CvaeSampler, n: int, *, seed: int, size: int, pixel_scale: float, max_magnitude: float
) -> tuple[GalaxySet, dict[str, Sample]]:
    """Draw galaxies of known truth, and what is to be like them.

    Parameters
    ----------
    sampler
        The model.
    n
        Number of galaxies; each has one generated and two parametric twins.
    seed
        Seed, which must not be that of the training set.
    size, pixel_scale, max_magnitude
        As for `make_synthetic_set`.

    Returns
    -------
    galaxies
        The galaxies.
    samples
        ``real`` (those galaxies), ``cvae``, ``parametric`` (bulge and disk
        with the parameters of the truth) and ``knots`` (the same with a
        quarter of the light in 30 knots).
    """
    parameters = draw_to_magnitude(n, seed, max_magnitude)
    galaxies = make_synthetic_set(
        n, seed=seed, size=size, pixel_scale=pixel_scale, parameters=parameters, keep_truth=False
    )
    rng, rows = np.random.default_rng([seed, 4]), np.arange(n)
    samples = {"real": _get_real(galaxies), "cvae": _generate(sampler, galaxies, rows, seed, rng)}
    baselines: dict[str, Callable[[GalaxyParameters], Components]] = {
        "parametric": make_smooth_galaxy,
        "knots": make_knotty_galaxy,
    }
    for name, make in baselines.items():
        transform = np.stack(
            [compute_component_transform(make(p), size=size, pixel_scale=pixel_scale) for p in parameters]
        )
        samples[name] = observe(transform, galaxies, rows, rng)
    return galaxies, samples


def make_cosmos_samples(
    sampler: CvaeSampler,
    file_name: str | Path,
    *,
    n_samples: int = 100,
    max_galaxies: int | None = None,
    seed: int = 0,
    size: int,
    pixel_scale: float,
) -> tuple[GalaxySet, dict[str, Sample]]:
    """Take real galaxies, and draw what is to be like them.

    Parameters
    ----------
    sampler
        The model; it clips conditions outside its training set, or flags
        them.
    file_name
        Catalogue of COSMOS galaxies, as for `read_cosmos_set`.
    n_samples
        Number of generated galaxies for each real one.
    max_galaxies, seed, size, pixel_scale
        As for `read_cosmos_set`.

    Returns
    -------
    galaxies
        The galaxies.
    samples
        As of `make_synthetic_samples`; parametric galaxies are the fits of
        the catalogue (Sersic, or bulge and disk).

    Notes
    -----
    All but the real galaxies have the flux of the fit, since the magnitude
    of the catalogue is off by a tenth; and what is outside the stamp of the
    real galaxy is cut off.
    """
    galaxies = read_cosmos_set(
        file_name, size=size, pixel_scale=pixel_scale, max_galaxies=max_galaxies, seed=seed
    )
    catalog = galsim.COSMOSCatalog(str(file_name), exclusion_level="marginal")
    index = {int(catalog.real_cat.ident[i]): k for k, i in enumerate(catalog.orig_index)}
    rng, rows = np.random.default_rng([seed, 4]), np.arange(len(galaxies))
    smooth, knotty, flux = [], [], np.empty(len(galaxies))
    for row, ident in enumerate(galaxies.ids):
        fit = catalog.makeGalaxy(index[int(ident)], gal_type="parametric")
        catalog_flux = galaxies.flux[row] if galaxies.flux is not None else fit.flux
        flux[row] = fit.flux / catalog_flux
        fit = fit.withFlux(1.0)
        knots = galsim.RandomKnots(N_KNOTS, profile=fit, rng=galsim.BaseDeviate(seed + row + 1))
        both = (1 - KNOT_FRACTION) * fit + KNOT_FRACTION * knots
        smooth.append(draw_transform(fit, size=size, pixel_scale=pixel_scale))
        knotty.append(draw_transform(both, size=size, pixel_scale=pixel_scale))
    # Images are for the flux of the fit from here on.
    galaxies = dataclasses.replace(
        galaxies,
        image=(galaxies.image / flux[:, None, None]).astype(np.float32),
        noise_variance=galaxies.noise_variance / flux**2,
    )
    generated = _generate(sampler, galaxies, np.repeat(rows, n_samples), seed, rng)
    return galaxies, {
        "real": _get_real(galaxies),
        "cvae": generated,
        "parametric": observe(np.stack(smooth), galaxies, rows, rng),
        "knots": observe(np.stack(knotty), galaxies, rows, rng),
    }


def _get_real(galaxies: GalaxySet) -> Sample:
    noise = np.sqrt(galaxies.noise_variance * galaxies.noise_power.mean())
    return Sample(galaxies.image, np.arange(len(galaxies)), noise)


def compare_samples(tables: Mapping[str, Table], *, seed: int = 0, n_bootstrap: int = 100) -> Table:
    """Compare samples with the real one.

    Parameters
    ----------
    tables
        What `Sample.measure` returns by the name of the sample; one is
        ``real``.
    seed
        Seed of resampling and of the folds of the classifier.
    n_bootstrap
        Number of bootstrap samples.

    Returns
    -------
    distances
        A row for each other sample and each of `STATISTICS`, with the fields
        of `Distance` and the medians of both samples, and a row ``c2st``
        whose ``ks`` is the area under the ROC curve of a classifier
        (`compute_c2st`), the galaxies of a group on one side of each split.
        Of a sample that has many rows with the same ``galaxy`` a classifier
        takes one of each; the area is the mean over up to `MAX_DRAWS` of
        them, the error that of one.
    """
    real = tables["real"]
    rows = []
    for name, table in tables.items():
        if name == "real":
            continue
        for statistic in STATISTICS:
            first, second = (np.asarray(t[statistic]) for t in (real, table))
            distance = compute_distance(first, second, seed=seed, n_bootstrap=n_bootstrap)
            medians = np.nanmedian(first), np.nanmedian(second)
            rows.append((name, statistic, *dataclasses.astuple(distance), *medians))
        results = []
        for once in _deal(np.asarray(table["galaxy"])):
            features = [np.column_stack([t[f] for f in FEATURES]) for t in (real, table[once])]
            groups = np.asarray(real["galaxy"]), np.asarray(table["galaxy"])[once]
            results.append(compute_c2st(*features, groups=groups, seed=seed))
        rows.append((name, "c2st", *np.mean(results, axis=0), np.nan, np.nan, 0.5, np.nan, np.nan))
    names = ("sample", "statistic", "ks", "ks_error", "wasserstein", "wasserstein_error", "ks_floor")
    return Table(rows=rows, names=(*names, "median_real", "median"))


def _deal(galaxy: np.ndarray) -> list[np.ndarray]:
    """Return rows with one of each galaxy, and others as long as there are."""
    order = np.argsort(galaxy, kind="stable")
    _, first, count = np.unique(galaxy[order], return_index=True, return_counts=True)
    return [order[first + draw] for draw in range(min(int(count.min()), MAX_DRAWS))]


def compute_conditioning(
    real: Table, other: Table, conditions: np.ndarray, *, edges: Mapping[str, Sequence[float]] | None = None
) -> Table:
    """Compare measured sizes of galaxies that were asked to be alike.

    Parameters
    ----------
    real, other
        What `Sample.measure` returns.
    conditions
        Of the real galaxies, shape ``(N, 3)``.
    edges
        Edges of bins in each of `CONDITION_NAMES`; quintiles by default.

    Returns
    -------
    table
        A row for each bin of each condition: its edges, the number of
        galaxies, and the ratio of the median half-light radii with its error
        from 200 bootstrap samples.
    """
    rng = np.random.default_rng(0)
    rows = []
    for column, name in enumerate(CONDITION_NAMES):
        values = conditions[:, column]
        bins = np.asarray((edges or {}).get(name, np.quantile(values, np.linspace(0, 1, 6))))
        for low, high in zip(bins[:-1], bins[1:], strict=True):
            sizes = []
            for table in (real, other):
                inside = (values >= low) & (values <= high)
                size = np.asarray(table["half_light_radius"])[inside[np.asarray(table["galaxy"])]]
                sizes.append(size[np.isfinite(size)])
            if min(map(len, sizes)) < 4:
                continue
            draws = [np.median(rng.choice(s, (200, len(s))), axis=1) for s in sizes]
            ratio = np.median(sizes[1]) / np.median(sizes[0])
            rows.append((name, low, high, len(sizes[0]), ratio, float((draws[1] / draws[0]).std())))
    return Table(rows=rows, names=("condition", "low", "high", "n", "radius_ratio", "radius_ratio_error"))


def compute_isotropy(table: Table) -> Table:
    """Return means that are zero if no direction is preferred.

    Parameters
    ----------
    table
        What `Sample.measure` returns.

    Returns
    -------
    isotropy
        Means of e1, e2, and of the modulus of e times cosine and sine of four
        times the position angle, which a memory of the pixels would leave;
        with errors.
    """
    e1, e2 = (np.asarray(table[name]) for name in ("e1", "e2"))
    good = np.isfinite(e1 + e2)
    e = (e1 + 1j * e2)[good]
    four = e**2 / np.maximum(np.abs(e), 1e-9)
    values = {"e1": e.real, "e2": e.imag, "e cos 4 theta": four.real, "e sin 4 theta": four.imag}
    rows = [(name, v.mean(), v.std() / np.sqrt(len(v))) for name, v in values.items()]
    return Table(rows=rows, names=("term", "mean", "error"))


def compute_nearest(train: np.ndarray, held_out: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """Look for generated galaxies that are copies of those trained on.

    Parameters
    ----------
    train, held_out, generated
        Features of galaxies, such as the latent means of their images, shapes
        ``(N, F)``, ``(M, F)`` and ``(K, F)``.

    Returns
    -------
    ratio
        Median distance of generated galaxies from the nearest galaxy trained
        on, over that of galaxies held out; much less than 1 means copies.
    close_fraction
        Fraction of the generated galaxies that are nearer than 99 % of those
        held out; 0.01 is expected.
    """
    scale = train.std(axis=0)
    tree = KDTree(train / scale)
    nearest = [tree.query(part / scale)[0] for part in (held_out, generated)]
    ratio = np.median(nearest[1]) / np.median(nearest[0])
    return float(ratio), float((nearest[1] < np.quantile(nearest[0], 0.01)).mean())

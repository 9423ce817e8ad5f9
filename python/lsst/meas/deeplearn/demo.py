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

"""A butler repository of made-up deep coadds with strong lenses.

The whole tract is drawn once in each band and patches are cut out of it, so
that patches agree where they overlap, in their noise too.
"""

from __future__ import annotations

__all__ = ("Scene", "make_demo", "make_scene")

import contextlib
import dataclasses
import logging
import multiprocessing
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import astropy.units as u
import galsim
import numpy as np
import sep
from astropy.table import Column, Table, vstack
from scipy.ndimage import convolve1d, gaussian_filter

from lsst.daf.butler import Butler
from lsst.utils.threads import disable_implicit_threading

from .coadds import MultibandCoadd
from .detection import detect_objects, select_primary
from .model_package import ModelPackage, chain_models, ingest_model
from .repository import CellSkyMap, make_cell_coadd, register_dataset_types, register_sky_map
from .scene import (
    AB_ZERO_POINT,
    PIXEL_SCALE,
    Galaxies,
    Sky,
    Stars,
    sample_early_types,
    sample_galaxies,
    sample_groups,
    sample_stars,
)
from .scene_drawing import (
    draw_galaxies,
    draw_psf_kernel,
    draw_stars,
    make_psf,
)

_LOG = logging.getLogger(__name__)

INSTRUMENT = "DemoCam"
"""Name of the instrument whose filters give the repository its bands."""

PSF_SIZE = 35
"""Side in pixels of the PSF images, as in DP2."""

ARC_SIZE = 71
"""Side in pixels of the stamps with arcs."""

ARC_PSF_SIZE = 41
"""Side in pixels of the PSF images that arcs are convolved with."""

MIN_ARC_SNR = 20.0
"""Signal to noise of arcs in the best band, as LensPop asks for."""

MIN_LENS_REDSHIFT = 0.2
"""Redshift of the nearest lens; nearer ones are rare on the sky, and so many
would cover everything else.
"""

LENS_DISTANCE = 75.0
"""Smallest distance of a lens from others and from bright objects, in pixels.
"""

BRIGHT_MAGNITUDE = 18.5
"""Magnitude of the stars and galaxies that lenses keep away from."""

WARP_KERNEL = (0.03, 0.94, 0.03)
"""Correlates the noise along each axis about as Lanczos-3 warping does: 0.89
of the variance is left in one dimension, and the depth is what it was."""


@dataclasses.dataclass
class Scene:
    """What there is on the sky of a tract, and the PSF it is seen with."""

    sky_map: CellSkyMap
    """The sky map."""

    bands: tuple[str, ...]
    """Bands in order."""

    sky: Sky
    """What sets this sky apart from others."""

    seed: int
    """Seed of the noise and of blemishes."""

    galaxies: Galaxies
    """Galaxies, those that are lenses among them."""

    stars: Stars
    """Stars."""

    psf: dict[str, np.ndarray]
    """FWHM in arcsec and reduced shear g1, g2 of the PSF in each cell of the
    tract, by band, shape ``(cell_y, cell_x, 3)``.
    """

    lenses: Table
    """Lenses, with the columns of the ``lens_truth`` dataset."""

    arcs: np.ndarray
    """Lensed sources in nJy, shape ``(N, B, y, x)``, on stamps that are
    centred on the pixel nearest to the lens.
    """

    def get_psf(self, band: str, *, x: float, y: float) -> galsim.GSObject:
        """Return the PSF at a position in pixels of the tract.

        Parameters
        ----------
        band
            Name of the band.
        x, y
            Position in pixels of the tract.
        """
        parameters = self.psf[band]
        row, column = (
            int(np.clip(round(position) // self.sky_map.cell_size, 0, n - 1))
            for position, n in ((y, parameters.shape[0]), (x, parameters.shape[1]))
        )
        return self.make_psf(band, parameters[row, column])

    def make_psf(self, band: str, parameters: np.ndarray) -> galsim.GSObject:
        """Return the PSF of a cell.

        Parameters
        ----------
        band
            Name of the band.
        parameters
            FWHM in arcsec and reduced shear.
        """
        fwhm, g1, g2 = parameters
        return make_psf(fwhm, g1, g2, beta=self.sky.survey[band].psf_beta)

    def get_missing_cells(self, band: str) -> list[tuple[int, int]]:
        """Return row and column in the tract of the cells without data.

        One at a corner of the tract in all bands, and one more in the first.

        Parameters
        ----------
        band
            Name of the band.
        """
        rows, columns = self.psf[band].shape[:2]
        return [(rows - 1, columns - 1), *([(1, 1)] if band == self.bands[0] else [])]


def make_demo(
    root: Path | str,
    *,
    name: str = "demo",
    sky: Sky | None = None,
    seed: int = 1,
    n_patches: int | tuple[int, int] = 2,
    inner_cells: tuple[int, int] = (11, 11),
    cell_size: int = 150,
    bands: Sequence[str] = ("g", "r", "i", "z"),
    n_lenses: int | None = None,
    run: str = "demo/coadds",
    processes: int = 2,
    report: Callable[[str], object] | None = None,
) -> None:
    """Make a butler repository of coadds of a made-up sky.

    In the collection ``run`` are ``deep_coadd``, ``object_patch``, ``object``
    and, if there are lenses, ``lens_truth``; sky map ``name``, tract 1.  The
    model packages that come with this package are put into
    ``models/<name>/v<version>``; the chain ``models/deeplens_gri`` has those
    of the lens finder.

    Parameters
    ----------
    root
        Folder of the repository; one that is there already gets a sky more.
    name
        Name of the sky map, which must not be in the repository.
    sky
        Survey and galaxies; by default coadds of ten years of LSST.
    seed
        Seed; the same seed gives the same repository.
    n_patches
        Number of patches along y and x, or in a row.
    inner_cells
        Number of cells along y and x of the inner region of a patch, which
        has a border of one cell besides.
    cell_size
        Side of a cell in pixels of 0.2 arcsec, at least 40.
    bands
        Bands, of g, r, i, z and y; without lenses also u.
    n_lenses
        Number of lenses with an Einstein radius above 1 arcsec in the inner
        region of each patch; besides there are a third as many smaller ones.
        12 by default, a thousand times as many as on the sky.  With 0 there
        are none at all; the sky is otherwise the same.
    run
        Name of the RUN collection.
    processes
        Number of processes.  They are spawned, so with more than one a script
        that calls this needs an ``if __name__ == "__main__"`` guard.
    report
        Called with a line of text whenever a step is done; by default the
        lines are logged.

    Raises
    ------
    ValueError
        Raised if the repository has a sky map of this name already.
    """
    report = report or _LOG.info
    is_new = not (Path(root) / "butler.yaml").exists()
    if not is_new:
        with Butler.from_config(str(root)) as butler:
            known = butler.query_dimension_records("skymap", explain=False)
        if name in {record.name for record in known}:
            raise ValueError(f"{root} has a sky map {name} already; give another name or another folder.")
    sky_map = CellSkyMap.from_center(
        name,
        ra=150.1,
        dec=2.2,
        pixel_scale=PIXEL_SCALE,
        n_patches=(1, n_patches) if isinstance(n_patches, int) else n_patches,
        inner_cells=inner_cells,
        cell_size=cell_size,
        tract=1,
    )
    scene = make_scene(sky_map, bands, sky=sky, seed=seed, n_lenses=12 if n_lenses is None else n_lenses)
    height, width = sky_map.bbox.shape
    report(
        f"A sky of {height} x {width} pixels: {len(scene.galaxies)} galaxies, {len(scene.stars)} stars, "
        f"{len(scene.lenses)} lenses."
    )
    if is_new:
        Butler.makeRepo(str(root))
    with Butler.from_config(str(root), run=run, writeable=True) as butler, _open_pool(processes) as pool:
        register_sky_map(butler, sky_map, instrument=INSTRUMENT, bands=bands)
        register_dataset_types(butler)
        snr: list[np.ndarray] = []
        tables: list[Table] = []
        arguments = [(root, run, scene, band) for band in bands]
        for band, band_snr in zip(bands, _map(pool, write_band, arguments), strict=True):
            snr.append(band_snr)
            report(f"Drew {band} and wrote its coadds.")
        patch_arguments = [(root, run, sky_map, bands, patch) for patch in sky_map.patch_ids]
        for table in _map(pool, write_objects, patch_arguments):
            report(f"Detected {len(table)} objects in patch {len(tables)}.")
            tables.append(table)
        butler.put(select_primary(tables), "object", skymap=sky_map.name, tract=sky_map.tract)
        if len(scene.lenses):
            _write_truth(butler, scene, np.stack(snr, axis=1))
        if is_new:
            for collection in _ingest_shipped_models(butler):
                report(f"Put model packages into {collection}.")
    report(f"The repository is in {root}, its coadds in the collection {run}.")


def make_scene(
    sky_map: CellSkyMap, bands: Sequence[str], *, sky: Sky | None = None, seed: int, n_lenses: int = 0
) -> Scene:
    """Draw what there is on the sky of a tract.

    Parameters
    ----------
    sky_map
        The sky map, with pixels of 0.2 arcsec.
    bands
        Bands.
    sky, seed, n_lenses
        As in `make_demo`.
    """
    sky = sky or Sky()
    shape = sky_map.bbox.shape
    # A generator each, so that the sky stays when lenses are added.
    galaxy_rng, group_rng, massive_rng, star_rng, psf_rng, lens_rng, sky_rng = np.random.default_rng(
        seed
    ).spawn(7)
    galaxies = Galaxies.concatenate([sample_galaxies(galaxy_rng, shape), sample_groups(group_rng, shape)])
    stars = sample_stars(star_rng, shape, bands)
    scene = Scene(
        sky_map=sky_map,
        bands=tuple(bands),
        sky=sky,
        seed=seed,
        galaxies=galaxies,
        stars=stars,
        psf=_sample_psf(psf_rng, tuple(n // sky_map.cell_size for n in shape), sky, bands),
        lenses=Table(),
        arcs=np.zeros((0, len(bands), ARC_SIZE, ARC_SIZE), dtype=np.float32),
    )
    massive = _sample_massive_galaxies(massive_rng, scene)
    scene.galaxies = Galaxies.concatenate([scene.galaxies, massive])
    sky.change(scene.galaxies, sky_rng)
    if n_lenses:
        _add_lenses(scene, lens_rng, n_lenses)
    return scene


def write_band(root: Path | str, run: str, scene: Scene, band: str) -> np.ndarray:
    """Draw a tract in one band and write the coadds of its patches.

    Parameters
    ----------
    root
        Folder of the repository.
    run
        Name of the RUN collection.
    scene
        What to draw.
    band
        Name of the band.

    Returns
    -------
    arc_snr
        Signal to noise of the arcs as LensPop defines it, shape ``(N,)``.
    """
    sky_map = scene.sky_map
    image, variance, masks = draw_band(scene, band)
    kernels = np.array(
        [[draw_psf_kernel(scene.make_psf(band, psf), PSF_SIZE) for psf in row] for row in scene.psf[band]]
    )
    projection = sky_map.sky_projection
    with Butler.from_config(str(root), run=run, writeable=True) as butler:
        for patch in map(sky_map.make_patch, sky_map.patch_ids):
            box = patch.outer_bbox
            pixels = box.slice_within(sky_map.bbox)
            first = box.y.start // sky_map.cell_size, box.x.start // sky_map.cell_size
            n = patch.cells.grid_size.as_tuple()
            missing = (np.array(scene.get_missing_cells(band)) - first).tolist()
            coadd = make_cell_coadd(
                image[pixels],
                variance[pixels],
                kernels[first[0] : first[0] + n[0], first[1] : first[1] + n[1]],
                band=band,
                patch=patch,
                sky_projection=projection,
                mask_planes={name: plane[pixels] for name, plane in masks.items()},
                missing_cells=[(i, j) for i, j in missing if 0 <= i < n[0] and 0 <= j < n[1]],
            )
            data_id = {"skymap": sky_map.name, "tract": sky_map.tract, "patch": patch.id, "band": band}
            butler.put(coadd, "deep_coadd", data_id)
    return _compute_arc_snr(scene, band, variance)


def write_objects(root: Path | str, run: str, sky_map: CellSkyMap, bands: Sequence[str], patch: int) -> Table:
    """Read the coadds of a patch, detect objects and write their table.

    Parameters
    ----------
    root
        Folder of the repository.
    run
        Name of the RUN collection.
    sky_map
        The sky map.
    bands
        Bands to measure.
    patch
        ID of the patch.

    Returns
    -------
    table
        The objects.
    """
    data_id = {"skymap": sky_map.name, "tract": sky_map.tract, "patch": patch}
    with Butler.from_config(str(root), run=run, writeable=True) as butler:
        handles = [butler.getDeferred("deep_coadd", data_id, band=band) for band in bands]
        coadd = MultibandCoadd.read(handles, bands)
        table = detect_objects(coadd, tract=sky_map.tract, patch=patch)
        butler.put(table, "object_patch", data_id)
    return table


def draw_band(scene: Scene, band: str) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Draw the image of a tract in one band.

    Parameters
    ----------
    scene
        What to draw.
    band
        Name of the band.

    Returns
    -------
    image, variance
        In nJy and its square, shape ``(y, x)``, NaN where there are no data.
        The variance is that of the pixels, of sky and sources.
    masks
        Where mask planes are set, by name.
    """
    settings = scene.sky.survey[band]
    shape = scene.sky_map.bbox.shape
    rng = np.random.default_rng([scene.seed, *band.encode()])

    def get_psf(x: float, y: float) -> galsim.GSObject:
        return scene.get_psf(band, x=x, y=y)

    stars = np.zeros(shape, dtype=np.float32)
    draw_stars(stars, scene.stars, band, get_psf, settings)
    model = stars.copy()
    draw_galaxies(model, scene.galaxies, band, get_psf, settings)
    for arcs, box in zip(scene.arcs[:, scene.bands.index(band)], _iterate_stamps(scene), strict=True):
        model[box] += arcs

    # Numbers of visits differ from cell to cell.
    depth = rng.normal(1.0, 0.03, scene.psf[band].shape[:2])
    sky = settings.sky_noise**2 * np.kron(depth, np.ones((scene.sky_map.cell_size,) * 2))
    variance = (sky + np.maximum(model, 0) / settings.gain).astype(np.float32)
    masks = _make_masks(rng, stars > 0.7 * settings.saturation, settings.n_visits)
    if settings.n_visits > 1:
        variance[masks["CLIPPED"]] *= settings.n_visits / (settings.n_visits - 1)
    noise = rng.standard_normal(shape, dtype=np.float32)
    for axis in (0, 1):
        noise = convolve1d(noise, WARP_KERNEL, axis=axis, mode="wrap")
    variance *= np.float32(np.sum(np.square(WARP_KERNEL)) ** 2)
    noise /= np.float32(np.sum(np.square(WARP_KERNEL)))
    image = model + np.sqrt(variance) * noise

    no_data = masks["NO_DATA"]
    # What is too faint to be detected is background to a pipeline.
    image -= np.float32(sep.Background(image, mask=no_data, bw=128, bh=128).globalback)
    smooth = gaussian_filter(np.where(no_data, 0, image), 1.7)
    masks["DETECTED"] = smooth > 5 * np.sqrt(variance / (4 * np.pi)) / 1.7
    image[no_data] = variance[no_data] = np.nan
    return image, variance, masks


def _sample_psf(
    rng: np.random.Generator, shape: tuple[int, ...], sky: Sky, bands: Sequence[str]
) -> dict[str, np.ndarray]:
    """Draw PSFs that vary smoothly over a tract, and a little by cell."""
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape)
    parameters = {}
    for band in bands:
        slopes, scatter = rng.normal(0, 1, (3, 2, 1, 1)), rng.normal(0, 1, (3, *shape))
        fwhm, g1, g2 = np.array([0.02, 0.01, 0.01])[:, None, None] * (
            slopes[:, 0] * (x - 0.5) + slopes[:, 1] * (y - 0.5) + 0.3 * scatter
        )
        parameters[band] = np.stack([sky.survey[band].psf_fwhm * (1 + fwhm), g1, g2], axis=-1)
    return parameters


def _sample_massive_galaxies(rng: np.random.Generator, scene: Scene) -> Galaxies:
    """Draw galaxies like those that are lenses, without arcs."""
    from .lenses.lens_population import sample_lens_population

    height, width = scene.sky_map.bbox.shape
    n = rng.poisson(scene.sky.massive_density * height * width * (PIXEL_SCALE / 60) ** 2)
    if n == 0:
        return sample_early_types(rng, *np.zeros((4, 0)))
    population = sample_lens_population(2 * n, seed=int(rng.integers(2**31)), bands=("i",))
    population = population[np.argsort(population["lens_redshift"] < MIN_LENS_REDSHIFT, kind="stable")[:n]]
    x, y = rng.uniform(0, width - 1, n), rng.uniform(0, height - 1, n)
    galaxies = _make_hosts(rng, population, x, y)
    brighter = scene.sky.massive_brightening * rng.random(n)
    galaxies.magnitude -= brighter
    # With luminosity to the power of 0.4, as compute_half_light_radius has it.
    galaxies.half_light_radius *= 10 ** (0.16 * brighter[:, None])
    disk = np.where(rng.random(n) < scene.sky.massive_disk_fraction, rng.uniform(0.1, 0.5, n), 0.0)
    galaxies.fraction[:] = np.stack([1 - disk, disk, np.zeros(n)], axis=1)
    return galaxies


def _make_hosts(rng: np.random.Generator, population: Table, x: np.ndarray, y: np.ndarray) -> Galaxies:
    """Draw lens galaxies: spheroids whose light follows mass, nearly."""
    redshift, magnitude = (np.asarray(population[name]) for name in ("lens_redshift", "lens_mag_i"))
    hosts = sample_early_types(rng, x, y, redshift, magnitude)
    hosts.axis_ratio[:, 0] = np.clip(population["axis_ratio"] + rng.normal(0, 0.05, len(x)), 0.3, 1.0)
    hosts.position_angle = np.deg2rad(population["position_angle"] + rng.normal(0, 5, len(x))) % np.pi
    hosts.fraction[:] = [1.0, 0.0, 0.0]
    return hosts


def _sample_lenses(
    rng: np.random.Generator,
    sky: Sky,
    bands: Sequence[str],
    n: int,
    *,
    min_radius: float,
    max_radius: float,
) -> Table:
    """Draw lenses that count as discoverable, by the noise of the sky, and
    are not too near.
    """
    # This imports torch.
    from .lenses.lens_population import sample_lens_population
    from .lenses.simulation import compute_arc_snr, render_arcs

    trials = sample_lens_population(
        4 * n,
        seed=int(rng.integers(2**31)),
        # Lens galaxies are made from their i magnitude.
        bands=sorted({*bands, "i"}),
        min_einstein_radius=min_radius,
        max_einstein_radius=max_radius,
    )
    survey = [sky.survey[band] for band in bands]
    kernels = np.stack(
        [draw_psf_kernel(make_psf(band.psf_fwhm, beta=band.psf_beta), ARC_PSF_SIZE) for band in survey]
    )
    arcs = render_arcs(
        trials,
        bands=bands,
        pixel_scale=PIXEL_SCALE,
        size=ARC_SIZE,
        psf=np.repeat(kernels[None].astype(np.float32), len(trials), axis=0),
    )
    noise = np.array([band.sky_noise for band in survey])[:, None, None]
    snr = compute_arc_snr(arcs, np.broadcast_to(noise**2, arcs.shape)).max(axis=1)
    # In their order; should there be too few, others follow.
    unwanted = (snr < MIN_ARC_SNR) | (trials["lens_redshift"] < MIN_LENS_REDSHIFT)
    return trials[np.argsort(unwanted, kind="stable")[:n]]


def _add_lenses(scene: Scene, rng: np.random.Generator, n_lenses: int) -> None:
    """Add lenses, arcs and galaxies, to a scene."""
    from .lenses.simulation import render_arcs

    sky_map, bands = scene.sky_map, scene.bands
    n_patches = len(sky_map.patch_ids)
    parts, patches = [], []
    for n, low, high in ((n_lenses, 1.0, 3.0), (n_lenses // 3, 0.6, 1.0)):
        if n:
            parts.append(
                _sample_lenses(rng, scene.sky, bands, n * n_patches, min_radius=low, max_radius=high)
            )
            patches.append(np.repeat(np.arange(n_patches), n))
    population = vstack(parts)
    x, y = _place_lenses(scene, rng, np.concatenate(patches))
    hosts = _make_hosts(rng, population, x, y)
    scene.sky.change(hosts, rng.spawn(1)[0])
    scene.galaxies = Galaxies.concatenate([scene.galaxies, hosts])

    # Kernels off their centres as the lenses are off those of their pixels.
    dx, dy = x - np.floor(x + 0.5), y - np.floor(y + 0.5)
    kernels = np.array(
        [
            [
                draw_psf_kernel(scene.get_psf(b, x=x[k], y=y[k]), ARC_PSF_SIZE, dx=dx[k], dy=dy[k])
                for b in bands
            ]
            for k in range(len(x))
        ]
    )
    scene.arcs = render_arcs(
        population, bands=bands, pixel_scale=PIXEL_SCALE, size=ARC_SIZE, psf=kernels.astype(np.float32)
    )
    sky = sky_map.sky_projection.pixel_to_sky(x=x, y=y)
    # Magnitudes and sizes as drawn, instead of those of the population.
    population.remove_columns(
        [name for name in population.colnames if name.startswith(("lens_mag_", "lens_half_light"))]
    )
    scene.lenses = population
    for index, (name, values, unit, description) in enumerate(
        [
            ("lens_id", np.arange(1, len(x) + 1), None, "Running number of the lens in the tract"),
            ("ra", sky.ra.deg, u.deg, "ICRS right ascension of the lens galaxy"),
            ("dec", sky.dec.deg, u.deg, "ICRS declination of the lens galaxy"),
            ("x", x, u.pix, "Column in pixels of the tract"),
            ("y", y, u.pix, "Row in pixels of the tract"),
            (
                "lens_half_light_radius",
                hosts.half_light_radius[:, 0],
                u.arcsec,
                "Half-light radius of the lens galaxy along its major axis",
            ),
            *(
                (
                    f"lens_mag_{band}",
                    AB_ZERO_POINT
                    + scene.sky.survey[band].galaxy_offset
                    - 2.5 * np.log10(hosts.compute_fluxes(band).sum(axis=1)),
                    u.ABmag,
                    f"Total {band} magnitude of the lens galaxy",
                )
                for band in bands
            ),
        ]
    ):
        scene.lenses.add_column(Column(values, unit=unit, description=description), index, name)


def _place_lenses(
    scene: Scene, rng: np.random.Generator, patches: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions in given patches, away from each other, from bright
    stars and galaxies and from missing cells.
    """
    sky_map = scene.sky_map
    stars = scene.stars[scene.stars.magnitudes[scene.bands[-1]] < BRIGHT_MAGNITUDE]
    galaxies = scene.galaxies[scene.galaxies.magnitude < BRIGHT_MAGNITUDE]
    occupied = [*zip(stars.x, stars.y, strict=True), *zip(galaxies.x, galaxies.y, strict=True)]
    missing = {cell for band in scene.bands for cell in scene.get_missing_cells(band)}
    positions = []
    for patch in patches:
        box = sky_map.make_patch(int(patch)).inner_bbox
        for _ in range(1000):
            x, y = rng.uniform(box.x.min + 10, box.x.max - 10), rng.uniform(box.y.min + 10, box.y.max - 10)
            distance = min((np.hypot(x - a, y - b) for a, b in occupied), default=np.inf)
            cell = int(y // sky_map.cell_size), int(x // sky_map.cell_size)
            if distance > LENS_DISTANCE and cell not in missing:
                break
        occupied.append((x, y))
        positions.append((x, y))
    x_all, y_all = np.array(positions).T
    return x_all, y_all


def _iterate_stamps(scene: Scene) -> Iterator[tuple[slice, slice]]:
    """Return the pixels of the stamps of the arcs."""
    for lens in scene.lenses:
        row, column = int(np.floor(lens["y"] + 0.5)), int(np.floor(lens["x"] + 0.5))
        half = ARC_SIZE // 2
        yield slice(row - half, row + half + 1), slice(column - half, column + half + 1)


def _compute_arc_snr(scene: Scene, band: str, variance: np.ndarray) -> np.ndarray:
    """Return the signal to noise of all arcs in one band."""
    if len(scene.lenses) == 0:
        return np.zeros(0)
    from .lenses.simulation import compute_arc_snr

    arcs = scene.arcs[:, [scene.bands.index(band)]]
    stamps = np.stack([variance[box] for box in _iterate_stamps(scene)])[:, None]
    return compute_arc_snr(arcs, stamps)[:, 0]


def _make_masks(rng: np.random.Generator, saturated: np.ndarray, n_visits: int) -> dict[str, np.ndarray]:
    """Draw blemishes as coadds have them."""
    shape = saturated.shape
    names = ("NO_DATA", "CLIPPED", "COSMIC_RAY", "INTERPOLATED", "INEXACT_PSF", "REJECTED")
    masks = {name: np.zeros(shape, dtype=bool) for name in names}
    y, x = np.ogrid[: shape[0], : shape[1]]
    area = shape[0] * shape[1]

    def make_line(width: float) -> np.ndarray:
        angle = rng.uniform(0, np.pi)
        across = np.cos(angle) * (x - rng.uniform(0, shape[1])) + np.sin(angle) * (
            y - rng.uniform(0, shape[0])
        )
        return np.asarray(np.abs(across) < width / 2)

    # A satellite in one visit, edges of detectors, a strip that no visit
    # covers, and cosmic rays.
    masks["CLIPPED"] |= make_line(9)
    for _ in range(3):
        masks["INEXACT_PSF"] |= make_line(20)
    for _ in range(1 + area // 4_000_000):
        row, column = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        masks["NO_DATA"][row : row + min(60, shape[0] // 5), column : column + 4] = True
    for row, column in rng.integers(0, shape, (area // 100_000, 2)):
        masks["COSMIC_RAY"][row : row + 2, column : column + 3] = True
    masks["INTERPOLATED"] |= masks["COSMIC_RAY"]
    # Charge bleeds along columns from the cores of bright stars.
    columns = np.flatnonzero(saturated.sum(axis=0) > 8)
    masks["SATURATED"] = saturated.copy()
    for column in columns:
        rows = np.flatnonzero(saturated[:, column])
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
            if (length := len(run)) > 8:
                masks["SATURATED"][max(run[0] - 2 * length, 0) : run[-1] + 2 * length, column] = True
    masks["NO_DATA"] |= masks["SATURATED"]
    masks["REJECTED"] |= masks["SATURATED"] | masks["CLIPPED"] | masks["COSMIC_RAY"]
    masks["INEXACT_PSF"] |= masks["REJECTED"]
    return masks


def _write_truth(butler: Butler, scene: Scene, snr: np.ndarray) -> None:
    """Write the lenses of each patch."""
    truth = scene.lenses.copy()
    flux = scene.arcs.sum(axis=(2, 3))
    source = 10 ** (-0.4 * (np.asarray(truth[f"source_mag_{scene.bands[0]}"]) - AB_ZERO_POINT))
    for name, values, unit, description in (
        (
            "magnification",
            flux[:, 0] / source,
            None,
            "Flux of the images over that of the source",
        ),
        ("arc_flux", flux, u.nJy, "Flux of the arcs, (band)"),
        ("arc_snr_by_band", snr, None, "Signal to noise of the arcs as LensPop defines it, (band)"),
        ("arc_snr", snr.max(axis=1), None, "Largest signal to noise over the bands"),
    ):
        truth[name] = Column(values, unit=unit, description=description)
    sky_map = scene.sky_map
    for patch in map(sky_map.make_patch, sky_map.patch_ids):
        inside = patch.outer_bbox.contains(x=np.round(truth["x"]), y=np.round(truth["y"]))
        butler.put(truth[inside], "lens_truth", skymap=sky_map.name, tract=sky_map.tract, patch=patch.id)


def _ingest_shipped_models(butler: Butler) -> list[str]:
    """Put the models of this package into a repository.

    There is a chain for each name; those whose names differ in a last number
    are an ensemble.

    Returns
    -------
    collections
        Runs and chains.
    """
    runs, chains = [], defaultdict(list)
    for path in sorted((Path(__file__).parent / "resources" / "models").glob("*.safetensors")):
        package = ModelPackage.read(path)
        runs.append(ingest_model(butler, package).run)
        chains[f"models/{re.sub(r'_\d+$', '', package.name)}"].append(runs[-1])
    for chain, members in chains.items():
        chain_models(butler, chain, members)
    return [*runs, *chains]


@contextlib.contextmanager
def _open_pool(processes: int) -> Iterator[Executor | None]:
    """Start processes, or none if one is enough."""
    if processes == 1:
        yield None
        return
    # Spawned, because forking a process that has used torch may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=disable_implicit_threading) as pool:
        yield pool


def _map(
    pool: Executor | None, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]
) -> Iterator[Any]:
    """Call a function with each tuple of arguments, results in order."""
    if pool is None:
        yield from (function(*args) for args in arguments)
    else:
        yield from (future.result() for future in [pool.submit(function, *args) for args in arguments])

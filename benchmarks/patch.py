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


"""A patch from files to scores, against the straightforward way.

The straightforward way reads whole coadds, takes ``MaskedImage[Box]`` of each
object, scales by ``torch.asinh``, and runs the network eagerly in float32.
Ours is LensFinderTask, with flags, noise and PSFs of all objects besides.

Run as ``python benchmarks patch``, or by itself for another size; see
``python benchmarks/patch.py --help``.
"""

from __future__ import annotations

__all__ = ("make_published_model", "make_repository", "run")

import argparse
import multiprocessing
import os
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any
from unittest import mock

# Before numpy and torch load their libraries: one core.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import astropy.units as u
import numpy as np
import torch
from astropy.table import Table
from results import Result, compute_seconds, format_table

from lsst.daf.butler import Butler
from lsst.images import Box, MaskedImage
from lsst.images.serialization import read_archive
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.cutouts import CutoutExtractor, _gather
from lsst.meas.deeplearn.lenses import lens_finder_task
from lsst.meas.deeplearn.lenses.deeplens import DeepLens
from lsst.meas.deeplearn.model_package import ModelPackage, ModelSettings, ingest_model
from lsst.meas.deeplearn.preprocessing import Preprocessing
from lsst.meas.deeplearn.repository import (
    CellSkyMap,
    make_cell_coadd,
    register_dataset_types,
    register_sky_map,
)

BANDS = "gri"
SIZE = 45
PIXELS_PER_CELL = 150


def make_repository(root: str, n_cells: int, n_objects: int) -> None:
    """Make a repository with one patch of noise, PSFs and objects.

    Parameters
    ----------
    root
        Folder of the repository.
    n_cells
        Cells of 150 pixels on a side of the patch.
    n_objects
        Number of objects.
    """
    sky_map = CellSkyMap.from_center(
        "benchmark",
        ra=150.0,
        dec=2.0,
        pixel_scale=0.2,
        n_patches=(1, 1),
        inner_cells=(n_cells - 2, n_cells - 2),
    )
    patch = sky_map.make_patch(0)
    shape = patch.outer_bbox.shape
    Butler.makeRepo(root)
    butler = Butler.from_config(root, run="coadds", writeable=True)
    register_sky_map(butler, sky_map, instrument="Benchmark", bands=BANDS)
    register_dataset_types(butler)
    rng = np.random.default_rng(1)
    r2 = np.sum((np.indices((35, 35)) - 17) ** 2, axis=0)
    psf = np.exp(-0.5 * r2 / 1.7**2)
    for band in BANDS:
        coadd = make_cell_coadd(
            5 * rng.standard_normal(shape, dtype=np.float32),
            25 * rng.uniform(0.9, 1.1, shape).astype(np.float32),
            np.broadcast_to(psf / psf.sum(), (*patch.cells.grid_size.as_tuple(), *psf.shape)),
            band=band,
            patch=patch,
            sky_projection=sky_map.sky_projection,
        )
        butler.put(coadd, "deep_coadd", skymap="benchmark", tract=0, patch=0, band=band)
    x, y = (rng.uniform(0, size - 1, n_objects) for size in reversed(shape))
    sky = sky_map.sky_projection.pixel_to_sky(x=x, y=y)
    objects = Table(
        {
            "objectId": np.arange(n_objects),
            "patch": np.zeros(n_objects, dtype=int),
            "coord_ra": sky.ra.deg * u.deg,
            "coord_dec": sky.dec.deg * u.deg,
            "refExtendedness": np.ones(n_objects),
            "i_cModelFlux": np.full(n_objects, 1e5) * u.nJy,
        }
    )
    butler.put(objects, "object", skymap="benchmark", tract=0)
    ingest_model(butler, make_published_model(), run="models")


def make_published_model() -> ModelPackage:
    """Return the published network, with weights that nobody trained."""
    torch.manual_seed(1)
    settings = ModelSettings(
        bands=tuple(BANDS), pixel_scale=0.2, stamp_size=SIZE, preprocessing=Preprocessing(softening=4.0)
    )
    weights = {name: tensor.numpy() for name, tensor in DeepLens(in_bands=len(BANDS)).state_dict().items()}
    return ModelPackage(
        name="published", version="1", architecture="DeepLens", settings=settings, weights=weights
    )


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the CPU time of the steps of the task by their names."""

    def wrap(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed_function(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.process_time() - start

        return timed_function

    steps = (
        (MultibandCoadd, "read", "read"),
        (CutoutExtractor, "__init__", "cut"),
        (CutoutExtractor, "extract", "cut"),
        (lens_finder_task, "_make_inputs", "scale"),
        (lens_finder_task, "predict", "network"),
        (lens_finder_task, "find_rings", "RingFinder"),
    )
    with ExitStack() as stack:
        for owner, attribute, name in steps:
            stack.enter_context(mock.patch.object(owner, attribute, wrap(getattr(owner, attribute), name)))
        yield


class Patch:
    """The files of a patch, its objects, and a network.

    Parameters
    ----------
    root
        Repository as `make_repository` makes it.
    """

    def __init__(self, root: str) -> None:
        self.butler = Butler.from_config(root, collections=["coadds", "models"])
        self.data_id = {"skymap": "benchmark", "tract": 0, "patch": 0}
        self.objects = self.butler.get("object", self.data_id)
        self.handles = [self.butler.getDeferred("deep_coadd", self.data_id, band=band) for band in BANDS]
        self.model = ModelPackage.from_arrow(self.butler.get("deeplens_model"))

    def score_naively(self, seconds: dict[str, float]) -> np.ndarray:
        """Score the objects in the straightforward way.

        Parameters
        ----------
        seconds
            CPU time of each step, which is added to.
        """
        clock = _Clock(seconds)
        paths = [self.butler.getURI("deep_coadd", self.data_id, band=band).ospath for band in BANDS]
        images = [read_archive(path, MaskedImage) for path in paths]
        clock.lap("read")
        coadd = MultibandCoadd.from_coadds(dict(zip(BANDS, images, strict=True)))
        x, y = coadd.sky_to_pixel(ra=self.objects["coord_ra"], dec=self.objects["coord_dec"])
        corners = np.round(np.stack([x, y], axis=1)).astype(int) - SIZE // 2
        boxes = [Box.factory[j : j + SIZE, i : i + SIZE] for i, j in corners.tolist()]
        boxes = [box for box in boxes if images[0].bbox.contains(box)]
        stamps = np.empty((len(boxes), len(BANDS), SIZE, SIZE), dtype=np.float32)
        for k, box in enumerate(boxes):
            for b, image in enumerate(images):
                stamps[k, b] = image[box].image.array
        clock.lap("cut")
        inputs = torch.asinh(torch.from_numpy(stamps) / 4)
        clock.lap("scale")
        network = self.model.network
        with torch.inference_mode():
            parts = [torch.sigmoid(network(inputs[k : k + 32])) for k in range(0, len(inputs), 32)]
        clock.lap("network")
        return torch.cat(parts).numpy()

    def score(
        self, seconds: dict[str, float], settings: Mapping[str, Any], *, ring_finder: bool = False
    ) -> Table:
        """Score the objects by LensFinderTask.

        Parameters
        ----------
        seconds
            CPU time of each step, which is added to.
        settings
            Configuration of its inference.
        ring_finder
            Whether to run RingFinder too.
        """
        config = lens_finder_task.LensFinderConfig()
        config.inference.update(**({"device": "cpu", "averageOrientations": 1} | dict(settings)))
        config.doRingFinder = ring_finder
        with timed(seconds):
            start = time.process_time()
            coadd = MultibandCoadd.read(self.handles, BANDS)
            task = lens_finder_task.LensFinderTask(config=config)
            candidates = task.run(coadd, self.objects, [self.model]).candidates
            total = time.process_time() - start
        seconds["other"] = total - sum(seconds.values())
        return candidates


class _Clock:
    """CPU time between laps.

    Parameters
    ----------
    seconds
        Where to add it up, by the names of the laps.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._start = time.process_time()

    def lap(self, name: str) -> None:
        """End a lap.

        Parameters
        ----------
        name
            Name of the lap.
        """
        now = time.process_time()
        self._seconds[name] += now - self._start
        self._start = now


def run(*, quick: bool, n_cells: int = 14, n_objects: int = 1250) -> list[Result]:
    """Time a patch, and the cutting of stamps.

    Parameters
    ----------
    quick
        Whether to take a patch of 4 x 4 cells with 50 objects.
    n_cells
        Cells of 150 pixels on a side of the patch.
    n_objects
        Number of objects; 5000 on 28 cells are the same density.
    """
    if quick:
        n_cells, n_objects = 4, 50
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        # In processes of their own, so that each has its own memory.
        _run_apart(make_repository, f"{root}/repo", n_cells, n_objects)
        context = multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        _run_apart(_measure_memory, f"{root}/repo", queue)
        peak, planes = queue.get()
        results = _time_patch(Patch(f"{root}/repo"), n_cells, n_objects)
    what = "peak memory of a process, RingFinder included"
    return [
        *results,
        Result("patch", what, peak, "GB"),
        Result("patch", "    beside the planes", peak - planes, "GB"),
    ]


def _run_apart(function: Callable[..., None], *args: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()


def _measure_memory(root: str, queue: SimpleQueue[tuple[float, float]]) -> None:
    """Send the peak memory of scoring a patch and that of its planes, GB."""
    patch = Patch(root)
    patch.score(defaultdict(float), {}, ring_finder=True)
    # Not getrusage, in which a process inherits the peak of its parent.
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])  # type: ignore[index]
    planes = MultibandCoadd.read(patch.handles, BANDS).planes.values()
    size = sum(band.image.nbytes + band.variance.nbytes + band.mask.array.nbytes for band in planes)
    queue.put((peak / 1e9, size / 1e9))


def _time_patch(patch: Patch, n_cells: int, n_objects: int) -> list[Result]:
    title = f"{n_cells * PIXELS_PER_CELL}^2 x {len(BANDS)} bands, {n_objects} objects"
    warm: dict[str, float] = defaultdict(float)
    engines = (("openvino", "float32"), ("openvino", "bfloat16"), ("torch", "float32"))
    for engine, precision in engines:  # Compiles, which a process does once.
        patch.score(warm, {"engine": engine, "precision": precision})
    naive: dict[str, float] = defaultdict(float)
    patch.score_naively(naive)
    results = _report(f"naive, {title}", naive, None, n_objects)
    for engine, precision in engines:
        seconds: dict[str, float] = defaultdict(float)
        patch.score(seconds, {"engine": engine, "precision": precision})
        results += _report(f"{engine} {precision}", seconds, sum(naive.values()), n_objects)
    return results + _time_cutting(patch, n_objects)


def _report(name: str, seconds: Mapping[str, float], naive: float | None, n_objects: int) -> list[Result]:
    total = sum(seconds.values())
    ratio = None if naive is None else naive / total
    results = [Result("patch", name, total, "CPU s", ratio, "" if ratio is None else "naive")]
    results += [
        Result("patch", f"    {step} ({100 * value / total:.1f} %)", value, "CPU s")
        for step, value in seconds.items()
    ]
    return [*results, Result("patch", "    per object", 1e3 * total / n_objects, "CPU ms")]


def _time_cutting(patch: Patch, n_objects: int) -> list[Result]:
    """Time cutting with image, variance, bad pixels; with and without PSF."""
    coadd = MultibandCoadd.read(patch.handles, BANDS)
    table = patch.objects
    corners = np.random.default_rng(3).integers(0, np.array(coadd.bbox.shape)[:, None] - SIZE, (2, n_objects))
    one_plane = np.empty((n_objects, SIZE, SIZE), dtype=np.float32)
    everywhere = np.ones(n_objects, dtype=bool)
    seconds = compute_seconds(
        lambda: _gather(
            one_plane,
            coadd.planes[BANDS[0]].image,
            bottom=corners[0],
            left=corners[1],
            inside=everywhere,
            off_edge=~everywhere,
        ),
        repeats=3,
    )
    results = [Result("cutouts", "stamps of one plane", n_objects / seconds, "stamps/s/core")]
    for psf_size in (0, 25):
        extractor = CutoutExtractor(coadd, size=SIZE, psf_size=psf_size)
        seconds = compute_seconds(
            lambda extractor=extractor: extractor.extract(
                ids=table["objectId"], ra=table["coord_ra"], dec=table["coord_dec"]
            ),
            repeats=3,
        )
        what = f"stamps of image, variance and mask, PSF of {psf_size} pixels"
        results.append(Result("cutouts", what, n_objects * len(BANDS) / seconds, "stamps/s/core"))
    return results


def main() -> None:
    """Time a patch of any size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=14, help="cells of 150 pixels on a side of the patch")
    parser.add_argument("--objects", type=int, default=1250, help="number of objects")
    args = parser.parse_args()
    print(format_table(run(quick=False, n_cells=args.cells, n_objects=args.objects)))


if __name__ == "__main__":
    main()

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

"""Time and memory of LensFinderTask on one patch, from files to table.

Run as ``python benchmarks/score_patch.py``; see ``--help``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import astropy.units as u
import numpy as np
from astropy.table import Table

from lsst.daf.butler import Butler
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.cutouts import CutoutExtractor
from lsst.meas.deeplearn.lenses import lens_finder_task
from lsst.meas.deeplearn.model_package import ModelPackage, ingest_model
from lsst.meas.deeplearn.repository import (
    CellSkyMap,
    make_cell_coadd,
    register_dataset_types,
    register_sky_map,
)
from lsst.pipe.base import ExecutionResources, QuantumContext
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor
from lsst.resources import ResourcePath

BANDS = "gri"
MODEL = ResourcePath("eups://meas_deeplearn/models/deeplens_gri.safetensors")


def make_repository(root: str, n_cells: int, n_objects: int) -> None:
    """Make a repository with one patch of noise, PSFs and objects."""
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
    with MODEL.as_local() as local:
        ingest_model(butler, ModelPackage.read(local.ospath), run="models", dataset_type="deeplens_model")


@contextmanager
def timed(seconds: dict[str, float]) -> Iterator[None]:
    """Add up the wall time of the steps of the task by their names."""

    def wrap(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed_function(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return timed_function

    steps = (
        (MultibandCoadd, "read", "reading"),
        (lens_finder_task, "read_objects", "reading"),
        (CutoutExtractor, "__init__", "cutting"),
        (CutoutExtractor, "extract", "cutting"),
        (lens_finder_task, "predict", "network"),
        (lens_finder_task, "find_rings", "RingFinder"),
        (QuantumContext, "put", "writing"),
    )
    with ExitStack() as stack:
        for owner, attribute, name in steps:
            stack.enter_context(mock.patch.object(owner, attribute, wrap(getattr(owner, attribute), name)))
        yield


def main() -> None:
    """Make a repository, run the task on its patch, print the shares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=22, help="cells of 150 pixels on a side of the patch")
    parser.add_argument("--objects", type=int, default=5000, help="number of objects")
    parser.add_argument("--cores", type=int, default=1, help="threads of the network")
    parser.add_argument("--orientations", type=int, default=8, help="orientations averaged: 1 or 8")
    parser.add_argument("--precision", default="float32", help="float32 or bfloat16")
    parser.add_argument("--no-ring-finder", action="store_true", help="run the network alone")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as root:
        # In a process of its own, so that its memory does not count.
        context = multiprocessing.get_context("spawn")
        maker = context.Process(target=make_repository, args=(f"{root}/repo", args.cells, args.objects))
        maker.start()
        maker.join()
        config = lens_finder_task.LensFinderConfig()
        config.inference.averageOrientations = args.orientations
        config.inference.precision = args.precision
        config.doRingFinder = not args.no_ring_finder
        executor = SimplePipelineExecutor.from_task_class(
            lens_finder_task.LensFinderTask,
            config=config,
            butler=SimplePipelineExecutor.prep_butler(
                f"{root}/repo", inputs=["coadds", "models"], output="scores"
            ),
            resources=ExecutionResources(num_cores=args.cores),
        )
        seconds: dict[str, float] = defaultdict(float)
        with timed(seconds):
            start = time.perf_counter()
            executor.run(register_dataset_types=True)
            total = time.perf_counter() - start

    seconds["other"] = total - sum(seconds.values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(
        f"{args.objects} objects, {args.cells * 150} x {args.cells * 150} pixels, {len(BANDS)} bands, "
        f"{args.cores} core(s), {args.precision}, {args.orientations} orientation(s)"
    )
    for name, value in seconds.items():
        print(f"{name:12}{value:8.2f} s {100 * value / total:6.1f} %")
    print(f"{'total':12}{total:8.2f} s  {1e3 * total / args.objects:.2f} ms per object")
    print(f"peak memory {memory:8.2f} GiB")


if __name__ == "__main__":
    main()

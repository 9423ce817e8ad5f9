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


"""Start-up, overhead of a quantum, and how time grows.

Patches run one after the other in one process, as those of a cluster of BPS
do: the first pays for imports, the model and its compilation.
"""

from __future__ import annotations

__all__ = ("run",)

import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
from astropy.table import Table, vstack
from patch import make_published_model, timed
from results import Result, time_calls

from lsst.daf.butler import Butler
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.lenses.lens_finder_task import LensFinderConfig, LensFinderTask
from lsst.meas.deeplearn.model_package import ingest_model
from lsst.meas.deeplearn.tests import make_test_coadds, make_test_repository
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor

N_CELLS, CELL_SIZE = 4, 150
"""Cells on a side of the inner region of a patch, and pixels on a side of a
cell; a patch has a border of one cell."""


def run(*, quick: bool) -> list[Result]:
    """Time start-up, objects, patches and processes.

    Parameters
    ----------
    quick
        Whether to take few objects and patches.
    """
    return _time_start_up() + _time_objects(quick=quick) + _time_patches(quick=quick)


def _time_start_up() -> list[Result]:
    """Time imports, each in a process of its own."""
    results = []
    for what, code in (
        ("import of the task", "import lsst.meas.deeplearn.lenses.lens_finder_task"),
        ("import of torch", "import torch"),
        ("import of OpenVINO", "from lsst.meas.deeplearn.inference import _import_openvino as f; f()"),
    ):
        timed = f"import time; {code}; print(time.process_time())"
        command = [sys.executable, "-c", timed]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            results.append(Result("start-up", what, float(done.stdout), "CPU s"))
    return results


def _make_config() -> LensFinderConfig:
    config = LensFinderConfig()
    config.inference.update(device="cpu", averageOrientations=1)
    config.selection = ["i_psfFlux > 0"]
    config.doRingFinder = False
    return config


def _time_objects(*, quick: bool) -> list[Result]:
    """Time a patch in memory with more and more objects."""
    coadd = MultibandCoadd.from_coadds(make_test_coadds(shape=(900, 900), n_cells=(6, 6)))
    n_objects = 32 if quick else 256
    rng = np.random.default_rng(1)
    x, y = rng.uniform(30, 870, (2, n_objects))
    ra, dec = coadd.pixel_to_sky(x=x + coadd.bbox.x.start, y=y + coadd.bbox.y.start)
    objects = Table({"objectId": np.arange(n_objects), "coord_ra": ra, "coord_dec": dec})
    objects["i_psfFlux"] = 1.0
    task, model = LensFinderTask(config=_make_config()), make_published_model()
    task.run(coadd, objects, [model])
    factors = (1, 2) if quick else (1, 2, 4, 8)
    tables = [vstack([objects] * factor, metadata_conflicts="silent") for factor in factors]
    seconds = time_calls(
        [lambda table=table: task.run(coadd, table, [model]) for table in tables], repeats=1 if quick else 2
    )
    numbers = [len(table) for table in tables]
    results = [Result("scaling", f"{n} objects", s, "CPU s") for n, s in zip(numbers, seconds, strict=True)]
    return results + _fit_line("object", numbers, seconds)


def _fit_line(what: str, numbers: Sequence[int], seconds: Sequence[float]) -> list[Result]:
    """Return the time for a further one, and how far times are off a line."""
    n, times = np.array(numbers, dtype=float), np.array(seconds)
    # Errors of times are fractions of them.
    slope, constant = np.polyfit(n, times, 1, w=1 / times)
    deviation = 100 * (abs(constant + slope * n - times) / times).max()
    return [
        Result("scaling", f"a further {what}", slope, "CPU s"),
        Result("scaling", f"{what}, start of the straight line", constant, "CPU s"),
        Result("scaling", f"{what}, largest deviation from a straight line", deviation, "%"),
    ]


def _time_patches(*, quick: bool) -> list[Result]:
    """Time 1, 2, 4 and 8 small patches in one process, and two processes."""
    numbers = (1, 2) if quick else (1, 2, 4, 8)
    with tempfile.TemporaryDirectory() as folder:
        root = f"{folder}/repo"
        # The same number of objects in each patch, borders included or not.
        n_objects = 40 if quick else 200
        butler = make_test_repository(
            root,
            n_patches=(1, numbers[-1]),
            inner_cells=(N_CELLS, N_CELLS),
            cell_size=CELL_SIZE,
            n_sources=n_objects * numbers[-1],
        )
        ingest_model(butler, make_published_model(), run="models")
        best = dict.fromkeys(numbers, float("inf"))
        scored = dict.fromkeys(numbers, 0)
        for round_ in range(2 if quick else 3):  # The first compiles.
            for n in numbers:
                executor = _make_executor(root, list(range(n)), f"run_{n}_{round_}")
                start = time.process_time()
                executor.run(register_dataset_types=True)
                if round_:
                    best[n] = min(best[n], time.process_time() - start)
                    scored[n] = _count_candidates(executor.butler)
        size = (N_CELLS + 2) * CELL_SIZE
        results = [
            Result("scaling", f"{n} patch(es) of {size}^2, {scored[n]} objects", best[n], "CPU s")
            for n in numbers
        ]
        results += _fit_line("patch", list(best), list(best.values()))
        overhead, reading = _time_overhead(root, butler)
        results.append(Result("scaling", "overhead of a quantum", overhead, "CPU s"))
        results.append(Result("scaling", f"reading a patch of {size}^2", reading, "CPU s"))
        if (os.cpu_count() or 1) > 1:
            results += _time_processes(root, numbers[-1])
    return results


def _count_candidates(butler: Butler) -> int:
    return sum(len(butler.get(ref)) for ref in butler.query_datasets("lens_candidates"))


def _make_executor(root: str, patches: list[int], output: str, **overrides: Any) -> SimplePipelineExecutor:
    config = _make_config()
    config.update(**overrides)
    butler = SimplePipelineExecutor.prep_butler(root, inputs=["test/coadds", "models"], output=output)
    where = f"skymap='test' AND tract=0 AND patch IN ({','.join(map(str, patches))})"
    return SimplePipelineExecutor.from_task_class(LensFinderTask, config=config, butler=butler, where=where)


def _time_overhead(root: str, butler: Butler) -> tuple[float, float]:
    """Return the CPU time of a quantum without that of reading its coadds,
    and that.

    A further quantum of a process, which finds no objects to score.
    """
    patches = sorted({int(ref.dataId["patch"]) for ref in butler.query_datasets("deep_coadd")})
    totals, readings = [], []
    for chosen in (patches[:1], patches):
        executor = _make_executor(
            root, chosen, f"overhead_{len(chosen)}", selection=["i_psfFlux > 1e30"], psfSize=1
        )
        seconds: dict[str, float] = defaultdict(float)
        with timed(seconds):
            start = time.process_time()
            executor.run(register_dataset_types=True)
            totals.append(time.process_time() - start - seconds["read"])
        readings.append(seconds["read"])
    n = len(patches) - 1
    return (totals[1] - totals[0]) / n, (readings[1] - readings[0]) / n


def _run_patches(
    root: str, patches: list[int], output: str, started: Barrier, queue: SimpleQueue[tuple[float, float]]
) -> None:
    """Run patches, and send how long it took and what of a core it had."""
    _make_executor(root, patches[:1], f"{output}_first").run(register_dataset_types=True)
    executor = _make_executor(root, patches, output)
    started.wait()
    start, cpu_start = time.perf_counter(), time.process_time()
    executor.run(register_dataset_types=True)
    seconds = time.perf_counter() - start
    queue.put((seconds, (time.process_time() - cpu_start) / seconds))


def _time_processes(root: str, n_patches: int) -> list[Result]:
    """Time two processes against one by the clock, both after start-up.

    Each has a copy of the repository, as quanta of BPS write into no registry
    for which they would wait for each other.
    """
    context = multiprocessing.get_context("spawn")
    best = {1: (float("inf"), 0.0), 2: (float("inf"), 0.0)}
    for round_, n_processes in itertools.product(range(2), best):
        started, queue = context.Barrier(n_processes), context.SimpleQueue()
        for k in range(n_processes):
            shutil.copytree(root, f"{root}_{n_processes}_{k}_{round_}")
        processes = [
            context.Process(
                target=_run_patches,
                args=(
                    f"{root}_{n_processes}_{k}_{round_}",
                    list(range(k, n_patches, n_processes)),
                    f"processes_{n_processes}_{k}",
                    started,
                    queue,
                ),
            )
            for k in range(n_processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        seconds, shares = zip(*(queue.get() for _ in processes), strict=True)
        best[n_processes] = min(best[n_processes], (max(seconds), sum(shares)))
    (one, cores), (two, both_cores) = best.values()
    return [
        Result("scaling", "two processes against one, by the clock", one / two, "x"),
        Result("scaling", "    cores that one had, and two", cores, f"and {both_cores:.2f}"),
    ]

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


"""Cutouts per (CPU) second of the simulation of lenses, by stage.

Run as ``python benchmarks/simulate_lenses.py``; see ``--help``.  Stamps are
those of the default configuration: 55 x 55 pixels in g, r and i with PSF
kernels of 25 x 25 pixels, and 16 rays a pixel.  Nothing is read or written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before numpy and torch load their libraries.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from astropy.table import Table

from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.lenses.contaminants import PAINTERS, paint_contaminants
from lsst.meas.deeplearn.lenses.lens_population import assign_source_images, sample_lens_population
from lsst.meas.deeplearn.lenses.simulate_lenses_task import SimulateLensesConfig
from lsst.meas.deeplearn.lenses.simulation import paint_lenses, render_arcs
from lsst.meas.deeplearn.lenses.source_images import SourceImages

BANDS = ("g", "r", "i")
PIXEL_SCALE = 0.2
"""In arcsec."""

GAIN = dict.fromkeys(BANDS, 200.0)


def make_hosts(n: int, config: SimulateLensesConfig) -> Cutouts:
    """Make stamps of noise, with Gaussian PSFs."""
    rng = np.random.default_rng(1)
    shape = (n, len(BANDS), config.stampSize, config.stampSize)
    r2 = np.sum((np.indices((config.psfSize,) * 2) - config.psfSize // 2) ** 2, axis=0)
    psf = np.exp(-0.5 * r2 / 1.7**2)
    return Cutouts(
        bands=BANDS,
        pixel_scale=PIXEL_SCALE,
        ids=np.arange(n),
        ra=np.zeros(n),
        dec=np.zeros(n),
        x=np.zeros(n),
        y=np.zeros(n),
        image=rng.standard_normal(shape, dtype=np.float32),
        variance=np.ones(shape, dtype=np.float32),
        bad=np.zeros(shape, dtype=bool),
        psf=np.broadcast_to(psf / psf.sum(), (*shape[:2], *psf.shape)).astype(np.float32),
        off_edge=np.zeros(n, dtype=bool),
        missing_band=np.zeros(shape[:2], dtype=bool),
        missing_cell=np.zeros(shape[:2], dtype=bool),
    )


def make_images(n: int = 50, size: int = 128) -> SourceImages:
    """Make images of round sources, as large as those of COSMOS."""
    y, x = np.indices((size, size)) - size // 2
    return SourceImages.from_arrays(np.tile(np.exp(-np.hypot(x, y) / 6.0), (n, 1, 1)), 0.03)


def measure(function: Callable[[], Any], n: int, device: str, repeats: int) -> float:
    """Return cutouts per second, the best of some runs.

    On a CPU these are seconds of the processor, all threads together, which
    other processes disturb less; on a GPU of the clock.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    seconds = []
    for _ in range(repeats):
        start = clock()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return n / min(seconds)


def measure_rendering(
    lenses: Table, hosts: Cutouts, images: SourceImages | None, device: str, batch: int, repeats: int
) -> float:
    """Return arcs per second on a device, PSF and all bands included."""

    def render() -> None:
        render_arcs(
            lenses,
            bands=BANDS,
            pixel_scale=PIXEL_SCALE,
            size=hosts.size,
            psf=hosts.psf,
            images=images,
            batch_size=batch,
            device=device,
        )

    return measure(render, len(lenses), device, repeats)


def main() -> None:
    """Measure all stages, print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=256, help="number of cutouts")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each stage, of which the best counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    config = SimulateLensesConfig()
    n, repeats = args.n, args.repeats
    hosts = make_hosts(n, config)
    lenses = sample_lens_population(n, seed=1, bands=BANDS)
    images = make_images()
    with_images = assign_source_images(lenses, images.ids, fraction=1.0, seed=1)
    flux = np.tile([2e3, 6e3, 1e4], (n, 1))

    rates: dict[str, float] = {}
    rates["draw from the prior"] = measure(
        lambda: sample_lens_population(n, seed=1, bands=BANDS), n, "cpu", repeats
    )
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for batch in (16, 64) if device == "cpu" else (64, 512):
            for what, table in (("profiles", lenses), ("images", with_images)):
                rate = measure_rendering(
                    table, hosts, images if table is with_images else None, device, batch, repeats
                )
                rates[f"render arcs of {what}, {device}, batch {batch}"] = rate
    rates["paint lenses: arcs, noise, signal to noise"] = measure(
        lambda: paint_lenses(hosts, lenses, gain=GAIN), n, "cpu", repeats
    )
    kinds = [kind for kind in config.nonLenses.values() if kind.painter]
    for kind in kinds:
        rates[f"paint {kind.painter}"] = measure(
            lambda painter=kind.painter: paint_contaminants(hosts, painter, flux, gain=GAIN),
            n,
            "cpu",
            repeats,
        )
    assert len(kinds) == len(PAINTERS)
    # Seconds for one lens and what goes with it, in the default proportions;
    # those that are only chosen cost nothing here.
    total = sum(kind.fraction for kind in config.nonLenses.values())
    seconds = 1 / rates["draw from the prior"] + 1 / rates["paint lenses: arcs, noise, signal to noise"]
    for kind in kinds:
        seconds += config.nonLensRatio * kind.fraction / total / rates[f"paint {kind.painter}"]
    rates["all, in default proportions"] = (1 + config.nonLensRatio) / seconds

    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(
        f"{n} cutouts, best of {repeats}, {args.threads} thread(s), {platform.machine()}, GPU {device_name}"
    )
    print(f"{'':45}{'cutouts / s':>12}{'ms each':>10}")
    for name, rate in rates.items():
        print(f"{name:45}{rate:12.0f}{1e3 / rate:10.2f}")
    if args.json:
        record = {
            "cutouts": n,
            "repeats": repeats,
            "threads": args.threads,
            "machine": platform.machine(),
            "gpu": device_name,
            "torch": torch.__version__,
            "cutouts_per_second": rates,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

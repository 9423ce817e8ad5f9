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


"""What a survey costs, from measured rates.

A patch costs the reading of its planes, the overhead of its quantum, and for
each object the cutting, the scaling and the network.  Readers are CPU cores;
the network runs on the same cores or on GPUs, at the same time.  Assumed are
that reading grows with the pixels, that cores and GPUs do not hinder each
other, and that files come as fast as cores decompress them.

Run as ``python benchmarks/survey_cost.py benchmarks.json``; see ``--help``.
"""

from __future__ import annotations

__all__ = ("Rates", "Survey", "check", "compute_hours", "project")

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

from results import Result, format_table


@dataclasses.dataclass(frozen=True)
class Rates:
    """CPU time on one core, as measured."""

    read: float
    """Reading a million pixels of one band, in s."""

    quantum: float
    """Overhead of a quantum and of opening its files, in s."""

    cut: float
    """Cutting, scaling and writing an object, in s."""

    network: float
    """The network for an object on a core, in s."""

    start_up: float
    """Imports of a process, in s."""

    first: float
    """What the first patch of a process costs more, in s."""


@dataclasses.dataclass(frozen=True)
class Survey:
    """What there is to do."""

    area: float = 18_000.0
    """Area in square degrees."""

    density: float = 1e8 / 18_000
    """Objects to score in a square degree; the default makes 1e8."""

    patch_side: float = 3000.0
    """Side of the inner region of a patch, in pixels."""

    border: float = 600.0
    """Pixels by which a patch is wider, on both sides together."""

    pixel_scale: float = 0.2
    """Side of a pixel in arcsec."""

    n_bands: int = 3
    """Number of bands."""

    patches_per_process: int = 100
    """Patches of a tract or cluster, which share a start-up."""

    @property
    def n_patches(self) -> float:
        """Number of patches."""
        return self.area / (self.patch_side * self.pixel_scale / 3600) ** 2

    @property
    def n_objects(self) -> float:
        """Number of objects to score."""
        return self.area * self.density


def compute_hours(
    survey: Survey, rates: Rates, *, n_cores: int, n_gpus: int = 0, gpu_seconds: float = 5e-6
) -> tuple[float, str]:
    """Return the hours that a survey takes, and what limits it.

    Parameters
    ----------
    survey
        What there is to do.
    rates
        Measured rates.
    n_cores
        Number of CPU cores.
    n_gpus
        Number of GPUs; without any the network runs on the cores.
    gpu_seconds
        Time of the network for an object on a GPU, in s.
    """
    mega_pixels = (survey.patch_side + survey.border) ** 2 / 1e6
    overlap = ((survey.patch_side + survey.border) / survey.patch_side) ** 2
    reading = survey.n_patches * survey.n_bands * mega_pixels * rates.read
    start = (rates.start_up + rates.first) / survey.patches_per_process
    fixed = survey.n_patches * (rates.quantum + start)
    # Objects of the border are scored by both patches.
    objects = survey.n_objects * overlap
    cores = {"reading": reading, "overhead": fixed, "cutting": objects * rates.cut}
    network = objects * (gpu_seconds if n_gpus else rates.network)
    if not n_gpus:
        cores["network"] = network
    hours = sum(cores.values()) / n_cores / 3600
    limit = max(cores, key=lambda name: cores[name])
    if n_gpus and network / n_gpus / 3600 > hours:
        return network / n_gpus / 3600, "network"
    return hours, limit


def find_rates(results: Sequence[Result]) -> Rates:
    """Return the rates among the figures of the benchmarks.

    Parameters
    ----------
    results
        Figures of ``patch`` and ``scaling``.

    Raises
    ------
    ValueError
        Raised if figures are missing.
    """
    steps: dict[str, float] = {}
    inside = False
    for result in results:
        if result.benchmark != "patch":
            continue
        if match := re.match(r"naive, (\d+)\^2 x (\d) bands, (\d+) objects", result.what):
            mega_pixels = int(match[1]) ** 2 / 1e6 * int(match[2])
            n_objects = int(match[3])
        if not result.what.startswith(" "):
            inside = result.what == "openvino float32"
        elif inside:
            steps[result.what.split()[0]] = result.value
    others = {result.what: result.value for result in results}
    small = {
        int(match[1]): result.value
        for result in results
        if (match := re.match(r"reading a patch of (\d+)\^2", result.what))
    }
    try:
        # To open a file costs as much whatever its size.
        ((side, seconds),) = small.items()
        few_pixels = Survey.n_bands * side**2 / 1e6
        read = (steps["read"] - seconds) / (mega_pixels - few_pixels)
        return Rates(
            read=read,
            quantum=others["overhead of a quantum"] + seconds - read * few_pixels,
            cut=(steps["cut"] + steps["scale"] + steps["other"]) / n_objects,
            network=steps["network"] / n_objects,
            start_up=others["import of the task"] + others["import of torch"],
            first=others["patch, start of the straight line"],
        )
    except (KeyError, UnboundLocalError, ValueError) as err:
        raise ValueError("The figures of 'patch' and 'scaling' are needed; run both.") from err


def check(results: Sequence[Result]) -> list[Result]:
    """Return how far the rates predict the times of 1, 2, 4, 8 patches.

    The patches differ in size and in number of objects from the one that the
    rates were measured on.  What the first costs more is that of the straight
    line through the same times.

    Parameters
    ----------
    results
        Figures of ``patch`` and ``scaling``.
    """
    rates = find_rates(results)
    checks = []
    for result in results:
        match = re.match(r"(\d+) patch\(es\) of (\d+)\^2, (\d+) objects", result.what)
        if result.benchmark != "scaling" or match is None:
            continue
        n, side, n_objects = (int(group) for group in match.groups())
        pixels = n * Survey.n_bands * side**2 / 1e6
        objects = (rates.cut + rates.network) * n_objects
        predicted = rates.first + rates.quantum * n + rates.read * pixels + objects
        what = f"{result.what}: model against measurement"
        checks.append(Result("survey", what, predicted / result.value, ""))
    return checks


def project(results: Sequence[Result]) -> list[Result]:
    """Return the cost of a survey for some machines.

    Parameters
    ----------
    results
        Figures of ``patch`` and ``scaling``.
    """
    rates = find_rates(results)
    projected = []
    for density in (1e8 / 18_000, 2e4):
        survey = Survey(density=density)
        title = f"18,000 deg2, {survey.n_objects:.0e} objects"
        for n_cores, n_gpus in ((2, 0), (64, 0), (16, 1), (1024, 8)):
            hours, limit = compute_hours(survey, rates, n_cores=n_cores, n_gpus=n_gpus)
            what = f"{title}, {n_cores} cores, {n_gpus} GPUs: {limit}"
            projected.append(Result("survey", what, hours, "h (projected)"))
    return projected


def main() -> None:
    """Project from a file of figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what 'python benchmarks --json' wrote")
    parser.add_argument("--cores", type=int, default=64, help="number of CPU cores")
    parser.add_argument("--gpus", type=int, default=0, help="number of GPUs")
    parser.add_argument("--gpu-us", type=float, default=5.0, help="us of a GPU for an object; not measured")
    for field in dataclasses.fields(Survey):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default, help="as in Survey")
    args = parser.parse_args()
    results = [Result(**result) for result in json.loads(args.results.read_text())["results"]]
    survey = Survey(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Survey)})
    rates = find_rates(results)
    hours, limit = compute_hours(
        survey, rates, n_cores=args.cores, n_gpus=args.gpus, gpu_seconds=args.gpu_us * 1e-6
    )
    what = f"{survey.n_patches:.0f} patches, {survey.n_objects:.3g} objects: limited by {limit}"
    print(rates)
    print(format_table([Result("survey", what, hours, "h")]))


if __name__ == "__main__":
    main()

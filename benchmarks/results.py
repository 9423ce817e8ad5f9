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


"""What benchmarks measure, as a table and as JSON."""

from __future__ import annotations

__all__ = (
    "Result",
    "compute_seconds",
    "describe_machine",
    "format_table",
    "time_calls",
    "time_on_cores",
)

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
    """One figure."""

    benchmark: str
    """What was run, such as ``network``."""

    what: str
    """What was measured."""

    value: float
    """The figure."""

    unit: str
    """Its unit."""

    ratio: float | None = None
    """How many times faster than the peer, in the same process on the same
    inputs."""

    peer: str = ""
    """The peer."""


def compute_seconds(call: Callable[[], object], *, repeats: int) -> float:
    """Return the least CPU time of some calls, after one that is not timed.

    CPU time of all threads together is what a core of this machine needs,
    also when other programs share it.

    Parameters
    ----------
    call
        What to time.
    repeats
        Number of timed calls.
    """
    return time_calls([call], repeats=repeats)[0]


def time_calls(calls: Iterable[Callable[[], object]], *, repeats: int) -> list[float]:
    """Return the least CPU time of each of some calls, timed by turns.

    By turns, so that what else the machine does is the same for all.

    Parameters
    ----------
    calls
        What to time.
    repeats
        Number of rounds, after one that is not timed.
    """
    calls = list(calls)
    best = [float("inf")] * len(calls)
    for round_ in range(repeats + 1):
        for k, call in enumerate(calls):
            start = time.process_time()
            call()
            if round_:
                best[k] = min(best[k], time.process_time() - start)
    return best


def time_on_cores(call: Callable[[], object], *, repeats: int) -> tuple[float, float]:
    """Return the least wall time of some calls, after one that is not timed.

    Parameters
    ----------
    call
        What to time.
    repeats
        Number of timed calls.

    Returns
    -------
    seconds
        Wall time.
    cores
        Cores that this process had meanwhile; less than it has threads tells
        that they waited, or that the machine was shared.
    """
    call()
    times = []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        call()
        seconds = time.perf_counter() - start
        times.append((seconds, (time.process_time() - cpu_start) / seconds))
    return min(times)


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, load, versions, date."""
    import torch

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    flags = set(fields.get("flags", "").split())
    versions = {}
    for name in ("torch", "openvino", "numpy", "lsst-images", "astropy"):
        try:
            versions[name] = version(name)
        except ImportError:
            versions[name] = "not installed"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "features": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "versions": versions,
    }


def format_table(results: Iterable[Result]) -> str:
    """Return the figures as lines of text.

    Parameters
    ----------
    results
        The figures.
    """
    lines = []
    for result in results:
        ratio = f"{result.ratio:6.2f} x {result.peer}" if result.ratio is not None else ""
        lines.append(f"{result.benchmark:12}{result.what:58}{result.value:12.4g} {result.unit:18}{ratio}")
    return "\n".join(line.rstrip() for line in lines)

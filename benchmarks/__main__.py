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


"""All benchmarks by one command: ``python benchmarks [--quick] [NAME...]``.

Prints one table, and writes it as JSON where ``--json`` says.  Times are CPU
times of one core unless the unit says otherwise; peers run in the same
process on the same inputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

# Before numpy and torch load their libraries: one core.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import network
import patch
import scaling
import survey_cost
from results import Result, describe_machine, format_table

OWN = {"network": network.run, "patch": patch.run, "scaling": scaling.run}
"""Benchmarks that return figures."""

OTHERS = {
    "simulate_lenses": ["-n", "16", "--repeats", "1"],
    "train_lens_finder": ["--steps", "1", "--batch-size", "8"],
    "generate_galaxies": ["--quick"],
    "measure_shear": ["--stamps", "64", "--seconds", "0.1"],
}
"""Scripts that print their own tables, with the options for ``--quick``."""


def main() -> None:
    """Run the benchmarks that are asked for."""
    names = [*OWN, *OTHERS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--json", type=Path, default=Path("benchmarks.json"), help="file to write")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"There is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}.")
    wanted = args.names or names

    machine = describe_machine()
    print(json.dumps(machine, indent=2), flush=True)
    results: list[Result] = []
    for name, run in OWN.items():
        if name in wanted:
            figures = run(quick=args.quick)
            print(format_table(figures), flush=True)
            results += figures
    if set(OWN) <= set(wanted):
        figures = survey_cost.check(results) + survey_cost.project(results)
        print(format_table(figures), flush=True)
        results += figures
    printed = {}
    for name, options in OTHERS.items():
        if name in wanted:
            command = [sys.executable, str(Path(__file__).with_name(f"{name}.py"))]
            done = subprocess.run(
                command + (options if args.quick else []), capture_output=True, text=True, check=False
            )
            printed[name] = done.stdout if done.returncode == 0 else done.stdout + done.stderr
            print(f"\n{name}\n{printed[name]}", flush=True)
    content = {
        "machine": machine,
        "quick": args.quick,
        "results": [dataclasses.asdict(result) for result in results],
        "printed": printed,
    }
    args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

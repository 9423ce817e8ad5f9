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


"""The bars of the lens finder, with intervals of 95 per cent, in one table.

Model packages are measured on test examples of `SimulateLensesTask` and on
objects of fields without lenses that `LensFinderTask` scored: of the ensemble
if they were scored with all the models, and of a network alone if they were
scored with that one.  What is not given is not measured.

Run as ``python benchmarks/lens_bars.py MODELS... --examples "10 years" REPO
COLLECTION --blank REPO COLLECTION``; see ``--help``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from astropy.table import Table

from lsst.daf.butler import Butler
from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.inference import InferenceConfig
from lsst.meas.deeplearn.lenses import challenge
from lsst.meas.deeplearn.lenses.degradation import add_noise
from lsst.meas.deeplearn.lenses.evaluate_lens_finder_task import (
    ENSEMBLE,
    REAL,
    EvaluateLensFinderConfig,
    EvaluateLensFinderTask,
    list_models,
)
from lsst.meas.deeplearn.metrics import Fraction
from lsst.meas.deeplearn.model_package import ModelPackage

CLEAR = "einstein_radius > 1.4, arc_snr > 20"
COLUMNS = ("bar", "set", "lens finder", "lenses", "others", "measured", "interval", "asked", "met")


def read_tables(repository: str, collection: str, dataset_type: str) -> Iterator[Table]:
    """Yield the tables of a collection, of one patch after the other."""
    with Butler.from_config(repository, collections=collection) as butler:
        refs = butler.query_datasets(dataset_type, limit=None)
        for ref in sorted(refs, key=lambda ref: tuple(ref.dataId.required_values)):
            yield butler.get(ref)


def read_examples(repository: str, collection: str, limit: int | None, noise: float = 1.0) -> Iterator[Table]:
    """Yield examples that no network has learnt from.

    With more noise than they have, arcs that fall below the smallest signal
    to noise of the simulation are left out.
    """
    rng = np.random.default_rng(2)
    for table in read_tables(repository, collection, "lens_training_cutouts"):
        chosen = np.flatnonzero(np.isin(table["split"], ("calibration", "test")))
        if limit is not None:
            # Kinds follow each other in a table.
            chosen = np.sort(np.random.default_rng(1).permutation(chosen)[:limit])
        if len(chosen):
            yield table[chosen] if noise == 1 else make_shallow(table[chosen], noise, rng)


def make_shallow(table: Table, noise: float, rng: np.random.Generator) -> Table:
    """Return examples in more noise."""
    smallest = np.nanmin(table["arc_snr"])
    stamps = add_noise(Cutouts.from_table(table), noise, rng)
    shallow = table.copy()
    shallow["image"], shallow["variance"] = stamps.image, stamps.variance
    shallow["arc_snr"] /= noise
    return shallow[~(shallow["arc_snr"] < smallest)]


class Bars:
    """Rows of the table."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def add(self, bar: str, name: str, row: Mapping[str, object], asked: str) -> None:
        """Add a row of the metrics; ``asked`` is as ">= 0.95"."""
        value, low, high = (float(str(row[key])) for key in ("value", "low", "high"))
        sign, _, number = asked.partition(" ")
        met = {"": "", ">=": value >= float(number or 0), "<=": value <= float(number or 0)}[sign]
        self.rows.append(
            {
                "bar": bar,
                "set": name,
                "lens finder": str(row["classifier"]),
                "lenses": str(row["n_positive"]),
                "others": str(row["n_negative"]),
                "measured": f"{value:.4f}",
                "interval": f"{low:.4f} to {high:.4f}" if np.isfinite(low) else str(row.get("note", "")),
                "asked": asked,
                "met": {True: "yes", False: "no", "": ""}[met],
            }
        )

    def print(self) -> None:
        """Print the table as reStructuredText has it."""
        cells = [dict(zip(COLUMNS, COLUMNS, strict=True)), *self.rows]
        widths = [max(len(cell[name]) for cell in cells) for name in COLUMNS]
        line = "  ".join("=" * width for width in widths)
        for k, cell in enumerate(cells):
            if k < 2:
                print(line)
            print("  ".join(cell[name].ljust(width) for name, width in zip(COLUMNS, widths)).rstrip())
        print(line)


def make_task(*, ring_finder: bool, probe: bool, robustness: int = 0) -> EvaluateLensFinderTask:
    """Make the evaluation with what the bars need."""
    config = EvaluateLensFinderConfig()
    config.doColors = False
    config.doRingFinder = ring_finder
    config.doProbe = probe
    config.maxRobustness = robustness
    return EvaluateLensFinderTask(config=config)


def find(metrics: Table, metric: str, subset: str = "all") -> Table:
    """Return the rows of a metric, networks first."""
    return metrics[(metrics["metric"] == metric) & (metrics["subset"] == subset)]


def measure_examples(bars: Bars, name: str, metrics: Table, networks: set[str]) -> None:
    """Add the bars that examples alone measure."""
    for subset, title in ((f"{REAL}, {CLEAR}", REAL), (CLEAR, "all kinds of others")):
        for row in find(metrics, "tpr_at_fpr_0.01", subset):
            if row["classifier"] in networks:
                bars.add(f"TPR at FPR 1e-2, clear lenses, {title}", name, row, ">= 0.95")
    for subset, title in (("all", "all lenses"), (CLEAR, "clear lenses")):
        (ring,) = find(metrics, "decision_tpr", subset)
        for row in find(metrics, "tpr_at_ringfinder_fpr", subset):
            if row["classifier"] in networks:
                asked = f">= {2 * ring['value']:.4f}"
                bars.add(f"TPR at FPR {row['note'][7:-1]} of RingFinder, {title}", name, row, asked)
        bars.add(f"TPR of RingFinder, {title}", name, ring, "")
    for metric, title in (("ece_of_package", "of the package"), ("ece", "made on the same sky")):
        for row in find(metrics, metric):
            if row["classifier"] in networks:
                bars.add(f"error of the calibration {title}", name, row, "<= 0.02")


def measure_changes(bars: Bars, name: str, metrics: Table, networks: set[str]) -> None:
    """Add what changes of the stamps do."""
    subsets = metrics["subset"][metrics["metric"] == "auroc"].tolist()
    for subset in dict.fromkeys(subsets[subsets.index("unchanged") :]):
        for row in find(metrics, "auroc", subset):
            if row["classifier"] in networks:
                bars.add(f"AUROC, {subset}", name, row, "")


def measure_blank(bars: Bars, models: list[ModelPackage], args: argparse.Namespace) -> None:
    """Add the bars at low false-positive rates."""
    name, *examples = args.examples[0]
    for repository, collection in args.blank:
        tables = list(read_tables(repository, collection, "lens_candidates"))
        used = {model for table in tables if len(table) for model in list_models(table)}
        chosen = [model for model in models if f"{model.name} {model.version}" in used]
        task = make_task(ring_finder=False, probe=False)
        result = task.run(
            read_examples(examples[0], examples[1], args.limit), chosen, blank=tables, num_cores=args.threads
        )
        for fpr, asked in ((1e-2, ""), (1e-3, ">= 0.50" if len(chosen) > 1 else ">= 0.40"), (1e-4, "")):
            for row in find(result.metrics, f"tpr_at_fpr_{fpr:g}", "blank fields"):
                bars.add(f"TPR at FPR {fpr:g} of blank fields, all lenses", name, row, asked)


def measure_challenge(bars: Bars, args: argparse.Namespace) -> None:
    """Add the bars of the challenge of Bologna."""
    root, key, package = args.challenge
    images, catalog = challenge.find_images(root, "ground"), challenge.read_catalog(key)
    ids = [int(number) for number in catalog["ID"] if int(number) in images]
    model = ModelPackage.read(package)
    scores = challenge.score_images(
        images, ids, "ground", [model], InferenceConfig(), num_threads=args.threads
    )
    found = challenge.score_challenge(dict(scores), catalog)
    half = 1.96 * found.auroc_error
    auroc = Fraction(found.auroc, found.auroc - half, min(found.auroc + half, 1.0), len(ids))
    counts = {"n_positive": found.n_lenses, "n_negative": found.n_non_lenses, "classifier": model.name}
    for title, value, asked in (
        ("AUROC", auroc, ">= 0.98"),
        ("TPR10", found.tpr10, ">= 0.45"),
        ("TPR0", found.tpr0, ""),
    ):
        bars.add(title, "challenge, ground", dataclasses.asdict(value) | counts, asked)


def main() -> None:
    """Measure what is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="model packages (.safetensors) of the ensemble")
    parser.add_argument(
        "--examples", nargs=3, action="append", required=True, metavar=("NAME", "REPO", "COLLECTION")
    )
    parser.add_argument(
        "--noise",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FACTOR"),
        help="measure the first examples with the noise times FACTOR too: 3.16 makes 1 year of 10, 13.6 one "
        "of the 184 visits in r and i",
    )
    parser.add_argument("--blank", nargs=2, action="append", default=[], metavar=("REPO", "COLLECTION"))
    parser.add_argument("--sersic", nargs=2, metavar=("REPO", "COLLECTION"))
    parser.add_argument("--challenge", nargs=3, metavar=("ROOT", "KEY", "PACKAGE"))
    parser.add_argument("--limit", type=int, help="number of examples of each patch; all if not given")
    parser.add_argument(
        "--robustness", type=int, default=0, help="number of examples of each patch to change as bad data do"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of the networks")
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    models = [ModelPackage.read(path) for path in args.models]
    networks = {f"{model.name} {model.version}" for model in models} | {ENSEMBLE}
    bars = Bars()
    sets = {name: (*place, 1.0) for name, *place in args.examples}
    sets |= {name: (*args.examples[0][1:], float(noise)) for name, noise in args.noise}
    if args.sersic:
        sets["plain Sersic sources"] = (*args.sersic, 1.0)
    for name, (repository, collection, noise) in sets.items():
        plain = name == "plain Sersic sources"
        task = make_task(ring_finder=not plain, probe=noise == 1, robustness=args.robustness)
        metrics = task.run(
            read_examples(repository, collection, args.limit, noise), models, num_cores=args.threads
        ).metrics
        if not plain:
            measure_examples(bars, name, metrics, networks)
        if args.robustness:
            measure_changes(bars, name, metrics, networks)
        for row in metrics[metrics["metric"] == "probe_auroc"]:
            bars.add(f"AUROC of a linear probe, {row['subset']}", name, row, "")
    measure_blank(bars, models, args)
    if args.challenge:
        measure_challenge(bars, args)
    bars.print()
    if args.json:
        args.json.write_text(json.dumps(bars.rows, indent=1))


if __name__ == "__main__":
    main()

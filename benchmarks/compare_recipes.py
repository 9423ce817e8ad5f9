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


"""What each choice of a recipe is worth, measured on validation examples.

Small networks are trained, from the same first weights and for as many
stamps, with the recipe ``config/trainLensFinder_robust.py``, with that recipe
less one choice, and with the published one.  What each finds on validation
examples, as they are and changed, is printed: areas under the ROC curve with
standard errors.

Run as ``python benchmarks/compare_recipes.py REPO --train COLLECTION
--measure NAME COLLECTION``; see ``--help``.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from astropy.table import Table
from lens_bars import make_shallow, read_tables

from lsst.meas.deeplearn.lenses.evaluate_lens_finder_task import (
    ENSEMBLE,
    EvaluateLensFinderConfig,
    EvaluateLensFinderTask,
)
from lsst.meas.deeplearn.lenses.train_lens_finder_task import TrainLensFinderConfig, TrainLensFinderTask
from lsst.meas.deeplearn.model_package import ModelPackage

CONFIG = Path(__file__).parents[1] / "config"

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "robust": ("robust", {}),
    "linear": ("robust", {"softening": 0.0}),
    "no shift": ("robust", {"augmentation.maxShift": 0}),
    "no turn": ("robust", {"augmentation.warpFraction": 0.0}),
    "no blur": ("robust", {"augmentation.maxBlur": 0.0}),
    "no noise": ("robust", {"augmentation.maxNoise": 1.0}),
    "no scatter": ("robust", {"augmentation.fluxScatter": 0.0, "augmentation.offsetScatter": 0.0}),
    "no missing band": ("robust", {"augmentation.missingBandFraction": 0.0}),
    "no masks": ("robust", {"augmentation.maskedFraction": 0.0}),
    "hosts as others": ("robust", {"kindWeights": {}}),
    "published": ("published", {}),
}
"""Configuration file, and what is changed in it."""

NETWORK = {"width": 0.25, "blocks": 1}


def make_config(recipe: str, args: argparse.Namespace) -> TrainLensFinderConfig:
    """Return the configuration of a training."""
    file, changes = RECIPES[recipe]
    config = TrainLensFinderConfig()
    config.load(str(CONFIG / f"trainLensFinder_{file}.py"))
    config.modelName = recipe
    config.network = NETWORK
    config.epochs = args.epochs
    config.precision = args.precision
    config.seed = args.seed
    for name, value in changes.items():
        *parents, last = name.split(".")
        place: Any = config
        for parent in parents:
            place = getattr(place, parent)
        setattr(place, last, value)
    return config


def read_validation(args: argparse.Namespace, collection: str, noise: float) -> Iterator[Table]:
    """Yield validation examples, as the examples of a test."""
    rng = np.random.default_rng(1)
    for table in read_tables(args.repository, collection, "lens_training_cutouts"):
        rows = rng.permutation(np.flatnonzero(table["split"] == "validation"))[: args.limit]
        chosen = table[np.sort(rows)]
        chosen["split"][:] = "test"
        if len(chosen):
            yield make_shallow(chosen, noise, rng) if noise > 1 else chosen


def make_evaluation(n_changed: int) -> EvaluateLensFinderTask:
    """Return the task that measures, with so many changed stamps a patch."""
    config = EvaluateLensFinderConfig()
    config.doColors = config.doRingFinder = config.doProbe = False
    config.inference.averageOrientations = 1
    config.maxRobustness = n_changed
    return EvaluateLensFinderTask(config=config)


def measure(models: list[ModelPackage], args: argparse.Namespace) -> list[dict[str, object]]:
    """Return areas under the ROC curve of all models."""
    rows = []
    for name, collection in args.measure:
        for noise in (1.0, 3.16):
            task = make_evaluation(args.limit if noise == 1 else 0)
            metrics = task.run(
                read_validation(args, collection, noise), models, num_cores=args.threads
            ).metrics
            for row in metrics[metrics["metric"] == "auroc"]:
                subset = str(row["subset"])
                if (
                    row["classifier"] == ENSEMBLE
                    or subset == "unchanged"
                    or (noise > 1 and subset != "all")
                    or any(word in subset for word in ("kind", "others", "einstein_radius"))
                ):
                    continue
                rows.append(
                    {
                        "recipe": str(row["classifier"]),
                        "set": name,
                        "change": f"noise x {noise:g}" if noise > 1 else subset,
                        "auroc": float(row["value"]),
                        "error": float(row["high"] - row["low"]) / 3.92,
                        "lenses": int(row["n_positive"]),
                        "others": int(row["n_negative"]),
                    }
                )
    return rows


def main() -> None:
    """Train, measure, and print a line for each recipe and change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("repository")
    parser.add_argument("--train", nargs="+", required=True, metavar="COLLECTION")
    parser.add_argument("--measure", nargs=2, action="append", required=True, metavar=("NAME", "COLLECTION"))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--limit", type=int, default=200, help="validation examples of each patch")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the rows")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    tables = [
        table
        for collection in args.train
        for table in read_tables(args.repository, collection, "lens_training_cutouts")
    ]
    models = []
    for recipe in args.recipes:
        start = time.process_time()
        task = TrainLensFinderTask(config=make_config(recipe, args))
        models.append(task.run(tables, num_cores=args.threads).model)
        print(f"Trained {recipe}: {time.process_time() - start:.0f} s of CPU time", flush=True)
    del tables
    rows = measure(models, args)
    for row in rows:
        print(
            "{recipe:16} {set:16} {change:32} {auroc:.4f} +- {error:.4f} {lenses:6} {others:6}".format(**row)
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

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


"""The command ``lens-challenge``: simulate, train, score, judge."""

from __future__ import annotations

__all__ = ("main",)

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
from astropy.table import Table, vstack

from ..inference import InferenceConfig
from ..model_package import ModelPackage, ModelPackageError
from ..patch_inputs import compute_seed
from .challenge import (
    BRANCHES,
    CHUNK,
    ChallengeError,
    find_images,
    make_training_table,
    read_catalog,
    read_cutouts,
    read_submission,
    score_challenge,
    score_images,
    write_submission,
)
from .lens_network import EvaluationError

SIMULATED_TOGETHER = 250
"""Number of objects that are simulated together."""


@click.group()
def main() -> None:
    """Take part in the lens finding challenge of Metcalf et al. (2019)."""


_root = click.argument("root", type=click.Path(exists=True, file_okay=False, path_type=Path))
_catalog = click.argument("catalog", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_branch = click.option(
    "--branch", type=click.Choice(list(BRANCHES)), default="ground", show_default=True, help="Which one."
)
_zero_point = click.option(
    "--zero-point", default=0.0, show_default=True, help="AB magnitude of a pixel value of 1."
)
_limit = click.option(
    "--limit", default=None, type=int, help="Number of objects, the first ones; all if not given."
)
_threads = click.option("--threads", default=1, show_default=True, help="Threads to use on a CPU.")


@main.command()
@_root
@_catalog
@click.argument("package", type=click.Path(path_type=Path))
@_branch
@_zero_point
@_limit
@_threads
@click.option("--epochs", default=None, type=int, help="Passes over the images, instead of the configured.")
@click.option(
    "--config-file", multiple=True, type=click.Path(exists=True), help="Overrides of TrainLensFinderConfig."
)
def train(
    root: Path,
    catalog: Path,
    package: Path,
    branch: str,
    zero_point: float,
    limit: int | None,
    threads: int,
    epochs: int | None,
    config_file: tuple[str, ...],
) -> None:
    """Train a network on the training images.

    ROOT is where the archives were unpacked, CATALOG is classifications.csv,
    and PACKAGE is the model package to write (.safetensors).

    \f

    Parameters
    ----------
    root
        Folder into which the archives were unpacked.
    catalog
        Key of the images.
    package
        Model package to write.
    branch
        One of `BRANCHES`.
    zero_point
        AB magnitude of a pixel value of 1.
    limit
        Number of objects, the first ones; `None` for all.
    threads
        Threads to use on a CPU.
    epochs
        Passes over the images; `None` for the configured number.
    config_file
        Files of overrides of `TrainLensFinderConfig`.
    """  # noqa: D301
    from .train_lens_finder_task import TrainingSetError, TrainLensFinderConfig, TrainLensFinderTask

    config = TrainLensFinderConfig()
    config.modelName = f"deeplens_challenge_{branch}"
    config.bands = list(BRANCHES[branch].files)
    config.pixelScale = BRANCHES[branch].pixel_scale
    for path in config_file:
        config.load(path)
    if epochs is not None:
        config.epochs = epochs
    size = config.stampSize + 2 * config.augmentation.maxShift
    try:
        config.validate()
        truth = read_catalog(catalog)
        images = find_images(root, branch)
        ids = _choose(truth, images, limit)
        tables = (
            make_training_table(
                read_cutouts(images, ids[k : k + CHUNK], branch, size=size, zero_point=zero_point), truth
            )
            for k in range(0, len(ids), CHUNK)
        )
        model = TrainLensFinderTask(config=config).run(tables, num_cores=threads).model
    except (ChallengeError, TrainingSetError) as err:
        raise click.ClickException(str(err)) from err
    model.write(package)
    figures = model.record["performance"]["all"]
    click.echo(f"Wrote {package}; AUROC {figures['auroc']:.4f} of the images held back.")


@main.command()
@_root
@_catalog
@click.argument("packages", nargs=-1, required=True)
@_branch
@_zero_point
@_limit
@_threads
@click.option("--output", type=click.Path(path_type=Path), help="File for the scores, as they are submitted.")
@click.option(
    "--orientations",
    type=click.Choice(["1", "8"]),
    default="8",
    show_default=True,
    help="Flips and rotations.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
def score(
    root: Path,
    catalog: Path,
    packages: tuple[str, ...],
    branch: str,
    zero_point: float,
    limit: int | None,
    threads: int,
    output: Path | None,
    orientations: str,
    device: str,
) -> None:
    """Score images by networks, and print the table of the paper.

    ROOT is where the archives were unpacked, CATALOG is their key, and
    PACKAGES are model packages (.safetensors); the mean of their logits
    counts.

    \f

    Parameters
    ----------
    root
        Folder into which the archives were unpacked.
    catalog
        Key of the images.
    packages
        Paths or URIs of model packages.
    branch
        One of `BRANCHES`.
    zero_point
        AB magnitude of a pixel value of 1.
    limit
        Number of objects, the first ones; `None` for all.
    threads
        Threads to use on a CPU.
    output
        File to write the scores to, or `None`.
    orientations
        Number of flips and rotations to average, 1 or 8.
    device
        ``auto``, ``cpu`` or ``cuda``.
    """  # noqa: D301
    config = InferenceConfig()
    config.update(device=device, averageOrientations=int(orientations))
    try:
        models = [ModelPackage.read(package) for package in packages]
        truth = read_catalog(catalog)
        images = find_images(root, branch)
        ids = _choose(truth, images, limit)
        found = score_images(images, ids, branch, models, config, zero_point=zero_point, num_threads=threads)
        scores = dict(found)
        if output is not None:
            write_submission(output, scores)
        # Objects without images count as those without a score.
        asked = truth if limit is None else truth[np.isin(truth["ID"], ids)]
        result = score_challenge(scores, asked)
    except (ChallengeError, EvaluationError, ModelPackageError, FileNotFoundError) as err:
        raise click.ClickException(str(err)) from err
    name = " + ".join(f"{model.name} {model.version}" for model in models)
    click.echo(result.describe(branch, name if len(name) <= 32 else f"{len(models)} networks"))


@main.command()
@_catalog
@click.argument("submission", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@_branch
@click.option("--cut", multiple=True, metavar="COLUMN=VALUE", help="Smallest value that lenses must have.")
def judge(catalog: Path, submission: Path, branch: str, cut: tuple[str, ...]) -> None:
    """Judge a file of scores, and print the table of the paper.

    CATALOG is the key of the images, SUBMISSION a file of IDs and scores.

    \f

    Parameters
    ----------
    catalog
        Key of the images.
    submission
        File of IDs and scores.
    branch
        One of `BRANCHES`.
    cut
        Smallest values that lenses must have, as ``column=value``.
    """  # noqa: D301
    try:
        cuts = {column: float(value) for column, _, value in (text.partition("=") for text in cut)}
        result = score_challenge(read_submission(submission), read_catalog(catalog), cuts=cuts)
    except ValueError as err:
        raise click.ClickException(str(err)) from err
    click.echo(result.describe(branch, submission.name))


@main.command()
@click.argument("root", type=click.Path(file_okay=False, path_type=Path))
@click.option("-n", "--number", default=2000, show_default=True, help="Number of objects.")
@click.option("--seed", default=1, show_default=True, help="Seed; give training and test other ones.")
def simulate(root: Path, number: int, seed: int) -> None:
    """Make a set like that of the lens finding challenge in ROOT.

    \f

    Parameters
    ----------
    root
        Folder to write, with the key as ``classifications.csv``.
    number
        Number of objects.
    seed
        Seed.
    """  # noqa: D301
    from .challenge_simulation import simulate_challenge, write_challenge

    keys = []
    for start in range(0, number, SIMULATED_TOGETHER):
        cutouts, key = simulate_challenge(
            min(SIMULATED_TOGETHER, number - start),
            seed=compute_seed("challenge", seed, start),
            first_id=100000 + start,
        )
        write_challenge(root, cutouts)
        keys.append(key)
        click.echo(f"{start + len(key)} of {number} objects are made.")
    vstack(keys).write(root / "classifications.csv", format="ascii.csv", overwrite=True)


def _choose(catalog: Table, images: Mapping[int, Any], limit: int | None) -> list[int]:
    """Return the IDs of the first objects that have images."""
    ids = [number for number in np.asarray(catalog["ID"]).tolist() if number in images]
    if not ids:
        raise ChallengeError("The key is not of these images: they have no ID in common.")
    return ids[:limit]


if __name__ == "__main__":
    main()

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


"""Tests of the tasks that simulate lenses and train on them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.table import Table, vstack

from lsst.daf.butler import Butler, DatasetType
from lsst.meas.deeplearn import training
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.detection import detect_objects
from lsst.meas.deeplearn.lenses.likelihood_ratio import ScoreCalibration
from lsst.meas.deeplearn.lenses.simulate_lenses_task import (
    EXAMPLE_COLUMNS,
    NonLensConfig,
    SimulateLensesConfig,
    SimulateLensesTask,
)
from lsst.meas.deeplearn.lenses.splits import SPLITS, compute_split
from lsst.meas.deeplearn.lenses.train_lens_finder_task import (
    TrainLensFinderConfig,
    TrainLensFinderConnections,
    TrainLensFinderTask,
)
from lsst.meas.deeplearn.lenses.training_set import TrainingSet, TrainingSetError
from lsst.meas.deeplearn.model_package import ModelPackage
from lsst.meas.deeplearn.patch_inputs import compute_seed
from lsst.meas.deeplearn.tests import make_test_coadds, make_test_repository
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import NoWorkFound, Pipeline
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor

CONFIG = Path(__file__).parents[1] / "config"
PIPELINE = str(Path(__file__).parents[1] / "pipelines" / "train_lens_finder.yaml")

SIMULATION = {
    # The objects of the test coadds are stars.
    "hostSelection": ["i_psfFlux > 100"],
    "stampSize": 25,
    "psfSize": 15,
    "arcsPerHost": 2,
    "minArcSnr": 2.0,
    "nonLensRatio": 1.0,
    "validationFraction": 0.25,
    "calibrationFraction": 0.1,
    "testFraction": 0.25,
    "blockSize": 8.0,
}
"""Configuration of a small simulation."""

TRAINING = {
    "stampSize": 21,
    "network": {"width": 0.25, "blocks": 1},
    "epochs": 2,
    "batchSize": 8,
    "augmentation.maxShift": 2,
    "date": "2026-11-23",
}
"""Configuration of a small training."""


def make_simulation_config(**values: Any) -> SimulateLensesConfig:
    """Make the configuration of a small simulation."""
    config = SimulateLensesConfig()
    config.update(**(SIMULATION | values))
    config.nonLenses = {
        "host": NonLensConfig(fraction=0.6),
        "companion": NonLensConfig(fraction=0.2, painter="companion"),
        "any": NonLensConfig(fraction=0.2, selection=["i_psfFlux > 0"]),
    }
    return config


class KilledError(Exception):
    """Raised where a process would be killed."""


def make_training_config(**values: Any) -> TrainLensFinderConfig:
    """Make the configuration of a small training."""
    config = TrainLensFinderConfig()
    for name, value in (TRAINING | values).items():
        target = config.augmentation if name.startswith("augmentation.") else config
        setattr(target, name.removeprefix("augmentation."), value)
    return config


@pytest.fixture(scope="module")
def patch() -> tuple[MultibandCoadd, Table]:
    """Return a coadd with 40 stars, and its objects."""
    rng = np.random.default_rng(3)
    x, y = rng.uniform(20, 280, (2, 40))
    sources = np.stack([x + 600, y + 1200, np.full(40, 2000.0)], axis=1)
    coadd = MultibandCoadd.from_coadds(make_test_coadds("gri", sources=sources))
    return coadd, detect_objects(coadd, tract=0, patch=0)


@pytest.fixture(scope="module")
def examples(patch: tuple[MultibandCoadd, Table]) -> Table:
    """Return simulated examples."""
    return SimulateLensesTask(config=make_simulation_config()).run(*patch, seed=5).examples


def test_examples_say_what_they_are(examples: Table) -> None:
    """Lenses have their truth, non-lenses have none."""
    assert {name for name, _, _ in EXAMPLE_COLUMNS} <= set(examples.colnames)
    lens = np.asarray(examples["label"])
    assert (np.asarray(examples["kind"] == "lens") == lens).all()
    for name in ("einstein_radius", "magnification", "arc_snr"):
        assert np.isfinite(examples[name][lens]).all()
        assert np.isnan(examples[name][~lens]).all()
    assert (examples["arc_snr"][lens] >= 2.0).all()
    assert (examples["magnification"][lens] >= 3.0).all()
    assert len(np.unique(examples["source_id"][lens])) == lens.sum()
    assert (examples["seed"] == 5).all()
    assert set(np.unique(examples["kind"])) == {"lens", "host", "companion", "any"}
    assert 0.7 < (~lens).sum() / lens.sum() <= 1.05


def test_paired_stamps_differ_by_the_arcs_only(examples: Table) -> None:
    """A host with and without arcs has the same noise, masks and PSF."""
    cutouts = Cutouts.from_table(examples)
    pairs = 0
    for host in np.flatnonzero(examples["kind"] == "host"):
        same = (examples["kind"] == "lens") & (examples["host_id"] == examples["host_id"][host])
        for lens in np.flatnonzero(same):
            arcs = cutouts.image[lens] - cutouts.image[host]
            assert arcs.min() > -0.02 * arcs.max()
            assert arcs.sum() > 0
            for name in ("variance", "bad", "psf"):
                np.testing.assert_array_equal(getattr(cutouts, name)[lens], getattr(cutouts, name)[host])
            assert examples["split"][lens] == examples["split"][host]
            pairs += 1
    assert pairs > 3


def test_companions_are_added_light(examples: Table, patch: tuple[MultibandCoadd, Table]) -> None:
    """Companions are on the stamps, and change nothing but pixels."""
    companions = examples[examples["kind"] == "companion"]
    hosts = {host["host_id"]: host["image"] for host in examples[examples["kind"] == "host"]}
    both = [row for row in companions if row["host_id"] in hosts]
    assert len(both) > 0
    for row in both:
        assert (row["image"] - hosts[row["host_id"]]).sum() > 0


def test_splits_do_not_leak(examples: Table) -> None:
    """No galaxy and no source is in two splits."""
    for name in ("host_id", "source_id"):
        seen: dict[int, str] = {}
        for value, split in zip(examples[name], examples["split"], strict=True):
            assert value == -1 or seen.setdefault(value, split) == split


def test_split_goes_by_the_sky() -> None:
    """Neighbours share a split, fractions are those asked for."""
    rng = np.random.default_rng(0)
    ra, dec = rng.uniform(150, 152, 20_000), rng.uniform(-30, -28, 20_000)
    fractions = {"validation": 0.2, "calibration": 0.15, "test": 0.1}
    split = compute_split(ra, dec, **fractions)
    for name, fraction in fractions.items():
        assert (split == name).mean() == pytest.approx(fraction, abs=0.02)
    assert set(split) == set(SPLITS)
    moved = compute_split(ra, dec + 1 / 3600, **fractions)
    assert (moved == split).mean() > 0.97


def test_a_field_can_be_all_test(patch: tuple[MultibandCoadd, Table]) -> None:
    """Examples of a sky that no network was trained on are for the test."""
    config = make_simulation_config(validationFraction=0.0, calibrationFraction=0.0, testFraction=1.0)
    config.validate()
    examples = SimulateLensesTask(config=config).run(*patch, seed=5).examples
    assert set(examples["split"]) == {"test"}


def test_seed_fixes_the_simulation(patch: tuple[MultibandCoadd, Table], examples: Table) -> None:
    """The same seed gives the same examples, another seed others."""
    task = SimulateLensesTask(config=make_simulation_config())
    again = task.run(*patch, seed=5).examples
    for name in ("image", "host_id", "source_id", "split"):
        np.testing.assert_array_equal(again[name], examples[name])
    other = task.run(*patch, seed=6).examples
    assert not set(other["source_id"][other["label"]]) & set(examples["source_id"])


def test_seeds_differ_between_patches() -> None:
    """Seeds come from the data ID and the configuration."""
    seeds = {
        compute_seed("sky", tract, patch, seed) for tract in (1, 2) for patch in (1, 2) for seed in (0, 1)
    }
    assert len(seeds) == 8
    assert compute_seed("sky", 1, 2, 0) == compute_seed("sky", 1, 2, 0)


def test_patch_without_hosts_has_no_work(patch: tuple[MultibandCoadd, Table]) -> None:
    """Without galaxies to paint on, or bright arcs, there is no work."""
    coadd, objects = patch
    task = SimulateLensesTask(config=make_simulation_config(hostSelection=["i_psfFlux > 1e9"]))
    with pytest.raises(NoWorkFound, match="hostSelection"):
        task.run(coadd, objects)
    with pytest.raises(NoWorkFound, match="hostSelection"):
        SimulateLensesTask(config=make_simulation_config()).run(coadd, objects[:0])
    task = SimulateLensesTask(config=make_simulation_config(minArcSnr=1e6))
    with pytest.raises(NoWorkFound, match="signal to noise"):
        task.run(coadd, objects)


@pytest.mark.parametrize(
    "values",
    [{"stampSize": 24}, {"momentColumns": ["xx"]}, {"testFraction": 0.9}, {"hostSelection": ["import os"]}],
)
def test_bad_configuration_is_refused(values: dict[str, Any]) -> None:
    """Settings that cannot work are refused before anything runs."""
    with pytest.raises(FieldValidationError):
        make_simulation_config(**values).validate()


@pytest.fixture(scope="module")
def model(examples: Table) -> ModelPackage:
    """Return a small model trained on the examples."""
    return TrainLensFinderTask(config=make_training_config()).run([examples]).model


def test_model_has_its_record(model: ModelPackage, examples: Table) -> None:
    """The package tells data, recipe, performance, code and date."""
    record = model.record
    counts = record["training_set"]["counts"]
    assert sum(sum(kinds.values()) for kinds in counts.values()) == len(examples)
    assert record["training_set"]["seeds"] == [5]
    assert record["recipe"]["epochs"] == 2
    assert record["recipe"]["augmentation"]["maxShift"] == 2
    assert len(record["history"]) == 2
    assert record["date"] == "2026-11-23"
    assert {"meas_deeplearn", "torch"} <= set(record["code"])
    performance = record["performance"]
    assert performance["all"]["n_lenses"] == counts["test"]["lens"]
    assert 0 <= performance["all"]["auroc"] <= 1
    assert performance["orientations"] == 8
    assert model.settings.bands == ("g", "r", "i")
    assert model.settings.stamp_size == 21
    assert ModelPackage.from_bytes(model.to_bytes()).record == record


def test_training_repeats(model: ModelPackage, examples: Table) -> None:
    """The same examples and seed give the same weights and record."""
    again = TrainLensFinderTask(config=make_training_config()).run([examples]).model
    assert again.digest == model.digest
    assert again.record == model.record
    other = TrainLensFinderTask(config=make_training_config(seed=1)).run([examples]).model
    assert other.digest != model.digest


def test_weights_are_stored_in_half_precision(model: ModelPackage) -> None:
    """Weights take two bytes, and the network runs with them."""
    kinds = {array.dtype for array in model.weights.values()}
    assert kinds == {np.dtype(np.float16), np.dtype(np.int64)}
    assert model.make_network()


def test_killed_training_goes_on(
    examples: Table, model: ModelPackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is kept, and a rerun from it gives the same weights."""
    config = make_training_config(checkpoint=str(tmp_path / "state.pt"))
    write = training._State.write

    def write_and_die(state: training._State, path: Path) -> None:
        write(state, path)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(training._State, "write", write_and_die)
        with pytest.raises(KilledError):
            TrainLensFinderTask(config=config).run([examples])
    assert (tmp_path / "state.pt").exists()
    resumed = TrainLensFinderTask(config=config).run([examples]).model
    assert len(resumed.record["history"]) == config.epochs > 1
    assert resumed.digest == model.digest


def test_fine_tuning_starts_from_a_model(model: ModelPackage, examples: Table, tmp_path: Path) -> None:
    """With a tiny rate the weights stay those of the initial model, and the
    record says where they came from.
    """
    model.write(tmp_path / "model.safetensors")
    config = make_training_config(initialModel=str(tmp_path / "model.safetensors"), learningRate=1e-9)
    tuned = TrainLensFinderTask(config=config).run([examples]).model
    np.testing.assert_allclose(tuned.weights["dense.weight"], model.weights["dense.weight"], atol=1e-3)
    assert tuned.record["initial_model"]["version"] == model.version
    assert tuned.record["initial_model"]["training_set"] == model.record["training_set"]


def test_fine_tuning_adds_bands(model: ModelPackage, examples: Table, tmp_path: Path) -> None:
    """Bands in another order keep their weights, and those of a new band
    start at 0.
    """
    assert model.settings.bands == ("g", "r", "i")
    stem = model.weights["stem.weight"]
    fewer = dataclasses.replace(
        model,
        settings=dataclasses.replace(model.settings, bands=("i", "g")),
        weights={**model.weights, "stem.weight": stem[:, [2, 0]]},
    )
    fewer.write(tmp_path / "model.safetensors")
    config = make_training_config(initialModel=str(tmp_path / "model.safetensors"), learningRate=1e-9)
    tuned = TrainLensFinderTask(config=config).run([examples]).model
    assert tuned.settings.bands == model.settings.bands
    np.testing.assert_allclose(tuned.weights["stem.weight"][:, [0, 2]], stem[:, [0, 2]], atol=1e-3)
    np.testing.assert_allclose(tuned.weights["stem.weight"][:, 1], 0.0, atol=1e-6)
    # It has a band too many.
    config.bands = ["g", "r"]
    with pytest.raises(TrainingSetError, match="bands: "):
        TrainLensFinderTask(config=config).run([examples])


def test_checkpoint_knows_where_it_started(model: ModelPackage, examples: Table, tmp_path: Path) -> None:
    """A checkpoint of random weights does not pass for one of fine-tuning."""
    checkpoint = str(tmp_path / "state.pt")
    TrainLensFinderTask(config=make_training_config(checkpoint=checkpoint)).run([examples])
    model.write(tmp_path / "model.safetensors")
    config = make_training_config(checkpoint=checkpoint, initialModel=str(tmp_path / "model.safetensors"))
    with pytest.raises(TrainingSetError, match="first weights"):
        TrainLensFinderTask(config=config).run([examples])


@pytest.mark.parametrize(
    "values", [{"augmentation.maxNoise": 2.0}, {"kindWeights": {"host": 2.0}}, {"softening": 3.0}]
)
def test_checkpoint_knows_its_recipe(examples: Table, tmp_path: Path, values: dict[str, Any]) -> None:
    """A training with another recipe does not go on from a checkpoint."""
    checkpoint = str(tmp_path / "state.pt")
    TrainLensFinderTask(config=make_training_config(checkpoint=checkpoint)).run([examples])
    config = make_training_config(checkpoint=checkpoint, **values)
    with pytest.raises(TrainingSetError, match="remove it to start afresh"):
        TrainLensFinderTask(config=config).run([examples])


def test_checkpoint_knows_its_examples(examples: Table, tmp_path: Path) -> None:
    """A training with as many other examples does not go on either."""
    config = make_training_config(checkpoint=str(tmp_path / "state.pt"))
    TrainLensFinderTask(config=config).run([examples])
    with pytest.raises(TrainingSetError, match="remove it to start afresh"):
        TrainLensFinderTask(config=config).run([examples[::-1]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stampSize": 19}, "stamp_size: 21 instead of 19"),
        ({"network": {"width": 0.5, "blocks": 1}}, "network: .*0.25.* instead of .*0.5"),
        ({"initialModel": "nowhere.safetensors"}, "cannot be read"),
    ],
)
def test_other_initial_model_is_refused(
    values: dict[str, Any], message: str, model: ModelPackage, examples: Table, tmp_path: Path
) -> None:
    """A model that is not what is trained, or none, stops the training."""
    model.write(tmp_path / "model.safetensors")
    config = make_training_config(**({"initialModel": str(tmp_path / "model.safetensors")} | values))
    with pytest.raises(TrainingSetError, match=message):
        TrainLensFinderTask(config=config).run([examples])


def test_shuffled_labels_teach_nothing(examples: Table) -> None:
    """Labels without meaning give an AUROC of one half, within its error."""
    rng = np.random.default_rng(8)
    shuffled = vstack([examples] * 3)
    shuffled["label"] = rng.permutation(np.asarray(shuffled["label"]))
    shuffled["kind"] = np.where(shuffled["label"], "lens", "host")
    shuffled["split"] = rng.choice(["train", "validation", "test"], len(shuffled))
    shuffled["image"] += rng.normal(0, np.sqrt(shuffled["variance"]))
    shuffled["einstein_radius"] = shuffled["arc_snr"] = np.where(shuffled["label"], 50.0, np.nan)
    model = TrainLensFinderTask(config=make_training_config(epochs=6)).run([shuffled]).model
    figures = model.record["performance"]["all"]
    assert abs(figures["auroc"] - 0.5) < 3 * figures["auroc_error"]
    assert figures["auroc_error"] < 0.1


def test_ensemble_of_one_training(examples: Table, patch: tuple[MultibandCoadd, Table]) -> None:
    """Members differ, share their history, and have a calibration each."""
    config = make_training_config(members=2, epochs=4, learningRate=5e-3)
    models = TrainLensFinderTask(config=config).run([examples]).models
    assert [model.name for model in models] == ["deeplens_gri_1", "deeplens_gri_2"]
    assert models[0].digest != models[1].digest
    assert models[0].record["history"] == models[1].record["history"]
    assert models[0].record["ensemble_performance"] == models[1].record["ensemble_performance"]
    assert models[0].record["best_epoch"] <= 3 < models[1].record["best_epoch"]
    connections = TrainLensFinderConnections(config=config)
    assert connections.outputs == {"model_1", "model_2"}
    assert connections.model_2.name == "deeplens_model_2"


def test_score_is_calibrated(examples: Table) -> None:
    """The record says what the logit is worth, and how well that holds."""
    more = vstack([examples] * 2)
    more["split"] = np.resize(["train", "calibration", "test", "validation", "calibration"], len(more))
    record = TrainLensFinderTask(config=make_training_config()).run([more]).model.record
    calibration = ScoreCalibration.from_dict(record["calibration"])
    assert (np.diff(calibration.log_ratios) >= 0).all()
    assert calibration.n_lens.sum() == record["training_set"]["counts"]["calibration"]["lens"]
    assert set(record["performance"]["calibrated"]) == {"ece", "brier"}


def test_few_examples_leave_no_calibration(model: ModelPackage) -> None:
    """Without ten of each class the record has no calibration."""
    assert "calibration" not in model.record
    assert "calibrated" not in model.record["performance"]


def test_examples_without_calibration_split(examples: Table) -> None:
    """Half of the galaxies for validation calibrate where none are for it."""
    settings = TrainLensFinderTask(config=make_training_config())._make_model_settings()
    old = examples.copy()
    old["split"][old["split"] == "calibration"] = "validation"
    data = TrainingSet.from_tables([old], settings, 2)
    hosts = {split: set(data.host_id[data.split == split]) for split in ("validation", "calibration")}
    assert hosts["validation"]
    assert abs(len(hosts["validation"]) - len(hosts["calibration"])) <= 1
    assert not hosts["validation"] & hosts["calibration"]


def test_galaxies_of_two_skies_are_two(examples: Table) -> None:
    """Object IDs that repeat on another sky are of other galaxies."""
    settings = TrainLensFinderTask(config=make_training_config())._make_model_settings()
    other = examples.copy()
    other["ra"] += 1.0
    alone = TrainingSet.from_tables([examples], settings, 2).describe()["distinct_galaxies"]
    both = TrainingSet.from_tables([examples, examples, other], settings, 2).describe()["distinct_galaxies"]
    assert both == {split: 2 * number for split, number in alone.items()}


def test_faint_arcs_do_not_count(examples: Table) -> None:
    """Without lenses that count, all that is learnt is to say no."""
    values = {"epochs": 4, "learningRate": 0.02}
    config = make_training_config(**values, **{"augmentation.minArcSnr": 1e9})
    (*_, last) = TrainLensFinderTask(config=config).run([examples]).model.record["history"]
    assert last["train_loss"] < 0.1
    (*_, last) = (
        TrainLensFinderTask(config=make_training_config(**values)).run([examples]).model.record["history"]
    )
    assert last["train_loss"] > 0.3


def test_kinds_have_weights(examples: Table) -> None:
    """A kind with next to no weight is not learnt."""
    values = {"epochs": 4, "learningRate": 0.02, "kindWeights": {"lens": 1e-6}}
    model = TrainLensFinderTask(config=make_training_config(**values)).run([examples]).model
    assert model.record["history"][-1]["train_loss"] < 0.1
    assert model.record["recipe"]["kind_weights"] == {"lens": 1e-6}
    with pytest.raises(FieldValidationError):
        make_training_config(kindWeights={"host": 0.0})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"members": 3, "epochs": 3}, "need more than 3 epochs"),
        ({"augmentation.minZoom": 2.0}, "minZoom is larger"),
        ({"stampSize": 20}, "odd"),
        ({"learningRate": 0.0}, "learningRate"),
    ],
)
def test_impossible_training_is_refused(values: dict[str, Any], message: str) -> None:
    """A configuration that cannot work is refused before anything runs."""
    with pytest.raises(FieldValidationError, match=message):
        make_training_config(**values).validate()


def test_small_batch_is_refused(examples: Table) -> None:
    """Fewer examples than a batch are refused before the training."""
    with pytest.raises(TrainingSetError, match="do not fill a batch of 5000"):
        TrainLensFinderTask(config=make_training_config(batchSize=5000)).run([examples])


@pytest.mark.parametrize("recipe", ["published", "robust", "challenge"])
def test_recipe_is_valid(recipe: str) -> None:
    """The recipes that are shipped can be loaded, also one over another."""
    config = TrainLensFinderConfig()
    for name in ("robust", recipe):
        config.load(str(CONFIG / f"trainLensFinder_{name}.py"))
    config.validate()
    default = TrainLensFinderConfig()
    assert (config == default) == (recipe == "published")
    assert not config.initialModel or Path(config.initialModel).exists()


def test_one_class_is_refused(examples: Table) -> None:
    """A split with lenses only cannot be trained on."""
    with pytest.raises(TrainingSetError, match="and 0 non-lenses; both are needed"):
        TrainLensFinderTask(config=make_training_config()).run([examples[examples["label"]]])


def test_missing_band_is_refused(examples: Table) -> None:
    """A model cannot have bands that the stamps lack."""
    with pytest.raises(TrainingSetError, match="z"):
        TrainLensFinderTask(config=make_training_config(bands=["g", "z"])).run([examples])


def test_small_stamps_are_refused(examples: Table) -> None:
    """Stamps must hold those of the network with their shifts."""
    with pytest.raises(TrainingSetError, match="25 pixels on a side; 23 and shifts of 2 need 27"):
        TrainLensFinderTask(config=make_training_config(stampSize=23)).run([examples])


def test_other_pixel_scale_is_refused(examples: Table) -> None:
    """Stamps with other pixels than the model's are refused."""
    with pytest.raises(TrainingSetError, match=r"0\.200 arcsec"):
        TrainLensFinderTask(config=make_training_config(pixelScale=0.17)).run([examples])
    other = examples.copy()
    other["pixel_scale"] = 0.17
    with pytest.raises(TrainingSetError, match="pixel"):
        TrainLensFinderTask(config=make_training_config()).run([vstack([examples, other])])


def test_nan_pixels_are_refused(examples: Table) -> None:
    """A good pixel that is NaN is an error; a bad one is not."""
    spoilt = examples.copy()
    spoilt["image"][2, 0, 12, 12] = np.nan
    with pytest.raises(TrainingSetError, match="1 stamps have good pixels"):
        TrainLensFinderTask(config=make_training_config()).run([spoilt])


def test_brightest_pixels_fit_half_precision(examples: Table) -> None:
    """Pixels above what float16 holds are clipped, and no others change."""
    table = examples.copy()
    table["image"][0, 0, 20, 20] = 1e9
    settings = TrainLensFinderTask(config=make_training_config())._make_model_settings()
    before = TrainingSet.from_table(examples, settings, margin=0).image
    image = TrainingSet.from_table(table, settings, margin=0).image
    assert image.dtype == np.float16
    assert (image == np.finfo(np.float16).max).sum() == 1
    assert (image != before).sum() == 1


def test_no_examples_are_refused(examples: Table) -> None:
    """An empty training set is refused."""
    with pytest.raises(TrainingSetError, match="empty"):
        TrainLensFinderTask(config=make_training_config()).run([])
    with pytest.raises(TrainingSetError, match="no columns"):
        TrainLensFinderTask(config=make_training_config()).run([examples["ids", "image"]])


def test_pipeline_trains_in_a_repository(tmp_path: Path) -> None:
    """One run simulates, trains and evaluates; the model has its name."""
    make_test_repository(tmp_path / "repo", n_patches=(1, 2), inner_cells=(3, 3), n_sources=120)
    butler = SimplePipelineExecutor.prep_butler(
        str(tmp_path / "repo"), inputs=["test/coadds"], output="u/test/training"
    )
    pipeline = Pipeline.from_uri(PIPELINE)
    for name, value in SIMULATION.items():
        pipeline.addConfigOverride("simulateLenses", name, value)
    pipeline.addConfigPython(
        "simulateLenses", "for kind in ('galaxy', 'blue', 'star'): del config.nonLenses[kind]"
    )
    for name, value in TRAINING.items():
        pipeline.addConfigOverride("trainLensFinder", name, value)
    pipeline.addConfigOverride("evaluateLensFinder", "doRingFinder", False)
    executor = SimplePipelineExecutor.from_pipeline(pipeline, butler=butler)
    quanta = executor.run(register_dataset_types=True)
    tasks = [quantum.taskName.rpartition(".")[2] for quantum in quanta]
    assert sorted(tasks) == [
        "EvaluateLensFinderTask",
        "SimulateLensesTask",
        "SimulateLensesTask",
        "TrainLensFinderTask",
    ]
    with Butler.from_config(str(tmp_path / "repo"), collections="u/test/training") as reader:
        package = ModelPackage.from_arrow(reader.get("deeplens_model"))
        seeds = [
            reader.get("lens_training_cutouts", skymap="test", tract=0, patch=k)["seed"][0] for k in (0, 1)
        ]
    assert package.name == "deeplens_gri"
    assert package.record["training_set"]["seeds"] == sorted(seeds)


def test_more_examples_are_added(examples: Table, tmp_path: Path) -> None:
    """Examples of a second simulation of the same patches are trained on,
    too.
    """
    make_test_repository(tmp_path / "repo", n_patches=(1, 1), inner_cells=(2, 2), n_sources=2)
    config = make_training_config(moreExamples=["wide_training_cutouts"])
    other = examples.copy()
    other["seed"][:] = 6
    with Butler.from_config(str(tmp_path / "repo"), run="u/test/examples", writeable=True) as writer:
        for name, table in (("lens_training_cutouts", examples), ("wide_training_cutouts", other)):
            writer.registry.registerDatasetType(
                DatasetType(name, ("skymap", "tract", "patch"), "ArrowAstropy", universe=writer.dimensions)
            )
            writer.put(table, name, skymap="test", tract=0, patch=0)
    butler = SimplePipelineExecutor.prep_butler(
        str(tmp_path / "repo"), inputs=["u/test/examples"], output="u/test/training"
    )
    executor = SimplePipelineExecutor.from_task_class(TrainLensFinderTask, config=config, butler=butler)
    executor.run(register_dataset_types=True)
    with Butler.from_config(str(tmp_path / "repo"), collections="u/test/training") as reader:
        record = ModelPackage.from_arrow(reader.get("deeplens_model")).record["training_set"]
    assert record["seeds"] == [5, 6]
    assert sum(sum(kinds.values()) for kinds in record["counts"].values()) == 2 * len(examples)


@pytest.mark.parametrize("pipeline", [PIPELINE, PIPELINE.replace(".yaml", "_demo.yaml")])
def test_building_the_pipeline_loads_no_torch(pipeline: str) -> None:
    """Tasks are imported and the pipeline is built without torch."""
    code = (
        "import sys\n"
        "from lsst.pipe.base import Pipeline\n"
        f"assert len(Pipeline.from_uri({pipeline!r}).to_graph().tasks) == 3\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

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


"""Tests of where the task that simulates lenses takes them from."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.table import Table

from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.detection import detect_objects
from lsst.meas.deeplearn.lenses.lens_population import sample_lens_population
from lsst.meas.deeplearn.lenses.simulate_lenses_task import (
    NonLensConfig,
    SimulateLensesConfig,
    SimulateLensesConnections,
    SimulateLensesTask,
    SourceError,
)
from lsst.meas.deeplearn.lenses.simulation_plots import plot_examples
from lsst.meas.deeplearn.lenses.source_images import SourceImages
from lsst.meas.deeplearn.tests import make_test_coadds
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import NoWorkFound


def make_config(**values: object) -> SimulateLensesConfig:
    """Make the configuration of a small simulation."""
    config = SimulateLensesConfig()
    small = {
        # The objects of the test coadds are stars.
        "hostSelection": ["i_psfFlux > 100"],
        "stampSize": 25,
        "psfSize": 15,
        "arcsPerHost": 3,
        "minArcSnr": 2.0,
        "validationFraction": 0.2,
        "calibrationFraction": 0.2,
        "testFraction": 0.2,
        "blockSize": 8.0,
    }
    config.update(**(small | values))
    config.nonLenses = {
        "host": NonLensConfig(fraction=0.5),
        "ring": NonLensConfig(fraction=0.3, painter="ring"),
        "trail": NonLensConfig(fraction=0.2, painter="trail", selection=["i_psfFlux > 0"]),
    }
    return config


def make_images(n: int = 40) -> Table:
    """Make the images of round sources."""
    y, x = np.mgrid[:31, :31] - 15
    image = np.exp(-np.hypot(x, y) / 2.0)
    return SourceImages.from_arrays(np.tile(image, (n, 1, 1)), 0.03, 1000 + np.arange(n)).to_table()


@pytest.fixture(scope="module")
def patch() -> tuple[MultibandCoadd, Table]:
    """Return a coadd with 40 stars, and its objects."""
    rng = np.random.default_rng(3)
    x, y = rng.uniform(20, 280, (2, 40))
    sources = np.stack([x + 600, y + 1200, np.full(40, 2000.0)], axis=1)
    coadd = MultibandCoadd.from_coadds(make_test_coadds("gri", sources=sources))
    return coadd, detect_objects(coadd, tract=0, patch=0)


def check_splits(examples: Table) -> None:
    """Check that no galaxy and no source is in two splits."""
    for name in ("host_id", "source_id"):
        seen: dict[int, str] = {}
        for value, split in zip(examples[name], examples["split"], strict=True):
            assert value == -1 or seen.setdefault(value, split) == split


def test_image_is_in_one_split_only(patch: tuple[MultibandCoadd, Table]) -> None:
    """Images that are used again and again do not leak between splits."""
    task = SimulateLensesTask(config=make_config(sourceImageFraction=0.7))
    examples = task.run(*patch, seed=2, source_images=make_images()).examples
    lenses = examples[examples["label"]]
    from_images = lenses["source_id"] < 2000
    assert 0.4 < np.mean(from_images) < 0.9
    assert len(np.unique(lenses["source_id"][from_images])) < from_images.sum()
    assert len(np.unique(lenses["split"])) > 1
    check_splits(examples)


def test_all_sources_may_be_images(patch: tuple[MultibandCoadd, Table]) -> None:
    """With a fraction of 1 no source is a profile."""
    task = SimulateLensesTask(config=make_config(sourceImageFraction=1.0))
    examples = task.run(*patch, seed=2, source_images=make_images()).examples
    assert (examples["source_id"][examples["label"]] < 2000).all()


def test_catalogue_replaces_the_prior(patch: tuple[MultibandCoadd, Table]) -> None:
    """Lenses are those of the user, within the limits, and do not leak."""
    population = sample_lens_population(60, seed=3, bands="gri")
    population["source_id"] = np.arange(60)
    task = SimulateLensesTask(config=make_config(useLensCatalog=True, minEinsteinRadius=0.9))
    examples = task.run(*patch, seed=2, lens_population=population).examples
    lenses = examples[examples["label"]]
    assert set(lenses["source_id"]) <= set(range(60))
    np.testing.assert_allclose(
        lenses["einstein_radius"], population["einstein_radius"][lenses["source_id"]], rtol=1e-5
    )
    assert lenses["einstein_radius"].min() >= 0.9
    check_splits(examples)


def test_brighter_sources(patch: tuple[MultibandCoadd, Table]) -> None:
    """Sources that are brighter than the prior give arcs that are, too."""
    snr = {}
    for brightening in (0.0, 3.0):
        task = SimulateLensesTask(config=make_config(maxBrightening=brightening, minArcSnr=0.0))
        examples = task.run(*patch, seed=2).examples
        snr[brightening] = np.log10(examples["arc_snr"][examples["label"]])
    # On average 1.5 mag, hence 0.6 dex.
    assert np.mean(snr[3.0]) - np.mean(snr[0.0]) == pytest.approx(0.6, abs=0.2)


def test_some_splits_only(patch: tuple[MultibandCoadd, Table]) -> None:
    """Examples of other splits are dropped, and the rest stays."""
    every, some = (
        SimulateLensesTask(config=make_config(**values)).run(*patch, seed=2).examples
        for values in ({}, {"splits": ["train"]})
    )
    assert set(some["split"]) == {"train"}
    wanted = every[every["split"] == "train"]
    np.testing.assert_array_equal(some["image"], wanted["image"])
    none = SimulateLensesTask(config=make_config(splits=["calibration"], calibrationFraction=0.0))
    with pytest.raises(NoWorkFound, match="calibration"):
        none.run(*patch, seed=2)
    with pytest.raises(FieldValidationError):
        make_config(splits=["training"])


def test_user_data_that_do_not_fit_are_refused(patch: tuple[MultibandCoadd, Table]) -> None:
    """The message says what is missing."""
    task = SimulateLensesTask(config=make_config(useLensCatalog=True))
    with pytest.raises(SourceError, match="dataset lens_population"):
        task.run(*patch)
    with pytest.raises(SourceError, match="source_mag_g"):
        task.run(*patch, lens_population=sample_lens_population(5, seed=1, bands="ri"))
    task = SimulateLensesTask(config=make_config(useLensCatalog=True, minEinsteinRadius=2.9))
    population = sample_lens_population(5, seed=1, bands="gri", max_einstein_radius=2.0)
    with pytest.raises(SourceError, match="limits on the Einstein radius"):
        task.run(*patch, lens_population=population)
    task = SimulateLensesTask(config=make_config(sourceImageFraction=0.5))
    with pytest.raises(SourceError, match="pixel_scale"):
        task.run(*patch, source_images=make_images()["source_id", "image"])


def test_connections_follow_the_configuration() -> None:
    """Datasets of the user are inputs only if they are asked for."""
    plain = SimulateLensesConnections(config=make_config())
    assert not {"source_images", "lens_population"} & set(plain.prerequisiteInputs)
    both = SimulateLensesConnections(config=make_config(useLensCatalog=True, sourceImageFraction=0.5))
    assert {"source_images", "lens_population"} <= set(both.prerequisiteInputs)


def test_kinds_without_share_are_refused() -> None:
    """Fractions that are all 0 leave nothing to divide by."""
    config = make_config()
    for kind in config.nonLenses.values():
        kind.fraction = 0.0
    with pytest.raises(FieldValidationError, match="nonLensRatio"):
        config.validate()


def test_painted_kinds_are_there(patch: tuple[MultibandCoadd, Table]) -> None:
    """Painted kinds stand on their galaxies, in the fractions asked for."""
    config = make_config()
    examples = SimulateLensesTask(config=config).run(*patch, seed=4).examples
    number = {name: int((examples["kind"] == name).sum()) for name in ("lens", "ring", "trail")}
    assert number["ring"] == pytest.approx(0.3 * number["lens"], abs=1)
    assert number["trail"] == pytest.approx(0.2 * number["lens"], abs=1)
    hosts = examples[examples["kind"] == "host"]
    image = dict(zip(hosts["host_id"], hosts["image"], strict=True))
    rings = examples[examples["kind"] == "ring"]
    light = [(row["image"] - image[row["host_id"]]).sum() for row in rings if row["host_id"] in image]
    assert light
    assert min(light) > 0
    assert not rings["label"].any()
    check_splits(examples)


def test_gain_makes_noise(patch: tuple[MultibandCoadd, Table]) -> None:
    """The gain of the configuration raises the variance under arcs."""
    quiet = SimulateLensesTask(config=make_config(gain={"g": 0.0, "r": 0.0, "i": 0.0}))
    noisy = SimulateLensesTask(config=make_config(gain={"g": 0.0, "r": 0.0, "i": 0.5}))
    before, after = (Cutouts.from_table(task.run(*patch, seed=4).examples) for task in (quiet, noisy))
    assert quiet.metadata.scalars.get("gain_i") is None
    assert noisy.metadata["gain_i"] == 0.5
    same = np.isin(after.ids, before.ids)
    assert same.all()
    variance = dict(zip(before.ids, before.variance, strict=True))
    raised = [(v - variance[row]).max(axis=(1, 2)) for row, v in zip(after.ids, after.variance, strict=True)]
    assert np.max(raised, axis=0)[0] == 0.0
    assert np.max(raised, axis=0)[2] > 10.0
    with pytest.raises(FieldValidationError):
        make_config(gain={"i": -1.0}).validate()


def test_examples_can_be_looked_at(patch: tuple[MultibandCoadd, Table]) -> None:
    """The plot has a row for each kind, lenses first."""
    examples = SimulateLensesTask(config=make_config()).run(*patch, seed=4).examples
    figure = plot_examples(examples, n_each=3)
    shown = [axes.texts[0].get_text() for axes in figure.axes if axes.texts]
    assert shown[0] == "lens"
    assert set(shown) == {"lens", "host", "ring", "trail"}
    assert sum(len(axes.images) for axes in figure.axes) == 12
    with pytest.raises(ValueError, match="no examples"):
        plot_examples(examples[:0])

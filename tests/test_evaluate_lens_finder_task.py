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


"""Tests of the evaluation of lens finders."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.table import Column, Table

from lsst.daf.butler import Butler, DatasetType
from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.lenses import degradation, evaluation_plots, simple_features
from lsst.meas.deeplearn.lenses.completeness import compute_completeness_map
from lsst.meas.deeplearn.lenses.evaluate_lens_finder_task import (
    COLORS,
    ENSEMBLE,
    REAL,
    EvaluateLensFinderConfig,
    EvaluateLensFinderConnections,
    EvaluateLensFinderTask,
)
from lsst.meas.deeplearn.lenses.example_scores import RING_FINDER
from lsst.meas.deeplearn.lenses.lens_network import EvaluationError
from lsst.meas.deeplearn.lenses.likelihood_ratio import ScoreCalibration
from lsst.meas.deeplearn.lenses.metric_table import METRIC_COLUMNS, add_evaluation, summarize_metrics
from lsst.meas.deeplearn.lenses.simulate_lenses_task import EXAMPLE_COLUMNS
from lsst.meas.deeplearn.model_package import ModelPackage, ModelPackageError, ingest_model
from lsst.meas.deeplearn.tests import make_test_model, make_test_repository
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import InvalidQuantumError
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor
from lsst.pipe.base.testUtils import lintConnections

NOISE = 10.0


def make_cutouts(
    n: int = 120, *, arcs: np.ndarray | None = None, bands: str = "gri", size: int = 51, seed: int = 1
) -> Cutouts:
    """Return stamps of red galaxies on noise, some with blue rings."""
    rng = np.random.default_rng(seed)
    pixels = np.arange(size) - size // 2
    radius = np.hypot(pixels[:, None], pixels) * 0.2
    galaxy, ring = np.exp(-radius / 0.5), np.exp(-0.5 * ((radius - 1.4) / 0.35) ** 2)
    flux = rng.uniform(500, 2000, n)[:, None, None, None] * np.linspace(0.2, 1, len(bands))[:, None, None]
    image = flux * galaxy + rng.normal(0, NOISE, (n, len(bands), size, size))
    if arcs is not None:
        image += arcs[:, None, None, None] * np.linspace(60, 20, len(bands))[:, None, None] * ring
    grid = np.arange(25) - 12
    psf = np.exp(-0.5 * (grid[:, None] ** 2 + grid**2) / 1.5**2)
    shape = (n, len(bands))
    return Cutouts(
        bands=tuple(bands),
        pixel_scale=0.2,
        ids=np.arange(n),
        ra=np.full(n, 150.0),
        dec=np.full(n, 2.0),
        x=np.full(n, 100.0),
        y=np.full(n, 100.0),
        image=image.astype(np.float32),
        variance=np.full(image.shape, NOISE**2, dtype=np.float32),
        bad=np.zeros(image.shape, dtype=bool),
        psf=np.broadcast_to(psf / psf.sum(), (*shape, 25, 25)).astype(np.float32).copy(),
        off_edge=np.zeros(n, dtype=bool),
        missing_band=np.zeros(shape, dtype=bool),
        missing_cell=np.zeros(shape, dtype=bool),
    )


def make_examples(n: int = 120, *, seed: int = 1, shuffle: bool = False, **kwargs: Any) -> Table:
    """Return a table as of SimulateLensesTask: half are lenses, a sixth each
    of the rest is of another kind, each split has its share.
    """
    rng = np.random.default_rng(seed)
    label = np.arange(n) % 2 == 0
    table = make_cutouts(n, arcs=label, seed=seed, **kwargs).to_table()
    if shuffle:
        label = rng.permutation(label)
    values = {
        "label": label,
        "kind": np.where(label, "lens", np.array(["host", "blue", "star"])[np.arange(n) // 2 % 3]),
        "host_id": 1000 * seed + np.arange(n) // 4,
        "source_id": np.where(label, 1, -1),
        "einstein_radius": np.where(label, rng.uniform(0.6, 2.5, n), np.nan).astype(np.float32),
        "magnification": np.where(label, 5.0, np.nan),
        "arc_snr": np.where(label, rng.uniform(15, 80, n), np.nan).astype(np.float32),
        "split": np.array(["train", "calibration", "test"])[np.arange(n) // 6 % 3],
        "seed": np.full(n, seed),
    }
    for name, unit, description in EXAMPLE_COLUMNS:
        table[name] = Column(values[name], unit=unit, description=description)
    return table


def make_config(**overrides: object) -> EvaluateLensFinderConfig:
    """Return a configuration that is quick."""
    config = EvaluateLensFinderConfig()
    config.inference.device = "cpu"
    config.inference.averageOrientations = 1
    config.update(**overrides)
    return config


def get_value(metrics: Table, classifier: str, metric: str, subset: str = "all") -> float:
    """Return the value of one row."""
    (row,) = metrics[
        (metrics["classifier"] == classifier) & (metrics["metric"] == metric) & (metrics["subset"] == subset)
    ]
    return float(row["value"])


@pytest.fixture(scope="module")
def result() -> Any:
    """Return the evaluation of two untrained networks on two tables."""
    models = [make_test_model(), dataclasses.replace(make_test_model(seed=2), version="2")]
    tables = (make_examples(seed=seed) for seed in (1, 2))
    return EvaluateLensFinderTask(config=make_config(maxRobustness=10)).run(tables, models)


def test_connections() -> None:
    """Connections obey the conventions, with an input for each model."""
    lintConnections(EvaluateLensFinderConnections, checkUnnecessaryMultiple=False)
    connections = EvaluateLensFinderConnections(config=make_config(models=["a_model", "b_model"]))
    assert {"examples", "model_0", "model_1"} == set(connections.inputs)
    assert connections.model_1.name == "b_model"
    found = EvaluateLensFinderConnections(config=make_config(doFindModels=True))
    assert set(found.inputs) == {"examples"}
    assert set(found.prerequisiteInputs) == {"ensemble"}


def test_metrics_are_described(result: Any) -> None:
    """Every row says what it is, of how many, and has its interval."""
    table = result.metrics
    assert table.colnames == list(METRIC_COLUMNS)
    for name, (_, description) in METRIC_COLUMNS.items():
        assert table[name].description == description
    assert all(table["description"])
    known = np.isfinite(table["low"]) & np.isfinite(table["value"])
    assert (table["low"] <= table["value"] + 1e-12)[known].all()
    assert (table["high"] >= table["value"] - 1e-12)[known].all()
    names = {"test 1", "test 2", ENSEMBLE, COLORS, RING_FINDER}
    for name in names:
        rows = table[(table["classifier"] == name) & (table["subset"] == "all")]
        assert {"auroc", "tpr0", "tpr10", "tpr_at_fpr_0.01", "precision_at_fpr_0.001"} <= set(rows["metric"])
        assert set(rows["n_positive"]) == {36}
        assert set(rows["n_negative"]) == {36}
    contaminants = table[table["metric"] == "contaminants_at_fpr_0.01"]
    assert set(contaminants["unit"]) == {"deg-2"}
    limited = table[table["metric"] == "tpr_at_fpr_0.0001"]
    assert all("needs 1e+06 negatives for 10%; you have 36" in note for note in limited["note"])


def test_baselines_see_rings(result: Any) -> None:
    """Colours and RingFinder tell blue rings about red galaxies."""
    assert get_value(result.metrics, COLORS, "auroc") > 0.9
    assert get_value(result.metrics, RING_FINDER, "auroc") > 0.9
    tpr, fpr = (get_value(result.metrics, "RingFinder", name) for name in ("decision_tpr", "decision_fpr"))
    assert fpr <= tpr
    assert 0 <= get_value(result.metrics, "test 1", "tpr_at_ringfinder_fpr") <= 1
    assert get_value(result.metrics, "test 1", "auroc_above_colors") < 0


def test_painted_kinds_are_left_out() -> None:
    """Rates among non-lenses of the coadd alone are those without others."""
    table = make_examples()
    config = make_config(realKinds=["host"], doColors=False, doProbe=False, maxRobustness=0, models=[])
    measured = EvaluateLensFinderTask(config=config).run([table]).metrics
    alone = table[table["label"] | (table["kind"] == "host")]
    expected = EvaluateLensFinderTask(config=config).run([alone]).metrics
    for metric in ("auroc", "tpr_at_fpr_0.01", "precision_at_fpr_0.01"):
        assert get_value(measured, RING_FINDER, metric, REAL) == get_value(expected, RING_FINDER, metric)


def test_kinds_and_cells_add_up(result: Any) -> None:
    """Parts of the examples are those of the whole."""
    table = result.metrics[result.metrics["classifier"] == COLORS]
    kinds = table[table["metric"] == "fpr_at_threshold"]
    assert {str(subset) for subset in kinds["subset"]} == {"kind = host", "kind = blue", "kind = star"}
    assert kinds["n_negative"].sum() == 36
    cells = table[table["metric"] == "completeness"]
    assert cells["n_positive"].sum() == 36
    found = (cells["value"] * cells["n_positive"]).sum() / 36
    assert found == pytest.approx(get_value(table, COLORS, "tpr_at_fpr_0.01"))


def test_robustness_and_probes(result: Any) -> None:
    """Each change and each probe has its rows."""
    table = result.metrics[result.metrics["classifier"] == "test 1"]
    changes = {str(row["subset"]): float(row["value"]) for row in table[table["metric"] == "score_change"]}
    assert set(changes) == {
        "unchanged",
        "centre off by up to 5 pixels",
        "seeing 1.25 times as wide",
        "bad stripe over 10%",
        "g band +0.05 mag",
        "g band -0.05 mag",
        *(f"no {band} band" for band in "gri"),
    }
    assert changes["unchanged"] == 0
    # This network sees pixels in units of their noise.
    assert changes["g band +0.05 mag"] < 1e-5
    assert all(changes[name] > 1e-4 for name in changes if name != "unchanged" and "mag" not in name)
    probes = result.metrics[result.metrics["metric"] == "probe_auroc"]
    assert len(probes) == 4
    outskirts = probes[probes["subset"] == "outskirts of kind = host"]
    assert abs(outskirts["value"][0] - 0.5) < 0.25
    center = probes[probes["subset"] == "central pixels of kind = host"]
    assert np.isfinite(center["value"][0])


def test_calibrations(result: Any) -> None:
    """Calibrations are plain data, and the summary of a model is JSON."""
    assert set(result.calibrations) == {"test 1", "test 2"}
    calibration = ScoreCalibration.from_dict(json.loads(json.dumps(result.calibrations))["test 1"])
    assert np.isfinite(calibration.compute_log_ratio(np.array([0.3]))).all()
    assert 0 <= get_value(result.metrics, ENSEMBLE, "ece") <= 1
    assert "ece_of_package" not in result.metrics["metric"]
    summary = json.loads(json.dumps(summarize_metrics(result.metrics, "test 1")))
    assert summary["all"]["auroc"]["n_negative"] == 36
    assert summary["all"]["ece"]["low"] is None
    with pytest.raises(KeyError, match="No lens finder 'test 9'"):
        summarize_metrics(result.metrics, "test 9")


def test_record_of_the_model(result: Any) -> None:
    """The evaluation travels with the weights, which stay as they are."""
    model = make_test_model()
    package = add_evaluation(model, result.metrics, result.calibrations)
    again = ModelPackage.from_bytes(package.to_bytes())
    assert again.record["evaluation"]["all"]["auroc"]["n_positive"] == 36
    assert again.record["calibration"] == result.calibrations["test 1"]
    assert all((again.weights[key] == value).all() for key, value in model.weights.items())


def test_figures(result: Any, tmp_path: Path) -> None:
    """There is a figure of each kind, and it can be drawn."""
    for name in ("roc", "completeness", "reliability", "histograms"):
        file = tmp_path / f"{name}.png"
        getattr(result, name).savefig(file, dpi=40)
        assert file.stat().st_size > 3000


def test_figures_of_nothing() -> None:
    """Figures of empty samples say so, and colours are those of the style
    whatever the style is when they are saved.
    """
    none, label = np.empty(0), np.ones(4, dtype=bool)
    cells = compute_completeness_map(none, none, none, x_edges=[0, 1], y_edges=[0, 1])
    figures = [
        evaluation_plots.plot_roc({"a": np.arange(4.0)}, label),
        evaluation_plots.plot_completeness(cells),
        evaluation_plots.plot_reliability({"a": none}, none),
        evaluation_plots.plot_score_histograms(none, np.empty(0, dtype="U4")),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO(), dpi=30)
    (line,) = [line for line in figures[0].axes[0].lines if line.get_linestyle() == "-"]
    assert line.get_color() == "#0173B2"


def test_shuffled_labels() -> None:
    """A planted shuffle of the labels leaves no information."""
    config = make_config(models=[], doRingFinder=False, doProbe=False)
    table = make_examples(900, shuffle=True, size=35)
    metrics = EvaluateLensFinderTask(config=config).run([table]).metrics
    (row,) = metrics[(metrics["metric"] == "auroc") & (metrics["subset"] == "all")]
    assert row["low"] < 0.5 < row["high"]
    assert row["high"] - row["low"] < 0.2


def test_nan_cutouts_are_left_out_and_counted() -> None:
    """Good pixels that are not finite spoil a stamp; bad ones do not."""
    table = make_examples()
    test = np.flatnonzero(table["split"] == "test")
    table["image"][test[:3], 1, 20, 20] = np.nan
    table["image"][test[3], 1, 20, 20] = np.inf
    table["bad"][test[3], 1, 20, 20] = True
    task = EvaluateLensFinderTask(config=make_config(maxRobustness=0, doProbe=False))
    metrics = task.run([table], [make_test_model()]).metrics
    assert get_value(metrics, "", "n_excluded") == 3
    assert task.metadata["n_excluded"] == 3
    row = metrics[(metrics["classifier"] == "test 1") & (metrics["metric"] == "auroc")][0]
    assert row["n_positive"] + row["n_negative"] == 36 - 3
    assert math.isfinite(row["value"])


@pytest.mark.parametrize("kept", [True, False])
def test_one_class(kept: bool) -> None:
    """Test examples of one class are an error that says so."""
    table = make_examples()
    table = table[(table["label"] == kept) | (table["split"] != "test")]
    with pytest.raises(EvaluationError, match="both are needed"):
        EvaluateLensFinderTask(config=make_config(models=[])).run([table])


def test_no_examples() -> None:
    """So are none at all."""
    with pytest.raises(EvaluationError, match="0 lenses and 0 non-lenses"):
        EvaluateLensFinderTask(config=make_config(models=[])).run([])


def test_model_without_scores() -> None:
    """A network whose output is not finite is an error, not a low score."""
    model = make_test_model()
    model.weights["dense.bias"][:] = np.nan
    with pytest.raises(EvaluationError, match="test 1 gives 72 of 72 examples no finite score"):
        EvaluateLensFinderTask(config=make_config(maxRobustness=0)).run([make_examples(108)], [model])


def test_missing_splits() -> None:
    """Without train and calibration examples the rest is still measured."""
    table = make_examples(240)
    config = make_config(maxRobustness=0, doProbe=False)
    result = EvaluateLensFinderTask(config=config).run([table[table["split"] == "test"]], [make_test_model()])
    assert set(result.metrics["classifier"]) == {"", "test 1", "RingFinder", RING_FINDER}
    assert {"ece_raw", "ece"} <= set(result.metrics["metric"])


def test_halves_calibrate_each_other() -> None:
    """Without calibration examples no galaxy is calibrated by itself: where
    one half is the opposite of the other, probabilities are wrong.
    """
    table = make_examples(400)
    table["split"][:] = "test"
    odd = table["host_id"] % 2 == 1
    table["label"] ^= odd
    config = make_config(maxRobustness=0, doProbe=False, doRingFinder=False)
    opposite = EvaluateLensFinderTask(config=config).run([table], [make_test_model()]).metrics
    table["label"] ^= odd
    alike = EvaluateLensFinderTask(config=config).run([table], [make_test_model()]).metrics
    assert get_value(opposite, "test 1", "ece") > 0.2
    assert get_value(alike, "test 1", "ece") < 0.1
    (note,) = alike["note"][(alike["metric"] == "ece") & (alike["classifier"] == "test 1")]
    assert note.startswith("Perfect probabilities have 0.0")


def test_too_few_to_calibrate() -> None:
    """A handful of examples calibrates nothing."""
    table = make_examples(24)
    table["split"][:] = "test"
    config = make_config(maxRobustness=0, doProbe=False)
    result = EvaluateLensFinderTask(config=config).run([table], [make_test_model()])
    assert set(result.calibrations) == {"test 1"}  # by all, with 12 of each kind
    assert "ece" not in result.metrics["metric"]


def test_calibration_of_the_package() -> None:
    """What a package says of its scores is measured as users get it."""
    calibration = {"thresholds": [1e3], "n_lens": [1.0, 9.0], "n_not": [9.0, 1.0]}
    model = dataclasses.replace(make_test_model(), record={"calibration": calibration})
    config = make_config(maxRobustness=0, doProbe=False, doRingFinder=False)
    metrics = EvaluateLensFinderTask(config=config).run([make_examples()], [model]).metrics
    # All logits are below the threshold, of which half are lenses.
    expected = 0.5 - 1 / (1 + 9.5 / 1.5)
    assert get_value(metrics, "test 1", "ece_of_package") == pytest.approx(expected, abs=1e-6)


def make_candidates(n: int, score: float, models: str = "test", versions: str = "1") -> Table:
    """Make a table as of LensFinderTask, of which the first is outside."""
    return Table(
        {
            "score": np.full(n, score, dtype=np.float32),
            "model_name": np.full(n, models),
            "model_version": np.full(n, versions),
            "patch_inner": np.arange(n) > 0,
            "flag_not_scored": np.arange(n) == 1,
        }
    )


def test_galaxies_in_two_splits_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Galaxies in the test and elsewhere are told of, but not equal IDs of
    other galaxies.
    """
    table, other = make_examples(), make_examples()
    for examples in (table, other):
        examples["host_id"] = np.arange(len(examples))
        examples["ra"] = 150.0 + 0.001 * np.arange(len(examples))
    other["split"] = np.where(other["split"] == "test", "train", "test")
    shared = other.copy()
    other["ra"] += 10.0
    for tables, expected in (([table], 0), ([table, other], 0), ([table, shared], len(table))):
        config = make_config(maxRobustness=0, doProbe=False, doRingFinder=False, doColors=False)
        task = EvaluateLensFinderTask(config=config)
        task.run(tables, [make_test_model()])
        assert task.metadata["n_shared_hosts"] == expected
        assert ("in other splits too" in caplog.text) == (expected > 0)


def test_calibration_without_examples_for_it() -> None:
    """Without a calibration split each half of the test calibrates the other,
    and the validation examples stay out of it.
    """
    table = make_examples(240)
    table["split"] = np.where(table["split"] == "calibration", "validation", table["split"])
    task = EvaluateLensFinderTask(config=make_config(maxRobustness=0, doProbe=False, doRingFinder=False))
    metrics = task.run([table], [make_test_model()]).metrics
    table["label"] ^= table["split"] == "validation"
    table["einstein_radius"] = table["arc_snr"] = np.where(table["label"], 30.0, np.nan).astype(np.float32)
    again = task.run([table], [make_test_model()]).metrics
    assert get_value(again, "test 1", "ece") == get_value(metrics, "test 1", "ece")


def test_blank_fields() -> None:
    """Objects of fields without lenses are negatives, if they have a score
    and are in the inner region, and were scored with the same models.
    """
    task = EvaluateLensFinderTask(config=make_config(maxRobustness=0, doProbe=False, doRingFinder=False))
    blank = [make_candidates(12, 0.0), make_candidates(22, 1.0), make_candidates(0, 0.5)]
    metrics = task.run([make_examples()], [make_test_model()], blank=blank).metrics
    rows = metrics[metrics["subset"] == "blank fields"]
    assert set(rows["n_negative"]) == {10 + 20}
    assert set(rows["classifier"]) == {"test 1"}
    assert get_value(metrics, "test 1", "auroc", "blank fields") == pytest.approx(1 / 3)
    assert get_value(metrics, "test 1", "tpr_at_fpr_0.01", "blank fields") == 0
    clear = "blank fields, einstein_radius > 1.4, arc_snr > 20"
    assert get_value(metrics, "test 1", "auroc", clear) == pytest.approx(1 / 3)
    with pytest.raises(EvaluationError, match=r"scored with models \['other 1'\], not with \['test 1'\]"):
        task.run([make_examples()], [make_test_model()], blank=[make_candidates(3, 0.5, "other")])
    with pytest.raises(EvaluationError, match=r"scored with models \['test 2'\], not with \['test 1'\]"):
        task.run([make_examples()], [make_test_model()], blank=[make_candidates(3, 0.5, versions="2")])
    with pytest.raises(EvaluationError, match=r"scored with models \[\], not with \['test 1'\]"):
        task.run([make_examples()], [make_test_model()], blank=[make_candidates(3, 0.5, "", "")])


def test_examples_that_do_not_fit() -> None:
    """Mixed bands, other columns, small stamps, wrong models are refused."""
    config = make_config(doRingFinder=False)
    task = EvaluateLensFinderTask(config=config)
    with pytest.raises(EvaluationError, match="cannot be evaluated together"):
        task.run([make_examples(), make_examples(bands="riz")], [])
    mixed = make_examples()
    mixed["bands"] = np.where(np.arange(len(mixed)) < 5, "g,r,z", "g,r,i")
    with pytest.raises(EvaluationError, match="mixes cutouts of bands"):
        task.run([mixed], [])
    with pytest.raises(EvaluationError, match=r"no columns \['arc_snr'\]"):
        task.run([make_examples()[[c for c in make_examples().colnames if c != "arc_snr"]]], [])
    with pytest.raises(EvaluationError, match="needs stamps of 45 pixels"):
        task.run([make_examples(size=35)], [make_test_model()])
    with pytest.raises(ModelPackageError, match="y missing"):
        task.run([make_examples()], [make_test_model("giy")])
    with pytest.raises(EvaluationError, match="Several model packages"):
        task.run([make_examples()], [make_test_model(), make_test_model()])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"models": ["a_model", "a_model"]}, "given once"),
        ({"models": [], "doRingFinder": False, "doColors": False}, "no lens finder"),
        ({"lensDensity": 10.0, "candidateDensity": 1.0}, "more lenses than objects"),
        ({"arcSnrEdges": [10.0, 5.0]}, "ascend"),
    ],
)
def test_validation(overrides: dict[str, object], message: str) -> None:
    """A configuration that cannot work is refused before anything runs."""
    with pytest.raises(FieldValidationError, match=message):
        make_config(**overrides).validate()


# Changes of stamps


def test_shift_centers() -> None:
    """Pixels move together by whole pixels, what comes in is bad."""
    cutouts = make_cutouts(40)
    shifted = degradation.shift_centers(cutouts, 5, np.random.default_rng(3))
    offsets = set()
    for before, after, bad in zip(cutouts.image[:, 2], shifted.image[:, 2], shifted.bad[:, 2], strict=True):
        row, column = np.argwhere(after == before[25, 25])[0]
        offsets.add((int(row) - 25, int(column) - 25))
        dy, dx = offsets_now = (int(row) - 25, int(column) - 25)
        assert max(map(abs, offsets_now)) <= 5
        assert bad.sum() == 51 * 51 - (51 - abs(dy)) * (51 - abs(dx))
        assert np.isnan(after[bad]).all()
    assert len(offsets) > 20
    unchanged = degradation.shift_centers(cutouts, 0, np.random.default_rng(3))
    np.testing.assert_array_equal(unchanged.image, cutouts.image)


def test_blur_widens_stars_at_equal_noise() -> None:
    """A star gets as wide as asked, and noise stays as strong."""
    cutouts = make_cutouts(20)
    rng = np.random.default_rng(4)
    star = 1e5 * cutouts.psf[0, 0] / cutouts.psf[0, 0].sum()
    image = rng.normal(0, NOISE, cutouts.image.shape).astype(np.float32)
    image[:, :, 13:38, 13:38] += star
    cutouts = dataclasses.replace(cutouts, image=image)
    blurred = degradation.blur(cutouts, 1.3, rng)
    x = np.arange(51) - 25
    for stamps, sigma in ((cutouts, 1.5), (blurred, 1.5 * 1.3)):
        mean = stamps.image.mean(axis=(0, 1))
        measured = math.sqrt((mean[:, 19:32].sum(axis=0) * x[19:32] ** 2).sum() / mean[:, 19:32].sum())
        assert measured == pytest.approx(sigma, rel=0.03)
        assert stamps.image[:, :, :8, :8].std() == pytest.approx(NOISE, rel=0.03)
    assert degradation.blur(cutouts, 1.0, rng).image == pytest.approx(cutouts.image)


def test_other_changes() -> None:
    """Stripes, zero points and missing bands are what they say."""
    cutouts = make_cutouts(5)
    striped = degradation.mask_stripe(cutouts, 0.2, np.random.default_rng(5))
    assert (striped.bad.mean(axis=(1, 2, 3)) == 10 / 51).all()
    assert (striped.bad.all(axis=3) == striped.bad.any(axis=3)).all()
    fainter = degradation.change_zero_point(cutouts, 1, 0.05)
    np.testing.assert_allclose(fainter.image[:, 1], cutouts.image[:, 1] * 10**-0.02, rtol=1e-6)
    np.testing.assert_allclose(fainter.variance[:, 1], NOISE**2 * 10**-0.04, rtol=1e-6)
    np.testing.assert_array_equal(fainter.image[:, 0], cutouts.image[:, 0])
    shallow = degradation.add_noise(cutouts, 3.0, np.random.default_rng(6))
    assert (shallow.image - cutouts.image).std() == pytest.approx(NOISE * math.sqrt(8), rel=0.03)
    np.testing.assert_allclose(shallow.variance, 9 * NOISE**2)
    without = degradation.remove_band(cutouts, 2)
    assert without.bad[:, 2].all()
    assert not without.bad[:, :2].any()
    assert not cutouts.bad.any()


# Simple features


def test_magnitudes_of_an_aperture() -> None:
    """The sum of the good pixels, in magnitudes up to a constant."""
    cutouts = make_cutouts(3)
    cutouts.bad[0, 1, 25, 25] = True
    magnitudes = simple_features.measure_magnitudes(cutouts, [0.1, 0.25])
    flux = cutouts.image[2, 2, 25, 24:27].sum() + cutouts.image[2, 2, [24, 26], 25].sum()
    assert magnitudes.shape == (3, 2, 3)
    # Far above the softening this is the magnitude in nJy but for 5 mag.
    assert magnitudes[2, 1, 2] == pytest.approx(-2.5 * math.log10(flux / 100), abs=0.01)
    assert magnitudes[0, 0, 1] == 0


def test_probed_pixels() -> None:
    """Central pixels and outskirts are of the right places."""
    cutouts = make_cutouts(4)
    center = simple_features.measure_center(cutouts)
    assert center.shape == (4, 27)
    assert (center[:, 4] == center[:, :9].max(axis=1)).all()
    outskirts = simple_features.measure_outskirts(cutouts, 4.0)
    assert outskirts.shape == (4, 12)
    np.testing.assert_allclose(outskirts[:, 3:6], 1.0, atol=0.15)  # noise in its units
    np.testing.assert_allclose(outskirts[:, 6:9], 0.0, atol=0.2)  # no correlation
    assert not simple_features.measure_outskirts(cutouts, 40.0).any()


# In a repository


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository with examples, a blank field and two models."""
    root = tmp_path_factory.mktemp("repository") / "repo"
    butler = make_test_repository(root, n_sources=5)
    examples = DatasetType(
        "lens_training_cutouts", ("skymap", "tract", "patch"), "ArrowAstropy", universe=butler.dimensions
    )
    butler.registry.registerDatasetType(examples)
    butler.collections.register("examples")
    butler.put(make_examples(120), examples, skymap="test", tract=0, patch=0, run="examples")
    candidates = DatasetType("lens_candidates", examples.dimensions, "ArrowAstropy")
    butler.registry.registerDatasetType(candidates)
    butler.collections.register("blank")
    # Of a patch that has no examples.
    butler.put(make_candidates(12, 0.5), candidates, skymap="test", tract=0, patch=1, run="blank")
    ingest_model(butler, make_test_model(), run="models/test", dataset_type="deeplens_model")
    ingest_model(butler, make_test_model("giy"), run="models/giy", dataset_type="other_model")
    return root


def test_in_a_repository(repository: Path) -> None:
    """The pipeline reads what the simulation writes, and its outputs come
    back whole.
    """
    butler = SimplePipelineExecutor.prep_butler(
        str(repository), inputs=["examples", "models/test", "blank"], output="evaluation"
    )
    config = make_config(maxRobustness=5, doProbe=False, doBlankFields=True)
    executor = SimplePipelineExecutor.from_task_class(EvaluateLensFinderTask, config=config, butler=butler)
    executor.run(register_dataset_types=True)
    metrics = butler.get("lens_finder_metrics")
    assert get_value(metrics, "test 1", "auroc") == pytest.approx(0.5, abs=0.5)
    assert metrics["value"].description == METRIC_COLUMNS["value"][1]
    assert set(metrics["n_negative"][metrics["subset"] == "blank fields"]) == {10}
    assert set(butler.get("lens_finder_calibrations")) == {"test 1"}
    for name in ("roc", "completeness", "reliability", "scores"):
        (ref,) = butler.query_datasets(f"lens_finder_{name}")
        assert Path(butler.getURI(ref).ospath).stat().st_size > 0


def test_models_are_found(repository: Path) -> None:
    """All models of the input collections are evaluated, as they are used."""
    other = dataclasses.replace(make_test_model(seed=2), name="other")
    with Butler.from_config(str(repository), writeable=True) as writer:
        ingest_model(writer, other, run="models/more", dataset_type="deeplens_model")
    butler = SimplePipelineExecutor.prep_butler(
        str(repository), inputs=["examples", "models/test", "models/more"], output="evaluation_found"
    )
    config = make_config(maxRobustness=0, doProbe=False, doRingFinder=False, doFindModels=True)
    executor = SimplePipelineExecutor.from_task_class(EvaluateLensFinderTask, config=config, butler=butler)
    executor.run(register_dataset_types=True)
    assert ENSEMBLE in butler.get("lens_finder_metrics")["classifier"]


def test_wrong_model_stops_the_run(repository: Path) -> None:
    """A model of other bands is a wrong set-up."""
    butler: Butler = SimplePipelineExecutor.prep_butler(
        str(repository), inputs=["examples", "models/giy"], output="evaluation_wrong"
    )
    executor = SimplePipelineExecutor.from_task_class(
        EvaluateLensFinderTask, config=make_config(models=["other_model"]), butler=butler
    )
    with pytest.raises(InvalidQuantumError, match="y missing"):
        executor.run(register_dataset_types=True)


# The benchmarks that measure with it


def run_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: object
) -> str:
    """Run a script of the folder benchmarks and return what it prints."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    importlib.import_module(name).main()
    return capsys.readouterr().out


def test_bars_are_measured(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bars come as a table, those of fields without lenses too."""
    model = tmp_path / "model.safetensors"
    make_test_model().write(model)
    options = ["--noise", "shallow", 1.1, "--blank", repository, "blank", "--robustness", 10]
    out = run_benchmark(
        monkeypatch, capsys, "lens_bars", model, "--examples", "deep", repository, "examples", *options
    )
    for title in (
        "TPR of RingFinder",
        "made on the same sky",
        "linear probe",
        "blank fields",
        "shallow",
        "bad stripe",
    ):
        assert title in out


def test_recipes_are_compared(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each recipe has a line for each set and change."""
    with Butler.from_config(str(repository), writeable=True) as butler:
        examples = make_examples(160)
        examples["split"] = np.array(["train", "train", "train", "validation", "test"])[
            np.arange(160) // 2 % 5
        ]
        butler.collections.register("recipes")
        butler.put(examples, "lens_training_cutouts", skymap="test", tract=0, patch=0, run="recipes")
    path = tmp_path / "rows.json"
    options = ["--epochs", 1, "--json", path, "--precision", "32-true"]
    run_benchmark(
        monkeypatch,
        capsys,
        "compare_recipes",
        repository,
        *["--train", "recipes", "--measure", "here", "recipes", "--recipes", "robust", "no masks", *options],
    )
    rows = json.loads(path.read_text())
    assert {row["recipe"].removesuffix(" 1") for row in rows} == {"robust", "no masks"}
    changes = {row["change"] for row in rows}
    assert {"all", "noise x 3.16", "no g band"} <= changes
    assert any(change.startswith("bad stripe") for change in changes)

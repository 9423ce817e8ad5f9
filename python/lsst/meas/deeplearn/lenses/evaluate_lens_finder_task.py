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


"""Measure how well lens finders do on simulated examples."""

from __future__ import annotations

__all__ = (
    "METRIC_COLUMNS",
    "EvaluateLensFinderConfig",
    "EvaluateLensFinderConnections",
    "EvaluateLensFinderTask",
    "EvaluationError",
    "LensNetwork",
    "add_evaluation",
    "summarize_metrics",
)

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from astropy.table import Column, Table, vstack
from scipy.special import expit

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import (
    ChoiceField,
    ConfigField,
    Field,
    FieldValidationError,
    ListField,
    RangeField,
)
from lsst.pipe.base import (
    InvalidQuantumError,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection

from ..cutouts import Cutouts
from ..inference import InferenceConfig, predict, torch_threads
from ..model_package import MODEL_STORAGE_CLASS, SCALE_TOLERANCE, ModelPackage, ModelPackageError
from .calibration import (
    apply_calibration,
    compute_brier_score,
    compute_calibration_error,
    compute_log_loss,
    fit_isotonic,
    fit_platt,
)
from .degradation import blur, change_zero_point, mask_stripe, remove_band, shift_centers
from .metrics import (
    CANDIDATE_DENSITY,
    LENS_DENSITY,
    CompletenessMap,
    Fraction,
    compute_auroc,
    compute_auroc_difference,
    compute_auroc_interval,
    compute_completeness_map,
    compute_operating_point,
    compute_probe_auroc,
    compute_sky_yield,
)
from .ring_finder import RingFinderConfig, find_rings
from .simple_features import classify_colors, measure_center, measure_magnitudes, measure_outskirts
from .simulate_lenses_task import EXAMPLE_COLUMNS

if TYPE_CHECKING:
    import torch

METRIC_COLUMNS: Mapping[str, tuple[str, str]] = {
    "classifier": ("U64", "Name and version of the model package, or name of the baseline"),
    "subset": ("U96", "Examples that count: all lenses or some, against all non-lenses or some"),
    "metric": ("U48", "What was measured; see the description of the row"),
    "value": ("f8", "The measurement, in the unit of the row; NaN if it cannot be made"),
    "low": ("f8", "Lower end of the interval of 95 per cent; NaN where there is none"),
    "high": ("f8", "Upper end of the interval of 95 per cent; NaN where there is none"),
    "unit": ("U16", "Unit of value, low and high; empty if they have none"),
    "n_positive": ("i8", "Number of lenses behind it"),
    "n_negative": ("i8", "Number of non-lenses behind it"),
    "description": ("U160", "What the metric is"),
    "note": ("U160", "What limits the measurement; empty if nothing does"),
}
"""Type and description of each column of ``lens_finder_metrics``."""

ENSEMBLE, COLORS, RING_FINDER = "mean of all models", "colour and magnitude", "RingFinder S/N"
"""Names of the classifiers that are no model package."""

_DESCRIPTIONS: Mapping[str, str] = {
    "auroc": "Area under the ROC curve, with the interval of DeLong",
    "tpr0": "True-positive rate before any false positive (Metcalf et al. 2019)",
    "tpr10": "True-positive rate with less than ten false positives (Metcalf et al. 2019)",
    "tpr_at_fpr": "True-positive rate at this false-positive rate",
    "threshold_at_fpr": "Score that has this false-positive rate",
    "precision_at_fpr": "Fraction of lenses among what is found, at the densities of the sky",
    "contaminants_at_fpr": "Non-lenses found on the sky",
    "completeness": "Fraction of the lenses found at the reference false-positive rate",
    "fpr_at_threshold": "False-positive rate at the threshold of the reference rate of all examples",
    "tpr_at_threshold": "True-positive rate at the threshold of the reference rate of unchanged examples",
    "score_change": "Root mean square change of the logit by what was done to the stamps",
    "ece_raw": "Expected calibration error of the output of the network",
    "brier_raw": "Brier score of the output of the network",
    "log_loss_raw": "Mean negative log-likelihood of the output of the network",
    "ece": "Expected calibration error after calibration on validation examples, for the share of lenses",
    "brier": "Brier score after calibration on validation examples, for the share of lenses",
    "log_loss": "Mean negative log-likelihood after the same calibration",
    "decision_tpr": "True-positive rate of the decision",
    "decision_fpr": "False-positive rate of the decision",
    "tpr_at_ringfinder_fpr": "True-positive rate at the false-positive rate of the decision of RingFinder",
    "auroc_above_colors": "AUROC less that of colour and magnitude, on the same examples",
    "probe_auroc": "AUROC of a linear probe between lenses and what the subset says; 0.5 is none",
    "n_excluded": "Examples left out because good pixels are not finite; counts are of the others",
}


class EvaluationError(ValueError):
    """Raised for examples or models that cannot be evaluated."""


class EvaluateLensFinderConnections(
    PipelineTaskConnections,
    dimensions=(),
    defaultTemplates={"outputName": "lens"},
):
    """Datasets that `EvaluateLensFinderTask` reads and writes.

    Each of ``config.models`` is one more input, ``model_0`` and so on.

    Parameters
    ----------
    config
        Configuration of the task.
    """

    examples = cT.Input(
        doc="Stamps with and without lensed arcs, of all patches to look at.",
        name="{outputName}_training_cutouts",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
        multiple=True,
        deferLoad=True,
    )
    metrics = cT.Output(
        doc="Figures of merit of each lens finder, a row each, with intervals of 95 per cent.",
        name="{outputName}_finder_metrics",
        storageClass="ArrowAstropy",
        dimensions=(),
    )
    calibrations = cT.Output(
        doc="Calibration of each lens finder, by name, for lenses.calibration.apply_calibration.",
        name="{outputName}_finder_calibrations",
        storageClass="StructuredDataDict",
        dimensions=(),
    )
    roc = cT.Output(
        doc="True-positive against false-positive rate of all lens finders.",
        name="{outputName}_finder_roc",
        storageClass="Plot",
        dimensions=(),
    )
    completeness = cT.Output(
        doc="Completeness by Einstein radius and signal to noise of the arcs.",
        name="{outputName}_finder_completeness",
        storageClass="Plot",
        dimensions=(),
    )
    reliability = cT.Output(
        doc="Fraction of lenses against predicted probability, before and after calibration.",
        name="{outputName}_finder_reliability",
        storageClass="Plot",
        dimensions=(),
    )
    histograms = cT.Output(
        doc="Distribution of the score for each kind of example.",
        name="{outputName}_finder_scores",
        storageClass="Plot",
        dimensions=(),
    )

    config: EvaluateLensFinderConfig

    def __init__(self, *, config: EvaluateLensFinderConfig):
        super().__init__(config=config)
        for k, name in enumerate(config.models):
            model = cT.Input(
                doc="Model package to evaluate.", name=name, storageClass=MODEL_STORAGE_CLASS, dimensions=()
            )
            setattr(self, f"model_{k}", model)


class EvaluateLensFinderConfig(PipelineTaskConfig, pipelineConnections=EvaluateLensFinderConnections):
    """Configuration of `EvaluateLensFinderTask`."""

    models = ListField[str](
        doc="Dataset types of the model packages to evaluate; the mean of their logits is one more lens "
        "finder if there are several.",
        default=["deeplens_model"],
    )
    inference = ConfigField[InferenceConfig](doc="How networks run.")
    chunkSize = RangeField(
        dtype=int, doc="Number of stamps that are worked on together.", default=1000, min=1
    )

    # What is measured.
    fprs = ListField[float](
        doc="False-positive rates at which true-positive rates are given.", default=[1e-2, 1e-3, 1e-4]
    )
    referenceFpr = RangeField(
        dtype=float,
        doc="False-positive rate of the completeness map, of the kinds of non-lenses and of robustness.",
        default=1e-2,
        min=0.0,
        max=1.0,
        inclusiveMax=False,
    )
    clearEinsteinRadius = RangeField(
        dtype=float, doc="Smallest Einstein radius in arcsec of a clear lens.", default=1.4, min=0.0
    )
    clearArcSnr = RangeField(
        dtype=float, doc="Smallest signal to noise of the arcs of a clear lens.", default=20.0, min=0.0
    )
    einsteinRadiusEdges = ListField[float](
        doc="Edges in arcsec of the cells of the completeness map; what is outside does not count.",
        default=[0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0],
    )
    arcSnrEdges = ListField[float](
        doc="Edges of the cells of the completeness map in the signal to noise of the arcs.",
        default=[10.0, 20.0, 30.0, 50.0, 100.0, 1000.0],
    )
    calibration = ChoiceField[str](
        doc="Calibration that is fitted to the validation examples.",
        default="isotonic",
        allowed={
            "isotonic": "Any ascending function; needs a thousand examples or more.",
            "platt": "A logistic function of the logit.",
        },
    )

    # The sky.
    lensDensity = RangeField(
        dtype=float,
        doc="Lenses per square degree among the objects that are looked at.",
        default=LENS_DENSITY,
        min=0.0,
        inclusiveMin=False,
    )
    candidateDensity = RangeField(
        dtype=float,
        doc="Objects per square degree that are looked at.",
        default=CANDIDATE_DENSITY,
        min=0.0,
        inclusiveMin=False,
    )

    # Baselines.
    doRingFinder = Field[bool](doc="Run RingFinder on the test examples?", default=True)
    ringFinder = ConfigField[RingFinderConfig](doc="RingFinder.")
    doColors = Field[bool](
        doc="Train a logistic regression on colours and magnitudes in apertures, of the train examples?",
        default=True,
    )
    apertureRadii = ListField[float](
        doc="Radii in arcsec of the apertures, ascending.", default=[0.8, 1.6, 3.2], minLength=1
    )

    # Robustness.
    maxRobustness = RangeField(
        dtype=int,
        doc="Number of test examples of each patch that are changed and scored again; 0 for none.",
        default=500,
        min=0,
    )
    shift = RangeField(
        dtype=int,
        doc="Largest error of the centre along each axis in pixels.  What comes into view from outside the "
        "stamp is bad.",
        default=5,
        min=0,
    )
    seeingFactor = RangeField(
        dtype=float, doc="Factor by which the PSF gets wider at equal noise.", default=1.25, min=1.0
    )
    zeroPointError = RangeField(
        dtype=float, doc="Error in mag of the zero point of the first band.", default=0.05, min=0.0
    )
    maskedFraction = RangeField(
        dtype=float,
        doc="Fraction of the rows that a bad stripe takes, in all bands, at a random place.",
        default=0.1,
        min=0.0,
        max=1.0,
    )

    # Realism.
    doProbe = Field[bool](
        doc="Tell lenses from galaxies without arcs by a linear probe of the features of each network, of "
        "the central pixels and of the outskirts?",
        default=True,
    )
    probeKind = Field[str](
        doc="Kind of non-lenses that differ from lenses by the arcs alone.", default="host"
    )
    outskirtsRadius = RangeField(
        dtype=float, doc="Distance in arcsec beyond which there should be no arcs.", default=4.0, min=0.0
    )
    seed = Field[int](doc="Seed of bootstraps, folds and changes of stamps.", default=1)

    def validate(self) -> None:
        super().validate()
        if len(set(self.models)) < len(self.models):
            raise FieldValidationError(self.__class__.models, self, "Models must be given once.")
        if not (self.models or self.doRingFinder or self.doColors):
            raise FieldValidationError(self.__class__.models, self, "There is no lens finder to evaluate.")
        if self.lensDensity > self.candidateDensity:
            raise FieldValidationError(
                self.__class__.lensDensity, self, "There cannot be more lenses than objects."
            )
        for field in ("einsteinRadiusEdges", "arcSnrEdges", "apertureRadii"):
            values = getattr(self, field)
            if any(b <= a for a, b in zip(values[:-1], values[1:], strict=True)):
                raise FieldValidationError(getattr(self.__class__, field), self, "The values must ascend.")


class EvaluateLensFinderTask(PipelineTask):
    """Measure lens finders on the test examples.

    Networks, their mean, and two baselines are tried on the same stamps:
    RingFinder (Gavazzi et al. 2014), and a logistic regression that knows
    only colours, magnitudes and concentrations, trained on the train examples.
    What the networks say is calibrated on the validation examples.  Stamps
    are changed as bad data would change them, and scored again.  Linear probes
    look for what gives simulations away.

    Tables are worked on one after the other, so that the stamps of one patch
    are in memory at a time.
    """

    ConfigClass: ClassVar[type[EvaluateLensFinderConfig]] = EvaluateLensFinderConfig
    _DefaultName: ClassVar[str] = "evaluateLensFinder"
    config: EvaluateLensFinderConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        inputs = butlerQC.get(inputRefs)
        handles = sorted(inputs["examples"], key=lambda handle: tuple(handle.dataId.required_values))
        try:
            models = [ModelPackage.from_arrow(inputs[f"model_{k}"]) for k in range(len(self.config.models))]
            outputs = self.run(
                (handle.get() for handle in handles), models, num_cores=butlerQC.resources.num_cores
            )
        except (EvaluationError, ModelPackageError) as err:
            raise InvalidQuantumError(str(err)) from err
        butlerQC.put(outputs, outputRefs)

    def run(
        self, examples: Iterable[Table], models: Iterable[ModelPackage] = (), *, num_cores: int = 1
    ) -> Struct:
        """Measure lens finders.

        Parameters
        ----------
        examples
            Tables of `SimulateLensesTask`; one is held in memory at a time.
        models
            Model packages.
        num_cores
            Threads that may be used on a CPU.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``metrics``
                The columns of `METRIC_COLUMNS` (`astropy.table.Table`).
            ``calibrations``
                Calibration of each network, by its name (`dict`).
            ``roc``, ``completeness``, ``reliability``, ``histograms``
                Figures (`matplotlib.figure.Figure`).

        Raises
        ------
        EvaluationError
            Raised if the examples do not fit the models or each other, or if
            the test examples are of one class.
        ModelPackageError
            Raised if a model is damaged or needs other bands.
        """
        finders = self._make_finders(models)
        measured = self._measure(examples, finders, num_cores)
        self._check(measured)
        rows = measured.rows
        test = rows[rows["split"] == "test"]
        scores = self._gather_scores(rows, finders)
        results = _MetricTable()
        excluded = measured.n_excluded
        is_test = np.asarray(rows["split"] == "test")
        n_lenses = int(np.asarray(rows["label"]).sum())
        results.add("", "all", "n_excluded", excluded, n_lenses, len(rows) - n_lenses)

        labels = np.asarray(test["label"])
        test_scores = {name: values[is_test] for name, values in scores.items()}
        thresholds = {}
        for name, values in test_scores.items():
            thresholds[name] = compute_operating_point(
                values, labels, fpr=self.config.referenceFpr, seed=self.config.seed
            ).threshold
            self._describe_rates(results, name, values, test)
            self._describe_kinds(results, name, values, test, thresholds[name])
            cells = self._map_completeness(values > thresholds[name], test)
            results.add_completeness(name, cells)
        self._compare(results, test_scores, test)
        networks = [*(finder.name for finder in finders), *([ENSEMBLE] if len(finders) > 1 else [])]
        calibrations = self._calibrate(results, {name: scores[name] for name in networks}, rows)
        self._describe_robustness(results, measured.changed, finders, thresholds)
        self._probe(results, measured.probes)

        self.metadata["n_lenses"] = int(labels.sum())
        self.metadata["n_non_lenses"] = int((~labels).sum())
        self.metadata["n_excluded"] = excluded
        for name, values in test_scores.items():
            self.log.info("AUROC %.4f +- %.4f: %s.", *compute_auroc(values, labels), name)
        best = networks[-1] if networks else next(iter(test_scores))
        figures = self._plot(test, test_scores, best, thresholds[best], calibrations)
        return Struct(metrics=results.to_table(), calibrations=calibrations, **figures)

    def _make_finders(self, models: Iterable[ModelPackage]) -> list[LensNetwork]:
        """Return the networks of model packages, ready for use."""
        finders = [LensNetwork.from_package(model) for model in models]
        names = [finder.name for finder in finders]
        if twice := {name for name in names if names.count(name) > 1}:
            raise EvaluationError(f"Several model packages are called {sorted(twice)}.")
        return finders

    # Measurements on stamps

    def _measure(self, tables: Iterable[Table], finders: list[LensNetwork], num_cores: int) -> _Measurements:
        """Return all that is needed of the stamps."""
        rows, changed, probes = [], [], []
        n_excluded, geometry = 0, None
        rng = np.random.default_rng(self.config.seed)
        for table in tables:
            if missing := {name for name, _, _ in EXAMPLE_COLUMNS} - set(table.colnames):
                raise EvaluationError(f"The examples have no columns {sorted(missing)}.")
            try:
                cutouts = Cutouts.from_table(table)
            except ValueError as err:
                raise EvaluationError(str(err)) from err
            here = (cutouts.bands, cutouts.size, round(cutouts.pixel_scale, 4))
            if geometry not in (None, here):
                raise EvaluationError(
                    f"Examples of {geometry} and of {here} (bands, pixels, arcsec) cannot be evaluated "
                    "together."
                )
            geometry = here
            spoilt = (~cutouts.bad & ~np.isfinite(cutouts.image)).any(axis=(1, 2, 3))
            n_excluded += int(spoilt.sum())
            truth = table[[name for name, _, _ in EXAMPLE_COLUMNS]][~spoilt]
            cutouts = cutouts[~spoilt]
            for start in range(0, len(truth), self.config.chunkSize):
                chunk = slice(start, start + self.config.chunkSize)
                rows.append(self._score_chunk(truth[chunk], cutouts[chunk], finders, num_cores))
                if self.config.doProbe:
                    probes.append(self._measure_features(truth[chunk], cutouts[chunk], finders, num_cores))
            if self.config.maxRobustness and finders:
                chosen = np.flatnonzero(truth["split"] == "test")
                chosen = np.sort(rng.permutation(chosen)[: self.config.maxRobustness])
                changed.append(self._score_changed(truth[chosen], cutouts[chosen], finders, rng, num_cores))
        if n_excluded:
            self.log.warning("%d examples have good pixels that are not finite; left out.", n_excluded)
        return _Measurements(_stack(rows), _stack(changed), _stack(probes), n_excluded)

    def _score_chunk(
        self, truth: Table, cutouts: Cutouts, finders: list[LensNetwork], num_cores: int
    ) -> Table:
        """Return truth and what each lens finder says."""
        rows = truth.copy()
        if self.config.doColors:
            rows["magnitudes"] = measure_magnitudes(cutouts, self.config.apertureRadii)
        looked_at = np.asarray(truth["split"] != "train")
        for finder in finders:
            rows[finder.name] = np.full(len(rows), np.nan)
            rows[finder.name][looked_at] = finder.score(cutouts[looked_at], self.config.inference, num_cores)
        if self.config.doRingFinder:
            test = np.asarray(truth["split"] == "test")
            rows[RING_FINDER] = np.full(len(rows), np.nan)
            rows["ring_finder_is_lens"] = np.zeros(len(rows), dtype=bool)
            try:
                rings = find_rings(cutouts[test], self.config.ringFinder)
            except ValueError as err:
                raise EvaluationError(f"{err}  Or set doRingFinder to False.") from err
            # No signal to noise is as good as none.
            rows[RING_FINDER][test] = np.nan_to_num(rings.snr, nan=-np.inf)
            rows["ring_finder_is_lens"][test] = rings.is_lens
        return rows

    def _score_changed(
        self,
        truth: Table,
        cutouts: Cutouts,
        finders: list[LensNetwork],
        rng: np.random.Generator,
        num_cores: int,
    ) -> Table:
        """Return what networks say of stamps that were changed."""
        rows = truth[["label"]].copy()
        config = self.config
        changes: dict[str, Callable[[Cutouts], Cutouts]] = {
            f"centre off by up to {config.shift} pixels": functools.partial(
                shift_centers, largest=config.shift, rng=rng
            ),
            f"seeing {config.seeingFactor:g} times as wide": functools.partial(
                blur, factor=config.seeingFactor, rng=rng
            ),
            f"bad stripe over {config.maskedFraction:.0%}": functools.partial(
                mask_stripe, fraction=config.maskedFraction, rng=rng
            ),
        }
        for error in (config.zeroPointError, -config.zeroPointError):
            changes[f"{cutouts.bands[0]} band {error:+g} mag"] = functools.partial(
                change_zero_point, band=0, error=error
            )
        for band, name in enumerate(cutouts.bands):
            changes[f"no {name} band"] = functools.partial(remove_band, band=band)
        for finder in finders:
            rows[f"{finder.name}: unchanged"] = finder.score(cutouts, config.inference, num_cores)
        for change, apply in changes.items():
            stamps = apply(cutouts)
            for finder in finders:
                rows[f"{finder.name}: {change}"] = finder.score(stamps, config.inference, num_cores)
        return rows

    def _measure_features(
        self, truth: Table, cutouts: Cutouts, finders: list[LensNetwork], num_cores: int
    ) -> Table:
        """Return features of lenses and of the galaxies that have no arcs."""
        chosen = np.asarray(
            (truth["split"] == "test") & (truth["label"] | (truth["kind"] == self.config.probeKind))
        )
        rows, cutouts = truth[["label", "host_id"]][chosen], cutouts[chosen]
        rows["central pixels"] = measure_center(cutouts)
        rows["outskirts"] = measure_outskirts(cutouts, self.config.outskirtsRadius)
        for finder in finders:
            features = finder.compute_features(cutouts, num_cores)
            if features is not None:
                rows[finder.name] = features
        return rows

    def _check(self, measured: _Measurements) -> None:
        """Raise if nothing can be measured; warn of galaxies in two splits."""
        rows = measured.rows
        test = np.asarray(rows["split"] == "test") if len(rows) else np.zeros(0, dtype=bool)
        labels = np.asarray(rows["label"])[test] if len(rows) else test
        if labels.all() or not labels.any():
            raise EvaluationError(
                f"The test examples are {int(labels.sum())} lenses and {int((~labels).sum())} non-lenses; "
                "both are needed.  Add patches, or change the fractions of SimulateLensesTask."
            )
        if shared := set(rows["host_id"][test]) & set(rows["host_id"][~test]):
            self.log.warning("%d galaxies of the test examples are in other splits too.", len(shared))
        self.metadata["n_shared_hosts"] = len(shared)

    def _gather_scores(self, rows: Table, finders: list[LensNetwork]) -> dict[str, np.ndarray]:
        """Return the scores of all lens finders, by name."""
        scores = {finder.name: np.asarray(rows[finder.name]) for finder in finders}
        looked_at = np.asarray(rows["split"] != "train")
        for name, values in scores.items():
            if n_bad := int((~np.isfinite(values[looked_at])).sum()):
                raise EvaluationError(f"{name} gives {n_bad} of {looked_at.sum()} examples no finite score.")
        if len(finders) > 1:
            scores[ENSEMBLE] = np.mean(list(scores.values()), axis=0)
        if self.config.doRingFinder:
            scores[RING_FINDER] = np.asarray(rows[RING_FINDER])
        if self.config.doColors:
            train = np.asarray(rows["split"] == "train")
            labels = np.asarray(rows["label"])
            if labels[train].all() or not labels[train].any():
                self.log.warning("The train examples are of one class; no classifier of colours.")
            else:
                scores[COLORS] = classify_colors(np.asarray(rows["magnitudes"]), labels, train)
        return scores

    # Figures of merit

    def _describe_rates(self, results: _MetricTable, name: str, scores: np.ndarray, test: Table) -> None:
        """Add AUROC, rates, and what they mean on the sky."""
        config = self.config
        labels = np.asarray(test["label"])
        clear = ~labels | self._find_clear(test)
        parts = {"all": np.ones_like(labels), self._clear_name: clear}
        for subset, part in parts.items():
            s, y = scores[part], labels[part]
            n1, n0 = int(y.sum()), int((~y).sum())
            results.add(name, subset, "auroc", compute_auroc_interval(s, y), n1, n0)
            note = f"Metcalf et al. count in 100,000 stamps; here are {n0} non-lenses."
            for metric, k in (("tpr0", 0), ("tpr10", 9)):
                point = compute_operating_point(s, y, false_positives=k, seed=config.seed)
                results.add(name, subset, metric, point.tpr, n1, n0, note=note)
            for fpr in config.fprs:
                point = compute_operating_point(s, y, fpr=fpr, seed=config.seed)
                results.add(name, subset, f"tpr_at_fpr_{fpr:g}", point.tpr, n1, n0, note=point.limit)
                if subset != "all":
                    continue
                # What it means if the rate is what it should be; the interval
                # is for what it is.
                rate = dataclasses.replace(
                    point.fpr, value=fpr, low=min(fpr, point.fpr.low), high=max(fpr, point.fpr.high)
                )
                found = compute_sky_yield(
                    point.tpr,
                    rate,
                    lens_density=config.lensDensity,
                    candidate_density=config.candidateDensity,
                )
                results.add(name, subset, f"threshold_at_fpr_{fpr:g}", point.threshold, n1, n0)
                for metric, value, unit in (
                    ("precision", found.precision, ""),
                    ("contaminants", found.contaminants, "deg-2"),
                ):
                    note = point.limit
                    results.add(name, subset, f"{metric}_at_fpr_{fpr:g}", value, n1, n0, unit=unit, note=note)

    @property
    def _clear_name(self) -> str:
        config = self.config
        return f"einstein_radius > {config.clearEinsteinRadius:g}, arc_snr > {config.clearArcSnr:g}"

    def _find_clear(self, test: Table) -> np.ndarray:
        config = self.config
        clear = test["einstein_radius"] > config.clearEinsteinRadius
        return np.asarray(clear & (test["arc_snr"] > config.clearArcSnr))

    def _describe_kinds(
        self, results: _MetricTable, name: str, scores: np.ndarray, test: Table, threshold: float
    ) -> None:
        """Add how well each kind of non-lens is told from lenses."""
        labels, kinds = np.asarray(test["label"]), np.asarray(test["kind"])
        for kind in np.unique(kinds[~labels]):
            part = labels | (kinds == kind)
            others = scores[kinds == kind]
            n1, n0, subset = int(labels.sum()), len(others), f"kind = {kind}"
            results.add(name, subset, "auroc", compute_auroc_interval(scores[part], labels[part]), n1, n0)
            rate = Fraction.from_counts(int((others > threshold).sum()), n0)
            results.add(name, subset, "fpr_at_threshold", rate, 0, n0)

    def _map_completeness(self, found: np.ndarray, test: Table) -> CompletenessMap:
        lenses = np.asarray(test["label"])
        return compute_completeness_map(
            found[lenses],
            np.asarray(test["einstein_radius"])[lenses],
            np.asarray(test["arc_snr"])[lenses],
            x_edges=list(self.config.einsteinRadiusEdges),
            y_edges=list(self.config.arcSnrEdges),
        )

    def _compare(self, results: _MetricTable, scores: Mapping[str, np.ndarray], test: Table) -> None:
        """Add how lens finders do beside the baselines."""
        labels = np.asarray(test["label"])
        n1, n0 = int(labels.sum()), int((~labels).sum())
        if COLORS in scores:
            for name in set(scores) - {COLORS}:
                difference = compute_auroc_difference(scores[name], scores[COLORS], labels)
                results.add_error(name, "all", "auroc_above_colors", difference, n1, n0, bounds=(-1, 1))
        if not self.config.doRingFinder:
            return
        decision = np.asarray(test["ring_finder_is_lens"])
        for subset, part in {
            "all": np.ones_like(labels),
            self._clear_name: ~labels | self._find_clear(test),
        }.items():
            y = labels[part]
            n1, n0 = int(y.sum()), int((~y).sum())
            tpr = Fraction.from_counts(int(decision[part][y].sum()), n1)
            fpr = Fraction.from_counts(int(decision[part][~y].sum()), n0)
            results.add("RingFinder", subset, "decision_tpr", tpr, n1, 0)
            results.add("RingFinder", subset, "decision_fpr", fpr, 0, n0)
            for name in scores:
                point = compute_operating_point(
                    scores[name][part], y, fpr=min(fpr.value, 1 - 1e-9), seed=self.config.seed
                )
                results.add(
                    name, subset, "tpr_at_ringfinder_fpr", point.tpr, n1, n0, note=f"At FPR {fpr.value:.4g}."
                )

    def _calibrate(
        self, results: _MetricTable, scores: Mapping[str, np.ndarray], rows: Table
    ) -> dict[str, dict[str, Any]]:
        """Add how well probabilities can be believed; return calibrations."""
        calibrations: dict[str, dict[str, Any]] = {}
        test = np.asarray(rows["split"] == "test")
        validation = np.asarray(rows["split"] == "validation")
        labels = np.asarray(rows["label"])
        n1, n0 = int(labels[test].sum()), int((~labels[test]).sum())
        fit = fit_isotonic if self.config.calibration == "isotonic" else fit_platt
        usable = not labels[validation].all() and labels[validation].any()
        if not usable and scores:
            self.log.warning("The validation examples are of one class or none; nothing is calibrated.")
        for name, values in scores.items():
            probabilities = {"_raw": expit(values[test])}
            if usable:
                calibrations[name] = fit(values[validation], labels[validation])
                # Splits may differ in their share of lenses.
                probabilities[""] = apply_calibration(
                    calibrations[name], values[test], prevalence=labels[test].mean()
                )
            for suffix, p in probabilities.items():
                for metric, compute in (
                    ("ece", compute_calibration_error),
                    ("brier", compute_brier_score),
                    ("log_loss", compute_log_loss),
                ):
                    results.add(name, "all", f"{metric}{suffix}", compute(p, labels[test]), n1, n0)
        return calibrations

    def _describe_robustness(
        self,
        results: _MetricTable,
        changed: Table,
        finders: list[LensNetwork],
        thresholds: Mapping[str, float],
    ) -> None:
        """Add what changes of the stamps do to the scores."""
        if not len(changed):
            return
        labels = np.asarray(changed["label"])
        n1, n0 = int(labels.sum()), int((~labels).sum())
        for finder in finders:
            before = np.asarray(changed[f"{finder.name}: unchanged"])
            for column in changed.colnames:
                name, _, change = column.partition(": ")
                if name != finder.name:
                    continue
                after = np.asarray(changed[column])
                results.add(name, change, "auroc", compute_auroc_interval(after, labels), n1, n0)
                above = after > thresholds[name]
                for metric, part in (("tpr_at_threshold", labels), ("fpr_at_threshold", ~labels)):
                    rate = Fraction.from_counts(int(above[part].sum()), int(part.sum()))
                    counts = (n1, 0) if part is labels else (0, n0)
                    results.add(name, change, metric, rate, *counts)
                rms = float(np.sqrt(np.mean((after - before) ** 2)))
                results.add(name, change, "score_change", rms, n1, n0)

    def _probe(self, results: _MetricTable, probes: Table) -> None:
        """Add how well lenses are told from their hosts by simple means."""
        if not len(probes):
            return
        labels, hosts = np.asarray(probes["label"]), np.asarray(probes["host_id"])
        n1, n0 = int(labels.sum()), int((~labels).sum())
        for column in probes.colnames[2:]:
            features = np.asarray(probes[column], dtype=np.float64).reshape(len(probes), -1)
            network = column not in ("central pixels", "outskirts")
            result = compute_probe_auroc(features, labels, groups=hosts, seed=self.config.seed)
            results.add_error(
                column if network else "linear probe",
                f"{'features' if network else column} of kind = {self.config.probeKind}",
                "probe_auroc",
                result,
                n1,
                n0,
                note="Folds by galaxy."
                if n0
                else f"There are no non-lenses of kind {self.config.probeKind}.",
            )

    def _plot(
        self,
        test: Table,
        scores: Mapping[str, np.ndarray],
        best: str,
        threshold: float,
        calibrations: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        """Return the figures, by the names of the connections."""
        from .evaluation_plots import plot_completeness, plot_reliability, plot_roc, plot_score_histograms

        labels = np.asarray(test["label"])
        rate = f"FPR {self.config.referenceFpr:g}"
        decisions = (
            {"RingFinder": np.asarray(test["ring_finder_is_lens"])} if self.config.doRingFinder else {}
        )
        is_network = best not in (COLORS, RING_FINDER)
        finite = np.isfinite(scores[best])
        probabilities = {"score": expit(scores[best])} if is_network else {}
        if best in calibrations:
            label = f"calibrated ({self.config.calibration})"
            probabilities[label] = apply_calibration(
                calibrations[best], scores[best], prevalence=labels.mean()
            )
        return {
            "roc": plot_roc(scores, labels, decisions=decisions, title="Test examples"),
            "completeness": plot_completeness(
                self._map_completeness(scores[best] > threshold, test), title=f"{best} at {rate}"
            ),
            "reliability": plot_reliability(probabilities, labels, title=best),
            "histograms": plot_score_histograms(
                scores[best][finite],
                np.asarray(test["kind"])[finite],
                threshold=threshold,
                threshold_label=rate,
                x_label="Logit of the score" if is_network else "Score",
                title=best,
            ),
        }


@dataclasses.dataclass(frozen=True, eq=False)
class LensNetwork:
    """A network that scores stamps which may be larger than it needs."""

    name: str
    """Name and version of the model package."""

    model: ModelPackage
    """The package."""

    network: torch.nn.Module
    """The network."""

    @classmethod
    def from_package(cls, model: ModelPackage) -> LensNetwork:
        """Make from a model package.

        Parameters
        ----------
        model
            The package.
        """
        return cls(f"{model.name} {model.version}", model, model.make_network())

    def prepare(self, cutouts: Cutouts) -> np.ndarray:
        """Return inputs of the network, shape ``(N, bands, y, x)``.

        Parameters
        ----------
        cutouts
            Stamps, at least as large as those of the network.

        Raises
        ------
        EvaluationError
            Raised if the stamps are too small.
        ModelPackageError
            Raised if they lack a band.
        """
        settings = self.model.settings
        self.model.check_bands(cutouts.bands)
        stamps = cutouts.select_bands(settings.bands)
        try:
            if abs(settings.pixel_scale / stamps.pixel_scale - 1) > SCALE_TOLERANCE:
                stamps = stamps.resample(settings.pixel_scale, settings.stamp_size)
        except ValueError as err:
            raise EvaluationError(f"{self.name}: {err}") from err
        if stamps.size < settings.stamp_size:
            raise EvaluationError(
                f"{self.name} needs stamps of {settings.stamp_size} pixels; those of the examples have "
                f"{stamps.size}.  Set stampSize of SimulateLensesTask."
            )
        return settings.preprocessing.apply(_crop(stamps, settings.stamp_size))

    def score(self, cutouts: Cutouts, config: InferenceConfig, num_threads: int) -> np.ndarray:
        """Return the logits of stamps, shape ``(N,)``.

        Parameters
        ----------
        cutouts
            Stamps, at least as large as those of the network.
        config
            How the network runs.
        num_threads
            Threads that may be used on a CPU.
        """
        return predict(self.network, self.prepare(cutouts), config, num_threads=num_threads)

    def compute_features(self, cutouts: Cutouts, num_threads: int) -> np.ndarray | None:
        """Return what the last dense layer sees, shape ``(N, F)``; `None` for
        a network that has none.

        Parameters
        ----------
        cutouts
            Stamps, at least as large as those of the network.
        num_threads
            Threads that may be used.

        Notes
        -----
        It runs in torch on the CPU, for other engines do not show what is
        inside of a network.
        """
        import torch

        layers = [module for module in self.network.modules() if isinstance(module, torch.nn.Linear)]
        if not layers:
            return None
        seen = [np.empty((0, layers[-1].in_features), dtype=np.float32)]

        def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen.append(inputs[0].numpy().reshape(len(inputs[0]), -1))

        hook = layers[-1].register_forward_pre_hook(keep)
        try:
            with torch_threads(num_threads), torch.inference_mode():
                for batch in torch.from_numpy(self.prepare(cutouts)).split(32):
                    self.network(batch)
        finally:
            hook.remove()
        return np.concatenate(seen)


@dataclasses.dataclass(frozen=True, eq=False)
class _Measurements:
    """What was measured on the stamps."""

    rows: Table
    """Truth and scores of every example."""

    changed: Table
    """Scores of some test examples under changes, ``<name>: <change>``."""

    probes: Table
    """Features of test lenses and of hosts without arcs."""

    n_excluded: int
    """Number of examples that were left out."""


class _MetricTable:
    """Rows of the metrics dataset."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        classifier: str,
        subset: str,
        metric: str,
        value: Fraction | float,
        n_positive: int,
        n_negative: int,
        *,
        unit: str = "",
        note: str = "",
    ) -> None:
        """Add a row.

        Parameters
        ----------
        classifier
            Name of the lens finder; empty if the row is of none.
        subset
            Which examples.
        metric
            Name of the figure of merit; it starts with one of those that have
            a description.
        value
            The figure, with its interval if it has one.
        n_positive, n_negative
            Number of lenses and of other examples.
        unit
            Unit of the figure; empty if it has none.
        note
            Remark on the figure.
        """
        if not isinstance(value, Fraction):
            value = Fraction(value, math.nan, math.nan, 0)
        family = next(name for name in sorted(_DESCRIPTIONS, key=len)[::-1] if metric.startswith(name))
        self._rows.append(
            {
                "classifier": classifier,
                "subset": subset,
                "metric": metric,
                "value": value.value,
                "low": value.low,
                "high": value.high,
                "unit": unit,
                "n_positive": n_positive,
                "n_negative": n_negative,
                "description": _DESCRIPTIONS[family],
                "note": note,
            }
        )

    def add_error(
        self,
        classifier: str,
        subset: str,
        metric: str,
        result: tuple[float, float],
        n_positive: int,
        n_negative: int,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        note: str = "",
    ) -> None:
        """Add a row from a value and its standard error.

        Parameters
        ----------
        classifier, subset, metric
            As for `add`.
        result
            Value and standard error; the error may be NaN.
        n_positive, n_negative
            As for `add`.
        bounds
            Smallest and largest value that the figure can have.
        note
            As for `add`.
        """
        value, error = result
        low, high = (min(max(value + sign * 1.96 * error, bounds[0]), bounds[1]) for sign in (-1, 1))
        if math.isnan(error):
            low = high = math.nan
        self.add(classifier, subset, metric, Fraction(value, low, high, 0), n_positive, n_negative, note=note)

    def add_completeness(self, classifier: str, cells: CompletenessMap) -> None:
        """Add the cells of a map that have lenses.

        Parameters
        ----------
        classifier
            Name of the lens finder.
        cells
            Map by Einstein radius and signal to noise of the arcs.
        """
        low, high = cells.interval
        for row, column in zip(*np.nonzero(cells.n), strict=True):
            (x0, x1), (y0, y1) = cells.x_edges[column : column + 2], cells.y_edges[row : row + 2]
            n = int(cells.n[row, column])
            value = Fraction(cells.value[row, column], low[row, column], high[row, column], n)
            subset = f"{x0:g} <= einstein_radius < {x1:g}, {y0:g} <= arc_snr < {y1:g}"
            self.add(classifier, subset, "completeness", value, n, 0)

    def to_table(self) -> Table:
        """Return the table."""
        table = Table()
        for name, (dtype, description) in METRIC_COLUMNS.items():
            values = np.array([row[name] for row in self._rows], dtype=dtype)
            table[name] = Column(values, description=description)
        return table


def summarize_metrics(metrics: Table, classifier: str) -> dict[str, dict[str, Any]]:
    """Return the figures of merit of a lens finder as types that JSON has.

    They can go into the record of its model package, under ``evaluation``.

    Parameters
    ----------
    metrics
        The table ``metrics`` of `EvaluateLensFinderTask`.
    classifier
        Name of the lens finder.

    Returns
    -------
    figures
        For each subset and metric ``value``, ``low``, ``high``,
        ``n_positive`` and ``n_negative``; `None` for NaN.

    Raises
    ------
    KeyError
        Raised if there is no such lens finder.
    """
    figures: dict[str, dict[str, Any]] = {}
    for row in metrics[metrics["classifier"] == classifier]:
        numbers = {
            name: float(row[name]) if math.isfinite(row[name]) else None for name in ("value", "low", "high")
        }
        counts = {name: int(row[name]) for name in ("n_positive", "n_negative")}
        figures.setdefault(str(row["subset"]), {})[str(row["metric"])] = numbers | counts
    if not figures:
        known = sorted({str(name) for name in metrics["classifier"]} - {""})
        raise KeyError(f"No lens finder {classifier!r} was evaluated; there are {known}.")
    return figures


def add_evaluation(
    model: ModelPackage, metrics: Table, calibrations: Mapping[str, Mapping[str, Any]]
) -> ModelPackage:
    """Return a model package with its evaluation in its record.

    Parameters
    ----------
    model
        A model package that was evaluated.
    metrics, calibrations
        Outputs of `EvaluateLensFinderTask`.

    Returns
    -------
    package
        The record has the entries ``evaluation``, from `summarize_metrics`,
        and ``calibration``, for `.calibration.apply_calibration`, if there is
        one.

    Raises
    ------
    KeyError
        Raised if this model was not evaluated.
    """
    name = f"{model.name} {model.version}"
    record = dict(model.record) | {"evaluation": summarize_metrics(metrics, name)}
    if name in calibrations:
        record["calibration"] = dict(calibrations[name])
    return dataclasses.replace(model, record=record)


def _crop(cutouts: Cutouts, size: int) -> Cutouts:
    """Return the central pixels of stamps."""
    start = (cutouts.size - size) // 2
    crop = (..., slice(start, start + size), slice(start, start + size))
    return dataclasses.replace(
        cutouts, image=cutouts.image[crop], variance=cutouts.variance[crop], bad=cutouts.bad[crop]
    )


def _stack(tables: list[Table]) -> Table:
    """Join tables, of which there may be none."""
    return vstack(tables, metadata_conflicts="silent") if tables else Table()

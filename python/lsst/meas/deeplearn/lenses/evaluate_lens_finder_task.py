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
    "EvaluateLensFinderConfig",
    "EvaluateLensFinderConnections",
    "EvaluateLensFinderTask",
    "list_models",
)

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from astropy.table import Table
from scipy.special import expit

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import (
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

from ..inference import InferenceConfig
from ..metrics import (
    Fraction,
    OperatingPoint,
    compute_auroc,
    compute_auroc_difference,
    compute_auroc_interval,
    compute_operating_point,
)
from ..model_package import (
    MODEL_STORAGE_CLASS,
    ModelPackage,
    ModelPackageError,
    find_models,
    load_model,
)
from .calibration import (
    compute_brier_score,
    compute_calibration_error,
    compute_calibration_noise,
    compute_log_loss,
)
from .completeness import (
    CANDIDATE_DENSITY,
    CLEAR_ARC_SNR,
    CLEAR_EINSTEIN_RADIUS,
    LENS_DENSITY,
    CompletenessMap,
    compute_completeness_map,
    compute_sky_yield,
)
from .ensemble import combine_logits, find_calibration
from .example_scores import RING_FINDER, ExampleScorer, Measurements
from .lens_network import EvaluationError, LensNetwork
from .likelihood_ratio import ScoreCalibration
from .logistic_regression import compute_probe_auroc
from .metric_table import MetricTable
from .ring_finder import RingFinderConfig
from .simple_features import classify_colors

ENSEMBLE, COLORS = "mean of all models", "colour and magnitude"
"""Names of classifiers that are no model package."""

REAL = "others as in the coadd"
"""Name of the subset whose non-lenses have nothing painted on them."""


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
    ensemble = cT.PrerequisiteInput(
        doc="All model packages of the input collections, chosen as LensFinderTask does.",
        name="deeplens_model",
        storageClass=MODEL_STORAGE_CLASS,
        dimensions=(),
        multiple=True,
        deferLoad=True,
        lookupFunction=find_models,
    )
    blankCandidates = cT.PrerequisiteInput(
        doc="What LensFinderTask says of the objects of fields without lenses: all tables of the input "
        "collections.",
        name="{outputName}_candidates",
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
        doc="Calibration of each network, by name, for lenses.likelihood_ratio.ScoreCalibration.from_dict.",
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
        if not config.doBlankFields:
            del self.blankCandidates
        if config.doFindModels:
            return
        del self.ensemble
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
    doFindModels = Field[bool](
        doc="Evaluate all model packages of the input collections, as LensFinderTask takes them, instead of "
        "those of ``models``?",
        default=False,
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
        dtype=float,
        doc="Smallest Einstein radius in arcsec of a clear lens.",
        default=CLEAR_EINSTEIN_RADIUS,
        min=0.0,
    )
    clearArcSnr = RangeField(
        dtype=float,
        doc="Smallest signal to noise of the arcs of a clear lens.",
        default=CLEAR_ARC_SNR,
        min=0.0,
    )
    einsteinRadiusEdges = ListField[float](
        doc="Edges in arcsec of the cells of the completeness map; what is outside does not count.",
        default=[0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0],
    )
    arcSnrEdges = ListField[float](
        doc="Edges of the cells of the completeness map in the signal to noise of the arcs.",
        default=[10.0, 20.0, 30.0, 50.0, 100.0, 1000.0],
    )
    realKinds = ListField[str](
        doc="Kinds of non-lenses that are as the coadd has them, with nothing painted on them; rates among "
        "them alone are given too.",
        default=["host", "galaxy", "blue", "star"],
    )
    doBlankFields = Field[bool](
        doc="Measure false-positive rates on the objects of fields without lenses too, as LensFinderTask "
        "scored them with the same models?",
        default=False,
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
    What the networks say is calibrated on the calibration examples or, without
    any, each half of the galaxies of the test by the other.  Stamps
    are changed as bad data would change them, and scored again.  Linear probes
    look for what gives simulations away.  Fields without lenses say how many
    false positives a search has.

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
            if self.config.doFindModels:
                models = [load_model(handle) for handle in inputs["ensemble"]]
            else:
                names = [f"model_{k}" for k in range(len(self.config.models))]
                models = [ModelPackage.from_arrow(inputs[name]) for name in names]
            outputs = self.run(
                (handle.get() for handle in handles),
                models,
                blank=[handle.get() for handle in inputs.get("blankCandidates", [])],
                num_cores=butlerQC.resources.num_cores,
            )
        except (EvaluationError, ModelPackageError) as err:
            raise InvalidQuantumError(str(err)) from err
        butlerQC.put(outputs, outputRefs)

    def run(
        self,
        examples: Iterable[Table],
        models: Iterable[ModelPackage] = (),
        *,
        blank: Iterable[Table] = (),
        num_cores: int = 1,
    ) -> Struct:
        """Measure lens finders.

        Parameters
        ----------
        examples
            Tables of `SimulateLensesTask`; one is held in memory at a time.
        models
            Model packages.
        blank
            Tables of `LensFinderTask` of fields without lenses, made with
            all the models.
        num_cores
            Threads that may be used on a CPU.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``metrics``
                The columns of `METRIC_COLUMNS` (`astropy.table.Table`).
            ``calibrations``
                Calibration of each network, by its name, as
                `ScoreCalibration.to_dict` returns it (`dict`).
            ``roc``, ``completeness``, ``reliability``, ``histograms``
                Figures (`matplotlib.figure.Figure`).

        Raises
        ------
        EvaluationError
            Raised if the examples do not fit the models or each other, if
            the test examples are of one class, or if the objects of blank
            fields were scored by other models.
        ModelPackageError
            Raised if a model is damaged or needs other bands.
        """
        finders = self._make_finders(models)
        measured = ExampleScorer(self.config, finders, num_cores, self.log).measure(examples)
        self._check(measured)
        rows = measured.rows
        test = rows[rows["split"] == "test"]
        scores = self._gather_scores(rows, finders)
        results = MetricTable()
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
            clear = self._find_clear(test)
            self._describe_rates(results, name, values, labels, clear)
            part = labels | np.isin(test["kind"], list(self.config.realKinds))
            if not labels[part].all():
                self._describe_rates(results, name, values[part], labels[part], clear[part], others=REAL)
            self._describe_kinds(results, name, values, test, thresholds[name])
            cells = self._map_completeness(values > thresholds[name], test)
            results.add_completeness(name, cells)
        self._compare(results, test_scores, test)
        networks = [*(finder.name for finder in finders), *([ENSEMBLE] if len(finders) > 1 else [])]
        calibrations, probabilities = self._calibrate(results, finders, rows)
        self._describe_robustness(results, measured.changed, finders, thresholds)
        self._probe(results, measured.probes)
        if (others := self._read_blank(blank, finders)) is not None:
            self._describe_blank(results, networks[-1], test_scores[networks[-1]], others, test)

        self.metadata["n_lenses"] = int(labels.sum())
        self.metadata["n_non_lenses"] = int((~labels).sum())
        self.metadata["n_excluded"] = excluded
        for name, values in test_scores.items():
            self.log.info("AUROC %.4f +- %.4f: %s.", *compute_auroc(values, labels), name)
        best = networks[-1] if networks else next(iter(test_scores))
        figures = self._plot(test, test_scores, best, thresholds[best], probabilities.get(best, {}))
        return Struct(metrics=results.to_table(), calibrations=calibrations, **figures)

    def _make_finders(self, models: Iterable[ModelPackage]) -> list[LensNetwork]:
        """Return the networks of model packages, ready for use."""
        finders = [LensNetwork.from_package(model) for model in models]
        names = [finder.name for finder in finders]
        if twice := {name for name in names if names.count(name) > 1}:
            raise EvaluationError(f"Several model packages are called {sorted(twice)}.")
        return finders

    def _check(self, measured: Measurements) -> None:
        """Raise if nothing can be measured; warn of galaxies in two splits."""
        rows = measured.rows
        test = np.asarray(rows["split"] == "test") if len(rows) else np.zeros(0, dtype=bool)
        labels = np.asarray(rows["label"])[test] if len(rows) else test
        if labels.all() or not labels.any():
            raise EvaluationError(
                f"The test examples are {int(labels.sum())} lenses and {int((~labels).sum())} non-lenses; "
                "both are needed.  Add patches, or change the fractions of SimulateLensesTask."
            )
        # Object IDs may repeat from one sky map to another.
        tested, others = (
            set(zip(part["host_id"], part["ra"], strict=True)) for part in (rows[test], rows[~test])
        )
        if shared := tested & others:
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

    def _describe_rates(
        self,
        results: MetricTable,
        name: str,
        scores: np.ndarray,
        labels: np.ndarray,
        clear: np.ndarray,
        others: str = "",
    ) -> None:
        """Add AUROC, rates, and what they mean on the sky."""
        config = self.config
        clear_name = ", ".join([others, self._clear_name] if others else [self._clear_name])
        parts = {others or "all": np.ones_like(labels), clear_name: ~labels | clear}
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
                if part.all():
                    self._describe_yield(results, name, subset, point, fpr, (n1, n0))

    def _describe_yield(
        self,
        results: MetricTable,
        name: str,
        subset: str,
        point: OperatingPoint,
        fpr: float,
        counts: tuple[int, int],
    ) -> None:
        """Add what a false-positive rate means on the sky."""
        # What it means if the rate is what it should be; the interval is for
        # what it is.
        rate = dataclasses.replace(
            point.fpr, value=fpr, low=min(fpr, point.fpr.low), high=max(fpr, point.fpr.high)
        )
        found = compute_sky_yield(
            point.tpr,
            rate,
            lens_density=self.config.lensDensity,
            candidate_density=self.config.candidateDensity,
        )
        results.add(name, subset, f"threshold_at_fpr_{fpr:g}", point.threshold, *counts)
        for metric, value, unit in (
            ("precision", found.precision, ""),
            ("contaminants", found.contaminants, "deg-2"),
        ):
            results.add(name, subset, f"{metric}_at_fpr_{fpr:g}", value, *counts, unit=unit, note=point.limit)

    def _read_blank(self, tables: Iterable[Table], finders: list[LensNetwork]) -> np.ndarray | None:
        """Return the scores of objects in fields without lenses; `None` if
        there are no such fields.
        """
        scores = []
        models = sorted(f"{finder.model.name} {finder.model.version}" for finder in finders)
        for table in tables:
            if len(table) and (used := list_models(table)) != models:
                raise EvaluationError(
                    f"The objects of blank fields were scored with models {used}, not with {models}.  Run "
                    "LensFinderTask on them with these."
                )
            usable = np.asarray(table["patch_inner"]) & ~np.asarray(table["flag_not_scored"])
            scores.append(np.asarray(table["score"])[usable])
        return np.concatenate(scores) if scores else None

    def _describe_blank(
        self, results: MetricTable, name: str, logits: np.ndarray, others: np.ndarray, test: Table
    ) -> None:
        """Add rates for the lenses of the test examples and the objects of
        fields without lenses.
        """
        lenses = np.asarray(test["label"])
        # Rounded as LensFinderTask rounds, so that ties are ties.
        scores = np.concatenate([expit(logits[lenses]).astype(np.float32), others])
        labels = np.arange(len(scores)) < lenses.sum()
        clear = np.concatenate([self._find_clear(test)[lenses], np.zeros(len(others), dtype=bool)])
        self._describe_rates(results, name, scores, labels, clear, others="blank fields")

    @property
    def _clear_name(self) -> str:
        config = self.config
        return f"einstein_radius > {config.clearEinsteinRadius:g}, arc_snr > {config.clearArcSnr:g}"

    def _find_clear(self, test: Table) -> np.ndarray:
        config = self.config
        clear = test["einstein_radius"] > config.clearEinsteinRadius
        return np.asarray(clear & (test["arc_snr"] > config.clearArcSnr))

    def _describe_kinds(
        self, results: MetricTable, name: str, scores: np.ndarray, test: Table, threshold: float
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

    def _compare(self, results: MetricTable, scores: Mapping[str, np.ndarray], test: Table) -> None:
        """Add how lens finders do beside the baselines."""
        labels = np.asarray(test["label"])
        n1, n0 = int(labels.sum()), int((~labels).sum())
        if COLORS in scores:
            for name in [name for name in scores if name != COLORS]:
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
        self, results: MetricTable, finders: list[LensNetwork], rows: Table
    ) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """Add how well probabilities can be believed.

        Returns
        -------
        calibrations
            Calibration of each network, by name.
        probabilities
            Probabilities of the test examples by name of the lens finder, and
            by how they were made.
        """
        splits, labels = np.asarray(rows["split"]), np.asarray(rows["label"])
        test = splits == "test"
        fit = splits == "calibration"
        if fit.any():
            folds = [(fit, test)]
        else:
            # Each half of the galaxies of the test by the other.
            odd = np.unique(rows["host_id"], return_inverse=True)[1] % 2 == 1
            folds, fit = [(test & odd, test & ~odd), (test & ~odd, test & odd)], test
        fitted = {finder.name: self._fit_calibration(rows, finder, fit) for finder in finders}
        groups = {finder.name: [finder] for finder in finders}
        if len(finders) > 1:
            groups[ENSEMBLE] = finders
        probabilities: dict[str, dict[str, np.ndarray]] = {}
        n1, n0 = int(labels[test].sum()), int((~labels[test]).sum())
        titles = {"_raw": "score", "": "calibrated", "_of_package": "calibrated by the package"}
        for name, members in groups.items():
            made = self._compute_probabilities(rows, members, folds, test)
            for suffix, p in made.items():
                noise = compute_calibration_noise(p)
                perfect = f"Perfect probabilities have {noise:.3f} with as many examples."
                for metric, value, note in (
                    ("ece", compute_calibration_error(p, labels[test]), perfect),
                    ("brier", compute_brier_score(p, labels[test]), ""),
                    ("log_loss", compute_log_loss(p, labels[test]), ""),
                ):
                    results.add(name, "all", f"{metric}{suffix}", value, n1, n0, note=note)
            probabilities[name] = {titles[suffix]: p for suffix, p in made.items()}
        return {name: own.to_dict() for name, own in fitted.items() if own is not None}, probabilities

    def _compute_probabilities(
        self,
        rows: Table,
        members: list[LensNetwork],
        folds: list[tuple[np.ndarray, np.ndarray]],
        test: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Return probabilities of the test examples: as they come out of the
        networks, and, where there are any, by calibrations that are fitted to
        the first part of each fold for its second, and by those of the
        packages.
        """
        logits = np.array([rows[finder.name] for finder in members])
        # Splits may differ in their share of lenses.
        prevalence = np.asarray(rows["label"])[test].mean()
        made = {"_raw": expit(logits[:, test].mean(axis=0))}
        fitted = np.full(len(rows), np.nan)
        for learn, apply in folds:
            own = [self._fit_calibration(rows, finder, learn) for finder in members]
            if all(own):
                fitted[apply] = combine_logits(logits[:, apply], own, prevalence=prevalence).probability
        if np.isfinite(fitted[test]).all():
            made[""] = fitted[test]
        carried = [find_calibration(finder.model) for finder in members]
        if all(carried):
            made["_of_package"] = combine_logits(logits[:, test], carried, prevalence=prevalence).probability
        return made

    def _fit_calibration(
        self, rows: Table, finder: LensNetwork, chosen: np.ndarray
    ) -> ScoreCalibration | None:
        """Return the calibration of a network on some of the examples, or
        `None` if they are too few.
        """
        try:
            return ScoreCalibration.from_scores(rows[finder.name][chosen], np.asarray(rows["label"])[chosen])
        except ValueError as err:
            self.log.warning("%s is not calibrated.  %s", finder.name, err)
            return None

    def _describe_robustness(
        self,
        results: MetricTable,
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

    def _probe(self, results: MetricTable, probes: Table) -> None:
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
        probabilities: Mapping[str, np.ndarray],
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


def list_models(candidates: Table) -> list[str]:
    """Return names and versions of the networks that scored candidates.

    Parameters
    ----------
    candidates
        A table of `LensFinderTask` with a row at least.

    Returns
    -------
    models
        Such as ``deeplens_gri_1 6``, sorted; empty without a network.
    """
    names, versions = (str(candidates[column][0]).split(",") for column in ("model_name", "model_version"))
    return sorted(" ".join(pair) for pair in zip(names, versions, strict=True) if any(pair))

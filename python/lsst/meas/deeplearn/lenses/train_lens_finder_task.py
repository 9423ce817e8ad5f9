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


"""Train a lens finder on simulated examples."""

from __future__ import annotations

__all__ = ("TrainLensFinderConfig", "TrainLensFinderConnections", "TrainLensFinderTask")

import dataclasses
import importlib
import importlib.metadata
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from astropy.table import Table
from scipy.special import expit

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import (
    ChoiceField,
    Config,
    ConfigField,
    DictField,
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

from .. import __version__
from ..inference import InferenceConfig, torch_threads
from ..inference import predict as predict_with_config
from ..metrics import compute_auroc
from ..model_package import ARCHITECTURES, MODEL_STORAGE_CLASS, ModelPackage, ModelPackageError, ModelSettings
from ..preprocessing import Preprocessing
from .calibration import compute_brier_score, compute_calibration_error
from .completeness import describe_scores
from .ensemble import combine_logits
from .likelihood_ratio import ScoreCalibration
from .training_set import TrainingSet, TrainingSetError, stretch

if TYPE_CHECKING:
    import torch

    from ..training import TrainingResult


class TrainLensFinderConnections(
    PipelineTaskConnections,
    dimensions=(),
    defaultTemplates={"outputName": "lens"},
):
    """Datasets that `TrainLensFinderTask` reads and writes.

    Parameters
    ----------
    config
        Configuration of the task.
    """

    examples = cT.Input(
        doc="Stamps with and without lensed arcs, of all patches to train on.",
        name="{outputName}_training_cutouts",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
        multiple=True,
        deferLoad=True,
    )
    model = cT.Output(
        doc="Model package of the trained network, with the record of its training and performance.  With "
        "several members, each has a dataset of this name and its number: deeplens_model_1 and so on.",
        name="deeplens_model",
        storageClass=MODEL_STORAGE_CLASS,
        dimensions=(),
    )

    config: TrainLensFinderConfig

    def __init__(self, *, config: TrainLensFinderConfig):
        super().__init__(config=config)
        for k, name in enumerate(config.moreExamples):
            more = cT.Input(
                doc=f"Further examples to train on: {name}.",
                name=name,
                storageClass="ArrowAstropy",
                dimensions=("skymap", "tract", "patch"),
                multiple=True,
                deferLoad=True,
                minimum=0,
            )
            setattr(self, f"more_examples_{k}", more)
        if config.members > 1:
            del self.model
            for k in range(1, config.members + 1):
                member = cT.Output(
                    doc=f"Model package of member {k} of the ensemble.",
                    name=f"{config.connections.model}_{k}",
                    storageClass=MODEL_STORAGE_CLASS,
                    dimensions=(),
                )
                setattr(self, f"model_{k}", member)


class AugmentationConfig(Config):
    """Random changes of the stamps in training, besides flips and rotations
    by 90 degrees.
    """

    maxShift = RangeField(dtype=int, doc="Largest shift along each axis in pixels.", default=0, min=0)
    maxRotation = RangeField(
        dtype=float,
        doc="Largest rotation in degrees to either side.",
        default=90.0,
        min=0.0,
        max=180.0,
        inclusiveMax=True,
    )
    minZoom = RangeField(dtype=float, doc="Smallest zoom.", default=0.9, min=0.1)
    maxZoom = RangeField(dtype=float, doc="Largest zoom.", default=1.0, min=0.1)
    warpFraction = RangeField(
        dtype=float,
        doc="Fraction of the stamps that are rotated and zoomed, which smooths their noise.",
        default=1.0,
        min=0.0,
        max=1.0,
        inclusiveMax=True,
    )
    maxBlur = RangeField(
        dtype=float,
        doc="Largest Gaussian sigma in pixels by which half of the stamps are blurred.",
        default=0.0,
        min=0.0,
    )
    maxNoise = RangeField(
        dtype=float,
        doc="Largest noise in units of that of the stamp, to which half of the stamps are brought: 3.16 "
        "makes 1 year of 10 years.  1 is none.",
        default=1.0,
        min=1.0,
    )
    minArcSnr = RangeField(
        dtype=float,
        doc="Smallest signal to noise of the arcs in the noise that a stamp was given; a lens below it "
        "does not count in that step, as no lens below minArcSnr of SimulateLensesTask does.",
        default=0.0,
        min=0.0,
    )
    fluxScatter = RangeField(
        dtype=float, doc="Scatter of the logarithm of a factor on each band.", default=0.0, min=0.0
    )
    offsetScatter = RangeField(
        dtype=float, doc="Scatter of an offset of the sky in units of the noise.", default=0.0, min=0.0
    )
    missingBandFraction = RangeField(
        dtype=float,
        doc="Fraction of the stamps of which one band is set to 0, as a band without data is.",
        default=0.0,
        min=0.0,
        max=1.0,
        inclusiveMax=True,
    )
    maskedFraction = RangeField(
        dtype=float,
        doc="Fraction of the stamps of which a strip or a disc is set to 0, as masked pixels are.",
        default=0.0,
        min=0.0,
        max=1.0,
        inclusiveMax=True,
    )


class TrainLensFinderConfig(PipelineTaskConfig, pipelineConnections=TrainLensFinderConnections):
    """Configuration of `TrainLensFinderTask`."""

    # The model.
    modelName = Field[str](doc="Name of the model package.", default="deeplens_gri")
    modelVersion = Field[str](doc="Version of the model package.", default="1")
    architecture = ChoiceField[str](
        doc="Network.", default="DeepLens", allowed={"DeepLens": "CMU DeepLens (Lanusse et al. 2018)."}
    )
    network = DictField[str, float](
        doc="Further arguments of the constructor of the network, such as 'width'; empty for the published "
        "network.",
        default={},
    )
    bands = ListField[str](doc="Bands of the model, in order; others are dropped.", default=["g", "r", "i"])
    pixelScale = RangeField(dtype=float, doc="Side of a pixel of the model in arcsec.", default=0.2, min=0.01)
    stampSize = RangeField(
        dtype=int, doc="Side of the stamps of the model in pixels, odd.", default=45, min=15
    )
    clip = RangeField(
        dtype=float, doc="Largest absolute pixel value, in units of the noise.", default=250.0, min=1.0
    )
    softening = RangeField(
        dtype=float,
        doc="Scale of the inverse hyperbolic sine stretch in units of the noise; 0 is linear, as published.",
        default=0.0,
        min=0.0,
    )
    floatBits = ChoiceField[int](
        doc="Precision in which weights are stored.",
        default=16,
        allowed={16: "Half precision: half the size; scores change by about 1e-3.", 32: "As trained."},
    )

    # The examples.
    moreExamples = ListField[str](
        doc="Dataset types of further examples, such as those of SimulateLensesTask with another "
        "configuration and another connections.outputName.  Of one type there is one dataset a patch.",
        default=[],
    )

    # Training; see lsst.meas.deeplearn.training.TrainingSettings.
    initialModel = Field[str](
        doc="File of a model package whose weights the training starts from (fine-tuning), of the same "
        "network, pixels and scaling.  Bands that it has not start with weights of 0.  Random weights if "
        "empty.",
        default="",
    )
    epochs = RangeField(dtype=int, doc="Number of passes over the examples.", default=120, min=1)
    batchSize = RangeField(dtype=int, doc="Number of stamps in a step.", default=128, min=2)
    learningRate = RangeField(
        dtype=float, doc="Largest learning rate.", default=1e-3, min=0.0, inclusiveMin=False
    )
    schedule = ChoiceField[str](
        doc="Learning rate in the course of the training.",
        default="step",
        allowed={
            "step": "Divided by ten after each third (Lanusse et al. 2018).",
            "cosine": "Raised over the first twentieth, then lowered to 0 along a cosine.",
        },
    )
    members = RangeField(
        dtype=int,
        doc="Number of networks that one training leaves: the rate starts again from its largest value "
        "as often, and each time the best network is kept (a snapshot ensemble; Huang et al. 2017).",
        default=1,
        min=1,
    )
    kindWeights = DictField[str, float](
        doc="Weights in the loss by kind of example ('lens', 'host', ...); 1 for those that are not named.  "
        "Many lenses are painted on each host, which stands but once without arcs: where 'host' has "
        "no larger weight, a bright galaxy alone looks like a lens.",
        default={},
        itemCheck=lambda weight: weight > 0,
    )
    weightDecay = RangeField(dtype=float, doc="Decoupled weight decay.", default=0.0, min=0.0)
    precision = ChoiceField[str](
        doc="Arithmetic of the training.",
        default="32-true",
        allowed={"32-true": "Single precision.", "bf16-mixed": "Mixed with bfloat16: faster where there is."},
    )
    accelerator = Field[str](doc="Kind of device, as Lightning Fabric calls them.", default="auto")
    devices = RangeField(dtype=int, doc="Number of devices.", default=1, min=1)
    augmentation = ConfigField[AugmentationConfig](doc="Random changes of the stamps.")
    seed = Field[int](doc="Seed of weights, order and augmentation.", default=0)
    checkpoint = Field[str](
        doc="File in which the state of the training is kept after each epoch, so that a rerun goes on where "
        "a killed one stopped.  None is kept if empty.",
        default="",
    )

    # The record.
    inference = ConfigField[InferenceConfig](doc="How the figures of merit are measured.")
    date = Field[str](doc="Date to note in the record, such as 2026-11-23; none if empty.", default="")

    def setDefaults(self) -> None:
        super().setDefaults()
        self.inference.batchSize = 128

    def validate(self) -> None:
        super().validate()
        if self.stampSize % 2 == 0:
            raise FieldValidationError(self.__class__.stampSize, self, "The side of stamps must be odd.")
        if 1 < self.members >= self.epochs:
            raise FieldValidationError(
                self.__class__.members, self, f"{self.members} members need more than {self.epochs} epochs."
            )
        if self.augmentation.minZoom > self.augmentation.maxZoom:
            raise FieldValidationError(
                self.__class__.augmentation, self, "augmentation.minZoom is larger than augmentation.maxZoom."
            )


class TrainLensFinderTask(PipelineTask):
    """Train a network to tell lenses from other galaxies.

    The published recipe of CMU DeepLens (Lanusse et al. 2018) is the default,
    but for the units of pixels: the noise of each stamp instead of the scatter
    of the training set.  The weights of the epoch with the largest area under
    the ROC curve of the validation examples are kept.  What their score says
    is fitted to the calibration examples and recorded with them, as are their
    figures of merit on the test examples.
    """

    ConfigClass: ClassVar[type[TrainLensFinderConfig]] = TrainLensFinderConfig
    _DefaultName: ClassVar[str] = "trainLensFinder"
    config: TrainLensFinderConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        inputs = butlerQC.get(inputRefs)
        names = ["examples", *(f"more_examples_{k}" for k in range(len(self.config.moreExamples)))]
        handles = [
            handle
            for name in names
            for handle in sorted(inputs[name], key=lambda handle: tuple(handle.dataId.required_values))
        ]
        try:
            outputs = self.run((handle.get() for handle in handles), num_cores=butlerQC.resources.num_cores)
        except TrainingSetError as err:
            raise InvalidQuantumError(str(err)) from err
        if self.config.members > 1:
            for k, model in enumerate(outputs.models, start=1):
                butlerQC.put(model.to_arrow(), getattr(outputRefs, f"model_{k}"))
        else:
            butlerQC.put(outputs.model.to_arrow(), outputRefs.model)

    def run(self, examples: Iterable[Table], *, num_cores: int = 1) -> Struct:
        """Train the network.

        Parameters
        ----------
        examples
            Tables of `SimulateLensesTask`; one is held in memory at a time.
        num_cores
            Threads that may be used on a CPU.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``models``
                The trained models, one for each member
                (`list` [`ModelPackage`]).
            ``model``
                The last of them, which was trained longest (`ModelPackage`).

        Raises
        ------
        TrainingSetError
            Raised if the examples do not fit the model or each other, if a
            split lacks lenses or non-lenses, if there are fewer than a batch,
            if the initial model cannot be read or is another one, or if the
            checkpoint is of another training.
        """
        settings = self._make_model_settings()
        initial = self._read_initial_model(settings)
        data = TrainingSet.from_tables(examples, settings, self.config.augmentation.maxShift)
        if (n := len(data.select("train"))) < self.config.batchSize:
            raise TrainingSetError(
                f"{n} training examples do not fill a batch of {self.config.batchSize}.  Add patches, or "
                "lower batchSize."
            )
        self.log.info("The training set has %s.", data.describe()["counts"])
        with torch_threads(num_cores):
            result = self._train(data, settings, initial)
        record = {
            "training_set": data.describe(),
            "recipe": self._describe_recipe(),
            "history": result.history,
            "code": {"meas_deeplearn": __version__, **_get_versions()},
        }
        if initial is not None:
            record["initial_model"] = {
                "name": initial.name,
                "version": initial.version,
                "training_set": initial.record.get("training_set"),
                "recipe": initial.record.get("recipe"),
                "initial_model": initial.record.get("initial_model"),
            }
        if self.config.date:
            record["date"] = self.config.date
        packages = [
            ModelPackage(
                name=self.config.modelName + (f"_{k}" if self.config.members > 1 else ""),
                version=self.config.modelVersion,
                architecture=self.config.architecture,
                settings=settings,
                weights={
                    key: _round(value, self.config.floatBits) for key, value in snapshot.weights.items()
                },
            )
            for k, snapshot in enumerate(result.snapshots, start=1)
        ]
        measured = self._measure(packages, data, num_cores)
        models = [
            dataclasses.replace(
                package, record=_to_json_types(record | {"best_epoch": snapshot.epoch} | figures)
            )
            for package, snapshot, figures in zip(packages, result.snapshots, measured, strict=True)
        ]
        return Struct(models=models, model=models[-1])

    def _make_model_settings(self) -> ModelSettings:
        config = self.config
        # Numbers of a DictField are floats; counts must be integers.
        network = {key: int(value) if value.is_integer() else value for key, value in config.network.items()}
        return ModelSettings(
            bands=tuple(config.bands),
            pixel_scale=config.pixelScale,
            stamp_size=config.stampSize,
            preprocessing=Preprocessing(
                noise="variance", clip=config.clip, softening=config.softening or None
            ),
            network=network,
        )

    def _read_initial_model(self, settings: ModelSettings) -> ModelPackage | None:
        """Return the model that the training starts from, if there is one."""
        path = self.config.initialModel
        if not path:
            return None
        try:
            initial = ModelPackage.read(path)
        except (OSError, ModelPackageError) as err:
            raise TrainingSetError(f"The initial model cannot be read: {err}") from err
        initial = _add_bands(initial, settings.bands)
        wanted = {"architecture": self.config.architecture, **dataclasses.asdict(settings)}
        found = {"architecture": initial.architecture, **dataclasses.asdict(initial.settings)}
        if other := [
            f"{key}: {found[key]} instead of {wanted[key]}" for key in wanted if found[key] != wanted[key]
        ]:
            raise TrainingSetError(
                f"Model {initial.name} {initial.version} is not what is trained here ({'; '.join(other)}).  "
                "Change the configuration to what the model has, or start from random weights."
            )
        return initial

    def _train(
        self, data: TrainingSet, settings: ModelSettings, initial: ModelPackage | None
    ) -> TrainingResult:
        """Return the networks of all members, and the history."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        from ..image_augmentation import ImageAugmentation
        from ..training import Batch, CheckpointError, TrainingSettings, predict, train

        config = self.config.augmentation
        change = ImageAugmentation(
            size=settings.stamp_size,
            max_shift=config.maxShift,
            max_rotation=config.maxRotation,
            zoom=(config.minZoom, config.maxZoom),
            warp_fraction=config.warpFraction,
            max_blur=config.maxBlur,
            max_noise=config.maxNoise,
            flux_scatter=config.fluxScatter,
            offset_scatter=config.offsetScatter,
            missing_fraction=config.missingBandFraction,
            masked_fraction=config.maskedFraction,
        )

        def augment(batch: Batch, generator: torch.Generator | None) -> Batch:
            images, noise = change(batch["image"].float(), generator)
            scaled = torch.from_numpy(stretch(images.numpy(), settings.preprocessing))
            # Unknown signal to noise is NaN, for non-lenses too.
            weight = batch["weight"] * ~(batch["arc_snr"] < config.minArcSnr * noise)
            return {"image": scaled, "label": batch["label"], "weight": weight}

        def compute_loss(network: torch.nn.Module, batch: Batch) -> torch.Tensor:
            loss = binary_cross_entropy_with_logits(
                network(batch["image"]), batch["label"], weight=batch["weight"], reduction="sum"
            )
            return loss / batch["weight"].sum().clamp(min=1.0)

        def evaluate(network: torch.nn.Module, batch: Batch) -> dict[str, float]:
            logits, labels = predict(network, batch["image"]), batch["label"]
            loss = binary_cross_entropy_with_logits(logits, labels)
            return {"loss": float(loss), "auroc": compute_auroc(logits.numpy(), labels.numpy())[0]}

        for kind in sorted(set(self.config.kindWeights) - set(data.kind.tolist())):
            self.log.warning("No example is of the kind %s, for which there is a weight.", kind)
        batches = {
            split: {
                "image": torch.from_numpy(part.image),
                "weight": torch.from_numpy(self._weigh(part)),
                "label": torch.from_numpy(part.label.astype(np.float32)),
                "arc_snr": torch.from_numpy(part.arc_snr.astype(np.float32)),
            }
            for split in ("train", "validation")
            for part in [data.select(split)]
        }
        try:
            return train(
                initial.make_network if initial else lambda: make_network(self.config.architecture, settings),
                batches["train"],
                compute_loss=compute_loss,
                settings=TrainingSettings(**self._make_training_settings()),
                validation=batches["validation"],
                evaluate=evaluate,
                augment=augment,
                checkpoint=Path(self.config.checkpoint) if self.config.checkpoint else None,
                recipe=json.dumps([self._describe_recipe(), dataclasses.asdict(settings)], default=str),
                accelerator=self.config.accelerator,
                devices=self.config.devices,
            )
        except CheckpointError as err:
            raise TrainingSetError(str(err)) from err

    def _weigh(self, examples: TrainingSet) -> np.ndarray:
        """Return the weight of each example in the loss, float32."""
        weight = np.ones(len(examples), dtype=np.float32)
        for kind, value in self.config.kindWeights.items():
            weight[examples.kind == kind] = value
        return weight

    def _make_training_settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "epochs": config.epochs,
            "batch_size": config.batchSize,
            "learning_rate": config.learningRate,
            "schedule": config.schedule,
            "cycles": config.members,
            "weight_decay": config.weightDecay,
            "precision": config.precision,
            "channels_last": True,
            "monitor": "auroc",
            "monitor_mode": "max",
            "seed": config.seed,
        }

    def _measure(
        self, packages: list[ModelPackage], data: TrainingSet, num_cores: int
    ) -> list[dict[str, Any]]:
        """Return entries of the record: calibration and performance."""
        scored = data[np.isin(data.split, ("calibration", "test"))]
        is_test = scored.split == "test"
        test = scored[is_test]
        logits = np.array([self._score(package, scored, num_cores) for package in packages])
        calibrations: list[ScoreCalibration | None] = []
        entries: list[dict[str, Any]] = []
        for package, values in zip(packages, logits, strict=True):
            entries.append({})
            try:
                calibration = ScoreCalibration.from_scores(values[~is_test], scored.label[~is_test])
            except ValueError as err:
                self.log.warning("Model %s has no calibration.  %s", package.name, err)
                calibrations.append(None)
            else:
                entries[-1]["calibration"] = calibration.to_dict()
                calibrations.append(calibration)
        for k, (package, entry) in enumerate(zip(packages, entries, strict=True)):
            one = slice(k, k + 1)
            entry["performance"] = self._describe_performance(logits[one, is_test], calibrations[one], test)
            self.log.info("%s on the test examples: %s.", package.name, entry["performance"]["summary"])
        if len(packages) > 1:
            together = self._describe_performance(logits[:, is_test], calibrations, test)
            self.log.info("All together: %s.", together["summary"])
            for entry in entries:
                entry["ensemble_performance"] = together
        return entries

    def _score(self, package: ModelPackage, data: TrainingSet, num_cores: int) -> np.ndarray:
        """Return logits of a model, as users get them."""
        start = (data.image.shape[-1] - package.settings.stamp_size) // 2
        crop = slice(start, start + package.settings.stamp_size)
        inputs = stretch(data.image[..., crop, crop], package.settings.preprocessing)
        return predict_with_config(
            package.make_network(), inputs, self.config.inference, num_threads=num_cores
        )

    def _describe_performance(
        self, member_logits: np.ndarray, calibrations: list[ScoreCalibration | None], test: TrainingSet
    ) -> dict[str, Any]:
        """Return figures of merit of the mean of some members."""
        logits = member_logits.mean(axis=0)
        figures = describe_scores(
            logits, test.label, einstein_radius=test.einstein_radius, arc_snr=test.arc_snr
        )
        if all(calibrations):
            combined = combine_logits(member_logits, calibrations, prevalence=test.label.mean())
            figures["calibrated"] = {
                "ece": compute_calibration_error(combined.probability, test.label),
                "brier": compute_brier_score(combined.probability, test.label),
            }
        figures["orientations"] = self.config.inference.averageOrientations
        figures["precision"] = self.config.inference.precision
        threshold = np.quantile(logits[~test.label], 0.99)
        figures["score_at_fpr_0.01"] = float(expit(threshold))
        figures["fraction_above_by_kind"] = {
            str(kind): float((logits[test.kind == kind] > threshold).mean()) for kind in np.unique(test.kind)
        }
        figures["summary"] = summarize(figures["all"])
        return figures

    def _describe_recipe(self) -> dict[str, Any]:
        return self._make_training_settings() | {
            "augmentation": self.config.augmentation.toDict(),
            "kind_weights": dict(self.config.kindWeights),
            "devices": self.config.devices,
            "stored_float_bits": self.config.floatBits,
        }


def summarize(figures: Mapping[str, Any]) -> str:
    """Return the figures of merit of `.completeness.describe_scores` in words.

    Parameters
    ----------
    figures
        Those of one set of examples.
    """
    rates = {key: value for key, value in figures.items() if key.startswith("tpr_at_fpr_")}
    return ", ".join(
        [f"AUROC {figures['auroc']:.4f}"]
        + [f"TPR {value[0]:.3f} at FPR {key.removeprefix('tpr_at_fpr_')}" for key, value in rates.items()]
        + [f"{figures['n_lenses']} lenses and {figures['n_non_lenses']} others of the same simulation"]
    )


def make_network(architecture: str, settings: ModelSettings) -> torch.nn.Module:
    """Return an untrained network.

    Parameters
    ----------
    architecture
        Key of `.model_package.ARCHITECTURES`.
    settings
        What it expects.
    """
    module, _, name = ARCHITECTURES[architecture].rpartition(".")
    network: torch.nn.Module = getattr(importlib.import_module(module), name)(
        in_bands=len(settings.bands), **settings.network
    )
    return network


def _add_bands(model: ModelPackage, bands: tuple[str, ...]) -> ModelPackage:
    """Return a model for these bands that ignores those that are new to it;
    the model itself if it has others.
    """
    if not set(model.settings.bands) <= set(bands):
        return model
    stem = model.weights["stem.weight"]
    wider = np.zeros((stem.shape[0], len(bands), *stem.shape[2:]), dtype=stem.dtype)
    wider[:, [bands.index(band) for band in model.settings.bands]] = stem
    return dataclasses.replace(
        model,
        settings=dataclasses.replace(model.settings, bands=bands),
        weights={**model.weights, "stem.weight": wider},
    )


def _round(values: np.ndarray, bits: int) -> np.ndarray:
    """Return weights in the precision in which they are stored."""
    return values.astype(np.float16) if bits == 16 and values.dtype.kind == "f" else values


def _get_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "lightning-fabric", "numpy")}


def _to_json_types(value: Any) -> Any:
    """Replace what JSON has not: NaN by None."""
    if isinstance(value, Mapping):
        return {key: _to_json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json_types(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

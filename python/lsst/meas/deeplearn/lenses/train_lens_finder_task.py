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
from ..cutouts import Cutouts
from ..inference import InferenceConfig, torch_threads
from ..inference import predict as predict_with_config
from ..model_package import ARCHITECTURES, MODEL_STORAGE_CLASS, SCALE_TOLERANCE, ModelPackage, ModelSettings
from ..preprocessing import Preprocessing
from .metrics import compute_auroc, describe_scores
from .simulate_lenses_task import EXAMPLE_COLUMNS, SPLITS

if TYPE_CHECKING:
    import torch


class TrainLensFinderConnections(
    PipelineTaskConnections,
    dimensions=(),
    defaultTemplates={"outputName": "lens"},
):
    """Datasets that `TrainLensFinderTask` reads and writes."""

    examples = cT.Input(
        doc="Stamps with and without lensed arcs, of all patches to train on.",
        name="{outputName}_training_cutouts",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
        multiple=True,
        deferLoad=True,
    )
    model = cT.Output(
        doc="Model package of the trained network, with the record of its training and performance.",
        name="deeplens_model",
        storageClass=MODEL_STORAGE_CLASS,
        dimensions=(),
    )


class AugmentationConfig(Config):
    """Random changes of the stamps in training."""

    maxShift = RangeField(dtype=int, doc="Largest shift along each axis in pixels.", default=3, min=0)
    minZoom = RangeField(dtype=float, doc="Smallest zoom.", default=0.92, min=0.1)
    maxZoom = RangeField(dtype=float, doc="Largest zoom.", default=1.08, min=0.1)
    zoomFraction = RangeField(
        dtype=float, doc="Fraction of the stamps that are zoomed.", default=0.3, min=0.0, max=1.0
    )
    maxBlur = RangeField(
        dtype=float,
        doc="Largest Gaussian sigma in pixels by which half of the stamps are blurred.",
        default=0.8,
        min=0.0,
    )
    maxNoise = RangeField(
        dtype=float,
        doc="Largest noise, in units of their own, that half of the stamps get besides; they count as "
        "shallower by as much.",
        default=1.5,
        min=0.0,
    )
    fluxScatter = RangeField(
        dtype=float, doc="Scatter of the logarithm of a factor on each band.", default=0.1, min=0.0
    )
    offsetScatter = RangeField(
        dtype=float, doc="Scatter of an offset of the sky in units of the noise.", default=0.1, min=0.0
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
        default=4.0,
        min=0.0,
    )
    floatBits = ChoiceField[int](
        doc="Precision in which weights are stored.",
        default=16,
        allowed={16: "Half precision: half the size; scores change by about 1e-3.", 32: "As trained."},
    )

    # Training; see lsst.meas.deeplearn.training.TrainingSettings.
    epochs = RangeField(dtype=int, doc="Number of passes over the examples.", default=120, min=1)
    batchSize = RangeField(dtype=int, doc="Number of stamps in a step.", default=128, min=2)
    learningRate = RangeField(dtype=float, doc="Largest learning rate.", default=1e-3, min=0.0)
    schedule = ChoiceField[str](
        doc="Learning rate in the course of the training.",
        default="step",
        allowed={
            "step": "Divided by ten after each third (Lanusse et al. 2018).",
            "cosine": "Raised over the first twentieth, then lowered to 0 along a cosine.",
        },
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


class TrainLensFinderTask(PipelineTask):
    """Train a network to tell lenses from other galaxies.

    The published recipe of CMU DeepLens (Lanusse et al. 2018) is the default,
    but for the scaling of pixels and for more augmentation.  The weights of
    the epoch with the largest area under the ROC curve of the validation
    examples are kept, and their figures of merit on the test examples are
    recorded with them.
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
        handles = butlerQC.get(inputRefs)["examples"]
        handles = sorted(handles, key=lambda handle: tuple(handle.dataId.required_values))
        try:
            outputs = self.run((handle.get() for handle in handles), num_cores=butlerQC.resources.num_cores)
        except TrainingSetError as err:
            raise InvalidQuantumError(str(err)) from err
        outputs.model = outputs.model.to_arrow()
        butlerQC.put(outputs, outputRefs)

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

            ``model``
                The trained model (`ModelPackage`).

        Raises
        ------
        TrainingSetError
            Raised if the examples do not fit the model or each other, or if
            a split lacks lenses or non-lenses.
        """
        settings = self._make_model_settings()
        data = self._read_examples(examples, settings)
        with torch_threads(num_cores):
            weights, history, best_epoch = self._train(data, settings)
        package = ModelPackage(
            name=self.config.modelName,
            version=self.config.modelVersion,
            architecture=self.config.architecture,
            settings=settings,
            weights={key: _round(value, self.config.floatBits) for key, value in weights.items()},
        )
        record = {
            "training_set": data.describe(),
            "recipe": self._describe_recipe(),
            "history": history,
            "best_epoch": best_epoch,
            "performance": self._evaluate(package, data, num_cores),
            "code": {"meas_deeplearn": __version__, **_get_versions()},
        }
        if self.config.date:
            record["date"] = self.config.date
        return Struct(model=dataclasses.replace(package, record=_to_json_types(record)))

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

    def _read_examples(self, tables: Iterable[Table], settings: ModelSettings) -> TrainingSet:
        """Read all tables, and check that they can be trained on."""
        parts = []
        for table in tables:
            if missing := {name for name, _, _ in EXAMPLE_COLUMNS} - set(table.colnames):
                raise TrainingSetError(f"The training set has no columns {sorted(missing)}.")
            parts.append(TrainingSet.from_table(table, settings, self.config.augmentation.maxShift))
        if not parts:
            raise TrainingSetError("The training set is empty.")
        data = TrainingSet.concatenate(parts)
        # Calibration comes after the training.
        for split in ("train", "validation", "test"):
            labels = data.label[data.split == split]
            if labels.all() or not labels.any():
                raise TrainingSetError(
                    f"The {split} examples are {labels.sum()} lenses and {(~labels).sum()} non-lenses; both "
                    "are needed.  Add patches, or change the fractions of SimulateLensesTask."
                )
        self.log.info("The training set has %s.", data.describe()["counts"])
        return data

    def _train(
        self, data: TrainingSet, settings: ModelSettings
    ) -> tuple[dict[str, np.ndarray], list[dict[str, float]], int]:
        """Return weights, history and best epoch."""
        import torch
        from torch.nn import functional

        from ..training import Batch, ImageAugmentation, TrainingSettings, predict, train

        augmentation = self.config.augmentation
        change = ImageAugmentation(
            size=settings.stamp_size,
            max_shift=augmentation.maxShift,
            zoom=(augmentation.minZoom, augmentation.maxZoom),
            zoom_fraction=augmentation.zoomFraction,
            max_blur=augmentation.maxBlur,
            max_noise=augmentation.maxNoise,
            flux_scatter=augmentation.fluxScatter,
            offset_scatter=augmentation.offsetScatter,
        )

        def augment(batch: Batch, generator: torch.Generator | None) -> Batch:
            images = change(batch["image"], generator)
            scaled = stretch(images.numpy(), settings.preprocessing)
            return {"image": torch.from_numpy(scaled), "label": batch["label"]}

        def compute_loss(network: torch.nn.Module, batch: Batch) -> torch.Tensor:
            return functional.binary_cross_entropy_with_logits(network(batch["image"]), batch["label"])

        def evaluate(network: torch.nn.Module, batch: Batch) -> dict[str, float]:
            logits = predict(network, batch["image"])
            loss = functional.binary_cross_entropy_with_logits(logits, batch["label"])
            return {"loss": float(loss), "auroc": compute_auroc(logits.numpy(), batch["label"].numpy())[0]}

        batches = {
            split: {
                "image": torch.from_numpy(data.image[data.split == split]),
                "label": torch.from_numpy(data.label[data.split == split].astype(np.float32)),
            }
            for split in SPLITS[:2]
        }
        result = train(
            lambda: make_network(self.config.architecture, settings),
            batches["train"],
            compute_loss=compute_loss,
            settings=TrainingSettings(**self._make_training_settings()),
            validation=batches["validation"],
            evaluate=evaluate,
            augment=augment,
            checkpoint=Path(self.config.checkpoint) if self.config.checkpoint else None,
            accelerator=self.config.accelerator,
            devices=self.config.devices,
        )
        return result.weights, result.history, result.best_epoch

    def _make_training_settings(self) -> dict[str, Any]:
        config = self.config
        return {
            "epochs": config.epochs,
            "batch_size": config.batchSize,
            "learning_rate": config.learningRate,
            "schedule": config.schedule,
            "weight_decay": config.weightDecay,
            "precision": config.precision,
            "channels_last": True,
            "monitor": "auroc",
            "monitor_mode": "max",
            "seed": config.seed,
        }

    def _evaluate(self, package: ModelPackage, data: TrainingSet, num_cores: int) -> dict[str, Any]:
        """Return figures of merit on the test examples, as users get them."""
        test = data[data.split == "test"]
        start = (test.image.shape[-1] - package.settings.stamp_size) // 2
        crop = slice(start, start + package.settings.stamp_size)
        inputs = stretch(test.image[..., crop, crop], package.settings.preprocessing)
        config = self.config.inference
        logits = predict_with_config(package.make_network(), inputs, config, num_threads=num_cores)
        figures = describe_scores(
            logits, test.label, einstein_radius=test.einstein_radius, arc_snr=test.arc_snr
        )
        figures["orientations"] = config.averageOrientations
        figures["precision"] = config.precision
        threshold = np.quantile(logits[~test.label], 0.99)
        figures["score_at_fpr_0.01"] = float(expit(threshold))
        figures["fraction_above_by_kind"] = {
            str(kind): float((logits[test.kind == kind] > threshold).mean()) for kind in np.unique(test.kind)
        }
        figures["summary"] = summarize(figures["all"])
        self.log.info("On the test examples: %s.", figures["summary"])
        return figures

    def _describe_recipe(self) -> dict[str, Any]:
        return self._make_training_settings() | {
            "augmentation": self.config.augmentation.toDict(),
            "devices": self.config.devices,
            "stored_float_bits": self.config.floatBits,
        }


class TrainingSetError(ValueError):
    """Raised for examples that cannot be trained on."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingSet:
    """Examples as arrays, with what is known of each."""

    image: np.ndarray
    """Pixels in units of the noise, neither clipped nor stretched, float32,
    shape ``(N, B, y, x)``."""

    label: np.ndarray
    """Whether there are lensed arcs, bool, shape ``(N,)``."""

    kind: np.ndarray
    """``lens``, or the kind of non-lens, shape ``(N,)``."""

    split: np.ndarray
    """One of `SPLITS`, shape ``(N,)``."""

    host_id: np.ndarray
    """Object ID of the galaxy, shape ``(N,)``."""

    einstein_radius: np.ndarray
    """In arcsec; NaN without lens, shape ``(N,)``."""

    arc_snr: np.ndarray
    """Signal to noise of the arcs; NaN without lens, shape ``(N,)``."""

    seed: np.ndarray
    """Seed of the simulation, shape ``(N,)``."""

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: np.ndarray) -> TrainingSet:
        """Return some of the examples."""
        names = [field.name for field in dataclasses.fields(self)]
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in names})

    @classmethod
    def concatenate(cls, parts: list[TrainingSet]) -> TrainingSet:
        """Join several sets.

        Parameters
        ----------
        parts
            The sets.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    @classmethod
    def from_table(cls, table: Table, settings: ModelSettings, margin: int) -> TrainingSet:
        """Make from a table of `SimulateLensesTask`.

        Parameters
        ----------
        table
            The table.
        settings
            What the network expects.
        margin
            Pixels to keep around the stamp of the network.

        Raises
        ------
        TrainingSetError
            Raised if the stamps lack bands, are too small, or have other
            pixels, or if some of their values are not finite.
        """
        try:
            cutouts = Cutouts.from_table(table).select_bands(settings.bands)
        except ValueError as err:
            raise TrainingSetError(str(err)) from err
        if abs(cutouts.pixel_scale / settings.pixel_scale - 1) > SCALE_TOLERANCE:
            raise TrainingSetError(
                f"The stamps have pixels of {cutouts.pixel_scale:.3f} arcsec; set pixelScale, which is "
                f"{settings.pixel_scale:.3f}, to that."
            )
        size = settings.stamp_size + 2 * margin
        if cutouts.size < size:
            raise TrainingSetError(
                f"The stamps have {cutouts.size} pixels on a side; {settings.stamp_size} and shifts of "
                f"{margin} need {size}.  Set stampSize of SimulateLensesTask, or maxShift."
            )
        linear = dataclasses.replace(settings.preprocessing, clip=math.inf, softening=None)
        crop = slice((cutouts.size - size) // 2, (cutouts.size - size) // 2 + size)
        image = linear.apply(cutouts)[..., crop, crop].copy()
        if spoilt := int((~np.isfinite(image)).any(axis=(1, 2, 3)).sum()):
            raise TrainingSetError(f"{spoilt} stamps have good pixels that are not finite.")
        return cls(
            image=image,
            label=np.asarray(table["label"], dtype=bool),
            kind=np.asarray(table["kind"], dtype=str),
            split=np.asarray(table["split"], dtype=str),
            host_id=np.asarray(table["host_id"]),
            einstein_radius=np.asarray(table["einstein_radius"]),
            arc_snr=np.asarray(table["arc_snr"]),
            seed=np.asarray(table["seed"]),
        )

    def describe(self) -> dict[str, Any]:
        """Return counts and seeds, as types that JSON has."""
        counts = {
            split: {
                str(kind): int(((self.split == split) & (self.kind == kind)).sum())
                for kind in np.unique(self.kind)
            }
            for split in SPLITS
        }
        hosts = {split: len(np.unique(self.host_id[self.split == split])) for split in SPLITS}
        return {"counts": counts, "distinct_galaxies": hosts, "seeds": [int(s) for s in np.unique(self.seed)]}


def summarize(figures: Mapping[str, Any]) -> str:
    """Return the figures of merit of `.metrics.describe_scores` in words.

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


def stretch(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Clip and stretch pixels that are in units of the noise.

    Parameters
    ----------
    images
        Pixels, shape ``(N, B, y, x)``.
    preprocessing
        Scaling of the model.
    """
    scaling = dataclasses.replace(preprocessing, noise=(1.0,) * images.shape[1], mean=None)
    return scaling.scale(images, variance=images, bad=np.zeros(images.shape, dtype=bool))


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

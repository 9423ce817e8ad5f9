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


"""Train a model of galaxy images."""

from __future__ import annotations

__all__ = ("TrainCvaeConfig", "TrainCvaeConnections", "TrainCvaeTask")

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from astropy.table import Table, vstack

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import ChoiceField, Field, FieldValidationError, RangeField
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
from ..inference import torch_threads
from ..model_package import MODEL_STORAGE_CLASS, SCALE_TOLERANCE, ModelPackage, ModelPackageError
from .coadd_set import make_coadd_set
from .conditions import ConditionError
from .cosmos import GalaxySet, GalaxySetError, read_cosmos_set
from .cut_galaxies_task import CONDITION_COLUMNS
from .synthetic import make_synthetic_set


class TrainCvaeConnections(PipelineTaskConnections, dimensions=(), defaultTemplates={"cutoutName": "galaxy"}):
    """Datasets that `TrainCvaeTask` reads and writes.

    Parameters
    ----------
    config
        Configuration of the task.
    """

    cutouts = cT.Input(
        doc="Stamps of galaxies of coadds, of all patches to train on.  Not read for other sources.",
        name="{cutoutName}_cutouts",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
        multiple=True,
        deferLoad=True,
    )
    start = cT.PrerequisiteInput(
        doc="Model package to go on from, for doFineTune.",
        name="galaxy_cvae_start_model",
        storageClass=MODEL_STORAGE_CLASS,
        dimensions=(),
    )

    model = cT.Output(
        doc="Model package of the trained network, with the record of its training and performance.",
        name="galaxy_cvae_model",
        storageClass=MODEL_STORAGE_CLASS,
        dimensions=(),
    )

    config: TrainCvaeConfig

    def __init__(self, *, config: TrainCvaeConfig):
        super().__init__(config=config)
        if config.source != "cutouts":
            del self.cutouts
        if not config.doFineTune:
            del self.start


class TrainCvaeConfig(PipelineTaskConfig, pipelineConnections=TrainCvaeConnections):
    """Configuration of `TrainCvaeTask`."""

    # The training set.
    source = ChoiceField[str](
        doc="Galaxies to train on.",
        default="synthetic",
        allowed={
            "synthetic": "Bulge, disk, knots and arms with the parameters of COSMOS; PSFs and noise like "
            "those of HST.",
            "cosmos": "The real galaxies of the GalSim COSMOS catalogue that cosmosCatalog names.",
            "cutouts": "Galaxies of the coadds of the repository, which cutGalaxies has cut out.",
        },
    )
    doFineTune = Field[bool](
        doc="Go on from the weights of galaxy_cvae_start_model, whose settings are kept?", default=False
    )
    cosmosCatalog = Field[str](
        doc="Path of the catalogue that galsim_download_cosmos has put somewhere, such as "
        "real_galaxy_catalog_25.2.fits.  It is recorded by its file name.",
        default="",
    )
    nGalaxies = RangeField(
        dtype=int,
        doc="Number of galaxies, those held out included; of real ones at most as many as there are.  On the "
        "default grid 10,000 take 0.7 GB, twice that while they are divided.",
        default=48000,
        min=32,
    )
    heldOutFraction = RangeField(
        dtype=float,
        doc="Fraction of the galaxies by which the best epoch is chosen; not trained on.",
        default=0.1,
        min=0.0,
        max=0.9,
        inclusiveMin=False,
    )
    maxMagnitude = RangeField(
        dtype=float, doc="Faintest magnitude of synthetic galaxies.", default=25.2, min=18.0
    )
    size = ChoiceField[int](
        doc="Pixels on a side of the grid.  Galaxies that are cut off at less than 7.7 arcsec respond to "
        "shear wrongly by percents.  Stamps of coadds must have one pixel more.",
        default=128,
        allowed={
            32: "For tests.",
            40: "8 arcsec with pixels of 0.2 arcsec.",
            64: "For tests.",
            128: "7.7 arcsec with the default pixels.",
            256: "Larger.",
        },
    )
    pixelScale = RangeField(
        dtype=float,
        doc="Side of a pixel in arcsec; a multiple of 0.03 for galaxies of COSMOS, and that of the coadd for "
        "those of coadds.",
        default=0.06,
        min=0.02,
    )

    # The network.
    modelName = Field[str](doc="Name of the model package.", default="galaxy_cvae")
    modelVersion = Field[str](doc="Version of the model package.", default="1")
    width = RangeField(dtype=int, doc="Channels of the narrowest convolutions.", default=16, min=1)
    latents = RangeField(dtype=int, doc="Number of latent variables of the shape.", default=16, min=2)
    textureLatents = RangeField(
        dtype=int, doc="Number of latent variables in each place of the disk.", default=2, min=1
    )
    textureSize = ChoiceField[int](
        doc="Pixels on a side of the texture of the disk.",
        default=64,
        allowed={16: "For tests.", 32: "Coarse.", 64: "A ninth of the half-light radius of the disk."},
    )
    flowLayers = RangeField(
        dtype=int,
        doc="Layers of the normalizing flow that is the prior of the shape; 0 is a Gaussian.",
        default=8,
        min=0,
    )
    textureLayers = RangeField(
        dtype=int,
        doc="Layers of the normalizing flow that is the prior of the texture; 0 is a Gaussian.",
        default=6,
        min=0,
    )
    outputFwhm = RangeField(
        dtype=float,
        doc="Width in arcsec of the Gaussian that smooths generated galaxies, more than 1.5 pixels.",
        default=0.13,
        min=0.0,
    )

    # Training; see lsst.meas.deeplearn.training.TrainingSettings.
    klWeight = RangeField(
        dtype=float, doc="Factor on the KL divergence; 1 is the evidence lower bound.", default=1.0, min=0.0
    )
    textureScale = RangeField(
        dtype=float,
        doc="Standard deviation of the normal deviates from which the texture of new galaxies is drawn; 1 is "
        "the prior, and more makes up for what the encoder does not see.",
        default=1.15,
        min=0.0,
    )
    textureStart = RangeField(
        dtype=int,
        doc="Number of steps before there is any texture, so that bulge and disk do what they can.",
        default=1000,
        min=0,
    )
    warmUp = RangeField(
        dtype=int,
        doc="Number of steps in which the KL divergence of the texture gets its weight; it has a tenth of it "
        "at first.",
        default=4000,
        min=0,
    )
    priorSteps = RangeField(
        dtype=int,
        doc="Number of steps in the end in which only the prior of the shape is fitted.",
        default=5000,
        min=0,
    )
    texturePriorSteps = RangeField(
        dtype=int,
        doc="Number of steps in the end in which only the prior of the texture is fitted.",
        default=1000,
        min=0,
    )
    fluxScatter = RangeField(
        dtype=float,
        doc="Relative error of the fluxes of the training set, which is integrated out; 0.1 suits real "
        "galaxies.",
        default=0.0,
        min=0.0,
    )
    minNoise = RangeField(
        dtype=float,
        doc="Smallest noise in a pixel to assume, in units of the flux of the galaxy: the error of the "
        "model.",
        default=2e-4,
        min=0.0,
    )
    epochs = RangeField(dtype=int, doc="Number of passes over the galaxies.", default=5, min=1)
    batchSize = RangeField(dtype=int, doc="Number of galaxies in a step.", default=32, min=2)
    learningRate = RangeField(dtype=float, doc="Largest learning rate.", default=1e-3, min=0.0)
    schedule = ChoiceField[str](
        doc="Learning rate in the course of the training.",
        default="cosine",
        allowed={
            "step": "Divided by ten after each third.",
            "cosine": "Raised over the first twentieth, then lowered to 0 along a cosine.",
        },
    )
    precision = ChoiceField[str](
        doc="Arithmetic of the training.",
        default="32-true",
        allowed={"32-true": "Single precision.", "bf16-mixed": "Mixed with bfloat16: faster where there is."},
    )
    accelerator = Field[str](doc="Kind of device, as Lightning Fabric calls them.", default="auto")
    seed = Field[int](doc="Seed of galaxies, weights, order and augmentation.", default=0)
    checkpoint = Field[str](
        doc="File in which the state of the training is kept after each epoch, so that a rerun goes on where "
        "a killed one stopped.  None is kept if empty.",
        default="",
    )

    def validate(self) -> None:
        super().validate()
        if self.source == "cosmos" and not self.cosmosCatalog:
            raise FieldValidationError(
                self.__class__.cosmosCatalog, self, "Real galaxies need the path of their catalogue."
            )
        if self.outputFwhm <= 1.5 * self.pixelScale:
            raise FieldValidationError(
                self.__class__.outputFwhm, self, f"Must be more than 1.5 pixels of {self.pixelScale} arcsec."
            )


class TrainCvaeTask(PipelineTask):
    """Train a conditional variational autoencoder of galaxies.

    See `cvae` for what differs from Lanusse et al. (2021).  The
    weights of the epoch with the largest evidence lower bound of the galaxies
    held out are kept.
    """

    ConfigClass: ClassVar[type[TrainCvaeConfig]] = TrainCvaeConfig
    _DefaultName: ClassVar[str] = "trainCvae"
    config: TrainCvaeConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        inputs = butlerQC.get(inputRefs)
        start = ModelPackage.from_arrow(inputs["start"]) if "start" in inputs else None
        tables = [handle.get() for handle in inputs.get("cutouts", [])]
        try:
            outputs = self.run(tables, start=start, num_cores=butlerQC.resources.num_cores)
        except (GalaxySetError, ConditionError, ModelPackageError) as err:
            raise InvalidQuantumError(str(err)) from err
        outputs.model = outputs.model.to_arrow()
        butlerQC.put(outputs, outputRefs)

    def run(
        self, tables: Sequence[Table] = (), *, start: ModelPackage | None = None, num_cores: int = 1
    ) -> Struct:
        """Make or read the training set, and train.

        Parameters
        ----------
        tables
            What `CutGalaxiesTask` writes, for ``source="cutouts"``.
        start
            Model to go on from.
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
        GalaxySetError
            Raised if there are no galaxies to train on.
        """
        from ..training import TrainingSettings
        from .cvae_sampling import train_cvae

        config = self.config
        galaxies = self._make_training_set(tables)
        rest, held_out = galaxies.split(config.heldOutFraction, seed=config.seed)
        self.log.info("Training on %d galaxies; %d are held out.", len(rest), len(held_out))
        with torch_threads(num_cores):
            package = train_cvae(
                rest,
                held_out,
                name=config.modelName,
                version=config.modelVersion,
                settings=TrainingSettings(
                    epochs=config.epochs,
                    batch_size=config.batchSize,
                    learning_rate=config.learningRate,
                    schedule=config.schedule,
                    precision=config.precision,
                    channels_last=True,
                    seed=config.seed,
                ),
                network={
                    "width": config.width,
                    "latents": config.latents,
                    "texture_size": config.textureSize,
                    "texture_latents": config.textureLatents,
                    "texture_start": config.textureStart,
                    "texture_scale": config.textureScale,
                    "flow_layers": config.flowLayers,
                    "texture_layers": config.textureLayers,
                    "output_fwhm": config.outputFwhm,
                },
                start=start,
                kl_weight=config.klWeight,
                warm_up=config.warmUp,
                prior_steps=config.priorSteps,
                texture_prior_steps=config.texturePriorSteps,
                flux_scatter=config.fluxScatter,
                min_noise=config.minNoise,
                checkpoint=Path(config.checkpoint) if config.checkpoint else None,
                accelerator=config.accelerator,
                record=self._describe_training_set(),
            )
        record = {**package.record, "code": {"meas_deeplearn": __version__}}
        self.metadata["n_train"] = len(rest)
        self.metadata["n_held_out"] = len(held_out)
        return Struct(model=dataclasses.replace(package, record=record))

    def _make_training_set(self, tables: Sequence[Table]) -> GalaxySet:
        config = self.config
        if config.source == "cutouts":
            return self._read_cutouts(tables)
        if config.source == "cosmos":
            return read_cosmos_set(
                config.cosmosCatalog,
                size=config.size,
                pixel_scale=config.pixelScale,
                max_galaxies=config.nGalaxies,
                seed=config.seed,
            )
        return make_synthetic_set(
            config.nGalaxies,
            seed=config.seed,
            size=config.size,
            pixel_scale=config.pixelScale,
            max_magnitude=config.maxMagnitude,
            keep_truth=False,
        )

    def _read_cutouts(self, tables: Sequence[Table]) -> GalaxySet:
        config = self.config
        parts = [Cutouts.from_table(table) for table in tables if len(table)]
        if not parts:
            raise GalaxySetError("There are no stamps of galaxies; run cutGalaxies and check its selection.")
        cutouts = Cutouts.concatenate(parts)
        if abs(cutouts.pixel_scale / config.pixelScale - 1) > SCALE_TOLERANCE:
            raise GalaxySetError(
                f"Stamps have pixels of {cutouts.pixel_scale:.4f} arcsec; set pixelScale to that, and "
                f"outputFwhm to more than 1.5 pixels."
            )
        names = [*CONDITION_COLUMNS]
        table = vstack([table[names] for table in tables if len(table)], metadata_conflicts="silent")
        galaxies, _ = make_coadd_set(cutouts, table, size=config.size, seed=config.seed)
        chosen = np.random.default_rng(config.seed).permutation(len(galaxies))[: config.nGalaxies]
        self.log.info("Took %d of %d stamps.", len(chosen), len(cutouts))
        return galaxies[np.sort(chosen)]

    def _describe_training_set(self) -> dict[str, Any]:
        description: dict[str, Any] = {"source": self.config.source, "seed": self.config.seed}
        if self.config.source == "cosmos":
            return description | {"catalog": Path(self.config.cosmosCatalog).name}
        if self.config.source == "cutouts":
            return description
        return description | {"max_magnitude": self.config.maxMagnitude}

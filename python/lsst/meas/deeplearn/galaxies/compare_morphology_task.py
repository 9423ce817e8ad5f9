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

"""Measure how much generated galaxies are like real ones."""

from __future__ import annotations

__all__ = ("CompareMorphologyConfig", "CompareMorphologyConnections", "CompareMorphologyTask")

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

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

from ..model_package import MODEL_STORAGE_CLASS, ModelPackage, ModelPackageError
from .comparison import (
    Sample,
    compare_samples,
    compute_conditioning,
    compute_isotropy,
    compute_nearest,
    make_cosmos_samples,
    make_synthetic_samples,
)
from .cosmos import GalaxySet, GalaxySetError
from .synthetic import draw_to_magnitude, make_synthetic_set

if TYPE_CHECKING:
    from .cvae_sampling import CvaeSampler


class CompareMorphologyConnections(PipelineTaskConnections, dimensions=()):
    """Datasets that `CompareMorphologyTask` reads and writes."""

    model = cT.Input(
        doc="Model package of the galaxies; its version is chosen by the order of input collections.",
        name="galaxy_cvae_model",
        storageClass=MODEL_STORAGE_CLASS,
        dimensions=(),
    )
    morphology = cT.Output(
        doc="Statistics of every galaxy of every sample (real, cvae, parametric, knots), a row each, with "
        "the conditions that it was made for.",
        name="galaxy_morphology",
        storageClass="ArrowAstropy",
        dimensions=(),
    )
    distances = cT.Output(
        doc="KS and Wasserstein distances of each statistic of each sample from the real one, with bootstrap "
        "errors and the distance that equal samples would have, and the area under the ROC curve of a "
        "classifier.",
        name="galaxy_morphology_distances",
        storageClass="ArrowAstropy",
        dimensions=(),
    )
    checks = cT.Output(
        doc="Bias of the half-light radius by condition, terms that are zero without a preferred direction, "
        "and distances from galaxies that were trained on; a row each.",
        name="galaxy_morphology_checks",
        storageClass="ArrowAstropy",
        dimensions=(),
    )
    gallery = cT.Output(
        doc="Galaxies of all samples that have the same conditions, in columns.",
        name="galaxy_gallery",
        storageClass="Plot",
        dimensions=(),
    )
    figure = cT.Output(
        doc="Distributions of the statistics of all samples.",
        name="galaxy_morphology_figure",
        storageClass="Plot",
        dimensions=(),
    )


class CompareMorphologyConfig(PipelineTaskConfig, pipelineConnections=CompareMorphologyConnections):
    """Configuration of `CompareMorphologyTask`."""

    source = ChoiceField[str](
        doc="Galaxies to compare with.",
        default="synthetic",
        allowed={
            "synthetic": "Galaxies of known truth, as those of trainCvae.",
            "cosmos": "The real galaxies of the GalSim COSMOS catalogue that cosmosCatalog names.",
        },
    )
    cosmosCatalog = Field[str](
        doc="Path of the catalogue that galsim_download_cosmos has put somewhere.", default=""
    )
    nGalaxies = RangeField(
        dtype=int,
        doc="Number of galaxies of each sample; of real ones at most as many as there are.  A galaxy of a "
        "sample takes about 20 ms.",
        default=2000,
        min=20,
    )
    nSamples = RangeField(
        dtype=int, doc="Number of generated galaxies for each real galaxy of COSMOS.", default=100, min=1
    )
    maxMagnitude = RangeField(
        dtype=float, doc="Faintest magnitude of synthetic galaxies.", default=25.2, min=18.0
    )
    seed = Field[int](
        doc="Seed of galaxies and noise; not that of the training set, or galaxies are compared with those "
        "trained on.",
        default=1000,
    )
    nBootstrap = RangeField(dtype=int, doc="Number of bootstrap samples of the errors.", default=100, min=2)
    nShown = RangeField(dtype=int, doc="Number of galaxies in the gallery.", default=12, min=1)

    def validate(self) -> None:
        super().validate()
        if self.source == "cosmos" and not self.cosmosCatalog:
            raise FieldValidationError(
                self.__class__.cosmosCatalog, self, "Real galaxies need the path of their catalogue."
            )


class CompareMorphologyTask(PipelineTask):
    """Compare generated with real galaxies by statistics of their shapes.

    All samples are observed with the PSFs and the noise of the real one, and
    measured in the same way; see `comparison`.
    """

    ConfigClass: ClassVar[type[CompareMorphologyConfig]] = CompareMorphologyConfig
    _DefaultName: ClassVar[str] = "compareMorphology"
    config: CompareMorphologyConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        inputs = butlerQC.get(inputRefs)
        try:
            outputs = self.run(ModelPackage.from_arrow(inputs["model"]))
        except (GalaxySetError, ModelPackageError) as err:
            raise InvalidQuantumError(str(err)) from err
        butlerQC.put(outputs, outputRefs)

    def run(self, model: ModelPackage) -> Struct:
        """Draw and compare samples.

        Parameters
        ----------
        model
            Model package of the galaxies.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``morphology``, ``distances``, ``checks``
                Tables (`astropy.table.Table`).
            ``gallery``, ``figure``
                Figures (`matplotlib.figure.Figure`).

        Raises
        ------
        ModelPackageError
            Raised if the model is of another kind.
        GalaxySetError
            Raised if there are no galaxies to compare with.
        """
        from .cvae_sampling import CvaeSampler
        from .plots import plot_gallery, plot_statistics

        config = self.config
        sampler = CvaeSampler(model, outside="clip", batch_size=16)
        galaxies, samples = self._make_samples(sampler)
        tables = {}
        for name, sample in samples.items():
            tables[name] = sample.measure(galaxies.pixel_scale)
            flagged = int(tables[name]["flag"].sum())
            self.log.info("Measured %d galaxies of %s; %d are flagged.", len(sample.galaxy), name, flagged)
        distances = compare_samples(tables, seed=config.seed, n_bootstrap=config.nBootstrap)
        for row in distances[distances["statistic"] == "c2st"]:
            self.log.info("C2ST of %s: %.3f +- %.3f.", row["sample"], row["ks"], row["ks_error"])
        shown = _choose_bright(galaxies.conditions, config.nShown)
        return Struct(
            morphology=_join(tables, galaxies.conditions),
            distances=distances,
            checks=self._check(model, sampler, galaxies, samples, tables),
            gallery=plot_gallery(samples, galaxies.conditions, shown, pixel_scale=galaxies.pixel_scale),
            figure=plot_statistics(tables, distances),
        )

    def _make_samples(self, sampler: CvaeSampler) -> tuple[GalaxySet, dict[str, Sample]]:
        config = self.config
        if config.source == "cosmos":
            return make_cosmos_samples(
                sampler,
                config.cosmosCatalog,
                n_samples=config.nSamples,
                max_galaxies=config.nGalaxies,
                seed=config.seed,
                size=sampler.size,
                pixel_scale=sampler.pixel_scale,
            )
        return make_synthetic_samples(
            sampler,
            config.nGalaxies,
            seed=config.seed,
            size=sampler.size,
            pixel_scale=sampler.pixel_scale,
            max_magnitude=config.maxMagnitude,
        )

    def _check(
        self,
        model: ModelPackage,
        sampler: CvaeSampler,
        galaxies: GalaxySet,
        samples: Mapping[str, Sample],
        tables: Mapping[str, Table],
    ) -> Table:
        """Return rows of check, value and error."""
        rows = []
        for row in compute_conditioning(tables["real"], tables["cvae"], galaxies.conditions):
            name = f"radius ratio, {row['condition']} {row['low']:.3g} to {row['high']:.3g}"
            rows.append((name, row["radius_ratio"], row["radius_ratio_error"]))
        for row in compute_isotropy(tables["cvae"]):
            rows.append((f"mean {row['term']}", row["mean"], row["error"]))
        training = model.record.get("training_set", {})
        n_all = training.get("n_train", 0) + training.get("n_validation", 0)
        if training.get("source") == "synthetic" and n_all:
            n = min(len(galaxies), n_all)
            parameters = draw_to_magnitude(n_all, training["seed"], training["max_magnitude"])[:n]
            trained_on = make_synthetic_set(
                n,
                seed=training["seed"],
                size=galaxies.size,
                pixel_scale=galaxies.pixel_scale,
                parameters=parameters,
                keep_truth=False,
            )
            latents = []
            noise = np.sqrt(trained_on.noise_variance * trained_on.noise_power.mean())
            train = Sample(trained_on.image, np.arange(n), noise)
            sets = (trained_on, train), (galaxies, samples["real"]), (galaxies, samples["cvae"])
            for source, sample in sets:
                means, _ = sampler.score(
                    sample.image,
                    psf=source.psf[source.psf_index[sample.galaxy]],
                    noise=sample.noise,
                    conditions=source.conditions[sample.galaxy],
                    noise_power=source.noise_power,
                )
                latents.append(means)
            ratio, close = compute_nearest(*latents)
            rows += [("distance from nearest trained on, over held out", ratio, np.nan)]
            rows += [("fraction nearer than 99 % of held out", close, np.sqrt(0.01 / n))]
        return Table(rows=rows, names=("check", "value", "error"))


def _choose_bright(conditions: np.ndarray, n: int) -> list[int]:
    """Return galaxies of which something can be seen, large ones of all kinds.

    Those of the largest radii among the brighter half.
    """
    bright = np.flatnonzero(conditions[:, 1] <= np.median(conditions[:, 1]))
    order = bright[np.argsort(conditions[bright, 0])[::-1]]
    chosen = order[: max(len(order) // 3, n)]
    step = max(len(chosen) // n, 1)
    return [int(row) for row in chosen[::step][:n]]


def _join(tables: Mapping[str, Table], conditions: np.ndarray) -> Table:
    parts = []
    for name, table in tables.items():
        part = table.copy()
        part.add_column(np.full(len(part), name, dtype="U16"), name="sample", index=0)
        for column, title in enumerate(("requested_radius", "magnitude", "redshift")):
            part[title] = conditions[np.asarray(part["galaxy"]), column]
        parts.append(part)
    return vstack(parts)

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

"""Find strong lenses among the objects of a patch."""

from __future__ import annotations

__all__ = ("LensFinderConfig", "LensFinderConnections", "LensFinderTask")

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import astropy.units as u
import numpy as np
from astropy.table import Column, Table

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import ConfigField, Field, FieldValidationError, ListField, RangeField
from lsst.pipe.base import (
    InvalidQuantumError,
    PipelineTask,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection
from lsst.utils.logging import PeriodicLogger

from ..coadds import MultibandCoadd
from ..cutouts import CutoutExtractor, Cutouts
from ..inference import InferenceConfig, describe_engines, predict
from ..model_package import (
    MODEL_STORAGE_CLASS,
    SCALE_TOLERANCE,
    ModelPackage,
    ModelPackageError,
    ModelSettings,
    find_models,
    load_model,
)
from ..object_selection import SelectionError, column_names, select_objects
from ..patch_inputs import PATCH_DIMENSIONS, PatchConfig, PatchConnections, read_objects
from .ensemble import combine_logits, find_calibration
from .ring_finder import RingFinderConfig, find_rings
from .votes import PRIOR

CANDIDATE_COLUMNS: Mapping[str, tuple[str, u.UnitBase | None, str]] = {
    "objectId": ("i8", None, "ID of the object in the input table"),
    "coord_ra": ("f8", u.deg, "ICRS right ascension of the object"),
    "coord_dec": ("f8", u.deg, "ICRS declination of the object"),
    "x": ("f8", u.pix, "Column of the object in pixels of the tract"),
    "y": ("f8", u.pix, "Row of the object in pixels of the tract"),
    "tract": ("i8", None, "Tract of the coadd that was looked at"),
    "patch": ("i8", None, "Patch of the coadd that was looked at"),
    "score": ("f4", None, "Output of the networks between 0 and 1, not a probability; NaN if not scored"),
    "score_err": ("f4", None, "Standard deviation of the scores of the networks; NaN for one network"),
    "log_likelihood_ratio": (
        "f8",
        None,
        "Natural logarithm of the likelihood ratio of a lens to anything else; NaN without calibration",
    ),
    "probability": ("f8", None, "Probability of a lens for the configured prevalence; NaN if not calibrated"),
    "probability_err": ("f8", None, "Error of the probability, from calibrations and between networks"),
    "ringfinder_snr": ("f4", None, "Signal to noise of g - alpha i in the annulus; NaN if not measured"),
    "ringfinder_is_lens": ("?", None, "Whether RingFinder calls the object a lens"),
    "ringfinder_n_regions": ("i4", None, "Number of arc-like residuals that RingFinder accepts"),
    "masked_fraction": ("f4", None, "Fraction of unusable pixels in the stamp, in the worst band"),
    "patch_inner": ("?", None, "Whether the object is in the inner region of the patch, where that is known"),
    "flag_not_scored": (
        "?",
        None,
        "The first classifier gave no score; other flags say why",
    ),
    "flag_edge": ("?", None, "A part of the stamp, or all of it, is outside the patch"),
    "flag_masked": ("?", None, "Too many pixels of the stamp are unusable"),
    "flag_missing_band": ("?", None, "The patch lacks a band"),
    "flag_missing_cell": ("?", None, "The object is in a cell without input images in some band"),
    "flag_bad_psf": ("?", None, "The coadd has no PSF model at the object in some band"),
    "bands": ("U32", None, "Bands that the network has seen, or else RingFinder"),
    "model_name": ("U256", None, "Names of the model packages; empty without a network"),
    "model_version": ("U128", None, "Versions of the model packages; empty without a network"),
}
"""Type, unit and description of each column of ``lens_candidates``."""


class LensFinderConnections(
    PatchConnections,
    dimensions=PATCH_DIMENSIONS,
    defaultTemplates={"outputName": "lens"},
):
    """Datasets that `LensFinderTask` reads and writes.

    Parameters
    ----------
    config
        Configuration of the task.
    """

    models = cT.PrerequisiteInput(
        doc="Model packages of the networks of an ensemble, or of one network: all that are in the input "
        "collections, but of runs models/<name>/<version> only the first version of each name.",
        name="deeplens_model",
        storageClass=MODEL_STORAGE_CLASS,
        dimensions=(),
        multiple=True,
        deferLoad=True,
        lookupFunction=find_models,
    )
    candidates = cT.Output(
        doc="Score and flags of every object that was selected, a row each.",
        name="{outputName}_candidates",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )
    cutouts = cT.Output(
        doc="Stamps of the objects with the highest scores, a row each (Cutouts.from_table).",
        name="{outputName}_cutouts",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )

    config: LensFinderConfig

    # A patch that lacks a band gets rows with flags.
    needs_all_bands: ClassVar[bool] = False

    def __init__(self, *, config: LensFinderConfig):
        super().__init__(config=config)
        if not config.doDeepLens:
            del self.models


class LensFinderConfig(PatchConfig, pipelineConnections=LensFinderConnections):
    """Configuration of `LensFinderTask`."""

    # Inputs.
    bands = ListField[str](
        doc="Bands to read; those of the model and of RingFinder must be among them.",
        default=["g", "r", "i"],
    )
    selection = ListField[str](
        doc="Conditions on columns that an object must satisfy to be looked at; see "
        "lsst.meas.deeplearn.object_selection.  Fluxes are in nJy, mag() is the AB magnitude.",
        default=["refExtendedness > 0.5", "mag(i_cModelFlux) < 23"],
    )

    # Pixels.
    maxMaskedFraction = RangeField(
        dtype=float,
        doc="Largest fraction of unusable pixels in any band of a stamp that still gets a score.",
        default=0.2,
        min=0.0,
        max=1.0,
        inclusiveMax=False,
    )
    doResample = Field[bool](
        doc="Resample stamps to the pixel scale of the model where it differs by more than 2%?  If not, "
        "such a model is refused.",
        default=True,
    )
    maxResampling = RangeField(
        dtype=float,
        doc="Largest ratio between the pixel scales of model and data, either way, that is resampled.",
        default=1.5,
        min=1.0,
    )
    stampExtent = RangeField(
        dtype=float,
        doc="Side of the stamps in arcsec when there is no model package to tell it.",
        default=9.0,
        min=6.0,
    )
    psfSize = RangeField(
        dtype=int, doc="Side of the PSF kernels that go with the stamps, in pixels; odd.", default=25, min=1
    )

    # Classifiers.
    doDeepLens = Field[bool](doc="Score with the networks of the model packages?", default=True)
    doRingFinder = Field[bool](doc="Run RingFinder?", default=True)
    inference = ConfigField[InferenceConfig](doc="Device, engine and precision of the networks.")
    prevalence = RangeField(
        dtype=float,
        doc="Fraction of lenses among the objects that are looked at, for their probability.  2e-4 are two "
        "lenses in a square degree (Collett 2015 for the depth of LSST) among ten thousand massive "
        "galaxies; a selection that lets more galaxies in has proportionally less.",
        default=PRIOR,
        min=0.0,
        max=1.0,
        inclusiveMin=False,
        inclusiveMax=False,
    )
    ringFinder = ConfigField[RingFinderConfig](doc="RingFinder.")

    # Outputs.
    nCutouts = RangeField(
        dtype=int,
        doc="Number of stamps to keep in each patch, of the highest scores of each classifier.",
        default=50,
        min=0,
    )
    chunkSize = RangeField(
        dtype=int,
        doc="Number of stamps held in memory at once; 1000 of 45 x 45 pixels in 3 bands take 60 MB.",
        default=1000,
        min=1,
    )

    def validate(self) -> None:
        super().validate()
        if not (self.doDeepLens or self.doRingFinder):
            raise FieldValidationError(
                self.__class__.doDeepLens, self, "Both doDeepLens and doRingFinder are off: nothing to do."
            )
        if self.psfSize % 2 == 0:
            raise FieldValidationError(self.__class__.psfSize, self, "The side of PSF kernels must be odd.")
        ring_bands = {self.ringFinder.blueBand, self.ringFinder.redBand}
        if self.doRingFinder and not ring_bands <= set(self.bands):
            raise FieldValidationError(
                self.__class__.bands,
                self,
                f"RingFinder needs bands {', '.join(sorted(ring_bands))}; bands are {', '.join(self.bands)}.",
            )
        try:
            column_names(self.selection)
        except SelectionError as err:
            raise FieldValidationError(self.__class__.selection, self, str(err)) from err


class LensFinderTask(PipelineTask):
    """Find galaxy-scale strong lenses among the objects of a patch.

    The objects that satisfy a selection are cut out of the coadds of all
    bands and scored by one network or several (CMU DeepLens, Lanusse et al.
    2018), by RingFinder (Gavazzi et al. 2014), or by both.
    """

    ConfigClass: ClassVar[type[LensFinderConfig]] = LensFinderConfig
    _DefaultName: ClassVar[str] = "lensFinder"
    config: LensFinderConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        data_id = butlerQC.quantum.dataId
        assert data_id is not None, "A quantum of this task has a patch."
        inputs = butlerQC.get(inputRefs)
        coadd = MultibandCoadd.read(inputs["coadds"], self.config.bands)
        objects = read_objects(
            inputs["objects"],
            self.config,
            column_names(self.config.selection),
            patch=int(data_id["patch"]),
        )
        try:
            outputs = self.run(
                coadd,
                objects,
                [load_model(handle) for handle in inputs["models"]] if self.config.doDeepLens else (),
                tract=int(data_id["tract"]),
                patch=int(data_id["patch"]),
                num_cores=butlerQC.resources.num_cores,
            )
        except ModelPackageError as err:
            raise InvalidQuantumError(str(err)) from err
        butlerQC.put(outputs, outputRefs)

    def run(
        self,
        coadd: MultibandCoadd,
        objects: Table,
        models: Sequence[ModelPackage] = (),
        *,
        tract: int = 0,
        patch: int = 0,
        num_cores: int = 1,
    ) -> Struct:
        """Score the objects of a patch.

        Parameters
        ----------
        coadd
            Coadds of the patch.
        objects
            Objects, with the columns that the configuration names.
        models
            Model packages whose scores are averaged; at least one is needed
            if ``config.doDeepLens``.
        tract, patch
            Where the coadd is, for the output.
        num_cores
            Threads that the networks may use.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``candidates``
                The columns of `CANDIDATE_COLUMNS`, a row for each selected
                object in the order of ``objects``
                (`astropy.table.Table`).
            ``cutouts``
                `Cutouts.to_table` of the objects with the highest scores
                (`astropy.table.Table`).

        Raises
        ------
        ModelPackageError
            Raised if a model does not fit the bands or the pixel scale, or
            another model.
        SelectionError
            Raised if the selection does not fit the table.
        """
        if self.config.doDeepLens and not models:
            raise ModelPackageError("No model package was given; set doDeepLens to False to run without.")
        if coadd.missing_bands:
            self.log.warning("The patch has no coadd in %s.", ", ".join(coadd.missing_bands))
        selected = objects[select_objects(objects, self.config.selection)]
        self.log.info("Looking at %d of %d objects.", len(selected), len(objects))

        self._check_models(models, coadd)
        extractor = CutoutExtractor(
            coadd,
            size=self._compute_stamp_size(models, coadd.pixel_scale),
            psf_size=self.config.psfSize,
            bad_planes=self.config.badMaskPlanes,
        )
        candidates = self._make_candidates(selected, models, tract=tract, patch=patch)
        progress = PeriodicLogger(self.log)
        for start in range(0, len(candidates), self.config.chunkSize):
            rows = candidates[start : start + self.config.chunkSize]
            # Without RingFinder only whether there is a PSF is asked for.
            cutouts = _extract(extractor, rows, None if self.config.doRingFinder else 1)
            usable = self._describe(rows, cutouts, coadd)
            if models:
                self._score(rows, cutouts, usable, models, num_cores)
            if self.config.doRingFinder:
                self._find_rings(rows, cutouts, usable)
            progress.log("Scored %d of %d objects.", start + len(rows), len(candidates))
        if models and len(candidates):
            self._log_engines(models, num_cores)
        candidates["flag_not_scored"][:] = ~np.isfinite(candidates[self._score_columns[0]])

        self.metadata["n_objects"] = len(candidates)
        self.metadata["n_not_scored"] = int(candidates["flag_not_scored"].sum())
        self.log.info(
            "%d objects have a score, %d have flags instead.",
            self.metadata["n_objects"] - self.metadata["n_not_scored"],
            self.metadata["n_not_scored"],
        )
        best = candidates[_choose_best(candidates, self._score_columns, self.config.nCutouts)]
        return Struct(candidates=candidates, cutouts=_extract(extractor, best).to_table())

    @property
    def _score_columns(self) -> list[str]:
        """Columns of the classifiers that run, the one that counts first."""
        columns = ["score"] if self.config.doDeepLens else []
        return columns + (["ringfinder_snr"] if self.config.doRingFinder else [])

    def _make_candidates(
        self, selected: Table, models: Sequence[ModelPackage], *, tract: int, patch: int
    ) -> Table:
        """Make the output table, with NaN and False for all measurements."""
        config = self.config
        candidates = Table()
        for name, (dtype, unit, description) in CANDIDATE_COLUMNS.items():
            values = np.zeros(len(selected), dtype=dtype)
            if values.dtype.kind == "f":
                values[:] = np.nan
            candidates[name] = Column(values, unit=unit, description=description)
        candidates["objectId"][:] = selected[config.idColumn]
        candidates["coord_ra"][:] = selected[config.raColumn]
        candidates["coord_dec"][:] = selected[config.decColumn]
        candidates["tract"][:] = tract
        candidates["patch"][:] = patch
        candidates["model_name"][:] = ",".join(model.name for model in models)
        candidates["model_version"][:] = ",".join(model.version for model in models)
        ring_bands = (config.ringFinder.blueBand, config.ringFinder.redBand)
        bands = models[0].settings.bands if models else ring_bands
        candidates["bands"][:] = ",".join(bands)
        return candidates

    def _check_models(self, models: Sequence[ModelPackage], coadd: MultibandCoadd) -> None:
        """Check that models fit the data and each other."""
        for model in models:
            model.check_bands(self.config.bands)
            if set(model.settings.bands) != set(models[0].settings.bands):
                raise ModelPackageError(
                    f"Model {model.name} {model.version} sees bands {', '.join(model.settings.bands)}, but "
                    f"{models[0].name} {models[0].version} sees {', '.join(models[0].settings.bands)}; the "
                    "models of an ensemble must agree.  Choose models by input collections."
                )
            self._check_pixel_scale(model, coadd.pixel_scale)
        if models:
            self.log.info("Scoring with %s.", ", ".join(f"{model.name} {model.version}" for model in models))
        if without := [model.name for model in models if find_calibration(model) is None]:
            self.log.info("Model %s is not calibrated, so there are no probabilities.", ", ".join(without))

    def _check_pixel_scale(self, model: ModelPackage, pixel_scale: float) -> None:
        """Check that stamps can be brought to the pixel scale of a model."""
        ratio = model.settings.pixel_scale / pixel_scale
        limit = 1 + (self.config.maxResampling - 1 if self.config.doResample else SCALE_TOLERANCE)
        if not 1 / limit <= ratio <= limit:
            raise ModelPackageError(
                f"Model {model.name} {model.version} needs pixels of {model.settings.pixel_scale:.3f} "
                f"arcsec, but those of the coadd have {pixel_scale:.3f} arcsec.  Choose a model that "
                "was trained for this survey, or set doResample or maxResampling."
            )
        if _needs_resampling(model.settings, pixel_scale):
            self.log.info(
                "Stamps are resampled from %.3f to %.3f arcsec per pixel.",
                pixel_scale,
                model.settings.pixel_scale,
            )

    def _compute_stamp_size(self, models: Sequence[ModelPackage], pixel_scale: float) -> int:
        """Return the side in pixels of the stamps that all classifiers see."""
        if not models:
            return _round_up_to_odd(self.config.stampExtent / pixel_scale)
        return max(_compute_cut_size(model.settings, pixel_scale) for model in models)

    def _describe(self, rows: Table, cutouts: Cutouts, coadd: MultibandCoadd) -> np.ndarray:
        """Fill in positions and flags; return which stamps can be scored."""
        rows["x"][:] = cutouts.x
        rows["y"][:] = cutouts.y
        if coadd.inner_bbox is not None:
            rows["patch_inner"][:] = coadd.inner_bbox.contains(x=cutouts.x, y=cutouts.y)
        else:
            rows["patch_inner"][:] = True
        rows["masked_fraction"][:] = cutouts.masked_fraction.max(axis=1)
        rows["flag_edge"][:] = cutouts.off_edge
        rows["flag_masked"][:] = ~(rows["masked_fraction"] <= self.config.maxMaskedFraction)
        rows["flag_missing_band"][:] = cutouts.missing_band.any(axis=1)
        rows["flag_missing_cell"][:] = cutouts.missing_cell.any(axis=1)
        rows["flag_bad_psf"][:] = cutouts.bad_psf.any(axis=1)
        return np.asarray(~(rows["flag_masked"] | rows["flag_missing_band"] | rows["flag_missing_cell"]))

    def _score(
        self,
        rows: Table,
        cutouts: Cutouts,
        usable: np.ndarray,
        models: Sequence[ModelPackage],
        num_cores: int,
    ) -> None:
        """Fill in the scores of the networks, and what they are worth."""
        usable_cutouts = cutouts if usable.all() else cutouts[usable]
        logits = np.empty((len(models), len(usable_cutouts)), dtype=np.float32)
        inputs: dict[str, np.ndarray] = {}
        for k, model in enumerate(models):
            # Members of an ensemble mostly see the same inputs.
            key = dataclasses.replace(model.settings, network={}).to_json()
            if key not in inputs:
                inputs[key] = _make_inputs(usable_cutouts, model.settings)
            logits[k] = predict(model.network, inputs[key], self.config.inference, num_threads=num_cores)
        calibrations = [find_calibration(model) for model in models]
        scores = combine_logits(logits, calibrations, prevalence=self.config.prevalence)
        for field in dataclasses.fields(scores):
            rows[field.name][usable] = getattr(scores, field.name)

    def _log_engines(self, models: Sequence[ModelPackage], num_cores: int) -> None:
        """Say how the networks have run, if any stamp was usable."""
        networks = [model.network for model in models]
        if engines := describe_engines(networks, self.config.inference, num_threads=num_cores):
            self.log.info("Networks ran with %s.", engines)

    def _find_rings(self, rows: Table, cutouts: Cutouts, usable: np.ndarray) -> None:
        """Fill in the results of RingFinder."""
        rings = find_rings(cutouts if usable.all() else cutouts[usable], self.config.ringFinder)
        rows["ringfinder_snr"][usable] = rings.snr
        rows["ringfinder_is_lens"][usable] = rings.is_lens
        rows["ringfinder_n_regions"][usable] = rings.n_regions


def _extract(extractor: CutoutExtractor, rows: Table, psf_size: int | None = None) -> Cutouts:
    return extractor.extract(
        ids=rows["objectId"], ra=rows["coord_ra"], dec=rows["coord_dec"], psf_size=psf_size
    )


def _needs_resampling(settings: ModelSettings, pixel_scale: float) -> bool:
    return abs(settings.pixel_scale / pixel_scale - 1) > SCALE_TOLERANCE


def _compute_cut_size(settings: ModelSettings, pixel_scale: float) -> int:
    """Return the side of stamps of the coadd that a network needs."""
    if _needs_resampling(settings, pixel_scale):
        return _round_up_to_odd(settings.stamp_size * settings.pixel_scale / pixel_scale)
    return settings.stamp_size


def _make_inputs(cutouts: Cutouts, settings: ModelSettings) -> np.ndarray:
    """Return what a network sees of stamps, ``(N, bands, y, x)``."""
    # Cropped first: a network sees the same alone as in an ensemble.
    stamps = cutouts.select_bands(settings.bands)
    stamps = stamps.crop(_compute_cut_size(settings, cutouts.pixel_scale))
    if _needs_resampling(settings, stamps.pixel_scale):
        stamps = stamps.resample(settings.pixel_scale, settings.stamp_size)
    return settings.preprocessing.apply(stamps)


def _choose_best(candidates: Table, columns: list[str], n: int) -> np.ndarray:
    """Return the rows with the n highest values in any of the columns."""
    best: set[int] = set()
    for column in columns:
        values = np.nan_to_num(np.asarray(candidates[column], dtype=np.float64), nan=-np.inf)
        order = np.lexsort((candidates["objectId"], -values))[:n]
        best.update(int(row) for row in order if np.isfinite(values[row]))
    return np.array(sorted(best), dtype=np.int64)


def _round_up_to_odd(size: float) -> int:
    return int(np.ceil(size)) // 2 * 2 + 1

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


"""Draw galaxies like those of a patch, as the coadd would show them."""

from __future__ import annotations

__all__ = ("CvaeGalaxyConfig", "CvaeGalaxyConnections", "CvaeGalaxyTask")

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import astropy.units as u
import galsim
import numpy as np
from astropy.table import Column, Table

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import Field, FieldValidationError, ListField, RangeField
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
from ..model_package import MODEL_STORAGE_CLASS, ModelPackage, ModelPackageError
from ..object_selection import SelectionError, column_names, select_objects
from ..patch_inputs import PATCH_DIMENSIONS, PatchConfig, PatchConnections, read_objects
from .conditions import CONDITION_NAMES, ConditionError
from .cvae_galaxy import NJY_ZERO_POINT, make_profile
from .parametric import GalaxyPopulation

if TYPE_CHECKING:
    pass

GALAXY_COLUMNS: Mapping[str, tuple[str, u.UnitBase | None, str]] = {
    "half_light_radius": ("f4", u.arcsec, "Half-light radius that the galaxy was drawn for"),
    "magnitude": ("f4", u.ABmag, "AB magnitude that the galaxy was drawn for"),
    "redshift": ("f4", None, "Redshift that the galaxy was drawn for"),
    "flux": ("f4", u.nJy, "Flux of the galaxy"),
    "galaxy_seed": ("i8", None, "Seed of its shape and orientation"),
    "flag_outside": ("?", None, "The object is outside the training set of the model; it was clipped to it"),
    "flag_not_drawn": ("?", None, "No galaxy was drawn: its conditions are unknown, or there is no PSF"),
    "model_name": ("U64", None, "Name of the model package"),
    "model_version": ("U32", None, "Version of the model package"),
    "model_digest": ("U64", None, "SHA-256 of the model package"),
}
"""Type, unit and description of what is added to the columns of `Cutouts`."""

GAUSSIAN_HALF_LIGHT_RADIUS = 1.1774
"""Half-light radius of a Gaussian in units of its sigma."""


class CvaeGalaxyConnections(
    PatchConnections,
    dimensions=PATCH_DIMENSIONS,
    defaultTemplates={"outputName": "galaxy_cvae"},
):
    """Datasets that `CvaeGalaxyTask` reads and writes."""

    model = cT.PrerequisiteInput(
        doc="Model package of the galaxies; its version is chosen by the order of input collections.",
        name="galaxy_cvae_model",
        storageClass=MODEL_STORAGE_CLASS,
        dimensions=(),
    )
    cutouts = cT.Output(
        doc="Stamps of generated galaxies with the PSF, pixels and noise of the coadd, a row for each "
        "object (Cutouts.from_table), and what they were drawn for.",
        name="{outputName}_cutouts",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )

    config: CvaeGalaxyConfig


class CvaeGalaxyConfig(PatchConfig, pipelineConnections=CvaeGalaxyConnections):
    """Configuration of `CvaeGalaxyTask`."""

    # Inputs.
    band = Field[str](
        doc="Band of the coadd; the nearest to F814W, in which COSMOS was observed, is i.", default="i"
    )
    selection = ListField[str](
        doc="Conditions on columns that an object must satisfy (see lsst.meas.deeplearn.object_selection).",
        default=["refExtendedness > 0.5", "17 < mag(i_cModelFlux) < 25"],
    )

    # Conditions.
    fluxColumn = Field[str](
        doc="Column with the total flux in nJy, which gives the magnitude; '{band}' stands for the band.",
        default="{band}_cModelFlux",
    )
    radiusColumn = Field[str](
        doc="Column with the half-light radius before the PSF, in arcsec.  If empty, it is that of a "
        "Gaussian with the second moments in momentColumns less those of the PSF: a rough guess.",
        default="",
    )
    momentColumns = ListField[str](
        doc="Columns with the second moments xx and yy in pixels squared.", default=["shape_xx", "shape_yy"]
    )
    minRadius = RangeField(
        dtype=float,
        doc="Half-light radius in arcsec that is taken for objects with a smaller one.",
        default=0.08,
        min=0.0,
        inclusiveMin=False,
    )
    redshiftColumn = Field[str](
        doc="Column with the photometric redshift.  If empty, redshifts are drawn from COSMOS galaxies of "
        "the same magnitude.",
        default="",
    )

    # Stamps.
    stampSize = RangeField(dtype=int, doc="Side of the stamps in pixels, odd.", default=45, min=15)
    psfSize = RangeField(dtype=int, doc="Side of the PSF kernels in pixels, odd.", default=25, min=3)
    doNoise = Field[bool](doc="Add noise with the variance of the coadd?", default=True)
    seed = Field[int](doc="Seed, to which the object ID is added.", default=0)

    def validate(self) -> None:
        super().validate()
        if self.stampSize % 2 == 0 or self.psfSize % 2 == 0:
            raise FieldValidationError(
                self.__class__.stampSize, self, "The sides of stamps and PSF kernels must be odd."
            )
        if not self.radiusColumn and len(self.momentColumns) != 2:
            raise FieldValidationError(
                self.__class__.momentColumns, self, "Without radiusColumn, two columns are needed, xx and yy."
            )
        try:
            column_names(self.selection)
        except SelectionError as err:
            raise FieldValidationError(self.__class__.selection, self, str(err)) from err


class CvaeGalaxyTask(PipelineTask):
    """Draw a galaxy for each object of a patch, from a trained model.

    A galaxy has the magnitude, half-light radius and redshift of its object,
    and the PSF, pixels, depth and flux units of the coadd; its shape is the
    model's.
    """

    ConfigClass: ClassVar[type[CvaeGalaxyConfig]] = CvaeGalaxyConfig
    _DefaultName: ClassVar[str] = "cvaeGalaxy"
    config: CvaeGalaxyConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        data_id = butlerQC.quantum.dataId
        assert data_id is not None, "A quantum of this task has a patch."
        inputs = butlerQC.get(inputRefs)
        coadd = MultibandCoadd.read(inputs["coadds"], [self.config.band])
        objects = read_objects(
            inputs["objects"],
            self.config,
            [*self._condition_columns, *column_names(self.config.selection)],
            patch=int(data_id["patch"]),
        )
        try:
            outputs = self.run(coadd, objects, ModelPackage.from_arrow(inputs["model"]))
        except (ModelPackageError, SelectionError) as err:
            raise InvalidQuantumError(str(err)) from err
        butlerQC.put(outputs, outputRefs)

    def run(self, coadd: MultibandCoadd, objects: Table, model: ModelPackage) -> Struct:
        """Draw the galaxies of a patch.

        Parameters
        ----------
        coadd
            Coadd of the patch, with the configured band.
        objects
            Objects, with the columns that the configuration names.
        model
            Model package of the galaxies.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``cutouts``
                `Cutouts.to_table` with generated galaxies, and the columns
                of `GALAXY_COLUMNS`, a row for each selected object in the
                order of ``objects`` (`astropy.table.Table`).

        Raises
        ------
        ModelPackageError
            Raised if the model is of another kind.
        SelectionError
            Raised if the selection does not fit the table.
        """
        from .cvae_sampling import CvaeSampler

        sampler = CvaeSampler(model, outside="clip")
        selected = objects[select_objects(objects, self.config.selection)]
        extractor = CutoutExtractor(
            coadd,
            size=self.config.stampSize,
            psf_size=self.config.psfSize,
            bad_planes=self.config.badMaskPlanes,
        )
        cutouts = extractor.extract(
            ids=np.asarray(selected[self.config.idColumn]),
            ra=np.asarray(selected[self.config.raColumn]),
            dec=np.asarray(selected[self.config.decColumn]),
        ).select_bands([self.config.band])
        table = self._make_table(selected, cutouts, model)
        progress = PeriodicLogger(self.log)
        images = np.array(cutouts.image)
        for row in range(len(table)):
            conditions = np.array([[float(table[name][row]) for name in CONDITION_NAMES]])
            if table["flag_not_drawn"][row]:
                images[row] = np.nan
                continue
            try:
                _, outside = sampler.check(conditions)
            except ConditionError as err:
                self.log.debug("Object %d: %s", cutouts.ids[row], err)
                table["flag_not_drawn"][row] = True
                images[row] = np.nan
                continue
            table["flag_outside"][row] = outside[0]
            seed = int(table["galaxy_seed"][row])
            profile = make_profile(
                sampler.draw(conditions, [seed])[0],
                pixel_scale=sampler.pixel_scale,
                flux=float(table["flux"][row]),
            )
            images[row, 0] = self._draw(profile, cutouts[row : row + 1])
            progress.log("Drew %d of %d galaxies.", row + 1, len(table))
        drawn = dataclasses.replace(cutouts, image=images)
        for name, column in drawn.to_table().columns.items():
            table[name] = column
        self.metadata["n_objects"] = len(table)
        self.metadata["n_not_drawn"] = int(table["flag_not_drawn"].sum())
        self.metadata["n_outside"] = int(table["flag_outside"].sum())
        self.log.info(
            "Drew %d galaxies; %d were outside the training set, %d objects could not be drawn.",
            len(table) - self.metadata["n_not_drawn"],
            self.metadata["n_outside"],
            self.metadata["n_not_drawn"],
        )
        return Struct(cutouts=table)

    @property
    def _flux_column(self) -> str:
        return self.config.fluxColumn.format(band=self.config.band)

    @property
    def _condition_columns(self) -> list[str]:
        """Columns from which conditions are made."""
        config = self.config
        radius = [config.radiusColumn] if config.radiusColumn else list(config.momentColumns)
        return [self._flux_column, *radius, *([config.redshiftColumn] if config.redshiftColumn else [])]

    def _make_table(self, selected: Table, cutouts: Cutouts, model: ModelPackage) -> Table:
        """Return the columns of `GALAXY_COLUMNS`, but for what is drawn."""
        table = Table()
        for name, (dtype, unit, description) in GALAXY_COLUMNS.items():
            table[name] = Column(np.zeros(len(selected), dtype=dtype), unit=unit, description=description)
        flux = _as_floats(selected[self._flux_column])
        table["flux"][:] = flux
        magnitude = np.full(len(flux), np.nan)
        magnitude[flux > 0] = NJY_ZERO_POINT - 2.5 * np.log10(flux[flux > 0])
        table["magnitude"][:] = magnitude
        table["half_light_radius"][:] = self._get_radii(selected, cutouts)
        table["galaxy_seed"][:] = [_make_seed(self.config.seed, i, "galaxy") for i in cutouts.ids]
        table["redshift"][:] = self._get_redshifts(selected, cutouts.ids, magnitude)
        unknown = cutouts.missing_band[:, 0] | cutouts.bad_psf[:, 0]
        for name in (*CONDITION_NAMES, "flux"):
            unknown |= ~np.isfinite(table[name])
        table["flag_not_drawn"][:] = unknown
        table["model_name"][:] = model.name
        table["model_version"][:] = model.version
        table["model_digest"][:] = model.digest
        return table

    def _get_radii(self, selected: Table, cutouts: Cutouts) -> np.ndarray:
        """Return half-light radii in arcsec; NaN where unknown."""
        config = self.config
        if config.radiusColumn:
            radius = _as_floats(selected[config.radiusColumn])
        else:
            xx, yy = (_as_floats(selected[name]) for name in config.momentColumns)
            psf = np.array([_measure_psf_variance(kernel) for kernel in cutouts.psf[:, 0]])
            variance = np.maximum((xx + yy) / 2 - psf.reshape(xx.shape), 0.0)
            radius = GAUSSIAN_HALF_LIGHT_RADIUS * np.sqrt(variance) * cutouts.pixel_scale
        return np.where(np.isfinite(radius), np.maximum(radius, config.minRadius), np.nan)

    def _get_redshifts(self, selected: Table, ids: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
        """Return redshifts, drawn for the magnitude if there is no column."""
        if self.config.redshiftColumn:
            return _as_floats(selected[self.config.redshiftColumn])
        population = GalaxyPopulation.make_cosmos().sample(20000, np.random.default_rng(0))
        order = np.argsort(population["magnitude"])
        known = population["magnitude"][order]
        redshift = np.full(len(magnitude), np.nan)
        for row, value in enumerate(magnitude):
            if np.isfinite(value):
                # One of the hundred galaxies of the nearest magnitudes.
                middle = int(np.searchsorted(known, value).clip(50, len(known) - 50))
                offset = _make_seed(self.config.seed, ids[row], "redshift") % 100 - 50
                redshift[row] = population["redshift"][order[middle + offset]]
        return redshift

    def _draw(self, profile: galsim.GSObject, cutout: Cutouts) -> np.ndarray:
        """Return the stamp of a galaxy in place of a cutout, ``(y, x)``."""
        scale, size = cutout.pixel_scale, cutout.size
        kernel = galsim.ImageD(cutout.psf[0, 0].astype(np.float64), scale=scale)
        # The kernel has the pixel in it, and is centred like the object.
        observed = galsim.Convolve(profile, galsim.InterpolatedImage(kernel, flux=1.0))
        stamp = observed.drawImage(nx=size, ny=size, scale=scale, method="no_pixel").array
        if self.config.doNoise:
            variance = np.where(cutout.bad[0, 0], np.nan, cutout.variance[0, 0])
            rng = np.random.default_rng(_make_seed(self.config.seed, cutout.ids[0], "noise"))
            stamp = stamp + np.sqrt(variance) * rng.standard_normal(stamp.shape)
        return np.asarray(stamp, dtype=np.float32)


def _as_floats(column: Any) -> np.ndarray:
    """Return a column as an array, masked values as NaN."""
    return np.ma.filled(np.ma.asarray(column, dtype=np.float64), np.nan)


def _make_seed(seed: int, object_id: int, purpose: str) -> int:
    """Return a seed that depends on nothing but the object."""
    digest = hashlib.sha256(f"{seed} {int(object_id)} {purpose}".encode()).digest()
    return int.from_bytes(digest[:7])


def _measure_psf_variance(kernel: np.ndarray) -> float:
    """Return sigma squared in pixels of a PSF; NaN where there is none."""
    if not np.isfinite(kernel).all():
        return np.nan
    moments = galsim.ImageD(kernel.astype(np.float64)).FindAdaptiveMom(strict=False)
    return float(moments.moments_sigma) ** 2 if not moments.error_message else np.nan

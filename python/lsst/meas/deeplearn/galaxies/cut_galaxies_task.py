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

"""Galaxies of a patch with what a galaxy model is conditioned on."""

from __future__ import annotations

__all__ = (
    "CONDITION_COLUMNS",
    "CutGalaxiesConfig",
    "CutGalaxiesConnections",
    "CutGalaxiesTask",
    "GalaxyPatchConfig",
    "extract_galaxies",
    "make_condition_table",
    "make_object_seed",
)

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import astropy.units as u
import galsim
import numpy as np
from astropy.table import Column, Table

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import Field, FieldValidationError, ListField, RangeField
from lsst.pipe.base import InvalidQuantumError, PipelineTask, QuantumContext, Struct
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection

from ..coadds import MultibandCoadd
from ..cutouts import CutoutExtractor, Cutouts
from ..object_selection import SelectionError, column_names, select_objects
from ..patch_inputs import PATCH_DIMENSIONS, PatchConfig, PatchConnections, read_objects
from .conditions import CONDITION_NAMES
from .cvae_galaxy import NJY_ZERO_POINT
from .parametric import GalaxyPopulation

CONDITION_COLUMNS: Mapping[str, tuple[str, u.UnitBase | None, str]] = {
    "half_light_radius": ("f4", u.arcsec, "Half-light radius before the PSF"),
    "magnitude": ("f4", u.ABmag, "AB magnitude"),
    "redshift": ("f4", None, "Redshift, or a draw from galaxies of the same magnitude"),
    "flux": ("f4", u.nJy, "Flux"),
    "flag_unknown": ("?", None, "A condition is unknown or impossible, or the coadd has no PSF there"),
}
"""Type, unit and description of the columns of `make_condition_table`."""

GAUSSIAN_HALF_LIGHT_RADIUS = 1.1774
"""Half-light radius of a Gaussian in units of its sigma."""


class CutGalaxiesConnections(
    PatchConnections, dimensions=PATCH_DIMENSIONS, defaultTemplates={"outputName": "galaxy"}
):
    """Datasets that `CutGalaxiesTask` reads and writes."""

    cutouts = cT.Output(
        doc="Stamps of galaxies (Cutouts.from_table) with their half-light radius, magnitude and redshift, "
        "a row each.",
        name="{outputName}_cutouts",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )

    config: CutGalaxiesConfig


class GalaxyPatchConfig(PatchConfig, pipelineConnections=PatchConnections):
    """Configuration of a task that looks at the galaxies of a patch."""

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
        doc="Half-light radius in arcsec that is taken for objects with a smaller one, or with 0; a negative "
        "one is unknown.",
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

    @property
    def flux_column(self) -> str:
        """Column with the flux."""
        return self.fluxColumn.format(band=self.band)

    @property
    def wanted_columns(self) -> list[str]:
        """Columns to read."""
        radius = [self.radiusColumn] if self.radiusColumn else list(self.momentColumns)
        redshift = [self.redshiftColumn] if self.redshiftColumn else []
        return [self.flux_column, *radius, *redshift, *column_names(self.selection)]


class CutGalaxiesConfig(GalaxyPatchConfig, pipelineConnections=CutGalaxiesConnections):
    """Configuration of `CutGalaxiesTask`."""


class CutGalaxiesTask(PipelineTask):
    """Cut out the galaxies of a patch, to train a galaxy model on them.

    The selection should leave out objects with near neighbours, which the
    model would take for parts of galaxies.
    """

    ConfigClass: ClassVar[type[CutGalaxiesConfig]] = CutGalaxiesConfig
    _DefaultName: ClassVar[str] = "cutGalaxies"
    config: CutGalaxiesConfig

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
            inputs["objects"], self.config, self.config.wanted_columns, patch=int(data_id["patch"])
        )
        try:
            outputs = self.run(coadd, objects)
        except SelectionError as err:
            raise InvalidQuantumError(str(err)) from err
        butlerQC.put(outputs, outputRefs)

    def run(self, coadd: MultibandCoadd, objects: Table) -> Struct:
        """Cut out the galaxies.

        Parameters
        ----------
        coadd
            Coadd of the patch, with the configured band.
        objects
            Objects, with the columns that the configuration names.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``cutouts``
                `Cutouts.to_table` and the columns of `CONDITION_COLUMNS`
                (`astropy.table.Table`).

        Raises
        ------
        SelectionError
            Raised if the selection does not fit the table.
        """
        selected, cutouts = extract_galaxies(coadd, objects, self.config)
        table = cutouts.to_table()
        for name, column in make_condition_table(selected, cutouts, self.config).columns.items():
            table[name] = column
        self.metadata["n_objects"] = len(table)
        n_unknown = int(table["flag_unknown"].sum())
        self.log.info("Cut out %d galaxies; of %d something is unknown.", len(table), n_unknown)
        return Struct(cutouts=table)


def extract_galaxies(
    coadd: MultibandCoadd, objects: Table, config: GalaxyPatchConfig
) -> tuple[Table, Cutouts]:
    """Return the selected objects, and their stamps in the band.

    Parameters
    ----------
    coadd, objects
        Of a patch.
    config
        What to select, and the size of stamps.
    """
    selected = objects[select_objects(objects, config.selection)]
    extractor = CutoutExtractor(
        coadd, size=config.stampSize, psf_size=config.psfSize, bad_planes=config.badMaskPlanes
    )
    cutouts = extractor.extract(
        ids=np.asarray(selected[config.idColumn]),
        ra=np.asarray(selected[config.raColumn]),
        dec=np.asarray(selected[config.decColumn]),
    )
    return selected, cutouts.select_bands([config.band])


def make_condition_table(selected: Table, cutouts: Cutouts, config: GalaxyPatchConfig) -> Table:
    """Return what a model is conditioned on, of objects.

    Parameters
    ----------
    selected
        Objects.
    cutouts
        Their stamps, whose PSF is subtracted from second moments.
    config
        Columns to take it from.

    Returns
    -------
    table
        The columns of `CONDITION_COLUMNS`.
    """
    table = Table()
    for name, (dtype, unit, description) in CONDITION_COLUMNS.items():
        table[name] = Column(np.zeros(len(selected), dtype=dtype), unit=unit, description=description)
    flux = _as_floats(selected[config.flux_column])
    magnitude = np.full(len(flux), np.nan)
    magnitude[flux > 0] = NJY_ZERO_POINT - 2.5 * np.log10(flux[flux > 0])
    table["flux"][:] = flux
    table["magnitude"][:] = magnitude
    table["half_light_radius"][:] = _get_radii(selected, cutouts, config)
    table["redshift"][:] = _get_redshifts(selected, cutouts.ids, magnitude, config)
    unknown = cutouts.missing_band[:, 0] | cutouts.bad_psf[:, 0]
    for name in (*CONDITION_NAMES, "flux"):
        unknown |= ~np.isfinite(table[name])
    with np.errstate(invalid="ignore"):
        unknown |= (table["half_light_radius"] <= 0) | (table["redshift"] < 0)
    table["flag_unknown"][:] = unknown
    return table


def _get_radii(selected: Table, cutouts: Cutouts, config: GalaxyPatchConfig) -> np.ndarray:
    """Return half-light radii in arcsec; NaN where unknown."""
    if config.radiusColumn:
        radius = _as_floats(selected[config.radiusColumn])
    else:
        xx, yy = (_as_floats(selected[name]) for name in config.momentColumns)
        psf = np.array([_measure_psf_variance(kernel) for kernel in cutouts.psf[:, 0]])
        variance = np.maximum((xx + yy) / 2 - psf.reshape(xx.shape), 0.0)
        radius = GAUSSIAN_HALF_LIGHT_RADIUS * np.sqrt(variance) * cutouts.pixel_scale
    return np.where(np.isfinite(radius) & (radius >= 0), np.maximum(radius, config.minRadius), np.nan)


def _get_redshifts(
    selected: Table, ids: np.ndarray, magnitude: np.ndarray, config: GalaxyPatchConfig
) -> np.ndarray:
    """Return redshifts, drawn for the magnitude if there is no column."""
    if config.redshiftColumn:
        return _as_floats(selected[config.redshiftColumn])
    population = GalaxyPopulation.make_cosmos().sample(20000, np.random.default_rng(0))
    order = np.argsort(population["magnitude"])
    known = population["magnitude"][order]
    redshift = np.full(len(magnitude), np.nan)
    for row, value in enumerate(magnitude):
        if np.isfinite(value):
            # One of the hundred galaxies of the nearest magnitudes.
            middle = int(np.searchsorted(known, value).clip(50, len(known) - 50))
            offset = make_object_seed(config.seed, ids[row], "redshift") % 100 - 50
            redshift[row] = population["redshift"][order[middle + offset]]
    return redshift


def _as_floats(column: Any) -> np.ndarray:
    """Return a column as an array, masked values as NaN."""
    return np.ma.filled(np.ma.asarray(column, dtype=np.float64), np.nan)


def make_object_seed(seed: int, object_id: int, purpose: str) -> int:
    """Return a seed that depends on nothing but the object.

    Parameters
    ----------
    seed
        Seed of the configuration.
    object_id
        The object.
    purpose
        What the seed is for.
    """
    digest = hashlib.sha256(f"{seed} {int(object_id)} {purpose}".encode()).digest()
    return int.from_bytes(digest[:7])


def _measure_psf_variance(kernel: np.ndarray) -> float:
    """Return sigma squared in pixels of a PSF; NaN where there is none."""
    if not np.isfinite(kernel).all():
        return np.nan
    moments = galsim.ImageD(kernel.astype(np.float64)).FindAdaptiveMom(strict=False)
    return float(moments.moments_sigma) ** 2 if not moments.error_message else np.nan

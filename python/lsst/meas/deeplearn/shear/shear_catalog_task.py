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


"""Calibrate the shear catalogues of a tract."""

from __future__ import annotations

__all__ = ("ShearCatalogConfig", "ShearCatalogConnections", "ShearCatalogTask")

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from astropy.table import Column, Table, vstack

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import Field, ListField, RangeField
from lsst.pipe.base import (
    InvalidQuantumError,
    NoWorkFound,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection

from ..object_selection import SelectionError, column_names, select_objects
from ..patch_inputs import PATCH_DIMENSIONS
from .bias import make_table

RESPONSE_COLUMNS: Mapping[str, tuple[str, str]] = {
    **{
        f"response{i}{j}{suffix}": ("f8", f"Response of the mean e{i} to shear g{j}{what}")
        for i in "12"
        for j in "12"
        for suffix, what in (("", ""), ("_err", ": its standard error by the jackknife"))
    },
    **{
        f"g{i}{suffix}": ("f8", f"Mean shear g{i}{what}")
        for i in "12"
        for suffix, what in (
            ("", ", multiplied by the hidden factor if blinded"),
            ("_err", ": its standard error"),
        )
    },
    "m1": ("f8", "Multiplicative bias of g1 that was taken out"),
    "m2": ("f8", "Multiplicative bias of g2 that was taken out"),
    "n_objects": ("i8", "Number of selected objects"),
    "n_blocks": ("i8", "Number of independent blocks"),
    "is_blinded": ("?", "The shear is multiplied by a hidden factor"),
}
"""Type and description of the columns of ``shear_response``."""


class ShearCatalogConnections(PipelineTaskConnections, dimensions=("skymap", "tract")):
    """Datasets that `ShearCatalogTask` reads and writes.

    Parameters
    ----------
    config
        Configuration of the task.
    """

    catalogs = cT.Input(
        doc="Shear catalogues with a row for each object and artificial shear.",
        name="object_shear_patch",
        storageClass="ArrowAstropy",
        dimensions=PATCH_DIMENSIONS,
        multiple=True,
        deferLoad=True,
    )
    bias = cT.Input(
        doc="Shear bias from simulations, which is taken out.",
        name="shear_bias",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
    )
    response = cT.Output(
        doc="Response and mean shear of the selected objects.",
        name="shear_response",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
    )
    calibrated = cT.Output(
        doc="Selected objects without artificial shear, with calibrated shear.",
        name="shear_object",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
    )
    blinding = cT.Output(
        doc="The hidden factor; butler unblind-shear takes it out.",
        name="shear_blinding",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
    )

    config: ShearCatalogConfig

    def __init__(self, *, config: ShearCatalogConfig):
        super().__init__(config=config)
        if not config.doCorrectBias:
            del self.bias
        if not config.doBlind:
            del self.blinding
        if config.catalogStorageClass != "ArrowAstropy":
            self.catalogs = dataclasses.replace(self.catalogs, storageClass=config.catalogStorageClass)


class ShearCatalogConfig(PipelineTaskConfig, pipelineConnections=ShearCatalogConnections):
    """Configuration of `ShearCatalogTask`."""

    # The catalogues.
    catalogStorageClass = Field[str](
        doc="Storage class of the catalogues; any that astropy tables can be made of.",
        default="ArrowAstropy",
    )
    e1Column = Field[str](doc="Column with the first component of the ellipticity.", default="gauss_g1")
    e2Column = Field[str](doc="Column with the second component.", default="gauss_g2")
    stepColumn = Field[str](doc="Column with the artificial shear: ns, 1p, 1m, 2p, 2m.", default="metaStep")
    step = RangeField(dtype=float, doc="Size of the artificial shear.", default=0.01, min=1e-4, max=0.1)
    keptColumns = ListField[str](
        doc="Further columns of the calibrated catalogue.", default=["shearObjectId", "ra", "dec"]
    )
    selection = ListField[str](
        doc="Conditions on columns that a row must satisfy, on its own measurements (see "
        "lsst.meas.deeplearn.object_selection).",
        default=[],
    )
    blockColumns = ListField[str](
        doc="Columns whose values, with the patch, make the blocks of the jackknife, such as cell_x and "
        "cell_y; if empty, blocks are the patches.",
        default=[],
    )

    # The calibration.
    doCorrectBias = Field[bool](doc="Take out the m and c of simulations?", default=False)
    morphology = Field[str](doc="Galaxies whose bias is taken out.", default="knots")
    estimator = Field[str](doc="Estimator whose bias is taken out.", default="metacal")

    # Blinding.
    doBlind = Field[bool](doc="Multiply the shear by a hidden factor?", default=False)
    blindingPhrase = Field[str](
        doc="Any text, from which the factor follows; choose one and forget it.", default="blind"
    )
    blindingLimit = RangeField(
        dtype=float, doc="Largest deviation of the factor from one.", default=0.1, min=0.0, max=0.5
    )


class ShearCatalogTask(PipelineTask):
    """Compute the response of shear catalogues, and calibrate their shear.

    Catalogues are those of metadetection or of `MeasureShearTask`.  The
    response is that of the mean over the tract, with that of the selection;
    the shear of an object is its ellipticity divided by it, which is right on
    average only.
    """

    ConfigClass: ClassVar[type[ShearCatalogConfig]] = ShearCatalogConfig
    _DefaultName: ClassVar[str] = "shearCatalog"
    config: ShearCatalogConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        inputs = butlerQC.get(inputRefs)
        columns = sorted(self._needed_columns)
        catalogs = {}
        for handle in inputs["catalogs"]:
            available = list(handle.get(component="columns"))
            self._check_columns(available)
            catalogs[int(handle.dataId["patch"])] = handle.get(parameters={"columns": columns})
        try:
            outputs = self.run(list(catalogs.values()), list(catalogs), bias=inputs.get("bias"))
        except SelectionError as err:
            raise InvalidQuantumError(str(err)) from err
        butlerQC.put(outputs, outputRefs)

    @property
    def _needed_columns(self) -> set[str]:
        config = self.config
        return {
            config.e1Column,
            config.e2Column,
            config.stepColumn,
            *config.keptColumns,
            *config.blockColumns,
            *column_names(config.selection),
        }

    def _check_columns(self, available: Sequence[str]) -> None:
        """Raise InvalidQuantumError if a column is missing."""
        config = self.config
        if config.stepColumn not in available:
            raise InvalidQuantumError(
                f"The shear catalogue has no column {config.stepColumn}: without artificially sheared "
                "versions of the objects there is no response.  Use the catalogues of metadetection or of "
                "MeasureShearTask, or set stepColumn."
            )
        if missing := sorted(self._needed_columns - set(available)):
            raise InvalidQuantumError(
                f"The shear catalogue has no columns {missing}; it has {sorted(available)}.  Set e1Column, "
                "e2Column, keptColumns, blockColumns and selection for this survey."
            )

    def run(self, catalogs: Sequence[Table], patches: Sequence[int], *, bias: Table | None = None) -> Struct:
        """Calibrate shear catalogues.

        Parameters
        ----------
        catalogs
            Catalogue of each patch.
        patches
            Numbers of the patches.
        bias
            The table ``bias`` of `ShearBiasTask`; not used unless
            ``config.doCorrectBias``.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``response``
                One row with the columns of `RESPONSE_COLUMNS`
                (`astropy.table.Table`).

            ``calibrated``
                Kept columns and g1, g2 (`astropy.table.Table`).

            ``blinding``
                The hidden factor, if any (`astropy.table.Table`).

        Raises
        ------
        lsst.pipe.base.NoWorkFound
            Raised if there are no rows.
        lsst.pipe.base.InvalidQuantumError
            Raised if columns or artificial shears are missing, or if there is
            no bias to correct for.
        """
        from .catalogs import compute_mean_shear, make_blinding, sum_catalog

        config = self.config
        tables = []
        for patch, catalog in zip(patches, catalogs, strict=True):
            self._check_columns(catalog.colnames)
            table = Table(catalog, copy=False)
            table["_patch"] = np.full(len(table), patch)
            tables.append(table)
        if not sum(map(len, tables)):
            raise NoWorkFound("The shear catalogues have no rows.")
        table = vstack(tables, metadata_conflicts="silent")
        selected = select_objects(table, config.selection)
        keys = np.column_stack([np.asarray(table[name]) for name in ("_patch", *config.blockColumns)])
        blocks = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
        e = np.column_stack([np.asarray(table[name], float) for name in (config.e1Column, config.e2Column)])
        meta_step = np.asarray(table[config.stepColumn]).astype(str)
        try:
            sums = sum_catalog(e=e, meta_step=meta_step, blocks=blocks, selected=selected, step=config.step)
            mean = compute_mean_shear(sums)
        except (ValueError, np.linalg.LinAlgError) as err:
            raise InvalidQuantumError(f"The shear catalogue has no response: {err}") from err
        m, c = self._get_bias(bias)
        blinding = make_blinding(config.blindingPhrase, limit=config.blindingLimit)
        factor = float(blinding["factor"][0]) if config.doBlind else 1.0

        rows = selected & np.isfinite(e).all(axis=1) & (meta_step == "ns")
        shear = factor * (e[rows] @ np.linalg.inv(mean.response).T - c) / (1 + m)
        calibrated = table[rows][list(config.keptColumns)]
        for i in (0, 1):
            calibrated[f"g{i + 1}"] = Column(
                shear[:, i], description=f"Estimate of shear component {i + 1}, right on average"
            )
        calibrated["is_blinded"] = Column(
            np.full(len(calibrated), config.doBlind), description="The shear is multiplied by a hidden factor"
        )
        values: dict[str, float | bool] = {"n_objects": mean.n_objects, "n_blocks": len(sums)}
        for i in (0, 1):
            values[f"g{i + 1}"] = factor * (mean.shear[i] - c[i]) / (1 + m[i])
            values[f"g{i + 1}_err"] = factor * mean.shear_errors[i] / (1 + m[i])
            values[f"m{i + 1}"] = m[i]
            for j in (0, 1):
                values[f"response{i + 1}{j + 1}"] = mean.response[i, j]
                values[f"response{i + 1}{j + 1}_err"] = mean.response_errors[i, j]
        values["is_blinded"] = config.doBlind
        response = make_table(RESPONSE_COLUMNS, [values])
        self.log.info(
            "Response of %d objects: %.3f, %.3f.", mean.n_objects, mean.response[0, 0], mean.response[1, 1]
        )
        result = Struct(response=response, calibrated=calibrated)
        if config.doBlind:
            result.blinding = blinding
        return result

    def _get_bias(self, bias: Table | None) -> tuple[np.ndarray, np.ndarray]:
        """Return m and c to take out."""
        if not self.config.doCorrectBias:
            return np.zeros(2), np.zeros(2)
        config = self.config
        chosen = [
            row
            for row in ([] if bias is None else bias)
            if (row["morphology"], row["estimator"], row["bin"], row["reference"], bool(row["flag"]))
            == (config.morphology, config.estimator, "all", "", False)
        ]
        if not chosen:
            raise InvalidQuantumError(
                f"There is no unflagged bias of {config.estimator} on {config.morphology} galaxies to take "
                "out; set estimator and morphology to those of the simulation."
            )
        row = chosen[0]
        return np.array([row["m1"], row["m2"]]), np.array([row["c1"], row["c2"]])

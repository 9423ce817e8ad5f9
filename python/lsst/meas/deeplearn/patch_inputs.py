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

"""The coadds and objects of a patch as inputs of a task.

Tasks that look at patches differ in what they do, not in how a survey names
its coadds and object tables; connections and fields for these are here.
"""

from __future__ import annotations

__all__ = (
    "PATCH_DIMENSIONS",
    "CoaddConfig",
    "CoaddConnections",
    "PatchConfig",
    "PatchConnections",
    "compute_seed",
    "read_objects",
)

import dataclasses
import difflib
import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar

from astropy.table import Table

import lsst.pipe.base.connectionTypes as cT
from lsst.daf.butler import DataCoordinate, DatasetRef
from lsst.pex.config import ChoiceField, Field, ListField
from lsst.pipe.base import (
    InvalidQuantumError,
    NoWorkFound,
    PipelineTaskConfig,
    PipelineTaskConnections,
)

from .cutouts import DEFAULT_BAD_PLANES

if TYPE_CHECKING:
    from lsst.daf.butler import DeferredDatasetHandle

PATCH_DIMENSIONS = ("skymap", "tract", "patch")
"""Dimensions of a task that looks at one patch."""


class CoaddConnections(PipelineTaskConnections, dimensions=PATCH_DIMENSIONS):
    """The coadds of a patch, in the bands that the configuration wants.

    Parameters
    ----------
    config
        Configuration of the task.
    """

    coadds = cT.Input(
        doc="Coadds of the patch, a band each, calibrated to flux densities.",
        name="deep_coadd",
        storageClass="CellCoadd",
        dimensions=(*PATCH_DIMENSIONS, "band"),
        multiple=True,
        deferLoad=True,
    )

    config: CoaddConfig

    needs_all_bands: ClassVar[bool] = True
    """Whether there is nothing to do for a patch that lacks a band."""

    def __init__(self, *, config: CoaddConfig):
        super().__init__(config=config)
        self.coadds = dataclasses.replace(self.coadds, storageClass=config.coaddStorageClass)

    def adjustQuantum(
        self,
        inputs: dict[str, tuple[cT.BaseInput, Collection[DatasetRef]]],
        outputs: dict[str, tuple[cT.Output, Collection[DatasetRef]]],
        label: str,
        data_id: DataCoordinate,
    ) -> tuple[
        Mapping[str, tuple[cT.BaseInput, Collection[DatasetRef]]],
        Mapping[str, tuple[cT.Output, Collection[DatasetRef]]],
    ]:
        """Keep the coadds of the bands that the configuration wants; refuse to
        go without a model.

        Parameters
        ----------
        inputs, outputs, label, data_id
            As in `lsst.pipe.base.PipelineTaskConnections.adjustQuantum`.
        """
        for prerequisite, found in inputs.values():
            if isinstance(prerequisite, cT.PrerequisiteInput) and len(found) < prerequisite.minimum:
                raise FileNotFoundError(
                    f"There is no {prerequisite.name} in the input collections.  Name the run that has one "
                    "with -i; a model package is put into one by 'butler ingest-deeplearn-model'."
                )
        connection, refs = inputs["coadds"]
        wanted = self.config.wanted_bands
        kept = [ref for ref in refs if ref.dataId["band"] in wanted]
        missing = set(wanted) - {str(ref.dataId["band"]) for ref in kept}
        if not kept or (missing and self.needs_all_bands):
            raise NoWorkFound(f"No coadds in {', '.join(sorted(missing))} for {data_id}.")
        adjusted = {"coadds": (connection, kept)}
        super().adjustQuantum(inputs | adjusted, outputs, label, data_id)
        return adjusted, {}


class CoaddConfig(PipelineTaskConfig, pipelineConnections=CoaddConnections):
    """Configuration of a task that reads the coadds of a patch."""

    coaddStorageClass = ChoiceField[str](
        doc="Storage class of the coadds.",
        default="CellCoadd",
        allowed={
            "CellCoadd": "lsst.images.cells.CellCoadd, as in DP2.",
            "MaskedImageV2": "lsst.images.MaskedImage, which brings no PSF.",
            "ExposureF": "lsst.afw.image.ExposureF, as in DP1 and in HSC and DECam repositories.",
        },
    )
    badMaskPlanes = ListField[str](
        doc="Mask planes, under lsst.images or afw names, whose pixels are unusable.",
        default=list(DEFAULT_BAD_PLANES),
    )

    @property
    def wanted_bands(self) -> list[str]:
        """Bands to read: those of the field ``bands``, or ``band``."""
        if "bands" in self.keys():
            return list(getattr(self, "bands"))
        return [getattr(self, "band")]


class PatchConnections(CoaddConnections, dimensions=PATCH_DIMENSIONS):
    """The coadds of a patch, and its objects.

    Parameters
    ----------
    config
        Configuration of the task.
    """

    objects = cT.Input(
        doc="Objects, with ICRS coordinates in degrees and fluxes in nJy.",
        name="object",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
        deferLoad=True,
    )

    config: PatchConfig

    def __init__(self, *, config: PatchConfig):
        super().__init__(config=config)
        if config.objectDimensions == "patch":
            self.objects = dataclasses.replace(self.objects, dimensions=set(PATCH_DIMENSIONS))


class PatchConfig(CoaddConfig, pipelineConnections=PatchConnections):
    """Configuration of a task that reads coadds and objects of a patch."""

    objectDimensions = ChoiceField[str](
        doc="What one object table covers.",
        default="tract",
        allowed={"tract": "A tract; rows are chosen by their column 'patch'.", "patch": "A patch."},
    )
    idColumn = Field[str](doc="Column with the ID of the object.", default="objectId")
    raColumn = Field[str](doc="Column with the ICRS right ascension in degrees.", default="coord_ra")
    decColumn = Field[str](doc="Column with the ICRS declination in degrees.", default="coord_dec")


def read_objects(
    handle: DeferredDatasetHandle, config: PatchConfig, columns: Iterable[str], *, patch: int
) -> Table:
    """Read the objects of a patch, and no more columns than are used.

    Parameters
    ----------
    handle
        The object table of the patch or of its tract.
    config
        What the table covers, and the names of its columns.
    columns
        Further columns to read.
    patch
        The patch.

    Raises
    ------
    lsst.pipe.base.InvalidQuantumError
        Raised if the table lacks a column.
    """
    wanted = {config.idColumn, config.raColumn, config.decColumn, *columns}
    if config.objectDimensions == "tract":
        wanted.add("patch")
    available = list(handle.get(component="columns"))
    if missing := sorted(wanted - set(available)):
        close = {name: difflib.get_close_matches(name, available) for name in missing}
        raise InvalidQuantumError(
            f"The object table has no columns {missing}; the nearest it has are {close}.  Configure "
            "selections and the names of columns for this survey."
        )
    table = handle.get(parameters={"columns": sorted(wanted)})
    return table[table["patch"] == patch] if config.objectDimensions == "tract" else table


def compute_seed(*values: object) -> int:
    """Return a seed that depends on all values, from 0 to 2**62 - 1.

    Parameters
    ----------
    *values
        Values of a data ID and the like.
    """
    digest = hashlib.sha256(repr(tuple(str(value) for value in values)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2

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


"""Measure the objects of a patch for weak lensing."""

from __future__ import annotations

__all__ = ("MeasureShearConfig", "MeasureShearConnections", "MeasureShearTask")

from collections.abc import Mapping
from typing import Any, ClassVar

import astropy.units as u
import numpy as np
import pyarrow as pa
from astropy.table import Column, Table

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import Field, FieldValidationError, ListField, RangeField
from lsst.pipe.base import InvalidQuantumError, NoWorkFound, PipelineTask, QuantumContext, Struct
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection

from ..coadds import MultibandCoadd
from ..cutouts import CutoutExtractor
from ..inference import torch_threads
from ..object_selection import SelectionError, column_names, select_objects
from ..patch_inputs import PATCH_DIMENSIONS, PatchConfig, PatchConnections, compute_seed, read_objects
from .shapes import STEPS

SHEAR_OBJECT_COLUMNS: Mapping[str, tuple[str, u.UnitBase | None, str]] = {
    "objectId": ("i8", None, "Object ID"),
    "ra": ("f8", u.deg, "ICRS right ascension"),
    "dec": ("f8", u.deg, "ICRS declination"),
    "metaStep": ("U2", None, "Artificial shear: none (ns), or a component up (p) or down (m)"),
    "gauss_g1": ("f8", None, "First component of the ellipticity, not corrected for its response"),
    "gauss_g2": ("f8", None, "Second component of the ellipticity, not corrected for its response"),
    "gauss_snr": ("f8", None, "Signal to noise of the weighted flux"),
    "gauss_T_ratio": ("f8", None, "Area of the object over that of a star"),
    "gauss_flags": ("i4", None, "1 if the measurement failed, or if pixels are masked; 0 if not"),
}
"""Type, unit and meaning of the columns; names are those of LSST's
metadetection where it has the quantity."""


class MeasureShearConnections(PatchConnections, dimensions=PATCH_DIMENSIONS):
    """Datasets that `MeasureShearTask` reads and writes."""

    catalog = cT.Output(
        doc="Ellipticities under five artificial shears, five rows for each object.",
        name="shear_measurement",
        storageClass="ArrowAstropy",
        dimensions=PATCH_DIMENSIONS,
    )
    schema = cT.InitOutput(
        doc="Columns of the catalogue with 'doc' and 'unit', and the artificial shear.",
        name="shear_measurement_schema",
        storageClass="ArrowSchema",
    )

    config: MeasureShearConfig


class MeasureShearConfig(PatchConfig, pipelineConnections=MeasureShearConnections):
    """Configuration of `MeasureShearTask`."""

    band = Field[str](doc="Band to measure in.", default="i")
    selection = ListField[str](
        doc="Conditions on columns that an object must satisfy (see lsst.meas.deeplearn.object_selection).",
        default=["refExtendedness > 0.5", "17 < mag(i_cModelFlux) < 25"],
    )
    stampSize = RangeField(dtype=int, doc="Side of the stamps in pixels; odd.", default=63, min=15)
    psfSize = RangeField(dtype=int, doc="Side of the PSF images in pixels; odd.", default=35, min=5)
    maxMaskedFraction = RangeField(
        dtype=float, doc="Largest fraction of masked pixels of a good stamp.", default=0.0, min=0.0, max=1.0
    )
    targetFwhm = RangeField(
        dtype=float,
        doc="Width (arcsec) of the PSF to which images are brought; if None, 1.2 times the widest PSF.",
        default=None,
        optional=True,
        min=0.0,
    )
    weightFwhm = RangeField(dtype=float, doc="Width of the Gaussian weight in arcsec.", default=1.2, min=0.1)
    step = RangeField(dtype=float, doc="Artificial shear.", default=0.01, min=1e-4, max=0.1)
    seed = Field[int](doc="Seed of the noise that is added, beside the data ID.", default=1)
    device = Field[str](doc="Device of torch: cpu or cuda.", default="cpu")

    def validate(self) -> None:
        super().validate()
        for side in (self.__class__.stampSize, self.__class__.psfSize):
            if getattr(self, side.name) % 2 == 0:
                raise FieldValidationError(side, self, "The side must be odd.")


class MeasureShearTask(PipelineTask):
    """Measure the objects of a patch by metacalibration.

    Neighbours stay in the stamps, and detection is not repeated on sheared
    images: what they do to shear is the business of metadetection, whose
    catalogues `ShearCatalogTask` takes as well.

    Parameters
    ----------
    **kwargs
        Those of `lsst.pipe.base.PipelineTask`.
    """

    ConfigClass: ClassVar[type[MeasureShearConfig]] = MeasureShearConfig
    _DefaultName: ClassVar[str] = "measureShear"
    config: MeasureShearConfig

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.schema = make_schema(self.config)

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        data_id = butlerQC.quantum.dataId
        assert data_id is not None, "A quantum of this task has a patch."
        inputs = butlerQC.get(inputRefs)
        objects = read_objects(
            inputs["objects"], self.config, column_names(self.config.selection), patch=int(data_id["patch"])
        )
        try:
            outputs = self.run(
                MultibandCoadd.read(inputs["coadds"], [self.config.band]),
                objects,
                seed=compute_seed(data_id["skymap"], data_id["tract"], data_id["patch"], self.config.seed),
                num_cores=butlerQC.resources.num_cores,
            )
        except SelectionError as err:
            raise InvalidQuantumError(str(err)) from err
        butlerQC.put(outputs, outputRefs)

    def run(self, coadd: MultibandCoadd, objects: Table, *, seed: int = 1, num_cores: int = 1) -> Struct:
        """Measure objects.

        Parameters
        ----------
        coadd
            Coadd of the patch in ``config.band``.
        objects
            Objects, with the columns that the configuration names.
        seed
            Seed of the noise that is added.
        num_cores
            Threads that may be used.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``catalog``
                The columns of `SHEAR_OBJECT_COLUMNS`
                (`astropy.table.Table`).

        Raises
        ------
        lsst.pipe.base.NoWorkFound
            Raised if no object is selected, or none has a PSF.
        """
        from .metacal import Metacalibration, compute_target_fwhm

        config = self.config
        selected = objects[select_objects(objects, config.selection)]
        if not len(selected):
            raise NoWorkFound("No object is selected.")
        cutouts = CutoutExtractor(
            coadd, size=config.stampSize, psf_size=config.psfSize, bad_planes=config.badMaskPlanes
        ).extract(
            ids=np.asarray(selected[config.idColumn]),
            ra=np.asarray(selected[config.raColumn]),
            dec=np.asarray(selected[config.decColumn]),
        )
        images, psf = cutouts.image[:, 0], cutouts.psf[:, 0]
        if cutouts.bad_psf.all():
            raise NoWorkFound("No object has a PSF.")
        middle = config.stampSize // 2
        sigma = np.sqrt(cutouts.variance[:, 0, middle, middle].astype(np.float64))
        good = (cutouts.masked_fraction[:, 0] <= config.maxMaskedFraction) & np.isfinite(sigma)
        engine = Metacalibration(
            pixel_scale=coadd.pixel_scale,
            stamp_size=config.stampSize,
            target_fwhm=config.targetFwhm or compute_target_fwhm(psf, coadd.pixel_scale),
            weight_fwhm=config.weightFwhm,
            step=config.step,
            device=config.device,
        )
        noise = np.random.default_rng(seed).standard_normal(images.shape, dtype=np.float32)
        noise *= np.where(good, sigma, 0.0)[:, None, None].astype(np.float32)
        with torch_threads(num_cores):
            shapes = engine.measure(images, psf, noise_sigma=np.where(good, sigma, 1.0), fixnoise=noise)
        n = len(STEPS)
        values = {
            "objectId": np.repeat(cutouts.ids, n),
            "ra": np.repeat(cutouts.ra, n),
            "dec": np.repeat(cutouts.dec, n),
            "metaStep": np.tile(STEPS, len(cutouts)),
            "gauss_g1": shapes.e[..., 0].ravel(),
            "gauss_g2": shapes.e[..., 1].ravel(),
            "gauss_snr": shapes.snr.ravel(),
            "gauss_T_ratio": shapes.size.ravel(),
            "gauss_flags": np.repeat(shapes.bad | ~good, n),
        }
        catalog = Table()
        for name, (dtype, unit, description) in SHEAR_OBJECT_COLUMNS.items():
            catalog[name] = Column(values[name].astype(dtype), unit=unit, description=description)
        self.log.info(
            "Measured %d objects, %d of them flagged.", len(cutouts), int((shapes.bad | ~good).sum())
        )
        self.metadata["target_fwhm"] = engine.target_fwhm
        return Struct(catalog=catalog)


def make_schema(config: MeasureShearConfig) -> pa.Schema:
    """Return the columns of the catalogue, described as those of LSST's
    metadetection are.

    Parameters
    ----------
    config
        Configuration of the task.
    """
    fields = []
    for name, (dtype, unit, description) in SHEAR_OBJECT_COLUMNS.items():
        kind = pa.string() if dtype.startswith("U") else pa.from_numpy_dtype(np.dtype(dtype))
        fields.append(pa.field(name, kind, metadata={"doc": description, "unit": str(unit or "")}))
    return pa.schema(fields, metadata={"shear_step": str(config.step), "shear_bands": config.band})

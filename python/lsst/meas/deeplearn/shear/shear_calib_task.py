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

"""Simulate galaxies that suit a patch, and measure their shear."""

from __future__ import annotations

__all__ = ("ShearCalibConfig", "ShearCalibConnections", "ShearCalibError", "ShearCalibTask")

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import astropy.units as u
import galsim
import numpy as np
from astropy.table import Column, Table, vstack

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import Field, FieldValidationError, ListField, RangeField
from lsst.pipe.base import (
    AlgorithmError,
    InvalidQuantumError,
    NoWorkFound,
    PipelineTask,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection
from lsst.utils.logging import PeriodicLogger

from ..coadds import MultibandCoadd
from ..inference import torch_threads
from ..model_package import MODEL_STORAGE_CLASS, ModelPackage
from ..object_selection import column_names, select_objects
from ..patch_inputs import PATCH_DIMENSIONS, CoaddConfig, CoaddConnections, compute_seed
from ..scene import AB_ZERO_POINT

if TYPE_CHECKING:
    from lsst.daf.butler import DeferredDatasetHandle

    from .calibration import Bin
    from .estimators import ShearEstimator
    from .morphologies import Morphology

ESTIMATORS = ("metacal", "regauss")
"""Metacalibration, and re-Gaussianization without calibration."""

LADDER = ("sersic", "bulge_disk", "knots", "real", "cvae")
"""Galaxies from the simplest to those that a network has learnt."""

NOISE_BOX = 50
"""Half of the side in pixels of the box that the noise is taken from."""


class ShearCalibError(AlgorithmError):
    """Raised if shear cannot be measured with the PSF of a patch."""

    @property
    def metadata(self) -> dict[str, Any]:
        return {}


class ShearCalibConnections(CoaddConnections, dimensions=PATCH_DIMENSIONS):
    """Datasets that `ShearCalibTask` reads and writes.

    Parameters
    ----------
    config
        Configuration of the task.
    """

    model = cT.PrerequisiteInput(
        doc="Model package of the galaxies of morphology 'cvae'.",
        name="galaxy_cvae_model",
        storageClass=MODEL_STORAGE_CLASS,
        dimensions=(),
    )
    objects = cT.Input(
        doc="Objects of the patch, whose magnitudes and number are those of the simulation.",
        name="object_patch",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
        deferLoad=True,
    )
    sums = cT.Output(
        doc="Sums over simulated galaxies from which shear bias follows, a row for each morphology, "
        "estimator, bin, place in the patch, true shear and artificial shear (ShearSums.from_table).",
        name="shear_calib_sums",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )

    config: ShearCalibConfig

    def __init__(self, *, config: ShearCalibConfig):
        super().__init__(config=config)
        if "cvae" not in config.morphologies:
            del self.model
        if not config.doMatchObjects:
            del self.objects


class ShearCalibConfig(CoaddConfig, pipelineConnections=ShearCalibConnections):
    """Configuration of `ShearCalibTask`."""

    # Inputs.
    band = Field[str](doc="Band of the coadd that the simulation is like.", default="i")

    # The simulation.
    morphologies = ListField[str](
        doc="Galaxies to simulate, all with the same magnitudes, sizes, redshifts and noise: 'sersic', "
        "'bulge_disk', 'knots' (bulge, disk and knots), 'real' (realGalaxyCatalog) or 'cvae' (a model).",
        default=["sersic", "bulge_disk", "knots"],
    )
    realGalaxyCatalog = Field[str](
        doc="Path of a catalogue of galsim.RealGalaxy, as of galsim_download_cosmos, for morphology 'real'.",
        default="",
    )
    nOrientations = RangeField(
        dtype=int,
        doc="Ways in which each galaxy is drawn: as it is, turned by 90 degrees, mirrored, and both.",
        default=2,
        min=1,
        max=4,
    )
    doCorrelateNoise = Field[bool](
        doc="Give the noise the correlation of that of the coadd?  Otherwise it is white.", default=True
    )
    nPlaces = RangeField(
        dtype=int,
        doc="Number of places in the patch whose PSF and noise are simulated; the blocks of the jackknife.",
        default=10,
        min=1,
        max=1000,
    )
    galaxiesPerPlace = RangeField(dtype=int, doc="Number of galaxies at each place.", default=20, min=1)
    minMagnitude = Field[float](doc="AB magnitude of the brightest galaxies.", default=20.0)
    maxMagnitude = Field[float](doc="AB magnitude of the faintest galaxies.", default=24.5)
    doMatchObjects = Field[bool](
        doc="Draw magnitudes from the objects of the patch, between minMagnitude and maxMagnitude, and take "
        "the number of blended galaxies from them?  Otherwise magnitudes have the slope of counts.",
        default=False,
    )
    fluxColumn = Field[str](doc="Column with the flux of the objects in nJy.", default="i_cModelFlux")
    objectSelection = ListField[str](
        doc="Conditions that tell galaxies among the objects (see lsst.meas.deeplearn.object_selection).",
        default=["detect_isPrimary", "i_extendedness > 0.5"],
    )
    nBlendScenes = RangeField(
        dtype=int,
        doc="Number of scenes of 160 x 160 pixels of galaxies that overlap at each place, which are measured "
        "with detection in all sheared versions ('metadetection') and without its response "
        "('no_detection'); 0 for none.",
        default=0,
        min=0,
    )
    blendDensity = RangeField(
        dtype=float,
        doc="Galaxies in a square arcmin of these scenes, unless doMatchObjects.",
        default=80.0,
        min=0.0,
    )
    shears = ListField[float](
        doc="Sizes of the true shear; each is applied to both components with both signs.  Two or more let "
        "the cubic term be fitted.",
        default=[0.02],
    )
    psfShears = ListField[float](
        doc="Sizes of an additional shear of the PSF, in arms that tell its leakage; may be empty.",
        default=[0.05],
    )
    stampSize = RangeField(dtype=int, doc="Side of the stamps in pixels; odd.", default=63, min=15)
    psfSize = RangeField(dtype=int, doc="Side of the PSF images in pixels; odd.", default=35, min=5)
    seed = Field[int](doc="Seed of the simulation, beside the data ID.", default=1)

    # The measurement.
    estimators = ListField[str](
        doc="Estimators to run: 'metacal' and 'regauss', which is not calibrated.", default=list(ESTIMATORS)
    )
    targetFwhm = RangeField(
        dtype=float,
        doc="Width (arcsec) of the PSF to which metacalibration brings the images; if None, 1.2 times the "
        "widest PSF of the places.",
        default=None,
        optional=True,
        min=0.0,
    )
    weightFwhm = RangeField(
        dtype=float, doc="Width of the Gaussian weight of metacalibration, in arcsec.", default=1.2, min=0.1
    )
    step = RangeField(
        dtype=float, doc="Artificial shear of metacalibration.", default=0.01, min=1e-4, max=0.1
    )
    nRealizations = RangeField(
        dtype=int,
        doc="Realisations of the noise of each stamp for metacalibration, added to moments; if 0, one is "
        "added to the pixels, as for other estimators.",
        default=50,
        min=0,
    )
    device = Field[str](doc="Device of torch: cpu or cuda.", default="cpu")

    # Faults, which null tests must find.
    psfSizeError = RangeField(
        dtype=float,
        doc="Relative error of the size of the PSF that estimators are told; 0 for the true one.",
        default=0.0,
        min=-0.5,
        max=0.5,
    )
    doFixNoise = Field[bool](
        doc="Add noise that is sheared the other way, so that noise has no response?", default=True
    )
    doSelectionResponse = Field[bool](
        doc="Cut every artificially sheared version on its own measurements?", default=True
    )

    # The selection.
    minSnr = Field[float](doc="Smallest signal to noise of the flux that counts.", default=10.0)
    snrBins = ListField[float](
        doc="Edges of bins in signal to noise; fewer than two for none.", default=[10.0, 20.0, 50.0, 200.0]
    )
    sizeBins = ListField[float](
        doc="Edges of bins in the area of the object over that of a star; fewer than two for none.",
        default=[1.0, 1.25, 1.5, 3.0],
    )
    magnitudeBins = ListField[float](
        doc="Edges of bins in true AB magnitude; fewer than two for none.", default=[20.0, 22.5, 23.5, 24.5]
    )
    redshiftBins = ListField[float](
        doc="Edges of bins in true redshift; fewer than two for none.", default=[0.0, 0.5, 1.0, 4.0]
    )

    def validate(self) -> None:
        super().validate()
        for field, known in (
            (self.__class__.morphologies, LADDER),
            (self.__class__.estimators, ESTIMATORS),
        ):
            values = getattr(self, field.name)
            if not values or not set(values) <= set(known):
                raise FieldValidationError(field, self, f"{list(values)} are not among {', '.join(known)}.")
        for side in (self.__class__.stampSize, self.__class__.psfSize):
            if getattr(self, side.name) % 2 == 0:
                raise FieldValidationError(side, self, "The side must be odd.")
        if self.psfSize > self.stampSize:
            raise FieldValidationError(self.__class__.psfSize, self, "PSF images must fit into the stamps.")
        if "real" in self.morphologies and not self.realGalaxyCatalog:
            raise FieldValidationError(
                self.__class__.realGalaxyCatalog,
                self,
                "Morphology 'real' needs the path of a catalogue; galsim_download_cosmos gets one.",
            )
        if not self.shears:
            raise FieldValidationError(self.__class__.shears, self, "At least one shear is needed.")
        if self.minMagnitude >= self.maxMagnitude:
            raise FieldValidationError(
                self.__class__.maxMagnitude, self, "It must be fainter than minMagnitude."
            )
        cls = self.__class__
        for bins in (cls.snrBins, cls.sizeBins, cls.magnitudeBins, cls.redshiftBins):
            edges = list(getattr(self, bins.name))
            if edges != sorted(set(edges)):
                raise FieldValidationError(bins, self, "Edges of bins must increase.")


class ShearCalibTask(PipelineTask):
    """Simulate galaxies that suit a patch, and measure their shear.

    At random places of the patch, isolated galaxies are drawn with its PSF,
    pixels and noise under known shears, and measured by metacalibration and
    by an estimator without calibration.  What is written are sums over the
    galaxies of each place, from which `ShearBiasTask` computes the bias of
    any set of patches with exact jackknife errors.

    The noise has the variance and the correlation of the coadd.  Galaxies are
    alone in their stamps; what detection and neighbours do to shear is in the
    scenes of ``nBlendScenes``, measured by metadetection.
    """

    ConfigClass: ClassVar[type[ShearCalibConfig]] = ShearCalibConfig
    _DefaultName: ClassVar[str] = "shearCalib"
    config: ShearCalibConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        data_id = butlerQC.quantum.dataId
        assert data_id is not None, "A quantum of this task has a patch."
        inputs = butlerQC.get(inputRefs)
        outputs = self.run(
            MultibandCoadd.read(inputs["coadds"], [self.config.band]),
            patch=int(data_id["patch"]),
            seed=compute_seed(data_id["skymap"], data_id["tract"], data_id["patch"], self.config.seed),
            model=ModelPackage.from_arrow(inputs["model"]) if "model" in inputs else None,
            objects=self._read_objects(inputs["objects"]) if "objects" in inputs else None,
            num_cores=butlerQC.resources.num_cores,
        )
        butlerQC.put(outputs, outputRefs)

    def run(
        self,
        coadd: MultibandCoadd,
        *,
        patch: int = 0,
        seed: int = 1,
        model: ModelPackage | None = None,
        objects: Table | None = None,
        num_cores: int = 1,
    ) -> Struct:
        """Simulate and measure galaxies.

        Parameters
        ----------
        coadd
            Coadd of the patch in ``config.band``.
        patch
            Number of the patch, which tells its blocks from those of others.
        seed
            Seed of the galaxies and their noise.
        model
            Model of the galaxies of morphology ``cvae``.
        objects
            Objects of the patch, if ``config.doMatchObjects``.
        num_cores
            Threads that may be used.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``sums``
                `ShearSums.to_table` of every morphology, estimator and bin,
                with columns that tell them apart (`astropy.table.Table`).

        Raises
        ------
        lsst.pipe.base.NoWorkFound
            Raised if the coadd has no place with a PSF and noise, or if the
            patch has no galaxies of the configured magnitudes.
        ShearCalibError
            Raised if metacalibration cannot use the PSF.
        """
        # These load torch.
        from .blends import compute_blended_sums
        from .calibration import compute_shear_sums
        from .metacal import Metacalibration, compute_target_fwhm
        from .simulation import GalaxySample, Scene, make_arms, make_psf_from_kernel

        config = self.config
        morphologies = self._make_morphologies(model)
        kernels, noise_sigmas = self._find_places(coadd, np.random.default_rng(seed))
        correlation = self._measure_noise_correlation(coadd)
        magnitudes, density = self._match_objects(coadd, objects)
        target_fwhm = config.targetFwhm or compute_target_fwhm(kernels, coadd.pixel_scale)
        metacal = Metacalibration(
            pixel_scale=coadd.pixel_scale,
            stamp_size=config.stampSize,
            target_fwhm=target_fwhm,
            weight_fwhm=config.weightFwhm,
            step=config.step,
            noise_correlation=correlation,
            device=config.device,
        )
        estimators = self._make_estimators(coadd.pixel_scale, metacal)
        arms, bins = make_arms(list(config.shears), list(config.psfShears)), self._make_bins()
        self.log.info(
            "Simulating %d galaxies in %d arms at %d places, noise %.3g nJy, target PSF %.3f arcsec.",
            len(kernels) * config.galaxiesPerPlace,
            len(arms),
            len(kernels),
            np.median(noise_sigmas),
            target_fwhm,
        )
        tables = []
        progress = PeriodicLogger(self.log)
        with torch_threads(num_cores):
            for place, (kernel, noise_sigma) in enumerate(zip(kernels, noise_sigmas, strict=True)):
                first = place * config.galaxiesPerPlace
                galaxies = GalaxySample.draw(
                    np.arange(first, first + config.galaxiesPerPlace),
                    seed=seed,
                    magnitude=magnitudes,
                )
                scene = Scene(
                    make_psf_from_kernel(kernel, coadd.pixel_scale),
                    coadd.pixel_scale,
                    config.stampSize,
                    float(noise_sigma),
                    correlation,
                    config.nOrientations,
                    config.psfSizeError,
                )
                for name, morphology in morphologies.items():
                    try:
                        sums = compute_shear_sums(
                            galaxies,
                            morphology,
                            scene,
                            arms,
                            estimators=estimators,
                            bins=bins,
                            block=patch * 1000 + place,
                            n_realizations=config.nRealizations,
                            fixnoise=config.doFixNoise,
                        )
                        blended = {}
                        if config.nBlendScenes:
                            first_scene = (patch * 1000 + place) * config.nBlendScenes
                            blended = compute_blended_sums(
                                morphology,
                                scene,
                                make_arms(list(config.shears)),
                                density=density,
                                magnitude=magnitudes,
                                target_fwhm=target_fwhm,
                                seed=seed,
                                blocks=range(first_scene, first_scene + config.nBlendScenes),
                                min_snr=config.minSnr,
                            )
                    except ValueError as err:
                        raise ShearCalibError(f"The PSF of this patch cannot be used: {err}") from err
                    for (estimator, label), values in sums.items():
                        tables.append(_describe(values.to_table(), name, estimator, label, bins[label]))
                    for estimator, values in blended.items():
                        tables.append(_describe(values.to_table(), name, estimator, "all", bins["all"]))
                progress.log("Simulated %d of %d places.", place + 1, len(kernels))
        table = vstack(tables, metadata_conflicts="silent")
        table["target_fwhm"] = Column(
            np.full(len(table), target_fwhm), unit=u.arcsec, description="FWHM of the PSF of metacalibration"
        )
        self.metadata["n_places"] = len(kernels)
        self.metadata["seed"] = seed
        self.metadata["target_fwhm"] = float(target_fwhm)
        self.metadata["noise_correlation"] = (
            0.0 if correlation is None else float(np.sort(correlation.ravel())[-2])
        )
        self.metadata["noise_sigma"] = float(np.median(noise_sigmas))
        self.metadata["density"] = density
        return Struct(sums=table)

    def _find_places(self, coadd: MultibandCoadd, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return PSF kernels and noise in nJy at random good pixels."""
        band, config = self.config.band, self.config
        variance = np.where(
            coadd.compute_bad_pixels(band, config.badMaskPlanes), np.nan, coadd.planes[band].variance
        )
        rows, columns = np.nonzero(np.isfinite(variance))
        # Some of them may lack a PSF.
        chosen = rng.permutation(len(rows))[: 3 * config.nPlaces]
        rows, columns = rows[chosen], columns[chosen]
        kernels = coadd.compute_psf_kernels(
            band, x=columns + coadd.bbox.x.start, y=rows + coadd.bbox.y.start, size=config.psfSize
        )
        usable = np.flatnonzero(np.isfinite(kernels).all(axis=(1, 2)))[: config.nPlaces]
        if not len(usable):
            raise NoWorkFound(f"The {band} coadd has no place with a PSF and good pixels.")
        noise = [
            np.sqrt(
                np.nanmedian(
                    variance[
                        max(row - NOISE_BOX, 0) : row + NOISE_BOX,
                        max(column - NOISE_BOX, 0) : column + NOISE_BOX,
                    ]
                )
            )
            for row, column in zip(rows[usable], columns[usable], strict=True)
        ]
        return kernels[usable], np.array(noise)

    def _read_objects(self, handle: DeferredDatasetHandle) -> Table:
        """Read the columns of the objects that are needed."""
        needed = {self.config.fluxColumn, *column_names(self.config.objectSelection)}
        if missing := needed - set(handle.get(component="columns")):
            raise InvalidQuantumError(
                f"The object table has no columns {sorted(missing)}.  Set fluxColumn and objectSelection for "
                "this survey, or doMatchObjects=False."
            )
        return handle.get(parameters={"columns": sorted(needed)})

    def _match_objects(
        self, coadd: MultibandCoadd, objects: Table | None
    ) -> tuple[np.ndarray | tuple[float, float], float]:
        """Return the magnitudes to draw from, and galaxies in a square
        arcmin.
        """
        config = self.config
        limits = (config.minMagnitude, config.maxMagnitude)
        if objects is None:
            return limits, config.blendDensity
        flux = np.asarray(objects[config.fluxColumn], dtype=np.float64)
        flux = flux[select_objects(objects, config.objectSelection) & (flux > 0)]
        magnitudes = AB_ZERO_POINT - 2.5 * np.log10(flux)
        magnitudes = magnitudes[(magnitudes >= limits[0]) & (magnitudes < limits[1])]
        if len(magnitudes) < 3:
            raise NoWorkFound(
                f"The patch has {len(magnitudes)} galaxies between magnitudes {limits[0]} and {limits[1]}; "
                "see objectSelection and fluxColumn, or set doMatchObjects=False."
            )
        good = ~coadd.compute_bad_pixels(config.band, config.badMaskPlanes)
        area = float(good.sum()) * (coadd.pixel_scale / 60) ** 2
        self.log.info(
            "Magnitudes and density are those of %d galaxies in %.2f arcmin^2.", len(magnitudes), area
        )
        return magnitudes, len(magnitudes) / area

    def _measure_noise_correlation(self, coadd: MultibandCoadd) -> np.ndarray | None:
        """Return the correlation of the noise of the coadd."""
        from .noise import measure_noise_correlation

        band = self.config.band
        if not self.config.doCorrelateNoise:
            return None
        planes = coadd.planes[band]
        full = coadd.compute_bad_pixels(band, self.config.badMaskPlanes)
        full |= coadd.compute_mask(band, ["DETECTED"])
        return measure_noise_correlation(planes.image, planes.variance, ~full)

    def _make_morphologies(self, model: ModelPackage | None) -> dict[str, Morphology]:
        """Return the configured steps of the ladder by name."""
        from .morphologies import CvaeGalaxies, ParametricGalaxies, RealGalaxies

        morphologies: dict[str, Morphology] = {}
        for name in self.config.morphologies:
            if name == "real":
                path = self.config.realGalaxyCatalog
                try:
                    morphologies[name] = RealGalaxies(galsim.RealGalaxyCatalog(path))
                except (OSError, KeyError) as err:
                    raise InvalidQuantumError(
                        f"There is no catalogue of real galaxies at realGalaxyCatalog={path!r} ({err}); "
                        "galsim_download_cosmos gets one."
                    ) from err
            elif name == "cvae":
                if model is None:
                    raise ValueError("Morphology 'cvae' needs a model.")
                morphologies[name] = CvaeGalaxies(model, device=self.config.device)
            else:
                morphologies[name] = ParametricGalaxies(name)
        return morphologies

    def _make_estimators(self, pixel_scale: float, metacal: ShearEstimator) -> dict[str, ShearEstimator]:
        """Return the configured estimators by name."""
        from .estimators import Regauss

        known: dict[str, ShearEstimator] = {
            "metacal": metacal,
            "regauss": Regauss(pixel_scale=pixel_scale, step=self.config.step),
        }
        return {name: known[name] for name in self.config.estimators}

    def _make_bins(self) -> dict[str, Bin]:
        """Return all objects, and the configured bins, by name."""
        from .calibration import Bin

        config = self.config
        respond = config.doSelectionResponse
        bins = {"all": Bin(min_snr=config.minSnr, respond=respond)}
        edges: dict[str, Sequence[float]] = {
            "snr": config.snrBins,
            "size": config.sizeBins,
            "magnitude": config.magnitudeBins,
            "redshift": config.redshiftBins,
        }
        for quantity, limits in edges.items():
            for low, high in pairwise(limits):
                bins[f"{quantity}_{low:g}_{high:g}"] = Bin(quantity, low, high, config.minSnr, respond)
        return bins


def _describe(table: Table, morphology: str, estimator: str, label: str, cut: Bin) -> Table:
    """Add the columns that tell the samples of a table apart."""
    n = len(table)
    quantity = "" if label == "all" else cut.quantity
    for name, values, description in (
        ("morphology", np.full(n, morphology, dtype="U16"), "Kind of simulated galaxies"),
        ("estimator", np.full(n, estimator, dtype="U16"), "Shear estimator"),
        ("bin", np.full(n, label, dtype="U32"), "Name of the bin; all for all objects"),
        ("bin_quantity", np.full(n, quantity, dtype="U16"), "What the bin is in; empty for all objects"),
        ("bin_low", np.full(n, cut.low), "Lower edge of the bin"),
        ("bin_high", np.full(n, cut.high), "Upper edge of the bin"),
    ):
        table[name] = Column(values, description=description)
    return table

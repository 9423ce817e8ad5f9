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


"""Make training examples for lens finders from the coadds of a patch."""

from __future__ import annotations

__all__ = ("NonLensConfig", "SimulateLensesConfig", "SimulateLensesConnections", "SimulateLensesTask")

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import astropy.units as u
import numpy as np
from astropy.table import Column, Table, vstack

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import (
    ChoiceField,
    Config,
    ConfigDictField,
    DictField,
    Field,
    FieldValidationError,
    ListField,
    RangeField,
)
from lsst.pipe.base import (
    InvalidQuantumError,
    NoWorkFound,
    PipelineTask,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection

from ..coadds import MultibandCoadd
from ..cutouts import CutoutExtractor, Cutouts
from ..inference import torch_threads
from ..object_selection import SelectionError, column_names, select_objects
from ..patch_inputs import PATCH_DIMENSIONS, PatchConfig, PatchConnections, compute_seed, read_objects
from .splits import SPLIT_DTYPE, SPLITS, choose_split, compute_split

if TYPE_CHECKING:
    from .source_images import SourceImages

EXAMPLE_COLUMNS: tuple[tuple[str, u.UnitBase | None, str], ...] = (
    ("label", None, "Whether there are lensed arcs in the stamp"),
    ("kind", None, "'lens', or the kind of non-lens"),
    ("host_id", None, "Object ID of the galaxy at the centre"),
    ("source_id", None, "ID of the lensed source; -1 without"),
    ("einstein_radius", u.arcsec, "Einstein radius; NaN without lens"),
    ("magnification", None, "Flux of all images over that of the source; NaN without lens"),
    ("arc_snr", None, "Signal to noise of the arcs as LensPop defines it, best band; NaN without lens"),
    ("split", None, "'train', 'validation', 'calibration' or 'test', by the place on the sky"),
    ("seed", None, "Seed of the simulation of this patch"),
)
"""Name, unit and description of what is added to the columns of `Cutouts`."""


class SimulateLensesConnections(
    PatchConnections,
    dimensions=PATCH_DIMENSIONS,
    defaultTemplates={"outputName": "lens"},
):
    """Datasets that `SimulateLensesTask` reads and writes.

    Parameters
    ----------
    config
        Configuration of the task.
    """

    source_images = cT.PrerequisiteInput(
        doc="Images of galaxies that are lensed (SourceImages.to_table), if sourceImageFraction is not 0.",
        name="lens_source_images",
        storageClass="ArrowAstropy",
        dimensions=(),
    )
    lens_population = cT.PrerequisiteInput(
        doc="Catalogue of lenses (complete_lens_population says what columns it needs), if useLensCatalog.",
        name="lens_population",
        storageClass="ArrowAstropy",
        dimensions=(),
    )
    examples = cT.Output(
        doc="Stamps of galaxies with and without lensed arcs, a row each: those of Cutouts.to_table, and "
        "what is known of each (label, kind, truth of the arcs, split).",
        name="{outputName}_training_cutouts",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
    )

    config: SimulateLensesConfig

    def __init__(self, *, config: SimulateLensesConfig):
        super().__init__(config=config)
        if config.sourceImageFraction == 0:
            del self.source_images
        if not config.useLensCatalog:
            del self.lens_population


class NonLensConfig(Config):
    """A kind of non-lenses."""

    fraction = RangeField(
        dtype=float,
        doc="Fraction of the non-lenses that are of this kind; fractions are divided by their sum.",
        default=1.0,
        min=0.0,
    )
    selection = ListField[str](
        doc="Conditions on the columns of the object table (see lsst.meas.deeplearn.object_selection).  If "
        "empty, the galaxies are the hosts of the lenses, without arcs.",
        default=[],
    )
    painter = ChoiceField[str](
        doc="What is painted on the galaxies; nothing if None.",
        optional=True,
        default=None,
        allowed={
            "companion": "One or two blue sources beside the galaxy like those of lenses, but not lensed.",
            "satellite": "Two to five small galaxies of the colour of the galaxy around it.",
            "spiral": "A disc with spiral arms, of which the galaxy is the bulge.",
            "ring": "A ring of young stars around the galaxy, concentric.",
            "merger": "A second galaxy of similar brightness, and a tidal tail from each.",
            "edge_on": "A disc seen from its edge: that of the galaxy, or one beside it.",
            "trail": "The trail of a satellite in one band.",
            "cosmic_ray": "Tracks of charged particles in one band.",
            "bleed": "Columns with too much or too little charge in one band.",
            "spike": "Diffraction spikes and halo of a bright star just off the stamp.",
            "ghost": "A piece of the out-of-focus ring of a reflected star in one band.",
        },
    )


class SimulateLensesConfig(PatchConfig, pipelineConnections=SimulateLensesConnections):
    """Configuration of `SimulateLensesTask`."""

    # Inputs.
    bands = ListField[str](doc="Bands of the stamps, in the order of their arrays.", default=["g", "r", "i"])
    fluxColumn = Field[str](
        doc="Columns with the total flux in nJy; '{band}' stands for the band.", default="{band}_cModelFlux"
    )
    momentColumns = ListField[str](
        doc="Columns with the second moments xx, yy and xy of hosts in pixels.  Lenses point along them.  If "
        "empty, they point anywhere.",
        default=["shape_xx", "shape_yy", "shape_xy"],
    )
    maxMaskedFraction = RangeField(
        dtype=float,
        doc="Largest fraction of unusable pixels in any band of a stamp.",
        default=0.2,
        min=0.0,
        max=1.0,
        inclusiveMax=False,
    )

    # Stamps.
    stampSize = RangeField(
        dtype=int,
        doc="Side of the stamps in pixels, odd; larger than what a network sees by twice the largest shift "
        "of its training.",
        default=55,
        min=15,
    )
    psfSize = RangeField(dtype=int, doc="Side of the PSF kernels in pixels, odd.", default=25, min=3)

    # Lenses.
    hostSelection = ListField[str](
        doc="Conditions on the columns of the object table for galaxies that may be lenses: red, bright and "
        "extended.",
        default=[
            "refExtendedness > 0.5",
            "16 < mag(i_cModelFlux) < 21.5",
            "mag(g_cModelFlux) - mag(i_cModelFlux) > 1.3",
        ],
    )
    arcsPerHost = RangeField(
        dtype=int,
        doc="Number of lenses tried on each host; those that are too faint are dropped.",
        default=5,
        min=1,
    )
    maxLenses = RangeField(dtype=int, doc="Largest number of lenses of a patch.", default=2000, min=1)
    minEinsteinRadius = RangeField(
        dtype=float, doc="Smallest Einstein radius in arcsec.", default=0.7, min=0.1
    )
    maxEinsteinRadius = RangeField(
        dtype=float, doc="Largest Einstein radius in arcsec.", default=3.0, min=0.2
    )
    uniformEinsteinRadius = Field[bool](
        doc="Draw the logarithm of the Einstein radius uniformly within the limits, not from the prior? "
        "For training: one lens of the prior in 20 is wider than 2 arcsec, too few to learn from.",
        default=False,
    )
    maxBrightening = RangeField(
        dtype=float,
        doc="Largest number of magnitudes by which sources are brighter than those of the prior, uniform "
        "from 0.  For training: most arcs of the prior are faint.",
        default=0.0,
        min=0.0,
    )
    minArcSnr = RangeField(
        dtype=float,
        doc="Smallest signal to noise of the arcs in the best band, as LensPop defines it.",
        default=20.0,
        min=0.0,
    )
    minMagnification = RangeField(
        dtype=float, doc="Smallest magnification of the source as a whole.", default=3.0, min=1.0
    )

    useLensCatalog = Field[bool](
        doc="Take lenses from the dataset lens_population instead of the prior?  Each of its sources goes "
        "into one split.",
        default=False,
    )
    sourceImageFraction = RangeField(
        dtype=float,
        doc="Fraction of the sources that look like images of the dataset lens_source_images; the others are "
        "Sersic profiles, half of them with knots.  Each image goes into one split.",
        default=0.0,
        min=0.0,
        max=1.0,
        inclusiveMax=True,
    )

    # Non-lenses.
    nonLenses = ConfigDictField(
        doc="Kinds of non-lenses, by the name that goes into the column 'kind'.",
        keytype=str,
        itemtype=NonLensConfig,
        default={},
    )
    nonLensRatio = RangeField(dtype=float, doc="Number of non-lenses for each lens.", default=1.0, min=0.0)

    gain = DictField[str, float](
        doc="Photo-electrons per nJy of the coadds by band, for the Poisson noise of what is painted.  For "
        "bands that are not given it comes from the slope of the variance plane with the flux; without a "
        "slope there is no such noise.  0 turns the noise off.",
        default={},
    )

    # Splits and seed.
    splits = ListField[str](
        doc="Splits whose examples are kept.",
        default=list(SPLITS),
        itemCheck=lambda name: name in SPLITS,
    )
    validationFraction = RangeField(
        dtype=float,
        doc="Fraction of the sky whose examples are for validation.",
        default=0.15,
        min=0.0,
        max=1.0,
        inclusiveMax=True,
    )
    calibrationFraction = RangeField(
        dtype=float,
        doc="Fraction of the sky whose examples turn scores into probabilities.",
        default=0.1,
        min=0.0,
        max=1.0,
        inclusiveMax=True,
    )
    testFraction = RangeField(
        dtype=float,
        doc="Fraction of the sky whose examples are for the test.",
        default=0.15,
        min=0.0,
        max=1.0,
        inclusiveMax=True,
    )
    blockSize = RangeField(
        dtype=float,
        doc="Side in arcsec of the blocks of sky that go into one split as a whole.",
        default=60.0,
        min=1.0,
    )
    seed = Field[int](doc="Seed, to which that of the data ID is added.", default=0)

    def setDefaults(self) -> None:
        super().setDefaults()
        color = "mag(g_cModelFlux) - mag(i_cModelFlux)"
        galaxy = ["refExtendedness > 0.5", "mag(i_cModelFlux) < 23"]
        blue = ["refExtendedness > 0.5", "mag(i_cModelFlux) < 22", f"{color} < 1.3"]
        star = ["refExtendedness < 0.5", "mag(i_cModelFlux) < 22"]
        self.nonLenses = {
            # As they are in the coadd.
            "host": NonLensConfig(fraction=0.22),
            "galaxy": NonLensConfig(fraction=0.22, selection=galaxy),
            "blue": NonLensConfig(fraction=0.10, selection=blue),
            "star": NonLensConfig(fraction=0.03, selection=star),
            # Painted on hosts.
            "companion": NonLensConfig(fraction=0.12, painter="companion"),
            "satellite": NonLensConfig(fraction=0.05, painter="satellite"),
            "spiral": NonLensConfig(fraction=0.10, painter="spiral"),
            "ring": NonLensConfig(fraction=0.03, painter="ring"),
            "merger": NonLensConfig(fraction=0.04, painter="merger"),
            "edge_on": NonLensConfig(fraction=0.05, painter="edge_on"),
            "trail": NonLensConfig(fraction=0.01, painter="trail"),
            "cosmic_ray": NonLensConfig(fraction=0.01, painter="cosmic_ray"),
            "bleed": NonLensConfig(fraction=0.005, painter="bleed"),
            "spike": NonLensConfig(fraction=0.01, painter="spike"),
            "ghost": NonLensConfig(fraction=0.005, painter="ghost"),
        }

    def validate(self) -> None:
        super().validate()
        if self.stampSize % 2 == 0 or self.psfSize % 2 == 0:
            raise FieldValidationError(
                self.__class__.stampSize, self, "The sides of stamps and PSF kernels must be odd."
            )
        if len(self.momentColumns) not in (0, 3):
            raise FieldValidationError(
                self.__class__.momentColumns, self, "Three columns are needed, xx, yy and xy, or none."
            )
        if self.validationFraction + self.calibrationFraction + self.testFraction > 1:
            raise FieldValidationError(
                self.__class__.testFraction,
                self,
                "Validation, calibration and test are more than the whole sky.",
            )
        if self.nonLenses and not any(kind.fraction for kind in self.nonLenses.values()):
            raise FieldValidationError(
                self.__class__.nonLenses,
                self,
                "All fractions of non-lenses are 0; use nonLensRatio=0 for none.",
            )
        if any(value < 0 for value in self.gain.values()):
            raise FieldValidationError(self.__class__.gain, self, "Gains must not be negative.")
        try:
            column_names([expression for selection in self.selections for expression in selection])
        except SelectionError as err:
            raise FieldValidationError(self.__class__.hostSelection, self, str(err)) from err

    @property
    def split_fractions(self) -> dict[str, float]:
        """Fractions of the splits, but for the training."""
        return {
            "validation": self.validationFraction,
            "calibration": self.calibrationFraction,
            "test": self.testFraction,
        }

    @property
    def selections(self) -> list[list[str]]:
        """The selections of hosts and of all kinds of non-lenses."""
        return [list(self.hostSelection), *(list(kind.selection) for kind in self.nonLenses.values())]


class SimulateLensesTask(PipelineTask):
    """Paint lensed arcs on galaxies of a patch, and choose non-lenses.

    Galaxies that may be lenses get arcs of sources drawn from a prior
    (`.lens_population.sample_lens_population`), for lenses that suit their
    magnitudes, colours and orientation, with the PSF of the coadd at that
    place.  Non-lenses are those galaxies without arcs, and other kinds.
    """

    ConfigClass: ClassVar[type[SimulateLensesConfig]] = SimulateLensesConfig
    _DefaultName: ClassVar[str] = "simulateLenses"
    config: SimulateLensesConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        data_id = butlerQC.quantum.dataId
        assert data_id is not None
        inputs = butlerQC.get(inputRefs)
        coadd = MultibandCoadd.read(inputs["coadds"], self.config.bands)
        objects = read_objects(
            inputs["objects"], self.config, self._list_columns(), patch=int(data_id["patch"])
        )
        seed = compute_seed(data_id["skymap"], data_id["tract"], data_id["patch"], self.config.seed)
        try:
            outputs = self.run(
                coadd,
                objects,
                seed=seed,
                num_cores=butlerQC.resources.num_cores,
                source_images=inputs.get("source_images"),
                lens_population=inputs.get("lens_population"),
            )
        except SourceError as err:
            raise InvalidQuantumError(str(err)) from err
        butlerQC.put(outputs, outputRefs)

    def run(
        self,
        coadd: MultibandCoadd,
        objects: Table,
        *,
        seed: int = 0,
        num_cores: int = 1,
        source_images: Table | None = None,
        lens_population: Table | None = None,
    ) -> Struct:
        """Make the examples of a patch.

        Parameters
        ----------
        coadd
            Coadds of the patch.
        objects
            Objects, with the columns that the configuration names.
        seed
            Seed of the simulation.
        num_cores
            Threads that may be used.
        source_images
            Images of galaxies (`SourceImages.to_table`), if sources are to
            look like them.
        lens_population
            Lenses to take instead of those of the prior.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``examples``
                `Cutouts.to_table` with the `EXAMPLE_COLUMNS`
                (`astropy.table.Table`).

        Raises
        ------
        lsst.pipe.base.NoWorkFound
            Raised if no galaxy of the patch can be a host, or no arc on it
            is bright enough.
        SourceError
            Raised if images or catalogue do not have what is needed.
        """
        rng = np.random.default_rng(seed)
        extractor = CutoutExtractor(
            coadd,
            size=self.config.stampSize,
            psf_size=self.config.psfSize,
            bad_planes=self.config.badMaskPlanes,
        )
        hosts = objects[select_objects(objects, self.config.hostSelection)]
        host_cutouts, hosts = self._extract(extractor, hosts)
        if len(hosts) == 0:
            raise NoWorkFound("No galaxy of this patch satisfies hostSelection with usable pixels.")
        with torch_threads(num_cores):
            gain = self._find_gain(coadd)
            sources = _Sources.make(self.config, lens_population, source_images, rng)
            lenses = self._make_lenses(host_cutouts, hosts, sources, gain, rng)
            if len(lenses) == 0:
                raise NoWorkFound(
                    f"No arc on any of {len(hosts)} hosts has a signal to noise of {self.config.minArcSnr}."
                )
            parts = [lenses]
            total = sum(kind.fraction for kind in self.config.nonLenses.values())
            for name, kind in sorted(self.config.nonLenses.items()):
                number = round(self.config.nonLensRatio * len(lenses) * kind.fraction / total)
                cutouts, table = host_cutouts, hosts
                if kind.selection:
                    table = objects[select_objects(objects, kind.selection)]
                    # Some of them will not be usable.
                    chosen = np.sort(rng.permutation(len(table))[: 2 * number])
                    cutouts, table = self._extract(extractor, table[chosen])
                parts.append(self._make_non_lenses(name, kind.painter, cutouts, table, number, gain, rng))
        examples = vstack(parts, metadata_conflicts="silent")
        examples["split"][:] = self._compute_split(np.asarray(examples["ra"]), np.asarray(examples["dec"]))
        examples["seed"][:] = seed
        examples = examples[np.isin(examples["split"], list(self.config.splits))]
        if len(examples) == 0:
            raise NoWorkFound(f"No example of this patch is in the splits {list(self.config.splits)}.")
        counts = {str(kind): int((examples["kind"] == kind).sum()) for kind in np.unique(examples["kind"])}
        self.metadata["seed"] = seed
        for name, count in counts.items():
            self.metadata[f"n_{name}"] = count
        self.log.info("Made %s.", ", ".join(f"{count} examples of {name}" for name, count in counts.items()))
        return Struct(examples=examples)

    def _list_columns(self) -> set[str]:
        """Return the columns that selections and lenses need."""
        expressions = [expression for selection in self.config.selections for expression in selection]
        fluxes = {self.config.fluxColumn.format(band=band) for band in self.config.bands}
        return column_names(expressions) | fluxes | set(self.config.momentColumns)

    def _extract(self, extractor: CutoutExtractor, objects: Table) -> tuple[Cutouts, Table]:
        """Return the usable stamps, and the rows that they belong to."""
        cutouts = extractor.extract(
            ids=np.asarray(objects[self.config.idColumn]),
            ra=np.asarray(objects[self.config.raColumn]),
            dec=np.asarray(objects[self.config.decColumn]),
        )
        spoilt = cutouts.off_edge | cutouts.bad_psf.any(axis=1) | cutouts.missing_cell.any(axis=1)
        usable = ~spoilt & (cutouts.masked_fraction.max(axis=1) <= self.config.maxMaskedFraction)
        return cutouts[usable], objects[usable]

    def _find_gain(self, coadd: MultibandCoadd) -> dict[str, float]:
        """Return photo-electrons per nJy of the bands that have them."""
        from .simulation import estimate_gain

        gain: dict[str, float] = {}
        for band, planes in coadd.planes.items():
            if band in self.config.gain:
                value: float | None = self.config.gain[band]
            else:
                bad = coadd.compute_bad_pixels(band, self.config.badMaskPlanes)
                value = estimate_gain(planes.image, planes.variance, bad)
            if value:
                gain[band] = value
                self.metadata[f"gain_{band}"] = value
            else:
                self.log.info("What is painted has no Poisson noise in %s: there is no gain.", band)
        return gain

    def _make_lenses(
        self,
        cutouts: Cutouts,
        hosts: Table,
        sources: _Sources,
        gain: Mapping[str, float],
        rng: np.random.Generator,
    ) -> Table:
        """Return the stamps of hosts with arcs on them."""
        from .simulation import paint_lenses

        lenses, chosen = self._match(cutouts, hosts, sources, rng)
        parts: list[Table] = []
        # In chunks, to stop as soon as there are enough.
        for rows in np.array_split(np.arange(len(lenses)), len(lenses) // 500 + 1):
            painted, truth = paint_lenses(
                cutouts[chosen[rows]],
                lenses[rows],
                images=sources.images,
                gain=gain,
                seed=int(rng.integers(2**62)),
            )
            bright = np.asarray(truth["arc_snr"] >= self.config.minArcSnr)
            bright &= np.asarray(truth["magnification"] >= self.config.minMagnification)
            names = ("source_id", "einstein_radius", "magnification", "arc_snr")
            columns = {name: np.asarray(truth[name])[bright] for name in names}
            parts.append(_make_examples(painted[bright], label=True, kind="lens", **columns))
            if sum(len(part) for part in parts) >= self.config.maxLenses:
                break
        return vstack(parts, metadata_conflicts="silent")[: self.config.maxLenses]

    def _match(
        self, cutouts: Cutouts, hosts: Table, sources: _Sources, rng: np.random.Generator
    ) -> tuple[Table, np.ndarray]:
        """Return lenses that suit hosts, and the rows of these."""
        from .lens_population import choose_hosts

        lenses, chosen = [], []
        split = self._compute_split(cutouts.ra, cutouts.dec)
        for name in SPLITS:
            rows = np.flatnonzero(split == name)
            if len(rows) == 0:
                continue
            population = sources.draw(self.config.arcsPerHost * len(rows), name, rng)
            if len(population) == 0:
                self.log.info("No lens of the catalogue is for %s.", name)
                continue
            magnitudes = {band: self._compute_magnitudes(hosts[rows], band) for band in self.config.bands}
            index = choose_hosts(
                population, magnitudes, seed=int(rng.integers(2**62)), max_lenses=self.config.arcsPerHost
            )
            lenses.append(population[index >= 0])
            chosen.append(rows[index[index >= 0]])
        if not lenses:
            raise SourceError("The catalogue has no lenses within the limits on the Einstein radius.")
        order = rng.permutation(sum(len(table) for table in lenses))
        table, rows = vstack(lenses, metadata_conflicts="silent")[order], np.concatenate(chosen)[order]
        return self._align(table, hosts[rows], rng), rows

    def _compute_split(self, ra: np.ndarray, dec: np.ndarray) -> np.ndarray:
        """Return the split of each position."""
        return compute_split(ra, dec, block_size=self.config.blockSize, **self.config.split_fractions)

    def _align(self, lenses: Table, hosts: Table, rng: np.random.Generator) -> Table:
        """Return lenses turned as their hosts are."""
        from .lens_population import rotate_lenses

        if not self.config.momentColumns:
            return lenses
        # Mass follows light, within the scatter of lens models.
        xx, yy, xy = (np.nan_to_num(np.asarray(hosts[name])) for name in self.config.momentColumns)
        angle = np.degrees(0.5 * np.arctan2(2 * xy, xx - yy)) + rng.normal(0, 10, len(hosts))
        return rotate_lenses(lenses, angle - np.asarray(lenses["position_angle"]))

    def _compute_magnitudes(self, objects: Table, band: str) -> np.ndarray:
        flux = np.asarray(objects[self.config.fluxColumn.format(band=band)], dtype=np.float64)
        return np.asarray(u.nJy.to(u.ABmag, np.where(flux > 0, flux, np.nan)))

    def _make_non_lenses(
        self,
        name: str,
        painter: str | None,
        cutouts: Cutouts,
        objects: Table,
        number: int,
        gain: Mapping[str, float],
        rng: np.random.Generator,
    ) -> Table:
        """Return stamps of one kind of non-lenses."""
        if painter is None or len(cutouts) == 0:
            cutouts = cutouts[np.sort(rng.permutation(len(cutouts))[:number])]
        else:
            from .contaminants import paint_contaminants

            # A galaxy can stand several times, with other paint.
            chosen = np.sort(rng.integers(len(cutouts), size=number))
            columns = [self.config.fluxColumn.format(band=band) for band in cutouts.bands]
            flux = np.stack([np.asarray(objects[column])[chosen] for column in columns], axis=1)
            cutouts = paint_contaminants(
                cutouts[chosen], painter, flux, gain=gain, seed=int(rng.integers(2**62))
            )
        if len(cutouts) < number:
            self.log.info("Only %d of %d non-lenses of kind %s are there.", len(cutouts), number, name)
        return _make_examples(cutouts, label=False, kind=name)


class SourceError(ValueError):
    """Raised for images or lenses of a user that cannot be simulated."""


@dataclasses.dataclass
class _Sources:
    """Where lenses and their sources come from."""

    config: SimulateLensesConfig
    catalog: Table | None
    images: SourceImages | None

    @classmethod
    def make(
        cls,
        config: SimulateLensesConfig,
        lens_population: Table | None,
        source_images: Table | None,
        rng: np.random.Generator,
    ) -> _Sources:
        """Check what the user gives.

        Parameters
        ----------
        config
            Configuration of the task.
        lens_population, source_images
            Tables of the user, if there are any.
        rng
            Generator of random numbers.
        """
        from .lens_population import complete_lens_population
        from .source_images import SourceImages

        for wanted, table, name in (
            (config.useLensCatalog, lens_population, "lens_population"),
            (config.sourceImageFraction > 0, source_images, "lens_source_images"),
        ):
            if wanted and table is None:
                raise SourceError(f"The configuration asks for the dataset {name}, which is not there.")
        catalog = images = None
        try:
            if config.useLensCatalog and lens_population is not None:
                catalog = complete_lens_population(
                    lens_population, bands=list(config.bands), seed=int(rng.integers(2**62))
                )
                radius = np.asarray(catalog["einstein_radius"])
                catalog = catalog[(radius >= config.minEinsteinRadius) & (radius <= config.maxEinsteinRadius)]
            if config.sourceImageFraction > 0 and source_images is not None:
                images = SourceImages.from_table(source_images)
        except ValueError as err:
            raise SourceError(str(err)) from err
        return cls(config, catalog, images)

    def draw(self, n: int, split: str, rng: np.random.Generator) -> Table:
        """Return lenses with sources that are in no other split.

        Parameters
        ----------
        n
            Number of lenses.
        split
            Split of the sources.
        rng
            Generator of random numbers.
        """
        from .lens_population import assign_source_images, sample_lens_population

        if self.catalog is None:
            lenses = sample_lens_population(
                n,
                seed=int(rng.integers(2**62)),
                bands=self.config.bands,
                min_einstein_radius=self.config.minEinsteinRadius,
                max_einstein_radius=self.config.maxEinsteinRadius,
                uniform_radius=self.config.uniformEinsteinRadius,
            )
        else:
            rows = np.flatnonzero(self._is_in(np.asarray(self.catalog["source_id"]), split))
            lenses = self.catalog[rng.choice(rows, n)] if len(rows) else self.catalog[:0]
        if self.config.maxBrightening > 0:
            brighter = rng.uniform(0, self.config.maxBrightening, len(lenses))
            for band in self.config.bands:
                lenses[f"source_mag_{band}"] -= brighter
        if self.images is None or len(lenses) == 0:
            return lenses
        ids = np.where(self._is_in(self.images.ids, split), self.images.ids, -1)
        fraction = self.config.sourceImageFraction
        return assign_source_images(lenses, ids, fraction=fraction, seed=int(rng.integers(2**62)))

    def _is_in(self, source_ids: np.ndarray, split: str) -> np.ndarray:
        """Return which sources belong to a split, by their IDs alone."""
        place = np.array([compute_seed("source", source) / 2**62 for source in source_ids.tolist()])
        return np.asarray(choose_split(place, **self.config.split_fractions) == split)


def _make_examples(
    cutouts: Cutouts,
    *,
    label: bool,
    kind: str,
    source_id: np.ndarray | int = -1,
    einstein_radius: np.ndarray | float = np.nan,
    magnification: np.ndarray | float = np.nan,
    arc_snr: np.ndarray | float = np.nan,
) -> Table:
    """Return a table of stamps with all columns of examples."""
    n = len(cutouts)
    values = {
        "label": np.full(n, label),
        "kind": np.full(n, kind, dtype="U32"),
        "host_id": cutouts.ids,
        "source_id": np.full(n, source_id, dtype=np.int64),
        "einstein_radius": np.full(n, einstein_radius, dtype=np.float32),
        "magnification": np.full(n, magnification, dtype=np.float32),
        "arc_snr": np.full(n, arc_snr, dtype=np.float32),
        "split": np.full(n, "", dtype=SPLIT_DTYPE),
        "seed": np.zeros(n, dtype=np.int64),
    }
    table = cutouts.to_table()
    for name, unit, description in EXAMPLE_COLUMNS:
        table[name] = Column(values[name], unit=unit, description=description)
    return table

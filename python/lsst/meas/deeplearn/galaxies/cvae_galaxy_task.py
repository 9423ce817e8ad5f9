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

__all__ = (
    "GALAXY_COLUMNS",
    "CvaeGalaxyConfig",
    "CvaeGalaxyConnections",
    "CvaeGalaxyTask",
    "describe_galaxies",
)

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import astropy.units as u
import numpy as np
from astropy.table import Column, Table

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import Field, FieldValidationError, RangeField
from lsst.pipe.base import InvalidQuantumError, PipelineTask, QuantumContext, Struct
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection
from lsst.utils.logging import PeriodicLogger

from ..coadds import MultibandCoadd
from ..cutouts import Cutouts
from ..model_package import MODEL_STORAGE_CLASS, SCALE_TOLERANCE, ModelPackage, ModelPackageError
from ..object_selection import SelectionError
from ..patch_inputs import PATCH_DIMENSIONS, PatchConnections, compute_seed, read_objects
from .conditions import CONDITION_NAMES
from .cosmos import GalaxySetError
from .cut_galaxies_task import (
    GalaxyPatchConfig,
    extract_galaxies,
    make_condition_table,
    make_object_seed,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lsst.images.cells import CellCoadd

    from .cvae_sampling import CvaeSampler

GALAXY_COLUMNS: Mapping[str, tuple[str, str]] = {
    "galaxy_seed": ("i8", "Seed of its shape and orientation"),
    "flag_outside": ("?", "The object is outside the training set of the model; it was clipped to it"),
    "flag_not_drawn": ("?", "No galaxy was drawn: its conditions are unknown, or there is no PSF"),
    "model_name": ("U64", "Name of the model package"),
    "model_version": ("U32", "Version of the model package"),
    "model_digest": ("U64", "SHA-256 of the model package"),
}
"""Type and description of what is added to the columns of `Cutouts` and to
`CONDITION_COLUMNS`."""

CHUNK_SIZE = 256
"""Number of galaxies that are kept on the grid of the model at once."""

EDGE_LEVEL = 0.02
"""Mean brightness on the border of its grid, in units of the noise of a pixel
of the coadd, above which a galaxy is drawn on a grid of twice the side."""

MAX_DOUBLINGS = 2
"""How often the side of the grid may be doubled."""

SCORE_COLUMNS: Mapping[str, str] = {
    "elbo": "Evidence lower bound of the real stamp, in nats",
    "kl_divergence": "KL divergence in it, in nats",
    "reduced_chi2": "Chi square of the real stamp from its reconstruction, over the number of modes: large "
    "for galaxies that the model has not seen the like of",
}
"""Description of what ``doScores`` adds, besides ``latents``."""


class CvaeGalaxyConnections(
    PatchConnections,
    dimensions=PATCH_DIMENSIONS,
    defaultTemplates={"outputName": "galaxy_cvae"},
):
    """Datasets that `CvaeGalaxyTask` reads and writes.

    Parameters
    ----------
    config
        Configuration of the task.
    """

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
    coadd = cT.Output(
        doc="Coadd of the patch with generated galaxies in place of everything that was in it, and noise "
        "with its variance.",
        name="{outputName}_coadd",
        storageClass="CellCoadd",
        dimensions=("skymap", "tract", "patch", "band"),
        multiple=True,
    )
    gallery = cT.Output(
        doc="Objects of the coadd, and below each the galaxy that was drawn for it.",
        name="{outputName}_gallery",
        storageClass="Plot",
        dimensions=("skymap", "tract", "patch"),
    )

    config: CvaeGalaxyConfig

    def __init__(self, *, config: CvaeGalaxyConfig):
        super().__init__(config=config)
        if not config.nShown:
            del self.gallery
        if not config.doCoadd:
            del self.coadd


class CvaeGalaxyConfig(GalaxyPatchConfig, pipelineConnections=CvaeGalaxyConnections):
    """Configuration of `CvaeGalaxyTask`."""

    doNoise = Field[bool](doc="Add noise with the variance of the coadd?", default=True)
    doCoadd = Field[bool](
        doc="Also write a coadd of the patch with nothing in it but the generated galaxies?  It needs "
        "coaddStorageClass='CellCoadd'.",
        default=False,
    )
    doScores = Field[bool](
        doc="Also say how likely the model finds the real stamps?  It needs a model that was trained on "
        "coadds with these pixels (source='cutouts' of trainCvae).",
        default=False,
    )

    nShown = RangeField(
        dtype=int,
        doc="Number of objects in the gallery, from bright to faint; 0 for none.",
        default=12,
        min=0,
    )

    def validate(self) -> None:
        super().validate()
        if self.doCoadd and self.coaddStorageClass != "CellCoadd":
            raise FieldValidationError(
                self.__class__.doCoadd,
                self,
                "A whole coadd is written for coaddStorageClass='CellCoadd' only.",
            )


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
            inputs["objects"], self.config, self.config.wanted_columns, patch=int(data_id["patch"])
        )
        try:
            outputs = self.run(coadd, objects, ModelPackage.from_arrow(inputs["model"]))
        except (ModelPackageError, SelectionError, GalaxySetError) as err:
            raise InvalidQuantumError(str(err)) from err
        if self.config.doCoadd:
            (ref,) = [ref for ref in outputRefs.coadd if ref.dataId["band"] == self.config.band]
            (handle,) = [h for h in inputs["coadds"] if h.dataId["band"] == self.config.band]
            seed = compute_seed(self.config.seed, data_id["tract"], data_id["patch"], "noise")
            butlerQC.put(self.make_coadd(handle.get(), outputs.light, seed=seed), ref)
        butlerQC.put(outputs.cutouts, outputRefs.cutouts)
        if self.config.nShown:
            butlerQC.put(outputs.gallery, outputRefs.gallery)

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
                of `CONDITION_COLUMNS` and `GALAXY_COLUMNS`, a row for each
                selected object in the order of ``objects``
                (`astropy.table.Table`).
            ``light``
                The galaxies without noise in nJy, as far as they reach, on
                the pixels of the coadd (`numpy.ndarray`, shape ``(y, x)``).
            ``gallery``
                Some of them below their objects
                (`matplotlib.figure.Figure`), or `None` for ``nShown=0``.

        Raises
        ------
        ModelPackageError
            Raised if the model is of another kind, or does not fit the
            pixels of the coadd for ``doScores``.
        SelectionError
            Raised if the selection does not fit the table.
        """
        from .cvae_sampling import CvaeSampler

        sampler = CvaeSampler(model, outside="clip")
        selected, cutouts = extract_galaxies(coadd, objects, self.config)
        table = self._make_table(selected, cutouts, model)
        known = np.flatnonzero(~table["flag_not_drawn"])
        conditions = np.column_stack([np.asarray(table[name], dtype=np.float64) for name in CONDITION_NAMES])
        _, table["flag_outside"][known] = sampler.check(conditions[known])
        images = np.full_like(cutouts.image, np.nan)
        light = np.zeros(coadd.bbox.shape, dtype=np.float32)
        progress = PeriodicLogger(self.log)
        for start in range(0, len(known), CHUNK_SIZE):
            rows = known[start : start + CHUNK_SIZE]
            for row, stamp in self._draw(model, rows, conditions, table, cutouts):
                edge = (len(stamp) - cutouts.size) // 2
                middle = slice(edge, edge + cutouts.size)
                images[row, 0] = stamp[middle, middle] + self._draw_noise(cutouts[row : row + 1])
                y, x = (
                    int(np.floor(center + 0.5)) - side.start - len(stamp) // 2
                    for center, side in ((cutouts.y[row], coadd.bbox.y), (cutouts.x[row], coadd.bbox.x))
                )
                _add_stamp(light, stamp, y, x)
            progress.log("Drew %d of %d galaxies.", start + len(rows), len(known))
        for name, column in dataclasses.replace(cutouts, image=images).to_table().columns.items():
            table[name] = column
        if self.config.doScores:
            self._add_scores(table, cutouts, sampler)
        self.metadata["n_objects"] = len(table)
        self.metadata["n_not_drawn"] = len(table) - len(known)
        self.metadata["n_outside"] = int(table["flag_outside"].sum())
        self.log.info(
            "Drew %d galaxies; %d were outside the training set, %d objects could not be drawn.",
            len(known),
            self.metadata["n_outside"],
            self.metadata["n_not_drawn"],
        )
        return Struct(
            cutouts=table,
            light=light,
            gallery=self._plot_gallery(table, cutouts) if self.config.nShown else None,
        )

    def make_coadd(self, coadd: CellCoadd, light: np.ndarray, *, seed: int) -> CellCoadd:
        """Put the galaxies of a patch into a coadd.

        Parameters
        ----------
        coadd
            Coadd of the patch, whose variance, mask, PSF and geometry the
            new one has.
        light
            What `run` returns.
        seed
            Seed of the noise.

        Returns
        -------
        synthetic
            The new coadd; pixels without data stay without.

        Notes
        -----
        The noise is not that of the stamps; it has the variance of the coadd
        pixel by pixel, in which the light of real objects has its share.
        """
        synthetic = coadd.copy()
        bad = ~np.isfinite(coadd.image.array)
        unit = coadd.unit
        total = light * (1.0 if unit is None else u.nJy.to(unit))
        if self.config.doNoise:
            noise = np.random.default_rng(seed).standard_normal(total.shape)
            total = total + np.sqrt(np.maximum(np.nan_to_num(coadd.variance.array), 0)) * noise
        synthetic.image.array[...] = np.where(bad, np.nan, total)
        return synthetic

    def _draw(
        self, model: ModelPackage, rows: np.ndarray, conditions: np.ndarray, table: Table, cutouts: Cutouts
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield rows of galaxies and all of their light in nJy."""
        from .cvae_sampling import CvaeSampler
        from .render import FineImages, draw_with_kernels

        size = None
        for doublings in range(MAX_DOUBLINGS + 1):
            sampler = CvaeSampler(model, outside="clip", size=size)
            drawn = sampler.draw(conditions[rows], table["galaxy_seed"][rows])
            flux = np.asarray(table["flux"], dtype=np.float64)[rows]
            border = (drawn[:, 0].mean(axis=1) + drawn[:, :, 0].mean(axis=1)) / 2
            brightness = flux * border * (cutouts.pixel_scale / sampler.pixel_scale) ** 2
            variance = cutouts.variance[rows, 0]
            noise = np.sqrt(np.where(variance > 0, variance, np.inf).min(axis=(1, 2)))
            cut = (brightness > EDGE_LEVEL * noise) & (doublings < MAX_DOUBLINGS)
            reach = cutouts.psf.shape[-1] + math.ceil(
                sampler.size * sampler.pixel_scale / cutouts.pixel_scale
            )
            stamps = draw_with_kernels(
                FineImages(drawn[~cut], sampler.pixel_scale),
                cutouts.psf[rows[~cut], 0],
                size=max(cutouts.size, reach // 2 * 2 + 1),
                pixel_scale=cutouts.pixel_scale,
            )
            yield from zip(rows[~cut], flux[~cut, None, None] * stamps, strict=True)
            rows, size = rows[cut], 2 * sampler.size
            if len(rows) == 0:
                break

    def _make_table(self, selected: Table, cutouts: Cutouts, model: ModelPackage) -> Table:
        """Return all columns, but for what is drawn."""
        table = make_condition_table(selected, cutouts, self.config)
        for name, (dtype, description) in GALAXY_COLUMNS.items():
            table[name] = Column(np.zeros(len(selected), dtype=dtype), description=description)
        table["galaxy_seed"][:] = [make_object_seed(self.config.seed, i, "galaxy") for i in cutouts.ids]
        table["flag_not_drawn"][:] = table["flag_unknown"]
        table["model_name"][:] = model.name
        table["model_version"][:] = model.version
        table["model_digest"][:] = model.digest
        return table

    def _plot_gallery(self, table: Table, cutouts: Cutouts) -> Figure:
        """Plot objects at even steps of the magnitude, the clean ones."""
        from .plots import plot_pairs

        clean = ~np.asarray(table["flag_not_drawn"]) & (cutouts.masked_fraction[:, 0] == 0)
        rows = np.flatnonzero(clean)
        magnitude = np.asarray(table["magnitude"])[rows]
        shown = np.empty(0, dtype=int)
        if len(rows):
            low, high = np.quantile(magnitude, [0.005, 0.5])
            steps = np.linspace(low, high, self.config.nShown)
            shown = np.unique([np.abs(magnitude - step).argmin() for step in steps])
            shown = rows[shown[np.argsort(magnitude[shown])]]
        return plot_pairs(cutouts[shown], table[shown])

    def _draw_noise(self, cutout: Cutouts) -> np.ndarray:
        """Return the noise of a stamp, which depends on the object only."""
        if not self.config.doNoise:
            return np.zeros((cutout.size, cutout.size))
        variance = np.where(cutout.bad[0, 0], np.nan, cutout.variance[0, 0])
        rng = np.random.default_rng(make_object_seed(self.config.seed, cutout.ids[0], "noise"))
        return np.asarray(np.sqrt(variance) * rng.standard_normal(variance.shape))

    def _add_scores(self, table: Table, cutouts: Cutouts, sampler: CvaeSampler) -> None:
        """Add what the model makes of the real stamps; NaN for the others."""
        from .coadd_set import make_coadd_set

        if abs(sampler.pixel_scale / cutouts.pixel_scale - 1) > SCALE_TOLERANCE:
            raise ModelPackageError(
                f"The model has pixels of {sampler.pixel_scale:.3f} arcsec and the coadd of "
                f"{cutouts.pixel_scale:.3f}; for scores train one with source='cutouts', or unset doScores."
            )
        table["latents"] = np.full((len(table), sampler.n_shape), np.nan, dtype=np.float32)
        table["latents"].description = "Mean of the latent variables of the shape of the real stamp"
        for name, description in SCORE_COLUMNS.items():
            table[name] = Column(np.full(len(table), np.nan, dtype=np.float32), description=description)
        try:
            galaxies, rows = make_coadd_set(cutouts, table, size=sampler.size)
        except GalaxySetError as err:
            self.log.warning("No real stamp can be scored: %s", err)
            return
        latents, elbo = sampler.score(
            galaxies.image,
            psf=galaxies.psf[galaxies.psf_index],
            noise=np.sqrt(galaxies.noise_variance * galaxies.noise_power.mean()),
            conditions=galaxies.conditions,
            noise_power=galaxies.noise_power,
        )
        likelihood, divergence = elbo.log_likelihood.numpy(), elbo.kl_divergence.numpy()
        modes = (sampler.size - 1) ** 2
        log_norm = modes * np.log(2 * np.pi * galaxies.noise_variance * galaxies.noise_power.mean())
        values: dict[str, Any] = {
            "latents": latents,
            "elbo": likelihood - divergence,
            "kl_divergence": divergence,
            "reduced_chi2": (-2 * likelihood - log_norm) / modes,
        }
        for name, value in values.items():
            table[name][rows] = value


def _add_stamp(image: np.ndarray, stamp: np.ndarray, y: int, x: int) -> None:
    """Add a stamp whose first pixel is at (y, x), as far as it is inside."""
    rows = slice(max(y, 0), max(min(y + len(stamp), image.shape[0]), 0))
    columns = slice(max(x, 0), max(min(x + len(stamp), image.shape[1]), 0))
    image[rows, columns] += stamp[rows.start - y : rows.stop - y, columns.start - x : columns.stop - x]


def describe_galaxies(table: Table) -> str:
    """Return a summary of the galaxies of a patch, to print.

    Parameters
    ----------
    table
        What `CvaeGalaxyTask` writes.
    """
    drawn = table[~np.asarray(table["flag_not_drawn"])]
    model = f"{table['model_name'][0]} {table['model_version'][0]}" if len(table) else "no model"
    lines = [
        f"{len(drawn)} drawn from {model}, {int(drawn['flag_outside'].sum())} of them clipped to its "
        f"training set; {len(table) - len(drawn)} objects could not be drawn."
    ]
    edges = [-np.inf, 20, 21, 22, 23, 24, np.inf]
    rows = Table(
        names=("magnitude", "galaxies", "radius", "redshift", "flux"), dtype=("U9", int, *3 * ["U6"])
    )
    in_stamp = np.nansum(np.asarray(drawn["image"])[:, 0], axis=(1, 2)) / np.asarray(drawn["flux"])
    for low, high in itertools.pairwise(edges):
        chosen = (drawn["magnitude"] >= low) & (drawn["magnitude"] < high)
        if chosen.any():
            name = f"{low:.0f} to {high:.0f}".replace("-inf to", "below").replace("to inf", "and more")
            values = drawn["half_light_radius"][chosen], drawn["redshift"][chosen], in_stamp[chosen]
            rows.add_row([name, int(chosen.sum()), *(f"{np.median(value):.2f}" for value in values)])
    lines += rows.pformat(max_lines=-1, max_width=-1)
    lines.append(
        "(medians: half-light radius in arcsec, redshift, flux in the stamp over that of the object)"
    )
    return "\n".join(lines)

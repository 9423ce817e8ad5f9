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


"""Rank the lens candidates of a tract."""

from __future__ import annotations

__all__ = ("RankLensCandidatesConfig", "RankLensCandidatesConnections", "RankLensCandidatesTask")

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from astropy.table import Column, Table, vstack
from scipy.spatial import cKDTree

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import ChoiceField, Field, ListField, RangeField
from lsst.pipe.base import (
    NoWorkFound,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection

from ..cutouts import Cutouts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RankLensCandidatesConnections(
    PipelineTaskConnections,
    dimensions=("skymap", "tract"),
    defaultTemplates={"outputName": "lens"},
):
    """Datasets that `RankLensCandidatesTask` reads and writes."""

    candidates = cT.Input(
        doc="Score and flags of every object that was selected in a patch, a row each.",
        name="{outputName}_candidates",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
        multiple=True,
        deferLoad=True,
    )
    cutouts = cT.Input(
        doc="Stamps of the objects with the highest scores of a patch, a row each (Cutouts.from_table).",
        name="{outputName}_cutouts",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract", "patch"),
        multiple=True,
        deferLoad=True,
        minimum=0,
    )
    ranked = cT.Output(
        doc="The candidates of the tract, each object once, the best first, with their rank.",
        name="{outputName}_candidates_ranked",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
    )
    gallery = cT.Output(
        doc="Colour composites of the best candidates of the tract.",
        name="{outputName}_gallery",
        storageClass="Plot",
        dimensions=("skymap", "tract"),
    )


class RankLensCandidatesConfig(PipelineTaskConfig, pipelineConnections=RankLensCandidatesConnections):
    """Configuration of `RankLensCandidatesTask`."""

    # The ranking.
    rankBy = ChoiceField[str](
        doc="Column that orders the candidates, highest first; objects with NaN have no rank.",
        default="score",
        allowed={
            "score": "Output of the networks.",
            "log_likelihood_ratio": "Likelihood ratio of a lens, in the steps of the calibration.",
            "probability": "Probability of a lens, in the steps of the calibration.",
            "ringfinder_snr": "Signal to noise of the residual of RingFinder.",
        },
    )
    matchRadius = RangeField(
        dtype=float,
        doc="Largest distance (arcsec) between rows of different patches that are the same object under "
        "different IDs; 0 merges rows of the same ID only.",
        default=1.0,
        min=0.0,
        max=60.0,
    )
    minScore = Field[float](
        doc="Smallest value of the rankBy column to be in the ranked table, or None for all.",
        default=None,
        optional=True,
    )
    nRanked = RangeField(
        dtype=int,
        doc="Largest number of objects with a rank in the ranked table, or None for all.",
        default=None,
        optional=True,
        min=1,
    )
    keepUnscored = Field[bool](
        doc="Keep the objects without a score, with rank -1, at the end of the ranked table?",
        default=True,
    )

    # The gallery.
    nGallery = RangeField(dtype=int, doc="Number of candidates in the gallery.", default=48, min=1)
    galleryBands = ListField[str](
        doc="Bands shown red, green and blue; objects that lack one are shown in grey.",
        default=["i", "r", "g"],
        length=3,
    )
    galleryColumns = RangeField(
        dtype=int, doc="Number of candidates in a row of the gallery.", default=8, min=1
    )


class RankLensCandidatesTask(PipelineTask):
    """Merge the lens candidates of the patches of a tract, and rank them.

    Patches overlap, so that an object near their border may have been looked
    at more than once.  Rows are the same object if they have the same ID,
    or come from different patches and are closer than
    ``config.matchRadius``; the closest rows are matched first, and two
    objects of one patch never become one.  Of the rows of an object the
    first of these is kept: with a score, in the inner region of its patch,
    with the fewest flags, the fewest masked pixels, the highest score.
    """

    ConfigClass: ClassVar[type[RankLensCandidatesConfig]] = RankLensCandidatesConfig
    _DefaultName: ClassVar[str] = "rankLensCandidates"
    config: RankLensCandidatesConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        inputs = butlerQC.get(inputRefs)
        outputs = self.run(
            [handle.get() for handle in inputs["candidates"]],
            # One at a time: the stamps of a tract need gigabytes.
            (handle.get() for handle in inputs["cutouts"]),
        )
        butlerQC.put(outputs, outputRefs)

    def run(self, candidates: Sequence[Table], cutouts: Iterable[Table] = ()) -> Struct:
        """Merge and rank the candidates of some patches.

        Parameters
        ----------
        candidates
            The table ``candidates`` of `LensFinderTask` for each patch.
        cutouts
            Its table ``cutouts`` for each patch, in any order.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``ranked``
                The columns of the input and ``rank``, each object once, the
                highest ``config.rankBy`` first and equal ones by ID; then
                those without a score, with rank -1, by ID
                (`astropy.table.Table`).
            ``gallery``
                Colour composites of the first ``config.nGallery`` of them
                (`matplotlib.figure.Figure`).

        Raises
        ------
        lsst.pipe.base.NoWorkFound
            Raised if there are no tables at all.
        """
        if not candidates:
            raise NoWorkFound("There are no tables of lens candidates.")
        rows = _stack(candidates)
        self._check_models(rows)
        merged = rows[_choose_rows(rows, self.config.rankBy, self.config.matchRadius)]
        ranked = self._rank(merged)

        n_ranked = int((ranked["rank"] > 0).sum())
        self.metadata["n_rows"] = len(rows)
        self.metadata["n_objects"] = len(merged)
        self.metadata["n_ranked"] = n_ranked
        self.log.info(
            "%d rows of %d patches are %d objects; ranked %d by %s, kept %d without a rank.",
            len(rows),
            len(candidates),
            len(merged),
            n_ranked,
            self.config.rankBy,
            len(ranked) - n_ranked,
        )
        return Struct(ranked=ranked, gallery=self._plot_gallery(ranked[:n_ranked], cutouts))

    def _check_models(self, rows: Table) -> None:
        """Warn if the scores cannot be compared with each other."""
        models = {(str(row["model_name"]), str(row["model_version"])) for row in rows[_first_of_models(rows)]}
        if len(models) > 1:
            self.log.warning(
                "The candidates were scored by different models (%s); their scores may not be comparable.",
                ", ".join(f"{name} {version}" for name, version in sorted(models)),
            )

    def _rank(self, merged: Table) -> Table:
        """Sort, cut and number the objects."""
        score = np.asarray(merged[self.config.rankBy], dtype=np.float64)
        scored = np.isfinite(score)
        if len(merged) and not scored.any():
            self.log.warning("No object has a %s; is rankBy what you want?", self.config.rankBy)
        order = np.lexsort((merged["objectId"], -np.where(scored, score, -np.inf)))
        best = order[: scored.sum()]
        if self.config.minScore is not None:
            best = best[score[best] >= self.config.minScore]
        best = best[: self.config.nRanked]
        rest = order[scored.sum() :] if self.config.keepUnscored else order[:0]
        ranked = merged[np.concatenate([best, rest])]
        rank = np.concatenate([np.arange(1, len(best) + 1), np.full(len(rest), -1)]).astype(np.int32)
        ranked.add_column(
            Column(
                rank,
                name="rank",
                description=f"Rank by {self.config.rankBy} in the tract, from 1; -1 without a score",
            ),
            index=0,
        )
        return ranked

    def _plot_gallery(self, best: Table, cutouts: Iterable[Table]) -> Figure:
        """Plot the best candidates of which there are cutouts."""
        from .plots import plot_gallery

        best = best[: self.config.nGallery]
        title = f"Lens candidates of tract {best['tract'][0]}" if len(best) else "Lens candidates"
        stamps, rows = _find_cutouts(best["objectId"], cutouts)
        if len(rows) < len(best):
            self.log.warning(
                "%d of the best %d candidates have no cutouts, so they are not in the gallery.",
                len(best) - len(rows),
                len(best),
            )
        return plot_gallery(
            stamps,
            ranks=best["rank"][rows],
            scores=best[self.config.rankBy][rows],
            bands=tuple(self.config.galleryBands),
            n_columns=self.config.galleryColumns,
            title=title,
            score_name=self.config.rankBy,
            empty_text="no cutouts of the candidates" if len(best) else "no candidates",
        )


def _stack(tables: Sequence[Table]) -> Table:
    """Join the tables of patches, of which any may be empty."""
    filled = [table for table in tables if len(table)]
    if not filled:
        return tables[0].copy()
    return vstack(filled, join_type="exact", metadata_conflicts="silent")


def _first_of_models(rows: Table) -> np.ndarray:
    """Return a row of each model name and version."""
    if not len(rows):
        return np.arange(0)
    names = np.stack([np.asarray(rows[name], dtype=str) for name in ("model_name", "model_version")], axis=1)
    return np.unique(names, axis=0, return_index=True)[1]


def _choose_rows(rows: Table, rank_by: str, match_radius: float) -> np.ndarray:
    """Return one row of each object.

    Parameters
    ----------
    rows
        Candidates of all patches.
    rank_by
        Column with the score.
    match_radius
        Largest distance in arcsec of the rows of an object that have
        different IDs.
    """
    identity = _identify_objects(rows, match_radius)
    score = np.asarray(rows[rank_by], dtype=np.float64)
    n_flags = np.zeros(len(rows), dtype=int)
    for name in rows.colnames:
        if name.startswith("flag_"):
            n_flags += np.asarray(rows[name], dtype=bool)
    preference = np.lexsort(
        (
            rows["patch"],
            rows["objectId"],
            -np.nan_to_num(score, nan=-np.inf),
            np.nan_to_num(rows["masked_fraction"], nan=np.inf),
            n_flags,
            ~np.asarray(rows["patch_inner"], dtype=bool),
            ~np.isfinite(score),
        )
    )
    _, first = np.unique(identity[preference], return_index=True)
    return preference[first]


def _identify_objects(rows: Table, match_radius: float) -> np.ndarray:
    """Return a number for each row, the same for rows of one object."""
    patch = np.asarray(rows["patch"])
    object_ids, identity = np.unique(np.asarray(rows["objectId"]), return_inverse=True)
    parent = np.arange(len(object_ids))
    patches: dict[int, set[int]] = defaultdict(set)
    for row, number in enumerate(identity):
        patches[int(number)].add(int(patch[row]))

    def find(number: int) -> int:
        while parent[number] != number:
            number = int(parent[number])
        return number

    for i, j in _find_close_pairs(rows, match_radius):
        if patch[i] == patch[j]:
            continue
        a, b = find(int(identity[i])), find(int(identity[j]))
        if a != b and patches[a].isdisjoint(patches[b]):
            parent[b] = a
            patches[a] |= patches.pop(b)
    return np.array([find(int(number)) for number in identity], dtype=np.int64)


def _find_close_pairs(rows: Table, radius: float) -> np.ndarray:
    """Return pairs of rows on the sky, the closest first, shape ``(P, 2)``.

    Parameters
    ----------
    rows
        Table with coordinates; rows that have none have no neighbours.
    radius
        Largest distance in arcsec.
    """
    ra, dec = (np.radians(np.asarray(rows[name], dtype=np.float64)) for name in ("coord_ra", "coord_dec"))
    known = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    if radius == 0 or not len(known):
        return np.zeros((0, 2), dtype=np.int64)
    vectors = np.stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)], axis=1)[known]
    # Chords are as good as angles over an arcminute.
    pairs = cKDTree(vectors).query_pairs(np.radians(radius / 3600), output_type="ndarray")
    distance = np.linalg.norm(vectors[pairs[:, 0]] - vectors[pairs[:, 1]], axis=1)
    pairs = known[pairs]
    object_id = np.sort(np.asarray(rows["objectId"])[pairs], axis=1)
    return pairs[np.lexsort((object_id[:, 1], object_id[:, 0], distance))]


def _find_cutouts(object_ids: np.ndarray, tables: Iterable[Table]) -> tuple[Cutouts | None, np.ndarray]:
    """Find the stamps of some objects.

    Parameters
    ----------
    object_ids
        IDs of the objects.
    tables
        Tables of cutouts, of which any may be empty.

    Returns
    -------
    cutouts
        Stamps in the order of ``object_ids``, or `None` if there are none.
    found
        Indices of the objects that have a stamp, in the same order.
    """
    object_ids = np.asarray(object_ids)
    parts = []
    for table in tables:
        wanted = np.isin(np.asarray(table["ids"]), object_ids)
        if wanted.any():
            parts.append(Cutouts.from_table(table[wanted]))
    if not parts:
        return None, np.arange(0)
    cutouts = Cutouts.concatenate(parts)
    # Of the stamps of an object in two patches, the more complete one.
    order = np.argsort(cutouts.masked_fraction.max(axis=1), kind="stable")
    ids, first = np.unique(cutouts.ids[order], return_index=True)
    stamp_of = dict(zip(ids.tolist(), order[first].tolist(), strict=True))
    found = np.array([k for k, object_id in enumerate(object_ids.tolist()) if object_id in stamp_of])
    return cutouts[np.array([stamp_of[object_id] for object_id in object_ids[found].tolist()])], found

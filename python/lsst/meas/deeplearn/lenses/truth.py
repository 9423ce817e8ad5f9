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

"""Compare lens candidates with the lenses that were put into the images."""

from __future__ import annotations

__all__ = ("RecoveredLenses", "count_recovered", "describe_recovery", "match_truth")

import dataclasses

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import Table

MATCH_RADIUS = 1.0
"""Largest distance in arcsec between a candidate and the lens that it is."""


@dataclasses.dataclass(frozen=True)
class RecoveredLenses:
    """How many lenses stand among the first candidates of each patch."""

    n_lenses: int
    """Number of lenses, each counted once."""

    n_selected: int
    """Number of them that are among the candidates at all."""

    n_recovered: dict[str, int]
    """Number of them among the first candidates, by the column of rank."""

    n_chance: float
    """Number expected among as many candidates drawn at random."""


def match_truth(candidates: Table, truth: Table, radius: float = MATCH_RADIUS) -> np.ndarray:
    """Return the row of ``truth`` that each candidate is, or -1.

    Parameters
    ----------
    candidates
        Table with ``coord_ra`` and ``coord_dec`` in degrees.
    truth
        Table with ``ra`` and ``dec`` in degrees of the lens galaxies.
    radius
        Largest distance in arcsec.
    """
    if len(candidates) == 0 or len(truth) == 0:
        return np.full(len(candidates), -1)
    index, distance, _ = SkyCoord(
        np.asarray(candidates["coord_ra"]), np.asarray(candidates["coord_dec"]), unit=u.deg
    ).match_to_catalog_sky(SkyCoord(np.asarray(truth["ra"]), np.asarray(truth["dec"]), unit=u.deg))
    return np.where(distance.arcsec <= radius, index, -1)


def count_recovered(
    candidates: Table,
    truth: Table,
    *,
    columns: tuple[str, ...] = ("score", "ringfinder_snr"),
    n_first: int = 50,
    min_einstein_radius: float = 1.0,
) -> RecoveredLenses:
    """Count the lenses among the first candidates of each patch.

    Parameters
    ----------
    candidates
        Table of `RankLensCandidatesTask` or `LensFinderTask`.
    truth
        Table with ``ra`` and ``dec`` in degrees and ``einstein_radius`` in
        arcsec; a lens that lies in two patches may stand in it twice.
    columns
        Columns by which candidates are ranked, the highest first.
    n_first
        Number of candidates of each patch that are looked at.
    min_einstein_radius
        Smallest Einstein radius in arcsec of the lenses that count.
    """
    truth = truth[np.asarray(truth["einstein_radius"]) > min_einstein_radius]
    truth = truth[np.unique(np.asarray(truth["lens_id"]), return_index=True)[1]]
    lens = match_truth(candidates, truth)
    patches = [np.flatnonzero(candidates["patch"] == patch) for patch in np.unique(candidates["patch"])]

    def count(rows: np.ndarray) -> int:
        return len(set(lens[rows]) - {-1})

    recovered = {}
    for column in columns:
        value = np.nan_to_num(np.asarray(candidates[column], dtype=np.float64), nan=-np.inf)
        first = [rows[np.argsort(-value[rows], kind="stable")[:n_first]] for rows in patches]
        recovered[column] = sum(count(rows[np.isfinite(value[rows])]) for rows in first)
    chance = sum(count(rows) * min(1.0, n_first / len(rows)) for rows in patches)
    return RecoveredLenses(
        n_lenses=len(truth),
        n_selected=count(np.arange(len(candidates))),
        n_recovered=recovered,
        n_chance=chance,
    )


def describe_recovery(candidates: Table, truth: Table, *, n_best: int = 10, n_first: int = 50) -> str:
    """Return a text with the best candidates and how many lenses were found.

    Parameters
    ----------
    candidates
        Table of `RankLensCandidatesTask`, the best first.
    truth
        Table of the lenses; see `count_recovered`.
    n_best
        Number of candidates to list.
    n_first
        Number of candidates of each patch among which lenses are counted.
    """
    best = candidates[:n_best]
    lens = match_truth(best, truth)
    table = best[
        [name for name in ("rank", "objectId", "patch", "score", "ringfinder_snr") if name in best.colnames]
    ]
    table["ra"] = [f"{ra:.5f}" for ra in best["coord_ra"]]
    table["dec"] = [f"{dec:+.5f}" for dec in best["coord_dec"]]
    table["truth"] = [
        f'lens, Einstein radius {truth["einstein_radius"][row]:.2f}"' if row >= 0 else "not a lens"
        for row in lens
    ]
    names = {"score": "DeepLens", "ringfinder_snr": "RingFinder"}
    ran = tuple(column for column in names if np.isfinite(candidates[column]).any())
    counts = count_recovered(candidates, truth, columns=ran, n_first=n_first)
    lines = [
        f"The {len(best)} best of {len(candidates)} candidates:",
        *table.pformat(max_lines=-1, max_width=-1),
        "",
        f'Lenses with an Einstein radius > 1": {counts.n_lenses} injected, {counts.n_selected} of them among '
        "the objects that were looked at.",
        f"Among the first {n_first} of each patch:",
        *(f"  by {names[column]:12}{found:5d}" for column, found in counts.n_recovered.items()),
        f"  by chance      {counts.n_chance:5.1f}",
    ]
    return "\n".join(lines)

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

"""Which candidates go onto an inspection page, from a butler repository.

Besides the best candidates these are others whose truth is known, so that
voters can be weighed: see `lsst.meas.deeplearn.lenses.visual_inspection`.
"""

from __future__ import annotations

__all__ = (
    "choose_candidates",
    "find_injected_lenses",
    "read_candidates",
    "read_cutout_ids",
    "read_cutouts",
    "read_examples",
)

import dataclasses
import hashlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
from astropy.table import Table, vstack

from ..cutouts import Cutouts
from .truth import match_truth
from .visual_inspection import InspectionPageError, crop_cutouts

if TYPE_CHECKING:
    from lsst.daf.butler import Butler, DatasetRef


def read_candidates(
    butler: Butler,
    dataset_type: str,
    collections: Sequence[str],
    *,
    where: str = "",
    order_by: str = "rank",
) -> tuple[Table, str]:
    """Read the candidates of some tracts in the order of a column.

    Parameters
    ----------
    butler
        A butler.
    dataset_type
        Name of the dataset type, such as ``lens_candidates_ranked``.
    collections
        Collections to search.
    where
        Which tracts, as a query expression; all by default.
    order_by
        Column to order by, from 1; others than these come last.

    Returns
    -------
    candidates
        Table in the order of the column.
    skymap
        Name of the sky map.

    Raises
    ------
    InspectionPageError
        Raised if there are none, if they are on several sky maps, or if
        they lack the column.
    """
    refs, tables = _read_tables(butler, dataset_type, collections, where)
    skymaps = {str(ref.dataId["skymap"]) for ref in refs}
    if len(skymaps) > 1:
        raise InspectionPageError(f"Candidates of several sky maps, {sorted(skymaps)}; choose with --where.")
    table = vstack([part for part in tables if len(part)] or tables[:1], metadata_conflicts="silent")
    if order_by not in table.colnames:
        raise InspectionPageError(f"{dataset_type} has no column {order_by!r}, but {table.colnames}.")
    place = np.asarray(table[order_by], dtype=np.float64)
    order = np.argsort(np.where(place > 0, place, np.inf), kind="stable")
    return table[order], skymaps.pop()


def read_cutout_ids(
    butler: Butler, dataset_type: str, collections: Sequence[str], *, where: str = ""
) -> np.ndarray:
    """Return the IDs of all objects that have a stamp.

    Parameters
    ----------
    butler
        A butler.
    dataset_type
        Name of the dataset type, such as ``lens_cutouts``.
    collections
        Collections to search.
    where
        Which tracts, as a query expression; all by default.

    Raises
    ------
    InspectionPageError
        Raised if there are no stamps at all.
    """
    refs = _find_tables(butler, dataset_type, collections, where)
    tables = [butler.get(ref, parameters={"columns": ["ids"]}) for ref in refs]
    return np.concatenate([np.asarray(table["ids"]) for table in tables])


def choose_candidates(
    candidates: Table, ids: np.ndarray, *, best: int, known: Collection[int] = ()
) -> tuple[Table, int]:
    """Choose the first candidates that can be shown, and known ones.

    Parameters
    ----------
    candidates
        Table with ``objectId``, the best first.
    ids
        IDs of the objects that have a stamp.
    best
        Largest number of candidates.
    known
        IDs of candidates whose truth is known; all of these that have a
        stamp are taken, besides the best others.

    Returns
    -------
    chosen
        Rows of the table, in its order.
    n_passed_over
        Number of candidates without a stamp that stand before the last of
        the chosen others.
    """
    object_ids = np.asarray(candidates["objectId"])
    shown = np.isin(object_ids, ids)
    is_known = np.isin(object_ids, np.array(sorted(known), dtype=np.int64))
    others = np.flatnonzero(shown & ~is_known)[:best]
    n_passed_over = int((~shown[: others[-1]]).sum()) if len(others) else 0
    rows = np.sort(np.concatenate([others, np.flatnonzero(shown & is_known)]))
    return candidates[rows], n_passed_over


def read_cutouts(
    butler: Butler, dataset_type: str, collections: Sequence[str], candidates: Table, *, where: str = ""
) -> Cutouts:
    """Read the stamps of candidates.

    Parameters
    ----------
    butler
        A butler.
    dataset_type
        Name of the dataset type, such as ``lens_cutouts``.
    collections
        Collections to search.
    candidates
        Table with ``objectId``.
    where
        Which tracts, as a query expression; all by default.

    Returns
    -------
    stamps
        Stamps of those candidates that have any, in any order, without PSF
        kernels.

    Raises
    ------
    InspectionPageError
        Raised if none of the candidates has one.
    """
    ids = np.asarray(candidates["objectId"])
    parts = []
    # One at a time: the stamps of a tract need gigabytes.
    for ref in butler.query_datasets(dataset_type, collections, where=where, explain=False):
        table = butler.get(ref)
        wanted = np.isin(np.asarray(table["ids"]), ids)
        if wanted.any():
            parts.append(_drop_psf(Cutouts.from_table(table[wanted])))
    if not parts:
        raise InspectionPageError(f"None of the {len(ids)} candidates has a stamp in {dataset_type}.")
    return Cutouts.concatenate(parts)


def find_injected_lenses(
    butler: Butler, dataset_type: str, collections: Sequence[str], candidates: Table, *, where: str = ""
) -> dict[int, bool]:
    """Find the candidates that are injected lenses.

    Parameters
    ----------
    butler
        A butler.
    dataset_type
        Name of the dataset type, such as ``lens_truth``.
    collections
        Collections to search.
    candidates
        Table with ``objectId``, ``coord_ra`` and ``coord_dec``.
    where
        Which tracts, as a query expression; all by default.

    Returns
    -------
    truth
        True for each of them, by its ID.

    Raises
    ------
    InspectionPageError
        Raised if there are no tables of injected lenses.
    """
    lenses = vstack(_read_tables(butler, dataset_type, collections, where)[1], metadata_conflicts="silent")
    return dict.fromkeys(candidates["objectId"][match_truth(candidates, lenses) >= 0].tolist(), True)


def read_examples(
    butler: Butler,
    dataset_type: str,
    collections: Sequence[str],
    candidates: Table,
    cutouts: Cutouts,
    *,
    number: int,
    where: str = "",
    seed: int = 1,
) -> tuple[Table, Cutouts, dict[int, bool]]:
    """Read simulated lenses and non-lenses to mix in among candidates.

    Parameters
    ----------
    butler
        A butler.
    dataset_type
        Name of the dataset type that `SimulateLensesTask` writes, such as
        ``lens_training_cutouts``.
    collections
        Collections to search.
    candidates
        The candidates of the page.
    cutouts
        Their stamps; examples are cropped to these.
    number
        Number of lenses, and of non-lenses, as far as there are so many.
    where
        Which tracts, as a query expression; all by default.
    seed
        Seed of the choice.

    Returns
    -------
    examples
        The examples with the columns of ``candidates``.  They have IDs that
        look like those of candidates.  No galaxy is among the examples
        twice, or among the candidates.
    stamps
        Their stamps.
    truth
        Whether each is a lens, by its ID.

    Raises
    ------
    InspectionPageError
        Raised if there are no examples, or if they lack a band or have
        smaller stamps or other pixels than the candidates.
    """
    refs = _find_tables(butler, dataset_type, collections, where)
    chosen = _choose_examples(_list_examples(butler, refs), candidates, number, seed)
    if not len(chosen):
        raise InspectionPageError(f"{dataset_type} has no example that is not among the candidates.")
    parts = []
    for k in np.unique(np.asarray(chosen["dataset"])).tolist():
        table = butler.get(refs[k])[chosen["row"][chosen["dataset"] == k]]
        parts.append(_fit_stamps(Cutouts.from_table(table), cutouts))
    ids = _make_example_ids(chosen, np.asarray(candidates["objectId"], dtype=np.int64))
    stamps = dataclasses.replace(Cutouts.concatenate(parts), ids=ids)
    examples = _make_rows(candidates, len(ids))
    for name, values in (
        ("objectId", ids),
        ("coord_ra", stamps.ra),
        ("coord_dec", stamps.dec),
        ("tract", chosen["tract"]),
        ("patch", chosen["patch"]),
        ("masked_fraction", stamps.masked_fraction.max(axis=1)),
    ):
        if name in examples.colnames:
            examples[name][:] = values
    return examples, stamps, dict(zip(ids.tolist(), np.asarray(chosen["label"], bool).tolist(), strict=True))


def _list_examples(butler: Butler, refs: Sequence[DatasetRef]) -> Table:
    """Return what examples there are, without their pixels."""
    columns = ["ra", "dec", "label", "kind", "host_id", "source_id"]
    parts = []
    for k, ref in enumerate(refs):
        part = butler.get(ref, parameters={"columns": columns})
        part["dataset"], part["row"] = k, np.arange(len(part))
        for name in ("tract", "patch"):
            part[name] = int(ref.dataId[name])
        parts.append(part)
    return vstack(parts, metadata_conflicts="silent")


def _choose_examples(listed: Table, candidates: Table, number: int, seed: int) -> Table:
    """Choose lenses and as many non-lenses, no galaxy twice.

    As a rule a galaxy is there with several arcs, and without any.
    """
    shuffled = listed[np.random.default_rng(seed).permutation(len(listed))]
    shuffled = shuffled[np.sort(np.unique(np.asarray(shuffled["host_id"]), return_index=True)[1])]
    positions = Table({"coord_ra": shuffled["ra"], "coord_dec": shuffled["dec"]})
    taken = Table({"ra": candidates["coord_ra"], "dec": candidates["coord_dec"]})
    shuffled = shuffled[match_truth(positions, taken) < 0]
    is_lens = np.asarray(shuffled["label"], dtype=bool)
    rows = np.concatenate([np.flatnonzero(is_lens == kind)[:number] for kind in (True, False)])
    chosen = shuffled[rows]
    chosen.sort(["dataset", "row"])
    return chosen


def _make_example_ids(examples: Table, taken: np.ndarray) -> np.ndarray:
    """Return IDs that do not tell examples from candidates.

    Those of the same example among the same candidates are always the same.
    """
    used = set(taken.tolist())
    span = max(int(taken.max()) - int(taken.min()), 10**9) + 1
    ids = []
    for row in examples:
        salt = 0
        while True:
            text = f"{row['host_id']} {row['source_id']} {row['kind']} {row['tract']} {salt}"
            number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
            object_id = int(taken.min()) + number % span
            if object_id not in used:
                break
            salt += 1
        used.add(object_id)
        ids.append(object_id)
    return np.array(ids, dtype=np.int64)


def _fit_stamps(stamps: Cutouts, like: Cutouts) -> Cutouts:
    """Return stamps with the bands and the size of others."""
    lacking = [band for band in like.bands if band not in stamps.bands]
    scales_agree = np.isclose(stamps.pixel_scale, like.pixel_scale, rtol=1e-3)
    if lacking or stamps.size < like.size or (stamps.size - like.size) % 2 or not scales_agree:
        raise InspectionPageError(
            f"Examples of {','.join(stamps.bands)}, {stamps.size} pixels of {stamps.pixel_scale:.4f} arcsec, "
            f"cannot be shown among candidates of {','.join(like.bands)}, {like.size} pixels of "
            f"{like.pixel_scale:.4f} arcsec; set bands and stampSize of SimulateLensesTask."
        )
    return _drop_psf(crop_cutouts(stamps.select_bands(like.bands), like.size))


def _drop_psf(stamps: Cutouts) -> Cutouts:
    """Return stamps without PSF kernels, which no page shows."""
    return dataclasses.replace(stamps, psf=np.zeros((*stamps.psf.shape[:2], 0, 0), dtype=np.float32))


def _make_rows(like: Table, n: int) -> Table:
    """Return rows with the columns of a table in which nothing is known."""
    table = Table()
    for name in like.colnames:
        dtype = like[name].dtype
        nothing = {"f": np.nan, "i": -1}.get(dtype.kind)
        table[name] = np.zeros(n, dtype) if nothing is None else np.full(n, nothing, dtype)
    return table


def _find_tables(
    butler: Butler, dataset_type: str, collections: Sequence[str], where: str
) -> list[DatasetRef]:
    """Find the datasets of some tracts or patches, in order."""
    refs = butler.query_datasets(dataset_type, collections, where=where, explain=False)
    if not refs:
        raise InspectionPageError(
            f"There is no {dataset_type} in {', '.join(collections)}{' where ' if where else ''}{where}."
        )
    return sorted(refs, key=lambda ref: tuple(ref.dataId.required_values))


def _read_tables(
    butler: Butler, dataset_type: str, collections: Sequence[str], where: str
) -> tuple[list[DatasetRef], list[Table]]:
    """Read the datasets of some tracts or patches, in order."""
    refs = _find_tables(butler, dataset_type, collections, where)
    return refs, [butler.get(ref) for ref in refs]

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

"""Tables and files of people's votes on lens candidates.

A vote is a row with the columns of `VOTE_COLUMNS`.  Votes come as CSV from
the inspection page (`lsst.meas.deeplearn.lenses.visual_inspection`) and from
Zooniverse, and leave as the ballots of `lsst.meas.deeplearn.lenses.votes`.
"""

from __future__ import annotations

__all__ = (
    "GRADES",
    "LENS_GRADES",
    "NOT_GRADES",
    "VOTE_COLUMNS",
    "VotesError",
    "ingest_votes",
    "make_ballots",
    "make_votes",
    "read_truth",
    "read_votes",
    "read_zooniverse_votes",
    "select_last_votes",
    "stack_votes",
    "write_truth",
    "write_votes",
    "write_zooniverse_manifest",
)

import csv
import datetime
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy.table import Column, Table, vstack

from .votes import Ballots

if TYPE_CHECKING:
    from lsst.daf.butler import Butler

GRADES: Mapping[str, str] = {
    "A": "Sure lens",
    "B": "Probable lens",
    "C": "Possible lens",
    "N": "Not a lens",
    "U": "Unsure",
}
"""The grades that the inspection page offers, and what they mean."""

LENS_GRADES, NOT_GRADES = ("A", "B"), ("C", "N")
"""Grades that count as votes for LENS and for NOT; the rest is no vote.  What
matters is only that a voter keeps to one meaning: agents absorb the rest."""

VOTE_COLUMNS: Mapping[str, tuple[str, str]] = {
    "objectId": ("i8", "ID of the candidate"),
    "skymap": ("U64", "Sky map of the candidate; empty if not known"),
    "tract": ("i8", "Tract of the candidate; -1 if not known"),
    "voter": ("U128", "Name that the voter gave"),
    "grade": ("U8", "A, B, C, N (not a lens) or U (unsure)"),
    "time": ("U32", "When the vote was cast, ISO 8601 in UTC"),
    "seconds": ("f4", "Time that the voter looked at the candidate in seconds; NaN if not known"),
    "saw_score": ("?", "Whether the score of the machine was shown before the vote"),
    "truth": ("i2", "1 of a known lens, 0 of a known non-lens, -1 if not known"),
}
"""Type and description of each column of ``lens_votes``."""

_CSV_COLUMNS = ("candidate_id", "skymap", "tract", "voter", "grade", "time", "seconds", "saw_score")


class VotesError(ValueError):
    """Votes that cannot be used."""


def make_votes(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Make a table of votes.

    Parameters
    ----------
    rows
        Votes, with ``objectId``, ``voter`` and ``grade`` and perhaps others
        of `VOTE_COLUMNS`.
    """
    rows = list(rows)
    defaults = {"skymap": "", "tract": -1, "time": "", "seconds": np.nan, "saw_score": False, "truth": -1}
    table = Table()
    for name, (dtype, description) in VOTE_COLUMNS.items():
        values = [row.get(name, defaults[name]) if name in defaults else row[name] for row in rows]
        table[name] = Column(np.array(values, dtype=dtype), description=description)
    return table


def stack_votes(tables: Sequence[Table]) -> Table:
    """Join tables of votes, of which there may be none.

    Parameters
    ----------
    tables
        Tables with the columns of `VOTE_COLUMNS`.
    """
    filled = [table for table in tables if len(table)]
    if not filled:
        return make_votes([])
    return vstack(filled, join_type="exact", metadata_conflicts="silent")


def select_last_votes(votes: Table) -> Table:
    """Keep the last vote of each voter on each candidate, in order of time.

    People change their minds, and hand in a file twice; the last word counts.

    Parameters
    ----------
    votes
        Table with the columns of `VOTE_COLUMNS`; of equal times, that
        further down is the later.
    """
    ordered = votes[np.argsort(np.asarray(votes["time"], dtype=str), kind="stable")]
    last: dict[tuple[str, int], int] = {}
    for row, key in enumerate(zip(ordered["voter"].tolist(), ordered["objectId"].tolist(), strict=True)):
        last[key] = row
    return ordered[sorted(last.values())]


def make_ballots(
    votes: Table,
    object_ids: np.ndarray,
    *,
    lens_grades: Iterable[str] = LENS_GRADES,
    not_grades: Iterable[str] = NOT_GRADES,
) -> Ballots:
    """Turn grades on candidates into votes LENS and NOT.

    Parameters
    ----------
    votes
        Table with the columns of `VOTE_COLUMNS`, in order of time.  Votes on
        candidates that are unknown are left out, but those of known truth
        are kept: they tell how good the voters are.
    object_ids
        IDs of the candidates, shape ``(N,)``, each once.
    lens_grades, not_grades
        Grades that count as LENS and as NOT; others are no vote.

    Returns
    -------
    ballots
        Its first N subjects are the candidates; subjects of known truth
        that are none of them follow.

    Raises
    ------
    VotesError
        Raised if the table says of a candidate both that it is a lens and
        that it is not.
    """
    ids = np.asarray(votes["objectId"], dtype=np.int64)
    truth = np.asarray(votes["truth"])
    object_ids = np.asarray(object_ids, dtype=np.int64)
    lenses, others = (set(ids[truth == value].tolist()) for value in (1, 0))
    if lenses & others:
        raise VotesError(f"Candidates {sorted(lenses & others)} are known as lenses and as non-lenses.")
    extra = np.setdiff1d(np.array(sorted(lenses | others), dtype=np.int64), object_ids)
    all_ids = np.concatenate([object_ids, extra])
    index = {object_id: k for k, object_id in enumerate(all_ids.tolist())}
    if len(index) < len(all_ids):
        raise ValueError("An object ID stands more than once among the candidates.")
    grade = np.asarray(votes["grade"], dtype=str)
    says_lens = np.isin(grade, list(lens_grades))
    counts = (says_lens | np.isin(grade, list(not_grades))) & np.isin(ids, all_ids)
    voters, voter = np.unique(np.asarray(votes["voter"], dtype=str)[counts], return_inverse=True)
    subject_truth = np.full(len(all_ids), -1, dtype=np.int8)
    subject_truth[[index[object_id] for object_id in lenses]] = 1
    subject_truth[[index[object_id] for object_id in others]] = 0
    return Ballots(
        voters=tuple(voters.tolist()),
        voter=voter.astype(np.int64),
        subject=np.array([index[object_id] for object_id in ids[counts].tolist()], dtype=np.int64),
        says_lens=says_lens[counts],
        truth=subject_truth,
    )


def read_votes(
    path: Path | str,
    *,
    truth: Mapping[int, bool] | None = None,
    on_error: Callable[[str], object] | None = None,
) -> Table:
    """Read the votes that the inspection page exports.

    Parameters
    ----------
    path
        CSV file in UTF-8 with the columns ``candidate_id``, ``voter``,
        ``grade`` and ``time``, and perhaps ``skymap``, ``tract``,
        ``seconds`` and ``saw_score``.
    truth
        Whether candidates are lenses, by their ID, where that is known.
    on_error
        Called with a message for each line that cannot be read, which is
        then left out; by default the first one is an error.

    Returns
    -------
    votes
        Table with the columns of `VOTE_COLUMNS`, in the order of the file.
        A file with nothing but a header has no rows.

    Raises
    ------
    VotesError
        Raised if the file is no such CSV file; it says in which line.
    """
    truth = truth or {}

    def parse(row: Mapping[str, str]) -> dict[str, Any]:
        object_id = _parse_int(row["candidate_id"])
        return {
            "objectId": object_id,
            "skymap": row.get("skymap", ""),
            "tract": _parse_int(row.get("tract") or "-1"),
            "voter": _parse_name(row["voter"]),
            "grade": _parse_grade(row["grade"]),
            "time": _parse_time(row["time"]),
            "seconds": float(row.get("seconds") or "nan"),
            "saw_score": row.get("saw_score", "").strip().lower() in ("1", "true"),
            "truth": int(truth.get(object_id, -1)),
        }

    return make_votes(_parse_csv(path, ("candidate_id", "voter", "grade", "time"), parse, on_error))


def write_votes(votes: Table, path: Path | str) -> None:
    """Write votes as `read_votes` reads them; truth is left out.

    Parameters
    ----------
    votes
        Table with the columns of `VOTE_COLUMNS`.
    path
        File to write.
    """
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV_COLUMNS)
        for row in votes:
            seconds = "" if np.isnan(row["seconds"]) else f"{row['seconds']:.1f}"
            names = ("skymap", "tract", "voter", "grade", "time")
            writer.writerow([row["objectId"], *(row[name] for name in names), seconds, int(row["saw_score"])])


def read_truth(path: Path | str) -> dict[int, bool]:
    """Read which candidates are known to be lenses, or not to be.

    Parameters
    ----------
    path
        CSV file with the columns ``candidate_id`` and ``is_lens``, 1 or 0;
        the key that belongs to an inspection page.

    Raises
    ------
    VotesError
        Raised if the file is no such CSV file.
    """

    def parse(row: Mapping[str, str]) -> dict[str, Any]:
        if row["is_lens"].strip() not in ("0", "1"):
            raise ValueError(f"is_lens is {row['is_lens']!r}, not 1 or 0")
        return {"id": _parse_int(row["candidate_id"]), "is_lens": row["is_lens"].strip() == "1"}

    return {row["id"]: row["is_lens"] for row in _parse_csv(path, ("candidate_id", "is_lens"), parse, None)}


def write_truth(truth: Mapping[int, bool], path: Path | str) -> None:
    """Write which candidates are known to be lenses, or not to be.

    Parameters
    ----------
    truth
        Whether candidates are lenses, by their ID.
    path
        File to write.
    """
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("candidate_id", "is_lens"))
        writer.writerows((object_id, int(is_lens)) for object_id, is_lens in sorted(truth.items()))


def read_zooniverse_votes(
    path: Path | str,
    *,
    task: str = "T0",
    answers: Mapping[str, str] | None = None,
    id_key: str = "objectId",
    on_error: Callable[[str], object] | None = None,
) -> Table:
    """Read the classifications that Zooniverse exports.

    Parameters
    ----------
    path
        "Classification export" of a workflow.
    task
        Task of the workflow that asks whether it is a lens, also as a part
        of a combined task.  The answer of a drawing task is a lens wherever
        something is marked, as in Space Warps.
    answers
        Grade of each answer of a question task, as that of `GRADES`; by
        default the texts and letters of these.
    id_key
        Metadata of the subject with the ID of the candidate, hidden (``#``)
        or not.  The hidden ``is_lens`` is its truth, if there is one.
    on_error
        As in `read_votes`.

    Returns
    -------
    votes
        Table with the columns of `VOTE_COLUMNS`.

    Raises
    ------
    VotesError
        Raised if the file is no such export; it says in which line.
    """
    grades = {text: grade for grade, text in GRADES.items()} | {grade: grade for grade in GRADES}
    grades |= answers or {}

    def parse(row: Mapping[str, str]) -> dict[str, Any]:
        answers_given = _find_answers(json.loads(row["annotations"]), task)
        if not answers_given:
            raise ValueError(f"there is no answer to task {task!r}")
        answer = answers_given[0]
        # A question that allows several answers has a list of these.
        if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], str):
            (answer,) = answer
        if isinstance(answer, str) and answer in grades:
            grade = grades[answer]
        elif isinstance(answer, list) and all(isinstance(mark, dict) for mark in answer):
            grade = "A" if answer else "N"
        else:
            raise ValueError(f"the answer {answer!r} is none of {sorted(grades)}")
        (subject,) = json.loads(row["subject_data"]).values()
        metadata = {str(key).lstrip("#!/"): value for key, value in subject.items()}
        if id_key not in metadata:
            raise ValueError(f"the subject has no {id_key!r} but {sorted(metadata)}")
        return {
            "objectId": _parse_int(str(metadata[id_key])),
            "skymap": str(metadata.get("skymap") or ""),
            "tract": _parse_int(str(metadata.get("tract") or "-1")),
            "voter": _parse_name(row["user_name"]),
            "grade": grade,
            "time": _parse_time(row["created_at"]),
            "truth": {"0": 0, "1": 1}.get(str(metadata.get("is_lens")), -1),
        }

    needed = ("user_name", "created_at", "annotations", "subject_data")
    return make_votes(_parse_csv(path, needed, parse, on_error))


def _find_answers(annotations: list[dict[str, Any]], task: str) -> list[Any]:
    """Return the answers to a task, also to those in combined tasks."""
    answers = []
    for item in annotations:
        if item.get("task") == task:
            answers.append(item["value"])
        elif isinstance(item.get("value"), list):
            answers += _find_answers([part for part in item["value"] if isinstance(part, dict)], task)
    return answers


def write_zooniverse_manifest(
    folder: Path | str,
    candidates: Table,
    images: Mapping[str, Sequence[bytes]],
    *,
    skymap: str = "",
    truth: Mapping[int, bool] | None = None,
) -> Path:
    """Write images and a manifest to upload as Zooniverse subjects.

    The score is not among the metadata, as it must not sway the volunteers.

    Parameters
    ----------
    folder
        Folder to write to; it is made if needed.
    candidates
        Table with ``objectId`` and perhaps ``tract``, ``coord_ra`` and
        ``coord_dec``, which volunteers do not see.
    images
        PNG files of all candidates, by the name of the view; see
        `lsst.meas.deeplearn.lenses.visual_inspection.make_pictures`.
    skymap
        Name of the sky map.
    truth
        Whether candidates are lenses, by their ID, where that is known.
        Zooniverse hides it on its page, but not from those who look for it.

    Returns
    -------
    manifest
        Path of ``manifest.csv``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    columns = [name for name in ("objectId", "tract", "coord_ra", "coord_dec") if name in candidates.colnames]
    views = [re.sub(r"[^A-Za-z0-9]+", "_", view) for view in images]
    manifest = folder / "manifest.csv"
    with manifest.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        hidden = [*columns, *(["skymap"] if skymap else []), *(["is_lens"] if truth else [])]
        writer.writerow([*(f"image_{view}" for view in views), *(f"#{name}" for name in hidden)])
        for row, files in zip(candidates, zip(*images.values(), strict=True), strict=True):
            object_id = int(row["objectId"])
            names = [f"candidate_{object_id}_{view}.png" for view in views]
            for name, content in zip(names, files, strict=True):
                (folder / name).write_bytes(content)
            values = [str(row[name]) for name in columns] + ([skymap] if skymap else [])
            if truth:
                values.append(str(int(truth[object_id])) if object_id in truth else "")
            writer.writerow([*names, *values])
    return manifest


def ingest_votes(butler: Butler, votes: Table, *, run: str, dataset_type: str = "lens_votes") -> None:
    """Put votes into a repository, those on a tract as one dataset.

    Parameters
    ----------
    butler
        A writeable butler.
    votes
        Table with the columns of `VOTE_COLUMNS`.  All must tell their tract
        and its sky map.
    run
        RUN collection to put the votes into; it is made if needed.
    dataset_type
        Name of the dataset type; it is registered if needed.

    Raises
    ------
    VotesError
        Raised, and nothing written, if the repository lacks one of the
        tracts or has votes on it in this run already.
    """
    from lsst.daf.butler import DatasetType

    tracts = sorted(set(zip(votes["skymap"].tolist(), votes["tract"].tolist(), strict=True)))
    for skymap, tract in tracts:
        if not butler.query_dimension_records("tract", skymap=skymap, tract=tract, explain=False):
            raise VotesError(f"The repository has no tract {tract} of the sky map {skymap!r}.")
    butler.registry.registerDatasetType(
        DatasetType(dataset_type, ("skymap", "tract"), "ArrowAstropy", universe=butler.dimensions)
    )
    butler.collections.register(run)
    for skymap, tract in tracts:
        if butler.find_dataset(dataset_type, skymap=skymap, tract=tract, collections=run) is not None:
            raise VotesError(
                f"There are votes on tract {tract} in {run} already; give all files again, and another --run."
            )
    with butler.transaction():
        for skymap, tract in tracts:
            chosen = (votes["skymap"] == skymap) & (votes["tract"] == tract)
            butler.put(votes[chosen], dataset_type, skymap=skymap, tract=tract, run=run)


def _parse_csv(
    path: Path | str,
    needed: Sequence[str],
    parse: Callable[[Mapping[str, str]], dict[str, Any]],
    on_error: Callable[[str], object] | None,
) -> list[dict[str, Any]]:
    """Parse the rows of a CSV file, or say in which line it fails."""
    try:
        # Spreadsheets put a mark of the byte order first.
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as err:
        raise VotesError(f"{path} is not a text file in UTF-8: {err}.") from err
    if not text.strip():
        raise VotesError(f"{path} is empty; a file of votes has at least a header.")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        if missing := sorted(set(needed) - set(reader.fieldnames or ())):
            raise VotesError(f"{path} has no columns {missing}; it has {reader.fieldnames}.")
        for row in reader:
            try:
                if None in row or None in row.values():
                    raise ValueError("it has not as many fields as the header")
                rows.append(parse(row))
            except (ValueError, KeyError, TypeError, AttributeError) as err:
                message = f"{path}, line {reader.line_num}: {err}."
                if on_error is None:
                    raise VotesError(message) from err
                on_error(message)
    except csv.Error as err:
        raise VotesError(f"{path}, after line {reader.line_num}: {err}.") from err
    return rows


def _parse_int(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{text} is too large for an ID")
    return value


def _parse_name(text: str) -> str:
    name = " ".join(text.split())
    if not name:
        raise ValueError("the voter has no name")
    return name


def _parse_grade(text: str) -> str:
    grade = text.strip().upper()
    if grade not in GRADES:
        raise ValueError(f"the grade {text!r} is none of {', '.join(GRADES)}")
    return grade


def _parse_time(text: str) -> str:
    """Return a time as ISO 8601 in UTC, which sorts as text."""
    time = datetime.datetime.fromisoformat(text.strip().removesuffix(" UTC"))
    if time.tzinfo is not None:
        time = time.astimezone(datetime.UTC).replace(tzinfo=None)
    return time.isoformat(timespec="milliseconds") + "Z"

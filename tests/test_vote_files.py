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

"""Tests of tables and files of votes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table

from lsst.meas.deeplearn.lenses.vote_files import (
    GRADES,
    VOTE_COLUMNS,
    VotesError,
    make_ballots,
    make_votes,
    read_truth,
    read_votes,
    read_zooniverse_votes,
    select_last_votes,
    stack_votes,
    write_truth,
    write_votes,
    write_zooniverse_manifest,
)


def make_table(*rows: tuple[int, str, str, str], truth: dict[int, int] | None = None) -> Table:
    """Make votes from tuples of ID, voter, grade and second."""
    return make_votes(
        {
            "objectId": object_id,
            "voter": voter,
            "grade": grade,
            "time": f"2026-11-23T10:00:{second}.000Z",
            "truth": (truth or {}).get(object_id, -1),
        }
        for object_id, voter, grade, second in rows
    )


def test_csv_round_trip(tmp_path: Path) -> None:
    """Votes come back as they were written, whatever the name."""
    name = 'Åsa "Å", <script>alert(1)</script>\' OR 1=1'
    votes = make_votes(
        [
            {"objectId": 2**62, "voter": name, "grade": "A", "time": "2026-11-23T10:00:00.000Z",
             "tract": 9813, "skymap": "lsst_cells_v2", "seconds": 3.5, "saw_score": True},
            {"objectId": -1, "voter": "b", "grade": "U", "time": "2026-11-23T10:00:01.000Z"},
        ]
    )  # fmt: skip
    write_votes(votes, tmp_path / "votes.csv")
    back = read_votes(tmp_path / "votes.csv", truth={2**62: True})
    assert back.colnames == list(VOTE_COLUMNS)
    for column in ("objectId", "voter", "grade", "time", "tract", "skymap", "saw_score"):
        assert back[column].tolist() == votes[column].tolist()
    np.testing.assert_array_equal(back["seconds"], votes["seconds"])
    assert back["truth"].tolist() == [1, -1]
    assert len(stack_votes([votes, back, votes[:0]])) == 4
    assert stack_votes([]).colnames == list(VOTE_COLUMNS)


def test_times_are_in_utc(tmp_path: Path) -> None:
    """Times with an offset are turned into UTC, so that they sort."""
    path = tmp_path / "votes.csv"
    path.write_text(
        "\ufeffcandidate_id,voter,grade,time,notes\n1, a  b ,a,2026-11-23T10:00:00+02:00,x\n"
        "1,a b,n,2026-11-23 09:00\n".replace("09:00\n", "09:00,\n"),
        encoding="utf-8",
    )
    votes = read_votes(path)
    assert votes["time"].tolist() == ["2026-11-23T08:00:00.000Z", "2026-11-23T09:00:00.000Z"]
    assert votes["voter"].tolist() == ["a b", "a b"]
    assert select_last_votes(votes)["grade"].tolist() == ["N"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\xff", "not a text file"),
        (b"id,vote\n1,2\n", r"no columns \['candidate_id'"),
        (b"candidate_id,voter,grade,time\n1,a,A\n", "line 2: it has not as many fields"),
        (b"candidate_id,voter,grade,time\n1,a,A,2026-01-01,5\n", "line 2: it has not as many fields"),
        (b"candidate_id,voter,grade,time\nx,a,A,2026-01-01\n", "line 2: invalid literal"),
        (b"candidate_id,voter,grade,time\n99999999999999999999,a,A,2026-01-01\n", "too large"),
        (b"candidate_id,voter,grade,time\n1,a,A,2026-01-01\n1,a,D,2026-01-01\n", "line 3: the grade 'D'"),
        (b"candidate_id,voter,grade,time\n1, ,A,2026-01-01\n", "line 2: the voter has no name"),
        (b"candidate_id,voter,grade,time\n1,a,A,yesterday\n", "line 2: Invalid isoformat"),
        (b'candidate_id,voter,grade,time\n1,"a"b,A,2026-01-01\n', "after line 1: ',' expected"),
        (b'candidate_id,voter,grade,time\n1,"a,A,2026-01-01\n', "unexpected end of data"),
    ],
)
def test_broken_csv(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that cannot be used says where it is broken."""
    path = tmp_path / "votes.csv"
    path.write_bytes(content)
    with pytest.raises(VotesError, match=message):
        read_votes(path)


def test_broken_lines_can_be_left_out(tmp_path: Path) -> None:
    """The other votes of a file with a broken line are not lost."""
    path = tmp_path / "votes.csv"
    path.write_text("candidate_id,voter,grade,time\n1,a,A,2026-01-01\n2,a\n3,a,B,2026-01-02\n")
    messages: list[str] = []
    assert read_votes(path, on_error=messages.append)["objectId"].tolist() == [1, 3]
    assert len(messages) == 1
    assert "line 3" in messages[0]
    path.write_text("candidate_id,voter,grade,time\n")
    assert len(read_votes(path)) == 0


def test_last_votes() -> None:
    """Of a voter's votes on a candidate the last one counts."""
    votes = make_table(
        (1, "a", "A", "20"),
        (1, "a", "N", "10"),
        (1, "b", "N", "05"),
        (1, "a", "B", "20"),
        (2, "a", "U", "00"),
    )
    last = select_last_votes(votes)
    assert list(zip(last["objectId"], last["voter"], last["grade"], strict=True)) == [
        (2, "a", "U"),
        (1, "b", "N"),
        (1, "a", "B"),
    ]
    assert len(select_last_votes(votes[:0])) == 0


def test_ballots() -> None:
    """Unknown candidates are left out, known truth stays, U is no vote."""
    votes = make_table(
        (5, "b", "A", "01"),
        (7, "a", "C", "02"),
        (99, "a", "A", "03"),
        (40, "a", "B", "04"),
        (5, "a", "U", "05"),
        truth={40: 1, 7: 0},
    )
    ballots = make_ballots(votes, np.array([7, 5]))
    assert ballots.voters == ("a", "b")
    assert ballots.subject.tolist() == [1, 0, 2]
    assert ballots.voter.tolist() == [1, 0, 0]
    assert ballots.says_lens.tolist() == [True, False, True]
    assert ballots.truth.tolist() == [0, -1, 1]
    assert ballots.n_votes.tolist() == [1, 1, 1]
    assert make_ballots(votes, np.array([5]), lens_grades="U", not_grades="A").says_lens.tolist() == [
        False,
        True,
    ]
    assert len(make_ballots(votes[:0], np.array([5]))) == 0
    with pytest.raises(VotesError, match="known as lenses and as non-lenses"):
        make_ballots(stack_votes([votes, make_table((40, "c", "A", "05"), truth={40: 0})]), np.array([5]))
    with pytest.raises(ValueError, match="more than once"):
        make_ballots(votes, np.array([5, 5]))


def test_truth_round_trip(tmp_path: Path) -> None:
    """The key of a page comes back as it was written."""
    path = tmp_path / "key.csv"
    write_truth({3: True, 1: False}, path)
    assert read_truth(path) == {3: True, 1: False}
    path.write_text("candidate_id,is_lens\n1,maybe\n")
    with pytest.raises(VotesError, match="line 2: is_lens is 'maybe'"):
        read_truth(path)


def write_export(path: Path, *rows: tuple[str, object, dict[str, str]]) -> None:
    """Write an export of Zooniverse with the columns that matter."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["classification_id", "user_name", "created_at", "annotations", "subject_data"])
        for k, (user, answer, metadata) in enumerate(rows):
            annotations = [{"task": "T1", "value": "x"}, {"task": "T0", "value": answer}]
            writer.writerow(
                [k, user, f"2026-01-01 00:00:0{k} UTC", json.dumps(annotations), json.dumps({"77": metadata})]
            )


def test_zooniverse(tmp_path: Path) -> None:
    """A manifest names every image, and the export of a campaign with it is
    read back.
    """
    candidates = Table({"objectId": [11, 12], "coord_ra": [150.0, 150.1], "score": [0.9, 0.1]})
    manifest = write_zooniverse_manifest(
        tmp_path / "subjects",
        candidates,
        {"colour, faint": [b"a", b"b"], "g": [b"c", b"d"]},
        skymap="sky",
        truth={12: True},
    )
    with manifest.open() as file:
        rows = list(csv.DictReader(file))
    assert (manifest.parent / rows[1]["image_colour_faint"]).read_bytes() == b"b"
    assert rows[0]["#objectId"] == "11"
    assert "0.9" not in manifest.read_text()

    path = tmp_path / "export.csv"
    subjects = [{key: value for key, value in row.items() if key.startswith("#")} for row in rows]
    write_export(path, ("x", GRADES["A"], subjects[0]), ("y", "No", subjects[1]), ("x", [], subjects[1]))
    votes = read_zooniverse_votes(path, answers={"No": "N"})
    assert votes["objectId"].tolist() == [11, 12, 12]
    assert votes["grade"].tolist() == ["A", "N", "N"]
    assert votes["truth"].tolist() == [-1, 1, 1]
    assert votes["skymap"][0] == "sky"
    assert votes["time"][1] == "2026-01-01T00:00:01.000Z"
    # A question with several answers, a part of a combined task, no answer.
    write_export(path, ("x", ["Not a lens"], subjects[0]), ("y", "A", subjects[1]), ("z", None, subjects[1]))
    messages: list[str] = []
    assert read_zooniverse_votes(path, on_error=messages.append)["grade"].tolist() == ["N", "A"]
    assert "line 4: the answer None is none of" in messages[0]
    combined = [{"task": "T7", "value": [{"task": "T5", "value": "B"}]}]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_name", "created_at", "annotations", "subject_data"])
        writer.writerow(["x", "2026-01-01", json.dumps(combined), json.dumps({"1": subjects[0]})])
    assert read_zooniverse_votes(path, task="T5")["grade"].tolist() == ["B"]
    write_export(path, ("x", GRADES["A"], subjects[0]), ("y", "No", subjects[1]))
    with pytest.raises(VotesError, match="line 3: the answer 'No' is none of"):
        read_zooniverse_votes(path)
    with pytest.raises(VotesError, match="no answer to task 'T9'"):
        read_zooniverse_votes(path, task="T9")
    with pytest.raises(VotesError, match="has no 'name'"):
        read_zooniverse_votes(path, answers={"No": "N"}, id_key="name")

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

"""Tests of the fusion of scores and votes."""

import logging
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.table import Table, vstack
from scipy.special import expit, logit

from lsst.daf.butler import Butler, DatasetType
from lsst.meas.deeplearn.lenses.fuse_lens_votes_task import (
    FUSED_COLUMNS,
    FuseLensVotesConnections,
    FuseLensVotesTask,
)
from lsst.meas.deeplearn.lenses.vote_files import VotesError, make_votes, read_votes
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import InvalidQuantumError, NoWorkFound, Pipeline
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor
from lsst.pipe.base.testUtils import lintConnections
from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d

PIPELINE = str(Path(__file__).resolve().parents[1] / "pipelines" / "fuse_lens_votes.yaml")
ROC = {
    "machine": "roc",
    "rocThresholds": [0.5],
    "rocTruePositiveRate": [0.8],
    "rocFalsePositiveRate": [0.1],
    "rocNLens": 1000,
    "rocNNot": 1000,
}


def make_candidates(scores: Iterable[float]) -> Table:
    """Make ranked candidates with IDs from 1."""
    score = np.array(list(scores), dtype=np.float32)
    n = len(score)
    return Table(
        {
            "rank": np.where(np.isnan(score), -1, np.arange(1, n + 1)),
            "objectId": np.arange(1, n + 1),
            "tract": np.full(n, 7),
            "score": score,
        }
    )


def make_some_votes(*votes: tuple[int, str, str], truth: dict[int, int] | None = None) -> Table:
    """Make votes from tuples of ID, voter and grade, one each second."""
    return make_votes(
        {
            "objectId": object_id,
            "voter": voter,
            "grade": grade,
            "time": f"2026-01-01T{k // 3600:02}:{k // 60 % 60:02}:{k % 60:02}.000Z",
            "skymap": "sky",
            "tract": 7,
            "truth": (truth or {}).get(object_id, -1),
        }
        for k, (object_id, voter, grade) in enumerate(votes)
    )


def make_task(**config: Any) -> FuseLensVotesTask:
    """Make a task with some settings."""
    settings = FuseLensVotesTask.ConfigClass()
    settings.update(**config)
    settings.validate()
    return FuseLensVotesTask(config=settings)


def fuse(candidates: Table, *votes: Table, **config: Any) -> Table:
    """Fuse, and return the table in the order of the IDs."""
    fused = make_task(**config).run(candidates, list(votes)).fused
    return fused[np.argsort(fused["objectId"])]


def test_connections() -> None:
    """The connections obey the rules of the middleware."""
    lintConnections(FuseLensVotesConnections)


def test_by_hand() -> None:
    """A voter who learned from known ones moves a candidate as by hand."""
    truth = {101: 1, 102: 1, 103: 0, 104: 0}
    votes = make_some_votes(
        (101, "a", "A"), (102, "a", "B"), (103, "a", "N"), (104, "a", "C"), (1, "a", "A"), (2, "a", "N"),
        truth=truth,
    )  # fmt: skip
    task = make_task(prior=0.1, mode="online", assumedVoter=[0.5, 0.5], **ROC)
    result = task.run(make_candidates([0.9, 0.2, 0.9]), [votes])
    # P_L = P_D = (2 + 2) / (4 + 2); each known half count of a bin is tiny.
    assert result.voters["p_lens"][0] == pytest.approx(4 / 6)
    assert result.voters["p_not"][0] == pytest.approx(4 / 6)
    fused = result.fused[np.argsort(result.fused["objectId"])]
    expected = logit(0.1) + np.array([np.log(8) + np.log(2), np.log(0.2 / 0.9) - np.log(2), np.log(8)])
    np.testing.assert_allclose(fused["log_odds"], expected, atol=0.01)
    np.testing.assert_allclose(fused["machine_log_ratio"], np.log([8, 0.2 / 0.9, 8]), atol=0.01)
    assert fused["n_votes"].tolist() == [1, 1, 0]
    assert fused["n_votes_lens"].tolist() == [1, 0, 0]
    assert result.fused["objectId"].tolist() == [1, 3, 2]
    assert fused["fused_rank"].tolist() == [1, 3, 2]
    assert (fused["posterior_low"] < fused["posterior"]).all()
    assert (fused["posterior_high"] > fused["posterior"]).all()
    # The third has the error of the machine only, 1 / sqrt(n) of its bins.
    assert fused["log_odds_error"][2] == pytest.approx(np.sqrt(1 / 800 + 1 / 100), rel=0.2)
    assert fused["log_odds_error"][0] > 0.5
    for name, (dtype, description) in FUSED_COLUMNS.items():
        assert fused[name].dtype == np.dtype(dtype)
        assert fused[name].description == description
    assert task.metadata["n_voters"] == 1


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_no_votes(mode: str) -> None:
    """Without votes the posterior is that of the machine, and the votes that
    help most are on those it leaves open.
    """
    candidates = make_candidates([0.999, 0.9, 0.5, 0.1, np.nan])
    fused = fuse(candidates, mode=mode, machine="probability", prior=0.5, machineError=0.3)
    np.testing.assert_allclose(fused["posterior"], [0.999, 0.9, 0.5, 0.1, 0.5], rtol=1e-5)
    np.testing.assert_allclose(fused["log_odds_error"], [0.3, 0.3, 0.3, 0.3, 0], rtol=0.2)
    assert fused["verdict"].tolist() == [1, 0, 0, 0, 0]
    assert fused["vote_rank"][0] == -1
    assert set(fused["vote_rank"][[2, 4]]) == {1, 2}
    assert (fused["votes_needed"] > 0).tolist() == [False, True, True, True, True]
    shifted = fuse(candidates, machine="probability", prior=0.01)
    assert shifted["posterior"][2] == pytest.approx(0.01)
    assert fuse(candidates, prior=0.3)["posterior"].tolist() == pytest.approx([0.3] * 5)


def test_campaign() -> None:
    """At the same votes more lenses are found with the machine, and the
    posteriors of both are calibrated within their errors.
    """
    rng = np.random.default_rng(3)
    n = 3000
    is_lens = rng.random(n) < 0.05
    # Gaussian scores, so that the probability is known.
    x = rng.normal(2.0 * is_lens, 1.0)
    candidates = make_candidates(1 / (1 + np.exp(-(2 * x - 2))))
    known = {int(i): int(is_lens[i - 1]) for i in range(1, n + 1, 10)}
    votes = []
    for name, p_lens, p_not in (("a", 0.9, 0.9), ("b", 0.8, 0.95), ("c", 0.6, 0.8)):
        says = rng.random(n) < np.where(is_lens, p_lens, 1 - p_not)
        votes += [(i + 1, name, "A" if says[i] else "N") for i in range(n)]
    table = make_some_votes(*votes, truth=known)
    people = fuse(candidates, table, prior=0.05)
    both = fuse(candidates, table, prior=0.05, machine="probability")
    unknown = np.array([i not in known for i in people["objectId"]])

    def count(fused: Table) -> tuple[int, int]:
        found = np.asarray(fused["verdict"] == 1) & unknown
        return int((found & is_lens).sum()), int(found.sum())

    found, total = count(both)
    assert found > 1.3 * count(people)[0]
    assert found / total > 0.9
    for fused in (people, both):
        p = np.asarray(fused["posterior"])[unknown]
        assert abs(p.sum() - is_lens[unknown].sum()) < 4 * np.sqrt((p * (1 - p)).sum())
    voters = make_task(prior=0.05, machine="probability").run(candidates, [table]).voters
    for row, p_lens in zip(voters, (0.9, 0.8, 0.6), strict=True):
        assert abs(row["p_lens"] - p_lens) < 3 * row["p_lens_error"]


def test_calibrated_machine(caplog: pytest.LogCaptureFixture) -> None:
    """The likelihood ratio of a calibrated model is used where there is one,
    with its error, whatever prevalence its probability is for; else the ROC
    curve of the score, else nothing.
    """
    candidates = make_candidates([0.9, 0.9, 0.1, np.nan])
    ratio = np.log([20.0, np.nan, 0.05, np.nan])
    candidates["log_likelihood_ratio"] = ratio
    candidates["probability"] = expit(logit(1e-3) + ratio)
    p = np.asarray(candidates["probability"])
    candidates["probability_err"] = p * (1 - p) * 0.4
    fused = fuse(candidates, prior=0.1)
    np.testing.assert_allclose(fused["machine_log_ratio"], np.nan_to_num(ratio))
    np.testing.assert_allclose(fused["log_odds"], logit(0.1) + np.nan_to_num(ratio))
    np.testing.assert_allclose(fused["log_odds_error"], [0.4, 0, 0.4, 0], atol=1e-6)
    low, high = expit(logit(fused["posterior"][0]) + np.array([-0.4, 0.4]))
    assert (fused["posterior_low"][0], fused["posterior_high"][0]) == (
        pytest.approx(low),
        pytest.approx(high),
    )
    # A vote adds its own error.
    assert fuse(candidates, make_some_votes((1, "a", "A")), prior=0.1)["log_odds_error"][0] > 0.5

    fused = fuse(candidates, prior=0.1, **{**ROC, "machine": "auto"})
    np.testing.assert_allclose(fused["machine_log_ratio"], [ratio[0], np.log(8), ratio[2], 0], atol=0.01)
    assert set(fuse(candidates, prior=0.1, machine="none")["machine_log_ratio"]) == {0.0}
    del candidates["probability"]
    assert fuse(candidates, machineError=0.3)["log_odds_error"].tolist() == [0.3, 0, 0.3, 0]
    assert "takes no part" not in caplog.text
    candidates["log_likelihood_ratio"] = np.nan
    fuse(candidates)
    assert "No candidate has a log_likelihood_ratio, so the machine takes no part" in caplog.text


def test_one_vote() -> None:
    """A single vote goes into the right direction, however small the prior,
    unless new voters are taken to guess.
    """
    votes = make_some_votes((1, "a", "A"), (2, "b", "N"))
    fused = fuse(make_candidates([0.9, 0.5, 0.1]), votes)
    assert fused["posterior"][0] > 1.5 * fused["posterior"][2]
    assert fused["posterior"][1] < fused["posterior"][2]
    fused = fuse(make_candidates([0.9, 0.5, 0.1]), votes, mode="online", assumedVoter=[0.5, 0.5])
    np.testing.assert_allclose(fused["posterior"], 2e-4)


def test_the_same_numbers_again() -> None:
    """The same quantum gives the same numbers, another seed other draws."""
    candidates, votes = make_candidates([0.9, 0.5]), make_some_votes((1, "a", "A"), (2, "b", "N"))
    task = make_task(prior=0.1)
    first, second = (task.run(candidates, [votes]).fused for _ in range(2))
    other = make_task(prior=0.1, seed=2).run(candidates, [votes]).fused
    assert first["log_odds_error"].tolist() == second["log_odds_error"].tolist()
    assert first["log_odds_error"].tolist() != other["log_odds_error"].tolist()
    assert first["posterior"].tolist() == other["posterior"].tolist()


def test_bad_votes(caplog: pytest.LogCaptureFixture) -> None:
    """Votes given twice or changed count once, those on unknown candidates
    are reported, U is no vote, and names are only names.
    """
    candidates = make_candidates([0.9, 0.5])
    clean = make_some_votes((1, "a", "N"), (1, "b", "A"), (2, "a", "A"))
    messy = make_some_votes(
        (1, "a", "A"), (1, "b", "A"), (2, "a", "A"), (1, "a", "N"), (99, "a", "A"), (2, "b", "U")
    )
    task = make_task(prior=0.1)
    expected = task.run(candidates, [clean]).fused
    with caplog.at_level(logging.WARNING):
        fused = task.run(candidates, [messy, messy]).fused
    np.testing.assert_allclose(fused["posterior"], expected["posterior"])
    assert "1 votes are on candidates that are not in the table" in caplog.text
    assert task.metadata["n_superseded"] == 7
    assert task.metadata["n_unknown"] == 1
    nasty = "<script>alert(1)</script>"
    voters = task.run(candidates, [make_some_votes((1, nasty, "A"))]).voters
    assert voters["voter"].tolist() == [nasty]
    with pytest.raises(VotesError, match="as lenses and as non-lenses"):
        task.run(
            candidates,
            [make_some_votes((1, "a", "A"), truth={1: 1}), make_some_votes((1, "b", "A"), truth={1: 0})],
        )
    with pytest.raises(InvalidQuantumError, match="no columns"):
        task.run(candidates, [Table({"objectId": [1]})])
    with pytest.raises(NoWorkFound):
        task.run(candidates[:0], [clean])
    with pytest.raises(InvalidQuantumError, match="no column 'probability'"):
        make_task(machine="probability", machineColumn="probability").run(candidates, [clean])


def test_voter_who_always_says_lens() -> None:
    """Such a voter changes nothing once there are known ones."""
    truth = {i: i % 2 for i in range(100, 200)}
    votes = make_some_votes(*((i, "yes", "A") for i in [*truth, 1, 2]), truth=truth)
    for mode in ("online", "offline"):
        fused = fuse(make_candidates([0.9, 0.5]), votes, prior=0.1, mode=mode)
        np.testing.assert_allclose(fused["posterior"], 0.1, atol=0.01)


def test_votes_that_saw_the_score(caplog: pytest.LogCaptureFixture) -> None:
    """Votes cast with the score in view are reported, or left out."""
    votes = make_some_votes((1, "a", "A"), (2, "a", "N"))
    votes["saw_score"][0] = True
    with caplog.at_level(logging.WARNING):
        fused = fuse(make_candidates([0.9, 0.5]), votes, prior=0.1, **ROC)
    assert fused["n_votes"].tolist() == [1, 1]
    assert "1 votes were cast with the score in view" in caplog.text
    fused = fuse(make_candidates([0.9, 0.5]), votes, prior=0.1, useVotesThatSawScore=False, **ROC)
    assert fused["n_votes"].tolist() == [0, 1]


def test_known_candidates() -> None:
    """Known ones are not asked about again."""
    votes = make_some_votes((1, "a", "A"), (2, "a", "N"), truth={1: 1})
    fused = fuse(make_candidates([0.9, 0.5]), votes, prior=0.1)
    assert fused["truth"].tolist() == [1, -1]
    assert fused["vote_rank"].tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"notGrades": ["A", "N"]}, "counts for a lens or against it"),
        ({"lensGrades": ["X"]}, "A grade is one of"),
        ({"rejection": 0.99}, "below that of detection"),
        ({"assumedVoter": [0.5, 1.0]}, "from 0 to 1"),
        ({"machine": "roc"}, "same length"),
        ({**ROC, "rocThresholds": [0.5, 0.6]}, "same length"),
        ({**ROC, "rocTruePositiveRate": [1.8]}, "do not rise"),
    ],
)
def test_config(config: dict[str, Any], message: str) -> None:
    """Settings that make no sense are refused with the reason."""
    with pytest.raises(FieldValidationError, match=message):
        make_task(**config)


@pytest.mark.parametrize("with_votes", [True, False])
def test_pipeline(tmp_path: Path, with_votes: bool) -> None:
    """The pipeline runs in a repository on votes from a CSV file, and on
    tracts without votes; all tracts are fused together.
    """
    root = Butler.makeRepo(str(tmp_path / "repo"))
    data_id, other = ({"skymap": "sky", "tract": tract} for tract in (7, 8))
    with Butler.from_config(root, writeable=True, run="inputs") as butler:
        corners = [LonLat.fromDegrees(ra, dec) for ra, dec in ((0, 0), (1, 0), (1, 1), (0, 1))]
        region = ConvexPolygon([UnitVector3d(corner) for corner in corners])
        sync = butler.registry.syncDimensionData
        sync("skymap", {"name": "sky", "hash": b"", "tract_max": 9, "patch_nx_max": 1, "patch_ny_max": 1})
        for tract in (7, 8):
            sync("tract", {"skymap": "sky", "id": tract, "region": region})
        for name in ("lens_candidates_ranked", "lens_votes"):
            butler.registry.registerDatasetType(
                DatasetType(name, ("skymap", "tract"), "ArrowAstropy", universe=butler.dimensions)
            )
        butler.put(make_candidates([0.9, 0.5, np.nan]), "lens_candidates_ranked", data_id)
        far = make_candidates([0.9, 0.5])
        far["objectId"] += 100
        far["tract"] = 8
        butler.put(far, "lens_candidates_ranked", other)
        if with_votes:
            path = tmp_path / "votes.csv"
            path.write_text("candidate_id,voter,grade,time\n1,\u00c5sa,A,2026-01-01\n2,b,N,2026-01-01\n")
            butler.put(read_votes(path), "lens_votes", data_id)
    butler = SimplePipelineExecutor.prep_butler(root, inputs=["inputs"], output="out")
    executor = SimplePipelineExecutor.from_pipeline_filename(PIPELINE, butler=butler)
    executor.run(register_dataset_types=True)
    fused = butler.get("lens_candidates_fused", data_id)
    # First that with a vote for it, last that with one against it.
    assert fused["objectId"].tolist() == ([1, 3, 2] if with_votes else [1, 2, 3])
    assert fused["n_votes"].tolist() == ([1, 0, 1] if with_votes else [0, 0, 0])
    assert fused["posterior"].description == FUSED_COLUMNS["posterior"][1]
    voters = butler.get("lens_voters", skymap="sky")
    assert voters["voter"].tolist() == (["b", "\u00c5sa"] if with_votes else [])
    # Both tracts are in one order.
    fused = vstack([fused, butler.get("lens_candidates_fused", other)], metadata_conflicts="silent")
    assert sorted(fused["fused_rank"]) == [1, 2, 3, 4, 5]
    assert set(fused["tract"]) == {7, 8}
    assert list(Pipeline.from_uri(PIPELINE).task_labels) == ["fuseLensVotes"]


def test_import_is_light() -> None:
    """Importing the task loads neither torch nor matplotlib."""
    code = (
        "import sys, lsst.meas.deeplearn.lenses.fuse_lens_votes_task;"
        "sys.exit({'torch', 'matplotlib'} & set(sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

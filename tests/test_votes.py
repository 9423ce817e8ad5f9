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

"""Tests of votes and of what they are worth."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from scipy.special import expit, logit

from lsst.meas.deeplearn.lenses.votes import (
    GRADES,
    VOTE_COLUMNS,
    Ballots,
    ScoreCalibration,
    Verdict,
    VotesError,
    compute_expected_votes,
    compute_information,
    compute_log_ratio,
    decide,
    make_ballots,
    make_votes,
    read_truth,
    read_votes,
    read_zooniverse_votes,
    run_offline,
    run_online,
    select_last_votes,
    stack_votes,
    update_probability,
    write_truth,
    write_votes,
    write_zooniverse_manifest,
)


def make_some_ballots(
    votes: Sequence[tuple[int, int, bool]], truth: Sequence[int], *, n_voters: int = 1
) -> Ballots:
    """Make ballots from tuples of voter, subject and vote."""
    voter, subject, says_lens = zip(*votes, strict=True) if votes else ((), (), ())
    return Ballots(
        voters=tuple(f"v{k}" for k in range(n_voters)),
        voter=np.array(voter, dtype=np.int64),
        subject=np.array(subject, dtype=np.int64),
        says_lens=np.array(says_lens, dtype=bool),
        truth=np.array(truth, dtype=np.int8),
    )


def make_campaign(
    rng: np.random.Generator,
    *,
    n_subjects: int = 3000,
    n_voters: int = 30,
    n_votes: int = 6,
    lens_fraction: float = 0.05,
    training_fraction: float = 0.1,
) -> tuple[Ballots, np.ndarray, np.ndarray, np.ndarray]:
    """Simulate voters, each subject being shown to ``n_votes`` of them.

    Returns
    -------
    ballots
        The votes.
    is_lens
        Whether each subject is a lens, known or not.
    p_lens, p_not
        True P_L and P_D of the voters.
    """
    p_lens, p_not = rng.uniform(0.6, 0.95, n_voters), rng.uniform(0.8, 0.98, n_voters)
    is_lens = rng.random(n_subjects) < lens_fraction
    known = rng.random(n_subjects) < training_fraction
    voter = np.argsort(rng.random((n_subjects, n_voters)), axis=1)[:, :n_votes].ravel()
    subject = np.repeat(np.arange(n_subjects), n_votes)
    says_lens = rng.random(len(voter)) < np.where(is_lens[subject], p_lens[voter], 1 - p_not[voter])
    order = rng.permutation(len(voter))
    ballots = Ballots(
        voters=tuple(f"v{k}" for k in range(n_voters)),
        voter=voter[order],
        subject=subject[order],
        says_lens=says_lens[order],
        truth=np.where(known, is_lens, -1).astype(np.int8),
    )
    return ballots, is_lens, p_lens, p_not


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


def test_update_by_hand() -> None:
    """One vote changes a probability as worked out by hand."""
    # 0.9 * 0.2 / (0.9 * 0.2 + 0.3 * 0.8) and so on.
    assert update_probability(0.2, True, 0.9, 0.7) == pytest.approx(0.18 / 0.42)
    assert update_probability(0.2, False, 0.9, 0.7) == pytest.approx(0.02 / 0.58)
    assert update_probability(2e-4, True, 0.5, 0.5) == pytest.approx(2e-4)
    np.testing.assert_allclose(
        compute_log_ratio(np.array([True, False]), 0.9, 0.7), np.log([0.9 / 0.3, 0.1 / 0.7])
    )


def test_online_by_hand() -> None:
    """An agent learns from two training subjects and then counts."""
    ballots = make_some_ballots([(0, 0, True), (0, 1, True), (0, 2, True), (0, 3, True)], truth=[1, 0, -1, 1])
    result = run_online(ballots, prior=0.01)
    # P_L: 0.5 -> (0.5 * 4 + 1) / 5 -> (0.6 * 5 + 1) / 6.
    # P_D: 0.5 -> (0.5 * 4 + 0) / 5.
    np.testing.assert_allclose(result.p_lens, [0.5, 0.6, 0.6, 0.6])
    np.testing.assert_allclose(result.p_not, [0.5, 0.5, 0.4, 0.4])
    np.testing.assert_allclose(result.n_lens, [4, 5, 5, 5])
    np.testing.assert_allclose(result.n_not, [4, 4, 5, 5])
    assert result.agents.p_lens[0] == pytest.approx(4 / 6)
    # The third vote has a likelihood ratio of 0.6 / (1 - 0.4) = 1.
    np.testing.assert_allclose(result.posterior[[0, 2]], 0.01)
    # The variance of Beta(4, 2).
    assert result.agents.p_lens_error[0] == pytest.approx(np.sqrt(4 * 2 / (36 * 7)))


def test_offline_by_hand() -> None:
    """With all truths known, expectation maximization counts."""
    ballots = make_some_ballots(
        [(0, 0, True), (0, 1, True), (0, 2, False), (0, 3, False), (0, 4, False)], truth=[1, 1, 1, 0, -1]
    )
    ballots.truth[4] = 0
    result = run_offline(ballots)
    assert result.converged
    assert result.agents.p_lens[0] == pytest.approx(3 / 5)
    assert result.agents.p_not[0] == pytest.approx(3 / 4)


def test_offline_is_a_fixed_point() -> None:
    """What expectation maximization returns solves its two equations."""
    ballots, *_ = make_campaign(np.random.default_rng(1), n_subjects=500)
    result = run_offline(ballots, prior=0.05)
    p = np.where(ballots.truth >= 0, ballots.truth, result.posterior)[ballots.subject]
    for agent in range(len(ballots.voters)):
        mine = ballots.voter == agent
        expected = (1 + p[mine & ballots.says_lens].sum()) / (2 + p[mine].sum())
        assert result.agents.p_lens[agent] == pytest.approx(np.clip(expected, 0.01, 0.99), abs=1e-5)


def test_order() -> None:
    """The order of votes does not matter offline, nor for given agents;
    online it does not once agents have learned.
    """
    rng = np.random.default_rng(2)
    ballots, *_ = make_campaign(rng, n_subjects=300)
    order = rng.permutation(len(ballots))
    for run in (run_offline, run_online):
        first, second = run(ballots), run(ballots[order])
        np.testing.assert_allclose(second.agents.p_lens, first.agents.p_lens, rtol=1e-5)
        np.testing.assert_allclose(second.agents.p_not, first.agents.p_not, rtol=1e-5)
        if run is run_offline:
            np.testing.assert_allclose(second.log_odds, first.log_odds, rtol=1e-4)

    trained = ballots[np.argsort(ballots.truth[ballots.subject] < 0, kind="stable")]
    n_training = int((ballots.truth[ballots.subject] >= 0).sum())
    rest = n_training + rng.permutation(len(ballots) - n_training)
    shuffled = trained[np.concatenate([np.arange(n_training), rest])]
    unknown = ballots.truth < 0
    np.testing.assert_allclose(
        run_online(shuffled).log_odds[unknown], run_online(trained).log_odds[unknown], rtol=1e-9
    )


@pytest.mark.parametrize("run", [run_online, run_offline])
def test_skills_of_voters(run: type[run_online]) -> None:
    """The skills of simulated voters are recovered within their errors."""
    ballots, _, p_lens, p_not = make_campaign(
        np.random.default_rng(3), n_subjects=6000, lens_fraction=0.2, training_fraction=0.4
    )
    agents = run(ballots, prior=0.2).agents
    for estimate, error, true in (
        (agents.p_lens, agents.p_lens_error, p_lens),
        (agents.p_not, agents.p_not_error, p_not),
    ):
        pull = (estimate - true) / error
        assert abs(pull.mean()) < 3 / np.sqrt(len(pull))
        assert 0.7 < pull.std() < 1.35
        assert np.abs(pull).max() < 4.5


def test_calibration_of_posteriors() -> None:
    """Among subjects of one posterior, that fraction are lenses."""
    ballots, is_lens, *_ = make_campaign(np.random.default_rng(4), n_subjects=20000, n_votes=3)
    result = run_offline(ballots, prior=0.05)
    unknown = ballots.truth < 0
    p, is_lens = result.posterior[unknown], is_lens[unknown]
    for low, high in ((0.0, 0.05), (0.05, 0.5), (0.5, 0.95), (0.95, 1.0)):
        chosen = (p >= low) & (p < high)
        error = np.sqrt((p[chosen] * (1 - p[chosen])).sum())
        assert abs(is_lens[chosen].sum() - p[chosen].sum()) < 4 * error


def test_machine_and_people() -> None:
    """At the same number of votes, completeness and precision are higher with
    the machine, and higher still where the votes go to those it leaves open.
    """
    rng = np.random.default_rng(5)
    ballots, is_lens, *_ = make_campaign(
        rng, n_subjects=20000, n_votes=2, lens_fraction=0.01, training_fraction=0.1
    )
    scores = rng.normal(2.0 * is_lens, 1.0)
    past = rng.random(20000) < 0.5
    calibration = ScoreCalibration.from_scores(rng.normal(2.0 * past, 1.0), past)
    log_ratio = calibration.compute_log_ratio(scores)
    unknown = ballots.truth < 0

    def measure(result_log_odds: np.ndarray) -> tuple[float, float]:
        found = (expit(result_log_odds) > 0.5) & unknown
        return (found & is_lens).sum() / (is_lens & unknown).sum(), (found & is_lens).sum() / found.sum()

    people = measure(run_offline(ballots, prior=0.01).log_odds)
    machine = measure(logit(0.01) + log_ratio)
    both = measure(run_offline(ballots, prior=0.01, prior_log_ratio=log_ratio).log_odds)
    assert both[0] > people[0] + 0.1
    assert both[1] > people[1]
    assert both[0] > machine[0] + 0.3

    # Ten votes each on a fifth of the subjects.
    first = np.argsort(-np.where(unknown, log_ratio, np.inf))[:4000]
    busy, lens_busy, *_ = make_campaign(
        np.random.default_rng(5), n_subjects=4000, n_votes=10, training_fraction=0.0
    )
    agents_truth = is_lens[first]
    says = np.random.default_rng(6).random(len(busy)) < np.where(agents_truth[busy.subject], 0.8, 0.1)
    chosen = Ballots(busy.voters, busy.voter, first[busy.subject], says, ballots.truth)
    best = measure(run_offline(chosen, prior=0.01, prior_log_ratio=log_ratio).log_odds)
    assert len(chosen) == len(ballots)
    assert best[0] > both[0]
    assert best[1] > both[1]


def test_voter_who_always_says_lens() -> None:
    """Such a voter is found out, and moves nothing; nor does one who is
    wrong more often than not move it the wrong way.
    """
    rng = np.random.default_rng(6)
    ballots, is_lens, *_ = make_campaign(rng, n_subjects=1000, lens_fraction=0.2, training_fraction=0.5)
    ballots.says_lens[ballots.voter == 0] = True
    liar = ballots.voter == 1
    ballots.says_lens[liar] = ~is_lens[ballots.subject[liar]]
    for run in (run_online, run_offline):
        result = run(ballots, prior=0.2)
        assert result.agents.skill[0] < 0.02
        assert abs(compute_log_ratio(True, result.agents.p_lens[0], result.agents.p_not[0])) < 0.1
        assert compute_log_ratio(True, result.agents.p_lens[1], result.agents.p_not[1]) < -2
        assert np.isfinite(result.log_odds).all()


def test_trajectories() -> None:
    """A trajectory ends at the posterior; its scatter is that of agents, and
    shrinks as these become known.
    """
    widths = []
    for n_training in (4, 400):
        votes = [(0, k % 2, k % 2 == 0 or k % 10 == 1) for k in range(n_training)]
        ballots = make_some_ballots([*votes, (0, 2, True), (0, 2, True)], truth=[1, 0, -1])
        result = run_online(ballots, prior=0.1)
        path, drawn = result.compute_trajectory(2, np.random.default_rng(0), 200)
        assert path[0] == pytest.approx(0.1)
        assert path[-1] == pytest.approx(result.posterior[2])
        assert drawn.shape == (200, 3)
        assert (drawn[:, 0] == path[0]).all()
        log_odds = result.draw_log_odds(np.random.default_rng(0), 200)
        assert log_odds[:, 2].std() == pytest.approx(logit(drawn[:, -1]).std(), rel=0.3)
        widths.append(log_odds[:, 2].std())
    assert widths[1] < 0.3 * widths[0]


def test_information() -> None:
    """A perfect voter gives a bit at even odds; one who guesses none."""
    assert compute_information(0.5, 1.0, 1.0) == pytest.approx(1.0)
    assert compute_information(0.5, 0.0, 0.0) == pytest.approx(1.0)
    assert compute_information(0.3, 0.8, 0.2) == pytest.approx(0.0, abs=1e-12)
    np.testing.assert_allclose(compute_information(np.array([0.0, 1.0]), 0.8, 0.9), 0.0, atol=1e-12)
    # It is the mean decrease of the entropy of the truth.
    p, p_lens, p_not = 0.3, 0.8, 0.9

    def entropy(q: float) -> float:
        return -q * np.log2(q) - (1 - q) * np.log2(1 - q)

    says = p_lens * p + (1 - p_not) * (1 - p)
    after = [float(update_probability(p, vote, p_lens, p_not)) for vote in (True, False)]
    expected = entropy(p) - says * entropy(after[0]) - (1 - says) * entropy(after[1])
    assert compute_information(p, p_lens, p_not) == pytest.approx(expected)


def test_expected_votes() -> None:
    """The expected number of votes is about that of simulated ones."""
    rng = np.random.default_rng(7)
    p_lens, p_not = 0.8, 0.9
    is_lens = rng.random(4000) < 0.02
    log_odds, n = np.full(4000, logit(0.02)), np.zeros(4000)
    for _ in range(200):
        active = decide(expit(log_odds)) == Verdict.UNDECIDED
        says = rng.random(4000) < np.where(is_lens, p_lens, 1 - p_not)
        log_odds += np.where(active, compute_log_ratio(says, p_lens, p_not), 0.0)
        n += active
    expected = compute_expected_votes(np.array([0.02]), p_lens, p_not)
    # Wald neglects by how much the last vote overshoots.
    assert expected[0] == pytest.approx(n.mean(), rel=0.15)
    np.testing.assert_array_equal(compute_expected_votes(np.array([0.96, 1e-9, 0.0, 1.0]), 0.8, 0.9), 0.0)
    assert np.isinf(compute_expected_votes(np.array([0.5]), 0.5, 0.5))


def test_decide() -> None:
    """Thresholds are those of Marshall et al. (2016)."""
    p = np.array([0.96, 0.95, 0.5, 1e-7, 9e-8, np.nan])
    assert decide(p).tolist() == [1, 0, 0, 0, -1, 0]
    assert decide(p, detection=0.4, rejection=1e-3).tolist() == [1, 1, 1, -1, -1, 0]


def test_no_votes() -> None:
    """Without votes the posterior is the prior, in both modes."""
    ballots = make_some_ballots([], truth=[-1, -1], n_voters=0)
    for run in (run_online, run_offline):
        result = run(ballots, prior=np.array([0.1, 0.2]), prior_log_ratio=np.array([0.0, np.log(4)]))
        np.testing.assert_allclose(result.posterior, [0.1, 0.5])
        assert result.converged
        assert len(result.agents) == len(result.agents.to_table()) == 0
        assert result.draw_log_odds(np.random.default_rng(0), 3).shape == (3, 2)


def test_score_calibration() -> None:
    """Likelihood ratios of Gaussian scores agree with the analytic ones, and
    so do their errors.
    """
    rng = np.random.default_rng(8)
    is_lens = rng.random(20000) < 0.5
    scores = rng.normal(2.0 * is_lens, 1.0)
    scores[:5] = np.nan
    calibration = ScoreCalibration.from_scores(scores, is_lens, min_count=20)
    assert calibration.n_lens.sum() + calibration.n_not.sum() == 20000 - 5
    assert (np.diff(calibration.log_ratios) > 0).all()
    assert min(calibration.n_lens.min(), calibration.n_not.min()) >= 20
    x = np.linspace(-1, 3, 9)
    # N(x; 2, 1) / N(x; 0, 1) = exp(2 x - 2)
    np.testing.assert_allclose(calibration.compute_log_ratio(x), 2 * x - 2, atol=0.9)
    assert calibration.compute_log_ratio(np.array([np.nan])) == 0
    # The mean of the likelihood ratio over other things is 1.
    ratio = np.exp(calibration.compute_log_ratio(rng.normal(size=100000)))
    assert ratio.mean() == pytest.approx(1.0, abs=0.2)
    drawn = calibration.draw_log_ratio(np.array([0.0, 9.0, np.nan]), rng, 2000)
    bins = calibration.find_bins(np.array([0.0, 9.0]))
    np.testing.assert_allclose(drawn.std(axis=0)[:2], calibration.errors[bins], rtol=0.1)
    assert (drawn[:, 2] == 0).all()
    with pytest.raises(ValueError, match="too few"):
        ScoreCalibration.from_scores(scores[:20], is_lens[:20])


def test_score_calibration_from_roc() -> None:
    """A point of a ROC curve makes two bins, as SWAP treats a classifier."""
    calibration = ScoreCalibration.from_roc([0.5], [0.9], [0.1], n_lens=100000, n_not=100000)
    np.testing.assert_allclose(
        calibration.compute_log_ratio(np.array([0.4, 0.5, 0.9])), np.log([1 / 9, 9, 9]), rtol=1e-3
    )
    unordered = ScoreCalibration.from_roc([0.9, 0.5], [0.5, 0.9], [0.01, 0.1], n_lens=1000, n_not=1000)
    assert unordered.thresholds.tolist() == [0.5, 0.9]
    # A curve that is not convex is replaced by its hull.
    hull = ScoreCalibration.from_roc([0.2, 0.5, 0.8], [0.9, 0.6, 0.5], [0.5, 0.4, 0.1], n_lens=100, n_not=100)
    assert hull.thresholds.tolist() == [0.2, 0.8]
    for rates in ([0.5, 0.9], [0.1, 0.2]), ([0.9, 0.5], [0.2, 1.1]), ([0.9, np.nan], [0.2, 0.1]):
        with pytest.raises(ValueError, match="ROC"):
            ScoreCalibration.from_roc([0.5, 0.9], *rates, n_lens=10, n_not=10)


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
    with pytest.raises(VotesError, match="line 3: the answer 'No' is none of"):
        read_zooniverse_votes(path)
    with pytest.raises(VotesError, match="no answer to task 'T9'"):
        read_zooniverse_votes(path, task="T9")
    with pytest.raises(VotesError, match="has no 'name'"):
        read_zooniverse_votes(path, answers={"No": "N"}, id_key="name")

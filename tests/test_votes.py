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

"""Tests of what votes are worth."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.special import expit, logit

from lsst.meas.deeplearn.lenses.likelihood_ratio import ScoreCalibration
from lsst.meas.deeplearn.lenses.votes import (
    Ballots,
    Verdict,
    compute_expected_votes,
    compute_information,
    compute_log_ratio,
    decide,
    run_offline,
    run_online,
    update_probability,
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

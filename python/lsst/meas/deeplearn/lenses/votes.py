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

r"""What people's votes on lens candidates are worth.

The statistical model is SWAP, the Space Warps Analysis Pipeline (Marshall et
al. 2016, MNRAS 455, 1171, arXiv:1504.06148).  A voter, or *agent*, is
described by two probabilities,

.. math::

    P_L = P(\mathrm{LENS}|\mathrm{lens}), \qquad
    P_D = P(\mathrm{NOT}|\mathrm{not\ a\ lens}),

and a vote changes the odds that a subject is a lens by the likelihood ratio

.. math::

    \frac{P(\mathrm{LENS}|\mathrm{lens})}{P(\mathrm{LENS}|\mathrm{not})}
    = \frac{P_L}{1 - P_D}, \qquad
    \frac{P(\mathrm{NOT}|\mathrm{lens})}{P(\mathrm{NOT}|\mathrm{not})}
    = \frac{1 - P_L}{P_D}.

Here everything is a sum of logarithms of such ratios, so that the order of
the votes of given agents cannot matter, and neither can rounding at a prior
of 2e-4.  What the two probabilities are is learned from subjects whose truth
is known, as the votes come in (`run_online`), or from all votes at once by
expectation maximization (`run_offline`; Dawid & Skene 1979).  A machine takes
part by the likelihood ratio of its score
(`lsst.meas.deeplearn.lenses.likelihood_ratio`).

All of this is arrays; tables and files of votes are in
`lsst.meas.deeplearn.lenses.vote_files`.
"""

from __future__ import annotations

__all__ = (
    "DETECTION",
    "PRIOR",
    "REJECTION",
    "Agents",
    "Ballots",
    "SwapResult",
    "Verdict",
    "compute_expected_votes",
    "compute_information",
    "compute_log_ratio",
    "compute_odds",
    "decide",
    "run_offline",
    "run_online",
    "update_probability",
)

import dataclasses
import enum

import numpy as np
from astropy.table import Column, Table
from numpy.typing import ArrayLike
from scipy.special import entr, expit, logit, xlog1py

PRIOR = 2e-4
"""Fraction of lenses among the subjects of Marshall et al. (2016)."""

DETECTION, REJECTION = 0.95, 1e-7
"""Posterior above which a subject is detected, and below which it is
rejected, as in Marshall et al. (2016)."""

PROBABILITY_RANGE = (0.01, 0.99)
"""Limits of P_L and P_D: no single vote may decide."""

N_DRAWS = 50
"""Number of trajectories that give the error, as in Marshall et al. (2016)."""


class Verdict(enum.IntEnum):
    """What the posterior says of a subject."""

    REJECTED = -1
    UNDECIDED = 0
    DETECTED = 1


# The update.


def compute_log_ratio(says_lens: ArrayLike, p_lens: ArrayLike, p_not: ArrayLike) -> np.ndarray:
    """Return the logarithm of the likelihood ratio of votes.

    Parameters
    ----------
    says_lens
        Whether the vote is LENS.
    p_lens, p_not
        The probabilities P_L and P_D of the agent, between 0 and 1
        exclusively.  All three are broadcast.
    """
    p_lens, p_not = np.asarray(p_lens), np.asarray(p_not)
    return np.where(says_lens, np.log(p_lens) - np.log1p(-p_not), np.log1p(-p_lens) - np.log(p_not))


def update_probability(p: ArrayLike, says_lens: ArrayLike, p_lens: ArrayLike, p_not: ArrayLike) -> np.ndarray:
    r"""Return the probability of a lens after one vote.

    .. math::

        p' = \frac{P_L\,p}{P_L\,p + (1 - P_D)(1 - p)} \quad\text{or}\quad
        p' = \frac{(1 - P_L)\,p}{(1 - P_L)\,p + P_D(1 - p)}

    for a vote LENS or NOT (Marshall et al. 2016).

    Parameters
    ----------
    p
        Probability before the vote.
    says_lens, p_lens, p_not
        As in `compute_log_ratio`.
    """
    return expit(logit(p) + compute_log_ratio(says_lens, p_lens, p_not))


def compute_information(p: ArrayLike, p_lens: ArrayLike, p_not: ArrayLike) -> np.ndarray:
    r"""Return the information in bits that a vote is expected to give.

    The mutual information of vote and truth (Marshall et al. 2016), with
    :math:`h` the entropy of a binary choice in bits:

    .. math::

        I = h\left[P_L\,p + (1 - P_D)(1 - p)\right]
            - p\,h(P_L) - (1 - p)\,h(P_D).

    0 of an agent whose votes do not depend on the truth, and at ``p`` of 0
    or 1; 1 of a perfect agent at ``p`` of 0.5.

    Parameters
    ----------
    p
        Probability of a lens before the vote.
    p_lens, p_not
        The probabilities P_L and P_D of the agent.  All are broadcast.
    """
    p, p_lens, p_not = np.asarray(p), np.asarray(p_lens), np.asarray(p_not)
    says_lens = p_lens * p + (1 - p_not) * (1 - p)
    information = _entropy(says_lens) - p * _entropy(p_lens) - (1 - p) * _entropy(p_not)
    return np.maximum(information, 0.0)


def compute_expected_votes(
    p: np.ndarray,
    p_lens: float,
    p_not: float,
    *,
    detection: float = DETECTION,
    rejection: float = REJECTION,
) -> np.ndarray:
    r"""Return how many more votes a decision is expected to take.

    Wald's (1945) approximation for a sequential test, that the log odds move
    by :math:`D_L = P_L \ln\frac{P_L}{1-P_D} + (1-P_L) \ln\frac{1-P_L}{P_D}`
    a vote towards detection if the subject is a lens, and by the like
    :math:`D_D` towards rejection if it is not:

    .. math::

        n = p\,\frac{L(p_d) - L(p)}{D_L} + (1 - p)\,\frac{L(p) - L(p_r)}{D_D},
        \qquad L(p) = \ln\frac{p}{1 - p}.

    0 where the posterior is beyond a threshold already; infinite if votes
    carry no information.

    Parameters
    ----------
    p
        Posterior.
    p_lens, p_not
        The probabilities P_L and P_D of a typical agent.
    detection, rejection
        Thresholds of `decide`.
    """
    p = np.asarray(p, dtype=np.float64)
    log_lens = float(compute_log_ratio(True, p_lens, p_not))
    log_not = float(compute_log_ratio(False, p_lens, p_not))
    up = p_lens * log_lens + (1 - p_lens) * log_not
    down = -(1 - p_not) * log_lens - p_not * log_not
    open_ = (p <= detection) & (p >= rejection)
    log_odds = logit(np.clip(p, rejection, detection))
    with np.errstate(divide="ignore", invalid="ignore"):
        n = p * (logit(detection) - log_odds) / up + (1 - p) * (log_odds - logit(rejection)) / down
    return np.where(open_, np.nan_to_num(n, nan=np.inf, posinf=np.inf), 0.0)


def decide(p: np.ndarray, *, detection: float = DETECTION, rejection: float = REJECTION) -> np.ndarray:
    """Return the `Verdict` of posteriors, int8.

    Parameters
    ----------
    p
        Posteriors; one that is NaN is undecided.
    detection
        Posterior above which a subject is detected.
    rejection
        Posterior below which a subject is rejected.
    """
    return (p > detection).astype(np.int8) - (p < rejection).astype(np.int8)


def _entropy(p: np.ndarray) -> np.ndarray:
    """Return the entropy in bits of a choice of probability p."""
    return (entr(p) - xlog1py(1 - p, -p)) / np.log(2)


# The agents.


@dataclasses.dataclass(frozen=True, eq=False)
class Agents:
    """How well A voters tell lenses from other things.

    What is known of P_L after k of n votes on lenses were LENS is a Beta
    distribution with the parameters ``k + s`` and ``n - k + s``.  Its mean is
    what SWAP's updates give, P_L <- (P_L N_L + correct) / (1 + N_L) from 0.5
    and N_L = 2 s.  A beginning other than 0.5 divides the 2 s accordingly.
    """

    voters: tuple[str, ...]
    """Names."""

    p_lens: np.ndarray
    """P_L, the probability of LENS on a lens, shape ``(A,)``."""

    p_not: np.ndarray
    """P_D, the probability of NOT on another thing, shape ``(A,)``."""

    n_lens: np.ndarray
    """N_L, the votes on lenses that P_L is known from, 2 s of no vote
    included, shape ``(A,)``.  Not integer where the truth is uncertain."""

    n_not: np.ndarray
    """N_D, the same for other things, shape ``(A,)``."""

    def __len__(self) -> int:
        return len(self.voters)

    @property
    def p_lens_error(self) -> np.ndarray:
        """Standard deviation of P_L, shape ``(A,)``."""
        return _beta_error(self.p_lens, self.n_lens)

    @property
    def p_not_error(self) -> np.ndarray:
        """Standard deviation of P_D, shape ``(A,)``."""
        return _beta_error(self.p_not, self.n_not)

    @property
    def skill(self) -> np.ndarray:
        """Information in bits of a vote where both are as likely, from 0 to
        1, shape ``(A,)``; what Marshall et al. (2016) call skill.
        """
        return compute_information(0.5, self.p_lens, self.p_not)

    def to_table(self) -> Table:
        """Return a table, a row a voter."""
        table = Table()
        for name, values, description in (
            ("voter", np.array(self.voters, dtype="U128"), "Name that the voter gave"),
            ("p_lens", self.p_lens, "P_L, probability of the vote LENS on a lens"),
            ("p_lens_error", self.p_lens_error, "Standard deviation of p_lens"),
            ("p_not", self.p_not, "P_D, probability of the vote NOT on something else"),
            ("p_not_error", self.p_not_error, "Standard deviation of p_not"),
            ("n_lens", self.n_lens, "Expected number of votes on lenses, with those of the prior"),
            ("n_not", self.n_not, "Expected number of votes on other things, with those of the prior"),
            ("skill", self.skill, "Expected information in bits of a vote at even odds"),
        ):
            table[name] = Column(values, description=description)
        return table


def _beta_error(p: np.ndarray, n: np.ndarray) -> np.ndarray:
    return np.sqrt(p * (1 - p) / (n + 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Ballots:
    """V votes of A voters on N subjects, as arrays.

    The order of the votes is that in which they were cast.
    """

    voters: tuple[str, ...]
    """Names of the voters."""

    voter: np.ndarray
    """Index of the voter of each vote, shape ``(V,)``."""

    subject: np.ndarray
    """Index of the subject of each vote, shape ``(V,)``."""

    says_lens: np.ndarray
    """Whether the vote is LENS, bool, shape ``(V,)``."""

    truth: np.ndarray
    """1 of a subject known to be a lens, 0 of one known not to be, -1 where
    it is to be found out, shape ``(N,)``."""

    def __len__(self) -> int:
        return len(self.voter)

    @property
    def n_votes(self) -> np.ndarray:
        """Number of votes on each subject, shape ``(N,)``."""
        return np.bincount(self.subject, minlength=len(self.truth))

    def __getitem__(self, index: np.ndarray | slice) -> Ballots:
        """Return some of the votes."""
        return dataclasses.replace(
            self, voter=self.voter[index], subject=self.subject[index], says_lens=self.says_lens[index]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class SwapResult:
    """Posteriors of N subjects and the agents that gave them."""

    ballots: Ballots
    """The votes."""

    agents: Agents
    """The agents after all votes."""

    p_lens: np.ndarray
    """P_L of the agent of each vote as the vote counted, shape ``(V,)``."""

    p_not: np.ndarray
    """P_D of the agent of each vote as the vote counted, shape ``(V,)``."""

    n_lens: np.ndarray
    """N_L of the agent of each vote as the vote counted, shape ``(V,)``."""

    n_not: np.ndarray
    """N_D of the agent of each vote as the vote counted, shape ``(V,)``."""

    prior_log_odds: np.ndarray
    """Log odds before any vote, shape ``(N,)``."""

    n_iterations: int = 1
    """Number of iterations."""

    converged: bool = True
    """Whether the iterations came to an end."""

    @property
    def log_ratio(self) -> np.ndarray:
        """Logarithm of the likelihood ratio of each vote, shape ``(V,)``."""
        return compute_log_ratio(self.ballots.says_lens, self.p_lens, self.p_not)

    @property
    def log_odds(self) -> np.ndarray:
        """Log odds of a lens after all votes, shape ``(N,)``."""
        return compute_odds(self.ballots, self.log_ratio, self.prior_log_odds)

    @property
    def posterior(self) -> np.ndarray:
        """Probability of a lens after all votes, shape ``(N,)``."""
        return expit(self.log_odds)

    def select_subjects(self, subjects: np.ndarray) -> SwapResult:
        """Return the same for some of the subjects.

        Parameters
        ----------
        subjects
            Indices of subjects, each once.
        """
        place = np.full(len(self.ballots.truth), -1)
        place[subjects] = np.arange(len(subjects))
        kept = place[self.ballots.subject] >= 0
        ballots = self.ballots[kept]
        return dataclasses.replace(
            self,
            ballots=dataclasses.replace(
                ballots, subject=place[ballots.subject], truth=self.ballots.truth[subjects]
            ),
            p_lens=self.p_lens[kept],
            p_not=self.p_not[kept],
            n_lens=self.n_lens[kept],
            n_not=self.n_not[kept],
            prior_log_odds=self.prior_log_odds[subjects],
        )

    def draw_log_odds(
        self,
        rng: np.random.Generator,
        n_draws: int = N_DRAWS,
        prior_error: np.ndarray | float = 0.0,
    ) -> np.ndarray:
        """Draw what the log odds may be, for all that is known of the agents.

        Every vote counts with a P_L and P_D drawn from their distributions,
        independently, as in Marshall et al. (2016).  These are Beta instead
        of binomial, which gives 0 and 1 to new agents.

        Parameters
        ----------
        rng
            Generator of random numbers.
        n_draws
            Number of draws.
        prior_error
            Standard deviation of the log odds before any vote, of all
            subjects or of each.

        Returns
        -------
        log_odds
            Shape ``(K, N)``, float32.
        """
        drawn = np.empty((n_draws, len(self.prior_log_odds)), dtype=np.float32)
        for draw in drawn:
            prior = self.prior_log_odds + prior_error * rng.standard_normal(len(self.prior_log_odds))
            draw[:] = compute_odds(self.ballots, self._draw_log_ratio(rng, slice(None)), prior)
        return drawn

    def compute_trajectory(
        self, subject: int, rng: np.random.Generator, n_draws: int = N_DRAWS
    ) -> tuple[np.ndarray, np.ndarray]:
        """Follow the posterior of a subject from vote to vote.

        Parameters
        ----------
        subject
            Index of the subject.
        rng
            Generator of random numbers.
        n_draws
            Number of draws.

        Returns
        -------
        posterior
            Before any vote and after each, shape ``(n + 1,)``.
        drawn
            The same for draws of the agents, shape ``(K, n + 1)``.
        """
        votes = np.flatnonzero(self.ballots.subject == subject)
        steps = np.stack([self.log_ratio[votes], *(self._draw_log_ratio(rng, votes) for _ in range(n_draws))])
        path = np.cumsum(np.insert(steps, 0, self.prior_log_odds[subject], axis=1), axis=1)
        return expit(path[0]), expit(path[1:])

    def _draw_log_ratio(self, rng: np.random.Generator, votes: np.ndarray | slice) -> np.ndarray:
        p_lens, p_not = (
            np.clip(rng.beta(p[votes] * n[votes], (1 - p[votes]) * n[votes]), *PROBABILITY_RANGE)
            for p, n in ((self.p_lens, self.n_lens), (self.p_not, self.n_not))
        )
        return compute_log_ratio(self.ballots.says_lens[votes], p_lens, p_not)


def compute_odds(ballots: Ballots, log_ratio: np.ndarray, prior_log_odds: np.ndarray) -> np.ndarray:
    """Return the log odds of subjects after their votes, shape ``(N,)``.

    Parameters
    ----------
    ballots
        The votes.
    log_ratio
        Logarithm of the likelihood ratio of each vote, shape ``(V,)``.
    prior_log_odds
        Log odds before any vote, shape ``(N,)``.
    """
    return prior_log_odds + np.bincount(ballots.subject, weights=log_ratio, minlength=len(ballots.truth))


def run_online(
    ballots: Ballots,
    *,
    prior: float | np.ndarray = PRIOR,
    prior_log_ratio: np.ndarray | None = None,
    pseudo_count: float = 2.0,
    prior_voter: tuple[float, float] = (0.5, 0.5),
) -> SwapResult:
    """Count the votes as they come, and learn from those of known truth.

    A vote counts with what was known of its agent before it.  If the truth
    of the subject is known the agent then learns: P_L <- (P_L N_L + correct)
    / (1 + N_L), N_L <- N_L + 1 for a lens, the same for P_D otherwise
    (Marshall et al. 2016).  The order of votes matters, but between voters
    it does not, nor between votes on subjects of unknown truth.

    Parameters
    ----------
    ballots
        The votes in the order in which they were cast.
    prior
        Probability of a lens before any vote, of all subjects or of each.
    prior_log_ratio
        Logarithm of a likelihood ratio of each subject to begin with, such
        as that of a machine, shape ``(N,)``.
    pseudo_count
        Half the number of votes that P_L and P_D of a new agent are taken to
        be known from; SWAP has 2, a "skepticism" of 2.
    prior_voter
        P_L and P_D of a new agent.  In SWAP these are 0.5: a vote counts
        nothing before the voter has seen subjects of known truth.
    """
    n_agents = len(ballots.voters)
    # Correct votes and all votes, by truth: 0 for other things, 1 for lenses.
    total = np.full((2, n_agents), 2 * pseudo_count)
    right = total * np.array([[prior_voter[1]], [prior_voter[0]]])
    at_vote = np.empty((4, len(ballots)))
    for v, (agent, subject, says_lens) in enumerate(
        zip(ballots.voter.tolist(), ballots.subject.tolist(), ballots.says_lens.tolist(), strict=True)
    ):
        at_vote[:2, v] = right[:, agent]
        at_vote[2:, v] = total[:, agent]
        truth = int(ballots.truth[subject])
        if truth >= 0:
            right[truth, agent] += says_lens == bool(truth)
            total[truth, agent] += 1
    p_not, p_lens = np.clip(at_vote[:2] / at_vote[2:], *PROBABILITY_RANGE)
    final_not, final_lens = np.clip(right / total, *PROBABILITY_RANGE)
    return SwapResult(
        ballots=ballots,
        agents=Agents(ballots.voters, final_lens, final_not, total[1], total[0]),
        p_lens=p_lens,
        p_not=p_not,
        n_lens=at_vote[3],
        n_not=at_vote[2],
        prior_log_odds=_compute_prior(ballots, prior, prior_log_ratio),
    )


def run_offline(
    ballots: Ballots,
    *,
    prior: float | np.ndarray = PRIOR,
    prior_log_ratio: np.ndarray | None = None,
    pseudo_count: float = 1.0,
    prior_voter: tuple[float, float] = (0.5, 0.5),
    max_iterations: int = 500,
    tolerance: float = 1e-6,
) -> SwapResult:
    r"""Find agents and posteriors together from all votes.

    Expectation maximization, the "offline" mode of Marshall et al. (2016):
    posteriors :math:`p_j` from the agents, known truths taking the place of
    posteriors, and agents from the posteriors,

    .. math::

        P_L = \frac{2 s\,P_{L0} + \sum_j p_j\,[\mathrm{LENS}_j]}
                   {2 s + \sum_j p_j},
        \qquad
        P_D = \frac{2 s\,P_{D0} + \sum_j (1 - p_j)\,[\mathrm{NOT}_j]}
                   {2 s + \sum_j (1 - p_j)},

    until they stay.  The order of the votes does not matter.  Agents begin at
    0.75, as lenses and the rest could not be told apart from 0.5.

    With few votes, none of them on subjects of known truth, and a small
    prior, whoever says LENS is taken for a bad voter rather than the subject
    for a lens; ``prior_voter`` is for voters who are known to be better.

    Parameters
    ----------
    ballots
        The votes, in any order.
    prior, prior_log_ratio
        As in `run_online`.
    pseudo_count
        The s in the formula; 1, Laplace's rule, in SWAP.
    prior_voter
        P_L0 and P_D0 in the formula; 0.5 in SWAP.
    max_iterations
        Largest number of iterations.
    tolerance
        Largest change of any P_L or P_D that ends the iterations.

    Returns
    -------
    result
        With ``converged`` False if the iterations were cut off.
    """
    start = _compute_prior(ballots, prior, prior_log_ratio)
    known = ballots.truth >= 0
    n_agents = len(ballots.voters)
    cell = 2 * ballots.voter + ballots.says_lens  # Agent and vote.
    p_lens = p_not = np.full(n_agents, 0.75)
    n_lens = n_not = np.full(n_agents, 2 * pseudo_count)
    iteration, converged = 0, False
    while not converged and iteration < max_iterations:
        log_ratio = compute_log_ratio(ballots.says_lens, p_lens[ballots.voter], p_not[ballots.voter])
        posterior = np.where(known, ballots.truth, expit(compute_odds(ballots, log_ratio, start)))
        weight = posterior[ballots.subject]
        on_lens = np.bincount(cell, weights=weight, minlength=2 * n_agents).reshape(n_agents, 2)
        on_not = np.bincount(cell, weights=1 - weight, minlength=2 * n_agents).reshape(n_agents, 2)
        n_lens, n_not = on_lens.sum(axis=1) + 2 * pseudo_count, on_not.sum(axis=1) + 2 * pseudo_count
        new_lens = np.clip((on_lens[:, 1] + 2 * pseudo_count * prior_voter[0]) / n_lens, *PROBABILITY_RANGE)
        new_not = np.clip((on_not[:, 0] + 2 * pseudo_count * prior_voter[1]) / n_not, *PROBABILITY_RANGE)
        change = np.abs([new_lens - p_lens, new_not - p_not]).max(initial=0.0)
        p_lens, p_not = new_lens, new_not
        iteration += 1
        converged = bool(change < tolerance)
    return SwapResult(
        ballots=ballots,
        agents=Agents(ballots.voters, p_lens, p_not, n_lens, n_not),
        p_lens=p_lens[ballots.voter],
        p_not=p_not[ballots.voter],
        n_lens=n_lens[ballots.voter],
        n_not=n_not[ballots.voter],
        prior_log_odds=start,
        n_iterations=iteration,
        converged=converged,
    )


def _compute_prior(ballots: Ballots, prior: float | np.ndarray, log_ratio: np.ndarray | None) -> np.ndarray:
    """Return the log odds before any vote, shape ``(N,)``."""
    log_odds = np.broadcast_to(logit(np.asarray(prior, dtype=np.float64)), ballots.truth.shape)
    return log_odds + (0.0 if log_ratio is None else log_ratio)

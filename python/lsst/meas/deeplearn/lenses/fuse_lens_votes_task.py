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

"""Fuse the score of the machine with people's votes."""

from __future__ import annotations

__all__ = ("FuseLensVotesConfig", "FuseLensVotesConnections", "FuseLensVotesTask")

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from astropy.table import Column, Table, vstack
from scipy.special import expit, logit

import lsst.pipe.base.connectionTypes as cT
from lsst.pex.config import ChoiceField, Field, FieldValidationError, ListField, RangeField
from lsst.pipe.base import (
    InvalidQuantumError,
    NoWorkFound,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection

from .known_lenses import flag_known_lenses, read_known_lenses
from .likelihood_ratio import ScoreCalibration
from .vote_files import (
    GRADES,
    LENS_GRADES,
    NOT_GRADES,
    VOTE_COLUMNS,
    make_ballots,
    select_last_votes,
    stack_votes,
)
from .votes import (
    DETECTION,
    PRIOR,
    REJECTION,
    Agents,
    SwapResult,
    Verdict,
    compute_expected_votes,
    compute_information,
    decide,
    run_offline,
    run_online,
)

CALIBRATED_COLUMN = "log_likelihood_ratio"
"""Column of the candidates with the calibrated logarithm of the likelihood
ratio of the machine, which `LensFinderTask` writes; it does not depend on how
common lenses are."""

FUSED_COLUMNS: Mapping[str, tuple[str, str]] = {
    "fused_rank": ("i4", "Rank by posterior among all candidates that were fused together, from 1"),
    "posterior": ("f8", "Probability of a lens after score and votes"),
    "posterior_low": ("f8", "16th percentile of the posterior for all that is known of voters and score"),
    "posterior_high": ("f8", "84th percentile of the same"),
    "log_odds": ("f8", "Natural logarithm of the odds of a lens after score and votes"),
    "log_odds_error": ("f8", "Standard deviation of log_odds"),
    "machine_log_ratio": ("f8", "Logarithm of the likelihood ratio of the machine; 0 if it says nothing"),
    "n_votes": ("i4", "Number of votes that count, one for each voter"),
    "n_votes_lens": ("i4", "Number of these that say lens"),
    "verdict": ("i1", "1 detected, -1 rejected, 0 undecided"),
    "truth": ("i2", "1 of a known lens, 0 of a known non-lens, -1 if not known; posteriors do not use it"),
    "vote_information": ("f4", "Information in bits that another vote is expected to give"),
    "votes_needed": ("f4", "Expected number of votes to a verdict; infinite if votes carry no information"),
    "vote_rank": ("i4", "Order of the next inspection page, from 1; -1 if decided or known"),
}
"""Type and description of what ``lens_candidates_fused`` has besides the
columns of the ranked candidates."""


class FuseLensVotesConnections(
    PipelineTaskConnections,
    dimensions=("skymap",),
    defaultTemplates={"outputName": "lens"},
):
    """Datasets that `FuseLensVotesTask` reads and writes.

    All tracts that are asked for go into one quantum: a voter has the same
    skill in all of them, and in one there may be a handful of votes.
    """

    candidates = cT.Input(
        doc="The candidates of each tract, each object once, the best first.",
        name="{outputName}_candidates_ranked",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
        multiple=True,
    )
    votes = cT.Input(
        doc="Votes on candidates of each tract, a row each (butler ingest-lens-votes); there may be none.",
        name="{outputName}_votes",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
        multiple=True,
        minimum=0,
    )
    fused = cT.Output(
        doc="The candidates with posterior and error from score and votes, the most probable lens first.",
        name="{outputName}_candidates_fused",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
        multiple=True,
    )
    voters = cT.Output(
        doc="How well each voter tells lenses from other things.",
        name="{outputName}_voters",
        storageClass="ArrowAstropy",
        dimensions=("skymap",),
    )


class FuseLensVotesConfig(PipelineTaskConfig, pipelineConnections=FuseLensVotesConnections):
    """Configuration of `FuseLensVotesTask`."""

    prior = RangeField(
        dtype=float,
        doc="Fraction of lenses among the candidates, before their score and votes are known: 2e-4 of "
        "objects that are merely massive galaxies; more if only high scores are in the table and machine is "
        "'none'.",
        default=PRIOR,
        min=0.0,
        max=1.0,
        inclusiveMin=False,
        inclusiveMax=False,
    )

    # The voters.
    mode = ChoiceField[str](
        doc="How the voters' skills are found.",
        default="offline",
        allowed={
            "offline": "From all votes together, by expectation maximization; the order does not matter.",
            "online": "From votes on candidates of known truth only, as they come in.",
        },
    )
    lensGrades = ListField[str](
        doc="Grades that count as votes for a lens; those in neither list are no vote.",
        default=list(LENS_GRADES),
    )
    notGrades = ListField[str](doc="Grades that count as votes against a lens.", default=list(NOT_GRADES))
    pseudoCount = RangeField(
        dtype=float,
        doc="Half the number of votes that P_L, and P_D, of a new voter are taken to be known from; by "
        "default that of Marshall et al. (2016), 1 offline and 2 online.",
        default=None,
        optional=True,
        min=0.1,
    )
    assumedVoter = ListField[float](
        doc="P_L and P_D that a voter is taken to have before any vote.  Marshall et al. (2016) have 0.5, "
        "0.5 for volunteers, who then learn from known candidates; without known ones, votes of experts "
        "would go for nothing.",
        default=[0.75, 0.9],
        length=2,
    )
    useVotesThatSawScore = Field[bool](
        doc="Use the votes that were cast with the score in view?  If the machine takes part too, it counts "
        "twice in these.",
        default=True,
    )

    # The machine.
    machine = ChoiceField[str](
        doc="How the machine takes part.",
        default="auto",
        allowed={
            "auto": "log_likelihood_ratio, written by LensFinderTask if its model is calibrated; where it "
            "is NaN, the score with its ROC curve if there is one here, and votes only if not.",
            "none": "Votes only.",
            "probability": "machineColumn is a calibrated probability, for machinePrevalence.",
            "roc": "machineColumn is a score with the ROC curve of rocThresholds and so on.",
        },
    )
    machineColumn = Field[str](
        doc="Column with the score, or with the probability if machine is 'probability'.", default="score"
    )
    machinePrevalence = RangeField(
        dtype=float,
        doc="Fraction of lenses for which the probability is calibrated.",
        default=0.5,
        min=0.0,
        max=1.0,
        inclusiveMin=False,
        inclusiveMax=False,
    )
    machineError = RangeField(
        dtype=float,
        doc="Standard deviation of the log odds of a calibrated probability or ratio that comes without an "
        "error.",
        default=0.0,
        min=0.0,
    )
    rocThresholds = ListField[float](doc="Scores at which the ROC curve is given.", default=[])
    rocTruePositiveRate = ListField[float](
        doc="Fraction of lenses with this score or a higher one, for each threshold.", default=[]
    )
    rocFalsePositiveRate = ListField[float](
        doc="Fraction of other objects with this score or a higher one, for each threshold.", default=[]
    )
    rocNLens = RangeField(
        dtype=int, doc="Number of lenses that the ROC curve was measured on.", default=1, min=1
    )
    rocNNot = RangeField(
        dtype=int, doc="Number of other objects that the ROC curve was measured on.", default=1, min=1
    )

    # The outcome.
    detection = RangeField(
        dtype=float, doc="Posterior above which a candidate is detected.", default=DETECTION, min=0.0, max=1.0
    )
    rejection = RangeField(
        dtype=float, doc="Posterior below which a candidate is rejected.", default=REJECTION, min=0.0, max=1.0
    )
    doFlagKnownLenses = Field[bool](
        doc="Add the column known_lens, from the catalogue of the optional package lenscat or that of "
        "knownLenses?  It changes no posterior.",
        default=False,
    )
    knownLenses = Field[str](
        doc="Path of a catalogue with name, ra and dec (degrees), instead of that of lenscat.",
        default=None,
        optional=True,
    )
    nDraws = RangeField(
        dtype=int, doc="Number of draws of the voters' skills that give the errors.", default=200, min=10
    )
    seed = Field[int](doc="Seed of the draws.", default=1)

    def validate(self) -> None:
        super().validate()
        grades = [*self.lensGrades, *self.notGrades]
        if len(set(grades)) < len(grades) or not set(grades) <= set(GRADES):
            raise FieldValidationError(
                self.__class__.notGrades,
                self,
                f"A grade is one of {', '.join(GRADES)} and counts for a lens or against it; lensGrades are "
                f"{', '.join(self.lensGrades)}, notGrades {', '.join(self.notGrades)}.",
            )
        if not 0 < self.rejection < self.detection < 1:
            raise FieldValidationError(
                self.__class__.rejection, self, "The threshold of rejection must be below that of detection."
            )
        if not all(0 < p < 1 for p in self.assumedVoter):
            raise FieldValidationError(self.__class__.assumedVoter, self, "Probabilities are from 0 to 1.")
        if self.machine == "roc" or (self.machine == "auto" and self.rocThresholds):
            sizes = {len(self.rocThresholds), len(self.rocTruePositiveRate), len(self.rocFalsePositiveRate)}
            if len(sizes) > 1 or 0 in sizes:
                raise FieldValidationError(
                    self.__class__.rocThresholds,
                    self,
                    "rocThresholds, rocTruePositiveRate and rocFalsePositiveRate must have the same length, "
                    "and that not 0.",
                )
            try:
                self.make_calibration()
            except ValueError as err:
                raise FieldValidationError(self.__class__.rocTruePositiveRate, self, str(err)) from err

    def make_calibration(self) -> ScoreCalibration:
        """Return the calibration of the ROC curve."""
        return ScoreCalibration.from_roc(
            list(self.rocThresholds),
            list(self.rocTruePositiveRate),
            list(self.rocFalsePositiveRate),
            n_lens=self.rocNLens,
            n_not=self.rocNNot,
        )


class FuseLensVotesTask(PipelineTask):
    """Fuse the score of the machine with people's votes on lens candidates.

    Each voter is an agent with the probabilities P_L to call a lens a lens
    and P_D to call another thing none, as in SWAP (Marshall et al. 2016);
    the machine takes part by the likelihood ratio of its score (Holloway et
    al. 2024).  All of these multiply the odds of the prior, which supposes
    that voters and machine err independently of each other.  See
    `lsst.meas.deeplearn.lenses.votes`.
    """

    ConfigClass: ClassVar[type[FuseLensVotesConfig]] = FuseLensVotesConfig
    _DefaultName: ClassVar[str] = "fuseLensVotes"
    config: FuseLensVotesConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        inputs = butlerQC.get(inputRefs)
        tracts = [int(ref.dataId["tract"]) for ref in inputRefs.candidates]
        sizes = [len(table) for table in inputs["candidates"]]
        candidates = vstack(inputs["candidates"], join_type="exact", metadata_conflicts="silent")
        candidates["tract"] = np.repeat(tracts, sizes)
        outputs = self.run(candidates, inputs.get("votes", ()))
        butlerQC.put(outputs.voters, outputRefs.voters)
        for ref in outputRefs.fused:
            butlerQC.put(outputs.fused[outputs.fused["tract"] == int(ref.dataId["tract"])], ref)

    def run(self, candidates: Table, votes: Sequence[Table] = ()) -> Struct:
        """Compute a posterior for each candidate.

        Parameters
        ----------
        candidates
            The table ``ranked`` of `RankLensCandidatesTask`, of one tract or
            of several.
        votes
            Tables of votes, with the columns of
            `lsst.meas.deeplearn.lenses.vote_files.VOTE_COLUMNS`.  Of each
            voter and candidate the last vote counts; votes on candidates that
            are not in the table count only if their truth is known.

        Returns
        -------
        result : `lsst.pipe.base.Struct`
            Results as a struct with attributes:

            ``fused``
                The columns of ``candidates`` and of `FUSED_COLUMNS`, the
                largest posterior first, equal ones as in ``candidates``
                (`astropy.table.Table`).
            ``voters``
                P_L, P_D and the skill of each voter with their errors
                (`astropy.table.Table`).

        Raises
        ------
        lsst.pipe.base.NoWorkFound
            Raised if there are no candidates.
        lsst.pipe.base.InvalidQuantumError
            Raised if the candidates lack ``config.machineColumn``.
        VotesError
            Raised if a candidate is known both as a lens and as none.
        """
        if not len(candidates):
            raise NoWorkFound("There are no candidates.")
        rng = np.random.default_rng(self.config.seed)
        ids = np.asarray(candidates["objectId"], dtype=np.int64)
        counted = self._select_votes(stack_votes(votes), ids)
        ballots = make_ballots(
            counted, ids, lens_grades=self.config.lensGrades, not_grades=self.config.notGrades
        )
        # Known ones that are no candidates follow these, and have no score.
        n_extra = len(ballots.truth) - len(ids)
        machine, machine_error = (np.pad(x, (0, n_extra)) for x in self._compute_machine(candidates))
        run = run_offline if self.config.mode == "offline" else run_online
        settings: dict[str, Any] = {"prior_voter": tuple(self.config.assumedVoter)}
        if self.config.pseudoCount is not None:
            settings["pseudo_count"] = self.config.pseudoCount
        result = run(ballots, prior=self.config.prior, prior_log_ratio=machine, **settings)
        if not result.converged:
            self.log.warning(
                "Expectation maximization has not converged in %d iterations.", result.n_iterations
            )
        error, low, high = self._compute_errors(result, machine_error, rng)
        fused = self._make_table(candidates, result, machine, error, low, high)
        self._describe(fused, result)
        return Struct(fused=fused, voters=result.agents.to_table())

    def _select_votes(self, votes: Table, ids: np.ndarray) -> Table:
        """Keep the votes that count; say what happens to the others."""
        if missing := set(VOTE_COLUMNS) - set(votes.colnames):
            raise InvalidQuantumError(f"The table of votes has no columns {sorted(missing)}.")
        last = select_last_votes(votes)
        used = np.isin(last["objectId"], ids) | (np.asarray(last["truth"]) >= 0)
        saw_score = np.asarray(last["saw_score"], dtype=bool) & used
        self.metadata["n_votes"] = len(votes)
        self.metadata["n_superseded"] = len(votes) - len(last)
        self.metadata["n_unknown"] = int((~used).sum())
        self.metadata["n_saw_score"] = int(saw_score.sum())
        if self.metadata["n_unknown"]:
            self.log.warning(
                "%d votes are on candidates that are not in the table; do they belong to another run?",
                self.metadata["n_unknown"],
            )
        if not self.config.useVotesThatSawScore:
            used &= ~saw_score
        elif saw_score.any() and self.config.machine != "none":
            self.log.warning(
                "%d votes were cast with the score in view; the machine counts twice in these.",
                self.metadata["n_saw_score"],
            )
        return last[used]

    def _compute_machine(self, candidates: Table) -> tuple[np.ndarray, np.ndarray]:
        """Return log likelihood ratios of the machine and their errors.

        Parameters
        ----------
        candidates
            The candidates.

        Returns
        -------
        log_ratio, error
            Both 0 where the machine says nothing, shape ``(N,)``.
        """
        config, n = self.config, len(candidates)
        log_ratio, error = np.full(n, np.nan), np.zeros(n)
        if config.machine == "auto" and CALIBRATED_COLUMN in candidates.colnames:
            log_ratio = np.asarray(candidates[CALIBRATED_COLUMN], dtype=np.float64)
            error = np.full(n, config.machineError)
            if {"probability", "probability_err"} <= set(candidates.colnames):
                p, p_err = (
                    np.asarray(candidates[c], dtype=np.float64) for c in ("probability", "probability_err")
                )
                with np.errstate(divide="ignore", invalid="ignore"):
                    given = p_err / (p * (1 - p))
                error = np.where(np.isfinite(given), given, error)
        elif config.machine == "probability":
            # No machine is ever as sure as 32-bit numbers round to.
            p = np.clip(self._get_column(candidates, config.machineColumn), 1e-7, 1 - 1e-7)
            log_ratio, error = logit(p) - logit(config.machinePrevalence), np.full(n, config.machineError)
        if config.machine == "roc" or (config.machine == "auto" and config.rocThresholds):
            calibration = config.make_calibration()
            bins = calibration.find_bins(self._get_column(candidates, config.machineColumn))
            use = np.isnan(log_ratio) & (bins >= 0)
            log_ratio = np.where(use, calibration.log_ratios[bins], log_ratio)
            error = np.where(use, calibration.errors[bins], error)
        silent = np.isnan(log_ratio)
        self.metadata["n_machine"] = int((~silent).sum())
        if config.machine == "auto" and silent.all():
            self.log.warning(
                "No candidate has a %s, so the machine takes no part.  Calibrate the model, configure "
                "rocThresholds, or set machine to 'none'.",
                CALIBRATED_COLUMN,
            )
        return np.where(silent, 0.0, log_ratio), np.where(silent, 0.0, error)

    def _get_column(self, candidates: Table, name: str) -> np.ndarray:
        """Return a column of the candidates as float64."""
        if name not in candidates.colnames:
            raise InvalidQuantumError(
                f"The candidates have no column {name!r}; configure machineColumn.  They have "
                f"{', '.join(candidates.colnames)}."
            )
        return np.asarray(candidates[name], dtype=np.float64)

    def _compute_errors(
        self, result: SwapResult, machine_error: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the error of the log odds and the limits of the posterior.

        Parameters
        ----------
        result
            Posteriors and agents.
        machine_error
            Standard deviation of the machine's log ratios, shape ``(N,)``.
        rng
            Generator of random numbers.

        Returns
        -------
        error, low, high
            Standard deviation of the log odds; 16th and 84th percentile of
            the posterior; shape ``(N,)``.
        """
        log_odds, error = result.log_odds, machine_error.copy()
        low, high = log_odds - error, log_odds + error
        voted = np.flatnonzero(result.ballots.n_votes)
        if len(voted):
            drawn = result.select_subjects(voted).draw_log_odds(rng, self.config.nDraws, machine_error[voted])
            error[voted] = drawn.std(axis=0, dtype=np.float64)
            low[voted], high[voted] = np.percentile(drawn, (16, 84), axis=0)
        return error, expit(low), expit(high)

    def _make_table(
        self,
        candidates: Table,
        result: SwapResult,
        machine: np.ndarray,
        error: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
    ) -> Table:
        """Return the candidates with what is known of them now, in order."""
        n, ballots = len(candidates), result.ballots
        log_odds = result.log_odds[:n]
        posterior = expit(log_odds)
        verdict = decide(posterior, detection=self.config.detection, rejection=self.config.rejection)
        says_lens = np.bincount(ballots.subject, weights=ballots.says_lens, minlength=n)[:n]
        p_lens, p_not = self._get_typical_voter(result)
        information = compute_information(posterior, p_lens, p_not)
        truth = ballots.truth[:n]
        is_open = (verdict == Verdict.UNDECIDED) & (truth < 0)
        values = {
            "fused_rank": _rank(log_odds),
            "posterior": posterior,
            "posterior_low": low[:n],
            "posterior_high": high[:n],
            "log_odds": log_odds,
            "log_odds_error": error[:n],
            "machine_log_ratio": machine[:n],
            "n_votes": ballots.n_votes[:n],
            "n_votes_lens": says_lens,
            "verdict": verdict,
            "truth": truth,
            "vote_information": information,
            "votes_needed": compute_expected_votes(
                posterior, p_lens, p_not, detection=self.config.detection, rejection=self.config.rejection
            ),
            "vote_rank": np.where(is_open, _rank(np.where(is_open, information, -1.0)), -1),
        }
        fused = candidates.copy()
        for name, (dtype, description) in FUSED_COLUMNS.items():
            fused[name] = Column(values[name].astype(dtype), description=description)
        if self.config.doFlagKnownLenses:
            flag_known_lenses(fused, read_known_lenses(self.config.knownLenses))
            self.metadata["n_known_lenses"] = int((fused["known_lens"] != "").sum())
        return fused[np.argsort(fused["fused_rank"])]

    def _get_typical_voter(self, result: SwapResult) -> tuple[float, float]:
        """Return P_L and P_D of the mean voter, weighted by their votes."""
        if not len(result.ballots):
            p_lens, p_not = self.config.assumedVoter
            return p_lens, p_not
        agents: Agents = result.agents
        weights = np.bincount(result.ballots.voter, minlength=len(agents))
        return float(np.average(agents.p_lens, weights=weights)), float(
            np.average(agents.p_not, weights=weights)
        )

    def _describe(self, fused: Table, result: SwapResult) -> None:
        """Log and record what came out."""
        verdict = np.asarray(fused["verdict"])
        self.metadata["n_voters"] = len(result.agents)
        self.metadata["n_counted"] = len(result.ballots)
        self.metadata["n_iterations"] = result.n_iterations
        self.metadata["n_detected"] = int((verdict == Verdict.DETECTED).sum())
        self.metadata["n_rejected"] = int((verdict == Verdict.REJECTED).sum())
        self.log.info(
            "%d votes of %d voters on %d candidates: %d detected, %d rejected.",
            len(result.ballots),
            len(result.agents),
            int((np.asarray(fused["n_votes"]) > 0).sum()),
            self.metadata["n_detected"],
            self.metadata["n_rejected"],
        )


def _rank(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, the largest first, equal ones in order."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    return ranks

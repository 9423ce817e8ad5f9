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

"""What votes and a machine find together, on a simulated campaign.

Run as ``python benchmarks/vote_campaign.py``; ``--figure`` writes the figure
of the documentation.
"""

from __future__ import annotations

import argparse

import numpy as np

from lsst.meas.deeplearn.lenses.likelihood_ratio import ScoreCalibration
from lsst.meas.deeplearn.lenses.votes import Ballots, run_offline

PREVALENCE = 0.01
"""Fraction of lenses in the list that is looked at."""

SEPARATION = 2.68
"""Distance of the Gaussian scores of lenses and others: a third of the lenses
at a false-positive rate of 1e-3, as the best single machine of Holloway et
al. (2024)."""

FALSE_POSITIVE_RATE = 1e-3
"""Where the completeness is stated."""

VARIANTS = ("machine", "people", "both", "both, votes where they help")


def simulate(
    rng: np.random.Generator, n: int, n_votes: int, args: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Simulate a campaign with ``n_votes`` votes per subject on average.

    Returns
    -------
    figures
        By variant, completeness at the false-positive rate, completeness and
        precision at a posterior above 0.5, and the mean pull of the voters'
        skills and its standard deviation.
    """
    is_lens, known = rng.random(n) < PREVALENCE, np.zeros(n, dtype=bool)
    # Simulated lenses and known non-lenses are mixed in besides.
    n_known = int(n * args.known)
    is_lens = np.append(is_lens, rng.random(n_known) < 0.5)
    known = np.append(known, np.ones(n_known, dtype=bool))
    p_lens, p_not = rng.uniform(0.6, 0.95, args.voters), rng.uniform(0.8, 0.98, args.voters)
    scores = rng.normal(SEPARATION * is_lens, 1.0)
    past = rng.random(20000) < 0.5
    machine = ScoreCalibration.from_scores(rng.normal(SEPARATION * past, 1.0), past).compute_log_ratio(scores)
    machine[known] = 0.0

    def vote(subjects: np.ndarray) -> Ballots:
        voter = rng.integers(args.voters, size=len(subjects))
        says = rng.random(len(subjects)) < np.where(is_lens[subjects], p_lens[voter], 1 - p_not[voter])
        truth = np.where(known, is_lens, -1).astype(np.int8)
        return Ballots(tuple(map(str, range(args.voters))), voter, subjects, says, truth)

    everyone = np.repeat(np.arange(n + n_known), n_votes)
    # The same number of votes, on the quarter with the highest scores.
    best = np.argsort(-np.where(known, -np.inf, machine), kind="stable")[: n // 4]
    chosen = np.concatenate([np.repeat(best, 4 * n_votes), np.repeat(np.flatnonzero(known), n_votes)])
    figures = {}
    for variant, subjects, ratio in (
        ("people", everyone, None),
        ("both", everyone, machine),
        ("both, votes where they help", chosen, machine),
    ):
        result = run_offline(vote(subjects), prior=PREVALENCE, prior_log_ratio=ratio)
        agents = result.agents
        pull = np.concatenate(
            [(agents.p_lens - p_lens) / agents.p_lens_error, (agents.p_not - p_not) / agents.p_not_error]
        )
        figures[variant] = np.append(
            measure(result.posterior[~known], is_lens[~known]), (pull.mean(), pull.std())
        )
    odds = PREVALENCE / (1 - PREVALENCE) * np.exp(machine[~known])
    figures["machine"] = np.append(
        measure(odds / (1 + odds), is_lens[~known], scores[~known]), (np.nan, np.nan)
    )
    return figures


def measure(posterior: np.ndarray, is_lens: np.ndarray, order: np.ndarray | None = None) -> np.ndarray:
    """Return completeness at a false-positive rate, and at 0.5 with precision.

    Parameters
    ----------
    posterior
        Posterior of each subject.
    is_lens
        What it is.
    order
        What subjects are ordered by, if not by their posterior.
    """
    order = posterior if order is None else order
    threshold = np.quantile(order[~is_lens], 1 - FALSE_POSITIVE_RATE)
    found = posterior > 0.5
    return np.array(
        [
            (order[is_lens] > threshold).mean(),
            found[is_lens].mean(),
            is_lens[found].mean() if found.any() else np.nan,
        ]
    )


def plot(path: str, n_votes: list[int], mean: dict[str, np.ndarray], error: dict[str, np.ndarray]) -> None:
    """Plot completeness and precision against the number of votes."""
    from lsst.utils.plotting import make_figure

    figure = make_figure(figsize=(8, 3.4), dpi=110, layout="constrained")
    titles = (f"Completeness at FPR {FALSE_POSITIVE_RATE:g}", "Completeness, P > 0.5", "Precision, P > 0.5")
    colors = dict(zip(VARIANTS, ("0.5", "tab:blue", "tab:orange", "tab:red"), strict=True))
    for k, (axes, title) in enumerate(zip(figure.subplots(1, 3, sharey=True), titles, strict=True)):
        for variant in VARIANTS:
            axes.errorbar(
                n_votes, mean[variant][:, k], error[variant][:, k], label=variant, color=colors[variant],
                marker="none" if variant == "machine" else "o", markersize=4, capsize=2,
            )  # fmt: skip
        axes.set(xlabel="Votes per candidate", title=title, xticks=n_votes, ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path)


def main() -> None:
    """Print the figures, and plot them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", type=int, default=20000, help="candidates in each campaign")
    parser.add_argument("--campaigns", type=int, default=10, help="campaigns, whose scatter gives the errors")
    parser.add_argument("--voters", type=int, default=30, help="P_L from 0.6 to 0.95, P_D from 0.8 to 0.98")
    parser.add_argument(
        "--known", type=float, default=0.05, help="known subjects besides, half of them lenses"
    )
    parser.add_argument("--votes", type=int, nargs="+", default=[1, 2, 3, 5, 8], help="votes per candidate")
    parser.add_argument("--figure", help="file to write a figure to")
    args = parser.parse_args()
    mean: dict[str, list[np.ndarray]] = {variant: [] for variant in VARIANTS}
    error: dict[str, list[np.ndarray]] = {variant: [] for variant in VARIANTS}
    print(
        f"{args.campaigns} campaigns of {args.subjects} candidates, {PREVALENCE:.0%} lenses.\n"
        f"{'votes':>5}  {'':28}{'TPR at ' + format(FALSE_POSITIVE_RATE, 'g'):>16}{'completeness':>16}"
        f"{'precision':>16}{'mean pull':>16}{'its scatter':>16}"
    )
    for n_votes in args.votes:
        runs = [
            simulate(np.random.default_rng([n_votes, k]), args.subjects, n_votes, args)
            for k in range(args.campaigns)
        ]
        for variant in VARIANTS:
            values = np.array([run[variant] for run in runs])
            mean[variant].append(values.mean(axis=0))
            error[variant].append(values.std(axis=0, ddof=1) / np.sqrt(len(values)))
            row = "".join(
                f"{m:9.3f} ±{e:.3f}" if np.isfinite(m) else f"{'':16}"
                for m, e in zip(mean[variant][-1], error[variant][-1], strict=True)
            )
            print(f"{n_votes:5}  {variant:28}{row}")
    pull, scatter = np.nanmean([mean[variant] for variant in VARIANTS], axis=(0, 1))[3:]
    print(f"Skills of voters: mean pull {pull:.3f}, scatter {scatter:.3f}.")
    if args.figure:
        plot(args.figure, args.votes, *({v: np.array(x) for v, x in part.items()} for part in (mean, error)))


if __name__ == "__main__":
    main()

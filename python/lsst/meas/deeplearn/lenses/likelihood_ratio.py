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

"""What the score of a machine is worth, as a voter among the voters.

A machine takes part in the fusion of `lsst.meas.deeplearn.lenses.votes` by the
likelihood ratio of its score (Holloway et al. 2024, arXiv:2311.07455), which
multiplies the odds of a lens as a vote does.  With the fraction of lenses
among the objects at hand it is a calibrated probability; how good those are
is measured by `lsst.meas.deeplearn.lenses.calibration`.
"""

from __future__ import annotations

__all__ = ("ScoreCalibration",)

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreCalibration:
    """What the score of a machine says, as likelihood ratios.

    Scores fall into M + 1 bins between M thresholds.  The ratio of the
    fractions of lenses and of other things in a bin is its likelihood ratio:
    the slope of the ROC curve there, which does not depend on how common
    lenses were where it was measured.
    """

    thresholds: np.ndarray
    """Scores, ascending, shape ``(M,)``; a score that is equal to a threshold
    falls into the bin above it."""

    n_lens: np.ndarray
    """Number of lenses in each bin, shape ``(M + 1,)``."""

    n_not: np.ndarray
    """Number of other things in each bin, shape ``(M + 1,)``."""

    @classmethod
    def from_roc(
        cls,
        thresholds: Sequence[float],
        true_positive_rate: Sequence[float],
        false_positive_rate: Sequence[float],
        *,
        n_lens: int,
        n_not: int,
    ) -> ScoreCalibration:
        """Make from points of a ROC curve.

        Parameters
        ----------
        thresholds
            Scores, in any order.
        true_positive_rate
            Fraction of the lenses with this score or a higher one.
        false_positive_rate
            Fraction of the other things with this score or a higher one.
        n_lens, n_not
            Numbers of lenses and of other things that it was measured on.

        Raises
        ------
        ValueError
            Raised if the points do not fall as the threshold rises, or are
            not fractions.
        """
        points = np.array([thresholds, true_positive_rate, false_positive_rate], dtype=np.float64)
        points = points[:, np.argsort(points[0], kind="stable")]
        rates = np.pad(points[1:], ((0, 0), (1, 1)), constant_values=((0, 0), (1, 0)))
        rates[:, 0] = 1.0
        fractions = -np.diff(rates, axis=1)
        if not (np.isfinite(points).all() and (fractions >= 0).all()):
            raise ValueError(
                "The rates of a ROC curve lie between 0 and 1 and do not rise with the threshold; "
                f"these are {rates[0, 1:-1].tolist()} and {rates[1, 1:-1].tolist()}."
            )
        return cls(points[0], fractions[0] * n_lens, fractions[1] * n_not)._merge(0.0)

    @classmethod
    def from_scores(
        cls, scores: np.ndarray, is_lens: np.ndarray, *, min_count: float = 10.0
    ) -> ScoreCalibration:
        """Make from scores of subjects of known truth.

        Bins are as narrow as they can be with ``min_count`` lenses and as
        many other things in each, and ratios that do not fall with the
        score (pooled adjacent violators, so the convex hull of the ROC
        curve).

        Parameters
        ----------
        scores
            Scores, shape ``(N,)``; NaN are left out.
        is_lens
            Whether each is a lens, shape ``(N,)``.
        min_count
            Smallest number of either kind in a bin.

        Raises
        ------
        ValueError
            Raised if there are fewer than ``min_count`` of either kind.
        """
        scores, is_lens = np.asarray(scores, dtype=np.float64), np.asarray(is_lens, dtype=bool)
        kept = np.isfinite(scores)
        scores, is_lens = scores[kept], is_lens[kept]
        if min(is_lens.sum(), (~is_lens).sum()) < min_count:
            raise ValueError(
                f"{is_lens.sum()} lenses and {(~is_lens).sum()} other things with a score are too few for a "
                f"calibration; it needs {min_count:g} of each."
            )
        values, index = np.unique(scores, return_inverse=True)
        counts = [np.bincount(index, weights=kind, minlength=len(values)) for kind in (is_lens, ~is_lens)]
        return cls(values[1:], counts[0], counts[1])._merge(min_count)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ScoreCalibration:
        """Make from what `to_dict` returned.

        Parameters
        ----------
        content
            Entry ``calibration`` of the record of a model package.

        Raises
        ------
        ValueError
            Raised if entries are missing or do not fit each other.
        """
        try:
            arrays = [np.asarray(content[key], dtype=np.float64) for key in ("thresholds", "n_lens", "n_not")]
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError("A calibration has lists of numbers thresholds, n_lens and n_not.") from err
        thresholds, n_lens, n_not = arrays
        if not (thresholds.ndim == 1 and n_lens.shape == n_not.shape == (len(thresholds) + 1,)):
            raise ValueError("A calibration has one bin more than it has thresholds.")
        if (np.diff(thresholds) <= 0).any() or (n_lens < 0).any() or (n_not < 0).any():
            raise ValueError("The thresholds of a calibration rise, and its counts are not negative.")
        return cls(thresholds, n_lens, n_not)

    def to_dict(self) -> dict[str, list[float]]:
        """Return what can be written as JSON; see `from_dict`."""
        return {
            "thresholds": self.thresholds.tolist(),
            "n_lens": self.n_lens.tolist(),
            "n_not": self.n_not.tolist(),
        }

    def _merge(self, min_count: float) -> ScoreCalibration:
        """Join bins until counts are large enough and ratios rise."""
        # Stack of bins: lower edge, lenses, other things.
        stack: list[list[float]] = []
        edges = [-np.inf, *self.thresholds.tolist()]
        for edge, lens, other in zip(edges, self.n_lens.tolist(), self.n_not.tolist(), strict=True):
            stack.append([edge, lens, other])
            while len(stack) > 1 and (
                min(stack[-2][1:]) < min_count or stack[-2][1] * stack[-1][2] >= stack[-1][1] * stack[-2][2]
            ):
                _, lens, other = stack.pop()
                stack[-1][1] += lens
                stack[-1][2] += other
        while len(stack) > 1 and min(stack[-1][1:]) < min_count:
            _, lens, other = stack.pop()
            stack[-1][1] += lens
            stack[-1][2] += other
        merged = np.array(stack).T
        return ScoreCalibration(merged[0, 1:], merged[1], merged[2])

    @property
    def log_ratios(self) -> np.ndarray:
        """Logarithm of the likelihood ratio of each bin, shape ``(M + 1,)``.

        Half a count is added to each bin, so that a bin that no example
        fell into does not decide alone.
        """
        lens, other = self.n_lens + 0.5, self.n_not + 0.5
        return np.log(lens / lens.sum()) - np.log(other / other.sum())

    @property
    def errors(self) -> np.ndarray:
        """Standard deviations of `log_ratios` from the counts."""
        return np.sqrt(1 / (self.n_lens + 0.5) + 1 / (self.n_not + 0.5))

    def find_bins(self, scores: np.ndarray) -> np.ndarray:
        """Return the bin of each score, -1 of NaN.

        Parameters
        ----------
        scores
            Scores, shape ``(N,)``.
        """
        scores = np.asarray(scores, dtype=np.float64)
        return np.where(np.isnan(scores), -1, np.searchsorted(self.thresholds, scores, side="right"))

    def compute_log_ratio(self, scores: np.ndarray) -> np.ndarray:
        """Return the logarithm of the likelihood ratio, 0 of NaN.

        Parameters
        ----------
        scores
            Scores, shape ``(N,)``.
        """
        bins = self.find_bins(scores)
        return np.where(bins < 0, 0.0, self.log_ratios[bins])

    def draw_log_ratio(self, scores: np.ndarray, rng: np.random.Generator, n_draws: int) -> np.ndarray:
        """Draw what the log ratios may be, shape ``(K, N)``.

        Scores of a bin share its error.

        Parameters
        ----------
        scores
            Scores, shape ``(N,)``.
        rng
            Generator of random numbers.
        n_draws
            Number of draws.
        """
        bins = self.find_bins(scores)
        drawn = self.log_ratios + self.errors * rng.standard_normal((n_draws, len(self.errors)))
        return np.where(bins < 0, 0.0, drawn[:, bins])

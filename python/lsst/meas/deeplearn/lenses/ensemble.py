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


"""What the networks of an ensemble say together.

Networks that were trained apart err apart: the mean of their outputs is
better than any of them, and their scatter says how far to trust it
(Lakshminarayanan et al. 2017, arXiv:1612.01474).
"""

from __future__ import annotations

__all__ = ("EnsembleScores", "combine_logits", "find_calibration")

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.special import expit, logit

from ..model_package import ModelPackage, ModelPackageError
from .likelihood_ratio import ScoreCalibration


@dataclasses.dataclass(frozen=True, eq=False)
class EnsembleScores:
    """Scores of N objects by K networks together."""

    score: np.ndarray
    """Logistic function of the mean logit, shape ``(N,)``."""

    score_err: np.ndarray
    """Standard deviation of the scores of the networks, shape ``(N,)``; NaN
    for one network."""

    log_likelihood_ratio: np.ndarray
    """Natural logarithm of the likelihood ratio of a lens to anything else,
    mean over the networks, shape ``(N,)``; NaN without calibration."""

    probability: np.ndarray
    """Probability of a lens, shape ``(N,)``; NaN without calibration."""

    probability_err: np.ndarray
    """Standard deviation of the log ratio times p (1 - p), shape ``(N,)``;
    NaN without calibration."""


def combine_logits(
    logits: np.ndarray, calibrations: Sequence[ScoreCalibration | None], *, prevalence: float
) -> EnsembleScores:
    """Combine the outputs of the networks of an ensemble.

    Parameters
    ----------
    logits
        Output of each network, shape ``(K, N)``.
    calibrations
        Calibration of the logit of each network, or `None`.
    prevalence
        Fraction of lenses among the objects, in (0, 1).

    Returns
    -------
    scores
        Likelihood ratios and probabilities are NaN unless all networks are
        calibrated.  The variance of the log ratio is that over the networks
        plus the mean one of the calibrations: networks are calibrated on the
        same examples, so that their errors do not average out.
    """
    n_networks, n = logits.shape
    logits = np.asarray(logits, dtype=np.float64)
    nothing = np.full(n, np.nan)
    score_err = expit(logits).std(axis=0, ddof=1) if n_networks > 1 else nothing
    ratio = probability = probability_err = nothing
    known = [calibration for calibration in calibrations if calibration is not None]
    if len(known) == n_networks:
        ratios, errors = (np.empty((n_networks, n)) for _ in range(2))
        for k, calibration in enumerate(known):
            ratios[k] = calibration.compute_log_ratio(logits[k])
            errors[k] = calibration.errors[calibration.find_bins(logits[k])]
        ratio = ratios.mean(axis=0)
        variance = (errors**2).mean(axis=0) + (ratios.var(axis=0, ddof=1) if n_networks > 1 else 0.0)
        ratio[np.isnan(logits).any(axis=0)] = np.nan
        log_odds = logit(prevalence) + ratio
        probability = expit(log_odds)
        probability_err = np.sqrt(variance) * probability * expit(-log_odds)
    return EnsembleScores(
        score=expit(logits.mean(axis=0)),
        score_err=score_err,
        log_likelihood_ratio=ratio,
        probability=probability,
        probability_err=probability_err,
    )


def find_calibration(model: ModelPackage) -> ScoreCalibration | None:
    """Return the calibration of a network, or `None` if it has none.

    Parameters
    ----------
    model
        Model package, with the calibration of its logit as ``calibration``
        in its record.

    Raises
    ------
    ModelPackageError
        Raised if there is one that makes no sense.
    """
    values = model.record.get("calibration")
    if values is None:
        return None
    try:
        return ScoreCalibration.from_dict(values)
    except ValueError as err:
        raise ModelPackageError(
            f"The calibration in the record of model {model.name} {model.version} makes no sense: {err}"
        ) from err

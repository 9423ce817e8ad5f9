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

"""Logistic regression, for baselines and for linear probes."""

from __future__ import annotations

__all__ = ("LogisticModel", "compute_probe_auroc", "fit_logistic")

import dataclasses
import math

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from ..metrics import check_classes, compute_auroc


@dataclasses.dataclass(frozen=True, eq=False)
class LogisticModel:
    """A logistic regression."""

    mean: np.ndarray
    """Values subtracted from the features, shape ``(F,)``."""

    scale: np.ndarray
    """Values that divide them then, shape ``(F,)``."""

    weights: np.ndarray
    """Weights of the scaled features, shape ``(F,)``."""

    intercept: float
    """What is added to their sum."""

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Return the logits of examples, shape ``(N,)``.

        Parameters
        ----------
        features
            Shape ``(N, F)``.
        """
        return np.asarray(((features - self.mean) / self.scale) @ self.weights + self.intercept)


def fit_logistic(features: np.ndarray, labels: np.ndarray, *, penalty: float = 1e-3) -> LogisticModel:
    r"""Fit a logistic regression to scaled features.

    The mean negative log-likelihood, with both classes of equal weight, plus
    :math:`\lambda |w|^2 / 2` is smallest; features are scaled to zero mean
    and unit variance first.

    Parameters
    ----------
    features
        Shape ``(N, F)``.
    labels
        Whether an example is positive, shape ``(N,)``.
    penalty
        The :math:`\lambda` of ridge regression.

    Raises
    ------
    ValueError
        Raised if features are not finite or a class is empty.
    """
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=bool)
    n1, n0 = check_classes(labels)
    if not np.isfinite(features).all():
        raise ValueError("Features must be finite.")
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    x = (features - mean) / scale
    share = np.where(labels, 0.5 / n1, 0.5 / n0)

    def compute_loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, intercept = parameters[:-1], parameters[-1]
        z = x @ weights + intercept
        residual = share * (expit(z) - labels)
        loss = -(share * log_expit(np.where(labels, z, -z))).sum() + penalty / 2 * (weights @ weights)
        return loss, np.append(residual @ x + penalty * weights, residual.sum())

    start = np.zeros(x.shape[1] + 1)
    best = minimize(compute_loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return LogisticModel(mean=mean, scale=scale, weights=best[:-1], intercept=float(best[-1]))


def compute_probe_auroc(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    n_folds: int = 5,
    penalty: float = 1e-2,
    seed: int = 1,
) -> tuple[float, float]:
    """Return how well a linear classifier tells two samples apart.

    A logistic regression is fitted to all folds but one and tried on that
    one, in turn.  0.5 means that nothing linear in the features does.

    Parameters
    ----------
    features
        Shape ``(N, F)``.
    labels
        Which sample each example is of, shape ``(N,)``.
    groups
        Examples of the same group go into the same fold, such as stamps of
        the same galaxy; shape ``(N,)``.  None are by default.
    n_folds
        Number of folds; less if there are less groups.
    penalty
        Of `fit_logistic`.
    seed
        Seed of the folds.

    Returns
    -------
    auroc, error
        Mean over the folds and its standard error, the larger of what those
        of the folds and the scatter between them say.  NaN if no fold has
        both samples on either side.

    Raises
    ------
    ValueError
        Raised if features are not finite.
    """
    features, labels = np.asarray(features, dtype=np.float64), np.asarray(labels, dtype=bool)
    _, group = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    n_groups = int(group.max(initial=-1)) + 1
    n_folds = min(n_folds, n_groups)
    fold = (np.random.default_rng(seed).permutation(n_groups) % max(n_folds, 1))[group]
    areas, errors = [], []
    for k in range(n_folds):
        train, test = fold != k, fold == k
        if any(labels[part].all() or not labels[part].any() for part in (train, test)):
            continue
        model = fit_logistic(features[train], labels[train], penalty=penalty)
        area, error = compute_auroc(model.predict(features[test]), labels[test])
        areas.append(area)
        errors.append(error)
    if not areas:
        return math.nan, math.nan
    error = math.sqrt(np.sum(np.square(errors))) / len(errors)
    # Examples of one group are not independent.
    scatter = float(np.std(areas, ddof=1)) / math.sqrt(len(areas)) if len(areas) > 1 else 0.0
    return float(np.mean(areas)), max(error, scatter)


# The summary of the training

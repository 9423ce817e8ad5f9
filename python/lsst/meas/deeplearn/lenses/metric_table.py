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

"""The figures of merit of lens finders as a table."""

from __future__ import annotations

__all__ = ("METRIC_COLUMNS", "MetricTable", "add_evaluation", "summarize_metrics")

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from astropy.table import Column, Table

from ..metrics import Fraction
from ..model_package import ModelPackage
from .completeness import CompletenessMap

METRIC_COLUMNS: Mapping[str, tuple[str, str]] = {
    "classifier": ("U64", "Name and version of the model package, or name of the baseline"),
    "subset": ("U96", "Examples that count: all lenses or some, against all non-lenses or some"),
    "metric": ("U48", "What was measured; see the description of the row"),
    "value": ("f8", "The measurement, in the unit of the row; NaN if it cannot be made"),
    "low": ("f8", "Lower end of the interval of 95 per cent; NaN where there is none"),
    "high": ("f8", "Upper end of the interval of 95 per cent; NaN where there is none"),
    "unit": ("U16", "Unit of value, low and high; empty if they have none"),
    "n_positive": ("i8", "Number of lenses behind it"),
    "n_negative": ("i8", "Number of non-lenses behind it"),
    "description": ("U160", "What the metric is"),
    "note": ("U160", "What limits the measurement; empty if nothing does"),
}
"""Type and description of each column of ``lens_finder_metrics``."""

_DESCRIPTIONS: Mapping[str, str] = {
    "auroc": "Area under the ROC curve, with the interval of DeLong",
    "tpr0": "True-positive rate before any false positive (Metcalf et al. 2019)",
    "tpr10": "True-positive rate with less than ten false positives (Metcalf et al. 2019)",
    "tpr_at_fpr": "True-positive rate at this false-positive rate",
    "threshold_at_fpr": "Score that has this false-positive rate",
    "precision_at_fpr": "Fraction of lenses among what is found, at the densities of the sky",
    "contaminants_at_fpr": "Non-lenses found on the sky",
    "completeness": "Fraction of the lenses found at the reference false-positive rate",
    "fpr_at_threshold": "False-positive rate at the threshold of the reference rate of all examples",
    "tpr_at_threshold": "True-positive rate at the threshold of the reference rate of unchanged examples",
    "score_change": "Root mean square change of the logit by what was done to the stamps",
    "ece_raw": "Expected calibration error of the output of the network",
    "brier_raw": "Brier score of the output of the network",
    "log_loss_raw": "Mean negative log-likelihood of the output of the network",
    "ece_of_package": "Expected calibration error with the calibrations of the model packages",
    "brier_of_package": "Brier score with the calibrations of the model packages",
    "log_loss_of_package": "Mean negative log-likelihood with the calibrations of the model packages",
    "ece": "Expected calibration error after calibration on other examples, for the share of lenses",
    "brier": "Brier score after calibration on other examples, for the share of lenses",
    "log_loss": "Mean negative log-likelihood after the same calibration",
    "decision_tpr": "True-positive rate of the decision",
    "decision_fpr": "False-positive rate of the decision",
    "tpr_at_ringfinder_fpr": "True-positive rate at the false-positive rate of the decision of RingFinder",
    "auroc_above_colors": "AUROC less that of colour and magnitude, on the same examples",
    "probe_auroc": "AUROC of a linear probe between lenses and what the subset says; 0.5 is none",
    "n_excluded": "Examples left out because good pixels are not finite; counts are of the others",
}


class MetricTable:
    """Rows of the metrics dataset."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        classifier: str,
        subset: str,
        metric: str,
        value: Fraction | float,
        n_positive: int,
        n_negative: int,
        *,
        unit: str = "",
        note: str = "",
    ) -> None:
        """Add a row.

        Parameters
        ----------
        classifier
            Name of the lens finder; empty if the row is of none.
        subset
            Which examples.
        metric
            Name of the figure of merit; it starts with one of those that have
            a description.
        value
            The figure, with its interval if it has one.
        n_positive, n_negative
            Number of lenses and of other examples.
        unit
            Unit of the figure; empty if it has none.
        note
            Remark on the figure.
        """
        if not isinstance(value, Fraction):
            value = Fraction(value, math.nan, math.nan, 0)
        family = next(name for name in sorted(_DESCRIPTIONS, key=len)[::-1] if metric.startswith(name))
        self._rows.append(
            {
                "classifier": classifier,
                "subset": subset,
                "metric": metric,
                "value": value.value,
                "low": value.low,
                "high": value.high,
                "unit": unit,
                "n_positive": n_positive,
                "n_negative": n_negative,
                "description": _DESCRIPTIONS[family],
                "note": note,
            }
        )

    def add_error(
        self,
        classifier: str,
        subset: str,
        metric: str,
        result: tuple[float, float],
        n_positive: int,
        n_negative: int,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        note: str = "",
    ) -> None:
        """Add a row from a value and its standard error.

        Parameters
        ----------
        classifier, subset, metric
            As for `add`.
        result
            Value and standard error; the error may be NaN.
        n_positive, n_negative
            As for `add`.
        bounds
            Smallest and largest value that the figure can have.
        note
            As for `add`.
        """
        value, error = result
        low, high = (min(max(value + sign * 1.96 * error, bounds[0]), bounds[1]) for sign in (-1, 1))
        if math.isnan(error):
            low = high = math.nan
        self.add(classifier, subset, metric, Fraction(value, low, high, 0), n_positive, n_negative, note=note)

    def add_completeness(self, classifier: str, cells: CompletenessMap) -> None:
        """Add the cells of a map that have lenses.

        Parameters
        ----------
        classifier
            Name of the lens finder.
        cells
            Map by Einstein radius and signal to noise of the arcs.
        """
        low, high = cells.interval
        for row, column in zip(*np.nonzero(cells.n), strict=True):
            (x0, x1), (y0, y1) = cells.x_edges[column : column + 2], cells.y_edges[row : row + 2]
            n = int(cells.n[row, column])
            value = Fraction(cells.value[row, column], low[row, column], high[row, column], n)
            subset = f"{x0:g} <= einstein_radius < {x1:g}, {y0:g} <= arc_snr < {y1:g}"
            self.add(classifier, subset, "completeness", value, n, 0)

    def to_table(self) -> Table:
        """Return the table."""
        table = Table()
        for name, (dtype, description) in METRIC_COLUMNS.items():
            values = np.array([row[name] for row in self._rows], dtype=dtype)
            table[name] = Column(values, description=description)
        return table


def summarize_metrics(metrics: Table, classifier: str) -> dict[str, dict[str, Any]]:
    """Return the figures of merit of a lens finder as types that JSON has.

    They can go into the record of its model package, under ``evaluation``.

    Parameters
    ----------
    metrics
        The table ``metrics`` of `EvaluateLensFinderTask`.
    classifier
        Name of the lens finder.

    Returns
    -------
    figures
        For each subset and metric ``value``, ``low``, ``high``,
        ``n_positive`` and ``n_negative``; `None` for NaN.

    Raises
    ------
    KeyError
        Raised if there is no such lens finder.
    """
    figures: dict[str, dict[str, Any]] = {}
    for row in metrics[metrics["classifier"] == classifier]:
        numbers = {
            name: float(row[name]) if math.isfinite(row[name]) else None for name in ("value", "low", "high")
        }
        counts = {name: int(row[name]) for name in ("n_positive", "n_negative")}
        figures.setdefault(str(row["subset"]), {})[str(row["metric"])] = numbers | counts
    if not figures:
        known = sorted({str(name) for name in metrics["classifier"]} - {""})
        raise KeyError(f"No lens finder {classifier!r} was evaluated; there are {known}.")
    return figures


def add_evaluation(
    model: ModelPackage, metrics: Table, calibrations: Mapping[str, Mapping[str, Any]]
) -> ModelPackage:
    """Return a model package with its evaluation in its record.

    Parameters
    ----------
    model
        A model package that was evaluated.
    metrics, calibrations
        Outputs of `EvaluateLensFinderTask`.

    Returns
    -------
    package
        The record has the entries ``evaluation``, from `summarize_metrics`,
        and ``calibration``, for `.likelihood_ratio.ScoreCalibration`, if
        there is one.

    Raises
    ------
    KeyError
        Raised if this model was not evaluated.
    """
    name = f"{model.name} {model.version}"
    record = dict(model.record) | {"evaluation": summarize_metrics(metrics, name)}
    if name in calibrations:
        record["calibration"] = dict(calibrations[name])
    return dataclasses.replace(model, record=record)

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


"""Figures of shear bias."""

from __future__ import annotations

__all__ = ("plot_bias_by_bin", "plot_bias_by_morphology")

from typing import TYPE_CHECKING

import numpy as np

from lsst.utils.plotting import make_figure

if TYPE_CHECKING:
    from astropy.table import Table
    from matplotlib.figure import Figure

COLORS = ("#1f5a99", "#c2571a", "#2f7d4f", "#7a3e9d", "#6b7280")
"""Of morphologies, from the simplest on."""

QUANTITIES = {
    "snr": "Signal to noise",
    "size": "Area over that of a star",
    "magnitude": "AB magnitude",
    "redshift": "Redshift",
}
"""What bins are in, and the labels of their axes."""


LADDER = ("sersic", "bulge_disk", "knots", "real", "cvae")
"""Morphologies from the simplest to the most complex, as they are shown."""


def plot_bias_by_morphology(bias: Table) -> Figure:
    """Plot m and c of each morphology, a column for each estimator.

    Parameters
    ----------
    bias
        The table ``bias`` of `ShearBiasTask`.
    """
    rows = bias[(bias["bin"] == "all") & (bias["reference"] == "")]
    estimators, morphologies = _get_unique(rows["estimator"]), _sort(rows["morphology"])
    figure = make_figure(figsize=(1.5 + 3.6 * max(len(estimators), 1), 5.6), layout="constrained")
    axes = figure.subplots(2, max(len(estimators), 1), squeeze=False, sharex=True)
    for column, estimator in enumerate(estimators):
        chosen = rows[rows["estimator"] == estimator]
        where = np.array([morphologies.index(name) for name in chosen["morphology"]], dtype=float)
        for axis, name, factor, label in (
            (axes[0, column], "m", 1e3, "m / 0.001"),
            (axes[1, column], "c", 1e4, "c / 0.0001"),
        ):
            axis.axhline(0.0, color="#d1d5db", zorder=0)
            for component, color in zip("12", COLORS, strict=False):
                shift = 0.08 * (2 * int(component) - 3)
                axis.errorbar(
                    where + shift,
                    factor * chosen[f"{name}{component}"],
                    factor * chosen[f"{name}{component}_err"],
                    fmt="o",
                    markersize=4,
                    color=color,
                    label=f"component {component}",
                )
            axis.set_ylabel(label)
        axes[0, column].set_title(estimator)
        axes[1, column].set_xticks(range(len(morphologies)), morphologies)
        axes[1, column].set_xlim(-0.5, len(morphologies) - 0.5)
    if len(rows):
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize="small")
    return figure


def plot_bias_by_bin(bias: Table, estimator: str) -> Figure:
    """Plot the mean of m1 and m2 against what the bins are in.

    Bins whose error is more than ten times the median may lie outside.

    Parameters
    ----------
    bias
        The table ``bias`` of `ShearBiasTask`.
    estimator
        Which estimator to show.
    """
    rows = bias[(bias["estimator"] == estimator) & (bias["reference"] == "") & ~bias["flag"]]
    quantities = [name for name in QUANTITIES if (rows["bin_quantity"] == name).any()]
    figure = make_figure(figsize=(1.0 + 3.0 * max(len(quantities), 1), 3.4), layout="constrained")
    axes = figure.subplots(1, max(len(quantities), 1), squeeze=False)[0]
    morphologies = _sort(rows["morphology"])
    m, error = 1e3 * (rows["m1"] + rows["m2"]) / 2, 1e3 * np.hypot(rows["m1_err"], rows["m2_err"]) / 2
    for axis, quantity in zip(axes, quantities, strict=False):
        axis.axhline(0.0, color="#d1d5db", zorder=0)
        axis.set_xlabel(QUANTITIES[quantity])
        for number, (morphology, color) in enumerate(zip(morphologies, COLORS, strict=False)):
            chosen = (rows["morphology"] == morphology) & (rows["bin_quantity"] == quantity)
            low, high = rows["bin_low"][chosen], rows["bin_high"][chosen]
            # Side by side within the bin, on an axis with a logarithm, too.
            share = 0.5 + 0.12 * (number - (len(morphologies) - 1) / 2)
            where = low * (high / low) ** share if quantity == "snr" else low + (high - low) * share
            for edge in {*low, *high}:
                axis.axvline(edge, color="#e5e7eb", linewidth=0.8, zorder=0)
            axis.errorbar(
                where,
                m[chosen],
                error[chosen],
                fmt="o",
                markersize=4,
                color=color,
                label=morphology,
            )
        if quantity == "snr":
            axis.set_xscale("log")
        # Errors differ by orders of magnitude, from one quantity to another
        # and within one.
        inside = rows["bin_quantity"] == quantity
        usual = inside & (error < 10 * np.median(error[inside]))
        limit = 1.1 * float((np.abs(m) + error)[usual].max())
        axis.set_ylim(-limit, limit)
    axes[0].set_ylabel(f"m / 0.001, {estimator}")
    if morphologies:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize="small")
    return figure


def _sort(morphologies: np.ndarray) -> list[str]:
    """Return morphologies in the order of the ladder, others last."""
    return sorted(_get_unique(morphologies), key=lambda name: (*LADDER, name).index(name))


def _get_unique(names: np.ndarray) -> list[str]:
    """Return names in the order in which they come first."""
    return list(dict.fromkeys(str(name) for name in names))

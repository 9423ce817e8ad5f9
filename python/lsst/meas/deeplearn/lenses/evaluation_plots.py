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


"""Figures of how well a lens finder does."""

from __future__ import annotations

__all__ = ("plot_completeness", "plot_reliability", "plot_roc", "plot_score_histograms")

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from lsst.utils.plotting import make_figure

from ..metrics import Fraction, compute_auroc, compute_operating_point, compute_roc
from .calibration import compute_calibration_error, compute_reliability
from .completeness import CompletenessMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_PER_DECADE = 8
"""Rates of false positives in a decade at which intervals are computed."""

GREY, LIGHT = "#6b7280", "#d1d5db"


def plot_roc(
    scores: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    decisions: Mapping[str, np.ndarray] | None = None,
    title: str = "",
) -> Figure:
    """Plot the ROC curves of several classifiers, false positives log.

    Bands are intervals of 95 per cent that include the error of the
    threshold.  Curves end where one false positive is left.

    Parameters
    ----------
    scores
        Scores of each classifier, shape ``(N,)``, by its name.
    labels
        Whether an example is a lens, shape ``(N,)``.
    decisions
        Decisions of classifiers that only say yes or no, shape ``(N,)``, by
        name; they are points.
    title
        Title.

    Returns
    -------
    figure
        A figure that is not known to `matplotlib.pyplot`.
    """
    labels = np.asarray(labels, dtype=bool)
    n1, n0 = int(labels.sum()), int((~labels).sum())
    with _style():
        figure, axes = _make_axes((7.0, 5.2))
        lowest = 1 / max(n0, 10)
        grid = np.geomspace(lowest, 1, max(int(-np.log10(lowest) * POINTS_PER_DECADE), 2) + 1)[:-1]
        for k, (name, values) in enumerate(scores.items()):
            roc = compute_roc(values, labels)
            auroc, error = compute_auroc(values, labels)
            label = f"{name}: AUROC {auroc:.3f} $\\pm$ {error:.3f}"
            axes.step(roc.fpr, roc.tpr, where="post", color=_get_color(k), linewidth=1.8, label=label)
            if n1 and n0:
                points = [compute_operating_point(values, labels, fpr=fpr).tpr for fpr in grid]
                low, high = [point.low for point in points], [point.high for point in points]
                axes.fill_between(grid, low, high, color=_get_color(k), alpha=0.16, linewidth=0)
        for k, (name, decision) in enumerate((decisions or {}).items()):
            fpr, tpr = (
                Fraction.from_counts(int(decision[part].sum()), int(part.sum())) for part in (~labels, labels)
            )
            if fpr.value > 0:
                _draw_point(axes, fpr, tpr, color=_get_color(len(scores) + k), label=f"{name}: decision")
        chance = np.geomspace(lowest / 2, 1, 100)
        axes.plot(chance, chance, color=GREY, linewidth=1, linestyle=":", label="by chance")
        axes.set(xscale="log", xlim=(lowest / 1.5, 1), ylim=(0, 1.02))
        axes.set(xlabel="False-positive rate", ylabel="True-positive rate")
        axes.legend(loc="lower right" if len(scores) < 3 else "best", frameon=False)
        _write_title(axes, title, f"{n1:,} lenses, {n0:,} non-lenses")
        if not (n1 and n0):
            _write_empty(axes, "a class is empty")
    return figure


def plot_completeness(
    completeness: CompletenessMap,
    *,
    x_label: str = "Einstein radius (arcsec)",
    y_label: str = "Signal to noise of the arcs",
    title: str = "",
) -> Figure:
    """Plot the fraction of lenses that are found, as a map.

    Each cell has its fraction in per cent with half its interval of 95 per
    cent, and the number of lenses; the line is at 50 per cent, through the
    edges of cells.

    Parameters
    ----------
    completeness
        The map.
    x_label, y_label
        What its properties are.
    title
        Title.

    Returns
    -------
    figure
        A figure that is not known to `matplotlib.pyplot`.
    """
    rows, columns = completeness.n.shape
    value, (low, high) = completeness.value, completeness.interval
    with _style():
        figure, axes = _make_axes((max(1.05 * columns + 2.4, 5.0), max(0.75 * rows + 1.9, 4.0)))
        axes.tick_params(which="both", top=False, right=False, direction="out")
        axes.minorticks_off()
        axes.set_facecolor(LIGHT)
        # Cells are drawn of one size, whatever they span.
        mesh = axes.pcolormesh(
            np.arange(columns + 1), np.arange(rows + 1), value, cmap="viridis", vmin=0, vmax=1
        )
        for row in range(rows):
            for column in range(columns):
                if not (n := completeness.n[row, column]):
                    continue
                color = "white" if value[row, column] < 0.6 else "black"
                half = (high - low)[row, column] / 2
                text = f"{value[row, column] * 100:.0f}$\\pm${half * 100:.0f}"
                axes.text(column + 0.5, row + 0.58, text, color=color, size=9, ha="center", va="center")
                axes.text(column + 0.5, row + 0.28, f"{n:,}", color=color, size=6.5, ha="center", va="center")
        for segment in _trace_half(value):
            axes.plot(*segment, color="white", linewidth=2.4, solid_capstyle="round")
        axes.set_xticks(np.arange(columns + 1), [f"{edge:g}" for edge in completeness.x_edges])
        axes.set_yticks(np.arange(rows + 1), [f"{edge:g}" for edge in completeness.y_edges])
        axes.set(xlabel=x_label, ylabel=y_label)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.set_label("Completeness")
        total = int(completeness.n.sum())
        _write_title(
            axes, title, f"{total:,} lenses; per cent $\\pm$ half of the 95% interval, and number; line at 50"
        )
        if not total:
            _write_empty(axes, "no lenses")
    return figure


def plot_reliability(
    probabilities: Mapping[str, np.ndarray], labels: np.ndarray, *, n_bins: int = 10, title: str = ""
) -> Figure:
    """Plot how often what is predicted happens.

    Parameters
    ----------
    probabilities
        Probabilities of a lens, shape ``(N,)``, by the name of what predicts
        them, such as before and after a calibration.
    labels
        Whether an example is a lens, shape ``(N,)``.
    n_bins
        Number of bins of equal width.
    title
        Title.

    Returns
    -------
    figure
        A figure that is not known to `matplotlib.pyplot`.
    """
    labels = np.asarray(labels, dtype=bool)
    with _style():
        figure, axes = _make_axes((6.0, 6.2), height_ratios=(3, 1))
        axes, counts = figure.axes
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="perfect")
        for k, (name, values) in enumerate(probabilities.items()):
            reliability = compute_reliability(values, labels, n_bins=n_bins)
            error = compute_calibration_error(values, labels, n_bins=n_bins)
            filled = reliability.n > 0
            x, y = reliability.predicted[filled], reliability.observed[filled]
            spread = np.clip([y - reliability.low[filled], reliability.high[filled] - y], 0, None)
            axes.errorbar(
                x,
                y,
                yerr=spread,
                color=_get_color(k),
                marker="os^Dv"[k % 5],
                markersize=5,
                linestyle="none",
                elinewidth=1,
                capsize=2,
                label=f"{name}: ECE {error:.3f}",
            )
            edges = np.linspace(0, 1, n_bins + 1)
            counts.stairs(reliability.n, edges, color=_get_color(k), linewidth=1.4)
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="Fraction of lenses")
        axes.tick_params(labelbottom=False)
        axes.legend(loc="upper left", frameon=False)
        counts.set(xlim=(0, 1), xlabel="Predicted probability", ylabel="Number")
        if len(labels):
            counts.set_yscale("log")
            counts.set_ylim(bottom=0.6)
        _write_title(axes, title, f"{len(labels):,} stamps, {labels.mean() if len(labels) else 0:.1%} lenses")
    return figure


def plot_score_histograms(
    scores: np.ndarray,
    kinds: np.ndarray,
    *,
    threshold: float | None = None,
    threshold_label: str = "",
    x_label: str = "Logit of the score",
    title: str = "",
) -> Figure:
    """Plot the distribution of a score for each kind of example.

    Parameters
    ----------
    scores
        Scores, shape ``(N,)``.
    kinds
        Kind of each, shape ``(N,)``; ``lens`` is drawn filled.
    threshold
        Score to mark.
    threshold_label
        What it is.
    x_label
        What the score is.
    title
        Title.

    Returns
    -------
    figure
        A figure that is not known to `matplotlib.pyplot`.
    """
    scores, kinds = np.asarray(scores, dtype=np.float64), np.asarray(kinds)
    names = sorted(set(kinds.tolist()) - {"lens"})
    with _style():
        figure, axes = _make_axes((7.0, 4.6))
        low, high = (
            np.quantile(scores, [0.0005, 0.9995]) if len(scores) else (0.0, 1.0)
        )  # A few extremes would leave the rest no room.
        edges = np.linspace(low, high if high > low else low + 1, 51)
        clipped = np.clip(scores, edges[0], edges[-1])
        for name in [*(["lens"] if (kinds == "lens").any() else []), *names]:
            part = clipped[kinds == name]
            density = np.histogram(part, edges)[0] / len(part)
            lens = name == "lens"
            # The second colour is that of the lenses.
            color = _get_color(1 if lens else (0, 2, 3, 4, 5, 6, 7, 8, 9)[names.index(name) % 9])
            axes.stairs(
                density,
                edges,
                color=color,
                fill=lens,
                alpha=0.35 if lens else 1.0,
                linewidth=1.5,
                label=f"{name} ({len(part):,})",
            )
        if threshold is not None and np.isfinite(threshold):
            axes.axvline(threshold, color=GREY, linewidth=1.2, linestyle="--", label=threshold_label or None)
        axes.set(xlabel=x_label, ylabel="Fraction of the kind in a bin", yscale="log")
        axes.set_xlim(edges[0], edges[-1])
        if len(scores):
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        else:
            _write_empty(axes, "no scores")
        _write_title(axes, title, f"{len(scores):,} stamps")
    return figure


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Draw in the style of Rubin publications, for this figure alone."""
    from matplotlib import style

    with style.context(["lsst.utils.plotting.rubin", {"axes.labelsize": 11, "font.size": 11}]):
        yield


def _get_color(k: int) -> str:
    """Return a colour of the style; names like C0 mean others later."""
    import matplotlib

    colors = matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]
    return f"#{colors[k % len(colors)].lstrip('#')}"


def _make_axes(size: tuple[float, float], height_ratios: tuple[float, ...] = (1,)) -> tuple[Figure, Axes]:
    """Return a figure and the first of its axes, which share their x."""
    figure = make_figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.add_gridspec(len(height_ratios), 1, height_ratios=height_ratios)
    axes = [figure.add_subplot(grid[k]) for k in range(len(height_ratios))]
    for part in axes:
        part.grid(True, which="major", color=LIGHT, linewidth=0.5)
        part.set_axisbelow(True)
    return figure, axes[0]


def _draw_point(axes: Axes, fpr: Fraction, tpr: Fraction, *, color: str, label: str) -> None:
    """Draw a pair of rates with their intervals."""
    axes.errorbar(
        fpr.value,
        tpr.value,
        xerr=[[fpr.value - fpr.low], [fpr.high - fpr.value]],
        yerr=[[tpr.value - tpr.low], [tpr.high - tpr.value]],
        color=color,
        marker="D",
        markersize=6,
        elinewidth=1.2,
        capsize=2,
        linestyle="none",
        label=label,
    )


def _trace_half(value: np.ndarray) -> list[tuple[list[int], list[int]]]:
    """Return the edges between cells below and above one half."""
    segments = []
    above = value >= 0.5
    known = np.isfinite(value)
    rows, columns = value.shape
    for row in range(rows):
        for column in range(columns):
            here = above[row, column]
            if column + 1 < columns and known[row, column] and known[row, column + 1]:
                if here != above[row, column + 1]:
                    segments.append(([column + 1, column + 1], [row, row + 1]))
            if row + 1 < rows and known[row, column] and known[row + 1, column]:
                if here != above[row + 1, column]:
                    segments.append(([column, column + 1], [row + 1, row + 1]))
    return segments


def _write_title(axes: Axes, title: str, note: str) -> None:
    """Write the title at the left and a note at the right."""
    axes.set_title(title, loc="left", size=11)
    axes.set_title(note, loc="right", size=8, color=GREY)


def _write_empty(axes: Axes, text: str) -> None:
    """Say why there is nothing to see."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, color=GREY, size=13, ha="center", va="center")

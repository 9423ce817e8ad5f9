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

"""Figures of generated galaxies."""

from __future__ import annotations

__all__ = ("plot_gallery", "plot_pairs", "plot_statistics")

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from astropy.table import Table

from lsst.utils.plotting import make_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..cutouts import Cutouts
    from .comparison import Sample

TITLES: Mapping[str, str] = {
    "real": "Held out",
    "cvae": "CVAE",
    "parametric": "Parametric",
    "knots": "Parametric + knots",
}
"""How samples are called in figures."""

COLORS: Mapping[str, str] = {
    "real": "black",
    "cvae": "#d1495b",
    "parametric": "#00798c",
    "knots": "#edae49",
}
"""Colours of samples, which people with colour blindness tell apart."""

SHOWN = (
    "multimode", "intensity", "deviation", "gini", "m20", "asymmetry", "concentration", "ellipticity",
    "half_light_radius",
)  # fmt: skip
"""Statistics in the figure, the ones of clumps first."""

SOFTENING = 2.0
"""Brightness in units of the noise at which the stretch turns logarithmic."""


def plot_gallery(
    samples: Mapping[str, Sample],
    conditions: np.ndarray,
    rows: Sequence[int],
    *,
    pixel_scale: float,
    side: float = 3.6,
) -> Figure:
    """Show galaxies of all samples that have the same conditions.

    Parameters
    ----------
    samples
        Samples by name, each with an image for each row.
    conditions
        Half-light radius in arcsec, magnitude and redshift, shape ``(N, 3)``.
    rows
        Galaxies to show, one a column.
    pixel_scale
        Side of a pixel in arcsec.
    side
        Side of what is shown in arcsec.
    """
    figure = make_figure(figsize=(1.15 * len(rows) + 0.9, 1.15 * len(samples) + 0.5))
    axes = figure.subplots(len(samples), len(rows), squeeze=False)
    for line, (name, sample) in zip(axes, samples.items(), strict=True):
        for ax, row in zip(line, rows, strict=True):
            first = int(np.flatnonzero(sample.galaxy == row)[0])
            image = sample.image[first]
            half = round(side / pixel_scale / 2)
            middle = slice(image.shape[0] // 2 - half, image.shape[0] // 2 + half + 1)
            level = SOFTENING * sample.noise[first]
            # The same stretch in a column, up to the peak of the real galaxy.
            top = np.arcsinh(samples["real"].image[row][middle, middle].max() / level)
            ax.imshow(
                np.arcsinh(image[middle, middle] / level), origin="lower", cmap="gray", vmin=-0.5, vmax=top
            )
            ax.set_xticks([])
            ax.set_yticks([])
        line[0].set_ylabel(TITLES.get(name, name), fontsize=8)
    for ax, row in zip(axes[0], rows, strict=True):
        radius, magnitude, redshift = conditions[row]
        ax.set_title(f'{radius:.2f}" {magnitude:.1f}\nz {redshift:.2f}', fontsize=7)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.88, bottom=0.02, wspace=0.05, hspace=0.05)
    return figure


def plot_pairs(cutouts: Cutouts, table: Table) -> Figure:
    """Show objects of a coadd, and below each what was drawn for it.

    Parameters
    ----------
    cutouts
        Stamps of the objects.
    table
        What `CvaeGalaxyTask` writes about them, in this order.
    """
    figure = make_figure(figsize=(1.15 * max(len(table), 1) + 0.9, 2.9))
    if not len(table):
        return figure
    axes = figure.subplots(2, len(table), squeeze=False)
    lines = zip(("Coadd", "CVAE"), (cutouts.image, np.asarray(table["image"])), axes, strict=True)
    for name, images, line in lines:
        line[0].set_ylabel(name, fontsize=8)
        for ax, image, real, variance in zip(
            line, images[:, 0], cutouts.image[:, 0], cutouts.variance[:, 0], strict=True
        ):
            level = SOFTENING * np.sqrt(np.median(variance))
            middle = slice(len(real) // 2 - 4, len(real) // 2 + 5)
            top = np.arcsinh(real[middle, middle].max() / level)
            ax.imshow(np.arcsinh(image / level), origin="lower", cmap="gray", vmin=-0.5, vmax=top)
            ax.set_xticks([])
            ax.set_yticks([])
    for ax, row in zip(axes[0], table, strict=True):
        title = f'{row["half_light_radius"]:.2f}" {row["magnitude"]:.1f}\nz {row["redshift"]:.2f}'
        ax.set_title(title, fontsize=7)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.84, bottom=0.02, wspace=0.05, hspace=0.05)
    return figure


def plot_statistics(tables: Mapping[str, Table], distances: Table) -> Figure:
    """Show the distributions of statistics of all samples.

    Parameters
    ----------
    tables
        What `Sample.measure` returns by the name of the sample.
    distances
        What `compare_samples` returns.
    """
    figure = make_figure(figsize=(9.0, 8.0))
    axes = figure.subplots(3, 3).ravel()
    for ax, statistic in zip(axes, SHOWN, strict=True):
        pooled = np.concatenate([np.asarray(table[statistic]) for table in tables.values()])
        low, high = np.nanquantile(pooled, [0.005, 0.99])
        for name, table in tables.items():
            values = np.sort(np.asarray(table[statistic]))
            values = values[np.isfinite(values)]
            label = TITLES.get(name, name)
            row = distances[(distances["sample"] == name) & (distances["statistic"] == statistic)]
            if len(row):
                label += f": {row['ks'][0]:.3f} $\\pm$ {row['ks_error'][0]:.3f}"
            share = (np.arange(len(values)) + 0.5) / len(values)
            ax.plot(values, share, color=COLORS.get(name), lw=1.2, label=label)
        ax.set_xlim(low, high)
        ax.set_xlabel(statistic.replace("_", " "))
        ax.legend(fontsize=6, title="KS distance from held out", title_fontsize=6, loc="lower right")
    for ax in axes[::3]:
        ax.set_ylabel("Fraction of galaxies below")
    figure.tight_layout()
    return figure

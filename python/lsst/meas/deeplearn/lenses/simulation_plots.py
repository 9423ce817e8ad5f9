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


"""A look at simulated examples."""

from __future__ import annotations

__all__ = ("plot_examples",)

from collections.abc import Sequence

import numpy as np
from astropy.table import Table
from matplotlib.figure import Figure

from lsst.utils.plotting import make_figure

from ..cutouts import Cutouts
from .plots import make_color_images


def plot_examples(
    examples: Table,
    *,
    n_each: int = 10,
    kinds: Sequence[str] | None = None,
    side: float = 0.9,
    seed: int = 0,
) -> Figure:
    """Plot some examples of each kind in colour, a row a kind.

    Parameters
    ----------
    examples
        Table of `SimulateLensesTask`.
    n_each
        Largest number of examples of a kind.
    kinds
        Kinds to show; by default all, lenses first and the others by their
        number.
    side
        Side of a stamp in inches.
    seed
        Seed of the choice of examples.

    Raises
    ------
    ValueError
        Raised if there are no examples.
    """
    if len(examples) == 0:
        raise ValueError("There are no examples to plot.")
    names, counts = np.unique(np.asarray(examples["kind"], dtype=str), return_counts=True)
    if kinds is None:
        kinds = sorted(names.tolist(), key=lambda name: (name != "lens", -counts[names == name][0], name))
    rng = np.random.default_rng(seed)
    figure = make_figure(figsize=(side * n_each + 1.0, side * len(kinds)))
    left = 1.0 / (side * n_each + 1.0)
    grid = figure.subplots(
        len(kinds),
        n_each,
        squeeze=False,
        gridspec_kw={"left": left, "right": 1, "bottom": 0, "top": 1, "wspace": 0.04, "hspace": 0.04},
    )
    for axes in grid.flat:
        axes.axis("off")
    for row, kind in zip(grid, kinds, strict=True):
        row[0].text(-0.08, 0.5, kind, transform=row[0].transAxes, ha="right", va="center", fontsize=8)
        chosen = rng.permutation(np.flatnonzero(examples["kind"] == kind))[:n_each]
        if len(chosen):
            images = make_color_images(Cutouts.from_table(examples[chosen]))
            for axes, image in zip(row, images, strict=False):
                axes.imshow(image, origin="lower", interpolation="nearest")
    return figure

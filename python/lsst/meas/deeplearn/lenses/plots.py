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


"""Pictures of lens candidates for people to look at."""

from __future__ import annotations

__all__ = ("make_color_images", "plot_gallery")

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lsst.utils.plotting import make_figure

from ..cutouts import Cutouts
from ..preprocessing import compute_noise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRETCH, SOFTENING = 10.0, 8.0
"""Stretch and Q of Lupton et al. (2004), for pixels in units of the noise:
both an arc of twice the noise and a galaxy of 500 times the noise show."""

BLACK = -0.5
"""Intensity in units of the noise that is shown black."""

BAND_WEIGHTS = {"u": 3.2, "g": 1.8, "r": 1.0, "i": 0.6, "z": 0.5, "y": 0.45}
"""Factors of flux densities, chosen so that old galaxies at redshift 0.5 are
orange in i, r, g and lensed sources blue, whatever the depths."""

NO_DATA_COLOR = (84, 88, 104)
"""Red, green and blue of pixels without data, a slate that no sky has."""

BACKGROUND, FRAME, TEXT, FAINT_TEXT, ACCENT = "#0b0d12", "#3a4150", "#e8eaf0", "#9aa3b5", "#ffd166"

PANEL, GAP, CAPTION, MARGIN, HEADER = 1.55, 0.10, 0.36, 0.18, 0.52
"""Layout of the gallery in inches."""


def make_color_images(cutouts: Cutouts, bands: Sequence[str] = ("i", "r", "g")) -> np.ndarray:
    """Make colour composites of stamps, each scaled to its own noise.

    Bands have fixed weights, so that a colour means the same on every page.
    The intensity is stretched as by Lupton et al. (2004, PASP 116, 133) in
    units of the noise, so that both faint arcs and bright galaxies show,
    and these keep their colours.

    Parameters
    ----------
    cutouts
        Stamps of any bands.
    bands
        The three bands shown red, green and blue.  An object that lacks one
        of them is shown in grey.

    Returns
    -------
    images
        Red, green and blue, uint8, shape ``(N, S, S, 3)``.  Pixels that are
        bad in a band that is shown have `NO_DATA_COLOR`.
    """
    from astropy.visualization import make_lupton_rgb

    images = np.empty((len(cutouts), cutouts.size, cutouts.size, 3), dtype=np.uint8)
    images[:] = NO_DATA_COLOR
    index = [cutouts.bands.index(band) for band in bands if band in cutouts.bands]
    if not index:
        return images
    weights = np.array([BAND_WEIGHTS.get(cutouts.bands[b], 1.0) for b in index], dtype=np.float32)
    flux = cutouts.image[:, index] * weights[:, None, None]
    variance = cutouts.variance[:, index] * weights[:, None, None] ** 2
    bad = cutouts.bad[:, index] | ~np.isfinite(flux) | ~np.isfinite(variance)
    noise = compute_noise(variance, bad)  # (N, bands)
    seen = ~bad.all(axis=(2, 3))
    for k in np.flatnonzero(seen.any(axis=1)):
        planes = np.where(bad[k], 0.0, flux[k])[seen[k]] / np.sqrt(np.mean(noise[k, seen[k]] ** 2))
        if len(planes) < 3:
            planes = np.repeat(planes.mean(axis=0, keepdims=True), 3, axis=0)
        picture = make_lupton_rgb(*(planes - BLACK), stretch=STRETCH, Q=SOFTENING)
        images[k] = np.where(bad[k, seen[k]].any(axis=0)[:, :, None], NO_DATA_COLOR, picture)
    return images


def plot_gallery(
    cutouts: Cutouts | None,
    *,
    ranks: Sequence[int] | np.ndarray | None = None,
    scores: Sequence[float] | np.ndarray | None = None,
    einstein_radii: Sequence[float] | np.ndarray | None = None,
    bands: Sequence[str] = ("i", "r", "g"),
    n_columns: int = 8,
    title: str = "Lens candidates",
    score_name: str = "score",
    empty_text: str = "no candidates",
) -> Figure:
    """Plot a page of lens candidates.

    Parameters
    ----------
    cutouts
        Stamps of the candidates in the order of the page; `None` or of
        length 0 for a page that says that there are none.
    ranks
        Rank of each candidate; 1, 2, 3, ... by default.
    scores
        Score of each candidate, or `None` to show none.
    einstein_radii
        True Einstein radii in arcsec, where they are known; NaN for an
        object that is no lens.
    bands
        Bands shown red, green and blue; see `make_color_images`.
    n_columns
        Largest number of candidates in a row.
    title
        Title of the page.
    score_name
        What the scores are.
    empty_text
        What a page without candidates says.

    Returns
    -------
    figure
        A figure that is not known to `matplotlib.pyplot`, so that there is
        no need to close it.

    Raises
    ------
    ValueError
        Raised if ``n_columns`` is not positive, or an array has not the
        length of ``cutouts``.
    """
    if n_columns < 1:
        raise ValueError(f"A gallery needs at least one column, not {n_columns}.")
    n = 0 if cutouts is None else len(cutouts)
    for name, values in (("ranks", ranks), ("scores", scores), ("einstein_radii", einstein_radii)):
        if values is not None and len(values) != n:
            raise ValueError(f"There are {n} cutouts but {len(values)} {name}.")

    # A narrow page has no room for its title.
    columns = max(min(n, n_columns), min(4, n_columns))
    rows = max(math.ceil(n / columns), 1)
    width = 2 * MARGIN + columns * (PANEL + GAP) - GAP
    height = HEADER + rows * (PANEL + CAPTION) + MARGIN
    figure = make_figure(figsize=(width, height), facecolor=BACKGROUND, dpi=150)
    figure.text(
        MARGIN / width, 1 - 0.31 / height, title, color=TEXT, size=12, weight="bold", ha="left", va="center"
    )
    if cutouts is None or n == 0:
        figure.text(0.5, 0.45, empty_text, color=FAINT_TEXT, size=13, ha="center", va="center")
        return figure

    shown = [band for band in bands if band in cutouts.bands]
    legend = ", ".join(shown) + (" as red, green, blue" if len(shown) == 3 else " as grey")
    if scores is not None:
        digits = 1 if np.nanmax(np.abs(scores), initial=0.0) >= 10 else 3
        legend = f"{score_name} at the upper right; {legend}"
    figure.text(
        1 - MARGIN / width, 1 - 0.31 / height, legend, color=FAINT_TEXT, size=7, ha="right", va="center"
    )
    for k, image in enumerate(make_color_images(cutouts, bands)):
        row, column = divmod(k, columns)
        left = MARGIN + column * (PANEL + GAP)
        bottom = height - HEADER - row * (PANEL + CAPTION) - PANEL
        axes = figure.add_axes((left / width, bottom / height, PANEL / width, PANEL / height))
        _draw_panel(axes, image, cutouts.pixel_scale)
        _write(
            axes, 0.04, 0.96, f"{k + 1 if ranks is None else ranks[k]}", size=8, color=ACCENT, weight="bold"
        )
        if scores is not None:
            score = f"{scores[k]:.{digits}f}" if np.isfinite(scores[k]) else "no score"
            _write(axes, 0.96, 0.96, score, size=7.5)
        if einstein_radii is not None and np.isfinite(einstein_radii[k]):
            _write(
                axes, 0.96, 0.09, f"\N{GREEK SMALL LETTER THETA}$_E$ {einstein_radii[k]:.2f}\N{DOUBLE PRIME}"
            )
        position = f"{cutouts.ra[k]:.5f}  {cutouts.dec[k]:+.5f}"
        axes.text(0.5, -0.03, f"{cutouts.ids[k]}", color=TEXT, **_caption(axes))
        axes.text(0.5, -0.115, position, color=FAINT_TEXT, **_caption(axes))
    return figure


def _draw_panel(axes: Axes, image: np.ndarray, pixel_scale: float) -> None:
    """Draw a composite with a thin frame and a bar of a round length."""
    size = image.shape[0]
    axes.imshow(image, origin="lower", interpolation="nearest", extent=(0, size, 0, size))
    axes.set(xticks=[], yticks=[], xlim=(0, size), ylim=(0, size))
    for spine in axes.spines.values():
        spine.set(color=FRAME, linewidth=0.6)
    length = max((bar for bar in (1, 2, 5, 10, 20, 50) if bar <= 0.3 * size * pixel_scale), default=1)
    start, stop, height = 0.05 * size, 0.05 * size + length / pixel_scale, 0.05 * size
    axes.plot([start, stop], [height, height], color=TEXT, linewidth=1.2, solid_capstyle="butt")
    _write(axes, 0.05, 0.135, f"{length}\N{DOUBLE PRIME}", size=6.5)


def _write(axes: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Write on a picture, readable on black and on white."""
    from matplotlib.patheffects import withStroke

    style.setdefault("color", TEXT)
    style.setdefault("size", 7.5)
    axes.text(
        x,
        y,
        text,
        transform=axes.transAxes,
        ha="left" if x < 0.5 else "right",
        va="top",
        path_effects=[withStroke(linewidth=1.6, foreground="black")],
        **style,
    )


def _caption(axes: Axes) -> dict[str, Any]:
    """Return the style of the lines under a picture."""
    return {"transform": axes.transAxes, "ha": "center", "va": "top", "size": 6.2}

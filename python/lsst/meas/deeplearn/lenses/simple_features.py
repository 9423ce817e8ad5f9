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

"""What classifiers without a network see of stamps."""

from __future__ import annotations

__all__ = ("classify_colors", "measure_center", "measure_magnitudes", "measure_outskirts")

import math
from collections.abc import Iterable

import numpy as np

from ..cutouts import Cutouts
from .logistic_regression import fit_logistic

COLOR_SOFTENING = 100.0
"""Flux in nJy below which magnitudes are linear in flux."""


def measure_magnitudes(cutouts: Cutouts, radii: Iterable[float]) -> np.ndarray:
    """Return magnitudes in circular apertures about the centres.

    Parameters
    ----------
    cutouts
        The stamps.
    radii
        Radii of the apertures in arcsec.

    Returns
    -------
    magnitudes
        Inverse hyperbolic sine magnitudes (Lupton et al. 1999) with a
        softening of `COLOR_SOFTENING`, of the good pixels, up to a constant,
        shape ``(N, apertures, bands)``.
    """
    image = np.where(cutouts.bad, 0.0, cutouts.image)
    radius = _compute_radius(cutouts)
    flux = np.stack([image[:, :, radius <= r].sum(axis=2) for r in radii], axis=1)
    return np.asarray(-2.5 / math.log(10) * np.arcsinh(flux / (2 * COLOR_SOFTENING)))


def measure_center(cutouts: Cutouts) -> np.ndarray:
    """Return the 3 x 3 central pixels of each band, in units of the flux
    within an arcsec, shape ``(N, bands * 9)``.

    Parameters
    ----------
    cutouts
        The stamps.
    """
    image = np.where(cutouts.bad, 0.0, cutouts.image)
    flux = image[:, :, _compute_radius(cutouts) <= 1.0].sum(axis=2)
    middle = slice(cutouts.size // 2 - 1, cutouts.size // 2 + 2)
    center = image[:, :, middle, middle].reshape(*image.shape[:2], 9)
    center = center / np.where(flux != 0, flux, 1.0)[:, :, None]
    return np.asarray(center.reshape(len(cutouts), 9 * len(cutouts.bands)))


def measure_outskirts(cutouts: Cutouts, radius: float) -> np.ndarray:
    """Return statistics of the pixels far from the centre.

    Parameters
    ----------
    cutouts
        The stamps.
    radius
        Distance in arcsec beyond which pixels count.

    Returns
    -------
    statistics
        Mean, standard deviation, correlation of neighbours in a row and
        fraction of bad pixels, of each band, in units of the noise, with
        values beyond 10 times the noise cut off; shape ``(N, bands * 4)``.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        pixels = np.clip(np.where(cutouts.bad, 0.0, cutouts.image / np.sqrt(cutouts.variance)), -10, 10)
    pixels = np.nan_to_num(pixels)
    far = _compute_radius(cutouts) > radius
    if not far.any():
        return np.zeros((len(cutouts), len(cutouts.bands) * 4))
    outside = pixels[:, :, far]
    mean, spread = outside.mean(axis=2), outside.std(axis=2)
    pairs = far[:, 1:] & far[:, :-1]
    left, right = pixels[..., :-1][:, :, pairs], pixels[..., 1:][:, :, pairs]
    product = (left * right).mean(axis=2) - left.mean(axis=2) * right.mean(axis=2)
    correlation = product / np.where(spread > 0, spread, 1.0) ** 2
    bad = cutouts.bad[:, :, far].mean(axis=2)
    return np.concatenate([mean, spread, correlation, bad], axis=1)


def classify_colors(magnitudes: np.ndarray, labels: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Classify by colours and magnitudes alone.

    A logistic regression sees the magnitude in the last band and the largest
    aperture, the colours in each aperture, the concentration in each band, and
    the products of all these.

    Parameters
    ----------
    magnitudes
        From `measure_magnitudes`, shape ``(N, apertures, bands)``.
    labels
        Whether an example is a lens, shape ``(N,)``; those of other examples
        than ``train`` are not looked at.
    train
        Which examples to train on, shape ``(N,)``.

    Returns
    -------
    logits
        Of all examples, shape ``(N,)``.

    Raises
    ------
    ValueError
        Raised if the examples to train on are of one class.
    """
    n = len(magnitudes)
    color = np.diff(magnitudes, axis=2).reshape(n, -1)
    concentration = np.diff(magnitudes, axis=1).reshape(n, -1)
    features = np.concatenate([magnitudes[:, -1, -1:], color, concentration], axis=1)
    mean, scale = features[train].mean(axis=0), features[train].std(axis=0)
    # Products of outliers would rule.
    features = np.clip((features - mean) / np.where(scale > 0, scale, 1.0), -5, 5)
    i, j = np.triu_indices(features.shape[1])
    features = np.concatenate([features, features[:, i] * features[:, j]], axis=1)
    return fit_logistic(features[train], labels[train]).predict(features)


def _compute_radius(cutouts: Cutouts) -> np.ndarray:
    """Return the distance of each pixel from the central one in arcsec."""
    pixels = np.arange(cutouts.size) - cutouts.size // 2
    return np.hypot(pixels[:, None], pixels) * cutouts.pixel_scale

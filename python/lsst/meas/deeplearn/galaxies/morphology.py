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


"""Statistics of the shapes of galaxies, and of how two samples differ.

Each statistic is a function of one image; `measure_morphology` takes all of
them in one way, so that samples differ by their galaxies only.  Differences
from statmorph (Rodriguez-Gomez et al. 2019), with which they are compared in
the tests: ellipses are those of adaptive moments; M, I and D are taken in the
region of `find_region`; and the noise in the asymmetry is subtracted by its
expectation.
"""

from __future__ import annotations

__all__ = (
    "STATISTICS",
    "Distance",
    "compute_asymmetry",
    "compute_c2st",
    "compute_deviation",
    "compute_distance",
    "compute_gini",
    "compute_intensity",
    "compute_m20",
    "compute_multimode",
    "compute_radii",
    "find_petrosian_region",
    "find_region",
    "measure_morphology",
)

import dataclasses
import math
from collections.abc import Callable, Mapping

import galsim
import numpy as np
from astropy.table import Table
from scipy import ndimage
from scipy.special import expit

from ..metrics import compute_auroc

STATISTICS: Mapping[str, str] = {
    "gini": "Gini coefficient of the pixels",
    "m20": "Logarithm of the second moment of the brightest fifth of the flux over that of all",
    "concentration": "5 log10(r80 / r20)",
    "asymmetry": "Flux that changes sides under half a turn",
    "multimode": "Area of the second largest peak over that of the largest (M)",
    "intensity": "Flux of the second brightest peak over that of the brightest (I)",
    "deviation": "Distance of the brightest peak from the centroid over the size (D)",
    "half_light_radius": "Radius in arcsec of the circle with half of the flux",
    "ellipticity": "Length of the shear that adaptive moments give",
    "e1": "Its component along the x axis",
    "e2": "Its component along the diagonal",
    "sigma": "Radius in arcsec of the Gaussian of adaptive moments",
    "rho4": "Fourth radial moment with the weight of adaptive moments",
}
"""What is measured, with the unit; columns of `measure_morphology`."""

REGION_SMOOTHING = 1.5
"""Sigma in pixels of the smoothing before galaxies are told from noise."""

REGION_THRESHOLD = 2.0
"""Lowest signal to noise of the smoothed image in the region."""

QUANTILE_STEP = 0.02
"""Steps of the levels at which peaks are counted (Freeman et al. 2013)."""

PETROSIAN_RADII = 1.5
"""Radius of the circle that has all flux, in Petrosian radii (Conselice
2003)."""

_EIGHT = np.ones((3, 3), dtype=bool)


def find_region(image: np.ndarray, noise: float) -> np.ndarray:
    """Return which pixels belong to the galaxy in the middle of an image.

    The connected pixels with at least twice the noise, both after smoothing
    by a Gaussian of 1.5 pixels, around the brightest one in the middle
    quarter.

    Parameters
    ----------
    image
        The image, shape ``(y, x)``.
    noise
        Standard deviation of the noise in a pixel, taken as white.

    Returns
    -------
    region
        Shape ``(y, x)``; all false if nothing stands out.
    """
    smooth = ndimage.gaussian_filter(image, REGION_SMOOTHING, mode="constant")
    threshold = REGION_THRESHOLD * noise / (2 * math.sqrt(math.pi) * REGION_SMOOTHING)
    labels, _ = ndimage.label(smooth > threshold, structure=_EIGHT)
    height, width = image.shape
    rows, columns = slice(height // 4, -(height // 4)), slice(width // 4, -(width // 4))
    peak = np.unravel_index(np.argmax(smooth[rows, columns]), smooth[rows, columns].shape)
    label = labels[rows, columns][peak]
    region: np.ndarray = (labels == label) & (label > 0)
    return region


def find_petrosian_region(
    image: np.ndarray, *, y: float, x: float, radius: float, g1: float = 0.0, g2: float = 0.0
) -> np.ndarray:
    """Return the region of a galaxy that does not depend on its noise.

    Lotz et al. (2004): the connected pixels that, after smoothing by a
    Gaussian of a fifth of the Petrosian radius, are brighter than that image
    is at this radius.

    Parameters
    ----------
    image
        The image, shape ``(y, x)``.
    y, x
        Centre, as indices.
    radius
        Petrosian radius in pixels, of the circle with the area of the
        ellipse.
    g1, g2
        Shear that makes this ellipse of a circle.

    Returns
    -------
    region
        Shape ``(y, x)``; all false without a radius.
    """
    if not radius > 0:
        return np.zeros(image.shape, dtype=bool)
    g = math.hypot(g1, g2)
    smooth = ndimage.gaussian_filter(image, 0.2 * radius * math.sqrt((1 + g) / (1 - g)), mode="constant")
    ring = np.abs(_compute_distance(image, y, x, g1, g2) - radius) < 0.5
    level = smooth[ring].mean() if ring.any() else smooth.max()
    labels, _ = ndimage.label(smooth >= level, structure=_EIGHT)
    label = labels[round(y), round(x)] or 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    region: np.ndarray = labels == label
    return region


def compute_gini(image: np.ndarray, region: np.ndarray) -> float:
    r"""Return the Gini coefficient.

    Lotz et al. (2004, AJ 128, 163), equation 6,

    .. math::
        G = \frac{1}{\bar{|x|} n (n - 1)} \sum_{i=1}^n (2 i - n - 1) |x_i|

    of the sorted pixels: 0 if all are the same, 1 if one has all flux.

    Parameters
    ----------
    image
        The image.
    region
        Pixels of the galaxy; with fewer than two the result is NaN.
    """
    values = np.sort(np.abs(image[region]))
    n = len(values)
    if n < 2 or values.sum() == 0:
        return math.nan
    return float(((2 * np.arange(1, n + 1) - n - 1) * values).sum() / ((n - 1) * values.sum()))


def compute_m20(image: np.ndarray, region: np.ndarray) -> float:
    r"""Return the second moment of the brightest 20 % of the flux.

    Lotz et al. (2004), equation 8: :math:`\log_{10} (\sum_i M_i / M_{tot})`
    over the brightest pixels that have a fifth of the flux, about the
    centroid.

    Parameters
    ----------
    image
        The image.
    region
        Pixels of the galaxy; NaN without flux, or without extent.
    """
    y, x = np.nonzero(region)
    flux = image[region]
    if len(flux) == 0 or not flux.sum() > 0:
        return math.nan
    moment = flux * ((x - np.average(x, weights=flux)) ** 2 + (y - np.average(y, weights=flux)) ** 2)
    order = np.argsort(flux)[::-1]
    brightest = order[: int(np.searchsorted(np.cumsum(flux[order]), 0.2 * flux.sum())) + 1]
    if not (moment[brightest].sum() > 0 and moment.sum() > 0):
        return math.nan
    return math.log10(moment[brightest].sum() / moment.sum())


def compute_multimode(image: np.ndarray, region: np.ndarray) -> float:
    """Return the multimode statistic M.

    Freeman et al. (2013, MNRAS 434, 282): above a level, the areas of the two
    largest groups of pixels are A1 and A2; M is A2 / A1 at the quantile of
    the pixels for which A2^2 / A1 is largest, in steps of 0.02.

    Parameters
    ----------
    image
        The image.
    region
        Pixels of the galaxy; 0 if there is only one group at each level, NaN
        without pixels.
    """
    if not region.any():
        return math.nan
    rows, columns = ndimage.find_objects(region.astype(np.int8))[0]
    inside = np.where(region[rows, columns], image[rows, columns], -np.inf)
    levels = np.quantile(image[region], np.arange(0, 1, QUANTILE_STEP))
    best, multimode = 0.0, 0.0
    for level in levels:
        labels, n = ndimage.label(inside >= level, structure=_EIGHT)
        if n < 2:
            continue
        second, first = np.sort(np.bincount(labels.ravel())[1:])[-2:]
        if second**2 / first > best:
            best, multimode = second**2 / first, second / first
    return float(multimode)


def compute_intensity(image: np.ndarray, region: np.ndarray) -> float:
    """Return the intensity statistic I.

    Freeman et al. (2013): each pixel, after smoothing by a Gaussian of one
    pixel, belongs to the peak that one reaches by stepping to the brightest
    neighbour; I is the flux of the second brightest group over that of the
    brightest.

    Parameters
    ----------
    image
        The image.
    region
        Pixels of the galaxy; 0 if there is one peak, NaN without pixels.
    """
    flux, _ = _sum_peaks(image, region)
    if len(flux) == 0 or not flux[0] > 0:
        return math.nan
    return float(flux[1] / flux[0]) if len(flux) > 1 else 0.0


def compute_deviation(image: np.ndarray, region: np.ndarray) -> float:
    r"""Return the deviation statistic D.

    Freeman et al. (2013), equation 4: the distance of the brightest peak (as
    for `compute_intensity`) from the centroid, times
    :math:`\sqrt{\pi / n}` for n pixels.

    Parameters
    ----------
    image
        The image.
    region
        Pixels of the galaxy; NaN without flux.
    """
    flux, peaks = _sum_peaks(image, region)
    values = np.where(region, image, 0.0).clip(min=0)
    if len(flux) == 0 or not values.sum() > 0:
        return math.nan
    center = np.array(ndimage.center_of_mass(values))
    return float(math.sqrt(math.pi / region.sum()) * np.linalg.norm(peaks[0] - center))


def _sum_peaks(image: np.ndarray, region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return flux and position (y, x) of all peaks, the brightest first."""
    if not region.any():
        return np.empty(0), np.empty((0, 2))
    rows, columns = ndimage.find_objects(region.astype(np.int8))[0]
    inside = np.pad(region[rows, columns], 1)
    smooth = ndimage.gaussian_filter(np.where(region, image, 0.0).clip(min=0), 1.0, mode="constant")
    smooth = np.where(inside, np.pad(smooth[rows, columns], 1), -np.inf)
    # The brightest of each pixel and its neighbours, as a flat index.
    index = np.arange(smooth.size).reshape(smooth.shape)
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    values = np.stack([np.roll(smooth, offset, axis=(0, 1)) for offset in offsets])
    sources = np.stack([np.roll(index, offset, axis=(0, 1)) for offset in offsets])
    upward = np.take_along_axis(sources, values.argmax(axis=0)[None], axis=0)[0]
    # Pixels outside would point at each other in circles.
    upward = np.where(inside, upward, index).ravel()
    while not np.array_equal(upward, upward[upward]):
        upward = upward[upward]
    peaks, group = np.unique(upward[inside.ravel()], return_inverse=True)
    flux = np.bincount(group, weights=smooth.ravel()[inside.ravel()])
    order = np.argsort(flux)[::-1]
    y, x = np.divmod(peaks[order], smooth.shape[1])
    return flux[order], np.column_stack([y + rows.start - 1, x + columns.start - 1]).astype(np.float64)


def compute_radii(
    image: np.ndarray,
    *,
    y: float,
    x: float,
    g1: float = 0.0,
    g2: float = 0.0,
    fractions: tuple[float, ...] = (0.2, 0.5, 0.8),
) -> np.ndarray:
    """Return the radii of the ellipses that have fractions of the flux.

    The flux is that inside 1.5 Petrosian radii, where the surface brightness
    is a fifth of its mean inside (Conselice 2003, ApJS 147, 1), as far as the
    image reaches.

    Parameters
    ----------
    image
        The image, sky subtracted.
    y, x
        Centre, as indices.
    g1, g2
        Shear that makes the ellipses of circles.
    fractions
        Fractions of the flux.

    Returns
    -------
    radii
        In pixels, of the circles with the area of the ellipses: those of
        ``fractions``, then 1.5 Petrosian radii; NaN without flux.
    """
    distance = _compute_distance(image, y, x, g1, g2).ravel()
    order = np.argsort(distance, kind="stable")
    radius = np.sqrt((np.arange(image.size) + 1) / math.pi)  # of a disk with as many pixels
    # Beyond the nearest border ellipses are cut off.
    g = math.hypot(g1, g2)
    reach = min(y, x, image.shape[0] - 1 - y, image.shape[1] - 1 - x) * math.sqrt((1 - g) / (1 + g))
    n = max(int(np.searchsorted(distance[order], reach)), 2)
    growth, radius = np.cumsum(image.ravel()[order])[:n], radius[:n]
    # Annuli of one pixel in radius.
    edges = np.arange(0.5, radius[-1], 1.0)
    at_edges = np.interp(edges, radius, growth)
    local = np.diff(at_edges) / (math.pi * np.diff(edges**2))
    inside = at_edges[1:] / (math.pi * edges[1:] ** 2)
    below = np.flatnonzero(local < 0.2 * inside)
    last = min(PETROSIAN_RADII * edges[below[0] + 1] if len(below) else radius[-1], radius[-1])
    total = np.interp(last, radius, growth)
    if not total > 0:
        return np.full(len(fractions) + 1, math.nan)
    monotonic = np.maximum.accumulate(growth)
    start = np.concatenate([[0.0], radius]), np.concatenate([[0.0], monotonic])
    return np.array([*(np.interp(np.array(fractions) * total, start[1], start[0])), last])


def _compute_distance(image: np.ndarray, y: float, x: float, g1: float, g2: float) -> np.ndarray:
    """Return the radius of the ellipse on which each pixel lies."""
    rows, columns = np.indices(image.shape)
    dy, dx = rows - y, columns - x
    square = g1**2 + g2**2
    u, v = (1 - g1) * dx - g2 * dy, (1 + g1) * dy - g2 * dx
    distance: np.ndarray = np.hypot(u, v) / math.sqrt(1 - square)
    return distance


def compute_asymmetry(image: np.ndarray, *, y: float, x: float, radius: float, noise: float) -> float:
    r"""Return the asymmetry under half a turn.

    Conselice (2003), with the expectation for white noise subtracted,

    .. math::
        A = \frac{\sum |I - I_{180}| - n \, 2 \sigma / \sqrt\pi}{\sum |I|}

    in a circle of n pixels, about the centre on a grid of half pixels for
    which A has its nearest minimum.

    Parameters
    ----------
    image
        The image, sky subtracted.
    y, x
        First guess of the centre, as indices.
    radius
        Radius of the circle in pixels.
    noise
        Standard deviation of the noise in a pixel.

    Returns
    -------
    asymmetry
        Negative values are possible; NaN without flux.
    """

    def evaluate(twice_y: int, twice_x: int) -> float:
        rows, columns = np.indices(image.shape)
        inside = np.hypot(rows - twice_y / 2, columns - twice_x / 2) < radius
        mirrored = twice_y - rows[inside], twice_x - columns[inside]
        valid = (mirrored[0] >= 0) & (mirrored[0] < image.shape[0])
        valid &= (mirrored[1] >= 0) & (mirrored[1] < image.shape[1])
        values = image[inside][valid]
        difference = np.abs(values - image[mirrored[0][valid], mirrored[1][valid]]).sum()
        total = np.abs(values).sum()
        return math.nan if total == 0 else (difference - 2 / math.sqrt(math.pi) * noise * len(values)) / total

    center = round(2 * y), round(2 * x)
    best = evaluate(*center)
    for _ in range(2 * max(image.shape)):
        trials = [(center[0] + dy, center[1] + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
        results = [evaluate(*trial) for trial in trials]
        lowest = int(np.nanargmin(results)) if not np.isnan(results).all() else 0
        if not results[lowest] < best:
            break
        best, center = results[lowest], trials[lowest]
    return best


def measure_morphology(images: np.ndarray, *, noise: np.ndarray, pixel_scale: float) -> Table:
    """Measure all statistics of many images.

    Parameters
    ----------
    images
        Images without sky, galaxies in the middle, shape ``(N, y, x)``.
    noise
        Standard deviation of the noise in a pixel, shape ``(N,)``.
    pixel_scale
        Side of a pixel in arcsec.

    Returns
    -------
    table
        The columns of `STATISTICS`, NaN where they cannot be measured, and
        ``flag``, whether that is so for any.
    """
    rows = [_measure(image, sigma, pixel_scale) for image, sigma in zip(images, noise, strict=True)]
    table = Table({name: np.array([row[name] for row in rows], dtype=np.float64) for name in STATISTICS})
    for name, description in STATISTICS.items():
        table[name].description = description
    flag = np.zeros(len(table), dtype=bool)
    for name in STATISTICS:
        flag |= ~np.isfinite(table[name])
    table["flag"] = flag
    return table


def _measure(image: np.ndarray, noise: float, pixel_scale: float) -> dict[str, float]:
    image = np.asarray(image, dtype=np.float64)
    result = dict.fromkeys(STATISTICS, math.nan)
    if not np.isfinite(image).all():
        return result
    region = find_region(image, noise)
    functions: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "multimode": compute_multimode,
        "intensity": compute_intensity,
        "deviation": compute_deviation,
    }
    for name, function in functions.items():
        result[name] = function(image, region)
    moments = galsim.Image(image, xmin=0, ymin=0).FindAdaptiveMom(strict=False)
    if moments.error_message:
        return result
    shape, center = moments.observed_shape, moments.moments_centroid
    result |= {"ellipticity": shape.g, "e1": shape.g1, "e2": shape.g2}
    result |= {"sigma": moments.moments_sigma * pixel_scale, "rho4": moments.moments_rho4}
    if not (1 < center.y < image.shape[0] - 2 and 1 < center.x < image.shape[1] - 2):
        return result
    r20, r50, r80, outermost = compute_radii(image, y=center.y, x=center.x)
    if r20 > 0:
        result |= {"half_light_radius": r50 * pixel_scale, "concentration": 5 * math.log10(r80 / r20)}
        ellipse = {"y": center.y, "x": center.x, "g1": shape.g1, "g2": shape.g2}
        radius = compute_radii(image, **ellipse)[-1] / PETROSIAN_RADII
        petrosian = find_petrosian_region(image, radius=radius, **ellipse)
        result |= {"gini": compute_gini(image, petrosian), "m20": compute_m20(image, petrosian)}
        result["asymmetry"] = compute_asymmetry(image, y=center.y, x=center.x, radius=outermost, noise=noise)
    return result


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far apart the distributions of one statistic are."""

    ks: float
    """Largest difference of the cumulative distributions."""

    ks_error: float
    """Its standard deviation over bootstrap samples."""

    wasserstein: float
    """Mean distance of quantiles, in standard deviations of the first
    sample."""

    wasserstein_error: float
    """Its standard deviation over bootstrap samples."""

    ks_floor: float
    """Mean KS distance of random halves of the first sample, scaled to the
    sizes of the two samples: what equal distributions would give."""


def compute_distance(
    first: np.ndarray, second: np.ndarray, *, seed: int = 0, n_bootstrap: int = 100
) -> Distance:
    """Compare the distributions of one statistic.

    Parameters
    ----------
    first, second
        Values of each sample, shapes ``(N,)`` and ``(M,)``; those that are
        not finite are left out.
    seed
        Seed of the resampling.
    n_bootstrap
        Number of bootstrap samples.

    Raises
    ------
    ValueError
        Raised if a sample has fewer than four values.
    """
    first, second = (values[np.isfinite(values)] for values in map(np.asarray, (first, second)))
    n, m = len(first), len(second)
    if min(n, m) < 4:
        raise ValueError(f"Samples of {n} and {m} values are too small to compare.")
    rng = np.random.default_rng(seed)
    draws = np.array(
        [_compute_distances(rng.choice(first, n), rng.choice(second, m)) for _ in range(n_bootstrap)]
    )
    floors = []
    for _ in range(n_bootstrap):
        shuffled = rng.permutation(first)
        floors.append(_compute_distances(shuffled[: n // 2], shuffled[n // 2 :])[0])
    ks, wasserstein = _compute_distances(first, second)
    error = draws.std(axis=0, ddof=1)
    scale = math.sqrt((1 / n + 1 / m) / (4 / n))
    return Distance(ks, float(error[0]), wasserstein, float(error[1]), float(np.mean(floors)) * scale)


def _compute_distances(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return KS and scaled Wasserstein distance."""
    values = np.sort(np.concatenate([first, second]))
    gap = np.searchsorted(np.sort(first), values, "right") / len(first)
    gap = np.abs(gap - np.searchsorted(np.sort(second), values, "right") / len(second))
    spread = first.std()
    area = float((gap[:-1] * np.diff(values)).sum())
    return float(gap.max()), area / spread if spread > 0 else (0.0 if area == 0 else math.inf)


def compute_c2st(
    first: np.ndarray,
    second: np.ndarray,
    *,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
    folds: int = 10,
    penalty: float = 1.0,
    seed: int = 0,
) -> tuple[float, float]:
    """Return how well a classifier tells two samples apart.

    The classifier two-sample test of Lopez-Paz & Oquab (2017,
    arXiv:1610.06545), with a logistic regression on the features, their
    squares and products, in units of the first sample's quartiles.

    Parameters
    ----------
    first, second
        Features of each sample, shapes ``(N, F)`` and ``(M, F)``; rows that
        are not finite are left out.
    groups
        Number of the galaxy that each row comes from; a galaxy is on one side
        of each split of training and test data.
    folds
        Number of splits.
    penalty
        Strength of the Gaussian prior on the weights.
    seed
        Seed of the splits.

    Returns
    -------
    auc, error
        Area under the ROC curve of scores on data not trained on; 0.5 means
        that the samples look alike.  NaN if a sample is empty.
    """
    features = np.concatenate([first, second])
    labels = np.arange(len(features)) < len(first)
    group = np.arange(len(features)) if groups is None else np.concatenate(groups)
    good = np.isfinite(features).all(axis=1)
    features, labels, group = features[good], labels[good], group[good]
    if labels.all() or not labels.any():
        return math.nan, math.nan
    low, middle, high = np.quantile(features[labels], [0.25, 0.5, 0.75], axis=0)
    scaled = np.clip((features - middle) / np.where(high > low, high - low, 1.0), -5, 5)
    i, j = np.triu_indices(scaled.shape[1])
    inputs = np.column_stack([np.ones(len(scaled)), scaled, scaled[:, i] * scaled[:, j]])
    _, index = np.unique(group, return_inverse=True)
    fold = np.random.default_rng(seed).permutation(index.max() + 1)[index] % folds
    scores = np.full(len(labels), math.nan)
    for k in range(folds):
        train, test = fold != k, fold == k
        if test.any() and 0 < labels[train].sum() < train.sum():
            scores[test] = inputs[test] @ _fit_logistic(inputs[train], labels[train], penalty)
    known = np.isfinite(scores)
    return compute_auroc(scores[known], labels[known])


def _fit_logistic(inputs: np.ndarray, labels: np.ndarray, penalty: float) -> np.ndarray:
    """Return the weights of a logistic regression, by Newton's method."""
    weights = np.zeros(inputs.shape[1])
    # Both classes count the same, whatever their size.
    share = np.where(labels, 0.5 / labels.mean(), 0.5 / (1 - labels.mean()))
    prior = penalty * np.eye(len(weights))
    prior[0, 0] = 1e-6
    for _ in range(25):
        p = expit(inputs @ weights)
        gradient = inputs.T @ (share * (labels - p)) - prior @ weights
        hessian = inputs.T @ ((share * p * (1 - p))[:, None] * inputs) + prior
        step = np.linalg.solve(hessian, gradient)
        weights += step
        if np.abs(step).max() < 1e-6:
            break
    return weights

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


"""Tests of the statistics of galaxy shapes."""

from __future__ import annotations

import math
from typing import Any

import galsim
import numpy as np
import pytest
from astropy.table import Table
from scipy.stats import ks_2samp, spearmanr, wasserstein_distance

from lsst.meas.deeplearn.galaxies.morphology import (
    STATISTICS,
    compute_asymmetry,
    compute_c2st,
    compute_deviation,
    compute_distance,
    compute_gini,
    compute_intensity,
    compute_m20,
    compute_multimode,
    compute_radii,
    find_region,
    measure_morphology,
)
from lsst.meas.deeplearn.galaxies.synthetic import make_synthetic_set

EVERYWHERE = np.ones((101, 101), dtype=bool)


def draw(profile: galsim.GSObject) -> np.ndarray:
    """Return an image of pixels of unit size."""
    return np.asarray(profile.drawImage(nx=101, ny=101, scale=1.0, method="no_pixel").array, dtype=np.float64)


def make_blobs(distance: float = 30.0, flux: float = 0.5, sigma: float = 3.0) -> np.ndarray:
    """Return two Gaussians along x; the left one has a flux of 1."""
    blob = galsim.Gaussian(sigma=sigma)
    return draw(blob.shift(-distance / 2, 0) + flux * blob.shift(distance / 2, 0))


def test_gini() -> None:
    """It is 0 for equal pixels, 1 for a single bright one, else between."""
    point = np.zeros((101, 101))
    point[50, 50] = 3.0
    assert compute_gini(np.ones((101, 101)), EVERYWHERE) == pytest.approx(0)
    assert compute_gini(point, EVERYWHERE) == pytest.approx(1)
    # (-3 - 2 + 3 + 12) / (3 * 10), by hand.
    assert compute_gini(np.arange(1.0, 5.0), np.ones(4, dtype=bool)) == pytest.approx(1 / 3)
    assert math.isnan(compute_gini(point, ~EVERYWHERE))


def test_m20_of_a_gaussian() -> None:
    """It is that of the integral over the profile."""
    # With t = r^2 / 2 sigma^2 the flux inside is 1 - exp(-t).
    t = -math.log(0.8)
    expected = math.log10(1 - (1 + t) * math.exp(-t))
    assert compute_m20(draw(galsim.Gaussian(sigma=8)), EVERYWHERE) == pytest.approx(expected, abs=0.02)
    assert math.isnan(compute_m20(-np.ones((101, 101)), EVERYWHERE))


def test_multimode() -> None:
    """One peak has 0, two alike have 1, others are between."""
    region = make_blobs() > 1e-6
    assert compute_multimode(draw(galsim.Gaussian(sigma=8)), EVERYWHERE) == 0
    assert compute_multimode(make_blobs(flux=1.0), region) == pytest.approx(1, abs=0.05)
    assert 0.2 < compute_multimode(make_blobs(flux=0.3), region) < 0.95
    assert math.isnan(compute_multimode(make_blobs(), ~EVERYWHERE))


@pytest.mark.parametrize("flux", [0.0, 0.2, 0.7])
def test_intensity(flux: float) -> None:
    """It is the ratio of the fluxes of two peaks."""
    region = make_blobs() > 1e-6
    assert compute_intensity(make_blobs(flux=flux), region) == pytest.approx(flux, abs=0.01)


def test_peaks_of_thin_regions() -> None:
    """Pixels far from a region do not matter, and level ground is one peak."""
    line = np.eye(23, dtype=bool)
    image = np.where(line, np.arange(23.0), 0.0)
    assert compute_intensity(image, line) == 0
    assert compute_deviation(image, line) > 0
    flat = np.ones((23, 23))
    assert compute_intensity(flat, flat > 0) == 0
    assert math.isnan(compute_intensity(0 * flat, flat > 2))


def test_deviation() -> None:
    """It is the distance of the brighter of two peaks from the centroid."""
    image = make_blobs(distance=30, flux=0.5)
    # The centroid is a third of the way from the brighter one.
    expected = math.sqrt(math.pi / EVERYWHERE.sum()) * 10
    assert compute_deviation(image, EVERYWHERE) == pytest.approx(expected, rel=0.02)
    assert compute_deviation(draw(galsim.Gaussian(sigma=8)), EVERYWHERE) == pytest.approx(0, abs=1e-6)


def test_radii() -> None:
    """Radii of a Gaussian are those of its integral, off centre too."""
    image = draw(galsim.Gaussian(sigma=8).shift(5.3, -3.1))
    radii = compute_radii(image, y=50 - 3.1, x=50 + 5.3)
    expected = [8 * math.sqrt(-2 * math.log(1 - f)) for f in (0.2, 0.5, 0.8)]
    assert radii[:3] == pytest.approx(expected, rel=0.02)
    assert np.isnan(compute_radii(-image, y=50, x=50)).all()


def test_asymmetry() -> None:
    """Symmetry is found off centre, and noise alone counts for nothing."""
    ellipse = draw(galsim.Gaussian(sigma=8).shear(g1=0.3).shift(1.5, -2.0))
    assert compute_asymmetry(ellipse, y=50, x=50, radius=30, noise=0.0) == pytest.approx(0, abs=1e-6)
    lopsided = draw(galsim.Gaussian(sigma=8) + 0.2 * galsim.Gaussian(sigma=2).shift(12, 0))
    clean = compute_asymmetry(lopsided, y=50, x=50, radius=30, noise=0.0)
    assert 0.1 < clean < 0.5
    noise = 2e-5
    noisy = lopsided + noise * np.random.default_rng(0).standard_normal(lopsided.shape)
    assert compute_asymmetry(noisy, y=50, x=50, radius=30, noise=noise) == pytest.approx(clean, abs=0.05)


def test_region() -> None:
    """The region is the galaxy in the middle, not its neighbour or noise."""
    noise = 1e-4
    image = draw(galsim.Gaussian(sigma=5) + 3 * galsim.Gaussian(sigma=3).shift(40, 40))
    image += noise * np.random.default_rng(0).standard_normal(image.shape)
    region = find_region(image, noise)
    assert region[50, 50]
    assert not region[90, 90]
    assert 300 < region.sum() < 1100
    assert not find_region(np.zeros((101, 101)), noise).any()


def test_measures_in_arcsec_and_shear() -> None:
    """Sizes are in arcsec, shapes are those of GalSim, and nothing is NaN."""
    images = np.stack([draw(galsim.Gaussian(sigma=6).shear(g1=0.2, g2=-0.1))] * 2)
    images += 1e-5 * np.random.default_rng(0).standard_normal(images.shape)
    images[1] = np.nan
    table = measure_morphology(images, noise=np.full(2, 1e-5), pixel_scale=0.06)
    assert set(table.colnames) == {*STATISTICS, "flag"}
    assert table["flag"].tolist() == [False, True]
    assert (table["e1"][0], table["e2"][0]) == pytest.approx((0.2, -0.1), abs=0.01)
    assert table["sigma"][0] == pytest.approx(0.36, rel=0.02)
    # A circle holds half of the light at less than the circularised radius.
    assert table["half_light_radius"][0] == pytest.approx(0.36 * 1.1774, rel=0.08)
    assert all(np.isnan(table[name][1]) for name in STATISTICS)


def test_empty_images_are_flagged() -> None:
    """Noise without galaxy and zeros give flags, not errors."""
    images = np.zeros((2, 64, 64))
    images[0] = np.random.default_rng(1).standard_normal((64, 64)) - 1
    assert measure_morphology(images, noise=np.ones(2), pixel_scale=0.06)["flag"].all()


def test_distances_are_those_of_scipy() -> None:
    """KS and Wasserstein distances agree with scipy; errors are sensible."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal(400), 0.3 + rng.standard_normal(500)
    result = compute_distance(np.append(first, np.nan), second)
    assert result.ks == pytest.approx(ks_2samp(first, second).statistic)
    assert result.wasserstein == pytest.approx(wasserstein_distance(first, second) / first.std())
    assert 0.01 < result.ks_error < 0.05
    assert 0.03 < result.wasserstein_error < 0.15
    # The mean of the Kolmogorov distribution is 0.8687.
    assert result.ks_floor == pytest.approx(0.8687 * math.sqrt(1 / 400 + 1 / 500), rel=0.15)
    with pytest.raises(ValueError, match="too small"):
        compute_distance(first[:3], second)


def test_c2st() -> None:
    """Samples that are alike cannot be told apart, others can."""
    rng = np.random.default_rng(0)
    first, alike, other = rng.standard_normal((3, 400, 4))
    auc, error = compute_c2st(first, alike)
    assert abs(auc - 0.5) < 4 * error
    assert compute_c2st(first, other + 0.5)[0] > 0.7
    # The same means and variances, but correlated.
    other[:, 1] = 0.9 * other[:, 0] + math.sqrt(0.19) * other[:, 1]
    assert compute_c2st(first, other)[0] > 0.7
    assert math.isnan(compute_c2st(first, other[:0])[0])


def test_c2st_keeps_galaxies_together() -> None:
    """Copies of a galaxy in training and test data do not help."""
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((2, 30, 8))
    copies = [np.repeat(sample, 10, axis=0) for sample in (first, second)]
    groups = np.repeat(np.arange(30), 10), np.repeat(np.arange(30, 60), 10)
    assert compute_c2st(*copies)[0] > 0.8
    assert compute_c2st(*copies, groups=groups)[0] < 0.75


@pytest.fixture(scope="module")
def by_statmorph() -> tuple[Table, list[Any]]:
    """Return the statistics of 24 bright galaxies, and what statmorph
    measures (``pip install meas-deeplearn[statmorph]``).
    """
    statmorph = pytest.importorskip("statmorph")
    galaxies = make_synthetic_set(24, seed=4, max_magnitude=22.5, n_psfs=2)
    noise = np.sqrt(galaxies.noise_variance * galaxies.noise_power.mean())
    results = []
    for image, sigma in zip(galaxies.image, noise, strict=True):
        region = find_region(image, sigma).astype(int)
        weights = np.full(image.shape, sigma)
        results += statmorph.source_morphology(image, region, weightmap=weights, cutout_extent=10)
    return measure_morphology(galaxies.image, noise=noise, pixel_scale=galaxies.pixel_scale), results


@pytest.mark.slow
def test_agrees_with_statmorph(by_statmorph: tuple[Table, list[Any]]) -> None:
    """Statistics rank galaxies much as those of statmorph do, although
    regions and centres differ.
    """
    table, results = by_statmorph
    names = {
        "gini": ("gini", 0.5),
        "m20": ("m20", 0.85),
        "concentration": ("concentration", 0.9),
        "asymmetry": ("asymmetry", 0.65),
        "deviation": ("deviation", 0.55),
        "half_light_radius": ("r50", 0.95),
    }
    for name, (theirs, least) in names.items():
        assert spearmanr(table[name], [result[theirs] for result in results]).statistic > least, name


@pytest.mark.slow
def test_formulas_agree_with_statmorph(by_statmorph: tuple[Table, list[Any]]) -> None:
    """In the regions and about the centres of statmorph, Gini, M20 and D are
    the same numbers.

    For I peaks on the border of the region matter, for M the steps of the
    levels: statmorph goes on between them, and finds others for a fifth of
    the galaxies.  Radii are from whole pixels here, from parts of them there.
    """
    differences = []
    for result in by_statmorph[1]:
        stamp, wide = np.float64(result._cutout_stamp_maskzeroed), result._segmap_gini
        clumps, region = np.float64(result._cutout_mid), result._segmap_mid.astype(bool)
        x, y = result._asymmetry_center
        r20, r50, r80, _ = compute_radii(stamp, y=y, x=x)
        differences.append(
            (
                compute_gini(stamp, wide) - result.gini,
                compute_m20(stamp, wide) - result.m20,
                compute_deviation(clumps, region) - result.deviation,
                compute_intensity(clumps, region) - result.intensity,
                compute_multimode(clumps, region) - result.multimode,
                5 * math.log10(r80 / r20) - result.concentration,
                r50 / result.r50 - 1,
            )
        )
    gini, m20, deviation, intensity, multimode, concentration, radius = np.abs(differences).T
    assert gini.max() < 1e-6
    assert m20.max() < 1e-9
    assert deviation.max() < 1e-6
    assert intensity.max() < 0.01
    assert np.mean(multimode < 0.01) > 0.75
    assert concentration.max() < 0.2
    assert radius.max() < 0.07

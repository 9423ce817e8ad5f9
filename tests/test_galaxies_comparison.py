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

"""Tests of the comparison of generated with real galaxies."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table, vstack

from lsst.meas.deeplearn.galaxies.comparison import (
    Sample,
    compare_samples,
    compute_conditioning,
    compute_isotropy,
    compute_nearest,
    make_cosmos_samples,
    make_synthetic_samples,
    observe,
)
from lsst.meas.deeplearn.galaxies.cosmos import GalaxySet
from lsst.meas.deeplearn.galaxies.cvae_sampling import CvaeSampler
from lsst.meas.deeplearn.galaxies.fourier import compute_transform
from lsst.meas.deeplearn.galaxies.morphology import STATISTICS
from lsst.meas.deeplearn.galaxies.parametric import draw_parameters, make_galaxy
from lsst.meas.deeplearn.galaxies.plots import plot_gallery, plot_statistics
from lsst.meas.deeplearn.galaxies.synthetic import compute_component_transform, make_synthetic_set
from lsst.meas.deeplearn.tests import make_test_galaxy_model

DATA = Path(os.environ.get("MEAS_DEEPLEARN_GALAXY_DATA", "none"))
"""Folder with the catalogues of GalSim; tests are skipped without."""


def make_table(n: int = 400, seed: int = 0, **columns: np.ndarray) -> Table:
    """Return statistics of n galaxies that are normal deviates."""
    rng = np.random.default_rng(seed)
    table = Table({name: rng.standard_normal(n) for name in STATISTICS} | columns)
    table["galaxy"] = np.arange(n)
    return table


def test_galaxies_are_observed_as_the_real_ones() -> None:
    """The truth in place of itself differs by its noise only."""
    parameters = draw_parameters(4, seed=2)
    galaxies = make_synthetic_set(4, seed=3, size=64, n_psfs=2, parameters=parameters)
    transform = np.stack(
        [compute_component_transform(make_galaxy(p), size=64, pixel_scale=0.06) for p in parameters]
    )
    rng = np.random.default_rng(1)
    rows = np.array([2, 0, 2])
    sample = observe(transform[rows], galaxies, rows, rng)
    assert sample.galaxy.tolist() == [2, 0, 2]
    difference = (sample.image - galaxies.image[rows]) / sample.noise[:, None, None]
    # Both have noise; the light that leaves the small grid comes in again.
    assert difference.std() == pytest.approx(np.sqrt(2), rel=0.05)
    whiteness = np.abs(compute_transform(difference)) ** 2 / 64**2
    assert np.median(whiteness[:, 20:30, 20:30] / galaxies.noise_power[20:30, 20:30]) > 0


def test_stamps_are_cut_as_the_real_ones() -> None:
    """Outside the stamp of the real galaxy there is noise only."""
    parameters = draw_parameters(1, seed=2)
    galaxies = make_synthetic_set(1, seed=3, size=64, n_psfs=1, parameters=parameters)
    cut = dataclasses.replace(
        galaxies, extent=np.array([[19.5, 25.0, 40.5, 44.0]]), noise_variance=np.array([1e-16])
    )
    transform = compute_component_transform(make_galaxy(parameters[0]), size=64, pixel_scale=0.06)[None]
    whole = dataclasses.replace(cut, extent=None)
    images = [observe(transform, g, np.array([0]), np.random.default_rng(1)).image[0] for g in (cut, whole)]
    assert np.abs(images[0][:20]).max() < 1e-6
    assert np.abs(images[0][:, :25]).max() < 1e-6
    np.testing.assert_allclose(images[0][20:41, 26:44], images[1][20:41, 26:44], atol=1e-6)
    np.testing.assert_allclose(images[0][20:41, 25], 0.5 * images[1][20:41, 25], atol=1e-6)


@pytest.fixture(scope="module")
def synthetic() -> tuple[GalaxySet, dict[str, Sample]]:
    """Return bright galaxies and their twins on a small grid."""
    sampler = CvaeSampler(make_test_galaxy_model(size=64), outside="clip")
    return make_synthetic_samples(sampler, 30, seed=5, size=64, pixel_scale=0.06, max_magnitude=22.5)


def test_synthetic_samples(synthetic: tuple[GalaxySet, dict[str, Sample]]) -> None:
    """All samples have the same noise and number, and other galaxies."""
    galaxies, samples = synthetic
    assert list(samples) == ["real", "cvae", "parametric", "knots"]
    for name, sample in samples.items():
        assert sample.image.shape == (30, 64, 64)
        np.testing.assert_allclose(sample.noise, samples["real"].noise, rtol=1e-5)
        assert name == "real" or not np.array_equal(sample.image, samples["real"].image)
    tables = {name: sample.measure(0.06) for name, sample in samples.items()}
    distances = compare_samples(tables, n_bootstrap=5)
    assert len(distances) == 3 * (len(STATISTICS) + 1)
    figure = plot_gallery(samples, galaxies.conditions, [1, 4], pixel_scale=0.06)
    assert len(figure.axes) == 8
    assert len(plot_statistics(tables, distances).axes) == 9


def test_distances_are_those_of_the_statistic_that_differs() -> None:
    """A shift of one statistic by a standard deviation is found."""
    shifted = make_table(seed=1)
    shifted["gini"] += 1
    distances = compare_samples({"real": make_table(), "cvae": shifted}, n_bootstrap=20)
    ks = {row["statistic"]: row["ks"] for row in distances}
    assert ks["gini"] == pytest.approx(0.383, abs=0.06)
    assert max(ks[name] for name in STATISTICS if name != "gini") < 0.12
    # The best classifier has 0.76; one that learns from 800 loses some.
    assert 0.65 < ks["c2st"] < 0.8
    assert distances["wasserstein"][0] == pytest.approx(1, abs=0.15)


def test_classifier_sees_all_draws() -> None:
    """Of many draws for each galaxy it has one at a time, and their mean."""
    draws = [make_table(seed=seed) for seed in (1, 2, 3)]
    draws[1]["gini"] += 2
    real = make_table()
    areas = [compare_samples({"real": real, "cvae": draw}, n_bootstrap=2)["ks"][-1] for draw in draws]
    together = vstack(draws)
    assert compare_samples({"real": real, "cvae": together}, n_bootstrap=2)["ks"][-1] == pytest.approx(
        np.mean(areas)
    )
    assert areas[1] > max(areas[0], areas[2]) + 0.2


def test_conditioning_by_bins() -> None:
    """A ratio of radii is found in the bin that has it."""
    rng = np.random.default_rng(1)
    conditions = np.column_stack(
        [rng.uniform(0.2, 0.6, 400), rng.uniform(20, 25, 400), rng.uniform(0, 2, 400)]
    )
    real, other = (
        make_table(half_light_radius=conditions[:, 0] * (1 + 0.01 * rng.standard_normal(400)))
        for _ in range(2)
    )
    other["half_light_radius"][conditions[:, 1] > 24] *= 1.2
    table = compute_conditioning(real, other, conditions, edges={"magnitude": (20, 22, 24, 25)})
    rows = table[table["condition"] == "magnitude"]
    assert rows["radius_ratio"].tolist() == pytest.approx([1, 1, 1.2], abs=0.03)
    assert rows["n"].sum() == 400
    assert set(table["condition"]) == {"half_light_radius", "magnitude", "redshift"}


def test_isotropy() -> None:
    """A preferred direction, and a memory of the pixels, are found."""
    rng = np.random.default_rng(2)
    angle = rng.uniform(0, 2 * np.pi, 2000)
    e1, e2 = 0.2 * np.cos(angle), 0.2 * np.sin(angle)

    def measure(e1: np.ndarray, e2: np.ndarray) -> dict[str, float]:
        table = compute_isotropy(make_table(2000, e1=e1, e2=e2))
        return {row["term"]: row["mean"] / row["error"] for row in table}

    assert max(map(abs, measure(e1, e2).values())) < 4
    assert measure(e1 + 0.03, e2)["e1"] > 5
    boxy = np.where(np.abs(e1) > np.abs(e2), 1.3, 1.0)
    assert measure(e1 * boxy, e2 * boxy)["e cos 4 theta"] > 5


def test_copies_are_found() -> None:
    """Galaxies that were trained on are nearer than new ones."""
    rng = np.random.default_rng(3)
    train, held_out, new = rng.standard_normal((3, 500, 4))
    ratio, close = compute_nearest(train, held_out, new)
    assert ratio == pytest.approx(1, abs=0.1)
    assert close < 0.05
    ratio, close = compute_nearest(train, held_out, train + 0.01 * new)
    assert ratio < 0.2
    assert close > 0.3


@pytest.mark.skipif(not (DATA / "real_galaxy_images.fits").exists(), reason="needs COSMOS images")
def test_cosmos_samples() -> None:
    """Baselines of real galaxies have their flux and size."""
    sampler = CvaeSampler(make_test_galaxy_model(size=128), outside="clip")
    galaxies, samples = make_cosmos_samples(
        sampler,
        DATA / "real_galaxy_catalog_23.5_example.fits",
        n_samples=2,
        max_galaxies=12,
        size=128,
        pixel_scale=0.06,
    )
    assert len(samples["cvae"].galaxy) == 2 * len(galaxies)
    fluxes = {name: sample.image.sum(axis=(1, 2)) for name, sample in samples.items()}
    assert np.median(fluxes["real"]) == pytest.approx(np.median(fluxes["parametric"]), abs=0.1)
    tables = {name: sample.measure(0.06) for name, sample in samples.items()}
    ratio = np.nanmedian(tables["parametric"]["sigma"] / tables["real"]["sigma"])
    assert ratio == pytest.approx(1, abs=0.1)

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


"""Tests of parametric galaxies."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import galsim
import numpy as np
import pytest
from scipy.stats import ks_2samp, spearmanr

from lsst.meas.deeplearn.galaxies.parametric import (
    PARAMETER_NAMES,
    GalaxyParameters,
    GalaxyPopulation,
    draw_parameters,
    make_galaxy,
    make_knotty_galaxy,
    make_smooth_galaxy,
    read_population_table,
)

DATA = Path(os.environ.get("MEAS_DEEPLEARN_GALAXY_DATA", "none"))
"""Folder with the catalogues of GalSim; tests are skipped without."""

GALAXY_KINDS = (make_smooth_galaxy, make_knotty_galaxy, make_galaxy)


def make_parameters(**kwargs: float) -> GalaxyParameters:
    """Return a galaxy with all of its parts."""
    values = {
        "magnitude": 23.0,
        "half_light_radius": 0.5,
        "redshift": 0.8,
        "axis_ratio": 0.6,
        "position_angle": 0.7,
        "bulge_fraction": 0.3,
        "knot_fraction": 0.2,
        "n_knots": 20,
        "arm_fraction": 0.3,
    }
    return GalaxyParameters(**(values | kwargs))  # type: ignore[arg-type]


@pytest.mark.skipif(not (DATA / "src_cosmos.fits").exists(), reason="needs the COSMOS catalogue")
def test_population_is_that_of_cosmos() -> None:
    """The shipped fit has the marginals and dependences of its data."""
    truth = read_population_table(str(DATA / "src_cosmos.fits"))
    drawn = GalaxyPopulation.make_cosmos().sample(20000, np.random.default_rng(1))
    sample = np.column_stack([drawn[name] for name in PARAMETER_NAMES])
    # Many bulges have 0 or 1 to within 1e-3.
    truth, sample = truth.round(3), sample.round(3)
    for a, b in zip(truth.T, sample.T, strict=True):
        assert ks_2samp(a, b).statistic < 0.04
    assert np.abs(spearmanr(truth).statistic - spearmanr(sample).statistic).max() < 0.03
    # The dependences beyond correlation: the marginals of bright galaxies.
    bright, sample = truth[truth[:, 0] < 22.5], sample[sample[:, 0] < 22.5]
    for a, b in zip(bright.T, sample.T, strict=True):
        assert ks_2samp(a, b).statistic < 0.07


def test_population_has_dependence_without_correlation() -> None:
    """The fit describes a parabola, which a single Gaussian cannot."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3000, len(PARAMETER_NAMES)))
    values[:, 1] = values[:, 2] ** 2 + 0.3 * values[:, 1]

    def compute_dependence(components: int) -> float:
        sample = GalaxyPopulation.fit(values, components=components, iterations=30).sample(3000, rng)
        return float(spearmanr(np.abs(sample["redshift"]), sample["half_light_radius"]).statistic)

    assert compute_dependence(6) > 0.75
    assert abs(compute_dependence(1)) < 0.1


def test_same_seed_same_galaxies() -> None:
    """Parameters follow the seed, and are valid."""
    galaxies = draw_parameters(50, seed=4)
    assert galaxies == draw_parameters(50, seed=4)
    assert galaxies != draw_parameters(50, seed=5)
    assert make_galaxy(galaxies[0]).make_profile() == make_galaxy(galaxies[0]).make_profile()
    assert {galaxy.arm_fraction > 0 for galaxy in galaxies} == {True, False}


@pytest.mark.parametrize("make", GALAXY_KINDS)
def test_flux_and_size(make: object) -> None:
    """The flux is 1, and half of it is inside the half-light radius.

    For smooth round galaxies; clumps and a bulge that is rounder than its
    disk move the radius by some per cent.
    """
    assert callable(make)
    assert make(make_parameters()).make_profile().flux == pytest.approx(1, rel=1e-9)
    parameters = make_parameters(axis_ratio=1.0, knot_fraction=0.0, arm_fraction=0.0)
    image = make(parameters).make_profile().drawImage(nx=512, ny=512, scale=0.02, method="sb")
    tolerance = 0.01 if make is not make_knotty_galaxy else 0.08
    assert image.calculateHLR(flux=1 / 0.02**2) == pytest.approx(0.5, rel=tolerance)


def test_disk_alone_is_exponential() -> None:
    """Without bulge, knots and arms there is the profile of GalSim."""
    parameters = make_parameters(bulge_fraction=0.0, knot_fraction=0.0, arm_fraction=0.0)
    expected = galsim.Exponential(half_light_radius=0.5).shear(q=0.6, beta=0.7 * galsim.radians)
    for k in ((0.0, 0.0), (3.0, 1.0), (-2.0, 9.0)):
        assert make_galaxy(parameters).make_profile().kValue(*k) == pytest.approx(
            expected.kValue(*k), rel=1e-6
        )


def test_bulge_alone_is_de_vaucouleurs() -> None:
    """With all flux in the bulge its radius is that of the galaxy."""
    parameters = make_parameters(bulge_fraction=1.0, axis_ratio=1.0)
    expected = galsim.DeVaucouleurs(half_light_radius=0.5)
    found = make_galaxy(parameters).make_profile()
    assert found.kValue(2.0, 1.0) == pytest.approx(expected.kValue(2.0, 1.0), rel=1e-4)


def test_clumps_are_where_the_disk_is() -> None:
    """Many knots together have the shape of the disk."""
    parameters = make_parameters(knot_fraction=1.0, n_knots=3000, arm_fraction=0.0, bulge_fraction=0.0)
    smooth = dataclasses.replace(parameters, knot_fraction=0.0)
    psf = galsim.Gaussian(fwhm=0.3)
    moments = [
        galsim.Convolve(make_galaxy(p).make_profile(), psf)
        .drawImage(nx=128, ny=128, scale=0.06)
        .FindAdaptiveMom()
        for p in (parameters, smooth)
    ]
    assert moments[0].moments_sigma == pytest.approx(moments[1].moments_sigma, rel=0.1)
    assert moments[0].observed_shape.g1 == pytest.approx(moments[1].observed_shape.g1, abs=0.05)
    assert moments[0].observed_shape.g2 == pytest.approx(moments[1].observed_shape.g2, abs=0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"half_light_radius": 0.0},
        {"half_light_radius": float("nan")},
        {"axis_ratio": 0.0},
        {"magnitude": float("inf")},
        {"redshift": -1.0},
        {"bulge_fraction": 1.1},
        {"arm_fraction": 0.9},
    ],
)
def test_impossible_galaxies_are_refused(wrong: dict[str, float]) -> None:
    """Parameters that no galaxy has are an error that says which."""
    with pytest.raises(ValueError, match=next(iter(wrong)).partition("_")[0]):
        make_parameters(**wrong)

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

"""Tests of the fit of the shear bias."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.table import Table

from lsst.daf.butler import Butler, DatasetType
from lsst.meas.deeplearn.shear.bias import PARAMETERS, ShearSums, fit_bias
from lsst.meas.deeplearn.shear.shapes import STEPS, Shapes
from lsst.meas.deeplearn.shear.simulation import make_arms

ARMS = make_arms((0.01, 0.02, 0.05), (0.05,))
TRUTH = {
    "m1": 0.02,
    "m2": -0.03,
    "c1": 1e-3,
    "c2": -2e-3,
    "cross1": 3e-3,
    "cross2": -4e-3,
    "cubic1": 0.6,
    "cubic2": -0.5,
    "alpha1": 0.02,
    "alpha2": 0.04,
}
STEP = 0.01


def make_sums(
    n_blocks: int = 20,
    *,
    n_objects: int = 50,
    noise: float = 0.0,
    seed: int = 1,
    response: float = 0.3,
    arms: np.ndarray = ARMS,
    truth: dict[str, float] = TRUTH,
    response_noise: float = 0.0,
) -> ShearSums:
    """Return sums over objects that obey the model exactly, but for noise
    that is the same in all arms, and noise that is not.
    """
    rng = np.random.default_rng(seed)
    g, p = arms[:, :2], arms[:, 2:]
    terms = {
        name: np.array([truth[f"{name}1"], truth[f"{name}2"]])
        for name in ("m", "c", "cross", "cubic", "alpha")
    }
    biased = terms["c"] + (1 + terms["m"]) * g + terms["cross"] * g[:, ::-1]
    biased = biased + terms["cubic"] * g * (g**2).sum(axis=1, keepdims=True) + terms["alpha"] * p  # (A, 2)
    artificial = STEP * np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
    shape = (n_blocks, len(arms), len(STEPS), n_objects, 2)
    e = response * np.broadcast_to((biased[:, None] + artificial)[:, :, None], shape)
    e = e + noise * rng.standard_normal((n_blocks, 1, 1, n_objects, 2))
    e = e + 0.02 * noise * rng.standard_normal((n_blocks, len(arms), 1, n_objects, 2))
    e = e + response_noise * rng.standard_normal(shape)
    counts = np.full((*shape[:3], 2), float(n_objects))
    values = np.concatenate([e.sum(axis=3), counts], axis=3)
    return ShearSums(arms, STEP, np.arange(n_blocks), values)


def make_shapes(e: np.ndarray) -> Shapes:
    """Return good shapes of equal weight."""
    n = len(e)
    return Shapes(STEP, e, np.full((n, 5), 20.0), np.ones((n, 5)), np.ones((n, 5)), np.zeros(n, dtype=bool))


def test_recovers_the_truth() -> None:
    """Without noise every term is found exactly."""
    bias = fit_bias(make_sums())
    assert not bias.flag
    for name in PARAMETERS:
        assert bias.values[name] == pytest.approx(TRUTH[name], abs=1e-9), name
        assert bias.errors[name] == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_allclose(bias.response, 0.3 * np.eye(2), atol=1e-12)
    assert bias.n_objects == 1000


def test_terms_that_arms_do_not_tell() -> None:
    """With one size of the shear and one PSF there is no cubic term and no
    leakage.
    """
    arms = make_arms((0.02,))
    bias = fit_bias(make_sums(arms=arms, truth=TRUTH | {"cubic1": 0.0, "cubic2": 0.0}))
    assert bias.values["m1"] == pytest.approx(TRUTH["m1"])
    assert np.isnan([bias.values[name] for name in ("cubic1", "cubic2", "alpha1", "alpha2")]).all()
    assert not bias.flag
    with pytest.raises(ValueError, match="do not tell c1, m1"):
        fit_bias(make_sums(arms=arms[:1]))


def test_cubic_term_can_be_left_out() -> None:
    """Without it, m takes it up."""
    bias = fit_bias(make_sums(), cubic=False)
    assert np.isnan(bias.values["cubic1"])
    assert bias.values["m1"] > TRUTH["m1"] + 5e-4


def test_jackknife_and_bootstrap_agree() -> None:
    """The two errors of each term are within 20% of each other."""
    bias = fit_bias(make_sums(100, noise=0.3), n_bootstrap=2000)
    for name in PARAMETERS:
        assert bias.bootstrap_errors[name] == pytest.approx(bias.errors[name], rel=0.2), name


def test_errors_are_honest() -> None:
    """In 200 experiments the pulls of m and c have a scatter of one."""
    arms = make_arms((0.02,))
    truth = TRUTH | {"cubic1": 0.0, "cubic2": 0.0}
    pulls = []
    for seed in range(200):
        bias = fit_bias(
            make_sums(30, n_objects=10, noise=0.3, seed=seed, arms=arms, truth=truth), n_bootstrap=2
        )
        pulls.append([(bias.values[k] - truth[k]) / bias.errors[k] for k in ("m1", "m2", "c1", "c2")])
    assert 0.9 < np.std(pulls) < 1.1
    assert abs(np.mean(pulls)) < 3 / np.sqrt(800)


def test_difference_has_paired_errors() -> None:
    """What two samples have in common does not count in their difference."""
    sums = make_sums(40, noise=0.3)
    other = make_sums(40, noise=0.3, truth=TRUTH | {"m1": 0.0})
    difference = fit_bias(sums, reference=other)
    assert difference.values["m1"] == pytest.approx(TRUTH["m1"], abs=1e-3)
    assert difference.errors["m1"] < 0.05 * fit_bias(sums).errors["m1"]
    with pytest.raises(ValueError, match="same arms and blocks"):
        fit_bias(sums, reference=make_sums(20))


def test_blocks_join_in_any_order() -> None:
    """Sums of parts are those of the whole, and make the same fit."""
    whole = make_sums(noise=0.3)
    parts = [ShearSums(whole.arms, whole.step, whole.blocks[k::3], whole.values[k::3]) for k in (2, 0, 1)]
    joined = ShearSums.concatenate(parts)
    np.testing.assert_array_equal(joined.values, whole.values)
    twice = ShearSums.concatenate([whole, whole])
    np.testing.assert_allclose(twice.values, 2 * whole.values)
    assert fit_bias(twice).errors == pytest.approx(fit_bias(whole).errors)
    with pytest.raises(ValueError, match="different arms"):
        ShearSums.concatenate([whole, make_sums(arms=ARMS[:8])])
    with pytest.raises(ValueError, match="no sums"):
        ShearSums.concatenate([])


@pytest.mark.parametrize(
    ("sums", "reason"),
    [
        (make_sums(1), "one block has no error"),
        (make_sums(2, n_objects=0), "no objects"),
        (make_sums(response=1e-3, response_noise=0.1), "the response is consistent with zero"),
    ],
)
def test_degenerate_samples_are_flagged(sums: ShearSums, reason: str) -> None:
    """A sample that says nothing has a flag and NaN instead of numbers."""
    bias = fit_bias(sums)
    assert bias.flag
    assert bias.reason == reason
    assert np.isnan(bias.errors["m1"]) or np.isnan(bias.values["m1"])


def test_empty_arms_are_flagged() -> None:
    """So are samples with an arm without objects, or with one block of it."""
    sums = make_sums()
    sums.values[:, 3] = 0.0
    assert fit_bias(sums).reason == "an arm has no objects"
    sums = make_sums()
    sums.values[1:, 3] = 0.0
    bias = fit_bias(sums)
    assert bias.reason == "an arm has objects in one block only"
    assert np.isnan(bias.values["m1"])
    empty = ShearSums(sums.arms, sums.step, sums.blocks[:0], sums.values[:0])
    assert fit_bias(empty).reason == "no objects"


def test_bad_shapes_do_not_count() -> None:
    """NaN ellipticities that are not selected leave the sums as they are."""
    e = np.zeros((3, 5, 2))
    e[1] = np.nan
    shapes = make_shapes(e)
    shapes.bad[1] = True
    sums = ShearSums.from_shapes([shapes], [shapes.select()], arms=ARMS[:1], block=4)
    np.testing.assert_array_equal(sums.values[0, 0, 0], [0, 0, 2, 2])
    with pytest.raises(ValueError, match="2 arms have shapes of 1"):
        ShearSums.from_shapes([shapes], [shapes.select()], arms=ARMS[:2], block=4)


def test_table_through_a_butler(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Sums survive the way through a repository, with units."""
    sums = make_sums(3, noise=0.1)
    root = str(tmp_path_factory.mktemp("sums") / "repo")
    Butler.makeRepo(root)
    butler = Butler.from_config(root, run="test", writeable=True)
    butler.registry.registerDatasetType(DatasetType("sums", butler.dimensions.empty, "ArrowAstropy"))
    butler.put(sums.to_table(), "sums")
    table = butler.get("sums")
    assert all(table[name].description for name in table.colnames)
    rng = np.random.default_rng(1)
    found = ShearSums.from_table(table[rng.permutation(len(table))])
    assert fit_bias(found).values == pytest.approx(fit_bias(sums).values)
    assert fit_bias(found).errors == pytest.approx(fit_bias(sums).errors)


def test_tables_are_checked() -> None:
    """Tables that are not of sums are refused with what is wrong."""
    table = make_sums(2).to_table()
    with pytest.raises(ValueError, match=r"no columns \['metaStep'\]"):
        ShearSums.from_table(Table({name: table[name] for name in table.colnames if name != "metaStep"}))
    with pytest.raises(ValueError, match="one row for each"):
        ShearSums.from_table(table[1:])
    other = table.copy()
    other["metaStep"][0] = "3p"
    with pytest.raises(ValueError, match="metaStep is one of"):
        ShearSums.from_table(other)
    other = table.copy()
    other["step"][0] = 0.02
    with pytest.raises(ValueError, match="2 sizes"):
        ShearSums.from_table(other)

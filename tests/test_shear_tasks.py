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

"""Tests of the calibration of shear in a repository."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.table import Table

from lsst.daf.butler import Butler
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.galaxies.conditions import ARCHITECTURE, ConditionSpace
from lsst.meas.deeplearn.galaxies.cvae import Cvae
from lsst.meas.deeplearn.model_package import ModelPackage, ModelSettings
from lsst.meas.deeplearn.shear.bias import PARAMETERS
from lsst.meas.deeplearn.shear.noise import measure_noise_correlation
from lsst.meas.deeplearn.shear.shear_bias_task import (
    BIAS_COLUMNS,
    TRANSFER_COLUMNS,
    ShearBiasConfig,
    ShearBiasConnections,
    ShearBiasTask,
)
from lsst.meas.deeplearn.shear.shear_calib_task import (
    ShearCalibConfig,
    ShearCalibConnections,
    ShearCalibError,
    ShearCalibTask,
)
from lsst.meas.deeplearn.shear.simulation import correlate_noise
from lsst.meas.deeplearn.tests import make_test_coadds, make_test_repository
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import InvalidQuantumError, NoWorkFound, Pipeline
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor
from lsst.pipe.base.testUtils import lintConnections

SMALL: dict[str, object] = {
    "nPlaces": 3,
    "galaxiesPerPlace": 3,
    "morphologies": ["sersic", "bulge_disk"],
    "stampSize": 45,
    "psfSize": 21,
    "maxMagnitude": 22.0,
    "nRealizations": 3,
    "psfShears": [],
}


def make_config(**kwargs: object) -> ShearCalibConfig:
    """Return a configuration that is quick."""
    config = ShearCalibConfig()
    config.update(**(SMALL | kwargs))
    return config


def make_galaxy_model(size: int = 64, pixel_scale: float = 0.06) -> ModelPackage:
    """Return a conditional VAE with random weights."""
    conditions = [[r, m, z] for r in (0.1, 1.0) for m in (18.0, 26.0) for z in (0.01, 4.0)]
    network = {
        "conditions": ConditionSpace.fit(np.array(conditions)).to_settings(),
        "pixel_scale": pixel_scale,
        "size": size,
        "width": 2,
        "latents": 4,
    }
    torch.manual_seed(3)
    cvae = Cvae(**network)  # type: ignore[arg-type]
    return ModelPackage(
        name="test",
        version="1",
        architecture=ARCHITECTURE,
        settings=ModelSettings(
            bands=("F814W",), pixel_scale=pixel_scale, stamp_size=size + 1, network=network
        ),
        weights={key: value.numpy() for key, value in cvae.state_dict().items()},
    )


@pytest.fixture(scope="module")
def coadd() -> MultibandCoadd:
    """Return a patch of noise."""
    return MultibandCoadd.from_coadds(make_test_coadds("i"))


@pytest.fixture(scope="module")
def sums(coadd: MultibandCoadd) -> Table:
    """Return the sums of a patch."""
    return ShearCalibTask(config=make_config()).run(coadd, patch=4, seed=5).sums


@pytest.mark.parametrize("connections", [ShearCalibConnections, ShearBiasConnections])
def test_connections(connections: type) -> None:
    """Connections obey the conventions of the middleware."""
    lintConnections(connections)


def test_sums_of_a_patch(sums: Table) -> None:
    """There is a row for everything, with blocks that belong to the patch."""
    assert set(sums["morphology"]) == {"sersic", "bulge_disk"}
    assert set(sums["estimator"]) == {"metacal", "regauss"}
    assert set(sums["block"]) == {4000, 4001, 4002}
    assert {"all", "snr_10_20", "size_1_1.25", "magnitude_20_22.5", "redshift_0_0.5"} <= set(sums["bin"])
    # Samples, places, arms and versions.
    assert len(sums) == 2 * 2 * 13 * 3 * 4 * 5
    assert all(sums[name].description for name in sums.colnames)
    every = sums[(sums["bin"] == "all") & (sums["metaStep"] == "ns")]
    # Two rotations of three galaxies, and three realisations of the noise.
    assert every["n"][every["estimator"] == "metacal"].max() == 18
    assert every["n"][every["estimator"] == "regauss"].max() == 6


def test_same_seed_same_sums(coadd: MultibandCoadd, sums: Table) -> None:
    """A quantum that is run again gives the same numbers."""
    again = ShearCalibTask(config=make_config()).run(coadd, patch=4, seed=5).sums
    np.testing.assert_array_equal(again["sum_we1"], sums["sum_we1"])
    other = ShearCalibTask(config=make_config()).run(coadd, patch=4, seed=6).sums
    assert not np.array_equal(other["sum_we1"], sums["sum_we1"])


def make_objects(magnitudes: list[float]) -> Table:
    """Return an object table; the last object is a star."""
    flux = 10 ** (-0.4 * (np.array(magnitudes) - 31.4))
    extended = np.array((len(flux) - 1) * [1.0] + [0.0])
    return Table({"i_cModelFlux": flux, "i_extendedness": extended, "detect_isPrimary": extended >= 0})


def test_magnitudes_of_the_patch(coadd: MultibandCoadd) -> None:
    """Galaxies have the magnitudes of those of the patch; there must be
    some.
    """
    config = make_config(doMatchObjects=True, nPlaces=2, magnitudeBins=[20.0, 21.0, 21.5, 22.0])
    task = ShearCalibTask(config=config)
    sums = task.run(coadd, objects=make_objects([21.1, 21.2, 21.3, 20.5])).sums
    n = {label: sums[sums["bin"] == label]["n"].sum() for label in set(sums["bin"])}
    assert n["magnitude_21_21.5"] == n["all"] > 0
    # Three galaxies on the patch.
    side = coadd.pixel_scale / 60
    assert task.metadata["density"] == pytest.approx(
        3 / (coadd.bbox.x.size * coadd.bbox.y.size * side**2), rel=0.1
    )
    with pytest.raises(NoWorkFound, match="has 2 galaxies between"):
        task.run(coadd, objects=make_objects([21.1, 21.2, 20.5]))


def test_blended_scenes(coadd: MultibandCoadd) -> None:
    """Scenes with detection are samples of their own, each a block."""
    config = make_config(nBlendScenes=2, nPlaces=1, morphologies=["sersic"], blendDensity=40.0)
    sums = ShearCalibTask(config=config).run(coadd, patch=3).sums
    blended = sums[np.isin(sums["estimator"], ["metadetection", "no_detection"])]
    assert set(blended["block"]) == {6000, 6001}
    assert set(blended["bin"]) == {"all"}
    assert len(blended) == 2 * 2 * 4 * 5
    assert blended["n"].sum() > 0


def test_bias_of_a_tract(sums: Table) -> None:
    """Every sample has a row, and so has each difference from the reference;
    bins without objects are flagged.
    """
    bias = ShearBiasTask(config=ShearBiasConfig()).run([sums]).bias
    assert bias.colnames == list(BIAS_COLUMNS)
    assert len(bias) == 13 * 2 * 3
    assert all(bias[name].description for name in bias.colnames)
    row = bias[(bias["estimator"] == "metacal") & (bias["bin"] == "all") & (bias["morphology"] == "sersic")][
        0
    ]
    assert not row["flag"]
    for name in ("m1", "m2"):
        assert abs(row[name]) < max(0.01, 4 * row[f"{name}_err"])
    assert np.isnan(row["cubic1"])
    difference = bias[
        (bias["estimator"] == "metacal") & (bias["bin"] == "all") & (bias["reference"] == "sersic")
    ][0]
    assert difference["morphology"] == "bulge_disk"
    assert difference["c1_err"] < row["c1_err"]
    empty = bias[(bias["bin"] == "snr_10_20") & (bias["reference"] == "")]
    assert (empty["flag"] == (empty["reason"] != "")).all()
    assert np.isnan([empty[name][empty["flag"]] for name in PARAMETERS]).all()


def test_what_is_left_after_the_calibration_of_others(sums: Table) -> None:
    """There is a row for each pair of morphologies and each estimator, and
    there are figures.
    """
    result = ShearBiasTask(config=ShearBiasConfig()).run([sums])
    transfer = result.transfer
    assert transfer.colnames == list(TRANSFER_COLUMNS)
    assert len(transfer) == 2 * 2
    bias = result.bias[(result.bias["estimator"] == "metacal") & (result.bias["bin"] == "all")]
    one, other = (
        bias[(bias["morphology"] == name) & (bias["reference"] == "")][0] for name in ("sersic", "bulge_disk")
    )
    row = transfer[(transfer["estimator"] == "metacal") & (transfer["applied_to"] == "bulge_disk")][0]
    assert row["calibrated_on"] == "sersic"
    assert row["m1"] == pytest.approx((1 + other["m1"]) / (1 + one["m1"]) - 1)
    assert row["m1_err"] > 0
    assert [len(plot.axes) for plot in (result.morphologyPlot, result.binPlot)] == [4, 3]


def test_bias_of_all_tracts() -> None:
    """The level of the results is that of the quanta."""
    config = ShearBiasConfig()
    config.level = "skymap"
    connections = ShearBiasConnections(config=config)
    assert set(connections.dimensions) == {"skymap"}
    assert set(connections.bias.dimensions) == {"skymap"}


def test_ladder(coadd: MultibandCoadd) -> None:
    """A network is one of the morphologies; it needs a model, and real
    galaxies need a catalogue.
    """
    config = make_config(morphologies=["sersic", "cvae"], estimators=["metacal"])
    assert hasattr(ShearCalibConnections(config=config), "model")
    assert not hasattr(ShearCalibConnections(config=make_config()), "model")
    task = ShearCalibTask(config=config)
    sums = task.run(coadd, model=make_galaxy_model()).sums
    assert set(sums["morphology"]) == {"sersic", "cvae"}
    with pytest.raises(ValueError, match="needs a model"):
        task.run(coadd)
    with pytest.raises(InvalidQuantumError, match="galsim_download_cosmos"):
        ShearCalibTask(config=make_config(morphologies=["real"], realGalaxyCatalog="missing.fits")).run(coadd)


def test_noise_correlation_of_a_coadd() -> None:
    """It is measured beside objects, and white noise is white."""
    rng = np.random.default_rng(1)
    correlation = np.array([[0.0, 0.1, 0.0], [0.3, 1.0, 0.3], [0.0, 0.1, 0.0]])
    noise = correlate_noise(rng.standard_normal((300, 300), dtype=np.float32), correlation)
    noise[100:120, 100:120] += 50.0
    empty = np.ones(noise.shape, dtype=bool)
    empty[90:130, 90:130] = False
    found = measure_noise_correlation(2 * noise + 3, np.full(noise.shape, 4.0), empty)
    assert found is not None
    np.testing.assert_allclose(found[2:5, 2:5], correlation, atol=0.015)
    white = rng.standard_normal((300, 300))
    assert measure_noise_correlation(white, np.ones(white.shape), empty) is None
    assert measure_noise_correlation(white, np.ones(white.shape), empty & False) is None


def test_bad_tables(sums: Table) -> None:
    """No tables are no work; other tables are refused."""
    task = ShearBiasTask(config=ShearBiasConfig())
    for tables in ([], [sums[:0]]):
        with pytest.raises(NoWorkFound):
            task.run(tables)
    other = sums.copy()
    other.remove_column("estimator")
    with pytest.raises(ValueError, match=r"no columns \['estimator'\]"):
        task.run([other])


def test_unusable_patches() -> None:
    """A target PSF that is too narrow is an error with the reason; a patch
    without any good pixel is no work.
    """
    task = ShearCalibTask(config=make_config(targetFwhm=0.5))
    with pytest.raises(ShearCalibError, match="too wide for a target PSF"):
        task.run(MultibandCoadd.from_coadds(make_test_coadds("i")))
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    with pytest.raises(NoWorkFound, match="no place"):
        task.run(MultibandCoadd.from_coadds(make_test_coadds("i", missing_cells=cells)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"morphologies": ["spiral"]}, "not among sersic"),
        ({"estimators": []}, "not among metacal"),
        ({"stampSize": 64}, "odd"),
        ({"psfSize": 55}, "fit into"),
        ({"shears": []}, "At least one shear"),
        ({"morphologies": ["real"]}, "needs the path of a catalogue"),
        ({"minMagnitude": 25.0}, "fainter"),
        ({"snrBins": [20.0, 10.0]}, "increase"),
    ],
)
def test_validation(overrides: dict[str, object], message: str) -> None:
    """A configuration that cannot work is refused before anything runs."""
    with pytest.raises(FieldValidationError, match=message):
        make_config(**overrides).validate()


def test_in_a_repository(tmp_path: Path) -> None:
    """The pipeline runs on coadds of a repository, and writes m and c; a
    network that is not there is asked for.
    """
    root = tmp_path / "repo"
    make_test_repository(root, bands="ri")
    pipeline = Pipeline.from_uri("eups://meas_deeplearn/pipelines/calibrate_shear.yaml")
    for name, value in SMALL.items():
        pipeline.addConfigOverride("shearCalib", name, value)
    butler = SimplePipelineExecutor.prep_butler(str(root), inputs=["test/coadds"], output="shear")
    pipeline.addConfigOverride("shearCalib", "morphologies", ["sersic", "cvae"])
    with pytest.raises(
        FileNotFoundError, match="no galaxy_cvae_model in .* -i; .* 'butler ingest-deeplearn-model'"
    ):
        SimplePipelineExecutor.from_pipeline(pipeline, butler=butler)
    pipeline.addConfigOverride("shearCalib", "morphologies", SMALL["morphologies"])
    SimplePipelineExecutor.from_pipeline(pipeline, butler=butler).run(register_dataset_types=True)
    butler = Butler.from_config(str(root), collections="shear")
    bias = butler.get("shear_bias", skymap="test", tract=0)
    row = bias[(bias["estimator"] == "metacal") & (bias["bin"] == "all") & (bias["reference"] == "")][0]
    assert not row["flag"]
    assert row["n_blocks"] == 6
    assert np.isfinite([row["m1_err"], row["c2_err"]]).all()
    assert bias["m1"].description

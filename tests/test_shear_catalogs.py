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


"""Tests of measured shear catalogues, their response and blinding."""

from __future__ import annotations

from pathlib import Path

import galsim
import numpy as np
import pytest
from astropy.table import Table
from click.testing import CliRunner

from lsst.daf.butler import Butler, DatasetType
from lsst.meas.deeplearn.cli import unblind_shear
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.shear.catalogs import compute_mean_shear, make_blinding, sum_catalog, unblind
from lsst.meas.deeplearn.shear.measure_shear_task import (
    SHEAR_OBJECT_COLUMNS,
    MeasureShearConfig,
    MeasureShearConnections,
    MeasureShearTask,
)
from lsst.meas.deeplearn.shear.shapes import STEPS
from lsst.meas.deeplearn.shear.shear_catalog_task import (
    RESPONSE_COLUMNS,
    ShearCatalogConfig,
    ShearCatalogConnections,
    ShearCatalogTask,
)
from lsst.meas.deeplearn.tests import make_test_coadds, make_test_repository
from lsst.pipe.base import InvalidQuantumError, NoWorkFound, Pipeline
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor
from lsst.pipe.base.testUtils import lintConnections

RESPONSE = np.array([[0.3, 0.01], [-0.01, 0.28]])
SHEAR = np.array([0.02, -0.01])


def make_catalog(n: int = 400, seed: int = 1, step: float = 0.01) -> Table:
    """Return a catalogue of metadetection of known shear and response."""
    rng = np.random.default_rng(seed)
    versions = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]) * step
    noise = rng.normal(0, 0.05, (n, 1, 2))
    noise -= noise.mean(axis=0)
    e = (SHEAR + versions) @ RESPONSE.T + noise
    return Table(
        {
            "shearObjectId": np.repeat(np.arange(n), 5),
            "ra": np.repeat(rng.uniform(10, 10.1, n), 5),
            "dec": np.repeat(rng.uniform(0, 0.1, n), 5),
            "cell_x": np.repeat(np.arange(n) % 10, 5),
            "metaStep": np.tile(STEPS, n),
            "gauss_g1": e[..., 0].ravel(),
            "gauss_g2": e[..., 1].ravel(),
            "gauss_snr": np.repeat(rng.uniform(5, 50, n), 5),
        }
    )


def make_task(**kwargs: object) -> ShearCatalogTask:
    """Return a task with blocks of cells."""
    config = ShearCatalogConfig()
    config.update(**({"blockColumns": ["cell_x"]} | kwargs))
    return ShearCatalogTask(config=config)


@pytest.mark.parametrize("connections", [ShearCatalogConnections, MeasureShearConnections])
def test_connections(connections: type) -> None:
    """Connections obey the conventions of the middleware."""
    lintConnections(connections)


def test_response_and_shear_are_recovered() -> None:
    """So they are, for the mean of two patches and of the objects."""
    result = make_task().run([make_catalog(), make_catalog(seed=2)], [3, 4])
    assert result.response.colnames == list(RESPONSE_COLUMNS)
    row = result.response[0]
    assert (row["n_objects"], row["n_blocks"], row["is_blinded"]) == (800, 20, False)
    for i in "12":
        assert row[f"g{i}"] == pytest.approx(SHEAR[int(i) - 1], abs=1e-8)
        assert 0 < row[f"g{i}_err"] < 0.05
        for j in "12":
            assert row[f"response{i}{j}"] == pytest.approx(RESPONSE[int(i) - 1, int(j) - 1], abs=1e-8)
    assert result.calibrated.colnames == ["shearObjectId", "ra", "dec", "g1", "g2", "is_blinded"]
    assert len(result.calibrated) == 800
    assert np.mean(result.calibrated["g1"]) == pytest.approx(SHEAR[0], abs=1e-8)


def test_selection_bias_and_bad_rows() -> None:
    """Cuts hold, the bias of a simulation is taken out, NaN is left out."""
    catalog = make_catalog()
    catalog["gauss_g1"][:5] = np.nan
    bias = Table(
        {
            "morphology": ["knots"], "estimator": ["metacal"], "bin": ["all"], "reference": [""],
            "flag": [False], "m1": [0.1], "m2": [0.0], "c1": [0.001], "c2": [0.0],
        }
    )  # fmt: skip
    plain = make_task(selection=["gauss_snr > 20"]).run([catalog], [0])
    task = make_task(selection=["gauss_snr > 20"], doCorrectBias=True)
    corrected = task.run([catalog], [0], bias=bias)
    assert len(plain.calibrated) == len(corrected.calibrated) < 400
    assert corrected.response["g1"][0] == pytest.approx((plain.response["g1"][0] - 0.001) / 1.1)
    with pytest.raises(InvalidQuantumError, match="no unflagged bias of metacal on knots"):
        task.run([catalog], [0])


def test_bad_catalogs() -> None:
    """Without metaStep there is no response; others are named, too."""
    catalog = make_catalog(20)
    other = catalog.copy()
    other.remove_column("metaStep")
    with pytest.raises(InvalidQuantumError, match="no column metaStep: without artificially sheared"):
        make_task().run([other], [0])
    other = catalog.copy()
    other.rename_column("gauss_g1", "wmom_g_1")
    with pytest.raises(InvalidQuantumError, match=r"no columns \['gauss_g1'\]"):
        make_task().run([other], [0])
    with pytest.raises(InvalidQuantumError, match="No selected row of the catalogue has metaStep 2m"):
        make_task().run([catalog[catalog["metaStep"] != "2m"]], [0])
    catalog["metaStep"][0] = "3p"
    with pytest.raises(InvalidQuantumError, match="not \\['3p'\\]"):
        make_task().run([catalog], [0])
    with pytest.raises(NoWorkFound, match="no rows"):
        make_task().run([catalog[:0]], [0])


def test_jackknife_is_that_of_blocks() -> None:
    """The error of the mean is the scatter of blocks; one has none."""
    catalog = make_catalog(2000, seed=5)
    e = np.column_stack([catalog["gauss_g1"], catalog["gauss_g2"]])
    settings = {"e": e, "meta_step": catalog["metaStep"], "selected": np.ones(len(e), bool), "step": 0.01}
    many = compute_mean_shear(sum_catalog(blocks=catalog["shearObjectId"], **settings))
    np.testing.assert_allclose(many.shear_errors, 0.05 / 0.29 / np.sqrt(2000), rtol=0.1)
    one = compute_mean_shear(sum_catalog(blocks=np.zeros(len(e), int), **settings))
    assert np.isnan(one.shear_errors).all()


def test_blinding(tmp_path: Path) -> None:
    """A hidden factor changes all shear, and the command takes it out."""
    catalog = make_catalog()
    plain = make_task().run([catalog], [0]).calibrated
    result = make_task(doBlind=True, blindingPhrase="secret").run([catalog], [0])
    factor = float(result.blinding["factor"][0])
    assert 0.9 < factor < 1.1
    assert factor != 1
    np.testing.assert_allclose(result.calibrated["g1"], factor * plain["g1"])
    np.testing.assert_allclose(unblind(result.calibrated, result.blinding)["g1"], plain["g1"])
    assert make_blinding("secret")["factor"] == result.blinding["factor"]
    assert make_blinding("other")["factor"] != result.blinding["factor"]
    for bad in ((plain, result.blinding), (catalog, result.blinding), (plain, catalog)):
        with pytest.raises(ValueError, match="not blinded|Not a"):
            unblind(*bad)

    root = tmp_path / "repo"
    make_test_repository(root, bands="i")
    with Butler.from_config(str(root), run="blind", writeable=True) as butler:
        for name, table in (("shear_object", result.calibrated), ("shear_blinding", result.blinding)):
            butler.registry.registerDatasetType(
                DatasetType(name, ("skymap", "tract"), "ArrowAstropy", universe=butler.dimensions)
            )
            butler.put(table, name, skymap="test", tract=0)
    arguments = [str(root), "--collections", "blind", "--run", "open"]
    outcome = CliRunner().invoke(unblind_shear, arguments)
    assert outcome.exit_code == 0, outcome.output
    with Butler.from_config(str(root), collections="open") as butler:
        np.testing.assert_allclose(butler.get("shear_object", skymap="test", tract=0)["g1"], plain["g1"])
    arguments[2] = "open"
    outcome = CliRunner().invoke(unblind_shear, arguments)
    assert "no shear_blinding beside" in outcome.output


def test_objects_of_a_patch() -> None:
    """Sheared galaxies in a coadd are measured; the catalogue is one that
    can be calibrated, and objects at the border are flagged.
    """
    coadd = MultibandCoadd.from_coadds(make_test_coadds("i"))
    start_x, start_y = coadd.bbox.x.start, coadd.bbox.y.start
    kernel = coadd.compute_psf_kernel("i", x=start_x + 60.0, y=start_y + 60.0, size=35)
    assert kernel is not None
    psf = galsim.InterpolatedImage(galsim.Image(kernel.astype(float), scale=0.2))
    galaxy = galsim.Convolve(galsim.Exponential(half_light_radius=0.5, flux=1e5).shear(g1=0.1), psf)
    places = [(60, 60), (150, 60), (60, 150), (150, 150)]
    stamp = galaxy.drawImage(nx=45, ny=45, scale=0.2, method="no_pixel").array
    for x, y in places:
        coadd.planes["i"].image[y - 22 : y + 23, x - 22 : x + 23] += stamp
    x, y = np.array([*places, (3, 3)]).T
    ra, dec = coadd.pixel_to_sky(x=x + start_x, y=y + start_y)
    objects = Table({"objectId": np.arange(5), "coord_ra": ra, "coord_dec": dec})
    config = MeasureShearConfig()
    config.update(selection=[], stampSize=45, psfSize=21)
    catalog = MeasureShearTask(config=config).run(coadd, objects).catalog
    assert catalog.colnames == list(SHEAR_OBJECT_COLUMNS)
    assert len(catalog) == 25
    assert catalog["ra"].unit == "deg"
    np.testing.assert_array_equal(catalog["gauss_flags"].reshape(5, 5).all(axis=1), [*4 * [False], True])
    settings = {"keptColumns": ["objectId"], "blockColumns": ["objectId"], "selection": ["gauss_flags == 0"]}
    mean = make_task(**settings).run([catalog], [0]).response[0]
    assert mean["g1"] == pytest.approx(0.1, abs=0.03)
    assert mean["g2"] == pytest.approx(0.0, abs=0.03)
    with pytest.raises(NoWorkFound, match="No object"):
        MeasureShearTask(config=config).run(coadd, objects[:0])


def test_schema_in_a_repository(tmp_path: Path) -> None:
    """The schema is known before anything has run, and the catalogue of a
    patch has it.
    """
    root = tmp_path / "repo"
    make_test_repository(root, bands="i")
    pipeline = Pipeline.from_uri("eups://meas_deeplearn/pipelines/measure_shear.yaml#measureShear")
    for name, value in {"selection": [], "stampSize": 45, "psfSize": 21}.items():
        pipeline.addConfigOverride("measureShear", name, value)
    butler = SimplePipelineExecutor.prep_butler(str(root), inputs=["test/coadds"], output="shear")
    SimplePipelineExecutor.from_pipeline(pipeline, butler=butler).run(register_dataset_types=True)
    with Butler.from_config(str(root), collections="shear") as butler:
        schema = butler.get("shear_measurement_schema")
        (ref, *_) = butler.query_datasets("shear_measurement")
        catalog = butler.get(ref, storageClass="ArrowTable")
    assert schema.metadata == {b"shear_step": b"0.01", b"shear_bands": b"i"}
    assert schema.field("ra").metadata[b"unit"] == b"deg"
    assert all(field.metadata[b"doc"] for field in schema)
    assert [(field.name, field.type) for field in catalog.schema] == [
        (field.name, field.type) for field in schema
    ]

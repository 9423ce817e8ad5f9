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

"""Tests of the search for lenses in a patch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import astropy.units as u
import numpy as np
import pytest
from astropy.table import Table
from scipy.special import expit, logit

from lsst.daf.butler import Butler, CollectionType, DataCoordinate
from lsst.images import Box, MaskedImage
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.lenses.lens_finder_task import (
    CANDIDATE_COLUMNS,
    LensFinderConfig,
    LensFinderConnections,
    LensFinderTask,
)
from lsst.meas.deeplearn.lenses.likelihood_ratio import ScoreCalibration
from lsst.meas.deeplearn.model_package import ModelPackageError, find_models, ingest_model, load_model
from lsst.meas.deeplearn.object_selection import SelectionError
from lsst.meas.deeplearn.tests import make_test_coadds, make_test_model, make_test_repository
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import InvalidQuantumError
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor
from lsst.pipe.base.testUtils import lintConnections


def make_objects(coadd: MultibandCoadd, x: list[float], y: list[float]) -> Table:
    """Return a table of bright galaxies at offsets from the first pixel."""
    ra, dec = coadd.pixel_to_sky(x=np.array(x) + coadd.bbox.x.start, y=np.array(y) + coadd.bbox.y.start)
    n = len(x)
    return Table(
        {
            "objectId": 100 + np.arange(n),
            "coord_ra": ra,
            "coord_dec": dec,
            "refExtendedness": np.ones(n),
            "i_cModelFlux": np.full(n, 1e5),
        }
    )


def make_config(**kwargs: object) -> LensFinderConfig:
    """Return a configuration that is quick."""
    config = LensFinderConfig()
    config.inference.device = "cpu"
    config.update(**kwargs)
    return config


@pytest.fixture
def coadd() -> MultibandCoadd:
    """Return a patch of noise of 300 x 300 pixels in g, r, i."""
    return MultibandCoadd.from_coadds(make_test_coadds())


def test_connections() -> None:
    """Connections obey the conventions of the middleware."""
    # The models of an ensemble are of one data ID, the empty one.
    lintConnections(LensFinderConnections, checkUnnecessaryMultiple=False)


def test_every_object_has_a_row(coadd: MultibandCoadd) -> None:
    """All selected objects come out, in order, with units and descriptions."""
    objects = make_objects(coadd, [50, 150, 220], [60, 140, 230])
    objects["i_cModelFlux"][1] = 10.0
    result = LensFinderTask(config=make_config()).run(coadd, objects, [make_test_model()], tract=3, patch=7)
    table = result.candidates
    assert table["objectId"].tolist() == [100, 102]
    assert table.colnames == list(CANDIDATE_COLUMNS)
    assert np.isfinite(table["score"]).all()
    assert ((table["score"] > 0) & (table["score"] < 1)).all()
    assert (table["tract"][0], table["patch"][0], table["bands"][0]) == (3, 7, "g,r,i")
    assert (table["model_name"][0], table["model_version"][0]) == ("test", "1")
    for name, (_, unit, description) in CANDIDATE_COLUMNS.items():
        assert (table[name].unit, table[name].description) == (unit, description)
    np.testing.assert_allclose(table["x"] - coadd.bbox.x.start, [50, 220], atol=1e-6)
    cutouts = Cutouts.from_table(result.cutouts)
    assert set(cutouts.ids) == {100, 102}


def test_scores_do_not_depend_on_chunks_or_batches(coadd: MultibandCoadd) -> None:
    """Memory settings leave the scores as they are, bit for bit."""
    objects = make_objects(coadd, np.linspace(30, 270, 20).tolist(), [150] * 20)
    model = make_test_model()
    one = make_config(chunkSize=1000)
    other = make_config(chunkSize=7)
    other.inference.batchSize = 3
    scores = [
        LensFinderTask(config=config).run(coadd, objects, [model]).candidates["score"]
        for config in (one, other)
    ]
    np.testing.assert_array_equal(scores[0], scores[1])


@pytest.mark.parametrize("do_ring_finder", [True, False])
def test_flag_of_the_psf_without_ring_finder(do_ring_finder: bool) -> None:
    """Where there is no PSF is flagged, whether its images are needed or not;
    the stamps that are kept have them.
    """
    coadds = make_test_coadds()
    # A PSF of NaN, but not a cell without images.
    coadds["r"].psf._array[0, 0] = np.nan
    coadd = MultibandCoadd.from_coadds(coadds)
    objects = make_objects(coadd, [50, 200], [60, 200])
    task = LensFinderTask(config=make_config(doRingFinder=do_ring_finder, psfSize=15))
    result = task.run(coadd, objects, [make_test_model()])
    assert result.candidates["flag_bad_psf"].tolist() == [True, False]
    assert np.isfinite(result.candidates["score"]).all()
    kept = Cutouts.from_table(result.cutouts)
    assert kept.psf.shape == (2, 3, 15, 15)
    assert kept.bad_psf.tolist() == [[False, True, False], [False] * 3]


def test_engine_is_logged_once(coadd: MultibandCoadd, caplog: pytest.LogCaptureFixture) -> None:
    """Each run says once how its networks ran, whatever the chunks and the
    networks, and also if what was compiled is used again.
    """
    objects = make_objects(coadd, np.linspace(30, 270, 20).tolist(), [150] * 20)
    models = [make_test_model(), make_test_model(seed=2)]
    config = make_config(chunkSize=7)
    config.inference.engine = "torch"
    with caplog.at_level("INFO"):
        for n in (1, 2):
            LensFinderTask(config=config).run(coadd, objects, models)
            lines = [record.getMessage() for record in caplog.records if "torch on cpu" in record.message]
            assert lines == n * ["Networks ran with torch on cpu in float32, 32 stamps in a pass."]
        caplog.clear()
        LensFinderTask(config=config).run(coadd, objects[:0], models)
        assert "Networks ran" not in caplog.text


def test_masked_image_scores_like_cell_coadd(coadd: MultibandCoadd) -> None:
    """A patch gives the same scores as a MaskedImage as as a CellCoadd."""
    objects = make_objects(coadd, [50, 150, 220], [60, 140, 230])
    masked_images = {
        band: MaskedImage(cell_coadd.image, mask=cell_coadd.mask, variance=cell_coadd.variance)
        for band, cell_coadd in make_test_coadds().items()
    }
    task, model = LensFinderTask(config=make_config()), make_test_model()
    expected = task.run(coadd, objects, [model]).candidates
    found = task.run(MultibandCoadd.from_coadds(masked_images), objects, [model]).candidates
    np.testing.assert_allclose(found["score"], expected["score"], atol=1e-4)
    assert found["flag_bad_psf"].all()


def test_bad_objects_have_flags_and_no_score() -> None:
    """Edge, outside, masked, NaN, missing cell: flags, never a number."""
    coadds = make_test_coadds(
        missing_cells=[(1, 1)], mask_boxes={"SATURATED": Box.from_shape((60, 60), start=(1210, 610))}
    )
    coadds["r"].image.array[60:120, 170:230] = np.nan
    coadd = MultibandCoadd.from_coadds(coadds)
    # Good, at the edge, outside, masked, NaN, in a missing cell.
    objects = make_objects(coadd, [110, 3, 500, 40, 200, 250], [110, 110, 110, 40, 90, 250])
    objects["coord_ra"][2] = 151.0
    table = LensFinderTask(config=make_config()).run(coadd, objects, [make_test_model()]).candidates
    np.testing.assert_array_equal(table["flag_not_scored"], [False, True, True, True, True, True])
    np.testing.assert_array_equal(table["flag_edge"], [False, True, True, False, False, False])
    np.testing.assert_array_equal(table["flag_masked"], [False, True, True, True, True, True])
    np.testing.assert_array_equal(table["flag_missing_cell"], [False, False, False, False, False, True])
    assert np.isnan(table["score"][table["flag_not_scored"]]).all()
    assert np.isnan(table["ringfinder_snr"][table["flag_not_scored"]]).all()
    assert not table["ringfinder_is_lens"][table["flag_not_scored"]].any()


def test_object_with_unknown_coordinates(coadd: MultibandCoadd) -> None:
    """NaN coordinates give a flagged row."""
    objects = make_objects(coadd, [150, 150], [150, 150])
    objects["coord_dec"][1] = np.nan
    table = LensFinderTask(config=make_config()).run(coadd, objects, [make_test_model()]).candidates
    np.testing.assert_array_equal(table["flag_not_scored"], [False, True])


def test_missing_band() -> None:
    """Without a band of the model there are rows with flags and no scores."""
    coadds = make_test_coadds()
    del coadds["r"]
    coadd = MultibandCoadd.from_coadds(coadds, "gri")
    table = (
        LensFinderTask(config=make_config())
        .run(coadd, make_objects(coadd, [150], [150]), [make_test_model()])
        .candidates
    )
    assert table["flag_missing_band"].all()
    assert np.isnan(table["score"]).all()


def test_no_objects(coadd: MultibandCoadd) -> None:
    """An empty table gives an empty table with all columns."""
    objects = make_objects(coadd, [150], [150])[:0]
    result = LensFinderTask(config=make_config()).run(coadd, objects, [make_test_model()])
    assert len(result.candidates) == len(result.cutouts) == 0
    assert result.candidates.colnames == list(CANDIDATE_COLUMNS)


def test_model_must_fit(coadd: MultibandCoadd) -> None:
    """Wrong bands and pixel scales are refused with the cure."""
    objects, task = make_objects(coadd, [150], [150]), LensFinderTask(config=make_config())
    with pytest.raises(ModelPackageError, match="y missing"):
        task.run(coadd, objects, [make_test_model("giy")])
    with pytest.raises(ModelPackageError, match="needs pixels of 0.030 arcsec"):
        task.run(coadd, objects, [make_test_model(pixel_scale=0.03)])
    with pytest.raises(ModelPackageError, match="doResample"):
        LensFinderTask(config=make_config(doResample=False)).run(
            coadd, objects, [make_test_model(pixel_scale=0.22)]
        )
    with pytest.raises(ModelPackageError, match="doDeepLens"):
        task.run(coadd, objects)


def test_resamples_to_the_scale_of_the_model(coadd: MultibandCoadd) -> None:
    """Another pixel scale within the limit is resampled."""
    objects = make_objects(coadd, [150], [150])
    table = (
        LensFinderTask(config=make_config())
        .run(coadd, objects, [make_test_model(pixel_scale=0.168)])
        .candidates
    )
    assert np.isfinite(table["score"]).all()


def test_model_bands_are_picked_by_name(coadd: MultibandCoadd) -> None:
    """A model of i and g alone sees these bands of g, r, i, in its order."""
    objects = make_objects(coadd, [150, 100], [150, 120])
    reference = MultibandCoadd.from_coadds(make_test_coadds("ig"))
    task = LensFinderTask(config=make_config(doRingFinder=False))
    expected = task.run(reference, objects, [make_test_model("ig")]).candidates["score"]
    np.testing.assert_allclose(
        task.run(coadd, objects, [make_test_model("ig")]).candidates["score"], expected, atol=1e-6
    )


def test_ensemble(coadd: MultibandCoadd) -> None:
    """Members of other scales and stamps score together with the others."""
    objects = make_objects(coadd, [50, 150, 220], [60, 140, 230])
    models = [
        make_test_model(),
        make_test_model("irg", seed=2, stamp_size=41),
        make_test_model(seed=3, pixel_scale=0.168),
    ]
    task = LensFinderTask(config=make_config(doRingFinder=False))
    table = task.run(coadd, objects, models).candidates
    alone = [logit(task.run(coadd, objects, [model]).candidates["score"]) for model in models]
    np.testing.assert_allclose(logit(table["score"]), np.mean(alone, axis=0), rtol=1e-4)
    np.testing.assert_allclose(table["score_err"], np.std(expit(alone), axis=0, ddof=1), rtol=1e-4)
    assert np.isnan(table["probability"]).all()
    assert set(table["model_name"]) == {"test,test,test"}


def test_calibrated_probability(coadd: MultibandCoadd) -> None:
    """A calibrated model gives probabilities for the prevalence."""
    objects = make_objects(coadd, [50, 150], [60, 140])
    calibration = ScoreCalibration(np.array([-50.0]), np.array([1, 500]), np.array([500, 50]))
    model = dataclasses.replace(make_test_model(), record={"calibration": calibration.to_dict()})
    table = LensFinderTask(config=make_config(prevalence=0.01)).run(coadd, objects, [model]).candidates
    np.testing.assert_allclose(table["log_likelihood_ratio"], calibration.log_ratios[1])
    odds = np.exp(calibration.log_ratios[1]) * 0.01 / 0.99
    np.testing.assert_allclose(table["probability"], odds / (1 + odds))
    assert (table["probability_err"] > 0).all()


def test_members_of_an_ensemble_must_agree(coadd: MultibandCoadd) -> None:
    """Members that see other bands are refused, by name."""
    other = dataclasses.replace(make_test_model("gi"), name="other")
    with pytest.raises(ModelPackageError, match="other 1 sees bands g, i, but test 1 sees g, r, i"):
        LensFinderTask(config=make_config()).run(
            coadd, make_objects(coadd, [150], [150]), [make_test_model(), other]
        )


def test_ring_finder_alone(coadd: MultibandCoadd) -> None:
    """Without a network there is no model, and RingFinder counts."""
    config = make_config(doDeepLens=False)
    assert "models" not in config.connections.ConnectionsClass(config=config).prerequisiteInputs
    table = LensFinderTask(config=config).run(coadd, make_objects(coadd, [150], [150])).candidates
    assert np.isfinite(table["ringfinder_snr"]).all()
    assert np.isnan(table["score"]).all()
    assert not table["flag_not_scored"].any()
    assert table["model_name"][0] == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"doDeepLens": False, "doRingFinder": False}, "nothing to do"),
        ({"bands": ["r", "i"]}, "RingFinder needs bands g, i"),
        ({"psfSize": 24}, "odd"),
        ({"selection": ["i_cModelFlux >"]}, "not an expression"),
    ],
)
def test_validation(overrides: dict[str, object], message: str) -> None:
    """A configuration that cannot work is refused before anything runs."""
    with pytest.raises(FieldValidationError, match=message):
        make_config(**overrides).validate()


def test_selection_that_does_not_fit(coadd: MultibandCoadd) -> None:
    """A column that is not there is named."""
    task = LensFinderTask(config=make_config(selection=["i_kronRad > 1"]))
    with pytest.raises(SelectionError, match="i_kronRad"):
        task.run(coadd, make_objects(coadd, [150], [150]), [make_test_model()])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository of two small patches and a model."""
    root = tmp_path_factory.mktemp("repository") / "repo"
    butler = make_test_repository(root, n_sources=40)
    ingest_model(butler, make_test_model(), run="models/test")
    ingest_model(butler, make_test_model("gry"), run="models/gry", dataset_type="deeplens_model")
    return root


def run_pipeline(root: Path, output: str, *, model: str = "models/test", **overrides: object) -> Butler:
    """Run LensFinderTask on a repository, and return a butler for it."""
    # The objects of the test repository are stars.
    settings: dict[str, object] = {"selection": ["i_psfFlux > 0"]}
    butler = SimplePipelineExecutor.prep_butler(str(root), inputs=["test/coadds", model], output=output)
    executor = SimplePipelineExecutor.from_task_class(
        LensFinderTask, config=make_config(**(settings | overrides)), butler=butler
    )
    executor.run(register_dataset_types=True)
    return butler


@pytest.mark.parametrize("dimensions", ["tract", "patch"])
def test_in_a_repository(repository: Path, dimensions: str) -> None:
    """The task reads object tables by tract and by patch."""
    config = make_config(objectDimensions=dimensions, selection=["i_psfFlux > 0"])
    if dimensions == "patch":
        config.connections.objects = "object_patch"
    butler = SimplePipelineExecutor.prep_butler(
        str(repository), inputs=["test/coadds", "models/test"], output=f"lenses_{dimensions}"
    )
    SimplePipelineExecutor.from_task_class(LensFinderTask, config=config, butler=butler).run(
        register_dataset_types=True
    )
    tables = [butler.get(ref) for ref in butler.query_datasets("lens_candidates")]
    assert len(tables) == 2
    assert sum(len(table) for table in tables) > 10
    for table in tables:
        assert np.isfinite(table["score"]).any()
        assert table["coord_ra"].unit == u.deg
        assert table["score"].description
        ids = butler.get("lens_cutouts", skymap="test", tract=0, patch=int(table["patch"][0]))["ids"]
        assert set(ids) <= set(table["objectId"])


def test_models_are_chosen_by_collections(tmp_path: Path) -> None:
    """All models of the inputs count, but of a name only the first version."""
    Butler.makeRepo(str(tmp_path / "repo"))
    butler = Butler.from_config(str(tmp_path / "repo"), writeable=True)
    for run in ("models/a/v1", "models/a/v2", "models/b/v1", "u/me/training", "u/me/other/training"):
        ingest_model(butler, make_test_model(), run=run)
    butler.collections.register("models/all", CollectionType.CHAINED)
    butler.collections.redefine_chain("models/all", ["models/b/v1", "models/a/v1"])
    dataset_type = butler.get_dataset_type("deeplens_model")
    empty = DataCoordinate.make_empty(butler.dimensions)

    def find(*collections: str) -> list[str]:
        return [ref.run for ref in find_models(dataset_type, butler.registry, empty, collections)]

    assert find("models/a/v1") == ["models/a/v1"]
    assert find("models/a/v2", "models/a/v1") == ["models/a/v2"]
    assert find("models/all", "models/a/v2") == ["models/b/v1", "models/a/v1"]
    assert find("u/me/other/training", "u/me/training") == ["u/me/other/training", "u/me/training"]


def test_models_are_loaded_once(repository: Path) -> None:
    """Quanta of a process share a model, its network and what is compiled."""
    butler = Butler.from_config(str(repository), collections="models/test")
    first, second = (load_model(butler.getDeferred("deeplens_model")) for _ in range(2))
    assert first is second
    assert first.network is second.network


def test_wrong_model_stops_the_run(repository: Path) -> None:
    """A model of other bands is a wrong set-up, not a failure of one patch."""
    with pytest.raises(InvalidQuantumError, match="y missing"):
        run_pipeline(repository, "lenses_wrong_model", model="models/gry")


def test_wrong_columns_stop_the_run(repository: Path) -> None:
    """A missing column is named beside the nearest that there are."""
    with pytest.raises(InvalidQuantumError, match="i_psfFlux"):
        run_pipeline(repository, "lenses_wrong_column", selection=["i_psfFluxx > 0"])

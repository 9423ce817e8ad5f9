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


"""Tests of the tasks that train the galaxy model and draw from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
import pytest
from astropy.table import Table

from lsst.daf.butler import Butler
from lsst.meas.deeplearn import model_package
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.galaxies.coadd_set import make_coadd_set
from lsst.meas.deeplearn.galaxies.compare_morphology_task import (
    CompareMorphologyConfig,
    CompareMorphologyConnections,
    CompareMorphologyTask,
)
from lsst.meas.deeplearn.galaxies.conditions import ARCHITECTURE
from lsst.meas.deeplearn.galaxies.cosmos import GalaxySetError
from lsst.meas.deeplearn.galaxies.cut_galaxies_task import (
    CONDITION_COLUMNS,
    CutGalaxiesConfig,
    CutGalaxiesConnections,
    CutGalaxiesTask,
)
from lsst.meas.deeplearn.galaxies.cvae_galaxy_task import (
    GALAXY_COLUMNS,
    CvaeGalaxyConfig,
    CvaeGalaxyConnections,
    CvaeGalaxyTask,
    describe_galaxies,
)
from lsst.meas.deeplearn.galaxies.train_cvae_task import (
    TrainCvaeConfig,
    TrainCvaeConnections,
    TrainCvaeTask,
)
from lsst.meas.deeplearn.model_package import ModelPackage, ModelPackageError
from lsst.meas.deeplearn.tests import make_test_coadds, make_test_model, make_test_repository
from lsst.pex.config import FieldValidationError
from lsst.pipe.base import InvalidQuantumError, Pipeline
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor
from lsst.pipe.base.testUtils import lintConnections

PIPELINES = "eups://meas_deeplearn/pipelines"


SMALL: dict[str, Any] = {
    "nGalaxies": 100,
    "size": 32,
    "width": 2,
    "latents": 3,
    "textureSize": 16,
    "textureStart": 2,
    "flowLayers": 1,
    "priorSteps": 5,
    "textureLayers": 2,
    "texturePriorSteps": 5,
    "epochs": 1,
    "batchSize": 16,
    "maxMagnitude": 23.5,
    "accelerator": "cpu",
}
"""What makes a training quick."""


def set_small(config: Any) -> None:
    """Make a training quick."""
    for name, value in SMALL.items():
        setattr(config, name, value)


@pytest.fixture(scope="module")
def model() -> ModelPackage:
    """Return a model after one epoch."""
    config = TrainCvaeConfig()
    set_small(config)
    package = TrainCvaeTask(config=config).run().model
    assert isinstance(package, ModelPackage)
    return package


@pytest.fixture
def coadd() -> MultibandCoadd:
    """Return a patch of 300 x 300 pixels of noise of 5 nJy."""
    return MultibandCoadd.from_coadds(make_test_coadds("i"))


def make_objects(coadd: MultibandCoadd, n: int = 4, **columns: Any) -> Table:
    """Return galaxies of magnitude 20 in the middle of a patch."""
    x = coadd.bbox.x.start + np.linspace(60, 230, n) + 0.3
    y = coadd.bbox.y.start + np.linspace(80, 220, n)
    ra, dec = coadd.pixel_to_sky(x=x, y=y)
    values = {
        "objectId": 100 + np.arange(n),
        "coord_ra": ra,
        "coord_dec": dec,
        "refExtendedness": np.ones(n),
        "i_cModelFlux": np.full(n, 10 ** (0.4 * (31.4 - 20.0))),
        "radius": np.full(n, 0.4),
        "photoz": np.full(n, 0.5),
        "shape_xx": np.full(n, 6.0),
        "shape_yy": np.full(n, 6.0),
    }
    return Table(values | columns)


def make_config(**kwargs: Any) -> CvaeGalaxyConfig:
    """Return a configuration that takes conditions from columns."""
    config = CvaeGalaxyConfig()
    config.update(**({"radiusColumn": "radius", "redshiftColumn": "photoz"} | kwargs))
    return config


@pytest.mark.parametrize(
    "connections",
    [TrainCvaeConnections, CvaeGalaxyConnections, CompareMorphologyConnections, CutGalaxiesConnections],
)
def test_connections(connections: type) -> None:
    """Connections obey the conventions of the middleware."""
    lintConnections(connections)


def test_training_is_recorded(model: ModelPackage) -> None:
    """The package says what it was trained on, and how well it did."""
    training_set = model.record["training_set"]
    assert (training_set["source"], training_set["max_magnitude"]) == ("synthetic", 23.5)
    assert training_set["n_train"] + training_set["n_validation"] == 100
    assert np.isfinite(model.record["performance"]["log_likelihood"])
    assert ModelPackage.from_arrow(model.to_arrow()).digest == model.digest


def test_training_config() -> None:
    """Wrong set-ups are refused with the field that is wrong."""
    config = TrainCvaeConfig(source="cosmos")
    with pytest.raises(FieldValidationError, match="cosmosCatalog"):
        config.validate()
    with pytest.raises(FieldValidationError, match="cosmosCatalog"):
        CompareMorphologyConfig(source="cosmos").validate()
    with pytest.raises(FieldValidationError, match="outputFwhm"):
        TrainCvaeConfig(outputFwhm=0.08).validate()
    config = TrainCvaeConfig(source="cosmos", cosmosCatalog="no/real_galaxy_catalog_25.2.fits")
    with pytest.raises(GalaxySetError, match="galsim_download_cosmos"):
        TrainCvaeTask(config=config).run()


def test_draws_a_galaxy_for_each_object(coadd: MultibandCoadd, model: ModelPackage) -> None:
    """Stamps have the flux, place and noise of their objects."""
    objects = make_objects(coadd)
    table = CvaeGalaxyTask(config=make_config()).run(coadd, objects, model).cutouts
    assert set(GALAXY_COLUMNS) < set(table.colnames)
    for name, (_, unit, description) in CONDITION_COLUMNS.items():
        assert (table[name].unit, table[name].description) == (unit, description)
    cutouts = Cutouts.from_table(table)
    assert cutouts.ids.tolist() == [100, 101, 102, 103]
    np.testing.assert_allclose(table["magnitude"], 20, atol=1e-4)
    np.testing.assert_allclose(table["half_light_radius"], 0.4)
    assert not table["flag_not_drawn"].any()
    assert len(set(table["galaxy_seed"])) == 4
    images = cutouts.image[:, 0]
    np.testing.assert_allclose(images.sum(axis=(1, 2)), objects["i_cModelFlux"], rtol=0.05)
    y, x = np.indices(images.shape[1:]) - images.shape[-1] // 2
    bright = np.where(images > 0.1 * images.max(axis=(1, 2), keepdims=True), images, 0)
    centroid = (bright * x).sum(axis=(1, 2)) / bright.sum(axis=(1, 2))
    np.testing.assert_allclose(centroid, cutouts.x - np.floor(cutouts.x + 0.5), atol=0.5)
    border = images[:, :4].std()
    assert border == pytest.approx(5, rel=0.2)


def test_same_galaxies_whatever_else_is_drawn(coadd: MultibandCoadd, model: ModelPackage) -> None:
    """A galaxy depends on its object and the seed only."""
    objects = make_objects(coadd)
    task = CvaeGalaxyTask(config=make_config())
    images = task.run(coadd, objects, model).cutouts["image"]
    np.testing.assert_array_equal(task.run(coadd, objects[2:], model).cutouts["image"], images[2:])
    other = CvaeGalaxyTask(config=make_config(seed=1)).run(coadd, objects, model).cutouts["image"]
    assert not np.allclose(other, images, rtol=0.1)


def test_without_noise(coadd: MultibandCoadd, model: ModelPackage) -> None:
    """Noise can be left out; the rest is the same."""
    objects = make_objects(coadd)
    noisy, clean = (
        CvaeGalaxyTask(config=make_config(doNoise=value)).run(coadd, objects, model).cutouts["image"]
        for value in (True, False)
    )
    assert (noisy - clean).std() == pytest.approx(5, rel=0.05)


def test_radius_from_moments_and_redshift_from_magnitude(coadd: MultibandCoadd, model: ModelPackage) -> None:
    """Without columns for them, both are estimated."""
    config = make_config(radiusColumn="", redshiftColumn="")
    table = CvaeGalaxyTask(config=config).run(coadd, make_objects(coadd), model).cutouts
    # The PSF of 3.5 pixels FWHM has a variance of 2.21.
    np.testing.assert_allclose(table["half_light_radius"], 1.1774 * np.sqrt(6 - 2.21) * 0.2, rtol=0.03)
    assert ((table["redshift"] > 0.01) & (table["redshift"] < 1.5)).all()
    assert len(set(table["redshift"])) > 1


def test_bad_objects_have_flags(coadd: MultibandCoadd, model: ModelPackage) -> None:
    """Unknown, impossible and far-off conditions, and no place: flags."""
    objects = make_objects(coadd, 9)
    objects["i_cModelFlux"][:3] = [np.nan, -5.0, 0.0]
    objects["photoz"][3] = -0.5
    objects["radius"][4:6] = [np.nan, -99.0]
    objects["coord_ra"][6] = 151.0
    objects["radius"][7] = 50.0
    table = CvaeGalaxyTask(config=make_config(selection=[])).run(coadd, objects, model).cutouts
    assert table["flag_not_drawn"].tolist() == [True] * 7 + [False] * 2
    assert table["flag_outside"].tolist() == [False] * 7 + [True, False]
    images = table["image"]
    assert np.isnan(images[:7]).all()
    assert np.isfinite(images[7:]).all()


def test_stamps_at_a_missing_cell(model: ModelPackage) -> None:
    """Galaxies are drawn where there are data, and nowhere else."""
    coadds = make_test_coadds("i", missing_cells=[(0, 0)])
    coadd = MultibandCoadd.from_coadds(coadds)
    missing = ~np.isfinite(coadds["i"].image.array)
    y, x = np.argwhere(missing).max(axis=0) + 5
    objects = make_objects(coadd, 1)
    where = {"x": np.array([coadd.bbox.x.start + x]), "y": np.array([coadd.bbox.y.start + y])}
    objects["coord_ra"], objects["coord_dec"] = coadd.pixel_to_sky(**where)
    table = CvaeGalaxyTask(config=make_config()).run(coadd, objects, model).cutouts
    assert not table["flag_not_drawn"][0]
    cut = missing[y - 22 : y + 23, x - 22 : x + 23]
    assert cut.any()
    np.testing.assert_array_equal(np.isnan(table["image"][0, 0]), cut)


def cut_galaxies(coadd: MultibandCoadd, objects: Table, **kwargs: Any) -> Table:
    """Return what CutGalaxiesTask makes of objects."""
    config = CutGalaxiesConfig()
    values = {"radiusColumn": "radius", "redshiftColumn": "photoz", "selection": [], "stampSize": 33}
    config.update(**(values | kwargs))
    return CutGalaxiesTask(config=config).run(coadd, objects).cutouts


def test_training_set_of_a_coadd(coadd: MultibandCoadd) -> None:
    """Stamps of known objects become images for a flux of 1."""
    objects = make_objects(coadd, 7)
    objects["i_cModelFlux"][0] = np.nan
    objects["i_cModelFlux"][1] = -5.0
    objects["photoz"][2] = -0.5
    objects["radius"][3] = 0.0  # Takes the smallest radius.
    objects["coord_ra"][4] = 151.0
    table = cut_galaxies(coadd, objects)
    assert table["flag_unknown"].tolist() == [True, True, True, False, True, False, False]
    cutouts = Cutouts.from_table(table)
    galaxies, rows = make_coadd_set(cutouts, table, size=32)
    assert rows.tolist() == [3, 5, 6]
    assert galaxies.image.shape == (3, 32, 32)
    assert galaxies.pixel_scale == pytest.approx(0.2, rel=1e-3)
    flux = np.asarray(objects["i_cModelFlux"])[rows]
    np.testing.assert_allclose(galaxies.image[0, 16, 16] * flux[0], cutouts.image[3, 0, 16, 16], rtol=1e-5)
    np.testing.assert_allclose(galaxies.psf.sum(axis=(1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(galaxies.noise_variance) * flux, 5, rtol=0.05)
    np.testing.assert_allclose(galaxies.conditions[0], [0.08, 20, 0.5], rtol=1e-4)
    with pytest.raises(GalaxySetError, match="set stampSize to 41"):
        make_coadd_set(cutouts, table, size=40)


def test_masked_corners(coadd: MultibandCoadd) -> None:
    """Small masked corners are filled with noise; large ones disqualify."""
    table = cut_galaxies(coadd, make_objects(coadd, 3))
    table["bad"][1, 0, :3, :3] = True
    table["image"][1, 0, :3, :3] = np.nan
    table["bad"][2, 0, :12, :12] = True
    galaxies, rows = make_coadd_set(Cutouts.from_table(table), table, size=32)
    assert rows.tolist() == [0, 1]
    corner = galaxies.image[1, :3, :3] / np.sqrt(galaxies.noise_variance[1])
    assert np.isfinite(corner).all()
    assert np.abs(corner).max() < 5
    table["bad"][:] = True
    with pytest.raises(GalaxySetError, match="None of 3 stamps"):
        make_coadd_set(Cutouts.from_table(table), table, size=32)


def make_coadd_config(**kwargs: Any) -> TrainCvaeConfig:
    """Return how to train on stamps of 0.2 arcsec pixels."""
    config = TrainCvaeConfig()
    values = SMALL | {"source": "cutouts", "pixelScale": 0.2, "outputFwhm": 0.35, "batchSize": 8}
    config.update(**(values | kwargs))
    return config


def test_trains_on_coadds_and_scores_them(coadd: MultibandCoadd) -> None:
    """A model of coadd stamps says how likely it finds them."""
    rng = np.random.default_rng(1)
    n = 24
    objects = make_objects(coadd, n, radius=rng.uniform(0.2, 0.8, n), photoz=rng.uniform(0.1, 1.0, n))
    objects["i_cModelFlux"] *= 10 ** rng.uniform(-1, 0, n)
    table = cut_galaxies(coadd, objects)
    model = TrainCvaeTask(config=make_coadd_config()).run([table[:10], table[10:]]).model
    assert model.settings.pixel_scale == pytest.approx(0.2, rel=1e-3)
    assert model.record["training_set"]["source"] == "cutouts"
    more = TrainCvaeTask(config=make_coadd_config()).run([table], start=model).model
    assert more.settings.network == model.settings.network

    config = make_config(doScores=True, selection=[], stampSize=33)
    objects["i_cModelFlux"][3] = np.nan
    scored = CvaeGalaxyTask(config=config).run(coadd, objects, model).cutouts
    assert scored["latents"].shape == (n, 3)
    known = ~np.asarray(scored["flag_unknown"])
    assert not known[3]
    for name in ("latents", "elbo", "kl_divergence", "reduced_chi2"):
        assert np.isfinite(scored[name][known]).all()
        assert np.isnan(scored[name][3]).all()
    # Where there is nothing but noise a galaxy of magnitude 20 is odd.
    assert (scored["reduced_chi2"][known] > 1.5).any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"pixelScale": 0.1, "outputFwhm": 0.2}, "set pixelScale"), ({}, "run cutGalaxies")],
)
def test_stamps_that_cannot_be_trained_on(
    coadd: MultibandCoadd, kwargs: dict[str, float], message: str
) -> None:
    """Other pixels, and no stamps at all, say what to do."""
    tables = [cut_galaxies(coadd, make_objects(coadd))] if kwargs else []
    with pytest.raises(GalaxySetError, match=message):
        TrainCvaeTask(config=make_coadd_config(**kwargs)).run(tables)


def test_scores_need_the_pixels_of_the_coadd(coadd: MultibandCoadd, model: ModelPackage) -> None:
    """A model of other pixels is refused for scores."""
    with pytest.raises(ModelPackageError, match="source='cutouts'"):
        CvaeGalaxyTask(config=make_config(doScores=True)).run(coadd, make_objects(coadd), model)


def test_whole_coadd(model: ModelPackage) -> None:
    """A coadd of generated galaxies has their flux and nothing else."""
    coadds = make_test_coadds("i", missing_cells=[(0, 0)])
    coadd = MultibandCoadd.from_coadds(coadds)
    objects = make_objects(coadd)[2:]
    task = CvaeGalaxyTask(config=make_config(doCoadd=True))
    synthetic = task.make_coadd(coadds["i"], task.run(coadd, objects, model).light, seed=3)
    data = np.isfinite(coadds["i"].image.array)
    assert np.array_equal(np.isfinite(synthetic.image.array), data)
    assert not data.all()
    quiet = CvaeGalaxyTask(config=make_config(doCoadd=True, doNoise=False))
    clean = quiet.make_coadd(coadds["i"], quiet.run(coadd, objects, model).light, seed=3)
    flux = float(np.sum(objects["i_cModelFlux"]))
    assert clean.image.array[data].sum() == pytest.approx(flux, rel=0.05)
    noise = (synthetic.image.array - clean.image.array)[data]
    assert noise.std() == pytest.approx(5, rel=0.05)
    with pytest.raises(FieldValidationError, match="CellCoadd"):
        make_config(doCoadd=True, coaddStorageClass="ExposureF").validate()


def test_bright_galaxies_have_no_edge(coadd: MultibandCoadd, model: ModelPackage) -> None:
    """Their light falls off beyond the grid of the model, too."""
    objects = make_objects(coadd, 2)
    objects["i_cModelFlux"][1] = 10 ** (0.4 * (31.4 - 30.0))
    result = CvaeGalaxyTask(config=make_config(doNoise=False, selection=[])).run(coadd, objects, model)
    cutouts = Cutouts.from_table(result.cutouts)
    rings = []
    for x, y in zip(cutouts.x - coadd.bbox.x.start, cutouts.y - coadd.bbox.y.start, strict=True):
        rows, columns = np.indices(result.light.shape)
        distance = np.hypot(rows - y, columns - x)
        rings.append([result.light[np.abs(distance - radius) < 1].mean() for radius in range(4, 17, 2)])
    # The grid reaches 4.8 pixels to each side, and the PSF 7 further.
    bright, faint = np.array(rings)
    assert (bright > 0.03).all()
    assert (bright[1:] / bright[:-1] > 0.25).all()
    assert faint[-1] < 1e-4 * faint[0]


def test_no_objects(coadd: MultibandCoadd, model: ModelPackage) -> None:
    """An empty table gives an empty table with all columns."""
    task = CvaeGalaxyTask(config=make_config())
    full, empty = (task.run(coadd, make_objects(coadd)[:n], model).cutouts for n in (2, 0))
    assert empty.colnames == full.colnames
    assert len(empty) == 0


def test_other_models_are_refused(coadd: MultibandCoadd, model: ModelPackage) -> None:
    """Weights of a lens finder draw no galaxies, and none of another grid are
    trained further.
    """
    lens_finder, small = make_test_model(), TrainCvaeConfig()
    set_small(small)
    with pytest.raises(ModelPackageError, match="not a galaxy model"):
        CvaeGalaxyTask(config=make_config()).run(coadd, make_objects(coadd), lens_finder)
    with pytest.raises(ModelPackageError, match="not a galaxy model"):
        CompareMorphologyTask(config=CompareMorphologyConfig()).run(lens_finder)
    with pytest.raises(ModelPackageError, match="not a galaxy model"):
        TrainCvaeTask(config=small).run(start=lens_finder)
    small.pixelScale = 0.08
    with pytest.raises(ModelPackageError, match="33 pixels of 0.060 .* 33 of 0.080.* set size"):
        TrainCvaeTask(config=small).run(start=model)


def run_pipeline(root: Path, name: str, output: str, inputs: list[str], **configs: Any) -> Butler:
    """Run a pipeline of this package, with changes of configuration."""
    pipeline = Pipeline.from_uri(f"{PIPELINES}/{name}.yaml")
    for label, values in configs.items():
        for key, value in values.items():
            pipeline.addConfigOverride(label, key, value)
    butler = SimplePipelineExecutor.prep_butler(str(root), inputs=inputs, output=output)
    SimplePipelineExecutor.from_pipeline(pipeline, butler=butler).run(register_dataset_types=True)
    return butler


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository of two small patches."""
    root = tmp_path_factory.mktemp("repository") / "repo"
    make_test_repository(root, bands="i", n_sources=40)
    return root


def test_pipelines(repository: Path) -> None:
    """Both pipelines run one after the other, and a butler finds it all."""
    butler = run_pipeline(
        repository,
        "train_galaxies",
        "models/cvae",
        ["test/coadds"],
        trainCvae=SMALL,
        compareMorphology={"nGalaxies": 24, "nBootstrap": 2, "nShown": 3, "maxMagnitude": 22.5},
    )
    distances = butler.get("galaxy_morphology_distances")
    assert set(distances["sample"]) == {"cvae", "parametric", "knots"}
    assert len(butler.get("galaxy_morphology")) == 4 * 24
    assert np.isfinite(butler.get("galaxy_morphology_checks")["value"]).all()
    for name in ("galaxy_gallery", "galaxy_morphology_figure"):
        assert butler.query_datasets(name)
    selection = ["i_psfFlux > 0"]
    butler = run_pipeline(
        repository,
        "generate_galaxies",
        "galaxies",
        ["test/coadds", "models/cvae"],
        cvaeGalaxy={"selection": selection},
    )
    assert butler.get("galaxy_cvae_model")["architecture"][0].as_py() == ARCHITECTURE
    tables = [butler.get(ref) for ref in butler.query_datasets("galaxy_cvae_cutouts")]
    assert len(tables) == 2
    assert sum(len(table) for table in tables) > 5
    for table in tables:
        assert table["flux"].unit == u.nJy
        assert Cutouts.from_table(table).bands == ("i",)
        drawn = ~np.asarray(table["flag_not_drawn"])
        assert drawn.any()
        assert np.isfinite(table["image"][drawn]).any()
        assert f"{drawn.sum()} drawn from galaxy_cvae 1" in describe_galaxies(table)
    assert len(butler.query_datasets("galaxy_cvae_gallery")) == 2


def test_wrong_columns_stop_the_run(repository: Path, model: ModelPackage) -> None:
    """A column that the object table lacks is named, with near ones."""
    butler = Butler.from_config(str(repository), writeable=True)
    model_package.ingest_model(butler, model, run="models/test", dataset_type="galaxy_cvae_model")
    with pytest.raises(InvalidQuantumError, match=r"no columns \['shape_x'\].*shape_xx"):
        run_pipeline(
            repository,
            "generate_galaxies",
            "wrong",
            ["test/coadds", "models/test"],
            cvaeGalaxy={"momentColumns": ["shape_x", "shape_yy"], "selection": []},
        )

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


"""Tests of the pipelines and configurations of surveys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from astropy.table import vstack

import lsst.pipe.base.connectionTypes as cT
from lsst.daf.butler import Butler
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.detection import detect_objects, select_primary
from lsst.meas.deeplearn.model_package import ingest_model
from lsst.meas.deeplearn.repository import CellSkyMap, register_sky_map
from lsst.meas.deeplearn.tests import make_test_coadd, make_test_model
from lsst.pex.config import Field
from lsst.pipe.base import (
    Pipeline,
    PipelineTask,
    PipelineTaskConfig,
    PipelineTaskConnections,
    QuantumContext,
    Struct,
)
from lsst.pipe.base.connections import InputQuantizedConnection, OutputQuantizedConnection
from lsst.pipe.base.pipeline_graph import PipelineGraph
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor

PATCH = {"skymap", "tract", "patch"}

# As drp_pipe and the documents of the data releases have them.
COADDS = {
    "LSSTCam": ("deep_coadd", "CellCoadd"),
    "LSSTComCam": ("deep_coadd", "ExposureF"),
    "HSC": ("deepCoadd_calexp", "ExposureF"),
    "DECam": ("deepCoadd_calexp", "ExposureF"),
    "LSSTCam-imSim": ("deepCoadd_calexp", "ExposureF"),
}
OBJECTS = {
    "LSSTCam": "object",
    "LSSTComCam": "object",
    "HSC": "objectTable_tract",
    "DECam": "objectTable_tract",
    "LSSTCam-imSim": "objectTable_tract",
}
PIXEL_SCALES = {"HSC": 0.168, "DECam": 0.262}

# Columns that the object tables of DP1, DP2, HSC, DECam and LSSTCam-imSim
# have in common (sdm_schemas), of those that our tasks use.
COLUMNS = {
    *("objectId", "tract", "patch", "coord_ra", "coord_dec", "refExtendedness"),
    *("shape_xx", "shape_yy", "shape_xy"),
    *(f"{band}_cModelFlux" for band in "gri"),
}

SKY_MAP = CellSkyMap.from_center(
    "test", ra=150.0, dec=2.0, pixel_scale=0.2, n_patches=(1, 2), inner_cells=(2, 2), cell_size=50
)
SOURCES = [(60.0 + 40 * n, 70.0 + 17 * (n % 4), 2000.0) for n in range(5)]


class MakeCoaddConnections(
    PipelineTaskConnections,
    dimensions=("skymap", "tract", "patch", "band"),
    defaultTemplates={"coaddName": "deep_coadd"},
):
    """What the stand-in for coadding writes."""

    coadd = cT.Output(
        doc="Coadd.",
        name="{coaddName}",
        storageClass="CellCoadd",
        dimensions=("skymap", "tract", "patch", "band"),
    )


class MakeCoaddConfig(PipelineTaskConfig, pipelineConnections=MakeCoaddConnections):
    """Configuration of the stand-in for coadding."""


class MakeCoaddTask(PipelineTask):
    """Stand-in for the tasks of a survey that make coadds."""

    ConfigClass: ClassVar[type[MakeCoaddConfig]] = MakeCoaddConfig
    _DefaultName: ClassVar[str] = "makeCoadd"

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        data_id = butlerQC.quantum.dataId
        coadd = make_test_coadd(
            str(data_id["band"]),
            patch=SKY_MAP.make_patch(int(data_id["patch"])),
            sky_projection=SKY_MAP.sky_projection,
            sources=SOURCES,
        )
        butlerQC.put(Struct(coadd=coadd), outputRefs)


class MakeObjectsConnections(
    PipelineTaskConnections,
    dimensions=("skymap", "tract"),
    defaultTemplates={"coaddName": "deep_coadd", "objectName": "object"},
):
    """What the stand-in for measurement reads and writes."""

    coadds = cT.Input(
        doc="Coadds of the tract.",
        name="{coaddName}",
        storageClass="CellCoadd",
        dimensions=("skymap", "tract", "patch", "band"),
        multiple=True,
    )
    objects = cT.Output(
        doc="Objects of the tract.",
        name="{objectName}",
        storageClass="ArrowAstropy",
        dimensions=("skymap", "tract"),
    )


class MakeObjectsConfig(PipelineTaskConfig, pipelineConnections=MakeObjectsConnections):
    """Configuration of the stand-in for measurement."""

    onlyPrimary = Field[bool](doc="Keep each object once?", default=True)


class MakeObjectsTask(PipelineTask):
    """Stand-in for the tasks of a survey that make its object table."""

    ConfigClass: ClassVar[type[MakeObjectsConfig]] = MakeObjectsConfig
    _DefaultName: ClassVar[str] = "makeObjects"
    config: MakeObjectsConfig

    def runQuantum(
        self,
        butlerQC: QuantumContext,
        inputRefs: InputQuantizedConnection,
        outputRefs: OutputQuantizedConnection,
    ) -> None:
        patches: dict[int, dict[str, Any]] = {}
        for ref in inputRefs.coadds:
            patches.setdefault(int(ref.dataId["patch"]), {})[str(ref.dataId["band"])] = butlerQC.get(ref)
        tables = [
            detect_objects(MultibandCoadd.from_coadds(coadds), tract=0, patch=patch)
            for patch, coadds in sorted(patches.items())
        ]
        merge = select_primary if self.config.onlyPrimary else vstack
        butlerQC.put(Struct(objects=merge(tables)), outputRefs)


def make_graph(survey: str, pipeline: str) -> PipelineGraph:
    """Return the graph of a pipeline of a survey."""
    return Pipeline.from_uri(f"eups://meas_deeplearn/pipelines/{survey}/{pipeline}.yaml").to_graph()


@pytest.mark.parametrize("survey", COADDS)
@pytest.mark.parametrize(
    ("pipeline", "label"),
    [
        ("find_lenses", "lensFinder"),
        ("train_lens_finder", "simulateLenses"),
        ("generate_galaxies", "cvaeGalaxy"),
        ("calibrate_shear", "shearCalib"),
    ],
)
def test_names_of_a_survey(survey: str, pipeline: str, label: str) -> None:
    """Each pipeline reads what the survey has, under its names."""
    inputs = make_graph(survey, pipeline).tasks[label].inputs
    name, storage_class = COADDS[survey]
    assert inputs["coadds"].parent_dataset_type_name == name
    assert inputs["coadds"].storage_class_name == storage_class
    assert inputs["coadds"].raw_dimensions == {*PATCH, "band"}
    if label != "shearCalib":
        assert inputs["objects"].parent_dataset_type_name == OBJECTS[survey]
        assert inputs["objects"].raw_dimensions == {"skymap", "tract"}


@pytest.mark.parametrize("survey", COADDS)
def test_columns_of_a_survey(survey: str) -> None:
    """Only columns that the survey has are used; of duplicate objects the
    primary ones are selected where the table has others.
    """
    from lsst.meas.deeplearn.object_selection import column_names

    extra = set() if OBJECTS[survey] == "object" else {"detect_isPrimary"}
    lens_finder = make_graph(survey, "find_lenses").tasks["lensFinder"].config
    simulation = make_graph(survey, "train_lens_finder").tasks["simulateLenses"].config
    galaxies = make_graph(survey, "generate_galaxies").tasks["cvaeGalaxy"].config
    for selection in (lens_finder.selection, *simulation.selections, galaxies.selection):
        if selection:
            assert column_names(selection) <= COLUMNS | extra
            assert column_names(selection) >= extra
    for config in (lens_finder, simulation, galaxies):
        assert {config.idColumn, config.raColumn, config.decColumn} <= COLUMNS
    assert {*simulation.momentColumns, *galaxies.momentColumns} <= COLUMNS


@pytest.mark.parametrize("survey", COADDS)
def test_stamps_of_a_survey(survey: str) -> None:
    """Networks are trained on stamps of nine arcsec, whatever the pixels, and
    stamps with a margin are simulated for them.
    """
    graph = make_graph(survey, "train_lens_finder")
    config = graph.tasks["trainLensFinder"].config
    assert config.pixelScale == PIXEL_SCALES.get(survey, 0.2)
    assert config.stampSize % 2 == 1
    assert config.pixelScale * config.stampSize == pytest.approx(9.0, abs=2 * config.pixelScale)
    simulated = graph.tasks["simulateLenses"].config.stampSize
    assert simulated == config.stampSize + 10


def test_survey_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe of the documents for another survey works."""
    monkeypatch.setenv("MY_SURVEY_DIR", str(tmp_path))
    (tmp_path / "coadds.py").write_text(
        "config.connections.coadds = 'stack'\nconfig.coaddStorageClass = 'MaskedImageV2'\n"
    )
    (tmp_path / "objects.py").write_text(
        "config.connections.objects = 'sources'\nconfig.objectDimensions = 'patch'\nconfig.idColumn = 'id'\n"
    )
    (tmp_path / "find_lenses.yaml").write_text(
        """
        description: Find strong lenses in MySurvey.
        imports:
          - location: $MEAS_DEEPLEARN_DIR/pipelines/find_lenses.yaml
        tasks:
          lensFinder:
            class: lsst.meas.deeplearn.lenses.lens_finder_task.LensFinderTask
            config:
              - file: $MY_SURVEY_DIR/coadds.py
              - file: $MY_SURVEY_DIR/objects.py
              - selection: ["extendedness > 0.5", "mag(i_flux) < 23"]
        """
    )
    task = Pipeline.from_uri(str(tmp_path / "find_lenses.yaml")).to_graph().tasks["lensFinder"]
    assert task.inputs["coadds"].parent_dataset_type_name == "stack"
    assert task.inputs["coadds"].storage_class_name == "MaskedImageV2"
    assert task.inputs["objects"].parent_dataset_type_name == "sources"
    assert task.inputs["objects"].raw_dimensions == PATCH
    assert list(task.config.selection) == ["extendedness > 0.5", "mag(i_flux) < 23"]


@pytest.mark.parametrize(
    ("survey", "options"),
    [
        ("LSSTCam", []),
        # Without afw, the stand-in writes coadds as lsst.images has them.
        ("HSC", ["lensFinder:coaddStorageClass=CellCoadd"]),
    ],
)
def test_one_graph_from_coadds_to_candidates(
    survey: str, options: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our pipeline imported behind that of a survey makes one graph, which
    makes coadds and objects and ends with ranked candidates.
    """
    # A survey's own pipeline, where drp_pipe would have it.
    drp = tmp_path / "drp_pipe" / "pipelines" / survey / "DRP.yaml"
    drp.parent.mkdir(parents=True)
    drp.write_text(
        f"""
        description: Data release production in two tasks.
        tasks:
          makeCoadd:
            class: {__name__}.MakeCoaddTask
            config:
              connections.coaddName: {COADDS[survey][0]}
          makeObjects:
            class: {__name__}.MakeObjectsTask
            config:
              connections.coaddName: {COADDS[survey][0]}
              connections.objectName: {OBJECTS[survey]}
              onlyPrimary: {OBJECTS[survey] == "object"}
        """
    )
    monkeypatch.setenv("DRP_PIPE_DIR", str(tmp_path / "drp_pipe"))
    both = tmp_path / "both.yaml"
    both.write_text(
        f"""
        description: A data release, and the lenses in it.
        imports:
          - location: $DRP_PIPE_DIR/pipelines/{survey}/DRP.yaml
          - location: $MEAS_DEEPLEARN_DIR/pipelines/{survey}/find_lenses.yaml
        """
    )
    root = str(tmp_path / "repo")
    Butler.makeRepo(root)
    butler = Butler.from_config(root, writeable=True)
    register_sky_map(butler, SKY_MAP, instrument="TestCam", bands="gri")
    ingest_model(butler, make_test_model(), run="models/deeplens/v1", dataset_type="deeplens_model")
    pipeline = Pipeline.from_uri(str(both))
    # The objects of the stand-in are stars.
    pipeline.addConfigOverride("lensFinder", "selection", ["i_psfFlux > 0"])
    for option in options:
        label, _, assignment = option.partition(":")
        pipeline.addConfigOverride(label, *assignment.split("="))

    executor = SimplePipelineExecutor.from_pipeline(
        pipeline,
        where="skymap = 'test' AND tract = 0",
        butler=SimplePipelineExecutor.prep_butler(root, inputs=["models/deeplens/v1"], output="drp"),
    )
    executor.run(register_dataset_types=True)

    ranked = executor.butler.get("lens_candidates_ranked", skymap="test", tract=0)
    assert len(ranked) == len(SOURCES)
    assert set(ranked["model_name"]) == {"test"}

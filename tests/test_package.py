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

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest

from lsst.daf.butler import Butler, DatasetType
from lsst.pipe.base import Pipeline
from lsst.resources import ResourcePath
from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d

TOP = Path(__file__).resolve().parents[1]
PIPELINES = sorted(str(path.relative_to(TOP)) for path in TOP.glob("pipelines/**/*.yaml"))
SOURCES = sorted(
    path
    for pattern in (
        *(f"{folder}/**/*.py" for folder in ("python", "config", "tests", "benchmarks")),
        *("doc/*.py", "bin/run-*", "bin/*.bash", "ups/*", "SConstruct", "tests/SConscript", ".ci/run"),
    )
    for path in TOP.glob(pattern)
    if path.is_file()
)


def test_pipelines_exist() -> None:
    """The tests below have something to check."""
    assert "pipelines/find_lenses.yaml" in PIPELINES


def test_import_loads_no_torch() -> None:
    """Importing the package loads no GPU library."""
    _check_loads_no_torch("import lsst.meas.deeplearn")


def test_pipetask_build_loads_no_torch() -> None:
    """`pipetask build` loads no GPU library, for any pipeline."""
    _check_loads_no_torch(
        *(_pipetask("build", "-p", _eups_uri(pipeline), "--show", "pipeline-graph") for pipeline in PIPELINES)
    )


def test_pipetask_qgraph_loads_no_torch(tmp_path: Path) -> None:
    """`pipetask qgraph` loads no GPU library, for any pipeline; those of
    surveys differ in names only.
    """
    commands = []
    pipelines = [name for name in PIPELINES if name.count("/") == 1]
    for n, pipeline in enumerate(pipelines):
        repo, graph = tmp_path / f"repo{n}", tmp_path / f"{n}.qg"
        _make_repo_without_files(repo, _eups_uri(pipeline))
        commands.append(
            _pipetask("qgraph", "-b", repo, "-p", _eups_uri(pipeline), "-i", "in", "-o", "out", "-q", graph)
        )
    _check_loads_no_torch(*commands)
    assert len(list(tmp_path.glob("*.qg"))) == len(pipelines)


@pytest.mark.parametrize("setup", [True, False], ids=["EUPS", "pip"])
@pytest.mark.parametrize("folder", ["pipelines", "config", "models", "bps"])
def test_eups_addresses_resolve(folder: str, setup: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files beside the code are found by eups:// addresses, where the
    product is set up with EUPS and where it is a Python package only.
    """
    if setup:
        monkeypatch.setenv("MEAS_DEEPLEARN_DIR", str(TOP))
    else:
        monkeypatch.delenv("MEAS_DEEPLEARN_DIR", raising=False)
    names = sorted(str(path.relative_to(TOP)) for path in (TOP / folder).glob("**/*.*") if path.is_file())
    assert names
    for name in names:
        if "__pycache__" not in name:
            assert ResourcePath(_eups_uri(name)).read() == (TOP / name).read_bytes()


def test_butler_subcommands_are_registered() -> None:
    """The `butler` program finds our sub-commands by entry point."""
    found = {point.value: point for point in entry_points(group="butler.cli", name="meas_deeplearn")}
    assert list(found) == ["lsst.meas.deeplearn.cli:get_cli_subcommands"]
    (point,) = found.values()
    commands = point.load()()
    assert commands
    assert all(isinstance(command, click.Command) for command in commands)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(TOP)))
def test_sources_are_in_order(path: Path) -> None:
    """Every source file has the licence header, unless it is a table or a
    few lines of configuration, and no absolute path.
    """
    text = path.read_text()
    if path.suffix != ".table" and TOP / "config" not in path.parents:
        assert "# This file is part of meas_deeplearn.\n" in text
        assert "GNU General Public License" in text
    assert not re.search(r"(^|[^\w./])/(tmp|work|root|home|Users)/", text)


def _eups_uri(name: str) -> str:
    return f"eups://meas_deeplearn/{name}"


def _pipetask(*args: object) -> str:
    """Return Python code that runs ``pipetask``, which returns its status."""
    return f"assert not pipetask({[str(arg) for arg in args]}, standalone_mode=False)"


def _check_loads_no_torch(*statements: str) -> None:
    """Run statements in a new process and look for torch at its end."""
    code = "\n".join(
        [
            "import sys",
            "from lsst.ctrl.mpexec.cli.pipetask import cli as pipetask",
            *statements,
            "sys.exit('torch was imported' if 'torch' in sys.modules else 0)",
        ]
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def _make_repo_without_files(root: Path, pipeline_uri: str) -> None:
    """Make a repository whose registry has all inputs of a pipeline for one
    patch; the files do not exist, and graphs are built without them.
    """
    butler = Butler.from_config(Butler.makeRepo(str(root)), writeable=True)
    registry = butler.registry
    corners = [LonLat.fromDegrees(ra, dec) for ra, dec in ((0, 0), (1, 0), (1, 1), (0, 1))]
    region = ConvexPolygon([UnitVector3d(corner) for corner in corners])
    registry.syncDimensionData(
        "instrument",
        {"name": "Cam", "visit_max": 1, "exposure_max": 1, "detector_max": 1, "class_name": "none.Cam"},
    )
    for band in "ugrizy":
        registry.syncDimensionData("physical_filter", {"instrument": "Cam", "name": band, "band": band})
    registry.syncDimensionData(
        "skymap", {"name": "sky", "hash": b"", "tract_max": 1, "patch_nx_max": 1, "patch_ny_max": 1}
    )
    registry.syncDimensionData("tract", {"skymap": "sky", "id": 0, "region": region})
    registry.syncDimensionData(
        "patch", {"skymap": "sky", "tract": 0, "id": 0, "cell_x": 0, "cell_y": 0, "region": region}
    )
    registry.registerRun("in")
    graph = Pipeline.from_uri(pipeline_uri).to_graph(registry)
    for name, _ in graph.iter_overall_inputs():
        dataset_type = graph.dataset_types[name].dataset_type
        registry.registerDatasetType(
            DatasetType(name, dataset_type.dimensions, dataset_type.storageClass_name)
        )
        values = {"skymap": "sky", "tract": 0, "patch": 0}
        data_ids = [
            {key: value for key, value in {**values, "band": band}.items() if key in dataset_type.dimensions}
            for band in ("ugrizy" if "band" in dataset_type.dimensions else "r")
        ]
        registry.insertDatasets(name, data_ids, run="in")

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

"""Tests of the sub-commands of ``butler``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from click.testing import Result

from lsst.daf.butler import Butler, DatasetType
from lsst.daf.butler.cli.butler import cli
from lsst.daf.butler.cli.utils import LogCliRunner
from lsst.meas.deeplearn.repository import make_tangent_wcs
from lsst.meas.deeplearn.tests import make_test_coadd, make_test_model
from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d


def run(*arguments: object) -> Result:
    """Run ``butler`` with arguments."""
    return LogCliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return an empty repository."""
    Butler.makeRepo(str(tmp_path / "repo"))
    return tmp_path / "repo"


def test_ingest_and_list_models(repository: Path, tmp_path: Path) -> None:
    """A model is put into a run, found by the butler, and listed."""
    path = tmp_path / "model.safetensors"
    make_test_model().write(path)
    result = run("ingest-deeplearn-model", repository, path, "--run", "models/test/v1")
    assert result.exit_code == 0, result.output
    butler = Butler.from_config(str(repository), collections="models/test/v1")
    assert butler.get("deeplens_model")["name"].to_pylist() == ["test"]
    again = run("ingest-deeplearn-model", repository, path, "--run", "models/test/v1")
    assert again.exit_code == 1
    assert "--run" in again.output
    listed = run("list-deeplearn-models", repository)
    assert listed.exit_code == 0, listed.output
    assert "models/test/v1" in listed.output
    assert "g,r,i" in listed.output


def test_export_models(repository: Path, tmp_path: Path) -> None:
    """Models come out as the files that went in; two of one name are
    refused.
    """
    path = tmp_path / "model.safetensors"
    make_test_model().write(path)
    for version in ("v1", "v2"):
        run("ingest-deeplearn-model", repository, path, "--run", f"models/test/{version}")
    folder = tmp_path / "exported"
    result = run("export-deeplearn-models", repository, folder, "--collections", "models/test/v1")
    assert result.exit_code == 0, result.output
    assert (folder / "test.safetensors").read_bytes() == path.read_bytes()
    both = run("export-deeplearn-models", repository, folder, "--collections", "models/*")
    assert both.exit_code == 1
    assert "name one run of each" in both.output
    # Members that were trained together have datasets of other names.
    name = ["--run", "trained", "--dataset-type", "deeplens_model_1"]
    assert run("ingest-deeplearn-model", repository, path, *name).exit_code == 0
    (folder / "test.safetensors").unlink()
    run("export-deeplearn-models", repository, folder, "--collections", "trained")
    assert (folder / "test.safetensors").read_bytes() == path.read_bytes()
    none = run("export-deeplearn-models", repository, folder, "--collections", "nothing*")
    assert "no model packages in nothing*" in none.output


def test_ingest_an_ensemble(repository: Path, tmp_path: Path) -> None:
    """Several models go into runs of their own, and into a chain."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("a", "b")]
    for path in paths:
        dataclasses.replace(make_test_model(), name=path.stem).write(path)
    result = run("ingest-deeplearn-model", repository, *paths, "--chain", "models/both")
    assert result.exit_code == 0, result.output
    butler = Butler.from_config(str(repository))
    assert butler.collections.get_info("models/both").children == ("models/a/v1", "models/b/v1")
    twice = run("ingest-deeplearn-model", repository, paths[0], paths[0], "--chain", "models/both")
    assert twice.exit_code == 1
    assert "different names" in twice.output
    one_run = run("ingest-deeplearn-model", repository, *paths, "--run", "models/c/v1")
    assert one_run.exit_code == 2
    assert "--run names the run of one model" in one_run.output
    taken = run(
        "ingest-deeplearn-model", repository, paths[0], "--run", "models/d/v1", "--chain", "models/a/v1"
    )
    assert taken.exit_code == 1
    assert "no chain" in taken.output


def test_bad_models_are_refused(repository: Path, tmp_path: Path) -> None:
    """A missing or damaged file is an error in one line, not a traceback."""
    path = tmp_path / "model.safetensors"
    assert "model.safetensors" in run("ingest-deeplearn-model", repository, path, "--run", "models/v1").output
    path.write_bytes(make_test_model().to_bytes()[:-100])
    result = run("ingest-deeplearn-model", repository, path, "--run", "models/v1")
    assert result.exit_code == 1
    assert "truncated" in result.output
    assert "ingest-deeplearn-model" in run("list-deeplearn-models", repository).output


def write_image(path: Path, band: str) -> None:
    """Write a plain FITS image of stars with a WCS and a zero point."""
    stars = [(640.0 + 37 * k, 1230.0 + 29 * k, 3000.0 + 500 * k) for k in range(8)]
    coadd = make_test_coadd(band, sources=stars)
    header = make_tangent_wcs(ra=150.0, dec=2.0, pixel_scale=0.2, x=150.0, y=150.0).to_header()
    header["MAGZERO"] = 31.4
    fits.writeto(path, np.asarray(coadd.image.array), header)


def test_import_fits_coadds(tmp_path: Path) -> None:
    """FITS images become coadds and objects that can be queried."""
    images = []
    for band in "gri":
        write_image(tmp_path / f"{band}.fits", band)
        images.append(f"{band}={tmp_path / band}.fits")
    options = ["--skymap", "field", "--run", "field/coadds", "--zero-point", "31.4", "--psf-fwhm", "i=0.7"]
    result = run("import-fits-coadds", tmp_path / "repo", *images, *options)
    assert result.exit_code == 0, result.output
    butler = Butler.from_config(str(tmp_path / "repo"), collections="field/coadds")
    assert len(butler.query_datasets("deep_coadd")) == 3
    assert len(butler.get("object", skymap="field", tract=0)) >= 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["image.fits"], "BAND=VALUE"),
        (["g=none.fits"], "none.fits"),
        (["g=x", "--zero-point", "a"], "BAND=NUMBER"),
    ],
)
def test_wrong_arguments_of_import(tmp_path: Path, arguments: list[str], message: str) -> None:
    """Wrong arguments are named, with what was expected."""
    result = run("import-fits-coadds", tmp_path / "repo", *arguments, "--skymap", "s", "--run", "r")
    assert result.exit_code != 0
    assert message in result.output


@pytest.mark.parametrize(
    ("command", "pipeline"),
    [(["show-lens-demo"], "find_lenses"), (["show-galaxies", "--collections", "no"], "generate_galaxies")],
)
def test_show_before_the_pipeline(repository: Path, command: list[str], pipeline: str) -> None:
    """Without results, the cure is said."""
    result = run(command[0], repository, *command[1:])
    assert result.exit_code == 1
    assert f"Run {pipeline}.yaml first" in result.output


def test_show_shear_bias(repository: Path) -> None:
    """The bias of a tract is printed with its errors, all objects only."""
    result = run("show-shear-bias", repository, "--collections", "shear")
    assert result.exit_code == 1
    assert "Run calibrate_shear.yaml first" in result.output
    table = Table({name: ["metacal"] * 2 for name in ("estimator", "morphology", "reference")})
    table["bin"] = ["all", "snr"]
    for k, name in enumerate(("m1", "m2", "c1", "c2", "alpha1")):
        table[name], table[f"{name}_err"] = 0.001 * (k + 1), 0.0005
    table["alpha1"] = np.nan
    with Butler.from_config(str(repository), writeable=True, run="shear") as butler:
        corners = [LonLat.fromDegrees(ra, dec) for ra, dec in ((0, 0), (1, 0), (1, 1), (0, 1))]
        region = ConvexPolygon([UnitVector3d(corner) for corner in corners])
        sync = butler.registry.syncDimensionData
        sync("skymap", {"name": "sky", "hash": b"", "tract_max": 9, "patch_nx_max": 1, "patch_ny_max": 1})
        sync("tract", {"skymap": "sky", "id": 7, "region": region})
        butler.registry.registerDatasetType(
            DatasetType("shear_bias", ("skymap", "tract"), "ArrowAstropy", universe=butler.dimensions)
        )
        butler.put(table, "shear_bias", skymap="sky", tract=7)
    lines = run("show-shear-bias", repository, "--collections", "shear").output.splitlines()
    assert any("Shear bias of tract 7" in line for line in lines)
    (row,) = (line for line in lines if "+2.00 +- 0.50" in line)
    assert "+1.00 +- 0.50" in row
    assert "+4.00 +- 0.50" in row
    assert not any("alpha1" in line for line in lines)

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

"""Tests of the commands of the README, run as a user runs them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lsst.daf.butler import Butler
from lsst.meas.deeplearn.model_package import ingest_model
from lsst.meas.deeplearn.tests import make_test_model, make_test_repository

PIPELINE = "eups://meas_deeplearn/pipelines/find_lenses.yaml"
OUTPUTS = ("lens_candidates", "lens_cutouts", "lens_candidates_ranked", "lens_gallery")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a repository of two small patches and a model."""
    root = tmp_path_factory.mktemp("repository") / "repo"
    butler = make_test_repository(root, n_sources=40)
    ingest_model(butler, make_test_model(), run="models/deeplens/v1", dataset_type="deeplens_model")
    return root


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment, and return what it printed."""
    script = Path(sys.executable).parent / command[0]
    return subprocess.run([str(script), *command[1:]], capture_output=True, text=True, check=False)


def run_pipetask(repository: Path, output: str, *options: str, models: str = "models/deeplens/v1") -> str:
    """Run the pipeline with two processes; return output and errors."""
    process = run(
        *("pipetask", "run", "-b", str(repository), "-p", PIPELINE),
        *("-i", f"test/coadds,{models}", "--output-run", output, "-d", "skymap='test' AND tract=0"),
        # The objects of the test repository are stars.
        *("-c", "lensFinder:selection=['i_psfFlux > 0']", "-c", "lensFinder:inference.averageOrientations=1"),
        *("-j", "2", "--register-dataset-types", *options),
    )
    return f"{process.stdout}{process.stderr}\nexit code {process.returncode}"


def test_failed_quantum_is_run_again(repository: Path) -> None:
    """After a failure only what is missing is run, and nothing is lost."""
    butler = Butler.from_config(str(repository))
    (ref,) = butler.query_datasets(
        "deep_coadd", "test/coadds", where="patch = 1 AND band = 'r'", skymap="test"
    )
    file = Path(butler.getURI(ref).ospath)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 3])
    first = run_pipetask(repository, "lenses/rerun")
    assert "exit code 1" in first
    file.write_bytes(content)
    (kept,) = butler.query_datasets("lens_candidates", "lenses/rerun")

    again = run_pipetask(
        repository, "lenses/rerun", "--extend-run", "--skip-existing-in", "lenses/rerun", "--clobber-outputs"
    )
    assert "exit code 0" in again
    tables = butler.query_datasets("lens_candidates", "lenses/rerun")
    assert kept in tables
    assert len(tables) == 2
    listing = run("butler", "query-datasets", str(repository), *OUTPUTS, "--collections", "lenses/rerun")
    for name in OUTPUTS:
        assert name in listing.stdout


def test_ensemble(repository: Path, tmp_path: Path) -> None:
    """All models of a chain score together, in the processes of pipetask."""
    paths = []
    for seed in (2, 3):
        package = dataclasses.replace(make_test_model(seed=seed), name=f"member_{seed}")
        paths.append(str(tmp_path / f"{package.name}.safetensors"))
        package.write(paths[-1])
    made = run("butler", "ingest-deeplearn-model", str(repository), *paths, "--chain", "models/both")
    assert "The ensemble is models/both." in made.stdout
    printed = run_pipetask(repository, "lenses/ensemble", models="models/both")
    assert "exit code 0" in printed
    butler = Butler.from_config(str(repository), collections="lenses/ensemble")
    ranked = butler.get("lens_candidates_ranked", skymap="test", tract=0)
    assert set(ranked["model_name"]) == {"member_2,member_3"}
    scored = ~ranked["flag_not_scored"]
    assert np.isfinite(ranked["score_err"][scored]).all()
    assert np.isnan(ranked["score_err"][~scored]).all()


@pytest.mark.parametrize("models", ["models/none", "test/coadds"])
def test_no_model(repository: Path, models: str) -> None:
    """Without a model package nothing runs, and its name is said."""
    printed = run_pipetask(repository, "lenses/none", models=models)
    assert "exit code 0" not in printed
    assert ("deeplens_model" if models == "test/coadds" else "models/none") in printed


@pytest.mark.slow
def test_galaxies(repository: Path) -> None:
    """A galaxy model is trained and drawn from, and queries find it all."""
    small = {"nGalaxies": 100, "size": 32, "width": 2, "latents": 3, "textureSize": 16, "textureStart": 2}
    small |= {"flowLayers": 1, "priorSteps": 5, "epochs": 1, "batchSize": 16, "maxMagnitude": 23.5}
    small |= {"textureLayers": 2, "texturePriorSteps": 5}
    compared = {"nGalaxies": 24, "nBootstrap": 2, "nShown": 3, "maxMagnitude": 22.5}
    settings = {"trainCvae": small, "compareMorphology": compared}
    options = [
        f"{label}:{key}={value}" for label, values in settings.items() for key, value in values.items()
    ]
    selection = ["cvaeGalaxy:selection=['i_psfFlux > 0']"]
    for pipeline, inputs, output, values in (
        ("train_galaxies.yaml", "test/coadds", "u/model", options),
        ("generate_galaxies.yaml", "test/coadds,u/model", "u/galaxies", selection),
    ):
        printed = run(
            *("pipetask", "run", "-b", str(repository), "-p", f"eups://meas_deeplearn/pipelines/{pipeline}"),
            *("-i", inputs, "--output-run", output, "--register-dataset-types"),
            *(part for value in values for part in ("-c", value)),
        )
        assert printed.returncode == 0, printed.stderr
    listing = run(
        "butler", "query-datasets", str(repository), "galaxy_*", "--collections", "u/model,u/galaxies"
    )
    names = ["galaxy_cvae_model", "galaxy_cvae_cutouts", "galaxy_cvae_gallery", "galaxy_gallery"]
    names += ["galaxy_morphology", "galaxy_morphology_distances", "galaxy_morphology_checks"]
    assert [name for name in names if name not in listing.stdout] == []
    shown = run("butler", "show-galaxies", str(repository), "--collections", "u/galaxies").stdout
    assert shown.count("drawn from galaxy_cvae 1") == 2
    assert shown.count("Gallery:") == 2

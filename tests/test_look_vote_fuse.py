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


"""Tests of the whole path, from the demo repository to fused posteriors."""

from __future__ import annotations

import csv
import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click import Command

from lsst.ctrl.mpexec.cli.pipetask import cli as pipetask_cli
from lsst.daf.butler import Butler
from lsst.daf.butler.cli.butler import cli as butler_cli
from lsst.daf.butler.cli.utils import LogCliRunner
from lsst.meas.deeplearn.demo import make_demo
from lsst.meas.deeplearn.lenses.vote_files import read_truth

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

PROGRAMS: dict[str, Command] = {"butler": butler_cli, "pipetask": pipetask_cli}


def run(program: str, *arguments: object) -> str:
    """Run a command, and return what it said."""
    result = LogCliRunner().invoke(PROGRAMS[program], [str(argument) for argument in arguments])
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.output


def run_pipeline(repo: Path, pipeline: str, inputs: str, output: str, *options: str) -> str:
    """Run one of our pipelines on the tract of the demo."""
    return run(
        *("pipetask", "run", "-b", repo, "-p", f"eups://meas_deeplearn/pipelines/{pipeline}", "-i", inputs),
        *("-o", output, "-d", "skymap='demo' AND tract=1", "--register-dataset-types", *options),
    )


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small demo repository with ranked candidates and examples."""
    repo = tmp_path_factory.mktemp("demo") / "repo"
    make_demo(repo, inner_cells=(4, 4), cell_size=75, bands=("g", "r", "i"), n_lenses=4, processes=1)
    run_pipeline(
        *(repo, "find_lenses.yaml", "demo/coadds,models/deeplens_gri", "demo/lenses"),
        *("-c", "lensFinder:inference.averageOrientations=1"),
    )
    run_pipeline(
        *(repo, "train_lens_finder.yaml#simulation", "demo/coadds", "demo/examples"),
        *("-c", "simulateLenses:maxLenses=40"),
    )
    return repo


def grade(page: Page, truth: dict[str, bool]) -> None:
    """Grade all candidates by keyboard, known ones as what they are."""
    for _ in range(page.locator(".card").count()):
        object_id = page.inner_text("#heading small")
        page.keyboard.press("a" if truth.get(object_id) else "n")


def test_campaign(repo: Path, page: Page, tmp_path: Path) -> None:
    """The page of a demo repository is graded by keyboard, filtered, taken
    back, exported, and opened again with its votes; these go through the
    repository into posteriors, which a query returns.
    """
    path = tmp_path / "page.html"
    said = run(
        *(
            "butler",
            "make-inspection-page",
            repo,
            path,
            "--collections",
            "demo/lenses,demo/coadds,demo/examples",
        ),
        *("--best", 12, "--injected", "lens_truth", "--examples", "lens_training_cutouts", "--n-examples", 8),
    )
    known = read_truth(tmp_path / "page_key.csv")
    assert sum(known.values()) > 8
    page.goto(path.as_uri())
    page.fill("#name", "Ada")
    page.keyboard.press("Enter")
    page.wait_for_selector("#help", state="hidden")
    n = page.locator(".card").count()
    # By keyboard, then filter, undo and reload.
    grade(page, {str(object_id): is_lens for object_id, is_lens in known.items()})
    assert page.inner_text("#progress-text") == f"{n} of {n}"
    page.keyboard.press("z")
    page.keyboard.press("Control+z")
    assert page.inner_text("#progress-text") == f"{n - 2} of {n}"
    page.select_option("#filter", "A")
    assert page.locator(".card").count() >= 8
    page.select_option("#filter", "none")
    assert page.locator(".card").count() == 2
    page.reload()
    assert page.inner_text("#progress-text") == f"{n - 2} of {n}"
    page.select_option("#filter", "all")
    page.keyboard.press("g")
    page.focus("#list")
    page.keyboard.press("u")
    with page.expect_download() as download:
        page.click("#export")
    votes = tmp_path / "votes.csv"
    download.value.save_as(votes)

    said = run(
        "butler", "ingest-lens-votes", repo, votes, "--key", tmp_path / "page_key.csv", "--run", "votes/ada"
    )
    assert f"Put {n - 1} votes of 1 voters into votes/ada" in said
    run_pipeline(
        repo, "fuse_lens_votes.yaml", "votes/ada,demo/lenses", "demo/fused", "-c", "fuseLensVotes:prior=0.02"
    )
    listing = run("butler", "query-datasets", repo, "lens_candidates_fused", "--collections", "demo/fused")
    assert "demo/fused/" in listing
    with Butler.from_config(str(repo), collections="demo/fused") as butler:
        fused = butler.get("lens_candidates_fused", skymap="demo", tract=1)
        voters = butler.get("lens_voters", skymap="demo")
    # Whoever is right on known ones is believed on the others.
    assert voters["voter"].tolist() == ["Ada"]
    assert voters["p_lens"][0] > 0.85
    assert voters["p_not"][0] > 0.85
    assert fused["n_votes"].sum() <= n - 2
    voted = fused["n_votes"] > 0
    said_lens = fused["n_votes_lens"] > 0
    assert np.min(fused["posterior"][said_lens]) > 0.02 > np.max(fused["posterior"][voted & ~said_lens])


def write_votes(folder: Path) -> None:
    """Write the votes of two voters and of a volunteer on the page there."""
    match = re.search(r'id="data">(.*?)</script>', (folder / "page.html").read_text())
    assert match is not None
    ids = json.loads(match[1])["ids"]
    truth = read_truth(folder / "page_key.csv")
    for name, says in (("ada", "AN"), ("ben", "BC")):
        rows = [f"{i},demo,1,{name},{says[not truth.get(int(i))]},2026-01-01T00:00:00Z" for i in ids]
        (folder / f"votes_{name}.csv").write_text(
            "\n".join(["candidate_id,skymap,tract,voter,grade,time", *rows])
        )
    with (folder / "classifications.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user_name", "created_at", "annotations", "subject_data"])
        for object_id in ids[:3]:
            annotations = [{"task": "T0", "value": "Probable lens"}]
            subject = {"#objectId": object_id, "#skymap": "demo", "#tract": "1"}
            writer.writerow(
                ["c", "2026-01-01 00:00:00 UTC", json.dumps(annotations), json.dumps({"1": subject})]
            )


def test_first_commands(repo: Path, capsys: pytest.CaptureFixture) -> None:
    """The first page of the documentation finds what the demo wrote."""
    text = (Path(__file__).resolve().parents[1] / "doc" / "getting-started.rst").read_text()
    query = re.search(r"^   (butler query-datasets demo/repo .*)$", text, flags=re.MULTILINE)
    source = re.search(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text)
    assert query is not None
    assert source is not None
    assert "lens_candidates_ranked" in run(*shlex.split(query[1].replace("demo/repo", str(repo))))
    exec(textwrap.dedent(source[1]).replace("demo/repo", str(repo)), {})
    assert "ringfinder_snr" in capsys.readouterr().out


def test_documented_commands(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The commands of the tutorial work one after the other."""
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[1] / "doc" / "visual-inspection.rst").read_text()
    for old, new in (
        ("demo/repo", str(repo)),
        ("demo/examples", "doc/examples"),
        ("demo/fused", "doc/fused"),
    ):
        text = text.replace(old, new)
    n_commands = 0
    for language, block in re.findall(r"\.\. code-block:: (\w+)\n\n((?:   .*\n|\n)+)", text):
        source = textwrap.dedent(block)
        if "machine.py" in source and language == "python":
            Path("machine.py").write_text(source)
        elif language == "python":
            exec(source, {})
        else:
            for command in source.replace("\\\n", " ").strip().splitlines():
                if "ingest-lens-votes" in command:
                    write_votes(tmp_path)
                run(*shlex.split(command))
                n_commands += 1
    assert n_commands == 8
    assert "posterior_low" in capsys.readouterr().out
    assert (tmp_path / "subjects" / "manifest.csv").exists()
    assert (tmp_path / "second.html").exists()
    with Butler.from_config(str(repo)) as butler:
        people, both = (
            butler.get("lens_candidates_fused", skymap="demo", tract=1, collections=f"doc/{name}")
            for name in ("fused", "fused_with_roc")
        )
    assert people["n_votes"].sum() == both["n_votes"].sum() > 0
    assert len(set(both["machine_log_ratio"])) >= 2

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

"""Tests of the page on which people grade lens candidates."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from astropy.table import Column, Table
from click.testing import CliRunner

from lsst.daf.butler import Butler, DatasetType
from lsst.meas.deeplearn.cli import ingest_lens_votes, make_inspection_page
from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.lenses.fuse_lens_votes_task import FuseLensVotesTask
from lsst.meas.deeplearn.lenses.inspection_candidates import choose_candidates
from lsst.meas.deeplearn.lenses.lens_finder_task import CANDIDATE_COLUMNS
from lsst.meas.deeplearn.lenses.plots import NO_DATA_COLOR, make_color_images
from lsst.meas.deeplearn.lenses.visual_inspection import (
    TEMPLATE_FOLDER,
    InspectionPage,
    InspectionPageError,
    make_pictures,
    measure_magnitudes,
    write_inspection_page,
)
from lsst.meas.deeplearn.lenses.vote_files import read_truth, read_votes
from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NASTY = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>&amp;"
BIG_ID = 3_000_000_000_000_000_001
"""Above 2**53, where the numbers of JavaScript have gaps."""


def make_candidates(n: int) -> Table:
    """Make ranked candidates, the best first."""
    table = Table()
    for name, (dtype, unit, description) in CANDIDATE_COLUMNS.items():
        table[name] = Column(np.zeros(n, dtype=dtype), unit=unit, description=description)
    table["objectId"][:] = BIG_ID + np.arange(n)
    table["coord_ra"][:] = 150.0 + 0.001 * np.arange(n)
    table["coord_dec"][:] = 2.0
    table["tract"][:] = 7
    table["score"][:] = np.linspace(0.99, 0.01, n)
    table["ringfinder_snr"][:] = np.where(np.arange(n) % 5 == 4, np.nan, np.arange(n) % 17)
    table["flag_edge"][:] = np.arange(n) % 10 == 3
    table.add_column(Column(np.arange(1, n + 1), name="rank"), index=0)
    return table


def make_cutouts(n: int, *, size: int = 21) -> Cutouts:
    """Make stamps of a red galaxy with a blue arc, and of noise."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:size, :size] - size // 2
    galaxy = 300 * np.exp(-0.5 * (x**2 + y**2) / 6)
    # To the upper right, so that a flipped picture is noticed.
    arc = 60 * np.exp(-0.5 * (np.hypot(x, y) - 6) ** 2) * ((x > 0) & (y > 0))
    image = rng.normal(size=(n, 3, size, size)).astype(np.float32)
    image += np.array([0.3, 0.8, 1.5], dtype=np.float32)[:, None, None] * galaxy.astype(np.float32)
    image += np.array([1.0, 0.6, 0.3], dtype=np.float32)[:, None, None] * arc.astype(np.float32)
    bad = np.zeros(image.shape, dtype=bool)
    if n > 2:
        bad[1, 0, 3, 4] = True
        bad[2, 1] = True
        image[2, 1] = np.nan
    return Cutouts(
        bands=("g", "r", "i"),
        pixel_scale=0.2,
        ids=BIG_ID + np.arange(n),
        ra=np.full(n, 150.0),
        dec=np.full(n, 2.0),
        x=np.zeros(n),
        y=np.zeros(n),
        image=image,
        variance=np.ones_like(image),
        bad=bad,
        psf=np.full((n, 3, 1, 1), 1.0, dtype=np.float32),
        off_edge=np.zeros(n, dtype=bool),
        missing_band=np.zeros((n, 3), dtype=bool),
        missing_cell=np.zeros((n, 3), dtype=bool),
    )


def write(path: Path, n: int = 12, **settings: Any) -> InspectionPage:
    """Write a page of made-up candidates."""
    settings = {"title": "Tract 7", "skymap": "sky"} | settings
    return write_inspection_page(path, make_candidates(n), make_cutouts(n), **settings)


def read_data(path: Path) -> dict[str, Any]:
    """Return the data that a page holds."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    assert match is not None
    return json.loads(match[1])


def test_page_holds_what_it_needs(tmp_path: Path) -> None:
    """A page is one file that refers to nothing else but viewers."""
    page = write(tmp_path / "page.html")
    assert page == InspectionPage(tmp_path / "page.html", None, page.page_id, 12, 0)
    text = page.path.read_text()
    data = read_data(page.path)
    assert data["ids"] == [str(BIG_ID + k) for k in range(12)]
    assert data["flag_names"][data["flags"][3][0]] == "edge"
    assert {detail["key"] for detail in data["details"] if detail["is_machine"]} >= {"rank", "score"}
    snr = next(detail for detail in data["details"] if detail["key"] == "ringfinder_snr")
    assert snr["values"][4] is None
    source = text.replace(json.dumps(data["viewers"])[1:-1], "")
    source = re.sub(r"https://[a-z.]+/[^\"]*\{ra\}[^\"]*", "", source)
    assert "http" not in source.replace("http-equiv", "")
    assert "default-src 'none'" in text
    # The same candidates keep their votes.
    assert write(tmp_path / "again.html", title="Other", order="random").page_id == page.page_id
    assert write(tmp_path / "fewer.html", n=11).page_id != page.page_id
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.html", "fewer.html", "page.html"]


def test_known_ones_are_mixed_in_blindly(tmp_path: Path) -> None:
    """Known candidates are at random places, and only their key tells."""
    truth = {BIG_ID + k: k % 2 == 0 for k in range(30, 40)} | {5: True}
    page = write(tmp_path / "page.html", 40, truth=truth)
    assert page.key_path == tmp_path / "page_key.csv"
    assert read_truth(page.key_path) == {i: lens for i, lens in truth.items() if i != 5}
    data = read_data(page.path)
    assert data["truth"] is None
    places = [data["ids"].index(str(BIG_ID + k)) for k in range(40)]
    assert places[:30] == sorted(places[:30])
    assert min(places[30:]) < 20
    assert places[30:] != sorted(places[30:])
    data = read_data(write(tmp_path / "feedback.html", 40, truth=truth, feedback=True).path)
    assert data["truth"][data["ids"].index(str(BIG_ID + 30))] is True
    assert data["truth"][data["ids"].index(str(BIG_ID))] is None
    shuffled = read_data(write(tmp_path / "random.html", 40, order="random").path)["ids"]
    assert shuffled != sorted(shuffled)


def test_tables_that_do_not_fit(tmp_path: Path) -> None:
    """Candidates without cutouts are left out and counted; a page without any
    candidate or with one twice is refused.
    """
    candidates, cutouts = make_candidates(5), make_cutouts(5)
    page = write_inspection_page(tmp_path / "page.html", candidates, cutouts[1:].to_table())
    assert (page.n_candidates, page.n_without_cutouts) == (4, 1)
    with pytest.raises(InspectionPageError, match="cutouts of none of the 1 candidates"):
        write_inspection_page(tmp_path / "no.html", candidates[:1], cutouts[1:])
    with pytest.raises(InspectionPageError, match="is empty"):
        write_inspection_page(tmp_path / "no.html", candidates, cutouts.to_table()[:0])
    with pytest.raises(InspectionPageError, match="more than once"):
        write_inspection_page(tmp_path / "no.html", candidates[[0, 0]], cutouts)
    assert not (tmp_path / "no.html").exists()
    small = write_inspection_page(tmp_path / "small.html", candidates, cutouts, size=11)
    assert read_data(small.path)["size"] == 11


def test_best_of_those_with_a_stamp() -> None:
    """The best that can be shown are chosen, so that none leaves a hole, and
    known ones besides.
    """
    candidates = make_candidates(12)
    with_stamps = BIG_ID + np.array([1, 3, 4, 7, 9, 11])
    chosen, n_passed_over = choose_candidates(candidates, with_stamps, best=3)
    assert (chosen["objectId"] - BIG_ID).tolist() == [1, 3, 4]
    assert n_passed_over == 2
    known = {BIG_ID + 1: True, BIG_ID + 8: False, BIG_ID + 11: False}
    chosen, n_passed_over = choose_candidates(candidates, with_stamps, best=3, known=known)
    assert (chosen["objectId"] - BIG_ID).tolist() == [1, 3, 4, 7, 11]
    assert n_passed_over == 4
    chosen, n_passed_over = choose_candidates(candidates, with_stamps[:0], best=3)
    assert (len(chosen), n_passed_over) == (0, 0)


def test_magnitudes() -> None:
    """A magnitude is that of the pixels in the middle, in nJy."""
    cutouts = make_cutouts(2)
    cutouts.image[:] = 0.0
    cutouts.image[0, 1, 10, 10] = 1000.0
    cutouts.image[0, 1, 0, 0] = 1e6
    assert measure_magnitudes(cutouts, "r")[0] == pytest.approx(23.9)
    assert np.isnan(measure_magnitudes(cutouts, "r")[1])
    cutouts.bad[0, 1, 11, 10] = True
    assert np.isnan(measure_magnitudes(cutouts, "r")[0])


def test_pictures() -> None:
    """Pictures are valid PNG with the pixels of the composites, North up."""
    cutouts = make_cutouts(2)
    pictures = make_pictures(cutouts, scale=2)
    assert list(pictures) == ["colour", "g", "r", "i"]
    content = pictures["colour"][1]
    assert content.startswith(b"\x89PNG")
    start = content.index(b"IDAT")
    length = int.from_bytes(content[start - 4 : start], "big")
    rows = np.frombuffer(zlib.decompress(content[start + 4 : start + 4 + length]), np.uint8).reshape(42, -1)
    assert (rows[:, 0] == 0).all()
    expected = make_color_images(cutouts, ("i", "r", "g"))[1]
    np.testing.assert_array_equal(rows[:, 1:].reshape(42, 42, 3)[::2, ::2], expected[::-1])


def test_contrast() -> None:
    """Text has the contrast that WCAG asks for, 4.5, on all backgrounds."""
    style = (TEMPLATE_FOLDER / "page.css").read_text()
    colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", style))

    def luminance(color: str) -> float:
        value = np.array([int(color[k : k + 2], 16) for k in (1, 3, 5)]) / 255
        return float(
            np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
            @ [0.2126, 0.7152, 0.0722]
        )

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for back in ("back", "panel"):
        for text in ("text", "faint", "accent"):
            assert contrast(colors[text], colors[back]) > 4.5
    for grade in "ABCNU":
        assert contrast(colors[grade], "#10131a") > 4.5


def test_import_is_light() -> None:
    """The sub-commands load nothing heavy before they run."""
    code = (
        "import sys, lsst.meas.deeplearn.cli;"
        "sys.exit({'torch', 'matplotlib', 'scipy'} & set(sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def make_repository(root: Path, n: int = 12) -> str:
    """Make a repository with ranked candidates and their cutouts."""
    with Butler.from_config(Butler.makeRepo(str(root)), writeable=True, run="lenses") as butler:
        corners = [LonLat.fromDegrees(ra, dec) for ra, dec in ((149, 1), (151, 1), (151, 3), (149, 3))]
        region = ConvexPolygon([UnitVector3d(corner) for corner in corners])
        sync = butler.registry.syncDimensionData
        sync("skymap", {"name": "sky", "hash": b"", "tract_max": 9, "patch_nx_max": 2, "patch_ny_max": 1})
        sync("tract", {"skymap": "sky", "id": 7, "region": region})
        sync("patch", {"skymap": "sky", "tract": 7, "id": 0, "cell_x": 0, "cell_y": 0, "region": region})
        truth = Table({"ra": [150.002], "dec": [2.0], "einstein_radius": [1.2], "lens_id": [1]})
        for name, table, dimensions in (
            ("lens_candidates_ranked", make_candidates(n), ("skymap", "tract")),
            ("lens_cutouts", make_cutouts(n).to_table(), ("skymap", "tract", "patch")),
            ("lens_truth", truth, ("skymap", "tract", "patch")),
        ):
            butler.registry.registerDatasetType(
                DatasetType(name, dimensions, "ArrowAstropy", universe=butler.dimensions)
            )
            data_id = {"skymap": "sky", "tract": 7, "patch": 0}
            butler.put(table, name, {key: data_id[key] for key in dimensions})
    return str(root)


def invoke(command: Any, *arguments: object) -> tuple[int, str]:
    """Run a sub-command, and return its exit code and what it said."""
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_commands(tmp_path: Path) -> None:
    """A page is written from a repository, and votes go back into it."""
    repo, page = make_repository(tmp_path / "repo"), tmp_path / "page.html"
    known = tmp_path / "known.csv"
    known.write_text(f"candidate_id,is_lens\n{BIG_ID + 9},0\n17,1\n")
    code, output = invoke(
        make_inspection_page, repo, page, "--collections", "lenses", "--best", 6, "--injected", "lens_truth",
        "--known", known, "--zooniverse", tmp_path / "zooniverse",
    )  # fmt: skip
    assert code == 0, output
    # Known ones are there besides the best, whatever their rank.
    assert "Wrote 8 of 12 candidates" in output
    assert "Of 3 known candidates 2 have a stamp here." in output
    assert read_truth(tmp_path / "page_key.csv") == {BIG_ID + 2: True, BIG_ID + 9: False}
    data = read_data(page)
    assert (data["skymap"], set(data["tract"])) == ("sky", {7})
    assert set(data["ids"]) == {str(BIG_ID + k) for k in (0, 1, 2, 3, 4, 5, 6, 9)}
    assert len(list((tmp_path / "zooniverse").glob("*.png"))) == 32

    votes = tmp_path / "votes.csv"
    votes.write_text(
        "candidate_id,skymap,tract,voter,grade,time\n"
        f"{BIG_ID},sky,7,a,N,2026-01-01T00:00:00Z\n{BIG_ID},sky,7,a,A,2026-01-01T00:00:01Z\n"
        f"{BIG_ID + 2},,,b,B,2026-01-01T00:00:02Z\n"
    )
    arguments = (repo, votes, votes, "--key", tmp_path / "page_key.csv", "--run", "votes/first")
    code, output = invoke(ingest_lens_votes, *arguments)
    assert code == 1
    assert "give --skymap and --tract" in output
    code, output = invoke(ingest_lens_votes, *arguments, "--skymap", "sky", "--tract", 8)
    assert code == 1
    assert "no tract 8" in output
    code, output = invoke(ingest_lens_votes, *arguments, "--skymap", "sky", "--tract", 7)
    assert code == 0, output
    assert "2 votes of 2 voters into votes/first; 4 were superseded" in output
    with Butler.from_config(repo) as butler:
        stored = butler.get("lens_votes", skymap="sky", tract=7, collections="votes/first")
    assert stored["grade"].tolist() == ["A", "B"]
    assert stored["truth"].tolist() == [-1, 1]
    code, output = invoke(ingest_lens_votes, *arguments, "--skymap", "sky", "--tract", 7)
    assert code == 1
    assert "votes on tract 7 in votes/first already" in output


def put_examples(repo: str, run: str, *, size: int) -> None:
    """Put a table as that of SimulateLensesTask into a repository: four hosts
    with arcs and without, of which the first is a candidate.
    """
    cutouts = make_cutouts(8, size=size)
    cutouts.ra[:] = 150.0 + 0.01 * (np.arange(8) // 2)
    table = cutouts.to_table()
    table["label"] = np.arange(8) % 2 == 0
    table["kind"] = np.where(table["label"], "lens", "host")
    table["host_id"], table["source_id"] = 100 + np.arange(8) // 2, np.arange(8)
    with Butler.from_config(repo, writeable=True, run=run) as butler:
        butler.registry.registerDatasetType(
            DatasetType(
                "lens_training_cutouts",
                ("skymap", "tract", "patch"),
                "ArrowAstropy",
                universe=butler.dimensions,
            )
        )
        butler.put(table, "lens_training_cutouts", skymap="sky", tract=7, patch=0)


def test_examples_are_mixed_in_blindly(tmp_path: Path) -> None:
    """Simulated lenses and non-lenses are among the candidates under IDs that
    do not tell them, no galaxy twice.
    """
    repo, page = make_repository(tmp_path / "repo"), tmp_path / "page.html"
    put_examples(repo, "examples", size=25)
    put_examples(repo, "small", size=15)
    arguments = (repo, page, "--examples", "lens_training_cutouts", "--n-examples", 2)
    code, output = invoke(make_inspection_page, *arguments, "--collections", "lenses,examples")
    assert code == 0, output
    truth = read_truth(tmp_path / "page_key.csv")
    # The first host is a candidate, so that three are left.
    assert 2 <= len(truth) <= 3
    assert f"Mixed in are {sum(truth.values())} simulated lenses" in output
    data = read_data(page)
    assert len(data["ids"]) == len(set(data["ids"])) == 12 + len(truth)
    assert {len(i) for i in data["ids"]} == {len(str(BIG_ID))}
    places = [data["ids"].index(str(i)) for i in truth]
    assert {round(data["ra"][k], 2) for k in places} <= {150.01, 150.02, 150.03}
    assert len({data["ra"][k] for k in places}) == len(truth)
    assert data["links_after_vote"]
    assert {detail["values"][places[0]] for detail in data["details"] if detail["key"] == "score"} == {None}
    invoke(make_inspection_page, *arguments, "--collections", "lenses,examples")
    assert read_truth(tmp_path / "page_key.csv") == truth
    for collections, message in (
        ("lenses,small", "15 pixels of 0.2000 arcsec, cannot be shown among candidates of g,r,i, 21 pixels"),
        ("lenses", "no lens_training_cutouts in lenses"),
    ):
        code, output = invoke(make_inspection_page, *arguments, "--collections", collections)
        assert code == 1
        assert message in output


def test_commands_with_bad_input(tmp_path: Path) -> None:
    """What is wrong is said in a line."""
    repo = make_repository(tmp_path / "repo")
    page = tmp_path / "page.html"
    for arguments, message in (
        (("--collections", "nothing"), "nothing"),
        (("--collections", "lenses", "--candidates", "other"), "other"),
        (("--collections", "lenses", "--order-by", "vote_rank"), "no column 'vote_rank'"),
        (
            ("--collections", "lenses", "--where", "skymap = 'sky' and tract = 8"),
            "no lens_candidates_ranked in lenses where",
        ),
    ):
        code, output = invoke(make_inspection_page, repo, page, *arguments)
        assert code == 1, output
        assert message in output
    assert not page.exists()
    votes = tmp_path / "votes.csv"
    votes.write_text("candidate_id,voter,grade,time\n1,a,A,never\n")
    code, output = invoke(ingest_lens_votes, repo, votes, "--run", "votes")
    assert code == 1
    assert "line 2" in output
    code, output = invoke(ingest_lens_votes, repo, votes, "--run", "votes", "--skip-broken")
    assert code == 1
    assert "no votes in these files" in output


# In the browser.


def open_page(page: Page, path: Path, *, name: str | None = "Ada") -> None:
    """Open an inspection page, and give a name."""
    page.goto(path.as_uri())
    if name is not None:
        page.fill("#name", name)
        page.keyboard.press("Enter")
        page.wait_for_selector("#help", state="hidden")


def export(page: Page, path: Path) -> Table:
    """Export the votes and read them."""
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(path)
    return read_votes(path)


def test_grade_by_keyboard(page: Page, tmp_path: Path) -> None:
    """Grading, undoing and filtering work by keys; votes survive a reload and
    come out as CSV.
    """
    path = write(tmp_path / "page.html").path
    open_page(page, path)
    for key in "abncu":
        page.keyboard.press(key)
    assert page.inner_text("#progress-text") == "5 of 12"
    assert page.inner_text("#heading").startswith("Candidate 6 of 12")
    assert page.inner_text("#status") == "Candidate 5: Unsure. 5 of 12 graded. Now candidate 6."
    page.keyboard.press("z")
    page.keyboard.press("Control+z")
    assert page.inner_text("#progress-text") == "3 of 12"
    assert page.inner_text("#heading").startswith("Candidate 4 of 12")
    # A second thought on the first.
    page.keyboard.press("Home")
    page.keyboard.press("c")
    page.keyboard.press("z")
    assert page.get_attribute("#card0", "aria-label").startswith("Candidate 1, grade Sure lens")

    page.select_option("#filter", "none")
    assert page.locator(".card").count() == 9
    page.focus("#list")
    page.keyboard.press("n")
    assert page.locator(".card").count() == 8
    page.select_option("#filter", "A")
    assert page.locator(".card").count() == 1
    page.select_option("#filter", "C")
    assert "No candidate fits" in page.inner_text("#list")
    page.select_option("#filter", "all")
    page.select_option("#flags", "without")
    assert page.locator(".card").count() == 11
    page.select_option("#flags", "any")
    page.fill("#search", str(BIG_ID + 11))
    assert page.locator(".card").count() == 1

    page.reload()
    assert page.inner_text("#progress-text") == "4 of 12"
    assert page.inner_text("#name-button") == "Ada"
    page.keyboard.press("z")
    assert page.inner_text("#progress-text") == "3 of 12"
    votes = export(page, tmp_path / "votes.csv")
    assert votes["objectId"].tolist() == [BIG_ID, BIG_ID + 1, BIG_ID + 2]
    assert votes["grade"].tolist() == ["A", "B", "N"]
    assert set(votes["voter"]) == {"Ada"}
    assert set(votes["skymap"]) == {"sky"}
    assert set(votes["tract"]) == {7}
    assert (votes["seconds"] >= 0).all()
    assert not votes["saw_score"].any()

    fused = FuseLensVotesTask(config=FuseLensVotesTask.ConfigClass()).run(make_candidates(12), [votes]).fused
    assert fused["objectId"][-1] == BIG_ID + 2
    assert set(fused["objectId"][:2]) == {BIG_ID, BIG_ID + 1}


def import_votes(page: Page, path: Path) -> None:
    """Take votes back from a file."""
    page.click("#name-button")
    with page.expect_file_chooser() as chooser:
        page.click("#import")
    chooser.value.set_files(path)
    page.wait_for_selector("#help", state="hidden")


def test_go_on_elsewhere(browser: Browser, page: Page, tmp_path: Path) -> None:
    """Votes that were exported on one computer are imported on another, where
    of two votes the later one stays; a file that is none changes nothing.
    """
    path = write(tmp_path / "page.html").path
    open_page(page, path)
    for key in "ab":
        page.keyboard.press(key)
    votes = export(page, tmp_path / "votes.csv")
    context = browser.new_context()
    other = context.new_page()
    open_page(other, path, name=None)
    with other.expect_file_chooser() as chooser:
        other.click("#import")
    chooser.value.set_files(tmp_path / "votes.csv")
    other.wait_for_selector("#help", state="hidden")
    assert other.inner_text("#name-button") == "Ada"
    assert other.inner_text("#status") == "Imported 2 votes from votes.csv."
    other.keyboard.press("Home")
    other.keyboard.press("n")
    other.reload()
    assert other.inner_text("#progress-text") == "2 of 12"
    later = export(other, tmp_path / "later.csv")
    assert later["grade"].tolist() == ["N", "B"]
    assert later["time"][1] == votes["time"][1]
    context.close()

    import_votes(page, tmp_path / "later.csv")
    assert "Imported 1 votes from later.csv. 1 were here already" in page.inner_text("#status")
    import_votes(page, tmp_path / "votes.csv")
    assert "Imported 0 votes" in page.inner_text("#status")
    assert export(page, tmp_path / "again.csv")["grade"].tolist() == ["N", "B"]

    row = f"{BIG_ID},Ada,A,2030-01-01T00:00:00Z"
    bad = tmp_path / "bad.csv"
    for content, message in (
        ("", "no column candidate_id"),
        ("a,b\n1,2\n", "no column candidate_id, voter, grade, time"),
        (f"candidate_id,voter,grade,time\n{row}\n1,Ada,<b>,2030\n", "line 3 is no vote"),
        (f"candidate_id,voter,grade,time\n{row}\n1,Ada,A,never\n", "line 3 is no vote"),
        (f"candidate_id,voter,grade,time\n{row}\n1,Ada,A\n", "line 3 is no vote"),
        ('candidate_id,voter,grade,time\n1,"Ada,A,2030\n', "ends within quotes"),
        ("candidate_id,voter,grade,time\n1,<img src=x onerror=alert(1)>,A,2030-01-01\n", "those of <img src"),
        (f"candidate_id,voter,grade,time\n{row}\n1,Ben,A,2030-01-01\n", "several voters"),
    ):
        bad.write_text(content)
        import_votes(page, bad)
        assert "Nothing was imported from bad.csv" in page.inner_text("#warning")
        assert message in page.inner_text("#warning")
    bad.write_text("candidate_id,voter,grade,time\n1,Ada,A,2030-01-01\n")
    import_votes(page, bad)
    assert "1 are on candidates of another page" in page.inner_text("#status")
    assert page.is_hidden("#warning")
    assert export(page, tmp_path / "again.csv")["grade"].tolist() == ["N", "B"]


def test_known_lenses_and_errors(page: Page, tmp_path: Path) -> None:
    """After the vote the page tells known lenses, and probabilities with
    their errors, however small.
    """
    candidates = make_candidates(3)
    candidates["known_lens"] = ["J1 (confident)", "", ""]
    candidates["probability"] = [2.34e-5, 0.5, np.nan]
    candidates["probability_err"] = [1e-5, 0.1, np.nan]
    candidates["posterior"], candidates["posterior_low"] = [0.9, 0.5, 0.1], [0.8, 0.4, 0.05]
    candidates["posterior_high"] = [0.95, 0.6, 0.2]
    path = tmp_path / "page.html"
    write_inspection_page(path, candidates, make_cutouts(3), links="after vote")
    open_page(page, path)
    assert page.is_hidden("#card0 .known")
    assert page.locator("#links a").count() == 0
    page.keyboard.press("a")
    page.keyboard.press("ArrowLeft")
    assert page.is_visible("#card0 .known")
    assert page.get_attribute("#card0", "aria-label").endswith("known lens")
    facts = page.inner_text("#facts")
    assert "J1 (confident)" in facts
    assert "2.3e\u22125 \u00b1 1.0e\u22125" in facts
    assert "0.900 (0.800 to 0.950)" in facts
    assert page.locator("#links a").count() == 5
    page.keyboard.press("ArrowRight")
    page.keyboard.press("n")
    page.keyboard.press("ArrowLeft")
    assert "0.500 \u00b1 0.100" in page.inner_text("#facts")
    assert page.is_hidden("#card1 .known")


def test_mouse_and_buttons(page: Page, tmp_path: Path) -> None:
    """All that keys do can be done with buttons, without letter keys too."""
    open_page(page, write(tmp_path / "page.html").path)
    page.uncheck("#keys")
    page.keyboard.press("a")
    assert page.inner_text("#progress-text") == "0 of 12"
    page.click("#grades button[data-grade=B]")
    page.click("#card4")
    page.click("#grades button[data-grade=N]")
    assert page.inner_text("#heading").startswith("Candidate 6")
    page.click("#previous")
    assert page.get_attribute("#grades button[data-grade=N]", "aria-pressed") == "true"
    page.click("#undo")
    assert page.inner_text("#progress-text") == "1 of 12"
    page.click("#ungraded")
    page.click("#next")
    page.click("#views button:nth-child(7)")
    assert "difference of bands" in page.get_attribute("#big", "aria-label")


def test_machine_is_silent_before_the_vote(page: Page, tmp_path: Path) -> None:
    """Scores are shown after the vote, or on demand, and the votes tell."""
    open_page(page, write(tmp_path / "page.html").path)
    assert "Score" not in page.inner_text("#facts")
    assert page.is_disabled("#sort option[value=score]")
    page.keyboard.press("a")
    page.keyboard.press("ArrowLeft")
    assert "0.99" in page.inner_text("#facts")
    page.check("#show-scores")
    page.keyboard.press("ArrowRight")
    assert "Score" in page.inner_text("#facts")
    page.keyboard.press("b")
    page.select_option("#sort", "ringfinder_snr")
    assert page.locator(".card").first.get_attribute("id") == "card11"
    assert page.locator(".card").last.get_attribute("id") == "card9"
    page.fill("#minimum", "0.5")
    assert page.locator(".card").count() == 6
    assert export(page, tmp_path / "votes.csv")["saw_score"].tolist() == [False, True]


def test_feedback(page: Page, tmp_path: Path) -> None:
    """Where truth is known, voters who train are told."""
    open_page(page, write(tmp_path / "page.html", 1, truth={BIG_ID: False}, feedback=True).path)
    assert page.is_hidden("#truth")
    page.keyboard.press("a")
    assert page.inner_text("#truth") == "This one is known not to be a lens."
    assert "All 1 shown have a grade" in page.inner_text("#status")
    # It is too late now.
    page.keyboard.press("n")
    assert "first grade counts" in page.inner_text("#status")
    page.keyboard.press("z")
    assert export(page, tmp_path / "votes.csv")["grade"].tolist() == ["A"]


def test_two_voters_at_one_machine(page: Page, tmp_path: Path) -> None:
    """Each name has votes of its own, and finds them again."""
    open_page(page, write(tmp_path / "page.html").path)
    page.keyboard.press("a")
    for name, n_votes in (("Ben", 0), ("Ada", 1)):
        page.click("#name-button")
        page.fill("#name", name)
        page.keyboard.press("Enter")
        page.wait_for_selector("#help", state="hidden")
        assert page.inner_text("#progress-text") == f"{n_votes} of 12"
    # A second thought, after the score has been shown.
    page.keyboard.press("Home")
    page.keyboard.press("b")
    votes = export(page, tmp_path / "votes.csv")
    assert votes["voter"].tolist() == ["Ada"]
    assert votes["saw_score"].tolist() == [True]


def test_screen_readers_and_focus(page: Page, tmp_path: Path) -> None:
    """Whatever can be used has a name, and Tab goes through it in order."""
    open_page(page, write(tmp_path / "page.html").path)
    assert page.evaluate("document.activeElement.id") == "list"
    assert page.get_attribute("#list", "aria-activedescendant") == "card0"
    assert page.get_attribute("#card0", "aria-selected") == "true"
    assert page.get_attribute("#card3", "aria-label") == "Candidate 4, no grade, flags: edge"
    snapshot = page.locator("body").aria_snapshot()
    assert "- listbox" in snapshot
    assert 'button "Probable lens"' in snapshot
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, a, canvas[role=img]")]
            .filter((e) => !(e.innerText || e.getAttribute("aria-label") || (e.labels && e.labels[0])))
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    seen = []
    for _ in range(8):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.dataset.grade || document.activeElement.id"))
    assert seen == ["zoom", "smooth", "A", "B", "C", "N", "U", ""]
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("Escape")
    assert page.is_hidden("#help")


def test_nothing_is_executed(page: Page, tmp_path: Path) -> None:
    """HTML in titles, sky maps and names is text; a name that would be a
    formula in a spreadsheet is none.
    """
    candidates, cutouts = make_candidates(3), make_cutouts(3)
    candidates["known_lens"] = NASTY
    path = write_inspection_page(
        tmp_path / "page.html",
        candidates,
        cutouts,
        title=NASTY,
        skymap=NASTY,
        viewers={NASTY: "https://x/{ra}"},
    ).path
    open_page(page, path, name='=cmd|"' + NASTY[:40])
    page.keyboard.press("a")
    page.keyboard.press("ArrowLeft")
    assert NASTY in page.inner_text("#facts")
    assert page.inner_text("h1") == NASTY
    assert page.title() == NASTY
    votes = export(page, tmp_path / "votes.csv")
    assert page.evaluate("window.hacked") is None
    assert votes["voter"].tolist() == ['cmd|"' + NASTY[:40]]
    assert votes["skymap"].tolist() == [NASTY[:64]]
    with (tmp_path / "votes.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 2


def test_pixels(page: Page, tmp_path: Path) -> None:
    """The colours are those of the gallery, to the rounding of the pixels."""
    open_page(page, write(tmp_path / "page.html", 3).path)
    expected = make_color_images(make_cutouts(3), ("i", "r", "g"))
    for k in range(3):
        flat = page.evaluate(
            f"""() => {{
                const canvas = document.getElementById("card{k}").querySelector("canvas");
                return [...canvas.getContext("2d").getImageData(0, 0, 21, 21).data];
            }}"""
        )
        shown = np.array(flat).reshape(21, 21, 4)[::-1, :, :3]
        difference = np.abs(shown - expected[k].astype(int))
        assert difference.mean() < 1.0
        # A pixel whose bands cancel is black, or just not.
        assert np.quantile(difference, 0.99) <= 6
    assert shown.max() > 150
    assert tuple(expected[1, 3, 4]) == NO_DATA_COLOR


def test_votes_that_cannot_be_kept(page: Page, tmp_path: Path) -> None:
    """A browser that keeps nothing says so; the votes can be exported."""
    page.add_init_script(
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"
    )
    open_page(page, write(tmp_path / "page.html").path)
    page.keyboard.press("a")
    assert "cannot be kept" in page.inner_text("#warning")
    assert len(export(page, tmp_path / "votes.csv")) == 1


def test_many_candidates(page: Page, tmp_path: Path) -> None:
    """2,000 candidates stay fluid: images are made when they come into view,
    and a vote is quick.
    """
    open_page(page, write(tmp_path / "page.html", 2000, size=21).path)
    drawn = page.evaluate("[...document.querySelectorAll('.card canvas')].filter((c) => c.width > 1).length")
    assert 20 < drawn < 300
    assert page.locator(".card").count() == 2000
    milliseconds = page.evaluate(
        """() => {
            const start = performance.now();
            for (let k = 0; k < 50; k++) {
                document.dispatchEvent(new KeyboardEvent("keydown", { key: "n", bubbles: true }));
            }
            document.body.offsetHeight;
            return (performance.now() - start) / 50;
        }"""
    )
    assert page.inner_text("#progress-text") == "50 of 2000"
    # A tenth of a second is felt as a delay.
    assert milliseconds < 100
    page.keyboard.press("End")
    page.wait_for_function("document.getElementById('card1999').querySelector('canvas').width > 1")

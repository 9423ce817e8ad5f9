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


"""Tests of the Bologna challenge, on a miniature in its layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from click.testing import CliRunner

from lsst.meas.deeplearn.inference import InferenceConfig
from lsst.meas.deeplearn.lenses import challenge, challenge_commands, challenge_simulation
from lsst.meas.deeplearn.lenses.challenge import ChallengeError
from lsst.meas.deeplearn.lenses.lens_network import EvaluationError
from lsst.meas.deeplearn.lenses.simulate_lenses_task import EXAMPLE_COLUMNS
from lsst.meas.deeplearn.lenses.simulation import compute_arc_snr, render_arcs
from lsst.meas.deeplearn.model_package import ModelPackage, ModelPackageError
from lsst.meas.deeplearn.scene import (
    sample_galaxies,
)
from lsst.meas.deeplearn.scene_drawing import (
    compute_transfer,
    draw_galaxies,
    draw_galaxies_in_bands,
    make_psf,
)
from lsst.meas.deeplearn.tests import make_test_model

FIRST_ID = 100000
NOISE = 1e-11

GROUND = ("Band1/imageSDSS_R", "Band2/imageSDSS_I", "Band3/imageSDSS_G", "Band4/imageSDSS_U")


def make_challenge(
    root: Path, n: int = 24, *, size: int = 51, files: tuple[str, ...] = GROUND, folders: int = 1
) -> Path:
    """Write a miniature of the training images, or of the test images if
    there are several folders; return its key.

    Even IDs are lenses: blue rings about red galaxies.
    """
    rng = np.random.default_rng(1)
    pixels = np.arange(size) - size // 2
    radius = np.hypot(pixels[:, None], pixels) * 0.2
    ids = FIRST_ID + np.arange(n)
    for k, number in enumerate(ids):
        folder = root if folders == 1 else root / f"Data_KiDS_Big.{k % folders}"
        for band, name in enumerate(files):
            image = rng.normal(0, NOISE, (size, size)) + (40 - 8 * band) * NOISE * np.exp(-radius / 0.6)
            if number % 2 == 0:
                image += 10 * NOISE * np.exp(-0.5 * ((radius - 1.4) / 0.3) ** 2)
            image[2:6, 3:10] = 100.0
            path = folder / "Public" / f"{name}-{number}.fits"
            path.parent.mkdir(parents=True, exist_ok=True)
            fits.writeto(path, image.astype(np.float32))
    lens = (ids % 2 == 0).astype(int)
    if folders == 1:
        catalog = root / "classifications.csv"
        columns = "ID,is_lens,Einstein_area,numb_pix_lensed_image,flux_lensed_image_in_sigma"
        rows = [
            f"{i},{x},{6.2 * x},{40 * x * (k + 1)},{300.0 * x}" for k, (i, x) in enumerate(zip(ids, lens))
        ]
        catalog.write_text("\n".join([columns, *rows]) + "\n")
    else:
        catalog = root / "ground_catalog.4.csv"
        rows = [f"{i},{1 - x}" for i, x in zip(ids, lens)]
        catalog.write_text("\n".join(["# ID : identification", "# no_source", "ID,no_source", *rows]) + "\n")
    return catalog


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like that of the training images."""
    root = tmp_path_factory.mktemp("challenge") / "GroundBasedTraining"
    make_challenge(root)
    return root


def test_both_layouts_are_found(training: Path, tmp_path: Path) -> None:
    """Training images lie in one folder, test images in several, and either
    key says what is a lens.
    """
    test = make_challenge(tmp_path, 6, folders=3)
    images = challenge.find_images(tmp_path, "ground")
    assert list(images) == [FIRST_ID + k for k in range(6)]
    assert images[FIRST_ID + 4]["u"] == (
        tmp_path / "Data_KiDS_Big.1" / "Public" / "Band4" / f"imageSDSS_U-{FIRST_ID + 4}.fits"
    )
    assert challenge.read_catalog(test)["is_lens"].tolist() == [True, False] * 3
    assert len(challenge.find_images(training, "ground")) == 24
    assert challenge.read_catalog(training / "classifications.csv")["is_lens"].tolist() == [True, False] * 12


def test_stamps(training: Path) -> None:
    """Bands are in order, masked pixels bad, units nJy, noise measured."""
    images = challenge.find_images(training, "ground")
    ids = [FIRST_ID + 3, FIRST_ID + 1]
    cutouts = challenge.read_cutouts(images, ids, "ground")
    assert cutouts.bands == ("u", "g", "r", "i")
    assert (cutouts.pixel_scale, cutouts.size, len(cutouts)) == (0.2, 51, 2)
    assert cutouts.ids.tolist() == ids
    assert cutouts.bad.sum() == 2 * 4 * 4 * 7
    assert np.isnan(cutouts.image[cutouts.bad]).all()
    # A value of 1 is AB magnitude 0, 3631 Jy.
    written = fits.getdata(images[FIRST_ID + 3]["r"])
    assert cutouts.image[0, 2, 25, 25] == pytest.approx(written[25, 25] * 3631e9, rel=1e-3)
    np.testing.assert_allclose(np.sqrt(cutouts.variance), NOISE * 3631e9, rtol=0.15)
    fainter = challenge.read_cutouts(images, ids, "ground", zero_point=2.5)
    np.testing.assert_allclose(fainter.image, cutouts.image / 10, rtol=1e-5)
    crop = challenge.read_cutouts(images, ids, "ground", size=45)
    np.testing.assert_array_equal(crop.image, cutouts.image[..., 3:-3, 3:-3])


def test_space(tmp_path: Path) -> None:
    """From space there is one band."""
    make_challenge(tmp_path, 4, files=("Band1/imageEUC_VIS",))
    cutouts = challenge.read_cutouts(challenge.find_images(tmp_path, "space"), [FIRST_ID], "space")
    assert (cutouts.bands, cutouts.pixel_scale) == (("VIS",), 0.1)
    with pytest.raises(ChallengeError, match="choose the other one"):
        challenge.find_images(tmp_path, "ground")


def test_files_that_do_not_fit(training: Path, tmp_path: Path) -> None:
    """Missing bands, doubles, wrong sizes and IDs are refused."""
    make_challenge(tmp_path / "a", 3)
    last = tmp_path / "a" / "Public" / "Band3" / f"imageSDSS_G-{FIRST_ID + 2}.fits"
    images = challenge.find_images(tmp_path / "a", "ground")
    fits.writeto(last, np.zeros((41, 41)), overwrite=True)
    with pytest.raises(ChallengeError, match="not one odd side"):
        challenge.read_cutouts(images, list(images), "ground")
    with pytest.raises(ChallengeError, match="no images of object 5"):
        challenge.read_cutouts(images, [5], "ground")
    with pytest.raises(ChallengeError, match="less than 101"):
        challenge.read_cutouts(images, [FIRST_ID], "ground", size=101)
    with pytest.raises(ChallengeError, match="no objects"):
        challenge.read_cutouts(images, [], "ground")
    last.unlink()
    with pytest.raises(ChallengeError, match=r"1 of 3 objects lack a band, such as 100002: \['g'\]"):
        challenge.find_images(tmp_path / "a", "ground")
    make_challenge(tmp_path / "b", 2)
    with pytest.raises(ChallengeError, match="same object"):
        challenge.find_images(tmp_path, "ground")


@pytest.mark.parametrize(
    ("text", "message"),
    [("ID,x\n1,2\n", "needs columns ID"), ("ID,is_lens\n1,0\n1,1\n", "more than once"), ("ID,x\n1\n", "ID")],
)
def test_keys_that_do_not_fit(text: str, message: str, tmp_path: Path) -> None:
    """A table that is no key is refused."""
    path = tmp_path / "key.csv"
    path.write_text(text)
    with pytest.raises(ChallengeError, match=message):
        challenge.read_catalog(path)


def test_submissions(tmp_path: Path) -> None:
    """Scores come back, whatever is between the columns."""
    path = tmp_path / "scores.txt"
    challenge.write_submission(path, {3: 0.25, 1: -1.5})
    assert challenge.read_submission(path) == {3: 0.25, 1: -1.5}
    path.write_text("# comment\n3 0.5\n\n4,nan\n")
    assert list(challenge.read_submission(path)) == [3, 4]
    for text, message in (("3 0.5 6\n", "Line 1"), ("3 a\n", "Line 1"), ("3 1\n3 2\n", "again")):
        path.write_text(text)
        with pytest.raises(ChallengeError, match=message):
            challenge.read_submission(path)


def test_score_by_hand(training: Path) -> None:
    """Perfect, shuffled and missing scores count as they should."""
    catalog = challenge.read_catalog(training / "classifications.csv")
    truth = dict(zip(catalog["ID"].tolist(), catalog["is_lens"].tolist(), strict=True))
    perfect = challenge.score_challenge({k: float(v) for k, v in truth.items()}, catalog)
    assert (perfect.auroc, perfect.tpr0.value, perfect.tpr10.value) == (1, 1, 1)
    assert (perfect.n_lenses, perfect.n_non_lenses, perfect.n_excluded) == (12, 12, 0)
    # One non-lens above all lenses.
    spoilt = {k: float(v) for k, v in truth.items()} | {FIRST_ID + 1: 2.0}
    assert challenge.score_challenge(spoilt, catalog).tpr0.value == 0
    partial = {k: float(v) for k, v in truth.items() if k > FIRST_ID + 3} | {FIRST_ID: np.nan}
    result = challenge.score_challenge(partial, catalog)
    assert (result.n_lenses, result.n_excluded) == (10, 4)
    # Pixels of lenses: 40, 120, 200, ...
    cut = challenge.score_challenge(spoilt, catalog, cuts={"numb_pix_lensed_image": 160})
    assert (cut.n_lenses, cut.n_non_lenses) == (10, 12)
    with pytest.raises(ChallengeError, match="no column 'size'"):
        challenge.score_challenge(spoilt, catalog, cuts={"size": 1})
    with pytest.raises(ChallengeError, match="0 non-lenses; both"):
        challenge.score_challenge({FIRST_ID: 1.0}, catalog)
    with pytest.raises(ChallengeError, match="such as 7"):
        challenge.score_challenge({7: 1.0}, catalog)


def test_table_of_the_paper(training: Path) -> None:
    """The entry takes its place among those published, whose order is kept."""
    catalog = challenge.read_catalog(training / "classifications.csv")
    scores = {k: float(v) for k, v in zip(catalog["ID"].tolist(), catalog["is_lens"], strict=True)}
    lines = challenge.score_challenge(scores, catalog).describe("ground").splitlines()
    assert lines[1].startswith("this one")
    assert lines[2].split() == ["CMU-DeepLens-Resnet-ground3", "0.98", "0.09", "0.45"]
    assert "defined for 100,000" in lines[-1]
    assert [len(entries) for entries in challenge.PUBLISHED.values()] == [10, 14]
    for entries in challenge.PUBLISHED.values():
        assert [row[1] for row in entries] == sorted((row[1] for row in entries), reverse=True)


def test_networks(training: Path, tmp_path: Path) -> None:
    """Networks score the images; NaN is left out; others are refused."""
    make_challenge(tmp_path, 6)
    images = challenge.find_images(tmp_path, "ground")
    path = images[FIRST_ID + 2]["g"]
    image = fits.getdata(path)
    image[25, 25] = np.nan
    fits.writeto(path, image, overwrite=True)
    config = InferenceConfig()
    config.update(device="cpu", averageOrientations=1)
    scores = dict(challenge.score_images(images, list(images), "ground", [make_test_model("ugri")], config))
    assert [number for number, score in scores.items() if np.isnan(score)] == [FIRST_ID + 2]
    catalog = challenge.read_catalog(tmp_path / "classifications.csv")
    assert challenge.score_challenge(scores, catalog).n_excluded == 1
    two = [make_test_model("ugri"), make_test_model("ugri", seed=2)]
    mean = dict(challenge.score_images(images, [FIRST_ID], "ground", two, config))
    other = dict(challenge.score_images(images, [FIRST_ID], "ground", two[1:], config))
    assert mean[FIRST_ID] == pytest.approx((scores[FIRST_ID] + other[FIRST_ID]) / 2, abs=1e-6)
    with pytest.raises(ModelPackageError, match="z missing"):
        list(challenge.score_images(images, [FIRST_ID], "ground", [make_test_model("gz")], config))
    model = make_test_model("ugri", stamp_size=65)
    with pytest.raises(EvaluationError, match="65 pixels"):
        list(challenge.score_images(images, [FIRST_ID], "ground", [model], config))


def test_training_table(training: Path) -> None:
    """Examples have all columns, and splits that do not depend on order."""
    catalog = challenge.read_catalog(training / "classifications.csv")
    images = challenge.find_images(training, "ground")
    cutouts = challenge.read_cutouts(images, list(images), "ground")
    cutouts.image[0, 0, 25, 25] = np.nan
    table = challenge.make_training_table(cutouts, catalog, validation=0.3, test=0.3, calibration=0.0)
    assert {name for name, _, _ in EXAMPLE_COLUMNS} <= set(table.colnames)
    assert len(table) == 23
    assert (table["label"] == (table["ids"] % 2 == 0)).all()
    assert set(table["split"]) == {"train", "validation", "test"}
    backwards = challenge.make_training_table(
        cutouts[::-1], catalog, validation=0.3, test=0.3, calibration=0.0
    )
    np.testing.assert_array_equal(backwards["split"][::-1], table["split"])


def test_simulated_set(tmp_path: Path) -> None:
    """A made-up set is read as the challenge is: half are lenses, whose arcs
    are counted, masked pixels are bad, and the noise is that of KiDS.
    """
    run = CliRunner().invoke(challenge_commands.main, ["simulate", str(tmp_path), "-n", "8", "--seed", "3"])
    assert run.exit_code == 0, run.output
    key = challenge.read_catalog(tmp_path / "classifications.csv")
    assert key["is_lens"].sum() == 4
    lens = np.asarray(key["is_lens"], dtype=bool)
    assert (key["numb_pix_lensed_image"][lens] > 10).all()
    assert (key["Einstein_area"][lens] > np.pi).all()
    assert (key["flux_lensed_image_in_sigma"][~lens] == 0).all()
    images = challenge.find_images(tmp_path, "ground")
    cutouts = challenge.read_cutouts(images, key["ID"].tolist(), "ground")
    assert cutouts.size == 101
    for b, band in enumerate("ugri"):
        ratio = np.sqrt(cutouts.variance[:, b, 0, 0]) / challenge_simulation.KIDS[band].sky_noise
        assert 0.7 < np.median(ratio) < 1.5
    # Red galaxies at the centre.
    center = cutouts.image[..., 48:53, 48:53].sum(axis=(2, 3))
    assert (center[:, 3] > 5 * center[:, 1]).mean() > 0.5
    made, catalog = challenge_simulation.simulate_challenge(3, seed=9)
    again, _ = challenge_simulation.simulate_challenge(3, seed=9)
    np.testing.assert_array_equal(made.image, again.image)
    assert catalog["is_lens"].sum() == 1


def test_pairs_of_the_simulated_set() -> None:
    """Each non-lens has a galaxy as bright as that of a lens."""
    cutouts, catalog = challenge_simulation.simulate_challenge(40, seed=4)
    lens = np.asarray(catalog["is_lens"], dtype=bool)
    center = np.log10(np.clip(cutouts.image[:, 3, 44:57, 44:57].sum(axis=(1, 2)), 1.0, None))
    assert np.median(np.abs(center[lens] - center[~lens])) < 0.15
    assert np.corrcoef(center[lens], center[~lens])[0, 1] > 0.8


def test_arcs_on_small_images() -> None:
    """What is cut off where arcs are painted on small images is far below the
    noise, and the signal to noise is that of the large ones.
    """
    rng = np.random.default_rng(1)
    fields = [challenge_simulation._Field.sample(rng) for _ in range(2)]
    lenses, arcs = challenge_simulation._draw_lenses(12, fields, rng)
    large = render_arcs(
        lenses,
        bands=tuple(challenge_simulation.KIDS),
        pixel_scale=0.2,
        size=challenge_simulation.SIZE,
        psf=np.array([fields[number].kernels for number in lenses["field"]]),
    )
    noise = np.array([fields[number].noise for number in lenses["field"]])[..., None, None]
    assert np.abs((arcs - large) / noise).max() < 0.3
    snr = compute_arc_snr(large, np.broadcast_to(noise**2, large.shape)).max(axis=1)
    assert (snr > 0.999 * challenge_simulation.MIN_ARC_SNR).all()


def test_galaxies_in_all_bands() -> None:
    """Galaxies drawn in Fourier space are those that are drawn one by one."""
    galaxies = sample_galaxies(np.random.default_rng(3), (400, 400))
    # Far enough from the edges not to come back at the other side.
    galaxies = galaxies[np.argsort(galaxies.magnitude)[:4]]
    galaxies.x, galaxies.y = np.array([50.0, 38.3, 60.8, 49.6]), np.array([50.0, 61.2, 43.5, 36.9])
    psfs = {band: make_psf(settings.psf_fwhm, 0.05) for band, settings in challenge_simulation.KIDS.items()}
    image = draw_galaxies_in_bands(
        galaxies,
        np.stack([galaxies.compute_fluxes(band) for band in psfs], axis=1),
        np.array([compute_transfer(psf, 144) for psf in psfs.values()]),
        101,
    )
    for drawn, (band, psf) in zip(image, psfs.items(), strict=True):
        expected = np.zeros((101, 101), dtype=np.float32)
        draw_galaxies(expected, galaxies, band, lambda x, y, psf=psf: psf, challenge_simulation.KIDS[band])
        assert np.abs(drawn - expected).max() < 5e-3 * expected.max()


def test_commands(tmp_path: Path) -> None:
    """One command trains, one scores, one judges a file of scores."""
    root = tmp_path / "data"
    catalog = str(make_challenge(root, 60))
    package = tmp_path / "model.safetensors"
    settings = tmp_path / "settings.py"
    settings.write_text(
        "config.network = {'width': 0.125, 'blocks': 1}\n"
        "config.batchSize = 16\nconfig.accelerator = 'cpu'\n"
        "config.inference.device = 'cpu'\nconfig.inference.averageOrientations = 1\n"
    )
    run = CliRunner().invoke
    trained = run(
        challenge_commands.main,
        ["train", str(root), catalog, str(package), "--epochs", "1", "--config-file", str(settings)],
    )
    assert trained.exit_code == 0, trained.output
    assert ModelPackage.read(package).settings.bands == ("u", "g", "r", "i")
    output = tmp_path / "scores.txt"
    options = ["--orientations", "1", "--device", "cpu", "--limit", "20", "--output", str(output)]
    scored = run(challenge_commands.main, ["score", str(root), catalog, str(package), *options])
    assert scored.exit_code == 0, scored.output
    assert "10 lenses, 10 non-lenses, 0 without a score" in scored.output
    judged = run(
        challenge_commands.main, ["judge", catalog, str(output), "--cut", "numb_pix_lensed_image=160"]
    )
    assert judged.exit_code == 0, judged.output
    assert "8 lenses, 10 non-lenses" in judged.output
    next((root / "Public" / "Band1").glob("*00.fits")).unlink()
    torn = run(challenge_commands.main, ["score", str(root), catalog, str(package)])
    assert "1 of 60 objects lack a band" in torn.output
    for band in (root / "Public").iterdir():
        next(band.glob("*00.fits"), band / "none").unlink(missing_ok=True)
    options = ["--orientations", "1", "--device", "cpu"]
    rest = run(challenge_commands.main, ["score", str(root), catalog, str(package), *options])
    assert "29 lenses, 30 non-lenses, 1 without a score" in rest.output
    wrong = run(challenge_commands.main, ["score", str(root), catalog, str(package), "--branch", "space"])
    assert wrong.exit_code == 1
    assert "choose the other one" in wrong.output

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


import io
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch as mock_patch

import numpy as np
import pytest
from astropy.table import Column, Table
from matplotlib.figure import Figure

from lsst.daf.butler import Butler, DatasetType
from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.lenses.lens_finder_task import CANDIDATE_COLUMNS
from lsst.meas.deeplearn.lenses.plots import BACKGROUND, NO_DATA_COLOR, make_color_images, plot_gallery
from lsst.meas.deeplearn.lenses.rank_lens_candidates_task import (
    RankLensCandidatesConnections,
    RankLensCandidatesTask,
)
from lsst.pipe.base import NoWorkFound, Pipeline
from lsst.pipe.base.pipelineIR import ContractError
from lsst.pipe.base.simple_pipeline_executor import SimplePipelineExecutor
from lsst.pipe.base.testUtils import lintConnections, makeQuantum, runTestQuantum
from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d

BANDS = ("g", "r", "i")
PIPELINE = str(Path(__file__).resolve().parents[1] / "pipelines" / "find_lenses.yaml")


def make_candidates(
    ids: Sequence[int],
    scores: Sequence[float],
    *,
    patch: int = 0,
    offsets: Sequence[float] | None = None,
    **columns: object,
) -> Table:
    """Make the candidates of a patch.

    Objects are ``offsets`` arcsec North of a place, by default so far apart
    that those with different IDs never match.
    """
    score = np.asarray(scores, dtype=np.float32)
    values: dict[str, object] = {
        "objectId": ids,
        "score": score,
        "ringfinder_snr": 100 * (1 - score),
        "flag_not_scored": ~np.isfinite(score),
        "coord_ra": 150.0,
        "coord_dec": np.asarray([100.0 * i for i in ids] if offsets is None else offsets, dtype=float) / 3600,
        "tract": 9813,
        "patch": patch,
        "patch_inner": True,
        **columns,
    }
    table = Table()
    for name, (dtype, unit, description) in CANDIDATE_COLUMNS.items():
        table[name] = Column(np.zeros(len(ids), dtype=dtype), unit=unit, description=description)
        table[name][:] = values.get(name, table[name])
    return table


def make_cutouts(ids: Sequence[int], *, size: int = 15) -> Cutouts:
    """Make stamps of noise with a bright pixel in the middle."""
    n, shape = len(ids), (len(ids), 3, size, size)
    image = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    image[:, :, size // 2, size // 2] = 300.0
    return Cutouts(
        bands=BANDS,
        pixel_scale=0.2,
        ids=np.asarray(ids, dtype=np.int64),
        ra=np.full(n, 150.0),
        dec=np.full(n, 2.0),
        x=np.full(n, 100.0),
        y=np.full(n, 200.0),
        image=image,
        variance=np.ones(shape, dtype=np.float32),
        bad=np.zeros(shape, dtype=bool),
        psf=np.ones((n, 3, 5, 5), dtype=np.float32) / 25,
        off_edge=np.zeros(n, dtype=bool),
        missing_band=np.zeros((n, 3), dtype=bool),
        missing_cell=np.zeros((n, 3), dtype=bool),
    )


def run(*tables: Table, cutouts: Sequence[Table] = (), **config: object) -> Table:
    """Rank candidates, and return the table."""
    return make_task(**config).run(list(tables), list(cutouts)).ranked


def make_task(**config: object) -> RankLensCandidatesTask:
    """Make a task with some settings."""
    settings = RankLensCandidatesTask.ConfigClass()
    settings.update(**config)
    return RankLensCandidatesTask(config=settings)


def get_texts(figure: Figure) -> list[str]:
    """Return all that is written in a figure."""
    return [text.get_text() for text in [*figure.texts, *(t for axes in figure.axes for t in axes.texts)]]


def test_connections() -> None:
    """The connections obey the rules of the middleware."""
    lintConnections(RankLensCandidatesConnections)


def test_order() -> None:
    """The highest score is first, ties go by ID, NaN is last, and no column
    gets lost.
    """
    ranked = run(
        make_candidates([5, 9, 7], [0.3, 0.8, np.nan]),
        make_candidates([3, 4, 1], [0.8, np.nan, 0.1], patch=1),
    )
    assert ranked["objectId"].tolist() == [3, 9, 5, 1, 4, 7]
    assert ranked["rank"].tolist() == [1, 2, 3, 4, -1, -1]
    assert ranked["flag_not_scored"].tolist() == [False] * 4 + [True] * 2
    assert ranked.colnames == ["rank", *CANDIDATE_COLUMNS]
    assert all(ranked[name].description for name in ranked.colnames)
    assert str(ranked["coord_ra"].unit) == "deg"


def test_order_of_inputs() -> None:
    """The result does not depend on the order of the patches."""
    rng = np.random.default_rng(7)
    tables = [
        make_candidates(
            rng.permutation(40) + 100 * patch,
            rng.choice([0.1, 0.5, np.nan], 40),
            patch=patch,
            offsets=rng.uniform(0, 60, 40),
        )
        for patch in range(4)
    ]
    ranked = run(*tables)
    again = run(*tables[::-1])
    assert len(ranked) < 160
    for name in ranked.colnames:
        np.testing.assert_array_equal(ranked[name], again[name])


def test_rank_by_ringfinder() -> None:
    """The column to rank by is configured."""
    ranked = run(make_candidates([1, 2], [0.9, 0.2]), rankBy="ringfinder_snr")
    assert ranked["objectId"].tolist() == [2, 1]
    assert "ringfinder_snr" in ranked["rank"].description


def test_limits() -> None:
    """A smallest score and a largest number cut scored objects only, unless
    the others are not wanted.
    """
    table = make_candidates([1, 2, 3, 4], [0.9, 0.5, 0.1, np.nan])
    assert run(table, minScore=0.5)["objectId"].tolist() == [1, 2, 4]
    assert run(table, nRanked=1)["objectId"].tolist() == [1, 4]
    assert run(table, nRanked=2, keepUnscored=False)["objectId"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"score": 0.1}, {"score": np.nan, "flag_not_scored": True}),
        ({"patch_inner": True, "flag_edge": True}, {"patch_inner": False, "score": 0.9}),
        ({"masked_fraction": 0.1}, {"flag_edge": True, "score": 0.9}),
        ({"masked_fraction": 0.0}, {"masked_fraction": 0.1, "score": 0.9}),
        ({"score": 0.9}, {"score": 0.8}),
    ],
    ids=["scored", "inner", "flags", "masked", "score"],
)
@pytest.mark.parametrize("second_id", [10, 20], ids=["same ID", "other ID"])
def test_overlap(first: dict[str, object], second: dict[str, object], second_id: int) -> None:
    """Of two rows of an object the better one is kept, in either order."""
    one = make_candidates([10], [0.5], patch=4, offsets=[0.0], **first)
    two = make_candidates([second_id], [0.5], patch=2, offsets=[0.6], **second)
    for tables in ([one, two], [two, one]):
        ranked = run(*tables)
        assert len(ranked) == 1
        assert ranked["patch"][0] == 4


def test_match_radius() -> None:
    """Objects farther apart than the radius stay two; so do all of different
    ID if it is zero.
    """
    one, near, far = (
        make_candidates([number], [0.5], patch=number, offsets=[offset])
        for number, offset in ((1, 0.0), (2, 0.95), (3, -1.05))
    )
    assert len(run(one, near)) == 1
    assert len(run(one, far)) == 2
    assert len(run(one, near, far, matchRadius=0.0)) == 3
    # At the pole of right ascension.
    near["coord_ra"] += 360.0
    assert len(run(one, near)) == 1


def test_objects_of_one_patch_are_never_merged() -> None:
    """Neighbours in one patch stay two, also if an object of another patch
    is close to both and better; it is the closer one.
    """
    pair = make_candidates([1, 2], [0.5, 0.4], patch=0, offsets=[0.0, 0.9])
    assert run(pair)["objectId"].tolist() == [1, 2]
    between = make_candidates([3], [0.9], patch=1, offsets=[0.6])
    assert run(pair, between)["objectId"].tolist() == [3, 1]
    other_pair = make_candidates([3, 4], [0.9, 0.8], patch=1, offsets=[0.05, 0.85])
    assert run(pair, other_pair)["objectId"].tolist() == [3, 4]
    # Four patches meet at a corner.
    corner = [make_candidates([k], [0.1 * k], patch=k, offsets=[0.1 * k]) for k in range(1, 5)]
    assert run(*corner)["objectId"].tolist() == [4]


def test_missing_coordinates() -> None:
    """Objects without coordinates are kept, each for itself."""
    tables = [make_candidates([k], [np.nan], patch=k, offsets=[np.nan], coord_ra=np.nan) for k in range(2)]
    assert run(*tables)["objectId"].tolist() == [0, 1]


def test_empty_patches() -> None:
    """Empty patches add nothing; if all are, the result is empty and the
    gallery says so; without any table there is no work.
    """
    empty, filled = make_candidates([], []), make_candidates([1], [0.5])
    assert run(empty, filled)["objectId"].tolist() == [1]
    task = make_task()
    result = task.run([empty, empty], [make_cutouts([]).to_table()])
    assert len(result.ranked) == 0
    assert result.ranked.colnames == ["rank", *CANDIDATE_COLUMNS]
    assert "no candidates" in get_texts(result.gallery)
    with pytest.raises(NoWorkFound):
        task.run([])


def test_nothing_scored(caplog: pytest.LogCaptureFixture) -> None:
    """If no object has a score, all are kept, and a warning asks why."""
    with caplog.at_level(logging.WARNING):
        ranked = run(make_candidates([2, 1], [np.nan, np.nan]))
    assert ranked["rank"].tolist() == [-1, -1]
    assert ranked["objectId"].tolist() == [1, 2]
    assert "No object has a score" in caplog.text


def test_different_models(caplog: pytest.LogCaptureFixture) -> None:
    """Scores of different models are ranked together with a warning."""
    with caplog.at_level(logging.WARNING):
        run(
            make_candidates([1], [0.5], model_name="deeplens", model_version="1"),
            make_candidates([2], [0.5], patch=1, model_name="deeplens", model_version="2"),
        )
    assert "deeplens 1, deeplens 2" in caplog.text


def test_gallery(caplog: pytest.LogCaptureFixture) -> None:
    """The gallery shows the best candidates with rank, score, ID and place,
    and takes the more complete of two cutouts.
    """
    candidates = make_candidates([1, 2, 3, 4], [0.25, 0.75, 0.5, np.nan])
    worse, better = make_cutouts([2]), make_cutouts([3, 2, 1])
    worse.bad[:, :, :4] = True
    task = make_task(nGallery=2)
    with mock_patch("lsst.meas.deeplearn.lenses.plots.make_color_images", wraps=make_color_images) as drawn:
        gallery = task.run([candidates], [t.to_table() for t in (worse, make_cutouts([]), better)]).gallery
    shown = drawn.call_args.args[0]
    assert shown.ids.tolist() == [2, 3]
    assert not shown.bad.any()
    texts = get_texts(gallery)
    assert {"1", "2", "0.750", "0.500", "150.00000  +2.00000"} <= set(texts)
    assert any("tract 9813" in text for text in texts)
    assert len(gallery.axes) == 2

    with caplog.at_level(logging.WARNING):
        result = make_task().run([candidates], [make_cutouts([3, 4]).to_table()])
    assert "2 of the best 3 candidates have no cutouts" in caplog.text
    assert len(result.gallery.axes) == 1
    assert "2" in get_texts(result.gallery)  # its rank
    assert "no cutouts of the candidates" in get_texts(make_task().run([candidates]).gallery)


@pytest.mark.parametrize("n", [0, 1, 3, 30])
def test_plot_gallery(n: int) -> None:
    """Any number of candidates fits the page, and pictures do not overlap."""
    cutouts = make_cutouts(range(n))
    figure = plot_gallery(cutouts, scores=np.full(n, np.nan), einstein_radii=np.full(n, 1.25), n_columns=4)
    assert len(figure.axes) == n
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    assert get_texts(figure).count("no score") == n
    assert sum("1.25" in text for text in get_texts(figure)) == n
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert len(buffer.getvalue()) > 1000
    assert figure.get_facecolor()[:3] == pytest.approx(
        [int(BACKGROUND[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    )


def test_plot_gallery_refusals() -> None:
    """Arrays of a wrong length and no columns are refused."""
    with pytest.raises(ValueError, match="2 cutouts but 1 scores"):
        plot_gallery(make_cutouts([1, 2]), scores=[0.5])
    with pytest.raises(ValueError, match="at least one column"):
        plot_gallery(None, n_columns=0)


def test_color_images() -> None:
    """Bad pixels have a colour of their own, colours are those of the bands,
    and an object without one of the bands is grey.
    """
    cutouts = make_cutouts(range(5))
    cutouts.image[0, 2, 7, 7] = 3000.0  # red
    cutouts.image[1, 0, 7, 7] = 3000.0  # blue
    cutouts.image[0, 1, 2, 3] = np.nan
    cutouts.bad[2, 0] = cutouts.missing_band[2, 0] = True
    cutouts.image[2, 0] = np.nan
    cutouts.bad[3] = True
    cutouts.image[4] = 1e30
    images = make_color_images(cutouts)
    assert images.dtype == np.uint8
    assert images.shape == (5, 15, 15, 3)
    assert images[0, 2, 3].tolist() == list(NO_DATA_COLOR)
    assert images[0, 7, 7].argmax() == 0
    assert images[1, 7, 7].argmax() == 2
    assert (np.ptp(images[2], axis=-1) == 0).all()
    assert images[2, 7, 7, 0] > 100
    assert (images[3] == NO_DATA_COLOR).all()
    # The sky is dark, in a grey or colours of the noise.
    assert np.median(images[0]) < 60
    assert (make_color_images(cutouts, ("z", "y", "u")) == NO_DATA_COLOR).all()
    assert (np.ptp(make_color_images(cutouts, ("z", "r", "g"))[1], axis=-1) == 0).all()


def make_butler(root: Path) -> Butler:
    """Make a repository with the dimensions of a tract of two patches."""
    butler = Butler.from_config(Butler.makeRepo(str(root)), writeable=True, run="test")
    corners = [LonLat.fromDegrees(ra, dec) for ra, dec in ((0, 0), (1, 0), (1, 1), (0, 1))]
    region = ConvexPolygon([UnitVector3d(corner) for corner in corners])
    sync = butler.registry.syncDimensionData
    sync("skymap", {"name": "sky", "hash": b"", "tract_max": 1, "patch_nx_max": 2, "patch_ny_max": 1})
    sync("tract", {"skymap": "sky", "id": 0, "region": region})
    for patch in range(2):
        sync(
            "patch",
            {"skymap": "sky", "tract": 0, "id": patch, "cell_x": patch, "cell_y": 0, "region": region},
        )
    connections = RankLensCandidatesConnections(config=RankLensCandidatesTask.ConfigClass())
    for connection in (connections.candidates, connections.cutouts, connections.ranked, connections.gallery):
        butler.registry.registerDatasetType(
            DatasetType(
                connection.name, connection.dimensions, connection.storageClass, universe=butler.dimensions
            )
        )
    return butler


def test_quantum(tmp_path: Path) -> None:
    """The task reads from and writes to a repository, where patches may be
    empty and cutouts may be missing.
    """
    butler = make_butler(tmp_path / "repo")
    tract = {"skymap": "sky", "tract": 0}
    patches = [{**tract, "patch": patch} for patch in range(2)]
    butler.put(make_candidates([1, 2], [0.5, np.nan]), "lens_candidates", patches[0])
    butler.put(make_candidates([], []), "lens_candidates", patches[1])
    butler.put(make_cutouts([1]).to_table(), "lens_cutouts", patches[0])
    butler.put(make_cutouts([]).to_table(), "lens_cutouts", patches[1])
    task = make_task()
    data_ids = {"candidates": patches, "cutouts": patches, "ranked": tract, "gallery": tract}
    runTestQuantum(task, butler, makeQuantum(task, butler, tract, data_ids), mockRun=False)
    ranked = butler.get("lens_candidates_ranked", tract)
    assert ranked["objectId"].tolist() == [1, 2]
    assert ranked["rank"].tolist() == [1, -1]
    assert ranked["rank"].description.startswith("Rank by score")
    with butler.getURI("lens_gallery", tract).open("rb") as file:
        assert file.read(4) == b"\x89PNG"


def test_graph_without_cutouts(tmp_path: Path) -> None:
    """A repository without any cutouts still gives a ranked table."""
    make_butler(tmp_path / "repo").put(
        make_candidates([1], [0.5]), "lens_candidates", {"skymap": "sky", "tract": 0, "patch": 0}
    )
    butler = SimplePipelineExecutor.prep_butler(str(tmp_path / "repo"), inputs=["test"], output="out")
    executor = SimplePipelineExecutor.from_task_class(RankLensCandidatesTask, butler=butler)
    executor.run(register_dataset_types=True)
    ranked = butler.get("lens_candidates_ranked", {"skymap": "sky", "tract": 0})
    assert ranked["rank"].tolist() == [1]


def test_pipeline_contract() -> None:
    """Renaming the output of one task only is refused."""
    pipeline = Pipeline.from_uri(PIPELINE)
    assert set(pipeline.task_labels) == {"lensFinder", "rankLensCandidates"}
    pipeline.addConfigOverride("lensFinder", "connections.outputName", "other")
    with pytest.raises(ContractError, match="outputName"):
        pipeline.to_graph()
    pipeline.addConfigOverride("rankLensCandidates", "connections.outputName", "other")
    names = {name for name, _ in pipeline.to_graph().iter_overall_inputs()}
    assert not any(name.startswith("other") for name in names)


def test_import_is_light() -> None:
    """Importing the task loads neither torch nor matplotlib."""
    code = (
        "import sys, lsst.meas.deeplearn.lenses.rank_lens_candidates_task, lsst.meas.deeplearn.lenses.plots;"
        "sys.exit({'torch', 'matplotlib'} & set(sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip() == ""

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

"""Tests of the comparison of candidates with injected lenses."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.table import Table

from lsst.meas.deeplearn.lenses.truth import count_recovered, describe_recovery, match_truth


@pytest.fixture
def truth() -> Table:
    """Return four lenses, one of them listed in two patches, one small."""
    return Table(
        {
            "lens_id": [1, 2, 3, 3, 4],
            "ra": [10.0, 10.01, 10.02, 10.02, 10.03],
            "dec": [0.0, 0.0, 0.0, 0.0, 0.0],
            "einstein_radius": [1.5, 1.2, 2.0, 2.0, 0.5],
        }
    )


@pytest.fixture
def candidates() -> Table:
    """Return 100 candidates in two patches, lenses 1 and 3 among them."""
    n = 100
    table = Table({"coord_ra": 11 + 0.01 * np.arange(n), "coord_dec": np.zeros(n)})
    table["patch"] = np.repeat([0, 1], n // 2)
    table["score"] = np.linspace(0.5, 0.1, n)
    table["ringfinder_snr"] = np.linspace(0.1, 0.5, n)
    table["coord_ra"][0], table["coord_ra"][60] = 10.0001, 10.02
    return table


def test_match_within_radius(candidates: Table, truth: Table) -> None:
    """Candidates match the nearest lens within the radius, others none."""
    lens = match_truth(candidates, truth)
    assert truth["lens_id"][lens[[0, 60]]].tolist() == [1, 3]
    assert (lens >= 0).sum() == 2
    assert (match_truth(candidates, truth, radius=0.1)[0]) == -1
    assert (match_truth(candidates, truth[:0]) == -1).all()
    assert len(match_truth(candidates[:0], truth)) == 0


def test_count_recovered(candidates: Table, truth: Table) -> None:
    """Lenses count once, above the radius, and by the rank in their patch."""
    counts = count_recovered(candidates, truth, n_first=10)
    assert (counts.n_lenses, counts.n_selected) == (3, 2)
    # Lens 3 is the 11th of its patch by score, and the 40th by RingFinder.
    assert counts.n_recovered == {"score": 1, "ringfinder_snr": 0}
    assert counts.n_chance == pytest.approx(2 * 10 / 50)
    assert count_recovered(candidates, truth, n_first=11).n_recovered["score"] == 2


def test_unscored_candidates_do_not_count(candidates: Table, truth: Table) -> None:
    """A lens without a score is not recovered."""
    candidates["score"][0] = np.nan
    assert count_recovered(candidates, truth, n_first=50).n_recovered["score"] == 1


def test_description(candidates: Table, truth: Table) -> None:
    """The text names the lenses among the best, and only what has run."""
    candidates["rank"] = np.arange(len(candidates)) + 1
    candidates["objectId"] = np.arange(len(candidates))
    candidates["coord_dec"][:] = 0.0
    candidates["ringfinder_snr"][:] = np.nan
    text = describe_recovery(candidates, truth, n_best=3)
    assert text.count("lens, Einstein radius 1.50") == 1
    assert text.count("not a lens") == 2
    assert "by DeepLens" in text
    assert "RingFinder" not in text

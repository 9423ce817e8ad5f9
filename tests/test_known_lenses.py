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

"""Tests of the look-up of known lenses."""

import sys
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table

from lsst.meas.deeplearn.lenses.fuse_lens_votes_task import FuseLensVotesTask
from lsst.meas.deeplearn.lenses.known_lenses import flag_known_lenses, read_known_lenses

CATALOG = (
    "name,RA [deg],DEC [deg],zlens,type,grading,ref\n"
    "J1,150.0,2.0,-,galaxy,confident,x\nJ2,0.0001,-10,0.3,galaxy,probable,x\nJ3,,,-,galaxy,probable,x\n"
)


def make_lenscat(folder: Path) -> None:
    """Make a package lenscat that must not be imported."""
    (folder / "lenscat" / "data").mkdir(parents=True)
    (folder / "lenscat" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "lenscat" / "data" / "catalog.csv").write_text(CATALOG)


def make_candidates() -> Table:
    """Make candidates of which the first two are known."""
    return Table(
        {
            "objectId": [1, 2, 3, 4],
            "coord_ra": [150.0, 359.9999, 150.0, np.nan],
            "coord_dec": [2.0 + 2 / 3600, -10.0, 2.0 + 4 / 3600, 2.0],
        }
    )


def test_lenscat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of lenscat is found without importing the package."""
    monkeypatch.delitem(sys.modules, "lenscat", raising=False)
    make_lenscat(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    catalog = read_known_lenses()
    assert catalog["name"].tolist() == ["J1", "J2"]
    candidates = make_candidates()
    flag_known_lenses(candidates, catalog)
    assert candidates["known_lens"].tolist() == ["J1 (confident)", "J2 (probable)", "", ""]
    flag_known_lenses(candidates, catalog[:0])
    assert candidates["known_lens"].tolist() == [""] * 4


def test_real_lenscat() -> None:
    """The real catalogue can be read, where it is installed."""
    try:
        catalog = read_known_lenses()
    except ImportError:
        pytest.skip("There is no lenscat.")
    assert len(catalog) > 30000


def test_without_lenscat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the message tells the cure."""
    monkeypatch.setattr("importlib.util.find_spec", {}.get)
    with pytest.raises(ImportError, match="pip install --no-deps lenscat"):
        read_known_lenses()


def test_in_the_fusion(tmp_path: Path) -> None:
    """The fused table tells which candidates are known."""
    path = tmp_path / "known.csv"
    path.write_text("name,ra,dec\nQ,150,2\n")
    config = FuseLensVotesTask.ConfigClass()
    config.doFlagKnownLenses = True
    config.knownLenses = str(path)
    fused = FuseLensVotesTask(config=config).run(make_candidates()).fused
    assert fused["known_lens"].tolist() == ["Q", "", "", ""]
    path.write_text("name,x\nQ,150\n")
    with pytest.raises(ValueError, match="no columns ra, dec"):
        read_known_lenses(path)

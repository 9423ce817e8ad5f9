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

"""Which candidates are known as lenses already."""

from __future__ import annotations

__all__ = ("MATCH_RADIUS", "flag_known_lenses", "read_known_lenses")

import importlib.util
from pathlib import Path

import astropy.units as u
import numpy as np
from astropy.coordinates import SkyCoord
from astropy.table import Column, Table

MATCH_RADIUS = 3.0
"""Largest distance in arcsec between a candidate and a known lens: some
catalogues give the lens galaxy, others the middle of the images."""

_COORDINATES = {"RA [deg]": "ra", "DEC [deg]": "dec"}


def read_known_lenses(path: Path | str | None = None) -> Table:
    """Read a catalogue of known lenses.

    Parameters
    ----------
    path
        Table with ``name``, ``ra`` and ``dec`` in degrees and perhaps
        ``grading``, in any format that astropy tells by the file name.  By
        default the catalogue of the package lenscat (Vujeva et al. 2024,
        arXiv:2406.04398) is read, which is not imported: that would need
        its many dependencies, of no use here.

    Returns
    -------
    catalog
        Table with ``name``, ``ra``, ``dec`` and ``grading``; rows without
        coordinates are left out.

    Raises
    ------
    ImportError
        Raised if the package is not there.
    ValueError
        Raised if the table lacks columns.
    """
    if path is None:
        spec = importlib.util.find_spec("lenscat")
        if spec is None or spec.origin is None:
            raise ImportError(
                "Known lenses come from the optional package 'lenscat': 'pip install "
                "meas-deeplearn[known-lenses]' or, as only its table is needed, 'pip install --no-deps "
                "lenscat'."
            )
        path = Path(spec.origin).parent / "data" / "catalog.csv"
    table = Table.read(path)
    for old, new in _COORDINATES.items():
        if old in table.colnames:
            table.rename_column(old, new)
    if missing := [name for name in ("name", "ra", "dec") if name not in table.colnames]:
        raise ValueError(f"{path} has no columns {', '.join(missing)}; it has {', '.join(table.colnames)}.")
    if "grading" not in table.colnames:
        table["grading"] = ""
    ra, dec = (np.ma.filled(np.ma.asarray(table[name], dtype=float), np.nan) for name in ("ra", "dec"))
    return table["name", "ra", "dec", "grading"][np.isfinite(ra) & np.isfinite(dec)]


def flag_known_lenses(candidates: Table, catalog: Table, *, radius: float = MATCH_RADIUS) -> None:
    """Add the column ``known_lens`` to a table of candidates.

    Parameters
    ----------
    candidates
        Table with ``coord_ra`` and ``coord_dec`` in degrees.  The column is
        the name and grading of the nearest known lens, or empty.
    catalog
        What `read_known_lenses` returned.
    radius
        Largest distance in arcsec.
    """
    names = np.zeros(len(candidates), dtype="U96")
    ra, dec = (np.asarray(candidates[name], dtype=np.float64) for name in ("coord_ra", "coord_dec"))
    rows = np.flatnonzero(np.isfinite(ra) & np.isfinite(dec))
    if len(rows) and len(catalog):
        known = SkyCoord(
            np.asarray(catalog["ra"], dtype=float), np.asarray(catalog["dec"], dtype=float), unit=u.deg
        )
        index, distance, _ = SkyCoord(ra[rows], dec[rows], unit=u.deg).match_to_catalog_sky(known)
        near = distance.arcsec <= radius
        for row, lens in zip(rows[near], catalog[index[near]], strict=True):
            names[row] = f"{lens['name']} ({lens['grading']})" if lens["grading"] else str(lens["name"])
    candidates["known_lens"] = Column(
        names,
        description=f"Name and grading of a known lens within {radius:g} arcsec; empty if there is none",
    )

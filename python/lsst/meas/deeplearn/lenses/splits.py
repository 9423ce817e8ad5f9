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

"""Which examples are for training, and which to measure."""

from __future__ import annotations

__all__ = ("SPLITS", "SPLIT_DTYPE", "choose_split", "compute_split")

import numpy as np

from ..patch_inputs import compute_seed

SPLITS = ("train", "validation", "calibration", "test")
"""Values of the column ``split``: to train, to choose epochs and settings, to
turn scores into probabilities, and to measure."""

SPLIT_DTYPE = "U11"
"""Type of that column."""


def compute_split(
    ra: np.ndarray,
    dec: np.ndarray,
    *,
    validation: float,
    calibration: float,
    test: float,
    block_size: float = 60.0,
) -> np.ndarray:
    """Return which of `SPLITS` positions belong to.

    Whole blocks of sky go into one split, so that a galaxy, its stamps in
    overlapping patches, and its neighbours do not leak from one into another
    but at the borders of blocks.

    Parameters
    ----------
    ra, dec
        ICRS coordinates in degrees.
    validation, calibration, test
        Fractions of the sky; the rest is for training.
    block_size
        Side of the blocks in arcsec.
    """
    row = np.floor(dec * 3600 / block_size).astype(np.int64)
    shrink = np.cos(np.radians((row + 0.5) * block_size / 3600))
    column = np.floor(ra * shrink * 3600 / block_size).astype(np.int64)
    blocks, inverse = np.unique(np.stack([row, column], axis=1), axis=0, return_inverse=True)
    place = np.array([compute_seed("split", *block) / 2**62 for block in blocks.tolist()])
    split = choose_split(place, validation=validation, calibration=calibration, test=test)
    return np.asarray(split[inverse.ravel()])


def choose_split(place: np.ndarray, *, validation: float, calibration: float, test: float) -> np.ndarray:
    """Return the split of numbers from 0 to 1.

    Parameters
    ----------
    place
        Numbers that are uniform from 0 to 1, shape ``(N,)``.
    validation, calibration, test
        Fractions; the rest is for training.
    """
    names = np.array(["test", "validation", "calibration", "train"], dtype=SPLIT_DTYPE)
    limits = np.cumsum([test, validation, calibration])
    return np.asarray(names[np.searchsorted(limits, place, side="right")])

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


"""Examples of lenses and non-lenses as arrays to train on."""

from __future__ import annotations

__all__ = ("TrainingSet", "TrainingSetError", "stretch")

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from astropy.table import Table

from ..cutouts import Cutouts
from ..model_package import SCALE_TOLERANCE, ModelSettings
from ..preprocessing import Preprocessing
from .simulate_lenses_task import EXAMPLE_COLUMNS, SPLITS

LARGEST = float(np.finfo(np.float16).max)
"""Largest absolute pixel of a training set, in units of the noise."""


class TrainingSetError(ValueError):
    """Raised for examples that cannot be trained on."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingSet:
    """Examples as arrays, with what is known of each."""

    image: np.ndarray
    """Pixels in units of the noise, not stretched, shape ``(N, B, y, x)``.
    They are float16, which makes room for twice as many examples and costs
    less than a thousandth of a flux; `LARGEST` is the largest of them."""

    label: np.ndarray
    """Whether there are lensed arcs, bool, shape ``(N,)``."""

    kind: np.ndarray
    """``lens``, or the kind of non-lens, shape ``(N,)``."""

    split: np.ndarray
    """One of `SPLITS`, shape ``(N,)``."""

    host_id: np.ndarray
    """Object ID of the galaxy, shape ``(N,)``."""

    ra: np.ndarray
    """ICRS right ascension of the galaxy in degrees, shape ``(N,)``; IDs may
    repeat from one sky map to another."""

    einstein_radius: np.ndarray
    """In arcsec; NaN without lens, shape ``(N,)``."""

    arc_snr: np.ndarray
    """Signal to noise of the arcs; NaN without lens, shape ``(N,)``."""

    seed: np.ndarray
    """Seed of the simulation, shape ``(N,)``."""

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: np.ndarray | slice) -> TrainingSet:
        """Return some of the examples."""
        names = [field.name for field in dataclasses.fields(self)]
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in names})

    def select(self, split: str) -> TrainingSet:
        """Return the examples of a split, without copying their pixels.

        Parameters
        ----------
        split
            One of `SPLITS`; examples must be in the order of `from_tables`.
        """
        return self[np.searchsorted(self.split, split) : np.searchsorted(self.split, split, side="right")]

    @classmethod
    def concatenate(cls, parts: list[TrainingSet]) -> TrainingSet:
        """Join several sets.

        Parameters
        ----------
        parts
            The sets.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    @classmethod
    def from_tables(cls, tables: Iterable[Table], settings: ModelSettings, margin: int) -> TrainingSet:
        """Make from all tables of `SimulateLensesTask`, ordered by split.

        Without examples for the calibration, half of the galaxies of the
        validation are for that.

        Parameters
        ----------
        tables
            The tables; one is held in memory at a time.
        settings
            What the network expects.
        margin
            Pixels to keep around the stamp of the network.

        Raises
        ------
        TrainingSetError
            Raised as by `from_table`, or if a split other than that for the
            calibration lacks lenses or non-lenses.
        """
        parts = [cls.from_table(table, settings, margin) for table in tables]
        if not parts:
            raise TrainingSetError("The training set is empty.")
        data = cls.concatenate(parts)
        del parts
        if not (data.split == "calibration").any():
            hosts = np.unique(data.host_id[data.split == "validation"])
            moved = (data.split == "validation") & np.isin(data.host_id, hosts[::2])
            data = dataclasses.replace(data, split=np.where(moved, "calibration", data.split))
        data = data[np.argsort(data.split, kind="stable")]
        for split in SPLITS:
            labels = data.select(split).label
            if split != "calibration" and (labels.all() or not labels.any()):
                raise TrainingSetError(
                    f"The {split} examples are {labels.sum()} lenses and {(~labels).sum()} non-lenses; both "
                    "are needed.  Add patches, or change the fractions of SimulateLensesTask."
                )
        return data

    @classmethod
    def from_table(cls, table: Table, settings: ModelSettings, margin: int) -> TrainingSet:
        """Make from a table of `SimulateLensesTask`.

        Parameters
        ----------
        table
            The table.
        settings
            What the network expects.
        margin
            Pixels to keep around the stamp of the network.

        Raises
        ------
        TrainingSetError
            Raised if the stamps lack bands, are too small, or have other
            pixels, or if some of their values are not finite.
        """
        if missing := {name for name, _, _ in EXAMPLE_COLUMNS} - set(table.colnames):
            raise TrainingSetError(f"The training set has no columns {sorted(missing)}.")
        try:
            cutouts = Cutouts.from_table(table).select_bands(settings.bands)
        except ValueError as err:
            raise TrainingSetError(str(err)) from err
        if abs(cutouts.pixel_scale / settings.pixel_scale - 1) > SCALE_TOLERANCE:
            raise TrainingSetError(
                f"The stamps have pixels of {cutouts.pixel_scale:.3f} arcsec; set pixelScale, which is "
                f"{settings.pixel_scale:.3f}, to that."
            )
        size = settings.stamp_size + 2 * margin
        if cutouts.size < size:
            raise TrainingSetError(
                f"The stamps have {cutouts.size} pixels on a side; {settings.stamp_size} and shifts of "
                f"{margin} need {size}.  Set stampSize of SimulateLensesTask, or maxShift."
            )
        linear = dataclasses.replace(settings.preprocessing, clip=math.inf, softening=None)
        crop = slice((cutouts.size - size) // 2, (cutouts.size - size) // 2 + size)
        image = linear.apply(cutouts)[..., crop, crop]
        if spoilt := int((~np.isfinite(image)).any(axis=(1, 2, 3)).sum()):
            raise TrainingSetError(f"{spoilt} stamps have good pixels that are not finite.")
        return cls(
            image=image.clip(-LARGEST, LARGEST).astype(np.float16),
            label=np.asarray(table["label"], dtype=bool),
            kind=np.asarray(table["kind"], dtype=str),
            split=np.asarray(table["split"], dtype=str),
            host_id=np.asarray(table["host_id"]),
            ra=cutouts.ra,
            einstein_radius=np.asarray(table["einstein_radius"]),
            arc_snr=np.asarray(table["arc_snr"]),
            seed=np.asarray(table["seed"]),
        )

    def describe(self) -> dict[str, Any]:
        """Return counts and seeds, as types that JSON has."""
        counts = {
            split: {
                str(kind): int(((self.split == split) & (self.kind == kind)).sum())
                for kind in np.unique(self.kind)
            }
            for split in SPLITS
        }
        galaxies: dict[str, set[tuple[int, float]]] = {split: set() for split in SPLITS}
        for split, host, ra in zip(self.split.tolist(), self.host_id.tolist(), self.ra.tolist(), strict=True):
            galaxies[split].add((host, ra))
        hosts = {split: len(galaxies[split]) for split in SPLITS}
        return {"counts": counts, "distinct_galaxies": hosts, "seeds": [int(s) for s in np.unique(self.seed)]}


def stretch(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Clip and stretch pixels that are in units of the noise.

    Parameters
    ----------
    images
        Pixels, shape ``(N, B, y, x)``.
    preprocessing
        Scaling of the model.

    Returns
    -------
    inputs
        Inputs of the network, float32, of the same shape.
    """
    scaling = dataclasses.replace(preprocessing, noise=(1.0,) * images.shape[1], mean=None)
    return scaling.scale(images, variance=images, bad=np.zeros(images.shape, dtype=bool))

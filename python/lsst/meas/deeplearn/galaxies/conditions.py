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


"""What a galaxy model is conditioned on, and where it has seen examples."""

from __future__ import annotations

__all__ = ("ARCHITECTURE", "CONDITION_NAMES", "ConditionError", "ConditionSpace", "check_galaxy_model")

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.spatial import ConvexHull

from ..model_package import ModelPackage, ModelPackageError

ARCHITECTURE = "Cvae"
"""Key in `ARCHITECTURES` of the network that has these conditions."""

CONDITION_NAMES = ("half_light_radius", "magnitude", "redshift")
"""Half-light radius in arcsec, AB magnitude and redshift, in this order."""

TOLERANCE = 1e-4
"""How far outside the hull counts as inside, in scaled conditions."""


class ConditionError(ValueError):
    """Raised for conditions of which a model has seen no examples."""


@dataclasses.dataclass(frozen=True)
class ConditionSpace:
    """The scaling of conditions, and the hull of those in a training set.

    Conditions are scaled as log radius, magnitude and log (1 + redshift),
    less their mean, over their standard deviation.  The hull is the convex
    hull of the scaled conditions.
    """

    mean: tuple[float, ...]
    """Mean of each condition."""

    scale: tuple[float, ...]
    """Standard deviation of each condition."""

    hull: tuple[tuple[float, ...], ...]
    """Half-spaces: scaled conditions c are inside if
    ``c @ h[:3] + h[3] <= 0`` for each; none means that all are."""

    @classmethod
    def fit(cls, conditions: np.ndarray) -> ConditionSpace:
        """Make for a training set.

        Parameters
        ----------
        conditions
            In the order of `CONDITION_NAMES`, shape ``(N, 3)``.

        Raises
        ------
        ConditionError
            Raised if conditions are impossible, or do not span a volume.
        """
        transformed = _transform(_check(conditions))
        mean, scale = transformed.mean(axis=0), transformed.std(axis=0)
        if len(conditions) < 5 or not (scale > 1e-9).all():
            raise ConditionError(
                "The training set needs at least five galaxies, of different half-light radii, magnitudes "
                "and redshifts."
            )
        equations = ConvexHull((transformed - mean) / scale).equations
        # Facets of four points in a plane come as two triangles.
        unique = np.unique(equations.round(6), axis=0)
        return cls(tuple(mean.tolist()), tuple(scale.tolist()), tuple(map(tuple, unique.tolist())))

    def to_settings(self) -> dict[str, Any]:
        """Return what `from_settings` takes, in types that JSON has."""
        return {
            "mean": list(self.mean),
            "scale": list(self.scale),
            "hull": [list(plane) for plane in self.hull],
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ConditionSpace:
        """Make from what `to_settings` returns.

        Parameters
        ----------
        settings
            The settings.
        """
        return cls(
            mean=tuple(settings["mean"]),
            scale=tuple(settings["scale"]),
            hull=tuple(tuple(plane) for plane in settings["hull"]),
        )

    def to_scaled(self, conditions: np.ndarray) -> np.ndarray:
        """Return scaled conditions.

        Parameters
        ----------
        conditions
            In the order of `CONDITION_NAMES`, shape ``(N, 3)``.

        Raises
        ------
        ConditionError
            Raised if conditions are not finite, a radius is not positive, or
            a redshift negative.
        """
        return (_transform(_check(conditions)) - np.array(self.mean)) / np.array(self.scale)

    def from_scaled(self, scaled: np.ndarray) -> np.ndarray:
        """Return the conditions that `to_scaled` would scale.

        Parameters
        ----------
        scaled
            Scaled conditions, shape ``(N, 3)``.
        """
        radius, magnitude, redshift = (scaled * np.array(self.scale) + np.array(self.mean)).T
        return np.column_stack([10**radius, magnitude, 10**redshift - 1])

    def is_inside(self, conditions: np.ndarray) -> np.ndarray:
        """Return whether conditions are in the hull of the training set.

        Impossible conditions are outside.

        Parameters
        ----------
        conditions
            In the order of `CONDITION_NAMES`, shape ``(N, 3)``.
        """
        possible = _is_possible(conditions)
        inside = np.zeros(len(conditions), dtype=bool)
        inside[possible] = self._compute_excess(self.to_scaled(conditions[possible])) <= TOLERANCE
        return inside

    def clip(self, conditions: np.ndarray) -> np.ndarray:
        """Return conditions with those outside the hull moved onto it.

        They are moved towards the mean of the training set, in scaled
        conditions.

        Parameters
        ----------
        conditions
            In the order of `CONDITION_NAMES`, shape ``(N, 3)``.

        Raises
        ------
        ConditionError
            Raised as by `to_scaled`; what is impossible has no nearest
            example.
        """
        conditions = np.asarray(conditions, dtype=np.float64)
        outside = ~self.is_inside(conditions)
        scaled = self.to_scaled(conditions)
        if self.hull:
            planes = np.array(self.hull)
            # The mean is inside, so that all offsets are negative.
            factor = 1 / np.maximum((scaled @ planes[:, :3].T / -planes[:, 3]).max(axis=1), 1.0)
            scaled = scaled * factor[:, None]
        return np.where(outside[:, None], self.from_scaled(scaled), conditions)

    def _compute_excess(self, scaled: np.ndarray) -> np.ndarray:
        """Return the distance outside the farthest half-space."""
        if not self.hull:
            return np.full(len(scaled), -np.inf)
        planes = np.array(self.hull)
        excess: np.ndarray = (scaled @ planes[:, :3].T + planes[:, 3]).max(axis=1)
        return excess


def _transform(conditions: np.ndarray) -> np.ndarray:
    radius, magnitude, redshift = conditions.T
    return np.column_stack([np.log10(radius), magnitude, np.log10(1 + redshift)])


def _is_possible(conditions: np.ndarray) -> np.ndarray:
    possible: np.ndarray = (
        np.isfinite(conditions).all(axis=1) & (conditions[:, 0] > 0) & (conditions[:, 2] >= 0)
    )
    return possible


def _check(conditions: np.ndarray) -> np.ndarray:
    conditions = np.asarray(conditions, dtype=np.float64)
    if not (good := _is_possible(conditions)).all():
        row = int(np.flatnonzero(~good)[0])
        values = ", ".join(
            f"{name} {value:g}" for name, value in zip(CONDITION_NAMES, conditions[row], strict=True)
        )
        raise ConditionError(
            f"{(~good).sum()} galaxies have conditions that no galaxy has, the first in row {row}: {values}."
        )
    return conditions


def check_galaxy_model(package: ModelPackage) -> None:
    """Check that a model package is a galaxy model.

    Parameters
    ----------
    package
        The package.

    Raises
    ------
    ModelPackageError
        Raised if it is a model of another kind.
    """
    if package.architecture != ARCHITECTURE:
        raise ModelPackageError(
            f"Model {package.name} {package.version} is a {package.architecture}, not a galaxy model; train "
            "one with pipelines/train_galaxies.yaml."
        )

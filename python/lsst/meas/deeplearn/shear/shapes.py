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

"""Shapes of galaxies as shear estimators return them."""

from __future__ import annotations

__all__ = ("N_MOMENTS", "STEPS", "Shapes")

import dataclasses

import numpy as np

STEPS = ("ns", "1p", "1m", "2p", "2m")
"""Versions of an image, as ``metaStep`` in LSST's metadetection: no shear,
and g1 and g2 one step up and down.
"""

N_MOMENTS = 28
"""Number of moments from which metacalibration computes shapes."""


@dataclasses.dataclass(eq=False)
class Shapes:
    """Shapes of N stamps, each as it is and under four artificial shears.

    An estimator must measure every version of a stamp in the same way; then
    the mean ellipticity of the selected, weighted objects of each version
    tells the response to shear of everything that was done.
    """

    step: float
    """Size of the artificial shear."""

    e: np.ndarray
    """Ellipticity, of any normalisation, float64, shape ``(N, 5, 2)``; NaN
    where ``bad``."""

    snr: np.ndarray
    """Signal to noise of the flux, shape ``(N, 5)``; infinite if the stamps
    have no noise."""

    size: np.ndarray
    """Area of the object over that of a star, shape ``(N, 5)``; NaN where it
    has no flux."""

    weight: np.ndarray
    """Weight in means, shape ``(N, 5)``; 0 where ``bad``."""

    bad: np.ndarray
    """Whether the measurement failed, bool, shape ``(N,)``."""

    def __len__(self) -> int:
        return len(self.bad)

    def select(
        self,
        *,
        snr: tuple[float, float] = (-np.inf, np.inf),
        size: tuple[float, float] = (-np.inf, np.inf),
        respond: bool = True,
    ) -> np.ndarray:
        """Return which versions of which objects pass cuts.

        Parameters
        ----------
        snr
            Lower limit, which passes, and upper limit, which does not, of
            the signal to noise.
        size
            Limits of the size.
        respond
            Whether each version is cut on its own measurements.  If not, all
            are cut on those without shear, which leaves the response of the
            selection out: wrong, and good for seeing how much it matters.

        Returns
        -------
        selected
            Bool, shape ``(N, 5)``; never where ``bad``.
        """
        selected = ~self.bad[:, None] & _is_between(self.snr, snr)
        if size != (-np.inf, np.inf):
            selected &= _is_between(self.size, size)
        return selected if respond else np.repeat(selected[:, :1], len(STEPS), axis=1)

    @classmethod
    def concatenate(cls, parts: list[Shapes]) -> Shapes:
        """Join shapes that were measured with the same step.

        Parameters
        ----------
        parts
            Shapes, at least one part.

        Raises
        ------
        ValueError
            Raised if there are none, or if the steps differ.
        """
        if len({part.step for part in parts}) != 1:
            raise ValueError("Only shapes that were measured with the same step can be joined.")
        names = ("e", "snr", "size", "weight", "bad")
        return cls(
            parts[0].step, **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        )


def _is_between(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Return whether values are in a range; infinite ones pass no limit."""
    with np.errstate(invalid="ignore"):
        return (values >= limits[0]) & ((values < limits[1]) | (limits[1] == np.inf))

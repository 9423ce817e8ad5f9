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

"""The pixel scaling of a model, the same in training and in use."""

from __future__ import annotations

__all__ = ("Preprocessing",)

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .cutouts import Cutouts


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Scaling of pixels in nJy to the inputs of a network.

    Each band is divided by its noise, clipped, and stretched; bad pixels
    become 0.
    """

    noise: str | tuple[float, ...] = "variance"
    """``"variance"`` for the square root of the median variance of the good
    pixels of each stamp and band, or a constant for each band in nJy, as
    Lanusse et al. (2018) take it from the training set."""

    mean: tuple[float, ...] | None = None
    """Value in nJy of each band to subtract first (Lanusse et al. 2018), or
    `None`."""

    clip: float = 250.0
    """Largest absolute value, in units of the noise (Lanusse et al. 2018)."""

    softening: float | None = None
    """Scale in units of the noise of an inverse hyperbolic sine stretch, or
    `None` for a linear one."""

    def __post_init__(self) -> None:
        if isinstance(self.noise, str) and self.noise != "variance":
            raise ValueError(f"The noise is 'variance' or a value for each band, not {self.noise!r}.")
        if not isinstance(self.noise, str) and not all(value > 0 for value in self.noise):
            raise ValueError(f"The noise must be positive in all bands; it is {self.noise}.")
        if not self.clip > 0:
            raise ValueError(f"The clip must be positive; it is {self.clip}.")
        if self.softening is not None and not self.softening > 0:
            raise ValueError(f"The softening must be positive or None; it is {self.softening}.")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Preprocessing:
        """Make from a mapping as `to_settings` returns it.

        Parameters
        ----------
        settings
            Values by name; those left out have their defaults.

        Raises
        ------
        ValueError
            Raised for a setting that does not exist here, or a value that
            makes no sense.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(settings) - names:
            raise ValueError(f"Unknown preprocessing settings {sorted(unknown)}; there are {sorted(names)}.")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
        }
        return cls(**values)

    def to_settings(self) -> dict[str, Any]:
        """Return the settings as types that JSON has."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    def check_bands(self, n_bands: int) -> None:
        """Check that there is a value for each band.

        Parameters
        ----------
        n_bands
            Number of bands.

        Raises
        ------
        ValueError
            Raised if ``noise`` or ``mean`` has another number of values.
        """
        for name in ("noise", "mean"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != n_bands:
                raise ValueError(
                    f"There are {n_bands} bands, but {len(value)} values for the {name}: {value}."
                )

    def apply(self, cutouts: Cutouts) -> np.ndarray:
        """Return network inputs, float32, shape ``(N, bands, y, x)``.

        Parameters
        ----------
        cutouts
            Stamps in nJy.
        """
        return self.scale(cutouts.image, variance=cutouts.variance, bad=cutouts.bad)

    def scale(self, image: np.ndarray, *, variance: np.ndarray, bad: np.ndarray) -> np.ndarray:
        """Return network inputs, float32, shape ``(N, bands, y, x)``.

        Parameters
        ----------
        image, variance, bad
            Pixels in nJy, their variance and whether they are unusable, all
            of shape ``(N, bands, y, x)``.

        Raises
        ------
        ValueError
            Raised as by `check_bands`.
        """
        self.check_bands(image.shape[1])
        if self.noise == "variance":
            noise = compute_noise(variance, bad)[..., None, None]
        else:
            noise = np.asarray(self.noise, dtype=np.float32)[:, None, None]
        x = np.where(bad, np.float32(0.0), image).astype(np.float32, copy=False)
        if self.mean is not None:
            x -= np.asarray(self.mean, dtype=np.float32)[:, None, None]
            x[bad] = 0.0
        x /= noise
        np.clip(x, -self.clip, self.clip, out=x)
        if self.softening is not None:
            x /= np.float32(self.softening)
            np.arcsinh(x, out=x)
        return x


def compute_noise(variance: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Return the noise of each stamp and band, shape ``(N, bands)``.

    Parameters
    ----------
    variance, bad
        Variance and whether pixels are unusable, shape
        ``(N, bands, y, x)``.

    Returns
    -------
    noise
        Square root of the median variance of the good pixels, and 1 where
        there are none.
    """
    n_pixels = math.prod(variance.shape[2:])
    flat = variance.reshape(-1, n_pixels)
    n_good = (~bad).sum(axis=(2, 3)).ravel()
    noise = np.ones(len(flat), dtype=np.float32)
    # Most stamps have no bad pixels, and partitioning is faster than sorting.
    middle = sorted({(n_pixels - 1) // 2, n_pixels // 2})
    if (clean := n_good == n_pixels).any():
        ordered = np.partition(flat if clean.all() else flat[clean], middle, axis=-1)
        noise[clean] = np.sqrt(ordered[:, middle].mean(axis=-1))
    # Bad pixels go to the end; np.nanmedian takes five times as long.
    if (spoilt := ~clean & (n_good > 0)).any():
        ordered = np.sort(np.where(bad.reshape(flat.shape)[spoilt], np.inf, flat[spoilt]), axis=-1)
        n = n_good[spoilt]
        pair = np.take_along_axis(ordered, np.stack([(n - 1) // 2, n // 2], axis=-1), axis=-1)
        noise[spoilt] = np.sqrt(pair.mean(axis=-1))
    return noise.reshape(variance.shape[:2])

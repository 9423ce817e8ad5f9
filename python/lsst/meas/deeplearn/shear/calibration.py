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

"""Simulate galaxies, measure them, and add up what the bias follows from."""

from __future__ import annotations

__all__ = ("Bin", "compute_shear_sums")

import dataclasses
from collections.abc import Mapping

import numpy as np

from .bias import ShearSums
from .estimators import LinearEstimator, ShearEstimator
from .morphologies import Morphology
from .shapes import N_MOMENTS, STEPS, Shapes
from .simulation import GalaxySample, Scene, draw_normal, draw_stamps, make_noise

MEASURED = ("snr", "size")
"""Quantities of `Bin` that are measured, so that they respond to shear."""

TRUE = ("magnitude", "redshift", "half_light_radius")
"""Quantities of `Bin` that are known, so that they do not."""


@dataclasses.dataclass(frozen=True)
class Bin:
    """A range of a quantity, and a cut besides."""

    quantity: str = "snr"
    """One of `MEASURED` or `TRUE`."""

    low: float = -np.inf
    """Lower limit, which is in the bin."""

    high: float = np.inf
    """Upper limit, which is not."""

    min_snr: float = -np.inf
    """Smallest signal to noise in all bins."""

    respond: bool = True
    """Whether to include the response of the selection; see
    `Shapes.select`."""

    def __post_init__(self) -> None:
        if self.quantity not in MEASURED + TRUE:
            raise ValueError(f"Bins are in {', '.join(MEASURED + TRUE)}, not in {self.quantity}.")

    def select(self, shapes: Shapes, galaxies: GalaxySample) -> np.ndarray:
        """Return which versions of which stamps are in the bin.

        Parameters
        ----------
        shapes
            Shapes of all stamps, those of a galaxy next to each other.
        galaxies
            The galaxies.
        """
        limits = (self.low, self.high)
        selected = shapes.select(snr=(self.min_snr, np.inf), respond=self.respond)
        if self.quantity == "snr":
            selected &= shapes.select(snr=limits, respond=self.respond)
        elif self.quantity == "size":
            selected &= shapes.select(size=limits, respond=self.respond)
        else:
            values = np.repeat(getattr(galaxies, self.quantity), len(shapes) // max(len(galaxies), 1))
            selected &= ((values >= self.low) & (values < self.high))[:, None].repeat(len(STEPS), axis=1)
        return selected


def compute_shear_sums(
    galaxies: GalaxySample,
    morphology: Morphology,
    scene: Scene,
    arms: np.ndarray,
    *,
    estimators: Mapping[str, ShearEstimator],
    bins: Mapping[str, Bin],
    block: int,
    fixnoise: bool = True,
    n_realizations: int = 0,
) -> dict[tuple[str, str], ShearSums]:
    """Simulate one block of galaxies in all arms and measure them.

    Parameters
    ----------
    galaxies
        The galaxies; the noiseless stamps of one arm are held in memory.
    morphology
        What they look like.
    scene
        PSF, pixels and noise.
    arms
        From `lsst.meas.deeplearn.shear.simulation.make_arms`.
    estimators
        Estimators by name.
    bins
        Bins by name.
    block
        Number of the block.
    fixnoise
        Whether estimators get a second realisation of the noise.
    n_realizations
        Number of realisations of the noise for estimators whose moments are
        linear, `lsst.meas.deeplearn.shear.metacal.Metacalibration`: it is
        then added to the moments, which costs next to nothing, and taken
        with both signs.  If 0, noise is added to the pixels, once, as for
        other estimators.

    Returns
    -------
    sums
        Sums by the names of estimator and bin.
    """
    images = morphology.draw(galaxies)
    size = scene.stamp_size
    noise = extra = None
    if scene.noise_sigma > 0:
        noise = make_noise(galaxies, scene).reshape(-1, size, size)
        extra = make_noise(galaxies, scene, fixnoise=True).reshape(-1, size, size) if fixnoise else None
    moments = _NoisyMoments(galaxies, scene, n_realizations, fixnoise)
    shapes: dict[str, list[Shapes]] = {name: [] for name in estimators}
    for arm in arms:
        clean = draw_stamps(images, galaxies, scene, arm).reshape(-1, size, size)
        noisy = clean if noise is None else clean + noise
        psf = scene.draw_psf(arm)
        for name, estimator in estimators.items():
            if n_realizations and isinstance(estimator, LinearEstimator):
                measured = moments.measure(estimator, clean, psf)
            else:
                measured = estimator.measure(noisy, psf, noise_sigma=scene.noise_sigma, fixnoise=extra)
            shapes[name].append(measured)
    return {
        (name, label): ShearSums.from_shapes(
            measured,
            [cut.select(shape, galaxies) for shape in measured],
            arms=arms,
            block=block,
        )
        for name, measured in shapes.items()
        for label, cut in bins.items()
    }


class _NoisyMoments:
    """Measures noiseless stamps with noise that is added to moments.

    Parameters
    ----------
    galaxies, scene, n_realizations, fixnoise
        As for `compute_shear_sums`.
    """

    def __init__(self, galaxies: GalaxySample, scene: Scene, n_realizations: int, fixnoise: bool) -> None:
        self._sigma = scene.noise_sigma
        self._fixnoise = fixnoise
        shape = (scene.n_orientations, (n_realizations + 1) // 2, (1 + fixnoise) * N_MOMENTS)
        half = draw_normal(galaxies, shape) if n_realizations else np.empty((0, 0, *shape[1:]))
        # What is linear in the noise cancels.
        self._normal = np.concatenate([half, -half], axis=2)[:, :, :n_realizations]

    def measure(self, estimator: LinearEstimator, stamps: np.ndarray, psf: np.ndarray) -> Shapes:
        """Return the shapes, the realisations of a stamp side by side.

        Parameters
        ----------
        estimator
            Estimator to measure with.
        stamps
            Stamps without noise, shape ``(N, y, x)``.
        psf
            Image of a star centred on a pixel, shape ``(y, x)``.
        """
        moments, _ = estimator.compute_moments(stamps, psf)
        noise, variance = estimator.draw_noise_moments(psf, self._normal, fixnoise=self._fixnoise)
        noisy = self._sigma * noise.reshape(len(stamps), -1, noise.shape[-1])
        noisy[..., :N_MOMENTS] += moments[:, None]
        return estimator.compute_shapes(noisy.reshape(-1, noise.shape[-1]), self._sigma**2 * variance)

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

"""A network of a model package, to score stamps of any bands and size."""

from __future__ import annotations

__all__ = ("EvaluationError", "LensNetwork")

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from ..cutouts import Cutouts
from ..inference import InferenceConfig, predict, torch_threads
from ..model_package import SCALE_TOLERANCE, ModelPackage

if TYPE_CHECKING:
    import torch


class EvaluationError(ValueError):
    """Raised for examples or models that cannot be evaluated."""


@dataclasses.dataclass(frozen=True, eq=False)
class LensNetwork:
    """A network that scores stamps which may be larger than it needs."""

    name: str
    """Name and version of the model package."""

    model: ModelPackage
    """The package."""

    network: torch.nn.Module
    """The network."""

    @classmethod
    def from_package(cls, model: ModelPackage) -> LensNetwork:
        """Make from a model package.

        Parameters
        ----------
        model
            The package.
        """
        return cls(f"{model.name} {model.version}", model, model.make_network())

    def prepare(self, cutouts: Cutouts) -> np.ndarray:
        """Return inputs of the network, shape ``(N, bands, y, x)``.

        Parameters
        ----------
        cutouts
            Stamps, at least as large as those of the network.

        Raises
        ------
        EvaluationError
            Raised if the stamps are too small.
        ModelPackageError
            Raised if they lack a band.
        """
        settings = self.model.settings
        self.model.check_bands(cutouts.bands)
        stamps = cutouts.select_bands(settings.bands)
        try:
            if abs(settings.pixel_scale / stamps.pixel_scale - 1) > SCALE_TOLERANCE:
                stamps = stamps.resample(settings.pixel_scale, settings.stamp_size)
        except ValueError as err:
            raise EvaluationError(f"{self.name}: {err}") from err
        if stamps.size < settings.stamp_size:
            raise EvaluationError(
                f"{self.name} needs stamps of {settings.stamp_size} pixels; those of the examples have "
                f"{stamps.size}.  Set stampSize of SimulateLensesTask."
            )
        return settings.preprocessing.apply(_crop(stamps, settings.stamp_size))

    def score(self, cutouts: Cutouts, config: InferenceConfig, num_threads: int) -> np.ndarray:
        """Return the logits of stamps, shape ``(N,)``.

        Parameters
        ----------
        cutouts
            Stamps, at least as large as those of the network.
        config
            How the network runs.
        num_threads
            Threads that may be used on a CPU.
        """
        return predict(self.network, self.prepare(cutouts), config, num_threads=num_threads)

    def compute_features(self, cutouts: Cutouts, num_threads: int) -> np.ndarray | None:
        """Return what the last dense layer sees, shape ``(N, F)``; `None` for
        a network that has none.

        Parameters
        ----------
        cutouts
            Stamps, at least as large as those of the network.
        num_threads
            Threads that may be used.

        Notes
        -----
        It runs in torch on the CPU, for other engines do not show what is
        inside of a network.
        """
        import torch

        layers = [module for module in self.network.modules() if isinstance(module, torch.nn.Linear)]
        if not layers:
            return None
        seen = [np.empty((0, layers[-1].in_features), dtype=np.float32)]

        def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            seen.append(inputs[0].numpy().reshape(-1, layers[-1].in_features))

        hook = layers[-1].register_forward_pre_hook(keep)
        try:
            with torch_threads(num_threads), torch.inference_mode():
                for batch in torch.from_numpy(self.prepare(cutouts)).split(32):
                    self.network(batch)
        finally:
            hook.remove()
        return np.concatenate(seen)


def _crop(cutouts: Cutouts, size: int) -> Cutouts:
    """Return the central pixels of stamps."""
    start = (cutouts.size - size) // 2
    crop = (..., slice(start, start + size), slice(start, start + size))
    return dataclasses.replace(
        cutouts, image=cutouts.image[crop], variance=cutouts.variance[crop], bad=cutouts.bad[crop]
    )

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

"""Where and how networks run: device, precision, threads, batches."""

from __future__ import annotations

__all__ = ("InferenceConfig", "predict", "torch_threads")

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from lsst.pex.config import ChoiceField, Config, RangeField

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)


class InferenceConfig(Config):
    """Choices of speed; scores agree between them."""

    device = ChoiceField[str](
        doc="Device on which networks run.",
        default="auto",
        allowed={
            "auto": "A CUDA GPU where torch sees one (CUDA_VISIBLE_DEVICES is respected), else the CPU.",
            "cpu": "The CPU.",
            "cuda": "A CUDA GPU; an error where there is none.",
        },
    )
    precision = ChoiceField[str](
        doc="Arithmetic of the network.",
        default="float32",
        allowed={
            "float32": "Single precision; scores do not depend on the batch size to 1e-6.",
            "bfloat16": "Automatic mixed precision; faster, scores change by about 0.02.",
        },
    )
    batchSize = RangeField(
        dtype=int,
        doc="Number of stamps in one pass; halved for as long as the GPU runs out of memory.",
        default=64,
        min=1,
    )
    averageOrientations = ChoiceField[int](
        doc="Number of flips and rotations by 90 degrees over which the output is averaged.",
        default=8,
        allowed={1: "None; fastest.", 8: "All eight; fewer false positives, eight times the work."},
    )


def predict(
    network: torch.nn.Module, inputs: np.ndarray, config: InferenceConfig, *, num_threads: int = 1
) -> np.ndarray:
    """Run a network over stamps.

    Parameters
    ----------
    network
        Network in evaluation mode, from ``(N, bands, y, x)`` to ``(N,)``.
    inputs
        Preprocessed stamps, float32, shape ``(N, bands, y, x)``.
    config
        Device, precision, batches, orientations.
    num_threads
        Threads to use on a CPU.  ``pipetask`` sets torch to one thread; this
        overrules it for the length of the call.

    Returns
    -------
    outputs
        Output of the network, averaged over the orientations, float32, shape
        ``(N,)``.

    Raises
    ------
    RuntimeError
        Raised if a GPU is asked for and there is none.
    torch.OutOfMemoryError
        Raised if a single stamp does not fit into the memory of the GPU.
    """
    import torch

    device = _choose_device(config.device)
    network = network.to(device).to(memory_format=torch.channels_last)
    outputs = np.empty(len(inputs), dtype=np.float32)
    batch_size, start = config.batchSize, 0
    with (
        torch_threads(num_threads),
        torch.inference_mode(),
        torch.autocast(device, torch.bfloat16, enabled=config.precision == "bfloat16"),
        # cuDNN would round the float32 of convolutions to 10 bits (TF32).
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        while start < len(inputs):
            stop = min(start + batch_size, len(inputs))
            try:
                batch = torch.from_numpy(np.ascontiguousarray(inputs[start:stop])).to(device)
                outputs[start:stop] = _average(network, batch, config.averageOrientations).cpu().numpy()
            except torch.OutOfMemoryError:
                if batch_size == 1:
                    raise
            else:
                start = stop
                continue
            # Here, for the exception kept the tensors of the batch alive.
            batch_size //= 2
            torch.cuda.empty_cache()
            _LOG.warning("Out of GPU memory; going on with batches of %d.", batch_size)
    return outputs


@contextlib.contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Set the number of threads of torch, and restore it at the end.

    Parameters
    ----------
    num_threads
        Number of threads, at least 1.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(num_threads, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _choose_device(name: str) -> str:
    """Return ``cpu`` or ``cuda``."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RuntimeError(
            "The configured device is 'cuda', but torch sees no GPU.  Set 'device' to 'auto' or 'cpu', or "
            "check CUDA_VISIBLE_DEVICES and the driver."
        )
    return "cuda" if available and name != "cpu" else "cpu"


def _average(network: torch.nn.Module, batch: torch.Tensor, orientations: int) -> torch.Tensor:
    """Return the output averaged over flips and rotations, shape ``(N,)``."""
    import torch

    total = torch.zeros(len(batch), dtype=torch.float32, device=batch.device)
    for k in range(orientations):
        view = torch.rot90(batch, k % 4, dims=(2, 3))  # (N, bands, y, x)
        if k >= 4:
            view = view.flip(3)
        total += network(view.contiguous(memory_format=torch.channels_last)).float()
    return total / orientations

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

"""Why torch alone is not faster: DeepLens with and without its activation.

The published network in eager torch, as our engine runs it, without its
exponential linear units, and compiled by inductor, which fuses what lies
between the convolutions.  Run as ``python benchmarks/torch_alone.py``;
compiling takes some minutes and a C++ compiler.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from results import Result, format_table, time_calls
from torch.nn import functional

from lsst.meas.deeplearn.lenses import deeplens

N_STAMPS, PEER_BATCH = 64, 32


def _elu(x: torch.Tensor) -> torch.Tensor:
    # Inductor computes exp faster than expm1.
    return torch.where(x > 0, x, torch.exp(x) - 1)


def make_call(
    network: torch.nn.Module,
    batch_size: int,
    activation: Callable[[torch.Tensor], torch.Tensor] = functional.elu,
) -> Callable[[], torch.Tensor]:
    """Return a call that runs a network over stamps.

    Parameters
    ----------
    network
        The network.
    batch_size
        Number of stamps in a pass.
    activation
        What to put in the place of the exponential linear unit.
    """
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(N_STAMPS, 3, 45, 45, generator=generator).split(batch_size)

    def call() -> torch.Tensor:
        with torch.inference_mode(), mock.patch.object(deeplens.functional, "elu", activation):
            return torch.cat([network(batch) for batch in batches])

    return call


def compile_network(network: torch.nn.Module, batch_size: int) -> Callable[..., torch.Tensor]:
    """Return a network with constant weights, compiled for one batch size.

    Parameters
    ----------
    network
        The network.
    batch_size
        Number of stamps in a pass.
    """
    import torch._inductor.config

    torch._inductor.config.freezing = True
    torch._dynamo.reset()
    compiled: Callable[..., torch.Tensor] = torch.compile(copy.deepcopy(network), dynamic=False)
    with torch.inference_mode(), mock.patch.object(deeplens.functional, "elu", _elu):
        compiled(torch.zeros(batch_size, 3, 45, 45))
    return compiled


def main() -> None:
    """Time the network in several ways by turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compile", action="store_true", help="compile by inductor too")
    parser.add_argument("--repeats", type=int, default=4, help="rounds, of which the best counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    network = deeplens.DeepLens(in_bands=3).eval()
    folded = copy.deepcopy(network)
    folded.fold_norms()
    folded = folded.to(memory_format=torch.channels_last)
    calls = {f"eager, batches of {PEER_BATCH}": make_call(network, PEER_BATCH)}
    for size in (8, 16, 32):
        calls[f"norms folded, channels last, batches of {size}"] = make_call(folded, size)
    calls["... ReLU instead, batches of 16"] = make_call(folded, 16, functional.relu)
    calls["... no activation, batches of 16"] = make_call(folded, 16, lambda x: x)
    if args.compile:
        for size in (16, 32):
            calls[f"compiled with freezing, batches of {size}"] = make_call(
                compile_network(folded, size), size, _elu
            )
    seconds = time_calls(calls.values(), repeats=args.repeats)
    print(
        format_table(
            Result("torch", what, N_STAMPS / s, "stamps/s/core", seconds[0] / s, "the first")
            for what, s in zip(calls, seconds, strict=True)
        )
    )


if __name__ == "__main__":
    main()

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


"""Tests of the DeepLens network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lsst.meas.deeplearn.lenses.deeplens import DeepLens


@pytest.mark.parametrize(("bands", "parameters"), [(1, 3_508_545), (3, 3_511_681)])
def test_number_of_parameters_is_published(bands: int, parameters: int) -> None:
    """One and three bands have the published numbers of parameters."""
    network = DeepLens(in_bands=bands)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_there_are_46_convolutions() -> None:
    """There are 46 convolutions and four projections of shortcuts."""
    names = [name for name, module in DeepLens(in_bands=1).named_modules() if isinstance(module, nn.Conv2d)]
    assert sum(name.endswith("project") for name in names) == 4
    assert len(names) - 4 == 46


def test_maps_shrink_as_published() -> None:
    """Maps have 45, 45, 23, 12, 6 and 3 pixels on a side."""
    sides = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        sides.append(output.shape[-1])

    network = DeepLens(in_bands=1).eval()
    network.stem.register_forward_hook(note)
    for unit in list(network.units)[::3]:
        unit.register_forward_hook(note)
    network(torch.zeros(1, 1, 45, 45))
    assert sides == [45, 45, 23, 12, 6, 3]


def test_strides_are_on_the_first_convolutions() -> None:
    """Stages 2 to 5 halve their maps in the first 1x1 convolution."""
    network = DeepLens(in_bands=1)
    strided = [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
    ]
    assert strided == [f"units.{unit}.{name}" for unit in (3, 6, 9, 12) for name in ("reduce", "project")]


@pytest.mark.parametrize("size", [16, 45, 64, 101])
def test_any_stamp_size_gives_one_logit(size: int) -> None:
    """Stamps of other sizes are averaged over all of their last maps."""
    network = DeepLens(in_bands=2, width=0.125, blocks=1).eval()
    assert network(torch.zeros(3, 2, size, size)).shape == (3,)


def test_settings_change_the_network() -> None:
    """A stride in the first convolution halves all maps; blocks add."""
    network = DeepLens(in_bands=3, stem_stride=2)
    assert network.stem(torch.zeros(1, 3, 45, 45)).shape[-1] == 23
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_511_681
    assert len(DeepLens(in_bands=3, width=0.125, blocks=2).units) == 10


@pytest.mark.parametrize(
    "settings", [{"in_bands": 0}, {"in_bands": 3, "width": 0.01}, {"in_bands": 3, "blocks": 0}]
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    """Settings that leave no network are refused with their values."""
    with pytest.raises(ValueError, match="in_bands="):
        DeepLens(**settings)  # type: ignore[arg-type]


def test_all_parameters_learn() -> None:
    """Every parameter has a gradient that is not zero."""
    torch.manual_seed(0)
    network = DeepLens(in_bands=3, width=0.25, blocks=2)
    network(torch.randn(8, 3, 45, 45)).square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert still == []


def test_folded_norms_change_nothing() -> None:
    """A network whose normalisations are folded gives the same logits."""
    torch.manual_seed(3)
    network = DeepLens(in_bands=2, width=0.25, blocks=2)
    x = torch.randn(6, 2, 45, 45)
    network(x)  # Gives the normalisations something to do.
    network.eval()
    folded = copy.deepcopy(network)
    folded.fold_norms()
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)
    n_norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in n.modules()) for n in (network, folded)]
    assert n_norms == [1 + 3 * 10 - 1, 10 - 1]

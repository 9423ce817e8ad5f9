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


"""The CMU DeepLens network.

Lanusse et al. (2018), MNRAS 473, 3895, arXiv:1703.02642; the units are those
of He et al. (2016), arXiv:1603.05027, with exponential linear units (Clevert
et al. 2016).
"""

from __future__ import annotations

__all__ = ("DeepLens",)

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

STEM_CHANNELS = 32
"""Output channels of the first convolution."""

INNER_CHANNELS = (16, 32, 64, 128, 256)
"""Channels of the 3x3 convolutions of each stage."""

OUTER_CHANNELS = (32, 64, 128, 256, 512)
"""Output channels of each stage."""

BATCH_NORM_EPSILON = 1e-4
"""The default of Lasagne, in which the network was published."""


class DeepLens(nn.Module):
    """The residual network of CMU DeepLens, as its authors' code has it.

    A 7x7 convolution is followed by five stages of three pre-activated
    bottleneck units, which halve the maps from the second stage on: 45, 45,
    23, 12, 6 and 3 pixels on a side.  The mean of each of the last maps goes
    into one dense output.  There are 46 convolutions, not counting the four
    projections of shortcuts, and 3,508,545 parameters for one band or
    3,511,681 for three.

    Parameters
    ----------
    in_bands
        Number of bands.
    width
        Factor on the number of channels; 1 is the published network.
    blocks
        Units in each stage; 3 is the published network.
    stem_stride
        Stride of the first convolution; 1 is the published network, 2 costs
        less than a third.

    Raises
    ------
    ValueError
        Raised for settings that leave no network.
    """

    def __init__(self, *, in_bands: int, width: float = 1.0, blocks: int = 3, stem_stride: int = 1) -> None:
        super().__init__()
        if in_bands < 1 or blocks < 1 or stem_stride < 1 or width * min(INNER_CHANNELS) < 1:
            raise ValueError(
                f"There is no DeepLens with in_bands={in_bands}, width={width}, blocks={blocks}, "
                f"stem_stride={stem_stride}."
            )
        channels = round(STEM_CHANNELS * width)
        self.stem = nn.Conv2d(in_bands, channels, 7, stem_stride, padding=3, bias=False)
        self.stem_norm: nn.Module = nn.BatchNorm2d(channels, eps=BATCH_NORM_EPSILON)
        units = []
        for stage, (inner, outer) in enumerate(zip(INNER_CHANNELS, OUTER_CHANNELS, strict=True)):
            for block in range(blocks):
                unit = BottleneckUnit(
                    channels,
                    round(inner * width),
                    round(outer * width),
                    stride=2 if stage > 0 and block == 0 else 1,
                    # The input of the first unit is activated already.
                    preactivate=stage > 0 or block > 0,
                )
                units.append(unit)
                channels = round(outer * width)
        self.units = nn.Sequential(*units)
        self.dense = nn.Linear(channels, 1)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.stem.weight, gain=nn.init.calculate_gain("relu"))
        nn.init.xavier_uniform_(self.dense.weight)
        nn.init.zeros_(self.dense.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logit of each stamp, shape ``(N,)``.

        Parameters
        ----------
        x
            Scaled stamps, shape ``(N, bands, y, x)``.
        """
        x = functional.elu(self.stem_norm(self.stem(x)))
        x = self.units(x)  # (N, 512, 3, 3) from 45x45
        # No activation after the last sum, as published.
        return torch.flatten(self.dense(x.mean(dim=(2, 3))))

    def fold_norms(self) -> None:
        """Merge normalisations into the convolutions before them.

        The outputs stay the same but for rounding.  The network must be in
        evaluation mode, and cannot be trained or saved afterwards.
        """
        self.stem, self.stem_norm = _fold(self.stem, self.stem_norm)
        for unit in self.units:
            assert isinstance(unit, BottleneckUnit)
            unit.reduce, unit.reduce_norm = _fold(unit.reduce, unit.reduce_norm)
            unit.convolve, unit.convolve_norm = _fold(unit.convolve, unit.convolve_norm)


def _fold(convolution: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    """Return a convolution that normalises too, and an empty norm."""
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(convolution, norm), nn.Identity()


class BottleneckUnit(nn.Module):
    """A pre-activated bottleneck unit of DeepLens.

    Parameters
    ----------
    channels
        Input channels.
    inner, outer
        Channels of the 3x3 convolution, and of the output.
    stride
        Stride of the first 1x1 convolution and of the projection.
    preactivate
        Whether to normalise and activate the input first.
    """

    def __init__(self, channels: int, inner: int, outer: int, *, stride: int, preactivate: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=BATCH_NORM_EPSILON) if preactivate else None
        self.reduce = nn.Conv2d(channels, inner, 1, stride, bias=False)
        self.reduce_norm: nn.Module = nn.BatchNorm2d(inner, eps=BATCH_NORM_EPSILON)
        self.convolve = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.convolve_norm: nn.Module = nn.BatchNorm2d(inner, eps=BATCH_NORM_EPSILON)
        self.expand = nn.Conv2d(inner, outer, 1)
        self.project = nn.Conv2d(channels, outer, 1, stride) if stride > 1 or channels != outer else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the output maps, shape ``(N, outer, y, x)``.

        Parameters
        ----------
        x
            Input maps, shape ``(N, channels, y, x)``.
        """
        activated = x if self.norm is None else functional.elu(self.norm(x))
        shortcut = x if self.project is None else self.project(activated)
        y = functional.elu(self.reduce_norm(self.reduce(activated)))
        y = functional.elu(self.convolve_norm(self.convolve(y)))
        return shortcut + self.expand(y)

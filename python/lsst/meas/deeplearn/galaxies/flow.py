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

"""A conditional normalizing flow.

Affine coupling layers (Dinh et al. 2017, arXiv:1605.08803) whose factors and
offsets also depend on conditions, as in the prior of Lanusse et al. (2021).
"""

from __future__ import annotations

__all__ = ("ConditionalFlow",)

import math

import torch
from torch import Tensor, nn

MAX_LOG_FACTOR = 2.0
"""Largest logarithm of the factor of a layer."""


class ConditionalFlow(nn.Module):
    """A density p(z|y) that can be evaluated and drawn from.

    Parameters
    ----------
    latents
        Number Z of variables, at least 2.
    conditions
        Number Y of conditions.
    layers
        Number of coupling layers after a Gaussian whose mean and variance
        depend on the conditions; 0 leaves that Gaussian.
    width
        Width of the networks in the layers.
    """

    def __init__(self, latents: int, conditions: int, *, layers: int = 8, width: int = 96) -> None:
        super().__init__()
        self.latents, self.kept = latents, latents // 2
        self.base = _make_network(conditions, width, 2 * latents)
        moved = latents - self.kept
        self.layers = nn.ModuleList(
            _make_network(self.kept + conditions, width, 2 * moved) for _ in range(layers)
        )

    def compute_log_density(self, z: Tensor, conditions: Tensor) -> Tensor:
        """Return log p(z|y), shape ``(N,)``.

        Parameters
        ----------
        z
            Shape ``(N, Z)``.
        conditions
            Shape ``(N, Y)``.
        """
        log_factors = torch.zeros(len(z), device=z.device)
        for layer in self.layers:
            kept, moved = z.split([self.kept, self.latents - self.kept], dim=1)
            log_factor, offset = _evaluate(layer, torch.cat([kept, conditions], dim=1))
            # What was moved comes first, so that the next layer keeps it.
            z = torch.cat([moved * torch.exp(log_factor) + offset, kept], dim=1)
            log_factors = log_factors + log_factor.sum(dim=1)
        log_factor, offset = _evaluate(self.base, conditions)
        z = z * torch.exp(log_factor) + offset
        return log_factors + log_factor.sum(dim=1) - 0.5 * (z**2 + math.log(2 * math.pi)).sum(dim=1)

    def sample(self, noise: Tensor, conditions: Tensor) -> Tensor:
        """Return variables drawn from p(z|y), shape ``(N, Z)``.

        Parameters
        ----------
        noise
            Normal deviates, shape ``(N, Z)``.
        conditions
            Shape ``(N, Y)``.
        """
        log_factor, offset = _evaluate(self.base, conditions)
        z = (noise - offset) * torch.exp(-log_factor)
        for layer in reversed(self.layers):
            moved, kept = z.split([self.latents - self.kept, self.kept], dim=1)
            log_factor, offset = _evaluate(layer, torch.cat([kept, conditions], dim=1))
            z = torch.cat([kept, (moved - offset) * torch.exp(-log_factor)], dim=1)
        return z


def _make_network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    last = nn.Linear(width, outputs)
    # A flow starts out as the identity.
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)


def _evaluate(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    log_factor, offset = network(inputs).float().chunk(2, dim=1)
    return MAX_LOG_FACTOR * torch.tanh(log_factor / MAX_LOG_FACTOR), offset

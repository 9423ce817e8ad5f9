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

"""Conditional normalizing flows, of a few variables and of maps.

Affine coupling layers (Dinh et al. 2017, arXiv:1605.08803) whose factors and
offsets also depend on conditions, as in the prior of Lanusse et al. (2021).
"""

from __future__ import annotations

__all__ = ("ConditionalFlow", "MapFlow", "append_radius")

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

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


class MapFlow(nn.Module):
    """A density of maps p(t|y), made by convolutions.

    What layers keep and what they move lie like the fields of a chess board.
    So neighbours may depend on each other, and each place on means over the
    whole map.

    Parameters
    ----------
    channels
        Number C of channels of the maps.
    conditions
        Number Y of conditions.
    layers
        Number of coupling layers; 0 leaves independent normal deviates.
    width
        Channels of the convolutions in the layers.
    """

    def __init__(self, channels: int, conditions: int, *, layers: int = 6, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_MapLayer(channels, conditions, width) for _ in range(layers))

    def compute_log_density(self, maps: Tensor, conditions: Tensor) -> Tensor:
        """Return log p(t|y), shape ``(N,)``.

        Parameters
        ----------
        maps
            Shape ``(N, C, y, x)``.
        conditions
            Shape ``(N, Y)``.
        """
        log_factors = torch.zeros(len(maps), device=maps.device)
        for parity, layer in enumerate(self.layers):
            log_factor, offset = layer(maps, conditions, parity % 2)
            maps = maps * torch.exp(log_factor) + offset
            log_factors = log_factors + log_factor.sum(dim=(1, 2, 3))
        return log_factors - 0.5 * (maps**2 + math.log(2 * math.pi)).sum(dim=(1, 2, 3))

    def sample(self, noise: Tensor, conditions: Tensor) -> Tensor:
        """Return maps drawn from p(t|y), shape ``(N, C, y, x)``.

        Parameters
        ----------
        noise
            Normal deviates, shape ``(N, C, y, x)``.
        conditions
            Shape ``(N, Y)``.
        """
        maps = noise
        for parity, layer in reversed(list(enumerate(self.layers))):
            log_factor, offset = layer(maps, conditions, parity % 2)
            maps = (maps - offset) * torch.exp(-log_factor)
        return maps


class _MapLayer(nn.Module):
    """Logarithms of the factors on the moved places, and their offsets."""

    def __init__(self, channels: int, conditions: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.context = nn.Linear(conditions, width)
        self.mean = nn.Linear(width, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 2 * channels, 3, padding=1)
        # A flow starts out as the identity.
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, maps: Tensor, conditions: Tensor, parity: int) -> tuple[Tensor, Tensor]:
        rows, columns = (torch.arange(n, device=maps.device) for n in maps.shape[-2:])
        moved = ((rows[:, None] + columns) % 2 == parity).to(maps.dtype)
        hidden = self.first(append_radius(maps * (1 - moved))) + self.context(conditions)[:, :, None, None]
        hidden = functional.silu(hidden)
        hidden = self.second(hidden) + self.mean(hidden.mean(dim=(2, 3)))[:, :, None, None]
        log_factor, offset = (self.last(functional.silu(hidden)) * moved).float().chunk(2, dim=1)
        return MAX_LOG_FACTOR * torch.tanh(log_factor / MAX_LOG_FACTOR), offset


def append_radius(maps: Tensor) -> Tensor:
    """Append the distance from the centre of maps as a channel.

    Parameters
    ----------
    maps
        Square maps, shape ``(N, C, y, x)``.
    """
    steps = torch.linspace(-1, 1, maps.shape[-1], device=maps.device, dtype=maps.dtype)
    radius = torch.sqrt(steps**2 + steps[:, None] ** 2)
    return torch.cat([maps, radius.expand(len(maps), 1, -1, -1)], dim=1)


def _make_network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    last = nn.Linear(width, outputs)
    # A flow starts out as the identity.
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), last)


def _evaluate(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    log_factor, offset = network(inputs).float().chunk(2, dim=1)
    return MAX_LOG_FACTOR * torch.tanh(log_factor / MAX_LOG_FACTOR), offset

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


"""Tests of the normalizing flows."""

from __future__ import annotations

import pytest
import torch

from lsst.meas.deeplearn.galaxies.flow import ConditionalFlow, MapFlow


@pytest.mark.parametrize("latents", [2, 5])
@pytest.mark.parametrize("layers", [0, 3])
def test_density_is_that_of_what_is_drawn(latents: int, layers: int) -> None:
    """Its logarithm is that of the normal deviates less the Jacobian."""
    torch.manual_seed(1)
    flow = ConditionalFlow(latents, 3, layers=layers, width=8).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    noise, conditions = torch.randn(1, latents).double(), torch.randn(1, 3).double()
    z = flow.sample(noise, conditions)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.sample(x, conditions)[0], noise)[:, 0]
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum()
    expected = normal - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow.compute_log_density(z, conditions)[0], expected, rtol=1e-4, atol=1e-4)


def test_density_of_maps_is_that_of_what_is_drawn() -> None:
    """So it is for maps, whose neighbours depend on each other."""
    torch.manual_seed(1)
    flow = MapFlow(2, 3, layers=3, width=4).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    noise, conditions = torch.randn(1, 2, 4, 4).double(), torch.randn(1, 3).double()
    maps = flow.sample(noise, conditions)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow.sample(x, conditions), noise).reshape(32, 32)
    assert (jacobian != 0).sum() > 5 * 32
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum()
    expected = normal - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(flow.compute_log_density(maps, conditions)[0], expected, rtol=1e-4, atol=1e-4)


def test_maps_have_the_same_amplitude_everywhere() -> None:
    """A flow learns that some maps are smooth and others are not.

    Without it each place would be drawn for itself, and all maps would be
    the same mixture.
    """
    torch.manual_seed(2)
    flow = MapFlow(1, 1, layers=4, width=16)
    amplitude, none = torch.where(torch.rand(1000, 1, 1, 1) < 0.5, 0.3, 1.5), torch.zeros(1000, 1)
    maps = amplitude * torch.randn(1000, 1, 8, 8)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(150):
        rows = torch.randint(1000, (128,))
        loss = -flow.compute_log_density(maps[rows], none[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scatter = flow.sample(torch.randn(1000, 1, 8, 8), none).detach().std(dim=(1, 2, 3))
    low, high = torch.quantile(scatter, torch.tensor([0.25, 0.75]))
    assert low < 0.6
    assert high > 1.2


def test_fits_what_no_gaussian_is() -> None:
    """A flow learns a ring whose radius is the condition."""
    torch.manual_seed(2)
    flow = ConditionalFlow(2, 1, layers=6, width=32)
    radius = 1 + torch.rand(2000, 1)
    angle = 2 * torch.pi * torch.rand(2000, 1)
    rings = radius * torch.cat([torch.cos(angle), torch.sin(angle)], dim=1) + 0.1 * torch.randn(2000, 2)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(300):
        loss = -flow.compute_log_density(rings, radius).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = flow.sample(torch.randn(2000, 2), radius).norm(dim=1, keepdim=True)
    assert (drawn - radius).abs().median() < 0.2

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


"""Tests of the equations of lensing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lsst.meas.deeplearn.lenses.lens_equation import (
    compute_caustics,
    compute_magnification,
    compute_sersic_b,
    compute_sersic_brightness,
    compute_shear_deflection,
    compute_sie_convergence,
    compute_sie_deflection,
    is_inside_polygon,
)

AXIS_RATIOS = (0.2, 0.5, 0.7, 0.9, 0.99, 0.9999, 1 - 1e-7, 1.0)


def scalar(value: float) -> Tensor:
    """Return a number in double precision."""
    return torch.tensor(value, dtype=torch.float64)


def make_positions(n: int = 500, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make positions in arcsec around a lens."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, generator=generator, dtype=torch.float64) * 1.5
    return x, y


def make_lens(axis_ratio: float) -> dict[str, Tensor]:
    """Make the parameters of an ellipsoid."""
    return {
        "einstein_radius": scalar(1.3),
        "axis_ratio": scalar(axis_ratio),
        "position_angle": scalar(0.6),
    }


@pytest.mark.parametrize("q", AXIS_RATIOS)
def test_sie_deflection_agrees_with_caustics(q: float) -> None:
    """The deflection is that of caustics, which cannot do a round lens."""
    func = pytest.importorskip("caustics.lenses.func")
    x, y = make_positions()
    lens = make_lens(q)
    alpha = compute_sie_deflection(x, y, **lens)
    expected = func.reduced_deflection_angle_sie(
        scalar(0), scalar(0), scalar(min(q, 1 - 1e-9)), lens["position_angle"], lens["einstein_radius"], x, y
    )
    for ours, theirs in zip(alpha, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


def test_round_lens_deflects_by_the_einstein_radius() -> None:
    """A round isothermal lens deflects everything by its radius."""
    x, y = make_positions()
    alpha_x, alpha_y = compute_sie_deflection(x, y, **make_lens(1.0))
    r = torch.hypot(x, y)
    torch.testing.assert_close(alpha_x, 1.3 * x / r)
    torch.testing.assert_close(alpha_y, 1.3 * y / r)


@pytest.mark.parametrize("q", AXIS_RATIOS)
def test_single_precision_suffices(q: float) -> None:
    """Single precision is right to a microarcsec, the round limit too."""
    x, y = make_positions()
    lens = make_lens(q)
    exact = compute_sie_deflection(x, y, **lens)
    single = compute_sie_deflection(x.float(), y.float(), **{k: v.float() for k, v in lens.items()})
    assert single[0].dtype == torch.float32
    for a, b in zip(single, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=5e-6)


@pytest.mark.parametrize("q", [0.5, 1.0])
def test_singular_centre_is_finite(q: float) -> None:
    """At the exact centre there is no deflection, and no NaN."""
    zero = torch.zeros(1, dtype=torch.float64)
    alpha = compute_sie_deflection(zero, zero, **make_lens(q))
    assert alpha[0].item() == 0.0
    assert alpha[1].item() == 0.0


def test_shear_agrees_with_caustics() -> None:
    """The shear has the sign of caustics."""
    func = pytest.importorskip("caustics.lenses.func")
    x, y = make_positions()
    ours = compute_shear_deflection(x, y, gamma1=scalar(0.05), gamma2=scalar(-0.03))
    theirs = func.reduced_deflection_angle_external_shear(
        scalar(0), scalar(0), scalar(0.05), scalar(-0.03), x, y
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("q", AXIS_RATIOS)
def test_magnification_is_the_inverse_jacobian(q: float) -> None:
    """The magnification is that of the lens equation, differentiated."""
    x, y = make_positions(100)
    lens = make_lens(q)
    shear = {"gamma1": scalar(0.04), "gamma2": scalar(-0.06)}

    def map_to_source(position: Tensor) -> Tensor:
        alpha_x, alpha_y = compute_sie_deflection(position[0], position[1], **lens)
        shear_x, shear_y = compute_shear_deflection(position[0], position[1], **shear)
        return torch.stack([position[0] - alpha_x - shear_x, position[1] - alpha_y - shear_y])

    jacobian = torch.func.vmap(torch.func.jacrev(map_to_source))(torch.stack([x, y], dim=1))
    expected = torch.linalg.det(jacobian)
    torch.testing.assert_close(
        1 / compute_magnification(x, y, **lens, **shear), expected, rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("q", AXIS_RATIOS)
def test_convergence_is_half_the_divergence(q: float) -> None:
    """Convergence and deflection belong together."""
    x, y = make_positions(50)
    lens = make_lens(q)
    h = 1e-6
    right, left = (compute_sie_deflection(x + s, y, **lens)[0] for s in (h, -h))
    up, down = (compute_sie_deflection(x, y + s, **lens)[1] for s in (h, -h))
    expected = (right - left + up - down) / (4 * h)
    torch.testing.assert_close(compute_sie_convergence(x, y, **lens), expected, rtol=1e-5, atol=1e-7)


def count_images(source: Tensor, lens: dict[str, Tensor], gamma1: float, gamma2: float) -> int:
    """Count the images of a point by tiling the image plane.

    A tile of two triangles around an image maps to one around the source.
    """
    axis = torch.linspace(-3.5, 3.5, 400, dtype=torch.float64) + 1e-3
    x, y = torch.meshgrid(axis, axis, indexing="xy")
    alpha_x, alpha_y = compute_sie_deflection(x, y, **lens)
    shear_x, shear_y = compute_shear_deflection(x, y, gamma1=scalar(gamma1), gamma2=scalar(gamma2))
    beta = torch.stack([x - alpha_x - shear_x - source[0], y - alpha_y - shear_y - source[1]], dim=-1)
    # The centre of the lens maps to its cut, not to a point.
    off_centre = torch.hypot(x, y)[:-1, :-1].ravel() > 0.05
    a, b, c, d = beta[:-1, :-1], beta[:-1, 1:], beta[1:, 1:], beta[1:, :-1]
    images = 0
    for triangle in ((a, b, c), (a, c, d)):
        corners = torch.stack([corner.reshape(-1, 2) for corner in triangle], dim=1)[off_centre]
        zero = torch.zeros(len(corners), dtype=torch.float64)
        images += int(is_inside_polygon(zero, zero, corners).sum())
    return images


@pytest.mark.parametrize("q", [0.4, 0.8, 1.0])
def test_sources_within_the_curves_are_multiply_imaged(q: float) -> None:
    """The number of images is that which caustic and cut promise."""
    gamma1, gamma2 = 0.05, -0.08
    lens = make_lens(q)
    caustic, cut = compute_caustics(
        **{name: value[None] for name, value in lens.items()},
        gamma1=scalar(gamma1)[None],
        gamma2=scalar(gamma2)[None],
        points=512,
    )
    generator = torch.Generator().manual_seed(1)
    for source in torch.randn(12, 2, generator=generator, dtype=torch.float64) * 0.6:
        in_caustic, in_cut = (
            bool(is_inside_polygon(source[:1], source[1:], curve)) for curve in (caustic, cut)
        )
        expected = 1 + 2 * in_caustic + in_cut
        assert count_images(source, lens, gamma1, gamma2) == expected


def test_caustic_of_round_lens_is_a_point() -> None:
    """Without ellipticity and shear the caustic is the point behind it."""
    zero = torch.zeros(1, dtype=torch.float64)
    lens = {name: value[None] for name, value in make_lens(1.0).items()}
    caustic, cut = compute_caustics(**lens, gamma1=zero, gamma2=zero)
    assert caustic.abs().max() < 1e-12
    torch.testing.assert_close(torch.linalg.norm(cut, dim=-1), torch.full((1, 128), 1.3, dtype=torch.float64))


@pytest.mark.parametrize("n", [0.5, 1.0, 2.5, 4.0, 8.0])
def test_sersic_b_halves_the_light(n: float) -> None:
    """Half of the light is within the half-light radius."""
    b = compute_sersic_b(scalar(n))
    tolerance = 2e-5 if n >= 1 else 2e-4
    assert torch.special.gammainc(scalar(2 * n), b).item() == pytest.approx(0.5, abs=tolerance)


@pytest.mark.parametrize(("n", "q"), [(0.5, 1.0), (1.0, 0.4), (2.5, 0.7)])
def test_sersic_has_unit_flux(n: float, q: float) -> None:
    """The flux is 1, and half of it is within the half-light ellipse."""
    axis = (torch.arange(2000, dtype=torch.float64) - 999.5) * 0.01
    x, y = axis[None, :], axis[:, None]
    light = compute_sersic_brightness(
        x,
        y,
        half_light_radius=scalar(0.6),
        axis_ratio=scalar(q),
        position_angle=scalar(0.0),
        sersic_index=scalar(n),
    )
    flux = light * 0.01**2
    assert flux.sum().item() == pytest.approx(1.0, abs=3e-3)
    inside = q * x**2 + y**2 / q < 0.6**2
    assert flux[inside].sum().item() == pytest.approx(0.5, abs=2e-3)


def test_position_angle_turns_counter_clockwise() -> None:
    """Light at 30 degrees from x to y lies along that direction."""
    profile = {
        "half_light_radius": scalar(0.6),
        "axis_ratio": scalar(0.3),
        "position_angle": scalar(math.radians(30)),
        "sersic_index": scalar(1.0),
    }
    angle = torch.deg2rad(torch.arange(180, dtype=torch.float64))
    light = compute_sersic_brightness(torch.cos(angle), torch.sin(angle), **profile)
    assert light.argmax().item() == 30


def test_point_in_polygon() -> None:
    """Points on either side of the edges of a concave polygon are told."""
    polygon = torch.tensor([[0.0, 0.0], [4, 0], [4, 4], [2, 1], [0, 4]])
    x = torch.tensor([1.0, 2.0, 2.0, 3.5, 5.0])
    y = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0])
    inside = is_inside_polygon(x, y, polygon.expand(5, -1, -1))
    assert inside.tolist() == [True, True, False, True, False]

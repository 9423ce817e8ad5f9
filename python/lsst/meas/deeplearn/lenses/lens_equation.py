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


"""Equations of strong lensing and of galaxy profiles, as pure functions.

All arguments are tensors that broadcast against each other; results have
their precision and device.  Angles on the sky are in arcsec, orientations in
radians, counter-clockwise from the x axis.  The lens is at the origin.
"""

from __future__ import annotations

__all__ = (
    "compute_caustics",
    "compute_magnification",
    "compute_sersic_b",
    "compute_sersic_brightness",
    "compute_shear_deflection",
    "compute_sie_convergence",
    "compute_sie_deflection",
    "is_inside_polygon",
    "rotate",
)

import math

import torch
from torch import Tensor

SMALL_ARGUMENT = 1e-3
"""Below this, inverse tangents are replaced by their Taylor series."""


def rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates in axes turned counter-clockwise by an angle.

    Parameters
    ----------
    x, y
        Coordinates.
    angle
        Angle in radians by which the new axes are turned.
    """
    cos, sin = torch.cos(angle), torch.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def compute_sie_deflection(
    x: Tensor, y: Tensor, *, einstein_radius: Tensor, axis_ratio: Tensor, position_angle: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return the deflection of a singular isothermal ellipsoid, in arcsec.

    Keeton (2002, arXiv:astro-ph/0102341), equations 34 and 35 without core,

    .. math::
        \alpha_u = \theta_E \frac{\sqrt q}{f} \arctan\frac{f u}{\psi}, \quad
        \alpha_v = \theta_E \frac{\sqrt q}{f}
            \,\mathrm{artanh}\frac{f v}{\psi}, \quad
        f^2 = 1 - q^2, \quad \psi^2 = q^2 u^2 + v^2,

    but with the Einstein radius on the intermediate axis, so that it
    encloses the same mass whatever the axis ratio.

    Parameters
    ----------
    x, y
        Position in the image plane in arcsec.
    einstein_radius
        Einstein radius in arcsec.
    axis_ratio
        Minor over major axis of the mass, in (0, 1]; 1 is exact.
    position_angle
        Direction of the major axis in radians.

    Returns
    -------
    alpha_x, alpha_y
        Deflection; zero at the singular centre.
    """
    u, v = rotate(x, y, position_angle)
    f = torch.sqrt((1 - axis_ratio) * (1 + axis_ratio))
    psi = torch.sqrt(axis_ratio**2 * u**2 + v**2)
    psi = torch.where(psi > 0, psi, torch.ones_like(psi))
    scale = einstein_radius * torch.sqrt(axis_ratio) / psi
    alpha_u = scale * u * _arctan_over_argument(f * u / psi)
    alpha_v = scale * v * _artanh_over_argument(f * v / psi)
    return rotate(alpha_u, alpha_v, -position_angle)


def _arctan_over_argument(t: Tensor) -> Tensor:
    small = t.abs() < SMALL_ARGUMENT
    safe = torch.where(small, torch.ones_like(t), t)
    return torch.where(small, 1 - t**2 / 3, torch.atan(safe) / safe)


def _artanh_over_argument(t: Tensor) -> Tensor:
    small = t.abs() < SMALL_ARGUMENT
    safe = torch.where(small, torch.full_like(t, 0.5), t)
    return torch.where(small, 1 + t**2 / 3, torch.atanh(safe) / safe)


def compute_shear_deflection(
    x: Tensor, y: Tensor, *, gamma1: Tensor, gamma2: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the deflection of an external shear, in arcsec.

    Parameters
    ----------
    x, y
        Position in the image plane in arcsec.
    gamma1, gamma2
        Shear; positive ``gamma1`` stretches images along the x axis.
    """
    return gamma1 * x + gamma2 * y, gamma2 * x - gamma1 * y


def compute_sie_convergence(
    x: Tensor, y: Tensor, *, einstein_radius: Tensor, axis_ratio: Tensor, position_angle: Tensor
) -> Tensor:
    r"""Return the convergence of a singular isothermal ellipsoid.

    .. math::
        \kappa = \frac{\theta_E}{2 \sqrt{q u^2 + v^2 / q}}

    Parameters
    ----------
    x, y, einstein_radius, axis_ratio, position_angle
        As for `compute_sie_deflection`.
    """
    u, v = rotate(x, y, position_angle)
    return einstein_radius / (2 * torch.sqrt(axis_ratio * u**2 + v**2 / axis_ratio))


def compute_magnification(
    x: Tensor,
    y: Tensor,
    *,
    einstein_radius: Tensor,
    axis_ratio: Tensor,
    position_angle: Tensor,
    gamma1: Tensor,
    gamma2: Tensor,
) -> Tensor:
    r"""Return the signed magnification of a point in the image plane.

    The shear of a singular isothermal ellipsoid is
    :math:`-\kappa e^{2 i \phi}` at polar angle :math:`\phi` (Kormann,
    Schneider & Bartelmann 1994).

    Parameters
    ----------
    x, y, einstein_radius, axis_ratio, position_angle
        As for `compute_sie_deflection`.
    gamma1, gamma2
        External shear.
    """
    kappa = compute_sie_convergence(
        x, y, einstein_radius=einstein_radius, axis_ratio=axis_ratio, position_angle=position_angle
    )
    phi = torch.atan2(y, x)
    total1 = gamma1 - kappa * torch.cos(2 * phi)
    total2 = gamma2 - kappa * torch.sin(2 * phi)
    return 1 / ((1 - kappa) ** 2 - total1**2 - total2**2)


def compute_caustics(
    *,
    einstein_radius: Tensor,
    axis_ratio: Tensor,
    position_angle: Tensor,
    gamma1: Tensor,
    gamma2: Tensor,
    points: int = 128,
) -> tuple[Tensor, Tensor]:
    r"""Return the caustic and the cut of an isothermal ellipsoid with shear.

    Along polar angle :math:`\phi` the critical curve is where

    .. math::
        \kappa = \frac{1 - \gamma^2}
            {2 (1 - \gamma_1 \cos 2 \phi - \gamma_2 \sin 2 \phi)},

    and the convergence falls as one over the radius.  The cut, which takes
    the place of the radial caustic, is minus the deflection at the centre.

    Parameters
    ----------
    einstein_radius, axis_ratio, position_angle, gamma1, gamma2
        As for `compute_magnification`, each of shape ``(N,)``.
    points
        Number of vertices M.

    Returns
    -------
    caustic, cut
        Vertices in the source plane in arcsec, shape ``(N, M, 2)``.  A
        source inside either curve is multiply imaged.
    """
    phi = torch.arange(points, dtype=einstein_radius.dtype, device=einstein_radius.device)
    phi = phi * (2 * math.pi / points)
    lens = {
        "einstein_radius": einstein_radius[:, None],
        "axis_ratio": axis_ratio[:, None],
        "position_angle": position_angle[:, None],
    }
    gamma1, gamma2 = gamma1[:, None], gamma2[:, None]
    cos, sin = torch.cos(phi), torch.sin(phi)
    unit_kappa = compute_sie_convergence(cos, sin, **lens)  # (N, M), at one arcsec
    along = gamma1 * torch.cos(2 * phi) + gamma2 * torch.sin(2 * phi)
    radius = unit_kappa * 2 * (1 - along) / (1 - gamma1**2 - gamma2**2)
    alpha_x, alpha_y = compute_sie_deflection(cos, sin, **lens)  # the same at every radius
    shear_x, shear_y = compute_shear_deflection(radius * cos, radius * sin, gamma1=gamma1, gamma2=gamma2)
    caustic = torch.stack([radius * cos - alpha_x - shear_x, radius * sin - alpha_y - shear_y], dim=-1)
    return caustic, torch.stack([-alpha_x, -alpha_y], dim=-1)


def is_inside_polygon(x: Tensor, y: Tensor, polygon: Tensor) -> Tensor:
    """Return whether points are inside closed polygons.

    Parameters
    ----------
    x, y
        Positions, shape ``(N,)``.
    polygon
        Vertices of a polygon for each, shape ``(N, M, 2)``.
    """
    x, y = x[:, None], y[:, None]
    x0, y0 = polygon.unbind(-1)
    x1, y1 = x0.roll(-1, dims=1), y0.roll(-1, dims=1)
    straddles = (y0 > y) != (y1 > y)
    height = torch.where(straddles, y1 - y0, torch.ones_like(y0))
    crosses = straddles & (x < x0 + (y - y0) / height * (x1 - x0))
    return crosses.sum(dim=1) % 2 == 1


def compute_sersic_b(sersic_index: Tensor) -> Tensor:
    """Return the constant b of the Sersic profile.

    Ciotti & Bertin (1999), equation 18; half of the light is within the
    half-light radius to 2e-5 for indices of 1 and more, 2e-4 for 0.5.

    Parameters
    ----------
    sersic_index
        Sersic index n.
    """
    n = sersic_index
    return (
        2 * n
        - 1 / 3
        + 4 / (405 * n)
        + 46 / (25515 * n**2)
        + 131 / (1148175 * n**3)
        - 2194697 / (30690717750 * n**4)
    )


def compute_sersic_brightness(
    x: Tensor,
    y: Tensor,
    *,
    half_light_radius: Tensor,
    axis_ratio: Tensor,
    position_angle: Tensor,
    sersic_index: Tensor,
) -> Tensor:
    r"""Return the surface brightness of a Sersic profile of unit flux.

    .. math::
        I(r) = \frac{b^{2 n}}{2 \pi n \Gamma(2 n) R^2}
            \exp[-b (r / R)^{1 / n}], \quad r^2 = q u^2 + v^2 / q

    Parameters
    ----------
    x, y
        Position relative to the centre in arcsec.
    half_light_radius
        Half-light radius R in arcsec, on the intermediate axis (the
        geometric mean of the half axes), as in lenstronomy and GalSim.
    axis_ratio
        Minor over major axis.
    position_angle
        Direction of the major axis in radians.
    sersic_index
        Sersic index n.

    Returns
    -------
    brightness
        Flux per square arcsec; its integral is 1.
    """
    u, v = rotate(x, y, position_angle)
    r = torch.sqrt(axis_ratio * u**2 + v**2 / axis_ratio) / half_light_radius
    n, b = sersic_index, compute_sersic_b(sersic_index)
    log_norm = 2 * n * torch.log(b) - torch.log(2 * math.pi * n) - torch.lgamma(2 * n)
    return torch.exp(log_norm - b * r ** (1 / n)) / half_light_radius**2

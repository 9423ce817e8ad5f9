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


"""Random changes of stamps that a network must not mind."""

from __future__ import annotations

__all__ = ("ImageAugmentation",)

import dataclasses
import math

import torch
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class ImageAugmentation:
    """Random changes of stamps that leave what they show the same.

    Stamps are in units of their noise, not stretched, and may be larger than
    what comes out, so that shifts bring in real pixels.
    """

    size: int
    """Side in pixels of what comes out."""

    max_shift: int = 0
    """Largest shift of the centre along each axis in pixels."""

    max_rotation: float = 0.0
    """Largest rotation in degrees to either side, on top of the eight
    symmetries of the square; Lanusse et al. (2018) have 90."""

    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of the magnification; Lanusse et al. (2018) have 0.9 to 1."""

    warp_fraction: float = 1.0
    """Fraction of the stamps that are rotated and zoomed, by bilinear
    interpolation."""

    max_blur: float = 0.0
    """Largest Gaussian sigma in pixels of a blur, the same in all bands but
    for a tenth of it; half of the stamps are blurred, and given back the noise
    that the blur takes."""

    max_noise: float = 1.0
    """Largest noise of the result in units of that of the stamp, at least 1:
    the square root of 10 makes one year of ten.  Half of the stamps get
    noisier, by factors that are uniform in their logarithm; the result is in
    units of its new noise."""

    flux_scatter: float = 0.0
    """Scatter of the logarithm of a factor on each band, for errors of
    zero-points and of the noise estimate."""

    offset_scatter: float = 0.0
    """Scatter of a constant that is added to each band, in units of the
    noise, for errors of the sky."""

    missing_fraction: float = 0.0
    """Fraction of the stamps of which one band, any with equal chance, is
    set to 0, as a missing band is."""

    masked_fraction: float = 0.0
    """Fraction of the stamps of which an area is set to 0, as masked pixels
    are: in half of them a strip of rows or columns up to a seventh of the side
    wide, as bleeding and gaps leave them, in the others a disc of up to a
    quarter of the side across beside the centre, as bright stars do; in each
    band with a chance of three quarters."""

    def __call__(self, images: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return changed stamps, and how much noisier each has become.

        Parameters
        ----------
        images
            Stamps in units of the noise, shape ``(N, bands, y, x)``.
        generator
            Source of random numbers; `None` crops the stamps to size and
            changes nothing else.

        Returns
        -------
        images
            Shape ``(N, bands, size, size)``.
        noise
            Noise in units of that of the stamp, at least 1, shape ``(N,)``.
        """
        noise = torch.ones(len(images))
        if generator is None:
            start = (images.shape[-1] - self.size) // 2
            return images[..., start : start + self.size, start : start + self.size], noise
        images = self._crop(images, generator)
        images = _flip(images, generator)
        if self.warp_fraction > 0 and (self.max_rotation > 0 or self.zoom != (1.0, 1.0)):
            images = self._warp(images, generator)
        variance = torch.ones(images.shape[:2])
        if self.max_blur > 0:
            images, variance = self._blur(images, generator)
        if self.flux_scatter > 0:
            images = images * torch.exp(self.flux_scatter * _normal_per_band(images, generator))
        if self.offset_scatter > 0:
            images = images + self.offset_scatter * _normal_per_band(images, generator)
        if self.max_noise > 1:
            chosen = torch.rand(len(images), generator=generator) < 0.5
            factor = self.max_noise ** torch.rand(len(images), generator=generator)
            noise = torch.where(chosen, factor, noise)
        if self.max_noise > 1 or self.max_blur > 0:
            added = torch.sqrt(noise[:, None] ** 2 - variance)[..., None, None]
            images = images + added * torch.randn(images.shape, generator=generator)
            images = images / noise[:, None, None, None]
        if self.missing_fraction > 0:
            images = self._drop_band(images, generator)
        if self.masked_fraction > 0:
            images = images * ~self._draw_masks(images, generator)
        return images, noise

    def _crop(self, images: Tensor, generator: torch.Generator) -> Tensor:
        margin = (images.shape[-1] - self.size) // 2
        reach = min(self.max_shift, margin)
        corner = margin + torch.randint(-reach, reach + 1, (2, len(images)), generator=generator)
        pixels = torch.arange(self.size)
        rows, columns = (c[:, None] + pixels for c in corner)  # (N, size)
        n = torch.arange(len(images))[:, None, None]
        return images[n, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _warp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        low, high = self.zoom
        n = len(images)
        factor = low + (high - low) * torch.rand(n, generator=generator)
        angle = torch.rand(n, generator=generator) * 2 - 1
        angle = angle * math.radians(self.max_rotation)
        chosen = torch.rand(n, generator=generator) < self.warp_fraction
        matrix = torch.zeros(n, 2, 3)
        matrix[:, 0, 0] = matrix[:, 1, 1] = torch.cos(angle) / factor
        matrix[:, 1, 0] = torch.sin(angle) / factor
        matrix[:, 0, 1] = -matrix[:, 1, 0]
        if not chosen.any():
            # affine_grid refuses an empty batch.
            return images
        matrix, warped = matrix[chosen], images.clone()
        grid = functional.affine_grid(matrix, [len(matrix), *images.shape[1:]], align_corners=False)
        warped[chosen] = functional.grid_sample(
            images[chosen], grid, padding_mode="reflection", align_corners=False
        )
        return warped

    def _drop_band(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, bands = images.shape[:2]
        dropped = torch.rand(n, 1, generator=generator) < self.missing_fraction
        band = torch.randint(bands, (n, 1), generator=generator)
        keep = ~(dropped & (torch.arange(bands) == band))
        return images * keep[..., None, None]

    def _draw_masks(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return masked pixels, of the shape of the stamps."""
        n, bands, size = images.shape[:3]
        masked = torch.rand(n, generator=generator) < self.masked_fraction
        strip = torch.rand(n, generator=generator) < 0.5
        where, extent, angle, turn = torch.rand(4, n, 1, 1, generator=generator)
        in_band = torch.rand(n, bands, generator=generator) < 0.75
        half = (size - 1) / 2
        pixels = torch.arange(size) - half
        y, x = pixels[:, None], pixels
        across = torch.where(turn < 0.5, x, y)  # (N, size, size)
        rows = (across - size * (where - 0.5)).abs() < extent * size / 14
        radius = 1 + extent * (size / 8 - 1)
        distance = radius + 3 + where * half
        angle = 2 * math.pi * angle
        disc = torch.hypot(x - distance * angle.cos(), y - distance * angle.sin()) < radius
        area = torch.where(strip[:, None, None], rows, disc)
        return (masked[:, None] & in_band)[..., None, None] & area[:, None]

    def _blur(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return blurred stamps, and the variance that is left of their
        noise, shape ``(N, bands)``.
        """
        n, bands = images.shape[:2]
        sigma = self.max_blur * torch.rand(n, 1, generator=generator)
        sigma = sigma * (torch.rand(n, 1, generator=generator) < 0.5)
        sigma = sigma * (1 + 0.1 * torch.randn(n, bands, generator=generator)).clamp(min=0.0)
        offsets = torch.arange(-3, 4)
        weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-2)[..., None]) ** 2)
        weights = weights / weights.sum(dim=-1, keepdim=True)  # (N, bands, 7)
        variance = (weights**2).sum(dim=-1) ** 2
        weights = weights.reshape(n * bands, 1, 1, 7)
        flat = images.reshape(1, n * bands, *images.shape[2:])
        flat = functional.conv2d(flat, weights, padding=(0, 3), groups=n * bands)
        flat = functional.conv2d(flat, weights.transpose(2, 3), padding=(3, 0), groups=n * bands)
        return flat.reshape(images.shape), variance


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply one of the eight symmetries of the square to each stamp."""
    choice = torch.rand(3, len(images), 1, 1, 1, generator=generator) < 0.5
    images = torch.where(choice[0], images.flip(-1), images)
    images = torch.where(choice[1], images.flip(-2), images)
    return torch.where(choice[2], images.transpose(-1, -2), images)


def _normal_per_band(images: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(*images.shape[:2], 1, 1, generator=generator)

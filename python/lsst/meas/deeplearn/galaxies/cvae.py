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

"""A conditional variational autoencoder of galaxy images.

Ravanbakhsh et al. (2017, arXiv:1609.05796) and Lanusse et al. (2021, MNRAS
504, 5543, arXiv:2008.03833): an encoder q(z|x, y), a prior p(z|y) and a
decoder p(x|z, y) of images x with conditions y.  As in the latter, the
decoder makes the galaxy as it is before the PSF, the likelihood is that of
noise that is correlated between pixels, and the prior is a normalizing flow.

Unlike them, the decoder knows what an ellipse is.  It makes a de Vaucouleurs
bulge and an exponential disk, and multiplies the disk by a texture, which
convolutions make in the plane of the disk, in units of its radius.  So size
and shape are exact on every grid, and the convolutions work on the same
pattern whatever the size, inclination and direction of the galaxy.  There
are two kinds of latent variables: those of the shape, which a flow describes
given y, and some for each place in the disk.  The second kind is what makes
knots that are sharp; a few variables for the whole galaxy can only blur them.
How they depend on each other, on the shape and on y, a flow of maps describes:
if they were independent, all disks would be equally knotty.

Grids are those of `fourier`, with the origin at pixel S / 2; everything is
drawn in Fourier space.
"""

from __future__ import annotations

__all__ = (
    "Cvae",
    "CvaeOutput",
    "Elbo",
    "Envelope",
    "compute_elbo",
    "compute_log_likelihood",
    "compute_transform",
    "invert_transform",
)

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import galsim
import torch
from torch import Tensor, nn
from torch.nn import functional

from .conditions import CONDITION_NAMES, ConditionSpace
from .flow import ConditionalFlow, MapFlow, append_radius

ENVELOPE_PARAMETERS = 8
"""Radii of disk and bulge, bulge fraction, two components of ellipticity,
roundness of the bulge, and the position."""

MAX_ELLIPTICITY = 0.92
"""Largest (1 - q) / (1 + q) of a disk."""

MAX_TEXTURE = 5.0
"""Largest logarithm of the factor on the disk."""

TEXTURE_REACH = 3.6
"""Half of the side of the texture in half-light radii of the disk."""

SHAPE_REACH = 4.0
"""Half of the side of what the first encoder sees, in half-light radii."""

SHAPE_SIZE = 48
"""Pixels on a side of what the first encoder sees."""

CELL = 4
"""Pixels of the texture on a side of the cells that have latents."""

EXPONENTIAL_HALF_LIGHT_RADIUS = 1.6783469900166605
"""Half-light radius of an exponential disk in units of its scale length."""

N_CONDITIONS = len(CONDITION_NAMES)


class Envelope(NamedTuple):
    """Bulges and disks of a batch; lengths are in arcsec, shapes ``(N,)``."""

    disk_radius: Tensor
    """Half-light radius of the circle with the area of the ellipse."""

    bulge_radius: Tensor
    """The same of the bulge."""

    bulge_fraction: Tensor
    """Fraction of the flux in the bulge."""

    disk_axis_ratio: Tensor
    """Minor over major axis."""

    bulge_axis_ratio: Tensor
    """The same of the bulge."""

    angle: Tensor
    """Direction of the major axes in radians, counter-clockwise from x."""

    x: Tensor
    """Position of the centre."""

    y: Tensor
    """Position of the centre."""


class CvaeOutput(NamedTuple):
    """What the network makes of a batch."""

    transform: Tensor
    """Transforms of the galaxies before the PSF, for a flux of 1, shape
    ``(N, S, S / 2 + 1)``."""

    mean: Tensor
    """Means of the latent variables of the shape in q(z|x, y), shape
    ``(N, Z)``."""

    shape_divergence: Tensor
    """KL divergence of these variables from their prior, estimated by the
    one draw of them, shape ``(N,)``."""

    texture_divergence: Tensor
    """The same of the variables of the texture, shape ``(N,)``."""


class Elbo(NamedTuple):
    """The two terms of the evidence lower bound, in nats a galaxy."""

    log_likelihood: Tensor
    """Log p(x|z, y) of the pixels, with one draw of z, shape ``(N,)``."""

    kl_divergence: Tensor
    """KL divergence of q(z|x, y) from p(z|y), shape ``(N,)``."""


class Cvae(nn.Module):
    """The network.

    Parameters
    ----------
    conditions
        Settings of the `ConditionSpace` of the training set.
    pixel_scale
        Side of a pixel in arcsec.
    in_bands
        Number of bands; only 1 is possible.
    size
        Even number of pixels S on a side of the grid.
    width
        Channels of the narrowest convolutions.
    latents
        Number Z of latent variables of the shape.
    texture_size
        Pixels on a side of the texture, a multiple of 4.
    texture_latents
        Number of latent variables in each cell of 4 x 4 of them.
    texture_scale
        Standard deviation of the normal deviates from which the texture of
        new galaxies is drawn; 1 is the prior.
    texture_scatter
        Scatter of the logarithm of that deviation from galaxy to galaxy.
    radius_factor, radius_exponent
        New galaxies are made for a half-light radius that is larger than the
        one asked for by this factor, times the ratio of the latter to that of
        a typical galaxy to this exponent.
    axis_ratio_exponent
        Exponent of the axis ratios of new galaxies.
    texture_start
        Number of training steps before there is any texture, so that bulge
        and disk do what they can.
    flow_layers
        Number of layers of the flow that is the prior of the shape; 0 is a
        Gaussian.
    texture_layers
        Number of layers of the flow that is the prior of the texture; 0 is a
        Gaussian.
    output_fwhm
        Width in arcsec of the Gaussian that smooths generated galaxies to
        what the pixels can hold; see `smooth`.

    Raises
    ------
    ValueError
        Raised for settings that leave no network.
    """

    def __init__(
        self,
        *,
        conditions: Mapping[str, Any],
        pixel_scale: float,
        in_bands: int = 1,
        size: int = 128,
        width: int = 16,
        latents: int = 16,
        texture_size: int = 64,
        texture_latents: int = 2,
        texture_scale: float = 1.0,
        texture_scatter: float = 0.0,
        radius_factor: float = 1.0,
        radius_exponent: float = 0.0,
        axis_ratio_exponent: float = 1.0,
        texture_start: int = 1000,
        flow_layers: int = 8,
        texture_layers: int = 0,
        output_fwhm: float = 0.13,
    ) -> None:
        super().__init__()
        if (
            in_bands != 1
            or size < 16
            or size % 2
            or texture_size % CELL
            or min(width, latents - 1, texture_size, texture_latents) < 1
        ):
            raise ValueError(
                f"There is no network with in_bands={in_bands}, size={size}, width={width}, "
                f"latents={latents}, texture_size={texture_size}, "
                f"texture_latents={texture_latents}; it has one band, an even "
                "size of at least 16, two latents and a texture size that is a multiple of 4."
            )
        if not output_fwhm > 1.5 * pixel_scale:
            raise ValueError(
                f"Pixels of {pixel_scale} arcsec cannot hold galaxies of {output_fwhm} arcsec resolution; "
                "output_fwhm must be larger than 1.5 pixels."
            )
        self.steps: Tensor
        self.condition_space = ConditionSpace.from_settings(conditions)
        self.size, self.pixel_scale, self.output_fwhm = size, pixel_scale, output_fwhm
        self.latents, self.texture_start = latents, texture_start
        self.texture_scale, self.texture_scatter = texture_scale, texture_scatter
        self.radius_factor, self.radius_exponent = radius_factor, radius_exponent
        self.axis_ratio_exponent = axis_ratio_exponent
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.texture_shape = (texture_latents, texture_size // CELL, texture_size // CELL)
        context = latents + N_CONDITIONS
        self.shape_encoder = _ShapeEncoder(width, latents)
        self.texture_encoder = _TextureEncoder(width, context + 1, texture_latents)
        self.prior = ConditionalFlow(latents, N_CONDITIONS, layers=flow_layers)
        self.envelope = nn.Sequential(
            nn.Linear(context, 128),
            nn.SiLU(),
            nn.Linear(128, 128),
            nn.SiLU(),
            nn.Linear(128, ENVELOPE_PARAMETERS),
        )
        self.texture = _TextureDecoder(width, context, texture_latents)
        self.texture_prior = MapFlow(texture_latents, context, layers=texture_layers)
        for layer in (self.envelope[-1], self.texture.last):
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=1e-2)
            nn.init.zeros_(layer.bias)

    @property
    def n_latents(self) -> int:
        """Number of all latent variables."""
        return self.latents + math.prod(self.texture_shape)

    def forward(
        self,
        image: Tensor,
        psf: Tensor,
        noise: Tensor,
        conditions: Tensor,
        latent_noise: Tensor | None = None,
    ) -> CvaeOutput:
        """Encode images, draw latent variables, and decode these.

        Parameters
        ----------
        image
            Images with PSF and noise for a flux of 1, shape ``(N, S, S)``.
        psf
            Their PSFs, shape ``(N, S, S)``.
        noise
            Standard deviation of the noise in a pixel, shape ``(N,)``.
        conditions
            Scaled conditions, shape ``(N, 3)``.
        latent_noise
            Normal deviates from which z is made, shape
            ``(N, n_latents)``; drawn from the generator of torch by default.
        """
        if latent_noise is None:
            latent_noise = torch.randn(len(image), self.n_latents, device=image.device)
        shape_noise, texture_noise = self._split(latent_noise)
        mean, log_variance = self.encode(image, psf, noise, conditions)
        radius = self._compute_radius(conditions)
        shape = mean + torch.exp(0.5 * log_variance) * shape_noise
        context = torch.cat([shape, conditions], dim=1)
        envelope = self._make_envelope(context, radius)
        smooth = self._draw_envelope(envelope)
        # One draw of z for the flow, which has no closed form.
        log_posterior = _compute_log_posterior(shape_noise, log_variance)
        shape_divergence = log_posterior - self.prior.compute_log_density(shape, conditions)
        if self.training:
            self.steps += 1
        if self.steps <= self.texture_start:
            return CvaeOutput(smooth[0] + smooth[1], mean, shape_divergence, torch.zeros_like(radius))
        texture_mean, texture_log_variance = self._encode_texture(
            image, psf, noise, context, envelope, smooth
        )
        texture = texture_mean + torch.exp(0.5 * texture_log_variance) * texture_noise
        log_posterior = _compute_log_posterior(texture_noise.flatten(1), texture_log_variance.flatten(1))
        return CvaeOutput(
            transform=self._add_texture(envelope, smooth, self.texture(texture, context)),
            mean=mean,
            shape_divergence=shape_divergence,
            texture_divergence=log_posterior - self.texture_prior.compute_log_density(texture, context),
        )

    def encode(self, image: Tensor, psf: Tensor, noise: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the shape in q(z|x, y).

        Parameters
        ----------
        image, psf, noise, conditions
            As for `forward`.

        Returns
        -------
        mean, log_variance
            Shape ``(N, Z)`` each.
        """
        scalars = torch.cat([torch.log10(noise)[:, None] + 3, conditions], dim=1)
        seen = self._zoom(image, psf, noise, self._compute_radius(conditions))
        mean, log_variance = self.shape_encoder(seen, scalars)
        return mean, log_variance

    def encode_texture(
        self, image: Tensor, psf: Tensor, noise: Tensor, conditions: Tensor, shape: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the texture in q(z|x, y).

        Parameters
        ----------
        image, psf, noise, conditions
            As for `forward`.
        shape
            Latent variables of the shape, shape ``(N, Z)``.

        Returns
        -------
        mean, log_variance
            Shape ``(N, *texture_shape)`` each.
        """
        context = torch.cat([shape, conditions], dim=1)
        envelope = self._make_envelope(context, self._compute_radius(conditions))
        return self._encode_texture(image, psf, noise, context, envelope, self._draw_envelope(envelope))

    def sample(self, conditions: Tensor, latent_noise: Tensor, orientation: Tensor | None = None) -> Tensor:
        """Decode latent variables drawn from p(z|y).

        Parameters
        ----------
        conditions
            Scaled conditions, shape ``(N, 3)``.
        latent_noise
            Normal deviates, shape ``(N, n_latents)``.
        orientation
            Angle in radians by which to turn galaxies counter-clockwise,
            after mirroring them about the x axis if it is negative, shape
            ``(N,)``; by default they are left as they are.

        Returns
        -------
        transform
            As of `fourier.compute_transform`, for a flux of 1, before the
            PSF, shape ``(N, S, S / 2 + 1)``.
        """
        shape_noise, texture_noise = self._split(latent_noise)
        shape = self.prior.sample(shape_noise, conditions)
        context = torch.cat([shape, conditions], dim=1)
        envelope = self._make_envelope(context, self._correct_radius(self._compute_radius(conditions)))
        envelope = envelope._replace(
            disk_axis_ratio=envelope.disk_axis_ratio**self.axis_ratio_exponent,
            bulge_axis_ratio=envelope.bulge_axis_ratio**self.axis_ratio_exponent,
        )
        texture = self.texture_prior.sample(self._stretch(texture_noise), context)
        factor = self.texture(texture, context)
        if orientation is not None:
            sign = torch.where(orientation < 0, -1.0, 1.0)
            cos, sin = torch.cos(orientation), torch.sin(orientation)
            x, y = envelope.x, sign * envelope.y
            envelope = envelope._replace(
                angle=sign * envelope.angle + orientation, x=cos * x - sin * y, y=sin * x + cos * y
            )
            factor = torch.where((sign < 0)[:, None, None, None], factor.flip(-2), factor)
        return self._add_texture(envelope, self._draw_envelope(envelope), factor)

    def smooth(self, transform: Tensor) -> Tensor:
        """Convolve with the Gaussian of ``output_fwhm``.

        So galaxies can be interpolated between pixels; no noise of the
        training images is in them.

        Parameters
        ----------
        transform
            What `sample` returns, shape ``(N, S, S / 2 + 1)``.

        Returns
        -------
        image
            Flux in each pixel, shape ``(N, S, S)``.
        """
        sigma = self.output_fwhm / (2 * math.sqrt(2 * math.log(2)))
        ky, kx = self._make_wave_numbers(transform.device)
        return invert_transform(transform, torch.exp(-0.5 * sigma**2 * (kx**2 + ky**2)))

    def _split(self, latent_noise: Tensor) -> tuple[Tensor, Tensor]:
        shape, texture = latent_noise.split([self.latents, math.prod(self.texture_shape)], dim=1)
        return shape, texture.view(-1, *self.texture_shape)

    def _compute_radius(self, conditions: Tensor) -> Tensor:
        """Return the half-light radius in arcsec of scaled conditions."""
        space = self.condition_space
        return 10 ** (conditions[:, 0].float() * space.scale[0] + space.mean[0])

    def _correct_radius(self, radius: Tensor) -> Tensor:
        """Return radii of which galaxies come out as large as asked for."""
        ratio = radius / 10 ** self.condition_space.mean[0]
        return radius * self.radius_factor * ratio**self.radius_exponent

    def _stretch(self, noise: Tensor) -> Tensor:
        """Give normal deviates, ``(N, C, y, x)``, the scatter of a texture.

        How long a vector of them is says nothing about its direction, so that
        their own length can tell by how much to stretch them.
        """
        n = noise[0].numel()
        excess = math.sqrt(n / 2) * ((noise**2).mean(dim=(1, 2, 3), keepdim=True) - 1)  # normal
        return self.texture_scale * torch.exp(self.texture_scatter * excess) * noise

    def _make_envelope(self, context: Tensor, radius: Tensor) -> Envelope:
        """Turn what the network says into bulges and disks."""
        p = self.envelope(context).float().unbind(dim=1)
        norm = torch.sqrt(p[3] ** 2 + p[4] ** 2 + 1e-8)
        g = MAX_ELLIPTICITY * torch.tanh(norm)
        bulge_g = g * torch.sigmoid(p[5])
        return Envelope(
            # Within factors of 5 of each other.
            disk_radius=radius * torch.exp(0.2 + 1.5 * torch.tanh(p[0] / 1.5)),
            bulge_radius=radius * torch.exp(-0.6 + 2 * torch.tanh(p[1] / 2)),
            bulge_fraction=torch.sigmoid(p[2] - 1),
            disk_axis_ratio=(1 - g) / (1 + g),
            bulge_axis_ratio=(1 - bulge_g) / (1 + bulge_g),
            angle=0.5 * torch.atan2(p[4], p[3] + 1e-8),
            x=0.3 * radius * torch.tanh(p[6]),
            y=0.3 * radius * torch.tanh(p[7]),
        )

    def _make_wave_numbers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        ky = 2 * math.pi * torch.fft.fftfreq(self.size, self.pixel_scale, device=device)[:, None]
        kx = 2 * math.pi * torch.fft.rfftfreq(self.size, self.pixel_scale, device=device)
        return ky, kx

    def _draw_envelope(self, envelope: Envelope) -> tuple[Tensor, Tensor]:
        """Return the transforms of bulges and disks, each of its flux."""
        e = Envelope(*(part[:, None, None] for part in envelope))
        ky, kx = self._make_wave_numbers(envelope.x.device)
        cos, sin = torch.cos(e.angle), torch.sin(e.angle)
        major, minor = (sin * ky + cos * kx) ** 2, (cos * ky - sin * kx) ** 2
        scale = (e.disk_radius / EXPONENTIAL_HALF_LIGHT_RADIUS) ** 2
        square = 1 + scale * (major / e.disk_axis_ratio + minor * e.disk_axis_ratio)
        disk = (1 - e.bulge_fraction) * torch.rsqrt(square) / square
        square = e.bulge_radius**2 * (major / e.bulge_axis_ratio + minor * e.bulge_axis_ratio)
        bulge = e.bulge_fraction * _compute_bulge(square)
        phase = -(kx * e.x + ky * e.y)
        turn = torch.complex(torch.cos(phase), torch.sin(phase))
        return turn * bulge, turn * disk

    def _add_texture(self, envelope: Envelope, smooth: tuple[Tensor, Tensor], texture: Tensor) -> Tensor:
        """Return the transform of bulges and textured disks.

        ``texture`` has the logarithms of the factor on the disk, shape
        ``(N, 1, texture_size, texture_size)``.
        """
        bulge, disk = smooth
        e = Envelope(*(part[:, None, None] for part in envelope))
        offset = self.pixel_scale * (torch.arange(self.size, device=texture.device) - self.size // 2)
        x, y = offset - e.x, offset[:, None] - e.y
        # No gradient: the direction of a round disk is arbitrary.
        cos, sin = torch.cos(e.angle.detach()), torch.sin(e.angle.detach())
        root = torch.sqrt(e.disk_axis_ratio)
        u = (cos * x + sin * y) * root / e.disk_radius
        v = (cos * y - sin * x) / (root * e.disk_radius)
        where = torch.stack([u, v], dim=-1).detach() / TEXTURE_REACH
        factor = functional.grid_sample(texture.float(), where, align_corners=True)[:, 0]  # (N, S, S)
        factor = MAX_TEXTURE * torch.tanh(factor / MAX_TEXTURE)
        # Exponential disk of unit flux in units of its half-light radius.
        rate = EXPONENTIAL_HALF_LIGHT_RADIUS
        density = rate**2 / (2 * math.pi) * torch.exp(-rate * torch.sqrt(u**2 + v**2 + 1e-6))
        excess = (self.pixel_scale / e.disk_radius) ** 2 * density * torch.expm1(factor)
        flux = 1 + excess.sum(dim=(1, 2), keepdim=True)
        extra = (1 - e.bulge_fraction) * compute_transform(excess)
        return bulge + (disk + extra) / flux.clamp(min=0.05)

    def _zoom(self, image: Tensor, psf: Tensor, noise: Tensor, radius: Tensor) -> Tensor:
        """Return images and PSFs in units of the half-light radius.

        The image is given twice, in units of its noise and of its surface
        brightness; shape ``(N, 3, SHAPE_SIZE, SHAPE_SIZE)``.
        """
        steps = torch.linspace(-SHAPE_REACH, SHAPE_REACH, SHAPE_SIZE, device=image.device)
        pixels = steps * radius[:, None] / self.pixel_scale  # (N, SHAPE_SIZE)
        shape = (len(image), SHAPE_SIZE, SHAPE_SIZE)
        x, y = pixels[:, None, :].expand(shape), pixels[:, :, None].expand(shape)
        seen = self._sample_pixels(torch.stack([image, psf], dim=1), x, y)
        area = (radius / self.pixel_scale)[:, None, None] ** 2
        return torch.stack(
            [
                torch.asinh(seen[:, 0] / noise[:, None, None]),
                torch.asinh(5 * seen[:, 0] * area),
                seen[:, 1] / psf.amax(dim=(1, 2))[:, None, None],
            ],
            dim=1,
        )

    def _encode_texture(
        self,
        image: Tensor,
        psf: Tensor,
        noise: Tensor,
        context: Tensor,
        envelope: Envelope,
        smooth: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of the texture, given its disk."""
        with torch.no_grad():
            observed = invert_transform(smooth[0] + smooth[1], compute_transform(psf))
            residual = self._deproject(image, observed, noise, envelope)
        mean, log_variance = self.texture_encoder(
            residual, torch.cat([context, torch.log10(noise)[:, None] + 3], dim=1)
        )
        return mean, log_variance

    def _deproject(self, image: Tensor, smooth: Tensor, noise: Tensor, envelope: Envelope) -> Tensor:
        """Return what is left of images in the plane of the disk.

        In units of the noise, and of the noise and the smooth galaxy, shape
        ``(N, 2, texture_size, texture_size)``.
        """
        e = Envelope(*(part[:, None, None] for part in envelope))
        n = CELL * self.texture_shape[1]
        steps = torch.linspace(-TEXTURE_REACH, TEXTURE_REACH, n, device=image.device)
        cos, sin = torch.cos(e.angle), torch.sin(e.angle)
        major = steps * e.disk_radius / torch.sqrt(e.disk_axis_ratio)
        minor = steps[:, None] * e.disk_radius * torch.sqrt(e.disk_axis_ratio)
        x, y = e.x + cos * major - sin * minor, e.y + sin * major + cos * minor
        level = noise[:, None, None]
        rest = image - smooth
        planes = torch.stack([torch.asinh(rest / level), rest / (smooth.clamp(min=0) + 2 * level)], dim=1)
        return self._sample_pixels(planes, x / self.pixel_scale, y / self.pixel_scale)

    def _sample_pixels(self, planes: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Interpolate in images, ``(N, C, S, S)``, by pixels from centre."""
        where = torch.stack([x, y], dim=-1) + self.size // 2
        return functional.grid_sample(planes, 2 * where / (self.size - 1) - 1, align_corners=True)


def _compute_log_posterior(noise: Tensor, log_variance: Tensor) -> Tensor:
    """Return log q of what is drawn with normal deviates, shape ``(N,)``."""
    return -0.5 * (noise**2 + log_variance + math.log(2 * math.pi)).sum(dim=1)


class _ShapeEncoder(nn.Module):
    """Means and variances of the latent variables of the shape."""

    def __init__(self, width: int, latents: int) -> None:
        super().__init__()
        channels = [3, 2 * width, 4 * width, 6 * width]
        self.first = nn.Linear(1 + N_CONDITIONS, 2 * width)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 5, stride=2, padding=2) for i, o in zip(channels[:-1], channels[1:], strict=True)
        )
        features = channels[-1] * (SHAPE_SIZE // 8) ** 2 + 1 + N_CONDITIONS
        self.head = nn.Sequential(
            nn.Linear(features, 16 * width), nn.SiLU(), nn.Linear(16 * width, 2 * latents)
        )

    def forward(self, seen: Tensor, scalars: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.convolutions[0](seen) + self.first(scalars)[:, :, None, None]
        for convolution in self.convolutions[1:]:
            maps = convolution(functional.silu(maps))
        features = torch.cat([functional.silu(maps).flatten(1), scalars], dim=1)
        mean, log_variance = self.head(features).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 4)


class _TextureEncoder(nn.Module):
    """Means and variances of the latent variables of the texture."""

    def __init__(self, width: int, context: int, latents: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [nn.Conv2d(2, width, 5, stride=2, padding=2), nn.Conv2d(width, 2 * width, 5, stride=2, padding=2)]
        )
        self.context = nn.Linear(context, 4 * width)
        self.convolutions = nn.ModuleList(
            [nn.Conv2d(2 * width + 1, 4 * width, 3, padding=1), nn.Conv2d(4 * width, 4 * width, 3, padding=1)]
        )
        self.head = nn.Conv2d(4 * width, 2 * latents, 1)

    def forward(self, residual: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        maps = residual
        for convolution in self.down:
            maps = functional.silu(convolution(maps))
        maps = self.convolutions[0](append_radius(maps)) + self.context(context)[:, :, None, None]
        maps = functional.silu(self.convolutions[1](functional.silu(maps)))
        mean, log_variance = self.head(maps).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4)


class _TextureDecoder(nn.Module):
    """Logarithm of the factor on the disk."""

    def __init__(self, width: int, context: int, latents: int) -> None:
        super().__init__()
        self.context = nn.Linear(context, 4 * width)
        self.first = nn.Conv2d(latents + 1, 4 * width, 3, padding=1)
        self.second = nn.Conv2d(4 * width, 4 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1)
        self.third = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up_again = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        maps = functional.silu(self.first(append_radius(latents)) + self.context(context)[:, :, None, None])
        maps = functional.silu(self.second(maps))
        maps = functional.silu(self.up(maps))
        maps = functional.silu(self.third(maps))
        maps = functional.silu(self.up_again(maps))
        result: Tensor = self.last(maps)
        return result  # (N, 1, texture_size, texture_size)


@functools.cache
def _tabulate_bulge() -> Tensor:
    """Return the transform of a de Vaucouleurs profile.

    At logarithms of the squared wave number times half-light radius from -16
    to 16 in steps of 1/16.
    """
    profile = galsim.DeVaucouleurs(half_light_radius=1.0)
    return torch.tensor([profile.kValue(math.exp(i / 32), 0.0).real for i in range(-256, 257)])


def _compute_bulge(square: Tensor) -> Tensor:
    """Interpolate in that table, at squared wave numbers."""
    position = (16 * torch.log(square.clamp(min=1.2e-7)) + 256).clamp(0, 511.99)
    index = position.detach().long()
    table = _tabulate_bulge().to(square.device)
    return torch.lerp(table[index], table[index + 1], position - index)


def compute_elbo(
    output: CvaeOutput,
    image: Tensor,
    psf: Tensor,
    noise_power: Tensor,
    noise_variance: Tensor,
    *,
    flux_scatter: float = 0.0,
) -> Elbo:
    """Return both terms of the evidence lower bound.

    Parameters
    ----------
    output
        What the network makes of the images.
    image, psf
        Images and their PSFs, shape ``(N, S, S)``.
    noise_power
        Power of the noise in each mode, as of
        `fourier.compute_noise_power`, shape ``(S, S / 2 + 1)``.
    noise_variance
        Factor on that for each galaxy, shape ``(N,)``.
    flux_scatter
        As for `compute_log_likelihood`.
    """
    log_likelihood = compute_log_likelihood(
        compute_transform(image),
        output.transform * compute_transform(psf),
        noise_power,
        noise_variance,
        flux_scatter=flux_scatter,
    )
    return Elbo(log_likelihood, output.shape_divergence + output.texture_divergence)


def compute_log_likelihood(
    data: Tensor,
    model: Tensor,
    noise_power: Tensor,
    noise_variance: Tensor,
    *,
    flux_scatter: float = 0.0,
) -> Tensor:
    r"""Return the log likelihood of images, shape ``(N,)``.

    The noise is independent between the modes k of the image,

    .. math::
        \ln p = -\frac{1}{2} \sum_k \left[ \frac{|d_k - m_k|^2}{S^2 v P_k}
            + \ln(2 \pi v P_k) \right],

    over all modes but the Nyquist frequencies.  If the flux of the model has
    a Gaussian error of relative size s, it is integrated out.

    Parameters
    ----------
    data, model
        Transforms d and m of the images and of the models with PSF, shape
        ``(N, S, S / 2 + 1)``.
    noise_power
        The power P, shape ``(S, S / 2 + 1)``.
    noise_variance
        The factor v, shape ``(N,)``.
    flux_scatter
        The error s; 0 means that fluxes are exact.
    """
    size = data.shape[-2]
    half = size // 2
    weights = torch.full_like(noise_power, 2.0)
    weights[:, 0] = 1.0
    weights[half] = weights[:, half] = 0.0
    variance = noise_variance[:, None, None] * noise_power  # (N, S, S / 2 + 1)
    inverse = weights / (size**2 * variance)
    residual = data - model
    chi2 = (inverse * (residual.real**2 + residual.imag**2)).sum(dim=(1, 2))
    log_norm = (weights * torch.log(2 * math.pi * variance)).sum(dim=(1, 2))
    if flux_scatter > 0:
        along = (inverse * (residual.real * model.real + residual.imag * model.imag)).sum(dim=(1, 2))
        square = 1 + flux_scatter**2 * (inverse * (model.real**2 + model.imag**2)).sum(dim=(1, 2))
        chi2 = chi2 - flux_scatter**2 * along**2 / square
        log_norm = log_norm + torch.log(square)
    return -0.5 * (chi2 + log_norm)


def compute_transform(image: Tensor) -> Tensor:
    """Return the transform of images with the origin at pixel S / 2.

    As `fourier.compute_transform`, for tensors and with the Nyquist
    frequencies.

    Parameters
    ----------
    image
        Shape ``(N, S, S)``.
    """
    return torch.fft.rfft2(torch.fft.ifftshift(image.float(), dim=(-2, -1)))


def invert_transform(transform: Tensor, psf: Tensor) -> Tensor:
    """Return galaxies as they are observed, without noise.

    Parameters
    ----------
    transform
        What `Cvae.sample` returns, shape ``(N, S, S / 2 + 1)``.
    psf
        Transforms of PSFs, which broadcast to that shape.

    Returns
    -------
    image
        Flux in each pixel, shape ``(N, S, S)``.
    """
    product = transform * psf
    half = product.shape[-2] // 2
    keep = torch.ones(product.shape[-2:], device=product.device)
    keep[half] = keep[:, half] = 0
    size = product.shape[-2]
    return torch.fft.fftshift(torch.fft.irfft2(product * keep, s=(size, size)), dim=(-2, -1))

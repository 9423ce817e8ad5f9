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
decoder makes the galaxy as it is before the PSF, and the likelihood is that
of noise that is correlated between pixels.  Unlike them, the decoder makes a
correction to a Sersic profile, not the whole image, so that sizes and wings
need not be learned pixel by pixel.

Grids are those of `fourier`, with the origin at pixel S / 2.
"""

from __future__ import annotations

__all__ = (
    "Cvae",
    "CvaeOutput",
    "Elbo",
    "compute_elbo",
    "compute_kl_divergence",
    "compute_log_likelihood",
    "convolve",
)

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .conditions import CONDITION_NAMES, ConditionSpace

MAX_CHANNELS = 256
"""Largest number of channels of a convolution."""

MAX_CORRECTION = 6.0
"""Largest logarithm of the factor on the Sersic profile."""

SOFTENING = 0.4
"""Radius in pixels within which the Sersic profile is flat."""

ENVELOPE_PARAMETERS = 6
"""Radius, index, two components of ellipticity and the position."""

N_CONDITIONS = len(CONDITION_NAMES)


class CvaeOutput(NamedTuple):
    """What the network makes of a batch."""

    brightness: Tensor
    """Fluxes of the galaxies before the PSF at the centres of pixels, all
    positive, their sum 1, shape ``(N, S, S)``."""

    mean: Tensor
    """Means of q(z|x, y), shape ``(N, Z)``."""

    log_variance: Tensor
    """Logarithms of its variances, shape ``(N, Z)``."""

    prior_mean: Tensor
    """Means of p(z|y), shape ``(N, Z)``."""

    prior_log_variance: Tensor
    """Logarithms of its variances, shape ``(N, Z)``."""


class Elbo(NamedTuple):
    """The two terms of the evidence lower bound, in nats a galaxy."""

    log_likelihood: Tensor
    """Log p(x|z, y) of the pixels, with one draw of z, shape ``(N,)``."""

    kl_divergence: Tensor
    """KL divergence of q(z|x, y) from p(z|y), shape ``(N,)``."""


class Cvae(nn.Module):
    """The network.

    Strided 5x5 convolutions bring the image to 4x4 maps, transposed 4x4
    convolutions bring these back to the grid.

    Parameters
    ----------
    conditions
        Settings of the `ConditionSpace` of the training set.
    pixel_scale
        Side of a pixel in arcsec.
    in_bands
        Number of bands; only 1 is possible.
    size
        Pixels S on a side of the grid, a power of 2.
    width
        Channels of the first convolution; each further one has twice as
        many, up to 256.
    latents
        Number Z of latent variables.
    output_fwhm
        Width in arcsec of the Gaussian that smooths generated galaxies to
        what the pixels can hold; see `generate`.

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
        width: int = 32,
        latents: int = 32,
        output_fwhm: float = 0.13,
    ) -> None:
        super().__init__()
        levels = round(math.log2(size)) - 2
        if in_bands != 1 or 4 * 2**levels != size or min(levels, width, latents) < 1:
            raise ValueError(
                f"There is no network with in_bands={in_bands}, size={size}, width={width}, "
                f"latents={latents}; it has one band and a size that is a power of 2, at least 8."
            )
        if not output_fwhm > 1.5 * pixel_scale:
            raise ValueError(
                f"Pixels of {pixel_scale} arcsec cannot hold galaxies of {output_fwhm} arcsec resolution; "
                "output_fwhm must be larger than 1.5 pixels."
            )
        self.condition_space = ConditionSpace.from_settings(conditions)
        self.size, self.pixel_scale, self.latents, self.output_fwhm = size, pixel_scale, latents, output_fwhm
        channels = [min(width * 2**level, MAX_CHANNELS) for level in range(levels)]
        # Image, PSF, noise and conditions.
        self.encoder = _make_encoder(3 + N_CONDITIONS, channels)
        self.posterior = nn.Linear(16 * channels[-1], 2 * latents)
        self.prior = nn.Sequential(nn.Linear(N_CONDITIONS, 128), nn.ELU(), nn.Linear(128, 2 * latents))
        self.envelope = nn.Sequential(
            nn.Linear(latents + N_CONDITIONS, 128), nn.ELU(), nn.Linear(128, ENVELOPE_PARAMETERS)
        )
        self.expand = nn.Linear(latents + N_CONDITIONS, 16 * channels[-1])
        self.decoder = _make_decoder([*channels[::-1], width])
        # Prior and correction start out neutral.
        for layer in (self.prior[-1], self.envelope[-1], self.decoder[-1]):
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            nn.init.normal_(layer.weight, std=1e-2)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

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
            Normal deviates from which z is made, shape ``(N, Z)``; drawn
            from the generator of torch by default.
        """
        mean, log_variance = self.encode(image, psf, noise, conditions)
        if latent_noise is None:
            latent_noise = torch.randn_like(mean)
        z = mean + torch.exp(0.5 * log_variance) * latent_noise
        return CvaeOutput(self.decode(z, conditions), mean, log_variance, *self.compute_prior(conditions))

    def encode(self, image: Tensor, psf: Tensor, noise: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z|x, y), each ``(N, Z)``.

        Parameters
        ----------
        image, psf, noise, conditions
            As for `forward`.
        """
        scalars = torch.cat([torch.log10(noise)[:, None] + 3, conditions], dim=1)
        planes = scalars[:, :, None, None].expand(-1, -1, self.size, self.size)
        # Linear for noise, logarithmic for the peaks of bright galaxies.
        stretched = torch.asinh(image / noise[:, None, None])
        scaled_psf = psf / psf.amax(dim=(1, 2), keepdim=True)
        x = torch.cat([stretched[:, None], scaled_psf[:, None], planes], dim=1)  # (N, 6, S, S)
        mean, log_variance = self.posterior(self.encoder(x).flatten(1)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 6)

    def compute_prior(self, conditions: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of p(z|y), each ``(N, Z)``.

        Parameters
        ----------
        conditions
            Scaled conditions, shape ``(N, 3)``.
        """
        mean, log_variance = self.prior(conditions).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-12, 6)

    def decode(self, z: Tensor, conditions: Tensor) -> Tensor:
        """Return the galaxies before the PSF.

        Parameters
        ----------
        z
            Latent variables, shape ``(N, Z)``.
        conditions
            Scaled conditions, shape ``(N, 3)``.

        Returns
        -------
        brightness
            Positive fluxes at the centres of pixels, their sum 1, shape
            ``(N, S, S)``.
        """
        inputs = torch.cat([z, conditions], dim=1)
        maps = functional.elu(self.expand(inputs)).view(len(z), -1, 4, 4)
        correction = self.decoder(maps)[:, 0].float()  # (N, S, S)
        correction = MAX_CORRECTION * torch.tanh(correction / MAX_CORRECTION)
        log_envelope = self._compute_log_envelope(self.envelope(inputs).float(), conditions.float())
        total = (log_envelope + correction).flatten(1)
        return torch.softmax(total, dim=1).view(-1, self.size, self.size)

    def _compute_log_envelope(self, parameters: Tensor, conditions: Tensor) -> Tensor:
        """Return the logarithm of Sersic profiles, up to a constant.

        The radius is that of the condition times a factor; ellipticity is
        (1 - q) / (1 + q).
        """
        radius, index, e1, e2, dx, dy = (p[:, None, None] for p in parameters.unbind(dim=1))
        space = self.condition_space
        log_radius = (conditions[:, 0] * space.scale[0] + space.mean[0])[:, None, None]
        # Within a factor of three of what was asked for.
        radius = 10**log_radius / self.pixel_scale * torch.exp(1.1 * torch.tanh(radius))
        index = torch.exp(0.2 + 1.4 * torch.tanh(index))  # 0.3 to 5; 1.2 at first
        grid = torch.arange(self.size, device=parameters.device) - self.size // 2
        # Centroids are known to a fraction of the size.
        x = grid[None, None, :] - 0.5 * radius * torch.tanh(dx)
        y = grid[None, :, None] - 0.5 * radius * torch.tanh(dy)
        norm = torch.sqrt(e1**2 + e2**2 + 1e-12)
        shrink = 0.9 * torch.tanh(norm) / norm
        e1, e2 = shrink * e1, shrink * e2
        square = 1 + e1**2 + e2**2
        r2 = (square - 2 * e1) * x**2 + (square + 2 * e1) * y**2 - 4 * e2 * x * y
        r2 = r2 / (1 - e1**2 - e2**2) + SOFTENING**2
        # The first terms of b suffice; the rest is absorbed in the radius.
        return -(2 * index - 1 / 3) * (r2 / radius**2) ** (0.5 / index)

    def generate(self, conditions: Tensor, latent_noise: Tensor) -> Tensor:
        """Return new galaxies without PSF and noise.

        They are smoothed by a Gaussian of ``output_fwhm``, so that they can
        be interpolated between pixels; no noise of the training images and
        nothing negative is in them.

        Parameters
        ----------
        conditions
            Scaled conditions, shape ``(N, 3)``.
        latent_noise
            Normal deviates, shape ``(N, Z)``.

        Returns
        -------
        image
            Flux in each pixel, their sum 1, shape ``(N, S, S)``.
        """
        return self.smooth(self.sample(conditions, latent_noise))

    def sample(self, conditions: Tensor, latent_noise: Tensor) -> Tensor:
        """Decode latent variables drawn from p(z|y).

        Parameters
        ----------
        conditions, latent_noise
            As for `generate`.

        Returns
        -------
        brightness
            As from `decode`.
        """
        mean, log_variance = self.compute_prior(conditions)
        return self.decode(mean + torch.exp(0.5 * log_variance) * latent_noise, conditions)

    def smooth(self, brightness: Tensor) -> Tensor:
        """Convolve with the Gaussian of ``output_fwhm``.

        Parameters
        ----------
        brightness
            What `decode` returns, shape ``(N, S, S)``.
        """
        sigma = self.output_fwhm / self.pixel_scale / (2 * math.sqrt(2 * math.log(2)))
        reach = math.ceil(5 * sigma)
        offsets = torch.arange(-reach, reach + 1, device=brightness.device, dtype=brightness.dtype)
        kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
        kernel = kernel / kernel.sum()
        images = functional.pad(brightness[:, None], [reach] * 4, mode="circular")
        images = functional.conv2d(images, kernel.view(1, 1, 1, -1))
        return functional.conv2d(images, kernel.view(1, 1, -1, 1))[:, 0]


def _make_encoder(in_channels: int, channels: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for out_channels in channels:
        layers += [
            nn.Conv2d(in_channels, out_channels, 5, stride=2, padding=2),
            nn.BatchNorm2d(out_channels),
            nn.ELU(inplace=True),
        ]
        in_channels = out_channels
    return nn.Sequential(*layers)


def _make_decoder(channels: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for in_channels, out_channels in zip(channels[:-1], channels[1:], strict=True):
        layers += [
            nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ELU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 5, padding=2))


def convolve(brightness: Tensor, psf: Tensor) -> Tensor:
    """Return galaxies as they are observed, without noise.

    Parameters
    ----------
    brightness
        What `Cvae.decode` returns, shape ``(N, S, S)``.
    psf
        PSFs with their pixel, shape ``(N, S, S)``.
    """
    transform = _compute_transform(brightness) * _compute_transform(psf)
    return torch.fft.fftshift(torch.fft.irfft2(transform, s=brightness.shape[-2:]), dim=(-2, -1))


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
    transform = _compute_transform(output.brightness) * _compute_transform(psf)
    log_likelihood = compute_log_likelihood(
        _compute_transform(image), transform, noise_power, noise_variance, flux_scatter=flux_scatter
    )
    kl_divergence = compute_kl_divergence(
        output.mean, output.log_variance, output.prior_mean, output.prior_log_variance
    )
    return Elbo(log_likelihood, kl_divergence)


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


def compute_kl_divergence(
    mean: Tensor, log_variance: Tensor, prior_mean: Tensor, prior_log_variance: Tensor
) -> Tensor:
    """Return the KL divergence of diagonal Gaussians, shape ``(N,)``.

    Parameters
    ----------
    mean, log_variance
        Of the distribution, shape ``(N, Z)``.
    prior_mean, prior_log_variance
        Of the one that it diverges from, shape ``(N, Z)``.
    """
    difference = log_variance - prior_log_variance
    distance = (mean - prior_mean) ** 2 * torch.exp(-prior_log_variance)
    return 0.5 * (torch.exp(difference) + distance - 1 - difference).sum(dim=1)


def _compute_transform(image: Tensor) -> Tensor:
    """Return the transform of images with the origin at pixel S / 2."""
    return torch.fft.rfft2(torch.fft.ifftshift(image.float(), dim=(-2, -1)))

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


"""Tests of the variational autoencoder of galaxies."""

from __future__ import annotations

import math

import galsim
import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lsst.meas.deeplearn.galaxies.conditions import ConditionSpace
from lsst.meas.deeplearn.galaxies.cvae import (
    TEXTURE_REACH,
    Cvae,
    Envelope,
    compute_elbo,
    compute_log_likelihood,
)
from lsst.meas.deeplearn.galaxies.fourier import (
    compute_noise_power,
    compute_transform,
    draw_noise,
    draw_transform,
    invert_transform,
    make_mode_weights,
)

PIXEL_SCALE = 0.06

SPACE = ConditionSpace(mean=(-0.5, 22.0, 0.3), scale=(0.3, 1.5, 0.1), hull=())


def make_network(size: int = 32, **kwargs: float) -> Cvae:
    """Return a small network with random weights."""
    torch.manual_seed(1)
    settings = {"width": 2, "latents": 4, "pixel_scale": PIXEL_SCALE, "texture_size": 32, "texture_layers": 2}
    settings |= kwargs
    network = Cvae(conditions=SPACE.to_settings(), size=size, texture_start=0, **settings)  # type: ignore[arg-type]
    return network.eval()


def draw_noises(network: Cvae, n: int) -> torch.Tensor:
    """Return normal deviates for n galaxies."""
    return torch.randn(n, network.n_latents, generator=torch.Generator().manual_seed(2))


def make_power(size: int) -> np.ndarray:
    """Return the power of noise that is correlated along x."""
    correlation = np.zeros((3, 3))
    correlation[1] = [0.3, 1.0, 0.3]
    return compute_noise_power(correlation, size)


def scale(half_light_radius: float = 0.4, magnitude: float = 22.0, redshift: float = 1.0) -> torch.Tensor:
    """Return scaled conditions of one galaxy, shape (1, 3)."""
    conditions = np.array([[half_light_radius, magnitude, redshift]])
    return torch.from_numpy(SPACE.to_scaled(conditions).astype(np.float32))


def test_shapes_and_flux() -> None:
    """What is decoded has a flux of 1, and the divergences are numbers."""
    network = make_network()
    network.steps += 1  # There is texture.
    n = 4
    conditions = scale(0.15).expand(n, -1)
    image = torch.randn(n, 32, 32, generator=torch.Generator().manual_seed(1))
    output = network(image, torch.rand(n, 32, 32), torch.full((n,), 0.01), conditions)
    assert output.transform.shape == (n, 32, 17)
    torch.testing.assert_close(output.transform[:, 0, 0].real, torch.ones(n))
    assert output.mean.shape == (n, 4)
    assert torch.isfinite(output.shape_divergence).all()
    assert torch.isfinite(output.texture_divergence).all()
    drawn = network.smooth(network.sample(conditions, draw_noises(network, n)))
    torch.testing.assert_close(drawn.sum(dim=(1, 2)), torch.ones(n))
    assert drawn.min() > -1e-3 * drawn.max()


@pytest.mark.parametrize("q", [1.0, 0.4])
def test_bulge_and_disk_are_those_of_galsim(q: float) -> None:
    """Without texture the envelope is what GalSim draws."""
    network = make_network(128)
    values = (0.4, 0.2, 0.3, q, 0.5 * (1 + q), 0.6, 0.05, -0.02)
    envelope = Envelope(*(torch.tensor([value]) for value in values))
    bulge, disk = network._draw_envelope(envelope)
    texture = torch.zeros(1, 1, 32, 32)
    found = network._add_texture(envelope, (bulge, disk), texture)[0].numpy()
    beta = 0.6 * galsim.radians
    expected = galsim.DeVaucouleurs(half_light_radius=0.2, flux=0.3).shear(q=0.5 * (1 + q), beta=beta)
    expected += galsim.Exponential(half_light_radius=0.4, flux=0.7).shear(q=q, beta=beta)
    transform = draw_transform(expected.shift(0.05, -0.02), size=128, pixel_scale=PIXEL_SCALE)
    inside = transform != 0
    np.testing.assert_allclose(found[inside], transform[inside], atol=1e-3)


def test_texture_is_turned_with_the_disk() -> None:
    """A bright place of the disk is where its direction says."""
    network = make_network(128)
    values = (0.5, 0.2, 0.0, 0.6, 1.0, 0.7, 0.0, 0.0)
    envelope = Envelope(*(torch.tensor([value]) for value in values))
    texture = torch.zeros(1, 1, 65, 65)
    # Along the major axis, half of the way to the border.
    texture[0, 0, 32, 48] = 5.0
    transform = network._add_texture(envelope, network._draw_envelope(envelope), texture)
    smooth = network._add_texture(envelope, network._draw_envelope(envelope), 0 * texture)
    extra = (network.smooth(transform) - network.smooth(smooth))[0].numpy()
    y, x = np.unravel_index(extra.argmax(), extra.shape)
    radius = 0.5 * TEXTURE_REACH * 0.5 / math.sqrt(0.6) / PIXEL_SCALE
    expected = 64 + radius * math.cos(0.7), 64 + radius * math.sin(0.7)
    assert (x, y) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("quarters", [1, 2, 3])
@pytest.mark.parametrize("mirrored", [False, True])
def test_orientation_turns_and_mirrors(quarters: int, mirrored: bool) -> None:
    """Orientations do to galaxies what they would do to images."""
    network = make_network(64)
    with torch.no_grad():
        network.envelope[-1].weight *= 50  # type: ignore[operator]
        network.texture.last.weight *= 100
    # Small enough that nothing wraps around the border of the grid.
    conditions, noise = scale(0.2), draw_noises(network, 1)
    angle = quarters * math.pi / 2 - (2 * math.pi if mirrored else 0)
    images = [
        network.smooth(network.sample(conditions, noise, torch.tensor([turn])))[0, 1:, 1:].detach().numpy()
        for turn in (0.0, angle)
    ]
    expected = np.rot90(images[0][::-1] if mirrored else images[0], -quarters)
    np.testing.assert_allclose(images[1], expected, atol=1e-5 * images[0].max())


def test_smoothing_is_a_gaussian() -> None:
    """A point becomes the Gaussian that GalSim draws."""
    network = make_network(64)
    expected = galsim.Gaussian(fwhm=network.output_fwhm).drawImage(
        nx=65, ny=65, scale=PIXEL_SCALE, method="no_pixel"
    )
    found = network.smooth(torch.ones(1, 64, 33))[0].numpy()
    np.testing.assert_allclose(found, expected.array[:64, :64], atol=0.02 * found.max())


def test_log_likelihood_of_correlated_noise() -> None:
    """It is that of the multivariate normal distribution of the pixels."""
    size, rng = 8, np.random.default_rng(0)
    power = make_power(size)
    # Covariance of the pixels, column by column.
    units = np.eye(size**2).reshape(-1, size, size)
    covariance = invert_transform(compute_transform(units) * power).reshape(size**2, -1)
    values, vectors = np.linalg.eigh(covariance)
    kept = values > 1e-9  # There is no noise at the Nyquist frequencies.
    assert kept.sum() == make_mode_weights(size).sum()
    data, model = draw_noise(power, rng, 2), 0.3 * draw_noise(power, rng, 2)
    variance = np.array([1.0, 2.5])
    for flux_scatter in (0.0, 0.2):
        found = compute_log_likelihood(
            torch.from_numpy(compute_transform(data)),
            torch.from_numpy(compute_transform(model)),
            torch.from_numpy(power),
            torch.from_numpy(variance),
            flux_scatter=flux_scatter,
        )
        for i in range(2):
            total = variance[i] * np.diag(values[kept])
            direction = vectors[:, kept].T @ model[i].ravel()
            total += flux_scatter**2 * np.outer(direction, direction)
            residual = vectors[:, kept].T @ (data[i] - model[i]).ravel()
            _, log_determinant = np.linalg.slogdet(2 * np.pi * total)
            expected = -0.5 * (residual @ np.linalg.solve(total, residual) + log_determinant)
            assert float(found[i]) == pytest.approx(expected, rel=1e-6)


def test_divergence_of_the_texture() -> None:
    """In the mean of many draws it is that of the two Gaussians."""
    network = make_network(texture_layers=0)
    network.steps += 1  # There is texture.
    n = 300
    image = 2 * torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(3)).expand(n, -1, -1)
    inputs = image, torch.rand(1, 32, 32).expand(n, -1, -1), torch.full((n,), 0.01), scale(0.2).expand(n, -1)
    noise = draw_noises(network, n)
    noise[:, : network.latents] = 0
    with torch.no_grad():
        network.texture_encoder.head.weight *= 20
        found = network(*inputs, noise).texture_divergence
        mean, log_variance = network.encode_texture(*inputs, network.encode(*inputs)[0])
    expected = kl_divergence(Normal(mean[0], torch.exp(0.5 * log_variance[0])), Normal(0.0, 1.0)).sum()
    assert expected > 5
    assert float(found.mean()) == pytest.approx(float(expected), abs=4 * float(found.std()) / math.sqrt(n))


def test_psf_is_in_the_likelihood() -> None:
    """The likelihood is largest where decoder and PSF make the image."""
    size = 32
    network = make_network(size)
    conditions = scale(0.2)
    psf = invert_transform(
        draw_transform(galsim.Moffat(beta=3, fwhm=0.2), size=size, pixel_scale=PIXEL_SCALE)
    )
    power = torch.from_numpy(make_power(size).astype(np.float32))
    psf_image = torch.from_numpy(psf.astype(np.float32))[None]
    variance = torch.full((1,), 1e-6)
    noise = draw_noises(network, 1)
    output = network(torch.zeros(1, size, size), psf_image, variance.sqrt(), conditions, noise)
    image = invert_transform(output.transform.detach().numpy() * compute_transform(psf))
    best = compute_elbo(output, torch.from_numpy(image), psf_image, power, variance).log_likelihood
    point = torch.zeros_like(psf_image)
    point[0, size // 2, size // 2] = 1
    other = compute_elbo(output, torch.from_numpy(image), point, power, variance).log_likelihood
    assert best > other + 10
    nothing = torch.zeros(1, size, size // 2 + 1, dtype=torch.complex64)
    no_residual = compute_log_likelihood(nothing, nothing, power, variance)
    torch.testing.assert_close(best, no_residual, rtol=1e-3, atol=0.5)


def test_texture_waits() -> None:
    """In the first steps of a training there is no texture."""
    network = make_network().train()
    network.texture_start = 2
    arguments = torch.zeros(1, 32, 32), torch.ones(1, 32, 32), torch.full((1,), 0.01), scale(0.2)
    divergences = [float(network(*arguments).texture_divergence.detach()) for _ in range(4)]
    assert divergences[:2] == [0, 0]
    assert 0 not in divergences[2:]
    assert int(network.steps) == 4


def test_corrections_of_new_galaxies() -> None:
    """New galaxies are larger and flatter, and textures differ more, by what
    the settings say, and not at all by default.
    """
    plain = make_network()
    corrections = {"radius_factor": 1.1, "radius_exponent": 0.5, "axis_ratio_exponent": 1.2}
    other = make_network(**corrections, texture_scale=2.0, texture_scatter=0.3)
    seen: dict[Cvae, Envelope] = {}
    for network in (plain, other):
        draw = network._draw_envelope
        network._draw_envelope = lambda envelope, n=network, d=draw: seen.update({n: envelope}) or d(envelope)
        network.sample(scale(0.2), draw_noises(network, 1))
    factor = 1.1 * (0.2 / 10**-0.5) ** 0.5
    for name in ("disk_radius", "bulge_radius", "x", "y"):
        torch.testing.assert_close(getattr(seen[other], name), factor * getattr(seen[plain], name))
    for name in ("disk_axis_ratio", "bulge_axis_ratio"):
        torch.testing.assert_close(getattr(seen[other], name), getattr(seen[plain], name) ** 1.2)
    noise = torch.randn(2000, 2, 8, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(plain._stretch(noise), noise)
    stretch = torch.log((other._stretch(noise) / noise)[:, 0, 0, 0])
    assert float(stretch.mean()) == pytest.approx(math.log(2), abs=0.03)
    assert float(stretch.std()) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize(
    "wrong", [{"size": 15}, {"in_bands": 3}, {"latents": 1}, {"texture_size": 30}, {"output_fwhm": 0.05}]
)
def test_impossible_networks_are_refused(wrong: dict[str, float]) -> None:
    """Settings that leave no network are an error."""
    with pytest.raises(ValueError, match="no network|cannot hold"):
        make_network(**wrong)  # type: ignore[arg-type]

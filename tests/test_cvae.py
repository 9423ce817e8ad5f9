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
    Cvae,
    compute_elbo,
    compute_kl_divergence,
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
    settings = {"width": 2, "latents": 3, "pixel_scale": PIXEL_SCALE} | kwargs
    network = Cvae(conditions=SPACE.to_settings(), size=size, **settings)  # type: ignore[arg-type]
    return network.eval()


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
    """What is decoded and generated is positive and has a flux of 1."""
    network = make_network()
    n = 4
    conditions = scale().expand(n, -1)
    output = network(torch.randn(n, 32, 32), torch.rand(n, 32, 32), torch.full((n,), 0.01), conditions)
    assert output.brightness.shape == (n, 32, 32)
    assert {part.shape for part in output[1:]} == {(n, 3)}
    image = network.generate(conditions, torch.randn(n, 3))
    for brightness in (output.brightness, image):
        assert (brightness >= 0).all()
        torch.testing.assert_close(brightness.sum(dim=(1, 2)), torch.ones(n))


@pytest.mark.parametrize("half_light_radius", [0.2, 0.3])
def test_first_guess_has_the_radius_asked_for(half_light_radius: float) -> None:
    """An untrained network makes round galaxies of about the right size."""
    network = make_network(128)
    brightness = network.decode(torch.zeros(1, 3), scale(half_light_radius))[0].detach().numpy()
    image = galsim.ImageD(brightness[1:, 1:].astype(np.float64), scale=PIXEL_SCALE)
    assert image.calculateHLR(flux=1.0) == pytest.approx(half_light_radius, rel=0.1)


def test_ellipticity_has_galsims_sign() -> None:
    """The envelope is stretched along x for e1 and the diagonal for e2."""
    network = make_network(64)
    for e1, e2 in ((0.3, 0.0), (0.0, 0.3), (-0.2, 0.2)):
        parameters = torch.tensor([[0.0, 0.0, e1, e2, 0.0, 0.0]])
        log_envelope = network._compute_log_envelope(parameters, scale())
        envelope = torch.exp(log_envelope)[0].numpy()
        shape = galsim.ImageD(envelope[1:, 1:].astype(np.float64)).FindAdaptiveMom().observed_shape
        strength = 0.9 * math.tanh(math.hypot(e1, e2)) / math.hypot(e1, e2)
        assert (shape.g1, shape.g2) == pytest.approx((strength * e1, strength * e2), abs=0.01)


def test_smoothing_is_a_gaussian() -> None:
    """A point becomes the Gaussian that GalSim draws."""
    network = make_network(64)
    point = torch.zeros(1, 64, 64)
    point[0, 32, 32] = 1.0
    expected = galsim.Gaussian(fwhm=network.output_fwhm).drawImage(
        nx=65, ny=65, scale=PIXEL_SCALE, method="no_pixel"
    )
    found = network.smooth(point)[0].numpy()
    np.testing.assert_allclose(found, expected.array[:64, :64], atol=0.01 * found.max())


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


def test_kl_divergence() -> None:
    """It is that of torch, and zero for equal distributions."""
    torch.manual_seed(0)
    mean, log_variance, prior_mean, prior_log_variance = torch.randn(4, 5, 3)
    found = compute_kl_divergence(mean, log_variance, prior_mean, prior_log_variance)
    expected = kl_divergence(
        Normal(mean, torch.exp(0.5 * log_variance)), Normal(prior_mean, torch.exp(0.5 * prior_log_variance))
    ).sum(dim=1)
    torch.testing.assert_close(found, expected)
    assert compute_kl_divergence(mean, log_variance, mean, log_variance).abs().max() == 0


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
    output = network(torch.zeros(1, size, size), psf_image, variance.sqrt(), conditions, torch.zeros(1, 3))
    transform = compute_transform(output.brightness.detach().numpy()) * compute_transform(psf)
    image = torch.from_numpy(invert_transform(transform).astype(np.float32))
    best = compute_elbo(output, image, psf_image, power, variance).log_likelihood
    point = torch.zeros_like(psf_image)
    point[0, size // 2, size // 2] = 1
    assert best > compute_elbo(output, image, point, power, variance).log_likelihood + 10
    nothing = torch.zeros(1, size, size // 2 + 1, dtype=torch.complex64)
    no_residual = compute_log_likelihood(nothing, nothing, power, variance)
    torch.testing.assert_close(best, no_residual)


@pytest.mark.parametrize("wrong", [{"size": 48}, {"in_bands": 3}, {"latents": 0}, {"output_fwhm": 0.05}])
def test_impossible_networks_are_refused(wrong: dict[str, float]) -> None:
    """Settings that leave no network are an error."""
    with pytest.raises(ValueError, match="no network|cannot hold"):
        make_network(**wrong)  # type: ignore[arg-type]

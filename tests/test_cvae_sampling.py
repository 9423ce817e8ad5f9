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


"""Tests of training the galaxy model and of drawing from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import galsim
import numpy as np
import pytest
import torch

import lsst.meas.deeplearn.galaxies.cvae_sampling as cvae_sampling
from lsst.meas.deeplearn.galaxies.conditions import ConditionError, ConditionSpace
from lsst.meas.deeplearn.galaxies.cosmos import GalaxySet
from lsst.meas.deeplearn.galaxies.cvae import Cvae
from lsst.meas.deeplearn.galaxies.cvae_sampling import (
    CvaeSampler,
    augment,
    fit_prior,
    make_batch,
    train_cvae,
)
from lsst.meas.deeplearn.galaxies.fourier import compute_transform, draw_transform, invert_transform
from lsst.meas.deeplearn.galaxies.synthetic import make_synthetic_set
from lsst.meas.deeplearn.model_package import ModelPackage, ModelPackageError
from lsst.meas.deeplearn.tests import make_test_model
from lsst.meas.deeplearn.training import TrainingSettings

CONDITIONS = np.array([[0.3, 22.0, 0.8]])

NETWORK = {
    "width": 2,
    "latents": 3,
    "texture_size": 32,
    "texture_start": 4,
    "flow_layers": 2,
    "texture_layers": 2,
}

SMALL = {"name": "test", "version": "1", "network": NETWORK, "warm_up": 8, "accelerator": "cpu"}
"""What makes a quick training."""


@pytest.fixture(scope="module")
def galaxies() -> GalaxySet:
    """Return galaxies to train on."""
    return make_synthetic_set(64, seed=1, size=32, n_psfs=3, max_magnitude=23.0)


@pytest.fixture(scope="module")
def validation() -> GalaxySet:
    """Return other galaxies."""
    return make_synthetic_set(16, seed=2, size=32, n_psfs=2, max_magnitude=23.0)


def make_sampler(package: ModelPackage, **kwargs: Any) -> CvaeSampler:
    """Return a sampler of a package after it was written and read."""
    return CvaeSampler(ModelPackage.from_bytes(package.to_bytes()), **kwargs)


@pytest.fixture(scope="module")
def package(galaxies: GalaxySet, validation: GalaxySet) -> ModelPackage:
    """Return a model after one epoch."""
    settings = TrainingSettings(epochs=1, batch_size=16)
    return train_cvae(galaxies, validation, settings=settings, **SMALL)  # type: ignore[arg-type]


def test_loss_falls(galaxies: GalaxySet, validation: GalaxySet) -> None:
    """Training makes held-out galaxies more likely, and records it."""
    settings = TrainingSettings(epochs=8, batch_size=16, learning_rate=3e-3, schedule="cosine")
    trained = train_cvae(galaxies, validation, settings=settings, **SMALL)  # type: ignore[arg-type]
    history = trained.record["history"]
    assert history[-1]["log_likelihood"] > history[0]["log_likelihood"] + 20
    assert (
        trained.record["performance"]["log_likelihood"]
        == history[trained.record["best_epoch"] - 1]["log_likelihood"]
    )
    assert trained.settings.stamp_size == 33
    assert trained.settings.pixel_scale == galaxies.pixel_scale


def test_resumed_training_ends_alike(galaxies: GalaxySet, validation: GalaxySet, tmp_path: Path) -> None:
    """A training that was interrupted ends with the same weights."""
    settings = TrainingSettings(epochs=2, batch_size=16)
    unbroken = train_cvae(galaxies, validation, settings=settings, **SMALL)  # type: ignore[arg-type]

    def interrupt(*args: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("interrupted")
        return evaluate(*args)  # type: ignore[arg-type]

    calls: list[int] = []
    evaluate = cvae_sampling._Loss.evaluate
    kwargs = SMALL | {"settings": settings, "checkpoint": tmp_path / "state"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cvae_sampling._Loss, "evaluate", interrupt)
        with pytest.raises(RuntimeError, match="interrupted"):
            train_cvae(galaxies, validation, **kwargs)  # type: ignore[arg-type]
    resumed = train_cvae(galaxies, validation, **kwargs)  # type: ignore[arg-type]
    for key, value in unbroken.weights.items():
        np.testing.assert_array_equal(resumed.weights[key], value)


def test_augmentation_keeps_image_and_psf_together(galaxies: GalaxySet) -> None:
    """Without noise, symmetries of image and PSF are those of the galaxy."""
    space = ConditionSpace.fit(galaxies.conditions)
    clean = dataclasses.replace(galaxies, image=galaxies.psf[galaxies.psf_index])
    batch = make_batch(clean, space, min_noise=1e-4)
    psf = torch.from_numpy(galaxies.psf)
    changed = augment(batch, torch.Generator().manual_seed(1), psf=psf)
    torch.testing.assert_close(changed["image"], changed["psf"])
    assert not torch.equal(changed["image"], batch["image"])
    # The amplitude at the origin and at zero frequency stay.
    transform = compute_transform(changed["image"].numpy())
    np.testing.assert_allclose(transform[:, 0, 0].real, 1, atol=1e-3)
    torch.testing.assert_close(changed["image"][:, 16, 16], batch["image"][:, 16, 16])
    unchanged = augment(batch, None, psf=psf)
    torch.testing.assert_close(unchanged["image"], batch["image"])


def test_bright_galaxies_have_a_noise_floor(galaxies: GalaxySet) -> None:
    """No galaxy has less noise than the error of the model."""
    batch = make_batch(galaxies, ConditionSpace.fit(galaxies.conditions), min_noise=3e-4)
    assert batch["noise"].min() == pytest.approx(3e-4)
    assert batch["noise"].max() > 3e-4


def test_draws_follow_the_seed(package: ModelPackage, galaxies: GalaxySet) -> None:
    """A galaxy depends on its seed and conditions only, to the last bit."""
    sampler = make_sampler(package)
    conditions, seeds = galaxies.conditions[:40], np.arange(40)
    images = sampler.draw(conditions, seeds)
    assert images.shape == (40, 33, 33)
    np.testing.assert_allclose(images.sum(axis=(1, 2)), 1, rtol=1e-5)
    assert images.min() > -1e-3 * images.max()
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(sampler.draw(conditions[order], seeds[order]), images[order])
    np.testing.assert_array_equal(sampler.draw(conditions[7:8], [7])[0], images[7])
    assert not np.array_equal(sampler.draw(conditions[7:8], [8])[0], images[7])
    assert sampler.draw(conditions[:0], []).shape == (0, 33, 33)


def test_draws_with_a_psf(package: ModelPackage, galaxies: GalaxySet) -> None:
    """With a PSF galaxies are what GalSim makes of those without."""
    sampler = make_sampler(package)
    fwhm = sampler._network.output_fwhm
    conditions, seeds = galaxies.conditions[:4], np.arange(4)
    wide = galsim.Gaussian(fwhm=0.3)
    psf = invert_transform(draw_transform(wide, size=32, pixel_scale=0.06))
    found = sampler.draw(conditions, seeds, psf=np.tile(psf, (4, 1, 1)))[:, 1:, 1:]
    # Of the Gaussian of the model, and the rest of the wide one.
    rest = galsim.Gaussian(fwhm=np.sqrt(0.3**2 - fwhm**2))
    kernel = draw_transform(rest, size=32, pixel_scale=0.06)
    expected = invert_transform(compute_transform(sampler.draw(conditions, seeds)[:, :-1, :-1]) * kernel)
    np.testing.assert_allclose(found[:, :-1, :-1], expected[:, 1:, 1:], atol=0.01 * expected.max())


def test_center_is_the_middle_pixel(package: ModelPackage) -> None:
    """Galaxies of random shapes have their mean centroid in the middle."""
    images = make_sampler(package).draw(np.repeat(CONDITIONS, 32, axis=0), np.arange(32))
    mean = galsim.ImageD(images.mean(axis=0).astype(np.float64), xmin=-16, ymin=-16)
    centroid = mean.FindAdaptiveMom().moments_centroid
    assert (centroid.x, centroid.y) == pytest.approx((0, 0), abs=0.3)


def test_conditions_outside_the_training_set(package: ModelPackage) -> None:
    """They are refused, clipped or flagged, as the user wants."""
    conditions = np.concatenate([CONDITIONS, [[3.0, 30.0, 9.0]]])
    with pytest.raises(ConditionError, match="1 of 2 galaxies are outside .* half-light radius 3 arcsec"):
        make_sampler(package).draw(conditions, [0, 1])
    clipped, flags = make_sampler(package, outside="clip").check(conditions)
    assert flags.tolist() == [False, True]
    assert make_sampler(package).space.is_inside(clipped).all()
    flagging = make_sampler(package, outside="flag")
    np.testing.assert_array_equal(flagging.check(conditions)[0], conditions)
    assert np.isfinite(flagging.draw(conditions, [0, 1])).all()
    with pytest.raises(ValueError, match="raise, clip or flag"):
        make_sampler(package, outside="ignore")


@pytest.mark.parametrize("value", [np.nan, -0.3, 0.0])
@pytest.mark.parametrize("outside", ["raise", "clip", "flag"])
def test_impossible_conditions_are_refused(package: ModelPackage, outside: str, value: float) -> None:
    """Nothing makes a galaxy without a positive radius."""
    conditions = np.array([[value, 22.0, 0.8]])
    with pytest.raises(ConditionError, match="no galaxy has"):
        make_sampler(package, outside=outside).draw(conditions, [0])


def test_other_models_are_refused() -> None:
    """Weights of a lens finder draw no galaxies."""
    with pytest.raises(ModelPackageError, match="not a galaxy model"):
        CvaeSampler(make_test_model())


def test_scores_of_images(package: ModelPackage, galaxies: GalaxySet) -> None:
    """Images are less likely with more noise than is said, and repeatable."""
    sampler = make_sampler(package, outside="flag")
    noise = np.sqrt(galaxies.noise_variance * galaxies.noise_power.mean())
    rows = slice(0, 10)
    inputs: dict[str, np.ndarray] = {
        "psf": galaxies.psf[galaxies.psf_index][rows],
        "noise": noise[rows],
        "conditions": galaxies.conditions[rows],
        "noise_power": galaxies.noise_power,
    }
    latents, elbo = sampler.score(galaxies.image[rows], **inputs)
    assert latents.shape == (10, 3)
    other = np.random.default_rng(0).standard_normal(galaxies.image[rows].shape) * noise[rows, None, None]
    _, worse = sampler.score(galaxies.image[rows] + 5 * other, **inputs)
    assert (worse.log_likelihood < elbo.log_likelihood).all()
    again, _ = sampler.score(galaxies.image[rows], **inputs)
    np.testing.assert_array_equal(latents, again)
    assert sampler.score(
        galaxies.image[:0], **{k: v if k == "noise_power" else v[:0] for k, v in inputs.items()}
    )[0].shape == (0, 3)


def test_priors_are_fitted_to_the_encoder(package: ModelPackage, galaxies: GalaxySet) -> None:
    """Latent variables get more likely, and nothing but priors changes."""
    network = package.make_network()
    assert isinstance(network, Cvae)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    data = make_batch(galaxies, network.condition_space, min_noise=1e-4)
    psf = torch.from_numpy(galaxies.psf)
    first, last = (fit_prior(network, data, psf=psf, steps=n, texture_steps=n) for n in (1, 100))
    assert last[0] > first[0]
    assert last[1] > first[1]
    for key, value in network.state_dict().items():
        assert key.startswith(("prior.", "texture_prior.")) or torch.equal(value, before[key])


@pytest.mark.slow
def test_recovers_the_galaxy_before_the_psf() -> None:
    """What is decoded has the size of the truth, not that of the image.

    The network is fitted to some galaxies of high signal to noise, for which
    the truth is known.
    """
    galaxies = make_synthetic_set(64, seed=5, size=64, n_psfs=4, max_magnitude=21.5, noise_variance=1e-7)
    settings = TrainingSettings(epochs=60, batch_size=16, learning_rate=3e-3, schedule="cosine")
    network_settings = NETWORK | {"width": 4, "latents": 8, "texture_start": 40}
    kwargs = SMALL | {"network": network_settings, "warm_up": 40}
    trained = train_cvae(galaxies, galaxies, settings=settings, **kwargs)  # type: ignore[arg-type]
    network = CvaeSampler(ModelPackage.from_bytes(trained.to_bytes()))._network
    batch = make_batch(galaxies, network.condition_space, min_noise=1e-4)
    batch = augment(batch, None, psf=torch.from_numpy(galaxies.psf))
    with torch.inference_mode():
        zeros = torch.zeros(64, network.n_latents)
        output = network(batch["image"], batch["psf"], batch["noise"], batch["conditions"], zeros)
        found = network.smooth(output.transform).numpy()
    assert galaxies.truth is not None

    def measure(images: np.ndarray) -> np.ndarray:
        views = [galsim.ImageD(image[1:, 1:].astype(np.float64), scale=1.0) for image in images]
        return np.array([view.calculateHLR(flux=view.array.sum()) for view in views])

    radius, truth, blurred = (measure(images) for images in (found, galaxies.truth, galaxies.image))
    assert np.median(np.abs(radius / truth - 1)) < 0.05
    assert abs(np.median(radius / truth - 1)) < abs(np.median(blurred / truth - 1)) + 0.02


def test_larger_grids_have_the_same_galaxies(package: ModelPackage) -> None:
    """What a larger grid adds is outside of the grid of the model."""
    conditions = np.array([[0.15, 22.0, 0.8]])
    small, large = (make_sampler(package, outside="flag", size=n).draw(conditions, [3])[0] for n in (32, 64))
    assert large.shape == (65, 65)
    np.testing.assert_allclose(large[20:45, 20:45], small[4:29, 4:29], atol=0.01 * small.max())
    outside = np.abs(np.arange(65) - 32) > 16
    assert large[outside].sum() > 0

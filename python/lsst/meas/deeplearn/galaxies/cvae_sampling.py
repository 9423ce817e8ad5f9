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


"""Training of the galaxy model, and drawing from it."""

from __future__ import annotations

__all__ = ("CvaeSampler", "augment", "fit_prior", "make_batch", "train_cvae")

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..inference import torch_threads
from ..model_package import SCALE_TOLERANCE, ModelPackage, ModelPackageError, ModelSettings
from ..training import Batch, TrainingSettings, train
from .conditions import ARCHITECTURE, ConditionError, ConditionSpace, check_galaxy_model
from .cosmos import GalaxySet
from .cvae import Cvae, CvaeOutput, Elbo, compute_elbo, compute_transform, invert_transform
from .flow import ConditionalFlow, MapFlow

FIRST_TEXTURE_WEIGHT = 0.1
"""First weight of the KL divergence of the texture, as a fraction."""

MAX_GRADIENT = 50.0
"""Largest norm of a gradient while priors are fitted."""


def make_batch(galaxies: GalaxySet, space: ConditionSpace, *, min_noise: float) -> Batch:
    """Return the tensors of a set of galaxies.

    Parameters
    ----------
    galaxies
        The galaxies.
    space
        Scaling of their conditions.
    min_noise
        Smallest noise in a pixel to assume, for a flux of 1: the error of
        the model.

    Returns
    -------
    batch
        Examples for `augment`, which wants the PSFs besides.
    """
    level = float(galaxies.noise_power.mean())
    noise = np.maximum(np.sqrt(galaxies.noise_variance * level), min_noise)
    return {
        "image": torch.from_numpy(galaxies.image),
        "psf_index": torch.from_numpy(galaxies.psf_index.astype(np.int64)),
        "noise": torch.from_numpy(noise.astype(np.float32)),
        "conditions": torch.from_numpy(space.to_scaled(galaxies.conditions).astype(np.float32)),
    }


def augment(batch: Batch, generator: torch.Generator | None, *, psf: Tensor) -> Batch:
    """Give galaxies their PSFs, and both a symmetry of the square.

    Parameters
    ----------
    batch
        What `make_batch` returns.
    generator
        Source of random numbers; `None` leaves the orientation alone.
    psf
        All PSFs, shape ``(P, S, S)``.

    Notes
    -----
    The noise is taken to have these symmetries.  That of COSMOS has them
    within 4 % of the power for half of the modes, 30 % at worst.
    """
    batch = {**batch, "psf": psf[batch["psf_index"]]}
    del batch["psf_index"]
    if generator is None:
        return batch
    choice = torch.rand(3, len(batch["image"]), 1, 1, generator=generator) < 0.5
    for key in ("image", "psf"):
        image = batch[key]
        image = torch.where(choice[0], _mirror(image, -1), image)
        image = torch.where(choice[1], _mirror(image, -2), image)
        batch[key] = torch.where(choice[2], image.transpose(-1, -2), image)
    return batch


def _mirror(image: Tensor, axis: int) -> Tensor:
    """Mirror images about pixel S / 2."""
    return image.flip(axis).roll(1, axis)


class _Loss:
    """Minus the evidence lower bound, in nats a pixel.

    Parameters
    ----------
    noise_power
        Power of the noise in each mode, shape ``(S, S / 2 + 1)``.
    kl_weight
        Factor on the KL divergence.
    flux_scatter
        Relative error of the fluxes.
    warm_up
        Number of steps in which the weight of the KL divergence of the
        texture rises to that of the rest.
    """

    def __init__(
        self, noise_power: np.ndarray, kl_weight: float, flux_scatter: float, warm_up: int = 0
    ) -> None:
        self._warm_up = warm_up
        self._power = torch.from_numpy(noise_power / noise_power.mean())
        self._kl_weight = kl_weight
        self._flux_scatter = flux_scatter

    def compute_elbo(self, network: nn.Module, batch: Batch) -> Elbo:
        """Return both terms for each galaxy of a batch.

        Parameters
        ----------
        network
            The network, or what Lightning Fabric has made of it.
        batch
            What `augment` returns.
        """
        return self._compute_elbo(self._run(network, batch), batch)

    def _run(self, network: nn.Module, batch: Batch) -> CvaeOutput:
        return CvaeOutput(*network(batch["image"], batch["psf"], batch["noise"], batch["conditions"]))

    def _compute_elbo(self, output: CvaeOutput, batch: Batch) -> Elbo:
        if self._power.device != batch["image"].device:
            self._power = self._power.to(batch["image"].device)
        return compute_elbo(
            output,
            batch["image"],
            batch["psf"],
            self._power,
            batch["noise"] ** 2,
            flux_scatter=self._flux_scatter,
        )

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        output = self._run(network, batch)
        elbo = self._compute_elbo(output, batch)
        assert isinstance(network.steps, Tensor)
        progress = min(float(network.steps) / max(self._warm_up, 1), 1.0)
        # The texture is cheap at first, lest its variables go unused.
        discount = (1 - progress) * (1 - FIRST_TEXTURE_WEIGHT) * output.texture_divergence
        divergence = self._kl_weight * (elbo.kl_divergence - discount)
        return (divergence - elbo.log_likelihood).mean() / batch["image"].shape[-1] ** 2

    def evaluate(self, network: nn.Module, data: Batch) -> dict[str, float]:
        """Return the mean of both terms over many galaxies.

        Parameters
        ----------
        network
            The network.
        data
            What `augment` returns.
        """
        device, n = next(network.parameters()).device, len(data["image"])
        log_likelihood = kl_divergence = 0.0
        with torch.no_grad():
            for start in range(0, n, 64):
                batch = {key: value[start : start + 64].to(device) for key, value in data.items()}
                elbo = self.compute_elbo(network, batch)
                log_likelihood += float(elbo.log_likelihood.sum()) / n
                kl_divergence += float(elbo.kl_divergence.sum()) / n
        return {
            "loss": (kl_divergence - log_likelihood) / data["image"].shape[-1] ** 2,
            "log_likelihood": log_likelihood,
            "kl_divergence": kl_divergence,
        }


def train_cvae(
    galaxies: GalaxySet,
    validation: GalaxySet,
    *,
    name: str,
    version: str,
    settings: TrainingSettings,
    network: Mapping[str, Any] | None = None,
    start: ModelPackage | None = None,
    prior_steps: int = 0,
    texture_prior_steps: int = 0,
    kl_weight: float = 1.0,
    warm_up: int = 4000,
    flux_scatter: float = 0.1,
    min_noise: float = 2e-4,
    band: str = "F814W",
    checkpoint: Path | None = None,
    accelerator: str = "auto",
    record: Mapping[str, Any] | None = None,
) -> ModelPackage:
    """Train the model and return it as a package.

    Parameters
    ----------
    galaxies, validation
        Galaxies to train on, and those by which the best epoch is chosen.
    name, version
        Of the package.
    settings
        How to train.
    network
        Settings of `Cvae` other than what the galaxies tell.
    start
        Model to go on from, whose settings are kept: conditions are scaled as
        by it, and its hull is that of the galaxies it has been trained on
        first.
    prior_steps, texture_prior_steps
        Number of steps of `fit_prior` in the end, for shape and texture.
    kl_weight
        Factor on the KL divergence in the loss; 1 is the evidence lower
        bound.
    warm_up
        Number of steps in which the KL divergence of the texture gets this
        weight; it has a tenth of it at first.
    flux_scatter
        Relative error of the catalogue fluxes, which is integrated out.
    min_noise
        Smallest noise to assume in a pixel, for a flux of 1.  It keeps a few
        bright galaxies from ruling the training.
    band
        Name of the band of the images.
    checkpoint, accelerator
        As for `train`.
    record
        What to record about the training set.

    Raises
    ------
    ConditionError
        Raised if the conditions of the training set span no volume.
    ModelPackageError
        Raised if ``start`` is another kind of model, or of another grid.
    """
    if start is not None:
        check_galaxy_model(start)
        size, scale = start.settings.stamp_size, start.settings.pixel_scale
        if size != galaxies.size + 1 or abs(scale / galaxies.pixel_scale - 1) > SCALE_TOLERANCE:
            raise ModelPackageError(
                f"Model {start.name} {start.version} has stamps of {size} pixels of {scale:.3f} arcsec, and "
                f"the training set of {galaxies.size + 1} of {galaxies.pixel_scale:.3f}; set size and "
                "pixelScale to those of the model, or train from the beginning."
            )
    space = ConditionSpace.fit(galaxies.conditions)
    settings_of_network = {
        "conditions": space.to_settings(),
        "pixel_scale": galaxies.pixel_scale,
        "size": galaxies.size,
        **(network or {}),
    }
    if start is not None:
        settings_of_network = dict(start.settings.network)
        space = ConditionSpace.from_settings(settings_of_network["conditions"])

    def make_network() -> Cvae:
        made = Cvae(**settings_of_network) if start is None else start.make_network()
        assert isinstance(made, Cvae)
        return made

    loss = _Loss(galaxies.noise_power, kl_weight, flux_scatter, warm_up)
    banks = [torch.from_numpy(part.psf) for part in (galaxies, validation)]

    def change(batch: Batch, generator: torch.Generator | None) -> Batch:
        # The loop gives the validation set, whole, without generator.
        return augment(batch, generator, psf=banks[generator is None])

    result = train(
        make_network,
        make_batch(galaxies, space, min_noise=min_noise),
        compute_loss=loss,
        settings=settings,
        validation=make_batch(validation, space, min_noise=min_noise),
        evaluate=loss.evaluate,
        augment=change,
        checkpoint=checkpoint,
        recipe=repr((kl_weight, flux_scatter, warm_up, min_noise)),
        accelerator=accelerator,
    )
    best = result.history[result.best_epoch - 1]
    weights = result.weights
    if prior_steps or texture_prior_steps:
        trained = make_network()
        trained.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
        batch = make_batch(galaxies, space, min_noise=min_noise)
        fit_prior(
            trained.eval(),
            batch,
            psf=banks[0],
            steps=prior_steps,
            texture_steps=texture_prior_steps,
            seed=settings.seed,
        )
        weights = {key: value.numpy() for key, value in trained.state_dict().items()}
    return ModelPackage(
        name=name,
        version=version,
        architecture=ARCHITECTURE,
        settings=ModelSettings(
            bands=(band,),
            pixel_scale=galaxies.pixel_scale,
            # A row and a column of zeros make the grid symmetric.
            stamp_size=galaxies.size + 1,
            network=settings_of_network,
        ),
        weights=weights,
        record={
            "recipe": dataclasses.asdict(settings)
            | {"kl_weight": kl_weight, "flux_scatter": flux_scatter, "min_noise": min_noise}
            | {"warm_up": warm_up, "prior_steps": prior_steps, "texture_prior_steps": texture_prior_steps},
            "training_set": {"n_train": len(galaxies), "n_validation": len(validation), **(record or {})},
            "history": result.history,
            "best_epoch": result.best_epoch,
            "performance": {key: best[key] for key in ("log_likelihood", "kl_divergence")},
        },
    )


def fit_prior(
    network: Cvae,
    data: Batch,
    *,
    psf: Tensor,
    steps: int,
    texture_steps: int = 0,
    batch_size: int = 512,
    texture_batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
) -> tuple[float, float]:
    """Fit the priors of shape and texture to what the encoder makes of
    galaxies.

    The rest of the network stays as it is.  In the bound that is trained on,
    the priors are pulled along by encoder and decoder; new galaxies are as
    good as they fit the aggregate posterior in the end, which a few more
    steps with them alone improve (Lanusse et al. 2021 fit theirs only so).

    Parameters
    ----------
    network
        The network, whose priors are changed.
    data
        What `make_batch` returns for the training set.
    psf
        All PSFs, shape ``(P, S, S)``.
    steps, texture_steps
        Number of steps for shape and texture.
    batch_size, texture_batch_size
        Number of galaxies in a step.
    learning_rate
        First learning rate, lowered to 0 along a cosine.
    seed
        Seed of orientations and order.

    Returns
    -------
    log_density, texture_log_density
        Means of log p(z|y) over the last tenth of the steps, in nats; NaN
        without steps.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    if not network.texture_prior.layers:
        texture_steps = 0
    parts = []
    with torch.no_grad():
        for start in range(0, len(data["image"]), 64):
            batch = {key: value[start : start + 64] for key, value in data.items()}
            batch = {key: value.to(device) for key, value in augment(batch, generator, psf=psf).items()}
            x, kernel, sigma, y = (batch[key] for key in ("image", "psf", "noise", "conditions"))
            mean, log_variance = network.encode(x, kernel, sigma, y)
            shape = mean + torch.exp(0.5 * log_variance) * _draw_normal(mean, generator)
            texture = network.encode_texture(x, kernel, sigma, y, shape) if texture_steps else ()
            parts.append((mean, log_variance, torch.cat([shape, y], dim=1), *texture))
    mean, log_variance, context, *of_texture = (torch.cat(part) for part in zip(*parts, strict=True))
    shape_posterior = mean, log_variance, context[:, network.latents :]
    density = _fit_flow(network.prior, shape_posterior, steps, batch_size, learning_rate, generator)
    if not texture_steps:
        return density, math.nan
    texture_posterior = of_texture[0], of_texture[1], context
    return density, _fit_flow(
        network.texture_prior, texture_posterior, texture_steps, texture_batch_size, learning_rate, generator
    )


def _draw_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return normal deviates from a generator of the CPU."""
    return torch.randn(like.shape, generator=generator).to(like.device)


def _fit_flow(
    flow: ConditionalFlow | MapFlow,
    posterior: tuple[Tensor, Tensor, Tensor],
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> float:
    """Fit to draws of Gaussians (mean, log variance, what they depend on)."""
    mean, log_variance, context = posterior
    optimizer = torch.optim.Adam(flow.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    densities = []
    for _ in range(steps):
        rows = torch.randint(len(mean), (min(batch_size, len(mean)),), generator=generator)
        z = mean[rows]
        z = z + torch.exp(0.5 * log_variance[rows]) * _draw_normal(z, generator)
        log_density = flow.compute_log_density(z, context[rows]).mean()
        optimizer.zero_grad()
        (-log_density).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), MAX_GRADIENT)
        optimizer.step()
        schedule.step()
        densities.append(float(log_density.detach()))
    return float(np.mean(densities[-max(steps // 10, 1) :])) if densities else math.nan


class CvaeSampler:
    """Draws galaxies from a trained model.

    A galaxy is determined by its conditions and its seed.  On a CPU galaxies
    are decoded one by one with one thread, so that on one kind of processor
    they are the same to the last bit, whatever is drawn with them; batches
    would gain 1.1 to 1.5 times.

    Parameters
    ----------
    package
        The model.
    outside
        What to do with conditions outside the hull of the training set:
        ``"raise"`` an error, ``"clip"`` them to it, or ``"flag"``: take them
        as they are.
    batch_size
        Number of galaxies to decode at once; more than 1 is for GPUs.
    device
        Where to, as torch names it.
    size
        Even number of pixels on a side of the grid, if not that of the model.
        Galaxies are the same, but more of their wings is on a larger grid.

    Raises
    ------
    ModelPackageError
        Raised if the package is another kind of model.
    ValueError
        Raised if ``outside`` is none of these.
    """

    def __init__(
        self,
        package: ModelPackage,
        *,
        outside: str = "raise",
        batch_size: int = 1,
        device: str = "cpu",
        size: int | None = None,
    ) -> None:
        check_galaxy_model(package)
        if outside not in ("raise", "clip", "flag"):
            raise ValueError(f"Conditions outside the training set can raise, clip or flag, not {outside!r}.")
        network = package.make_network()
        assert isinstance(network, Cvae)
        network.size = size or network.size
        self.package = package
        self.outside = outside
        self._network = network.to(device)
        self._batch_size = batch_size
        self._device = device

    @property
    def space(self) -> ConditionSpace:
        """The conditions that the model has seen."""
        return self._network.condition_space

    @property
    def size(self) -> int:
        """Side of the grid in pixels."""
        return self._network.size

    @property
    def n_shape(self) -> int:
        """Number of latent variables of the shape."""
        return self._network.latents

    @property
    def pixel_scale(self) -> float:
        """Side of a pixel in arcsec."""
        return self._network.pixel_scale

    def check(self, conditions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return conditions to use, and which of them had been outside.

        Parameters
        ----------
        conditions
            Half-light radius in arcsec, magnitude and redshift, shape
            ``(N, 3)``.

        Raises
        ------
        ConditionError
            Raised for impossible conditions, and for those outside the hull
            if ``outside`` is ``"raise"``.
        """
        conditions = np.asarray(conditions, dtype=np.float64).reshape(-1, 3)
        self.space.to_scaled(conditions)
        flags = ~self.space.is_inside(conditions)
        if flags.any() and self.outside == "raise":
            radius, magnitude, redshift = conditions[np.flatnonzero(flags)[0]]
            raise ConditionError(
                f"{flags.sum()} of {len(conditions)} galaxies are outside the training set of model "
                f"{self.package.name} {self.package.version}, such as one with half-light radius "
                f"{radius:.3g} arcsec, magnitude {magnitude:.2f} and redshift {redshift:.2f}.  Leave them "
                "out, or set outside to clip or flag."
            )
        if self.outside == "clip":
            conditions = self.space.clip(conditions)
        return conditions, flags

    def draw(
        self,
        conditions: np.ndarray,
        seeds: Sequence[int] | np.ndarray,
        *,
        psf: np.ndarray | None = None,
    ) -> np.ndarray:
        """Draw galaxies without noise, mirrored or not and turned.

        Parameters
        ----------
        conditions
            Half-light radius in arcsec, magnitude and redshift, shape
            ``(N, 3)``.
        seeds
            A seed for each galaxy, not negative.
        psf
            PSFs with their pixel on the grid of the model, shape
            ``(N, S, S)``; by default the Gaussian of the model.

        Returns
        -------
        image
            Flux in each pixel, their sum 1, float32, shape
            ``(N, S + 1, S + 1)``; the centre is that of the middle pixel, and
            the last row and column are 0.

        Raises
        ------
        ConditionError
            Raised as by `check`.
        """
        size = self._network.size
        images = np.zeros((len(conditions), size + 1, size + 1), dtype=np.float32)
        for rows, transform in self._sample(conditions, seeds):
            if psf is None:
                drawn = self._network.smooth(transform)
            else:
                kernel = torch.from_numpy(np.asarray(psf[rows], dtype=np.float32)).to(self._device)
                drawn = invert_transform(transform, compute_transform(kernel))
            images[rows, :-1, :-1] = drawn.cpu().numpy()
        return images

    def draw_transforms(self, conditions: np.ndarray, seeds: Sequence[int] | np.ndarray) -> np.ndarray:
        """Draw galaxies before the PSF.

        Parameters
        ----------
        conditions, seeds
            As for `draw`.

        Returns
        -------
        transform
            As of `fourier.compute_transform`, for a flux of 1, shape
            ``(N, S, S / 2 + 1)``.
        """
        half = self._network.size // 2
        transforms = np.zeros((len(conditions), 2 * half, half + 1), dtype=np.complex64)
        for rows, transform in self._sample(conditions, seeds):
            transforms[rows] = transform.cpu().numpy()
        transforms[:, half] = transforms[..., half] = 0
        return transforms

    def _sample(
        self, conditions: np.ndarray, seeds: Sequence[int] | np.ndarray
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield rows, and the transforms of their galaxies."""
        conditions, _ = self.check(conditions)
        if len(seeds) != len(conditions):
            raise ValueError(f"There are {len(seeds)} seeds for {len(conditions)} galaxies.")
        scaled = self.space.to_scaled(conditions)
        for start in range(0, len(conditions), self._batch_size):
            rows = slice(start, min(start + self._batch_size, len(conditions)))
            normal = np.empty((rows.stop - start, self._network.n_latents))
            orientation = np.empty(len(normal))
            for i, seed in enumerate(seeds[rows]):
                rng = np.random.default_rng(int(seed))
                normal[i] = rng.standard_normal(normal.shape[1])
                orientation[i] = rng.uniform(-2 * np.pi, 2 * np.pi)
            arrays = scaled[rows], normal, orientation
            inputs = [torch.from_numpy(array.astype(np.float32)).to(self._device) for array in arrays]
            with torch.inference_mode(), torch_threads(1):
                transform = self._network.sample(*inputs)
            yield rows, transform

    def score(
        self,
        image: np.ndarray,
        *,
        psf: np.ndarray,
        noise: np.ndarray,
        conditions: np.ndarray,
        noise_power: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Elbo]:
        """Say how the model sees images of real galaxies.

        Parameters
        ----------
        image
            Images with PSF and noise for a flux of 1 on the grid of the
            model, shape ``(N, S, S)``, the origin at pixel S / 2.
        psf
            Their PSFs with their pixel, shape ``(N, S, S)``.
        noise
            Standard deviation of the noise in a pixel, shape ``(N,)``.
        conditions
            As for `draw`.
        noise_power
            Power of the noise in each mode as of
            `fourier.compute_noise_power`; white by default.

        Returns
        -------
        latents
            Means of q(z|x, y) for the shape, shape ``(N, Z)``.
        elbo
            Both terms of the evidence lower bound; the latent variables are
            at their means.

        Raises
        ------
        ConditionError
            Raised as by `check`.
        """
        conditions, _ = self.check(conditions)
        size = self._network.size
        power = np.ones((size, size // 2 + 1)) if noise_power is None else noise_power / noise_power.mean()
        arrays = [image, psf, noise, self.space.to_scaled(conditions)]
        inputs = [torch.from_numpy(np.asarray(array, dtype=np.float32)).to(self._device) for array in arrays]
        weight = torch.from_numpy(power.astype(np.float32)).to(self._device)
        means, likelihoods, divergences = [], [], []
        with torch.inference_mode(), torch_threads(1):
            for start in range(0, len(image), 16):
                x, kernel, sigma, y = [part[start : start + 16] for part in inputs]
                zeros = torch.zeros(len(x), self._network.n_latents, device=self._device)
                output = self._network(x, kernel, sigma, y, zeros)
                elbo = compute_elbo(output, x, kernel, weight, sigma**2)
                means.append(output.mean.cpu().numpy())
                likelihoods.append(elbo.log_likelihood.cpu())
                divergences.append(elbo.kl_divergence.cpu())
        if not means:
            return np.empty((0, self._network.latents)), Elbo(torch.empty(0), torch.empty(0))
        return np.concatenate(means), Elbo(torch.cat(likelihoods), torch.cat(divergences))

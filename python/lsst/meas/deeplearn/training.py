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


"""The training loop of every network of this package.

Nothing here knows what a network is for: the caller says how to make it, and
how to compute the loss of a batch.
"""

from __future__ import annotations

__all__ = (
    "Batch",
    "CheckpointError",
    "Snapshot",
    "TrainingResult",
    "TrainingSettings",
    "compute_learning_rate",
    "predict",
    "train",
)

import bisect
import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from lsst.utils.logging import PeriodicLogger

_LOG = logging.getLogger(__name__)

type Batch = dict[str, Tensor]
"""Examples by the names of their parts; the first axis counts examples."""

EVALUATION_BATCH_SIZE = 128
"""Number of examples in a batch without gradients."""


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How to train a network.

    The defaults are those of Lanusse et al. (2018).
    """

    epochs: int = 120
    """Number of passes over the examples."""

    batch_size: int = 128
    """Number of examples in a step, over all devices."""

    learning_rate: float = 1e-3
    """Largest learning rate."""

    schedule: str = "step"
    """``"step"`` divides the rate by ten after each third of a cycle;
    ``"cosine"`` lowers it to 0 along a cosine.  That of the first cycle rises
    over its first twentieth."""

    cycles: int = 1
    """Number of times that the rate starts from its largest value, each of
    which ends with a network of its own: a snapshot ensemble (Huang et al.
    2017, arXiv:1704.00109).  The first takes twice as long as each of the
    others (theirs are equal), for it starts from nothing."""

    weight_decay: float = 0.0
    """Decoupled weight decay (Loshchilov & Hutter 2019); 0 is plain ADAM."""

    precision: str = "32-true"
    """``"32-true"`` or ``"bf16-mixed"``, which is faster where the processor
    has bfloat16; any precision of Lightning Fabric."""

    channels_last: bool = False
    """Whether images are kept with the channels as the fastest axis, which
    is faster on most processors.  Networks that have a convolution with less
    than three channels are not kept so on a CPU: torch 2.15 crashes in their
    backward pass."""

    monitor: str = "loss"
    """Validation figure by which the best epoch is chosen."""

    monitor_mode: str = "min"
    """``"min"`` if a smaller figure is better, ``"max"`` if a larger one."""

    seed: int = 0
    """Seed of the first weights, the order of examples, and augmentation."""

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.learning_rate > 0:
            raise ValueError(
                f"Training needs at least one epoch, batches of two and a positive learning rate, not "
                f"{self.epochs}, {self.batch_size} and {self.learning_rate}."
            )
        if self.cycles < 1 or 1 < self.cycles >= self.epochs:
            raise ValueError(
                f"{self.epochs} epochs cannot have {self.cycles} cycles; several need more epochs."
            )
        if self.schedule not in ("step", "cosine") or self.monitor_mode not in ("min", "max"):
            raise ValueError(f"Unknown schedule {self.schedule!r} or monitor mode {self.monitor_mode!r}.")

    @property
    def last_epochs(self) -> tuple[int, ...]:
        """Number of the last epoch of each cycle, from 1."""
        parts = self.cycles + 1
        return tuple(round(self.epochs * (cycle + 2) / parts) for cycle in range(self.cycles))


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A network as it was after an epoch."""

    epoch: int
    """Number of the epoch, from 1."""

    weights: dict[str, np.ndarray]
    """State of the network."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingResult:
    """Trained networks and how they became so."""

    snapshots: tuple[Snapshot, ...]
    """The network after the best epoch of each cycle."""

    history: list[dict[str, float]]
    """Figures of each epoch: ``epoch``, ``train_loss``, ``learning_rate``,
    and those of the validation."""

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """State of the network after the best epoch of the last cycle."""
        return self.snapshots[-1].weights

    @property
    def best_epoch(self) -> int:
        """Number of that epoch, from 1."""
        return self.snapshots[-1].epoch


class TrainingError(RuntimeError):
    """Raised if the loss is no longer finite."""


class CheckpointError(ValueError):
    """Raised for a checkpoint that is not of this training."""


def compute_learning_rate(settings: TrainingSettings, progress: float) -> float:
    """Return the learning rate at a point of the training.

    Parameters
    ----------
    settings
        The settings.
    progress
        Fraction of the steps that are done, from 0 to 1.
    """
    ends = [epoch / settings.epochs for epoch in settings.last_epochs]
    cycle = min(bisect.bisect_right(ends, progress), settings.cycles - 1)
    start = ends[cycle - 1] if cycle else 0.0
    progress = min((progress - start) / (ends[cycle] - start), 1.0)
    if settings.schedule == "step":
        return settings.learning_rate * 0.1 ** min(math.floor(3 * progress + 1e-9), 2)
    warm_up = 0.0 if cycle else 0.05
    if progress < warm_up:
        return settings.learning_rate * max(progress / warm_up, 0.02)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def train(
    make_network: Callable[[], nn.Module],
    data: Batch,
    *,
    compute_loss: Callable[[nn.Module, Batch], Tensor],
    settings: TrainingSettings,
    validation: Batch | None = None,
    evaluate: Callable[[nn.Module, Batch], Mapping[str, float]] | None = None,
    augment: Callable[[Batch, torch.Generator | None], Batch] | None = None,
    checkpoint: Path | None = None,
    recipe: str = "",
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    accelerator: str = "auto",
    devices: int = 1,
) -> TrainingResult:
    """Train a network.

    Parameters
    ----------
    make_network
        Returns the network to train; called with the generator of torch
        seeded.
    data
        Training examples.
    compute_loss
        Returns the mean loss of a batch.
    settings
        How to train.
    validation
        Examples by which the best epoch of each cycle is chosen; without
        them, the last one is.
    evaluate
        Returns figures of a network in evaluation mode on ``validation``; the
        default is ``loss``, the mean of ``compute_loss``.
    augment
        Returns a changed batch, given a seeded generator; called on the CPU.
        It is called once on ``validation``, with `None` for the generator:
        then it must do what is not random only.
    checkpoint
        File in which the state is kept after each epoch.  If it exists, the
        training goes on from there, and on a CPU ends with the same weights
        as one that was not interrupted.
    recipe
        What else decides what is learnt, such as the settings of ``augment``
        and ``compute_loss``; a checkpoint knows it.
    on_epoch
        Called after each epoch with its figures.
    accelerator, devices
        Kind and number of devices, as Lightning Fabric has them.

    Returns
    -------
    result
        Weights of the best epochs, and the history.

    Raises
    ------
    ValueError
        Raised if there are fewer examples than a batch has.
    CheckpointError
        Raised if the checkpoint is of other settings, another recipe, other
        examples, by all that they have but images, or other first weights.
    TrainingError
        Raised if the loss is no longer finite.

    Notes
    -----
    Each epoch has generators of its own, seeded by the seed and the number
    of the epoch.  The last examples of an epoch that do not fill a batch are
    left out; the order differs from epoch to epoch.
    """
    n = _count(data)
    if n < settings.batch_size:
        raise ValueError(f"{n} examples do not fill a batch of {settings.batch_size}.")
    if validation is not None and augment is not None:
        validation = augment(validation, None)
    evaluate = evaluate or _MeanLoss(compute_loss)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        precision=settings.precision,  # type: ignore[arg-type]
    )
    fabric.launch()
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        network = make_network()
        if settings.channels_last and (_has_many_channels(network) or fabric.device.type != "cpu"):
            network = network.to(memory_format=torch.channels_last)
        state = _State(network, settings, recipe, data)
        module, optimizer = fabric.setup(network, state.optimizer)
        if checkpoint is not None and checkpoint.exists():
            state.read(checkpoint)
            _LOG.info("Training goes on after epoch %d of %d.", state.epoch, settings.epochs)
        while state.epoch < settings.epochs:
            figures = _train_epoch(
                fabric, module, optimizer, data, compute_loss, settings, augment, state.epoch
            )
            if validation is not None:
                figures |= evaluate(module.eval(), validation)
            state.finish_epoch(figures, choose=validation is not None)
            if checkpoint is not None and fabric.is_global_zero:
                state.write(checkpoint)
            fabric.barrier()
            _LOG.info(
                "Epoch %d of %d: %s.",
                state.epoch,
                settings.epochs,
                ", ".join(f"{key} {value:.4g}" for key, value in figures.items()),
            )
            if on_epoch is not None:
                on_epoch(state.history[-1])
    return TrainingResult(
        snapshots=tuple(
            Snapshot(epoch, {key: value.cpu().numpy() for key, value in weights.items()})
            for epoch, weights in state.snapshots
        ),
        history=state.history,
    )


def _train_epoch(
    fabric: Fabric,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Batch,
    compute_loss: Callable[[nn.Module, Batch], Tensor],
    settings: TrainingSettings,
    augment: Callable[[Batch, torch.Generator | None], Batch] | None,
    epoch: int,
) -> dict[str, float]:
    """Return figures of one pass over the data."""
    # A seed sequence, so that epochs of neighbouring seeds share nothing.
    order_seed, augment_seed, global_seed = np.random.SeedSequence([settings.seed, epoch]).generate_state(3)
    order = torch.randperm(_count(data), generator=torch.Generator().manual_seed(int(order_seed)))
    generator = torch.Generator().manual_seed(int(augment_seed))
    torch.manual_seed(int(global_seed))
    steps = len(order) // settings.batch_size
    periodic = PeriodicLogger(_LOG, interval=60.0)
    module.train()
    total, start, rate = 0.0, time.monotonic(), 0.0
    for step in range(steps):
        index = order[step * settings.batch_size : (step + 1) * settings.batch_size]
        batch = {key: value[index] for key, value in data.items()}
        if augment is not None:
            batch = augment(batch, generator)
        # Each device takes its share of the batch.
        batch = {
            key: _arrange(fabric.to_device(value[fabric.global_rank :: fabric.world_size]), module)
            for key, value in batch.items()
        }
        rate = compute_learning_rate(settings, (epoch + step / steps) / settings.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = compute_loss(module, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss is {value} in step {step + 1} of epoch {epoch + 1}. Lower the learning rate, and "
                "look for pixels that are not finite in the training set."
            )
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        optimizer.step()
        total += value
        periodic.log(
            "Step %d of %d in epoch %d: mean loss %.4f.", step + 1, steps, epoch + 1, total / (step + 1)
        )
    seconds = time.monotonic() - start
    _LOG.info("%d steps of %d examples took %.1f seconds.", steps, settings.batch_size, seconds)
    return {"train_loss": total / steps, "learning_rate": rate}


def predict(network: nn.Module, images: Tensor, *, batch_size: int = EVALUATION_BATCH_SIZE) -> Tensor:
    """Return the outputs of a network, float32, on the CPU.

    Parameters
    ----------
    network
        The network; its mode is left as it is.
    images
        Inputs, the first axis of which counts examples.
    batch_size
        Number of examples at once.
    """
    device = next(network.parameters()).device
    with torch.no_grad():
        parts = [
            network(_arrange(part.to(device), network)).float().cpu() for part in images.split(batch_size)
        ]
    return torch.cat(parts)


class _MeanLoss:
    """The mean loss over examples without gradients."""

    def __init__(self, compute_loss: Callable[[nn.Module, Batch], Tensor]) -> None:
        self._compute_loss = compute_loss

    def __call__(self, network: nn.Module, data: Batch) -> dict[str, float]:
        device = next(network.parameters()).device
        total, n = 0.0, _count(data)
        with torch.no_grad():
            for batch in _split(data, EVALUATION_BATCH_SIZE):
                batch = {key: _arrange(value.to(device), network) for key, value in batch.items()}
                total += float(self._compute_loss(network, batch)) * _count(batch)
        return {"loss": total / n}


class _State:
    """All that a training needs to go on.

    Parameters
    ----------
    network
        The network.
    settings
        How it is trained.
    recipe
        What else decides what is learnt.
    data
        Training examples.
    """

    def __init__(self, network: nn.Module, settings: TrainingSettings, recipe: str, data: Batch) -> None:
        self.network = network
        self.settings = settings
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        # Best epoch so far of each cycle that has begun, and its weights.
        self.snapshots: list[tuple[int, dict[str, Tensor]]] = []
        self._fingerprint = json.dumps(
            {
                "settings": dataclasses.asdict(settings),
                "recipe": recipe,
                "n_examples": _count(data),
                "examples": _hash({key: value for key, value in data.items() if value.ndim < 3}),
                "start": _hash(network.state_dict()),
            },
            sort_keys=True,
        )

    def finish_epoch(self, figures: dict[str, float], *, choose: bool) -> None:
        """Note the figures of an epoch, and its weights if they are best.

        Parameters
        ----------
        figures
            Figures of the epoch.
        choose
            Whether the best epoch is looked for; if not, it is the last.
        """
        self.epoch += 1
        self.history.append({"epoch": self.epoch, **figures})
        monitor = self.settings.monitor
        if choose and monitor not in figures:
            raise ValueError(f"No figure is called {monitor!r}; there are {sorted(figures)}.")
        cycle = bisect.bisect_left(self.settings.last_epochs, self.epoch)
        if choose and len(self.snapshots) > cycle:
            gain = figures[monitor] - self.history[self.snapshots[cycle][0] - 1][monitor]
            if not (gain < 0 if self.settings.monitor_mode == "min" else gain > 0):
                return
        weights = {key: value.detach().clone() for key, value in self.network.state_dict().items()}
        self.snapshots[cycle:] = [(self.epoch, weights)]

    def write(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all.

        Parameters
        ----------
        path
            File to write.
        """
        temporary = path.with_name(path.name + ".part")
        torch.save(
            {
                "fingerprint": self._fingerprint,
                "epoch": self.epoch,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "history": self.history,
                "snapshots": self.snapshots,
            },
            temporary,
        )
        temporary.replace(path)

    def read(self, path: Path) -> None:
        """Read a checkpoint; nothing in it is run.

        Parameters
        ----------
        path
            File to read.
        """
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if content["fingerprint"] != self._fingerprint:
            raise CheckpointError(
                f"Checkpoint {path} is of a training with other settings or data or first weights "
                f"({content['fingerprint']}); remove it to start afresh."
            )
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.epoch, self.history = content["epoch"], content["history"]
        self.snapshots = content["snapshots"]


def _hash(values: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors and their names."""
    digest = hashlib.sha256()
    for name, value in values.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _count(data: Batch) -> int:
    return len(next(iter(data.values())))


def _split(data: Batch, size: int) -> Iterator[Batch]:
    for start in range(0, _count(data), size):
        yield {key: value[start : start + size] for key, value in data.items()}


def _has_many_channels(network: nn.Module) -> bool:
    """Whether all convolutions have three channels or more on both sides."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    return all(min(layer.in_channels, layer.out_channels) >= 3 for layer in layers)


def _arrange(value: Tensor, network: nn.Module) -> Tensor:
    """Give images the memory format of the weights of a network."""
    weights = next((p for p in network.parameters() if p.ndim == 4 and p.shape[1] > 1), None)
    if value.ndim != 4 or weights is None or weights.is_contiguous():
        return value.contiguous()
    return value.contiguous(memory_format=torch.channels_last)

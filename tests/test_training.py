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


"""Tests of the training loop, with networks of width four."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lsst.meas.deeplearn.image_augmentation import ImageAugmentation
from lsst.meas.deeplearn.training import (
    Batch,
    TrainingError,
    TrainingResult,
    TrainingSettings,
    compute_learning_rate,
    predict,
    train,
)


class SmallNetwork(nn.Sequential):
    """A network of width four, with all kinds of layers that have state."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ELU(), nn.Dropout(0.2), nn.Flatten(), nn.LazyLinear(1)
        )
        self(torch.zeros(2, 2, 9, 9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flatten()


class KilledError(Exception):
    """Raised where a process would be killed."""


def make_data(n: int = 3, size: int = 9) -> Batch:
    """Make stamps, of which those with a bright row are positive."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(n, 2, size, size, generator=generator)
    label = (torch.arange(n) % 2).float()
    image[label > 0, :, size // 2] += 1.0
    return {"image": image, "label": label}


def compute_loss(network: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the cross entropy."""
    return functional.binary_cross_entropy_with_logits(network(batch["image"]), batch["label"])


def augment(batch: Batch, generator: torch.Generator | None) -> Batch:
    """Shift stamps and make them noisier."""
    change = ImageAugmentation(size=9, max_shift=1, max_noise=1.5)
    return {"image": change(batch["image"], generator)[0], "label": batch["label"]}


def run(data: Batch, **kwargs: object) -> TrainingResult:
    """Train the small network."""
    settings = kwargs.pop("settings", TrainingSettings(epochs=4, batch_size=3, learning_rate=0.02))
    arguments = {"compute_loss": compute_loss, "settings": settings, "accelerator": "cpu"} | kwargs
    return train(SmallNetwork, data, **arguments)  # type: ignore[arg-type]


def assert_same_weights(a: TrainingResult, b: TrainingResult) -> None:
    """Check that two trainings end with equal weights."""
    assert a.weights.keys() == b.weights.keys()
    for name in a.weights:
        np.testing.assert_array_equal(a.weights[name], b.weights[name], err_msg=name)


def test_loss_falls() -> None:
    """Three examples are learnt."""
    result = run(make_data(), settings=TrainingSettings(epochs=20, batch_size=3, learning_rate=0.02))
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    assert [figures["epoch"] for figures in result.history] == list(range(1, 21))
    assert result.best_epoch == 20


def test_one_seed_fixes_all() -> None:
    """The same seed gives the same weights whatever the global state."""
    data = make_data(9)
    torch.manual_seed(1)
    first = run(data, augment=augment)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert_same_weights(first, run(data, augment=augment))
    torch.testing.assert_close(torch.get_rng_state(), state)
    other = run(data, augment=augment, settings=TrainingSettings(4, 3, 0.02, seed=1))
    assert any((first.weights[name] != other.weights[name]).any() for name in first.weights)


def test_resumed_run_equals_unbroken_one(tmp_path: Path) -> None:
    """A killed training goes on, and ends with the same weights."""
    data, validation, checkpoint = make_data(9, size=11), make_data(4, size=11), tmp_path / "state.pt"

    def kill(figures: dict[str, float]) -> None:
        if figures["epoch"] == 2:
            raise KilledError

    unbroken = run(data, validation=validation, augment=augment)
    with pytest.raises(KilledError):
        run(data, validation=validation, augment=augment, checkpoint=checkpoint, on_epoch=kill)
    resumed = run(data, validation=validation, augment=augment, checkpoint=checkpoint)
    assert_same_weights(unbroken, resumed)
    assert resumed.history == unbroken.history
    assert resumed.best_epoch == unbroken.best_epoch


def test_checkpoint_of_other_training_is_refused(tmp_path: Path) -> None:
    """A checkpoint of other settings or data is not taken up."""
    checkpoint = tmp_path / "state.pt"
    run(make_data(), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="other settings or data"):
        run(make_data(), checkpoint=checkpoint, settings=TrainingSettings(epochs=5, batch_size=3))
    with pytest.raises(ValueError, match="other settings or data"):
        run(make_data(6), checkpoint=checkpoint)


def test_best_epoch_is_kept() -> None:
    """The weights are those of the epoch with the best figure."""
    figures = iter([0.5, 0.9, 0.7, 0.6])
    seen = []

    def evaluate(network: nn.Module, batch: Batch) -> dict[str, float]:
        assert not network.training
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return {"merit": next(figures)}

    settings = TrainingSettings(
        epochs=4, batch_size=3, learning_rate=0.02, monitor="merit", monitor_mode="max"
    )
    result = run(make_data(), validation=make_data(), evaluate=evaluate, settings=settings)
    assert result.best_epoch == 2
    np.testing.assert_array_equal(result.weights["0.weight"], seen[1]["0.weight"].numpy())


def test_loss_of_validation_is_the_mean() -> None:
    """Without other figures the best epoch has the smallest mean loss."""
    result = run(make_data(), validation=make_data(200))
    losses = [figures["loss"] for figures in result.history]
    assert result.best_epoch == 1 + int(np.argmin(losses))
    network = SmallNetwork().eval()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in result.weights.items()})
    data = make_data(200)
    outputs = predict(network, data["image"], batch_size=7)
    expected = functional.binary_cross_entropy_with_logits(outputs, data["label"])
    assert min(losses) == pytest.approx(expected.item(), rel=1e-5)


def test_bad_data_stop_the_training() -> None:
    """NaN in the data is an error that names the step."""
    data = make_data()
    data["image"][1, 0, 4, 4] = torch.nan
    with pytest.raises(TrainingError, match="loss is nan in step 1 of epoch 1"):
        run(data)


def test_too_few_examples_are_refused() -> None:
    """An epoch needs at least one whole batch."""
    with pytest.raises(ValueError, match="2 examples do not fill a batch of 3"):
        run(make_data(2))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"schedule": "linear"},
        {"epochs": 2, "cycles": 3},
        {"epochs": 3, "cycles": 3},
    ],
)
def test_impossible_settings_are_refused(kwargs: dict[str, object]) -> None:
    """Settings that cannot be followed are refused at once."""
    with pytest.raises(ValueError, match="needs at least|Unknown schedule|cannot have 3 cycles"):
        TrainingSettings(**kwargs)  # type: ignore[arg-type]


def test_published_schedule() -> None:
    """The rate is divided by ten after epochs 40 and 80 of 120."""
    settings = TrainingSettings()
    rates = [compute_learning_rate(settings, epoch / 120) for epoch in (0, 39, 40, 79, 80, 119)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_cosine_schedule() -> None:
    """The rate rises to its largest value and falls to 0."""
    settings = TrainingSettings(schedule="cosine", learning_rate=2e-3)
    rates = [compute_learning_rate(settings, progress) for progress in (0.0, 0.025, 0.05, 0.525, 1.0)]
    np.testing.assert_allclose(rates, [4e-5, 1e-3, 2e-3, 1e-3, 0.0], atol=1e-12)


def test_each_cycle_starts_again() -> None:
    """With restarts, each cycle goes from the largest rate to 0."""
    settings = TrainingSettings(epochs=80, schedule="cosine", cycles=3)
    assert settings.last_epochs == (40, 60, 80)
    rates = [compute_learning_rate(settings, epoch / 80) for epoch in (0, 2, 39.99, 40, 50, 59.99, 60, 80)]
    np.testing.assert_allclose(rates, [2e-5, 1e-3, 0, 1e-3, 5e-4, 0, 1e-3, 0], atol=1e-8)


def test_each_cycle_leaves_a_network(tmp_path: Path) -> None:
    """Snapshots are the best epochs of each cycle; a resumed run has them."""
    settings = TrainingSettings(epochs=8, batch_size=3, learning_rate=0.02, schedule="cosine", cycles=3)
    data, validation, checkpoint = make_data(9), make_data(20), tmp_path / "state.pt"

    def kill(figures: dict[str, float]) -> None:
        if figures["epoch"] == 5:
            raise KilledError

    unbroken = run(data, validation=validation, settings=settings)
    losses = [figures["loss"] for figures in unbroken.history]
    expected = [
        1 + int(np.argmin(losses[:4])),
        5 + int(np.argmin(losses[4:6])),
        7 + int(np.argmin(losses[6:])),
    ]
    assert [snapshot.epoch for snapshot in unbroken.snapshots] == expected
    with pytest.raises(KilledError):
        run(data, validation=validation, settings=settings, checkpoint=checkpoint, on_epoch=kill)
    resumed = run(data, validation=validation, settings=settings, checkpoint=checkpoint)
    for a, b in zip(unbroken.snapshots, resumed.snapshots, strict=True):
        assert a.epoch == b.epoch
        for name in a.weights:
            np.testing.assert_array_equal(a.weights[name], b.weights[name])
    last = run(data, settings=settings)
    assert [snapshot.epoch for snapshot in last.snapshots] == [4, 6, 8]


def test_few_channels_are_not_arranged() -> None:
    """Networks on which torch crashes keep the usual order of axes."""
    settings = TrainingSettings(epochs=2, batch_size=3, learning_rate=0.02, channels_last=True)
    assert_same_weights(
        run(make_data(), settings=settings), run(make_data(), settings=TrainingSettings(2, 3, 0.02))
    )


def test_bfloat16_trains() -> None:
    """Mixed precision learns the examples too."""
    settings = TrainingSettings(epochs=15, batch_size=3, learning_rate=0.02, precision="bf16-mixed")
    result = run(make_data(), settings=settings)
    assert result.history[-1]["train_loss"] < 0.5 * result.history[0]["train_loss"]
    assert result.weights["0.weight"].dtype == np.float32

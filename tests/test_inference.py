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


"""Tests of where and how networks run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lsst.meas.deeplearn.inference import InferenceConfig, predict, torch_threads
from lsst.meas.deeplearn.lenses.deeplens import DeepLens

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


class _Probe(torch.nn.Module):
    """Sums pixels with weights, and records how it is called.

    Parameters
    ----------
    largest
        Largest batch for which there is "memory".
    """

    def __init__(self, largest: int = 1_000_000) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4) / 10)
        self.largest = largest
        self.batches: list[int] = []
        self.threads: set[int] = set()
        self.tf32: set[bool] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        self.threads.add(torch.get_num_threads())
        self.tf32.add(torch.backends.cudnn.allow_tf32)
        assert not torch.is_grad_enabled()
        if len(x) > self.largest:
            raise torch.OutOfMemoryError("Out of memory.")
        rows, columns = x.shape[2:]
        return (x * self.weights[:rows, :columns]).sum(dim=(1, 2, 3))


def _make_config(**kwargs: Any) -> InferenceConfig:
    config = InferenceConfig()
    config.update(**({"device": "cpu"} | kwargs))
    config.validate()
    return config


def _make_inputs(n: int, size: int = 3, bands: int = 2) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, bands, size, size)).astype(np.float32)


def test_outputs_are_those_of_the_network() -> None:
    """Without orientations the output is that of the network."""
    inputs = _make_inputs(7)
    outputs = predict(_Probe(), inputs, _make_config(averageOrientations=1))
    assert outputs.dtype == np.float32
    expected = (inputs * _Probe().weights[:, :3].detach().numpy()).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)


def test_average_over_orientations() -> None:
    """The average is over the eight flips and rotations of the stamp."""
    inputs = _make_inputs(4)
    outputs = predict(_Probe(), inputs, _make_config(averageOrientations=8))
    weights = _Probe().weights[:, :3].detach().numpy()
    views = [
        view
        for k in range(4)
        for rotated in [np.rot90(inputs, k, axes=(2, 3))]
        for view in (rotated, rotated[..., ::-1])
    ]
    expected = np.mean([(view * weights).sum(axis=(1, 2, 3)) for view in views], axis=0)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    for turned in (np.rot90(inputs, axes=(2, 3)), inputs[..., ::-1]):
        np.testing.assert_allclose(predict(_Probe(), turned, _make_config()), outputs, rtol=1e-5, atol=1e-6)


def _make_deeplens() -> torch.nn.Module:
    torch.manual_seed(2)
    return DeepLens(in_bands=3, width=0.25, blocks=1).eval()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 13])
def test_outputs_do_not_depend_on_the_batch_size(device: str, batch_size: int) -> None:
    """Scores agree to a millionth, whatever the batches."""
    inputs = _make_inputs(13, size=45, bands=3)
    config = {"device": device, "averageOrientations": 1}
    whole = predict(_make_deeplens(), inputs, _make_config(batchSize=64, **config))
    outputs = predict(_make_deeplens(), inputs, _make_config(batchSize=batch_size, **config))
    scores, expected = (1 / (1 + np.exp(-logits.astype(np.float64))) for logits in (outputs, whole))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)


@needs_gpu
def test_devices_agree() -> None:
    """CPU and GPU give the same scores in single precision."""
    inputs = _make_inputs(13, size=45, bands=3)
    outputs = [predict(_make_deeplens(), inputs, _make_config(device=device)) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_single_precision_is_single() -> None:
    """Convolutions on a GPU do not use 10 bits for float32."""
    probe = _Probe()
    before = torch.backends.cudnn.allow_tf32
    predict(probe, _make_inputs(2), _make_config())
    assert probe.tf32 == {False}
    assert torch.backends.cudnn.allow_tf32 is before


def test_bfloat16_is_close() -> None:
    """Mixed precision changes scores a little."""
    inputs = _make_inputs(6, size=45, bands=3)
    single, mixed = (
        predict(_make_deeplens(), inputs, _make_config(precision=precision, averageOrientations=1))
        for precision in ("float32", "bfloat16")
    )
    assert mixed.dtype == np.float32
    assert not np.array_equal(mixed, single)
    np.testing.assert_allclose(mixed, single, atol=0.2)


@pytest.mark.parametrize(("n", "expected"), [(0, []), (3, [3]), (4, [4]), (9, [4, 4, 1])])
def test_batches(n: int, expected: list[int]) -> None:
    """Stamps go in full batches and a rest; none go not at all."""
    probe = _Probe()
    assert predict(probe, _make_inputs(n), _make_config(batchSize=4, averageOrientations=1)).shape == (n,)
    assert probe.batches == expected


@pytest.mark.parametrize("orientations", [1, 8])
def test_out_of_memory_halves_the_batch(orientations: int, caplog: pytest.LogCaptureFixture) -> None:
    """Out of memory, batches are halved until they fit; nothing is lost."""
    inputs = _make_inputs(23)
    config = _make_config(batchSize=16, averageOrientations=orientations)
    probe = _Probe(largest=5)
    outputs = predict(probe, inputs, config)
    np.testing.assert_array_equal(outputs, predict(_Probe(), inputs, config))
    assert [n for n in probe.batches if n > 5] == [16, 8]
    assert sum(n for n in probe.batches if n <= 5) == 23 * orientations
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "going on with batches of 4" in caplog.text


def test_out_of_memory_with_one_stamp() -> None:
    """If one stamp does not fit, that is an error."""
    with pytest.raises(torch.OutOfMemoryError):
        predict(_Probe(largest=0), _make_inputs(3), _make_config(batchSize=2))


def test_other_errors_are_not_hidden() -> None:
    """Only lack of memory is a reason to try again."""
    with pytest.raises(RuntimeError, match="must match the size"):
        predict(_Probe(), _make_inputs(2, size=7), _make_config())


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, auto means the CPU and cuda is an error with a cure."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    inputs = _make_inputs(2)
    np.testing.assert_array_equal(
        predict(_Probe(), inputs, _make_config(device="auto")),
        predict(_Probe(), inputs, _make_config(device="cpu")),
    )
    with pytest.raises(
        RuntimeError, match="'cuda', but torch sees no GPU.*'auto' or 'cpu'.*CUDA_VISIBLE_DEVICES"
    ):
        predict(_Probe(), inputs, _make_config(device="cuda"))


@needs_gpu
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpu_is_used(device: str) -> None:
    """The network and its inputs go to the GPU, the output comes back."""
    network = _Probe()
    outputs = predict(network, _make_inputs(2), _make_config(device=device))
    assert network.weights.is_cuda
    assert isinstance(outputs, np.ndarray)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_are_set_and_restored(num_threads: int) -> None:
    """The network runs with the threads it is given, and they are restored."""
    before = torch.get_num_threads()
    probe = _Probe()
    predict(probe, _make_inputs(2), _make_config(), num_threads=num_threads)
    assert probe.threads == {num_threads}
    assert torch.get_num_threads() == before


def test_threads_are_restored_after_an_error() -> None:
    """An error leaves the number of threads as it was."""
    before = torch.get_num_threads()
    with pytest.raises(torch.OutOfMemoryError):
        predict(_Probe(largest=0), _make_inputs(1), _make_config(), num_threads=before + 1)
    assert torch.get_num_threads() == before
    with torch_threads(0):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_inputs_may_be_views() -> None:
    """Inputs may be strided."""
    inputs = _make_inputs(8)
    config = _make_config()
    np.testing.assert_array_equal(
        predict(_Probe(), inputs[::2], config), predict(_Probe(), inputs, config)[::2]
    )

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

import gc
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit

from lsst.meas.deeplearn import inference
from lsst.meas.deeplearn.inference import (
    CPU_BATCH,
    InferenceConfig,
    describe_engines,
    predict,
    torch_threads,
)
from lsst.meas.deeplearn.lenses.deeplens import DeepLens
from lsst.meas.deeplearn.metrics import compute_auroc
from lsst.meas.deeplearn.model_package import ModelPackage
from lsst.resources import ResourcePath

HAVE_OPENVINO = importlib.util.find_spec("openvino") is not None

needs_openvino = pytest.mark.skipif(not HAVE_OPENVINO, reason="OpenVINO is an option")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


class _Probe(torch.nn.Module):
    """Sums pixels with weights, and records how it, or a copy, is called.

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

    def __deepcopy__(self, memo: object) -> _Probe:
        return self

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
    config.update(**({"device": "cpu", "engine": "torch"} | kwargs))
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


@pytest.mark.parametrize("engine", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_float32_repeats_bit_for_bit(engine: str) -> None:
    """On a CPU neither chunks, batches, order nor threads change a bit."""
    network = _make_deeplens()
    inputs = _make_inputs(CPU_BATCH + 3, size=45, bands=3)
    settings = {"engine": engine, "precision": "float32", "averageOrientations": 8}
    expected = predict(network, inputs, _make_config(**settings))
    order = np.random.default_rng(4).permutation(len(inputs))
    np.testing.assert_array_equal(predict(network, inputs[order], _make_config(**settings)), expected[order])
    config = _make_config(batchSize=7, **settings)
    for part in (slice(0, 1), slice(5, 18)):
        np.testing.assert_array_equal(predict(network, inputs[part], config), expected[part])
    settings["averageOrientations"] = 1
    one, two = (predict(network, inputs[:3], _make_config(**settings), num_threads=n) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("engine", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_float32_repeats_in_another_process(engine: str) -> None:
    """On a CPU another process gives the same scores, bit for bit."""
    code = (
        "import sys, test_inference as t; "
        "config = t._make_config(engine=sys.argv[1], precision='float32', averageOrientations=1); "
        "scores = t.predict(t._make_deeplens(), t._make_inputs(5, size=45, bands=3), config); "
        "print(scores.tobytes().hex())"
    )
    config = _make_config(engine=engine, precision="float32", averageOrientations=1)
    expected = predict(_make_deeplens(), _make_inputs(5, size=45, bands=3), config)
    process = subprocess.run(
        [sys.executable, "-c", code, engine],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    assert process.stdout.split()[-1] == expected.tobytes().hex()


@needs_gpu
@pytest.mark.parametrize("batch_size", [1, 5, 13])
def test_gpu_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    """On a GPU scores agree to a millionth, whatever the batches."""
    inputs = _make_inputs(13, size=45, bands=3)
    settings = {"device": "cuda", "precision": "float32", "averageOrientations": 1}
    whole, outputs = (
        predict(_make_deeplens(), inputs, _make_config(batchSize=size, **settings))
        for size in (64, batch_size)
    )
    np.testing.assert_allclose(expit(outputs), expit(whole), rtol=0, atol=1e-6)


@needs_gpu
def test_devices_agree() -> None:
    """CPU and GPU give the same scores in single precision."""
    inputs = _make_inputs(13, size=45, bands=3)
    outputs = [
        predict(_make_deeplens(), inputs, _make_config(device=device, precision="float32"))
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


def test_single_precision_is_single() -> None:
    """Convolutions on a GPU do not use 10 bits for float32."""
    probe = _Probe()
    before = torch.backends.cudnn.allow_tf32
    predict(probe, _make_inputs(2), _make_config())
    assert probe.tf32 == {False}
    assert torch.backends.cudnn.allow_tf32 is before


@pytest.mark.parametrize(("n", "n_batches"), [(0, 0), (3, 1), (CPU_BATCH, 1), (2 * CPU_BATCH + 1, 3)])
def test_batches(n: int, n_batches: int) -> None:
    """Stamps go in full batches, the last one filled up; none go nowhere."""
    probe = _Probe()
    assert predict(probe, _make_inputs(n), _make_config(averageOrientations=1)).shape == (n,)
    assert probe.batches == n_batches * [CPU_BATCH]


@pytest.mark.parametrize("orientations", [1, 8])
def test_out_of_memory_halves_the_batch(orientations: int, caplog: pytest.LogCaptureFixture) -> None:
    """Out of memory, batches are halved until they fit; nothing is lost."""
    inputs = _make_inputs(23)
    config = _make_config(averageOrientations=orientations)
    probe = _Probe(largest=CPU_BATCH // 4)
    outputs = predict(probe, inputs, config)
    np.testing.assert_array_equal(outputs, predict(_Probe(), inputs, config))
    sizes = [n for n in probe.batches if n > probe.largest]
    assert sizes == [CPU_BATCH, CPU_BATCH // 2]
    # Another test may have let informative messages through.
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert f"going on with batches of {probe.largest}" in caplog.text


def test_another_process_takes_the_memory() -> None:
    """If two quanta share a GPU and memory goes, finished scores stay."""
    inputs = _make_inputs(2 * CPU_BATCH + 5)
    config = _make_config(averageOrientations=1)
    probe = _Probe()

    def lose_memory(*args: object) -> None:
        probe.largest = CPU_BATCH // 2

    probe.register_forward_hook(lose_memory)
    outputs = predict(probe, inputs, config)
    np.testing.assert_array_equal(outputs, predict(_Probe(), inputs, config))
    half = CPU_BATCH // 2
    assert probe.batches == [CPU_BATCH, CPU_BATCH, half, half, half]


def test_out_of_memory_with_one_stamp() -> None:
    """If one stamp does not fit, that is an error with a cure."""
    with pytest.raises(torch.OutOfMemoryError) as info:
        predict(_Probe(largest=0), _make_inputs(3), _make_config())
    assert "-j 1" in info.value.__notes__[0]


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


class _LostEngine:
    """An engine of a GPU that is gone."""

    def run(self, inputs: np.ndarray, orientations: int) -> np.ndarray:
        raise torch.AcceleratorError("CUDA error: device lost")


@pytest.fixture
def lost_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch see a GPU that fails when it is used."""
    make_engine = inference._make_engine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(inference, "_failed_devices", set())
    monkeypatch.setattr(
        inference,
        "_make_engine",
        lambda network, shape, device, *args, **kwargs: (
            _LostEngine() if device == "cuda" else make_engine(network, shape, device, *args, **kwargs)
        ),
    )


@pytest.mark.usefixtures("lost_gpu")
def test_gpu_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """If a GPU fails, the CPU takes over for good, with a warning."""
    inputs = _make_inputs(5)
    expected = predict(_Probe(), inputs, _make_config(device="cpu"))
    for _ in range(2):
        outputs = predict(_Probe(), inputs, _make_config(device="auto"))
        np.testing.assert_array_equal(outputs, expected)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["The GPU failed (CUDA error: device lost); this process goes on without it."]


@pytest.mark.usefixtures("lost_gpu")
def test_gpu_that_fails_and_was_asked_for() -> None:
    """If the GPU was asked for by name, its failure is an error."""
    with pytest.raises(RuntimeError, match="device lost") as info:
        predict(_Probe(), _make_inputs(5), _make_config(device="cuda"))
    assert "set device to 'cpu'" in info.value.__notes__[0]


def test_engines_live_as_long_as_their_network() -> None:
    """What is compiled is used again, and is gone with its network."""
    network, inputs = _make_deeplens(), _make_inputs(3, size=45, bands=3)
    before = len(inference._engines)
    predict(network, inputs, _make_config())
    (engine,) = inference._engines[network].values()
    predict(network, inputs, _make_config())
    assert list(inference._engines[network].values()) == [engine]
    del network, engine
    gc.collect()
    assert len(inference._engines) <= before


def test_the_network_stays_as_it_is() -> None:
    """A network can be trained and saved after it was run."""
    network = _make_deeplens()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for precision in ("float32", "bfloat16"):
        predict(network, _make_inputs(2, size=45, bands=3), _make_config(precision=precision))
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_without_openvino(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without OpenVINO torch computes, and the log says how to get it."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    network, inputs = _make_deeplens(), _make_inputs(3, size=45, bands=3)
    outputs = predict(network, inputs, _make_config(engine="openvino"))
    assert "torch, not with OpenVINO" in caplog.text
    assert "pip install meas-deeplearn[openvino]" in caplog.text
    np.testing.assert_array_equal(outputs, predict(network, inputs, _make_config(engine="torch")))


def test_without_bfloat16(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without bfloat16 arithmetic the network runs in float32, and says so."""
    monkeypatch.setattr(inference._TorchEngine, "_has_bfloat16", staticmethod(lambda device: False))
    network, inputs = _make_deeplens(), _make_inputs(3, size=45, bands=3)
    outputs = predict(network, inputs, _make_config(precision="bfloat16"))
    assert "no bfloat16 arithmetic" in caplog.text
    np.testing.assert_array_equal(outputs, predict(network, inputs, _make_config(precision="float32")))


@needs_openvino
def test_openvino_without_bfloat16(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The same with OpenVINO, which knows what the CPU can do."""
    openvino = inference._import_openvino()
    monkeypatch.setattr(openvino.Core, "get_property", lambda core, device, name: ["FP32"])
    network, inputs = _make_deeplens(), _make_inputs(3, size=45, bands=3)
    config = _make_config(engine="openvino", precision="bfloat16")
    outputs = predict(network, inputs, config)
    assert "no bfloat16 arithmetic" in caplog.text
    assert describe_engines([network], config).startswith("OpenVINO on cpu in float32")
    config.precision = "float32"
    np.testing.assert_array_equal(outputs, predict(network, inputs, config))


@needs_openvino
def test_openvino_does_not_call_home() -> None:
    """The telemetry of OpenVINO is never loaded."""
    code = (
        "import sys; from lsst.meas.deeplearn.inference import _import_openvino; _import_openvino(); "
        "print([name for name in sys.modules if name.startswith('openvino_telemetry') and sys.modules[name]])"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def _make_lenses_and_galaxies(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scaled g, r, i stamps of red galaxies, half with a blue ring."""
    rng = np.random.default_rng(7)
    y, x = np.indices((45, 45)) - 22.0
    angle, ratio = rng.uniform(0, np.pi, (n, 1, 1)), rng.uniform(0.5, 1.0, (n, 1, 1))
    u = x * np.cos(angle) + y * np.sin(angle)
    v = (y * np.cos(angle) - x * np.sin(angle)) / ratio
    galaxy = np.exp(-np.hypot(u, v) / rng.uniform(2.0, 4.0, (n, 1, 1)))
    ring = np.exp(-0.5 * ((np.hypot(u, v) - rng.uniform(5.0, 9.0, (n, 1, 1))) / 1.8) ** 2)
    arc = 0.5 + 0.5 * np.cos(np.arctan2(v, u) - rng.uniform(0, 6.3, (n, 1, 1)))
    is_lens = np.arange(n) % 2 == 0
    flux = rng.uniform(20, 200, (n, 1, 1, 1)) * np.array([0.25, 0.7, 1.0])[:, None, None]
    source = (
        is_lens[:, None, None, None]
        * rng.uniform(1, 12, (n, 1, 1, 1))
        * np.array([1.0, 0.9, 0.7])[:, None, None]
    )
    stamps = flux * galaxy[:, None] + source * (ring * arc)[:, None] + rng.normal(size=(n, 3, 45, 45))
    return np.arcsinh(stamps / 4.0).astype(np.float32), is_lens


@pytest.fixture(scope="module")
def scored() -> tuple[torch.nn.Module, np.ndarray, np.ndarray, np.ndarray]:
    """Return the shipped network, stamps, whether lenses, and their scores."""
    (path, *_) = sorted(
        ResourcePath.findFileResources(["eups://meas_deeplearn/models/"], r".*deeplens.*\.safetensors$")
    )
    network = ModelPackage.read(path).network
    inputs, is_lens = _make_lenses_and_galaxies(320)
    settings = {"engine": "torch", "precision": "float32", "averageOrientations": 1}
    return network, inputs, is_lens, expit(predict(network, inputs, _make_config(**settings)))


@needs_openvino
def test_float32_agrees_with_trained_weights(
    scored: tuple[torch.nn.Module, np.ndarray, np.ndarray, np.ndarray],
) -> None:
    """In float32 scores agree to 1e-5, and no object changes sides."""
    network, inputs, is_lens, expected = scored
    settings = {"engine": "openvino", "precision": "float32", "averageOrientations": 1}
    scores = expit(predict(network, inputs, _make_config(**settings)))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    threshold = np.quantile(expected[~is_lens], 0.99)
    np.testing.assert_array_equal(scores > threshold, expected > threshold)


@pytest.mark.parametrize("engine", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_bfloat16_agrees_with_trained_weights(
    engine: str, scored: tuple[torch.nn.Module, np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """In bfloat16 areas under ROC curves and decisions stay as they are.

    The area moves by less than 5e-4, and less than a hundredth of the objects
    change sides of the threshold for one false positive in a hundred.
    """
    network, inputs, is_lens, expected = scored
    settings = {"engine": engine, "precision": "bfloat16", "averageOrientations": 1}
    scores = expit(predict(network, inputs, _make_config(**settings)))
    assert not np.array_equal(scores, expected)
    areas = [compute_auroc(values, is_lens)[0] for values in (scores, expected)]
    assert areas[1] > 0.75
    assert abs(areas[0] - areas[1]) < 5e-4
    threshold = np.quantile(expected[~is_lens], 0.99)
    assert np.mean((scores > threshold) != (expected > threshold)) < 0.01

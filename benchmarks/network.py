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


"""Stamps per second of DeepLens, by engine, precision and batch.

The peer is the network as anyone would run it: eager torch in float32.  The
published network and the shipped one, whose first convolution has stride 2,
are both timed; how far scores move is measured with the shipped weights.
"""

from __future__ import annotations

__all__ = ("run",)

import os
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from results import Result, time_calls, time_on_cores
from scipy.special import expit

from lsst.meas.deeplearn import inference
from lsst.meas.deeplearn.inference import CPU_BATCH, InferenceConfig, predict
from lsst.meas.deeplearn.lenses.deeplens import DeepLens
from lsst.meas.deeplearn.model_package import ModelPackage
from lsst.resources import ResourcePath

MODELS = "eups://meas_deeplearn/models/"
SHAPE = (3, 45, 45)
NETWORKS = {"published": {}, "shipped": {"stem_stride": 2}}
ENGINES = [("torch", "float32"), ("torch", "bfloat16"), ("openvino", "float32"), ("openvino", "bfloat16")]
GPU_BATCHES = (64, 256, 1024, 4096)


def run(*, quick: bool) -> list[Result]:
    """Time the networks on one core, and on a GPU where there is one.

    Parameters
    ----------
    quick
        Whether to time a smaller network on fewer stamps.
    """
    n, repeats = (CPU_BATCH, 1) if quick else (128, 2)
    batches = (CPU_BATCH,) if quick else (8, CPU_BATCH, 128)
    inputs = np.random.default_rng(1).normal(size=(n, *SHAPE)).astype(np.float32)
    torch.set_num_threads(1)
    results = []
    for label, settings in NETWORKS.items():
        torch.manual_seed(1)
        network = DeepLens(in_bands=3, width=0.25 if quick else 1.0, **settings).eval()
        naive = {size: _make_naive(network, inputs, size) for size in batches}
        seconds = dict(zip(naive, time_calls(naive.values(), repeats=repeats), strict=True))
        best = min(seconds.values())
        for size, value in seconds.items():
            results.append(_rate(f"{label}, eager float32, batches of {size}", n, value))
        for engine, precision in ENGINES:
            for size in batches:
                with mock.patch.object(inference, "CPU_BATCH", size):
                    call = _make_engine(network, inputs, engine, precision, size)
                    # The peer again: what else the machine does has changed.
                    value, peer = time_calls([call, naive[CPU_BATCH]], repeats=repeats)
                what = f"{label}, {engine} {precision}, batches of {size}"
                results.append(_rate(what, n, value, peer / value, f"eager, batches of {CPU_BATCH}"))
            what = f"{label}, {engine} {precision}, best against best batch"
            top = max(result.value for result in results[-len(batches) :])
            results.append(_rate(what, n, n / top, best * top / n, "eager, its best batch"))
        if (os.cpu_count() or 1) > 1:
            results += _time_two_cores(label, network, inputs, quick=quick)
        if torch.cuda.is_available():
            results += _time_gpu(label, network, quick=quick)
    return results + _measure_agreement(quick=quick)


def _rate(what: str, n: int, seconds: float, ratio: float | None = None, peer: str = "") -> Result:
    return Result("network", what, n / seconds, "stamps/s/core", ratio, peer)


def _make_naive(network: torch.nn.Module, inputs: np.ndarray, size: int) -> Callable[[], object]:
    def call() -> None:
        with torch.inference_mode():
            for start in range(0, len(inputs), size):
                network(torch.from_numpy(inputs[start : start + size]))

    return call


def _make_engine(
    network: torch.nn.Module, inputs: np.ndarray, engine: str, precision: str, batch_size: int
) -> Callable[[], np.ndarray]:
    # The size is a part of what is kept for a network.
    config = InferenceConfig()
    config.update(
        device="cpu", engine=engine, precision=precision, averageOrientations=1, batchSize=batch_size
    )
    return lambda: predict(network, inputs, config)


def _time_two_cores(label: str, network: torch.nn.Module, inputs: np.ndarray, *, quick: bool) -> list[Result]:
    """Time two threads by the clock, against the 350 us of Lanusse's talk."""
    inputs = np.concatenate([inputs] * (1 if quick else 8))
    results = []
    for precision in ("float32", "bfloat16"):
        config = InferenceConfig()
        config.update(device="cpu", precision=precision, averageOrientations=1)
        seconds, cores = time_on_cores(
            lambda config=config: predict(network, inputs, config, num_threads=2), repeats=1 if quick else 3
        )
        what = f"{label}, {precision}, two cores"
        results.append(Result("network", what, 1e6 * seconds / len(inputs), "us/stamp"))
        results.append(Result("network", "    cores that it had", cores, ""))
    return results


def _time_gpu(label: str, network: torch.nn.Module, *, quick: bool) -> list[Result]:
    """Time on a GPU: the whole way from memory and back."""
    n = GPU_BATCHES[0] if quick else 16384
    inputs = np.random.default_rng(1).normal(size=(n, *SHAPE)).astype(np.float32)
    on_gpu = torch.from_numpy(inputs).cuda()
    naive_network = DeepLens(in_bands=3, width=0.25 if quick else 1.0, **NETWORKS[label]).eval().cuda()

    def run_naive() -> None:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for start in range(0, n, 1024):
                naive_network(on_gpu[start : start + 1024])
        torch.cuda.synchronize()

    peer = _time_wall(run_naive)
    results = [Result("network", f"{label}, GPU, eager float32", 1e6 * peer / n, "us/stamp")]
    for precision in ("float32", "bfloat16"):
        for size in GPU_BATCHES[:1] if quick else GPU_BATCHES:
            config = InferenceConfig()
            config.update(device="cuda", precision=precision, averageOrientations=1, batchSize=size)
            seconds = _time_wall(lambda config=config: predict(network, inputs, config))
            what = f"{label}, GPU, {precision}, batches of {size}"
            results.append(
                Result("network", what, 1e6 * seconds / n, "us/stamp", peer / seconds, "eager there")
            )
    return results


def _time_wall(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def _measure_agreement(*, quick: bool) -> list[Result]:
    """Measure how far scores of the shipped weights move."""
    (path, *_) = sorted(ResourcePath.findFileResources([MODELS], r"deeplens.*\.safetensors$"))
    network = ModelPackage.read(path).network
    rng = np.random.default_rng(2)
    scale = np.exp(rng.normal(size=(CPU_BATCH if quick else 512, 1, 1, 1)))
    inputs = (scale * rng.normal(size=(len(scale), *SHAPE))).astype(np.float32)
    expected = expit(_make_engine(network, inputs, "torch", "float32", CPU_BATCH)().astype(np.float64))
    results = []
    for engine, precision in ENGINES[1:]:
        scores = expit(_make_engine(network, inputs, engine, precision, CPU_BATCH)().astype(np.float64))
        what = f"largest change of a score, {engine} {precision}"
        results.append(Result("network", what, float(abs(scores - expected).max()), ""))
    return results

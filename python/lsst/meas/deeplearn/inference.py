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


"""Where and how networks run: device, engine, precision, threads, batches.

The engines are torch, on a CPU or a GPU, and OpenVINO, on a CPU, which is an
option (``pip install meas-deeplearn[openvino]``).  On a CPU every pass has the
same number of stamps, so that float32 scores are the same bit for bit
whatever the chunks, threads and processes.
"""

from __future__ import annotations

__all__ = ("InferenceConfig", "describe_engines", "predict", "torch_threads")

import contextlib
import copy
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import numpy as np

from lsst.pex.config import ChoiceField, Config, RangeField

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)

CPU_BATCH = 32
"""Number of stamps in a pass on a CPU; more leave the caches, and fewer do not
fill the kernels."""


class InferenceConfig(Config):
    """Choices of speed; scores agree between them as they say."""

    device = ChoiceField[str](
        doc="Device on which networks run.",
        default="auto",
        allowed={
            "auto": "A CUDA GPU where torch sees one (CUDA_VISIBLE_DEVICES is respected), else the CPU, "
            "which also takes over from a GPU that fails.",
            "cpu": "The CPU.",
            "cuda": "A CUDA GPU; an error where there is none, or where it fails.",
        },
    )
    engine = ChoiceField[str](
        doc="Library that computes the network.  In float32 their logits agree to 1e-5 of their scatter.",
        default="auto",
        allowed={
            "auto": "OpenVINO on a CPU if it is installed and can do the network, else torch.",
            "torch": "Torch.",
            "openvino": "OpenVINO on a CPU; torch on a GPU, or where OpenVINO fails.",
        },
    )
    precision = ChoiceField[str](
        doc="Arithmetic of the network.",
        default="auto",
        allowed={
            "auto": "bfloat16 on a GPU that has it, else float32.",
            "float32": "Single precision; on a CPU scores repeat bit for bit.",
            "bfloat16": "Eight bits of mantissa; float32 where the hardware has no such arithmetic.  Scores "
            "change by up to 0.03, ranks and areas under ROC curves by less than is measurable.",
        },
    )
    batchSize = RangeField(
        dtype=int,
        doc="Number of stamps in one pass on a GPU; halved for as long as it runs out of memory.  A CPU "
        f"takes {CPU_BATCH} at a time.",
        default=1024,
        min=1,
    )
    averageOrientations = ChoiceField[int](
        doc="Number of flips and rotations by 90 degrees over which the output is averaged.",
        default=8,
        allowed={1: "None; fastest.", 8: "All eight; fewer false positives, eight times the work."},
    )


def predict(
    network: torch.nn.Module, inputs: np.ndarray, config: InferenceConfig, *, num_threads: int = 1
) -> np.ndarray:
    """Run a network over stamps.

    What is prepared for a network is kept as long as the network, so that
    further calls pay nothing for it.

    Parameters
    ----------
    network
        Network in evaluation mode, from ``(N, bands, y, x)`` to ``(N,)``; it
        stays on the CPU, and as it is.
    inputs
        Preprocessed stamps, float32, shape ``(N, bands, y, x)``.
    config
        Device, engine, precision, batches, orientations.
    num_threads
        Threads to use on a CPU.  ``pipetask`` sets torch to one thread; this
        overrules it for the length of the call.

    Returns
    -------
    outputs
        Output of the network, averaged over the orientations, float32, shape
        ``(N,)``.

    Raises
    ------
    RuntimeError
        Raised if a GPU is asked for and there is none, or if it fails.
    torch.OutOfMemoryError
        Raised if a single stamp does not fit into the memory of the GPU.
    """
    import torch

    outputs = np.empty(len(inputs), dtype=np.float32)
    if not len(inputs):
        return outputs
    device = _choose_device(config.device)
    try:
        engine = _get_engine(network, inputs.shape[1:], device, config, num_threads)
        return engine.run(inputs, config.averageOrientations)
    except torch.OutOfMemoryError as err:
        err.add_note("The GPU is full: run fewer processes on it ('pipetask -j 1'), or set device to 'cpu'.")
        raise
    except RuntimeError as err:
        if device == "cpu":
            raise
        if config.device != "auto":
            err.add_note("The GPU failed; set device to 'cpu', or to 'auto' to go on without it.")
            raise
        _LOG.warning("The GPU failed (%s); this process goes on without it.", str(err).partition("\n")[0])
        _failed_devices.add(device)
    return predict(network, inputs, config, num_threads=num_threads)


def describe_engines(
    networks: Iterable[torch.nn.Module], config: InferenceConfig, *, num_threads: int = 1
) -> str:
    """Return how networks have run, for a log.

    Parameters
    ----------
    networks
        Networks that `predict` has run.
    config
        Configuration with which they ran.
    num_threads
        Threads with which they ran.
    """
    choice = _choose(_choose_device(config.device), config, num_threads)
    found = [_engines.get(network, {}) for network in networks]
    return "; ".join(
        sorted({str(engine) for engines in found for key, engine in engines.items() if key[1:] == choice})
    )


@contextlib.contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Set the number of threads of torch, and restore it at the end.

    Parameters
    ----------
    num_threads
        Number of threads, at least 1.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(num_threads, 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Engine(Protocol):
    """A network made ready for a device and a precision."""

    def run(self, inputs: np.ndarray, orientations: int) -> np.ndarray:
        """Return the mean output of each stamp, shape ``(N,)``.

        Parameters
        ----------
        inputs
            Preprocessed stamps, shape ``(N, bands, y, x)``.
        orientations
            Number of flips and rotations, 1 or 8.
        """


type _Choice = tuple[str, str, bool, int, int]

_failed_devices: set[str] = set()
_engines: WeakKeyDictionary[Any, dict[tuple[Any, ...], _Engine]] = WeakKeyDictionary()


def _choose_device(name: str) -> str:
    """Return ``cpu`` or ``cuda``."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise RuntimeError(
            "The configured device is 'cuda', but torch sees no GPU.  Set 'device' to 'auto' or 'cpu', or "
            "check CUDA_VISIBLE_DEVICES and the driver."
        )
    if name == "auto" and "cuda" in _failed_devices:
        return "cpu"
    return "cuda" if available and name != "cpu" else "cpu"


def _choose(device: str, config: InferenceConfig, num_threads: int) -> _Choice:
    """Return what the engines of a network differ in, but for the stamps."""
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and device == "cuda")
    batch_size = config.batchSize if device == "cuda" else CPU_BATCH
    return device, config.engine, bfloat16, batch_size, max(num_threads, 1)


def _get_engine(
    network: torch.nn.Module,
    shape: tuple[int, ...],
    device: str,
    config: InferenceConfig,
    num_threads: int,
) -> _Engine:
    """Return what is ready for a network, or make it ready."""
    choice = _choose(device, config, num_threads)
    engines = _engines.setdefault(network, {})
    if (shape, *choice) not in engines:
        _, library, bfloat16, batch_size, num_threads = choice
        engines[shape, *choice] = _make_engine(
            network,
            shape,
            device,
            library,
            bfloat16=bfloat16,
            batch_size=batch_size,
            num_threads=num_threads,
        )
    return engines[shape, *choice]


def _make_engine(
    network: torch.nn.Module,
    shape: tuple[int, ...],
    device: str,
    library: str,
    *,
    bfloat16: bool,
    batch_size: int,
    num_threads: int,
) -> _Engine:
    """Make a network ready with the library of the configuration."""
    reason = ""
    if device == "cpu" and library != "torch":
        try:
            return _OpenVinoEngine(network, shape, bfloat16=bfloat16, num_threads=num_threads)
        except Exception as err:
            # Torch always works, and what OpenVINO raises is not documented.
            reason = f"not with OpenVINO: {str(err).strip().partition('\n')[0]}"
            if library == "openvino":
                _LOG.warning("A network runs with torch, %s", reason)
    return _TorchEngine(
        network,
        device,
        bfloat16=bfloat16,
        batch_size=batch_size,
        num_threads=num_threads,
        reason=reason,
    )


class _TorchEngine:
    """A network in torch.

    Parameters
    ----------
    network
        The network; it is copied.
    device
        ``cpu`` or ``cuda``.
    bfloat16
        Whether to round weights and activations to bfloat16.
    batch_size
        Number of stamps in a pass.
    num_threads
        Number of threads on a CPU.
    reason
        Why torch, if another library was wanted.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        device: str,
        *,
        bfloat16: bool,
        batch_size: int,
        num_threads: int,
        reason: str = "",
    ) -> None:
        import torch

        self._reason = reason
        self._device = torch.device(device)
        self._num_threads = num_threads
        self._batch_size = batch_size
        if bfloat16 and not self._has_bfloat16(device):
            _LOG.warning("The %s has no bfloat16 arithmetic; networks run in float32.", device)
            bfloat16 = False
        self._dtype = torch.bfloat16 if bfloat16 else torch.float32
        network = copy.deepcopy(network)
        if (fold_norms := getattr(network, "fold_norms", None)) is not None:
            fold_norms()
        network = network.to(device=self._device, dtype=self._dtype)
        self._network = network.to(memory_format=torch.channels_last)

    @staticmethod
    def _has_bfloat16(device: str) -> bool:
        import torch

        if device == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def __str__(self) -> str:
        precision = str(self._dtype).removeprefix("torch.")
        description = f"torch on {self._device} in {precision}, {self._batch_size} stamps in a pass"
        return f"{description} ({self._reason})" if self._reason else description

    def run(self, inputs: np.ndarray, orientations: int) -> np.ndarray:
        """Return the mean output of each stamp, shape ``(N,)``.

        Parameters
        ----------
        inputs
            Stamps, shape ``(N, bands, y, x)``.
        orientations
            Number of flips and rotations to average over.
        """
        import torch

        outputs = torch.empty(len(inputs), dtype=torch.float32, device=self._device)
        start = 0
        with (
            torch_threads(self._num_threads),
            torch.inference_mode(),
            # cuDNN would round the float32 of convolutions to 10 bits (TF32).
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            uploads = _Uploads(inputs, self._device)
            while start < len(inputs):
                stop = min(start + self._batch_size, len(inputs))
                try:
                    batch = uploads.get(start, stop, self._batch_size).to(self._dtype)
                    outputs[start:stop] = self._average(batch, orientations)[: stop - start]
                except torch.OutOfMemoryError:
                    if self._batch_size == 1:
                        raise
                else:
                    start = stop
                    continue
                # Here, for the exception kept the tensors of the batch alive.
                self._batch_size //= 2
                torch.cuda.empty_cache()
                _LOG.warning("Out of GPU memory; going on with batches of %d.", self._batch_size)
            return outputs.cpu().numpy()

    def _average(self, batch: torch.Tensor, orientations: int) -> torch.Tensor:
        """Return the output averaged over flips and rotations."""
        import torch

        total = torch.zeros(len(batch), dtype=torch.float32, device=batch.device)
        for k in range(orientations):
            view = torch.rot90(batch, k % 4, dims=(2, 3))  # (N, bands, y, x)
            if k >= 4:
                view = view.flip(3)
            total += self._network(view.contiguous(memory_format=torch.channels_last)).float()
        return total / orientations


class _Uploads:
    """Batches of stamps on a device, the next one on its way.

    A GPU copies from page-locked memory while it computes; of the two
    buffers one is filled while the other is copied.

    Parameters
    ----------
    inputs
        Stamps, shape ``(N, bands, y, x)``.
    device
        Where they go.
    """

    N_BUFFERS: ClassVar[int] = 2

    def __init__(self, inputs: np.ndarray, device: torch.device) -> None:
        self._inputs = inputs
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._copied: list[Any] = []
        self._n_calls = 0

    def get(self, start: int, stop: int, size: int) -> torch.Tensor:
        """Return stamps, and zeros up to the size of a batch.

        Parameters
        ----------
        start, stop
            First stamp, and the one after the last.
        size
            Number of stamps of a batch.
        """
        import torch

        on_gpu = self._device.type == "cuda"
        if not self._buffers or len(self._buffers[0]) != size:
            shape = (size, *self._inputs.shape[1:])
            n_buffers = self.N_BUFFERS if on_gpu else 1
            self._buffers = [torch.zeros(shape, pin_memory=on_gpu) for _ in range(n_buffers)]
            self._copied = [torch.cuda.Event() for _ in range(n_buffers)] if on_gpu else []
        k = self._n_calls % len(self._buffers)
        self._n_calls += 1
        if on_gpu:
            self._copied[k].synchronize()
        buffer = self._buffers[k]
        buffer[: stop - start] = torch.from_numpy(np.ascontiguousarray(self._inputs[start:stop]))
        buffer[stop - start :] = 0.0
        if not on_gpu:
            return buffer
        batch = buffer.to(self._device, non_blocking=True)
        self._copied[k].record()
        return batch


class _OpenVinoEngine:
    """A network in OpenVINO on the CPU.

    Parameters
    ----------
    network
        The network.
    shape
        Shape of a stamp, ``(bands, y, x)``.
    bfloat16
        Whether to compute in bfloat16.
    num_threads
        Number of stamps batches that are computed at once, a thread each.

    Raises
    ------
    ImportError
        Raised if OpenVINO is not installed.
    """

    def __init__(
        self, network: torch.nn.Module, shape: tuple[int, ...], *, bfloat16: bool, num_threads: int
    ) -> None:
        openvino = _import_openvino()
        core = openvino.Core()
        if bfloat16 and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            _LOG.warning("The CPU has no bfloat16 arithmetic; networks run in float32.")
            bfloat16 = False
        self._precision = "bfloat16" if bfloat16 else "float32"
        self._num_threads = num_threads
        self._shape = (CPU_BATCH, *shape)
        model = openvino.convert_model(_trace(network, self._shape), input=[list(self._shape)])
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
                # A thread for each stream: sums do not depend on threads.
                "NUM_STREAMS": num_threads,
                "INFERENCE_NUM_THREADS": num_threads,
                # Processes that pin their threads pin them to the same cores.
                "ENABLE_CPU_PINNING": False,
            },
        )
        self._queue = openvino.AsyncInferQueue(compiled, 2 * num_threads)

    def __str__(self) -> str:
        return f"OpenVINO on cpu in {self._precision}, {self._num_threads} thread(s)"

    def run(self, inputs: np.ndarray, orientations: int) -> np.ndarray:
        """Return the mean output of each stamp, shape ``(N,)``.

        Parameters
        ----------
        inputs
            Stamps, shape ``(N, bands, y, x)``.
        orientations
            Number of flips and rotations to average over.
        """
        outputs = np.empty((orientations, len(inputs)), dtype=np.float32)

        def keep(request: Any, place: tuple[int, slice]) -> None:
            k, stamps = place
            outputs[k, stamps] = request.get_output_tensor(0).data[: stamps.stop - stamps.start]

        self._queue.set_callback(keep)
        for start in range(0, len(inputs), CPU_BATCH):
            stop = min(start + CPU_BATCH, len(inputs))
            batch = inputs[start:stop]
            if len(batch) < CPU_BATCH:
                batch = np.concatenate([batch, np.zeros((CPU_BATCH - len(batch), *self._shape[1:]))])
            for k in range(orientations):
                view = np.rot90(batch, k % 4, axes=(2, 3))
                view = view[..., ::-1] if k >= 4 else view
                place = (k, slice(start, stop))
                self._queue.start_async({0: np.ascontiguousarray(view, dtype=np.float32)}, userdata=place)
        self._queue.wait_all()
        # One after the other: np.mean adds in an order that depends on N.
        total = outputs[0].copy()
        for output in outputs[1:]:
            total += output
        return total / np.float32(orientations)


def _import_openvino() -> Any:
    """Import OpenVINO, and keep it from calling home."""
    # Its telemetry sends a message when OpenVINO is imported, and is optional.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as err:
        raise ImportError(f"{err}; it comes with 'pip install meas-deeplearn[openvino]'.") from err
    return openvino


def _trace(network: torch.nn.Module, shape: tuple[int, ...]) -> Any:
    """Return the operations of a network with its weights as constants."""
    import torch

    with torch.no_grad(), warnings.catch_warnings():
        # The exported programs that should replace traces take ten times as
        # long to make, and OpenVINO traces too.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.freeze(torch.jit.trace(network, torch.zeros(shape), check_trace=False))

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


"""Speed of the training of DeepLens, in stamps per second.

The steps are those of the training: augmentation, forward and backward pass,
optimizer.  Run as ``python benchmarks/train_lens_finder.py``; see ``--help``.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from lsst.meas.deeplearn.image_augmentation import ImageAugmentation
from lsst.meas.deeplearn.lenses.deeplens import DeepLens
from lsst.meas.deeplearn.training import Batch, TrainingSettings, train

SIZE, MARGIN, BANDS = 45, 5, 3


def compute_loss(network: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the cross entropy of a batch."""
    return binary_cross_entropy_with_logits(network(batch["image"]), batch["label"])


def measure(
    *, stride: int, precision: str, channels_last: bool, batch_size: int, steps: int, accelerator: str
) -> dict[str, Any]:
    """Return wall and processor time of the steps after the first epoch."""
    rng = torch.Generator().manual_seed(1)
    n, side = steps * batch_size, SIZE + 2 * MARGIN
    data = {
        "image": torch.randn(n, BANDS, side, side, generator=rng),
        "label": (torch.arange(n) % 2).float(),
    }
    change = ImageAugmentation(
        size=SIZE, max_shift=MARGIN, max_blur=1.1, max_noise=3.17, flux_scatter=0.1, offset_scatter=0.1
    )

    def augment(batch: Batch, generator: torch.Generator | None) -> Batch:
        return {"image": torch.asinh(change(batch["image"], generator)[0] / 4), "label": batch["label"]}

    ends: list[tuple[float, float]] = []

    def note(_: dict[str, float]) -> None:
        ends.append((time.perf_counter(), time.process_time()))

    train(
        lambda: DeepLens(in_bands=BANDS, stem_stride=stride),
        data,
        compute_loss=compute_loss,
        settings=TrainingSettings(
            epochs=4, batch_size=batch_size, precision=precision, channels_last=channels_last
        ),
        augment=augment,
        accelerator=accelerator,
        on_epoch=note,
    )
    # The first epoch warms up; the best of the others is least disturbed.
    wall, cpu = np.diff(np.array(ends), axis=0).min(axis=0)
    return {
        "stem_stride": stride,
        "precision": precision,
        "channels_last": channels_last,
        "batch_size": batch_size,
        "per_second": n / wall,
        "per_cpu_second": n / cpu,
    }


def main() -> None:
    """Measure the training in several ways, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads on a CPU")
    parser.add_argument("--batch-size", type=int, help="stamps in a step; 64 on a CPU, 1024 on a GPU")
    parser.add_argument("--steps", type=int, default=8, help="steps in each of four epochs")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    torch.set_num_threads(args.threads)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {args.threads} thread(s)"
    results = []
    print(f"{device}, torch {torch.__version__}, {BANDS} bands of {SIZE} x {SIZE} pixels")
    print("stride  precision   channels last    per s  per CPU s  ratio")
    for stride in (1, 2):
        for precision, channels_last in (("32-true", False), ("32-true", True), ("bf16-mixed", True)):
            result = measure(
                stride=stride,
                precision=precision,
                channels_last=channels_last,
                batch_size=args.batch_size or (1024 if cuda else 64),
                steps=args.steps,
                accelerator="cuda" if cuda else "cpu",
            )
            results.append(result)
            # Other work on the machine slows a CPU, but not its own time.
            rate = "per_second" if cuda else "per_cpu_second"
            ratio = result[rate] / results[0][rate]
            print(
                f"{stride:6}  {precision:10}  {channels_last!s:13}  {result['per_second']:7.0f}  "
                f"{result['per_cpu_second']:9.0f}  {ratio:5.2f}"
            )
    if args.json:
        args.json.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": results}))


if __name__ == "__main__":
    main()

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

"""Galaxies per second and core, and gigabytes, in one run.

Run as ``python benchmarks/generate_galaxies.py``; see ``--help``.  Truth,
PSF and noise of training sets are compared with GalSim drawing the same
galaxies.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

# Before numpy and torch load their libraries: one core.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import galsim
import numpy as np

from lsst.meas.deeplearn.galaxies.cvae_galaxy import CvaeModel
from lsst.meas.deeplearn.galaxies.cvae_sampling import CvaeSampler
from lsst.meas.deeplearn.galaxies.fourier import draw_transform
from lsst.meas.deeplearn.galaxies.parametric import make_galaxy
from lsst.meas.deeplearn.galaxies.synthetic import compute_component_transform, draw_to_magnitude
from lsst.meas.deeplearn.model_package import ModelPackage

MODEL = Path(__file__).parents[1] / "models" / "cvae_synthetic.safetensors"


def measure(function: Callable[[], object], repeats: int) -> float:
    """Return the least processor time of a call in seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer galaxies")
    parser.add_argument("--device", default="cpu", help="where the network runs, as torch names it")
    args = parser.parse_args()
    n, repeats = (32, 2) if args.quick else (128, 3)
    parameters = draw_to_magnitude(n, 5, 24.0)
    conditions = np.array([p.conditions for p in parameters])
    rows: list[tuple[str, float]] = []
    for batch_size in (1, 16, 64):
        package = ModelPackage.read(MODEL)
        sampler = CvaeSampler(package, outside="clip", batch_size=batch_size, device=args.device)
        sampler.draw(conditions[:16], np.arange(16))
        seconds = measure(lambda s=sampler: s.draw(conditions, np.arange(n)), repeats)  # type: ignore[misc]
        rows.append((f"CVAE on {args.device}, batches of {batch_size}", n / seconds))
    galaxies = [CvaeModel(str(MODEL), "clip").make_galaxy(*c, seed=i) for i, c in enumerate(conditions[:32])]
    psf = galsim.Moffat(beta=3, fwhm=0.7)
    seconds = measure(
        lambda: [galsim.Convolve(g, psf).drawImage(nx=40, ny=40, scale=0.2) for g in galaxies], repeats
    )
    rows.append(("GalSim draws a generated galaxy with a PSF", len(galaxies) / seconds))
    parts = [make_galaxy(p) for p in parameters[:32]]
    seconds = measure(
        lambda: [compute_component_transform(c, size=256, pixel_scale=0.06) for c in parts], repeats
    )
    rows.append(("Transform of a synthetic galaxy, 256 x 256", len(parts) / seconds))
    profiles = [c.make_profile() for c in parts]
    seconds = measure(lambda: [draw_transform(p, size=256, pixel_scale=0.06) for p in profiles], repeats)
    rows.append(("The same by GalSim", len(profiles) / seconds))
    for name, rate in rows:
        print(f"{name:45s} {rate:8.1f} /s")
    print(f"{'Largest memory':45s} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:8.2f} GB")


if __name__ == "__main__":
    main()

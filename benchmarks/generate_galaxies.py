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

Run as ``python benchmarks/generate_galaxies.py``; see ``--help``.  Drawing is
compared with GalSim drawing the same galaxies, by turns in the same process.
"""

from __future__ import annotations

import argparse
import os
import resource
from functools import partial
from pathlib import Path

# Before numpy and torch load their libraries: one core.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import galsim
import numpy as np
from results import Result, compute_seconds, format_table, time_calls

from lsst.meas.deeplearn.galaxies.cvae_galaxy import make_profile
from lsst.meas.deeplearn.galaxies.cvae_sampling import CvaeSampler
from lsst.meas.deeplearn.galaxies.fourier import draw_transform
from lsst.meas.deeplearn.galaxies.parametric import make_galaxy
from lsst.meas.deeplearn.galaxies.render import FineImages, Renderer, draw_with_kernels
from lsst.meas.deeplearn.galaxies.synthetic import compute_component_transform, draw_to_magnitude
from lsst.meas.deeplearn.model_package import ModelPackage

MODEL = Path(__file__).parents[1] / "models" / "cvae_synthetic.safetensors"

SCALE, SIZE = 0.2, 45
"""Pixels of the stamps in arcsec, and their number on a side."""

KERNEL_SIZE = 25
"""Pixels on a side of the PSF kernels."""

BENCHMARK = "galaxies"


def measure_sampling(conditions: np.ndarray, *, device: str, repeats: int) -> list[Result]:
    """Return galaxies a second that the network makes, by batch size.

    Parameters
    ----------
    conditions
        Half-light radius, magnitude and redshift of each, shape ``(N, 3)``.
    device
        Where the network runs, as torch names it.
    repeats
        Number of timed calls.
    """
    results = []
    package, seeds = ModelPackage.read(MODEL), np.arange(len(conditions))
    for batch_size in (1, 16, 64):
        sampler = CvaeSampler(package, outside="clip", batch_size=batch_size, device=device)
        seconds = compute_seconds(partial(sampler.draw, conditions, seeds), repeats=repeats)
        what = f"CVAE on {device}, batches of {batch_size}"
        results.append(Result(BENCHMARK, what, len(conditions) / seconds, "galaxies/s"))
    return results


def measure_drawing(conditions: np.ndarray, *, repeats: int) -> list[Result]:
    """Return galaxies a second that are drawn as a survey sees them.

    Parameters
    ----------
    conditions, repeats
        As for `measure_sampling`.
    """
    n = len(conditions)
    sampler = CvaeSampler(ModelPackage.read(MODEL), outside="clip", batch_size=16)
    images = FineImages(sampler.draw(conditions, np.arange(n)), sampler.pixel_scale)
    profiles = [make_profile(image, pixel_scale=images.pixel_scale, flux=1.0) for image in images.array]
    psf = galsim.Convolve(galsim.Moffat(beta=3, fwhm=0.7), galsim.Pixel(SCALE))
    kernel = psf.drawImage(nx=KERNEL_SIZE, ny=KERNEL_SIZE, scale=SCALE, method="no_pixel").array
    kernels = np.repeat(kernel[None], n, axis=0)
    shear = (0.02, 0.01)

    def draw_by_galsim(psf: galsim.GSObject) -> None:
        for profile in profiles:
            observed = galsim.Convolve(profile.shear(g1=shear[0], g2=shear[1]), psf)
            observed.drawImage(nx=SIZE, ny=SIZE, scale=SCALE, method="no_pixel")

    renderer = Renderer(psf, images, size=SIZE, pixel_scale=SCALE, shear=shear)
    pixels = galsim.InterpolatedImage(galsim.ImageD(kernel.astype(float), scale=SCALE), flux=1.0)
    results = []
    for what, peer, call in (
        ("Sheared, one PSF", partial(draw_by_galsim, psf), partial(renderer.draw, images)),
        (
            "Each with a kernel in pixels",
            partial(draw_by_galsim, pixels),
            partial(draw_with_kernels, images, kernels, size=SIZE, pixel_scale=SCALE),
        ),
    ):
        theirs, ours = time_calls([peer, call], repeats=repeats)
        results.append(Result(BENCHMARK, what, n / ours, "galaxies/s", theirs / ours, "GalSim"))
    return results


def measure_transforms(conditions: np.ndarray, *, repeats: int) -> list[Result]:
    """Return transforms a second of synthetic galaxies to train on.

    Parameters
    ----------
    conditions, repeats
        As for `measure_sampling`.
    """
    parts = [make_galaxy(p) for p in draw_to_magnitude(min(len(conditions), 32), 5, 24.0)]
    profiles = [c.make_profile() for c in parts]
    theirs, ours = time_calls(
        [
            lambda: [draw_transform(p, size=256, pixel_scale=0.06) for p in profiles],
            lambda: [compute_component_transform(c, size=256, pixel_scale=0.06) for c in parts],
        ],
        repeats=repeats,
    )
    what = "Transform of a synthetic galaxy, 256 x 256"
    return [Result(BENCHMARK, what, len(parts) / ours, "galaxies/s", theirs / ours, "GalSim")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer galaxies")
    parser.add_argument("--device", default="cpu", help="where the network runs, as torch names it")
    args = parser.parse_args()
    n, repeats = (16, 1) if args.quick else (128, 3)
    conditions = np.array([p.conditions for p in draw_to_magnitude(n, 5, 24.0)])
    results = measure_sampling(conditions, device=args.device, repeats=repeats)
    results += measure_drawing(conditions, repeats=repeats)
    results += measure_transforms(conditions, repeats=repeats)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(format_table([*results, Result(BENCHMARK, "Largest memory", memory, "GB")]))


if __name__ == "__main__":
    main()

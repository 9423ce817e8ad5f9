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

"""Stamps per second and core of shear estimators, in one run.

Run as ``python benchmarks/measure_shear.py``; see ``--help``.  The reference
is metacalibration as a loop over stamps: GalSim deconvolves, shears and
reconvolves an image, and the moments are sums over its pixels.  The peak is
that of a product of square matrices; parts of metacalibration have rows of
their own.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

# Before numpy and torch load their libraries: one core.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import galsim
import numpy as np
import torch

from lsst.meas.deeplearn.galaxies.render import FineImages, Renderer
from lsst.meas.deeplearn.shear.estimators import AnaCal, Regauss
from lsst.meas.deeplearn.shear.metacal import Metacalibration
from lsst.meas.deeplearn.shear.morphologies import ParametricGalaxies, make_profile
from lsst.meas.deeplearn.shear.shapes import STEPS
from lsst.meas.deeplearn.shear.simulation import GalaxySample, Scene, draw_stamps

PIXEL_SCALE, TARGET_FWHM, WEIGHT_FWHM, STEP = 0.2, 0.85, 1.2, 0.01
ARM = (0.02, 0.01, 0.0, 0.0)
SHEARS = dict(zip(STEPS, ((0, 0), (STEP, 0), (-STEP, 0), (0, STEP), (0, -STEP)), strict=True))


def measure_by_galsim(stamps: np.ndarray, psf: np.ndarray, *, n_steps: int = 0) -> np.ndarray:
    """Return ellipticities by metacalibration with GalSim.

    The weight is at the centre of the stamp, or follows the centroid by a
    number of steps.
    """
    size = stamps.shape[-1]
    axis = (np.arange(size) - size // 2) * PIXEL_SCALE
    var = WEIGHT_FWHM**2 / (8 * np.log(2))
    star = galsim.InterpolatedImage(galsim.Image(psf, scale=PIXEL_SCALE), x_interpolant="lanczos15")
    inverse, target = galsim.Deconvolve(star), galsim.Gaussian(fwhm=TARGET_FWHM)
    ellipticities = []
    for stamp in stamps:
        image = galsim.InterpolatedImage(galsim.Image(stamp, scale=PIXEL_SCALE), x_interpolant="lanczos15")
        deconvolved = galsim.Convolve(image, inverse)
        for g1, g2 in SHEARS.values():
            sheared = galsim.Convolve(deconvolved.shear(g1=g1, g2=g2), target)
            pixels = sheared.drawImage(nx=size, ny=size, scale=PIXEL_SCALE, method="no_pixel").array
            center = np.zeros(2)
            for step in range(n_steps + 1):
                x, y = np.meshgrid(axis - center[0], axis - center[1])
                weighted = pixels * np.exp(-0.5 * (x**2 + y**2) / var)
                flux = weighted.sum()
                if step < n_steps:
                    center += 2 * np.array([(weighted * x).sum(), (weighted * y).sum()]) / flux
            plus, cross = (weighted * (x**2 - y**2)).sum(), (weighted * 2 * x * y).sum()
            ellipticities.append((plus / flux / var, cross / flux / var))
    return np.array(ellipticities).reshape(len(stamps), len(SHEARS), 2)


def draw_by_galsim(profiles: list[galsim.GSObject], scene: Scene) -> None:
    """Draw galaxies under shear one after the other."""
    for profile in profiles:
        sheared = galsim.Convolve(profile.shear(g1=ARM[0], g2=ARM[1]), scene.psf)
        sheared.drawImage(nx=scene.stamp_size, ny=scene.stamp_size, scale=PIXEL_SCALE, method="no_pixel")


def make_anacal(
    stamps: np.ndarray, noise: np.ndarray, psf: np.ndarray
) -> dict[str, tuple[Callable[[], object], int]]:
    """Return what measures stamps by AnaCal, if it is installed."""
    try:
        anacal = AnaCal(pixel_scale=PIXEL_SCALE)
    except ImportError:
        return {}
    n = len(stamps)
    return {
        "AnaCal": (lambda: anacal.measure(stamps, psf, noise_sigma=1.0), n),
        "... its noise correction": (
            lambda: anacal.measure(stamps, psf, noise_sigma=1.0, fixnoise=noise),
            n,
        ),
    }


def compute_rate(function: Callable[[], object], n: int, clock: Callable[[], float], seconds: float) -> float:
    """Return how many stamps a second a function does, n in each call."""
    function()
    start, done = clock(), 0
    while (elapsed := clock() - start) < seconds or not done:
        function()
        done += n
    return done / elapsed


def main() -> None:
    """Draw galaxies, measure them again and again, print rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=63, help="side of the stamps in pixels, odd")
    parser.add_argument("--stamps", type=int, default=8192, help="stamps in a batch")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to spend on each estimator")
    parser.add_argument("--device", default="cpu", help="device of torch: cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Of a GPU the wall time counts; the arrays come from and go to the CPU.
    clock = time.process_time if args.device == "cpu" else time.perf_counter

    galaxies = GalaxySample.draw(np.arange(64), seed=1)
    scene = Scene(galsim.Moffat(beta=2.5, fwhm=0.7).shear(g1=0.02, g2=-0.02), PIXEL_SCALE, args.size)
    images = ParametricGalaxies("sersic").draw(galaxies)
    few = draw_stamps(images, galaxies, scene, np.zeros(4))[:, 0]
    many = np.resize(few, (args.stamps, *few.shape[1:]))
    noise = np.random.default_rng(1).standard_normal(many.shape, dtype=np.float32)
    profiles = [make_profile(galaxies, k, "sersic") for k in range(len(galaxies))]
    # Like those of a network or of Hubble.
    small = FineImages(np.stack([p.drawImage(nx=65, ny=65, scale=0.06).array for p in profiles]), 0.06)
    pictures = [galsim.InterpolatedImage(galsim.Image(array, scale=0.06)) for array in small.array]
    renderer = Renderer(scene.psf, small, size=args.size, pixel_scale=PIXEL_SCALE, shear=ARM[:2])
    psf = scene.draw_psf()
    # Of the size that the tasks use.
    small_psf = Scene(scene.psf, PIXEL_SCALE, 35).draw_psf()
    psfs = np.repeat(small_psf[None].astype(np.float32), len(many), axis=0)
    metacal = Metacalibration(
        pixel_scale=PIXEL_SCALE,
        stamp_size=args.size,
        target_fwhm=TARGET_FWHM,
        weight_fwhm=WEIGHT_FWHM,
        step=STEP,
        device=args.device,
    )
    regauss = Regauss(pixel_scale=PIXEL_SCALE)
    moments, variance = metacal.compute_moments(many, psf)
    kernels = torch.as_tensor(metacal.make_kernels(psf), dtype=torch.float32, device=args.device).flatten(1)
    parts = torch.as_tensor(many, device=args.device).flatten(1).split(512)
    square = torch.ones((1024, 1024), device=args.device)
    n, m = len(many), len(few)

    def multiply(kernels: torch.Tensor) -> float:
        # What is read from a GPU has been computed.
        return float([kernels @ part.T for part in parts][-1][0, 0])

    cases: dict[str, tuple[Callable[[], object], int]] = {
        "metacalibration by GalSim": (lambda: measure_by_galsim(few[:8], psf), 8),
        "re-Gaussianization": (lambda: regauss.measure(few, psf), m),
        **make_anacal(many[:1024], noise[:1024], psf),
        "metacalibration, one PSF": (lambda: metacal.measure(many, psf, noise_sigma=1.0), n),
        "... with noise correction": (
            lambda: metacal.measure(many, psf, noise_sigma=1.0, fixnoise=noise),
            n,
        ),
        "... its 28 kernels alone": (lambda: multiply(kernels), n),
        "... 20 kernels": (lambda: multiply(kernels[:20]), n),
        "... shapes of moments alone": (lambda: metacal.compute_shapes(moments, variance), n),
        "metacalibration, PSF of each": (lambda: metacal.measure(many, psfs, noise_sigma=1.0), n),
        "... its moments alone": (lambda: metacal.compute_moments(many, psfs), n),
        "drawing by GalSim, profiles": (lambda: draw_by_galsim(profiles, scene), m),
        "drawing by GalSim, images": (lambda: draw_by_galsim(pictures, scene), m),
        "drawing in batches, images": (lambda: renderer.draw(small), m),
        "drawing in batches, profiles": (lambda: draw_stamps(images, galaxies, scene, ARM), 2 * m),
    }
    peak = 2 * 1024**3 * compute_rate(lambda: float((square @ square)[0, 0]), 1, clock, args.seconds)
    print(f"{args.size} x {args.size} pixels, {args.device}, {torch.get_num_threads()} core")
    print(f"{'peak':30}{peak / 1e9:12.0f} GFLOP/s")
    reference = 0.0
    for name, (function, count) in cases.items():
        rate = compute_rate(function, count, clock, args.seconds)
        reference = reference or rate
        print(f"{name:30}{rate:12.0f} stamps/s{rate / reference:10.1f} x GalSim")


if __name__ == "__main__":
    main()

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

"""Shear bias of simulations that are too long for tests, with errors.

Run as ``python benchmarks/shear_accuracy.py blends``, ``noise`` or
``selection``; see ``--help``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping

# Before numpy and torch load their libraries: one core.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import galsim
import numpy as np
import torch

from lsst.meas.deeplearn.shear.bias import ShearBias, ShearSums, fit_bias
from lsst.meas.deeplearn.shear.blends import compute_blended_sums
from lsst.meas.deeplearn.shear.calibration import Bin, compute_shear_sums
from lsst.meas.deeplearn.shear.metacal import Metacalibration
from lsst.meas.deeplearn.shear.morphologies import ParametricGalaxies
from lsst.meas.deeplearn.shear.simulation import GalaxySample, Scene, make_arms

PSF = galsim.Moffat(beta=2.5, fwhm=0.7).shear(g1=0.02, g2=-0.02)
PIXEL_SCALE, TARGET_FWHM = 0.2, 0.85

NOISE = {"1-year": 4.0, "10-year": 1.3}
"""Noise in a pixel in nJy."""


def format_bias(name: str, bias: ShearBias) -> str:
    """Return a line with m and c."""
    values = [
        f"{key} {scale * bias.values[key]:6.2f} +- {scale * bias.errors[key]:.2f}"
        for key, scale in (("m1", 1e3), ("m2", 1e3), ("c1", 1e4), ("c2", 1e4))
    ]
    return f"{name:40}" + "  ".join(values) + "  (m / 1e-3, c / 1e-4)"


def make_metacal(**settings: float) -> Metacalibration:
    """Return the engine with other settings than usual."""
    return Metacalibration(
        pixel_scale=PIXEL_SCALE, stamp_size=63, **({"target_fwhm": TARGET_FWHM} | settings)
    )


def simulate(
    args: argparse.Namespace,
    estimators: Mapping[str, Metacalibration],
    bins: Mapping[str, Bin],
    *,
    fixnoise: bool = True,
    dilation: float = 1.0,
) -> dict[tuple[str, str], ShearSums]:
    """Return the sums of isolated galaxies with noise."""
    scene = Scene(PSF, PIXEL_SCALE, noise_sigma=NOISE[args.noise])
    parts: dict[tuple[str, str], list[ShearSums]] = {}
    for block in range(args.n // args.block):
        galaxies = GalaxySample.draw(
            np.arange(args.block * block, args.block * (block + 1)), seed=args.seed, magnitude=(20.0, 25.2)
        )
        galaxies.half_light_radius *= dilation
        sums = compute_shear_sums(
            galaxies,
            ParametricGalaxies(args.morphology),
            scene,
            make_arms((args.shear,)),
            estimators=estimators,
            bins=bins,
            block=block,
            n_realizations=args.realizations,
            fixnoise=fixnoise,
        )
        for key, values in sums.items():
            parts.setdefault(key, []).append(values)
    return {key: ShearSums.concatenate(values) for key, values in parts.items()}


def measure_noise(args: argparse.Namespace) -> None:
    """Print the bias by noise, with and without a cut, and with faults."""
    estimators = {"metacal": make_metacal(), "weighted": make_metacal(weight_snr=10.0)}
    cut, wrong = Bin(min_snr=10.0), Bin(min_snr=10.0, respond=False)
    sums = simulate(args, estimators, {"all": Bin(), "cut": cut, "wrong": wrong})
    for label, key, reference in (
        ("all", ("metacal", "all"), None),
        ("all, weighted", ("weighted", "all"), None),
        ("S/N > 10", ("metacal", "cut"), None),
        ("... no selection resp.", ("metacal", "wrong"), ("metacal", "cut")),
    ):
        bias = fit_bias(sums[key], reference=sums[reference] if reference else None)
        print(format_bias(label, bias), flush=True)
    faulty = simulate(args, {"metacal": make_metacal()}, {"all": Bin()}, fixnoise=False)
    print(format_bias("all, no noise correction", fit_bias(faulty["metacal", "all"])))
    print(f"{time.process_time():.0f} s of CPU time")


def measure_selection(args: argparse.Namespace) -> None:
    """Print what the response of a cut is worth, for cuts and definitions of
    the signal to noise.
    """
    estimators = {f"weight {fwhm}": make_metacal(weight_fwhm=fwhm) for fwhm in (0.6, 1.2, 2.4)}
    cuts = (7.0, 10.0, 14.0, 20.0)
    bins = {(cut, right): Bin(min_snr=cut, respond=right) for cut in cuts for right in (True, False)}
    for dilation in (1.0, 1.5):
        labels = {f"{cut} {right}": value for (cut, right), value in bins.items()}
        sums = simulate(args, estimators, labels, dilation=dilation)
        for name in estimators:
            for cut in cuts:
                right, wrong = (sums[name, f"{cut} {value}"] for value in (True, False))
                bias = fit_bias(wrong, reference=right)
                print(format_bias(f"radii x {dilation}, {name}, S/N > {cut:g}", bias), flush=True)
    print(f"{time.process_time():.0f} s of CPU time")


def measure_blends(args: argparse.Namespace) -> None:
    """Print the bias of blended scenes with detection as they add up."""
    scene = Scene(PSF, PIXEL_SCALE, noise_sigma=NOISE[args.noise])
    parts: dict[str, list[ShearSums]] = {}
    for start in range(0, args.n, args.chunk):
        sums = compute_blended_sums(
            ParametricGalaxies(args.morphology),
            scene,
            make_arms((args.shear,)),
            density=args.density,
            magnitude=(20.0, args.faintest),
            target_fwhm=TARGET_FWHM,
            seed=args.seed,
            blocks=range(start, min(start + args.chunk, args.n)),
            min_snr=args.min_snr,
            n_realizations=args.realizations,
        )
        for name, values in sums.items():
            parts.setdefault(name, []).append(values)
        print(f"{min(start + args.chunk, args.n)} scenes, {time.process_time():.0f} s of CPU time")
        for name, values_of_all in parts.items():
            bias = fit_bias(ShearSums.concatenate(values_of_all))
            print(format_bias(f"{name} ({bias.n_objects:.0f})", bias), flush=True)


def main() -> None:
    """Run one of the simulations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of galaxies and noise")
    parser.add_argument("--morphology", default="sersic", help="kind of galaxies")
    parser.add_argument("--shear", type=float, default=0.02, help="true shear")
    commands = parser.add_subparsers(required=True)
    blends = commands.add_parser("blends", help="galaxies that overlap, with detection")
    blends.add_argument("--n", type=int, default=1200, help="number of scenes of 32 x 32 arcsec")
    blends.add_argument("--chunk", type=int, default=50, help="scenes after which the result is printed")
    blends.add_argument("--density", type=float, default=80.0, help="galaxies in a square arcmin")
    blends.add_argument("--faintest", type=float, default=26.0, help="their magnitude limit")
    blends.add_argument("--noise", choices=NOISE, default="10-year", help="level of the noise")
    blends.add_argument("--min-snr", type=float, default=10.0, help="threshold; weights are 1 at twice that")
    blends.add_argument("--realizations", type=int, default=4, help="of the noise, each with both signs")
    blends.set_defaults(function=measure_blends)
    for name, function, n, realizations, text in (
        ("noise", measure_noise, 3000, 400, "isolated galaxies with noise, with and without a cut"),
        ("selection", measure_selection, 900, 60, "what the response of cuts is worth"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--n", type=int, default=n, help="number of galaxies")
        command.add_argument("--block", type=int, default=30, help="galaxies in a block of the jackknife")
        command.add_argument("--noise", choices=NOISE, default="1-year", help="level of the noise")
        command.add_argument("--realizations", type=int, default=realizations, help="of the noise")
        command.set_defaults(function=function)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.function(args)


if __name__ == "__main__":
    main()

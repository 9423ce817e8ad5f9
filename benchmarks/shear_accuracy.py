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

"""Accuracy of the shear estimators, with errors, one command for each row of
the table in the documentation.

Run as ``python benchmarks/shear_accuracy.py clean``, ``noise``, ``selection``,
``blends``, ``psf``, ``errors`` or ``galsim``; see ``--help``.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before numpy and torch load their libraries: one core.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import galsim
import numpy as np
import torch
from measure_shear import measure_by_galsim

from lsst.meas.deeplearn.model_package import ModelPackage
from lsst.meas.deeplearn.shear.bias import ShearBias, ShearSums, fit_bias
from lsst.meas.deeplearn.shear.blends import compute_blended_sums
from lsst.meas.deeplearn.shear.calibration import Bin, compute_shear_sums
from lsst.meas.deeplearn.shear.metacal import Metacalibration
from lsst.meas.deeplearn.shear.morphologies import CvaeGalaxies, Morphology, ParametricGalaxies
from lsst.meas.deeplearn.shear.simulation import GalaxySample, Scene, draw_stamps, make_arms, make_noise

PSF = galsim.Moffat(beta=2.5, fwhm=0.7).shear(g1=0.02, g2=-0.02)
PIXEL_SCALE, TARGET_FWHM = 0.2, 0.85
MAGNITUDE = (20.0, 25.2)

NOISE = {"none": 0.0, "1-year": 4.0, "10-year": 1.3}
"""Noise in a pixel in nJy."""

SCALES = {"m": 1e3, "c": 1e5, "cross": 1e5, "cubic": 1.0, "alpha": 1e5}
"""By what terms of the bias are multiplied in print."""


def format_bias(name: str, bias: ShearBias, terms: Sequence[str] = ("m", "c")) -> str:
    """Return a line with terms of the bias."""
    values = [
        f"{term}{i} {scale * bias.values[f'{term}{i}']:7.2f} +- {scale * bias.errors[f'{term}{i}']:.2f}"
        for term, scale in SCALES.items()
        for i in "12"
        if term in terms
    ]
    units = ", ".join(f"{term} / {1 / SCALES[term]:.0e}" for term in terms)
    return f"{name:40}" + "  ".join(values) + f"  ({units})"


def make_morphology(name: str) -> Morphology:
    """Return what draws galaxies: ``cvae`` are those of the model that
    ships.
    """
    if name != "cvae":
        return ParametricGalaxies(name)
    return CvaeGalaxies(
        ModelPackage.read(Path(__file__).parents[1] / "models" / "cvae_synthetic.safetensors")
    )


def make_metacal(**settings: Any) -> Metacalibration:
    """Return the engine with other settings than usual."""
    return Metacalibration(
        pixel_scale=PIXEL_SCALE, stamp_size=63, **({"target_fwhm": TARGET_FWHM} | settings)
    )


def simulate(
    args: argparse.Namespace,
    estimators: Mapping[str, Metacalibration],
    bins: Mapping[str, Bin],
    *,
    arms: np.ndarray | None = None,
    fixnoise: bool = True,
    dilation: float = 1.0,
    **settings: Any,
) -> dict[tuple[str, str], ShearSums]:
    """Return the sums of isolated galaxies; settings are those of the
    scene.
    """
    scene = Scene(PSF, PIXEL_SCALE, noise_sigma=NOISE[args.noise], **settings)
    parts: dict[tuple[str, str], list[ShearSums]] = {}
    for block in range(args.n // args.block):
        galaxies = GalaxySample.draw(
            np.arange(args.block * block, args.block * (block + 1)), seed=args.seed, magnitude=MAGNITUDE
        )
        galaxies.half_light_radius *= dilation
        sums = compute_shear_sums(
            galaxies,
            make_morphology(args.morphology),
            scene,
            make_arms((args.shear,)) if arms is None else arms,
            estimators=estimators,
            bins=bins,
            block=block,
            n_realizations=args.realizations,
            fixnoise=fixnoise,
        )
        for key, values in sums.items():
            parts.setdefault(key, []).append(values)
    return {key: ShearSums.concatenate(values) for key, values in parts.items()}


def measure_clean(args: argparse.Namespace) -> None:
    """Print the bias of three shears without noise, with the cubic term."""
    arms = make_arms((0.01, 0.02, 0.05), (0.05,))
    sums = simulate(args, {"metacal": make_metacal()}, {"all": Bin()}, arms=arms, n_orientations=4)
    bias = fit_bias(sums["metacal", "all"])
    for terms in (("m", "c"), ("cross", "cubic"), ("alpha",)):
        print(format_bias(args.morphology, bias, terms))


def measure_wrong_psf(args: argparse.Namespace) -> None:
    """Print what a wrong size of the PSF does to the bias."""
    true, wrong = (
        simulate(args, {"metacal": make_metacal()}, {"all": Bin()}, psf_size_error=error)["metacal", "all"]
        for error in (0.0, args.error)
    )
    print(format_bias(f"PSF too large by {args.error}", fit_bias(wrong, reference=true)))


def measure_errors(args: argparse.Namespace) -> None:
    """Print how honest the errors of many small calibrations are."""
    scene, arms = Scene(PSF, PIXEL_SCALE, noise_sigma=NOISE[args.noise]), make_arms((args.shear,))
    metacal, morphology = make_metacal(), make_morphology(args.morphology)
    stamps_shape = (-1, scene.stamp_size, scene.stamp_size)
    calibrations = []
    for first in range(0, args.n, args.galaxies):
        galaxies = GalaxySample.draw(
            np.arange(first, first + args.galaxies), seed=args.seed, magnitude=MAGNITUDE
        )
        images = morphology.draw(galaxies)
        noise, more = (make_noise(galaxies, scene, fixnoise=value) for value in (False, True))
        shapes = [
            metacal.measure(
                (draw_stamps(images, galaxies, scene, arm) + noise).reshape(stamps_shape),
                scene.draw_psf(arm),
                noise_sigma=scene.noise_sigma,
                fixnoise=more.reshape(stamps_shape),
            )
            for arm in arms
        ]
        blocks = np.repeat(galaxies.ids // args.block, scene.n_orientations)
        parts = [
            ShearSums.from_shapes(
                shapes,
                [shape.select() & (blocks == block)[:, None] for shape in shapes],
                arms=arms,
                block=block,
            )
            for block in np.unique(blocks)
        ]
        calibrations.append(ShearSums.concatenate(parts))
    truth = fit_bias(ShearSums.concatenate(calibrations))
    print(format_bias("all together", truth))
    fits = [fit_bias(sums) for sums in calibrations]
    names = ("m1", "m2", "c1", "c2")
    pulls = np.array([[(fit.values[k] - truth.values[k]) / fit.errors[k] for k in names] for fit in fits])
    ratios = np.array([[fit.bootstrap_errors[k] / fit.errors[k] for k in names] for fit in fits])
    for k, name in enumerate(names):
        print(
            f"{name}: scatter of {len(fits)} pulls {pulls[:, k].std():.2f}, mean {pulls[:, k].mean():.2f}; "
            f"bootstrap / jackknife {ratios[:, k].mean():.2f}, {np.mean(np.abs(ratios[:, k] - 1) < 0.2):.0%} "
            "within 20%"
        )
    print(f"all pulls: {pulls.std():.3f} +- {1 / np.sqrt(2 * pulls.size):.3f}")


def measure_agreement(args: argparse.Namespace) -> None:
    """Print how far ellipticities are from those of a loop with GalSim."""
    metacal, morphology = make_metacal(dtype=torch.float64), make_morphology(args.morphology)
    stamps, psfs, expected, found = [], [], [], []
    for k, g in enumerate(np.linspace(-0.05, 0.05, args.n)):
        galaxy = GalaxySample.draw(np.array([k]), seed=args.seed, magnitude=MAGNITUDE)
        scene = Scene(PSF.shear(g1=g, g2=-g / 2).dilate(1 + g), PIXEL_SCALE)
        stamp = draw_stamps(morphology.draw(galaxy), galaxy, scene, np.zeros(4))[0, :1]
        psf = scene.draw_psf()
        expected.append(measure_by_galsim(stamp, psf, n_steps=30))
        found.append(metacal.measure(stamp, psf).e)
        stamps.append(stamp)
        psfs.append(psf)
    together = metacal.measure(np.concatenate(stamps), np.stack(psfs)).e
    for name, e in (("one PSF", np.concatenate(found)), ("PSF of each", together)):
        largest = np.abs(e - np.concatenate(expected)).max()
        print(f"{name}: {e.size} components of e differ by up to {largest:.1e}")


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


def measure_blends(args: argparse.Namespace) -> None:
    """Print the bias of blended scenes with detection as they add up."""
    scene = Scene(PSF, PIXEL_SCALE, noise_sigma=NOISE[args.noise])
    parts: dict[str, list[ShearSums]] = {}
    for start in range(0, args.n, args.chunk):
        sums = compute_blended_sums(
            make_morphology(args.morphology),
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
    parser.add_argument(
        "--morphology", default="sersic", help="kind of galaxies: sersic, bulge_disk, knots, cvae"
    )
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
    for name, function, text, n, block, noise, realizations in (
        ("clean", measure_clean, "isolated galaxies without noise, with the cubic term", 96, 4, "none", 0),
        ("noise", measure_noise, "isolated galaxies with and without a cut", 3000, 30, "1-year", 400),
        ("selection", measure_selection, "what the response of cuts is worth", 900, 30, "1-year", 60),
        ("psf", measure_wrong_psf, "a PSF of the wrong size", 48, 2, "none", 0),
        ("errors", measure_errors, "pulls of many small calibrations", 24000, 3, "10-year", 0),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--n", type=int, default=n, help="number of galaxies")
        command.add_argument("--block", type=int, default=block, help="galaxies in a block of the jackknife")
        command.add_argument("--noise", choices=NOISE, default=noise, help="level of the noise")
        command.add_argument("--realizations", type=int, default=realizations, help="of the noise")
        command.set_defaults(function=function)
        if name == "psf":
            command.add_argument("--error", type=float, default=0.02, help="of the size of the PSF")
        elif name == "errors":
            command.add_argument("--galaxies", type=int, default=120, help="galaxies in a calibration")
    agreement = commands.add_parser("galsim", help="agreement with metacalibration by GalSim")
    agreement.add_argument("--n", type=int, default=24, help="number of galaxies, each with a PSF of its own")
    agreement.set_defaults(function=measure_agreement)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.function(args)
    print(f"{time.process_time():.0f} s of CPU time")


if __name__ == "__main__":
    main()

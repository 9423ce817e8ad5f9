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


"""Bars of a galaxy model without a pipeline: isotropy, redshift, and truth.

Run as ``python benchmarks/galaxy_bars.py``; see ``--help``.  Isotropy is that
of galaxies drawn for a population, by moments with a round Gaussian weight,
each in four orientations.
Redshift is what changes if nothing but the redshift that was asked for does.
Truth is what the model makes of noisy images of synthetic galaxies: the latent
variables are at their means, and the result is compared with the galaxies
before PSF and noise.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import galsim
import numpy as np
import torch

from lsst.meas.deeplearn.galaxies.cosmos import COSMOS_NOISE_VARIANCE
from lsst.meas.deeplearn.galaxies.cvae import Cvae
from lsst.meas.deeplearn.galaxies.cvae_sampling import CvaeSampler, augment, make_batch
from lsst.meas.deeplearn.galaxies.morphology import compute_radii, measure_morphology
from lsst.meas.deeplearn.galaxies.parametric import make_galaxy, make_smooth_galaxy
from lsst.meas.deeplearn.galaxies.synthetic import draw_to_magnitude, make_synthetic_set
from lsst.meas.deeplearn.model_package import ModelPackage

MODEL = Path(__file__).parents[1] / "models" / "cvae_synthetic.safetensors"

WEIGHT_SIGMA = 0.5
"""Sigma of the weight of moments in arcsec."""

NOISE = 3.7e-4
"""Noise of COSMOS in a pixel for a galaxy of magnitude 22.5, of flux 1."""


def compute_ellipticities(images: np.ndarray, pixel_scale: float) -> np.ndarray:
    """Return e1 and e2 of weighted moments about the middle, ``(N, 2)``.

    Parameters
    ----------
    images
        Images with odd sides, shape ``(N, y, x)``.
    pixel_scale
        Side of a pixel in arcsec.
    """
    x = pixel_scale * (np.arange(images.shape[-1]) - images.shape[-1] // 2)
    weight = np.exp(-(x**2 + x[:, None] ** 2) / (2 * WEIGHT_SIGMA**2))
    xx, yy, xy = (
        (images * (weight * m)).sum((1, 2))
        for m in (x**2 + 0 * x[:, None], x[:, None] ** 2 + 0 * x, x * x[:, None])
    )
    return np.column_stack([xx - yy, 2 * xy]) / (xx + yy)[:, None]


def measure_isotropy(package: ModelPackage, n: int, *, seed: int, chunk: int = 64) -> None:
    """Print the means of e1, e2 and of e cos and sin of 4 theta.

    Each galaxy is drawn in a random orientation, and turned from there by 45,
    90 and 135 degrees.  What it has itself cancels in the mean of the four;
    what the grid adds stays.

    Parameters
    ----------
    package
        The model.
    n
        Number of galaxies.
    seed
        Seed of the population.
    chunk
        Number of galaxies to draw at once.
    """
    sampler = CvaeSampler(package, outside="clip")
    network = package.make_network()
    assert isinstance(network, Cvae)
    drawn = [p.conditions for p in draw_to_magnitude(n, seed, 25.2)]
    conditions = sampler.space.to_scaled(sampler.check(np.array(drawn))[0])
    rng, parts = np.random.default_rng(seed), []
    with torch.inference_mode():
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            normal = rng.standard_normal((rows.stop - start, network.n_latents))
            # Negative ones are mirrored.
            angle = rng.uniform(2 * np.pi, 4 * np.pi, len(normal)) * rng.choice([-1, 1], len(normal))
            inputs = [torch.from_numpy(part.astype(np.float32)) for part in (conditions[rows], normal)]
            ring = []
            for turn in np.arange(4) * np.pi / 4:
                orientation = torch.from_numpy((angle + np.sign(angle) * turn).astype(np.float32))
                images = network.smooth(network.sample(*inputs, orientation)).numpy()
                ring.append(
                    compute_ellipticities(np.pad(images, ((0, 0), (0, 1), (0, 1))), network.pixel_scale)
                )
            parts.append(np.stack(ring, axis=1))
    e1, e2 = np.moveaxis(np.concatenate(parts), 2, 0)  # (N, 4)
    e, twice = np.hypot(e1, e2), np.arctan2(e2, e1)
    print(f"Isotropy of {n} galaxies in four orientations, mean |e| {e.mean():.3f}")
    for name, values in {
        "e1": e1, "e2": e2, "e cos 4 theta": e * np.cos(2 * twice), "e sin 4 theta": e * np.sin(2 * twice)
    }.items():  # fmt: skip
        one, ring_mean = values[:, 0], values.mean(axis=1)
        print(
            f"  {name:14s} {ring_mean.mean():+.6f} +- {ring_mean.std() / np.sqrt(n):.6f}, of the first alone "
            f"{one.mean():+.5f} +- {one.std() / np.sqrt(n):.5f}"
        )


def measure_redshift(package: ModelPackage, n: int, *, seed: int) -> None:
    """Print the median concentration and clumpiness by redshift.

    Galaxies have 0.45 arcsec and magnitude 22.5, the smoothing of the model,
    and white noise like that of COSMOS.

    Parameters
    ----------
    package
        The model.
    n
        Number of galaxies of each redshift.
    seed
        Seed of galaxies and noise, the same for each redshift.
    """
    sampler = CvaeSampler(package)
    print(f"Medians of {n} galaxies of each redshift, 0.45 arcsec and magnitude 22.5")
    for redshift in (0.3, 1.0):
        rng = np.random.default_rng(seed)
        images = sampler.draw(np.tile([0.45, 22.5, redshift], (n, 1)), rng.integers(2**31, size=n))
        images += NOISE * rng.standard_normal(images.shape)
        table = measure_morphology(images, noise=np.full(n, NOISE), pixel_scale=sampler.pixel_scale)
        for name in ("concentration", "multimode", "asymmetry"):
            values = np.asarray(table[name])[np.isfinite(table[name])]
            error = np.median(rng.choice(values, (200, len(values))), axis=1).std()
            print(f"  z {redshift}  {name:14s} {np.median(values):.3f} +- {error:.3f}")


def measure_truth(
    network: Cvae, n: int, *, seed: int, max_magnitude: float, depth: float = 1.0, smooth: bool = False
) -> None:
    """Print how well galaxies are recovered from noisy images.

    Parameters
    ----------
    network
        The model.
    n
        Number of galaxies.
    seed
        Their seed.
    max_magnitude
        Their faintest magnitude.
    depth
        Variance of the noise in units of that of COSMOS.
    smooth
        Whether the galaxies have neither knots nor arms.
    """
    galaxies = make_synthetic_set(
        n,
        seed=seed,
        max_magnitude=max_magnitude,
        noise_variance=depth * COSMOS_NOISE_VARIANCE,
        make_components=make_smooth_galaxy if smooth else make_galaxy,
    )
    assert galaxies.truth is not None
    batch = make_batch(galaxies, network.condition_space, min_noise=1e-4)
    found = []
    with torch.inference_mode():
        for start in range(0, n, 64):
            part = {key: value[start : start + 64] for key, value in batch.items()}
            part = augment(part, None, psf=torch.from_numpy(galaxies.psf))
            zeros = torch.zeros(len(part["image"]), network.n_latents)
            output = network(part["image"], part["psf"], part["noise"], part["conditions"], zeros)
            found.append(network.smooth(output.transform).numpy())
    recovered = np.concatenate(found).astype(np.float64)
    truth = galaxies.truth.astype(np.float64)
    flux = recovered.sum(axis=(1, 2)) / truth.sum(axis=(1, 2))
    middle = network.size // 2
    radii = np.array(
        [
            [compute_radii(image, y=middle, x=middle)[1] for image in pair]
            for pair in zip(recovered, truth, strict=True)
        ]
    )
    shapes = np.array(
        [[_measure_shape(image) for image in pair] for pair in zip(recovered, truth, strict=True)]
    )
    good = np.isfinite(shapes).all(axis=(1, 2))
    known = np.stack([np.ravel(shapes[good, i]) for i in (0, 1)])
    slope, slope_error = _fit_slope(known[1], known[0])
    ratio = radii[:, 0] / radii[:, 1]
    kind = "smooth galaxies" if smooth else "galaxies"
    print(f"Truth of {n} {kind} brighter than {max_magnitude}, noise variance {depth} of COSMOS")
    print(f"  flux in the stamp   {np.median(flux):.4f} +- {1.25 * flux.std() / np.sqrt(n):.4f}")
    print(f"  half-light radius   {np.median(ratio):.4f} +- {1.25 * ratio.std() / np.sqrt(n):.4f}")
    print(
        f"  slope of ellipticity {slope:.3f} +- {slope_error:.3f}, scatter {(known[0] - known[1]).std():.3f}"
    )


def _measure_shape(image: np.ndarray) -> tuple[float, float]:
    moments = galsim.ImageD(image[1:, 1:].copy()).FindAdaptiveMom(strict=False)
    if moments.error_message:
        return np.nan, np.nan
    return moments.observed_shape.e1, moments.observed_shape.e2


def _fit_slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    slope = (x * y).sum() / (x * x).sum()
    return slope, np.sqrt(((y - slope * x) ** 2).mean() / (x * x).sum())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=str(MODEL), help="model package")
    parser.add_argument("--isotropy", type=int, default=4000, help="galaxies drawn; 0 for none")
    parser.add_argument("--redshift", type=int, default=500, help="galaxies of each redshift; 0 for none")
    parser.add_argument("--truth", type=int, default=300, help="galaxies recovered; 0 for none")
    parser.add_argument("--seed", type=int, default=555, help="not that of a training set")
    args = parser.parse_args()
    torch.set_num_threads(1)
    package = ModelPackage.read(args.model)
    network = package.make_network()
    assert isinstance(network, Cvae)
    if args.truth:
        measure = partial(measure_truth, network, args.truth, seed=args.seed)
        measure(max_magnitude=22.0)
        measure(max_magnitude=22.0, smooth=True)
        measure(max_magnitude=24.0)
        measure(max_magnitude=24.0, depth=0.05)
    if args.isotropy:
        measure_isotropy(package, args.isotropy, seed=args.seed)
    if args.redshift:
        measure_redshift(package, args.redshift, seed=args.seed)


if __name__ == "__main__":
    main()

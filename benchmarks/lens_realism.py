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


"""Whether a linear probe tells simulated arcs from those of real galaxies.

Run as ``python benchmarks/lens_realism.py REPO COSMOS``; see ``--help``.  No
large set of real lenses can be had without a survey's data, so the reference
are arcs whose sources are galaxies that HST observed (a GalSim real-galaxy
catalogue), lensed onto galaxies of the coadds.  Against it stand arcs that
differ in nothing but the source: a plain Sersic profile, a profile with knots
as the prior has them, and images of other galaxies of the same catalogue.

The probe is a logistic regression on what the last layer of a trained lens
finder sees; 0.5 is not to be told apart.  Folds go by host.  The table also
has the areas against the same hosts without arcs, which say how well the
finder sees each kind.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from astropy.table import Table

from lsst.daf.butler import Butler
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.cutouts import CutoutExtractor, Cutouts
from lsst.meas.deeplearn.lenses.lens_network import LensNetwork
from lsst.meas.deeplearn.lenses.lens_population import assign_source_images, sample_lens_population
from lsst.meas.deeplearn.lenses.logistic_regression import compute_probe_auroc
from lsst.meas.deeplearn.lenses.simulate_lenses_task import SimulateLensesConfig
from lsst.meas.deeplearn.lenses.simulation import estimate_gain, paint_lenses
from lsst.meas.deeplearn.lenses.source_images import SourceImages, read_cosmos_images
from lsst.meas.deeplearn.model_package import ModelPackage
from lsst.meas.deeplearn.object_selection import select_objects
from lsst.resources import ResourcePath

MODEL = "eups://meas_deeplearn/models/deeplens_gri_1.safetensors"


def read_hosts(repo: str, collection: str, patches: list[int], size: int) -> tuple[Cutouts, dict[str, float]]:
    """Return stamps of galaxies that may be lenses, and the gain."""
    config = SimulateLensesConfig()
    bands = list(config.bands)
    parts = []
    gain: dict[str, float] = {}
    with Butler.from_config(repo, collections=collection) as butler:
        objects = butler.get("object", skymap="demo", tract=1)
        for patch in patches:
            data_id = {"skymap": "demo", "tract": 1, "patch": patch}
            handles = [butler.getDeferred("deep_coadd", data_id, band=band) for band in bands]
            coadd = MultibandCoadd.read(handles, bands)
            for band, planes in coadd.planes.items():
                bad = coadd.compute_bad_pixels(band, config.badMaskPlanes)
                gain.setdefault(band, estimate_gain(planes.image, planes.variance, bad) or np.inf)
            table = objects[objects["patch"] == patch]
            table = table[select_objects(table, config.hostSelection)]
            cutouts = CutoutExtractor(coadd, size=size, psf_size=config.psfSize).extract(
                ids=np.asarray(table["objectId"]),
                ra=np.asarray(table["coord_ra"]),
                dec=np.asarray(table["coord_dec"]),
            )
            parts.append(cutouts[~cutouts.bad.any(axis=(1, 2, 3)) & ~cutouts.bad_psf.any(axis=1)])
    return Cutouts.concatenate(parts), gain


def make_sets(lenses: Table, images: SourceImages, seed: int) -> dict[str, tuple[Table, SourceImages | None]]:
    """Return the lenses with each kind of source; half of the images are for
    the reference, the others for the simulation.
    """
    plain = lenses.copy()
    plain["source_knot_flux"] = 0.0
    plain["source_sersic_index"] = 1.0
    first = np.arange(len(images)) % 2 == 0
    sets: dict[str, tuple[Table, SourceImages | None]] = {
        "plain Sersic": (plain, None),
        "with knots": (lenses, None),
    }
    for name, half, offset in (("reference", first, 1), ("other images", ~first, 2)):
        ids = np.where(half, images.ids, -1)
        sets[name] = (assign_source_images(lenses, ids, fraction=1.0, seed=seed + offset), images)
    return sets


def main() -> None:
    """Simulate all sets, compute features, print the table of the probe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("repo", help="butler repository with the coadds of make-lens-demo")
    parser.add_argument("cosmos", help="GalSim real-galaxy catalogue")
    parser.add_argument("--collection", default="demo/coadds", help="collection of the coadds")
    parser.add_argument("--patches", type=int, nargs="+", default=[0, 1], help="patches")
    parser.add_argument("-n", type=int, default=1000, help="number of lenses tried")
    parser.add_argument("--min-snr", type=float, default=20.0, help="smallest signal to noise in all sets")
    parser.add_argument(
        "--brighten",
        type=float,
        default=0.0,
        help="magnitudes by which sources are brighter than the prior's",
    )
    parser.add_argument("--model", default=MODEL, help="model package of the lens finder")
    parser.add_argument("--seed", type=int, default=1, help="seed")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    args = parser.parse_args()

    with ResourcePath(args.model).as_local() as local:
        model = ModelPackage.read(local.ospath)
    network = LensNetwork.from_package(model)
    hosts, gain = read_hosts(args.repo, args.collection, args.patches, model.settings.stamp_size)
    rng = np.random.default_rng(args.seed)
    chosen = rng.integers(len(hosts), size=args.n)
    lenses = sample_lens_population(args.n, seed=args.seed, bands=hosts.bands, min_einstein_radius=0.7)
    for band in hosts.bands:
        lenses[f"source_mag_{band}"] -= args.brighten
    images = read_cosmos_images(args.cosmos)

    painted, bright = {}, np.ones(args.n, dtype=bool)
    for name, (table, source_images) in make_sets(lenses, images, args.seed).items():
        stamps, truth = paint_lenses(hosts[chosen], table, images=source_images, gain=gain, seed=args.seed)
        painted[name] = stamps
        bright &= np.asarray(truth["arc_snr"]) >= args.min_snr
    features = {
        name: network.compute_features(stamps[bright], num_threads=torch.get_num_threads())
        for name, stamps in (*painted.items(), ("no arcs", hosts[chosen]))
    }
    groups = np.tile(chosen[bright], 2)
    print(
        f"{bright.sum()} lenses on {len(np.unique(chosen[bright]))} hosts, {len(images)} images, "
        f"{model.name} {model.version}"
    )
    print(f"{'sources':16}{'against the reference':>24}{'against no arcs':>24}")
    record: dict[str, dict[str, tuple[float, float]]] = {}
    for name in ("plain Sersic", "with knots", "other images", "reference"):
        record[name] = {}
        for other in ("reference", "no arcs"):
            if name == other:
                continue
            both = np.concatenate([features[name], features[other]])
            labels = np.arange(len(both)) < bright.sum()
            record[name][other] = compute_probe_auroc(both, labels, groups=groups, seed=args.seed)
        cells = [record[name].get(other, (np.nan, np.nan)) for other in ("reference", "no arcs")]
        print(f"{name:16}" + "".join(f"{value:16.3f} +- {error:.3f}" for value, error in cells))
    if args.json:
        args.json.write_text(json.dumps({"n_lenses": int(bright.sum()), "auroc": record}, indent=2) + "\n")


if __name__ == "__main__":
    main()

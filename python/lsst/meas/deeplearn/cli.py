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

"""Sub-commands of ``butler``."""

from __future__ import annotations

__all__ = ("get_cli_subcommands",)

from collections.abc import Iterable

import click

from lsst.daf.butler.cli.opt import repo_argument
from lsst.daf.butler.cli.utils import ButlerCommand

# Modules that a command needs are imported in it, so that 'butler --help'
# stays quick.


def get_cli_subcommands() -> list[click.Command]:
    """Return the sub-commands that this package adds to ``butler``."""
    return [
        ingest_deeplearn_model,
        list_deeplearn_models,
        import_fits_coadds,
        make_lens_demo,
        show_lens_demo,
    ]


@click.command(cls=ButlerCommand, name="ingest-deeplearn-model")
@repo_argument(required=True)
@click.argument("package")
@click.option("--run", help="RUN collection to put the model into; models/<name>/v<version> by default.")
@click.option("--dataset-type", help="Dataset type; that of the network by default, such as deeplens_model.")
def ingest_deeplearn_model(repo: str, package: str, run: str | None, dataset_type: str | None) -> None:
    """Put a model package into a repository.

    PACKAGE is the path or URI of a .safetensors file, such as
    eups://meas_deeplearn/models/deeplens_gri.safetensors.
    """
    from lsst.daf.butler import Butler

    from .model_package import ModelPackage, ModelPackageError, ingest_model

    try:
        model = ModelPackage.read(package)
    except (FileNotFoundError, ModelPackageError) as err:
        raise click.ClickException(str(err)) from err
    with Butler.from_config(repo, writeable=True) as butler:
        ref = ingest_model(butler, model, run=run, dataset_type=dataset_type)
    click.echo(f"Put {model.name} {model.version} into {ref.run} as {ref.datasetType.name}.")


@click.command(cls=ButlerCommand, name="list-deeplearn-models")
@repo_argument(required=True)
@click.option("--collections", default="*", show_default=True, help="Glob of the collections to search.")
def list_deeplearn_models(repo: str, collections: str) -> None:
    """List the model packages of a repository.

    Printed are bands, stamps and the performance that was measured when each
    model was trained.
    """
    from lsst.daf.butler import Butler

    from .model_package import list_models

    with Butler.from_config(repo) as butler:
        table = list_models(butler, collections)
    if not table:
        raise click.ClickException(
            "There are no model packages; add one with 'butler ingest-deeplearn-model'."
        )
    click.echo("\n".join(table.pformat(max_lines=-1, max_width=-1)))


@click.command(cls=ButlerCommand, name="import-fits-coadds")
@repo_argument(required=True)
@click.argument("images", nargs=-1, required=True, metavar="BAND=FILE...")
@click.option("--skymap", required=True, help="Name for the sky map of this field.")
@click.option("--run", required=True, help="RUN collection to write to, such as cfhtls/coadds.")
@click.option(
    "--zero-point",
    "zero_points",
    multiple=True,
    metavar="[BAND=]MAG",
    help="AB magnitude of one count, for all bands or one; by default it is read from the header.",
)
@click.option("--weight", "weights", multiple=True, metavar="BAND=FILE", help="Inverse variance images.")
@click.option("--psf", "psfs", multiple=True, metavar="BAND=FILE", help="Images of a star.")
@click.option(
    "--psf-fwhm", multiple=True, metavar="[BAND=]ARCSEC", help="Width of the PSF where there is no image."
)
def import_fits_coadds(
    repo: str,
    images: tuple[str, ...],
    skymap: str,
    run: str,
    zero_points: tuple[str, ...],
    weights: tuple[str, ...],
    psfs: tuple[str, ...],
    psf_fwhm: tuple[str, ...],
) -> None:
    """Import plain FITS images of a field as coadds, and detect objects.

    REPO is made if it does not exist.  All images must have one pixel grid
    and a celestial WCS.
    """
    from . import fits_coadds

    files = _split_bands(images)
    try:
        fits_coadds.import_fits_coadds(
            repo,
            files,
            sky_map=skymap,
            run=run,
            zero_points=_split_numbers(zero_points, files),
            weights=_split_bands(weights),
            psfs=_split_bands(psfs),
            psf_fwhm=_split_numbers(psf_fwhm, files),
            report=click.echo,
        )
    except (OSError, ValueError) as err:
        raise click.ClickException(str(err)) from err


def _split_bands(values: Iterable[str]) -> dict[str, str]:
    """Turn ``BAND=VALUE`` arguments into a mapping."""
    if bad := [value for value in values if "=" not in value]:
        raise click.BadParameter(f"{bad[0]!r} is not of the form BAND=VALUE, such as i=image.fits.")
    return dict(value.split("=", 1) for value in values)


def _split_numbers(values: Iterable[str], bands: Iterable[str]) -> dict[str, float] | None:
    """Turn numbers for one band, or for all of them, into a mapping."""
    numbers: dict[str, str] = {}
    for value in values:
        numbers |= _split_bands([value]) if "=" in value else dict.fromkeys(bands, value)
    try:
        return {band: float(number) for band, number in numbers.items()} or None
    except ValueError as err:
        raise click.BadParameter(f"{err}; give a number, or BAND=NUMBER.") from err


@click.command(cls=ButlerCommand, name="make-lens-demo")
@repo_argument(required=True)
@click.option("--seed", default=1, show_default=True, help="Seed of the sky, the noise and the lenses.")
@click.option("--patches", default=2, show_default=True, help="Number of patches.")
@click.option("--lenses", default=None, type=int, help="Lenses in each patch; 0 for a field to train on.")
def make_lens_demo(repo: str, seed: int, patches: int, lenses: int | None) -> None:
    """Make a repository with synthetic coadds, objects and lenses.

    The shipped model packages go into it too.
    """
    from .demo import make_demo

    make_demo(repo, seed=seed, n_patches=patches, n_lenses=lenses, report=click.echo)


@click.command(cls=ButlerCommand, name="show-lens-demo")
@repo_argument(required=True)
@click.option("--collections", default="demo/lenses", show_default=True, help="Output of find_lenses.yaml.")
@click.option("--best", default=10, show_default=True, help="Number of candidates to print.")
def show_lens_demo(repo: str, collections: str, best: int) -> None:
    """Print the best candidates of the demo with the truth beside them.

    Works for any repository with injected lenses ('lens_truth').
    """
    from astropy.table import vstack

    from lsst.daf.butler import (
        Butler,
        EmptyQueryResultError,
        MissingCollectionError,
        MissingDatasetTypeError,
    )

    from .lenses.truth import describe_recovery

    with Butler.from_config(repo) as butler:
        try:
            refs = butler.query_datasets("lens_candidates_ranked", collections)
        except (EmptyQueryResultError, MissingCollectionError, MissingDatasetTypeError) as err:
            raise click.ClickException(f"Run find_lenses.yaml first: {err}") from err
        for ref in refs:
            truth_refs = butler.query_datasets("lens_truth", "*", find_first=False, data_id=ref.dataId)
            truth = vstack([butler.get(truth_ref) for truth_ref in truth_refs], metadata_conflicts="silent")
            click.echo(describe_recovery(butler.get(ref), truth, n_best=best))
            gallery = butler.find_dataset("lens_gallery", ref.dataId, collections=collections)
            for name, shown in (("Table", ref), ("Gallery", gallery)):
                if shown is not None:
                    click.echo(f"{name + ':':8} {butler.getURI(shown).ospath}")

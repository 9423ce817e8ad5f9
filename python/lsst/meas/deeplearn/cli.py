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
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lsst.daf.butler.cli.opt import repo_argument
from lsst.daf.butler.cli.utils import ButlerCommand

if TYPE_CHECKING:
    pass

# Modules that a command needs are imported in it, so that 'butler --help'
# stays quick.


def get_cli_subcommands() -> list[click.Command]:
    """Return the sub-commands that this package adds to ``butler``."""
    return [
        ingest_deeplearn_model,
        list_deeplearn_models,
        export_deeplearn_models,
        import_fits_coadds,
        make_lens_demo,
        show_lens_demo,
        show_galaxies,
        show_shear_bias,
        make_inspection_page,
        ingest_lens_votes,
        unblind_shear,
    ]


@click.command(cls=ButlerCommand, name="ingest-deeplearn-model")
@repo_argument(required=True)
@click.argument("packages", nargs=-1, required=True, metavar="PACKAGE...")
@click.option("--run", help="RUN collection to put a model into; models/<name>/v<version> by default.")
@click.option("--chain", help="CHAINED collection to make of all the models, such as models/deeplens_gri.")
@click.option("--dataset-type", help="Dataset type; that of the network by default, such as deeplens_model.")
def ingest_deeplearn_model(
    repo: str, packages: tuple[str, ...], run: str | None, chain: str | None, dataset_type: str | None
) -> None:
    """Put model packages into a repository.

    PACKAGE is the path or URI of a .safetensors file, such as
    eups://meas_deeplearn/models/deeplens_gri_1.safetensors.  The models of a
    chain are an ensemble; a chain that exists already is replaced.
    """
    from lsst.daf.butler import Butler
    from lsst.daf.butler.registry import ConflictingDefinitionError

    from .model_package import ModelPackage, ModelPackageError, chain_models, ingest_model

    if run is not None and len(packages) > 1:
        raise click.UsageError("--run names the run of one model; several have runs of their own names.")
    try:
        models = [ModelPackage.read(package) for package in packages]
    except (FileNotFoundError, ModelPackageError) as err:
        raise click.ClickException(str(err)) from err
    names = [model.name for model in models]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise click.ClickException(f"The models of an ensemble need different names; {repeated} repeat.")
    with Butler.from_config(repo, writeable=True) as butler:
        runs = []
        for model in models:
            try:
                ref = ingest_model(butler, model, run=run, dataset_type=dataset_type)
            except ConflictingDefinitionError as err:
                raise click.ClickException(
                    f"The run for {model.name} has a model package already; name another one with --run."
                ) from err
            click.echo(f"Put {model.name} {model.version} into {ref.run} as {ref.datasetType.name}.")
            runs.append(ref.run)
        if chain is not None:
            try:
                chain_models(butler, chain, runs)
            except ModelPackageError as err:
                raise click.ClickException(str(err)) from err
            click.echo(f"The ensemble is {chain}.")


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


@click.command(cls=ButlerCommand, name="export-deeplearn-models")
@repo_argument(required=True)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--collections", required=True, help="Glob of the collections to search.")
def export_deeplearn_models(repo: str, folder: Path, collections: str) -> None:
    """Write the model packages of a repository to .safetensors files.

    FOLDER gets a file for each, named after the model.  Those of an ensemble
    that was trained together can be ingested with a chain then.
    """
    from lsst.daf.butler import Butler

    from .model_package import ModelPackage, list_models

    with Butler.from_config(repo) as butler:
        table = list_models(butler, collections)
        if not table:
            raise click.ClickException(f"There are no model packages in {collections}.")
        names = table["name"].tolist()
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise click.ClickException(f"Several models are called {repeated}; name one run of each.")
        folder.mkdir(parents=True, exist_ok=True)
        for row in table:
            package = butler.get(str(row["dataset_type"]), collections=str(row["run"]))
            path = folder / f"{row['name']}.safetensors"
            ModelPackage.from_arrow(package).write(path)
            click.echo(f"Wrote {path}.")


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


@click.command(cls=ButlerCommand, name="show-shear-bias")
@repo_argument(required=True)
@click.option("--collections", required=True, help="Output of calibrate_shear.yaml, comma-separated.")
@click.option("--where", default="", help="Which tracts, as a query expression; all by default.")
def show_shear_bias(repo: str, collections: str, where: str) -> None:
    """Print the shear bias of each tract with its errors.

    For each estimator and kind of galaxies, and for the difference between
    kinds; the bins are in the dataset, 'shear_bias'.
    """
    import numpy as np
    from astropy.table import Table

    from lsst.daf.butler import Butler, ButlerUserError

    names = ("m1", "m2", "c1", "c2", "alpha1")
    with Butler.from_config(repo) as butler:
        try:
            refs = butler.query_datasets("shear_bias", collections.split(","), where=where)
        except ButlerUserError as err:
            raise click.ClickException(f"Run calibrate_shear.yaml first: {err}") from err
        for ref in refs:
            table = butler.get(ref)
            table = table[table["bin"] == "all"]
            rows = Table({"estimator": table["estimator"], "galaxies": table["morphology"]})
            rows["minus"] = table["reference"]
            for name in (name for name in names if np.isfinite(table[name]).any()):
                pairs = zip(table[name], table[f"{name}_err"], strict=True)
                rows[name] = [f"{1e3 * value:+.2f} +- {1e3 * error:.2f}" for value, error in pairs]
            click.echo(f"Shear bias of tract {ref.dataId['tract']}, in units of 1e-3:")
            click.echo("\n".join(rows.pformat(max_lines=-1, max_width=-1)))


@click.command(cls=ButlerCommand, name="show-galaxies")
@repo_argument(required=True)
@click.option("--collections", required=True, help="Output of generate_galaxies.yaml, comma-separated.")
@click.option("--where", default="", help="Which patches, as a query expression; all by default.")
def show_galaxies(repo: str, collections: str, where: str) -> None:
    """Print what galaxies were drawn for the objects of each patch."""
    from lsst.daf.butler import Butler, ButlerUserError

    from .galaxies.cvae_galaxy_task import describe_galaxies

    chain = collections.split(",")
    with Butler.from_config(repo) as butler:
        try:
            refs = butler.query_datasets("galaxy_cvae_cutouts", chain, where=where)
        except ButlerUserError as err:
            raise click.ClickException(f"Run generate_galaxies.yaml first: {err}") from err
        for ref in sorted(refs, key=lambda ref: (ref.dataId["tract"], ref.dataId["patch"])):
            click.echo(f"Galaxies of tract {ref.dataId['tract']}, patch {ref.dataId['patch']}:")
            click.echo(describe_galaxies(butler.get(ref)))
            gallery = butler.find_dataset("galaxy_cvae_gallery", ref.dataId, collections=chain)
            for name, shown in (("Table", ref), ("Gallery", gallery)):
                if shown is not None:
                    click.echo(f"{name + ':':8} {butler.getURI(shown).ospath}")


@click.command(cls=ButlerCommand, name="make-inspection-page")
@repo_argument(required=True)
@click.argument("page", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--collections", required=True, help="Collections with the candidates, comma-separated.")
@click.option("--where", default="", help="Which tracts, as a query expression; all by default.")
@click.option("--candidates", default="lens_candidates_ranked", show_default=True, help="Dataset type.")
@click.option("--cutouts", default="lens_cutouts", show_default=True, help="Dataset type.")
@click.option(
    "--order-by",
    default="rank",
    show_default=True,
    help="Column to order by, from 1; vote_rank of lens_candidates_fused puts first what votes help most.",
)
@click.option(
    "--best",
    default=500,
    show_default=True,
    type=click.IntRange(min=1),
    help="Largest number of candidates on the page; known ones are there besides.",
)
@click.option("--shuffle", is_flag=True, help="Show them in random order, which tells nothing of the rank.")
@click.option("--show-scores", is_flag=True, help="Show what the machine thinks before the vote.")
@click.option(
    "--known",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="CSV file (candidate_id, is_lens) of candidates whose truth is known, to weigh the voters.",
)
@click.option(
    "--injected", default=None, help="Dataset type of injected lenses (lens_truth): they are known too."
)
@click.option(
    "--known-lenses",
    default=None,
    help="Catalogue (name, ra, dec) to look the candidates up in, or 'lenscat' for that of this package; "
    "what is known is shown after the vote.",
)
@click.option(
    "--examples",
    default=None,
    help="Dataset type that SimulateLensesTask writes (lens_training_cutouts): simulated lenses and "
    "non-lenses are mixed in blindly, to weigh the voters.",
)
@click.option(
    "--n-examples",
    default=50,
    show_default=True,
    type=click.IntRange(min=1),
    help="Number of these lenses, and of the non-lenses.",
)
@click.option("--feedback", is_flag=True, help="Tell voters the truth after their vote, where it is known.")
@click.option("--title", default="Lens candidates", show_default=True, help="Title of the page.")
@click.option(
    "--zooniverse",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to write the images and manifest of a Zooniverse subject set to, too.",
)
def make_inspection_page(
    repo: str,
    page: Path,
    collections: str,
    where: str,
    candidates: str,
    cutouts: str,
    order_by: str,
    best: int,
    shuffle: bool,
    show_scores: bool,
    known: Path | None,
    injected: str | None,
    known_lenses: str | None,
    examples: str | None,
    n_examples: int,
    feedback: bool,
    title: str,
    zooniverse: Path | None,
) -> None:
    """Write a page on which people grade lens candidates.

    PAGE is the HTML file to write.  It opens in any browser, from disk.
    Votes are exported from it as CSV; 'butler ingest-lens-votes' takes them.
    """
    from astropy.table import vstack

    from lsst.daf.butler import Butler, ButlerUserError

    from .cutouts import Cutouts
    from .lenses import inspection_candidates as chooser
    from .lenses.known_lenses import flag_known_lenses, read_known_lenses
    from .lenses.visual_inspection import make_pictures, match_cutouts, write_inspection_page
    from .lenses.vote_files import read_truth, write_zooniverse_manifest

    names = [name.strip() for name in collections.split(",")]
    try:
        truth = read_truth(known) if known is not None else {}
        with Butler.from_config(repo) as butler:
            table, skymap = chooser.read_candidates(butler, candidates, names, where=where, order_by=order_by)
            if injected is not None:
                truth |= chooser.find_injected_lenses(butler, injected, names, table, where=where)
            ids = chooser.read_cutout_ids(butler, cutouts, names, where=where)
            n_all = len(table)
            table, n_passed_over = chooser.choose_candidates(table, ids, best=best, known=truth)
            stamps = chooser.read_cutouts(butler, cutouts, names, table, where=where)
            if known_lenses is not None:
                catalog = read_known_lenses(None if known_lenses == "lenscat" else known_lenses)
                flag_known_lenses(table, catalog)
            n_found = len(table)
            n_given, n_known = len(truth), len(set(truth) & set(table["objectId"].tolist()))
            if examples is not None:
                rows, more, answers = chooser.read_examples(
                    butler, examples, names, table, stamps, number=n_examples, where=where
                )
                table = vstack([table, rows], metadata_conflicts="silent")
                stamps = Cutouts.concatenate([stamps, more])
                truth |= answers
        written = write_inspection_page(
            page,
            table,
            stamps,
            title=title,
            skymap=skymap,
            truth=truth,
            feedback=feedback,
            links="always" if examples is None else "after vote",
            order="random" if shuffle else "given",
            show_scores=show_scores,
        )
    except (ButlerUserError, ImportError, OSError, ValueError) as err:
        raise click.ClickException(str(err)) from err
    click.echo(f"Wrote {n_found} of {n_all} candidates to {written.path}.")
    if len(table) > n_found:
        n_lenses = sum(answers.values())
        click.echo(f"Mixed in are {n_lenses} simulated lenses and {len(answers) - n_lenses} non-lenses.")
    if n_known < n_given:
        click.echo(f"Of {n_given} known candidates {n_known} have a stamp here.")
    if n_passed_over:
        click.echo(
            f"{n_passed_over} candidates that come before the last of these have no stamp; nCutouts of "
            "LensFinderTask sets how many of a patch do."
        )
    if written.key_path is not None:
        click.echo(f"Keep {written.key_path} from the voters: it says which ones are known.")
    if zooniverse is not None:
        found, rows = match_cutouts(table, stamps)
        manifest = write_zooniverse_manifest(
            zooniverse, table[rows], make_pictures(found), skymap=skymap, truth=truth
        )
        click.echo(f"Wrote {manifest} and the images of {len(rows)} subjects.")


@click.command(cls=ButlerCommand, name="ingest-lens-votes")
@repo_argument(required=True)
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--run", required=True, help="RUN collection to put the votes into, such as votes/first.")
@click.option("--dataset-type", default="lens_votes", show_default=True, help="Dataset type of the votes.")
@click.option(
    "--key",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Key of an inspection page (candidate_id, is_lens): which candidates are known.",
)
@click.option("--skymap", default=None, help="Sky map of votes that do not tell it.")
@click.option("--tract", default=None, type=int, help="Tract of votes that do not tell it.")
@click.option("--zooniverse", is_flag=True, help="The files are classification exports of Zooniverse.")
@click.option("--skip-broken", is_flag=True, help="Leave out lines that cannot be read, instead of stopping.")
def ingest_lens_votes(
    repo: str,
    files: tuple[Path, ...],
    run: str,
    dataset_type: str,
    key: tuple[Path, ...],
    skymap: str | None,
    tract: int | None,
    zooniverse: bool,
    skip_broken: bool,
) -> None:
    """Put people's votes on lens candidates into a repository.

    FILES are the CSV files that inspection pages export, of all voters.  All
    votes on a tract become one dataset, of each voter and candidate the last
    vote.  Nothing is written unless all files can be read.  To add votes
    later, give all files again, and another RUN.
    """
    from lsst.daf.butler import Butler

    from .lenses.vote_files import (
        VotesError,
        ingest_votes,
        read_truth,
        read_votes,
        read_zooniverse_votes,
        select_last_votes,
        stack_votes,
    )

    def report(message: str) -> None:
        click.echo(f"Left out: {message}", err=True)

    on_error = report if skip_broken else None
    try:
        truth: dict[int, bool] = {}
        for path in key:
            truth |= read_truth(path)
        if zooniverse:
            tables = [read_zooniverse_votes(path, on_error=on_error) for path in files]
        else:
            tables = [read_votes(path, on_error=on_error) for path in files]
        votes = stack_votes(tables)
        for row in votes:
            row["truth"] = truth.get(int(row["objectId"]), row["truth"])
    except VotesError as err:
        raise click.ClickException(str(err)) from err
    last = select_last_votes(votes)
    if not len(last):
        raise click.ClickException("There are no votes in these files.")
    last["skymap"][last["skymap"] == ""] = skymap or ""
    last["tract"][last["tract"] < 0] = -1 if tract is None else tract
    if (last["skymap"] == "").any() or (last["tract"] < 0).any():
        raise click.ClickException("Some votes do not tell their tract; give --skymap and --tract.")
    with Butler.from_config(repo, writeable=True) as butler:
        try:
            ingest_votes(butler, last, run=run, dataset_type=dataset_type)
        except VotesError as err:
            raise click.ClickException(str(err)) from err
    n_voters = len(set(last["voter"].tolist()))
    click.echo(
        f"Put {len(last)} votes of {n_voters} voters into {run}; {len(votes) - len(last)} were superseded."
    )


@click.command(cls=ButlerCommand, name="unblind-shear")
@repo_argument(required=True)
@click.option("--collections", required=True, help="Collections with blinded shear, in order of search.")
@click.option("--run", required=True, help="RUN collection to put catalogues without the hidden factor into.")
@click.option("--dataset-type", default="shear_object", show_default=True, help="Blinded dataset type.")
def unblind_shear(repo: str, collections: str, run: str, dataset_type: str) -> None:
    """Take the hidden factor out of shear catalogues.

    The result has the same dataset type, in RUN.
    """
    from lsst.daf.butler import Butler

    from .shear.catalogs import unblind

    with Butler.from_config(repo, writeable=True) as butler:
        refs = butler.query_datasets(dataset_type, collections.split(","), explain=False)
        if not refs:
            raise click.ClickException(f"There is no {dataset_type} in {collections}.")
        tables = []
        for ref in refs:
            blinding = butler.find_dataset("shear_blinding", ref.dataId, collections=ref.run)
            if blinding is None:
                raise click.ClickException(f"There is no shear_blinding beside {ref}.")
            try:
                tables.append((unblind(butler.get(ref), butler.get(blinding)), ref))
            except ValueError as err:
                raise click.ClickException(f"{ref}: {err}") from err
        butler.collections.register(run)
        with butler.transaction():
            for table, ref in tables:
                butler.put(table, ref.datasetType, ref.dataId, run=run)
    click.echo(f"Took the hidden factor out of {len(tables)} catalogues; they are in {run}.")

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

"""Sub-commands of ``butler`` for people's votes on lens candidates."""

from __future__ import annotations

__all__ = ("ingest_lens_votes", "make_inspection_page")

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lsst.daf.butler.cli.opt import repo_argument
from lsst.daf.butler.cli.utils import ButlerCommand

if TYPE_CHECKING:
    from astropy.table import Table

    from lsst.daf.butler import Butler, DatasetRef

    from ..cutouts import Cutouts

# Modules that a command needs are imported in it, so that 'butler --help'
# stays quick.


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
@click.option("--best", default=500, show_default=True, help="Largest number of candidates on the page.")
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
    feedback: bool,
    title: str,
    zooniverse: Path | None,
) -> None:
    """Write a page on which people grade lens candidates.

    PAGE is the HTML file to write.  It opens in any browser, from disk.
    Votes are exported from it as CSV; 'butler ingest-lens-votes' takes them.
    """
    from lsst.daf.butler import Butler, ButlerUserError

    from .known_lenses import flag_known_lenses, read_known_lenses
    from .visual_inspection import make_pictures, match_cutouts, write_inspection_page
    from .votes import read_truth, write_zooniverse_manifest

    names = [name.strip() for name in collections.split(",")]
    try:
        truth = read_truth(known) if known is not None else {}
        with Butler.from_config(repo) as butler:
            refs, table = _read_candidates(butler, candidates, names, where, order_by, best)
            skymap = str(refs[0].dataId["skymap"])
            stamps = _read_cutouts(butler, cutouts, names, where, table)
            if injected is not None:
                truth |= _find_injected(butler, injected, names, where, table)
        if known_lenses is not None:
            catalog = read_known_lenses(None if known_lenses == "lenscat" else known_lenses)
            flag_known_lenses(table, catalog)
        written = write_inspection_page(
            page,
            table,
            stamps,
            title=title,
            skymap=skymap,
            truth=truth,
            feedback=feedback,
            order="random" if shuffle else "given",
            show_scores=show_scores,
        )
    except (ButlerUserError, ImportError, OSError, ValueError) as err:
        raise click.ClickException(str(err)) from err
    click.echo(f"Wrote {written.n_candidates} candidates to {written.path}.")
    if written.n_without_cutouts:
        click.echo(
            f"{written.n_without_cutouts} more have no cutouts; nCutouts of LensFinderTask sets how many do."
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

    from .votes import (
        VotesError,
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
        _put_votes(butler, last, run, dataset_type)
    n_voters = len(set(last["voter"].tolist()))
    click.echo(
        f"Put {len(last)} votes of {n_voters} voters into {run}; {len(votes) - len(last)} were superseded."
    )


def _put_votes(butler: Butler, votes: Table, run: str, dataset_type: str) -> None:
    """Write the votes on each tract."""
    from lsst.daf.butler import DatasetType

    tracts = sorted(set(zip(votes["skymap"].tolist(), votes["tract"].tolist(), strict=True)))
    for skymap, tract in tracts:
        if not butler.query_dimension_records("tract", skymap=skymap, tract=tract, explain=False):
            raise click.ClickException(f"The repository has no tract {tract} of the sky map {skymap!r}.")
    butler.registry.registerDatasetType(
        DatasetType(dataset_type, ("skymap", "tract"), "ArrowAstropy", universe=butler.dimensions)
    )
    butler.collections.register(run)
    for skymap, tract in tracts:
        if butler.find_dataset(dataset_type, skymap=skymap, tract=tract, collections=run) is not None:
            raise click.ClickException(
                f"There are votes on tract {tract} in {run} already; give all files again, and another --run."
            )
    with butler.transaction():
        for skymap, tract in tracts:
            chosen = (votes["skymap"] == skymap) & (votes["tract"] == tract)
            butler.put(votes[chosen], dataset_type, skymap=skymap, tract=tract, run=run)


def _read(
    butler: Butler, dataset_type: str, collections: Sequence[str], where: str
) -> tuple[list[DatasetRef], list[Table]]:
    """Read the datasets of some tracts or patches, in order."""
    from .visual_inspection import InspectionPageError

    refs = butler.query_datasets(dataset_type, collections, where=where, explain=False)
    if not refs:
        raise InspectionPageError(
            f"There is no {dataset_type} in {', '.join(collections)}{' where ' if where else ''}{where}."
        )
    refs.sort(key=lambda ref: tuple(ref.dataId.required_values))
    return refs, [butler.get(ref) for ref in refs]


def _read_candidates(
    butler: Butler, dataset_type: str, collections: Sequence[str], where: str, order_by: str, best: int
) -> tuple[list[DatasetRef], Table]:
    """Read the first candidates of some tracts by a column."""
    import numpy as np
    from astropy.table import vstack

    from .visual_inspection import InspectionPageError

    refs, tables = _read(butler, dataset_type, collections, where)
    skymaps = {str(ref.dataId["skymap"]) for ref in refs}
    if len(skymaps) > 1:
        raise InspectionPageError(f"Candidates of several sky maps, {sorted(skymaps)}; choose with --where.")
    table = vstack([part for part in tables if len(part)] or tables[:1], metadata_conflicts="silent")
    if order_by not in table.colnames:
        raise InspectionPageError(f"{dataset_type} has no column {order_by!r}, but {table.colnames}.")
    place = np.asarray(table[order_by], dtype=np.float64)
    return refs, table[np.argsort(np.where(place > 0, place, np.inf), kind="stable")][:best]


def _read_cutouts(
    butler: Butler, dataset_type: str, collections: Sequence[str], where: str, candidates: Table
) -> Cutouts:
    """Read the stamps of candidates."""
    import numpy as np

    from ..cutouts import Cutouts
    from .visual_inspection import InspectionPageError

    ids = np.asarray(candidates["objectId"])
    parts = []
    # One at a time: the stamps of a tract need gigabytes.
    for ref in butler.query_datasets(dataset_type, collections, where=where, explain=False):
        table = butler.get(ref)
        wanted = np.isin(np.asarray(table["ids"]), ids)
        if wanted.any():
            parts.append(Cutouts.from_table(table[wanted]))
    if not parts:
        raise InspectionPageError(f"None of the {len(ids)} candidates has a stamp in {dataset_type}.")
    return Cutouts.concatenate(parts)


def _find_injected(
    butler: Butler, dataset_type: str, collections: Sequence[str], where: str, candidates: Table
) -> dict[int, bool]:
    """Return the candidates that are injected lenses."""
    from astropy.table import vstack

    from .truth import match_truth

    lenses = vstack(_read(butler, dataset_type, collections, where)[1], metadata_conflicts="silent")
    return dict.fromkeys(candidates["objectId"][match_truth(candidates, lenses) >= 0].tolist(), True)

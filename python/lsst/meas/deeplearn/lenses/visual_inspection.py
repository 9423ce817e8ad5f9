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

"""A page on which people look at lens candidates and grade them.

The page is one file that needs no server and no network: it opens from disk,
keeps the votes in the browser and hands them out as CSV, which
`lsst.meas.deeplearn.lenses.vote_files.read_votes` reads.  It holds the pixels
of every band, not pictures, so that any stretch of any band can be looked at.
"""

from __future__ import annotations

__all__ = (
    "DEFAULT_VIEWERS",
    "InspectionPage",
    "InspectionPageError",
    "crop_cutouts",
    "make_pictures",
    "match_cutouts",
    "measure_magnitudes",
    "write_inspection_page",
)

import base64
import dataclasses
import hashlib
import html
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from astropy.table import Column, Table

from ..cutouts import Cutouts
from ..preprocessing import compute_noise
from .plots import BAND_WEIGHTS, BLACK, NO_DATA_COLOR, SOFTENING, STRETCH, make_color_images
from .vote_files import GRADES, write_truth

TEMPLATE_FOLDER = Path(__file__).parent / "inspection_page"
"""Where the page's HTML, style and script are."""

DEFAULT_VIEWERS: Mapping[str, str] = {
    "Legacy Surveys": "https://www.legacysurvey.org/viewer?ra={ra}&dec={dec}&layer=ls-dr10&zoom=16",
    "Aladin Lite": "https://aladin.cds.unistra.fr/AladinLite/?target={ra}%20{dec}&fov=0.01",
    "ESASky": "https://sky.esa.int/esasky/?target={ra}%20{dec}&fov=0.01",
    "SIMBAD": "https://simbad.cds.unistra.fr/simbad/sim-coo?Coord={ra}%20{dec}&Radius=10&Radius.unit=arcsec",
    "NED": "https://ned.ipac.caltech.edu/conesearch?search_type=Near+Position+Search&ra={ra}&dec={dec}"
    "&radius=0.2",
}
"""Address of viewers of the sky, by name; {ra} and {dec} are in degrees."""

ASINH_SCALE, LOWEST, HIGHEST = 2.0, -10.0, 20000.0
"""Pixels are held in 8 bits as asinh(x / ASINH_SCALE), for x in units of the
noise between LOWEST and HIGHEST: steps of a tenth of the noise on the sky and
of 5 per cent in the core of a galaxy."""

N_STEPS = 254
"""Number of steps; 0 is a bad pixel."""

APERTURE = 1.5
"""Radius in arcsec of the magnitude that is measured on stamps."""

AB_ZERO_POINT = 31.4
"""AB magnitude of 1 nJy."""


@dataclasses.dataclass(frozen=True)
class _Detail:
    """A column that the page shows."""

    label: str
    digits: int = 0
    is_machine: bool = True
    """Does it tell what the machine, or anyone else, thinks?"""
    unit: str = ""
    errors: tuple[str, ...] = ()
    """Column with the error, or those with the limits, if they are there."""
    is_probability: bool = False
    """Do small values matter?"""


_DETAILS: Mapping[str, _Detail] = {
    "rank": _Detail("Rank"),
    "score": _Detail("Score", 3, errors=("score_err",)),
    "probability": _Detail("Probability", 3, errors=("probability_err",), is_probability=True),
    "posterior": _Detail("Posterior", 3, errors=("posterior_low", "posterior_high"), is_probability=True),
    "ringfinder_snr": _Detail("RingFinder S/N", 1),
    "ringfinder_is_lens": _Detail("RingFinder: lens"),
    "n_votes": _Detail("Votes so far"),
    "known_lens": _Detail("Known lens"),
    "magnitude": _Detail("Magnitude", 2, is_machine=False, unit="mag"),
    "masked_fraction": _Detail("Masked fraction", 3, is_machine=False),
    "patch": _Detail("Patch", is_machine=False),
}


class InspectionPageError(ValueError):
    """Tables from which no page can be made."""


@dataclasses.dataclass(frozen=True)
class InspectionPage:
    """What was written."""

    path: Path
    """The page."""

    key_path: Path | None
    """CSV file with the truth of candidates whose truth is known, not to be
    given to voters; see `lsst.meas.deeplearn.lenses.vote_files.read_truth`."""

    page_id: str
    """Under which browsers keep the votes; that of the same candidates is
    always the same."""

    n_candidates: int
    """Number of candidates on the page."""

    n_without_cutouts: int
    """Number of candidates left out as there are no cutouts of them."""


def write_inspection_page(
    path: Path | str,
    candidates: Table,
    cutouts: Table | Cutouts,
    *,
    title: str = "Lens candidates",
    skymap: str = "",
    bands: Sequence[str] = ("i", "r", "g"),
    size: int | None = None,
    truth: Mapping[int, bool] | None = None,
    feedback: bool = False,
    links: Literal["always", "after vote"] = "always",
    order: Literal["given", "random"] = "given",
    show_scores: bool = False,
    viewers: Mapping[str, str] = DEFAULT_VIEWERS,
    seed: int = 1,
) -> InspectionPage:
    """Write a page on which people grade lens candidates.

    Parameters
    ----------
    path
        HTML file to write.
    candidates
        Table with ``objectId``, ``coord_ra`` and ``coord_dec``, in the order
        of the page; that of `RankLensCandidatesTask`, for example.  Columns
        ``flag_*`` are shown as flags, and of the others those that the page
        knows: score, probability, RingFinder's, magnitude and so on.
    cutouts
        Stamps of the candidates, `Cutouts` or the table of these; of other
        objects too, perhaps.
    title
        Title of the page.
    skymap
        Name of the sky map, to go with the votes.
    bands
        Bands shown red, green and blue; a candidate that lacks one is shown
        in grey.  Single bands are shown for all that there are.
    size
        Side in pixels of what is shown of the stamps; all by default.
    truth
        Whether candidates are lenses, by their ID, where that is known:
        simulations and known lenses and other things, among the candidates
        and the cutouts like all others.  They are mixed in at random
        places, and their truth is written to a file of its own next to the
        page.
    feedback
        Tell voters the truth after their vote, where it is known?  The page
        then holds it.
    links
        When to show links to viewers of the sky.  These show simulated
        lenses without their arcs.
    order
        Keep the order of the table or shuffle it?  A ranked order tells
        voters what the machine thinks.
    show_scores
        Show what the machine thinks before the vote?  Posteriors of fused
        votes take people to judge on their own, so by default it is shown
        after the vote only.  Voters may change it; the votes tell which.
    viewers
        Address of viewers of the sky to link to, by name, with {ra} and
        {dec} in degrees.  No link is followed unless it is clicked.
    seed
        Seed of the shuffling.

    Returns
    -------
    page
        What was written.

    Raises
    ------
    InspectionPageError
        Raised if the tables do not fit each other: if there is a candidate
        twice, or none with a cutout.
    """
    path = Path(path)
    truth = dict(truth or {})
    stamps, rows = match_cutouts(candidates, cutouts)
    if len(rows) == 0:
        raise InspectionPageError(
            f"There are cutouts of none of the {len(candidates)} candidates, so there is nothing to show."
        )
    n_without = len(candidates) - len(rows)
    known = {int(i): truth[int(i)] for i in candidates["objectId"][rows] if int(i) in truth}
    places = _mix(np.array([int(i) in known for i in candidates["objectId"][rows]]), order, seed)
    table, stamps = candidates[rows[places]], stamps[places]
    if "magnitude" not in table.colnames:
        band = next((band for band in bands if band in stamps.bands), stamps.bands[0])
        table["magnitude"] = measure_magnitudes(stamps, band)
    page_id = _make_page_id(skymap, table["objectId"])
    data: dict[str, Any] = {
        "page": page_id,
        "title": title,
        "skymap": skymap,
        "grades": dict(GRADES),
        "viewers": [[name, address] for name, address in viewers.items()],
        "show_scores": show_scores,
        "links_after_vote": links == "after vote",
        "truth": [known.get(int(i)) for i in table["objectId"]] if feedback else None,
        **_describe_candidates(table),
        **_pack_pixels(crop_cutouts(stamps, size), bands),
    }
    _write_atomically(path, _fill_template(title, data))
    key_path = path.with_name(f"{path.stem}_key.csv") if known else None
    if key_path is not None:
        write_truth(known, key_path)
    return InspectionPage(path, key_path, page_id, len(table), n_without)


def make_pictures(
    cutouts: Cutouts, *, bands: Sequence[str] = ("i", "r", "g"), scale: int = 8
) -> dict[str, list[bytes]]:
    """Make PNG files of stamps, for a Zooniverse campaign for example.

    Parameters
    ----------
    cutouts
        Stamps.
    bands
        Bands shown red, green and blue in the composite; see
        `lsst.meas.deeplearn.lenses.plots.make_color_images`.
    scale
        Number of pixels of the picture to each of the stamp, along an axis.

    Returns
    -------
    pictures
        Files by the name of the view: ``colour`` and each of the bands, in
        grey.
    """
    views = {"colour": make_color_images(cutouts, bands)}
    views |= {band: make_color_images(cutouts, [band]) for band in cutouts.bands}
    return {
        view: [_encode_png(np.kron(image[::-1], np.ones((scale, scale, 1), np.uint8))) for image in images]
        for view, images in views.items()
    }


def match_cutouts(candidates: Table, cutouts: Table | Cutouts) -> tuple[Cutouts, np.ndarray]:
    """Find the stamps of candidates.

    Parameters
    ----------
    candidates
        Table with ``objectId``.
    cutouts
        Stamps of these and of other objects, in any order.

    Returns
    -------
    stamps
        Stamps of the candidates that have one, in the order of the table; of
        two of an object the one with fewer bad pixels.
    rows
        Rows of the candidates that have one.

    Raises
    ------
    InspectionPageError
        Raised if a candidate stands in the table twice, or if there are no
        stamps at all.
    """
    ids = np.asarray(candidates["objectId"], dtype=np.int64)
    if len(np.unique(ids)) < len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise InspectionPageError(
            f"{(counts > 1).sum()} candidates stand in the table more than once, {values[counts > 1][0]} for "
            "example; votes could not be told apart."
        )
    if isinstance(cutouts, Table):
        if not len(cutouts):
            raise InspectionPageError("The table of cutouts is empty, so there is nothing to show.")
        cutouts = Cutouts.from_table(cutouts)
    order = np.argsort(cutouts.masked_fraction.max(axis=1), kind="stable")
    values, first = np.unique(cutouts.ids[order], return_index=True)
    place = np.searchsorted(values, ids)
    found = np.flatnonzero(np.isin(ids, values))
    return cutouts[order[first[place[found]]]], found


def crop_cutouts(cutouts: Cutouts, size: int | None) -> Cutouts:
    """Return the middle of stamps.

    Parameters
    ----------
    cutouts
        Stamps.
    size
        Side in pixels; `None`, or one that is not smaller, for all.
    """
    if size is None or size >= cutouts.size:
        return cutouts
    margin = (cutouts.size - size) // 2
    middle = (..., slice(margin, cutouts.size - margin), slice(margin, cutouts.size - margin))
    return dataclasses.replace(
        cutouts, image=cutouts.image[middle], variance=cutouts.variance[middle], bad=cutouts.bad[middle]
    )


def measure_magnitudes(cutouts: Cutouts, band: str, *, radius: float = APERTURE) -> Column:
    """Measure AB magnitudes in an aperture in the middle of stamps.

    Parameters
    ----------
    cutouts
        Stamps.
    band
        Name of the band.
    radius
        Radius of the aperture in arcsec.

    Returns
    -------
    magnitudes
        NaN where a pixel of the aperture is bad or the flux is not positive,
        shape ``(N,)``.
    """
    b, middle = cutouts.bands.index(band), cutouts.size // 2
    y, x = np.mgrid[: cutouts.size, : cutouts.size] - middle
    aperture = np.hypot(x, y) * cutouts.pixel_scale <= radius
    flux = np.where(cutouts.bad[:, b], np.nan, cutouts.image[:, b])[:, aperture].sum(axis=1, dtype=np.float64)
    magnitudes = AB_ZERO_POINT - 2.5 * np.log10(np.where(flux > 0, flux, np.nan))
    return Column(
        magnitudes,
        description=f"AB magnitude in {band} within {radius:g} arcsec",
        meta={"label": f"{band} magnitude"},
    )


def _mix(known: np.ndarray, order: str, seed: int) -> np.ndarray:
    """Return an order in which those of known truth are at random places."""
    rng = np.random.default_rng(seed)
    if order == "random":
        return rng.permutation(len(known))
    at_known = np.zeros(len(known), dtype=bool)
    at_known[rng.permutation(len(known))[: known.sum()]] = True
    places = np.empty(len(known), dtype=np.int64)
    places[at_known] = rng.permutation(np.flatnonzero(known))
    places[~at_known] = np.flatnonzero(~known)
    return places


def _make_page_id(skymap: str, object_ids: np.ndarray) -> str:
    ids = np.sort(np.asarray(object_ids, dtype="<i8"))
    return hashlib.sha256(skymap.encode() + b"\0" + ids.tobytes()).hexdigest()[:16]


def _describe_candidates(table: Table) -> dict[str, Any]:
    """Return what the page says of each candidate, as types JSON has."""
    flag_names = [name for name in table.colnames if name.startswith("flag_")]
    flags = np.array([np.asarray(table[name], dtype=bool) for name in flag_names]).reshape(-1, len(table))
    details = []
    for name, detail in _DETAILS.items():
        if name not in table.colnames:
            continue
        values = _list_values(table[name], detail)
        if name == "ringfinder_is_lens" and "ringfinder_snr" in table.colnames:
            # It says nothing of what it has not measured.
            measured = np.isfinite(np.asarray(table["ringfinder_snr"]))
            values = [value if here else None for value, here in zip(values, measured, strict=True)]
        if all(value is None for value in values):
            continue
        description = dataclasses.asdict(detail) | {"key": name, "values": values}
        description["label"] = table[name].meta.get("label", detail.label)
        description["title"] = table[name].description or ""
        if set(detail.errors) <= set(table.colnames):
            description["errors"] = [_list_values(table[column], detail) for column in detail.errors]
        else:
            description["errors"] = []
        details.append(description)
    tract = np.asarray(table["tract"]) if "tract" in table.colnames else np.full(len(table), -1)
    return {
        # As text: a number of JavaScript has 53 bits.
        "ids": [str(i) for i in np.asarray(table["objectId"]).tolist()],
        "tract": tract.tolist(),
        "ra": [_to_json(value, 6) for value in np.asarray(table["coord_ra"], dtype=float).tolist()],
        "dec": [_to_json(value, 6) for value in np.asarray(table["coord_dec"], dtype=float).tolist()],
        "flag_names": [name.removeprefix("flag_").replace("_", " ") for name in flag_names],
        "flags": [np.flatnonzero(column).tolist() for column in flags.T],
        "details": details,
    }


def _list_values(column: Column, detail: _Detail) -> list[Any]:
    """Return the values of a column as JSON has them."""
    return [_to_json(value, detail.digits, detail.is_probability) for value in np.asarray(column).tolist()]


def _to_json(value: Any, digits: int, is_probability: bool = False) -> Any:
    """Return a value of a table as JSON has it; `None` if it is not known."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.3g}") if is_probability else round(value, digits)
    if isinstance(value, int):
        return value if value >= 0 else None
    return value or None


def _pack_pixels(cutouts: Cutouts, bands: Sequence[str]) -> dict[str, Any]:
    """Return the pixels of the stamps and how to show them."""
    flux = np.asarray(cutouts.image, dtype=np.float32)
    bad = cutouts.bad | ~np.isfinite(flux) | ~np.isfinite(cutouts.variance)
    noise = compute_noise(cutouts.variance, bad)  # (N, bands)
    x = np.where(bad, 0.0, flux) / noise[:, :, None, None]
    low, high = (math.asinh(limit / ASINH_SCALE) for limit in (LOWEST, HIGHEST))
    step = (high - low) / (N_STEPS - 1)
    codes = np.rint((np.arcsinh(np.clip(x, LOWEST, HIGHEST) / ASINH_SCALE) - low) / step) + 1
    codes = np.where(bad, 0, codes).astype(np.uint8)

    weights = np.array([BAND_WEIGHTS.get(band, 1.0) for band in cutouts.bands])
    gain = weights * noise  # (N, bands)
    shown = [cutouts.bands.index(band) for band in bands if band in cutouts.bands]
    seen = ~bad.all(axis=(2, 3))[:, shown]
    # As in make_color_images: the noise of the bands that are shown.
    square = np.where(seen, gain[:, shown] ** 2, 0.0).sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
    common = np.sqrt(np.where(square > 0, square, 1.0))
    return {
        "bands": list(cutouts.bands),
        "colors": shown,
        "size": cutouts.size,
        "pixel_scale": round(cutouts.pixel_scale, 5),
        "scale": {"soft": ASINH_SCALE, "low": low, "step": step},
        "stretch": {"stretch": STRETCH, "q": SOFTENING, "black": BLACK, "no_data": list(NO_DATA_COLOR)},
        "gain": [[float(f"{value:.5g}") for value in row] for row in (gain / common[:, None]).tolist()],
        # Rows from the bottom, bands one after the other.
        "pixels": [base64.b64encode(stamp.tobytes()).decode() for stamp in codes],
    }


def _fill_template(title: str, data: Mapping[str, Any]) -> str:
    """Return the page; whatever the data say, none of it is executed."""
    style, script, page = (
        (TEMPLATE_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html")
    )
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    # "</script" and "<!--" would end or bend the element.
    payload = payload.replace("<", "\\u003c")
    values = {
        "TITLE": html.escape(title),
        "STYLE": style,
        "SCRIPT": script,
        "STYLE_HASH": _hash_source(style),
        "SCRIPT_HASH": _hash_source(script),
        "DATA": payload,
    }
    pieces = page.split("@@")
    if len(pieces) % 2 == 0:
        raise RuntimeError("The template of the page has an odd number of marks.")
    return "".join(piece if k % 2 == 0 else values[piece] for k, piece in enumerate(pieces))


def _hash_source(source: str) -> str:
    """Return the source expression that lets a browser run only this."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _write_atomically(path: Path, text: str) -> None:
    """Write a file so that no half of it is ever there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        # A temporary file is readable by its owner only.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _encode_png(image: np.ndarray) -> bytes:
    """Encode red, green and blue, uint8, shape ``(y, x, 3)``, as PNG."""
    height, width, _ = image.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)

    def make_chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        make_chunk(kind, content)
        for kind, content in (
            (b"IHDR", header),
            (b"IDAT", zlib.compress(rows.tobytes(), 6)),
            (b"IEND", b""),
        )
    )

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


"""The Bologna strong lens finding challenge: reader, training set, scorer.

Metcalf et al. (2019, A&A 625, A119) asked to classify 100,000 simulated
objects, in four bands from the ground or in one from space.  Their files are

``classifications.csv``
    Key of the 20,000 training images, with columns ``ID``, ``is_lens``,
    ``Einstein_area``, ``numb_pix_lensed_image`` and
    ``flux_lensed_image_in_sigma``.  The key of the test images,
    ``ground_catalog.4.csv``, begins with lines of comment and has a column
    ``no_source`` instead, 0 for a lens.
``Public/Band<k>/image<name>-<ID>.fits``
    A stamp of 101 x 101 pixels.  From the ground ``Band1`` to ``Band4`` are
    ``SDSS_R``, ``SDSS_I``, ``SDSS_G`` and ``SDSS_U``, of 0.2 arcsec; from
    space ``Band1`` is ``EUC_VIS``, of 0.1 arcsec.  Masked pixels are 100.  The
    test images are in ten folders ``Data_KiDS_Big.<n>/Public``, or
    ``Data_EuclidBig.<n>/Public``.

This is what code of participants reads (that of CMU DeepLens, Lanusse et al.
2018, and of LASTRO EPFL), and what the paper says.  It does not say the unit
of the pixels: values of about 1e-11 in the noise suit flux densities in units
of 3631 Jy, a zero point of 0 mag, which is assumed here and does not matter
for networks that see pixels in units of their noise.  There are no weight maps
for participants, so that the noise is measured on each stamp, and no PSFs.
"""

from __future__ import annotations

__all__ = (
    "BRANCHES",
    "PUBLISHED",
    "Branch",
    "ChallengeError",
    "ChallengeScore",
    "find_images",
    "make_training_table",
    "read_catalog",
    "read_cutouts",
    "read_submission",
    "score_challenge",
    "score_images",
    "write_submission",
)

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.io.ascii import InconsistentTableError
from astropy.table import Column, Table

from ..cutouts import Cutouts
from ..inference import InferenceConfig
from ..metrics import Fraction, compute_auroc, compute_operating_point
from ..model_package import ModelPackage
from ..patch_inputs import compute_seed
from .lens_network import LensNetwork
from .simulate_lenses_task import EXAMPLE_COLUMNS

MASKED = 100.0
"""Value of masked pixels."""

NOISE_RADIUS = 6.0
"""Distance from the centre in arcsec beyond which the noise is measured."""

CHUNK = 250
"""Number of objects whose stamps are in memory together."""

AB_ZERO_POINT = 31.4
"""AB magnitude of 1 nJy."""


class ChallengeError(ValueError):
    """Raised for files that are not those of the challenge."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """One of the two challenges."""

    files: Mapping[str, str]
    """Folder and beginning of the file names of each band, by its name."""

    pixel_scale: float
    """Side of a pixel in arcsec."""


BRANCHES: Mapping[str, Branch] = {
    "ground": Branch(
        files={
            "u": "Band4/imageSDSS_U-",
            "g": "Band3/imageSDSS_G-",
            "r": "Band1/imageSDSS_R-",
            "i": "Band2/imageSDSS_I-",
        },
        pixel_scale=0.2,
    ),
    "space": Branch(files={"VIS": "Band1/imageEUC_VIS-"}, pixel_scale=0.1),
}
"""The challenges."""

PUBLISHED: Mapping[str, tuple[tuple[str, float, float, float], ...]] = {
    "ground": (
        ("CMU-DeepLens-Resnet-ground3", 0.98, 0.09, 0.45),
        ("CMU-DeepLens-Resnet-Voting", 0.98, 0.02, 0.10),
        ("LASTRO EPFL", 0.97, 0.07, 0.11),
        ("CAS Swinburne Melb", 0.96, 0.02, 0.08),
        ("AstrOmatic", 0.96, 0.00, 0.01),
        ("Manchester SVM", 0.93, 0.22, 0.35),
        ("Manchester2 (people)", 0.89, 0.00, 0.01),
        ("ALL-star", 0.84, 0.01, 0.02),
        ("CAST", 0.83, 0.00, 0.00),
        ("YattaLensLite", 0.82, 0.00, 0.00),
    ),
    "space": (
        ("LASTRO EPFL", 0.93, 0.00, 0.08),
        ("CMU-DeepLens-Resnet", 0.92, 0.22, 0.29),
        ("GAMOCLASS", 0.92, 0.07, 0.36),
        ("CMU-DeepLens-Resnet-Voting", 0.91, 0.00, 0.01),
        ("AstrOmatic", 0.91, 0.00, 0.01),
        ("CMU-DeepLens-Resnet-aug", 0.91, 0.00, 0.00),
        ("Kapteyn Resnet", 0.82, 0.00, 0.00),
        ("CAST", 0.81, 0.07, 0.12),
        ("Manchester1 (people)", 0.81, 0.01, 0.17),
        ("Manchester SVM", 0.81, 0.03, 0.08),
        ("NeuralNet2", 0.76, 0.00, 0.00),
        ("YattaLensLite", 0.76, 0.00, 0.00),
        ("ALL-now", 0.73, 0.05, 0.07),
        ("GAHEC IRAP", 0.66, 0.00, 0.01),
    ),
}
"""Name, AUROC, TPR0 and TPR10 of all entries (Metcalf et al. 2019, table 3),
in its order."""


# Files


def find_images(root: Path | str, branch: str) -> dict[int, dict[str, Path]]:
    """Find the images below a folder.

    Parameters
    ----------
    root
        Folder in which archives of the challenge were unpacked.
    branch
        Key of `BRANCHES`.

    Returns
    -------
    images
        File of each band, by the name of the band, by the ID of the object;
        ascending.

    Raises
    ------
    ChallengeError
        Raised if there are none, if objects lack a band, or if the same one
        is found twice.
    """
    images: dict[int, dict[str, Path]] = {}
    bands = BRANCHES[branch].files
    for band, prefix in bands.items():
        for path in Path(root).rglob(f"Public/{prefix}*.fits"):
            files = images.setdefault(int(path.stem.rpartition("-")[2]), {})
            if band in files:
                raise ChallengeError(f"{files[band]} and {path} are of the same object; name one folder.")
            files[band] = path
    if not images:
        first = next(iter(bands.values()))
        raise ChallengeError(
            f"There are no files Public/{first}*.fits below {root}.  Unpack the archives of the {branch} "
            "branch there, or choose the other one."
        )
    if torn := [number for number, files in images.items() if len(files) < len(bands)]:
        missing = sorted(set(bands) - set(images[torn[0]]))
        raise ChallengeError(
            f"{len(torn)} of {len(images)} objects lack a band, such as {torn[0]}: {missing}.  Unpack all "
            "archives."
        )
    return dict(sorted(images.items()))


def read_catalog(path: Path | str) -> Table:
    """Read the key of training or test images.

    Parameters
    ----------
    path
        The ``.csv`` file.

    Returns
    -------
    catalog
        The columns of the file, ``is_lens`` (bool) among them.

    Raises
    ------
    ChallengeError
        Raised if the file does not say what is a lens, or has an ID twice.
    FileNotFoundError
        Raised if there is no such file.
    """
    text = Path(path).read_text()
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    try:
        catalog = Table.read(lines, format="ascii.csv")
    except (InconsistentTableError, ValueError) as err:
        raise ChallengeError(f"{path} is not a table of comma-separated values: {err}") from err
    if "ID" not in catalog.colnames or not {"is_lens", "no_source"} & set(catalog.colnames):
        raise ChallengeError(
            f"{path} is not a key of the challenge: it needs columns ID and is_lens or no_source, and has "
            f"{', '.join(catalog.colnames)}."
        )
    if "is_lens" in catalog.colnames:
        catalog["is_lens"] = np.asarray(catalog["is_lens"]) != 0
    else:
        catalog["is_lens"] = np.asarray(catalog["no_source"]) == 0
    if len(np.unique(catalog["ID"])) < len(catalog):
        raise ChallengeError(f"{path} has IDs more than once.")
    return catalog


def read_cutouts(
    images: Mapping[int, Mapping[str, Path]],
    ids: Sequence[int],
    branch: str,
    *,
    size: int | None = None,
    zero_point: float = 0.0,
) -> Cutouts:
    """Read the stamps of some objects.

    Parameters
    ----------
    images
        From `find_images`.
    ids
        IDs of the objects.
    branch
        Key of `BRANCHES`.
    size
        Odd side in pixels of the part about the centre to keep; all by
        default.
    zero_point
        AB magnitude of a pixel value of 1.

    Returns
    -------
    cutouts
        Stamps in nJy; masked pixels are bad.  The variance is that of the
        pixels further than `NOISE_RADIUS` from the centre, or than two thirds
        of the way to the edge if stamps are smaller, from their median
        absolute deviation.  The PSF is not known.

    Raises
    ------
    ChallengeError
        Raised for an ID without images, or for images of different sizes.
    """
    if not len(ids):
        raise ChallengeError("There are no objects to read.")
    bands, scale = tuple(BRANCHES[branch].files), BRANCHES[branch].pixel_scale
    stamps: list[list[np.ndarray]] = []
    for number in ids:
        if number not in images:
            raise ChallengeError(f"There are no images of object {number}; unpack all archives.")
        stamps.append([fits.getdata(images[number][band]) for band in bands])
        shapes = {stamp.shape for stamp in (*stamps[0], *stamps[-1])}
        if len(shapes) > 1 or len(set(stamps[0][0].shape)) > 1 or stamps[0][0].shape[0] % 2 == 0:
            raise ChallengeError(f"Images of object {number} have shapes {sorted(shapes)}, not one odd side.")
    values = np.array(stamps, dtype=np.float64)
    bad = values == MASKED
    image = np.where(bad, np.nan, values) * 10 ** (0.4 * (AB_ZERO_POINT - zero_point))
    variance = np.broadcast_to(_measure_noise(image, scale)[..., None, None] ** 2, image.shape)
    start = 0 if size is None else (image.shape[-1] - size) // 2
    if start < 0:
        raise ChallengeError(f"Images have {image.shape[-1]} pixels on a side, less than {size}.")
    crop = (..., slice(start, image.shape[-1] - start), slice(start, image.shape[-1] - start))
    n, center = len(ids), np.full(len(ids), float(image.shape[-1] // 2))
    return Cutouts(
        bands=bands,
        pixel_scale=scale,
        ids=np.asarray(ids, dtype=np.int64),
        ra=np.full(n, np.nan),
        dec=np.full(n, np.nan),
        x=center,
        y=center.copy(),
        image=image[crop].astype(np.float32),
        variance=variance[crop].astype(np.float32),
        bad=bad[crop],
        psf=np.empty((n, len(bands), 0, 0), dtype=np.float32),
        off_edge=np.zeros(n, dtype=bool),
        missing_band=np.zeros((n, len(bands)), dtype=bool),
        missing_cell=np.zeros((n, len(bands)), dtype=bool),
    )


def _measure_noise(image: np.ndarray, pixel_scale: float) -> np.ndarray:
    """Return the noise of each stamp and band, shape ``(N, B)``; 1 where no
    pixel is good.
    """
    half = image.shape[-1] // 2
    pixels = np.arange(image.shape[-1]) - half
    limit = min(NOISE_RADIUS / pixel_scale, 2 * half / 3)
    far = image[..., np.hypot(pixels[:, None], pixels) > limit]
    far = np.where(np.isfinite(far), far, np.nan)
    usable = np.isfinite(far).any(axis=-1)
    noise = np.ones(usable.shape)
    deviation = np.abs(far[usable] - np.nanmedian(far[usable], axis=-1, keepdims=True))
    noise[usable] = 1.4826 * np.nanmedian(deviation, axis=-1)
    return np.where(noise > 0, noise, 1.0)


def read_submission(path: Path | str) -> dict[int, float]:
    """Read scores as they were submitted.

    Parameters
    ----------
    path
        File of two columns, ID and score, between which is white space or a
        comma.

    Raises
    ------
    ChallengeError
        Raised for a line that is none of these, or an ID that comes twice.
    """
    scores: dict[int, float] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            name, score = line.replace(",", " ").split()
            key = int(name)
            value = float(score)
        except ValueError as err:
            raise ChallengeError(f"Line {number} of {path} is not an ID and a score: {line!r}.") from err
        if key in scores:
            raise ChallengeError(f"Line {number} of {path} scores object {key} again.")
        scores[key] = value
    return scores


def write_submission(path: Path | str, scores: Mapping[int, float]) -> None:
    """Write scores as they were submitted.

    Parameters
    ----------
    path
        The file.
    scores
        Score of each object, by its ID.
    """
    Path(path).write_text("".join(f"{number}, {score:.8g}\n" for number, score in scores.items()))


# Scores


def score_images(
    images: Mapping[int, Mapping[str, Path]],
    ids: Sequence[int],
    branch: str,
    models: Sequence[ModelPackage],
    config: InferenceConfig,
    *,
    zero_point: float = 0.0,
    num_threads: int = 1,
) -> Iterator[tuple[int, float]]:
    """Score objects by networks.

    Parameters
    ----------
    images
        From `find_images`.
    ids
        IDs of the objects.
    branch
        Key of `BRANCHES`.
    models
        Model packages, over whose logits the mean is taken.
    config
        How networks run.
    zero_point
        AB magnitude of a pixel value of 1.
    num_threads
        Threads that may be used on a CPU.

    Yields
    ------
    id, score
        Logits; NaN for objects with pixels that are neither masked nor
        finite.

    Raises
    ------
    ChallengeError
        Raised as by `read_cutouts`.
    EvaluationError, ModelPackageError
        Raised if a model does not fit.
    """
    networks = [LensNetwork.from_package(model) for model in models]
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        cutouts = read_cutouts(images, chunk, branch, zero_point=zero_point)
        spoilt = (~cutouts.bad & ~np.isfinite(cutouts.image)).any(axis=(1, 2, 3))
        scores = np.full(len(chunk), np.nan)
        logits = [network.score(cutouts[~spoilt], config, num_threads) for network in networks]
        scores[~spoilt] = np.mean(logits, axis=0)
        yield from zip(chunk, scores.tolist(), strict=True)


@dataclasses.dataclass(frozen=True)
class ChallengeScore:
    """The figures of merit of the challenge."""

    auroc: float
    """Area under the ROC curve."""

    auroc_error: float
    """Its standard error."""

    tpr0: Fraction
    """True-positive rate before any false positive."""

    tpr10: Fraction
    """True-positive rate with less than ten false positives."""

    n_lenses: int
    """Number of lenses."""

    n_non_lenses: int
    """Number of non-lenses."""

    n_excluded: int
    """Number of objects that count for nothing, for they have no score."""

    def describe(self, branch: str, name: str = "this one") -> str:
        """Return the table of the paper with this entry in its place.

        Parameters
        ----------
        branch
            Key of `BRANCHES`.
        name
            What to call this entry.
        """
        rows = [(*row, "") for row in PUBLISHED[branch]]
        place = sum(row[1] >= round(self.auroc, 2) for row in rows)
        tpr0, tpr10 = (f"{t.value:.3f} [{t.low:.3f}, {t.high:.3f}]" for t in (self.tpr0, self.tpr10))
        note = f"AUROC {self.auroc:.4f} +- {self.auroc_error:.4f}, TPR0 {tpr0}, TPR10 {tpr10}"
        rows.insert(place, (name, self.auroc, self.tpr0.value, self.tpr10.value, "  <--"))
        lines = [f"{'entry':32} AUROC  TPR0  TPR10"]
        lines += [f"{row[0]:32} {row[1]:5.2f} {row[2]:5.2f}  {row[3]:5.2f}{row[4]}" for row in rows]
        lines += [
            "",
            f"{name}: {note}",
            f"{self.n_lenses} lenses, {self.n_non_lenses} non-lenses, {self.n_excluded} without a score.",
        ]
        if self.n_lenses + self.n_non_lenses != 100_000:
            lines.append("TPR0 and TPR10 are defined for 100,000 objects; here they are other rates.")
        return "\n".join(lines)


def score_challenge(
    scores: Mapping[int, float], catalog: Table, *, cuts: Mapping[str, float] | None = None
) -> ChallengeScore:
    """Return the figures of merit of the challenge.

    Parameters
    ----------
    scores
        Score of each object, by its ID; NaN for those without.
    catalog
        From `read_catalog`.
    cuts
        Smallest value of columns of the catalogue that lenses must have to
        count, such as ``numb_pix_lensed_image``; non-lenses always count, as
        in section 5 of the paper.

    Raises
    ------
    ChallengeError
        Raised if scores are of other objects, or if objects, lenses or
        non-lenses have none.
    """
    if unknown := set(scores) - set(np.asarray(catalog["ID"]).tolist()):
        raise ChallengeError(
            f"{len(unknown)} of {len(scores)} scores are of objects that the key does not have, such as "
            f"{min(unknown)}."
        )
    labels = np.asarray(catalog["is_lens"], dtype=bool)
    counts = np.ones_like(labels)
    for column, lowest in (cuts or {}).items():
        if column not in catalog.colnames:
            raise ChallengeError(f"The key has no column {column!r}; it has {', '.join(catalog.colnames)}.")
        counts &= ~labels | (np.asarray(catalog[column], dtype=np.float64) >= lowest)
    values = np.array([scores.get(number, math.nan) for number in np.asarray(catalog["ID"]).tolist()])
    scored = np.isfinite(values)
    part = counts & scored
    values, labels = values[part], labels[part]
    n1, n0 = int(labels.sum()), int((~labels).sum())
    if n1 == 0 or n0 == 0:
        raise ChallengeError(f"There are scores of {n1} lenses and {n0} non-lenses; both are needed.")
    auroc, error = compute_auroc(values, labels)
    return ChallengeScore(
        auroc=auroc,
        auroc_error=error,
        tpr0=compute_operating_point(values, labels, false_positives=0).tpr,
        tpr10=compute_operating_point(values, labels, false_positives=9).tpr,
        n_lenses=n1,
        n_non_lenses=n0,
        n_excluded=int((counts & ~scored).sum()),
    )


# Training


def make_training_table(
    cutouts: Cutouts,
    catalog: Table,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    calibration: float = 0.05,
) -> Table:
    """Return stamps as examples for `TrainLensFinderTask`.

    Parameters
    ----------
    cutouts
        Stamps of objects of the catalogue.
    catalog
        From `read_catalog`.
    validation, test, calibration
        Fractions of the objects in these splits, drawn by their IDs.

    Returns
    -------
    examples
        `Cutouts.to_table` with the columns that `SimulateLensesTask` adds.
        Einstein radii and signal to noise are NaN, for the units of the key
        are not documented.  Stamps with pixels that are neither masked nor
        finite are left out.
    """
    truth = dict(zip(np.asarray(catalog["ID"]).tolist(), np.asarray(catalog["is_lens"]), strict=True))
    cutouts = cutouts[(cutouts.bad | np.isfinite(cutouts.image)).all(axis=(1, 2, 3))]
    label = np.array([bool(truth[number]) for number in cutouts.ids.tolist()], dtype=bool)
    place = np.array([compute_seed("challenge", number) / 2**62 for number in cutouts.ids.tolist()])
    edges = np.cumsum([test, validation, calibration])
    split = np.array(["test", "validation", "calibration", "train"])[np.searchsorted(edges, place, "right")]
    n = len(cutouts)
    unknown = np.full(n, np.nan, dtype=np.float32)
    values: dict[str, Any] = {
        "label": label,
        "kind": np.where(label, "lens", "no source"),
        "host_id": cutouts.ids,
        "source_id": np.full(n, -1),
        "einstein_radius": unknown,
        "magnification": unknown,
        "arc_snr": unknown,
        "split": split,
        "seed": np.zeros(n, dtype=np.int64),
    }
    table = cutouts.to_table()
    for name, unit, description in EXAMPLE_COLUMNS:
        table[name] = Column(values[name], unit=unit, description=description)
    return table

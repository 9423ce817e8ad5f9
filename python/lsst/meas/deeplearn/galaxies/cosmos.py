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


"""Training sets of galaxy images, from COSMOS or of known truth."""

from __future__ import annotations

__all__ = ("GalaxySet", "GalaxySetError", "read_cosmos_set")

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import galsim
import numpy as np

from lsst.utils.logging import PeriodicLogger

from .fourier import (
    compute_noise_power,
    compute_transform,
    draw_noise,
    invert_transform,
    truncate_transform,
)

_LOG = logging.getLogger(__name__)

COSMOS_PIXEL_SCALE = 0.03
"""Side in arcsec of the pixels of the COSMOS images."""

COSMOS_ZERO_POINT = 25.94
"""AB magnitude in F814W of one count per second in these images."""

COSMOS_NOISE_VARIANCE = 7.46e-6
"""Median variance of the noise in these images, in squared counts per
second."""

MAX_BAD_FRACTION = 0.02
"""Largest fraction of unusable pixels in a stamp that is repaired."""


MIN_SKY_CELLS = 20
"""Least number of squares on the sky between which galaxies are divided."""


class GalaxySetError(ValueError):
    """Raised for images that cannot be trained on."""


@dataclasses.dataclass(frozen=True, eq=False)
class GalaxySet:
    """Images of N galaxies with all that is needed to model them.

    Grids are those of `fourier`.
    """

    pixel_scale: float
    """Side of a pixel in arcsec."""

    ids: np.ndarray
    """Number of each galaxy, int64, shape ``(N,)``."""

    image: np.ndarray
    """Images with PSF and noise, for a flux of 1, float32, shape
    ``(N, S, S)``."""

    psf: np.ndarray
    """PSFs with their pixel, of unit flux, float32, shape ``(P, S, S)``."""

    psf_index: np.ndarray
    """Which of them a galaxy has, int64, shape ``(N,)``."""

    noise_power: np.ndarray
    """Power of the noise in each mode as of `compute_noise_power`, float32,
    shape ``(S, S / 2 + 1)``."""

    noise_variance: np.ndarray
    """Factor on that for each galaxy, for a flux of 1, shape ``(N,)``."""

    conditions: np.ndarray
    """Half-light radius in arcsec, magnitude and redshift, shape
    ``(N, 3)``."""

    sky: np.ndarray
    """Right ascension and declination in degrees, shape ``(N, 2)``; NaN where
    there are none."""

    extent: np.ndarray | None = None
    """Lower and upper borders of the stamps from which images were made, as
    (y, x, y, x) in pixels of the grid, shape ``(N, 4)``; what is outside is
    noise.  `None` where galaxies fill the grid."""

    flux: np.ndarray | None = None
    """Flux of the catalogue magnitudes in the unit of the catalogue, shape
    ``(N,)``, where it is known."""

    truth: np.ndarray | None = None
    """The images without noise and with `truth_fwhm` for PSF, float32, shape
    ``(N, S, S)``, where they are known."""

    truth_fwhm: float = 0.0
    """Width of the Gaussian PSF of `truth` in arcsec."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self.image.shape[-1]

    def __getitem__(self, index: np.ndarray | slice) -> GalaxySet:
        """Return some of the galaxies, with all PSFs."""
        names = ["ids", "image", "psf_index", "noise_variance", "conditions", "sky"]
        arrays: dict[str, Any] = {name: getattr(self, name)[index] for name in names}
        for name in ("extent", "flux", "truth"):
            value = getattr(self, name)
            arrays[name] = None if value is None else value[index]
        return dataclasses.replace(self, **arrays)

    def split(self, fraction: float, *, seed: int = 0) -> tuple[GalaxySet, GalaxySet]:
        """Divide into galaxies to train on and galaxies held out.

        Where positions are known, galaxies are held out by squares of 0.05
        degrees on the sky, so that neighbours are not on both sides; by
        smaller ones where all lie in less than twenty.

        Parameters
        ----------
        fraction
            Fraction to hold out, in (0, 1).
        seed
            Seed of the choice.

        Returns
        -------
        rest, held_out
            Neither is empty.

        Raises
        ------
        GalaxySetError
            Raised if one would be.
        """
        no_sky = ~np.isfinite(self.sky).all(axis=1)
        for side in (0.05, 0.0125, 0.003):
            cells = np.nan_to_num(np.floor(self.sky / side), nan=-1e6).astype(np.int64)
            cells[no_sky, 0] = self.ids[no_sky]
            unique, groups = np.unique(cells, axis=0, return_inverse=True)
            if len(unique) >= MIN_SKY_CELLS:
                break
        held_out = (np.random.default_rng(seed).uniform(size=len(unique)) < fraction)[groups.ravel()]
        if held_out.all() or not held_out.any():
            raise GalaxySetError(
                f"Holding out {fraction} of {len(self)} galaxies in {len(unique)} places leaves a side empty."
            )
        return self[~held_out], self[held_out]


def read_cosmos_set(
    file_name: str | Path,
    *,
    size: int = 128,
    pixel_scale: float = 2 * COSMOS_PIXEL_SCALE,
    exclusion_level: str = "marginal",
    max_galaxies: int | None = None,
    seed: int = 0,
) -> GalaxySet:
    """Read galaxies of the COSMOS catalogue of GalSim.

    Stamps are filled up with noise, brought to the larger pixels in Fourier
    space, centred, and divided by the flux of the catalogue magnitude.

    Parameters
    ----------
    file_name
        The catalogue, such as ``real_galaxy_catalog_25.2.fits``; the files
        of fits and of selections lie beside it.
    size
        Even number of pixels on a side.
    pixel_scale
        Side of a pixel in arcsec, a multiple of the 0.03 arcsec of COSMOS.
    exclusion_level
        Selection as of `galsim.COSMOSCatalog`.
    max_galaxies
        Number of galaxies to take, chosen at random; all by default.
    seed
        Seed of that choice and of the noise around the stamps.

    Raises
    ------
    GalaxySetError
        Raised if the files are not there, the pixel scale does not fit, or
        no galaxy is usable.

    Notes
    -----
    Galaxies lose what their stamp does not hold; stamps larger than the grid
    are cropped.  Galaxies without fit, without redshift, or with too many
    unusable pixels are left out.  The half-light radius is that of the Sersic
    fit, on the geometric mean of the half axes.
    """
    ratio = round(pixel_scale / COSMOS_PIXEL_SCALE)
    if ratio < 1 or abs(ratio * COSMOS_PIXEL_SCALE / pixel_scale - 1) > 1e-6:
        raise GalaxySetError(
            f"Pixels of {pixel_scale} arcsec are no multiple of those of COSMOS, {COSMOS_PIXEL_SCALE} arcsec."
        )
    if not Path(file_name).exists():
        raise GalaxySetError(f"There is no {file_name}; run galsim_download_cosmos to get it.")
    try:
        catalog = galsim.COSMOSCatalog(str(file_name), exclusion_level=exclusion_level)
    except (OSError, KeyError) as err:
        raise GalaxySetError(
            f"{file_name} or the files of fits and selection beside it are not a COSMOS catalogue ({err}); "
            "run galsim_download_cosmos to get them."
        ) from err
    rng = np.random.default_rng([seed, 1])
    rows = np.arange(catalog.nobjects)
    if max_galaxies is not None and max_galaxies < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_galaxies, replace=False))
    parts, progress = [], PeriodicLogger(_LOG)
    noise_image, _, _ = catalog.real_cat.getNoiseProperties(int(catalog.orig_index[rows[0]]))
    correlation = None if noise_image is None else noise_image.array
    native_power = compute_noise_power(correlation, ratio * size)
    for done, row in enumerate(rows):
        index = int(catalog.orig_index[row])
        if (part := _read_cosmos_galaxy(catalog, index, native_power, size, ratio, rng)) is not None:
            parts.append(part)
        progress.log("Read %d of %d galaxies.", done + 1, len(rows))
    if not parts:
        raise GalaxySetError(f"None of the {len(rows)} galaxies of {file_name} is usable.")
    if len(parts) < len(rows):
        _LOG.info("Left out %d of %d galaxies.", len(rows) - len(parts), len(rows))
    columns: dict[str, Any] = {key: np.array([part[key] for part in parts]) for key in parts[0]}
    return GalaxySet(
        pixel_scale=pixel_scale,
        psf_index=np.arange(len(parts)),
        # Flux in a large pixel is that of ratio^2 small ones.
        noise_power=(ratio**2 * truncate_power(native_power, size)).astype(np.float32),
        **columns,
    )


def _read_cosmos_galaxy(
    catalog: galsim.COSMOSCatalog,
    index: int,
    native_power: np.ndarray,
    size: int,
    ratio: int,
    rng: np.random.Generator,
) -> dict[str, Any] | None:
    """Return the parts of a `GalaxySet`, or `None` if it is not usable."""
    fit, real = catalog.param_cat[index], catalog.real_cat
    conditions = np.array([fit["hlr"][0], fit["mag_auto"], fit["zphot"]], dtype=np.float64)
    if not fit["viable_sersic"] or not np.isfinite(conditions).all() or not conditions[0] > 0:
        return None
    stamp = real.getGalImage(index)
    variance = float(real.variance[index])
    bad = ~np.isfinite(stamp.array) | (stamp.array == 0)
    if bad.mean() > MAX_BAD_FRACTION or not variance > 0:
        return None
    padded = math.sqrt(variance) * draw_noise(native_power, rng)
    y, x = _find_centroid(stamp)
    _paste(padded, np.where(bad, np.nan, stamp.array), y=y, x=x)
    flux = 10 ** (-0.4 * (conditions[1] - COSMOS_ZERO_POINT))
    transform = truncate_transform(compute_transform(padded / flux), size)
    psf_stamp = real.getPSFImage(index)
    psf_padded = np.zeros(padded.shape)
    psf_y, psf_x = _find_centroid(psf_stamp)
    _paste(psf_padded, psf_stamp.array / psf_stamp.array.sum(), y=psf_y, x=psf_x)
    psf = truncate_transform(compute_transform(psf_padded), size)
    pixel = 2 * math.pi / size
    image = invert_transform(
        _shift(transform, (y - round(y)) / ratio * pixel, (x - round(x)) / ratio * pixel)
    )
    psf = _shift(psf, (psf_y - round(psf_y)) / ratio * pixel, (psf_x - round(psf_x)) / ratio * pixel)
    rows, columns = stamp.array.shape
    # Pixel centres of the grid have integer numbers.
    low = np.array([-y - 0.5, -x - 0.5]) / ratio + size // 2
    extent = np.concatenate([low, low + np.array([rows, columns]) / ratio])
    return {
        "ids": int(real.ident[index]),
        "extent": extent,
        "flux": flux,
        "image": image.astype(np.float32),
        "psf": invert_transform(psf).astype(np.float32),
        "noise_variance": variance / flux**2,
        "conditions": conditions,
        "sky": _get_sky(real, index),
    }


def _get_sky(real: galsim.RealGalaxyCatalog, index: int) -> np.ndarray:
    """Return right ascension and declination in degrees."""
    if "RA" not in real.cat.names:
        return np.array([np.nan, np.nan])
    return np.array([real.cat["RA"][index], real.cat["DEC"][index]], dtype=np.float64)


def truncate_power(power: np.ndarray, size: int) -> np.ndarray:
    """Return the powers of the modes that a smaller grid has.

    Parameters
    ----------
    power
        Shape ``(S, S / 2 + 1)``.
    size
        Even number of pixels on a side of the smaller grid.
    """
    half = size // 2
    return np.concatenate([power[:half, : half + 1], power[-half:, : half + 1]])


def _find_centroid(stamp: galsim.Image) -> tuple[float, float]:
    """Return the centroid as indices (y, x), by adaptive moments.

    The centre of the stamp if they fail or wander off by more than a tenth.
    """
    moments = stamp.FindAdaptiveMom(strict=False)
    center = (stamp.array.shape[0] - 1) / 2, (stamp.array.shape[1] - 1) / 2
    y, x = moments.moments_centroid.y - stamp.ymin, moments.moments_centroid.x - stamp.xmin
    wandered = math.hypot(y - center[0], x - center[1]) > 0.1 * min(stamp.array.shape)
    return center if moments.error_message or wandered else (y, x)


def _paste(grid: np.ndarray, stamp: np.ndarray, *, y: float, x: float) -> None:
    """Replace pixels of a grid by the finite ones of a stamp.

    The pixel of the stamp that is nearest to (y, x) comes to the origin.
    """
    origin = grid.shape[0] // 2
    target: list[slice] = []
    source: list[slice] = []
    for center, n, size in zip((round(y), round(x)), stamp.shape, grid.shape, strict=True):
        start = origin - center
        low, high = max(start, 0), min(start + n, size)
        target.append(slice(low, high))
        source.append(slice(low - start, high - start))
    part = stamp[source[0], source[1]]
    grid[target[0], target[1]] = np.where(np.isfinite(part), part, grid[target[0], target[1]])


def _shift(transform: np.ndarray, y: float, x: float) -> np.ndarray:
    """Move an image by (-y, -x), in units of 2 pi / S pixels."""
    size = transform.shape[-2]
    ky = np.fft.fftfreq(size, 1 / size)[:, None]
    kx = np.fft.rfftfreq(size, 1 / size)
    return transform * np.exp(1j * (ky * y + kx * x))

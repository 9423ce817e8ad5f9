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


"""Training sets from the galaxies of coadds."""

from __future__ import annotations

__all__ = ("make_coadd_set",)

import numpy as np
from astropy.table import Table

from ..cutouts import Cutouts
from .conditions import CONDITION_NAMES
from .cosmos import MAX_BAD_FRACTION, GalaxySet, GalaxySetError
from .fourier import compute_noise_power


def make_coadd_set(
    cutouts: Cutouts, table: Table, *, size: int, seed: int = 0
) -> tuple[GalaxySet, np.ndarray]:
    """Make a training set of stamps of one band.

    Parameters
    ----------
    cutouts
        Stamps of galaxies, of at least ``size + 1`` pixels.
    table
        Their half-light radius, magnitude, redshift and flux, and
        ``flag_unknown``, as of `CutGalaxiesTask`.
    size
        Even number of pixels on a side of the images.
    seed
        Seed of the noise that replaces bad pixels.

    Returns
    -------
    galaxies
        Images in units of the flux, with the PSF of each object.
    rows
        Which objects they are.

    Raises
    ------
    GalaxySetError
        Raised if stamps are too small, or none is usable.

    Notes
    -----
    Left out are objects with unknown conditions, without PSF, and with more
    than 2 % of bad pixels, which are replaced by noise otherwise.  The noise
    of a stamp is taken to be white, and that of its median variance.
    """
    if cutouts.size < size + 1:
        raise GalaxySetError(
            f"Stamps of {cutouts.size} pixels are too small for images of {size}; set stampSize to "
            f"{size + 1} or more."
        )
    cutouts = cutouts.crop(size + 1)
    bad = cutouts.bad[:, 0] | ~np.isfinite(cutouts.image[:, 0]) | ~(cutouts.variance[:, 0] > 0)
    usable = ~np.asarray(table["flag_unknown"]) & (np.asarray(table["flux"]) > 0) & ~cutouts.bad_psf[:, 0]
    usable &= bad.mean(axis=(1, 2)) <= MAX_BAD_FRACTION
    rows = np.flatnonzero(usable)
    if len(rows) == 0:
        raise GalaxySetError(f"None of {len(cutouts)} stamps has known conditions and enough good pixels.")
    bad = bad[rows]
    flux = np.asarray(table["flux"], dtype=np.float64)[rows]
    variance = np.array(
        [np.median(v[~b]) for v, b in zip(cutouts.variance[rows, 0], bad, strict=True)], dtype=np.float64
    )
    noise = np.random.default_rng(seed).standard_normal(bad.shape)
    image = np.where(bad, np.sqrt(variance)[:, None, None] * noise, cutouts.image[rows, 0])
    # Objects are off the middle of their pixel, and so are their PSFs.
    psf = np.zeros((len(rows), size, size), dtype=np.float32)
    kernel = cutouts.psf[rows, 0]
    reach = min(kernel.shape[-1] // 2, size // 2 - 1)
    middle, source = size // 2, kernel.shape[-1] // 2
    target = slice(middle - reach, middle + reach + 1)
    psf[:, target, target] = kernel[
        :, source - reach : source + reach + 1, source - reach : source + reach + 1
    ]
    galaxies = GalaxySet(
        pixel_scale=cutouts.pixel_scale,
        ids=np.asarray(cutouts.ids)[rows],
        # The last row and column have no partner on the other side.
        image=(image / flux[:, None, None])[:, :size, :size].astype(np.float32),
        psf=psf / psf.sum(axis=(1, 2), keepdims=True),
        psf_index=np.arange(len(rows)),
        noise_power=compute_noise_power(None, size).astype(np.float32),
        noise_variance=variance / flux**2,
        conditions=np.column_stack(
            [np.asarray(table[name], dtype=np.float64)[rows] for name in CONDITION_NAMES]
        ),
        sky=np.column_stack([cutouts.ra[rows], cutouts.dec[rows]]),
    )
    return galaxies, rows

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

"""What a shear estimator is, one that is not calibrated, and AnaCal."""

from __future__ import annotations

__all__ = ("AnaCal", "LinearEstimator", "Regauss", "ShearEstimator")

import math
from typing import Protocol, runtime_checkable

import galsim
import numpy as np

from ..scene import AB_ZERO_POINT
from .shapes import STEPS, Shapes

_VERSIONS = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])


class ShearEstimator(Protocol):
    """Anything that measures the shapes of stamps, and their response."""

    step: float
    """Size of the artificial shear."""

    def measure(
        self,
        images: np.ndarray,
        psf: np.ndarray,
        *,
        noise_sigma: np.ndarray | float = 0.0,
        fixnoise: np.ndarray | None = None,
    ) -> Shapes:
        """Return the shapes of stamps.

        Parameters
        ----------
        images
            Stamps, shape ``(N, y, x)``.
        psf
            Image of a star centred on a pixel, one for all stamps, shape
            ``(y, x)``, or one each, shape ``(N, y, x)``.
        noise_sigma
            Standard deviation of the noise in a pixel, one for all stamps or
            shape ``(N,)``.
        fixnoise
            Another realisation of the noise of each stamp, for estimators
            that add it, shape ``(N, y, x)``.
        """


@runtime_checkable
class LinearEstimator(ShearEstimator, Protocol):
    """An estimator that starts from linear moments, to which noise can be
    added as well as to pixels; its methods are those of
    `lsst.meas.deeplearn.shear.metacal.Metacalibration`.
    """

    def compute_moments(self, images: np.ndarray, psf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the moments of stamps, and the variance of their fluxes.

        Parameters
        ----------
        images
            Stamps, shape ``(N, y, x)``.
        psf
            As for `ShearEstimator.measure`.
        """

    def draw_noise_moments(
        self, psf: np.ndarray, normal: np.ndarray, *, fixnoise: bool = True
    ) -> tuple[np.ndarray, float]:
        """Return moments of noise, and the variance of the flux.

        Parameters
        ----------
        psf
            Image of a star centred on a pixel, shape ``(y, x)``.
        normal
            Standard normal numbers, in the last axis one for each moment, and
            with ``fixnoise`` one more for each.
        fixnoise
            Whether to include the noise that is added to keep the response
            right.
        """

    def compute_shapes(self, moments: np.ndarray, variance: np.ndarray | float) -> Shapes:
        """Return the shapes that follow from moments.

        Parameters
        ----------
        moments
            Moments as from `compute_moments`, a row for each stamp, and next
            to them those of noise that is sheared the other way, if any.
        variance
            That of the flux: as from `compute_moments`, times the variance of
            the noise in a pixel.
        """


class Regauss:
    """Shapes by re-Gaussianization, as the HSM module of GalSim has it.

    Hirata & Seljak (2003, MNRAS 343, 459), with the response that theory
    gives to an object of no noise and elliptical isophotes, 2 - e^2 (Bernstein
    & Jarvis 2002): the response of the correction for the PSF, of the noise
    and of cuts is left out.  That makes it the opposite of metacalibration,
    an estimator whose bias depends on what galaxies look like.

    Parameters
    ----------
    pixel_scale
        Side of a pixel in arcsec.
    min_resolution
        Smallest resolution factor of usable objects, 0 for stars, 1 for
        objects that are much larger than the PSF.
    max_ellipticity
        Largest absolute value of a component of usable ellipticities.
    step
        Shear of the artificial versions; the response is written as if it
        had been measured on them.
    """

    def __init__(
        self,
        *,
        pixel_scale: float,
        min_resolution: float = 0.3,
        max_ellipticity: float = 2.0,
        step: float = 0.01,
    ) -> None:
        self.pixel_scale = pixel_scale
        self.min_resolution = min_resolution
        self.max_ellipticity = max_ellipticity
        self.step = step

    def measure(
        self,
        images: np.ndarray,
        psf: np.ndarray,
        *,
        noise_sigma: np.ndarray | float = 0.0,
        fixnoise: np.ndarray | None = None,
    ) -> Shapes:
        """Return the shapes of stamps.

        Parameters
        ----------
        images, psf, noise_sigma
            As for `ShearEstimator.measure`.
        fixnoise
            Not used.
        """
        stamps = np.asarray(images, dtype=np.float64)
        psfs = np.broadcast_to(np.asarray(psf, dtype=np.float64), (len(stamps), *np.shape(psf)[-2:]))
        e, flux_noise, size = (
            np.full((len(stamps), 2), np.nan),
            np.ones(len(stamps)),
            np.full(len(stamps), np.nan),
        )
        flux = np.full(len(stamps), np.nan)
        settings = galsim.hsm.HSMParams(max_mom2_iter=400)
        star = galsim.Image(psfs[0], scale=self.pixel_scale) if len(stamps) else None
        for k, (stamp, kernel) in enumerate(zip(stamps, psfs, strict=True)):
            if np.ndim(psf) == 3:
                star = galsim.Image(kernel, scale=self.pixel_scale)
            if not (np.isfinite(stamp).all() and np.isfinite(kernel).all()):
                continue
            image = galsim.Image(stamp, scale=self.pixel_scale)
            result = galsim.hsm.EstimateShear(image, star, strict=False, hsmparams=settings)
            ellipticity = (result.corrected_e1, result.corrected_e2)
            if (
                result.error_message
                or result.resolution_factor < self.min_resolution
                or max(map(abs, ellipticity)) > self.max_ellipticity
            ):
                continue
            e[k] = ellipticity
            # The optimal flux of a Gaussian object, and its noise.
            flux[k], flux_noise[k] = result.moments_amp, np.sqrt(4 * np.pi) * result.moments_sigma
            size[k] = (result.moments_sigma / result.psf_sigma) ** 2 if result.psf_sigma > 0 else np.nan
        with np.errstate(divide="ignore"):
            snr = flux / (flux_noise * noise_sigma)
        bad = ~np.isfinite(e).all(axis=1)
        response = 2 - (e**2).sum(axis=1)
        return Shapes(
            self.step,
            e=e[:, None, :] + self.step * response[:, None, None] * _VERSIONS,
            snr=np.repeat(snr[:, None], len(STEPS), axis=1),
            size=np.repeat(size[:, None], len(STEPS), axis=1),
            weight=np.where(bad, 0.0, 1.0)[:, None].repeat(len(STEPS), axis=1),
            bad=bad,
        )


class AnaCal:
    """Shapes by the FPFS estimator of AnaCal, an independent check.

    Fourier power function shapelets (Li & Mandelbaum 2023, arXiv:2208.10522)
    with analytical responses and its own correction for noise (Li et al.
    2025, arXiv:2408.06337), by the package of the authors (GPL-3).  The
    versions under artificial shear are the first order of the responses.

    Objects must be at the centre of their stamps under shear, too: there is
    no response of the centroid.

    Parameters
    ----------
    pixel_scale
        Side of a pixel in arcsec.
    smoothing
        Standard deviation in arcsec of the Gaussian that images are smoothed
        with; ``sigma_shapelets1`` of AnaCal.
    step
        Shear of the artificial versions.

    Raises
    ------
    ImportError
        Raised if AnaCal is not installed.
    """

    def __init__(self, *, pixel_scale: float, smoothing: float = 0.52, step: float = 0.01) -> None:
        try:
            import anacal
        except ImportError as err:
            raise ImportError(
                "This estimator requires the optional 'anacal' package.  Install it directly or via "
                "'pip install meas-deeplearn[anacal]'."
            ) from err
        self._fpfs = anacal.fpfs
        self.pixel_scale = pixel_scale
        self.smoothing = smoothing
        self.step = step

    def measure(
        self,
        images: np.ndarray,
        psf: np.ndarray,
        *,
        noise_sigma: np.ndarray | float = 0.0,
        fixnoise: np.ndarray | None = None,
    ) -> Shapes:
        """Return the shapes of stamps.

        Parameters
        ----------
        images, psf, noise_sigma, fixnoise
            As for `ShearEstimator.measure`; images in nJy.  Stamps with a
            PSF or a noise of their own are measured one by one.
        """
        stamps = np.asarray(images, dtype=np.float64)
        n = len(stamps)
        sigmas = np.broadcast_to(np.asarray(noise_sigma, dtype=np.float64), n)
        good = np.isfinite(stamps).all(axis=(1, 2))
        e, snr = np.full((n, len(STEPS), 2), np.nan), np.full((n, len(STEPS)), np.nan)
        if np.ndim(psf) == 2 and np.ndim(noise_sigma) == 0:
            groups = [np.flatnonzero(good)]
        else:
            groups = [np.array([k]) for k in np.flatnonzero(good)]
        for group in filter(len, groups):
            star = np.asarray(psf if np.ndim(psf) == 2 else psf[group[0]], dtype=np.float64)
            noise = None if fixnoise is None else fixnoise[group]
            e[group], snr[group] = self._measure(stamps[group], star, float(sigmas[group[0]]), noise)
        bad = ~np.isfinite(e).all(axis=(1, 2))
        return Shapes(
            self.step,
            e=e,
            snr=snr,
            size=np.full((n, len(STEPS)), np.nan),
            weight=np.where(bad, 0.0, 1.0)[:, None].repeat(len(STEPS), axis=1),
            bad=bad,
        )

    def _measure(
        self, stamps: np.ndarray, psf: np.ndarray, noise_sigma: float, fixnoise: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ellipticities and signal to noise of all versions."""
        image, places = _make_mosaic(stamps)
        side = stamps.shape[-1] + 1
        star = np.zeros((side, side))
        first = side // 2 - len(psf) // 2
        star[first : first + len(psf), first : first + len(psf)] = psf
        result = self._fpfs.process_image(
            fpfs_config=self._fpfs.FpfsConfig(npix=side, sigma_shapelets1=self.smoothing),
            pixel_scale=self.pixel_scale,
            # Without noise it only sets the unit of the signal to noise.
            noise_variance=noise_sigma**2 or 1.0,
            mag_zero=AB_ZERO_POINT,
            gal_array=image,
            psf_array=star,
            noise_array=None if fixnoise is None else _make_mosaic(fixnoise)[0],
            detection=places,
        )

        def make_versions(name: str, derivative: str) -> np.ndarray:
            change = np.stack([result[f"{derivative}_dg1"], result[f"{derivative}_dg2"]])
            versions: np.ndarray = result[name][:, None] + self.step * (_VERSIONS @ change).T
            return versions

        e = np.stack([make_versions(f"fpfs1_e{i}", f"fpfs1_de{i}") for i in (1, 2)], axis=-1)
        snr = make_versions("s2n_fpfs1", "ds2n_fpfs1") if noise_sigma else np.full(e.shape[:2], np.inf)
        return e, snr


def _make_mosaic(stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of stamps side by side in even cells, and the places of
    their centres.
    """
    n, size, _ = stamps.shape
    columns, cell = math.isqrt(max(n - 1, 0)) + 1, size + 1
    image = np.zeros((columns * cell, columns * cell), dtype=np.float32)
    places = np.empty(n, dtype=[("y", "i4"), ("x", "i4")])
    for k, stamp in enumerate(stamps):
        y, x = (cell * index for index in divmod(k, columns))
        image[y + 1 : y + cell, x + 1 : x + cell] = stamp
        places[k] = (y + cell // 2, x + cell // 2)
    return image, places

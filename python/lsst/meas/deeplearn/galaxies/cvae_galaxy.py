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


"""Galaxies of a trained model as profiles of GalSim, and in its YAML files.

With ``modules: [lsst.meas.deeplearn.galaxies.cvae_galaxy]`` a configuration
file of GalSim has two ways to draw them.  The input ``cvae_catalog`` draws the
galaxies of a catalogue in batches, once for each output file, and objects
of type ``CvaeCatalogGalaxy`` take them from there::

    modules:
      - lsst.meas.deeplearn.galaxies.cvae_galaxy
    input:
      cvae_catalog:
        model: galaxy_cvae.safetensors
        file_name: galaxies.fits  # half_light_radius, magnitude, redshift
        outside: clip
    gal:
      type: CvaeCatalogGalaxy
      shear: {type: G1G2, g1: 0.02, g2: 0.0}

The input ``cvae_model`` draws objects of type ``CvaeGalaxy`` one by one, for
conditions that the file computes in any way that GalSim has::

    input:
      cvae_model:
        file_name: galaxy_cvae.safetensors
    gal:
      type: CvaeGalaxy
      half_light_radius: {type: Random, min: 0.2, max: 0.5}  # arcsec
      magnitude: 23.0  # AB, F814W
      redshift: 0.7
      flux: 10.0  # optional

Galaxies follow the random seed of the file: the same seed draws the same
galaxies, in whatever order and with however many processes.
"""

from __future__ import annotations

__all__ = ("CvaeCatalog", "CvaeGalaxy", "CvaeModel", "make_profile")

import functools
import logging
from typing import TYPE_CHECKING, Any, ClassVar

import galsim
import numpy as np
from astropy.table import Table
from galsim.config import InputLoader, RegisterInputType, RegisterObjectType

from ..model_package import ModelPackage
from .conditions import check_galaxy_model

if TYPE_CHECKING:
    from .cvae_sampling import CvaeSampler

NJY_ZERO_POINT = 31.4
"""AB magnitude of one nJy."""


CATALOG_BATCH_SIZE = 16
"""Galaxies of a catalogue that are decoded at once."""


@functools.lru_cache(maxsize=4)
def _make_sampler(file_name: str, outside: str, batch_size: int = 1, device: str = "cpu") -> CvaeSampler:
    """Return the sampler of a model, which is loaded once a process."""
    from .cvae_sampling import CvaeSampler

    return CvaeSampler(ModelPackage.read(file_name), outside=outside, batch_size=batch_size, device=device)


def make_profile(
    image: np.ndarray, *, pixel_scale: float, flux: float, gsparams: galsim.GSParams | None = None
) -> galsim.GSObject:
    """Return a drawn galaxy as a profile.

    Parameters
    ----------
    image
        What `CvaeSampler.draw` returns for a galaxy, shape ``(y, x)``.
    pixel_scale
        Side of its pixels in arcsec.
    flux
        Flux of the profile.
    gsparams
        Accuracy of drawing.
    """
    pixels = galsim.ImageF(np.ascontiguousarray(image, dtype=np.float32), scale=pixel_scale)
    return galsim.InterpolatedImage(pixels, flux=flux, gsparams=gsparams)


class CvaeModel:
    """A trained galaxy model in a file.

    Parameters
    ----------
    file_name
        Path or URI of the ``.safetensors`` file.
    outside
        What to do with conditions outside the hull of the training set:
        ``"raise"`` an error, ``"clip"`` them to it, or ``"flag"``: take them
        as they are, and set `CvaeGalaxy.is_outside`.

    Raises
    ------
    FileNotFoundError
        Raised if there is no such file.
    ModelPackageError
        Raised if it is not a galaxy model.

    Notes
    -----
    The network is loaded when the first galaxy is drawn, in each process of
    its own.
    """

    _req_params: ClassVar[dict[str, type]] = {"file_name": str}
    _opt_params: ClassVar[dict[str, type]] = {"outside": str}
    _single_params: ClassVar[list[dict[str, type]]] = []
    _takes_rng: ClassVar[bool] = False

    def __init__(self, file_name: str, outside: str = "raise") -> None:
        self.file_name = str(file_name)
        self.outside = outside
        if outside not in ("raise", "clip", "flag"):
            raise ValueError(f"Conditions outside the training set can raise, clip or flag, not {outside!r}.")
        package = ModelPackage.read(self.file_name)
        check_galaxy_model(package)
        self.digest = package.digest

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, CvaeModel)
            and (self.file_name, self.outside) == (other.file_name, other.outside)
            and self.digest == other.digest
        )

    def __hash__(self) -> int:
        return hash((self.file_name, self.outside, self.digest))

    def __repr__(self) -> str:
        return f"{CvaeModel.__module__}.CvaeModel({self.file_name!r}, outside={self.outside!r})"

    def make_galaxy(
        self,
        half_light_radius: float,
        magnitude: float,
        redshift: float,
        *,
        seed: int,
        flux: float | None = None,
        gsparams: galsim.GSParams | None = None,
    ) -> CvaeGalaxy:
        """Return a galaxy.

        Parameters
        ----------
        half_light_radius, magnitude, redshift, seed, flux, gsparams
            As for `CvaeGalaxy`.
        """
        return CvaeGalaxy(
            self, half_light_radius, magnitude, redshift, seed=seed, flux=flux, gsparams=gsparams
        )


class CvaeGalaxy(galsim.GSObject):
    """A galaxy drawn from a trained model, as a profile of GalSim.

    The profile is without PSF and noise, smoothed by the Gaussian of the
    model (0.13 arcsec FWHM by default) and cut off at the border of its
    stamp (7.7 arcsec).  The seed also mirrors it or not, and turns it by any
    angle.

    Parameters
    ----------
    model
        The model, or the path of its file.
    half_light_radius
        Half-light radius in arcsec.
    magnitude
        AB magnitude.
    redshift
        Redshift.
    seed
        Seed of the shape and of the orientation, not negative.
    flux
        Flux of the profile, of any sign as with other profiles; that of the
        magnitude in nJy by default.
    gsparams
        Accuracy of drawing.
    image
        What `CvaeSampler.draw` returns for these conditions and this seed, if
        it is at hand.

    Raises
    ------
    ConditionError
        Raised for conditions that no galaxy has, and for those outside the
        training set unless the model is told otherwise.
    """

    _req_params: ClassVar[dict[str, type]] = {
        "half_light_radius": float,
        "magnitude": float,
        "redshift": float,
    }
    _opt_params: ClassVar[dict[str, type]] = {"flux": float, "seed": int}
    _has_hard_edges = False
    _is_axisymmetric = False
    _is_analytic_x = True
    _is_analytic_k = True

    def __init__(
        self,
        model: CvaeModel | str,
        half_light_radius: float,
        magnitude: float,
        redshift: float,
        *,
        seed: int = 0,
        flux: float | None = None,
        gsparams: galsim.GSParams | None = None,
        image: np.ndarray | None = None,
    ) -> None:
        self.model = model if isinstance(model, CvaeModel) else CvaeModel(model)
        self.half_light_radius = float(half_light_radius)
        self.magnitude = float(magnitude)
        self.redshift = float(redshift)
        self.seed = int(seed)
        if self.seed < 0:
            raise ValueError(f"Seeds are not negative; this one is {self.seed}.")
        if flux is None:
            flux = 10 ** (-0.4 * (self.magnitude - NJY_ZERO_POINT))
        if not np.isfinite(flux):
            raise ValueError(f"The flux of a galaxy must be finite; it is {flux}.")
        self._total_flux = float(flux)
        self._gsparams = galsim.GSParams.check(gsparams)
        conditions = np.array([[self.half_light_radius, self.magnitude, self.redshift]])
        sampler = _make_sampler(self.model.file_name, self.model.outside)
        _, outside = sampler.check(conditions)
        self.is_outside = bool(outside[0])
        """Whether the conditions are outside those of the training set."""
        self._image = sampler.draw(conditions, [self.seed])[0] if image is None else image
        self._pixel_scale = sampler.pixel_scale

    @galsim.utilities.lazy_property
    def _profile(self) -> galsim.GSObject:
        return make_profile(
            self._image,
            pixel_scale=self._pixel_scale,
            flux=self._total_flux,
            gsparams=self._gsparams,
        )

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, CvaeGalaxy) and self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        conditions = (self.half_light_radius, self.magnitude, self.redshift)
        return (self.model, *conditions, self.seed, self._total_flux, self._gsparams)

    def __repr__(self) -> str:
        return (
            f"{CvaeGalaxy.__module__}.CvaeGalaxy({self.model!r}, {self.half_light_radius!r}, "
            f"{self.magnitude!r}, {self.redshift!r}, seed={self.seed!r}, flux={self._total_flux!r}, "
            f"gsparams={self._gsparams!r})"
        )

    def __str__(self) -> str:
        return (
            f"CvaeGalaxy(half_light_radius={self.half_light_radius}, magnitude={self.magnitude}, "
            f"redshift={self.redshift}, seed={self.seed}, flux={self._total_flux})"
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_profile", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state

    # What GalSim asks of a profile is what the interpolated image answers.

    @property
    def _maxk(self) -> float:
        return float(self._profile.maxk)

    @property
    def _stepk(self) -> float:
        return float(self._profile.stepk)

    @property
    def _centroid(self) -> galsim.PositionD:
        return self._profile.centroid

    @property
    def _flux(self) -> float:
        return self._total_flux

    @property
    def _positive_flux(self) -> float:
        return float(self._profile.positive_flux)

    @property
    def _negative_flux(self) -> float:
        return float(self._profile.negative_flux)

    @galsim.utilities.lazy_property
    def _flux_per_photon(self) -> float:
        return float(self._calculate_flux_per_photon())

    @property
    def _max_sb(self) -> float:
        return float(self._profile.max_sb)

    def _xValue(self, pos: galsim.PositionD) -> float:
        return float(self._profile._xValue(pos))

    def _kValue(self, kpos: galsim.PositionD) -> complex:
        return complex(self._profile._kValue(kpos))

    def _drawReal(self, image: galsim.Image, *args: Any, **kwargs: Any) -> None:
        self._profile._drawReal(image, *args, **kwargs)

    def _drawKImage(self, image: galsim.Image, *args: Any, **kwargs: Any) -> None:
        self._profile._drawKImage(image, *args, **kwargs)

    def _shoot(self, photons: galsim.PhotonArray, rng: galsim.BaseDeviate) -> None:
        self._profile._shoot(photons, rng)


def _build_cvae_galaxy(
    config: dict[str, Any],
    base: dict[str, Any],
    ignore: list[str],
    gsparams: dict[str, Any] | None,
    logger: logging.Logger | None,
) -> tuple[CvaeGalaxy, bool]:
    """Build an object of type ``CvaeGalaxy``, as GalSim calls it."""
    model = galsim.config.GetInputObj("cvae_model", config, base, "CvaeGalaxy")
    kwargs, safe = galsim.config.GetAllParams(
        config, base, req=CvaeGalaxy._req_params, opt=CvaeGalaxy._opt_params, ignore=[*ignore, "num"]
    )
    if "seed" not in kwargs:
        rng = galsim.config.GetRNG(config, base, logger, "CvaeGalaxy")
        # raw() has 32 bits, of which two galaxies in 77,000 share all.
        kwargs["seed"] = int(rng.raw()) << 32 | int(rng.raw())
        safe = False
    galaxy = model.make_galaxy(**kwargs, gsparams=galsim.GSParams(**gsparams) if gsparams else None)
    if galaxy.is_outside and logger is not None:
        logger.warning("obj %s: %s is outside the training set.", base.get("obj_num", 0), galaxy)
    return galaxy, safe


class CvaeCatalog:
    """The galaxies of a catalogue, drawn in batches when it is read.

    A galaxy depends on the seed and on its row, and to the last bit on the
    rows of its batch.

    Parameters
    ----------
    model
        Path or URI of the ``.safetensors`` file.
    file_name
        Table in a format that astropy reads (FITS, ECSV, Parquet).
    rng
        Source of the seeds.
    half_light_radius, magnitude, redshift
        Names of the columns with the conditions: arcsec, AB, redshift.
    flux
        Name of the column with fluxes; by default those of the magnitudes in
        nJy.
    outside
        As for `CvaeModel`.
    batch_size
        Number of galaxies to decode at once.
    device
        Where to, as torch names it.

    Raises
    ------
    FileNotFoundError
        Raised if there is no such file.
    ModelPackageError
        Raised if it is not a galaxy model.
    KeyError
        Raised if a column is not in the table.
    ConditionError
        Raised for conditions that no galaxy has, and for those outside the
        training set unless told otherwise.
    ValueError
        Raised for fluxes that are missing, zero or negative.
    """

    _req_params: ClassVar[dict[str, type]] = {"model": str, "file_name": str}
    _opt_params: ClassVar[dict[str, type]] = {
        "half_light_radius": str,
        "magnitude": str,
        "redshift": str,
        "flux": str,
        "outside": str,
        "batch_size": int,
        "device": str,
    }
    _single_params: ClassVar[list[dict[str, type]]] = []
    _takes_rng: ClassVar[bool] = True

    def __init__(
        self,
        model: str,
        file_name: str,
        *,
        rng: galsim.BaseDeviate,
        half_light_radius: str = "half_light_radius",
        magnitude: str = "magnitude",
        redshift: str = "redshift",
        flux: str | None = None,
        outside: str = "raise",
        batch_size: int = CATALOG_BATCH_SIZE,
        device: str = "cpu",
    ) -> None:
        self.model = CvaeModel(model, outside)
        table = Table.read(file_name)
        columns = [half_light_radius, magnitude, redshift, *([flux] if flux else [])]
        if missing := [name for name in columns if name not in table.colnames]:
            raise KeyError(f"{file_name} has no columns {missing}; it has {table.colnames}.")
        values = [np.ma.filled(np.ma.asarray(table[name], dtype=np.float64), np.nan) for name in columns]
        self._conditions = np.column_stack(values[:3])
        self._fluxes = None if flux is None else values[3]
        if self._fluxes is not None and not (valid := self._fluxes > 0).all():
            row = int(np.flatnonzero(~valid)[0])
            raise ValueError(
                f"{(~valid).sum()} of {len(valid)} galaxies of {file_name} have no positive flux in column "
                f"{flux!r}, such as row {row} with {self._fluxes[row]}.  Leave them out."
            )
        seed = rng.raw()
        seeds = np.random.SeedSequence(seed).generate_state(len(table), np.uint64) >> np.uint64(1)
        self._seeds = seeds.astype(np.int64)
        sampler = _make_sampler(self.model.file_name, outside, batch_size, device)
        self._images = sampler.draw(self._conditions, self._seeds)

    def getNObjects(self) -> int:
        """Return the number of galaxies."""
        return len(self._conditions)

    def make_galaxy(
        self, index: int, *, flux: float | None = None, gsparams: galsim.GSParams | None = None
    ) -> CvaeGalaxy:
        """Return the galaxy of a row.

        Parameters
        ----------
        index
            Number of the row, from 0.
        flux
            Flux of the profile; by default that of the catalogue.
        gsparams
            Accuracy of drawing.

        Raises
        ------
        IndexError
            Raised if there is no such row.
        """
        if not 0 <= index < len(self._conditions):
            raise IndexError(f"There is no galaxy {index} in a catalogue of {len(self._conditions)}.")
        if flux is None and self._fluxes is not None:
            flux = float(self._fluxes[index])
        radius, magnitude, redshift = self._conditions[index].tolist()
        return CvaeGalaxy(
            self.model,
            radius,
            magnitude,
            redshift,
            seed=int(self._seeds[index]),
            flux=flux,
            gsparams=gsparams,
            image=self._images[index],
        )


def _build_catalog_galaxy(
    config: dict[str, Any],
    base: dict[str, Any],
    ignore: list[str],
    gsparams: dict[str, Any] | None,
    logger: logging.Logger | None,
) -> tuple[CvaeGalaxy, bool]:
    """Build an object of type ``CvaeCatalogGalaxy``, as GalSim calls it."""
    catalog = galsim.config.GetInputObj("cvae_catalog", config, base, "CvaeCatalogGalaxy")
    # Rows are counted from the first object of the file.
    galsim.config.SetDefaultIndex(config, catalog.getNObjects())
    kwargs, safe = galsim.config.GetAllParams(
        config, base, req={"index": int}, opt={"flux": float}, ignore=[*ignore, "num"]
    )
    return catalog.make_galaxy(**kwargs, gsparams=galsim.GSParams(**gsparams) if gsparams else None), safe


# Without proxy each process has a copy, and a network of its own; catalogues
# are drawn before there are processes.
RegisterInputType("cvae_model", InputLoader(CvaeModel, use_proxy=False))
RegisterInputType("cvae_catalog", InputLoader(CvaeCatalog, has_nobj=True, use_proxy=False))
RegisterObjectType("CvaeGalaxy", _build_cvae_galaxy, input_type="cvae_model")
RegisterObjectType("CvaeCatalogGalaxy", _build_catalog_galaxy, input_type="cvae_catalog")

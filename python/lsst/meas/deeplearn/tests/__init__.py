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

"""Small coadds, models and repositories for tests."""

from __future__ import annotations

__all__ = (
    "make_test_coadd",
    "make_test_coadds",
    "make_test_galaxy_model",
    "make_test_model",
    "make_test_repository",
)

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np

from lsst.daf.butler import Butler
from lsst.images import YX, Box, SkyProjection, TractFrame
from lsst.images.cells import CellCoadd, CellGrid, PatchDefinition

from ..model_package import ModelPackage, ModelSettings
from ..preprocessing import Preprocessing
from ..repository import (
    CellSkyMap,
    make_cell_coadd,
    make_tangent_wcs,
    register_dataset_types,
    register_sky_map,
)

PSF_SIZE = 21
"""Side in pixels of the PSF images of test coadds."""


def make_test_coadd(
    band: str = "i",
    *,
    shape: tuple[int, int] = (300, 300),
    start: tuple[int, int] = (1200, 600),
    n_cells: tuple[int, int] = (2, 2),
    seed: int = 1,
    unit: u.UnitBase = u.nJy,
    background: float = 0.0,
    noise: float = 5.0,
    sources: Iterable[tuple[float, float, float]] = (),
    psf_fwhm: float = 3.5,
    missing_cells: Collection[tuple[int, int]] = (),
    mask_boxes: Mapping[str, Box] | None = None,
    patch: PatchDefinition | None = None,
    sky_projection: SkyProjection[TractFrame] | None = None,
) -> CellCoadd:
    """Make a small coadd of stars on white noise.

    Parameters
    ----------
    band
        Name of the band; bands have different noise.
    shape
        Number of pixels along y and x, multiples of ``n_cells``.
    start
        First pixel (y, x).
    n_cells
        Number of cells along y and x.
    seed
        Seed of the noise.
    unit
        Unit of the image.
    background
        Constant to add to the image.
    noise
        Standard deviation of the noise in a pixel.  If 0 the image has no
        noise and a variance of 1.
    sources
        Stars: x, y in pixels of the coadd, counted from where ``start``
        says, and flux.
    psf_fwhm
        Width of the Gaussian PSF in pixels.
    missing_cells
        Row and column of the cells that have no data.
    mask_boxes
        Pixels in which a mask plane is set, by the name of the plane.
    patch
        Geometry of the patch, instead of ``shape``, ``start`` and
        ``n_cells``.
    sky_projection
        Map to the sky; pixels of 0.2 arcsec, tangent at (150, 2) degrees at
        pixel (1000, 1000), by default.
    """
    if patch is None:
        patch = _make_patch(shape, start, n_cells)
    box = patch.outer_bbox
    if sky_projection is None:
        wcs = make_tangent_wcs(ra=150.0, dec=2.0, pixel_scale=0.2, x=1000.0, y=1000.0)
        frame = TractFrame(skymap="test", tract=0, bbox=box)
        sky_projection = SkyProjection.from_fits_wcs(wcs, frame, pixel_bounds=box)
    # Patches that overlap do not share their noise.
    rng = np.random.default_rng([seed, *band.encode(), *np.abs(box.start)])
    image = background + noise * rng.standard_normal(box.shape)
    for x, y, flux in sources:
        _add_star(image, x - box.x.start, y - box.y.start, flux, psf_fwhm)
    mask_planes = {}
    for name, mask_box in (mask_boxes or {}).items():
        mask_planes[name] = np.zeros(box.shape, dtype=bool)
        mask_planes[name][mask_box.slice_within(box)] = True
    psf = _make_gaussian(PSF_SIZE // 2, PSF_SIZE // 2, (PSF_SIZE, PSF_SIZE), psf_fwhm)
    return make_cell_coadd(
        image,
        np.full(box.shape, noise**2 if noise > 0 else 1.0),
        np.broadcast_to(psf / psf.sum(), (*patch.cells.grid_size.as_tuple(), *psf.shape)),
        band=band,
        patch=patch,
        sky_projection=sky_projection,
        mask_planes=mask_planes,
        missing_cells=missing_cells,
        unit=unit,
    )


def make_test_coadds(bands: Iterable[str] = "gri", **kwargs: Any) -> dict[str, CellCoadd]:
    """Make small coadds of the same stars in several bands.

    Parameters
    ----------
    bands
        Names of the bands.
    **kwargs
        Passed to `make_test_coadd`.
    """
    return {band: make_test_coadd(band, **kwargs) for band in bands}


def make_test_galaxy_model(*, size: int = 64, seed: int = 3, **network: Any) -> ModelPackage:
    """Make a galaxy model with random weights that makes lumpy galaxies.

    Parameters
    ----------
    size
        Pixels on a side of its grid.
    seed
        Seed of the weights.
    **network
        Further settings of the network.
    """
    import torch

    from ..galaxies.conditions import ARCHITECTURE, ConditionSpace
    from ..galaxies.cvae import Cvae

    rng = np.random.default_rng(0)
    conditions = np.column_stack(
        [10 ** rng.uniform(-1, 0, 200), rng.uniform(18, 25, 200), rng.uniform(0.1, 2.0, 200)]
    )
    settings: dict[str, Any] = {
        "conditions": ConditionSpace.fit(conditions).to_settings(),
        "pixel_scale": 0.06,
        "size": size,
        "width": 2,
        "latents": 4,
        "texture_size": 32,
        "texture_start": 0,
        "flow_layers": 2,
    } | network
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        cvae = Cvae(**settings)
    with torch.no_grad():
        cvae.texture.last.weight *= 100
        cvae.envelope[-1].weight *= 50  # type: ignore[operator,assignment]
    return ModelPackage(
        name="test",
        version="1",
        architecture=ARCHITECTURE,
        settings=ModelSettings(bands=("F814W",), pixel_scale=0.06, stamp_size=size + 1, network=settings),
        weights={key: value.numpy() for key, value in cvae.state_dict().items()},
    )


def make_test_repository(
    root: Path | str,
    *,
    bands: Iterable[str] = "gri",
    n_patches: tuple[int, int] = (1, 2),
    inner_cells: tuple[int, int] = (2, 2),
    cell_size: int = 50,
    n_sources: int = 30,
    run: str = "test/coadds",
    **kwargs: Any,
) -> Butler:
    """Make a butler repository with a tract of small patches of stars.

    Each patch has ``deep_coadd`` in each band and ``object_patch``, and the
    tract has ``object``; the sky map is ``test``, the tract 0.

    Parameters
    ----------
    root
        Folder of the repository, which must not exist or be empty.
    bands
        Names of the bands.
    n_patches
        Number of patches along y and x.
    inner_cells
        Number of cells along y and x in the inner region of a patch, which
        has a border of one cell besides.
    cell_size
        Side of a cell in pixels.
    n_sources
        Number of stars in the tract.
    run
        Name of the collection.
    **kwargs
        Passed to `make_test_coadd`.

    Returns
    -------
    butler
        Writeable butler whose default collection is ``run``.
    """
    from ..coadds import MultibandCoadd
    from ..detection import detect_objects, select_primary

    bands = tuple(bands)
    sky_map = CellSkyMap.from_center(
        "test",
        ra=150.0,
        dec=2.0,
        pixel_scale=0.2,
        n_patches=n_patches,
        inner_cells=inner_cells,
        cell_size=cell_size,
    )
    Butler.makeRepo(str(root))
    butler = Butler.from_config(str(root), run=run, writeable=True)
    register_sky_map(butler, sky_map, instrument="TestCam", bands=bands)
    register_dataset_types(butler)
    rng = np.random.default_rng(kwargs.get("seed", 1))
    y, x = rng.uniform(0, np.array(sky_map.bbox.shape)[:, None] - 1, size=(2, n_sources))
    sources = np.stack([x, y, rng.uniform(500.0, 5000.0, n_sources)], axis=1)
    tract_id = {"skymap": sky_map.name, "tract": sky_map.tract}
    tables = []
    for patch_id in sky_map.patch_ids:
        patch_data_id = {**tract_id, "patch": patch_id}
        coadds = make_test_coadds(
            bands,
            patch=sky_map.make_patch(patch_id),
            sky_projection=sky_map.sky_projection,
            sources=sources,
            **kwargs,
        )
        for band, coadd in coadds.items():
            butler.put(coadd, "deep_coadd", patch_data_id, band=band)
        multiband = MultibandCoadd.from_coadds(coadds)
        tables.append(detect_objects(multiband, tract=sky_map.tract, patch=patch_id))
        butler.put(tables[-1], "object_patch", patch_data_id)
    butler.put(select_primary(tables), "object", tract_id)
    return butler


def make_test_model(
    bands: Iterable[str] = "gri", *, pixel_scale: float = 0.2, stamp_size: int = 45, seed: int = 1
) -> ModelPackage:
    """Make a model package with a small untrained DeepLens.

    Parameters
    ----------
    bands
        Names of the bands.
    pixel_scale
        Side of a pixel in arcsec.
    stamp_size
        Side of the stamps in pixels.
    seed
        Seed of the weights.
    """
    import torch

    from ..lenses.deeplens import DeepLens

    settings = ModelSettings(
        bands=tuple(bands),
        pixel_scale=pixel_scale,
        stamp_size=stamp_size,
        preprocessing=Preprocessing(softening=4.0),
        network={"width": 0.125, "blocks": 1},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DeepLens(in_bands=len(settings.bands), **settings.network)
    weights = {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}
    return ModelPackage(
        name="test", version="1", architecture="DeepLens", settings=settings, weights=weights, record={}
    )


def _make_patch(shape: tuple[int, int], start: tuple[int, int], n_cells: tuple[int, int]) -> PatchDefinition:
    """Return a patch that has no border."""
    box = Box.from_shape(shape, start=start)
    cell_shape = YX(y=shape[0] // n_cells[0], x=shape[1] // n_cells[1])
    if shape != (cell_shape.y * n_cells[0], cell_shape.x * n_cells[1]):
        raise ValueError(f"{shape} pixels cannot be divided into {n_cells} cells.")
    return PatchDefinition(
        id=0, index=YX(y=0, x=0), inner_bbox=box, cells=CellGrid(bbox=box, cell_shape=cell_shape)
    )


def _make_gaussian(x: float, y: float, shape: tuple[int, int], fwhm: float) -> np.ndarray:
    """Return a Gaussian of unit integral at a position."""
    sigma = fwhm / np.sqrt(8 * np.log(2))
    along_y = np.exp(-0.5 * ((np.arange(shape[0]) - y) / sigma) ** 2)
    along_x = np.exp(-0.5 * ((np.arange(shape[1]) - x) / sigma) ** 2)
    return np.outer(along_y, along_x) / (2 * np.pi * sigma**2)


def _add_star(image: np.ndarray, x: float, y: float, flux: float, fwhm: float) -> None:
    """Add a star at a position in array indices, if it is on the image."""
    radius = int(np.ceil(4 * fwhm))
    bottom, left = max(round(y) - radius, 0), max(round(x) - radius, 0)
    stamp = image[bottom : max(round(y) + radius + 1, 0), left : max(round(x) + radius + 1, 0)]
    stamp += flux * _make_gaussian(x - left, y - bottom, stamp.shape, fwhm)

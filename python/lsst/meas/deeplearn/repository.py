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

"""Coadds and dimension records of a butler repository that we make."""

from __future__ import annotations

__all__ = (
    "PATCH_DIMENSIONS",
    "CellSkyMap",
    "make_cell_coadd",
    "make_region",
    "make_tangent_wcs",
    "register_dataset_types",
    "register_sky_map",
)

import dataclasses
import hashlib
from collections.abc import Collection, Iterable, Mapping

import astropy.units as u
import astropy.wcs
import numpy as np

from lsst.daf.butler import Butler, DatasetType
from lsst.images import (
    YX,
    Box,
    Image,
    Mask,
    MaskSchema,
    SkyProjection,
    TractFrame,
    get_legacy_deep_coadd_mask_planes,
)
from lsst.images.cells import (
    CellCoadd,
    CellGrid,
    CellGridBounds,
    CellIJ,
    CellPointSpreadFunction,
    PatchDefinition,
)
from lsst.sphgeom import ConvexPolygon, LonLat, UnitVector3d

PATCH_DIMENSIONS = ("skymap", "tract", "patch")
"""Dimensions of a dataset that belongs to one patch."""

DATASET_TYPES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("deep_coadd", "CellCoadd", ("band", *PATCH_DIMENSIONS)),
    ("object_patch", "ArrowAstropy", PATCH_DIMENSIONS),
    ("object", "ArrowAstropy", ("skymap", "tract")),
    ("lens_truth", "ArrowAstropy", PATCH_DIMENSIONS),
)
"""Name, storage class and dimensions of the datasets that we make."""


@dataclasses.dataclass(frozen=True, eq=False)
class CellSkyMap:
    """A sky map of one tract, whose patches are made of cells and overlap.

    As in the sky maps of the Rubin data releases, the inner regions of the
    patches tile the tract, and each patch has a border of whole cells that it
    shares with its neighbours.
    """

    name: str
    """Name of the sky map in the repository."""

    wcs: astropy.wcs.WCS
    """WCS of the pixels of the tract, the first of which is (0, 0)."""

    n_patches: tuple[int, int]
    """Number of patches along y and x."""

    inner_cells: tuple[int, int]
    """Number of cells along y and x in the inner region of a patch."""

    border_cells: int = 1
    """Number of cells of the border on each side of a patch."""

    cell_size: int = 150
    """Side of a cell in pixels."""

    tract: int = 0
    """ID of the tract."""

    @classmethod
    def from_center(
        cls,
        name: str,
        *,
        ra: float,
        dec: float,
        pixel_scale: float,
        n_patches: tuple[int, int],
        inner_cells: tuple[int, int],
        border_cells: int = 1,
        cell_size: int = 150,
        tract: int = 0,
    ) -> CellSkyMap:
        """Make a sky map with the tract centred on a position.

        Parameters
        ----------
        name
            Name of the sky map.
        ra, dec
            ICRS coordinates of the centre in degrees.
        pixel_scale
            Side of a pixel in arcsec.
        n_patches, inner_cells, border_cells, cell_size, tract
            See the attributes of the same names.
        """
        height, width = (
            cell_size * (n * inner + 2 * border_cells)
            for n, inner in zip(n_patches, inner_cells, strict=True)
        )
        wcs = make_tangent_wcs(ra=ra, dec=dec, pixel_scale=pixel_scale, x=(width - 1) / 2, y=(height - 1) / 2)
        return cls(name, wcs, n_patches, inner_cells, border_cells, cell_size, tract)

    @property
    def bbox(self) -> Box:
        """Bounding box of the tract in pixels."""
        shape = (
            self.cell_size * (n * inner + 2 * self.border_cells)
            for n, inner in zip(self.n_patches, self.inner_cells, strict=True)
        )
        return Box.from_shape(tuple(shape), start=(0, 0))

    @property
    def sky_projection(self) -> SkyProjection[TractFrame]:
        """Map between the pixels of the tract and the sky."""
        frame = TractFrame(skymap=self.name, tract=self.tract, bbox=self.bbox)
        return SkyProjection.from_fits_wcs(self.wcs, frame, pixel_bounds=self.bbox)

    @property
    def patch_ids(self) -> range:
        """IDs of all patches."""
        return range(self.n_patches[0] * self.n_patches[1])

    def make_patch(self, patch: int) -> PatchDefinition:
        """Return the geometry of a patch.

        Parameters
        ----------
        patch
            ID of the patch; IDs increase fastest along x.
        """
        row, column = divmod(patch, self.n_patches[1])
        inner_shape = [n * self.cell_size for n in self.inner_cells]
        border = self.border_cells * self.cell_size
        start = row * inner_shape[0], column * inner_shape[1]
        outer = Box.from_shape([n + 2 * border for n in inner_shape], start=start)
        return PatchDefinition(
            id=patch,
            index=YX(y=row, x=column),
            inner_bbox=Box.from_shape(inner_shape, start=(start[0] + border, start[1] + border)),
            cells=CellGrid(bbox=outer, cell_shape=YX(self.cell_size, self.cell_size)),
        )


def make_tangent_wcs(*, ra: float, dec: float, pixel_scale: float, x: float, y: float) -> astropy.wcs.WCS:
    """Return a gnomonic WCS with north up and east to the left.

    Parameters
    ----------
    ra, dec
        ICRS coordinates of the tangent point in degrees.
    pixel_scale
        Side of a pixel in arcsec.
    x, y
        Pixel of the tangent point, counted from 0.
    """
    wcs = astropy.wcs.WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.crval = [ra, dec]
    wcs.wcs.crpix = [x + 1.0, y + 1.0]
    wcs.wcs.cd = np.diag([-pixel_scale / 3600, pixel_scale / 3600])
    wcs.wcs.set()
    return wcs


def make_cell_coadd(
    image: np.ndarray,
    variance: np.ndarray,
    psf_kernels: np.ndarray,
    *,
    band: str,
    patch: PatchDefinition,
    sky_projection: SkyProjection[TractFrame],
    mask_planes: Mapping[str, np.ndarray] | None = None,
    missing_cells: Collection[tuple[int, int]] = (),
    unit: u.UnitBase = u.nJy,
) -> CellCoadd:
    """Put planes together to the coadd of one band of a patch.

    Parameters
    ----------
    image, variance
        Pixel values and their variance, shape ``(y, x)``.
    psf_kernels
        PSF of each cell, of odd sides, shape ``(cell_y, cell_x, y, x)``.
    band
        Name of the band.
    patch
        Geometry of the patch.
    sky_projection
        Map between the pixels of the tract and the sky.
    mask_planes
        Where mask planes are set, by their lsst.images names.
    missing_cells
        Row and column of the cells that have no input images.  There the
        image, the variance and the PSF become NaN, and NO_DATA is set.
    unit
        Unit of the image.

    Raises
    ------
    ValueError
        Raised if an array does not cover the patch.
    """
    box, grid = patch.outer_bbox, patch.cells
    for name, array in (("image", image), ("variance", variance), *(mask_planes or {}).items()):
        if array.shape != box.shape:
            raise ValueError(f"The {name} has {array.shape} pixels, but the patch {box.shape}.")
    n_cells = grid.grid_size.as_tuple()
    if psf_kernels.shape[:2] != n_cells:
        raise ValueError(f"There are PSFs for {psf_kernels.shape[:2]} cells, but the patch has {n_cells}.")
    # Copies, because missing cells are blanked below.
    image = np.array(image, dtype=np.float32)
    variance = np.array(variance, dtype=np.float32)
    psf_kernels = np.array(psf_kernels, dtype=np.float64)
    no_data = np.zeros(box.shape, dtype=bool)
    for cell in missing_cells:
        pixels = grid.bbox_of(CellIJ(*cell)).slice_within(box)
        image[pixels] = variance[pixels] = np.nan
        no_data[pixels] = True
        psf_kernels[cell] = np.nan
    schema = MaskSchema(list(get_legacy_deep_coadd_mask_planes().values()), dtype=np.uint8)
    mask = Mask(0, schema=schema, bbox=box, sky_projection=sky_projection)
    for name, plane in (mask_planes or {}).items():
        mask.set(name, plane)
    mask.set("NO_DATA", no_data | mask.get("NO_DATA"))
    missing = frozenset(CellIJ(*cell) for cell in missing_cells)
    return CellCoadd(
        Image(image, bbox=box, unit=unit),
        mask=mask,
        variance=Image(variance, bbox=box, unit=unit**2),
        sky_projection=sky_projection,
        band=band,
        psf=CellPointSpreadFunction(psf_kernels, CellGridBounds(grid=grid, bbox=grid.bbox, missing=missing)),
        patch=patch,
    )


def register_sky_map(butler: Butler, sky_map: CellSkyMap, *, instrument: str, bands: Iterable[str]) -> None:
    """Insert the dimension records that the coadds of a tract need.

    Records that are there already are left as they are, so that this can be
    called again.

    Parameters
    ----------
    butler
        Writeable butler.
    sky_map
        The sky map, its tract and patches.
    instrument
        Name of an instrument to which the bands belong; a repository knows
        bands only through the filters of an instrument.
    bands
        Names of the bands; the filters get the same names.

    Raises
    ------
    lsst.daf.butler.registry.ConflictingDefinitionError
        Raised if the repository has another sky map of this name.
    """
    projection = sky_map.sky_projection
    key = {"skymap": sky_map.name, "tract": sky_map.tract}
    registry = butler.registry
    with butler.transaction():
        registry.syncDimensionData(
            "instrument", {"name": instrument, "class_name": "lsst.pipe.base.Instrument"}
        )
        for band in bands:
            registry.syncDimensionData(
                "physical_filter", {"instrument": instrument, "name": f"{instrument}_{band}", "band": band}
            )
        registry.syncDimensionData(
            "skymap",
            {
                "name": sky_map.name,
                "hash": _compute_hash(sky_map),
                "tract_max": sky_map.tract + 1,
                "patch_nx_max": sky_map.n_patches[1],
                "patch_ny_max": sky_map.n_patches[0],
            },
        )
        registry.syncDimensionData(
            "tract",
            {"skymap": sky_map.name, "id": sky_map.tract, "region": make_region(projection, sky_map.bbox)},
        )
        for patch in map(sky_map.make_patch, sky_map.patch_ids):
            region = make_region(projection, patch.outer_bbox)
            cell = {"cell_x": patch.index.x, "cell_y": patch.index.y}
            registry.syncDimensionData("patch", {**key, "id": patch.id, "region": region, **cell})


def register_dataset_types(butler: Butler) -> None:
    """Register the types of the datasets that we make, if need be.

    Parameters
    ----------
    butler
        Writeable butler.
    """
    for name, storage_class, dimensions in DATASET_TYPES:
        butler.registry.registerDatasetType(
            DatasetType(name, dimensions, storage_class, universe=butler.dimensions)
        )


def make_region(sky_projection: SkyProjection[TractFrame], box: Box) -> ConvexPolygon:
    """Return the region of the sky that a box of pixels covers.

    Parameters
    ----------
    sky_projection
        Projection of the pixels.
    box
        The pixels.
    """
    x = np.array([box.x.min - 0.5, box.x.max + 0.5, box.x.max + 0.5, box.x.min - 0.5])
    y = np.array([box.y.min - 0.5, box.y.min - 0.5, box.y.max + 0.5, box.y.max + 0.5])
    sky = sky_projection.pixel_to_sky(x=x, y=y)
    return ConvexPolygon(
        [
            UnitVector3d(LonLat.fromDegrees(float(ra), float(dec)))
            for ra, dec in zip(sky.ra.deg, sky.dec.deg, strict=True)
        ]
    )


def _compute_hash(sky_map: CellSkyMap) -> bytes:
    """Return a digest of the sky map; no two of a repository share one."""
    geometry = (
        sky_map.name,
        sky_map.wcs.to_header_string(),
        sky_map.n_patches,
        sky_map.inner_cells,
        sky_map.border_cells,
        sky_map.cell_size,
        sky_map.tract,
    )
    return hashlib.sha1(repr(geometry).encode()).digest()

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

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from astropy.coordinates import SkyCoord

from lsst.daf.butler import Butler
from lsst.images.cells import CellCoadd
from lsst.meas.deeplearn import scene, scene_drawing
from lsst.meas.deeplearn.coadds import MultibandCoadd
from lsst.meas.deeplearn.demo import Scene, draw_band, make_demo, make_scene
from lsst.meas.deeplearn.repository import CellSkyMap

BANDS = ("g", "r", "i")


@pytest.fixture(scope="module")
def butler(tmp_path_factory: pytest.TempPathFactory) -> Butler:
    """Return a butler of a tiny demo repository of two patches."""
    root = tmp_path_factory.mktemp("demo") / "repo"
    make_demo(root, inner_cells=(2, 2), cell_size=75, bands=BANDS, n_lenses=3, processes=1)
    return Butler.from_config(str(root), collections="demo/coadds")


def _make_sky_map() -> CellSkyMap:
    return CellSkyMap.from_center(
        "demo",
        ra=150.0,
        dec=2.0,
        pixel_scale=0.2,
        n_patches=(1, 1),
        inner_cells=(2, 2),
        cell_size=75,
        tract=1,
    )


def _make_empty_scene() -> Scene:
    """Return a scene without galaxies, stars and lenses."""
    full = make_scene(_make_sky_map(), BANDS, seed=1)
    none = np.zeros(0, dtype=int)
    return dataclasses.replace(full, galaxies=full.galaxies[none], stars=full.stars[none])


def _read(butler: Butler, patch: int) -> dict[str, CellCoadd]:
    data_id = {"skymap": "demo", "tract": 1, "patch": patch}
    return {band: butler.get("deep_coadd", data_id, band=band) for band in BANDS}


def test_models(butler: Butler) -> None:
    """The shipped models are there, in chains without their versions."""
    members = butler.collections.get_info("models/deeplens_gri").children
    assert members
    assert all(member.startswith("models/deeplens_gri_") for member in members)
    found = butler.query_datasets("deeplens_model", "models/deeplens_gri", find_first=False)
    assert len(found) == len(members)
    assert butler.query_datasets("galaxy_cvae_model", "models/galaxy_cvae")


def test_patches_agree_where_they_overlap(butler: Butler) -> None:
    """Two patches have the same pixels, noise too, in their overlap."""
    for band in BANDS:
        left, right = (_read(butler, patch)[band] for patch in (0, 1))
        box = left.bbox.intersection(right.bbox)
        assert box.shape == (300, 150)
        for plane in ("image", "variance"):
            np.testing.assert_array_equal(getattr(left, plane)[box].array, getattr(right, plane)[box].array)
        np.testing.assert_array_equal(left.mask[box].array, right.mask[box].array)


def test_coadds_are_as_dp2_has_them(butler: Butler) -> None:
    """Coadds are in nJy, with a PSF that varies and a missing cell."""
    for patch in (0, 1):
        coadds = _read(butler, patch)
        multiband = MultibandCoadd.from_coadds(coadds)
        assert multiband.pixel_scale == pytest.approx(0.2, rel=1e-4)
        assert {coadd.unit.to_string() for coadd in coadds.values()} == {"nJy"}
        missing = [len(multiband.planes[band].missing_cells) for band in BANDS]
        # One in the first band, and one in all at the corner of the tract.
        assert missing == ([1, 0, 0] if patch == 0 else [1, 1, 1])
        for band, coadd in coadds.items():
            assert coadd.psf.kernel_bbox.shape == (35, 35)
            no_data = multiband.compute_mask(band, ("NO_DATA",))
            np.testing.assert_array_equal(no_data, np.isnan(coadd.image.array))
            for plane in ("DETECTED", "INEXACT_PSF"):
                assert 0 < multiband.compute_mask(band, (plane,)).mean() < 0.9
        kernels = [multiband.compute_psf_kernel("r", x=x, y=100.0, size=21) for x in (190.0, 260.0)]
        assert np.abs(kernels[0] - kernels[1]).max() > 1e-5


def test_objects_are_measured(butler: Butler) -> None:
    """The tables hold plausible objects, those of the tract once."""
    table = butler.get("object", skymap="demo", tract=1)
    patches = [butler.get("object_patch", skymap="demo", tract=1, patch=patch) for patch in (0, 1)]
    assert len(table) == sum(patch["detect_isPrimary"].sum() for patch in patches)
    assert len(table) == len(np.unique(table["objectId"]))
    area = 150 * 300 * (0.2 / 60) ** 2
    assert 10 < len(table) / area < 200
    assert set(table["refBand"]) <= set(BANDS)


def test_truth(butler: Butler) -> None:
    """Lenses are where the truth says, at an object, and can be found."""
    for patch in (0, 1):
        truth = butler.get("lens_truth", skymap="demo", tract=1, patch=patch)
        assert len(truth) >= 4
        box = _read(butler, patch)["i"].bbox
        assert box.contains(x=np.round(truth["x"]), y=np.round(truth["y"])).all()
        assert (truth["einstein_radius"] > 1).sum() >= 3
        assert (truth["magnification"] > 1).all()
        assert np.median(truth["arc_snr"]) > 15
        assert truth["arc_snr_by_band"].shape == (len(truth), 3)
        objects = butler.get("object_patch", skymap="demo", tract=1, patch=patch)
        _, distance, _ = SkyCoord(truth["ra"], truth["dec"]).match_to_catalog_sky(
            SkyCoord(objects["coord_ra"], objects["coord_dec"])
        )
        assert np.median(distance.arcsec) < 0.3


def test_no_lenses(tmp_path: Path) -> None:
    """With no lenses there is no truth, and the sky is the same."""
    lines: list[str] = []
    root = tmp_path / "repo"
    make_demo(
        root,
        n_patches=1,
        inner_cells=(2, 2),
        cell_size=75,
        bands=("i",),
        n_lenses=0,
        processes=1,
        report=lines.append,
    )
    butler = Butler.from_config(str(root), collections="demo/coadds")
    assert not butler.query_datasets("lens_truth", explain=False)
    assert len(butler.query_datasets("object")) == 1
    assert any("Drew i" in line for line in lines)
    sky_map = _make_sky_map()
    with_lenses, without = (make_scene(sky_map, ("i",), seed=1, n_lenses=n) for n in (2, 0))
    assert len(with_lenses.galaxies) == len(without.galaxies) + 2
    np.testing.assert_array_equal(with_lenses.galaxies.x[:-2], without.galaxies.x)
    np.testing.assert_array_equal(with_lenses.stars.x, without.stars.x)


def test_skies_share_a_repository(tmp_path: Path) -> None:
    """A second sky with a name of its own goes into the same repository."""
    for name, seed in (("first", 1), ("second", 2)):
        make_demo(
            tmp_path / "repo",
            name=name,
            sky=scene.Sky.sample(seed),
            seed=seed,
            n_patches=1,
            inner_cells=(2, 2),
            cell_size=75,
            bands=("i",),
            n_lenses=0,
            processes=1,
        )
    butler = Butler.from_config(str(tmp_path / "repo"), collections="demo/coadds")
    coadds = [
        butler.get("deep_coadd", skymap=name, tract=1, patch=0, band="i") for name in ("first", "second")
    ]
    assert np.nanmax(np.abs(coadds[0].image.array - coadds[1].image.array)) > 1
    with pytest.raises(ValueError, match="another name"):
        make_demo(tmp_path / "repo", name="first")


def test_another_sky() -> None:
    """Depth, seeing, sizes and numbers of galaxies are those of the sky."""
    usual, other = scene.Sky(), scene.Sky.sample(3)
    assert scene.Sky.sample(3) == other
    assert other.survey["i"].depth != usual.survey["i"].depth
    settings = dataclasses.replace(scene.SURVEY["i"], depth=25.0, psf_fwhm=1.1, psf_beta=2.5)
    sky = scene.Sky({"i": settings}, galaxy_size=1.3, spheroid_indices=(3.0,), massive_density=50.0)
    one, two = (make_scene(_make_sky_map(), ("i",), sky=item, seed=1, n_lenses=1) for item in (None, sky))
    assert len(two.galaxies) > len(one.galaxies)
    field = slice(0, 10)
    np.testing.assert_allclose(
        two.galaxies.half_light_radius[field], 1.3 * one.galaxies.half_light_radius[field]
    )
    assert set(two.galaxies.sersic_index) == {2.5, 3.0}
    assert two.get_psf("i", x=10, y=10).original.beta == 2.5
    none = np.zeros(0, dtype=int)
    empty = dataclasses.replace(two, galaxies=two.galaxies[none], stars=two.stars[none], arcs=0 * two.arcs)
    noise = np.nan_to_num(draw_band(empty, "i")[0])
    blocks = noise.reshape(30, 10, 30, 10).sum(axis=(1, 3)) / 10
    assert np.std(blocks) == pytest.approx(settings.sky_noise, rel=0.12)


def test_brighter_galaxies_like_lenses() -> None:
    """Galaxies like lenses may be brighter and larger, and have disks; others
    stay as they are.
    """
    sky = scene.Sky(massive_density=50.0)
    varied = dataclasses.replace(sky, massive_brightening=2.5, massive_disk_fraction=1.0)
    one, two = (
        make_scene(_make_sky_map(), ("i",), sky=item, seed=1, n_lenses=0).galaxies for item in (sky, varied)
    )
    brighter = one.magnitude - two.magnitude
    massive = brighter > 0
    assert 30 < massive.sum() < len(one) / 2
    assert 2.0 < brighter.max() < 2.5
    larger = two.half_light_radius[massive, 0] / one.half_light_radius[massive, 0]
    np.testing.assert_allclose(larger, 10 ** (0.16 * brighter[massive]))
    assert (two.fraction[massive, 1] > 0.1).all()
    assert (one.fraction[massive, 1] == 0).all()
    np.testing.assert_allclose(two.fraction.sum(axis=1), 1)
    np.testing.assert_array_equal(one.fraction[~massive], two.fraction[~massive])


def test_one_visit() -> None:
    """A single visit is as much shallower as its exposure is shorter."""
    visit = scene.SURVEY["r"].with_visits(1)
    assert visit.depth == pytest.approx(scene.SURVEY["r"].depth - 1.25 * np.log10(184))
    assert visit.sky_noise == pytest.approx(scene.SURVEY["r"].sky_noise * 184**0.5)
    assert visit.gain == pytest.approx(scene.SURVEY["r"].gain / 184)
    image = draw_band(make_scene(_make_sky_map(), ("r",), sky=scene.Sky({"r": visit}), seed=1), "r")[0]
    assert np.isfinite(image).mean() > 0.5


@pytest.mark.parametrize("seed", range(5))
def test_depth_of_sampled_skies(seed: int) -> None:
    """Sampled skies have twentieth to all of ten years, within the scatter."""
    for band, settings in scene.Sky.sample(seed).survey.items():
        fainter = scene.SURVEY[band].depth - settings.depth
        assert -0.4 < fainter < 1.25 * np.log10(20) + 0.4
        assert 0.75 < settings.psf_fwhm / scene.SURVEY[band].psf_fwhm < 1.43


def test_seed_decides_everything() -> None:
    """The same seed gives the same pixels, another seed another sky."""
    sky_map = _make_sky_map()
    first, second, other = (
        draw_band(make_scene(sky_map, ("i",), seed=seed, n_lenses=1), "i")[0] for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert np.nanmax(np.abs(first - other)) > 1


def test_arcs_are_in_the_image() -> None:
    """Without arcs the image lacks what the arcs hold."""
    with_arcs = make_scene(_make_sky_map(), ("i",), seed=1, n_lenses=2)
    without = dataclasses.replace(with_arcs, arcs=np.zeros_like(with_arcs.arcs))
    images = [np.nan_to_num(draw_band(item, "i")[0]) for item in (with_arcs, without)]
    assert (images[0] - images[1]).sum() == pytest.approx(with_arcs.arcs.sum(), rel=0.3)


def test_variance_is_that_of_the_pixels() -> None:
    """Noise has the variance of its plane, and the depth of the survey."""
    empty = _make_empty_scene()
    for band in BANDS:
        image, variance, _ = draw_band(empty, band)
        good = np.isfinite(image)
        assert np.std((image / np.sqrt(variance))[good]) == pytest.approx(1.0, rel=0.02)
        filled = np.where(good, image, 0)
        correlation = (filled[:, 1:] * filled[:, :-1]).mean() / (filled**2).mean()
        assert 0.04 < correlation < 0.20
        # Over many pixels the noise is that before they were correlated.
        blocks = filled.reshape(30, 10, 30, 10).sum(axis=(1, 3)) / 10
        assert np.std(blocks) == pytest.approx(scene.SURVEY[band].sky_noise, rel=0.12)


@pytest.mark.parametrize("band", sorted(scene.SURVEY))
def test_depth(band: str) -> None:
    """A star at the depth of the survey has a signal to noise of 5."""
    settings = scene.SURVEY[band]
    kernel = scene_drawing.draw_psf_kernel(scene_drawing.make_psf(settings.psf_fwhm), 35)
    flux = 10 ** (-0.4 * (settings.depth - scene.AB_ZERO_POINT))
    assert flux * np.sqrt((kernel**2).sum()) / settings.sky_noise == pytest.approx(5, rel=0.01)


def test_counts_of_galaxies() -> None:
    """There are as many galaxies as the LSST Science Book has."""
    galaxies = scene.sample_galaxies(np.random.default_rng(1), (3000, 3000))
    for magnitude in (23.0, 25.0, 26.5):
        expected = 100 * 46 * 10 ** (0.31 * (magnitude - 25))
        assert (galaxies.magnitude < magnitude).sum() == pytest.approx(expected, abs=4 * expected**0.5)


def test_colors_follow_redshift() -> None:
    """Old galaxies redden as the 4000 A break moves through the bands."""
    redshift = np.array([0.05, 0.2, 0.4, 0.7, 0.9])
    galaxies = scene.sample_early_types(
        np.random.default_rng(1), *np.zeros((2, 5)), redshift, np.full(5, 20.0)
    )
    galaxies.young[:] = 0.01
    g, r, i = (galaxies.compute_fluxes(band).sum(axis=1) for band in BANDS)
    assert (np.diff(2.5 * np.log10(r / g))[:2] > 0.1).all()
    assert (np.diff(2.5 * np.log10(i / r))[2:3] > 0.3).all()
    assert 0.6 < 2.5 * np.log10(r / g)[0] < 1.0
    np.testing.assert_allclose(i, 10 ** (-0.4 * (20 - scene.AB_ZERO_POINT)))


def test_types_differ() -> None:
    """Late types are bluer than early types, and some are seen edge-on."""
    rng = np.random.default_rng(1)
    n = 300
    positions, redshift, magnitude = np.zeros((2, n)), np.full(n, 0.4), np.full(n, 21.0)
    early, late = (
        sample(rng, *positions, redshift, magnitude)
        for sample in (scene.sample_early_types, scene.sample_late_types)
    )
    color = [
        2.5 * np.log10(np.divide(*(g.compute_fluxes(b).sum(axis=1) for b in "rg"))) for g in (early, late)
    ]
    assert np.median(color[0]) > np.median(color[1]) + 0.4
    assert (late.axis_ratio[:, 1] < 0.3).mean() > 0.1


@pytest.mark.parametrize("sample", [scene.sample_early_types, scene.sample_late_types])
def test_galaxies_are_drawn_with_their_flux(sample: Callable[..., scene.Galaxies]) -> None:
    """Drawn galaxies have the flux of the catalogue, bright or faint."""
    for magnitude in (20.0, 24.0):
        rng = np.random.default_rng(2)
        galaxies = sample(rng, np.full(3, 200.3), np.full(3, 199.6), np.full(3, 0.5), np.full(3, magnitude))
        image = np.zeros((401, 401), dtype=np.float32)
        scene_drawing.draw_galaxies(image, galaxies, "r", lambda x, y: scene_drawing.make_psf(0.8))
        assert image.sum() == pytest.approx(galaxies.compute_fluxes("r").sum(), rel=0.06)
        y, x = np.indices(image.shape)
        assert (image * x).sum() / image.sum() == pytest.approx(200.3, abs=0.5)
        assert (image * y).sum() / image.sum() == pytest.approx(199.6, abs=0.5)


def test_stars_are_drawn_as_the_psf() -> None:
    """A star is its flux times the PSF kernel."""
    psf = scene_drawing.make_psf(0.8, 0.02, -0.01)
    star = scene.Stars(np.array([30.0]), np.array([25.0]), {"i": np.array([20.0])})
    image = np.zeros((60, 60), dtype=np.float32)
    scene_drawing.draw_stars(image, star, "i", lambda x, y: psf)
    flux = 10 ** (-0.4 * (20 - scene.AB_ZERO_POINT))
    stamp = image[25 - 10 : 25 + 11, 30 - 10 : 30 + 11] / flux
    np.testing.assert_allclose(
        stamp, scene_drawing.draw_psf_kernel(psf, 35)[7:28, 7:28], rtol=0.01, atol=1e-6
    )

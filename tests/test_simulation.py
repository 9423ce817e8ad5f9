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


"""Tests of simulated lenses."""

from __future__ import annotations

import astropy.units as u
import galsim
import numpy as np
import pytest
import torch
from astropy.table import Table
from scipy.stats import ks_2samp, kstest

from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.lenses.lens_equation import (
    compute_caustics,
    compute_shear_deflection,
    compute_sie_deflection,
    is_inside_polygon,
)
from lsst.meas.deeplearn.lenses.lens_population import (
    choose_hosts,
    compute_einstein_radius,
    compute_flux,
    rotate_lenses,
    sample_lens_population,
)
from lsst.meas.deeplearn.lenses.simulation import (
    compute_arc_snr,
    estimate_gain,
    paint_lenses,
    render_arcs,
)

SCALE = 0.2  # arcsec
PSF = galsim.Moffat(beta=3.0, fwhm=0.75)


def make_psf(n: int, *, bands: int = 1, size: int = 35, dx: float = 0.0, dy: float = 0.0) -> np.ndarray:
    """Make images of a star, with its offset in pixels."""
    star = PSF.shift(dx * SCALE, dy * SCALE).drawImage(nx=size, ny=size, scale=SCALE).array
    return np.broadcast_to(star / star.sum(), (n, bands, size, size)).astype(np.float32)


def make_source(**values: float) -> Table:
    """Make one lens with a plain source, without knots and shear."""
    table = sample_lens_population(1, seed=1)
    table["source_knot_flux"] = 0.0
    plain = {
        "einstein_radius": 0.0,
        "axis_ratio": 1.0,
        "gamma1": 0.0,
        "gamma2": 0.0,
        "source_x": 0.0,
        "source_y": 0.0,
        "source_half_light_radius": 0.4,
        "source_axis_ratio": 1.0,
        "source_sersic_index": 1.0,
        "source_mag_i": 22.0,
    }
    for name, value in (plain | values).items():
        table[name] = value
    return table


def make_cutouts(n: int, *, bands: str = "gri", size: int = 31, noise: float = 5.0) -> Cutouts:
    """Make stamps of noise with PSF kernels."""
    rng = np.random.default_rng(2)
    shape = (n, len(bands), size, size)
    return Cutouts(
        bands=tuple(bands),
        pixel_scale=SCALE,
        ids=np.arange(1, n + 1),
        ra=np.full(n, 150.0),
        dec=np.full(n, 2.0),
        x=np.arange(n) * 100.0,
        y=np.arange(n) * 100.0,
        image=rng.normal(0, noise, shape).astype(np.float32),
        variance=np.full(shape, noise**2, dtype=np.float32),
        bad=np.zeros(shape, dtype=bool),
        psf=make_psf(n, bands=len(bands), size=21),
        off_edge=np.zeros(n, dtype=bool),
        missing_band=np.zeros((n, len(bands)), dtype=bool),
        missing_cell=np.zeros((n, len(bands)), dtype=bool),
    )


class TestPopulation:
    """Tests of the prior."""

    def test_agrees_with_lenspop(self) -> None:
        """Medians are those of the LensPop table of the optimal coadd."""
        table = sample_lens_population(20_000, seed=1, min_einstein_radius=0.32, max_einstein_radius=3.6)
        medians = {  # of the 13,126 lenses; Collett (2015)
            "lens_redshift": (0.493, 0.03),
            "source_redshift": (2.064, 0.15),
            "einstein_radius": (1.15, 0.1),
            "velocity_dispersion": (258.2, 10.0),
            "axis_ratio": (0.728, 0.02),
            "lens_mag_i": (18.89, 0.2),
            "lens_mag_g": (21.81, 0.3),
            "source_mag_g": (26.15, 0.15),
            "source_mag_i": (25.87, 0.15),
            "source_half_light_radius": (0.18, 0.03),
            "source_axis_ratio": (0.657, 0.02),
        }
        for name, (expected, tolerance) in medians.items():
            assert np.median(table[name]) == pytest.approx(expected, abs=tolerance), name

    def test_seed_fixes_all(self) -> None:
        """The same seed gives the same lenses, another seed others."""
        first, again, other = (sample_lens_population(50, seed=seed) for seed in (3, 3, 4))
        for name in first.colnames:
            np.testing.assert_array_equal(first[name], again[name])
        assert not (first["einstein_radius"] == other["einstein_radius"]).any()
        assert len(np.unique(np.concatenate([first["source_id"], other["source_id"]]))) == 100

    @pytest.mark.parametrize("uniform", [False, True])
    def test_limits_hold(self, uniform: bool) -> None:
        """Einstein radii are within limits, and follow from the rest."""
        table = sample_lens_population(
            500, seed=1, min_einstein_radius=1.0, max_einstein_radius=1.5, uniform_radius=uniform
        )
        assert table["einstein_radius"].min() > 1.0
        assert table["einstein_radius"].max() < 1.5
        expected = compute_einstein_radius(
            velocity_dispersion=table["velocity_dispersion"].data,
            lens_redshift=table["lens_redshift"].data,
            source_redshift=table["source_redshift"].data,
        )
        np.testing.assert_allclose(table["einstein_radius"], expected)

    def test_uniform_radii(self) -> None:
        """The logarithms of radii are uniform if asked for, on lens galaxies
        that do not know of them.
        """
        table = sample_lens_population(
            4000, seed=2, min_einstein_radius=0.8, max_einstein_radius=4.0, uniform_radius=True
        )
        position = np.log(table["einstein_radius"].data / 0.8) / np.log(4.0 / 0.8)
        assert kstest(position, "uniform").pvalue > 0.01
        magnitude = table["lens_mag_i"].data
        assert ks_2samp(magnitude[position < 0.3], magnitude[position > 0.7]).pvalue > 0.01

    def test_sources_are_multiply_imaged(self) -> None:
        """Every source is inside the caustic or the cut."""
        table = sample_lens_population(300, seed=5)
        columns = ("einstein_radius", "axis_ratio", "position_angle", "gamma1", "gamma2")
        values = {name: torch.tensor(np.asarray(table[name])) for name in columns}
        values["position_angle"] = torch.deg2rad(values["position_angle"])
        caustic, cut = compute_caustics(**values)
        x, y = (torch.tensor(np.asarray(table[name])) for name in ("source_x", "source_y"))
        assert (is_inside_polygon(x, y, caustic) | is_inside_polygon(x, y, cut)).all()

    def test_columns_are_described(self) -> None:
        """Every column has a description, and quantities have units."""
        table = sample_lens_population(3, seed=1, bands="grizy")
        assert all(table[name].description for name in table.colnames)
        assert table["einstein_radius"].unit == u.arcsec
        assert {f"source_mag_{band}" for band in "grizy"} <= set(table.colnames)

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"bands": "u"},
            {"min_einstein_radius": 2.0, "max_einstein_radius": 1.0},
            {"min_magnification": 1.0},
        ],
    )
    def test_impossible_requests_are_refused(self, kwargs: dict[str, object]) -> None:
        """What the prior does not have is refused."""
        with pytest.raises(ValueError, match="prior|magnified"):
            sample_lens_population(3, seed=1, **kwargs)  # type: ignore[arg-type]

    def test_einstein_radius_has_its_limits(self) -> None:
        """It is 0 for a source in front, and that of a near lens."""
        sigma, near, far = np.array(220.0), np.array(1e-4), np.array(5.0)
        front = compute_einstein_radius(
            velocity_dispersion=sigma, lens_redshift=np.array(0.5), source_redshift=np.array(0.4)
        )
        assert front == 0.0
        radius = compute_einstein_radius(velocity_dispersion=sigma, lens_redshift=near, source_redshift=far)
        assert radius == pytest.approx(4 * np.pi * (220 / 299792.458) ** 2 * 206264.8, rel=1e-3)


class TestRendering:
    """Tests of images of arcs."""

    @pytest.mark.parametrize("index", [0.6, 1.0, 2.0])
    def test_unlensed_source_agrees_with_galsim(self, index: float) -> None:
        """Without a lens the image is that of GalSim, PSF and pixel in it."""
        table = make_source(
            source_half_light_radius=0.4,
            source_sersic_index=index,
            source_axis_ratio=0.6,
            source_position_angle=25.0,
            source_x=0.37,
            source_y=-0.21,
        )
        arcs = render_arcs(table, bands="i", pixel_scale=SCALE, size=45, psf=make_psf(1), oversample=8)[0, 0]
        profile = galsim.Sersic(index, half_light_radius=0.4, flux=compute_flux(np.array(22.0)).item())
        profile = profile.shear(q=0.6, beta=25 * galsim.degrees).shift(0.37, -0.21)
        expected = galsim.Convolve(profile, PSF).drawImage(nx=45, ny=45, scale=SCALE).array
        assert np.abs(arcs - expected).max() < 3e-3 * expected.max()

    def test_psf_offset_moves_the_lens(self) -> None:
        """A kernel off its centre moves the arcs with it."""
        table = make_source()
        psf = make_psf(1, dx=0.3, dy=-0.4)
        arcs = render_arcs(table, bands="i", pixel_scale=SCALE, size=45, psf=psf)[0, 0]
        y, x = np.mgrid[:45, :45] - 22
        assert (x * arcs).sum() / arcs.sum() == pytest.approx(0.3, abs=0.02)
        assert (y * arcs).sum() / arcs.sum() == pytest.approx(-0.4, abs=0.02)

    def test_point_behind_round_lens_is_a_ring(self) -> None:
        """A small source behind a round lens is a ring of its radius."""
        table = make_source(einstein_radius=1.5, source_half_light_radius=0.06, source_sersic_index=0.6)
        ring = render_arcs(table, bands="i", pixel_scale=0.1, size=61, oversample=8)[0, 0]
        y, x = (np.mgrid[:61, :61] - 30) * 0.1
        radius = np.hypot(x, y)
        assert (radius * ring).sum() / ring.sum() == pytest.approx(1.5, abs=0.02)
        assert ring[np.abs(radius - 1.5) > 0.4].sum() < 1e-3 * ring.sum()

    def test_magnification_of_round_lens(self) -> None:
        """A small source off the axis is magnified by 2 / beta."""
        table = make_source(einstein_radius=1.2, source_x=0.5, source_half_light_radius=0.06)
        cutouts = make_cutouts(1, bands="i", size=45)
        _, truth = paint_lenses(cutouts, table, oversample=8)
        assert truth["magnification"][0] == pytest.approx(2 * 1.2 / 0.5, rel=0.02)

    def test_central_pixel_is_honest(self) -> None:
        """The centre of the lens holds no light of the source's centre."""
        table = make_source(einstein_radius=1.5, source_x=0.4, source_half_light_radius=0.15)
        coarse = render_arcs(table, bands="i", pixel_scale=SCALE, size=45)[0, 0]
        fine = render_arcs(table, bands="i", pixel_scale=SCALE, size=45, oversample=32)[0, 0]
        assert fine[22, 22] < 1e-3 * fine.max()
        assert abs(coarse[22, 22] - fine[22, 22]) < 2e-3 * fine.max()

    def test_four_rays_are_enough(self) -> None:
        """With 4 rays a side the median error is below half a per cent."""
        table = sample_lens_population(24, seed=7)
        psf = make_psf(24, size=21)
        four, many = (
            render_arcs(table, bands="i", pixel_scale=SCALE, size=45, psf=psf, oversample=n) for n in (4, 16)
        )
        error = np.abs(four - many).max(axis=(1, 2, 3)) / many.max(axis=(1, 2, 3))
        assert np.median(error) < 5e-3
        assert error.max() < 0.1

    def test_light_is_where_the_lens_equation_says(self) -> None:
        """Peaks of arcs map back to the source."""
        table = sample_lens_population(20, seed=11)
        table["source_knot_flux"] = 0.0
        arcs = render_arcs(table, bands="i", pixel_scale=0.05, size=161)[:, 0]
        peak = np.array([np.unravel_index(stamp.argmax(), stamp.shape) for stamp in arcs])
        y, x = torch.tensor((peak - 80) * 0.05).T
        columns = {
            name: torch.tensor(np.asarray(table[name])) for name in table.colnames if table[name].ndim == 1
        }
        alpha_x, alpha_y = compute_sie_deflection(
            x,
            y,
            einstein_radius=columns["einstein_radius"],
            axis_ratio=columns["axis_ratio"],
            position_angle=torch.deg2rad(columns["position_angle"]),
        )
        shear_x, shear_y = compute_shear_deflection(x, y, gamma1=columns["gamma1"], gamma2=columns["gamma2"])
        distance = torch.hypot(
            x - alpha_x - shear_x - columns["source_x"], y - alpha_y - shear_y - columns["source_y"]
        )
        assert (distance < 0.5 * columns["source_half_light_radius"] + 0.05).all()

    def test_batches_do_not_matter(self) -> None:
        """The same images come in batches of any size."""
        table = sample_lens_population(5, seed=2)
        psf = make_psf(5, bands=2, size=21)
        one, all_ = (
            render_arcs(table, bands="gi", pixel_scale=SCALE, size=31, psf=psf, batch_size=n) for n in (1, 64)
        )
        np.testing.assert_allclose(one, all_, rtol=1e-4, atol=1e-4 * all_.max())
        assert one.dtype == np.float32

    def test_rotation_turns_the_image(self) -> None:
        """A lens turned by 90 degrees makes the image turned by as much."""
        table = sample_lens_population(4, seed=3)
        kwargs = {"bands": "i", "pixel_scale": SCALE, "size": 31}
        plain = render_arcs(table, **kwargs)
        turned = render_arcs(rotate_lenses(table, np.full(4, 90.0)), **kwargs)
        np.testing.assert_allclose(turned, np.rot90(plain, -1, axes=(2, 3)), atol=2e-3 * plain.max())

    @pytest.mark.parametrize("oversample", [1, 2, 5])
    def test_dishonest_sampling_is_refused(self, oversample: int) -> None:
        """Few or an odd number of rays are refused."""
        with pytest.raises(ValueError, match="even number of rays"):
            render_arcs(make_source(), bands="i", pixel_scale=SCALE, size=31, oversample=oversample)

    def test_bad_psf_is_refused(self) -> None:
        """A PSF of the wrong shape, or with NaN, is refused."""
        kwargs = {"bands": "i", "pixel_scale": SCALE, "size": 31}
        with pytest.raises(ValueError, match="odd K"):
            render_arcs(make_source(), psf=np.ones((1, 1, 4, 4), dtype=np.float32), **kwargs)
        with pytest.raises(ValueError, match="no finite PSF"):
            render_arcs(make_source(), psf=np.full((1, 1, 5, 5), np.nan, dtype=np.float32), **kwargs)


class TestSnr:
    """Tests of the signal to noise of LensPop."""

    def test_by_hand(self) -> None:
        """Pixels are added in the order of their signal to noise."""
        arcs = np.array([6.0, 4.0, 1.0, 0.0]).reshape(1, 1, 2, 2)
        variance = np.array([4.0, 1.0, 1.0, 1.0]).reshape(1, 1, 2, 2)
        # In order: 4 / 1, 10 / sqrt(5), 11 / sqrt(6), 11 / sqrt(7).
        expected = 11 / np.sqrt(6)
        assert compute_arc_snr(arcs, variance)[0, 0] == pytest.approx(expected)

    def test_bad_pixels_do_not_count(self) -> None:
        """Bad and infinite pixels are left out; none gives 0."""
        arcs = np.full((1, 1, 2, 2), 3.0)
        variance = np.ones((1, 1, 2, 2))
        variance[0, 0, 0, 0] = np.nan
        bad = np.zeros((1, 1, 2, 2), dtype=bool)
        bad[0, 0, 0, 1] = True
        assert compute_arc_snr(arcs, variance, bad)[0, 0] == pytest.approx(6 / np.sqrt(2))
        assert compute_arc_snr(arcs, variance, np.ones_like(bad))[0, 0] == 0.0


class TestPainting:
    """Tests of arcs on stamps."""

    def test_pairs_differ_by_the_arcs_only(self) -> None:
        """Painted and plain stamps differ by the rendered arcs."""
        cutouts, table = make_cutouts(6), sample_lens_population(6, seed=4)
        before = cutouts.image.copy()
        painted, truth = paint_lenses(cutouts, table)
        arcs = render_arcs(table, bands="gri", pixel_scale=SCALE, size=31, psf=cutouts.psf)
        np.testing.assert_allclose(painted.image - cutouts.image, arcs, atol=1e-3)
        np.testing.assert_array_equal(cutouts.image, before)
        np.testing.assert_array_equal(painted.variance, cutouts.variance)
        np.testing.assert_array_equal(truth["host_id"], cutouts.ids)
        np.testing.assert_allclose(truth["arc_flux"], arcs.sum(axis=(2, 3)), rtol=1e-5)
        np.testing.assert_allclose(truth["arc_snr"], compute_arc_snr(arcs, cutouts.variance).max(axis=1))

    def test_bad_pixels_stay_bad(self) -> None:
        """A pixel without data has none afterwards."""
        cutouts = make_cutouts(2)
        cutouts.image[0, 1, 10:20, 10:20] = np.nan
        cutouts.bad[0, 1, 10:20, 10:20] = True
        painted, truth = paint_lenses(cutouts, sample_lens_population(2, seed=4))
        assert np.isnan(painted.image[0, 1, 10:20, 10:20]).all()
        assert np.isfinite(truth["arc_snr"]).all()

    def test_known_gain_adds_poisson_noise(self) -> None:
        """With a gain the variance grows by the arcs', and so does noise."""
        cutouts = make_cutouts(200, bands="i", size=15)
        table = sample_lens_population(1, seed=4, min_einstein_radius=0.5)[np.zeros(200, dtype=int)]
        plain, _ = paint_lenses(cutouts, table)
        noisy, _ = paint_lenses(cutouts, table, gain={"i": 0.1}, seed=9)
        arcs = plain.image - cutouts.image
        np.testing.assert_allclose(noisy.variance - cutouts.variance, arcs * 10, rtol=1e-3, atol=1e-2)
        pull = (noisy.image - plain.image) / np.sqrt(np.clip(arcs, 1e-6, None) * 10)
        assert pull[arcs > arcs.max() / 10].std() == pytest.approx(1.0, abs=0.05)

    def test_mismatch_is_refused(self) -> None:
        """A lens for each stamp is needed, and a PSF in each band."""
        cutouts = make_cutouts(2)
        with pytest.raises(ValueError, match="3 lenses for 2 stamps"):
            paint_lenses(cutouts, sample_lens_population(3, seed=4))
        cutouts.psf = np.full_like(cutouts.psf, np.nan)
        with pytest.raises(ValueError, match="PSF in all bands"):
            paint_lenses(cutouts, sample_lens_population(2, seed=4))


class TestGain:
    """Tests of the gain from the variance plane."""

    @staticmethod
    def make_coadd(gain: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Make image, variance and bad pixels, with the depth in steps."""
        rng = np.random.default_rng(8)
        y, x = np.mgrid[:1000, :1000]
        light = np.zeros((1000, 1000))
        for x_0, y_0, flux in zip(*rng.uniform(0, 1000, (2, 300)), rng.pareto(1.0, 300) * 3e3, strict=True):
            box = np.s_[max(int(y_0) - 15, 0) : int(y_0) + 16, max(int(x_0) - 15, 0) : int(x_0) + 16]
            light[box] += flux / 40 * np.exp(-((x[box] - x_0) ** 2 + (y[box] - y_0) ** 2) / 13)
        sky = np.kron([[90.0, 110.0], [100.0, 120.0]], np.ones((500, 500)))
        variance = sky + light / gain
        image = light + rng.normal(0, 1, light.shape) * np.sqrt(variance)
        bad = np.zeros(light.shape, dtype=bool)
        bad[:, 300:305] = True
        image[bad] = np.nan
        return image.astype(np.float32), variance.astype(np.float32), bad

    @pytest.mark.parametrize("gain", [0.5, 20.0])
    def test_slope_is_found(self, gain: float) -> None:
        """The gain is that of the noise of the sources."""
        assert estimate_gain(*self.make_coadd(gain)) == pytest.approx(gain, rel=0.1)

    def test_variance_of_the_sky_has_none(self) -> None:
        """Without a slope, or with an empty coadd, there is no gain."""
        image, variance, bad = self.make_coadd(np.inf)
        assert estimate_gain(image, variance, bad) is None
        assert estimate_gain(image, variance, np.ones_like(bad)) is None


class TestHosts:
    """Tests of the choice of hosts."""

    def test_lenses_find_their_own_galaxies(self) -> None:
        """Of galaxies like the deflectors each lens gets one like its own."""
        table = sample_lens_population(300, seed=6)
        magnitudes = {band: np.asarray(table[f"lens_mag_{band}"]) for band in "gri"}
        hosts = choose_hosts(table, magnitudes, seed=1, max_lenses=2, neighbors=5)
        found = hosts >= 0
        assert found.mean() > 0.9
        assert np.bincount(hosts[found]).max() <= 2
        difference = magnitudes["i"][hosts[found]] - magnitudes["i"][found]
        assert np.abs(difference).std() < 0.5

    def test_two_bands_are_needed(self) -> None:
        """One magnitude tells no type."""
        with pytest.raises(ValueError, match="needs two bands"):
            choose_hosts(sample_lens_population(3, seed=1), {"i": np.ones(3)}, seed=1, max_lenses=1)

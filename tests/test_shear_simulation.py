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

"""Tests of simulated stamps, and of shear estimators on them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import galsim
import numpy as np
import pytest
import torch
from astropy.table import Table

from lsst.meas.deeplearn.galaxies.conditions import ARCHITECTURE, ConditionSpace
from lsst.meas.deeplearn.galaxies.cvae import Cvae
from lsst.meas.deeplearn.model_package import ModelPackage, ModelSettings
from lsst.meas.deeplearn.shear.bias import ShearBias, ShearSums, fit_bias
from lsst.meas.deeplearn.shear.calibration import Bin, compute_shear_sums
from lsst.meas.deeplearn.shear.estimators import AnaCal, LinearEstimator, Regauss, ShearEstimator
from lsst.meas.deeplearn.shear.metacal import Metacalibration
from lsst.meas.deeplearn.shear.morphologies import (
    PARAMETRIC,
    CvaeGalaxies,
    ParametricGalaxies,
    RealGalaxies,
    make_profile,
)
from lsst.meas.deeplearn.shear.shapes import Shapes
from lsst.meas.deeplearn.shear.simulation import (
    GalaxySample,
    Scene,
    draw_stamps,
    make_arms,
    make_noise,
    make_psf_from_kernel,
)

SCALE = 0.2
PSF = galsim.Moffat(beta=2.5, fwhm=0.7).shear(g1=0.02, g2=-0.02)
ALL = {"all": Bin()}


def make_metacalibration(**kwargs: object) -> Metacalibration:
    """Return an engine for stamps of 63 pixels."""
    settings: dict[str, object] = {"pixel_scale": SCALE, "stamp_size": 63, "target_fwhm": 0.85}
    return Metacalibration(**(settings | kwargs))  # type: ignore[arg-type]


def make_sums(
    galaxies: GalaxySample,
    scene: Scene,
    arms: np.ndarray,
    *,
    estimators: Mapping[str, ShearEstimator] | None = None,
    bins: Mapping[str, Bin] = ALL,
    morphology: str = "sersic",
    n_blocks: int = 8,
    n_realizations: int = 0,
    fixnoise: bool = True,
) -> dict[tuple[str, str], ShearSums]:
    """Simulate and measure galaxies in blocks."""
    parts = [
        compute_shear_sums(
            galaxies[block::n_blocks],
            ParametricGalaxies(morphology),
            scene,
            arms,
            estimators={"metacal": make_metacalibration()} if estimators is None else estimators,
            bins=bins,
            block=block,
            n_realizations=n_realizations,
            fixnoise=fixnoise,
        )
        for block in range(n_blocks)
    ]
    return {key: ShearSums.concatenate([part[key] for part in parts]) for key in parts[0]}


def fit(sums: Mapping[tuple[str, str], ShearSums], label: str = "all", **kwargs: object) -> ShearBias:
    """Fit the bias of metacalibration."""
    return fit_bias(sums["metacal", label], **kwargs)  # type: ignore[arg-type]


def test_galaxies_depend_on_their_id_alone() -> None:
    """Order and number of the galaxies do not matter, nor do other arms."""
    scene = Scene(PSF, SCALE, noise_sigma=2.0)
    many = GalaxySample.draw(np.arange(20), seed=3)
    few = GalaxySample.draw(np.array([17, 4]), seed=3)
    for name in ("magnitude", "redshift", "half_light_radius", "axis_ratio", "offset", "bulge_fraction"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[[17, 4]])
    for fixnoise in (False, True):
        some = make_noise(few, scene, fixnoise=fixnoise)
        np.testing.assert_array_equal(some, make_noise(many, scene, fixnoise=fixnoise)[[17, 4]])
        assert some.std() == pytest.approx(2.0, rel=0.02)
    assert make_profile(few, 1, "knots") == make_profile(many, 4, "knots")
    assert not (GalaxySample.draw(few.ids, seed=4).magnitude == few.magnitude).any()


def test_sample_is_like_the_sky() -> None:
    """Magnitudes have the slope of counts, or are those of a catalogue."""
    galaxies = GalaxySample.draw(np.arange(3000), seed=1, magnitude=(20.0, 25.0))
    assert galaxies.magnitude.min() > 20.0
    assert galaxies.magnitude.max() < 25.0
    counts, _ = np.histogram(galaxies.magnitude, [23, 24, 25])
    assert counts[1] / counts[0] == pytest.approx(10**0.31, rel=0.1)
    assert 0.15 < np.median(galaxies.half_light_radius) < 0.5
    assert 0.5 < np.median(galaxies.redshift) < 1.2
    chosen = GalaxySample.draw(np.arange(100), seed=1, magnitude=np.array([21.0, 22.0, 23.5]))
    assert set(chosen.magnitude) == {21.0, 22.0, 23.5}


@pytest.mark.parametrize("morphology", PARAMETRIC)
def test_morphologies_are_matched(morphology: str) -> None:
    """All have a flux of one and the half-light radius of the sample."""
    galaxies = GalaxySample.draw(np.arange(3), seed=2)
    galaxies.axis_ratio[:] = 1.0
    radii = []
    for k in range(len(galaxies)):
        profile = make_profile(galaxies, k, morphology)
        assert profile.flux == pytest.approx(1.0)
        if morphology != "knots":
            radii.append(profile.calculateHLR(size=128, scale=0.1 * galaxies.half_light_radius[k]))
    if radii:
        np.testing.assert_allclose(radii, galaxies.half_light_radius, rtol=0.08)


def test_arms() -> None:
    """Both components and signs of every shear, then of every PSF."""
    arms = make_arms((0.02,), (0.05,))
    assert arms.tolist() == [
        [0.02, 0, 0, 0],
        [-0.02, 0, 0, 0],
        [0, 0.02, 0, 0],
        [0, -0.02, 0, 0],
        [0, 0, 0.05, 0],
        [0, 0, -0.05, 0],
        [0, 0, 0, 0.05],
        [0, 0, 0, -0.05],
    ]


def test_orientations() -> None:
    """With a round PSF and no shear, the second is the first one turned by
    90 degrees, offset too; the other two are their mirror images.
    """
    scene = Scene(galsim.Moffat(beta=3.0, fwhm=0.7), SCALE, n_orientations=4)
    galaxies = GalaxySample.draw(np.arange(3), seed=1)
    stamps = draw_stamps(ParametricGalaxies("sersic").draw(galaxies), galaxies, scene, np.zeros(4))
    turned = np.rot90(stamps[:, 0], -1, axes=(1, 2))
    np.testing.assert_allclose(stamps[:, 1], turned, atol=1e-4 * stamps.max())
    np.testing.assert_allclose(stamps[:, 2:], stamps[:, :2, :, ::-1], atol=1e-4 * stamps.max())


def test_stamps_are_those_of_galsim() -> None:
    """Shear, PSF, offset, rotation and flux are those that GalSim draws."""
    galaxies = GalaxySample.draw(np.arange(4), seed=1)
    scene = Scene(PSF, SCALE)
    for arm in make_arms((0.05,), (0.05,)):
        stamps = draw_stamps(ParametricGalaxies("sersic").draw(galaxies), galaxies, scene, arm)
        for k in range(len(galaxies)):
            dx, dy = SCALE * galaxies.offset[k]
            for turns, (x, y) in enumerate(((dx, dy), (-dy, dx))):
                galaxy = make_profile(galaxies, k, "sersic").rotate(90 * turns * galsim.degrees)
                sheared = galaxy.shear(g1=arm[0], g2=arm[1]).shift(x, y) * galaxies.flux[k]
                expected = galsim.Convolve(sheared, PSF.shear(g1=arm[2], g2=arm[3])).drawImage(
                    nx=63, ny=63, scale=SCALE, method="no_pixel"
                )
                np.testing.assert_allclose(stamps[k, turns], expected.array, atol=1e-3 * stamps.max())


def test_noise_has_the_given_correlation() -> None:
    """Neighbouring pixels are correlated as asked, with the same variance."""
    correlation = np.zeros((3, 3))
    correlation[1], correlation[1, 1] = 0.3, 1.0
    scene = Scene(PSF, SCALE, noise_sigma=2.0, noise_correlation=correlation)
    noise = make_noise(GalaxySample.draw(np.arange(30), seed=1), scene)
    assert noise.shape == (30, 2, 63, 63)
    assert noise.std() == pytest.approx(2.0, rel=0.01)
    assert np.mean(noise[..., 1:] * noise[..., :-1]) / 4 == pytest.approx(0.3, abs=0.01)
    assert np.mean(noise[..., 1:, :] * noise[..., :-1, :]) / 4 == pytest.approx(0.0, abs=0.01)


def test_psf_from_a_kernel() -> None:
    """A PSF made from pixels has these pixels."""
    scene = Scene(PSF, SCALE, stamp_size=35)
    kernel = scene.draw_psf()
    again = Scene(make_psf_from_kernel(kernel, SCALE), SCALE, stamp_size=35).draw_psf()
    np.testing.assert_allclose(again, kernel, atol=1e-4 * kernel.max())


def test_estimators_have_one_interface() -> None:
    """Metacalibration starts from linear moments, re-Gaussianization not."""
    estimators: list[ShearEstimator] = [make_metacalibration(), Regauss(pixel_scale=SCALE)]
    assert [isinstance(estimator, LinearEstimator) for estimator in estimators] == [True, False]
    galaxies = GalaxySample.draw(np.arange(4), seed=1)
    scene = Scene(PSF, SCALE)
    stamps = draw_stamps(ParametricGalaxies("sersic").draw(galaxies), galaxies, scene, np.zeros(4))[:, 0]
    for estimator in estimators:
        shapes = estimator.measure(stamps, scene.draw_psf(), noise_sigma=1.0)
        assert isinstance(shapes, Shapes)
        assert shapes.e.shape == (4, 5, 2)
        assert np.isfinite(shapes.e[~shapes.bad]).all()


def test_regauss_measures_the_shear_of_round_galaxies() -> None:
    """It is HSM's distortion with the response of theory; failures, small
    and NaN objects are bad.
    """
    psf = galsim.Gaussian(fwhm=0.7)
    galaxy = galsim.Gaussian(fwhm=0.9, flux=1e3)
    scene = Scene(psf, SCALE)
    sheared = [galsim.Convolve(galaxy.shear(g1=g1, g2=g2), psf) for g1, g2 in ((0.02, 0), (0, -0.03))]
    stamps = [profile.drawImage(nx=63, ny=63, scale=SCALE, method="no_pixel").array for profile in sheared]
    stamps += [scene.draw_psf(), np.full((63, 63), np.nan)]
    for kernel in (scene.draw_psf(), np.repeat(scene.draw_psf()[None], 4, axis=0)):
        shapes = Regauss(pixel_scale=SCALE).measure(np.array(stamps), kernel, noise_sigma=1.0)
        np.testing.assert_array_equal(shapes.bad, [False, False, True, True])
        # A distortion is twice a small shear.
        np.testing.assert_allclose(shapes.e[:2, 0], [[0.04, 0], [0, -0.06]], atol=2e-4)
        response = (shapes.e[:2, 1, 0] - shapes.e[:2, 2, 0]) / (2 * shapes.step)
        np.testing.assert_allclose(response, 2.0, atol=0.01)
        assert shapes.size[0, 0] == pytest.approx(1 + (0.9 / 0.7) ** 2, rel=0.01)
        # That of a matched filter: flux / (noise sqrt(4 pi) sigma in pixels).
        sigma = np.hypot(0.7, 0.9) / 2.3548 / SCALE
        assert shapes.snr[0, 0] == pytest.approx(1e3 / np.sqrt(4 * np.pi) / sigma, rel=0.01)


@pytest.mark.parametrize("morphology", ["sersic", "knots"])
def test_bias_without_noise(morphology: str) -> None:
    """Isolated galaxies: m below 5e-4 after the cubic term, c below 1e-5,
    cross terms below 1e-4, leakage of the PSF below 1e-3.
    """
    galaxies = GalaxySample.draw(np.arange(24), seed=5)
    arms = make_arms((0.01, 0.02, 0.05), (0.05,))
    bias = fit(make_sums(galaxies, Scene(PSF, SCALE, n_orientations=4), arms, morphology=morphology))
    assert not bias.flag
    for i in "12":
        assert abs(bias.values[f"m{i}"]) < 5e-4
        assert abs(bias.values[f"c{i}"]) < 1e-5
        assert abs(bias.values[f"cross{i}"]) < 1e-4
        assert abs(bias.values[f"alpha{i}"]) < 1e-3
    assert bias.n_objects == 96


def test_noise_in_moments_is_noise_in_pixels() -> None:
    """Adding noise to moments gives the shapes of noisy stamps."""
    galaxies = GalaxySample.draw(np.arange(100), seed=1, magnitude=(22.0, 23.0))
    scene = Scene(PSF, SCALE, noise_sigma=2.0)
    arms = make_arms((0.02,))[:2]
    bins = {"all": Bin(), "bright": Bin(min_snr=50.0), "small": Bin("half_light_radius", high=0.3)}
    pixels, moments = (
        make_sums(galaxies, scene, arms, bins=bins, n_realizations=n, n_blocks=2) for n in (0, 10)
    )
    for label in bins:
        one, other = (sums["metacal", label].values.sum(axis=(0, 1)) for sums in (pixels, moments))
        assert other[0, 3] == pytest.approx(10 * one[0, 3], rel=0.05)
        for axis, (plus, minus) in enumerate(((1, 2), (3, 4))):
            response = [(s[plus, axis] - s[minus, axis]) / s[0, 2] / 0.02 for s in (one, other)]
            assert response[0] == pytest.approx(response[1], rel=0.15)


def test_pairing_survives_any_order() -> None:
    """Blocks of other galaxies and sizes add up to the same sums."""
    galaxies = GalaxySample.draw(np.arange(8), seed=1)
    scene, arms = Scene(PSF, SCALE, noise_sigma=1.0), make_arms((0.02,))[:2]
    forward, backward = (
        make_sums(sample, scene, arms, n_blocks=n)["metacal", "all"].values.sum(axis=0)
        for sample, n in ((galaxies, 2), (galaxies[::-1], 3))
    )
    np.testing.assert_allclose(forward, backward, rtol=1e-6, atol=1e-6)


def test_bins_are_checked() -> None:
    """A quantity that does not exist is named beside those that do."""
    with pytest.raises(ValueError, match="not in colour"):
        Bin("colour")


def test_real_galaxies(tmp_path: Path) -> None:
    """Images of a GalSim catalogue can be sheared and measured."""
    catalog = RealGalaxies(galsim.RealGalaxyCatalog(make_real_catalog(tmp_path), dir=str(tmp_path)))
    galaxies = GalaxySample.draw(np.arange(4), seed=1)
    profile = catalog.make_profile(galaxies, 2)
    assert profile.flux == pytest.approx(1.0)
    assert profile == catalog.make_profile(galaxies[2:], 0)
    sums = compute_shear_sums(
        galaxies,
        catalog,
        Scene(PSF, SCALE),
        make_arms((0.02,)),
        estimators={"metacal": make_metacalibration()},
        bins=ALL,
        block=0,
    )
    bias = fit(sums)
    assert bias.reason == "one block has no error"
    assert abs(bias.values["m1"]) < 5e-3


def make_galaxy_model(size: int = 64, pixel_scale: float = 0.06) -> ModelPackage:
    """Return a conditional VAE with random weights."""
    conditions = [[r, m, z] for r in (0.1, 1.0) for m in (18.0, 26.0) for z in (0.01, 4.0)]
    network = {
        "conditions": ConditionSpace.fit(np.array(conditions)).to_settings(),
        "pixel_scale": pixel_scale,
        "size": size,
        "width": 2,
        "latents": 4,
    }
    torch.manual_seed(3)
    cvae = Cvae(**network)  # type: ignore[arg-type]
    return ModelPackage(
        name="test",
        version="1",
        architecture=ARCHITECTURE,
        settings=ModelSettings(
            bands=("F814W",), pixel_scale=pixel_scale, stamp_size=size + 1, network=network
        ),
        weights={key: value.numpy() for key, value in cvae.state_dict().items()},
    )


def test_galaxies_of_a_network() -> None:
    """They have unit flux, follow their IDs, and measure the shear."""
    galaxies = GalaxySample.draw(np.arange(6), seed=1)
    morphology = CvaeGalaxies(make_galaxy_model())
    images = morphology.draw(galaxies)
    assert (images.array.shape, images.pixel_scale) == ((6, 33, 33), 0.12)
    np.testing.assert_allclose(images.array.sum(axis=(1, 2)), 1.0, rtol=0.02)
    np.testing.assert_array_equal(morphology.draw(galaxies[3:]).array, images.array[3:])
    assert not np.allclose(images.array[0], images.array[1])
    sums = compute_shear_sums(
        galaxies,
        morphology,
        Scene(PSF, SCALE),
        make_arms((0.02,)),
        estimators={"metacal": make_metacalibration()},
        bins=ALL,
        block=0,
    )
    assert abs(fit(sums).values["m1"]) < 2e-3


def make_real_catalog(folder: Path) -> str:
    """Write a catalogue of two galaxies as those of COSMOS are written."""
    psf = galsim.Gaussian(fwhm=0.1)
    images, psfs = [], []
    for radius in (0.3, 0.5):
        galaxy = galsim.Convolve(galsim.Exponential(half_light_radius=radius, flux=100.0).shear(g1=0.2), psf)
        images.append(galaxy.drawImage(nx=128, ny=128, scale=0.03))
        psfs.append(psf.drawImage(nx=32, ny=32, scale=0.03, method="no_pixel"))
    galsim.fits.writeMulti(images, str(folder / "images.fits"))
    galsim.fits.writeMulti(psfs, str(folder / "psfs.fits"))
    table = Table(
        {
            "IDENT": [1, 2],
            "MAG": [22.0, 24.0],
            "BAND": ["F814W"] * 2,
            "WEIGHT": [1.0, 1.0],
            "GAL_FILENAME": ["images.fits"] * 2,
            "PSF_FILENAME": ["psfs.fits"] * 2,
            "GAL_HDU": [0, 1],
            "PSF_HDU": [0, 1],
            "PIXEL_SCALE": [0.03, 0.03],
            "NOISE_MEAN": [0.0, 0.0],
            "NOISE_VARIANCE": [1e-6, 1e-6],
            "STAMP_FLUX": [100.0, 100.0],
        }
    )
    table.write(folder / "catalog.fits")
    return "catalog.fits"


def test_wrong_psf_is_seen() -> None:
    """A PSF that is too large by 2% is a bias at more than 5 sigma."""
    galaxies = GalaxySample.draw(np.arange(24), seed=5)
    true, wrong = (
        make_sums(galaxies, Scene(PSF, SCALE, psf_size_error=error), make_arms((0.02,)))["metacal", "all"]
        for error in (0.0, 0.02)
    )
    bias = fit_bias(wrong, reference=true)
    for name in ("m1", "m2", "c1", "c2"):
        assert abs(bias.values[name]) > 5 * bias.errors[name], name
    assert bias.values["m1"] > 0.02


def check_small(bias: ShearBias) -> None:
    """Check that m and c are small, and known well enough to say so."""
    for i in "12":
        assert bias.errors[f"m{i}"] < 1.5e-3
        assert abs(bias.values[f"m{i}"]) < max(2e-3, 3 * bias.errors[f"m{i}"])
        assert abs(bias.values[f"c{i}"]) < max(1e-4, 3 * bias.errors[f"c{i}"])


def make_centered_sums(estimator: ShearEstimator, scene: Scene) -> ShearSums:
    """Measure galaxies in the middle of their stamps."""
    galaxies = GalaxySample.draw(np.arange(96), seed=5, magnitude=(20.0, 23.0))
    galaxies.offset[:] = 0.0
    parts = [
        compute_shear_sums(
            galaxies[first : first + 12],
            ParametricGalaxies("sersic"),
            scene,
            make_arms((0.02,)),
            estimators={"it": estimator},
            bins={"all": Bin()},
            block=first,
        )["it", "all"]
        for first in range(0, len(galaxies), 12)
    ]
    return ShearSums.concatenate(parts)


@pytest.mark.parametrize("noise_sigma", [0.0, 1.3])
def test_anacal_agrees(noise_sigma: float) -> None:
    """AnaCal, which shares no code with metacalibration, sees the same m
    within errors, and to 5e-4 without noise.
    """
    pytest.importorskip("anacal")
    scene = Scene(PSF, SCALE, noise_sigma=noise_sigma)
    other, own = (
        make_centered_sums(estimator, scene)
        for estimator in (AnaCal(pixel_scale=SCALE), make_metacalibration())
    )
    difference = fit_bias(other, reference=own)
    assert not difference.flag
    for name in ("m1", "m2", "c1", "c2"):
        limit = 5e-4 if name.startswith("m") else 1e-5
        assert abs(difference.values[name]) < max(limit, 4 * difference.errors[name]), name
        if noise_sigma == 0 and name.startswith("m"):
            assert abs(fit_bias(other).values[name]) < 1e-3


def test_anacal_flags_and_groups() -> None:
    """NaN stamps are bad; a PSF of each stamp gives what one PSF does."""
    pytest.importorskip("anacal")
    galaxies = GalaxySample.draw(np.arange(3), seed=5, magnitude=(20.0, 21.0))
    scene = Scene(PSF, SCALE)
    stamps = draw_stamps(ParametricGalaxies("sersic").draw(galaxies), galaxies, scene, np.zeros(4))[:, 0]
    stamps[1] = np.nan
    psf = scene.draw_psf()
    one, each = (AnaCal(pixel_scale=SCALE).measure(stamps, p) for p in (psf, np.repeat(psf[None], 3, axis=0)))
    np.testing.assert_array_equal(one.bad, [False, True, False])
    np.testing.assert_allclose(each.e, one.e, rtol=1e-6)


def test_anacal_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the message says how to get it."""
    monkeypatch.setitem(sys.modules, "anacal", None)
    with pytest.raises(ImportError, match=r"meas-deeplearn\[anacal\]"):
        AnaCal(pixel_scale=SCALE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight_snr",
    [
        pytest.param(
            0.0,
            marks=pytest.mark.xfail(
                strict=True, reason="Objects of a signal to noise near 3 make the error of m 3e-3."
            ),
        ),
        10.0,
    ],
)
def test_noise_without_cut(weight_snr: float) -> None:
    """With the noise of a year m stays below 2e-3 without a cut, too: if
    weights keep the objects of a signal to noise near 3 from ruling.
    """
    galaxies = GalaxySample.draw(np.arange(1500), seed=21, magnitude=(20.0, 25.2))
    scene, arms = Scene(PSF, SCALE, noise_sigma=4.0), make_arms((0.02,))
    estimators = {"metacal": make_metacalibration(weight_snr=weight_snr)}
    sums = make_sums(galaxies, scene, arms, estimators=estimators, bins=ALL, n_blocks=50, n_realizations=400)
    check_small(fit(sums, "all"))


@pytest.mark.slow
def test_noise_and_selection() -> None:
    """With the noise of a year and a cut m stays below 2e-3, thanks to
    the noise correction and the response of the selection; without either,
    the bias is seen at 5 sigma.
    """
    galaxies = GalaxySample.draw(np.arange(1500), seed=21, magnitude=(20.0, 25.2))
    scene, arms = Scene(PSF, SCALE, noise_sigma=4.0), make_arms((0.02,))
    bins = {"all": Bin(), "cut": Bin(min_snr=10.0), "wrong": Bin(min_snr=10.0, respond=False)}
    sums, without = (
        make_sums(galaxies, scene, arms, bins=bins, n_blocks=50, n_realizations=400, fixnoise=fixnoise)
        for fixnoise in (True, False)
    )
    check_small(fit(sums, "cut"))
    # Faults are injected, and must show.
    for faulty, reference in (
        (sums["metacal", "wrong"], sums["metacal", "cut"]),
        (without["metacal", "all"], None),
    ):
        bias = fit_bias(faulty, reference=reference)
        mean = (bias.values["m1"] + bias.values["m2"]) / 2
        error = np.sqrt(bias.covariance[:2, :2].sum()) / 2
        assert abs(mean) > 5 * error

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

"""Tests of metacalibration as a matrix product."""

from __future__ import annotations

import galsim
import numpy as np
import pytest

from lsst.meas.deeplearn.shear.metacal import DERIVATIVES, Metacalibration, compute_target_fwhm
from lsst.meas.deeplearn.shear.shapes import N_MOMENTS, STEPS, Shapes
from lsst.meas.deeplearn.shear.simulation import correlate_noise

SCALE, SIZE, TARGET_FWHM, WEIGHT_FWHM, STEP = 0.2, 63, 0.85, 1.2, 0.01
PSF = galsim.Moffat(beta=2.5, fwhm=0.7).shear(g1=0.02, g2=-0.02)
SHEARS = {"ns": (0.0, 0.0), "1p": (STEP, 0.0), "1m": (-STEP, 0.0), "2p": (0.0, STEP), "2m": (0.0, -STEP)}


def make_metacalibration(**kwargs: object) -> Metacalibration:
    """Return an engine in double precision."""
    import torch

    settings: dict[str, object] = {
        "pixel_scale": SCALE,
        "stamp_size": SIZE,
        "target_fwhm": TARGET_FWHM,
        "weight_fwhm": WEIGHT_FWHM,
        "step": STEP,
        "dtype": torch.float64,
    }
    return Metacalibration(**(settings | kwargs))  # type: ignore[arg-type]


def draw(profile: galsim.GSObject, size: int = SIZE) -> np.ndarray:
    """Return the values of a profile at pixels."""
    image = profile.drawImage(nx=size, ny=size, scale=SCALE, method="no_pixel", dtype=np.float64)
    return np.asarray(image.array)


def make_stamps(n: int, psf: galsim.GSObject = PSF, seed: int = 1) -> np.ndarray:
    """Draw galaxies off the centre of their stamps by up to half a pixel."""
    rng = np.random.default_rng(seed)
    stamps = []
    for k in range(n):
        galaxy = galsim.Sersic([1.0, 1.5, 2.5][k % 3], half_light_radius=rng.uniform(0.2, 0.6), flux=100.0)
        galaxy = galaxy.shear(q=rng.uniform(0.3, 1.0), beta=rng.uniform(0, np.pi) * galsim.radians)
        galaxy += 0.1 * galsim.Gaussian(sigma=0.1, flux=100.0).shift(*rng.uniform(-0.3, 0.3, 2))
        stamps.append(draw(galsim.Convolve(galaxy.shift(*rng.uniform(-SCALE / 2, SCALE / 2, 2)), psf)))
    return np.array(stamps)


def measure_by_galsim(stamp: np.ndarray, psf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Deconvolve, shear and reconvolve an image, and measure its pixels with
    a weight that follows the centroid; return ellipticities and sizes.
    """
    image, star = (
        galsim.InterpolatedImage(galsim.Image(array, scale=SCALE), x_interpolant="lanczos15")
        for array in (stamp, psf)
    )
    deconvolved = galsim.Convolve(image, galsim.Deconvolve(star))
    axis = (np.arange(SIZE) - SIZE // 2) * SCALE
    var, target_var = (np.array([WEIGHT_FWHM, TARGET_FWHM]) / 2.3548200450309493) ** 2
    e, size = [], []
    for name in STEPS:
        sheared = deconvolved.shear(g1=SHEARS[name][0], g2=SHEARS[name][1])
        pixels = draw(galsim.Convolve(sheared, galsim.Gaussian(fwhm=TARGET_FWHM)))
        center = np.zeros(2)
        for _ in range(30):
            x, y = np.meshgrid(axis - center[0], axis - center[1])
            weighted = pixels * np.exp(-0.5 * (x**2 + y**2) / var)
            flux = weighted.sum()
            center += 2 * np.array([(weighted * x).sum(), (weighted * y).sum()]) / flux
        plus, cross = (weighted * (x**2 - y**2)).sum(), (weighted * 2 * x * y).sum()
        e.append([plus / flux / var, cross / flux / var])
        size.append((weighted * (x**2 + y**2)).sum() / flux * (1 / var + 1 / target_var) / 2)
    return np.array(e), np.array(size)


def compute_response(shapes: Shapes) -> np.ndarray:
    """Return the response of each object, shape ``(N, 2, 2)``."""
    plus, minus = shapes.e[:, [1, 3]], shapes.e[:, [2, 4]]
    response: np.ndarray = np.swapaxes(plus - minus, 1, 2) / (2 * shapes.step)
    return response


def test_agrees_with_galsim() -> None:
    """Ellipticities are those of an independent metacalibration to 1e-5, and
    so are sizes and responses within the accuracy of pixels.
    """
    stamps, psf = make_stamps(6), draw(PSF)
    engine = make_metacalibration()
    assert engine.compute_moments(stamps, psf)[0].shape == (6, N_MOMENTS) == (6, len(DERIVATIVES))
    found = engine.measure(stamps, psf)
    e, size = (np.array(parts) for parts in zip(*(measure_by_galsim(s, psf) for s in stamps), strict=True))
    np.testing.assert_allclose(found.e, e, atol=1e-5)
    np.testing.assert_allclose(found.size, size, atol=1e-4)
    response = np.swapaxes(e[:, [1, 3]] - e[:, [2, 4]], 1, 2) / (2 * STEP)
    np.testing.assert_allclose(compute_response(found), response, atol=1e-3)


def test_psf_of_each_agrees_with_galsim() -> None:
    """With a grid of PSFs each stamp is deconvolved from its own."""
    profiles = [
        galsim.Moffat(beta=beta, fwhm=fwhm).shear(g1=g1, g2=-0.5 * g1)
        for beta in (2.5, 3.5)
        for fwhm in (0.6, 0.75)
        for g1 in (-0.03, 0.05)
    ]
    stamps = np.concatenate([make_stamps(1, psf, seed) for seed, psf in enumerate(profiles)])
    psfs = np.stack([draw(psf) for psf in profiles])
    engine = make_metacalibration()
    found = engine.measure(stamps, psfs)
    for k, psf in enumerate(psfs):
        np.testing.assert_allclose(found.e[k], measure_by_galsim(stamps[k], psf)[0], atol=1e-5)
        np.testing.assert_allclose(found.e[k], engine.measure(stamps[k : k + 1], psf).e[0], atol=1e-10)


def test_round_object() -> None:
    """A star is round, of the size of a star, and where it is."""
    engine = make_metacalibration()
    moments, _ = engine.compute_moments(draw(PSF.shift(0.03, -0.05))[None], draw(PSF))
    shapes = engine.compute_shapes(moments, 0.0)
    np.testing.assert_allclose(shapes.e, 0.0, atol=2e-4)
    np.testing.assert_allclose(shapes.size[:, 0], 1.0, atol=1e-3)
    assert moments[0, DERIVATIVES.index((1, 0))] > 0 > moments[0, DERIVATIVES.index((0, 1))]


@pytest.mark.parametrize("each", [False, True], ids=["one PSF", "PSF of each"])
def test_place_in_the_stamp_does_not_matter(each: bool) -> None:
    """Shapes of lumpy galaxies stay as they are when they move by most of a
    pixel, and so do their responses.
    """
    knots = [galsim.Gaussian(sigma=0.05, flux=0.2).shift(0.4, 0.1), galsim.Gaussian(sigma=0.05, flux=0.1)]
    galaxy = galsim.Add(galsim.Exponential(half_light_radius=0.4).shear(g1=0.2, g2=0.1), *knots)
    places = [(0.0, 0.0), (0.1, 0.0), (-0.1, 0.07), (0.05, -0.1)]
    stamps = np.stack([draw(galsim.Convolve(galaxy.shift(*place), PSF)) for place in places])
    psf = np.repeat(draw(PSF)[None], 4, axis=0) if each else draw(PSF)
    shapes = make_metacalibration().measure(stamps, psf)
    np.testing.assert_allclose(shapes.e[1:], shapes.e[:1].repeat(3, axis=0), atol=2e-5)
    response = compute_response(shapes)
    np.testing.assert_allclose(response[1:], response[:1].repeat(3, axis=0), atol=1e-3)


def test_float32_and_batches_make_no_difference() -> None:
    """Precision and batches change shapes and responses by 1e-6 at most."""
    import torch

    stamps, psf = make_stamps(10), draw(PSF)
    psfs = np.repeat(psf[None], 10, axis=0)
    expected = make_metacalibration().measure(stamps, psf)
    single = make_metacalibration(dtype=torch.float32)
    batched = make_metacalibration()
    batched._batch_size = 3
    for shapes in (
        single.measure(stamps, psf),
        single.measure(stamps, psfs),
        batched.measure(stamps, psfs),
        Shapes.concatenate([single.measure(stamps[:4], psf), single.measure(stamps[4:], psf)]),
    ):
        np.testing.assert_allclose(shapes.e, expected.e, atol=1e-6)
        np.testing.assert_allclose(compute_response(shapes), compute_response(expected), atol=2e-6)


@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="torch sees no GPU")
def test_gpu_makes_no_difference() -> None:
    """A GPU gives the shapes that the CPU gives."""
    stamps, psf = make_stamps(10), draw(PSF)
    for one in (psf, np.repeat(psf[None], 10, axis=0)):
        shapes = [make_metacalibration(device=device).measure(stamps, one) for device in ("cpu", "cuda")]
        np.testing.assert_allclose(shapes[0].e, shapes[1].e, atol=1e-6)


@pytest.mark.parametrize("each", [False, True], ids=["one PSF", "PSF of each"])
def test_fixnoise_is_turned(each: bool) -> None:
    """The added noise goes through the shears in a frame turned by 90
    degrees, and comes back as it was.
    """
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((3, SIZE, SIZE))
    psf = draw(galsim.Gaussian(fwhm=0.7))
    psfs = np.repeat(psf[None], 3, axis=0) if each else psf
    engine = make_metacalibration()
    tensor = engine._to_tensor(noise)
    there, plain = (
        engine._compute_moments(tensor, psfs, turned=turned)[0].numpy() for turned in (True, False)
    )
    np.testing.assert_allclose(there, plain, atol=1e-9)
    # A shear of the turned frame is the opposite shear of this one: noise
    # that is added to itself does not respond.
    bright = engine.compute_moments(make_stamps(3, galsim.Gaussian(fwhm=0.7)), psfs)[0]
    twice = engine.compute_shapes(np.concatenate([bright, 1e3 * plain], axis=1), 0.0)
    once = engine.compute_shapes(bright + 1e3 * plain, 0.0)
    np.testing.assert_allclose(twice.e[:, 0], once.e[:, 0], atol=1e-9)


@pytest.mark.parametrize("fixnoise", [False, True])
@pytest.mark.parametrize("white", [True, False])
def test_moment_covariance(fixnoise: bool, white: bool) -> None:
    """The moments of noisy stamps scatter as predicted, and as drawn."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((2, 4000, SIZE + 1, SIZE + 1), dtype=np.float32)
    correlation = None if white else np.array([[0.0, 0.2, 0.1], [0.25, 1.0, 0.25], [0.1, 0.2, 0.0]])
    if correlation is not None:
        noise = correlate_noise(noise, correlation)
    noise = np.ascontiguousarray(noise[:, :, :SIZE, :SIZE])
    engine, psf = make_metacalibration(noise_correlation=correlation), draw(PSF)
    moments, variance = engine.compute_moments(noise[0], psf)
    if fixnoise:
        more = engine._compute_moments(engine._to_tensor(noise[1]), psf, turned=True)[0].numpy()
        moments = np.concatenate([moments, more], axis=1)
    expected = engine.compute_moment_covariance(psf, fixnoise=fixnoise)
    sigma = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(variance, sigma[0] ** 2, rtol=1e-6)
    moments, expected = moments / sigma, expected / sigma / sigma[:, None]
    np.testing.assert_allclose(moments.T @ moments / len(moments), expected, atol=0.1)
    drawn, one = engine.draw_noise_moments(psf, rng.standard_normal((4000, len(sigma))), fixnoise=fixnoise)
    drawn /= sigma
    np.testing.assert_allclose(drawn.T @ drawn / len(drawn), expected, atol=0.1)
    assert one == pytest.approx(sigma[0] ** 2)
    each = engine.compute_moments(noise[0, :2], np.repeat(psf[None], 2, axis=0))[1]
    np.testing.assert_allclose(each, one, rtol=1e-5)


def test_selection_and_weights_follow_the_shear() -> None:
    """Cuts and weights are taken from each version of an image."""
    stamps, psf = make_stamps(8), draw(PSF)
    engine = make_metacalibration(weight_snr=20.0)
    shapes = engine.measure(stamps, psf, noise_sigma=0.1)
    np.testing.assert_allclose(shapes.weight, 1 / (1 + (20 / shapes.snr) ** 2))
    limit = float(np.sort(shapes.snr[0])[2])
    assert sorted(shapes.select(snr=(limit, np.inf))[0]) == [False, False, True, True, True]
    assert len(set(shapes.select(snr=(limit, np.inf), respond=False)[0])) == 1
    np.testing.assert_array_equal(shapes.select(size=(0.0, 1.0)), shapes.size < 1.0)


@pytest.mark.parametrize("each", [False, True], ids=["one PSF", "PSF of each"])
def test_bad_stamps_are_flagged(each: bool) -> None:
    """NaN pixels and negative objects come out as bad, others are good."""
    stamps, psf = make_stamps(3), draw(PSF)
    stamps[1, 5, 5] = np.nan
    stamps[2] *= -1
    psfs = np.repeat(psf[None], 3, axis=0) if each else psf
    shapes = make_metacalibration().measure(stamps, psfs)
    np.testing.assert_array_equal(shapes.bad, [False, True, True])
    assert np.isnan(shapes.e[1:]).all()
    assert (shapes.weight[1:] == 0).all()
    np.testing.assert_array_equal(shapes.select(), ~shapes.bad[:, None].repeat(5, axis=1))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (draw(galsim.Gaussian(fwhm=0.25)), "undersampled"),
        (draw(galsim.Moffat(beta=2.5, fwhm=1.0)), "too wide for a target PSF of 0.850 arcsec"),
        (np.full((SIZE, SIZE), np.nan), "not finite"),
    ],
)
def test_unusable_psf(kernel: np.ndarray, message: str) -> None:
    """One bad PSF is an error with the cure; among many it is a flag."""
    engine, stamps = make_metacalibration(), make_stamps(2)
    with pytest.raises(ValueError, match=message):
        engine.measure(stamps, kernel)
    shapes = engine.measure(stamps, np.stack([draw(PSF), kernel]))
    np.testing.assert_array_equal(shapes.bad, [False, True])


def test_shapes_of_arrays_are_checked() -> None:
    """Arrays that do not fit together are refused."""
    engine, stamps = make_metacalibration(), make_stamps(2)
    with pytest.raises(ValueError, match="one PSF or one each"):
        engine.measure(stamps, np.zeros((3, 21, 21)))
    with pytest.raises(ValueError, match="must be odd"):
        engine.measure(stamps, np.zeros((20, 20)))
    with pytest.raises(ValueError, match="odd number"):
        make_metacalibration(stamp_size=64)
    with pytest.raises(ValueError, match="must be positive"):
        make_metacalibration(step=0.0)
    with pytest.raises(ValueError, match="same step"):
        Shapes.concatenate([])


def test_small_psf_images() -> None:
    """A PSF image may be smaller than the stamps."""
    psf, stamps = galsim.Gaussian(fwhm=0.7), make_stamps(2, galsim.Gaussian(fwhm=0.7))
    engine = make_metacalibration()
    expected = engine.measure(stamps, draw(psf)).e
    np.testing.assert_allclose(engine.measure(stamps, draw(psf, 21)).e, expected, atol=1e-6)
    psfs = np.repeat(draw(psf, 21)[None], 2, axis=0)
    np.testing.assert_allclose(engine.measure(stamps, psfs).e, expected, atol=1e-6)


@pytest.mark.parametrize("fwhm", [0.6, 0.9])
def test_target_fwhm(fwhm: float) -> None:
    """The new PSF is wider than the widest PSF by a fifth, and usable."""
    psfs = np.stack([draw(galsim.Moffat(beta=2.5, fwhm=width)) for width in (0.9 * fwhm, fwhm)])
    target = compute_target_fwhm(psfs, SCALE)
    assert target == pytest.approx(1.2 * fwhm, rel=0.03)
    assert not make_metacalibration(target_fwhm=target).measure(make_stamps(2), psfs).bad.any()
    with pytest.raises(ValueError, match="no PSF"):
        compute_target_fwhm(psfs * np.nan, SCALE)

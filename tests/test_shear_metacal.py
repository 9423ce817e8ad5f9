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

from lsst.meas.deeplearn.shear.metacal import MOMENTS, Metacalibration, compute_target_fwhm
from lsst.meas.deeplearn.shear.shapes import STEPS, Shapes

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


def measure_by_galsim(stamp: np.ndarray, psf: np.ndarray) -> np.ndarray:
    """Deconvolve, shear and reconvolve an image, and sum its pixels."""
    image, star = (
        galsim.InterpolatedImage(galsim.Image(array, scale=SCALE), x_interpolant="lanczos15")
        for array in (stamp, psf)
    )
    deconvolved = galsim.Convolve(image, galsim.Deconvolve(star))
    axis = (np.arange(SIZE) - SIZE // 2) * SCALE
    x, y = np.meshgrid(axis, axis)
    weight = np.exp(-0.5 * (x**2 + y**2) / (WEIGHT_FWHM / 2.3548200450309493) ** 2)
    moments, third = [], []
    for name in STEPS:
        sheared = deconvolved.shear(g1=SHEARS[name][0], g2=SHEARS[name][1])
        weighted = weight * draw(galsim.Convolve(sheared, galsim.Gaussian(fwhm=TARGET_FWHM)))
        moments += [(weighted * q).sum() for q in (1, x, y, x**2 - y**2, 2 * x * y, x**2 + y**2)]
        if name == "ns":
            third = [(weighted * q).sum() for q in (x**3, x**2 * y, x * y**2, y**3)]
    return np.array(moments + third)


def compute_response(shapes: Shapes) -> np.ndarray:
    """Return the response of each object, shape ``(N, 2, 2)``."""
    plus, minus = shapes.e[:, [1, 3]], shapes.e[:, [2, 4]]
    response: np.ndarray = np.swapaxes(plus - minus, 1, 2) / (2 * shapes.step)
    return response


def test_agrees_with_galsim() -> None:
    """Ellipticities are those of an independent metacalibration to 1e-5, and
    the moments those of the images that GalSim draws.
    """
    stamps, psf = make_stamps(6), draw(PSF)
    engine = make_metacalibration()
    moments, _ = engine.compute_moments(stamps, psf)
    expected = np.array([measure_by_galsim(stamp, psf) for stamp in stamps])
    assert moments.shape == (6, 34)
    np.testing.assert_allclose(moments, expected, atol=3e-5 * expected[:, 0].max())
    found, wanted = (
        engine.compute_shapes(moments, np.zeros(12)),
        engine.compute_shapes(expected, np.zeros(12)),
    )
    np.testing.assert_allclose(found.e, wanted.e, atol=1e-5)
    np.testing.assert_allclose(found.size, wanted.size, atol=1e-4)
    np.testing.assert_allclose(compute_response(found), compute_response(wanted), atol=2e-3)


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
        wanted = engine.compute_shapes(measure_by_galsim(stamps[k], psf)[None], np.zeros(12))
        np.testing.assert_allclose(found.e[k], wanted.e[0], atol=1e-5)
        np.testing.assert_allclose(found.e[k], engine.measure(stamps[k : k + 1], psf).e[0], atol=1e-10)


def test_round_object() -> None:
    """A star is round, of the size of a star, and where it is."""
    engine = make_metacalibration()
    moments, _ = engine.compute_moments(draw(PSF.shift(0.03, -0.05))[None], draw(PSF))
    shapes = engine.compute_shapes(moments, np.zeros(12))
    np.testing.assert_allclose(shapes.e, 0.0, atol=2e-4)
    np.testing.assert_allclose(shapes.size[:, 0], 1.0, atol=1e-3)
    assert moments[0, MOMENTS.index("x")] > 0 > moments[0, MOMENTS.index("y")]


def test_gaussian_is_exact_off_the_centre() -> None:
    """For a Gaussian object the position in the stamp does not matter."""
    psf = galsim.Gaussian(fwhm=0.7)
    galaxy = galsim.Convolve(galsim.Gaussian(fwhm=0.6).shear(g1=0.2, g2=0.1), psf)
    stamps = np.stack([draw(galaxy.shift(dx, dy)) for dx, dy in ((0.0, 0.0), (0.1, 0.0), (-0.1, 0.07))])
    shapes = make_metacalibration().measure(stamps, draw(psf))
    np.testing.assert_allclose(shapes.e[1:], shapes.e[:1].repeat(2, axis=0), atol=1e-6)


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
    np.testing.assert_allclose(there[:, 30:], plain[:, 30:], atol=1e-12)
    # A shear of the turned frame is the opposite shear of this one.
    there, plain = (moments[:, :30].reshape(3, 5, 6) for moments in (there, plain))
    np.testing.assert_allclose(there, plain[:, [0, 2, 1, 4, 3]], atol=1e-12)


@pytest.mark.parametrize("fixnoise", [False, True])
def test_moment_covariance(fixnoise: bool) -> None:
    """The moments of noisy stamps scatter as predicted, and as drawn."""
    rng = np.random.default_rng(3)
    noise_stamps = rng.standard_normal((2, 4000, SIZE, SIZE), dtype=np.float32)
    engine, psf = make_metacalibration(), draw(PSF)
    moments, covariances = engine.compute_moments(noise_stamps[0], psf)
    if fixnoise:
        moments += engine._compute_moments(engine._to_tensor(noise_stamps[1]), psf, turned=True)[0].numpy()
    expected = engine.compute_moment_covariance(psf, fixnoise=fixnoise)
    sigma = np.sqrt(np.diag(expected))
    moments, expected = moments / sigma, expected / sigma / sigma[:, None]
    np.testing.assert_allclose(moments.T @ moments / len(moments), expected, atol=0.1)
    drawn, noise = engine.draw_noise_moments(psf, rng.standard_normal((4000, 34)), fixnoise=fixnoise)
    drawn /= sigma
    np.testing.assert_allclose(drawn.T @ drawn / len(drawn), expected, atol=0.1)
    if not fixnoise:
        np.testing.assert_allclose(sigma[0] ** 2, covariances[0], rtol=1e-6)
    # All ways to the covariances that are used agree.
    for psfs in (psf, np.repeat(psf[None], 2, axis=0)):
        found = engine.compute_moments(noise_stamps[0, :2], psfs)[1]
        if fixnoise:
            turned = engine._compute_moments(engine._to_tensor(noise_stamps[1, :2]), psfs, turned=True)[1]
            found = np.concatenate([found[..., :1], found[..., 1:] + turned.numpy()[..., 1:]], axis=-1)
        np.testing.assert_allclose(found, np.broadcast_to(noise, found.shape), atol=1e-5 * noise.max())


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

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
import time

import galsim
import numpy as np
import pytest

from lsst.meas.deeplearn.cutouts import Cutouts
from lsst.meas.deeplearn.lenses.ring_finder import RingFinderConfig, compute_residuals, find_rings
from lsst.pex.config import FieldValidationError

BANDS = ("g", "r", "i")
NOISE = {"g": 2.5, "r": 3.0, "i": 4.5}  # nJy in a pixel of 0.2 arcsec
RED = {"g": 1000.0, "r": 5000.0, "i": 10_000.0}  # nJy, g - i = 2.5
BLUE = {"g": 3500.0, "r": 4200.0, "i": 5000.0}
SEEING = {"g": 0.85, "r": 0.8, "i": 0.7}  # arcsec


def make_host() -> galsim.GSObject:
    """Make an elliptical galaxy of unit flux."""
    return galsim.DeVaucouleurs(half_light_radius=0.9).shear(q=0.8, beta=30 * galsim.degrees)


def make_arc(*, radius: float = 1.5, start: float = 0.0, length: float = 120.0) -> galsim.GSObject:
    """Make an arc of unit flux; angles are in degrees."""
    angles = np.radians(np.linspace(start, start + length, 15))
    beads = [galsim.Gaussian(sigma=0.15).shift(radius * np.cos(t), radius * np.sin(t)) for t in angles]
    return galsim.Sum(beads).withFlux(1.0)


def make_companion() -> galsim.GSObject:
    """Make a small round galaxy of unit flux beside the lens."""
    return galsim.Exponential(half_light_radius=0.2).shift(1.6, -0.9)


def make_cutouts(
    sources: list[galsim.GSObject | None],
    *,
    pixel_scale: float = 0.2,
    offset: tuple[float, float] = (0.3, -0.2),
    seeing: dict[str, float] = SEEING,
    psf_shift: float = 0.0,
    host_flux: float = 1.0,
    noise: bool = True,
) -> Cutouts:
    """Make stamps of red hosts, some with blue sources.

    The object is ``offset`` pixels away from the centre of its pixel, and
    its PSF with it; the PSF of g is another ``psf_shift`` arcsec away.
    """
    rng = np.random.default_rng(98)
    n, size, psf_size = len(sources), 2 * round(4.5 / pixel_scale) + 1, 2 * round(2.5 / pixel_scale) + 1
    image, variance = np.zeros((2, n, len(BANDS), size, size), dtype=np.float32)
    psf = np.zeros((n, len(BANDS), psf_size, psf_size), dtype=np.float32)
    shift = (offset[0] * pixel_scale, offset[1] * pixel_scale)
    for b, band in enumerate(BANDS):
        kernel = galsim.Moffat(beta=3, fwhm=seeing[band])
        if band == "g":
            kernel = kernel.shift(psf_shift, 0.0)
        psf[:, b] = kernel.shift(shift).drawImage(nx=psf_size, ny=psf_size, scale=pixel_scale).array
        for k, source in enumerate(sources):
            scene = make_host() * RED[band] * host_flux
            if source is not None:
                scene = scene + source * BLUE[band]
            scene = galsim.Convolve(scene.shift(shift), kernel)
            flux = scene.drawImage(nx=size, ny=size, scale=pixel_scale).array
            variance[k, b] = (NOISE[band] * pixel_scale / 0.2) ** 2 + 0.02 * flux
            image[k, b] = flux
    if noise:
        image += rng.normal(size=image.shape) * np.sqrt(variance)
    return Cutouts(
        bands=BANDS,
        pixel_scale=pixel_scale,
        ids=np.arange(n),
        ra=np.full(n, 150.0),
        dec=np.full(n, 2.0),
        x=np.full(n, 1000.0 + offset[0]),
        y=np.full(n, 2000.0 + offset[1]),
        image=image,
        variance=variance,
        bad=np.zeros(image.shape, dtype=bool),
        psf=psf,
        off_edge=np.zeros(n, dtype=bool),
        missing_band=np.zeros((n, len(BANDS)), dtype=bool),
        missing_cell=np.zeros((n, len(BANDS)), dtype=bool),
    )


def make_pair_of_arcs() -> galsim.GSObject:
    """Make two images on either side of the lens, twice unit flux."""
    return make_arc(radius=1.8, start=20.0, length=60.0) + make_arc(radius=1.8, start=210.0, length=60.0)


@pytest.mark.parametrize("pixel_scale", [0.168, 0.2, 0.263])
def test_decision(pixel_scale: float) -> None:
    """Arcs are found and other things are not, at any pixel scale."""
    cutouts = make_cutouts([make_arc(), make_pair_of_arcs(), None, make_companion()], pixel_scale=pixel_scale)
    result = find_rings(cutouts)
    assert result.is_lens.tolist() == [True, True, False, False]
    assert result.n_regions.tolist()[:3] == [1, 2, 0]
    assert (result.snr[[0, 1, 3]] > 20).all()
    assert result.snr[2] < 6
    assert result.psf_matched.all()
    assert result.alpha[2] == pytest.approx(0.1, rel=0.15)


def test_pixel_scale() -> None:
    """The S/N does not depend on the pixel scale."""
    sources = [make_arc(), make_pair_of_arcs()]
    results = [find_rings(make_cutouts(sources, pixel_scale=scale, noise=False)) for scale in (0.168, 0.263)]
    np.testing.assert_allclose(results[0].snr, results[1].snr, rtol=0.03)
    np.testing.assert_allclose(results[0].alpha, results[1].alpha, rtol=0.03)


def test_depth() -> None:
    """The same signal to noise gives the same decision at any depth, unless
    limits are fixed.
    """
    cutouts = make_cutouts([make_arc(), make_pair_of_arcs(), None, make_companion()])
    deep = dataclasses.replace(cutouts, image=cutouts.image / 20, variance=cutouts.variance / 400)
    result, deep_result = find_rings(cutouts), find_rings(deep)
    assert deep_result.is_lens.tolist() == result.is_lens.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(deep_result.n_regions, result.n_regions)
    config = RingFinderConfig()
    config.limitNoise = 0.0
    assert not find_rings(deep, config).is_lens.any()
    config.limitNoise = -1.0
    with pytest.raises(FieldValidationError, match="negative"):
        config.validate()


def test_psf_matching() -> None:
    """A difference of the PSFs makes an arc, unless they are matched."""
    cutouts = make_cutouts([None], host_flux=20.0, seeing={"g": 0.9, "r": 0.8, "i": 0.6}, psf_shift=0.15)
    unmatched = dataclasses.replace(cutouts, psf=np.zeros((1, 3, 0, 0), dtype=np.float32))
    matched_result, unmatched_result = find_rings(cutouts), find_rings(unmatched)
    assert matched_result.psf_matched.all()
    assert not matched_result.is_lens.any()
    assert matched_result.snr[0] < 6
    assert not unmatched_result.psf_matched.any()
    assert unmatched_result.is_lens.all()
    assert unmatched_result.snr[0] > 30


def test_matched_residual_of_host_is_zero() -> None:
    """The convolved images of a galaxy of one colour cancel, wherever the
    galaxy lies on its pixel.
    """
    cutouts = make_cutouts([None], noise=False, offset=(0.45, -0.45))
    residuals = compute_residuals(cutouts)
    centre = np.hypot(residuals.x, residuals.y) < 2.7
    assert np.nanmax(np.abs(residuals.image / residuals.noise)[centre]) < 0.5
    row, column = np.unravel_index(np.argmin(np.hypot(residuals.x, residuals.y)[0]), (45, 45))
    blue = cutouts.image[0, 0]
    assert abs(row - np.argmax(blue.max(axis=1))) <= 1
    assert abs(column - np.argmax(blue.max(axis=0))) <= 1


def test_noise_of_residuals() -> None:
    """The noise of pixels and of sums is that of many realisations."""
    clean = make_cutouts([None], noise=False)
    n = 400
    cutouts = dataclasses.replace(clean[np.zeros(n, dtype=int)], image=np.repeat(clean.image, n, axis=0))
    rng = np.random.default_rng(5)
    cutouts.image = cutouts.image + rng.normal(size=cutouts.image.shape) * np.sqrt(cutouts.variance)
    residuals = compute_residuals(cutouts)
    # Far from the lens, where the noise of alpha does not matter.
    pixel = residuals.image[:, 9, 34]
    assert pixel.std() == pytest.approx(residuals.noise[:, 9, 34].mean(), rel=0.12)
    mask = np.zeros((1, 45, 45), dtype=bool)
    mask[:, 5:10, 25:39] = True
    expected = residuals.compute_sum_noise(mask, np.zeros(1, dtype=int))[0]
    assert residuals.image[:, mask[0]].sum(axis=1).std() == pytest.approx(expected, rel=0.12)
    # Independent pixels would have several times less.
    assert expected > 2.5 * np.sqrt((residuals.noise[0][mask[0]] ** 2).sum())


def test_snr_of_noise() -> None:
    """Noise alone has the S/N that the documentation says."""
    cutouts = make_cutouts([None] * 40)
    assert np.median(find_rings(cutouts).snr) == pytest.approx(3.5, abs=0.7)
    same_psf = dict.fromkeys(BANDS, 0.8)
    cutouts = make_cutouts([None] * 40, seeing=same_psf)
    cutouts.psf = np.zeros((40, 3, 0, 0), dtype=np.float32)
    assert np.median(find_rings(cutouts).snr) == pytest.approx(15.0, abs=3.0)


def test_bad_pixels() -> None:
    """Garbage under bad pixels changes nothing, elsewhere a star is one."""
    cutouts = make_cutouts([None, make_arc()])
    clean = find_rings(cutouts)
    cutouts.bad[:, 0, 30:33, 12:15] = True
    cutouts.image[:, 0, 30:33, 12:15] = 1e6
    cutouts.image[:, 2, 5, 5] = np.nan
    cutouts.variance[:, 0, 40, 7] = 0.0
    result = find_rings(cutouts)
    assert result.is_lens.tolist() == clean.is_lens.tolist() == [False, True]
    np.testing.assert_allclose(result.snr, clean.snr, rtol=0.25)


def test_not_computable() -> None:
    """What cannot be computed is NaN and no lens, and spoils no other."""
    cutouts = make_cutouts([make_arc()] * 7)
    cutouts.missing_band[0, 0] = True
    cutouts.bad[0, 0] = True
    cutouts.image[0, 0] = np.nan
    cutouts.variance[0, 0] = np.nan
    cutouts.bad[1, 2, 22, 22] = True  # the centre
    cutouts.image[2] = np.nan
    cutouts.bad[3, 0, :24] = True  # more than half of the annulus
    cutouts.image[4, 2] *= -1  # no red light
    cutouts.psf[5, 0] = np.nan
    result = find_rings(cutouts)
    assert np.isnan(result.snr).tolist() == [True] * 5 + [False] * 2
    assert np.isnan(result.alpha).tolist() == [True] * 5 + [False] * 2
    assert not result.is_lens[:5].any()
    assert not result.n_regions[:5].any()
    assert result.psf_matched.tolist() == [True] * 5 + [False, True]
    assert result.is_lens[6]
    np.testing.assert_array_equal(result.snr[6:], find_rings(cutouts[6:]).snr)


def test_batches() -> None:
    """Results do not depend on how many objects there are."""
    cutouts = make_cutouts([make_arc(), None])
    many = find_rings(cutouts[np.arange(300) % 2])
    one = find_rings(cutouts)
    np.testing.assert_allclose(many.snr, np.tile(one.snr, 150), rtol=1e-5)
    assert many.is_lens.tolist() == one.is_lens.tolist() * 150
    empty = find_rings(cutouts[:0])
    assert len(empty.snr) == len(empty.is_lens) == len(empty.n_regions) == 0


def test_inputs_are_not_changed() -> None:
    """The cutouts are the same afterwards."""
    cutouts = make_cutouts([make_arc()])
    cutouts.bad[0, 0, 3, 3] = True
    image, variance = cutouts.image.copy(), cutouts.variance.copy()
    find_rings(cutouts)
    np.testing.assert_array_equal(cutouts.image, image)
    np.testing.assert_array_equal(cutouts.variance, variance)


def test_refusals() -> None:
    """Stamps without the bands, too small ones and an empty annulus are
    refused with the cure.
    """
    cutouts = make_cutouts([None])
    config = RingFinderConfig()
    config.blueBand = "u"
    with pytest.raises(ValueError, match="u missing.  Configure blueBand"):
        find_rings(cutouts, config)
    with pytest.raises(ValueError, match="cut larger ones"):
        find_rings(dataclasses.replace(cutouts, pixel_scale=0.1))
    config.outerRadius = 0.2
    with pytest.raises(FieldValidationError, match="0.5 and 0.2 arcsec"):
        config.validate()


def test_speed() -> None:
    """More than 150 objects a second, on a busy machine as well."""
    cutouts = make_cutouts([make_arc(), None])[np.arange(256) % 2]
    start = time.process_time()
    find_rings(cutouts)
    assert 256 / (time.process_time() - start) > 150

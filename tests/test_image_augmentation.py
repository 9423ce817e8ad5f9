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


"""Tests of the random changes of stamps."""

from __future__ import annotations

import pytest
import torch

from lsst.meas.deeplearn.image_augmentation import ImageAugmentation


def test_no_stamp_is_warped() -> None:
    """A batch of which no stamp is chosen stays as it is."""
    images = torch.randn(2, 3, 9, 9)
    change = ImageAugmentation(size=9, zoom=(0.9, 1.1), max_rotation=90, warp_fraction=1e-9)
    out = change._warp(images, torch.Generator().manual_seed(1))
    assert torch.equal(out, images)


def test_no_generator_crops_only() -> None:
    """For validation stamps are cropped about their centre."""
    images = torch.randn(4, 2, 11, 11)
    change = ImageAugmentation(size=7, max_shift=2, max_blur=1, max_noise=2, flux_scatter=1)
    out, noise = change(images, None)
    assert torch.equal(out, images[..., 2:9, 2:9])
    assert torch.equal(noise, torch.ones(4))


def test_shifts_bring_in_real_pixels() -> None:
    """A shifted stamp is a piece of the larger one, up to a symmetry."""
    images = torch.arange(4 * 11 * 11, dtype=torch.float32).reshape(4, 1, 11, 11)
    out, _ = ImageAugmentation(size=7, max_shift=2)(images, torch.Generator().manual_seed(1))
    assert out.shape == (4, 1, 7, 7)
    for stamp, image in zip(out, images, strict=True):
        assert set(stamp.ravel().tolist()) <= set(image.ravel().tolist())
        assert len(set(stamp.ravel().tolist())) == 49


def test_all_symmetries_appear() -> None:
    """The eight symmetries of the square come with equal chance."""
    images = torch.arange(9.0).reshape(1, 1, 3, 3).expand(4000, 1, 3, 3)
    out, _ = ImageAugmentation(size=3)(images, torch.Generator().manual_seed(1))
    kinds, counts = torch.unique(out.reshape(4000, 9), dim=0, return_counts=True)
    assert len(kinds) == 8
    assert counts.min() > 400


def test_noise_keeps_its_unit() -> None:
    """Stamps with more noise are still in units of their noise."""
    images = torch.randn(500, 1, 15, 15, generator=torch.Generator().manual_seed(2))
    change = ImageAugmentation(size=15, max_noise=3)
    out, noise = change(images, torch.Generator().manual_seed(3))
    assert out.std().item() == pytest.approx(1.0, abs=0.01)
    assert 2.5 < noise.max() <= 3
    assert (noise == 1).float().mean().item() == pytest.approx(0.5, abs=0.07)


def test_noise_hides_the_signal_by_its_factor() -> None:
    """A signal falls, in units of the noise, as the noise rises."""
    out, noise = ImageAugmentation(size=45, max_noise=3)(
        torch.full((50, 1, 45, 45), 10.0), torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(out.mean(dim=(1, 2, 3)), 10 / noise, rtol=0, atol=0.1)


def test_one_band_is_dropped() -> None:
    """A stamp loses one band at most, each as often as the others."""
    change = ImageAugmentation(size=5, missing_fraction=0.3)
    out, _ = change(torch.ones(3000, 3, 5, 5), torch.Generator().manual_seed(3))
    missing = (out == 0).all(dim=(2, 3))
    assert missing.sum(dim=1).max() == 1
    torch.testing.assert_close(missing.float().mean(dim=0), torch.full((3,), 0.1), rtol=0, atol=0.02)


def test_areas_are_masked() -> None:
    """Strips and discs are set to 0, the same in the bands that have them,
    and discs leave the centre.
    """
    change = ImageAugmentation(size=45, masked_fraction=0.4)
    out, _ = change(torch.ones(3000, 3, 45, 45), torch.Generator().manual_seed(3))
    masked = out == 0
    assert masked.any(dim=(2, 3)).float().mean().item() == pytest.approx(0.4 * 0.75, abs=0.02)
    assert masked.float().mean(dim=(2, 3)).max() <= 7 / 45
    area = masked.any(dim=1)
    assert ((masked == area[:, None]) | ~masked.any(dim=(2, 3), keepdim=True)).all()
    is_strip = area.all(dim=1).any(dim=1) | area.all(dim=2).any(dim=1)
    is_disc = area.any(dim=(1, 2)) & ~is_strip
    assert is_strip.float().mean().item() == pytest.approx(0.2, abs=0.03)
    assert is_disc.float().mean().item() > 0.1
    assert not area[is_disc, 22, 22].any()


def test_blur_keeps_the_flux() -> None:
    """Half of the stamps are blurred, all keep their flux."""
    images = torch.zeros(200, 2, 21, 21)
    images[:, :, 10, 10] = 7e5
    out, _ = ImageAugmentation(size=21, max_blur=1.0)(images, torch.Generator().manual_seed(4))
    torch.testing.assert_close(out.sum(dim=(2, 3)), torch.full((200, 2), 7e5), rtol=1e-3, atol=0)
    sharp = (out[:, 0, 10, 10] > 7e5 - 10).float().mean().item()
    # A tenth is blurred too little to tell.
    assert sharp == pytest.approx(0.6, abs=0.12)


def test_blur_keeps_the_noise() -> None:
    """Blurred stamps have the noise that they had."""
    images = torch.randn(500, 2, 15, 15, generator=torch.Generator().manual_seed(2))
    out, noise = ImageAugmentation(size=15, max_blur=1.0)(images, torch.Generator().manual_seed(4))
    assert out.std().item() == pytest.approx(1.0, abs=0.01)
    assert (noise == 1).all()


def test_zoom_magnifies_about_the_centre() -> None:
    """A zoom by 2 doubles sizes and leaves the centre in its place."""
    axis = torch.arange(31.0) - 15
    r2 = axis[:, None] ** 2 + axis[None, :] ** 2
    images = torch.exp(-r2 / (2 * 3.0**2))[None, None]
    change = ImageAugmentation(size=31, zoom=(2.0, 2.0))
    out, _ = change(images, torch.Generator().manual_seed(5))
    torch.testing.assert_close(out[0, 0], torch.exp(-r2 / (2 * 6.0**2)), rtol=0, atol=0.03)


def test_rotation_turns_about_the_centre() -> None:
    """A line stays a line through the centre, at any angle."""
    images = torch.zeros(100, 1, 31, 31)
    images[:, :, 15] = 1.0
    out, _ = ImageAugmentation(size=31, max_rotation=90)(images, torch.Generator().manual_seed(5))
    axis = torch.arange(31.0) - 15
    radius = torch.hypot(axis[:, None], axis[None, :])
    # A line of unit width covers this much of a circle.
    covered = (out[:, 0] * (radius < 12)).sum(dim=(1, 2))
    assert covered.min() > 20
    assert covered.max() < 26
    assert (out[:, 0, 15, 15] > 0.6).all()
    # Off the axes of the pixels.
    assert (((out > 0.1) & (out < 0.9)).flatten(1).sum(dim=1) > 10).float().mean() > 0.9

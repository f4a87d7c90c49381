"""Masks drawn: grown and blurred as skimage and scipy do it, on latents, and back in pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import skimage.morphology
import torch
from PIL import Image

from rectiflow.errors import InputError
from rectiflow.models.images import SizePolicy, fit, placed
from rectiflow.steer.masks import (
    DerivedMask,
    latent_mask,
    mask_cells,
    pasted,
    picture_masks,
    read_mask,
)


def noise(height: int = 23, width: int = 31) -> Image.Image:
    """Grey points on black."""
    generator = np.random.default_rng(0)
    dots = generator.integers(0, 256, (height, width)) * (generator.random((height, width)) < 0.05)
    return Image.fromarray(dots.astype(np.uint8))


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "L"
    return np.asarray(image)


def drawn_mask(mask: Image.Image, grow: float = 0, blur: float = 0) -> Image.Image:
    """As it is read for a picture of its own size."""
    return read_mask(mask, mask.size, grow=grow, blur=blur)  # type: ignore[arg-type]


def test_brightness_is_softness() -> None:
    assert array(drawn_mask(Image.new("RGB", (3, 2), (255, 255, 255)))).min() == 255
    assert array(drawn_mask(Image.new("RGB", (3, 2), (128, 128, 128)))).tolist() == [[128] * 3] * 2
    assert np.array_equal(array(drawn_mask(noise())), array(noise()))


@pytest.mark.parametrize("radius", [1, 2, 5, 10**12])
def test_growing_is_dilation_by_a_disc(radius: int) -> None:
    expected = skimage.morphology.dilation(array(noise()), skimage.morphology.disk(min(radius, 40)))
    assert np.array_equal(array(drawn_mask(noise(), grow=radius)), expected)


@pytest.mark.parametrize("sigma", [0.5, 2.0, 3.3])
def test_blurring_is_gaussian(sigma: float) -> None:
    whole = Image.fromarray(np.kron(array(noise()), np.ones((3, 3), np.uint8)))
    expected = scipy.ndimage.gaussian_filter(
        array(whole) / 255, sigma, mode="nearest", radius=int(np.ceil(3 * sigma))
    )
    found = array(drawn_mask(whole, blur=sigma)) / 255
    assert np.abs(found - expected).max() <= 0.5 / 255 + 1e-6


def test_black_beyond_the_blur_stays_black() -> None:
    drawn = Image.new("L", (64, 48))
    drawn.paste(255, (0, 0, 20, 48))
    soft = array(drawn_mask(drawn, grow=2, blur=4))
    assert (soft[:, 22 + 12 :] == 0).all() and (soft[:, : 22 - 12] == 255).all()
    assert (np.diff(soft[24].astype(int)) <= 0).all() and 100 < soft[24, 22] < 155


def test_what_cannot_be() -> None:
    for given, message in (
        ({"grow": -1}, "mask_grow is -1"),
        ({"grow": 1.5}, "mask_grow is 1.5; whole pixels"),
        ({"blur": -0.1}, "mask_blur is -0.1"),
        ({"blur": float("nan")}, "mask_blur is nan"),
    ):
        with pytest.raises(InputError, match=message):
            drawn_mask(noise(), **given)
    with pytest.raises(InputError, match=r"mask is 31 × 23 and the image 5 × 6.*--mask-resize"):
        read_mask(noise(), (5, 6))


def test_on_latents_soft_edges_stay_soft_and_lines_stay_whole() -> None:
    pixels = torch.zeros(1, 1, 32, 48)
    pixels[..., 5] = 1.0  # a line one pixel wide
    pixels[..., 40:] = 0.5
    pixels[..., 24:32] = torch.linspace(0, 0.9, 8)
    cells = latent_mask(pixels, (1, 4, 8, 12))
    assert cells.shape == (1, 1, 8, 12)
    assert (cells[0, 0, :, 1] == 1).all() and not cells[0, 0, :, 2:6].any()
    assert (cells[0, 0, :, 10:] == 0.5).all()
    expected = torch.linspace(0, 0.9, 8).unflatten(0, (2, 4)).mean(1)
    torch.testing.assert_close(cells[0, 0, 3, 6:8], expected)
    hard = (torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0)) < 0.02).float()
    blocks = hard.unflatten(2, (8, 4)).unflatten(4, (12, 4)).amax((3, 5))
    assert torch.equal(latent_mask(hard, (2, 4, 8, 12)), blocks)


def test_masks_of_latents_in_the_pictures_pixels() -> None:
    policy = SizePolicy(multiple=8, largest=128, area=64 * 64)
    for size in ((300, 200), (64, 64), (61, 40)):
        _, restore = fit(Image.new("RGB", size), policy)
        width, height = restore.size
        cells = torch.zeros(2, 1, height // 4, width // 4)
        cells[0, :, :, : width // 8] = 1.0
        left, nothing = picture_masks(cells, restore)
        assert left.size == nothing.size == size and not array(nothing).any()
        columns = array(left).mean(0)
        assert (columns[: size[0] // 2 - 10] == 255).all()
        assert (columns[size[0] // 2 + 10 :] == 0).all()


def test_pasting_is_exact_where_black_and_where_white() -> None:
    generator = np.random.default_rng(1)
    edited, source = (
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), np.uint8)) for _ in range(2)
    )
    mask = np.repeat(np.array([[0, 255, 128]], np.uint8), 20, 0).repeat(10, 1)
    result = np.asarray(pasted(edited, source, Image.fromarray(mask))).astype(float)
    one, other = np.asarray(edited).astype(float), np.asarray(source).astype(float)
    assert np.array_equal(result[:, :10], other[:, :10])
    assert np.array_equal(result[:, 10:20], one[:, 10:20])
    mixed = (one * 128 + other * 127) / 255
    assert np.abs(result - mixed)[:, 20:].max() <= 0.5 + 1e-4


def test_a_derived_mask_by_hand() -> None:
    """Over the first steps, smoothed, cut by a ramp from half the threshold to the threshold."""
    gathered = DerivedMask(0.5, 10)
    assert [step for step in range(10) if gathered.wants(step)] == [0, 1, 2]
    assert [step for step in range(10) if gathered.ready(step)] == list(range(2, 10))
    strong, weak = torch.zeros(1, 2, 9, 9), torch.zeros(1, 2, 9, 9)
    strong[:, :, 1:4, 1:4], strong[:, :, 6:9, 6:9] = -1.0, 0.375
    for difference in (strong, weak, strong):
        gathered.add(difference)
    mask = gathered.mask()[0, 0]
    assert mask[2, 2] == 1 and mask[7, 7] == pytest.approx(0.5) and mask[4:6, 0].sum() == 0


WHERE = np.zeros((20, 30), bool)
WHERE[4:9, 5:25] = True


def strokes(colour: tuple[int, int, int], paper: tuple[int, int, int, int]) -> Image.Image:
    """Opaque strokes on paper of some colour and opacity."""
    pixels = np.tile(np.array(paper, np.uint8), (*WHERE.shape, 1))
    pixels[WHERE] = (*colour, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("mask", "invert"),
    [
        (strokes((255, 255, 255), (0, 0, 0, 0)), False),
        (strokes((255, 0, 0), (255, 255, 255, 0)), False),
        (strokes((0, 0, 0), (0, 0, 0, 0)), False),
        (strokes((255, 255, 255), (0, 0, 0, 255)), False),  # opaque: its brightness counts
        (strokes((0, 0, 0), (255, 255, 255, 255)), True),
        (Image.fromarray(WHERE), False),
        (Image.fromarray(WHERE.astype(np.uint8)), False),
        (Image.fromarray(WHERE.astype(np.uint16)), False),
        (Image.fromarray(WHERE.astype(np.int32)), False),
        (WHERE, False),
        (WHERE.astype(np.int64), False),
        (WHERE.astype(np.float32), False),
        (WHERE[None, ..., None] * np.uint8(255), False),
        (torch.from_numpy(WHERE), False),
        (torch.from_numpy(~WHERE).float()[None, None], True),
        ([Image.fromarray(WHERE)], False),
    ],
)
def test_masks_as_people_have_them(mask: Any, invert: bool) -> None:
    found = read_mask(mask, (30, 20), invert=invert)
    assert np.array_equal(array(found), np.where(WHERE, 255, 0))


def test_soft_strokes_are_as_soft_as_they_are_opaque() -> None:
    soft = np.zeros((2, 3, 4), np.uint8)
    soft[..., 3] = [[0, 64, 128], [192, 255, 0]]
    assert np.array_equal(array(read_mask(Image.fromarray(soft), (3, 2))), soft[..., 3])


def test_a_photograph_with_a_hole_says_how_it_is_read() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    pixels[..., 3] = np.where(WHERE, 0, 255)
    with pytest.warns(UserWarning, match="its opacity is taken.*--mask-invert"):
        found = read_mask(Image.fromarray(pixels), (30, 20), invert=True)
    assert np.array_equal(array(found), np.where(WHERE, 255, 0))


def test_a_mask_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    Image.new("L", (30, 20)).save(tmp_path / "black.png")
    for mask, invert, message in (
        (tmp_path / "black.png", False, r"mask .*black\.png is black all over"),
        (Image.new("RGBA", (30, 20), (255, 255, 255, 0)), False, "is black all over"),
        (np.ones((20, 30)), True, "is white all over"),
    ):
        with pytest.raises(InputError, match=message):
            read_mask(mask, (30, 20), invert=invert)
    dot = Image.new("L", (3000, 2000))
    dot.paste(255, (0, 0, 5, 5))
    place = placed(dot.size, SizePolicy(multiple=8, largest=128, area=64 * 64))
    with pytest.raises(InputError, match="of the edit through at the 80 × 56 the model sees"):
        mask_cells(dot, place, (4, 14, 20))
    with pytest.warns(UserWarning, match="is 76 of 255.*no more than 30% of the edit"):
        read_mask(strokes((255, 0, 0), (0, 0, 0, 255)), (30, 20))


def test_another_size_is_stretched_if_that_is_asked_for() -> None:
    small = Image.fromarray(WHERE)
    for kind in (small, small.convert("RGBA")):
        found = array(read_mask(kind, (300, 200), resize=True))
        assert found.shape == (200, 300)
        assert (
            (found[50:80, 60:240] == 255).all() and not found[:30].any() and not found[110:].any()
        )
    with pytest.warns(UserWarning, match="the mask is 30 × 20 and the image 60 × 60, of another"):
        read_mask(small, (60, 60), resize=True)

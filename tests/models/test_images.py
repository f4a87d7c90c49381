"""Pictures of every kind come in as anyone would expect, and any size goes there and back."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rectiflow.errors import InputError
from rectiflow.models.images import Restore, SizePolicy, fit, to_pil, to_tensor
from rectiflow.models.picture import load_image

EMOJI = SizePolicy(multiple=8, largest=128, area=64 * 64)
LARGE = SizePolicy(multiple=16, largest=1536, area=1024 * 1024)


def picture(width: int, height: int) -> Image.Image:
    """A smooth one."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x / max(width - 1, 1), y / max(height - 1, 1), np.full(x.shape, 0.5)]
    return Image.fromarray((np.stack(channels, -1) * 255).astype(np.uint8))


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 128))
    for name in ("a.png", "a.webp"):
        image.save(tmp_path / name, lossless=True)
        loaded = load_image(tmp_path / name)
        assert loaded.mode == "RGB"
        assert loaded.getpixel((0, 0)) == (255, 0, 0)
        assert loaded.getpixel((1, 0)) == (127, 127, 127)
        assert loaded.getpixel((3, 3)) == (255, 255, 255)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    loaded = load_image(tmp_path / "p.png")
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    grey = load_image(Image.new("LA", (1, 1), (0, 0)))
    assert grey.getpixel((0, 0)) == (255, 255, 255)


def test_photographs_stand_upright(tmp_path: Path) -> None:
    image = picture(30, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise
    image.save(tmp_path / "a.png", exif=exif)
    loaded = load_image(str(tmp_path / "a.png"))
    assert loaded.size == (20, 30)
    assert loaded.getpixel((19, 0)) == image.getpixel((0, 0))


def test_print_grey_deep_and_bilevel(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    red, green, blue = load_image(tmp_path / "c.jpg").getpixel((0, 0))
    assert red > 200 and max(green, blue) < 60
    for level in (0, 128, 255):
        assert load_image(Image.new("L", (1, 1), level)).getpixel((0, 0)) == (level,) * 3
    deep = np.array([[0, 257 * 100, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "d.png")
    loaded = load_image(tmp_path / "d.png")
    assert [loaded.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]
    assert load_image(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(InputError, match="floating-point pixels"):
        load_image(Image.new("F", (1, 1)))


def test_what_is_not_a_picture_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.png").touch()
    picture(64, 64).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    cases = {
        "text.png": "is not an image",
        "empty.png": "is not an image",
        "half.png": "cannot be read as an image",
        "nowhere.png": "there is no file",
        ".": "is a folder",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_bombs_are_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(InputError, match="smaller than 178 megapixels"):
        load_image(tmp_path / "bomb.png")


def test_fifty_megapixels_are_fine(tmp_path: Path) -> None:
    Image.new("1", (10_000, 5_000), 1).save(tmp_path / "large.png")
    image = load_image(tmp_path / "large.png")
    fitted, restore = fit(image, EMOJI)
    assert fitted.shape == (1, 3, 48, 96) and restore.content_size == (91, 45)
    assert fitted.min() == 1


@pytest.mark.parametrize("policy", [EMOJI, LARGE])
@pytest.mark.parametrize(
    "size",
    [(1, 1), (1, 500), (500, 1), (64, 64), (640, 480), (63, 65), (96, 40), (17, 31), (1000, 1001)],
)
def test_any_size_goes_there_and_back(policy: SizePolicy, size: tuple[int, int]) -> None:
    image = picture(*size)
    fitted, restore = fit(image, policy)
    _, _, height, width = fitted.shape
    assert policy.supports(height, width)
    assert fitted.min() >= 0 and fitted.max() <= 1
    content = restore.content_size[0] * restore.content_size[1]
    assert content <= 1.05 * policy.area or restore.content_size == size
    if max(size) / min(size) < 1.5 and restore.content_size != size:
        assert content >= 0.9 * policy.area
        # The proportions are kept to the pixel that rounding costs.
        ratio = restore.content_size[0] / restore.content_size[1]
        assert ratio == pytest.approx(size[0] / size[1], rel=0.03)
    (back,) = restore(fitted)
    assert back.size == size
    difference = np.abs(np.asarray(back, int) - np.asarray(image, int)).mean()
    assert difference < 4 or max(size) / min(size) > 100


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (128, 64), (32, 32), (128, 8)])
def test_a_supported_size_near_the_native_area_is_used_as_it_is(size: tuple[int, int]) -> None:
    image = picture(*size)
    fitted, restore = fit(image, EMOJI)
    assert torch.equal(fitted, to_tensor(image))
    assert restore(fitted) == [image]
    assert restore == Restore(size, size, (0, 0), size)


def test_others_are_not() -> None:
    assert fit(picture(8, 8), EMOJI)[0].shape == (1, 3, 64, 64)
    assert fit(picture(128, 128), EMOJI)[0].shape == (1, 3, 64, 64)
    assert fit(picture(1920, 1080), LARGE)[0].shape == (1, 3, 768, 1376)


def test_the_padding_repeats_the_edge() -> None:
    fitted, restore = fit(picture(300, 200), EMOJI)
    (left, top), (width, height) = restore.offset, restore.content_size
    assert (left, top) == (1, 2) and (width, height) == (78, 52)
    assert torch.equal(fitted[..., 0], fitted[..., left])
    assert torch.equal(fitted[..., -1, :], fitted[..., top + height - 1, :])


def test_masks_go_where_the_picture_goes() -> None:
    _, restore = fit(picture(300, 200), EMOJI)
    mask = Image.new("L", (300, 200))
    mask.paste(255, (150, 0, 300, 200))
    fitted = restore.fit_mask(mask)
    assert fitted.shape == (1, 1, 56, 80)
    assert fitted[..., :38].max() == 0 and fitted[..., 42:].min() == 1


def test_pixels_survive_the_tensor() -> None:
    image = Image.fromarray(np.arange(256 * 3, dtype=np.int64).astype(np.uint8).reshape(16, 16, 3))
    assert to_pil(to_tensor(image)) == [image]


def test_reading_pictures_imports_neither_diffusers_nor_transformers() -> None:
    code = (
        "import sys, rectiflow.models.images; "
        "sys.exit(bool({'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

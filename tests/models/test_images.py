"""Pictures of every kind come in as anyone would expect, and any size goes there and back."""

from __future__ import annotations

import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from rectiflow.errors import InputError
from rectiflow.models.images import Restore, SizePolicy, fit, to_pil, to_tensor
from rectiflow.models.picture import check_image, load_image
from rectiflow.report.metadata import save_png, srgb_profile

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


def icc(primaries: Sequence[Sequence[float]]) -> bytes:
    """An ICC profile of three primaries (XYZ under D50) and sRGB's curve."""

    def fixed(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(65536 * value) for value in values))

    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0)
    curve += fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(79)}
    tags |= {b"wtpt": b"XYZ " + bytes(4) + fixed(*D50)}
    for name, xyz in zip(b"rgb".decode(), primaries, strict=True):
        tags[f"{name}XYZ".encode()] = b"XYZ " + bytes(4) + fixed(*xyz)
        tags[f"{name}TRC".encode()] = curve
    place, table, data = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", place + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", place + len(data), b"lcms", 0x02400000, b"mntr", b"RGB ",
                         b"XYZ ") + bytes(12) + b"acsp" + bytes(28) + fixed(*D50)  # fmt: skip
    return header + bytes(128 - len(header)) + table + data


D50 = (0.9642, 1.0, 0.8249)
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def test_colours_are_those_the_profile_means(tmp_path: Path) -> None:
    """Display P3 by its matrices; what is sRGB by any profile stays to the bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    image, profile = Image.fromarray(pixels), icc(P3)
    share = pixels / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    linear = (linear @ np.array(P3) @ np.linalg.inv(np.array(SRGB))).clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    image.save(tmp_path / "p3.png", icc_profile=profile)
    found = np.asarray(load_image(tmp_path / "p3.png")).astype(int)
    assert np.abs(found - 255 * srgb).max() <= 2 and np.abs(found - pixels).mean() > 5
    image.save(tmp_path / "p3.tif", icc_profile=profile)
    assert np.array_equal(np.asarray(load_image(tmp_path / "p3.tif")), found)
    image.putalpha(255)
    image.putpixel((0, 0), (9, 9, 9, 0))
    image.save(tmp_path / "clear.png", icc_profile=profile)
    clear = np.asarray(load_image(tmp_path / "clear.png")).astype(int)
    assert np.array_equal(clear[1:], found[1:]) and clear[0, 0].tolist() == [255] * 3
    Image.new("L", (3, 3), 100).save(tmp_path / "grey.png", icc_profile=profile)
    assert load_image(tmp_path / "grey.png").getpixel((1, 1)) == (100, 100, 100)
    plain = Image.fromarray(pixels)
    for number, same in enumerate((icc(SRGB), srgb_profile())):
        plain.save(tmp_path / f"{number}.png", icc_profile=same)
        assert load_image(tmp_path / f"{number}.png") == plain
    plain.save(tmp_path / "bad.png", icc_profile=b"no profile" * 20)
    with pytest.warns(UserWarning, match="an ICC profile is ignored"):
        assert load_image(tmp_path / "bad.png") == plain


def test_a_look_at_the_beginning(tmp_path: Path) -> None:
    save_png(picture(30, 20), tmp_path / "a.png", {})
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:-30])
    check_image(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(InputError, match=r"b.heic is HEIC, which needs a plugin: pip install"):
        check_image(tmp_path / "b.heic")


def test_what_is_written_says_that_it_is_srgb(tmp_path: Path) -> None:
    image = picture(30, 20)
    written = save_png(image, tmp_path / "a.png", {})
    with Image.open(written) as opened:
        assert opened.info["icc_profile"] == srgb_profile()
    assert load_image(written) == image


@pytest.mark.parametrize("kind", [np.int32, np.uint16])
def test_deep_pictures_with_values_of_eight_bits(tmp_path: Path, kind: type) -> None:
    grey = np.arange(256).reshape(16, 16)
    Image.fromarray(grey.astype(kind)).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.tif"))[..., 0], grey)
    Image.fromarray((grey * 257).astype(kind)).save(tmp_path / "b.tif")
    assert np.array_equal(np.asarray(load_image(tmp_path / "b.tif"))[..., 1], grey)
    if kind is np.int32:
        Image.fromarray((grey * 1000).astype(kind)).save(tmp_path / "c.tif")
        with pytest.raises(InputError, match=r"c\.tif: the picture has values from 0 to 255000"):
            load_image(tmp_path / "c.tif")


def test_arrays_and_tensors() -> None:
    image = picture(31, 20)
    pixels = np.asarray(image)
    for same in (
        pixels,
        pixels[None],
        pixels / 255,
        (pixels / 255).astype(np.float16),
        pixels.astype(np.int64),
        pixels.astype(np.uint16) * 257,
        to_tensor(image),
        to_tensor(image)[0].double().requires_grad_(),
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        [image],
        (pixels,),
    ):
        assert load_image(same) == image
    assert load_image(pixels[..., 0]) == Image.fromarray(pixels[..., 0]).convert("RGB")
    alpha = np.dstack([pixels, np.full((20, 31), 0, np.uint8)])
    assert load_image(alpha) == Image.new("RGB", (31, 20), "white")
    for wrong, message in (
        (pixels.transpose(2, 0, 1), r"the array has shape \(3, 20, 31\): give one picture"),
        (np.stack([pixels] * 2), r"the array has shape \(2, 20, 31, 3\)"),
        (torch.from_numpy(pixels.copy()), r"the tensor has shape \(20, 31, 3\): .*\[3, H, W\]"),
        (pixels[:0], "give one picture"),
        (pixels / 127.5 - 1, "floats has values from -1 to 1: give 0 to 1"),
        (pixels.astype(float), "values from 0 to 255: give 0 to 1"),
        (np.full((2, 2), np.nan), "values from nan to nan"),
        (pixels.astype(np.int64) - 5, "values from -5 to"),
        (pixels.astype(complex), "is of complex128"),
        ([image, image], "2 pictures: give one picture"),
        (3, "3: give one picture"),
        (b"abc", "give one picture"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_image(wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "kind", "package"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC", "pillow-heif"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", "pillow-jxl-plugin"),
    ],
)
def test_a_kind_that_needs_a_plugin_is_named(
    tmp_path: Path, start: bytes, kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "photo"
    file.write_bytes(start + bytes(40))
    for module in ("pillow_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"photo is {kind}, .*pip install {package}, or"):
        load_image(file)


def test_a_plugin_that_is_there_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    plugin = ModuleType("pillow_heif")

    def register_heif_opener() -> None:
        def opened(file: object, name: str) -> Image.Image:
            return Image.new("RGB", (2, 3), "red")

        Image.register_open("HEIF", opened, lambda start: start[4:12] == b"ftypheic")

    plugin.register_heif_opener = register_heif_opener  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    assert load_image(tmp_path / "a.heic") == Image.new("RGB", (2, 3), "red")


@pytest.mark.parametrize(
    ("name", "said"),
    [("a.gif", "frames"), ("a.webp", "frames"), ("a.png", "frames"), ("a.tif", "pages")],
)
def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(
    tmp_path: Path, name: str, said: str
) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / name, save_all=True, append_images=[blue, red], lossless=True)
    with pytest.warns(UserWarning, match=f"{name} has 3 {said}: the first is taken"):
        assert load_image(tmp_path / name) == red
    red.save(tmp_path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(tmp_path / name)
        red.save(tmp_path / "two.mpo", save_all=True, append_images=[blue])
        load_image(tmp_path / "two.mpo")  # a telephone's photograph with its preview


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

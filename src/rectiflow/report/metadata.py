"""What made a picture, kept inside its file as JSON.

In a PNG it is a text chunk named ``rectiflow``, in JPEG and WebP the comment of the EXIF data.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from rectiflow._version import __version__
from rectiflow.errors import InputError
from rectiflow.files import replacing
from rectiflow.guarded import Unreadable, parse_json

KEY = "rectiflow"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""What pictures can be written as, by the ending of their names."""
QUALITY: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}
UNSAID = "it was not written by rectiflow, or another program has saved it since"
EXIF, COMMENT, ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"


def save_picture(
    image: Image.Image, path: str | PathLike[str], settings: Mapping[str, Any]
) -> Path:
    """Save a picture with what made it, in the format of the file's ending, and return its path.

    JPEG is lossy, at quality 95; PNG and WebP keep every pixel.

    Args:
        image: The picture.
        path: A file that ends in one of `FORMATS`, replaced only once the new one is complete.
        settings: As in `save_png`.
    """
    path = Path(path)
    kind = FORMATS[path.suffix.lower()]
    if kind == "PNG":
        return save_png(image, path, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.dumps({KEY: {"version": __version__, **settings}}, allow_nan=False)
    exif = Image.Exif()
    exif.get_ifd(EXIF)[COMMENT] = ASCII + kept.encode("ascii")
    with replacing(path) as unfinished:
        image.save(unfinished, format=kind, exif=exif, icc_profile=srgb_profile(), **QUALITY[kind])
    return path


def as_saved(image: Image.Image, path: Path) -> Image.Image:
    """A picture as it comes back from a file of this name, in which it loses something or not."""
    kind = FORMATS.get(path.suffix.lower(), "PNG")
    if kind not in QUALITY:
        return image
    file = io.BytesIO()
    image.save(file, format=kind, **QUALITY[kind])
    with Image.open(file) as read:
        return read.copy()


def read_picture(path: str | PathLike[str]) -> dict[str, Any]:
    """What made a picture, of any of `FORMATS`.

    Raises:
        InputError: there is no such file, it is no picture, or nothing is recorded in it.
    """
    if FORMATS.get(Path(path).suffix.lower(), "PNG") == "PNG":
        return read_png(path)
    try:
        with Image.open(path) as image:
            comment = image.getexif().get_ifd(EXIF).get(COMMENT)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise InputError(f"{path} cannot be read as a picture ({error})") from None
    if not isinstance(comment, bytes) or KEY.encode() not in comment:  # or another program's
        raise InputError(f"{path} does not say what made it: {UNSAID}")
    return _settings(comment.removeprefix(ASCII), path, KEY)


@cache
def srgb_profile() -> bytes:
    """The ICC profile of sRGB, for files that are written: the same bytes at any time."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile[:24] + bytes(12) + profile[36:]  # without the date


def save_png(image: Image.Image, path: str | PathLike[str], settings: Mapping[str, Any]) -> Path:
    """Save a picture, in sRGB, with what made it, and return its path.

    Args:
        image: The picture.
        path: The file, replaced only once the new one is complete.
        settings: JSON data: prompt, seed, grid, method, model, weight hash, … The version of
            the package is added as ``version``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngImagePlugin.PngInfo()
    kept = json.dumps({"version": __version__, **settings}, ensure_ascii=False, allow_nan=False)
    text.add_itxt(KEY, kept)  # iTXt is UTF-8: prompts may hold anything
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=text, icc_profile=srgb_profile())
    return path


def read_png(path: str | PathLike[str]) -> dict[str, Any]:
    """What made a picture.

    Raises:
        InputError: there is no such file, it is no PNG, or nothing is recorded in it.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            # Not `image.text`, which decodes the pixels, however many a file claims to have.
            text = image.info.get(KEY)
            image.verify()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except Exception as error:  # whatever a damaged file makes the decoder raise
        raise InputError(f"{path} cannot be read as a PNG ({error})") from None
    if text is None:
        raise InputError(f"{path} does not say what made it: {UNSAID}")
    return _settings(str(text), path)


def _settings(
    text: str | bytes, path: str | PathLike[str], key: str | None = None
) -> dict[str, Any]:
    """What a record says, or what it says of `key`."""
    try:
        said: dict[str, Any] = parse_json(text, "it")
        if key is not None and not isinstance(said.get(key), dict):
            raise Unreadable("it", f"says nothing of {key}")
    except Unreadable as error:
        raise InputError(
            f"what {path} says about its making is damaged ({error}); use the original file"
        ) from error
    return said if key is None else said[key]

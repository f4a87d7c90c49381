"""What made a picture, kept inside its PNG as one JSON text chunk named ``rectiflow``."""

from __future__ import annotations

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
        raise InputError(
            f"{path} does not say what made it: it was not written by rectiflow, or another "
            f"program has saved it since"
        )
    try:
        settings: dict[str, Any] = parse_json(str(text), "it")
    except Unreadable as error:
        raise InputError(
            f"what {path} says about its making is damaged ({error}); use the original file"
        ) from error
    return settings

"""Pictures and masks as people have them: files of any kind, Pillow images, arrays and tensors."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.report.metadata import srgb_profile

Picture = str | Path | Image.Image | NDArray[Any] | Tensor
"""A file; a Pillow image; an array ``[H, W]`` or ``[H, W, C]`` or a tensor ``[C, H, W]``, or a
batch of one: floats from 0 to 1, 8 or 16 bits, or booleans."""

PLUGINS = {
    "HEIC": ("pillow_heif", "pillow-heif", (b"ftyphei", b"ftyphev", b"ftypmif1", b"ftypmsf1")),
    "AVIF": ("pillow_avif", "pillow-avif-plugin", (b"ftypavi",)),
    "JPEG XL": ("pillow_jxl", "pillow-jxl-plugin", (b"JXL \r\n", b"\xff\n")),
}
"""Kinds that Pillow may need help with: the module, its package, and how such files begin."""
FRAMES = {"GIF": "frames", "WEBP": "frames", "PNG": "frames", "AVIF": "frames", "TIFF": "pages"}
"""Of which format a second picture is lost; a photograph's may hold a preview (MPO)."""
T = TypeVar("T")
SAME = 1
"""A profile whose colours are within this many levels of sRGB's is sRGB."""


def load_image(source: Picture) -> Image.Image:
    """Read a picture as anyone looking at it would expect: sRGB, upright, on white.

    EXIF rotation is applied, an ICC profile is followed, transparency is laid on white; CMYK,
    palettes, grey and 16 bits become 8-bit RGB. Of an animation the first frame is taken, and a
    warning says so.

    Args:
        source: A file, a picture already open, an array or a tensor.

    Raises:
        InputError: There is no such file, it is not a picture, it is damaged, or it is too large;
            or an array has another shape or range than a picture has.
    """
    return _read(source, _on_white)


def check_image(source: str | Path) -> None:
    """See that a file begins like a picture that `load_image` reads, without reading all of it.

    Raises:
        InputError: It does not.
    """
    _read(source, lambda image: None)


def load_mask(source: Picture) -> Image.Image:
    """Read a mask: grey, white where something may change.

    Where the picture has transparent parts, its opacity is the mask, whatever its colours; else its
    brightness is. Values of 0 and 1 alone are read as 0 and 255.

    Args:
        source: As `load_image` takes it.

    Raises:
        InputError: As `load_image`.
    """
    return _read(source, _grey)


def load_alpha(source: Picture) -> Image.Image | None:
    """The opacity of a picture, upright and grey; None if nothing of it is transparent.

    Args:
        source: As `load_image` takes it.

    Raises:
        InputError: As `load_image`.
    """
    return _read(source, _opacity)


def with_alpha(image: Image.Image, alpha: Image.Image) -> Image.Image:
    """A picture that was laid on white, made transparent again: RGBA.

    Its colours are those that give `image` on white, so that soft edges have no white in them.

    Args:
        image: RGB, on white.
        alpha: Grey, of its size.

    Example:
        >>> half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
        >>> with_alpha(load_image(half), load_alpha(half)).getpixel((0, 0))
        (255, 0, 0, 128)
    """
    share = np.asarray(alpha, np.float32)[..., None] / 255
    shown = np.asarray(image, np.float32)
    own = np.where(share > 0, (shown - 255 * (1 - share)) / np.maximum(share, 1 / 255), 255)
    result = Image.fromarray(own.round().clip(0, 255).astype(np.uint8))
    result.putalpha(alpha)
    return result


def _read(source: Picture, use: Callable[[Image.Image], T]) -> T:
    """What a function makes of a source as Pillow opens it; one line for what cannot be read."""
    if isinstance(source, list | tuple) and len(source) == 1:
        source = source[0]
    if isinstance(source, Image.Image):
        return use(_first_of(source, "the picture"))
    if isinstance(source, np.ndarray | Tensor):
        return use(_of_array(source))
    if not isinstance(source, str | Path):
        what = f"{len(source)} pictures" if isinstance(source, list | tuple) else repr(source)[:60]
        raise InputError(f"{what}: give one picture, as a file, Pillow image, array or tensor")
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"{path} is a folder: give an image file")
    try:
        # Pillow warns from 89 megapixels on and refuses from twice that on; we want only the latter
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _opened(path) as image:
                found = use(image)
                _first_of(image, str(path))
                return found
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise InputError(
            f"{path} is too large: make it smaller than {most} megapixels first"
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is {_kind(path)}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    # Whatever a damaged file makes the decoders raise.
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from error


def _opened(path: Path) -> Image.Image:
    """Open a file, by a plugin where one is needed and installed."""
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        for module, _ in _plugins(path).values():
            try:
                plugin = import_module(module)
            except ImportError:
                continue
            if hasattr(plugin, "register_heif_opener"):  # the others register themselves
                plugin.register_heif_opener()
        return Image.open(path)


def _plugins(path: Path) -> dict[str, tuple[str, str]]:
    """The kind that a file seems to be, with what reads it, of those that Pillow may not know."""
    with path.open("rb") as file:
        start = file.read(12)
    return {
        kind: (module, package)
        for kind, (module, package, marks) in PLUGINS.items()
        if start.startswith(marks) or start[4:].startswith(marks)
    }


def _kind(path: Path) -> str:
    """What is to be said of a file that nothing could open."""
    for kind, (_, package) in _plugins(path).items():
        return f"{kind}, which needs a plugin: pip install {package}, or save it as JPEG or PNG"
    return "not an image: give PNG, JPEG, WebP or TIFF"


def _first_of(image: Image.Image, name: str) -> Image.Image:
    """Say that only the first frame of an animation is taken."""
    count = getattr(image, "n_frames", 1) if image.format in FRAMES else 1
    if count > 1:
        parts = FRAMES[str(image.format)]
        warnings.warn(f"{name} has {count} {parts}: the first is taken", stacklevel=2)
    return image


def _of_array(given: NDArray[Any] | Tensor) -> Image.Image:
    """An array or a tensor as a picture of 8 bits: grey, RGB or with alpha."""
    if isinstance(given, Tensor):
        tensor = given.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        what, wanted, array = "tensor", "[3, H, W] or [1, 3, H, W]", tensor.numpy()
        array = array[0] if array.ndim == 4 and len(array) == 1 else array
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    else:
        what, wanted, array = "array", "(H, W, 3) or (H, W)", given
        array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    sound = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (2, 3, 4))
    if not sound or not array.size:
        raise InputError(f"the {what} has shape {tuple(given.shape)}: give one picture, {wanted}")
    return Image.fromarray(np.ascontiguousarray(_eight_bits(array, what)))


def _eight_bits(array: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """Values as 8 bits: floats from 0 to 1, booleans, 8 or 16 bits."""
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "fiu":
        raise InputError(f"the {what} is of {array.dtype}: give floats from 0 to 1, or 8 bits")
    least, most = array.min(), array.max()
    if array.dtype.kind == "f":
        if not (least >= -1e-3 and most <= 1 + 1e-3):  # not so for NaN either
            raise InputError(
                f"the {what} of floats has values from {least:.4g} to {most:.4g}: give 0 to 1"
            )
        return (array.clip(0, 1) * 255).round().astype(np.uint8)
    if least < 0 or most > 65535:
        raise InputError(f"the {what} has values from {least} to {most}: give 0 to 255, or 16 bits")
    if most <= 255:  # in however many bits: a picture of 16 would be black
        return array.astype(np.uint8)
    return (array / 257).round().astype(np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as EXIF says, of 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow would clip 16 bits to 8, not scale them
        profile = image.info.get("icc_profile")
        image = Image.fromarray(_eight_bits(np.asarray(image), "picture"))
        image.info["icc_profile"] = profile
    elif image.mode == "F":
        raise InputError("floating-point pixels have no agreed range: convert to 8 or 16 bits")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    image = _upright(image)
    colours = _srgb(image)
    if image.has_transparency_data:
        colours.putalpha(image.convert("RGBA").getchannel("A"))
        white = Image.new("RGBA", image.size, "white")
        colours = Image.alpha_composite(white, colours).convert("RGB")
    # Whoever saves it would write the profile, or a resolution, of another picture.
    colours.info = {}
    return colours


def _srgb(image: Image.Image) -> Image.Image:
    """The colours of a picture without their opacity, RGB, as its ICC profile means them."""
    profile = image.info.get("icc_profile")
    plain = image if image.mode in ("L", "RGB", "CMYK") else None
    if plain is None:
        plain = image.convert("L" if image.mode in ("1", "LA", "La") else "RGB")
    if profile and profile != srgb_profile():
        try:
            return _transformed(plain, profile)
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            warnings.warn(f"an ICC profile is ignored: {error}", stacklevel=2)
    return plain.convert("RGB")


def _transformed(plain: Image.Image, profile: bytes) -> Image.Image:
    """A picture brought from a profile's colours to sRGB; as it is where those are sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if plain.mode == "L" and source.profile.xcolor_space.strip() == "RGB":
        plain = plain.convert("RGB")
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        plain.mode,
        "RGB",
        ImageCms.Intent(source.profile.rendering_intent),
    )
    if plain.mode != "CMYK":
        levels = np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3), -1).reshape(1, -1, 3)
        known = Image.fromarray(levels.astype(np.uint8))
        known = known if plain.mode == "RGB" else known.getchannel(0)
        seen = np.asarray(ImageCms.applyTransform(known, transform), int)
        if np.abs(seen - np.asarray(known.convert("RGB"), int)).max() <= SAME:
            return plain.convert("RGB")
    found = ImageCms.applyTransform(plain, transform)
    assert found is not None
    return found


def _opacity(image: Image.Image) -> Image.Image | None:
    image = _upright(image)
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def _grey(image: Image.Image) -> Image.Image:
    image = _upright(image)
    grey = _opacity(image)
    if grey is None:
        grey = image.convert("L")
    else:
        shown = np.asarray(image.convert("RGBA").convert("L"))[np.asarray(grey) == 255]
        if shown.size and np.ptp(shown) > 128:
            warnings.warn(
                "the mask has transparent parts, and light and dark ones: its opacity is taken; "
                "mask_invert (--mask-invert) edits where it is transparent",
                stacklevel=2,
            )
    return grey.point(lambda value: 255 * value) if grey.getextrema()[1] == 1 else grey

"""Pictures as they stand in a page: scaled copies, difference maps, PNG data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

LARGEST = 1024
"""Longest side of a copy in a slider; a page is to be mailed, the full picture is a file."""
PANEL = 640
"""Longest side of a copy in the smaller panels."""
SMALL = 128
"""Longest side up to which single pixels are meant to be seen."""

_MAGMA = np.round(matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).astype(np.uint8)


@dataclass(frozen=True)
class Picture:
    """A picture ready for a page."""

    uri: str
    width: int
    height: int
    alt: str

    @property
    def small(self) -> bool:
        """Whether its pixels are to be seen one by one."""
        return max(self.width, self.height) <= SMALL


def picture(image: Image.Image, alt: str, largest: int = PANEL) -> Picture:
    """A copy for the page, at most `largest` on its longer side."""
    if image.mode not in ("RGB", "P", "L"):
        image = image.convert("RGB")
    if max(image.size) > largest:
        scale = largest / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        # A palette has no colours in between.
        how = Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.LANCZOS
        image = image.resize(size, how)
    written = io.BytesIO()
    image.save(written, format="PNG", optimize=max(image.size) <= 2 * SMALL)
    uri = "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")
    return Picture(uri, image.width, image.height, alt)


def pixels(image: Image.Image) -> NDArray[np.float32]:
    """A picture as float32 ``[H, W, 3]`` in [0, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / np.float32(255)


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of one size; infinite if they are equal."""
    error = float(np.square(pixels(image) - pixels(other), dtype=np.float64).mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def difference(image: Image.Image, other: Image.Image) -> NDArray[np.float32]:
    """The largest absolute difference of the channels, ``[H, W]`` in [0, 1]."""
    change: NDArray[np.float32] = np.abs(pixels(image) - pixels(other)).max(axis=2)
    return change


def amplification(differences: Iterable[NDArray[np.float32]]) -> int:
    """The power of two, 1 to 64, that makes the differences visible with hardly any clipped."""
    largest = max(float(np.quantile(values, 0.995)) for values in differences)
    if largest == 0:
        return 1
    return min(64, 2 ** max(0, math.floor(math.log2(1 / largest))))


def difference_map(
    values: NDArray[np.float32], factor: int, mask: NDArray[np.bool_] | None = None
) -> Image.Image:
    """Differences from black (none) to pale yellow, with the mask's outline in white.

    The picture is stored with a palette, which keeps a large map small.
    """
    levels = np.round(np.clip(values * factor, 0, 1) * 254).astype(np.uint8)
    if mask is not None:
        levels[_outline(mask, width=max(1, max(mask.shape) // 300))] = 255
    image = Image.fromarray(levels)
    palette = _MAGMA.copy()
    palette[255] = 255
    image.putpalette(palette.tobytes())
    return image


def _outline(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The rim of the mask, inside it; where it meets the picture's border there is none."""
    inside = mask.copy()
    for _ in range(width):
        padded = np.pad(inside, 1, mode="edge")
        inside = (
            inside & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
        )
    return mask & ~inside

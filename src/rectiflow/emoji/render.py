"""Rendering: a scene and a size give a picture, and nothing else enters."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rectiflow.emoji.scene import BACKGROUNDS, Item, Scene
from rectiflow.emoji.sprites import sprite

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
SEPIA = np.array([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]], np.float32)


@functools.lru_cache(maxsize=32768)
def stamp(
    emoji: str, side: int, tilt: int, mirrored: bool, upside_down: bool, pattern: str
) -> NDArray[np.float32]:
    """A sprite ready to be pasted: float32 ``[side', side', 4]``, premultiplied, in [0, 1]."""
    image = Image.fromarray(sprite(emoji)).convert("RGBa")
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if tilt or upside_down:
        angle = tilt + 180 * upside_down
        image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    scaled = max(1, round(side * image.width / sprite(emoji).shape[1]))
    image = image.resize((scaled, scaled), Image.Resampling.BOX, reducing_gap=None)
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    if pattern != "plain":
        y, x = np.mgrid[:scaled, :scaled] * (8.0 / side)
        if pattern == "striped":
            lit = (x + y) % 2 < 1
        else:
            lit = ((x % 2 - 1) ** 2 + (y % 2 - 1) ** 2) < 0.3
        # White paint over the sprite, where the sprite is.
        pixels[..., :3] += (0.75 * lit)[..., None] * (pixels[..., 3:] - pixels[..., :3])
    return pixels


def item_stamp(item: Item, size: int) -> tuple[NDArray[np.float32], int, int]:
    """The stamp of an item in a picture of `size` pixels, and its top-left corner (y, x)."""
    side = max(2, round(item.scale * size))
    pixels = stamp(item.emoji, side, item.tilt, item.mirrored, item.upside_down, item.pattern)
    half = pixels.shape[0] / 2
    return pixels, round(item.y * size - half), round(item.x * size - half)


def background(scene: Scene, size: int) -> NDArray[np.float32]:
    """The background alone, float32 ``[size, size, 3]`` in [0, 1]."""
    parts = np.clip(np.array(BACKGROUNDS[scene.background]) + np.array(scene.shade), 0, 255) / 255
    canvas = np.empty((size, size, 3), dtype=np.float32)
    canvas[:] = parts[0]
    if len(parts) == 2:
        canvas[round(scene.horizon * size) :] = parts[1]
    return canvas


def paste(canvas: NDArray[np.float32], pixels: NDArray[np.float32], top: int, left: int) -> None:
    """Composite a premultiplied stamp onto the canvas, in place; what hangs over is cut."""
    height, width = canvas.shape[:2]
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(height, top + pixels.shape[0]), min(width, left + pixels.shape[1])
    if y0 >= y1 or x0 >= x1:
        return
    part = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    window = canvas[y0:y1, x0:x1]
    window *= 1 - part[..., 3:]
    window += part[..., :3]


def apply_style(canvas: NDArray[np.float32], style: str) -> NDArray[np.float32]:
    """A picture in a style; float32 ``[H, W, 3]`` in [0, 1] in and out."""
    if style == "plain":
        return canvas
    if style == "sepia":
        return np.minimum(canvas @ SEPIA.T, np.float32(1))
    luma = canvas @ LUMA
    if style == "sketch":  # dark strokes where the picture changes, on paper
        padded = np.pad(luma, 1, mode="edge")
        dy, dx = padded[2:, 1:-1] - padded[:-2, 1:-1], padded[1:-1, 2:] - padded[1:-1, :-2]
        luma = np.clip(0.96 - 1.6 * np.hypot(dx, dy), 0.08, 1).astype(np.float32)
    elif style != "gray":
        raise KeyError(f"no style is called {style!r}")
    return np.repeat(luma[..., None], 3, axis=2)


def render_array(scene: Scene, size: int = 64) -> NDArray[np.uint8]:
    """The picture of a scene, uint8 ``[size, size, 3]`` RGB."""
    canvas = background(scene, size)
    for item in scene.items:
        paste(canvas, *item_stamp(item, size))
    return np.asarray(np.round(apply_style(canvas, scene.style) * 255), dtype=np.uint8)


def render(scene: Scene, size: int = 64) -> Image.Image:
    """The picture of a scene as an RGB image of `size` × `size` pixels."""
    return Image.fromarray(render_array(scene, size))

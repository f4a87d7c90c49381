"""The style and the background of a picture, read from its colours alone.

A style that takes colour away makes backgrounds alike (every flat one is the same sheet of paper
in a sketch), so what is read is the *set* of settings that the picture allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rectiflow.emoji.render import LUMA, SEPIA, apply_style
from rectiflow.emoji.scene import BACKGROUNDS, SCENERY, SHADE, STYLES

Pixels = NDArray[np.float32]

PAPER = 0.96
"""A sketch's white, and how much darker a change of luma by 1 is drawn (`apply_style`)."""
STROKE = 1.6
# Sepia is one tone times three factors; blue, the smallest, never saturates.
_SEPIA_TONE = SEPIA.sum(axis=1)

CHROMA = 0.03
"""Mean distance from a style's tones up to which a picture may be in it; 30 dB of noise is half."""
UNEVEN = 3
"""Rows above and below a horizon where either side's colour is background."""
TIE = 0.02
"""Colours this much further away than the nearest, beyond any shade, are allowed too."""


@dataclass(frozen=True)
class Setting:
    """What stands behind the items."""

    style: str
    backgrounds: tuple[str, ...]
    """Those the picture allows, the nearest first; more than one only without colour."""
    canvas: Pixels
    """The picture without its items in the style's `features`, ``[C, H, W]``."""
    misfit: float
    """How far its colours are from the nearest background's, in [0, 1], beyond any shade."""


def features(pixels: Pixels, style: str) -> Pixels:
    """What pictures in a style are compared by: ``[H, W, 3]`` to ``[C, H, W]``.

    Plain pictures by colour (C = 3), gray and sepia by tone, sketches by how much they darken.
    """
    if style == "plain":
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    if style == "sepia":
        return pixels[None, ..., 2] / _SEPIA_TONE[2]
    luma = (pixels @ LUMA)[None]
    return np.maximum(PAPER - luma, 0) / STROKE if style == "sketch" else luma


def toneless(pixels: Pixels, style: str) -> float:
    """How far a picture is from a style's tones: mean absolute distance, 0 for plain."""
    if style == "plain":
        return 0.0
    return float(np.abs(pixels - in_tones(pixels, style)).mean())


def in_tones(pixels: Pixels, style: str) -> Pixels:
    """The picture with its colours, ``[H, W, 3]``, replaced by the nearest a style has."""
    if style == "plain":
        return pixels
    if style == "sepia":
        return np.minimum(pixels[..., 2:] / _SEPIA_TONE[2] * _SEPIA_TONE, 1)
    return np.repeat((pixels @ LUMA)[..., None], 3, axis=2)


def possible_styles(pixels: Pixels) -> tuple[str, ...]:
    """The styles a picture may be in, judged by its tones: plain always, for things can be gray."""
    side = pixels.shape[0] // 4
    blurred = pixels.reshape(side, 4, side, 4, 3).mean(axis=(1, 3))
    near = [style for style in STYLES if toneless(blurred, style) < CHROMA]
    if np.median(pixels[[0, 1, -2, -1]]) < PAPER - 0.06 and "sketch" in near:
        near.remove("sketch")
    return tuple(near)


def _find_horizon(image: Pixels, top: Pixels, bottom: Pixels) -> int:
    """The row where the lower colour begins, seen at the sides, where items rarely are."""
    sides = np.concatenate([image[:, :, :4], image[:, :, -4:]], axis=2)
    above, below = (
        np.median(np.abs(sides - colour[:, None, None]).sum(axis=0), axis=1)
        for colour in (top, bottom)
    )
    costs = np.concatenate([[0], np.cumsum(above)]) + np.concatenate(
        [np.cumsum(below[::-1])[::-1], [0]]
    )
    size = image.shape[1]
    first = round(0.4 * size)
    return first + int(np.argmin(costs[first : round(0.8 * size)]))


def _between(image: Pixels, top: Pixels, bottom: Pixels) -> Pixels:
    """The mixture of two colours nearest to each pixel: a horizon need not be straight or sharp."""
    step = bottom - top
    along = np.tensordot(step, image - top[:, None, None], 1) / max(float(step @ step), 1e-6)
    return top[:, None, None] + step[:, None, None] * np.clip(along, 0, 1)


def read_setting(pixels: Pixels, style: str) -> Setting:
    """The setting of a picture whose style is known.

    Args:
        pixels: float32 ``[H, W, 3]`` in [0, 1].
        style: one of the world's styles.
    """
    if style == "sketch":
        return _read_sketch(pixels)
    image = features(pixels, style)
    # The first and last rows are free of items in every layout.
    top, bottom = (np.median(image[:, rows], axis=(1, 2)) for rows in (slice(2), slice(-2, None)))
    distances = {}
    for name, colours in BACKGROUNDS.items():
        nominal = apply_style(np.array([colours], np.float32) / np.float32(255), style)
        known = features(nominal, style)[:, 0]  # [C, parts]
        ends = np.stack([top, bottom], axis=1) - known
        distances[name] = float(np.maximum(np.abs(ends) - SHADE / 255, 0).sum(axis=0).mean())
    nearest = min(distances, key=distances.__getitem__)
    canvas = np.empty_like(image)
    if nearest in SCENERY or (style != "plain" and np.abs(top - bottom).max() > 0.06):
        horizon = _find_horizon(image, top, bottom)
        canvas[:, :horizon], canvas[:, horizon:] = top[:, None, None], bottom[:, None, None]
        band = slice(horizon - UNEVEN, horizon + UNEVEN)
        canvas[:, band] = _between(image[:, band], top, bottom)
    else:
        canvas[:] = ((top + bottom) / 2)[:, None, None]
    slack = 0 if style == "plain" else TIE
    allowed = sorted(
        (name for name in distances if distances[name] <= distances[nearest] + slack),
        key=distances.__getitem__,
    )
    return Setting(style, tuple(allowed), canvas, distances[nearest])


def _read_sketch(pixels: Pixels) -> Setting:
    """A sketch shows of its background only the line of a horizon, fainter at night."""
    strokes = features(pixels, "sketch")
    size = strokes.shape[1]
    rows = strokes[0, :, [0, 1, -2, -1]].min(axis=0)
    # The line is two rows dark with light ones around, which the side of an item is not.
    first, last = round(0.4 * size), round(0.8 * size)
    lines = np.minimum(rows[first:last], rows[first + 1 : last + 1])
    around = np.maximum(rows[first - 2 : last - 2], rows[first + 3 : last + 3])
    line = first + int(np.argmax(lines - around))
    strength = float((lines - around).max())
    steps = {
        name: float(abs((np.diff(np.array(BACKGROUNDS[name]), axis=0)[0] / 255) @ LUMA))
        for name in SCENERY
    }
    canvas = np.zeros_like(strokes)
    if strength < min(steps.values()) / 2:
        return Setting("sketch", tuple(n for n in BACKGROUNDS if n not in SCENERY), canvas, 0.0)
    canvas[0, line - 1 : line + 3] = rows[line - 1 : line + 3, None]
    nearest = min(steps, key=lambda name: abs(steps[name] - strength))
    margin = abs(steps[nearest] - strength) + 2 * TIE
    allowed = [name for name in steps if abs(steps[name] - strength) <= margin]
    allowed.sort(key=lambda name: abs(steps[name] - strength))
    return Setting("sketch", tuple(allowed), canvas, 0.0)

"""Matching sprites to a picture: how much of what is unexplained each one would explain.

Pasting a template T with coverage a (premultiplied) onto a canvas B changes it by D = T − aB. The
squared error against the picture I falls by Σ(2RD − D²), where R = I − B: the *gain*. Written out
it is a sum of correlations of images with templates, so that all places are tried at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rectiflow.emoji.render import apply_style, stamp
from rectiflow.emoji.scene import PATTERNS
from rectiflow.emoji.sprites import SPRITES
from rectiflow.evaluate.setting import features

SIZE = 64
"""Side of the pictures judged."""
COARSE_SIDES = (24, 28, 32, 36, 40)
COARSE_TILTS = (-6, 6)
GROUNDS = (0.1, 0.3, 0.45, 0.6, 0.8, 0.95)
"""Lumas of what may be behind a sketch's items: its outlines depend on it, and nothing shows it."""


class Pose(NamedTuple):
    """A sprite as it is pasted: the arguments of `stamp`, and for a sketch what is behind it."""

    emoji: str
    side: int
    tilt: int = 0
    mirrored: bool = False
    upside_down: bool = False
    pattern: str = "plain"
    ground: float = 0.45

    @property
    def look(self) -> tuple[str, bool, bool]:
        """What distinguishes two things found, rather than how well one fits."""
        return self.emoji, self.mirrored, self.upside_down


class Match(NamedTuple):
    """A pose at a place of the picture, pixels of its top-left corner, and what it explains."""

    pose: Pose
    top: int
    left: int
    gain: float


def template(pose: Pose, style: str) -> NDArray[np.float32]:
    """A pose in the style's `features` and its coverage: ``[C + 1, S, S]``."""
    pixels = stamp(*pose[:-1])
    if style == "sketch":
        pixels = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
        drawn = apply_style(pixels[..., :3] + (1 - pixels[..., 3:]) * pose.ground, "sketch")
        return np.concatenate([features(drawn, "sketch"), pixels[None, ..., 3]])
    shown = apply_style(pixels[..., :3], style)
    return np.concatenate([features(shown, style), pixels[None, ..., 3]])


def _weights(templates: Tensor) -> Tensor:
    """``[N, C + 1, S, S]`` to the channels that `_inputs` are correlated with."""
    shown, cover = templates[:, :-1], templates[:, -1:]
    energy = shown.square().sum(dim=1, keepdim=True)
    return torch.cat([shown, cover, shown * cover, cover.square(), energy], dim=1)


def _inputs(image: Tensor, canvas: Tensor) -> Tensor:
    rest = image - canvas
    overlap = (rest * canvas).sum(dim=0, keepdim=True)
    squared = canvas.square().sum(dim=0, keepdim=True)
    # Ones where there is a picture: a template that hangs over pays for what is inside only.
    return torch.cat([rest, -overlap, canvas, -squared / 2, torch.full_like(squared, -0.5)])


class _Bank(NamedTuple):
    poses: list[Pose]
    spectra: Tensor


@functools.cache
def _bank(look: str, kind: str) -> _Bank:
    """The spectra of every sprite at coarse sides and tilts, at half size, ``[K, N, H, W]``."""
    poses = [
        Pose(name, side, tilt, mirrored, kind == "upside down", pattern, ground)
        for name, sprite in SPRITES.items()
        for mirrored in (False, True)[: 1 + sprite.directional]
        for side in COARSE_SIDES[kind == "upside down" :]
        for tilt in ((0,) if kind == "painted" or look == "sketch" else COARSE_TILTS)
        for pattern in (PATTERNS[1:] if kind == "painted" else PATTERNS[:1])
        for ground in (GROUNDS[1::2] if look == "sketch" else GROUNDS[2:3])
    ]
    drawn = torch.zeros(len(poses), 4 if look == "plain" else 2, SIZE, SIZE)
    for index, pose in enumerate(poses):
        pixels = template(pose, look)
        first = SIZE // 2 - pixels.shape[1] // 2
        last = first + pixels.shape[1]
        drawn[index, :, first:last, first:last] = torch.from_numpy(pixels)
    weights = torch.fft.ifftshift(_weights(F.avg_pool2d(drawn, 2)), dim=(2, 3))
    spectra = torch.fft.rfft2(weights.transpose(0, 1).contiguous())
    return _Bank(poses, spectra.conj().resolve_conj())


def _correlate(inputs: Tensor, spectra: Tensor) -> Tensor:
    """The correlation with each template at every place, ``[N, SIZE / 2, SIZE / 2]``."""
    total = torch.zeros_like(spectra[0])
    for channel, spectrum in zip(torch.fft.rfft2(inputs), spectra, strict=True):
        total.addcmul_(spectrum, channel)
    return torch.fft.irfft2(total)


def shortlist(
    image: Tensor,
    canvas: Tensor,
    style: str,
    kind: str,
    *,
    length: int,
    largest: int = SIZE,
) -> tuple[list[Pose], int, int]:
    """The likeliest poses at the likeliest place, found at half size.

    Args:
        image: the picture's features, ``[C, SIZE, SIZE]``.
        canvas: what is explained so far, of the same shape.
        style: the picture's.
        kind: "upright", "upside down" or "painted" (with a pattern).
        length: how many sprites to keep, each in its best coarse size.
        largest: side of the largest sprite looked for, pixels.

    Returns:
        The poses, best first, and the row and column of their centre in pixels.
    """
    inputs = _inputs(F.avg_pool2d(image, 2), F.avg_pool2d(canvas, 2))
    look = "gray" if style == "sepia" else style  # the weights of the colours are nearly the same
    poses, spectra = _bank(look, kind)
    gains = _correlate(inputs, spectra)
    gains[torch.tensor([pose.side > largest for pose in poses])] = -torch.inf
    row, column = divmod(int(gains.amax(dim=0).argmax()), SIZE // 2)
    near = gains[:, max(0, row - 2) : row + 3, max(0, column - 2) : column + 3].amax(dim=(1, 2))
    kept: dict[tuple[str, bool, bool], Pose] = {}
    for index in near.argsort(descending=True).tolist():
        kept.setdefault(poses[index].look, poses[index])
        if len(kept) == length:
            break
    return list(kept.values()), 2 * row, 2 * column


def match(
    image: Tensor,
    canvas: Tensor,
    style: str,
    poses: Sequence[Pose],
    row: int,
    column: int,
    *,
    reach: int = 2,
) -> list[Match]:
    """Each pose at its best place within `reach` pixels of a centre, in the order given."""
    drawn = [template(pose, style) for pose in poses]
    side = max(pixels.shape[1] for pixels in drawn)
    stack = np.zeros((len(drawn), drawn[0].shape[0], side, side), np.float32)
    starts = [(side - pixels.shape[1]) // 2 for pixels in drawn]
    for place, pixels, start in zip(stack, drawn, starts, strict=True):
        place[:, start : start + pixels.shape[1], start : start + pixels.shape[1]] = pixels
    top, left, width = row - side // 2 - reach, column - side // 2 - reach, side + 2 * reach
    margins = (-left, left + width - SIZE, -top, top + width - SIZE)
    window = F.pad(_inputs(image, canvas), margins)
    gains = 2 * F.conv2d(window[None], _weights(torch.from_numpy(stack)))[0]
    best = gains.flatten(1).max(dim=1)
    return [
        Match(pose, top + index // span + start, left + index % span + start, gain)
        for span in (2 * reach + 1,)
        for pose, start, gain, index in zip(
            poses, starts, best.values.tolist(), best.indices.tolist(), strict=True
        )
    ]

"""A judge of pictures of the emoji world that knows sprites and nothing learned.

It is given a picture alone and says what is in it, by taking it apart as the renderer put it
together: read the background, find the sprite that explains most of what differs from it, paste
that one, and go on until nothing more is explained. Matching is by squared error, so a shape that
is a little off still counts as what it is nearest to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rectiflow.emoji.edits import COLOURED
from rectiflow.emoji.scene import MAX_TILT, PATTERNS, Scene
from rectiflow.errors import InputError
from rectiflow.evaluate.setting import Setting, features, in_tones, possible_styles, read_setting
from rectiflow.evaluate.templates import SIZE, Match, Pose, match, shortlist, template

MOST_ITEMS = 5
"""The search ends here; no scene has more than three."""
LENGTH = 12
"""Sprites kept of the coarse search, and how many of those the fine search keeps."""
FINALISTS = 4
TILTS = range(-MAX_TILT, MAX_TILT + 1, 4)
SCORE = 0.35
"""Share of the difference under an item that it must explain."""
GAIN = 2.0
"""Least gain of an item, in squared error summed over pixels and channels."""
PATTERN_GAIN = 1.05
"""A pattern must explain this many times what the plain sprite does."""
ALIKE = 0.06
"""Root mean square difference up to which toneless members of one family pass for each other."""
GROUNDS = (0.1, 0.3, 0.45, 0.6, 0.8, 0.95)
"""Lumas tried for what is behind a sketch, which its outlines depend on."""


@dataclass(frozen=True)
class Found:
    """One emoji seen in a picture; lengths are fractions of its side, as in `Item`."""

    emoji: str
    x: float
    y: float
    scale: float
    tilt: int
    mirrored: bool
    upside_down: bool
    pattern: str
    score: float
    """Share of the difference from the background that it explains, at most 1."""
    like: tuple[str, ...]
    """Names it cannot be told from: itself, and without colour others of its family."""


@dataclass(frozen=True)
class Verdict:
    """What a picture shows."""

    background: str
    style: str
    items: tuple[Found, ...]
    backgrounds: tuple[str, ...]
    """Those it may be: more than one only where a style has taken the colours away."""
    residual: float
    """Root mean square of what is left unexplained, pixels in [0, 1]."""

    @property
    def count(self) -> int:
        """How many items were found."""
        return len(self.items)


def agrees(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """Whether a picture shows what a scene's caption says.

    ``emoji``: the named emoji are all found, each as often as it is named, and no other is.
    ``background``: background and style. ``count``: the number of items.
    """
    return {
        "emoji": _pairs(list(verdict.items), [item.emoji for item in scene.items]),
        "background": scene.background in verdict.backgrounds and scene.style == verdict.style,
        "count": verdict.count == len(scene.items),
    }


def _pairs(found: list[Found], names: list[str]) -> bool:
    """Whether found and named emoji can be matched one to one."""
    if len(found) != len(names):
        return False
    if not names:
        return True
    first, *others = found
    return any(
        name in first.like and _pairs(others, names[:index] + names[index + 1 :])
        for index, name in enumerate(names)
    )


def judge(picture: Image.Image | NDArray[np.uint8]) -> Verdict:
    """Say what a picture shows.

    Args:
        picture: RGB, 64 × 64 pixels; uint8 if an array ``[64, 64, 3]``.

    Raises:
        InputError: another size or mode.
    """
    array = np.asarray(picture)
    if array.shape != (SIZE, SIZE, 3) or array.dtype != np.uint8:
        raise InputError(f"the judge reads RGB pictures of {SIZE} × {SIZE} pixels; resize first")
    pixels = array.astype(np.float32) / 255
    verdicts = [_explain(pixels, style) for style in possible_styles(pixels)]
    return min(verdicts, key=lambda verdict: verdict.residual)


@torch.inference_mode()
def _explain(pixels: NDArray[np.float32], style: str) -> Verdict:
    setting = read_setting(pixels, style)
    image = torch.from_numpy(features(pixels, style))
    model = torch.from_numpy(setting.canvas)
    canvas, found = model.clone(), []
    while len(found) < MOST_ITEMS:
        best = _find(image, canvas, style, first=not found)
        drawn, rows, columns = _visible(best, style)
        cover = drawn[-1:]
        under = ((image - canvas)[:, rows, columns].square() * cover).sum()
        score = best.gain / max(float(under), 1e-6)
        if best.gain < GAIN or score < SCORE:
            break
        found.append(_describe(best, style, score))
        model[:, rows, columns] = model[:, rows, columns] * (1 - cover) + drawn[:-1]
        # What is under an item is settled, however well it fits: nothing else is looked for there.
        canvas[:, rows, columns] = torch.where(
            cover > 0.3, image[:, rows, columns], model[:, rows, columns]
        )
    return Verdict(
        background=setting.backgrounds[0],
        style=style,
        items=tuple(found),
        backgrounds=setting.backgrounds,
        residual=_residual(pixels, image, model, setting),
    )


def _residual(
    pixels: NDArray[np.float32], image: Tensor, model: Tensor, setting: Setting
) -> float:
    """What is unexplained as an RGB distance, so that styles can be compared."""
    off_tone = float(np.square(pixels - in_tones(pixels, setting.style)).mean())
    scale = 1.6 if setting.style == "sketch" else 1.0
    return float(np.sqrt(off_tone + float((scale * (image - model)).square().mean())))


def _find(image: Tensor, canvas: Tensor, style: str, *, first: bool) -> Match:
    """The item that explains most: a coarse search, then a fine one among the likeliest."""
    # As in the world, only a picture's single item is upside down or has a pattern.
    poses, row, column = shortlist(image, canvas, style, LENGTH, upside_down=first)
    turned = [pose._replace(tilt=tilt) for pose in poses for tilt in TILTS]
    finalists = _best_of_each(match(image, canvas, style, turned, row, column, reach=3))
    sized: list[Match] = []
    for finalist in finalists[:FINALISTS]:
        pose, tilt = finalist.pose, finalist.pose.tilt
        variants = [
            pose._replace(side=pose.side + more, tilt=near)
            for more in range(-3, 4)
            for near in (tilt - 4, tilt, tilt + 4)
            if near in TILTS
        ]
        sized += match(image, canvas, style, variants, *_centre(finalist, style))
    finalists = _best_of_each(sized)
    if style == "sketch":
        finalists = [
            max(
                (
                    match(image, canvas, style, [f.pose], *_centre(f, style), ground=ground)[0]
                    for ground in GROUNDS
                ),
                key=lambda m: m.gain,
            )
            for f in finalists
        ]
    best = max(finalists, key=lambda m: m.gain)
    if not first:
        return best
    painted = [
        m._replace(gain=m.gain / PATTERN_GAIN)
        for finalist in finalists
        for m in match(
            image,
            canvas,
            style,
            [
                finalist.pose._replace(side=finalist.pose.side + more, pattern=pattern)
                for pattern in PATTERNS[1:]
                for more in (-1, 0, 1)
            ],
            *_centre(finalist, style),
            ground=finalist.ground,
        )
    ]
    return max([best, *painted], key=lambda m: m.gain)


def _best_of_each(matches: list[Match]) -> list[Match]:
    """The best match of every sprite, best first."""
    best: dict[tuple[str, bool, bool], Match] = {}
    for found in sorted(matches, key=lambda m: -m.gain):
        pose = found.pose
        best.setdefault((pose.emoji, pose.mirrored, pose.upside_down), found)
    return list(best.values())


def _centre(found: Match, style: str) -> tuple[int, int]:
    half = template(found.pose, style).shape[1] // 2
    return found.top + half, found.left + half


def _visible(found: Match, style: str) -> tuple[Tensor, slice, slice]:
    """The part of a match inside the picture, and the rows and columns it covers."""
    drawn = torch.from_numpy(template(found.pose, style, found.ground))
    side = drawn.shape[1]
    rows = slice(max(0, found.top), min(SIZE, found.top + side))
    columns = slice(max(0, found.left), min(SIZE, found.left + side))
    inside = drawn[
        :,
        rows.start - found.top : rows.stop - found.top,
        columns.start - found.left : columns.stop - found.left,
    ]
    return inside, rows, columns


def _describe(found: Match, style: str, score: float) -> Found:
    pose = found.pose
    half = template(pose, style).shape[1] / 2
    return Found(
        emoji=pose.emoji,
        x=(found.left + half) / SIZE,
        y=(found.top + half) / SIZE,
        scale=pose.side / SIZE,
        tilt=pose.tilt,
        mirrored=pose.mirrored,
        upside_down=pose.upside_down,
        pattern=pose.pattern,
        score=min(score, 1.0),
        like=_like(pose, style),
    )


def _like(pose: Pose, style: str) -> tuple[str, ...]:
    """The names of what looks the same in the style as this pose."""
    family = next((f for f in COLOURED if pose.emoji in f), ())
    if style == "plain" or not family:
        return (pose.emoji,)
    if style == "sketch":  # a flat fill leaves nothing but the outline
        return family
    drawn = template(pose, style)
    others = {name: template(pose._replace(emoji=name), style) for name in family}
    weight = drawn[1] / drawn[1].sum()
    return tuple(
        name
        for name, other in others.items()
        if float((np.square(other[0] - drawn[0]) * weight).sum()) <= ALIKE**2
    )

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
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rectiflow.emoji.edits import COLOURED
from rectiflow.emoji.scene import MAX_TILT, Scene
from rectiflow.emoji.sprites import GROUPS, SPRITES
from rectiflow.errors import InputError
from rectiflow.evaluate.setting import Setting, features, in_tones, possible_styles, read_setting
from rectiflow.evaluate.templates import GROUNDS, SIZE, Match, Pose, match, shortlist, template

MOST_ITEMS = 5
"""The search ends here; no scene has more than three."""
LENGTH = 24
"""Sprites kept of the coarse search, and how many of those the fine search keeps."""
FINALISTS = 6
TILTS = range(-MAX_TILT, MAX_TILT + 1, 4)
COARSE_TILTS = (-8, 0, 8)
SMALLEST = 22
"""Side of the smallest item looked for, pixels."""
SCORE = 0.35
"""Share of the difference under an item that it must explain."""
GAIN = 0.5
"""Least gain of an item in squared error, summed over pixels, a channel."""
GOOD = 0.97
"""An item that explains this share is upright and has no pattern."""
PUZZLING = 0.05
"""Root mean square residual of a picture that is worth a second search."""
MUCH_BETTER = 0.75
LARGEST_OF_SEVERAL = 32
"""No item of a layout with several slots is larger, pixels."""
OVERLAP = 0.5
"""Share of an item that may lie over others."""
UNUSUAL_GAIN = 1.02
"""A pattern or a sprite upside down must explain this many times what a usual one does."""
ALIKE = 0.06
"""Root mean square difference up to which toneless members of one family pass for each other."""


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
    """Root mean square of what is left unexplained, pixels in [0, 1], and the misfit of the
    background's colours."""

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
    pixels = array.astype(np.float32) / np.float32(255)
    verdicts = [_explain(pixels, style) for style in possible_styles(pixels)]
    verdict = min(verdicts, key=lambda verdict: verdict.residual)
    if verdict.residual <= PUZZLING:
        return verdict
    # Several small things may have been taken for one large. More items always explain more, so
    # that has to be much the better explanation.
    other = _explain(pixels, verdict.style, largest=LARGEST_OF_SEVERAL)
    return other if other.residual < MUCH_BETTER * verdict.residual else verdict


@torch.inference_mode()
def _explain(pixels: NDArray[np.float32], style: str, largest: int = SIZE) -> Verdict:
    setting = read_setting(pixels, style)
    image = torch.from_numpy(features(pixels, style))
    model = torch.from_numpy(setting.canvas)
    canvas, settled = model.clone(), torch.zeros_like(model[:1])
    found: list[Found] = []
    search = _Search(image, style, largest)
    for _ in range(MOST_ITEMS):
        best = search.find(canvas, first=not found)
        share = score(best, image, canvas, style)
        if best.gain < GAIN * len(image) or share < SCORE:
            break
        drawn, rows, columns = _visible(best, style)
        cover = drawn[-1:]
        # What is under an item and at its rim is settled, however well it fits: what is left
        # there is no other item.
        if float((settled[:, rows, columns] * cover).sum() / cover.sum()) < OVERLAP:
            found.append(_describe(best, style, share))
            model[:, rows, columns] = model[:, rows, columns] * (1 - cover) + drawn[:-1]
        settled[:, rows, columns] = torch.maximum(settled[:, rows, columns], cover)
        rim = F.max_pool2d(settled, 3, stride=1, padding=1) > 0.2
        canvas = torch.where(rim, image, model)
    return Verdict(
        background=setting.backgrounds[0],
        style=style,
        items=tuple(found),
        backgrounds=setting.backgrounds,
        residual=_residual(pixels, image, model, setting) + setting.misfit,
    )


def score(found: Match, image: Tensor, canvas: Tensor, style: str) -> float:
    """The share of what differs under a match that it explains."""
    drawn, rows, columns = _visible(found, style)
    under = ((image - canvas)[:, rows, columns].square() * drawn[-1:]).sum()
    return found.gain / max(float(under), 1e-6)


def _residual(pixels: NDArray[np.float32], image: Tensor, model: Tensor, setting: Setting) -> float:
    """What is unexplained as an RGB distance, so that styles can be compared."""
    off_tone = float(np.square(pixels - in_tones(pixels, setting.style)).mean())
    scale = 1.6 if setting.style == "sketch" else 1.0
    return float(np.sqrt(off_tone + float((scale * (image - model)).square().mean())))


class _Search:
    """The search for items in one picture whose style is known."""

    def __init__(self, image: Tensor, style: str, largest: int) -> None:
        self.image, self.style, self.largest = image, style, largest

    def find(self, canvas: Tensor, *, first: bool) -> Match:
        """The item that explains most of what the canvas does not."""
        best = self._best(canvas, "upright")
        # As in the world, only a picture's single item is upside down or has a pattern.
        if not first or score(best, self.image, canvas, self.style) > GOOD:
            return best
        unusual = [self._best(canvas, kind) for kind in ("upside down", "painted")]
        other = max(unusual, key=lambda found: found.gain)
        return other if other.gain > UNUSUAL_GAIN * best.gain else best

    def _best(self, canvas: Tensor, kind: str) -> Match:
        """A coarse search for everything everywhere, then a fine one among the likeliest."""
        length = LENGTH * (2 if self.style == "sketch" else 1)
        poses, row, column = shortlist(
            self.image, canvas, self.style, kind, length=length, largest=self.largest
        )
        turned = [pose._replace(tilt=tilt) for pose in poses for tilt in COARSE_TILTS]
        found = match(self.image, canvas, self.style, turned, row, column, reach=3)
        finalists = _best_of_each(found)[:FINALISTS]
        for growth in (range(-3, 4), range(-1, 2)):
            finalists = self._refine(
                canvas, [(f, _variants(f.pose, growth, self.style)) for f in finalists]
            )
        best = finalists[0]
        siblings = GROUPS[SPRITES[best.pose.emoji].group]
        return self._refine(
            canvas, [(best, [best.pose._replace(emoji=name) for name in siblings])]
        )[0]

    def _refine(self, canvas: Tensor, tries: list[tuple[Match, list[Pose]]]) -> list[Match]:
        """Poses at the places of earlier matches: the best of every sprite, best first."""
        return _best_of_each(
            [
                better
                for near, poses in tries
                for better in match(
                    self.image, canvas, self.style, poses, *_centre(near, self.style)
                )
            ]
        )


def _variants(pose: Pose, growth: range, style: str) -> list[Pose]:
    """The pose a little smaller and larger, turned a little, and before other grounds."""
    return [
        pose._replace(side=pose.side + more, tilt=tilt, ground=ground)
        for more in growth
        for tilt in (pose.tilt - 4, pose.tilt, pose.tilt + 4)
        if tilt in TILTS and pose.side + more >= SMALLEST
        for ground in (GROUNDS if style == "sketch" and len(growth) == 3 else (pose.ground,))
    ]


def _best_of_each(matches: list[Match]) -> list[Match]:
    """The best match of every sprite, best first."""
    best: dict[tuple[str, bool, bool], Match] = {}
    for found in sorted(matches, key=lambda m: -m.gain):
        best.setdefault(found.pose.look, found)
    return list(best.values())


def _centre(found: Match, style: str) -> tuple[int, int]:
    half = template(found.pose, style).shape[1] // 2
    return found.top + half, found.left + half


def _visible(found: Match, style: str) -> tuple[Tensor, slice, slice]:
    """The part of a match inside the picture, and the rows and columns it covers."""
    drawn = torch.from_numpy(template(found.pose, style))
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

"""Scenes: what is in a picture, as data, and how one is drawn at random from a seed.

A scene holds more than its caption says. Position, size, tilt and the exact shade of the
background are *nuisance*: they are in the scene and never in the caption, so they are what an
edit has to preserve.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from rectiflow.emoji.sprites import SPRITES

# Each background is one flat colour, or (for scenery) a colour above and one below a horizon.
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((178, 34, 44),),
    "orange": ((226, 132, 74),),
    "yellow": ((240, 220, 130),),
    "green": ((62, 142, 96),),
    "blue": ((66, 104, 196),),
    "purple": ((118, 78, 158),),
    "pink": ((244, 176, 204),),
    "white": ((244, 244, 242),),
    "gray": ((134, 136, 140),),
    "black": ((24, 24, 28),),
    "meadow": ((158, 208, 238), (104, 166, 72)),
    "beach": ((96, 178, 214), (232, 210, 160)),
    "night": ((20, 24, 66), (60, 46, 100)),
}
SCENERY = ("meadow", "beach", "night")
STYLES = ("plain", "gray", "sepia", "sketch")
PATTERNS = ("plain", "striped", "dotted")

SHADE = 10
"""Largest deviation of a background's channel from its nominal colour, of 255."""
MAX_TILT = 12
"""Largest tilt of an item, degrees."""

# Slots of a layout: centre (x, y), how far the centre may wander, smallest and largest scale;
# fractions of the picture's side.
Slot = tuple[float, float, float, float, float]
LAYOUTS: tuple[tuple[Slot, ...], ...] = (
    ((0.5, 0.5, 0.08, 0.5, 0.66),),
    ((0.26, 0.5, 0.03, 0.40, 0.48), (0.74, 0.5, 0.03, 0.40, 0.48)),
    ((0.27, 0.28, 0.02, 0.36, 0.44), (0.73, 0.28, 0.02, 0.36, 0.44), (0.5, 0.73, 0.03, 0.36, 0.44)),
)


@dataclass(frozen=True)
class Item:
    """One emoji in a scene; lengths are fractions of the picture's side."""

    emoji: str
    x: float = 0.5
    """Centre, 0 left to 1 right."""
    y: float = 0.5
    """Centre, 0 top to 1 bottom."""
    scale: float = 0.6
    """Side of the sprite's square."""
    tilt: int = 0
    """Degrees, counter-clockwise."""
    mirrored: bool = False
    """Faces right; only for sprites that have a direction."""
    upside_down: bool = False
    pattern: str = "plain"
    """One of PATTERNS."""


@dataclass(frozen=True)
class Scene:
    """Items on a background, in a style."""

    items: tuple[Item, ...]
    background: str = "white"
    """One of BACKGROUNDS."""
    shade: tuple[int, int, int] = (0, 0, 0)
    """Added to the background's colour, per channel of 255: nuisance."""
    horizon: float = 0.6
    """Where scenery's lower part begins, fraction from the top: nuisance."""
    style: str = "plain"
    """One of STYLES."""


def _clashes(emoji: str, background: str) -> bool:
    """Whether a plain sprite would vanish in the background of its own colour."""
    colour, _, shape = emoji.partition(" ")
    return shape in ("heart", "circle", "square") and colour == background


def draw_item(rng: random.Random, emoji: str, slot: Slot) -> Item:
    """An item of the given emoji with its nuisance drawn for a slot."""
    x, y, wander, smallest, largest = slot
    vanishing = rng.random()
    return Item(
        emoji=emoji,
        x=x + rng.uniform(-wander, wander),
        y=y + rng.uniform(-wander, wander),
        scale=rng.uniform(smallest, largest),
        tilt=4 * rng.randint(-MAX_TILT // 4, MAX_TILT // 4),
        mirrored=SPRITES[emoji].directional and rng.random() < 0.5,
        upside_down=vanishing < 0.06,
        pattern="plain" if vanishing < 0.88 else rng.choice(PATTERNS[1:]),
    )


def draw_emoji(rng: random.Random, background: str) -> str:
    """An emoji that can be seen on the background."""
    while True:
        emoji = rng.choice(tuple(SPRITES))
        if not _clashes(emoji, background):
            return emoji


def draw_background(rng: random.Random, emoji: tuple[str, ...] = ()) -> str:
    """A background on which all of the emoji can be seen."""
    while True:
        background = rng.choice(tuple(BACKGROUNDS))
        if not any(_clashes(name, background) for name in emoji):
            return background


def draw_scene(
    rng: random.Random,
    *,
    layout: int | None = None,
    repeat: float = 0.35,
    vacancy: float = 0.3,
    style: str | None = None,
) -> Scene:
    """A scene from a random stream.

    Args:
        rng: the stream.
        layout: number of slots, 1 to 3; drawn when None.
        repeat: chance that an item repeats the one before it.
        vacancy: chance that one slot of a layout with several stays empty.
        style: one of STYLES; drawn when None.
    """
    layout = layout or rng.choices((1, 2, 3), (45, 35, 20))[0]
    background = draw_background(rng)
    slots = list(LAYOUTS[layout - 1])
    if layout > 1 and rng.random() < vacancy:
        slots.pop(rng.randrange(layout))
    items: list[Item] = []
    for slot in slots:
        repeated = bool(items) and rng.random() < repeat
        emoji = items[-1].emoji if repeated else draw_emoji(rng, background)
        item = draw_item(rng, emoji, slot)
        if len(slots) > 1:
            item = Item(emoji, item.x, item.y, item.scale, item.tilt, item.mirrored)
        if repeated:  # "two cars facing left": what the caption groups must look alike
            item = Item(emoji, item.x, item.y, item.scale, item.tilt, items[-1].mirrored)
        items.append(item)
    if style is None:
        style = rng.choices(STYLES, (88, 4, 4, 4))[0]
    return Scene(
        items=tuple(items),
        background=background,
        shade=(rng.randint(-SHADE, SHADE), rng.randint(-SHADE, SHADE), rng.randint(-SHADE, SHADE)),
        horizon=rng.uniform(0.5, 0.7),
        style=style,
    )


def sample(seed: int) -> Scene:
    """The scene of a seed.

    Training draws seeds below 1 000 000, tuning 1 000 000 to 1 999 999, reported figures
    2 000 000 and above.
    """
    return draw_scene(random.Random(seed))

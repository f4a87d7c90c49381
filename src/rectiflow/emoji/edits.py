"""Edits whose right answer is known: a source scene, a target scene, both captions, the mask.

The kinds are the ten of PIE-Bench (arXiv 2310.01506) and the two that FTEdit (arXiv 2411.15843)
adds, quantity and text. A kind is one function from a scene to the changed scene; what it does
not change (place, size, tilt, shade, horizon) it leaves alone, and both scenes are such as
`draw_scene` can draw.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rectiflow.emoji.caption import caption
from rectiflow.emoji.render import render_array
from rectiflow.emoji.scene import (
    LAYOUTS,
    PATTERNS,
    STYLES,
    Item,
    Scene,
    Slot,
    _clashes,
    draw_background,
    draw_item,
    draw_scene,
)
from rectiflow.emoji.sprites import GROUPS, SPRITES
from rectiflow.errors import InputError

THRESHOLD = 2
"""A pixel is edited where a channel differs by more than this, of 255."""
VISIBLE = 0.01
"""Smallest share of the picture that a sampled edit changes."""

APPLES = ("red apple", "green apple")
COLOURED: tuple[tuple[str, ...], ...] = (
    *(GROUPS[group] for group in ("heart", "circle", "square", "book")),
    APPLES,
)
"""Families that differ in nothing but their colour."""
KEYS: tuple[tuple[str, ...], ...] = tuple(
    tuple(name for name in GROUPS["key"] if name.startswith(what)) for what in ("digit", "letter")
)
"""Digits, and letters."""
# Exchanging two of these is a change of colour, content, pose or text rather than of object.
_VARIANTS = (*COLOURED, GROUPS["face"], GROUPS["hand"], GROUPS["key"])
_DIRECTIONAL = tuple(name for name, sprite in SPRITES.items() if sprite.directional)


@dataclass(frozen=True)
class EditCase:
    """One edit and its right answer."""

    kind: str
    """One of KINDS."""
    source: Scene
    target: Scene
    seed: int = 0
    """What it was drawn from; methods that draw noise draw it from here."""

    @property
    def source_prompt(self) -> str:
        """What the source shows."""
        return caption(self.source)

    @property
    def target_prompt(self) -> str:
        """What the target shows."""
        return caption(self.target)

    def mask(self, size: int = 64) -> NDArray[np.bool_]:
        """Where the two pictures differ, bool ``[size, size]``."""
        source, target = (render_array(s, size).astype(int) for s in (self.source, self.target))
        return np.asarray((np.abs(source - target) > THRESHOLD).any(axis=-1))


# A change returns None for a scene that it does not suit.
_Change = Callable[[Scene, random.Random], Scene | None]


def _swap(scene: Scene, index: int, item: Item) -> Scene:
    return replace(scene, items=(*scene.items[:index], item, *scene.items[index + 1 :]))


def _as(item: Item, emoji: str) -> Item:
    """The item showing another emoji, all nuisance kept."""
    return replace(item, emoji=emoji, mirrored=item.mirrored and SPRITES[emoji].directional)


def _draw_new(rng: random.Random, scene: Scene, pool: tuple[str, ...]) -> str | None:
    """An emoji of the pool that is not in the scene and does not vanish in its background."""
    present = {item.emoji for item in scene.items}
    free = [name for name in pool if name not in present and not _clashes(name, scene.background)]
    return rng.choice(free) if free else None


def _exchange(*families: tuple[str, ...]) -> _Change:
    """The change of one item into another of its own family."""

    def change(scene: Scene, rng: random.Random) -> Scene | None:
        members = [
            (index, family)
            for index, item in enumerate(scene.items)
            for family in families
            if item.emoji in family
        ]
        if not members:
            return None
        index, family = rng.choice(members)
        emoji = _draw_new(rng, scene, family)
        return _swap(scene, index, _as(scene.items[index], emoji)) if emoji else None

    return change


def _object(scene: Scene, rng: random.Random) -> Scene | None:
    """One item becomes another thing, half the time of its own group."""
    index = rng.randrange(len(scene.items))
    item = scene.items[index]
    group = GROUPS[SPRITES[item.emoji].group] if rng.random() < 0.5 else tuple(SPRITES)
    variants = next((family for family in _VARIANTS if item.emoji in family), ())
    pools = (tuple(name for name in names if name not in variants) for names in (group, SPRITES))
    emoji = next(filter(None, (_draw_new(rng, scene, pool) for pool in pools)), None)
    return _swap(scene, index, _as(item, emoji)) if emoji else None


def _seats(scene: Scene) -> tuple[tuple[Slot, ...], list[int]]:
    """The layout of a scene and the slot each item sits in."""
    for layout in LAYOUTS:
        seats = [
            index
            for item in scene.items
            for index, (x, y, wander, _, _) in enumerate(layout)
            if max(abs(item.x - x), abs(item.y - y)) <= wander + 1e-9
        ]
        if len(seats) == len(scene.items) >= len(layout) - 1:
            return layout, seats
    raise InputError("the scene's items fit no layout; draw it with rectiflow.emoji.scene.sample")


def _is_plain(item: Item) -> bool:
    return item.pattern == "plain" and not item.upside_down


def _seat(scene: Scene, rng: random.Random, emoji: str, mirrored: bool) -> Scene | None:
    """The scene with an item in the slot its layout has free."""
    layout, seats = _seats(scene)
    free = [index for index in range(len(layout)) if index not in seats]
    if not free or not all(map(_is_plain, scene.items)):
        return None
    item = draw_item(rng, emoji, layout[free[0]])
    item = Item(emoji, item.x, item.y, item.scale, item.tilt, mirrored)
    place = sum(seat < free[0] for seat in seats)
    return replace(scene, items=(*scene.items[:place], item, *scene.items[place:]))


def _remove(scene: Scene, index: int) -> Scene | None:
    """The scene without an item, if its layout was full and is not left empty."""
    layout, seats = _seats(scene)
    if len(layout) == 1 or len(seats) < len(layout):
        return None
    return replace(scene, items=scene.items[:index] + scene.items[index + 1 :])


def _add(scene: Scene, rng: random.Random) -> Scene | None:
    emoji = _draw_new(rng, scene, tuple(SPRITES))
    mirrored = rng.random() < 0.5
    return _seat(scene, rng, emoji, SPRITES[emoji].directional and mirrored) if emoji else None


def _delete(scene: Scene, rng: random.Random) -> Scene | None:
    names = [item.emoji for item in scene.items]
    single = [index for index, name in enumerate(names) if names.count(name) == 1]
    return _remove(scene, rng.choice(single)) if single else None


def _quantity(scene: Scene, rng: random.Random) -> Scene | None:
    """One more of the same where a slot is free, else one fewer."""
    first = scene.items[0]
    if any((i.emoji, i.mirrored) != (first.emoji, first.mirrored) for i in scene.items):
        return None
    fewer = _remove(scene, rng.randrange(len(scene.items)))
    return fewer or _seat(scene, rng, first.emoji, first.mirrored)


def _pose(scene: Scene, rng: random.Random) -> Scene | None:
    """A single item turns: the other way, thumb up to down, or upside down."""
    if len(scene.items) > 1:
        return None
    (item,) = scene.items
    if SPRITES[item.emoji].directional:
        return replace(scene, items=(replace(item, mirrored=not item.mirrored),))
    if item.emoji in GROUPS["hand"]:
        return _exchange(GROUPS["hand"])(scene, rng)
    if item.pattern != "plain":
        return None
    return replace(scene, items=(replace(item, upside_down=not item.upside_down),))


def _material(scene: Scene, rng: random.Random) -> Scene | None:
    if len(scene.items) > 1 or not _is_plain(scene.items[0]):
        return None
    return replace(scene, items=(replace(scene.items[0], pattern=rng.choice(PATTERNS[1:])),))


def _background(scene: Scene, rng: random.Random) -> Scene:
    name = scene.background
    while name == scene.background:
        name = draw_background(rng, tuple(item.emoji for item in scene.items))
    return replace(scene, background=name)


def _style(scene: Scene, rng: random.Random) -> Scene | None:
    return replace(scene, style=rng.choice(STYLES[1:])) if scene.style == "plain" else None


# Two changes at once, in this order.
_MIXES = (
    ("object", "background"),
    ("object", "add"),
    ("delete", "object"),
    ("add", "background"),
    ("color", "background"),
    ("object", "style"),
)


def _random(scene: Scene, rng: random.Random) -> Scene | None:
    first, second = rng.choice(_MIXES)
    changed = _CHANGES[first](scene, rng)
    return _CHANGES[second](changed, rng) if changed else None


_CHANGES: dict[str, _Change] = {
    "random": _random,
    "object": _object,
    "add": _add,
    "delete": _delete,
    "content": _exchange(GROUPS["face"]),
    "pose": _pose,
    "color": _exchange(*COLOURED),
    "material": _material,
    "background": _background,
    "style": _style,
    "quantity": _quantity,
    "text": _exchange(*KEYS),
}
KINDS = tuple(_CHANGES)
"""PIE-Bench's ten kinds in its order, then quantity and text."""

# Half of all random scenes or more suit most kinds; for the others, what the first item shows.
_SUBJECTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "content": (GROUPS["face"],),
    "pose": (_DIRECTIONAL, GROUPS["hand"], tuple(SPRITES)),
    "color": COLOURED,
    "text": KEYS,
}


def _draw_source(rng: random.Random, kind: str) -> Scene:
    several = rng.choice((2, 3))
    if kind == "quantity":
        return draw_scene(rng, layout=several, repeat=1.0, vacancy=0.5, style="plain")
    if kind in ("add", "delete"):
        return draw_scene(rng, layout=several, vacancy=float(kind == "add"), style="plain")
    scene = draw_scene(rng, layout=1 if kind in ("pose", "material") else None, style="plain")
    if kind in _SUBJECTS:
        emoji = _draw_new(rng, scene, rng.choice(_SUBJECTS[kind]))
        if emoji:
            scene = _swap(scene, 0, _as(scene.items[0], emoji))
    return scene


def _change(kind: str) -> _Change:
    if kind not in _CHANGES:
        raise InputError(f"unknown kind of edit {kind!r}; one of {', '.join(KINDS)}")
    return _CHANGES[kind]


def edit(scene: Scene, kind: str, rng: random.Random) -> EditCase:
    """Change a scene.

    Args:
        scene: the source, such as `draw_scene` draws.
        kind: one of KINDS.
        rng: decides what is changed, and into what.

    Raises:
        InputError: no such kind, or the scene does not suit it (a scene without a face has no
            expression to change).
    """
    target = _change(kind)(scene, rng)
    if target is None:
        raise InputError(
            f"an edit of kind {kind!r} does not suit {caption(scene)!r}; sample_edit draws one"
        )
    return EditCase(kind, scene, target)


def sample_edit(kind: str, seed: int) -> EditCase:
    """The edit of a kind and a seed, with a source scene that suits it.

    Seeds below 1 000 000 are for training, to 1 999 999 for tuning, from there for reported
    figures.

    Raises:
        InputError: no such kind.

    Example:
        >>> case = sample_edit("quantity", 2_000_000)
        >>> case.source_prompt, case.target_prompt
        ('two rabbits on a yellow background', 'three rabbits on a yellow background')
    """
    change, rng = _change(kind), random.Random(f"{kind} {seed}")
    while True:
        source = _draw_source(rng, kind)
        target = change(source, rng)
        if target is None:
            continue
        case = EditCase(kind, source, target, seed)
        if case.mask().mean() >= VISIBLE:
            return case

"""What a scene's caption says: the items in reading order, the background, the style."""

from __future__ import annotations

import itertools

from rectiflow.emoji.scene import SCENERY, Item, Scene
from rectiflow.emoji.sprites import SPRITES

NUMBERS = ("no", "one", "two", "three")
SETTINGS = {"meadow": "in a meadow", "beach": "on a beach", "night": "at night"}
STYLE_WORDS = {"gray": "in black and white", "sepia": "in sepia", "sketch": "as a pencil sketch"}


def _look(item: Item) -> tuple[str, bool, bool, str]:
    return item.emoji, item.mirrored, item.upside_down, item.pattern


def _phrase(item: Item, count: int) -> str:
    sprite = SPRITES[item.emoji]
    words = []
    if item.upside_down:
        words.append("upside-down")
    if item.pattern != "plain":
        words.append(item.pattern)
    words.append(sprite.name if count == 1 else sprite.plural)
    if sprite.directional:
        words.append("facing right" if item.mirrored else "facing left")
    noun = " ".join(words)
    if count > 1:
        return f"{NUMBERS[count]} {noun}"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def caption(scene: Scene) -> str:
    """The caption of a scene, for example ``two lemons and a key on a blue background``."""
    groups = [list(group) for _, group in itertools.groupby(scene.items, key=_look)]
    phrases = [_phrase(group[0], len(group)) for group in groups]
    listed = " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1]))) if phrases else ""
    setting = (
        SETTINGS[scene.background]
        if scene.background in SCENERY
        else f"on {'an' if scene.background == 'orange' else 'a'} {scene.background} background"
    )
    text = f"{listed or 'nothing'} {setting}"
    return text if scene.style == "plain" else f"{text}, {STYLE_WORDS[scene.style]}"

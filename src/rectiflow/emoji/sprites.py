"""The curated emoji of the world: their names, their groups, and the sheet they ship in.

Results must not depend on the font a machine happens to have, so every sprite was rendered once
from Noto Color Emoji into ``sprites.png`` (``python -m rectiflow.emoji.sprites FONT`` makes it
again). Names are those of ``unicodedata`` shortened to plain words.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

SHEET = Path(__file__).with_name("sprites.png")
CELL = 96
"""Side of a sprite in the sheet, pixels."""
COLUMNS = 12

# One line a group: character and name, the plural in brackets where it is irregular. A group
# whose name ends in "<" shows things that face left, and can be mirrored to face right.
TABLE = """
fruit: 🍎 red apple, 🍏 green apple, 🍐 pear, 🍊 tangerine, 🍋 lemon, 🍌 banana, 🍉 watermelon,\
 🍇 grape bunch (grape bunches), 🍓 strawberry (strawberries), 🍒 cherry pair,\
 🍍 pineapple, 🍅 tomato (tomatoes)
food: 🥑 avocado, 🥕 carrot, 🍄 mushroom, 🍔 hamburger, 🍕 pizza slice,\
 🍩 donut, 🍪 cookie, 🎂 cake, 🍦 ice cream, 🧀 cheese wedge
animal: 🐶 dog, 🐱 cat, 🐰 rabbit, 🦊 fox (foxes), 🐼 panda, 🐯 tiger,\
 🦁 lion, 🐷 pig, 🐸 frog, 🐵 monkey, 🐔 chicken, 🐞 ladybug,\
 🦋 butterfly (butterflies)
creature<: 🐢 turtle, 🐟 fish (fish), 🐌 snail
face: 😀 grinning face, 😢 crying face, 😡 angry face, 😴 sleeping face, 😎 cool face,\
 😍 loving face, 😮 surprised face, 🤢 sick face, 😉 winking face
vehicle<: 🚗 car, 🚕 taxi, 🚑 ambulance, 🚒 fire truck, 🚜 tractor
craft: 🚀 rocket, 🎈 balloon
plant: 🌻 sunflower, 🌹 rose, 🌵 cactus (cacti), 🌴 palm tree,\
 🌲 pine tree, 🍁 maple leaf (maple leaves), 🍀 clover
weather: 🌞 sun, 🌛 moon, ⛅ cloud, ⭐ star, 🌈 rainbow, ⛄ snowman (snowmen)
object: 🔑 key, 🔒 padlock, 🔔 bell, 🎁 gift, 🏆 trophy (trophies),\
 💡 light bulb, 👑 crown, 🎩 top hat, 💎 gem, 🎃 pumpkin
ball: ⚽ soccer ball, 🏀 basketball, 🎾 tennis racket
book: 📕 red book, 📗 green book, 📘 blue book, 📙 orange book
heart: ❤️ red heart, 🧡 orange heart, 💛 yellow heart, 💚 green heart, 💙 blue heart,\
 💜 purple heart, 🖤 black heart, 🤍 white heart, 🤎 brown heart
circle: 🔴 red circle, 🟡 yellow circle, 🟢 green circle, 🔵 blue circle, 🟣 purple circle
square: 🟥 red square, 🟨 yellow square, 🟩 green square, 🟦 blue square, 🟪 purple square
hand: 👍 thumb up (thumbs up), 👎 thumb down (thumbs down)
key: 1️⃣ digit one (digits one), 2️⃣ digit two (digits two), 3️⃣ digit three (digits three),\
 4️⃣ digit four (digits four), 5️⃣ digit five (digits five), 🇦 letter A (letters A),\
 🇧 letter B (letters B), 🇲 letter M (letters M), 🇸 letter S (letters S), 🇽 letter X (letters X)
"""


@dataclass(frozen=True)
class Sprite:
    """One emoji: its place in the sheet, its character, its name and what it is."""

    index: int
    character: str
    name: str
    plural: str
    group: str
    directional: bool
    """Faces left as drawn, so that mirroring it means something."""


def _parse(table: str) -> dict[str, Sprite]:
    sprites: dict[str, Sprite] = {}
    for line in table.strip().splitlines():
        group, _, entries = line.partition(": ")
        for entry in entries.split(","):
            character, _, rest = entry.strip().partition(" ")
            name, _, plural = rest.partition(" (")
            sprites[name] = Sprite(
                index=len(sprites),
                character=character,
                name=name,
                plural=plural.rstrip(")") or name + "s",
                group=group.rstrip("<"),
                directional=group.endswith("<"),
            )
    return sprites


SPRITES: dict[str, Sprite] = _parse(TABLE)
"""Every sprite by name, in the order of the sheet."""
GROUPS: dict[str, tuple[str, ...]] = {
    group: tuple(s.name for s in SPRITES.values() if s.group == group)
    for group in dict.fromkeys(s.group for s in SPRITES.values())
}


@functools.cache
def _sheet() -> NDArray[np.uint8]:
    with Image.open(SHEET) as sheet:
        return np.asarray(sheet.convert("RGBA"))


def sprite(name: str) -> NDArray[np.uint8]:
    """The sprite called `name`, uint8 ``[CELL, CELL, 4]`` RGBA (straight alpha).

    Raises:
        KeyError: no sprite has that name.
    """
    row, column = divmod(SPRITES[name].index, COLUMNS)
    return _sheet()[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


def make_sheet(font_file: str) -> None:
    """Render the sheet anew from the bitmap font Noto Color Emoji (size 109)."""
    font = ImageFont.truetype(font_file, 109)
    rows = -(-len(SPRITES) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for entry in SPRITES.values():
        glyph = Image.new("RGBA", (192, 192))
        ImageDraw.Draw(glyph).text((20, 20), entry.character, font=font, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        side = max(glyph.size)
        square = Image.new("RGBA", (side, side))
        square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        # Resized with premultiplied alpha, so that no dark fringe appears.
        cell = square.convert("RGBa").resize((CELL, CELL), Image.Resampling.LANCZOS)
        row, column = divmod(entry.index, COLUMNS)
        sheet.paste(cell.convert("RGBA"), (column * CELL, row * CELL))
    notice = PngImagePlugin.PngInfo()
    notice.add_text("Copyright", "Copyright Google LLC (Noto Color Emoji)")
    notice.add_text("License", "SPDX-License-Identifier: OFL-1.1")
    notice.add_text("Source", "Noto Color Emoji, https://github.com/googlefonts/noto-emoji")
    sheet.save(SHEET, optimize=True, pnginfo=notice)


if __name__ == "__main__":
    make_sheet(sys.argv[1])

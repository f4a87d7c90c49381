"""Contact sheets of generated pictures, each under its seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

CELL = 256
"""Longest side of a picture on a sheet, in pixels."""
LEAST = 128
"""Small pictures are enlarged to about this."""


def write_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    about: dict[str, Any],
    seeds: Sequence[int],
    file: Path,
    *,
    columns: int | None = None,
) -> None:
    """Write a contact sheet that says what is on it.

    Args:
        images: of one size.
        captions: one each.
        about: what made them.
        seeds: of what is on it.
        file: a picture.
        columns: pictures in a row; as many as make the sheet about square if None.
    """
    from PIL import Image

    from rectiflow.report import save_picture
    from rectiflow.report.pictures import pixels
    from rectiflow.report.sheet import contact_sheet

    longest = max(images[0].size)
    cells = list(images)
    if longest > CELL:
        size = tuple(max(1, round(side * CELL / longest)) for side in images[0].size)
        cells = [image.resize((size[0], size[1]), Image.Resampling.LANCZOS) for image in images]
    sheet = contact_sheet(
        [pixels(cell) for cell in cells],
        columns=columns or math.ceil(math.sqrt(len(images))),
        scale=max(1, LEAST // longest),
        captions=captions,
    )
    save_picture(sheet, file, about | {"command": "generate --sheet", "seeds": list(seeds)})


def write_pairs(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    about: dict[str, Any],
    seeds: Sequence[int],
    file: Path,
) -> None:
    """The sheet of pictures in files of their own: each beside its refined one, if there is any."""
    if not after:
        write_sheet(before, [f"seed {seed}" for seed in seeds], about, seeds, file)
        return
    images = [image for pair in zip(before, after, strict=True) for image in pair]
    captions = [text for seed in seeds for text in (f"seed {seed}", f"{seed} refined")]
    columns = 2 * max(1, round(math.sqrt(len(seeds) / 2)))
    write_sheet(images, captions, about, seeds, file, columns=columns)

"""Contact sheets: many small pictures on one, with captions when they are given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

GAP = 2
LINE = 12


def contact_sheet(
    images: NDArray[np.floating] | Sequence[NDArray[np.floating]],
    *,
    columns: int,
    scale: int = 1,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Lay pictures out in rows.

    Args:
        images: each ``[H, W, 3]`` in [0, 1], all of one size.
        columns: pictures in a row.
        scale: whole-number enlargement, so that pixels stay visible.
        captions: one under each picture, cut to its width.
    """
    height, width = (side * scale for side in images[0].shape[:2])
    step_y, step_x = height + GAP + (LINE if captions else 0), width + GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * step_x, rows * step_y), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=10)
    for index, pixels in enumerate(images):
        left, top = index % columns * step_x, index // columns * step_y
        picture = Image.fromarray(np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8))
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if captions:
            text = captions[index]
            while text and draw.textlength(text, font=font) > width:
                text = text[:-1]
            draw.text((left, top + height), text, fill="black", font=font)
    return sheet

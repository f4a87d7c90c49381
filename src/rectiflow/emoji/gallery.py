"""Pictures of the world for its documentation: ``python -m rectiflow.emoji.gallery FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rectiflow.emoji.caption import caption
from rectiflow.emoji.edits import KINDS, sample_edit
from rectiflow.emoji.render import render_array
from rectiflow.emoji.scene import Scene, sample
from rectiflow.report.sheet import contact_sheet

SIZE = 128
FIRST = 2_000_000
"""The first of the held-out seeds; the pictures shown are those of the seeds from here on."""


def _picture(scene: Scene) -> NDArray[np.floating]:
    return render_array(scene, SIZE) / 255


def scene_sheet(rows: int = 6, columns: int = 8) -> Image.Image:
    """The scenes of the first seeds, each above its caption."""
    scenes = [sample(FIRST + index) for index in range(rows * columns)]
    captions = [caption(scene) for scene in scenes]
    return contact_sheet([*map(_picture, scenes)], columns=columns, captions=captions)


def edit_sheet(columns: int = 3) -> Image.Image:
    """Per kind a row of the first seeds' edits: source, target, mask."""
    pictures: list[NDArray[np.floating]] = []
    captions: list[str] = []
    for kind in KINDS:
        for seed in range(FIRST, FIRST + columns):
            case = sample_edit(kind, seed)
            mask = np.repeat(case.mask(SIZE)[..., None], 3, axis=2).astype(float)
            pictures += [_picture(case.source), _picture(case.target), mask]
            captions += [case.source_prompt, case.target_prompt, kind]
    return contact_sheet(pictures, columns=3 * columns, captions=captions)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    scene_sheet().save(folder / "scenes.png", optimize=True)
    edit_sheet().save(folder / "edits.png", optimize=True)

"""Scenes of the emoji world in COCO's format: the evaluator's own test data."""

from __future__ import annotations

import json
from pathlib import Path

from rectiflow.emoji.caption import caption
from rectiflow.emoji.render import render
from rectiflow.emoji.scene import sample
from rectiflow.errors import InputError
from rectiflow.files import check_begun, write_whole

FIRST_SEED = 2_000_000
"""Reported figures are of these seeds on; nothing is trained or tuned on them."""
SIDE = 64
SPLIT = "val2017"


def make_emoji_coco(folder: Path, n: int) -> Path:
    """Write n held-out scenes as a COCO folder; returns the file of captions.

    An image's id is its scene's seed. Pictures are PNG of 64 × 64 pixels, so that nothing is lost.

    Args:
        folder: made if need be.
        n: how many scenes.

    Raises:
        InputError: the folder holds captions already.
    """
    file = folder / "annotations" / f"captions_{SPLIT}.json"
    if file.exists():
        raise InputError(f"{file} is there already: choose another folder")
    check_begun(folder)
    for part in (file.parent, folder / SPLIT):
        part.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, seed in enumerate(range(FIRST_SEED, FIRST_SEED + n)):
        scene = sample(seed)
        name = f"{seed:012d}.png"
        render(scene, SIDE).save(folder / SPLIT / name)
        images.append({"id": seed, "file_name": name, "height": SIDE, "width": SIDE})
        annotations.append({"id": number, "image_id": seed, "caption": caption(scene)})
    about = {"description": "scenes of rectiflow's emoji world in the format of COCO captions"}
    data = {"info": about, "images": images, "annotations": annotations}
    # Last, so that a folder with captions is a complete one.
    write_whole(file, json.dumps(data, indent=1) + "\n")
    return file

"""Edits of the emoji world in PIE-Bench's format: the evaluator's own test data."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rectiflow.emoji.edits import KINDS as EMOJI_KINDS
from rectiflow.emoji.edits import EditCase, sample_edit
from rectiflow.emoji.render import render
from rectiflow.errors import InputError
from rectiflow.evaluate.pie_bench_data import KINDS, MAPPING, PICTURES, SIDE, encode_mask
from rectiflow.files import check_begun, write_whole

FIRST_SEED = 2_000_000
"""Reported figures are of these seeds on; nothing is trained or tuned on them."""
SOURCE_SIDE = 64
TYPES = dict(zip(EMOJI_KINDS, (*range(10), 0, 0), strict=True))
"""Kind of the emoji world → editing_type_id; quantity and text, which PIE-Bench lacks, are 0."""


def make_emoji_pie(folder: Path, n: int) -> Path:
    """Write n edits of the emoji world as a PIE-Bench folder; returns the mapping file.

    The twelve kinds take turns. Pictures are rendered at 64 pixels and enlarged to 512, every
    pixel a square of 8 × 8; they are PNG, so that nothing is lost.

    Args:
        folder: made if need be.
        n: how many edits.

    Raises:
        InputError: the folder holds a mapping file already.
    """
    file = folder / MAPPING
    if file.exists():
        raise InputError(f"{file} is there already: choose another folder")
    check_begun(folder)
    mapping = {}
    for number in range(n):
        kind = EMOJI_KINDS[number % len(EMOJI_KINDS)]
        case = sample_edit(kind, FIRST_SEED + number // len(EMOJI_KINDS))
        type_id = TYPES[kind]
        key = f"{type_id}{number:011d}"
        path = f"{type_id}_{KINDS[type_id].replace(' ', '_')}/{key}.png"
        mapping[key] = _entry(case, path, type_id)
        picture = folder / PICTURES / path
        picture.parent.mkdir(parents=True, exist_ok=True)
        enlarged = render(case.source, SOURCE_SIDE).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        enlarged.save(picture)
    # Last, so that a folder with a mapping file is a complete one.
    write_whole(file, json.dumps(mapping, indent=1) + "\n")
    return file


def _entry(case: EditCase, path: str, type_id: int) -> dict[str, Any]:
    source, target = case.source_prompt.split(), case.target_prompt.split()
    changes = difflib.SequenceMatcher(a=source, b=target, autojunk=False).get_opcodes()
    changed = [change for change in changes if change[0] != "equal"]
    replaced = [(source[b - 1], target[d - 1]) for tag, _, b, _, d in changed if tag == "replace"]
    mask = np.kron(case.mask(SOURCE_SIDE), np.ones((SIDE // SOURCE_SIDE,) * 2, dtype=bool))
    return {
        "image_path": path,
        "original_prompt": _bracketed(source, [(a, b) for _, a, b, _, _ in changed]),
        "editing_prompt": _bracketed(target, [(c, d) for _, _, _, c, d in changed]),
        "editing_instruction": f"turn {case.source_prompt} into {case.target_prompt}",
        "editing_type_id": str(type_id),
        "blended_word": " ".join(replaced[-1]) if replaced else "",
        "mask": encode_mask(mask),
    }


def _bracketed(words: list[str], spans: list[tuple[int, int]]) -> str:
    """A prompt with brackets around what the other one has not."""
    marked = list(words)
    for start, end in spans:
        if start < end:
            marked[start] = "[" + marked[start]
            marked[end - 1] += "]"
    return " ".join(marked)

"""Find out what is usual of the images the embedded model knows, and what that tells apart.

    python docs/calibrate.py --dtype bfloat16 --threads 1

writes `docs/results/domain.json`, its table into `docs/editing.md`, and the ranges into the
model's `rectiflow.json`. The ranges come from scenes of the tuning seeds alone; everything that is
judged by them is other pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image

import rectiflow as rf
from rectiflow.emoji.caption import caption
from rectiflow.emoji.render import render
from rectiflow.emoji.scene import sample
from rectiflow.invert.domain import path_statistics, unusual
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.presets import PRESETS
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models import FlowModel, read_metadata, write_metadata
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.images import fit
from rectiflow.models.load import WEIGHTS
from rectiflow.models.metadata import FILE_NAME

DOCS = Path(__file__).parent
MODEL = "emoji-sd3"
PRESET_NAMES = ("exact", "fast")
TUNING, HELD_OUT = 1_000_000, 2_000_000
BATCH = 20
MARGIN = 0.25
"""Of the width of what was seen, on each side: sixty scenes do not show the most unusual one."""
PHOTOGRAPHS: dict[str, tuple[Callable[[], Any], str]] = {
    "astronaut": (skimage.data.astronaut, "a woman in an orange suit"),
    "brick": (skimage.data.brick, "a brick wall"),
    "camera": (skimage.data.camera, "a man with a camera"),
    "chelsea": (skimage.data.chelsea, "a cat"),
    "coffee": (skimage.data.coffee, "a cup of coffee on a table"),
    "grass": (skimage.data.grass, "grass"),
    "hubble": (skimage.data.hubble_deep_field, "galaxies in space"),
    "cells": (skimage.data.immunohistochemistry, "cells under a microscope"),
    "retina": (skimage.data.retina, "the inside of an eye"),
    "rocket": (skimage.data.rocket, "a rocket at night"),
}
Example = tuple[Image.Image, str]
Values = list[dict[str, float]]


def scenes(first: int, count: int) -> list[Example]:
    """Scenes with their captions."""
    drawn = [sample(seed) for seed in range(first, first + count)]
    return [(render(scene), caption(scene)) for scene in drawn]


def photographs(crops: int) -> list[Example]:
    """Square crops of photographs, brought to the model's size."""
    rng = random.Random(0)
    found = []
    for load, prompt in PHOTOGRAPHS.values():
        whole = Image.fromarray(load()).convert("RGB")
        for _ in range(crops):
            side = rng.randint(128, min(whole.size))
            left, top = (rng.randint(0, length - side) for length in whole.size)
            crop = whole.crop((left, top, left + side, top + side))
            found.append((crop.resize((64, 64), Image.Resampling.LANCZOS), prompt))
    return found


def noises(count: int) -> list[Example]:
    """Every value uniform by itself."""
    draws = [np.random.default_rng(seed).integers(0, 256, (64, 64, 3)) for seed in range(count)]
    return [(Image.fromarray(draw.astype(np.uint8)), "") for draw in draws]


def patterns() -> tuple[list[Example], list[Example]]:
    """Checkerboards of four sizes, and pictures of one colour."""
    y, x = np.mgrid[:64, :64]
    boards = [((x // side + y // side) % 2 * 255).astype(np.uint8) for side in (2, 4, 8, 16)]
    flat = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white", "red", "gray")]
    named = zip(flat, ("black", "white", "red", "gray"), strict=True)
    return (
        [(Image.fromarray(board).convert("RGB"), "a checkerboard") for board in boards],
        [(picture, f"a {colour} background") for picture, colour in named],
    )


def generated(model: FlowModel, count: int) -> list[Example]:
    """What the model itself makes of captions, saved as pictures and read again."""
    prompts = [prompt for _, prompt in scenes(HELD_OUT + 500, count)]
    return list(zip(rf.generate(model, prompts, seed=0), prompts, strict=True))


@torch.no_grad()
def statistics(model: FlowModel, examples: Sequence[Example], name: str) -> Values:
    """What a preset's inversion tells of each example, `noise_seed` as in an edit."""
    preset = dataclasses.replace(PRESETS[name], source_features="recompute")
    found: Values = []
    for first in range(0, len(examples), BATCH):
        pictures, prompts = zip(*examples[first : first + BATCH], strict=True)
        pixels = torch.cat([fit(picture, model.size_policy)[0] for picture in pictures])
        latents = model.encode_image(pixels)
        grid = grid_for(model, preset, latents)
        velocity = GuidedVelocity(model, model.encode_prompt(prompts))
        path = invert_latents(velocity, latents, grid, preset)
        found += path_statistics(SCHEMES[preset.scheme], path, grid)
        print(f"{name}: {first + len(pictures)} of {len(examples)}", flush=True)
    return found


def ranges_of(values: Values) -> dict[str, tuple[float, float]]:
    """What was seen of each statistic, and `MARGIN` beyond."""
    found = {}
    for name in values[0]:
        seen = [value[name] for value in values]
        beyond = MARGIN * (max(seen) - min(seen))
        low, high = min(seen) - beyond, max(seen) + beyond
        # No error is too small: the model may know an image as well as it likes.
        found[name] = (0.0 if name == "denoising_error" else round(low, 3), round(high, 3))
    return found


def table(report: dict[str, Any]) -> str:
    """How many of each kind of picture warn, and between which values they lie."""
    lines = []
    for preset, kinds in report["presets"].items():
        names = list(kinds["tuning"]["values"][0])
        lines += [
            f"| `{preset}` | warned | " + " | ".join(names) + " |",
            "|---" * (len(names) + 2) + "|",
        ]
        usual = " | ".join("{:.2f} to {:.2f}".format(*report["ranges"][name]) for name in names)
        lines.append(f"| *usual* | | {usual} |")
        for kind, entry in kinds.items():
            if kind != "tuning":
                seen = ([value[name] for value in entry["values"]] for name in names)
                ends = " | ".join(f"{min(values):.2f} to {max(values):.2f}" for values in seen)
                lines.append(f"| {kind} | {entry['warned']} of {entry['n']} | {ends} |")
        lines.append("")
    return "\n".join(lines)


def fill(block: str) -> None:
    """Put the table between the markers of `docs/editing.md`."""
    page = DOCS / "editing.md"
    text = re.sub(
        r"(<!-- domain:.*?-->\n).*?(<!-- /domain -->)",
        lambda match: f"{match[1]}\n{block}\n{match[2]}",
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    page.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scenes", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = rf.load(MODEL, dtype=options.dtype)
    known = scenes(HELD_OUT, options.scenes)
    ten = known[:10]
    checkerboards, flat = patterns()
    judged = {
        "scenes": known,
        "photographs": photographs(2),
        "noise": noises(10),
        "checkerboards": checkerboards,
        "flat": flat,
        "generated": generated(model, 10),
        "wrong prompt": [(ten[i][0], ten[i - 1][1]) for i in range(len(ten))],
        "missing prompt": [(picture, "") for picture, _ in ten],
    }
    tuning = scenes(TUNING, options.scenes)
    ranges: dict[str, tuple[float, float]] = {}
    presets: dict[str, Any] = {}
    for name in PRESET_NAMES:
        everything = [*tuning, *(example for kind in judged.values() for example in kind)]
        values = statistics(model, everything, name)
        own, values = values[: len(tuning)], values[len(tuning) :]
        ranges |= ranges_of(own)
        presets[name] = {"tuning": {"values": own}}
        for kind, examples in judged.items():
            mine, values = values[: len(examples)], values[len(examples) :]
            warned = sum(bool(unusual(value, ranges)) for value in mine)
            presets[name][kind] = {"n": len(mine), "warned": warned, "values": mine}
            print(f"{name}, {kind}: {warned} of {len(mine)} warned")
    report = {
        "model": MODEL,
        "dtype": options.dtype,
        "seeds": {"tuning": TUNING, "held_out": HELD_OUT},
        "margin": MARGIN,
        "ranges": ranges,
        "presets": presets,
    }
    text = json.dumps(report, indent=1)
    (DOCS / "results/domain.json").write_text(text + "\n", encoding="utf-8")
    fill(table(report))
    folder = WEIGHTS / MODEL
    metadata = read_metadata(folder / FILE_NAME)
    write_metadata(metadata.model_copy(update={"domain": ranges}), folder)


if __name__ == "__main__":
    main()

"""Find out what is usual of the images the embedded model knows, and what that tells apart.

    python docs/calibrate.py --dtype bfloat16 --threads 1

writes `docs/results/domain.json`, its table into `docs/editing.md`, and the ranges into the
model's `rectiflow.json`: by scheme and number of steps, from scenes of the tuning seeds and from
pictures that the model made of their captions under guidance 1, 3 and 5. Everything that is judged
by them is other pictures. `--quick` takes a few of each and writes nothing but to the terminal.
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
from rectiflow.checksums import write_checksums
from rectiflow.emoji.caption import caption
from rectiflow.emoji.render import render
from rectiflow.emoji.scene import sample
from rectiflow.invert.domain import path_statistics, unusual, usual
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.presets import PRESETS
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models import FlowModel, Metadata, read_metadata, write_metadata
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.images import fit
from rectiflow.models.load import WEIGHTS
from rectiflow.models.metadata import FILE_NAME

DOCS = Path(__file__).parent
MODEL = "emoji-sd3"
JUDGED = ("exact", "fast")
"""Presets whose judgement of other pictures is reported."""
STEPS = (6, 15, 30)
CALIBRATED = (*JUDGED, "ftedit", "two-step", "rf-solver", "fireflow", "uniedit")
"""A preset of every scheme that is judged, with the preset's grid."""
SAME = {"query_offset": "euler"}
"""Schemes that go through the same states."""
GUIDANCE = (1.0, 3.0, 5.0)
TUNING, HELD_OUT = 1_000_000, 2_000_000
BATCH = 40
SHARE = 0.98
"""Of the pictures that the model knows, not to be warned about."""
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


def generated(model: FlowModel, first: int, count: int, guidance: float) -> list[Example]:
    """What the model itself makes of captions, saved as pictures and read again."""
    prompts = [prompt for _, prompt in scenes(first, count)]
    made = rf.generate(model, prompts, seed=first, guidance_scale=guidance, num_inference_steps=15)
    return list(zip(made, prompts, strict=True))


@torch.no_grad()
def statistics(model: FlowModel, examples: Sequence[Example], name: str, steps: int) -> Values:
    """What a preset's inversion tells of each example, `noise_seed` as in an edit."""
    keeps = "inversion" if name == "fast" else "recompute"
    preset = dataclasses.replace(
        PRESETS[name],
        num_inference_steps=steps,
        strength=1.0,
        guidance_scale=1.0,
        source_features=keeps,
        adaln_ratio=0.0,
        attention_ratio=0.0,
    )
    found: Values = []
    for first in range(0, len(examples), BATCH):
        pictures, prompts = zip(*examples[first : first + BATCH], strict=True)
        pixels = torch.cat([fit(picture, model.size_policy)[0] for picture in pictures])
        latents = model.encode_image(pixels)
        grid = grid_for(model, preset, latents)
        velocity = GuidedVelocity(model, model.encode_prompt(prompts))
        path = invert_latents(velocity, latents, grid, preset)
        found += path_statistics(SCHEMES[preset.scheme], path, grid)
    print(f"{name}, {steps} steps: {len(examples)} pictures", flush=True)
    return found


def ranges_of(values: Values) -> dict[str, tuple[float, float]]:
    """Where `SHARE` of what was seen lies.

    No error is too small, and no noise much: the model may know an image as well as it likes. Of
    the noise the norm tells more than all else; kurtosis and correlation tell little beside it.
    """
    found = {}
    for name in ("norm", "denoising_error"):
        if name in values[0]:
            seen = [value[name] for value in values]
            low = 0.0 if name == "denoising_error" else 0.8 * min(seen)
            found[name] = (round(low, 3), round(float(np.quantile(seen, SHARE)), 3))
    return found


def table(report: dict[str, Any]) -> str:
    """How many of each kind of picture warn, and between which values they lie."""
    lines = []
    for preset, kinds in report["presets"].items():
        name = "denoising_error" if preset == "fast" else "norm"
        steps = list(next(iter(kinds.values())))
        lines += [
            f"| `{preset}` | " + " | ".join(f"warned, {n} steps | {name}" for n in steps) + " |",
            "|---" * (2 * len(steps) + 1) + "|",
        ]
        ranges = report["ranges"][PRESETS[preset].scheme][name]
        row = [f" | {low:.2f} to {high:.2f}" for low, high in (ranges[n] for n in steps)]
        lines.append("| *usual* | " + " | ".join(row) + " |")
        for kind, by_steps in kinds.items():
            row = [
                f"{entry['warned']} of {len(entry['values'])} | "
                f"{min(entry['values']):.2f} to {max(entry['values']):.2f}"
                for entry in by_steps.values()
            ]
            lines.append(f"| {kind} | " + " | ".join(row) + " |")
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


def known(model: FlowModel, first: int, count: int, made: int) -> dict[str, list[Example]]:
    """Pictures that the model knows: scenes, and what it makes under several guidances."""
    found = {"scenes": scenes(first, count)}
    for number, guidance in enumerate(GUIDANCE, 1):
        pictures = generated(model, first + 1000 * number, made, guidance)
        found[f"generated, guidance {guidance:g}"] = pictures
    return found


def calibrated(model: FlowModel, pictures: list[Example], names: Sequence[str]) -> dict[str, Any]:
    """The ranges, by scheme, statistic and steps."""
    ranges: dict[str, Any] = {}
    for name in names:
        scheme = PRESETS[name].scheme
        for steps in STEPS:
            found = ranges_of(statistics(model, pictures, name, steps))
            for statistic, ends in found.items():
                for one in filter(None, (scheme, SAME.get(scheme))):
                    ranges.setdefault(one, {}).setdefault(statistic, {})[str(steps)] = ends
    return ranges


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scenes", type=int, default=30)
    parser.add_argument("--generated", type=int, default=10, help="Under each guidance.")
    parser.add_argument("--preset", action="append", choices=CALIBRATED, help="These alone.")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = rf.load(MODEL, dtype=options.dtype)
    count, made = (4, 1) if options.quick else (options.scenes, options.generated)
    pool = known(model, TUNING, 2 * count // 3, made)
    names = options.preset or CALIBRATED
    ranges = calibrated(model, [example for kind in pool.values() for example in kind], names)
    held_out = known(model, HELD_OUT, count, made)
    ten = held_out["scenes"][:10]
    checkerboards, flat = patterns()
    judged = held_out | {
        "photographs": photographs(1 if options.quick else 2),
        "noise": noises(10),
        "checkerboards": checkerboards,
        "flat": flat,
        "wrong prompt": [(ten[i][0], ten[i - 1][1]) for i in range(len(ten))],
        "missing prompt": [(picture, "") for picture, _ in ten],
    }
    file = DOCS / "results/domain.json"
    presets: dict[str, Any] = {}
    if options.preset and file.is_file():  # the others stay
        before = json.loads(file.read_text(encoding="utf-8"))
        presets, ranges = before["presets"], before["ranges"] | ranges
    metadata = read_metadata(WEIGHTS / MODEL / FILE_NAME)
    metadata = Metadata.model_validate(metadata.model_dump() | {"domain": ranges})
    everything = [example for kind in judged.values() for example in kind]
    for name in (one for one in JUDGED if one in names):
        presets[name] = {kind: {} for kind in judged}
        for steps in (6, 30):
            values = statistics(model, everything, name, steps)
            limits = usual(metadata, PRESETS[name].scheme, steps)
            for kind, examples in judged.items():
                mine, values = values[: len(examples)], values[len(examples) :]
                warned = sum(bool(unusual(value, limits)) for value in mine)
                (statistic,) = limits
                shown = [round(value[statistic], 4) for value in mine]
                presets[name][kind][str(steps)] = {"warned": warned, "values": shown}
                print(f"{name}, {steps} steps, {kind}: {warned} of {len(mine)} warned")
    report = {
        "model": MODEL,
        "dtype": options.dtype,
        "seeds": {"tuning": TUNING, "held_out": HELD_OUT},
        "share": SHARE,
        "ranges": ranges,
        "presets": presets,
    }
    if options.quick:
        print(table(report))
        return
    file.write_text(json.dumps(report) + "\n", encoding="utf-8")
    fill(table(report))
    write_metadata(metadata, WEIGHTS / MODEL)
    write_checksums(WEIGHTS / MODEL)


if __name__ == "__main__":
    main()

"""Does it run on this accelerator at all: tiny pipelines of the real classes through every path.

    python benchmarks/accelerator.py > accelerator.jsonl     # in a clone; minutes on a GPU

Generating, inverting, every preset, kept features and off-loading, then pairs, reflow and
distillation resumed once, in bfloat16 and float16, and `torch.compile` once a family. A line of
JSON follows each as soon as it is over: ok, refused with its reason, or failed with its trace, and
the seconds; the last line counts them. What a run that is killed has found is so kept. The exit
code is 1 if anything failed. ``--steps 2`` on a CPU is a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import rectiflow as rf  # noqa: E402
from rectiflow.invert.presets import PRESETS  # noqa: E402
from rectiflow.models.metadata import Metadata, write_metadata  # noqa: E402
from tests.tiny import tiny_sd3  # noqa: E402
from tests.tiny_flux import tiny_flux  # noqa: E402
from tests.tiny_qwen import tiny_qwen  # noqa: E402
from tests.tiny_sd import tiny_sd  # noqa: E402

PIPELINES: dict[str, Callable[[], Any]] = {
    "sd": tiny_sd,
    "sd3": lambda: tiny_sd3(t5=True, medium=True),
    "flux": tiny_flux,
    "qwen": tiny_qwen,
}
PROMPTS = ["a red cat", "two apples"]
PRECISIONS = {"sd": ("bf16", "fp16"), "sd3": ("bf16",), "flux": ("bf16",)}
"""In which families are straightened: the whole is to take four minutes on a GPU."""


class Report:
    """What was tried, said as it goes: a line of JSON each."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[str]] = {"ok": [], "refused": [], "failed": []}

    def run(self, name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        outcome, why = "ok", ""
        try:
            work()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        except rf.InputError as error:
            outcome, why = "refused", str(error)
        except Exception:  # whatever goes wrong is what is asked for
            outcome, why = "failed", traceback.format_exc()
        self.outcomes[outcome].append(name)
        seconds = round(time.perf_counter() - started, 3)
        print(json.dumps({"name": name, outcome: why or True, "seconds": seconds}), flush=True)
        print(f"{outcome:7} {name}", file=sys.stderr, flush=True)


def edits(
    report: Report, name: str, folder: Path, dtype: torch.dtype, steps: int, compiles: bool
) -> None:
    """Everything that takes a picture or a prompt; compiled, which takes the longest, if asked."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    picture, here = Image.fromarray(pixels), f"{name} {str(dtype).removeprefix('torch.')}"
    given: dict[str, Any] = {"num_inference_steps": steps}
    model = rf.load(folder, dtype=dtype)

    def edit(model: Any = model, **more: Any) -> None:
        told: dict[str, Any] = {"source_prompt": "a red cat", "prompts": ["a blue cat"]}
        rf.edit(model, picture, **(told | given | more))

    report.run(f"{here}: generate", lambda: rf.generate(model, PROMPTS, seed=0, **given))
    for preset in PRESETS:
        report.run(f"{here}: edit, {preset}", lambda preset=preset: edit(preset=preset))
    kept = {"source_features": "inversion", "num_inference_steps": max(steps, 8)}  # fewer keep none
    for keep in ("memory", "cpu", "disk"):
        report.run(
            f"{here}: features in {keep}", lambda keep=keep: edit(**kept, keep_features=keep)
        )
    mask = Image.new("L", picture.size, 255)
    report.run(f"{here}: a mask", lambda: edit(mask=mask))
    for offload in ("model", "sequential"):
        report.run(
            f"{here}: off-loading, {offload}",
            lambda offload=offload: edit(rf.load(folder, dtype=dtype, offload=offload)),
        )

    def compiled() -> None:
        other = rf.load(folder, dtype=dtype)
        other.network.compile()
        edit(other)

    if compiles:
        report.run(f"{here}: compiled", compiled)


def straighten(report: Report, folder: Path, work: Path, precision: str, steps: int) -> None:
    """Pairs, then reflow and distillation of so many steps, each resumed at its half."""
    model, store = rf.load(folder), work / f"pairs-{folder.name}-{precision}"
    here = f"{folder.name} {precision}"
    shape: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}
    report.run(f"{here}: pairs", lambda: rf.make_pairs(model, PROMPTS, store, num=16, **shape))
    for kind, train in (("reflow", rf.reflow), ("distill", rf.distill)):
        for length in (steps // 2, steps):
            given = {"mixed_precision": precision, "batch_size": 4, "warmup_steps": 1}
            given |= {"steps": max(length, 1), "held_out": 4, "log_every": 5}
            run = work / f"{kind}-{folder.name}-{precision}"
            report.run(
                f"{here}: {kind}, to step {given['steps']}",
                lambda train=train, run=run, given=given: train(model, store, run=run, **given),
            )


def main() -> int:
    """Try all of it, and print the last line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=4, help="of an edit")
    parser.add_argument("--train-steps", type=int, default=20)
    parser.add_argument("--only", choices=PIPELINES, action="append", help="some of the pipelines")
    options = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for family in options.only or PIPELINES:
            PIPELINES[family]().save_pretrained(work / family)
            write_metadata(Metadata(default_size=32), work / family)
            for dtype in (torch.bfloat16, torch.float16):
                compiles = dtype == torch.bfloat16
                edits(report, family, work / family, dtype, options.steps, compiles)
            for precision in PRECISIONS.get(family, ()):
                straighten(report, work / family, work, precision, options.train_steps)
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    failed = report.outcomes["failed"]
    made = {"device": str(there), "machine": platform.machine(), "torch": torch.__version__}
    counts = {outcome: len(names) for outcome, names in report.outcomes.items()}
    print(json.dumps(made | counts | {"failures": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

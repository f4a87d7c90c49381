"""Does it run on this accelerator at all: tiny pipelines of the real classes through every path.

    python benchmarks/accelerator.py > accelerator.json     # in a clone; minutes on a GPU

Generating, inverting, every preset, kept features, off-loading and `torch.compile`, then pairs,
reflow and distillation resumed once, in bfloat16 and float16. The JSON has a line for each with its
seconds, or the trace of what went wrong; the exit code is 1 if anything did. ``--steps 2`` on a CPU
is a rehearsal.
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


class Report:
    """What was tried: name -> seconds, a refusal in words, or a trace."""

    def __init__(self) -> None:
        self.tried: dict[str, dict[str, Any]] = {}

    def run(self, name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        found: dict[str, Any] = {"ok": True}
        try:
            work()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        except rf.InputError as error:
            found["refused"] = str(error)
        except Exception:  # whatever goes wrong is what is asked for
            found = {"ok": False, "trace": traceback.format_exc()}
        self.tried[name] = found | {"seconds": round(time.perf_counter() - started, 3)}
        print(f"{'ok' if found['ok'] else 'FAILED':7} {name}", file=sys.stderr, flush=True)


def edits(report: Report, name: str, folder: Path, dtype: torch.dtype, steps: int) -> None:
    """Everything that takes a picture or a prompt."""
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

    report.run(f"{here}: compiled", compiled)


def straighten(report: Report, folder: Path, work: Path, precision: str, steps: int) -> None:
    """Pairs, then reflow and distillation of so many steps, each resumed at its half."""
    model, store = rf.load(folder), work / f"pairs-{precision}"
    shape: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}
    report.run(f"pairs {precision}", lambda: rf.make_pairs(model, PROMPTS, store, num=16, **shape))
    for kind, train in (("reflow", rf.reflow), ("distill", rf.distill)):
        for length in (steps // 2, steps):
            given = {"mixed_precision": precision, "batch_size": 4, "warmup_steps": 1}
            given |= {"steps": max(length, 1), "held_out": 4, "log_every": 5}
            run = work / f"{kind}-{precision}"
            report.run(
                f"{kind} {precision}, to step {given['steps']}",
                lambda train=train, run=run, given=given: train(model, store, run=run, **given),
            )


def main() -> int:
    """Try all of it, and print the JSON."""
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
            for dtype in (torch.bfloat16, torch.float16):
                edits(report, family, work / family, dtype, options.steps)
        if "sd" in (options.only or PIPELINES):
            for precision in ("bf16", "fp16"):
                straighten(report, work / "sd", work, precision, options.train_steps)
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    failed = [name for name, found in report.tried.items() if not found["ok"]]
    made = {"device": str(there), "machine": platform.machine(), "torch": torch.__version__}
    print(json.dumps(made | {"failed": failed, "tried": report.tried}, indent=2))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A study that is made in seconds: a tiny random Stable Diffusion, its chain, and a few rows."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rectiflow.emoji.vae import HELD_OUT
from rectiflow.evaluate.emoji_models import load_clip
from rectiflow.evaluate.picture_quality import reference_statistics
from rectiflow.models.load import WEIGHTS
from rectiflow.reproduce.study import CLIP, Flow, Item, Pictures, Settings, Store, Student, Study
from rectiflow.reproduce.workshop import Workshop
from tests.tiny_sd import tiny_sd

COMMON: Settings = {
    "start": "exact",
    "batch_size": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "ema_decay": 0.9,
    "log_every": 1,
    "measure_every": 0,
    "held_out": 0,
    "sample_minutes": 60,
    "checkpoint_minutes": 60,
    "save_every": 1,
}
REFLOW = COMMON | {"kind": "reflow"}
DISTILL = COMMON | {"kind": "distill"}
MADE = ("pairs-teacher", "2rf-0", "pairs-of-2rf-0", "one-0")
"""Stores and students."""
ROWS = ("flow-2rf-0", "teacher-at-25", "one-0-at-1")


def write_teacher(folder: Path) -> Path:
    """The teacher's pipeline."""
    tiny_sd().save_pretrained(folder)
    return folder


def toy(teacher: Path) -> Study:
    """Under names that the page of InstaFlow's knows."""
    model = str(teacher)
    items: tuple[Item, ...] = (
        Store("pairs-teacher", model, 6, 2, 2.0),
        Store("pairs-held-out", model, 3, 2, 2.0, held_out=True),
        Student("2rf-0", model, "pairs-teacher", (REFLOW | {"steps": 3},)),
        Store("pairs-of-2rf-0", "2rf-0", 4, 2, 1.5, "euler"),
        Student(
            "one-0",
            "2rf-0",
            "pairs-of-2rf-0",
            (DISTILL | {"steps": 2}, DISTILL | {"steps": 1, "loss": "pseudo_huber"}),
        ),
        Flow("flow-2rf-0", "2rf-0", num=2, pairs="pairs-held-out"),
        Pictures("teacher-at-25", model, 2, 2.0, "dpmpp", num=3, judged=0),
        Pictures("one-0-at-1", "one-0", 1, num=3, against=("teacher-at-25",), judged=1),
    )
    return Study("instaflow", "small", items)


def workshop(teacher: Path, folder: Path) -> Workshop:
    """A place to work at it; of true pictures a few stand for all, since all take a minute."""
    place = Workshop(toy(teacher), folder, torch.float32)
    if not place.reference.is_file():
        seeds = range(HELD_OUT, HELD_OUT + 8)
        reference_statistics(load_clip(WEIGHTS / CLIP), seeds).save(place.reference)
    return place


def names(items: Sequence[Item]) -> list[str]:
    return [item.name for item in items]


def contents(folder: Path, *below: str) -> dict[Path, tuple[int, bytes]]:
    """When each file was written, and what is in it."""
    files = [file for part in below for file in (folder / part).rglob("*") if file.is_file()]
    return {f.relative_to(folder): (f.stat().st_mtime_ns, f.read_bytes()) for f in sorted(files)}


def weights(folder: Path) -> dict[Path, bytes]:
    """What was made: latents of pairs, and weights of every student's every phase."""
    found = contents(folder, "pairs", "students")
    return {
        file: data
        for file, (_, data) in found.items()
        if file.suffix == ".safetensors" and "checkpoint" not in str(file)
    }


def fork(place: Workshop, items: Sequence[Item], said: Path, **options: Any) -> int:
    """Work in another process, which writes its lines to a file; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with said.open("a", buffering=1) as opened:
            place.work(items, told=lambda line: print(line, file=opened), **options)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a process; its exit code, or less than 0 for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

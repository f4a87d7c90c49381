"""`examples/straighten.sh` at the length of a test, and its folder compared with another."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.straighten.toy import records
from tests.tiny_sd import tiny_sd

SCRIPT = Path(__file__).parents[2] / "examples" / "straighten.sh"
PROMPTS = "a red apple\ntwo cats\na happy dog\n"
NUM = 24
PAIRS = "--batch-size 2 --shard-size 4 --keep-seconds 0 --steps 4"
SETTINGS: dict[str, Any] = {
    "steps": 14,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "held_out": 4,
    "held_out_steps": 2,
    "measure_every": 5,
    "log_every": 3,
    "save_every": 2,
    "keep_last": 3,
    "checkpoint_minutes": 60,
    "sample_minutes": 60,
}


def write_teacher(folder: Path) -> None:
    """A pipeline, prompts and settings, side by side."""
    tiny_sd().save_pretrained(folder / "tiny")
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "short.yaml").write_text(yaml.safe_dump(SETTINGS))


def environment(teacher: Path, rectiflow: str) -> dict[str, str]:
    """What the script is told."""
    return os.environ | {
        "RECTIFLOW": rectiflow,
        "MODEL": str(teacher / "tiny"),
        "PROMPTS": str(teacher / "prompts.txt"),
        "NUM": str(NUM),
        "CONFIG": str(teacher / "short.yaml"),
        "PAIR_OPTIONS": PAIRS,
    }


def begin(cwd: Path, teacher: Path, rectiflow: str) -> subprocess.Popen[str]:
    """The script, in a process group of its own."""
    cwd.mkdir(exist_ok=True)
    return subprocess.Popen(
        ["sh", str(SCRIPT), "out"],
        cwd=cwd,
        env=environment(teacher, rectiflow),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def from_start_to_end(cwd: Path, teacher: Path, rectiflow: str) -> Path:
    process = begin(cwd, teacher, rectiflow)
    said, complaints = process.communicate(timeout=600)
    assert process.returncode == 0, complaints
    assert [line.partition(":")[0] for line in said.splitlines()] == [
        "out/pairs-1",
        "out/reflow",
        "model",
        "out/pairs-2",
        "out/distill",
        "model",
        "out/one-step",
    ]
    return cwd / "out"


def same(out: Path, whole: Path) -> None:
    """Every file there, and there alone; to the last byte but for what the clock says in logs."""
    assert files(out) == files(whole)
    for file in files(whole):
        if file.name == "log.jsonl":
            assert records(out / file.parent) == records(whole / file.parent), file
        else:
            assert (out / file).read_bytes() == (whole / file).read_bytes(), file


def files(out: Path) -> list[Path]:
    return sorted(file.relative_to(out) for file in out.rglob("*") if file.is_file())

"""From a diffusion model to a one-step model by `examples/straighten.sh`, whatever comes between."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rectiflow.models import load
from rectiflow.models.generate import generate
from tests.app.forks import Forks
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
STAGES = ("pairs-1", "reflow", "pairs-2", "distill")

STOCK = """
import sys
sys.modules["rectiflow"] = None
try:
    import rectiflow
except ImportError:
    pass
else:
    sys.exit("rectiflow can be imported")
import numpy, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
latents = torch.from_numpy(numpy.load(sys.argv[2]))
images = pipeline("a red apple", latents=latents, num_inference_steps=1, guidance_scale=1.0,
                  output_type="np").images
numpy.save(sys.argv[3], images)
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, prompts and settings, side by side."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_sd().save_pretrained(folder / "tiny")
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "short.yaml").write_text(yaml.safe_dump(SETTINGS))
    return folder


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path, forks: Forks) -> Path:
    """What the script leaves if nothing stops it; tests only read it."""
    return from_start_to_end(tmp_path_factory.mktemp("whole"), teacher, forks.command)


def runs_in_stock_diffusers(out: Path, folder: Path) -> None:
    """One step, where rectiflow cannot be imported, gives what the run's own model gives here."""
    model = load(out / "distill" / "model", device="cpu")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    np.save(folder / "noise.npy", noise.numpy())
    words = [out / "one-step", folder / "noise.npy", folder / "image.npy"]
    command = [sys.executable, "-c", STOCK, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    (image,) = np.load(folder / "image.npy")
    assert image.shape == (32, 32, 3) and image.std() > 0.01
    mine = generate(model, "a red apple", seed=5, num_inference_steps=1, guidance_scale=1.0)
    np.testing.assert_allclose(image, np.asarray(mine[0], np.float32) / 255, atol=0.01)


def test_from_a_diffusion_model_to_a_one_step_model(whole: Path, tmp_path: Path) -> None:
    runs_in_stock_diffusers(whole, tmp_path)


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


def test_done_again_it_changes_nothing(
    whole: Path, teacher: Path, forks: Forks, tmp_path: Path
) -> None:
    """Nothing is made, trained or written again but the exports, which are what they were."""
    shutil.copytree(whole, tmp_path / "out")
    same(from_start_to_end(tmp_path, teacher, forks.command), whole)


def states_seen(out: Path, stage: str) -> object:
    """What changes as the work goes on from a stage, or nothing as long as it has not come there."""
    if not (out / stage).exists():
        return None
    later = STAGES[STAGES.index(stage) :] if stage in STAGES else ()
    folders = [out / name for name in later if (out / name).is_dir()]
    return [
        (entry.name, entry.stat().st_mtime_ns)
        for folder in folders
        for entry in sorted(folder.iterdir(), key=lambda path: path.name)
        if entry.exists()
    ]


def kill_in(process: subprocess.Popen[str], out: Path, stage: str, rng: random.Random) -> bool:
    """kill -9 the script and all it started, some changes into a stage; False if it was over."""
    news, last = rng.randint(1, 6), None
    begun = False
    while process.poll() is None and news:
        try:
            now = states_seen(out, stage)
        except FileNotFoundError:
            continue  # renamed while it was looked at
        if now is not None:
            news -= now != last and begun
            begun, last = True, now
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def broken(cwd: Path, teacher: Path, rectiflow: str, stages: Sequence[str], seed: int) -> list[str]:
    """The script killed in each of these stages, and run once more; where it was killed."""
    rng, killed = random.Random(seed), []
    for stage in stages:
        if kill_in(begin(cwd, teacher, rectiflow), cwd / "out", stage, rng):
            killed.append(stage)
    from_start_to_end(cwd, teacher, rectiflow)
    return killed


def test_killed_on_the_way(whole: Path, teacher: Path, forks: Forks, tmp_path: Path) -> None:
    stages = ["pairs-1", "reflow", "distill"]
    assert broken(tmp_path, teacher, forks.command, stages, seed=0) == stages
    same(tmp_path / "out", whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_times(whole: Path, teacher: Path, forks: Forks, tmp_path: Path) -> None:
    stages = [*["pairs-1"] * 5, *["reflow"] * 6, *["pairs-2"] * 3, *["distill"] * 5]
    stages.append(".one-step.tmp")
    killed = broken(tmp_path, teacher, forks.command, stages, seed=1)
    assert len(killed) >= 19, killed
    same(tmp_path / "out", whole)

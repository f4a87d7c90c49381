"""From a diffusion model to a one-step model by one script, whatever comes between."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from rectiflow.models import load
from rectiflow.models.generate import generate
from tests.app.forks import Forks
from tests.app.script import SETTINGS, begin, from_start_to_end, same

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


def test_from_a_diffusion_model_to_a_one_step_model(script_whole: Path, tmp_path: Path) -> None:
    runs_in_stock_diffusers(script_whole, tmp_path)


def test_done_again_it_changes_nothing(
    script_whole: Path, script_teacher: Path, forks: Forks, tmp_path: Path
) -> None:
    """Nothing is made, trained or written again but the exports, which are what they were."""
    shutil.copytree(script_whole, tmp_path / "out")
    same(from_start_to_end(tmp_path, script_teacher, forks.command), script_whole)


def entries(out: Path, stage: str) -> dict[Path, int]:
    """What lies in the folders of a stage and those after it, and when each last changed."""
    later = STAGES[STAGES.index(stage) :] if stage in STAGES else (stage,)
    files = [file for name in later if (out / name).is_dir() for file in (out / name).iterdir()]
    return {file: file.stat().st_mtime_ns for file in files}


def progress(found: Iterable[Path]) -> int:
    """How many shards and checkpoints have been finished."""
    shards = [file for file in found if re.fullmatch(r"shard-\d+\.json", file.name)]
    steps = dict.fromkeys((file.parent for file in found), 0)
    for file in found:
        if match := re.fullmatch(r"checkpoint-(\d+)", file.name):
            steps[file.parent] = max(steps[file.parent], int(match[1]))
    return len(shards) + sum(steps.values()) // SETTINGS["save_every"]


def kill_in(process: subprocess.Popen[str], out: Path, stage: str, rng: random.Random) -> bool:
    """kill -9 the script and all it started, some way into a stage; False if it was over."""
    further, news = rng.choice([0, 0, 1, 1, 2]) if stage in STAGES else 0, rng.randint(0, 3)
    begun: int | None = None
    last: dict[Path, int] = {}
    while process.poll() is None:
        time.sleep(0.004)
        try:
            now = entries(out, stage)
        except FileNotFoundError:
            continue  # renamed while it was looked at
        if not (out / stage).exists() or now == last:
            continue
        if begun is None:
            begun = progress(now)
        elif progress(now) >= begun + further:
            news -= 1
        if news < 0:
            break
        last = now
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


def test_killed_on_the_way(
    script_whole: Path, script_teacher: Path, forks: Forks, tmp_path: Path
) -> None:
    stages = ["pairs-1", "reflow", "distill"]
    killed = broken(tmp_path, script_teacher, forks.command, stages, seed=0)
    assert len(killed) >= 2, killed
    same(tmp_path / "out", script_whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_times(
    script_whole: Path, script_teacher: Path, forks: Forks, tmp_path: Path
) -> None:
    stages = [*["pairs-1"] * 5, *["reflow"] * 5, ".2rf.tmp"]
    stages += [*["pairs-2"] * 3, *["distill"] * 5, ".one-step.tmp"]
    killed = broken(tmp_path, script_teacher, forks.command, stages, seed=1)
    assert len(killed) >= 18, killed
    same(tmp_path / "out", script_whole)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_where_every_command_is_started(
    script_whole: Path, script_teacher: Path, tmp_path: Path
) -> None:
    """As a user's shell starts them, rather than as forks: to the same bytes."""
    rectiflow, stages = f"{sys.executable} -m rectiflow", ["pairs-1", "distill"]
    assert broken(tmp_path, script_teacher, rectiflow, stages, seed=2) == stages
    same(tmp_path / "out", script_whole)

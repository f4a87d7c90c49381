"""Training from the command line: settings, resuming, exporting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rectiflow.app.outputs import MANIFEST
from tests.app.conftest import Run

TINY = ("--set", "batch_size=2", "--set", "block_out_channels=[8,8,8]", "--set", "log_every=1")


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_resume_export(run: Run, cwd: Path) -> None:
    first = run("train", "emoji-vae", *TINY, "--set", "steps=2", "--json").data
    assert first["run"] == "runs/emoji-vae" and first["step"] == 2 and first["finished"]
    assert first["resumed_from"] is None
    # The same run, lengthened; everything else is as it was begun.
    words = ("train", "emoji-vae", "--set", "steps=3", "--export", "vae", "--json")
    second = run(*words).data
    assert second["resumed_from"] == 2 and second["step"] == 3
    log = [json.loads(line) for line in Path("runs/emoji-vae/log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3]
    assert {file.name for file in Path("vae").iterdir()} == {
        "checksums.json",
        MANIFEST,
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    run("train", "emoji-vae", "--set", "batch_size=4").refuses("batch_size 2 and not 4")
    run("train", "emoji-clip", "-o", "runs/emoji-vae").refuses("is a run of emoji-vae")
    run("train", "emoji-vae", "--resume_from_checkpoint", "checkpoint-9").refuses("checkpoint-3")
    weights = Path("runs/emoji-vae/checkpoint-3/network.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    run("train", "emoji-vae", "--set", "steps=4").refuses("is damaged", "runs/emoji-vae")
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear")
    run("train", "emoji-vae", "--export", "full").refuses("full/letter.txt", "--overwrite")


def test_a_config_file(run: Run, cwd: Path) -> None:
    Path("c.yaml").write_text("recipe: emoji-vae\nsteps: 1\nbatch_size: 2\nblock_out_channels: [8]")
    data = run("train", "--config", "c.yaml", "-o", "r", "--json").data
    assert data["recipe"] == "emoji-vae" and data["steps"] == 1
    run("train", "emoji-clip", "--config", "c.yaml").refuses("emoji-vae", "emoji-clip")
    Path("c.yaml").write_text("- just a list")
    run("train", "emoji-vae", "--config", "c.yaml").refuses("c.yaml")


def test_wrong_settings_are_one_line(run: Run, cwd: Path) -> None:
    run("train", "emoji-vae", "--set", "speed=1").refuses("speed")
    run("train", "emoji-vae", "--set", "steps=few").refuses("steps")
    run("train", "emoji-vae", "--set", "steps").refuses("key=value")
    run("train", "emoji-sd3", "--set", "vae=nowhere").refuses("nowhere")
    run("train", "emoji-vae", "--init-from", "nowhere").refuses("nowhere")
    assert not list(Path("runs").rglob("config.yaml"))

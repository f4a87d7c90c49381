"""The command as a process: what a user's shell and pipes see."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.app.conftest import Run

RECTIFLOW = [sys.executable, "-m", "rectiflow"]


def rectiflow(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*RECTIFLOW, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_failures_are_one_line_and_a_code(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for words in (["invert", "text.png"], ["nothing"]):
        done = rectiflow(*words, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("rectiflow: error: ") and done.stderr.count("\n") == 1


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from rectiflow.app.cli import app, main
for command in app.registered_commands:
    assert main([command.name or command.callback.__name__, "--help"]) == 0
assert not {"torch", "diffusers", "transformers", "accelerate", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Example:") == done.stdout.count("Usage:") == 15


def test_replay_in_a_process_of_its_own(
    run: Run, model: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON alone on stdout, and not a word of torch, transformers or diffusers beside it."""
    monkeypatch.chdir(tmp_path)
    words = ("--from", "a cat", "--to", "a dog", "--steps", 2, "--model", model, "--json")
    assert run("edit", photo, *words).data["edits"][0]["image"] == "edit-1.png"
    # From another folder: what a picture refers to is found from anywhere.
    done = rectiflow("replay", tmp_path / "out" / "edit-1.png", "--json", cwd=tmp_path.parent)
    assert done.returncode == 0 and json.loads(done.stdout)["identical"], done.stderr
    assert done.stderr == ""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupted(tmp_path: Path) -> None:
    settings = ["batch_size=2", "block_out_channels=[8,8,8]", "log_every=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    process = subprocess.Popen(
        [*RECTIFLOW, "train", "emoji-vae", *words, "-o", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # A shell ignores it for what it runs in the background, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 100
    while not (tmp_path / "run" / "log.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75 and "error" not in err
    assert re.fullmatch(r"run: step \d+ of \d+; the same command goes on from here\n", out)
    assert list((tmp_path / "run").glob("checkpoint-*"))

"""The command as a process: what a user's shell and pipes see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECTIFLOW = [sys.executable, "-m", "rectiflow"]


def rectiflow(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [*RECTIFLOW, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)


def test_json_alone_on_stdout_and_silence_beside_it(model: Path, tmp_path: Path) -> None:
    """Not a word of torch, transformers or diffusers, and no progress bar in a pipe."""
    words = ("generate", "a red cat", "--model", model, "-o", "a.png", "--json")
    done = rectiflow(*words, cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["nfe"] == 6
    assert done.stderr == ""


def test_failures_are_one_line_and_a_code(tmp_path: Path) -> None:
    for words in (["edit", "none.png", "--to", "a"], ["nothing"]):
        done = rectiflow(*words, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("rectiflow: error: ") and done.stderr.count("\n") == 1


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
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "log.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "rectiflow: error: interrupted\n" and out == ""

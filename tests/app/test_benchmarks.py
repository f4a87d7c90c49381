"""The benchmarks that need no long time run, and compare like with like."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_all_sides_of_the_one_step_benchmark_draw_the_same_picture() -> None:
    done = run("one_step.py", "--repeats", "3", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert set(record["network_calls"].values()) == {1}
    assert record["difference_of_pictures"] <= 1
    bare, library = record["bare"]["median_ms"], record["library"]["median_ms"]
    assert record["ratio"] == library / bare
    assert record["ratio_without_tokenizer"] > record["ratio"] > 0


def test_a_many_step_model_is_refused() -> None:
    done = run("one_step.py", "--model", "emoji-sd", "--repeats", "1")
    assert done.returncode != 0
    assert "give a one-step model" in done.stderr

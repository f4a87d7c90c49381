"""The benchmarks that need no long time run, and compare like with like."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: str) -> None:
    """As `python benchmarks/NAME` does, without importing everything again."""
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


def test_all_sides_of_the_one_step_benchmark_draw_the_same_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "one_step.py", "--repeats", "3", "--json")
    record = json.loads(capsys.readouterr().out)
    assert set(record["network_calls"].values()) == {1}
    assert record["difference_of_pictures"] <= 1
    bare, library = record["bare"]["median_ms"], record["library"]["median_ms"]
    assert record["ratio"] == library / bare
    assert record["ratio_without_tokenizer"] > record["ratio"] > 0


def test_a_many_step_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="give a one-step model"):
        run(monkeypatch, "one_step.py", "--model", "emoji-sd", "--repeats", "1")

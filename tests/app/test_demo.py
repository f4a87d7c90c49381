"""The demo on a tiny model, and the figures of `evaluate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rectiflow.app import demo
from rectiflow.app.outputs import MANIFEST
from rectiflow.emoji.edits import KINDS
from rectiflow.report import read_png
from tests.app.conftest import Run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_the_demo_shows_at_least_six_kinds() -> None:
    kinds = {kind for kind, _ in demo.CASES}
    assert {"object", "color", "quantity", "content", "background", "style"} <= kinds
    assert kinds <= set(KINDS) and len(kinds) == len(demo.CASES)


def test_demo(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CASES", demo.CASES[:2])
    done = run("demo", "--model", model, "-o", tmp_path / "d", "--json")
    assert done.code == 0
    data = done.data
    assert data["report"] == "report.html" and len(data["cases"]) == 2
    page = (tmp_path / "d" / "report.html").read_text(encoding="utf-8")
    for case in data["cases"]:
        assert f'href="{case["report"]}"' in page
        folder = (tmp_path / "d" / case["report"]).parent
        assert {"source.png", "target.png", "edit-1.png", "report.html"} == {
            file.name for file in folder.iterdir()
        }
        assert case["prompt"] in (folder / "report.html").read_text(encoding="utf-8")
        assert read_png(folder / "edit-1.png")["prompt"] == case["prompt"]
    assert "right answer" in page or "True target" in page
    assert re.search(r"rectiflow demo --model", page)
    assert run("replay", tmp_path / "d" / data["cases"][0]["image"]).code == 0


def test_evaluate_writes_figures_and_pictures(run: Run, model: Path, tmp_path: Path) -> None:
    words = ("evaluate", "emoji-edits", "--limit", 2, "--model", model, "-o", tmp_path / "e")
    figures = run(*words, "--json").data
    assert figures["n"] == 2 and {"nothing", "bound", "euler", "exact"} <= set(figures["methods"])
    names = {file.name for file in (tmp_path / "e").iterdir()}
    written = {f"emoji-edits{ending}" for ending in (".json", ".csv", "-per-edit.csv", ".html")}
    assert names == {*written, "parts", MANIFEST}
    assert json.loads((tmp_path / "e" / "emoji-edits.json").read_text()) == figures
    for entry in figures["methods"].values():
        assert set(entry) >= {
            "target_psnr", "inside_mse", "outside_mse", "outside_n", "nfe", "seconds", "by_kind",
        }  # fmt: skip
    assert {"fast - nothing", "fast - euler", "exact - ftedit"} <= set(figures["paired"])
    assert all(set(entry) == {"mean", "low", "high"} for entry in figures["paired"].values())
    page = (tmp_path / "e" / "emoji-edits.html").read_text(encoding="utf-8")
    assert all(name in page for name in figures["methods"]) and "data:image/png" in page

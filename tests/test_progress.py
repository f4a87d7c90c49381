"""A line every so often where there is no terminal, and a bar where there is one."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from tqdm import tqdm

import rectiflow as rf
from rectiflow import progress as module
from rectiflow.progress import announced, progress
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd_model

Lines = Callable[[], dict[str, tuple[int, int]]]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST", 0.0)
    with progress(desc="reflow", total=2000, initial=100, unit="step") as bar:
        bar.set_postfix(loss="0.1234", refresh=False)
        for _ in range(3):
            bar.update(100)
        tqdm.write("rectiflow: something", file=sys.stderr)
    assert list(progress(range(3), desc="edits")) == [0, 1, 2]
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 8 and lines[3] == "rectiflow: something" and lines[-1] == ""
    shape = r"reflow: 400 of 2000, +[\d.]+step/s, 00:00 so far, \d\d:\d\d left, loss=0.1234"
    assert re.fullmatch(shape, lines[2]), lines
    assert all(line.startswith("edits: ") for line in lines[4:7])
    assert not any("\r" in line for line in lines)


def test_they_become_rarer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock of our own: a step a second, for ten minutes."""
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    with progress(total=600, miniters=1) as bar:
        bar._time = lambda: now
        bar.start_t = bar.last_print_t = 0.0
        for _ in range(600):
            now += 1
            bar.update()
    found = [int(line.split()[0]) for line in capsys.readouterr().err.splitlines()]
    assert found[:5] == [10, 30, 60, 90, 120] and len(found) == 21


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(5), desc="edits")) == list(range(5))
    for _ in progress(range(5), disable=True):
        pass
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    bar = progress(range(3), desc="edits")
    assert type(bar) is tqdm
    assert list(bar) == [0, 1, 2] and "100%" in screen.getvalue()


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lines:
    """Every step a line: what was said of each kind of work, as the last line has it."""
    monkeypatch.setattr(module, "FIRST", 0.0)
    monkeypatch.setattr(module, "SOON", 0.0)
    shape = r"(\w[\w ]*?): +(\d+) of (\d+), .* so far, .* left"

    def said() -> dict[str, tuple[int, int]]:
        rows = re.findall(shape, capsys.readouterr().err)
        return {what: (int(n), int(total)) for what, n, total in rows}

    return said


@pytest.mark.parametrize("preset", ["fast", "exact", "ftedit", "two-step", "rf-solver", "fireflow"])
def test_an_edit_in_python_has_totals(lines: Lines, preset: str) -> None:
    model = tiny_model()
    picture = Image.new("RGB", (32, 32), "red")
    rf.edit(
        model,
        picture,
        source_prompt="a red apple",
        prompts="a green apple",
        preset=preset,
        num_inference_steps=5,
        strength=1.0,
        diagnose=True,
    )
    said = lines()
    assert said["editing"] == said["inverting"] == said["reconstructing"] == (5, 5)


@pytest.mark.parametrize("solver", ["dpmpp", "euler", "heun"])
def test_generating_in_python_has_totals(lines: Lines, solver: str) -> None:
    model = tiny_sd_model()
    rf.generate(model, ["a", "b", "c"], num_inference_steps=4, solver=solver, batch_size=2)
    said = lines()
    assert said == {"generating 1 to 2 of 3": (4, 4), "generating 3 to 3 of 3": (4, 4)}


def test_short_work_in_python_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    rf.generate(tiny_model(), "a red apple", num_inference_steps=2)
    assert capsys.readouterr().err == ""


def test_a_notebook_has_bars_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Widget(tqdm):
        """As tqdm.auto has it."""

    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=Widget))
    assert type(progress(range(3), disable=True)) is Widget


def test_what_takes_long_is_announced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with announced("loading nothing"):
        pass
    monkeypatch.setattr(module, "LONGEST", 0.05)
    with announced("loading a large model"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "rectiflow: loading a large model …\n"

"""A line every so often where there is no terminal, and a bar where there is one."""

from __future__ import annotations

import io
import re
import sys

import pytest
from tqdm import tqdm

from rectiflow import progress as module
from rectiflow.progress import progress


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
    assert found[:5] == [10, 30, 70, 130, 190] and len(found) == 11


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

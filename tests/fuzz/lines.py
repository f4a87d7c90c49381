"""Random command lines: options of the commands themselves, with values of all kinds."""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from rectiflow.app.cli import app

VALUES = [
    "", "0", "-1", "1", "9" * 30, "1e308", "nan", "inf", "-inf", "x", "a red cat", "none.png", ".",
    "/dev/null", "/dev/full", "/proc/self/mem", "[" * 3000, "{", "a: b: c", "=", "a=", "a.b.c=1",
    "steps=3", "betas=[2, 3]", "betas=9", "learning_rate=-1", "x=&a [*a]", "seed=" + "9" * 40,
    "num_inference_steps=" + "9" * 25, "strength=nan", "scheme=[]", "features=[1]", "\x1b[2J",
    "\u202e", "\ud800", "é", "🍎", "x" * 5000, "--", "-", "@", "a@inf", "a@1@2", "../..", "~nobody",
    "no/such", "emoji-sd3", "emoji:0", "emoji:-1", "emoji:x", "1/0", "3/2", "64x", "0x0",
    "8x99999999",
    "euler", "exact", "cpu", "none", "cuda:99", "meta", "float16", "latest", "checkpoint-9",
    "1:2", ",",
]  # fmt: skip
SLOW = {
    ("demo",), ("doctor",), ("reproduce",), ("evaluate", "emoji-edits"),
    ("evaluate", "emoji-models"), ("evaluate", "inversion-error"),
}  # fmt: skip
"""Commands that need no argument to begin with minutes of work."""


def line(rng: random.Random) -> list[str]:
    """A command and up to six options or words; values of no kind or another."""
    path, command = rng.choice(_commands())
    words = list(path)
    options = [p for p in command.params if p.opts and p.opts[0].startswith("-")]
    arguments = [p for p in command.params if p not in options]
    for _ in arguments:
        if rng.random() < 0.6:
            words.append(rng.choice(VALUES))
    for _ in range(rng.randrange(7)):
        option = rng.choice(options)
        words.append(rng.choice(option.opts))
        if not getattr(option, "is_flag", False) and rng.random() < 0.95:
            words.append(rng.choice(VALUES))
    if rng.random() < 0.1:
        rng.shuffle(words)
    # Lines that happen to make sense work for a moment only.
    if path[0] in ("generate", "edit", "invert", "chain") and "--steps" not in words:
        words += ["--steps", rng.choice(["1", "2", "9" * 30, "0"])]
    if path[0] in ("train", "pairs", "reflow", "distill"):
        words += ["--max-minutes", "0.001"]
    return words


def _commands() -> list[tuple[tuple[str, ...], Any]]:
    found = []

    def walk(path: tuple[str, ...], command: Any) -> None:
        inner = getattr(command, "commands", {})
        for name, one in sorted(inner.items()):
            walk((*path, name), one)
        if not inner and path not in SLOW:
            found.append((path, command))

    walk((), typer.main.get_command(app))
    return found


@contextlib.contextmanager
def within(folder: Path) -> Iterator[None]:
    """In a folder, and with what is printed kept."""
    before = os.getcwd()
    os.chdir(folder)
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            yield
    finally:
        os.chdir(before)

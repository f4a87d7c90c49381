"""What the suites of ``rectiflow evaluate`` share: options, and how figures are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from rectiflow.app.console import json_text
from rectiflow.errors import InputError
from rectiflow.files import write_whole

Limit = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="So many pictures, scenes or edits, in place of the suite's own number.",
        show_default=False,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for figures and pictures.", show_default=False),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Pictures, scenes or edits that go through the network together.",
        show_default=False,
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Only make the I-th of N shares of the pictures, for machines that share a disk; run "
        "again without it to measure.",
        show_default=False,
    ),
]
StepCounts = Annotated[
    list[int] | None,
    typer.Option("--steps", min=1, help="A number of steps; repeatable.", show_default=False),
]


def share_of(text: str | None) -> tuple[int, int] | None:
    """(I, N) of "I/N".

    Raises:
        InputError: it is no such share.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--shard is {text!r}: give I/N with I from 1 to N, such as 1/4")
    return int(found[1]), int(found[2])


def methods_in(text: str | None) -> list[str] | None:
    """The methods of ``--methods``, such as ``euler,ddim``; None if it is not given.

    Raises:
        InputError: it names none.
    """
    if text is None:
        return None
    names = [name for name in (part.strip() for part in text.split(",")) if name]
    if not names:
        raise InputError("--methods names none: leave it out, or give one")
    return names


def write_json(file: Path, figures: dict[str, Any]) -> None:
    """Write figures, whole or not at all."""
    write_whole(file, json_text(figures) + "\n")

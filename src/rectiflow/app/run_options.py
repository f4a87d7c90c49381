"""What commands that train have in common: settings from a file and options, resuming, export."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options
from rectiflow.checksums import write_checksums
from rectiflow.errors import InputError
from rectiflow.files import readable_alike, unfinished_folder
from rectiflow.stopping import GO_ON_LATER

if TYPE_CHECKING:
    from rectiflow.straighten.trainer import Trainer

Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting; repeatable."),
]
Resume = Annotated[
    str,
    typer.Option(
        "--resume_from_checkpoint", help="latest, or the name of a checkpoint of the run."
    ),
]
MaxMinutes = Annotated[
    float | None,
    typer.Option(
        min=0, help="Stop after this long, to be resumed (exit code 75).", show_default=False
    ),
]
Export = Annotated[
    Path | None,
    typer.Option(help="Write the model to this folder at the end.", show_default=False),
]


def assigned(given: dict[str, Any], assignments: list[str] | None) -> dict[str, Any]:
    """Settings with those of ``--set`` put in.

    Raises:
        InputError: one of them is not an assignment, or its value is not YAML.
    """
    from rectiflow.straighten.config import override

    return override(given, assignments or [])


def leave_together(finished: bool) -> None:
    """End a training command once its other processes do, lest a launcher ends the slower ones.

    Raises:
        typer.Exit: the run is not finished, and the code says so.
    """
    from accelerate import PartialState

    PartialState().wait_for_everyone()
    if not finished:
        raise typer.Exit(GO_ON_LATER)


def check_export(folder: Path) -> None:
    """See that a folder is new, empty, or a model already: nothing else is to be written into.

    Raises:
        InputError: it has other things in it, or cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
            raise InputError(f"--export {folder} has other things in it: give a new folder")
    options.output_folder(folder.parent)


def export(trainer: Trainer, folder: Path) -> None:
    """Write the model under another name first; what else is in the folder stays."""
    unfinished = unfinished_folder(folder)
    trainer.export(unfinished)
    readable_alike(unfinished)
    move_into(unfinished, folder)
    write_checksums(folder)


def move_into(unfinished: Path, folder: Path) -> None:
    """Move every file of one folder to its place in another; what else is there stays."""
    for file in sorted(unfinished.rglob("*")):
        if file.is_file():
            target = folder / file.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    shutil.rmtree(unfinished, ignore_errors=True)


def last_of(run: Path, name: str) -> float | None:
    """The last value of a figure in a run's log."""
    from rectiflow.straighten.metrics_log import read_log

    log = run / "log.jsonl"
    known = (entry[name] for entry in reversed(read_log(log)) if entry.get(name) is not None)
    found: float | None = next(known, None)
    return found

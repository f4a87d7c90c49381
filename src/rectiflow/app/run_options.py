"""What commands that train have in common: settings from a file and options, resuming, export."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app.outputs import Outputs
from rectiflow.checksums import CHECKSUMS, write_checksums
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


MARKS = ("config.yaml", "*/config.yaml")
"""What a run's folder has, or those of its phases."""


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


def export_to(folder: Path, overwrite: bool) -> Outputs:
    """Where the files of a model go: a folder that is new, or has them from us.

    Raises:
        InputError: it has other things in it, or cannot be written.
    """
    return Outputs(folder, ["**/*"], overwrite=overwrite)


def export(trainer: Trainer, outputs: Outputs) -> None:
    """Write the model under another name first, then every file in its place."""
    unfinished = unfinished_folder(outputs.folder)
    trainer.export(unfinished)
    readable_alike(unfinished)
    for file in sorted(unfinished.rglob("*")):
        if file.is_file():
            os.replace(file, outputs.file(file.relative_to(unfinished).as_posix()))
    shutil.rmtree(unfinished, ignore_errors=True)
    outputs.file(CHECKSUMS)
    write_checksums(outputs.folder)
    outputs.finish()


def last_of(run: Path, name: str) -> float | None:
    """The last value of a figure in a run's log."""
    from rectiflow.straighten.metrics_log import read_log

    log = run / "log.jsonl"
    known = (entry[name] for entry in reversed(read_log(log)) if entry.get(name) is not None)
    found: float | None = next(known, None)
    return found

"""``rectiflow reproduce``: a paper's claims on the embedded world, as one page."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rectiflow.app import options
from rectiflow.app.console import session
from rectiflow.app.outputs import Overwrite
from rectiflow.errors import InputError
from rectiflow.stopping import GO_ON_LATER


class Paper(StrEnum):
    """Whose claims."""

    instaflow = "instaflow"


class Size(StrEnum):
    """How much of it."""

    small = "small"
    full = "full"


def reproduce(
    paper: Annotated[
        Paper, typer.Argument(help="instaflow: reflow and one-step distillation (ICLR 2024).")
    ],
    size: Annotated[
        Size,
        typer.Option(
            help="small: within an hour on two CPU cores, the first two claims; "
            "full: everything, in several hours."
        ),
    ] = Size.small,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for pairs, students and figures.  [default: runs/reproduce/PAPER-SIZE]",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            help="The page.  [default: docs/reproduction.md, of the small size "
            "docs/reproduction-small.md]",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only items whose names begin so, and what they need; repeatable.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="How many work on it; each gets its share of the cores.")
    ] = 1,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Stop after this long, whatever is being made; run again, it goes on "
            "(exit code 75).",
            show_default=False,
        ),
    ] = None,
    amend: Annotated[
        bool,
        typer.Option(
            "--amend",
            help="Keep rows that the page's record has and the folder lacks, as long as the study "
            "and the shipped models are the same. The others are made, with what they need; so is "
            "all that --only names.",
        ),
    ] = False,
    dtype: Annotated[
        options.Dtype, typer.Option(help="What networks compute in.")
    ] = options.Dtype.float32,
    as_json: options.AsJson = False,
) -> None:
    """Measure a paper's claims on the embedded world.

    What they need is trained from the shipped teacher. The same command again goes on where it
    stopped, and several at once share the work. The page says which claims hold here, which do
    not, and what was not run.
    """
    with session(as_json, resumable=True) as terminal:
        import torch

        from rectiflow.reproduce import page as written
        from rectiflow.reproduce.company import work_together
        from rectiflow.reproduce.instaflow import instaflow
        from rectiflow.reproduce.record import Record
        from rectiflow.reproduce.workshop import Workshop, check_folder

        study = instaflow(size.value)
        folder = output or Path("runs/reproduce") / f"{paper.value}-{size.value}"
        small = "" if size is Size.full else "-small"
        file = page or Path("docs") / f"reproduction{small}.md"
        if file.suffix != ".md":
            raise InputError(f"--page {file}: give a file that ends in .md; it is Markdown")
        workshop = Workshop(study, folder, getattr(torch, dtype.value))
        record = written.record_of(file)
        before = Record.read(record) if amend or record.exists() else None
        if before is not None:
            before.check(workshop)
        if only is None:
            made = before.still(workshop).made if before and amend else {}
            only = [item.name for item in study.items if item.name not in made]
        try:
            items = study.only(only)
        except KeyError as error:
            raise InputError(
                f"--only {error.args[0]}: nothing of this study is called so"
            ) from error
        if before is None and file.exists() and not overwrite:
            raise InputError(
                f"{file} is there, and no record of this study ({record}): give another --page, or "
                "replace it with --overwrite"
            )
        options.output_folder(folder)
        options.output_folder(file.parent)
        check_folder(folder, study, workshop.dtype)
        started = time.perf_counter()
        waiting = work_together(workshop, items, processes, max_minutes, terminal.note)
        # Read again, since another command may have amended the page meanwhile.
        summary = written.write(workshop, file, Record.read(record) if amend else None)
        data = {
            "paper": paper.value,
            "size": size.value,
            "folder": str(folder),
            "page": str(file),
            "claims": summary,
            "missing": [item.name for item in waiting],
            "seconds": time.perf_counter() - started,
            "warnings": terminal.warnings,
        }
        lines = [
            f"({key}) {claim['verdict']}: {claim['sentence']}" for key, claim in summary.items()
        ]
        if waiting:
            lines.append(f"{len(waiting)} items are not there; the same command goes on")
        terminal.result(data, "\n".join([*lines, str(file)]))
        if waiting:
            raise typer.Exit(GO_ON_LATER)

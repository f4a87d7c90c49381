"""The options of ``rectiflow evaluate emoji-edits``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from rectiflow.app.suites import methods_in
from rectiflow.errors import InputError


class Masked(StrEnum):
    """Whether methods are told where the edit belongs."""

    none = "none"
    given = "given"


Methods = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,C",
        help="Presets, and nothing or bound. By default all that fit the model.",
        show_default=False,
    ),
]
FirstSeed = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Of the first scene. By default 2000000, and 1000000 for --tune.",
        show_default=False,
    ),
]
Masks = Annotated[
    Masked | None,
    typer.Option(
        help="given shows every method where the edit belongs, in a table of its own.",
        show_default=False,
    ),
]
Tuned = Annotated[
    Path | None,
    typer.Option(
        help="tuning.json of --tune; adds a row with what it chose for a method.",
        show_default=False,
    ),
]
Tune = Annotated[
    bool,
    typer.Option("--tune", help="Choose settings of each method on tuning seeds."),
]
Ablations = Annotated[
    bool,
    typer.Option("--ablations", help="Vary one setting of fast and ftedit at a time."),
]
Update = Annotated[
    bool,
    typer.Option(
        "--update",
        help="Put the rows of --methods into the table that -o has, and leave its others; the page "
        "is left as it is.",
    ),
]
Processes = Annotated[
    int,
    typer.Option(
        min=1,
        help="That work side by side, each with its own copy of the model and a share of the "
        "methods.",
    ),
]


@dataclass(frozen=True)
class EditOptions:
    """The options of emoji-edits alone, as they were given."""

    methods: str | None = None
    first_seed: int | None = None
    batch_size: int | None = None
    masks: Masked | None = None
    tuned: Path | None = None
    tune: bool = False
    ablations: bool = False
    processes: int = 1
    update: bool = False

    @property
    def names(self) -> list[str] | None:
        """The methods asked for."""
        return methods_in(self.methods)

    def check(self) -> None:
        """Refuse options that exclude each other.

        Raises:
            InputError: names them.
        """
        if self.tune and self.ablations:
            raise InputError("--tune and --ablations are two runs: leave one out")
        if (self.tune or self.ablations) and (self.masks or self.tuned):
            raise InputError("--masks and --tuned are for the table: leave out --tune, --ablations")
        if self.ablations and self.methods:
            raise InputError("--ablations has its own methods: leave out --methods")
        if self.update and (self.tune or self.ablations or not self.methods):
            raise InputError("--update is for some rows of the table: name them with --methods")

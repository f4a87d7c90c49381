"""``rectiflow cite``: whose work was used."""

from __future__ import annotations

from typing import Annotated

import typer

from rectiflow.app import options
from rectiflow.app.citations import BIBTEX, METHODS
from rectiflow.app.console import session
from rectiflow.errors import InputError


def cite(
    methods: Annotated[
        list[str] | None,
        typer.Argument(metavar="[METHOD]...", help="Methods or presets; without any, the list."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the BibTeX of the papers behind a method."""
    with session(as_json) as terminal:
        if not methods:
            terminal.result(
                {"methods": {name: list(keys) for name, (_, keys) in METHODS.items()}},
                "\n".join(f"{name:16} {what}" for name, (what, _) in METHODS.items()),
            )
            return
        for name in methods:
            if name not in METHODS:
                raise InputError(f"unknown method {name!r}: one of {', '.join(METHODS)}")
        keys = dict.fromkeys(key for name in methods for key in METHODS[name][1])
        entries = {key: BIBTEX[key] for key in keys}
        terminal.result({"bibtex": entries}, "\n\n".join(entries.values()))

"""Where a trained model comes from, in a file of its folder: settings, ancestors, measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rectiflow.errors import InputError

FILE_NAME = "training.json"
MODEL = "model"
"""What the folder of a run's model is called."""


def short_name(folder: Path) -> str:
    """What a model's folder is called: the last part, or that of the run whose model it is."""
    return folder.parent.name if folder.name == MODEL and folder.parent.name else folder.name


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Write the record into a model's folder."""
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a model's folder; None if there is none.

    Raises:
        InputError: It is there and is not a record.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} is not the record of a training")
    return found

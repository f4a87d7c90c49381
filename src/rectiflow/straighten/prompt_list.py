"""Lists of prompts: from a text file, a table, or a data set of the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rectiflow.errors import InputError

COLUMNS = ("prompt", "caption", "text")
"""What a column of prompts is called where nothing else is said; the first that is there."""
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def load_prompts(source: str | Path, most: int | None = None) -> list[str]:
    """Read a list of prompts.

    Args:
        source: A file: .txt, or of another kind, with a prompt on each line; .jsonl with a string
            or an object on each line; .csv with a header. Or `owner/name` of a data set on the
            hub, of which the split `train` is read. A column is named as in `captions.csv:text`;
            else it is the first of `COLUMNS`.
        most: Read no more than this of a data set on the hub.

    Returns:
        The prompts in order, without spaces around them.

    Raises:
        InputError: It is not there, is not what it should be, has no prompts, or has an empty one.

    Example:
        >>> load_prompts("no/such/file.txt")
        Traceback (most recent call last):
        ...
        rectiflow.errors.InputError: there is no file of prompts no/such/file.txt
    """
    name, column = _split(str(source))
    path = Path(name).expanduser()
    if path.is_file():
        found = _from_file(path, column)
    elif path.is_dir():
        raise InputError(f"{path} is a folder: give a file of prompts")
    elif not path.suffix and _HUB.fullmatch(name):
        found = _from_hub(name, column, most)
    else:
        raise InputError(f"there is no file of prompts {path}")
    if not found:
        raise InputError(f"{source} has no prompts: give at least one")
    return found


def _split(source: str) -> tuple[str, str | None]:
    """A name and the column after its colon; a file's name may have a colon itself."""
    name, colon, column = source.rpartition(":")
    if not colon or not name or Path(source).expanduser().exists() or re.search(r"[\\/]", column):
        return source, None
    return name, column


def _from_file(path: Path, column: str | None) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    match path.suffix.lower():
        case ".csv":
            return _from_csv(path, text, column)
        case ".jsonl":
            rows = [(line, _parsed(path, line, t)) for line, t in _lines(path, text)]
            return [_prompt(f"{path}, line {line}", row, column) for line, row in rows]
        case _:
            if column is not None:
                raise InputError(f"{path} has no columns: give it without :{column}")
            return [line for _, line in _lines(path, text)]


def _lines(path: Path, text: str) -> list[tuple[int, str]]:
    """The lines, numbered from 1; those after the last that is not empty are none."""
    # Not splitlines(), which also divides at U+2028 and the like.
    lines = [line.strip() for line in text.rstrip().split("\n")] if text.strip() else []
    for number, line in enumerate(lines, 1):
        if not line:
            raise InputError(f"{path}, line {number}: it is empty; remove it, or write a prompt")
    return list(enumerate(lines, 1))


def _from_csv(path: Path, text: str, column: str | None) -> list[str]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        rows = [(reader.line_num, cells) for cells in reader]
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV file: {error}") from error
    chosen = _column(str(path), reader.fieldnames, column)
    return [_prompt(f"{path}, line {line}", cells, chosen) for line, cells in rows]


def _parsed(path: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {line}: it is not JSON ({error.msg})") from error


def _prompt(where: str, row: Any, column: str | None) -> str:
    """The prompt of a row: a string, or an object with a column."""
    value = row
    if isinstance(row, dict):
        value = row.get(_column(where, list(row), column))
    if not isinstance(value, str):
        raise InputError(f"{where}: the prompt is not text")
    if not value.strip():
        raise InputError(f"{where}: the prompt is empty; remove it, or write one")
    return value.strip()


def _column(where: str, names: Sequence[str], column: str | None) -> str:
    for name in COLUMNS if column is None else (column,):
        if name in names:
            return name
    wanted = f"column {column!r}" if column is not None else f"column {' or '.join(COLUMNS)}"
    has = ", ".join(names) or "none"
    raise InputError(f"{where} has no {wanted}; it has {has}: name one as in FILE:COLUMN")


def _from_hub(name: str, column: str | None, most: int | None) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"there is no file {name}, and reading a data set of the hub needs the package "
            "datasets: pip install datasets"
        ) from error
    try:
        rows: Iterable[Any] = load_dataset(name, split="train", streaming=True)
        return [
            _prompt(f"{name}, row {number}", row, column)
            for number, row in enumerate(islice(rows, most))
        ]
    except InputError:
        raise
    except Exception as error:  # whatever the hub, the network and the file formats raise
        lines = str(error).strip().splitlines()
        why = lines[0] if lines else type(error).__name__
        raise InputError(
            f"cannot read the data set {name} from the hub ({why}): check its name and the network"
        ) from error

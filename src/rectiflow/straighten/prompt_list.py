"""Lists of prompts: from text, tables and data of several formats, or a data set of the hub."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rectiflow.arguments import checked
from rectiflow.errors import InputError, install
from rectiflow.guarded import MOST_UNPACKED, parse_json, read_bytes, unpack

COLUMNS = ("prompt", "caption", "text")
"""What a column of prompts is called where nothing else is said; the first that is there."""
FORMATS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
"""Kinds of files by the ends of their names; all but the last may be in a .gz as well."""
_HUB = re.compile(r"[\w.-]+/[\w.-]+")

Row = tuple[str, Any]
"""Where a row is, to be named in errors, and what it holds: text, or a mapping with columns."""


@checked
def load_prompts(source: str | Path, most: int | None = None, *, blanks: bool = True) -> list[str]:
    """Read a list of prompts.

    Args:
        source: A file. `.txt`, or a name without an end: a prompt on each line. `.csv`, `.tsv`: a
            table with a header. `.jsonl`, `.ndjson`: a string or an object on each line. `.json`: a
            list of strings or objects. `.parquet`: a table (extra `datasets`). Each but the last
            also compressed, with `.gz` behind. Or `owner/name` of a data set on the hub, of which
            the split `train` is read. A column is named as in `captions.csv:text`; else it is the
            first of `COLUMNS`.
        most: Read no more than this of a data set on the hub.
        blanks: Whether blank lines and empty prompts are skipped; a warning says how many were.
            If not, the first is an error.

    Returns:
        The prompts in order, without spaces around them.

    Raises:
        InputError: It is not there, is not what it should be, or has no prompts.

    Example:
        >>> load_prompts("no/such/file.txt")
        Traceback (most recent call last):
        ...
        rectiflow.errors.InputError: there is no file of prompts no/such/file.txt
    """
    name, column = _split(str(source))
    path = Path(name).expanduser()
    if path.is_file():
        rows = _from_file(path, column)
    elif path.is_dir():
        raise InputError(f"{path} is a folder: give a file of prompts")
    elif not path.suffix and _HUB.fullmatch(name):
        rows = _from_hub(name, most)
    else:
        raise InputError(f"there is no file of prompts {path}")
    found, skipped = [], 0
    for where, row in rows:
        prompt = _prompt(where, row, column)
        if prompt:
            found.append(prompt)
        elif blanks:
            skipped += 1
        else:
            raise InputError(f"{where}: the prompt is empty; write one, or remove the line")
    if not found:
        raise InputError(f"{source} has no prompts: give at least one")
    if skipped:
        blank = "prompt is blank and" if skipped == 1 else "prompts are blank and"
        warnings.warn(f"{source}: {skipped} {blank} skipped", stacklevel=1)
    return found


def _split(source: str) -> tuple[str, str | None]:
    """A name and the column after its colon; a file's name may have a colon itself."""
    name, colon, column = source.rpartition(":")
    if not colon or not name or Path(source).expanduser().exists() or re.search(r"[\\/]", column):
        return source, None
    return name, column


def _from_file(path: Path, column: str | None) -> Iterable[Row]:
    packed = path.suffix.lower() == ".gz"
    kind = Path(path.stem if packed else path.name).suffix.lower()
    match kind:
        case ".parquet" if not packed:
            return _from_parquet(path, column)
        case ".csv":
            return _from_table(path, _text(path, packed), ",", column)
        case ".tsv":
            return _from_table(path, _text(path, packed), "\t", column)
        case ".json":
            return _from_json(path, _text(path, packed))
        case ".jsonl" | ".ndjson":
            lines = _lines(path, _text(path, packed))
            return ((where, _parsed(where, line) if line else "") for where, line in lines)
        case ".txt" | "":
            if column is not None:
                raise InputError(f"{path} has no columns: give it without :{column}")
            return _lines(path, _text(path, packed))
    raise InputError(
        f"{path} is not a list of prompts by its name: give {', '.join(FORMATS)}, or rename it to "
        ".txt if it has a prompt on each line"
    )


def _text(path: Path, packed: bool) -> str:
    try:
        data = read_bytes(path, MOST_UNPACKED)
        data = unpack(data, path) if packed else data
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: it is not text in UTF-8; save the file as UTF-8"
        ) from error


def _lines(path: Path, text: str) -> Iterator[tuple[str, str]]:
    """The lines with their places, numbered from 1; those after the last with text are none."""
    # Not splitlines(), which also divides at U+2028 and the like.
    lines = text.rstrip().split("\n") if text.strip() else []
    return ((f"{path}, line {number}", line.strip()) for number, line in enumerate(lines, 1))


def _from_table(path: Path, text: str, delimiter: str, column: str | None) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text.rstrip(), newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        at = names.index(_column(str(path), names, column))
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if cells and len(cells) <= at:
                raise InputError(f"{where}: it ends before the column {names[at]}")
            yield where, cells[at] if cells else ""
    except csv.Error as error:
        kind = "a CSV" if delimiter == "," else "a TSV"
        raise InputError(f"{path} is not {kind} file: {error}") from error


def _from_json(path: Path, text: str) -> Iterator[Row]:
    rows = _parsed(str(path), text) if text.strip() else []
    if not isinstance(rows, list):
        raise InputError(f'{path} is not a list of prompts: give ["...", ...], or .jsonl')
    return ((f"{path}, entry {number}", row) for number, row in enumerate(rows, 1))


def _from_parquet(path: Path, column: str | None) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(
            f"{path}: reading .parquet needs the package datasets: {install('datasets')}"
        ) from error
    try:
        names = parquet.read_schema(path).names
        chosen = _column(str(path), names, column)
        cells = parquet.read_table(path, columns=[chosen])[chosen].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a Parquet file that can be read") from error
    return ((f"{path}, row {number}", cell or "") for number, cell in enumerate(cells, 1))


def _parsed(where: str, text: str) -> Any:
    return parse_json(text, where, None)


def _prompt(where: str, row: Any, column: str | None) -> str:
    """The prompt of a row: a string, or an object with a column."""
    value = row
    if isinstance(row, dict):
        value = row.get(_column(where, list(row), column))
        value = "" if value is None else value  # a row that ends early, a null
    if not isinstance(value, str):
        raise InputError(f"{where}: the prompt is not text")
    return value.strip()


def _column(where: str, names: Sequence[str], column: str | None) -> str:
    for name in COLUMNS if column is None else (column,):
        if name in names:
            return name
    wanted = f"column {column!r}" if column is not None else f"column {' or '.join(COLUMNS)}"
    has = ", ".join(map(str, names)) or "none"
    raise InputError(f"{where} has no {wanted}; it has {has}: name one as in FILE:COLUMN")


def _from_hub(name: str, most: int | None) -> Iterator[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"there is no file {name}, and reading a data set of the hub needs the package "
            f"datasets: {install('datasets')}"
        ) from error
    try:
        rows: Iterable[Any] = load_dataset(name, split="train", streaming=True)
        for number, row in enumerate(islice(rows, most)):
            yield f"{name}, row {number}", row
    except Exception as error:  # whatever the hub, the network and the file formats raise
        lines = str(error).strip().splitlines()
        why = lines[0] if lines else type(error).__name__
        raise InputError(
            f"cannot read the data set {name} from the hub ({why}): check its name and the network"
        ) from error

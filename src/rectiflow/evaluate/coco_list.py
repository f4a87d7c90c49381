"""Which pictures of COCO, and with which captions, as a file of the user's says it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rectiflow.errors import InputError
from rectiflow.guarded import MOST_UNPACKED, Unreadable, as_text, parse_json, read_bytes

ID, CAPTION = ("image_id", "id"), ("caption", "prompt", "text")
"""What the two columns of a table may be called; the first that is there counts."""


def read_ids(file: Path) -> list[int]:
    """The ids in a text file, one a line; empty lines do not count.

    Raises:
        InputError: it cannot be read, holds something else, or an id twice, or none.
    """
    ids = []
    for number, line in enumerate(_text(file, "--ids", "a text file of ids").split("\n"), 1):
        text = line.strip()
        if text and not (text.isascii() and text.isdigit()):
            raise InputError(f"{file}, line {number}: {text[:40]!r} is no image id; one a line")
        ids += [int(text)] if text else []
    if not ids or len(set(ids)) < len(ids):
        raise InputError(f"{file} holds {'an id twice' if ids else 'no ids'}: give each id once")
    return ids


def read_captions(file: Path) -> list[tuple[int, str]]:
    """The rows (image id, caption) of a table, in its order.

    Args:
        file: `.csv` or `.tsv` with a header that names `ID` and `CAPTION`; `.jsonl` with an object
            a line; `.json` with a list of objects or of pairs, an object from id to caption, or
            COCO's own annotations. An image may come more than once, with other captions.

    Raises:
        InputError: it cannot be read, is of another kind, or a row is none or there twice.
    """
    text = _text(file, "--captions", "a table of image ids and captions")
    match file.suffix.lower():
        case ".csv" | ".tsv":
            delimiter = "," if file.suffix.lower() == ".csv" else "\t"
            table = csv.DictReader(text.splitlines(), delimiter=delimiter, strict=True)
            try:
                found: Iterable[Any] = list(table)
            except csv.Error as error:
                raise InputError(f"{file}, line {table.line_num}: {error}") from error
        case ".jsonl" | ".ndjson":
            found = [_json(file, line) for line in text.splitlines() if line.strip()]
        case ".json":
            found = _json(file, text)
            if isinstance(found, dict):
                found = found.get("annotations", list(found.items()))
            if not isinstance(found, list):
                raise InputError(f"{file} is no list: give [{{'image_id': 1, 'caption': …}}, …]")
        case _:
            raise InputError(f"--captions {file}: give a .csv, .tsv, .jsonl or .json file")
    rows = [_row(file, number, row) for number, row in enumerate(found, 1)]
    if not rows:
        raise InputError(f"{file} holds no captions: give one or more")
    if len(set(rows)) < len(rows):
        twice = next(row for row in rows if rows.count(row) > 1)
        raise InputError(f"{file} holds image {twice[0]} with one caption twice: give it once")
    return rows


def _row(file: Path, number: int, row: Any) -> tuple[int, str]:
    if isinstance(row, dict):
        row = [next((row[key] for key in keys if key in row), None) for keys in (ID, CAPTION)]
    match row:
        case [int() | str() as i, str() as caption] if str(i).isascii() and str(i).isdigit():
            if caption.strip():
                return int(i), " ".join(caption.split())
    raise InputError(
        f"{file}, row {number} has no image id and caption: name the two columns {ID[0]} and "
        f"{CAPTION[0]}"
    )


def _json(file: Path, text: str) -> Any:
    return parse_json(text, file, None)


def _text(file: Path, option: str, wanted: str) -> str:
    try:
        return as_text(read_bytes(file, MOST_UNPACKED), file)
    except Unreadable as error:
        raise InputError(f"{option} {file} cannot be read: give {wanted}") from error

"""Files that are there whole or not at all."""

from __future__ import annotations

import csv
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path in the same folder to write to; what was written takes the file's place at the end.

    Who reads meanwhile finds the file as it was, and so does everyone if writing fails or is
    killed. What a killed process leaves is hidden, and gone when the file is written again.

    Args:
        file: In a folder that is there.
        shared: Whether several processes may write it at a time; the last to end counts. What one
            of them leaves when it is killed stays.
    """
    whose = f"-{secrets.token_hex(8)}" if shared else ""
    unfinished = file.with_name(f".{file.name}{whose}.tmp")
    try:
        yield unfinished
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_whole(file: Path, text: str, *, shared: bool = False) -> None:
    """Write a text as UTF-8; `shared` as in `replacing`."""
    with replacing(file, shared=shared) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_csv(
    file: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Write a table with a head.

    Args:
        file: In a folder that is there.
        rows: What is in each column; None and what is left out are empty cells.
        columns: Their order; by default the first row's, of which there must be one then.
    """
    with replacing(file) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as open_:
        writer = csv.DictWriter(open_, list(rows[0]) if columns is None else columns)
        writer.writeheader()
        writer.writerows(rows)

"""Files that are there whole or not at all."""

from __future__ import annotations

import csv
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rectiflow.errors import InputError


@contextmanager
def replacing(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """A new file in the same folder to write to; it takes the file's place at the end.

    Who reads meanwhile finds the file as it was, and so does everyone if writing fails or is
    killed. What a killed process leaves is hidden, and gone when the file is written again. Nobody
    can foretell its name and put a link there, and its mode follows the umask, whoever writes it.

    Args:
        file: In a folder that is there.
        shared: Whether several processes may write it at a time; the last to end counts. What one
            of them leaves when it is killed stays.
    """
    if not shared:
        for left in leftovers(file):
            left.unlink(missing_ok=True)
    unfinished = _unfinished(file)
    # Fails where there is anything of that name, a link too.
    handle = os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    os.close(handle)
    try:
        yield unfinished
        if (
            unfinished.stat().st_mode != mode
        ):  # some libraries make a file of their own, for us alone
            unfinished.chmod(stat.S_IMODE(mode))
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def unfinished_folder(folder: Path) -> Path:
    """A new folder beside another, to be filled and renamed; what a kill left of one is removed.

    Args:
        folder: That it is to become; those above it are made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(folder):
        shutil.rmtree(left, ignore_errors=True)
    unfinished = _unfinished(folder)
    unfinished.mkdir()
    return unfinished


def final_name(path: Path) -> str:
    """What a file or folder is to be called, also while it has a hidden name."""
    return re.sub(r"\.(.+)-[0-9a-f]{16}\.tmp", r"\1", path.name)


def readable_alike(folder: Path) -> None:
    """Give the files in a new folder the modes that the umask gives: the folder's own has it.

    Some libraries make files that are readable for their owner alone.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def leftovers(path: Path) -> list[Path]:
    """What killed processes have left of a file or folder that they were writing."""
    pattern = re.compile(rf"\.{re.escape(_short(path))}-[0-9a-f]{{16}}\.tmp")
    try:
        with os.scandir(path.parent) as entries:
            return [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]
    except FileNotFoundError:
        return []


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{_short(path)}-{secrets.token_hex(8)}.tmp")


def _short(path: Path) -> str:
    """A name, cut where with what is put around it no file system would take it."""
    return path.name.encode(errors="ignore")[:200].decode(errors="ignore")


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


def check_begun(folder: Path, *marks: str) -> None:
    """See that a folder of long work is that work's, by a mark in it, or free for it.

    Args:
        folder: That may be there.
        marks: Names, or patterns of names, of which the work writes one before all else.

    Raises:
        InputError: Other things are in it.
    """
    if not folder.is_dir() or any(any(folder.glob(mark)) for mark in marks):
        return
    for file in sorted(folder.iterdir()):
        if not file.name.startswith("."):
            raise InputError(
                f"{folder} has other things in it ({file.name}): give a folder that is new or empty"
            )

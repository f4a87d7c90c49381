"""Reading what may be damaged or hostile: JSON, gzip and safetensors, each in one place.

A file is looked at before it is taken into memory (its kind, its size), and what is in it before it
is used (its encoding, its depth, its type). Whatever is wrong is one line that names the file.
"""

from __future__ import annotations

import gzip
import io
import json
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rectiflow.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 32 * 2**20
"""Of a file that is parsed: the largest tokenizers have about 20 MB."""
MOST_UNPACKED = 2**30
"""Of a list of prompts that is packed: some ten million."""
MOST_DEPTH = 64
"""Of lists and groups in one another; ours have about eight."""

_KINDS: dict[type, str] = {dict: "a group of named values", list: "a list", str: "a text"}


class Unreadable(InputError):
    """A file that is not what it should be.

    Args:
        where: What to call it: `FILE`, or `FILE, line 3`.
        why: What is wrong with it, to follow that.
    """

    def __init__(self, where: str | Path, why: str = "") -> None:
        super().__init__(f"{where} {why}".strip())
        self.why = why


class Missing(Unreadable, FileNotFoundError):
    """A file that is not there."""


def read_bytes(file: Path, most: int = MOST_BYTES) -> bytes:
    """All of a file.

    Args:
        file: A regular one: a pipe or a device might never end.
        most: Bytes that it may have.

    Raises:
        Missing: It is not there.
        Unreadable: It cannot be read, or is larger.
    """
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise Unreadable(file, "is no file")
        with file.open("rb") as opened:
            data = opened.read(most + 1)
    except FileNotFoundError as error:
        raise Missing(file, "is not there") from error
    except OSError as error:
        raise Unreadable(file, f"cannot be read ({error.strerror})") from error
    if len(data) > most:
        raise Unreadable(file, f"has more than {most // 2**20} MiB, which none of its kind has")
    return data


def as_text(data: bytes, where: str | Path) -> str:
    """Bytes as UTF-8, with or without a byte order mark.

    Raises:
        Unreadable: They are something else.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(where, f"is not text in UTF-8 (byte {error.start})") from error


def parse_json(data: bytes | str, where: str | Path, kind: type | None = dict) -> Any:
    """What a text in JSON says.

    Args:
        data: All of it.
        where: What to call it in an error.
        kind: `dict` or `list`, which it must be; None for any.

    Raises:
        Unreadable: It is not JSON, is another kind, or is nested too deeply.

    Example:
        >>> parse_json('{"a": [1, true]}', "settings.json")
        {'a': [1, True]}
        >>> parse_json("[" * 5000, "settings.json")
        Traceback (most recent call last):
        ...
        rectiflow.guarded.Unreadable: settings.json is nested more than 64 deep
    """
    text = as_text(data, where) if isinstance(data, bytes) else data
    try:
        found = json.loads(text)
    except RecursionError:
        raise Unreadable(where, f"is nested more than {MOST_DEPTH} deep") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise Unreadable(where, f"is not JSON ({error.msg}, {at})") from error
    except ValueError as error:  # a number of more digits than Python takes
        raise Unreadable(where, f"is not JSON ({error})") from error
    check_nesting(found, where)
    if kind is not None and not isinstance(found, kind):
        raise Unreadable(where, f"holds a {type(found).__name__} and not {_KINDS[kind]}")
    return found


def check_nesting(data: Any, where: str | Path) -> None:
    """Refuse data nested too deeply, and texts that cannot be written as UTF-8.

    Raises:
        Unreadable: It is, or has halves of characters (lone surrogates) in it.
    """
    level: list[Any] = [[data]]
    for _ in range(MOST_DEPTH + 1):
        inner = {}  # each once: YAML can say that a group is in a thousand places
        for group in level:
            for value in [*group, *group.values()] if isinstance(group, dict) else group:
                if isinstance(value, dict | list):
                    inner[id(value)] = value
                elif isinstance(value, str) and not value.isascii():
                    try:
                        value.encode()
                    except UnicodeEncodeError as error:
                        raise Unreadable(where, "has half a character in it") from error
        if not inner:
            return
        level = [*inner.values()]
    raise Unreadable(where, f"is nested more than {MOST_DEPTH} deep")


def read_json(file: Path, kind: type | None = dict) -> Any:
    """What a file in JSON says.

    Raises:
        Unreadable: As `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(file), file, kind)


def unpack(data: bytes, where: str | Path, most: int = MOST_UNPACKED) -> bytes:
    """What is packed by gzip.

    Raises:
        Unreadable: It is not gzip, not whole, or more than `most` bytes.
    """
    if not data:  # which Python takes for nothing, packed
        raise Unreadable(where, "is not a whole gzip file (it is empty)")
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            found = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Unreadable(where, f"is not a whole gzip file ({error})") from error
    if len(found) > most:
        raise Unreadable(where, f"unpacks to more than {most // 2**20} MiB")
    return found


@contextmanager
def opened_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file, as `safe_open` of PyTorch gives it.

    Raises:
        Unreadable: It is none, or is cut short; also where a tensor is asked for in the block that
            it does not have. `Missing` if it is not there.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise Unreadable(file, "is no file")
        with safe_open(file, "pt") as opened:
            yield opened
    except FileNotFoundError as error:
        raise Missing(file, "is not there") from error
    except (OSError, SafetensorError) as error:
        why = str(error).rpartition(": ")[2] or type(error).__name__
        raise Unreadable(file, f"is not a safetensors file that can be read ({why})") from error


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and the texts in its header.

    Raises:
        Unreadable: As `opened_tensors`.
    """
    with opened_tensors(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}

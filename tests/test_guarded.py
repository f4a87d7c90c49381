"""The one reader of JSON, gzip and safetensors: whatever a file holds, one line names it."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rectiflow.errors import InputError
from rectiflow.guarded import (
    Missing,
    Unreadable,
    parse_json,
    read_bytes,
    read_json,
    read_tensors,
    unpack,
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": "\xff"}', "is not text in UTF-8 (byte 7)"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"true", "holds a bool and not a group of named values"),
        (b"[1]", "holds a list and not a group of named values"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "is nested more than 64 deep"),
        (b"[" * 200_000, "is nested more than 64 deep"),
        (b'{"a":' * 100_000, "is nested more than 64 deep"),
        (b'{"a": "\\ud800"}', "has half a character in it"),
        (b'{"\\ud800": 1}', "has half a character in it"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    ],
)
def test_what_is_wrong_with_json(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(Unreadable) as caught:
        read_json(file)
    line = str(caught.value)
    assert line.startswith(f"{file} {words}") and len(line.splitlines()) == 1


def test_json_as_it_should_be(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    data: dict[str, Any] = {"prompt": "zwei Äpfel 🍎", "a": [[1, 2.5, None], {"b": True}]}
    file.write_bytes("\ufeff".encode() + json.dumps(data, ensure_ascii=False).encode())
    assert read_json(file) == data
    assert parse_json("[1]", "here", list) == [1] and parse_json('"a"', "here", None) == "a"


def test_files_that_are_none(tmp_path: Path) -> None:
    """A pipe would never end, a device neither."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("pipe", "device", "."):
        for read in (read_json, read_tensors):
            with pytest.raises(InputError, match="is no file"):
                read(tmp_path / name)
    with pytest.raises(Missing, match="is not there"):
        read_json(tmp_path / "none")
    with pytest.raises(FileNotFoundError):  # for those who look for that
        read_tensors(tmp_path / "none")


def test_sizes(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**40)  # a sparse file
    with pytest.raises(Unreadable, match="has more than 32 MiB"):
        read_bytes(tmp_path / "a")
    bomb = gzip.compress(bytes(5 * 2**20))
    assert len(unpack(bomb, "bomb")) == 5 * 2**20
    with pytest.raises(Unreadable, match=r"^bomb unpacks to more than 4 MiB"):
        unpack(bomb, "bomb", 4 * 2**20)


def test_gzip_damaged_anywhere() -> None:
    packed = gzip.compress(b'"a red apple"\n' * 50)
    assert zlib.crc32(unpack(packed, "here")) == zlib.crc32(b'"a red apple"\n' * 50)
    for place in range(len(packed)):
        for changed in (packed[:place], packed[:place] + b"\xff" + packed[place + 1 :]):
            try:
                assert unpack(changed, "here") == unpack(packed, "here")
            except Unreadable as error:
                assert str(error).startswith("here is not a whole gzip file")


def test_safetensors_damaged_anywhere(tmp_path: Path) -> None:
    """A header cut or changed is a line; tensors are what a checksum is for."""
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2, 3)}, file, {"about": "{}"})
    whole = file.read_bytes()
    tensors, about = read_tensors(file)
    assert torch.equal(tensors["x"], torch.ones(2, 3)) and about == {"about": "{}"}
    for place in range(len(whole) - 24):
        for changed in (whole[:place], whole[:place] + b"\xff" + whole[place + 1 :]):
            file.write_bytes(changed)
            try:
                read_tensors(file)
            except Unreadable as error:
                line = str(error)
                assert line.startswith(f"{file} is not a safetensors file")
                assert len(line.splitlines()) == 1

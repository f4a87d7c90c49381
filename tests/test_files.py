"""Files that are there whole or not at all."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from rectiflow.files import replacing, write_csv, write_whole


def test_what_was_there_stays_until_all_is_written(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_whole(file, "old ½\n")
    with replacing(file) as unfinished:
        unfinished.write_text("new")
        assert file.read_bytes() == "old ½\n".encode()
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_whole(file, "old")
    with pytest.raises(ZeroDivisionError), replacing(file) as unfinished:
        unfinished.write_text("half of")
        raise ZeroDivisionError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_killed_process_leaves_what_was_there(tmp_path: Path) -> None:
    """And something hidden, until the file is written again."""
    file = tmp_path / "a.txt"
    write_whole(file, "old")
    code = (
        "import os, pathlib, sys\n"
        "from rectiflow.files import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as unfinished:\n"
        "    unfinished.write_text('half of')\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, file], check=False).returncode == 9
    assert file.read_text() == "old"
    (left,) = {*tmp_path.iterdir()} - {file}
    assert left.name.startswith(".") and left.suffix == ".tmp"
    write_whole(file, "new")
    assert list(tmp_path.iterdir()) == [file]


def test_one_file_by_two_writers_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with replacing(file, shared=True) as one, replacing(file, shared=True) as two:
        one.write_text("one")
        two.write_text("two")
    assert file.read_text() == "one" and list(tmp_path.iterdir()) == [file]


def test_a_table(tmp_path: Path) -> None:
    """Read back by the standard library; what is None or left out is empty."""
    file = tmp_path / "a.csv"
    rows = [{"a": 'x, "y"\nz', "b": None}, {"a": 0.1}]
    write_csv(file, rows)
    with file.open(newline="") as opened:
        assert list(csv.DictReader(opened)) == [
            {"a": 'x, "y"\nz', "b": ""},
            {"a": "0.1", "b": ""},
        ]
    write_csv(file, [], ["b", "a"])
    assert file.read_bytes() == b"b,a\r\n"

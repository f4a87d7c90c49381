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


def test_links_are_not_followed_and_names_not_foretold(tmp_path: Path) -> None:
    """In a folder that others may write to, whoever knew the hidden name could put a link there."""
    file, victim = tmp_path / "o.png", tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".o.png.tmp").symlink_to(victim)
    file.symlink_to(victim)
    names = set()
    for _ in range(3):
        with replacing(file) as unfinished:
            names.add(unfinished.name)
            assert not unfinished.is_symlink() and unfinished.read_bytes() == b""
            unfinished.write_text("new")
    assert len(names) == 3 and victim.read_text() == "mine"
    assert not file.is_symlink() and file.read_text() == "new"


@pytest.mark.parametrize("taken", ["file", "link"])
def test_a_name_that_is_taken_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    there = tmp_path / f".a.txt-{'0' * 16}.tmp"
    there.write_text("mine") if taken == "file" else there.symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a.txt", "new", shared=True)
    assert not (tmp_path / "victim").exists() and not (tmp_path / "a.txt").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_modes_follow_the_umask_whoever_writes(tmp_path: Path, umask: int) -> None:
    """safetensors makes files of its own, readable for their owner alone."""
    code = (
        "import os, pathlib, sys, torch\n"
        "from PIL import Image\n"
        "from safetensors.torch import save_file\n"
        "from rectiflow.files import *\n"
        "from rectiflow.report import save_png\n"
        "from rectiflow.straighten import checkpoint\n"
        "os.umask(int(sys.argv[2]))\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "write_whole(folder / 'a.txt', 'a')\n"
        "save_png(Image.new('RGB', (2, 2)), folder / 'a.png', {})\n"
        "with replacing(folder / 'a.safetensors') as unfinished:\n"
        "    save_file({'x': torch.ones(1)}, unfinished)\n"
        "checkpoint.save(folder, 1, {'network': {'x': torch.ones(1)}}, 1)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, str(umask)], check=True)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 5
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_a_name_as_long_as_may_be(tmp_path: Path) -> None:
    for name in ("n" * 255, "ä" * 127):
        write_whole(tmp_path / name, "x")
    assert len(list(tmp_path.iterdir())) == 2

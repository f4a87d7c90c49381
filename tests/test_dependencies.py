"""The lower bounds of pyproject.toml and the versions of constraints.txt, held to each other."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
UNLOCKED = {"wandb", "trackio"}  # trackio keeps pillow below 13
WANTED = [
    requirement
    for line in chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    if (requirement := Requirement(line)).name != "rectiflow"
]


def pins(text: str) -> dict[str, Version]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "one exact version a line"
    return {canonicalize_name(n): Version(v) for n, v in (line.split("==") for line in lines)}


LOCK = pins((ROOT / "constraints.txt").read_text())


def test_the_lock_is_of_allowed_versions() -> None:
    for requirement in [wanted for wanted in WANTED if wanted.name not in UNLOCKED]:
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)]), (
            requirement
        )


def test_the_lock_brings_neither_torchvision_nor_cuda() -> None:
    assert not [name for name in LOCK if re.match("torchvision|nvidia|cuda|triton", name)]


def test_the_lowest_versions_are_allowed_and_of_every_dependency() -> None:
    script = ROOT / ".ci" / "lowest.py"
    lowest = pins(subprocess.check_output([sys.executable, script], text=True))
    assert lowest.keys() == {canonicalize_name(requirement.name) for requirement in WANTED}
    for requirement in WANTED:
        assert requirement.specifier.contains(lowest[canonicalize_name(requirement.name)])


def test_loras_have_the_peft_that_the_libraries_ask_for() -> None:
    """If this fails, what is installed here does not work together: see the extra `lora`."""
    from diffusers.utils import constants
    from transformers.integrations import peft

    for library in (constants, peft):
        assert Version(version("peft")) >= Version(library.MIN_PEFT_VERSION)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_change_of_the_lock_installs_again(tmp_path: Path) -> None:
    lock, python = tmp_path / "lock.txt", tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    lock.write_text("torch==2.13.0\n")
    python.touch()
    command = ["make", "-n", f"VENV={python.parents[1]}", f"CONSTRAINTS={lock}", "install-dev"]

    def commands() -> str:
        return subprocess.check_output(command, cwd=ROOT, text=True)

    for stamp in (".installed", ".installed-dev"):
        (python.parents[1] / stamp).touch()
    assert "pip" not in commands()
    later = lock.stat().st_mtime + 60
    os.utime(lock, (later, later))
    assert commands().count(f"--constraint {lock} --no-build-isolation --editable") == 2

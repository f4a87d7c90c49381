"""What a release says of itself, and that it works where nothing else is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOME = PROJECT["urls"]["Source"]
RAW = HOME.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"


def test_addresses_in_the_readme_work_elsewhere() -> None:
    """An index shows the README without the files beside it."""
    text = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text)
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)]*)\)", text)
    named = dict(re.findall(r"^\[([^\]]*)\]: (\S+)$", text, re.MULTILINE))
    assert pictures and named
    for address in pictures:
        assert address.startswith(RAW) and (ROOT / address.removeprefix(RAW)).is_file()
    assert all(address.startswith("https://") for address in links), links
    for name, address in named.items():
        assert address == f"{HOME}/blob/main/{name}" and (ROOT / name).is_file()
    short = set(re.findall(r"\[((?:docs/|[A-Z]+\.)[\w./-]+)\](?![(:])", text))
    assert short <= named.keys(), short - named.keys()


def test_nothing_is_said_to_be_in_an_index() -> None:
    """Until there is a release: `pip install ".[extra]"` in a clone."""
    said = [
        file
        for folder in ("src", "docs", "examples", "README.md")
        for file in ([ROOT / folder] if folder.endswith(".md") else (ROOT / folder).rglob("*"))
        if file.suffix in (".py", ".md", ".sh") and re.search(r"rectiflow\[\w", file.read_text())
    ]
    assert not said


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_release_installs_into_an_empty_environment(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(*words: str | Path) -> str:
        return subprocess.run(
            words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        ).stdout

    said = call(
        "make", "-C", ROOT, "build", f"DIST={tmp_path / 'dist'}", f"PYTHON={sys.executable}"
    )
    assert said.count("PASSED") == 2
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        (info,) = {name.split("/")[0] for name in opened.namelist() if ".dist-info/" in name}
        about = Parser().parsestr(opened.read(f"{info}/METADATA").decode())
        assert about["License-Expression"] == "Apache-2.0 AND OFL-1.1"
        held = [opened.read(f"{info}/licenses/{name}") for name in about.get_all("License-File")]
        assert any(b"Apache License" in text for text in held)
        assert any(b"PERMISSION & CONDITIONS" in text for text in held)
        urls = dict(line.split(", ") for line in about.get_all("Project-URL"))
        assert urls == PROJECT["urls"]
    call(sys.executable, "-m", "venv", "empty")
    python = tmp_path / "empty" / "bin" / "python"
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pip = (python, "-m", "pip", "install", "--quiet")
    call(*pip, "--index-url", "https://download.pytorch.org/whl/cpu", "--no-deps", torch)
    call(*pip, "--constraint", ROOT / "constraints.txt", wheel)
    rectiflow = python.with_name("rectiflow")
    assert call(rectiflow, "-V") == f"{about['Version']}\n"
    call(rectiflow, "generate", "a red apple", "--steps", "2", "-o", "apple.png")
    assert "apple" in call(rectiflow, "info", "apple.png")

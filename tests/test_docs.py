"""Every block of code in README, CONTRIBUTING and docs: Python runs, commands exist and have the
options they are given, and those that edit and generate run, on tiny models of the same families.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
import typer.main
from markdown_it import MarkdownIt
from PIL import Image
from typer.testing import CliRunner

import rectiflow as rf
from rectiflow.app import options
from rectiflow.app.cli import app
from rectiflow.models.base import FlowModel
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd_model

ROOT = Path(__file__).parents[1]
FILES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{f.name}" for f in ROOT.glob("docs/*.md"))]
WrongUse: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError, typer's own copy
RUN = ("edit", "chain", "generate", "invert", "models", "cite")
"""Commands that are run, where they need nothing but a model and a picture."""


def code(file: str) -> Iterator[tuple[str, str, str]]:
    """Language, code and the comment before it, of all blocks; `-` is inline code's language."""
    before = ""
    for token in MarkdownIt().enable("table").parse((ROOT / file).read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            yield token.info.strip() or "sh", token.content, before
        for child in token.children or []:
            if child.type == "code_inline":
                yield "-", child.content, ""
        before = token.content if token.type == "html_block" else ""


def blocks(*languages: str) -> dict[str, list[str]]:
    found = {
        file: [
            text
            for language, text, before in code(file)
            # What is tested elsewhere says so, and is found there by its name.
            if language in languages and "tested:" not in before
        ]
        for file in FILES
    }
    return {file: texts for file, texts in found.items() if texts}


def commands(text: str) -> list[list[str]]:
    """The words of each of our commands in a block."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";&|"):
                found.append(words)
                words = []
            else:
                words.append(word)
    ours = (words[words.index("rectiflow") :] for words in found if "rectiflow" in words[:4])
    return [words[1:] for words in ours if not {"…", "..."} & set(words)]


def parse(words: list[str]) -> list[str]:
    """The names of the command; raises `WrongUse` where it does not take its arguments."""
    command: Any = typer.main.get_command(app)
    names: list[str] = []
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
        names.append(command.name)
    unknown = hasattr(command, "commands") and words and not words[0].startswith("-")
    if not names or unknown:
        raise WrongUse(f"no command {shlex.join(words)}")
    command.make_context(names[-1], list(words))
    return names


def test_commands_are_found_and_wrong_ones_are_noticed() -> None:
    text = 'rectiflow pairs --num 3 \\\n  --out x && A=1 rectiflow export "a b" -o c # why\n'
    found = commands(text)
    assert found == [["pairs", "--num", "3", "--out", "x"], ["export", "a b", "-o", "c"]]
    assert [parse(words) for words in found] == [["pairs"], ["export"]]
    assert parse(["evaluate", "coco", "--limit", "3"]) == ["evaluate", "coco"]
    for wrong in (
        ["pear"],
        ["evaluate", "pear"],
        ["pairs", "--pear"],
        ["edit", "--dtype=x"],
    ):
        with pytest.raises(WrongUse):
            parse(wrong)


@pytest.mark.parametrize("file", blocks("sh", "bash"))
def test_commands_in_blocks_have_these_options(file: str) -> None:
    for text in blocks("sh", "bash")[file]:
        for words in commands(text):
            parse(words)
        for target in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        for script in re.findall(r"(?:python|sh) ([\w/]+\.(?:py|sh))", text):
            assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("file", blocks("-"))
def test_commands_in_sentences_have_these_options(file: str) -> None:
    """What they are given is left out there, or stands in capitals."""
    for text in blocks("-")[file]:
        if re.match("rectiflow [a-z]", text) and "…" not in text:
            try:
                parse(shlex.split(text)[1:])
            except typer.BadParameter:  # an argument that is left out is one, too
                pass
        if match := re.match(r"python (\S+\.py)(.*)", text):
            source = (ROOT / match[1]).read_text(encoding="utf-8")
            for option in re.findall(r"--[\w-]+", match[2]):
                assert option in source, text


@pytest.fixture(scope="module")
def models() -> dict[str, FlowModel]:
    return {"sd3": tiny_model(), "sd": tiny_sd_model()}


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: dict[str, FlowModel]
) -> Iterator[Path]:
    """A folder with the files that the docs speak of, and models that stand for those they name."""
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name in ("photo.png", "photo.jpg", "cat.jpg"):
        Image.fromarray(values).save(name)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save("mask.png")
    Path("edits.csv").write_text("image,from,to\nphoto.png,a red apple,a green apple\n")

    def stand_in(name: Any = "emoji-sd3", **_: Any) -> FlowModel:
        unet = any(part in str(name) for part in ("emoji-sd", "instaflow", "2rf"))
        return models["sd" if unet and name != "emoji-sd3" else "sd3"]

    monkeypatch.setattr(rf, "load", stand_in)

    def load(self: options.ModelOptions, name: str | None = None, **_: Any) -> FlowModel:
        return stand_in(name or self.model)

    monkeypatch.setattr(options.ModelOptions, "load", load)

    class LPIPS(torch.nn.Linear):
        """Of the package of that name, which is not installed."""

        def __init__(self, net: str) -> None:
            super().__init__(1, 1)

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    yield tmp_path


Run = Callable[[list[str]], None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", blocks("sh", "bash"))
def test_commands_that_edit_and_generate_run(file: str, place: Path) -> None:
    for text in blocks("sh", "bash")[file]:
        for words in commands(text):
            if words and words[0] in RUN:
                result = CliRunner().invoke(app, words, obj=words)
                assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", blocks("python"))
def test_python_runs(file: str, place: Path) -> None:
    """The blocks of a file one after the other, as a reader would."""
    names: dict[str, Any] = {}
    for number, text in enumerate(blocks("python")[file], 1):
        exec(compile(text, f"{file}, block {number}", "exec"), names)

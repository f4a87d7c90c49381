"""What is hostile on the command line, in the environment and in files ends in one visible line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from rectiflow.app.cli import main
from rectiflow.report import save_png

DEEP = "[" * 3000
HIDDEN = re.compile("[\\x00-\\x09\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")
REPAINT = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["train", "emoji-vae", "--set", f"x={DEEP}"], "nested more than 64 deep"),
        (["edit", "a.png", "--from", "a", "--to", "b", "--set", f"x={DEEP}"], "nested more than"),
        (["generate", "a cat", "--steps", "9" * 30], "--steps is 9999"),
        (["generate", "a cat", "--steps", "1000000000"], "give 1 or more, up to 100000"),
        (["edit", "a.png", "--from", "a", "--to", "b", "--steps", "9" * 30], "at most 100000"),
        (["train", "emoji-vae", "--set", "betas=[2, 3]"], "'betas.0'"),
        (["train", "emoji-vae", "--set", "betas=[-1, 0.5]"], "'betas.0'"),
        (["train", "emoji-vae", "--set", "learning_rate=.inf"], "'--set learning_rate'"),
        (["train", "emoji-vae", "--set", f"steps={'9' * 30}"], "steps is 9999"),
        (["train", "emoji-vae", "--set", f"batch_size={'9' * 30}"], "batch_size is 9999"),
        (["train", "emoji-vae", "--set", f"seed={2**64}"], "seed is 18446744073709551616"),
        (["generate", "a \udcff cat"], "argument 2, 'a \\udcff cat', is not text in UTF-8"),
        (["generate", "a cat", "--model", REPAINT], r"unknown model"),
    ],
)
def test_command_lines(
    line: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*line, "-o", "out"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and words in printed.err and len(printed.err.splitlines()) == 1
    assert not HIDDEN.search(printed.err)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x"}, "RANK in the environment is 'x' and not a number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE in the environment is '-1'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE in the environment is 2, and MASTER_ADDR is not there"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 of WORLD_SIZE 2"),
    ],
)
@pytest.mark.parametrize("command", ["train", "pairs"])
def test_the_environment_of_a_launcher(
    command: str,
    environment: dict[str, str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Writers of pairs need no meeting place; all else they need as well."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = ["train", "emoji-vae", "--set", "steps=1"]
    if command == "pairs":
        if environment == {"WORLD_SIZE": "2"}:
            return
        line = ["pairs", "--prompts", "emoji:4", "--num", "4"]
    assert main([*line, "-o", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1


def test_info_shows_what_would_repaint_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.png"
    made = {"prompt": f"a cat{REPAINT}", REPAINT: [REPAINT], "in": {REPAINT: 1, "t": [0.5, "x"]}}
    save_png(Image.new("RGB", (2, 2)), file, made)
    assert main(["info", str(file)]) == 0
    printed = capsys.readouterr().out
    assert not HIDDEN.search(printed)
    assert "a cat\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\u202e" in printed
    assert main(["info", str(file), "--json"]) == 0
    printed = capsys.readouterr().out
    assert not HIDDEN.search(printed) and json.loads(printed)["prompt"] == made["prompt"]

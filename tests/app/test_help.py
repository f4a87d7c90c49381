"""Help, usage errors, and the commands that need no model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rectiflow
from rectiflow.app.citations import BIBTEX, METHODS
from rectiflow.invert import PRESETS
from rectiflow.models import embedded_models
from tests.app.conftest import Run

COMMANDS = (
    "demo",
    "edit",
    "chain",
    "generate",
    "invert",
    "pairs",
    "reflow",
    "distill",
    "export",
    "train",
    "evaluate",
    "models",
    "doctor",
    "info",
    "replay",
    "cite",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.code == 0 and not done.err
    assert f"Example:\n    rectiflow {command}" in done.out
    assert "--json" in done.out


def test_nothing_is_help_and_there_is_a_version(run: Run) -> None:
    assert all(f"\n  {command} " in run().out for command in COMMANDS)
    listed = run("--help").out.partition("Commands:")[2]
    assert "..." not in listed, "a first sentence is too long for the list"
    assert run("--version").out == run("-V").out == f"{rectiflow.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_commands(shell: str) -> None:
    told = {"_TYPER_COMPLETE_ARGS": "rectiflow re", "COMP_WORDS": "rectiflow re"}
    told |= {"COMP_CWORD": "1", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    words = [sys.executable, "-m", "rectiflow"]
    environment = os.environ | told | {"_RECTIFLOW_COMPLETE": f"complete_{shell}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert "reflow" in done.stdout and "distill" not in done.stdout, done


def test_quiet_and_verbose(run: Run, photo: Path, model: Path, tmp_path: Path) -> None:
    words = ["edit", photo, "--to", "a red apple", "--model", model, "-o", tmp_path]
    assert "rectiflow: warning: " in run(*words).err
    for quiet in ([*words, "-q"], ["--quiet", *words]):
        done = run(*quiet)
        assert not done.err and done.code == 0 and "report:" in done.out
    assert run(*words, "-q", "--json").data["warnings"], "they are still in the record"
    missing = ["edit", tmp_path / "no.png", "--to", "a red apple"]
    run(*missing, "-q").refuses("there is no file")
    assert "Traceback" in run(*missing, "-v").err
    run(*missing).refuses("there is no file")
    run(*words, "-q", "-v").refuses("--verbose and --quiet")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["paint"], "no such command 'paint'"),
        (["edit"], "--to"),
        (["edit", "--too", "x"], "--too"),
        (["edit", "--to", "x"], "give an image or --seed"),
        (["edit", "a.png", "--seed", "1", "--to", "x"], "give an image or --seed"),
        (["edit", "--to", "x", "--seed", "1"], '--seed needs --from "..."'),
        (["edit", "--to", "x", "--seed", "-1"], "--seed"),
        (["edit", "--to", "x", "--from", "y", "--seed", "0", "--steps", "many"], "--steps"),
        (
            ["edit", "--to", "x", "--from", "y", "--seed", "0", "--steps", "0"],
            "--steps is 0",
        ),
        (
            ["edit", "--to", "x", "--from", "y", "--seed", "0", "--guidance", "nan"],
            "--guidance",
        ),
        (
            ["edit", "--to", "x", "--from", "y", "--seed", "0", "--preset", "best"],
            "fast, exact, ftedit",
        ),
        (
            ["edit", "--to", "x", "--from", "y", "--seed", "0", "--set", "speed=1"],
            "unknown setting 'speed'",
        ),
        (["edit", "--to", "x", "--from", "y", "--seed", "0", "--set", "speed"], "key=value"),
        (
            ["edit", "--to", "x", "--from", "y", "--seed", "0", "--set", "omega=1"],
            "omega has no effect on the scheme renoising with the method two_branch",
        ),
        (
            ["chain", "a.png", "--to", "x", "--from", "y", "--set", "iterations=3"],
            "iterations has no effect on the scheme renoising",
        ),
        (
            ["edit", "--to", "x", "--from", "y", "--seed", "0", "--set", "method=uni_edit"],
            "the method uni_edit begins at a noise, to which the scheme renoising does not lead",
        ),
        (
            ["edit", "a.safetensors", "--to", "x", "--set", "method=flow_edit"],
            "the method flow_edit makes no use of an inversion (scheme query_offset)",
        ),
        (
            ["edit", "--to", "x", "--from", "y", "--seed", "0", "--set", "iterations=few"],
            "iterations",
        ),
        (["edit", "--to", "x", "--from", "y", "--seed", "0", "--set", "inject=[: :]"], "inject"),
        (
            ["edit", "--to", "x", "--from", "y", "--seed", "0", "--set", "adaln_ratio=2"],
            "adaln_ratio",
        ),
        (["generate", "x", "--dtype", "float8"], "float8"),
        (["generate", "x", "-n", "0"], "--count"),
        (["generate", "x", "--guidance", "-1"], "--guidance"),
        (["generate", "x", "--refine", "emoji-sd", "--refine-guidance", "-1"], "--refine-guidance"),
        (["pairs", "--prompts", "x", "--num", "1", "--guidance", "-1", "--out", "x"], "--guidance"),
        (["generate", "x", "-n", "2", "-o", "x.png"], "folder"),
        (["invert", "a.png", "--steps", "3", "-o", "x.bin"], "there is no file a.png"),
        (["evaluate", "everything"], "emoji-models"),
        (["train"], "emoji-vae"),
        (["train", "emoji-gan"], "emoji-gan"),
        (["train", "emoji-vae", "--config", "none.yaml"], "none.yaml"),
        (["cite", "magic"], "unknown method 'magic'"),
        (["info", "none.png"], "none.png"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, words: list[str], expected: str) -> None:
    run(*words).refuses(expected)


def test_cite(run: Run) -> None:
    assert "2309.06380" in run("cite", "instaflow").out
    assert "2411.15843" in run("cite", "ftedit", "--json").data["bibtex"]["xu2025unveil"]
    assert run("cite", "ftedit", "subject").out.count("@inproceedings") == 1  # one paper, once
    for name, path in (("fast", "kulikov2025flowedit"), ("exact", "yang2026directedit")):
        cited = run("cite", name, "--json").data["bibtex"]
        assert {"xu2025unveil", path} <= set(cited)  # whose controls, on whose path
    assert set(run("cite", "--json").data["methods"]) == set(METHODS)


def test_every_preset_has_its_citation() -> None:
    assert set(PRESETS) <= set(METHODS)
    assert {key for _, keys in METHODS.values() for key in keys} == set(BIBTEX)
    for key, entry in BIBTEX.items():
        assert entry.startswith("@") and f"{{{key}," in entry
        assert entry.count("{") == entry.count("}")


def test_models(run: Run) -> None:
    data = run("models", "--json").data
    assert [entry["name"] for entry in data["models"]] == embedded_models()
    assert set(data["presets"]) == set(PRESETS)
    printed = run("models").out
    assert "StableDiffusion3Pipeline" in printed
    heading = "Presets (--preset; an edit takes fast if none is named):\n"
    listed = printed.partition(heading)[2].splitlines()
    column = {
        line.index(preset.reference) for line, preset in zip(listed, PRESETS.values(), strict=True)
    }
    assert len(column) == 1, "references are not below each other"


def test_doctor_says_what_is_broken(run: Run) -> None:
    done = run("doctor", "--json")
    found = {entry["check"]: entry["ok"] for entry in done.data["checks"]}
    assert {"python", "torch", "diffusers", "transformers", "weights", "disk"} <= set(found)
    broken = [name for name, ok in found.items() if not ok]
    assert broken == ([] if "emoji-sd3" in embedded_models() else ["weights"])
    assert done.code == (1 if broken else 0) and done.data["ok"] == (not broken)

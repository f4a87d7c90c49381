"""What a command prints of its cost is what its network did, counted on the module."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch.nn.modules.module import register_module_forward_hook

from rectiflow.app import demo
from rectiflow.invert import PRESETS
from tests.app.conftest import Run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PROMPTS = ("--from", "a red cat", "--to", "a blue cat")
STEPS = ("--steps", 4)


@contextmanager
def counted() -> Iterator[list[int]]:
    """The rows of each call of a transformer, whoever loaded it: guided rows count as rows."""
    rows: list[int] = []

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, SD3Transformer2DModel):
            rows.append(len(output[0]))

    handle = register_module_forward_hook(hook)
    try:
        yield rows
    finally:
        handle.remove()


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(text: str) -> int:
    """The network samples that a summary ends with."""
    (line,) = (line for line in text.splitlines() if "network samples" in line)
    return int(line.partition(" network samples")[0].split()[-1])


@pytest.mark.parametrize("more", [(), ("--guidance", 2, "--diagnose")], ids=str)
@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith("-flux")])
def test_edit(
    run: Run, model: Path, photo: Path, cwd: Path, preset: str, more: tuple[Any, ...]
) -> None:
    steps = ("--steps", 10) if preset == "uniedit" else STEPS
    words = ("edit", photo, *PROMPTS, "--to", "a dog", "--preset", preset, "-m", model, *steps)
    with counted() as rows:
        nfe = run(*words, *more, "--json").data["nfe"]
    assert nfe["total"] == sum(rows) > 0
    assert set(nfe) == {"inversion", "editing", "reconstruction", "total"}
    assert nfe["total"] == nfe["inversion"] + nfe["editing"] + nfe["reconstruction"]
    assert (nfe["reconstruction"] > 0) == ("--diagnose" in more)


def test_the_default_spends_two_samples_a_step(
    run: Run, model: Path, photo: Path, cwd: Path
) -> None:
    """Sixty of the thirty steps of its preset, in words and in the pictures too."""
    with counted() as rows:
        done = run("edit", photo, *PROMPTS, "-m", model)
    assert said(done.out) == sum(rows) == 60
    assert "60 network samples (30 inverting, 30 editing)" in done.out
    told = run("info", "out/edit-1.png", "--json").data["nfe"]
    assert told == {"inversion": 30, "editing": 30, "reconstruction": 0, "total": 60}


def test_an_inversion_and_an_edit_of_it(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    for more in ((), ("--reconstruct", "again.png")):
        with counted() as rows:
            words = ("invert", photo, "--prompt", "a cat", "-m", model, *STEPS, "-o")
            done = run(*words, "a.safetensors", *more)
        assert said(done.out) == sum(rows) == (12 if more else 4)
        assert "nan" not in done.out and "residual" not in done.out  # this scheme knows none
    with counted() as rows:
        done = run("edit", "a.safetensors", "--to", "a dog", "-m", model)
    assert said(done.out) == sum(rows) and "inverting" not in done.out


@pytest.mark.parametrize("much", [False, True])
def test_what_is_kept_is_said_once_and_only_if_it_is_much(
    run: Run, model: Path, photo: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch, much: bool
) -> None:
    """A large share of what is free, or 256 MiB: of a tiny model's features, if little is free."""
    if much:
        monkeypatch.setattr("rectiflow.models.memory.free_memory", lambda device: (2**10, 2**30))
    (cwd / "two.csv").write_text(f"image,from,to\n{photo},a cat,a dog\n{photo},a pig,a dog\n")
    words = ("edit", "--batch", "two.csv", "--set", "attention_ratio=1")
    done = run(*words, "-m", model, *STEPS)
    assert done.code == 0 and done.err.count("of the source's features") == (1 if much else 0)


def test_chain(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    words = ("chain", photo, *PROMPTS, "--to", "a dog", "-m", model, *STEPS)
    with counted() as rows:
        done = run(*words)
    # Two turns of two samples a step, and the second prompt from the original.
    assert said(done.out) == sum(rows) == 2 * 8 + 4
    with counted() as rows:
        nfe = run(*words, "--preset", "ftedit", "--json").data["nfe"]
    assert nfe["total"] == sum(rows)


def test_demo(run: Run, model: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CASES", demo.CASES[:1])
    with counted() as rows:
        assert said(run("demo", "-m", model, "-o", "d").out) == sum(rows) == 60
    with counted() as rows:
        data = run("demo", "-m", model, "-o", "d", "--json", "--diagnose").data
    # The edit, and of its picture a way back to its noise and two forth.
    assert data["nfe"]["total"] == sum(rows) == 60 + 90
    assert sum(case["nfe"]["total"] for case in data["cases"]) == sum(rows)


@pytest.mark.parametrize("more", [(), ("--diagnose",)], ids=str)
def test_batch(run: Run, model: Path, photo: Path, cwd: Path, more: tuple[str, ...]) -> None:
    table = cwd / "edits.csv"
    table.write_text(f"image,from,to,seed\n{photo},a cat,a dog,\n{photo},a cat,a pig,\n,a,b,3\n")
    with counted() as rows:
        done = run("edit", "--batch", table, "-m", model, *STEPS, *more)
    assert said(done.out) == sum(rows)
    with Path("out/results.csv").open(newline="") as file:
        shown = list(csv.DictReader(file))
    assert sum(int(row["nfe"]) for row in shown) == sum(rows)
    parts = ("nfe_inversion", "nfe_editing", "nfe_reconstruction")
    assert sum(int(row[part]) for row in shown for part in parts) == sum(rows)


@pytest.mark.parametrize(
    "more",
    [
        ("a cat", "-n", 2, "--guidance", 3, "--seed", 3),
        ("a cat", "a dog", "--consistent", "--seed", 3),
        ("a cat", "--guidance", 1, "--seed", 3),
        ("a cat", "--interpolate", "3,9", "--frames", 3),
    ],
    ids=str,
)
def test_generate(run: Run, model: Path, cwd: Path, more: tuple[Any, ...]) -> None:
    with counted() as rows:
        done = run("generate", *more, "-m", model, *STEPS, "-o", "made")
    assert done.code == 0 and said(done.out) == sum(rows) > 0


def test_evaluate(run: Run, model: Path, cwd: Path) -> None:
    for name in ("fast", "flowedit"):
        words = ("evaluate", "emoji-edits", "--limit", 1, "-m", model, "--json", "--methods")
        with counted() as rows:
            entry = run(*words, name).data["methods"][name]
        assert entry["nfe"] == sum(rows)


def test_pie_bench(run: Run, model: Path, cwd: Path) -> None:
    """The default preset, and a figure that is the mean over its pictures."""
    assert run("evaluate", "pie-bench", "--make-data", "data", "--limit", 2).code == 0
    words = ("evaluate", "pie-bench", "--data", "data", "-o", "out", "-m", model, "--json")
    with counted() as rows:
        data = run(*words).data
    assert data["method"] == "fast" and 2 * data["nfe"] == sum(rows) == 120

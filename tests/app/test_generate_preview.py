"""A one-step model at work: a sheet of many seeds, some picked, those refined by another model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rectiflow
from rectiflow.app.outputs import MANIFEST
from rectiflow.models import Metadata, load, write_metadata
from rectiflow.report import read_png
from tests.app.conftest import Run
from tests.tiny_sd import tiny_sd

PROMPT = "two red cats"


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "one-step"
    tiny_sd(rectified=True).save_pretrained(folder)
    write_metadata(Metadata(family="sd", student_steps=(1,)), folder)
    return folder


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


def files(folder: str = "out") -> set[str]:
    return {file.name for file in Path(folder).iterdir()} - {MANIFEST}


def test_one_sample_a_picture(run: Run, fast: Path, cwd: Path) -> None:
    """By the folder's metadata alone: a step, guidance 1, nothing for the negative prompt."""
    data = run("generate", PROMPT, "--model", fast, "-n", 3, "--json").data
    assert data["nfe"] == 3 and [entry["nfe"] for entry in data["images"]] == [1, 1, 1]
    settings = data["settings"]
    assert (settings["num_inference_steps"], settings["guidance_scale"]) == (1, 1.0)
    assert data["sheet"] is None and files() == {"0.png", "1.png", "2.png"}


def test_a_sheet_then_some_of_it(run: Run, fast: Path, cwd: Path) -> None:
    words = ("generate", PROMPT, "--model", fast, "--seed", 4, "-n", 10, "--json")
    data = run(*words, "--sheet").data
    assert files() == {"sheet.png"} and data["sheet"] == "sheet.png"
    assert data["nfe"] == 10
    assert [entry["seed"] for entry in data["images"]] == list(range(4, 14))
    assert all(entry["image"] is None for entry in data["images"])
    made = read_png("out/sheet.png")
    assert made["seeds"] == list(range(4, 14)) and made["prompt"] == PROMPT
    run("replay", "out/sheet.png").refuses("is a sheet", "--pick")
    sheet = Image.open("out/sheet.png").convert("RGB")

    data = run(*words, "--pick", "7,13", "--sheet").data
    assert files() == {"sheet.png", "7.png", "13.png", "picked.png"}
    assert data["nfe"] == 2 and [entry["image"] for entry in data["images"]] == ["7.png", "13.png"]
    for seed in (7, 13):
        assert run("replay", f"out/{seed}.png").code == 0
        picture = Image.open(f"out/{seed}.png")
        (made_here,) = rectiflow.generate(load(fast), PROMPT, seed=seed)
        assert largest_difference(picture, made_here) == 0
        # On the sheet: 4 in a row, enlarged 4 times, a gap of 2 and a caption of 12 below.
        row, column = divmod(seed - 4, 4)
        left, top = column * (128 + 2), row * (128 + 2 + 12)
        cell = sheet.crop((left, top, left + 128, top + 128))
        assert largest_difference(cell.resize((32, 32), Image.Resampling.NEAREST), picture) <= 1
    run(*words, "--sheet", "-o", "preview.png")
    assert read_png("preview.png")["seeds"] == made["seeds"]


def test_refined(run: Run, fast: Path, model: Path, cwd: Path) -> None:
    words = ("generate", PROMPT, "--model", fast, "-n", 6, "--json", "--refine", model)
    refine = ("--strength", 0.6, "--refine-steps", 4, "--refine-guidance", 1.5)
    data = run(*words, *refine, "--pick", "2,5", "--sheet").data
    names = {"2.png", "2-refined.png", "5.png", "5-refined.png"}
    assert files() == names | {"refined.png"} and data["sheet"] == "refined.png"
    assert {entry["image"] for entry in data["images"]} == names
    assert [entry.get("refined_from") for entry in data["images"]][2:] == ["2.png", "5.png"]
    # Shift 3 has the last step and a half of four after t = 0.4, with guidance two samples each.
    assert [entry["nfe"] for entry in data["images"]] == [1, 1, 4, 4]
    assert data["nfe"] == 10
    assert (data["refinement"]["strength"], data["refinement"]["guidance_scale"]) == (0.6, 1.5)
    made = read_png("out/5-refined.png")
    assert made["refinement"]["seed"] == 5 and made["seed"] == 5
    (expected,) = rectiflow.refine(
        load(model),
        Image.open("out/5.png"),
        PROMPT,
        strength=0.6,
        seed=5,
        num_inference_steps=4,
        guidance_scale=1.5,
    )
    assert largest_difference(Image.open("out/5-refined.png"), expected) == 0
    told = run("info", "out/5-refined.png").out
    assert "refinement:\n  model: " in told and "  strength: 0.6\n" in told
    assert run("replay", "out/5-refined.png", "-o", "again.png").code == 0
    assert largest_difference(Image.open("again.png"), expected) == 0


def test_refined_without_a_preview(run: Run, fast: Path, model: Path, cwd: Path) -> None:
    """One picture by default, all of several, one file if one is named."""
    words = ("generate", PROMPT, "--model", fast, "--refine", model, "--json")
    run(*words, "--seed", 3)
    assert files() == {"3.png", "3-refined.png"}
    made = read_png("out/3-refined.png")["refinement"]
    assert (made["strength"], made["num_inference_steps"], made["guidance_scale"]) == (0.5, 3, 2.0)
    data = run(*words, "--seed", 3, "-o", "one.png").data
    assert largest_difference(Image.open("one.png"), Image.open("out/3-refined.png")) == 0
    assert [entry["image"] for entry in data["images"]] == [None, "one.png"]
    run(*words, "-n", 2, "--strength", 1, "-o", "all")
    assert files("all") == {"0.png", "0-refined.png", "1.png", "1-refined.png"}
    (whole,) = rectiflow.generate(load(model), PROMPT, seed=1)
    assert largest_difference(Image.open("all/1-refined.png"), whole) == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-n", "4", "--pick", "4"], "--pick 4 is outside the preview, which has seeds 0 to 3"),
        (["-n", "4", "--pick", "1,x"], "--pick 1,x: give seeds with commas between"),
        (["-n", "4", "--pick", "1,1"], "names a seed twice"),
        (["-n", "4", "--pick", "1,2", "-o", "x.png"], "2 pictures do not fit into x.png"),
        (["--refine", "emoji-sd3", "--sheet", "-o", "x.png"], "pictures and a sheet"),
        (["--refine", "emoji-sd3", "--strength", "0"], "--strength is 0.0"),
        (["--refine", "emoji-sd3", "--strength", "1.5"], "--strength is 1.5"),
        (["--refine", "emoji-sd3", "--refine-steps", "0"], "--refine-steps is 0"),
        (["--refine", "emoji-sd3", "--refine-guidance", "inf"], "--refine-guidance is inf"),
        (["--strength", "0.4"], "--strength is for --refine"),
        (["--refine-steps", "4"], "--refine-steps is for --refine"),
        (["-o", "x.gif"], "give --interpolate too"),
        (["--frames", "4"], "--frames"),
        (["another"], "two for --interpolate"),
        (["another", "--consistent", "--sheet"], "--consistent does not take --sheet"),
        (["--interpolate", "3"], "two seeds or more"),
        (["--interpolate", "3,x"], "--interpolate 3,x: give seeds"),
        (["--interpolate", "3,9", "--seed", "2"], "--interpolate does not take --seed"),
        (["--interpolate", "3,9", "--refine", "emoji-sd3"], "does not take --refine"),
        (["--interpolate", "3,9,4", "--frames", "2"], "--frames is 2: give 3 or more"),
        (["--interpolate", "3,9", "--fps", "99"], "fps is 99"),
        (["--interpolate", "3,9", "-o", "x.avi"], ".gif, .mp4, .png"),
        (["b", "c", "--interpolate", "3,9"], "one prompt, or two"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, cwd: Path, words: list[str], expected: str) -> None:
    run("generate", "a", *words).refuses(expected)
    assert not any(cwd.iterdir())

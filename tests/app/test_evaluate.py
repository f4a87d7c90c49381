"""``rectiflow evaluate``: a command for each suite, and the two that compare models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.app.conftest import Run
from tests.tiny_sd import tiny_sd

COMMON = (
    "--limit --output --model --base --lora --variant --revision --device --dtype --offload --json "
    "--verbose --quiet --help"
)
OWN = {
    "emoji-models": "--overwrite",
    "emoji-edits": "--overwrite --methods --masks --tuned --tune --ablations --update --first-seed "
    "--batch-size --processes",
    "pie-bench": "--data --make-data --preset --set --workers --shard --metrics --dino --clip "
    "--lpips-weights",
    "coco": "--data --make-data --split --ids --captions --steps --guidance --solver --seed "
    "--batch-size --shard --clip --inception-weights",
    "inversion-error": "--overwrite --steps --reference-steps --batch-size",
    "straight-edits": "--overwrite --steps --methods --guidance --batch-size",
}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd().save_pretrained(folder)
    return folder


def test_the_suites_are_listed(run: Run) -> None:
    listed = run("evaluate", "--help").out.partition("Commands:")[2]
    assert all(f"\n  {suite} " in listed for suite in OWN)
    assert "..." not in listed, "a first sentence is too long for the list"
    run("evaluate").refuses("rectiflow evaluate --help")
    run("evaluate", "everything").refuses("everything", *OWN)


@pytest.mark.parametrize("suite", OWN)
def test_a_suite_has_its_own_options_alone(run: Run, suite: str) -> None:
    done = run("evaluate", suite, "--help")
    assert done.code == 0 and not done.err
    assert f"Example:\n    rectiflow evaluate {suite} " in done.out
    listed = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", done.out, re.MULTILINE))
    own = {*OWN[suite].split(), *COMMON.split()}
    assert listed == own
    other = min({"--data", "--tune"} - own)
    run("evaluate", suite, other).refuses(
        f"no such option: {other}", f"rectiflow evaluate {suite} --help"
    )


def test_inversion_error(run: Run, sd: Path, tmp_path: Path) -> None:
    words = ("evaluate", "inversion-error", "--model", sd, "--limit", 2, "--steps", 2, "--steps", 3)
    words += ("--reference-steps", 4, "--batch-size", 2, "--device", "cpu")
    figures = run(*words, "-o", tmp_path, "--json").data
    assert figures == json.loads((tmp_path / "inversion-error.json").read_text())
    assert list(figures["models"]) == [str(sd)] and figures["n"] == 2
    assert list(figures["models"][str(sd)]["steps"]) == ["2", "3"]
    assert figures["reference_steps"] == 4


def test_straight_edits(run: Run, sd: Path, tmp_path: Path) -> None:
    words = ("evaluate", "straight-edits", "-m", sd, "--limit", 2, "--steps", 1, "--device", "cpu")
    figures = run(*words, "--methods", "ddim, flowedit", "-o", tmp_path, "--json").data
    assert figures == json.loads((tmp_path / "straight-edits.json").read_text())
    assert list(figures["models"][str(sd)]["steps"]["1"]) == ["ddim", "flowedit"]


def test_what_is_refused(run: Run, sd: Path) -> None:
    for suite in ("inversion-error", "straight-edits"):
        words = ("evaluate", suite, "-m", sd)
        run(*words, "-m", sd).refuses("each once")
        run(*words, "--steps", 0).refuses("--steps")
        run("evaluate", suite, "-m", "emoji-none").refuses("emoji-none")
    run("evaluate", "straight-edits", "-m", sd, "--methods", ",").refuses("--methods")
    run("evaluate", "straight-edits", "-m", sd, "--methods", "exact").refuses("exact", "flowedit")

"""A teacher and its student before the same edits: figures, differences, sentences, the command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rectiflow.app.console import Session
from rectiflow.app.inversion_error import straight_editing
from rectiflow.app.options import ModelOptions
from rectiflow.errors import InputError
from rectiflow.evaluate.inversion_plots import straight_plots
from rectiflow.evaluate.straight_editing import (
    METHODS,
    evaluate_straight_editing,
    sentences,
)
from rectiflow.invert import get_preset
from rectiflow.invert.features import check_controls
from rectiflow.models.load import load
from tests.tiny_sd import tiny_sd, tiny_sd_model


def test_methods_fit_a_network_without_joint_attention() -> None:
    for preset in METHODS.values():
        preset.check()
        check_controls(tiny_sd_model(), preset)
        assert preset.grid == "student"
    assert METHODS["ddim"].scheme == get_preset("ddim").scheme


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A teacher, its twin by another name, and a rectified flow."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("teacher", "twin"):
        tiny_sd().save_pretrained(folder / name)
    tiny_sd(rectified=True, seed=1).save_pretrained(folder / "rectified")
    return [str(folder / name) for name in ("teacher", "twin", "rectified")]


def run(folders: list[str], output: Path) -> dict[str, Any]:
    said = io.StringIO()
    straight_editing(
        Session(said, True),
        model=ModelOptions(models=folders),
        output=output,
        limit=2,
        steps=(1, 2),
        batch_size=2,
    )
    figures: dict[str, Any] = json.loads(said.getvalue())
    assert figures == json.loads((output / "straight-edits.json").read_text())
    return figures


def test_the_command(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = run(folders, tmp_path / "out")
    teacher, twin, rectified = folders
    assert figures["n"] == 2 and list(figures["models"]) == folders
    assert figures["models"][rectified]["kind"] == "flow"
    for entry in figures["models"].values():
        for count, methods in entry["steps"].items():
            assert list(methods) == list(METHODS)
            for name, found in methods.items():
                assert ("reconstruction_psnr" in found) is (name in ("euler", "ddim"))
                assert found["target_psnr"]["low"] <= found["target_psnr"]["mean"]
            # One evaluation a step to invert; two a step to edit under guidance.
            assert methods["ddim"]["nfe"]["mean"] == 3 * int(count)
    one, other = (figures["models"][name] for name in (teacher, twin))
    assert one == other
    for point in figures["paired"][f"{twin} - {teacher}"].values():
        assert all(pair == {"mean": 0, "low": 0, "high": 0} for pair in point.values())
    differs = figures["paired"][f"{rectified} - {teacher}"]["ddim, 2"]["target_psnr"]
    steps = [figures["models"][name]["steps"]["2"]["ddim"] for name in (rectified, teacher)]
    expected = steps[0]["target_psnr"]["mean"] - steps[1]["target_psnr"]["mean"]
    assert differs["mean"] == pytest.approx(expected) and expected != 0
    assert "in 0 of 4 settings and farther in 0" in figures["sentences"][0]
    plots = {file.name for file in (tmp_path / "out").glob("*.svg")}
    assert plots == {f"straight-edits-{name}.svg" for name in straight_plots(figures)}
    assert {f"straight-edits-{kind}-flowedit.svg" for kind in ("target", "straightness")} <= plots
    assert "straight-edits-reconstruction-flowedit.svg" not in plots

    def never(*_: object, **__: object) -> None:
        raise AssertionError("what was kept is made again")

    monkeypatch.setattr("rectiflow.evaluate.emoji_edits.invert_cases", never)
    assert run(folders, tmp_path / "out") == figures


def test_without_guidance_a_step_of_an_edit_is_one_evaluation(folders: list[str]) -> None:
    made = evaluate_straight_editing(
        [load(folders[2])], steps=(2,), methods=("ddim",), guidance_scale=1.0, limit=2
    )
    assert made["guidance_scale"] == 1 and not made["paired"]
    (entry,) = made["models"].values()
    assert entry["steps"]["2"]["ddim"]["nfe"]["mean"] == 2 * 2


def test_sentences_follow_from_the_figures() -> None:
    def pair(low: float, high: float) -> dict[str, float]:
        return {"mean": (low + high) / 2, "low": low, "high": high}

    figures = {
        "models": {
            "old": {"straightness": {"mean": 0.5}},
            "runs/new/model": {"straightness": {"mean": 0.1}},
        },
        "paired": {
            "runs/new/model - old": {
                "ddim, 2": {"target_psnr": pair(1, 3), "reconstruction_psnr": pair(2, 4)},
                "ddim, 8": {"target_psnr": pair(-1, 2), "reconstruction_psnr": pair(-4, -3)},
                "flowedit, 8": {"target_psnr": pair(-3, -2)},
            }
        },
    }
    (said,) = sentences(figures)
    assert "S(Z) is 0.1 for new and 0.5 for old." in said
    assert (
        "A round trip is nearer to its target with it in 1 of 2 settings and farther in 1" in said
    )
    assert "An edit is nearer to its target with it in 1 of 3 settings and farther in 1" in said
    assert "+2.00 dB by ddim, 2 steps (95 % interval +1.00 to +3.00)" in said
    assert "-2.50 dB by flowedit, 8 steps" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": ["emoji-sd", "emoji-sd"]}, "give each once"),
        ({"models": ["emoji-sd"], "steps": (0,)}, "steps has 0"),
        ({"models": ["emoji-sd"], "methods": ("euler", "exact")}, "no method 'exact'; there are"),
    ],
)
def test_what_is_wrong_is_said_first(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        model = ModelOptions(models=given.pop("models"))
        straight_editing(Session(io.StringIO(), True), model=model, **given)
    assert "\n" not in str(caught.value)


def test_a_student_may_know_its_velocity_outright() -> None:
    """Of a `reuse` student, a rectified network, every method is of use too."""
    model = tiny_sd_model(rectified=True)
    figures = evaluate_straight_editing([model], steps=(2,), methods=("ddim",), limit=1)
    assert figures["paired"] == {} and figures["sentences"] == []
    found = figures["models"]["tiny-sd"]["steps"]["2"]["ddim"]
    assert torch.isfinite(torch.tensor([value["mean"] for value in found.values()])).all()

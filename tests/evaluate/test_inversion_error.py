"""Errors of inversion steps against closed forms and against the steps; and as a command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rectiflow.app.console import Session
from rectiflow.app.inversion_error import inversion_error
from rectiflow.app.options import ModelOptions
from rectiflow.errors import InputError
from rectiflow.evaluate.inversion_claims import compared, sentence, verdict
from rectiflow.evaluate.inversion_error import (
    accurate_states,
    approximation_errors,
    round_trips,
)
from rectiflow.flow.diffusion import variance_preserving
from rectiflow.flow.grid import uniform
from rectiflow.invert.ddim import ddim_step
from tests.flow.gaussians import TwoGaussians
from tests.invert.fields import randn, slope, wild
from tests.tiny import tiny_sd3
from tests.tiny_sd import tiny_sd

FLOW = TwoGaussians(0.7, 0.4)
GRID = torch.tensor([0.0, 0.2, 0.3, 0.7, 0.9, 1.0], dtype=torch.float64)
X_0 = randn(5, 3)


def relative(value: Tensor, true: Tensor) -> Tensor:
    return (value - true).norm(dim=1) / true.norm(dim=1)


def test_the_accurate_states_are_the_flows_own() -> None:
    errors = []
    for steps in (32, 48, 64, 96):
        states = accurate_states(FLOW.velocity, FLOW.state(X_0, 1.0), GRID, steps, bend=0.97)
        assert torch.equal(states[-1], FLOW.state(X_0, 1.0))
        errors.append(float((states - FLOW.trajectory(X_0, GRID)).abs().max()))
    assert errors[-1] < 1e-4 and slope(errors) > 1.7


def test_errors_between_gaussians_in_closed_form() -> None:
    """Euler's by the flow's slope, DDIM's by regression in a diffusion model's coordinates."""
    states = FLOW.trajectory(X_0, GRID)
    found = approximation_errors(FLOW.velocity, states, GRID)
    assert {tuple(values.shape) for values in found.values()} == {(5, 5)}
    a, b = variance_preserving(GRID)
    own = states * (a + b).reshape(-1, 1, 1)
    noise = [FLOW.epsilon(own[i], a[i], b[i]) for i in range(len(GRID))]
    for i in range(5):
        true = FLOW.velocity(states[i], GRID[i])
        for time, told in (("noisier", GRID[i]), ("cleaner", GRID[i + 1])):
            expected = relative(FLOW.velocity(states[i + 1], told), true)
            torch.testing.assert_close(found[f"straight, {time}"][i], expected)
        if i == 0:  # where σ is infinite
            assert found["diffusion, noisier"][i].isnan().all()
            assert found["diffusion, cleaner"][i].isnan().all()
            continue
        told = FLOW.epsilon(own[i + 1], a[i], b[i])
        torch.testing.assert_close(found["diffusion, noisier"][i], relative(told, noise[i]))
        expected = relative(noise[i + 1] if i < 4 else told, noise[i])
        torch.testing.assert_close(found["diffusion, cleaner"][i], expected)


@pytest.mark.parametrize("time", ["noisier", "cleaner"])
def test_errors_are_those_of_the_steps_relative_to_what_they_move(time: Any) -> None:
    states, calls = randn(6, 5, 3, seed=4), []

    def counted(x: Tensor, t: Tensor, step: int) -> Tensor:
        calls.append(step)
        return wild(x, t)

    found = approximation_errors(counted, states, GRID)
    assert len(calls) == 3 * 5 + 1
    for i in range(1, 5):
        (t, t_next), (x, x_next) = GRID[i : i + 2], states[i : i + 2]
        velocity, h = wild(x, t), t_next - t
        known = wild(x_next, t if time == "noisier" else t_next)
        off = (x_next - h * known) - (x_next - h * velocity)
        expected = off.norm(dim=1) / (h * velocity).norm(dim=1)
        torch.testing.assert_close(found[f"straight, {time}"][i], expected)
        # DDIM's step, in its coordinates x / t, where it moves by Δσ ε̂.
        sigma, sigma_next = (1 - t) / t, (1 - t_next) / t_next
        moved = (sigma - sigma_next) * (x - t * velocity)
        right = x_next / t_next + moved
        made = ddim_step(wild, x_next, t, t_next, i, time=time) / t
        expected = (made - right).norm(dim=1) / moved.norm(dim=1)
        torch.testing.assert_close(found[f"diffusion, {time}"][i], expected)


def test_on_straight_trajectories_the_velocity_at_the_state_is_right_in_all_coordinates() -> None:
    x_1 = randn(4, 3, seed=5)
    speed = randn(4, 3, seed=6)

    def straight(x: Tensor, t: Tensor, step: int = 0) -> Tensor:
        return speed

    states = torch.stack([x_1 - (1 - t) * speed for t in GRID])
    found = approximation_errors(straight, states, GRID)
    for name in ("straight, noisier", "straight, cleaner"):
        assert (found[name] == 0).all()
    # From t = 1 DDIM tells the noisier time, at which its state is not one of the flow's.
    assert found["diffusion, cleaner"][1:4].max() < 1e-12
    assert found["diffusion, noisier"][1:].min() > 1e-3
    trips = round_trips(straight, x_1, GRID)
    assert trips["euler, noisier"].max() < 1e-12 < 1e-3 < trips["ddim, noisier"].min()


def test_round_trips_in_closed_form() -> None:
    rate = 1.5

    def field(x: Tensor, t: Tensor, step: int = 0) -> Tensor:
        return rate * x

    steps = 4
    trips = round_trips(field, randn(3, 2), uniform(steps))
    h = 1 / steps
    expected = abs(((1 - h * rate) * (1 + h * rate)) ** steps - 1)
    torch.testing.assert_close(trips["euler, noisier"], torch.full((3,), expected).double())
    assert set(trips) == {f"{s}, {t}" for s in ("euler", "ddim") for t in ("noisier", "cleaner")}


def rows(value: float) -> dict[str, Any]:
    names = [f"{c}, {t}" for c in ("straight", "diffusion") for t in ("noisier", "cleaner")]
    names += [f"round trip, {s}, {t}" for s in ("euler", "ddim") for t in ("noisier", "cleaner")]
    spread = np.linspace(0.9, 1.1, 12)
    return {name: value * spread for name in names}


def test_the_sentence_follows_from_the_figures() -> None:
    kinds = {"d": "diffusion", "f": "flow", "other": "diffusion"}
    for of_flow, word in ((0.4, "holds"), (0.1, "does not hold")):
        found = {"d": {10: rows(0.2)}, "f": {10: rows(of_flow)}}
        (pair,) = compared(found, kinds)
        assert pair["ratios"]["own"]["mean"] == pytest.approx(of_flow / 0.2)
        assert pair["model"] == "f" and pair["to"] == "d" and pair["steps"] == 10
        assert f"suffers more than DDIM {word} in their own" in sentence(pair)
        assert f"{of_flow:.1%} of what it moves" in sentence(pair)
        # Whichever comes first, what is said of the claim is the same.
        (turned,) = compared(dict(reversed(found.items())), kinds)
        assert turned["model"] == "d"
        assert f"suffers more than DDIM {word} in their own" in sentence(turned)
    mixed = rows(0.2)
    mixed["straight, noisier"] = mixed["straight, noisier"] * np.exp([1.0, -1.0] * 6)
    (pair,) = compared({"d": {10: rows(0.2)}, "f": {10: mixed}}, kinds)
    assert (
        "DDIM is not decided in their own coordinates, is not decided in the straight"
        in sentence(pair)
    )
    assert "is not decided in a diffusion model's" in sentence(pair)  # both are 0.2
    assert verdict(pair["ratios"]["straight, noisier"], True) == "is not decided"
    (pair,) = compared({"d": {10: rows(0.2)}, "other": {10: rows(0.1)}}, kinds)
    assert "suffers" not in sentence(pair) and "0.50 times" in sentence(pair)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    tiny_sd().save_pretrained(folder / "sd")
    tiny_sd3().save_pretrained(folder / "sd3")
    return [str(folder / "sd"), str(folder / "sd3")]


def test_the_command(folders: list[str], tmp_path: Path) -> None:
    said = io.StringIO()
    inversion_error(
        Session(said, True),
        model=ModelOptions(models=folders),
        output=tmp_path / "out",
        limit=2,
        steps=(2, 4),
        reference_steps=6,
        batch_size=1,
    )
    figures = json.loads(said.getvalue())
    assert figures == json.loads((tmp_path / "out" / "inversion-error.json").read_text())
    assert figures["n"] == 2 and figures["seeds"] == [2_000_000, 2_000_001]
    assert list(figures["models"]) == folders
    assert [entry["kind"] for entry in figures["models"].values()] == ["diffusion", "flow"]
    for entry in figures["models"].values():
        for count, found in entry["steps"].items():
            assert len(found["times"]) == int(count) + 1
            for group in ("errors", "round_trip"):
                for value in found[group].values():
                    assert 0 < value["low"] <= value["mean"] <= value["high"]
            known = [v for v in found["errors"]["straight, noisier"]["per_step"]]
            assert np.mean(known) == pytest.approx(found["errors"]["straight, noisier"]["mean"])
    # The flow's first step leads to t = 0.
    assert figures["models"][folders[1]]["steps"]["4"]["errors"]["diffusion, noisier"]["per_step"][
        0
    ] is None  # fmt: skip
    assert len(figures["sentences"]) == 2 and "That a rectified flow" in figures["sentences"][0]
    plots = sorted(file.name for file in (tmp_path / "out").glob("*.svg"))
    assert plots == [
        f"inversion-error-{name}.svg"
        for name in ("along-diffusion", "along-straight", "round-trip", "steps-diffusion",
                     "steps-straight")
    ]  # fmt: skip
    assert {file.suffix for file in (tmp_path / "out").iterdir()} == {".svg", ".json"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": ["emoji-sd", "emoji-sd"]}, "each once"),
        ({"steps": (10, 1)}, "steps has 1: give 2 or more"),
        ({"models": ["emoji-nothing"]}, "emoji-nothing"),
    ],
)
def test_what_is_wrong_is_said_first(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        model = ModelOptions(models=given.pop("models", None))
        inversion_error(Session(io.StringIO(), True), model=model, **given)
    assert "\n" not in str(caught.value)

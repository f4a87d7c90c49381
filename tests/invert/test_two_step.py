"""The two-step: reversible to rounding on any grid, second order, and what it asks where."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from rectiflow.flow.grid import uniform
from rectiflow.invert import SCHEMES, get_preset
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer import edit_latents
from tests.invert.fields import GRIDS, Recorder, generated, inverted, order_of_inversion, randn
from tests.steer.edits import SOURCES, task
from tests.tiny import tiny_model

X_1 = randn(3, 4)


@pytest.mark.parametrize("steps", [1, 2, 3, 12])
@pytest.mark.parametrize("grid", GRIDS)
def test_it_returns_along_its_own_states_on_any_grid(grid: str, steps: int) -> None:
    points = GRIDS[grid](steps)
    path = inverted("two_step", Recorder(), X_1, points)
    states = generated("two_step", Recorder(), path, points)
    # On uneven grids the parasitic mode multiplies rounding, too.
    torch.testing.assert_close(states, path.trajectory, rtol=0, atol=1e-10)
    assert (path.trajectory[0] - X_1).abs().mean() > 0.1


def test_both_ways_ask_at_the_states_and_their_times() -> None:
    grid, back, forth = GRIDS["shifted"](6), Recorder(), Recorder()
    path = inverted("two_step", back, X_1, grid)
    generated("two_step", forth, path, grid)
    assert [step for _, _, step in back.calls] == [0, 5, 4, 3, 2, 1]
    asked = [6, 5, 4, 3, 2, 1]
    for (x, t, _), i in zip(back.calls, asked, strict=True):
        assert torch.equal(x, path.trajectory[i]) and t == grid[i]
    assert [step for _, _, step in forth.calls] == [1, 2, 3, 4, 5]
    for x, t, i in forth.calls:
        torch.testing.assert_close(x, path.trajectory[i])
        assert t == grid[i]
    assert path.evaluations.tolist() == [[1, 1, 1]] * 6
    # What the field said is no Euler step from there, so nobody may take it for one.
    assert path.velocities is None and path.offsets is None


def test_the_recurrence() -> None:
    grid = GRIDS["zigzag"](5)
    x = inverted("two_step", Recorder(), X_1, grid).trajectory
    torch.testing.assert_close(x[4], x[5] - (grid[5] - grid[4]) * Recorder()(x[5], grid[5], 0))
    for i in range(1, 5):
        v = Recorder()(x[i], grid[i], i)
        torch.testing.assert_close(x[i - 1], x[i + 1] - (grid[i + 1] - grid[i - 1]) * v)


def test_second_order_on_uniform_grids() -> None:
    assert order_of_inversion("two_step") == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_without_the_pair_it_is_off(steps: int) -> None:
    grid = uniform(steps)
    path = inverted("two_step", Recorder(), X_1, grid)
    solver = SCHEMES["two_step"].solver(path, grid, torch.arange(3))
    before = path.trajectory[0]
    x = before + grid[1] * Recorder()(before, grid[0], 0)  # Euler's step instead
    for step in range(1, steps):
        x, before = solver.step(Recorder(), x, grid[step], grid[step + 1], step, before)
    assert (x - X_1).norm() / X_1.norm() > 0.01


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_step_that_lost_its_memory(step: int) -> None:
    """On the path it is exact; beside it, it keeps its distance where the field does."""
    grid, rows = GRIDS["shifted"](6), torch.tensor([0, 1, 2])

    def of_time(x: Tensor, t: Tensor, step: int) -> Tensor:
        return torch.cos(3 * t) * torch.ones_like(x)

    for field in (Recorder(), of_time):
        path = inverted("two_step", field, X_1, grid)
        solver = SCHEMES["two_step"].solver(path, grid, rows)
        here, there = path.trajectory[step], path.trajectory[step + 1]
        landed, memory = solver.step(field, here, grid[step], grid[step + 1], step, None)
        torch.testing.assert_close(landed, there)
        assert torch.equal(memory, here)
    landed, _ = solver.step(of_time, here + 0.7, grid[step], grid[step + 1], step, None)
    torch.testing.assert_close(landed, there + 0.7)


def test_every_row_follows_the_path_of_its_owner() -> None:
    grid = uniform(4)
    path = inverted("two_step", Recorder(), X_1, grid)
    solver = SCHEMES["two_step"].solver(path, grid, torch.tensor([2, 0, 2]))
    landed, memory = solver.step(
        Recorder(), path.trajectory[0][[2, 0, 2]], grid[0], grid[1], 0, None
    )
    assert torch.equal(landed, path.trajectory[1][[2, 0, 2]])
    assert torch.equal(memory, path.trajectory[0][[2, 0, 2]])


@pytest.mark.parametrize("compensate", ["none", "source", "both"])
def test_an_edit_in_which_the_source_comes_in_late(compensate: str) -> None:
    """Features of two steps were kept and those of four are wanted; memory is lost between."""
    model = tiny_model()
    preset = get_preset(
        "two-step",
        num_inference_steps=6,
        adaln_ratio=0.0,
        attention_ratio=2 / 6,
        compensate=compensate,
    )
    latents = torch.randn(2, 4, 8, 12)
    grid = grid_for(model, preset, latents)
    field = GuidedVelocity(model, model.encode_prompt(SOURCES))
    path = invert_latents(field, latents, grid, preset)
    same = dataclasses.replace(task(model, path, SOURCES, (0, 1)), grid=grid)
    edited = edit_latents(model, same, preset.override({"attention_ratio": 4 / 6}))
    torch.testing.assert_close(edited.latents, latents, atol=1e-4, rtol=0)
    late = 6 if compensate == "both" else 2
    # The first step asks nothing, with the source or without.
    assert edited.nfe == 5 * 2 + 2 * min(late, 5)

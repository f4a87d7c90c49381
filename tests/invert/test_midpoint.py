"""RF-Solver: the midpoint rule run backwards."""

from __future__ import annotations

import pytest
import torch

from rectiflow.flow.solver import Midpoint, integrate
from rectiflow.invert import SCHEMES
from tests.invert.fields import (
    GRIDS,
    RICCATI_END,
    Recorder,
    inverted,
    order_of_inversion,
    order_of_return,
    randn,
    riccati,
    solved,
)


@pytest.mark.parametrize("grid", ["uniform", "shifted", "zigzag"])
def test_second_order_to_the_noise_and_back(grid: str) -> None:
    assert order_of_inversion("midpoint", GRIDS[grid]) == pytest.approx(2, abs=0.2)
    assert order_of_return("midpoint", GRIDS[grid]) > 1.8


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_the_rule_backwards_with_the_steps_own_numbers(grid: str) -> None:
    points, velocity, x_1 = GRIDS[grid](5), Recorder(), randn(2, 4)
    path = inverted("midpoint", velocity, x_1, points)
    back = integrate(Recorder(), x_1, points.flip(0), "midpoint", keep_trajectory=True).trajectory
    assert back is not None
    torch.testing.assert_close(path.trajectory, back.flip(0), rtol=0, atol=1e-13)
    assert [step for _, _, step in velocity.calls] == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0]
    assert path.evaluations.tolist() == [[2, 2]] * 5
    assert isinstance(SCHEMES["midpoint"].solver(path, points, torch.arange(2)), Midpoint)


def test_the_fields_time_is_that_of_the_state() -> None:
    steps = 200
    velocity = Recorder(riccati)
    inverted("midpoint", velocity, RICCATI_END, GRIDS["uniform"](steps))
    for x, t, _ in velocity.calls:
        # Half a step too early or too late would be off by h/2 dx/dt, about 5e-4.
        assert (x - solved(RICCATI_END, t)).abs().max() < 1e-4

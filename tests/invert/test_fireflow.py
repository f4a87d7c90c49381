"""FireFlow: second order at one evaluation per step, both ways."""

from __future__ import annotations

import pytest
import torch

from rectiflow.flow.solver import FireFlow, integrate
from rectiflow.invert import SCHEMES
from tests.invert.fields import (
    GRIDS,
    RICCATI_END,
    Recorder,
    generated,
    inverted,
    order_of_inversion,
    order_of_return,
    randn,
    riccati,
    solved,
)

STEPS = 5


@pytest.mark.parametrize("grid", ["uniform", "shifted", "zigzag"])
def test_second_order_to_the_noise_and_back(grid: str) -> None:
    assert order_of_inversion("fireflow", GRIDS[grid]) == pytest.approx(2, abs=0.2)
    assert order_of_return("fireflow", GRIDS[grid]) > 1.8


@pytest.mark.parametrize("grid", GRIDS)
def test_one_more_evaluation_than_steps_in_each_direction(grid: str) -> None:
    points, back, forth, x_1 = GRIDS[grid](STEPS), Recorder(), Recorder(), randn(2, 4)
    path = inverted("fireflow", back, x_1, points)
    generated("fireflow", forth, path, points)
    assert [step for _, _, step in back.calls] == [4, 4, 3, 2, 1, 0]
    assert [step for _, _, step in forth.calls] == [0, 0, 1, 2, 3, 4]
    assert path.evaluations.tolist() == [[1, 1]] * 4 + [[2, 2]]
    # The first at the end it comes from, the others in the middles of the steps.
    middles = (points[1:] + points[:-1]) / 2
    for calls, times in ((back.calls, middles.flip(0)), (forth.calls, middles)):
        torch.testing.assert_close(torch.stack([t for _, t, _ in calls[1:]]), times)
    assert torch.equal(back.calls[0][0], x_1) and back.calls[0][1] == points[-1]
    assert torch.equal(forth.calls[0][0], path.trajectory[0]) and forth.calls[0][1] == points[0]
    again = integrate(Recorder(), x_1, points.flip(0), "fireflow", keep_trajectory=True).trajectory
    assert again is not None
    torch.testing.assert_close(path.trajectory, again.flip(0), rtol=0, atol=1e-13)
    assert isinstance(SCHEMES["fireflow"].solver(path, points, torch.arange(2)), FireFlow)


def test_the_fields_time_is_that_of_the_state() -> None:
    velocity = Recorder(riccati)
    inverted("fireflow", velocity, RICCATI_END, GRIDS["uniform"](200))
    for x, t, _ in velocity.calls:
        # Half a step too early or too late would be off by h/2 dx/dt, about 5e-4.
        assert (x - solved(RICCATI_END, t)).abs().max() < 1e-4


def test_half_the_cost_of_the_midpoint_rule_and_near_it() -> None:
    x_1, grid = randn(2, 4), GRIDS["uniform"](40)
    found = {
        name: inverted(name, Recorder(), x_1, grid) for name in ("euler", "midpoint", "fireflow")
    }
    far, near = (
        (found[name].trajectory[0] - found["midpoint"].trajectory[0]).norm()
        for name in ("euler", "fireflow")
    )
    assert near < 0.1 * far
    assert found["fireflow"].evaluations.sum() == found["midpoint"].evaluations.sum() / 2 + 2

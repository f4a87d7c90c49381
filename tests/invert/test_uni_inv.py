"""Uni-Inv: its equations, its cost, and how well Euler's step returns from where it leads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rectiflow.flow.solver import Euler
from rectiflow.invert import SCHEMES, fixed_point_inversion
from tests.invert.fields import GRIDS, Recorder, inverted, order_of_return, randn, wild

STEPS = 6
X_1 = randn(3, 4)


@pytest.mark.parametrize("grid", GRIDS)
def test_by_its_equations(grid: str) -> None:
    points, velocity = GRIDS[grid](STEPS), Recorder()
    path = inverted("uni_inv", velocity, X_1, points)
    x, v = X_1, wild(X_1, points[-1])
    asked = [(X_1, points[-1], STEPS - 1)]
    for i in reversed(range(STEPS)):
        h = points[i + 1] - points[i]
        guess = x - h * v
        asked.append((guess, points[i], i))
        v = wild(guess, points[i])
        x = x - h * v
        torch.testing.assert_close(path.trajectory[i], x)
        residual = (x - guess).norm(dim=1) / x.norm(dim=1)
        torch.testing.assert_close(path.residuals[i], residual.float())
    assert len(velocity.calls) == STEPS + 1 == path.evaluations[:, 0].sum()
    assert path.evaluations.tolist() == [[1] * 3] * (STEPS - 1) + [[2] * 3]
    for (x, t, step), (x_asked, t_asked, i) in zip(velocity.calls, asked, strict=True):
        torch.testing.assert_close(x, x_asked)
        assert (t, step) == (t_asked, i)
    # It asked at its guess and not at x_i, where the generating step will ask.
    assert path.velocities is None and path.offsets is None


@pytest.mark.parametrize("grid", GRIDS)
def test_it_is_one_warm_started_fixed_point_iteration(grid: str) -> None:
    """The two begin differently, which a field that is constant there does not notice."""
    points = GRIDS[grid](STEPS)

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        return torch.ones_like(x) if t >= points[-2] else wild(x, t)

    fixed = fixed_point_inversion(velocity, X_1, points, iterations=0, warm_start=True)
    path = inverted("uni_inv", velocity, X_1, points)
    torch.testing.assert_close(path.trajectory, fixed.trajectory)
    torch.testing.assert_close(path.residuals[:-1], fixed.residuals[:-1])
    assert path.evaluations.sum() == fixed.evaluations.sum() + 3  # rows


@pytest.mark.parametrize("grid", ["uniform", "shifted"])
def test_what_returns_is_of_second_order_where_eulers_is_of_first(grid: str) -> None:
    """The paper's local error of O(h³)."""
    assert order_of_return("uni_inv", GRIDS[grid]) == pytest.approx(2, abs=0.2)
    assert order_of_return("euler", GRIDS[grid]) == pytest.approx(1, abs=0.2)
    path = inverted("uni_inv", wild, X_1, GRIDS[grid](STEPS))
    solver = SCHEMES["uni_inv"].solver(path, GRIDS[grid](STEPS), torch.arange(3))
    assert isinstance(solver, Euler)

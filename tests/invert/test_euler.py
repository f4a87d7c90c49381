"""Euler inversion against its closed form, for both times the network can be told."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from rectiflow.invert import euler_inversion

GRID = torch.tensor([0.0, 0.1, 0.4, 0.75, 1.0], dtype=torch.float64)


def rate(t: Tensor) -> Tensor:
    return 1 + t.square()


@pytest.mark.parametrize("time", ["noisier", "cleaner"])
def test_closed_form(time: Literal["noisier", "cleaner"]) -> None:
    x_1 = torch.randn(3, 2, 4, dtype=torch.float64)
    seen: list[tuple[float, int]] = []

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        seen.append((float(t), step))
        return rate(t) * x

    result = euler_inversion(velocity, x_1, GRID, time=time)
    told = GRID[:-1] if time == "noisier" else GRID[1:]
    factors = 1 - GRID.diff() * rate(told)
    expected = [x_1 * factors[i:].prod() for i in range(5)]
    torch.testing.assert_close(result.trajectory, torch.stack(expected))
    assert seen == [(float(told[i]), i) for i in (3, 2, 1, 0)]


def test_one_evaluation_per_step_and_no_residual_claimed() -> None:
    result = euler_inversion(lambda x, t, step: x, torch.randn(2, 3), GRID.float())
    assert result.evaluations.tolist() == [[1, 1]] * 4
    assert result.residuals.isnan().all()
    assert result.trajectory.dtype == torch.float32

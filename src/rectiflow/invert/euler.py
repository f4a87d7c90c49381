"""Euler inversion: the generation step run backwards with the velocity taken at the wrong end."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rectiflow.flow.solver import Velocity
from rectiflow.invert.result import InversionResult


def euler_inversion(
    velocity: Velocity,
    x_1: Tensor,
    grid: Tensor,
    *,
    time: Literal["noisier", "cleaner"] = "cleaner",
) -> InversionResult:
    """``x_i = x_{i+1} − h_i v(x_{i+1}, t)``, one evaluation per step.

    Args:
        velocity: the field.
        x_1: image latents, ``[B, ...]``, float32 or float64.
        grid: rising times ``[N + 1]``, the last that of the image.
        time: what the network is told: ``t_{i+1}``, the time of the state (the usual scheme), or
            ``t_i``, the time the generation step would use (FTEdit's baseline).

    Returns:
        The trajectory; no residuals are known, they are NaN.
    """
    states = [x_1]
    for step in reversed(range(len(grid) - 1)):
        h = grid[step + 1] - grid[step]
        t = grid[step + 1] if time == "cleaner" else grid[step]
        states.append(states[-1] - h * velocity(states[-1], t, step))
    steps, rows = len(grid) - 1, len(x_1)
    return InversionResult(
        trajectory=torch.stack(states[::-1]),
        residuals=torch.full((steps, rows), torch.nan),
        evaluations=torch.ones(steps, rows, dtype=torch.long),
    )

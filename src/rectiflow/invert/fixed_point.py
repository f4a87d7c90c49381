"""Two-stage inversion, stage I: the implicit inverse step solved by fixed-point iteration.

A generation step ``x_{i+1} = x_i + h v(x_i, t_i)`` is inverted exactly by the solution of
``y = x_{i+1} − h v(y, t_i)``. Iterating this map converges to it where the step is short enough
for the map to contract (FTEdit, arXiv 2411.15843, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rectiflow.flow.solver import Velocity
from rectiflow.invert.result import InversionResult


def fixed_point_inversion(
    velocity: Velocity,
    x_1: Tensor,
    grid: Tensor,
    *,
    iterations: int = 2,
    tolerance: float = 0.0,
    average: bool = False,
    warm_start: bool = False,
) -> InversionResult:
    """Invert the Euler generation of an image, step by step from the image's end.

    Each row of the batch is solved by itself: it stops once it has converged, and it is damped
    once its iterates move apart (each new one is then averaged with the one before).

    Args:
        velocity: the field of the source prompt. A field whose rows differ has a method
            ``select(rows)``; rows that have converged are then left out of the evaluation.
        x_1: image latents, ``[B, ...]``, float32 or float64.
        grid: rising times ``[N + 1]``, the last that of the image.
        iterations: at most ``iterations + 1`` evaluations per step; 0 is Euler's inversion with
            the velocity at the noisier time.
        tolerance: stop a row when ``‖y^k − y^{k−1}‖ ≤ tolerance · ‖y^k‖``.
        average: return ``mean(y^1 … y^I)``, as the paper does, rather than the last iterate.
        warm_start: begin with the velocity of the step before instead of ``y^0 = x_{i+1}``.

    Returns:
        The trajectory with the residuals ``‖y^k − y^{k−1}‖ / ‖y^k‖`` of each step's last iterate.
    """
    steps, rows = len(grid) - 1, len(x_1)
    states = [x_1]
    residuals = torch.zeros(steps, rows)
    evaluations = torch.zeros(steps, rows, dtype=torch.long)
    slope: Tensor | None = None  # the velocity of the step before
    for step in reversed(range(steps)):
        t, h = grid[step], grid[step + 1] - grid[step]
        end = states[-1]
        y = end - h * slope if warm_start and slope is not None else end.clone()
        iterates: list[Tensor] = []
        damped = torch.zeros(rows, dtype=torch.bool)
        active = torch.arange(rows)
        for _ in range(iterations + 1):
            field = _select(velocity, active, rows)
            proposal = end[active] - h * field(y[active], t, step)
            damping = _column(damped[active], y) * 0.5
            proposal = torch.lerp(proposal, y[active], damping)
            moved = _norm(proposal - y[active]) / _norm(proposal).clamp_min(1e-12)
            first = evaluations[step, active] == 0
            damped[active] |= ~first & (moved > residuals[step, active])
            residuals[step, active] = moved
            evaluations[step, active] += 1
            y = y.index_copy(0, active.to(y.device), proposal)
            iterates.append(y)
            active = active[moved > tolerance]
            if len(active) == 0:
                break
        # A row that has converged stands still in later iterates; FTEdit's preset never stops one.
        x = torch.stack(iterates).mean(0) if average else y
        slope = (end - x) / h
        states.append(x)
    return InversionResult(torch.stack(states[::-1]), residuals, evaluations)


def _select(velocity: Any, active: Tensor, rows: int) -> Velocity:
    """The field of the active rows; a field without `select` treats all rows alike."""
    if len(active) == rows or not hasattr(velocity, "select"):
        field: Velocity = velocity
        return field
    chosen: Velocity = velocity.select(active)
    return chosen


def _norm(x: Tensor) -> Tensor:
    """Per-row Euclidean norm, on the CPU where the bookkeeping is."""
    return x.flatten(1).norm(dim=1).float().cpu()


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Per-row values shaped to broadcast against a state."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))

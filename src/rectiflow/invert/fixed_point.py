"""Two-stage inversion, stage I: the implicit inverse step solved by fixed-point iteration.

A generation step ``x_{i+1} = x_i + h v(x_i, t_i)`` is inverted exactly by the fixed point of
``G(y) = x_{i+1} − h v(y, t_i)``. Iterating G converges to it where the step is short enough for G
to contract (FTEdit, arXiv 2411.15843, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rectiflow.flow.solver import Velocity
from rectiflow.invert.result import InversionResult

LEAST_CUT = 0.1
"""A step that led astray is shortened to no less than this share of itself at a time."""


@runtime_checkable
class RowwiseVelocity(Protocol):
    """A field whose rows differ, by their prompts say, and can be asked for some rows alone."""

    def select(self, rows: Tensor) -> Velocity:
        """The field of the rows with these numbers, int64 ``[n]``."""
        ...


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

    Each row of the batch is solved by itself, whatever its company, and is evaluated no more once
    it has converged. Where an iterate is further from its image under G than the one before, as
    happens where G does not contract, the step that led to it is taken back and shortened.

    Args:
        velocity: the field of the source prompt; one whose rows differ is a `RowwiseVelocity`.
        x_1: image latents, ``[B, ...]``, float32 or float64.
        grid: rising times ``[N + 1]``, the last that of the image.
        iterations: at most ``iterations + 1`` evaluations per step; 0 is Euler's inversion with
            the velocity at the noisier time.
        tolerance: a row is done with a step when ``‖G(y) − y‖ ≤ tolerance · ‖G(y)‖``.
        average: return ``mean(y^1 … y^I)`` of the plain iteration, as the paper does, rather than
            the last iterate; no step is shortened then.
        warm_start: begin with the velocity of the step before instead of ``y^0 = x_{i+1}``.

    Returns:
        The trajectory, with the residuals ``‖G(y) − y‖ / ‖G(y)‖`` where the velocity was last
        taken; of an average, ``‖mean G(y) − mean y‖ / ‖mean G(y)‖``.
    """
    steps, rows = len(grid) - 1, len(x_1)
    states = [x_1]
    residuals = torch.zeros(steps, rows)
    evaluations = torch.zeros(steps, rows, dtype=torch.long)
    slope: Tensor | None = None  # the velocity of the step before
    for step in reversed(range(steps)):
        end, h = states[-1], grid[step + 1] - grid[step]
        start = end - h * slope if warm_start and slope is not None else end
        x, residuals[step], evaluations[step] = _fixed_point(
            _InverseStep(velocity, end, grid[step], h, step),
            start,
            iterations=iterations,
            tolerance=tolerance,
            average=average,
        )
        slope = (end - x) / h
        states.append(x)
    return InversionResult(torch.stack(states[::-1]), residuals, evaluations)


@dataclass(frozen=True, eq=False)
class _InverseStep:
    """``G(y) = x_{i+1} − h v(y, t_i)``, for some of the rows."""

    velocity: Velocity
    end: Tensor
    t: Tensor
    h: Tensor
    step: int

    def __call__(self, y: Tensor, rows: Tensor) -> Tensor:
        field = self.velocity
        if len(rows) < len(self.end) and isinstance(field, RowwiseVelocity):
            field = field.select(rows)
        return self.end[rows] - self.h * field(y, self.t, self.step)


def _fixed_point(
    step: _InverseStep, start: Tensor, *, iterations: int, tolerance: float, average: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's fixed point of G, its residual, and the evaluations it took."""
    rows = len(start)
    query, best, image_of_best = start.clone(), start.clone(), start.clone()
    total = torch.zeros_like(start)
    least = torch.full((rows,), torch.inf)  # ‖G(y) − y‖ at the best y so far
    share = torch.ones(rows)  # how far to go from there towards G(y)
    residuals = torch.zeros(rows)
    evaluations = torch.zeros(rows, dtype=torch.long)
    active = torch.arange(rows)
    for _ in range(iterations + 1):
        y = query[active]
        image = step(y, active)
        distance, size = _norm(image - y), _norm(image).clamp_min(1e-12)
        evaluations[active] += 1
        total[active] += image
        astray = torch.zeros(len(active), dtype=torch.bool)
        if not average:
            astray = distance > least[active]
            cut = _cut(image_of_best[active] - best[active], image - y)
            share[active] *= torch.where(astray, cut, 1.0)
        good, at = active[~astray], ~astray.to(y.device)
        best[good], image_of_best[good] = y[at], image[at]
        least[good], residuals[good] = distance[~astray], (distance / size)[~astray]
        query[active] = torch.lerp(
            best[active], image_of_best[active], _column(share[active], start)
        )
        active = active[distance > tolerance * size]
        if len(active) == 0:
            break
    if not average:
        return query, residuals, evaluations
    # The plain iteration ends at y^I: what it moved in all, shared out, is mean G(y) − mean y.
    mean = total / _column(evaluations, start)
    moved = _norm(query - start) / evaluations / _norm(mean).clamp_min(1e-12)
    return mean, moved, evaluations


def _cut(before: Tensor, after: Tensor) -> Tensor:
    """By how much to shorten a step: to where ``G(y) − y`` would be least, were it linear in y.

    Args:
        before: ``G(y) − y`` where the step began, ``[n, ...]``.
        after: the same where it led.
    """
    before, difference = before.flatten(1), (before - after).flatten(1)
    best = (before * difference).sum(1) / difference.square().sum(1).clamp_min(1e-24)
    return best.float().cpu().clamp(LEAST_CUT, 0.5)


def _norm(x: Tensor) -> Tensor:
    """Per-row Euclidean norm, on the CPU where the bookkeeping is."""
    return x.flatten(1).norm(dim=1).float().cpu()


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Per-row values shaped to broadcast against a state."""
    return values.to(like).view(-1, *[1] * (like.ndim - 1))

"""A time-symmetric two-step: exact at one evaluation per step, from a pair of states.

``x_{i−1} = x_{i+1} − (h_i + h_{i−1}) v(x_i, t_i)`` runs either way with the same evaluations, hence
reverses to rounding on any grid. It is second order on uniform ones (the leapfrog, or explicit
midpoint rule: Hairer, Nørsett & Wanner, III.3), with the leapfrog's parasitic mode.
There is no official code of it as an inversion.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rectiflow.flow.device import RowNumbers, take
from rectiflow.flow.solver import Solver, Velocity
from rectiflow.invert.presets import Preset
from rectiflow.invert.result import InversionResult
from rectiflow.invert.scheme import Scheme


class TwoStep(Scheme):
    """Starts with one Euler step from the image, asked at the image; N evaluations.

    Where that step asks is of no matter to exactness, as coming forth ``x_1`` is given and no step
    is Euler's; it asks at the state's own time, ``t_N``.
    """

    name = "two_step"

    def invert(
        self, velocity: Velocity, x_1: Tensor, grid: Tensor, preset: Preset, noise: Tensor | None
    ) -> InversionResult:
        """Leap back over each state to the one before."""
        h = grid.diff()
        # The generating step 0 asks nothing, so that number is free for the Euler step: what is
        # recorded under every other number is what that generating step will find.
        states = [x_1, x_1 - h[-1] * velocity(x_1, grid[-1], 0)]
        for step in range(len(h) - 1, 0, -1):
            v = velocity(states[-1], grid[step], step)
            states.append(states[-2] - (h[step] + h[step - 1]) * v)
        return InversionResult.unsolved(states)

    def solver(self, path: InversionResult, grid: Tensor, rows: RowNumbers) -> Solver:
        """The same leaps forward; from ``x_0`` alone they would be off, so ``x_1`` is given."""
        return Leapfrog(take(path.trajectory, rows, 1), grid)


class Leapfrog(Solver):
    """``x_{i+1} = x_{i−1} + (h_i + h_{i−1}) v(x_i, t_i)``. Order 2, one evaluation.

    The order is that on uniform grids. The first step asks nothing: every row goes to ``x_1``.
    Where a later step has no memory, it is Euler's, with what Euler's step along the path would
    miss added to it: exact on the path.

    Args:
        path: the states of the path that is followed, ``[N + 1, B, ...]``.
        grid: their times.
    """

    name, order, evaluations = "leapfrog", 2, 1

    def __init__(self, path: Tensor, grid: Tensor) -> None:
        self.path = path
        self.grid = grid

    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        """One leap, over `x` from the state before it, which is the memory."""
        if step == 0:
            return self.path[1], x
        leap = self.grid[step + 1] - self.grid[step - 1]
        v = velocity(x, t, step)
        if memory is not None:
            return memory + leap * v, x
        before, here, there = self.path[step - 1 : step + 2]
        missed = there - here - (t_next - t) / leap * (there - before)
        return x + (t_next - t) * v + missed, x

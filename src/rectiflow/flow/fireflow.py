"""FireFlow's solver: the midpoint rule whose predictor is the last step's midpoint velocity."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rectiflow.flow.solver import Solver, Velocity


class FireFlow(Solver):
    """Midpoint with ``v(x_i, t_i)`` replaced by the velocity at the last step's middle.

    Order 2, *one* evaluation per step and one more in the first: the predictor's error is O(h), so
    the middle is off by O(h²), like the midpoint rule's own. Not Adams–Bashforth, which follows a
    line through two velocities and asks at the step's beginning. Source: FireFlow, Deng et al.
    2024, arXiv 2412.07517.
    """

    name, order, evaluations = "fireflow", 2, 1

    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        """One step; the velocity at its middle is the memory."""
        h = t_next - t
        v = velocity(x, t, step) if memory is None else memory
        v = velocity(x + h / 2 * v, t + h / 2, step)
        return x + h * v, v

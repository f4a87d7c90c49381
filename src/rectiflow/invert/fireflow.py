"""FireFlow: a second-order inversion at the cost of a first-order one (arXiv 2412.07517).

The official code does the same.
"""

from __future__ import annotations

from torch import Tensor

from rectiflow.flow.device import RowNumbers
from rectiflow.flow.solver import FireFlow, Solver, Velocity
from rectiflow.invert.fixed_point import AcceptingVelocity
from rectiflow.invert.presets import Preset
from rectiflow.invert.result import InversionResult
from rectiflow.invert.scheme import Scheme


class FireFlowInversion(Scheme):
    """The midpoint rule with its first velocity reused, both ways; N + 1 evaluations.

    Features are kept of the middles alone, and no control acts on the evaluation that the edit
    begins with, as in the official code: no step of the inversion asks there.
    """

    name = "fireflow"
    accepts = True

    def invert(
        self, velocity: Velocity, x_1: Tensor, grid: Tensor, preset: Preset, noise: Tensor | None
    ) -> InversionResult:
        """Run the generation backwards."""
        states, memory = [x_1], None
        for step in reversed(range(len(grid) - 1)):
            x, memory = FireFlow().step(
                velocity, states[-1], grid[step + 1], grid[step], step, memory
            )
            states.append(x)
            # The step's middle, and not the image at which the first step asks before it.
            if isinstance(velocity, AcceptingVelocity):
                velocity.accept(step)
        result = InversionResult.unsolved(states)
        result.evaluations[-1] = 2  # the first step backwards has nothing to reuse
        return result

    def solver(self, path: InversionResult, grid: Tensor, rows: RowNumbers) -> Solver:
        """The same forward."""
        return FireFlow()

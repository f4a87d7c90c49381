"""Query offset: an exact inverse at one evaluation per step (DirectEdit, arXiv 2605.02417).

The inversion asks the field at the cleaner state, ``v_i = v(x_{i+1}, τ_i)``, and goes to
``x_i = x_{i+1} − h_i v_i``. The generating step asks the field where it was asked before: at
``x_i + Δ_i`` with ``Δ_i = x_{i+1} − x_i``, and at that time. Under the same prompt and guidance it
then returns ``x_{i+1}`` to rounding; a target's row uses the source's offsets. The time τ_i is that
of the state, t_{i+1}, with ``time="cleaner"``; DirectEdit's official code tells the network t_i
(`"noisier"`), both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rectiflow.flow.device import RowNumbers, take
from rectiflow.flow.solver import Solver, Velocity
from rectiflow.invert.presets import Preset
from rectiflow.invert.result import InversionResult
from rectiflow.invert.scheme import Scheme


class QueryOffset(Scheme):
    """Ask at the cleaner end going back, and at the same place coming forth."""

    name = "query_offset"

    def invert(
        self, velocity: Velocity, x_1: Tensor, grid: Tensor, preset: Preset, noise: Tensor | None
    ) -> InversionResult:
        """Euler inversion that remembers where it asked."""
        states, velocities = [x_1], []
        times = grid[1:] if preset.time == "cleaner" else grid[:-1]
        for step in reversed(range(len(grid) - 1)):
            v = velocity(states[-1], times[step], step)
            velocities.append(v)
            states.append(states[-1] - (grid[step + 1] - grid[step]) * v)
        trajectory = torch.stack(states[::-1])
        return InversionResult.unsolved(
            states,
            velocities=torch.stack(velocities[::-1]),
            offsets=trajectory.diff(dim=0),
            times=times.clone(),  # saved beside the grid
        )

    def solver(self, path: InversionResult, grid: Tensor, rows: RowNumbers) -> Solver:
        """Euler's step with the velocity of another place and time."""
        assert path.offsets is not None
        times = grid[1:] if path.times is None else path.times
        return OffsetEuler(take(path.offsets, rows, 1), times)


class OffsetEuler(Solver):
    """``x + h v(x + Δ_i, τ_i)``. Order 1, one evaluation.

    Args:
        offsets: ``Δ_i`` for each row of the state, ``[N, B, ...]``.
        times: ``τ_i``, ``[N]``.
    """

    name, order, evaluations = "offset_euler", 1, 1

    def __init__(self, offsets: Tensor, times: Tensor) -> None:
        self.offsets = offsets
        self.times = times

    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        """One step; nothing is remembered."""
        v = velocity(x + self.offsets[step], self.times[step], step)
        return x + (t_next - t) * v, None

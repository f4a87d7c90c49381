"""What every inversion scheme returns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from rectiflow.invert.features import FeatureStore


@dataclass(frozen=True, eq=False)
class InversionResult:
    """The path from noise to image that a scheme found, and how well it solved each step."""

    trajectory: Tensor
    """States ``x_0 … x_N`` at the grid's times, ``[N + 1, B, ...]``; the last is the image."""
    residuals: Tensor
    """Last movement of the state in each step, relative to its size: ``[N, B]``; NaN if unknown."""
    evaluations: Tensor
    """Evaluations of the field in each step, ``[N, B]``."""
    velocities: Tensor | None = None
    """``[N, B, ...]``: what the field said at ``x_i + offsets_i``, where the generating step will
    ask it again; None where the scheme has not asked there."""
    offsets: Tensor | None = None
    """``[N, B, ...]``: where the generating step asks the field, from ``x_i``; None for zero."""
    times: Tensor | None = None
    """``[N]``, on the CPU: the times the network is told there; None for the scheme's own."""
    features: FeatureStore | None = None
    """The network's features at those places, if they were recorded."""
    scheme: str | None = None
    """Of `SCHEMES`, what generates along the path, where that is not the preset's: a generated
    image's path is Euler's, however an image would have been inverted."""

    @classmethod
    def unsolved(
        cls,
        states: list[Tensor],
        evaluations: int = 1,
        velocities: Tensor | None = None,
        offsets: Tensor | None = None,
        times: Tensor | None = None,
    ) -> InversionResult:
        """The path of a scheme that does not know its residuals.

        Args:
            states: from the image to the noise.
            evaluations: of the field, in every step.
            velocities: as in the result.
            offsets: as in the result.
            times: as in the result.
        """
        steps, rows = len(states) - 1, len(states[0])
        return cls(
            trajectory=torch.stack(states[::-1]),
            residuals=torch.full((steps, rows), torch.nan),
            evaluations=torch.full((steps, rows), evaluations, dtype=torch.long),
            velocities=velocities,
            offsets=offsets,
            times=times,
        )

    def to(self, device: torch.device) -> InversionResult:
        """The same path with its states on another device."""
        moved = {
            name: found.to(device)
            for name in ("trajectory", "velocities", "offsets")
            if (found := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **moved)

    def under_another_prompt(self) -> InversionResult:
        """The states alone: velocities and features found under one prompt are not another's."""
        return dataclasses.replace(self, velocities=None, features=None)

    def correction(self, grid: Tensor, step: int) -> Tensor | None:
        """``x_{i+1} − x_i − h_i v_i``: what compensation adds to a step; None if unknown."""
        if self.velocities is None:
            return None
        here, there = self.trajectory[step], self.trajectory[step + 1]
        return there - here - (grid[step + 1] - grid[step]) * self.velocities[step]

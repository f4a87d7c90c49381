"""What every inversion scheme returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class InversionResult:
    """The path from noise to image that a scheme found, and how well it solved each step."""

    trajectory: Tensor
    """States ``x_0 … x_N`` at the grid's times, ``[N + 1, B, ...]``; the last is the image."""
    residuals: Tensor
    """Last movement of the state in each step, relative to its size: ``[N, B]``."""
    evaluations: Tensor
    """Evaluations of the field in each step, ``[N, B]``."""

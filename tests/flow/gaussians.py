"""The flow between N(0, I) and N(m, s² I) on the straight path, in closed form.

`x_t ~ N(t m, σ_t² I)` with `σ_t² = (1 - t)² + t² s²`, so `v(x, t) = m + (σ'/σ)(x - t m)`, the flow
is `Z_t = t m + σ_t Z_0`, and with q = σ_t², A = 1 + s²:
`σ'² = (A t - 1)² / q = A - s² / q` and `∫ dt / q = π / (2 s)` over [0, 1]. Hence
`S / d = ∫ σ'² dt - (s - 1)² = A - π s / 2 - (s - 1)² = s (2 - π / 2)`,
`σ'' = (A - σ'²) / σ = s² / σ³`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TwoGaussians:
    mean: float
    scale: float

    def sigma(self, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return ((1 - t) ** 2 + (self.scale * t) ** 2).sqrt()

    def velocity(self, x: Tensor, t: Tensor, step: int = 0) -> Tensor:
        slope = (t * self.scale**2 - (1 - t)) / ((1 - t) ** 2 + (self.scale * t) ** 2)
        return self.mean + slope * (x - t * self.mean)

    def state(self, x_0: Tensor, t: Tensor | float) -> Tensor:
        """Z_t."""
        return t * self.mean + self.sigma(t) * x_0

    def trajectory(self, x_0: Tensor, grid: Tensor) -> Tensor:
        return torch.stack([self.state(x_0, t) for t in grid])

    def epsilon(self, x_t: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """E[x_0 | x_t] where x_t = a x_1 + b x_0: regression of one Gaussian on another."""
        return b * (x_t - a * self.mean) / (a**2 * self.scale**2 + b**2)

    @property
    def straightness(self) -> float:
        """S / d for E x_0² = 1."""
        return self.scale * (2 - math.pi / 2)

    @property
    def transport_cost(self) -> float:
        """E ‖x_1 - x_0‖² / d."""
        return self.mean**2 + (self.scale - 1) ** 2

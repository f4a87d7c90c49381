"""Interpolation: the straight path from seeded noise to the image, for methods without inversion.

SDEdit (arXiv 2108.01073) noises an image and lets the target's prompt take over; FlowEdit needs no
path at all. The model is not asked. SDEdit's official code is for diffusion models: on a flow there
is none of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rectiflow.flow.solver import Velocity
from rectiflow.invert.presets import Preset
from rectiflow.invert.result import InversionResult
from rectiflow.invert.scheme import Scheme


class Interpolation(Scheme):
    """``x_i = (1 − t_i) ε + t_i x_1``; no evaluation."""

    name = "interpolation"
    noisy = True
    inverts = False

    def invert(
        self, velocity: Velocity, x_1: Tensor, grid: Tensor, preset: Preset, noise: Tensor | None
    ) -> InversionResult:
        """Noise the image."""
        assert noise is not None
        states = [torch.lerp(noise, x_1, t) for t in reversed(grid[:-1])]
        return InversionResult.unsolved([x_1, *states], evaluations=0)

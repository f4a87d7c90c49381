"""Masks on latents: where an edit may act."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rectiflow.invert.features import active_steps

MASK_STEPS = 0.3
"""Share of the steps over which a derived mask is gathered before it is used."""


class DerivedMask:
    """Where two prompts disagree about the velocity is where an edit belongs.

    The disagreement ``mean_channels |v_target − v_source|`` is averaged over the first steps,
    smoothed over neighbouring cells, and cut at a share of its largest value (after DiffEdit,
    arXiv 2210.11427, whose noise estimates become velocities here).
    """

    def __init__(self, threshold: float, steps: int) -> None:
        self.threshold = threshold
        self.steps = max(1, active_steps(MASK_STEPS, steps))
        self._maps: list[Tensor] = []

    def wants(self, step: int) -> bool:
        """Whether the disagreement of this step is to be added."""
        return step < self.steps

    def ready(self, step: int) -> bool:
        """Whether the mask can be used from this step on."""
        return step >= self.steps - 1

    def add(self, disagreement: Tensor) -> None:
        """Add the difference of the velocities ``[T, C, h, w]`` in one step."""
        self._maps.append(disagreement.abs().mean(1, keepdim=True))

    def mask(self) -> Tensor:
        """1 where the edit belongs, 0 where the source stays, soft between: ``[T, 1, h, w]``."""
        heat = torch.stack(self._maps).mean(0)
        heat = F.avg_pool2d(F.pad(heat, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        heat = heat / heat.amax((2, 3), keepdim=True).clamp_min(1e-12)
        return ((heat - 0.5 * self.threshold) / (0.5 * self.threshold)).clamp(0, 1)


def disagreement(difference: Tensor) -> Tensor:
    """How much two velocities differ in each cell, from 0 to 1 within each row, ``[B, 1, h, w]``.

    ``minmax(mean_channels |Δ|)`` (UniEdit-Flow, arXiv 2504.13109); 0 where they agree everywhere.

    Args:
        difference: Δ, ``[B, C, h, w]``.
    """
    size = difference.abs().mean(1, keepdim=True)
    low, high = size.amin((2, 3), keepdim=True), size.amax((2, 3), keepdim=True)
    return (size - low) / (high - low).clamp_min(1e-12)


def latent_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A pixel mask ``[B, 1, H, W]`` at the latents' size: a cell counts if any pixel does."""
    return F.adaptive_max_pool2d(mask, tuple(shape[-2:]))

"""Classifier-free guidance as a velocity field, and where a guidance scale goes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.device import RowNumbers
from rectiflow.models.base import FlowModel
from rectiflow.models.prompts import Conditioning


class GuidedVelocity:
    """A model's field under classifier-free guidance, `α v(x, t | c) + (1 - α) v(x, t | ∅)`.

    At α ≤ 1 this is the conditional field, as in diffusers, at one network sample per row.
    Otherwise both halves go through the network in one batch, [negative, prompt].

    Args:
        model: The network.
        cond: A prompt per row, or one for all.
        negative: What stands for ∅, likewise; the empty prompt if None. Not used at α ≤ 1.
        guidance_scale: With diffusers' meaning: α, or, where the network takes the guidance as an
            input, that input, whatever it is.
        true_cfg_scale: α of a network that takes the guidance as an input; another network takes
            it in the place of `guidance_scale` if it is above 1.

    Raises:
        InputError: A scale is negative or not finite.
    """

    def __init__(
        self,
        model: FlowModel,
        cond: Conditioning,
        negative: Conditioning | None = None,
        guidance_scale: float = 1.0,
        true_cfg_scale: float = 1.0,
    ) -> None:
        self.model = model
        self.on_step: Callable[[int], object] | None = None
        """Told the number of the step of every call."""
        self.cond, self.cfg_scale = guided(model, cond, guidance_scale, true_cfg_scale)
        self.samples_per_row = 1 if self.cfg_scale == 1 else 2
        self.negative: Conditioning | None = None
        if self.samples_per_row == 2:
            negative = model.encode_prompt("") if negative is None else negative
            self.negative, _ = guided(model, negative.as_negative(), guidance_scale)

    def __call__(self, x: Tensor, t: Tensor, step: int = 0) -> Tensor:
        """The velocity at `x` [B, C, h, w]."""
        if self.on_step is not None:
            self.on_step(step)
        cond = self.cond.rows(len(x))
        if self.negative is None:
            return self.model.velocity(x, t, cond)
        both = Conditioning.cat([self.negative.rows(len(x)), cond])
        unguided, prompted = self.model.velocity(torch.cat([x, x]), t, both).chunk(2)
        return self.model.combine(unguided, prompted, self.cfg_scale)

    def select(self, rows: RowNumbers) -> GuidedVelocity:
        """The field of some rows, for schemes that finish with rows one by one."""
        part = copy.copy(self)
        part.cond = self.cond if len(self.cond) == 1 else self.cond[rows]
        if self.negative is not None and len(self.negative) > 1:
            part.negative = self.negative[rows]
        return part


def guided(
    model: FlowModel, cond: Conditioning, guidance_scale: float, true_cfg_scale: float = 1.0
) -> tuple[Conditioning, float]:
    """Where a guidance scale goes: into the network's input, or into α.

    Returns:
        The prompts, with the network's guidance input if it has one, and α, which is 1 where there
        is no classifier-free guidance.

    Raises:
        InputError: A scale is negative or not finite.
    """
    check_guidance("guidance_scale", guidance_scale)
    check_guidance("true_cfg_scale", true_cfg_scale)
    if model.guidance_embeds:
        return cond.with_guidance(guidance_scale), max(1.0, true_cfg_scale)
    return cond, max(1.0, guidance_scale if true_cfg_scale <= 1 else true_cfg_scale)


def check_guidance(name: str, scale: float) -> None:
    """Refuse what is no guidance scale.

    Raises:
        InputError: It is negative or not finite.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise InputError(f"{name} is {scale}: give 0 or more; up to 1 is no guidance")

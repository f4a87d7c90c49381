"""What editing methods without controls share: a prompt's guided field, and the end of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from rectiflow.flow.solver import CountedVelocity
from rectiflow.invert.preset import Preset
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.prompts import Conditioning
from rectiflow.steer.masks import open_cells
from rectiflow.steer.task import EditTask, StepCallback


def prompted(
    model: FlowModel, cond: Conditioning, task: EditTask, preset: Preset
) -> CountedVelocity:
    """The field of prompts, a row each, under the guidance of a preset, counted."""
    return CountedVelocity(
        GuidedVelocity(model, cond, task.negative, preset.guidance_scale, preset.true_cfg_scale)
    )


def end_step(
    task: EditTask, step: int, target: Tensor, stays: Tensor, callback: StepCallback | None
) -> Tensor:
    """Where the task's mask is 0 take what stays, and call back.

    Args:
        task: its mask.
        step: the number of the step that ends.
        target: where it has led, ``[T, C, h, w]``.
        stays: where the sources are at that time, of each target's, ``[T, C, h, w]``.
        callback: called with the result.
    """
    if task.mask is not None:
        target = torch.lerp(stays, target, open_cells(task.mask))
    if callback is not None:
        callback(step, task.grid[step + 1], target)
    return target

"""All editing methods by name, and the one way to run them on latents."""

from __future__ import annotations

import torch

from rectiflow.invert.preset import Preset
from rectiflow.models.base import FlowModel
from rectiflow.steer.task import Edited, EditTask, Method, StepCallback
from rectiflow.steer.two_branch import two_branch

METHODS: dict[str, Method] = {"two_branch": two_branch}


@torch.no_grad()
def edit_latents(
    model: FlowModel,
    task: EditTask,
    preset: Preset,
    callback_on_step_end: StepCallback | None = None,
) -> Edited:
    """Edit a task by the method that a preset names."""
    return METHODS[preset.method](model, task, preset, callback_on_step_end)

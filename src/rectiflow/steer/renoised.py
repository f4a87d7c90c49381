"""Two branches along a renoised path, whatever way the image was inverted.

The inversion says what the model knows of the image, and brings it back; but an edit from its one
noise repeats in the new place what that noise made in the old one. So source and target go under
fresh noise at every step, with the source's features carried over (`invert/renoising.py`).
"""

from __future__ import annotations

import dataclasses

import torch

from rectiflow.invert.inverting import invert_latents
from rectiflow.invert.preset import Preset
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer.task import Edited, EditTask, StepCallback
from rectiflow.steer.two_branch import two_branch


@torch.no_grad()
def renoised(
    model: FlowModel,
    task: EditTask,
    preset: Preset,
    callback_on_step_end: StepCallback | None = None,
) -> Edited:
    """`two_branch` on the renoised path of the task's images, which is made here."""
    within = dataclasses.replace(preset, scheme="renoising", method="two_branch")
    path = invert_latents(
        GuidedVelocity(model, task.source),
        task.trajectory[-1],
        task.grid,
        within,
        seeds=task.seeds,
    )
    edited = two_branch(model, dataclasses.replace(task, path=path), within, callback_on_step_end)
    return dataclasses.replace(edited, nfe=edited.nfe + int(path.evaluations.sum()))

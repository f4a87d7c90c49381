"""All editing methods by name, and the one way to run them on latents."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from rectiflow.invert.features import check_controls
from rectiflow.invert.preset import Preset
from rectiflow.models.base import FlowModel
from rectiflow.progress import steps
from rectiflow.steer.dna_edit import dna_edit
from rectiflow.steer.flow_edit import flow_edit
from rectiflow.steer.masks import blended
from rectiflow.steer.rf_inversion import rf_inversion
from rectiflow.steer.task import Edited, EditTask, Method, StepCallback
from rectiflow.steer.two_branch import two_branch
from rectiflow.steer.uni_edit import uni_edit

METHODS: dict[str, Method] = {
    "two_branch": two_branch,
    "uni_edit": uni_edit,
    "flow_edit": flow_edit,
    "dna_edit": dna_edit,
    "rf_inversion": rf_inversion,
}


@torch.no_grad()
def edit_latents(
    model: FlowModel,
    task: EditTask,
    preset: Preset,
    callback_on_step_end: StepCallback | None = None,
    shown_as: str | None = None,
) -> Edited:
    """Edit a task by the method that a preset names, and blend what is grey in its mask.

    Raises:
        InputError: the preset acts on joint attentions, and the network has none.
    """
    check_controls(model, preset, windows=task.token_steps is not None)
    with steps(shown_as, len(task.grid) - 1) as took:

        def ended(step: int, *state: Any) -> Any:
            took(step)
            return callback_on_step_end and callback_on_step_end(step, *state)

        called = callback_on_step_end if shown_as is None else ended
        edited = METHODS[preset.method](model, task, preset, called)
    if edited.mask is None:
        return edited
    source = task.trajectory[-1][list(task.owners)]
    latents = blended(edited.latents, source, edited.mask)
    return dataclasses.replace(edited, latents=latents, whole=edited.latents)

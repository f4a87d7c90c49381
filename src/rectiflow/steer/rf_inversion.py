"""Generating drawn by an image (RF-Inversion, arXiv 2410.10792, algorithm 2).

    ``v̂ = v(x, t | target) + η ((x_image − x) / (1 − t) − v(x, t | target))``

Over the first steps the state is drawn towards the image, on which the straight line from it would
end; after them the prompt is alone. The network is told the time of the state. The official
pipeline does the same; its way to the noise is another (`rectiflow.invert.rf_inversion`).
"""

from __future__ import annotations

import torch

from rectiflow.flow.device import take
from rectiflow.flow.grid import active_steps
from rectiflow.invert.preset import Preset
from rectiflow.models.base import FlowModel
from rectiflow.steer.prompted import end_step, prompted
from rectiflow.steer.task import Edited, EditTask, StepCallback


@torch.no_grad()
def rf_inversion(
    model: FlowModel,
    task: EditTask,
    preset: Preset,
    callback_on_step_end: StepCallback | None = None,
) -> Edited:
    """Run the targets from the noise of their sources to images.

    η = 0 is plain generation; η = 1 in all steps returns the image.
    """
    owners = task.owners
    image, x = (take(task.trajectory[i], owners) for i in (-1, 0))
    field = prompted(model, task.target, task, preset)
    drawn = active_steps(preset.eta_ratio, task.steps)
    for step in range(task.steps):
        t, t_next = task.grid[step], task.grid[step + 1]
        v = field(x, t, step)
        if step < drawn:
            v = v + preset.eta * ((image - x) / (1 - t) - v)
        x = x + (t_next - t) * v
        there = take(task.trajectory[step + 1], owners)
        x = end_step(task, step, x, there, callback_on_step_end)
    return Edited(x, field.nfe, task.mask)

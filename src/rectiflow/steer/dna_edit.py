"""DNAEdit's editing: the target keeps to a clean image that moves with it (arXiv 2506.01430).

After the scheme ``dna``, with its offsets ``d`` and the velocities ``v̂`` found there, each step
from ``t`` over ``h`` is (the paper's σ is 1 − t, its velocity −v)

    ``v = v(x + d, t | target)``,  ``x_ref += h (v − v̂)``,
    ``x += h (η v + (1 − η) (x_ref − x) / (1 − t))``,

where ``x_ref`` begins as the image and is what the image would have become so far. The official
code does the same.
"""

from __future__ import annotations

import torch

from rectiflow.flow.device import take
from rectiflow.invert.preset import Preset
from rectiflow.models.base import FlowModel
from rectiflow.steer.prompted import end_step, prompted
from rectiflow.steer.task import Edited, EditTask, StepCallback


@torch.no_grad()
def dna_edit(
    model: FlowModel,
    task: EditTask,
    preset: Preset,
    callback_on_step_end: StepCallback | None = None,
) -> Edited:
    """Run the targets from the noised states of their sources to images.

    The path's own movement ``(x_{i+1} − x_i) / h`` stands for ``v̂``: for the scheme ``dna`` they
    are the same, and a path without offsets, a generated one, can be edited too. With equal
    prompts and guidance 1, η = 1 returns the image.
    """
    owners = task.owners
    reference, x = (take(task.trajectory[i], owners) for i in (-1, 0))
    field = prompted(model, task.target, task, preset)
    for step in range(task.steps):
        t, t_next = task.grid[step], task.grid[step + 1]
        here, there = (take(task.trajectory[i], owners) for i in (step, step + 1))
        asked = x if task.path.offsets is None else x + take(task.path.offsets[step], owners)
        v = field(asked, t, step)
        reference = reference + (t_next - t) * v - (there - here)
        v = preset.eta * v + (1 - preset.eta) * (reference - x) / (1 - t)
        x = end_step(task, step, x + (t_next - t) * v, there, callback_on_step_end)
    return Edited(x, field.nfe, task.mask)

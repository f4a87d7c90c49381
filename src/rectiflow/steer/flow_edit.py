"""FlowEdit: from image to image, without inversion (arXiv 2412.08629, algorithm 1).

Each step draws noise ε, makes a source and a target of it that differ as image and edit do, and
moves the edit by the difference of their velocities:

    ``z_source = t x + (1 − t) ε``,  ``z_target = z_edit + z_source − x``,
    ``z_edit += h mean[v(z_target, t | target) − v(z_source, t | source)]``.

The last ``n_min`` steps are plain sampling from ``z_edit + z_source − x`` with a last ε. The steps
gone are the paper's ``n_max``. The official code does the same, with noise of the device's own
generator.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rectiflow.flow.device import take
from rectiflow.flow.solver import CountedVelocity
from rectiflow.invert.preset import Preset
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import initial_noise
from rectiflow.steer.prompted import end_step, prompted
from rectiflow.steer.task import Edited, EditTask, StepCallback


@torch.no_grad()
def flow_edit(
    model: FlowModel,
    task: EditTask,
    preset: Preset,
    callback_on_step_end: StepCallback | None = None,
) -> Edited:
    """Carry the images of a task to their targets.

    Sources are under `source_guidance_scale`, which takes no `true_cfg_scale` but that of a network
    with a guidance input. With equal prompts and guidance, and no plain sampling, the image
    returns. Outside a mask the edit returns to the image in every step. The callback gets
    ``z_edit``, and the state in steps of plain sampling.
    """
    x, owners = task.trajectory[-1], task.owners
    sources = _sources(model, task, preset)
    targets = prompted(model, task.target, task, preset)
    draw = Draws(model, task, preset)
    image, plain = take(x, owners), task.steps - preset.n_min
    edit = image
    for step in range(plain):
        t, h = task.grid[step], task.grid[step + 1] - task.grid[step]
        moves = []
        for _ in range(preset.n_avg):
            z_source = t * x + (1 - t) * draw()
            z_target = edit + take(z_source - x, owners)
            moves.append(targets(z_target, t, step) - take(sources(z_source, t, step), owners))
        edit = edit + h * torch.stack(moves).mean(0)
        edit = end_step(task, step, edit, image, callback_on_step_end)
    if preset.n_min:
        noise, t = draw(), task.grid[plain]
        edit = edit + take((1 - t) * (noise - x), owners)
        for step in range(plain, task.steps):
            t, t_next = task.grid[step], task.grid[step + 1]
            edit = edit + (t_next - t) * targets(edit, t, step)
            stays = take(t_next * x + (1 - t_next) * noise, owners)
            edit = end_step(task, step, edit, stays, callback_on_step_end)
    return Edited(edit, sources.nfe + targets.nfe, task.mask)


def _sources(model: FlowModel, task: EditTask, preset: Preset) -> CountedVelocity:
    """The sources' field; α of a network with a guidance input is the same for both prompts."""
    own = dataclasses.replace(
        preset,
        guidance_scale=preset.source_guidance_scale,
        true_cfg_scale=preset.true_cfg_scale if model.guidance_embeds else 1.0,
    )
    return prompted(model, task.source, task, own)


class Draws:
    """Noise for the sources of a task, each from a generator of its own that goes on and on."""

    def __init__(self, model: FlowModel, task: EditTask, preset: Preset) -> None:
        self.model = model
        images = task.trajectory[-1]
        self.size = [side * model.factor for side in images.shape[-2:]]
        seeds = task.seeds or (preset.noise_seed,) * len(images)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self) -> Tensor:
        """The next draw from N(0, I), float32 ``[B, C, h, w]``."""
        height, width = self.size
        return initial_noise(self.model, self.generators, height, width)

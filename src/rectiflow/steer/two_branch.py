"""Two branches: the source retraces its path, the target leaves it for its prompt (FTEdit).

The source's row goes through the network only in the steps in which something needs it that is not
known from the inversion: its features, or its velocity for the compensation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.invert.features import active_steps, attention_points, text_points
from rectiflow.invert.preset import Preset
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models.base import FlowModel
from rectiflow.steer.attention_mask import AttentionMask
from rectiflow.steer.controls import AdaLNReplacement, AttentionInjection, Control, controlled
from rectiflow.steer.field import EditField
from rectiflow.steer.masks import DerivedMask
from rectiflow.steer.task import Edited, EditTask, StepCallback


def controls_of(model: FlowModel, preset: Preset, task: EditTask) -> list[Control]:
    """The controls a preset asks for; those that would act on no step are left out."""
    until = active_steps(preset.adaln_ratio, task.steps)
    if task.token_steps is not None:
        until = int(task.token_steps.max())
    controls: list[Control] = [
        AdaLNReplacement(task.token_maps, until, text_points(model), task.token_steps),
        AttentionInjection(
            active_steps(preset.attention_ratio, task.steps), attention_points(model, preset)
        ),
    ]
    return [control for control in controls if control.steps]


def derived_mask(
    model: FlowModel, preset: Preset, task: EditTask
) -> DerivedMask | AttentionMask | None:
    """What gathers the mask a preset asks for, unless one is given."""
    if task.mask is not None or not preset.mask_threshold:
        return None
    if preset.mask_from == "velocity":
        return DerivedMask(preset.mask_threshold, task.steps)
    if task.changed is None or task.deleted is None:
        raise InputError("mask_from 'attention' needs the changed words: edit by rectiflow.edit")
    return AttentionMask(
        model, preset.mask_threshold, task.steps, task.changed, task.deleted, task.trajectory.shape
    )


@torch.no_grad()
def two_branch(
    model: FlowModel,
    task: EditTask,
    preset: Preset,
    callback_on_step_end: StepCallback | None = None,
) -> Edited:
    """Run the targets from the noise of their sources to images (FTEdit, algorithm 2).

    With ``compensate="both"``, equal prompts and guidance give the source back to rounding; with
    ``"source"`` only the source's features are those of the true path; with ``"none"`` the
    source too runs free.
    """
    path, owners = task.path, list(task.owners)
    shared, free = preset.compensate == "both", preset.compensate == "none"
    mask, gatherer = task.mask, derived_mask(model, preset, task)
    watch = gatherer if isinstance(gatherer, AttentionMask) else None
    velocities = gatherer if isinstance(gatherer, DerivedMask) else None
    with controlled(model, controls_of(model, preset, task), watch) as network:
        field = EditField(network, task, preset, guided_sources=free or shared)
        # Inversion runs without guidance, also without that which a network takes as an input.
        as_inverted = field.scale == 1 and not (
            model.guidance_embeds and preset.guidance_scale != 1
        )
        known = path if preset.source_features == "inversion" and as_inverted else None
        seen = 0 if watch is None else watch.source_steps
        compared = 0 if velocities is None else velocities.steps
        last_use = max([c.steps for c in network.controls] + [seen, compared])
        source, target = task.trajectory[0], task.trajectory[0][owners]
        memory, rows = None, -1
        for step in range(task.steps):
            t, t_next = task.grid[step], task.grid[step + 1]
            if not free:
                source = task.trajectory[step]
            points = network.points(step)
            recorded = preset.source_features == "inversion" and (
                not points or (path.features is not None and path.features.covers(step, points))
            )
            correction = None if known is None else known.correction(task.grid, step)
            needed = (
                bool(points and not recorded)
                or (shared and correction is None)
                or step < seen
                or (free and step < last_use and not (recorded and not (seen or compared)))
                or (step < compared and correction is None)
            )
            x = torch.cat([source, target]) if needed else target
            if len(x) < rows:
                memory = _last_rows(memory, len(x))
            elif len(x) > rows:
                memory = None  # nothing is remembered of sources that come in later
            rows = len(x)
            owned = torch.tensor([*range(len(source))] * needed + owners)
            solver = SCHEMES[path.scheme or preset.scheme].solver(path, task.grid, owned)
            landed, memory = solver.step(field, x, t, t_next, step, memory)
            here = landed[: len(source)] if needed else None
            moved = landed[len(landed) - len(owners) :]
            if velocities is not None and velocities.wants(step):
                own = task.trajectory[step + 1] - correction if here is None else here  # type: ignore[operator]
                velocities.add((moved - target - (own - source)[owners]) / (t_next - t))
            if shared:
                if here is not None:
                    correction = task.trajectory[step + 1] - here
                assert correction is not None
                moved = moved + correction[owners]
            target = moved
            if free:  # where it is not run, its features are those of the path, so it is there
                source = task.trajectory[step + 1] if here is None else here
            if gatherer is not None and gatherer.ready(step):
                mask = gatherer.mask()
            if mask is not None:
                target = torch.lerp(task.trajectory[step + 1][owners], target, mask)
            if callback_on_step_end is not None:
                callback_on_step_end(step, t_next, target)
    return Edited(target, field.nfe, mask)


def _last_rows(memory: Any, count: int) -> Any:
    """What a solver remembers, for the last rows of the state alone: the sources have gone."""
    if isinstance(memory, tuple):
        return tuple(_last_rows(part, count) for part in memory)
    if isinstance(memory, Tensor) and memory.ndim > 0:
        return memory[len(memory) - count :]
    return memory

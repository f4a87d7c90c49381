"""Two branches: the source retraces its path, the target leaves it for its prompt (FTEdit).

The source's row goes through the network only in the steps in which something needs it that is not
known from the inversion: its features, or its velocity for the compensation. In FTEdit's official
code it goes through in every step, and the compensation reaches it alone (``compensate="source"``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.device import take
from rectiflow.flow.grid import active_steps
from rectiflow.invert.features import attention_points, text_points
from rectiflow.invert.preset import Preset
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models.base import FlowModel
from rectiflow.steer.attention_mask import AttentionMask
from rectiflow.steer.controls import AdaLNReplacement, AttentionInjection, Control, controlled
from rectiflow.steer.field import EditField
from rectiflow.steer.masks import DerivedMask, open_cells
from rectiflow.steer.task import Edited, EditTask, StepCallback


def controls_of(model: FlowModel, preset: Preset, task: EditTask) -> list[Control]:
    """The controls a preset asks for; those that would act on no step are left out."""
    until = active_steps(preset.adaln_ratio, task.steps)
    if task.token_steps is not None:
        until = int(task.token_steps.max())
    # Brought there once, not in every step.
    held = None if task.token_steps is None else task.token_steps.to(model.device)
    controls: list[Control] = [
        AdaLNReplacement(task.token_maps.to(model.device), until, text_points(model), held),
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


class _Source:
    """The source's row: where it is, what is known of it, and in which steps it has to run.

    Args:
        task: its path.
        preset: what is taken from it.
        field: the field of source and targets.
        seen: the steps in which its attention is watched.
        compared: the steps in which its velocity is held against the targets'.
    """

    def __init__(
        self, task: EditTask, preset: Preset, field: EditField, seen: int, compared: int
    ) -> None:
        self.task = task
        self.network = field.network
        self.shared, self.free = preset.compensate == "both", preset.compensate == "none"
        self.keeps = preset.source_features == "inversion"
        self.knows = self.keeps and field.as_inverted
        self.seen, self.compared = seen, compared
        self.last_use = max([c.steps for c in field.network.controls] + [seen, compared])
        self.state = task.trajectory[0]

    def correction(self, step: int) -> Tensor | None:
        """What compensation adds to a step, if it is known without running the source."""
        return self.task.path.correction(self.task.grid, step) if self.knows else None

    def runs(self, step: int) -> bool:
        """Whether something is wanted of it in a step that has not been kept."""
        points, features = self.network.points(step), self.task.path.features
        kept = not points or (features is not None and features.covers(step, points))
        kept = kept and self.keeps
        compared = step < self.compared
        return (
            (bool(points) and not kept)
            or step < self.seen
            or ((self.shared or compared) and self.correction(step) is None)
            # Running free it has to get where it will be wanted.
            or (self.free and step < self.last_use and not (kept and not self.seen + self.compared))
        )

    def begin(self, step: int) -> None:
        """Be where the path is, unless it runs free."""
        if not self.free:
            self.state = self.task.trajectory[step]

    def end(self, step: int, landed: Tensor | None) -> Tensor | None:
        """Go on from where the step landed, None if it did not run; the compensation, if known."""
        there = self.task.trajectory[step + 1]
        if self.free:  # where it is not run, its features are those of the path, so it is there
            self.state = there if landed is None else landed
        return self.correction(step) if landed is None else there - landed


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
    owners, path = task.owners, task.path
    mask, gatherer = task.mask, derived_mask(model, preset, task)
    watch = gatherer if isinstance(gatherer, AttentionMask) else None
    differences = gatherer if isinstance(gatherer, DerivedMask) else None
    with controlled(model, controls_of(model, preset, task), watch) as network:
        field = EditField(network, task, preset, guided_sources=preset.compensate != "source")
        source = _Source(
            task,
            preset,
            field,
            seen=0 if watch is None else watch.source_steps,
            compared=0 if differences is None else differences.steps,
        )
        target, memory, rows = take(task.trajectory[0], owners), None, 0
        for step in range(task.steps):
            t, t_next = task.grid[step], task.grid[step + 1]
            source.begin(step)
            here = source.state
            beside = len(here) if source.runs(step) else 0
            x = torch.cat([here[:beside], target])
            memory = _last_rows(memory, len(x)) if len(x) <= rows else None
            if len(x) != rows:
                rows, owned = len(x), [*range(beside), *owners]
                solver = SCHEMES[path.scheme or preset.scheme].solver(path, task.grid, owned)
            field.uncontrolled = solver.extra if memory is None else 0
            landed, memory = solver.step(field, x, t, t_next, step, memory)
            correction = source.end(step, landed[:beside] if beside else None)
            moved = landed[beside:]
            if differences is not None and differences.wants(step):
                assert correction is not None
                own = task.trajectory[step + 1] - correction - here
                differences.add((moved - target - take(own, owners)) / (t_next - t))
            target = moved
            if source.shared:
                assert correction is not None
                target = moved + take(correction, owners)
            if gatherer is not None and gatherer.ready(step):
                mask = gatherer.mask()
            if mask is not None:
                there = take(task.trajectory[step + 1], owners)
                target = torch.lerp(there, target, open_cells(mask))
            if callback_on_step_end is not None:
                callback_on_step_end(step, t_next, target)
    return Edited(target, field.nfe, mask)


def _last_rows(memory: Any, count: int) -> Any:
    """What a solver remembers, for the last rows of the state alone: the sources may have gone."""
    if isinstance(memory, tuple):
        return tuple(_last_rows(part, count) for part in memory)
    if isinstance(memory, Tensor) and memory.ndim > 0:
        return memory[len(memory) - count :]
    return memory

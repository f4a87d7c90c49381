"""Editing on latents: source rows retrace their path, target rows leave it for their prompt.

All rows of a step go through the network in one batch, laid out as [unconditional rows,
conditional rows] and sources before targets in each. A source's row is evaluated only in the
steps in which something needs it: a control reads its features, or its compensation is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rectiflow.invert.presets import Preset
from rectiflow.models.base import Conditioning, FlowModel
from rectiflow.steer.controls import (
    AdaLNReplacement,
    AttentionInjection,
    Control,
    ControlledNetwork,
    Rows,
    active_steps,
    controlled,
)

StepCallback = Callable[[int, Tensor, Tensor], None]
"""Called after each step with its number, the time reached and the target states."""
MASK_STEPS = 0.3
"""Share of the steps over which a derived mask is gathered before it is used."""


@dataclass(frozen=True)
class EditTask:
    """A batch of edits: T targets of B inverted sources."""

    trajectory: Tensor
    """float32 ``[N + 1, B, C, h, w]``, from noise to image."""
    grid: Tensor
    """Rising times ``[N + 1]``."""
    source: Conditioning
    """B rows."""
    target: Conditioning
    """T rows."""
    owners: tuple[int, ...]
    """Which source each target is edited from."""
    token_maps: Tensor
    """int64 ``[T, L]``."""
    negative: Conditioning | None = None
    """One row, what guidance pushes away from; not used at guidance 1."""
    mask: Tensor | None = None
    """``[T or 1, 1, h, w]`` in [0, 1]: 0 where the source has to stay."""


@dataclass(frozen=True)
class Edited:
    """What `edit_latents` returns."""

    latents: Tensor
    """``[T, C, h, w]``."""
    nfe: int
    """Network samples spent."""
    mask: Tensor | None
    """The mask that was given or derived, ``[T or 1, 1, h, w]``."""


def controls_of(preset: Preset, task: EditTask) -> list[Control]:
    """The controls a preset asks for; those that would act on no step are left out."""
    steps = len(task.grid) - 1
    controls: list[Control] = [
        AdaLNReplacement(task.token_maps, active_steps(preset.adaln_ratio, steps)),
        AttentionInjection(
            active_steps(preset.attention_ratio, steps), preset.inject, preset.features
        ),
    ]
    return [control for control in controls if control.steps]


@torch.no_grad()
def edit_latents(
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
    steps, owners = len(task.grid) - 1, list(task.owners)
    source, target = task.trajectory[0], task.trajectory[0][owners]
    mask, gatherer = task.mask, None
    if preset.mask_threshold and mask is None:
        gatherer = DerivedMask(preset.mask_threshold, steps)
    nfe = 0
    with controlled(model, controls_of(preset, task)) as network:
        ends = [control.steps for control in network.controls]
        last_use = max([*ends, 0 if gatherer is None else gatherer.steps])
        for step in range(steps):
            t, h = task.grid[step], task.grid[step + 1] - task.grid[step]
            if preset.compensate != "none":
                source = task.trajectory[step]
            free = preset.compensate == "none" and step < last_use
            gathering = gatherer is not None and gatherer.wants(step)
            shared = preset.compensate == "both"
            needed = bool(network.active(step)) or free or shared or gathering
            batch = _Batch(
                task, preset, source, target, with_source=needed, guided_source=free or shared
            )
            v_source, v_target = batch.velocities(network, t, step)
            nfe += batch.size
            if gathering and gatherer is not None and batch.disagreement is not None:
                gatherer.add(batch.disagreement)
            if shared and v_source is not None:
                compensation = (task.trajectory[step + 1] - source) / h - v_source
                v_target = v_target + compensation[owners]
            target = target + h * v_target
            if free and v_source is not None:
                source = source + h * v_source
            if gatherer is not None and gatherer.ready(step):
                mask = gatherer.mask()
            if mask is not None:
                target = torch.lerp(task.trajectory[step + 1][owners], target, mask)
            if callback_on_step_end is not None:
                callback_on_step_end(step, task.grid[step + 1], target)
    return Edited(target, nfe, mask)


class _Batch:
    """The rows of one evaluation."""

    def __init__(
        self,
        task: EditTask,
        preset: Preset,
        source: Tensor,
        target: Tensor,
        *,
        with_source: bool,
        guided_source: bool,
    ) -> None:
        self.guidance = preset.guidance_scale
        self.owners = list(task.owners)
        self.sources = len(source) if with_source else 0
        guided = self.guidance != 1
        # Unguided, a source's row is read for its features alone; no unconditional twin is needed.
        self.guided_sources = self.sources if guided and guided_source else 0
        states: list[Tensor] = []
        conditions: list[Conditioning] = []
        if guided:
            assert task.negative is not None
            states += [source[: self.guided_sources], target]
            conditions += [task.negative.repeat(self.guided_sources + len(target))]
        states += [source[: self.sources], target]
        conditions += [task.source[: self.sources], task.target]
        self.x = torch.cat(states)
        self.cond = Conditioning.cat(conditions)
        self.size = len(self.x)
        self.targets = len(target)
        first = self.size - self.targets
        sources_begin = first - self.sources
        self.rows = Rows(
            targets=tuple(range(first, self.size)) if self.sources else (),
            sources=tuple(sources_begin + owner for owner in self.owners) if self.sources else (),
            pairs=tuple(range(self.targets)) if self.sources else (),
        )
        self.disagreement: Tensor | None = None

    def velocities(
        self, network: ControlledNetwork, t: Tensor, step: int
    ) -> tuple[Tensor | None, Tensor]:
        """The guided velocities of sources (None when they were not evaluated) and targets."""
        v = network.velocity(self.x, t, self.cond, step, self.rows)
        conditional = v[self.size - self.targets - self.sources :]
        v_source, v_target = conditional.split([self.sources, self.targets])
        if self.sources:
            self.disagreement = (v_target - v_source[self.owners]).abs().mean(1, keepdim=True)
        if self.guidance != 1:
            unguided = v[: self.guided_sources + self.targets]
            u_source, u_target = unguided.split([self.guided_sources, self.targets])
            v_target = u_target + self.guidance * (v_target - u_target)
            if self.guided_sources:
                v_source = u_source + self.guidance * (v_source - u_source)
        return (v_source if self.sources else None), v_target


class DerivedMask:
    """Where two prompts disagree about the velocity is where an edit belongs.

    The disagreement ``mean_channels |v_target − v_source|`` is averaged over the first steps,
    smoothed over neighbouring cells, and cut at a share of its largest value (after DiffEdit,
    arXiv 2210.11427, whose noise estimates become velocities here).
    """

    def __init__(self, threshold: float, steps: int) -> None:
        self.threshold = threshold
        self.steps = max(1, active_steps(MASK_STEPS, steps))
        self._maps: list[Tensor] = []

    def wants(self, step: int) -> bool:
        """Whether the disagreement of this step is to be added."""
        return step < self.steps

    def ready(self, step: int) -> bool:
        """Whether the mask can be used from this step on."""
        return step >= self.steps - 1

    def add(self, disagreement: Tensor) -> None:
        """Add the disagreement ``[T, 1, h, w]`` of one step."""
        self._maps.append(disagreement)

    def mask(self) -> Tensor:
        """1 where the edit belongs, 0 where the source stays, soft between: ``[T, 1, h, w]``."""
        heat = torch.stack(self._maps).mean(0)
        heat = F.avg_pool2d(F.pad(heat, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        heat = heat / heat.amax((2, 3), keepdim=True).clamp_min(1e-12)
        return ((heat - 0.5 * self.threshold) / (0.5 * self.threshold)).clamp(0, 1)


def latent_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A pixel mask ``[B, 1, H, W]`` at the latents' size: a cell counts if any pixel does."""
    return F.adaptive_max_pool2d(mask, tuple(shape[-2:]))

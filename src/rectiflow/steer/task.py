"""What an editing method is given, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rectiflow.invert.preset import Preset
from rectiflow.invert.result import InversionResult
from rectiflow.models.base import FlowModel
from rectiflow.models.prompts import Conditioning

StepCallback = Callable[[int, Tensor, Tensor], None]
"""Called after each step with its number, the time reached and the target states."""


@dataclass(frozen=True)
class EditTask:
    """A batch of edits: T targets of B inverted sources."""

    path: InversionResult
    """Of B sources; what it holds of velocities and features is of the prompts in `source`."""
    grid: Tensor
    """Rising times ``[N + 1]``, on the CPU."""
    source: Conditioning
    """B rows: what the sources show, whatever prompt they were inverted under."""
    target: Conditioning
    """T rows."""
    owners: tuple[int, ...]
    """Which source each target is edited from."""
    token_maps: Tensor
    """int64 ``[T, L]``."""
    negative: Conditioning | None = None
    """One row, what guidance pushes away from; not used at guidance 1."""
    mask: Tensor | None = None
    """``[T or 1, 1, h, w]`` in [0, 1]: the share of the edit's change that the result has."""
    token_steps: Tensor | None = None
    """int64 ``[T, L]``: until which step each unchanged token is held; None for the preset's."""
    changed: Tensor | None = None
    """bool ``[T, L]``: the targets' new words; for masks from attention (`changed_tokens`)."""
    deleted: Tensor | None = None
    """bool ``[T, L]``: the words of their sources that they lack; likewise."""
    seeds: tuple[int, ...] = ()
    """Of the noise that a method draws, one per source; the preset's for all if empty."""

    @property
    def trajectory(self) -> Tensor:
        """The sources' states, float32 ``[N + 1, B, C, h, w]``, from noise to image."""
        return self.path.trajectory

    @property
    def steps(self) -> int:
        """N, the steps that are gone."""
        return len(self.grid) - 1


@dataclass(frozen=True)
class Edited:
    """What an editing method returns."""

    latents: Tensor
    """``[T, C, h, w]``."""
    nfe: int
    """Network samples spent."""
    mask: Tensor | None = None
    """The mask that was given or derived, ``[T or 1, 1, h, w]``."""
    whole: Tensor | None = None
    """The latents before what is grey in the mask was blended with the source; `edit_latents` does
    that, and sets this."""


Method = Callable[[FlowModel, EditTask, Preset, StepCallback | None], Edited]
"""Edits a task by a preset. Where a mask is 0 the source stays; the callback is called."""

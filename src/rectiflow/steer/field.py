"""The field of a batch of edits: sources and targets through the network together, and counted."""

from __future__ import annotations

import torch
from torch import Tensor

from rectiflow.flow.device import take
from rectiflow.invert.preset import Preset
from rectiflow.models.guidance import guided
from rectiflow.models.prompts import Conditioning
from rectiflow.steer.controls import ControlledNetwork, Kept, Rows
from rectiflow.steer.task import EditTask


class EditField:
    """The velocity of states ``[S + T, ...]``: S sources, all of them or none, then T targets.

    In the network a batch is laid out as [unconditional rows, conditional rows], sources before
    targets in each. Without sources, controls take the features kept by the inversion.

    Args:
        network: with the controls installed.
        task: whose prompts.
        preset: the guidance.
        guided_sources: whether the sources' velocity is wanted, under guidance like the targets'.
            If not, they are read for their features alone and need no unconditional twin.
    """

    def __init__(
        self,
        network: ControlledNetwork,
        task: EditTask,
        preset: Preset,
        guided_sources: bool,
    ) -> None:
        model, scales = network.network.model, (preset.guidance_scale, preset.true_cfg_scale)
        self.network = network
        self.task = task
        self.target, self.scale = guided(model, task.target, *scales)
        self.as_inverted = self.scale == 1 and not (
            model.guidance_embeds and preset.guidance_scale != 1
        )
        """Whether the targets run as sources are inverted: without guidance of either sort."""
        # A source is replayed as it was inverted, unless it has to run under the guidance too.
        self.guided_sources = guided_sources
        self.source, _ = guided(model, task.source, *(scales if guided_sources else (1.0, 1.0)))
        self.negative: Conditioning | None = None
        if self.scale != 1:
            negative = model.encode_prompt("") if task.negative is None else task.negative
            self.negative, _ = guided(model, negative.as_negative(), *scales)
        self.nfe = 0
        self.uncontrolled = 0
        """The evaluations next to come on which no control acts: those that a solver begins with
        and that are no step's own (FireFlow's, as its official code has it)."""
        self._step, self._inner = -1, 0

    def __call__(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        """The velocities of all rows; those of unguided sources are their conditional ones."""
        if step != self._step:
            self._step, self._inner = step, 0
        targets = len(self.target)
        sources = len(x) - targets
        twins = 0 if self.negative is None else targets + sources * self.guided_sources
        own = x[:0] if twins == 0 else x[len(x) - twins :]
        cond = Conditioning.cat([self.source, self.target]) if sources else self.target
        if self.negative is not None:
            cond = Conditioning.cat([self.negative.rows(twins), cond])
        free = self.uncontrolled > 0
        self.uncontrolled -= free
        v = self.network.velocity(
            torch.cat([own, x]),
            t,
            cond,
            step,
            self._rows(twins, sources, 0 if free else targets),
            None if sources else self._kept(step, self._inner, x.device),
        )
        self.nfe += twins + len(x)
        self._inner += not free
        if not twins:
            return v
        unguided, prompted = v[:twins], v[twins:]
        combined = self.network.network.model.combine(unguided, prompted[-twins:], self.scale)
        return torch.cat([prompted[:-twins], combined])

    def _rows(self, twins: int, sources: int, targets: int) -> Rows:
        first = twins + sources
        return Rows(
            targets=tuple(range(first, first + targets)),
            sources=tuple(twins + owner for owner in self.task.owners) if sources else (),
            pairs=tuple(range(targets)),
        )

    def _kept(self, step: int, inner: int, device: torch.device) -> Kept | None:
        store, owners = self.task.path.features, self.task.owners
        if store is None:
            return None
        return lambda point: take(store.get(step, inner, point, device), owners)

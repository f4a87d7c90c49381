"""What is minimised: a module that owns the student's network and gives the loss of each sample.

The network is a submodule and is reached through `forward`, so that whatever wraps modules
(distributed data parallel, sharding, compiling, checkpointing) wraps this one as any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from rectiflow.models.base import FlowModel
from rectiflow.models.prompts import Conditioning
from rectiflow.straighten.coupling import column
from rectiflow.straighten.losses import (
    HUBER,
    PERCEPTUAL,
    LossName,
    Perceptual,
    l2,
    pseudo_huber,
)

PREFIX = "cond_"
ROWS = "rows_"


def pack(cond: Conditioning) -> dict[str, Tensor]:
    """Embedded prompts as tensors of a batch, which trainers know how to move."""
    fields = {field.name: getattr(cond, field.name) for field in dataclasses.fields(cond)}
    return {f"{PREFIX}{name}": part for name, part in fields.items() if part is not None}


def unpack(tensors: Mapping[str, Tensor]) -> Conditioning:
    """The inverse of `pack`."""
    return Conditioning(**{name.removeprefix(PREFIX): part for name, part in tensors.items()})


def rows_by_step(steps: Tensor) -> dict[str, Tensor]:
    """Which samples take a first step, a second, …: int64 tensors of a batch.

    They are part of the batch since an accelerator cannot say how many there are without being
    waited for.

    Args:
        steps: In how many steps each sample goes, int64 [B], on the CPU.

    Example:
        >>> rows_by_step(torch.tensor([1, 2]))
        {'rows_1': tensor([0, 1]), 'rows_2': tensor([1])}
    """
    taken = range(1, int(steps.max()) + 1)
    return {f"{ROWS}{k}": torch.nonzero(steps >= k)[:, 0] for k in taken}


class Objective(nn.Module):
    """The part that all have in common.

    Args:
        model: The student; its network's parameters are this module's.
        loss: One of the names in `losses`.
        huber: c of the pseudo-Huber loss, per dimension.
        perceptual: The distance of pictures, for losses that have one.
    """

    def __init__(
        self,
        model: FlowModel,
        loss: LossName = "l2",
        *,
        huber: float = HUBER,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__()
        self.network: nn.Module = model.network
        self.model = model  # no module itself, so nothing of it is registered a second time
        self.loss: LossName = loss
        self.huber = huber
        if (loss in PERCEPTUAL) != (perceptual is not None):
            raise ValueError(f"loss {loss} and perceptual distance {perceptual} do not go together")
        self.perceptual = perceptual

    def residual_loss(self, residual: Tensor) -> Tensor:
        """The loss of a difference of latents or velocities, [B]."""
        return l2(residual) if self.loss == "l2" else pseudo_huber(residual, self.huber)


class VelocityObjective(Objective):
    """Regression of the velocity at one time per sample: flow matching, reflow, windows.

    Args:
        model: The student.
        loss: As in `Objective`.
        own_prediction: Measure the error of what the network itself predicts (ε, say) instead of
            the velocity's: Rectified Diffusion, Wang et al. 2024, arXiv 2410.07303.
        huber: As in `Objective`.
        perceptual: As in `Objective`.
    """

    def __init__(
        self,
        model: FlowModel,
        loss: LossName = "l2",
        *,
        own_prediction: bool = False,
        huber: float = HUBER,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__(model, loss, huber=huber, perceptual=perceptual)
        self.own_prediction = own_prediction

    def forward(self, x: Tensor, t: Tensor, target: Tensor, **cond: Tensor) -> Tensor:
        """The loss of each sample, [B].

        Args:
            x: States [B, C, h, w].
            t: Their times [B].
            target: The velocities there.
            **cond: As `pack` gives them.
        """
        v = self.model.differentiable_velocity(x, t, unpack(cond))
        if self.perceptual is None:
            residual = v - target
            if self.own_prediction:
                residual = residual * column(prediction_scale(self.model, t), residual)
            return self.residual_loss(residual)
        # Where the straight line through (t, x) would end.
        rest = column(1 - t, x)
        seen = self.perceptual(x + rest * v, x + rest * target)
        if self.loss == "lpips":
            return seen
        # Lee et al. 2024, arXiv 2405.20320, eq. 7, where time runs the other way.
        return t * self.residual_loss(v - target) + seen


class EndObjective(Objective):
    """Distillation: the end of the student's own Euler steps against the latents.

    Gradients go through all steps. In one batch samples may take different numbers of steps.

    Args:
        model: The student.
        grids: Its grid [k + 1] for every number of steps k.
        loss: As in `Objective`; lpips_huber adds the two up.
        huber: As in `Objective`.
        perceptual: As in `Objective`.
    """

    table: Tensor

    def __init__(
        self,
        model: FlowModel,
        grids: Mapping[int, Tensor],
        loss: LossName = "l2",
        *,
        huber: float = HUBER,
        perceptual: Perceptual | None = None,
    ) -> None:
        super().__init__(model, loss, huber=huber, perceptual=perceptual)
        self.most = max(grids)
        # Row k is the grid of k steps, and stays at its end.
        table = torch.ones(self.most + 1, self.most + 1)
        for steps, grid in grids.items():
            table[steps] = float(grid[-1])
            table[steps, : steps + 1] = grid
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor, target: Tensor, steps: Tensor, **given: Tensor) -> Tensor:
        """The loss of each sample, [B].

        Args:
            x: States at the field's first time, [B, C, h, w].
            target: The latents to reach.
            steps: In how many steps, int64 [B].
            **given: As `pack` and `rows_by_step` give them.
        """
        rows = {name: part for name, part in given.items() if name.startswith(ROWS)}
        cond = unpack({name: part for name, part in given.items() if name not in rows})
        x = self.end(x, steps, cond, rows)
        if self.perceptual is None:
            return self.residual_loss(x - target)
        seen = self.perceptual(x, target)
        return seen if self.loss == "lpips" else self.residual_loss(x - target) + seen

    def end(
        self, x: Tensor, steps: Tensor, cond: Conditioning, moving: Mapping[str, Tensor]
    ) -> Tensor:
        """Where each row gets in its number of steps; `moving` as from `rows_by_step`."""
        grids = self.table[steps]
        for now, after in pairwise(range(self.most + 1)):
            rows = moving.get(f"{ROWS}{after}")
            if rows is None:
                if not _in_company():
                    break
                rows = steps.new_zeros(1)  # a step of length 0
            t, h = grids[rows, now], grids[rows, after] - grids[rows, now]
            if len(rows) == len(x):
                x = x + column(h, x) * self.model.differentiable_velocity(x, t, cond)
            else:
                v = self.model.differentiable_velocity(x[rows], t, cond[rows])
                x = x.index_add(0, rows, column(h, x) * v)
        return x


def prediction_scale(model: FlowModel, t: Tensor) -> Tensor:
    """By how much an error of the velocity at `t` [B] is one of the network's own prediction.

    At a given state predictions are affine in each other: ε = x - s v has s times the velocity's
    error, x_1 = x + (1 - s) v has 1 - s times it, and diffusion-v has -√(s² + (1 - s)²) times it
    (only the size is returned).
    """
    path = model.diffusion_path
    s = t if path is None else t.clamp(path.s_min, path.s_max)
    match model.prediction_type:
        case "epsilon":
            return s
        case "sample":
            return 1 - s
        case "v_prediction":
            return torch.hypot(s, 1 - s)
    return torch.ones_like(s)


def _in_company() -> bool:
    """Whether other processes wait for this one's network (sharded, they call it together)."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()

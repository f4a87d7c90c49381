"""Couplings by a teacher that works while its student trains: nothing is stored.

What is made for a batch is forgotten after it. Like every coupling, these are functions of the
sample's number; with the batch, a network's results can differ in their last bits.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.grid import uniform
from rectiflow.flow.solver import integrate
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import generate_latents
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.straighten.coupling import Coupling, Piece, stored_noise
from rectiflow.straighten.times import draw_windows, uniforms

Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model that makes latents while training, and what it is told.

    Args:
        model: It is used, never trained.
        solver: As in `generate_latents`; for windows one of `flow.SOLVERS`.
        num_inference_steps: N; within a window, its share.
        guidance_scales: Each sample draws one of these.
        negative_prompt: As in `generate_latents`.
    """

    model: FlowModel
    solver: str
    num_inference_steps: int
    guidance_scales: tuple[float, ...]
    negative_prompt: str | None = None

    def scales(self, seed: int, numbers: Sequence[int]) -> list[float]:
        """The guidance scale of each sample."""
        u = uniforms(seed, "guidance", numbers)[:, 0].tolist()
        count = len(self.guidance_scales)
        return [self.guidance_scales[min(int(v * count), count - 1)] for v in u]


@dataclass(frozen=True, eq=False)
class OnlineTeacher:
    """Pairs made on the fly, none of them kept.

    Sample n has the noise of pair n in a store whose base seed is `seed`, and its prompt.

    Args:
        teacher: Who makes them.
        prompts: Sample n has number n modulo their count.
        latent_shape: [C, h, w].
        seed: Of the run.
    """

    teacher: Teacher
    prompts: Sequence[str]
    latent_shape: tuple[int, int, int]
    seed: int

    def __call__(self, numbers: Sequence[int]) -> Piece:
        """The samples of these numbers."""
        x_0 = stored_noise(self.seed, numbers, self.latent_shape)
        prompts = [self.prompts[number % len(self.prompts)] for number in numbers]
        scales = self.teacher.scales(self.seed, numbers)
        x_1 = torch.empty_like(x_0)
        for scale, rows in by_value(scales).items():
            x_1[rows] = self._latents(x_0[rows], [prompts[row] for row in rows], scale)
        return Piece.whole(x_0, x_1, prompts, torch.tensor(scales))

    def _latents(self, x_0: Tensor, prompts: list[str], scale: float) -> Tensor:
        teacher = self.teacher
        solution = generate_latents(
            teacher.model,
            prompts,
            x_0.to(teacher.model.device),
            negative_prompt=teacher.negative_prompt,
            num_inference_steps=teacher.num_inference_steps,
            guidance_scale=scale,
            solver=teacher.solver,
        )
        return solution.x.float().cpu()


@dataclass(frozen=True, eq=False)
class Windows:
    """Straight pieces between points of the teacher's own trajectories.

    The times between `edges` are windows; within its own, each sample goes straight from where the
    teacher enters to where it leaves. Source: PeRFlow, Yan et al. 2024, arXiv 2405.07510, eq. 6,
    which starts from noised images, as `inner` with `noised` does; ProReflow, Ke et al. 2025, arXiv
    2503.04824, uses fewer windows phase after phase.

    Args:
        teacher: Whose trajectories; `num_inference_steps` over all windows, at least one in each.
        edges: Times [K + 1], rising: the grid of the K-step student.
        inner: Where noise, prompts and (for `noised`) latents come from.
        seed: Of the run.
        noised: Enter the window at `(1 - t) x_0 + t x_1` of `inner`, rather than by following the
            teacher from the noise on.
    """

    teacher: Teacher
    edges: Tensor
    inner: Coupling
    seed: int
    noised: bool = False

    def __call__(self, numbers: Sequence[int]) -> Piece:
        """The samples of these numbers."""
        whole = self.inner(numbers)
        windows = draw_windows(self.edges, self.seed, numbers)
        scales = self.teacher.scales(self.seed, numbers)
        start, end = torch.empty_like(whole.x_0), torch.empty_like(whole.x_0)
        for (window, scale), rows in by_value(
            list(zip(windows.tolist(), scales, strict=True))
        ).items():
            start[rows], end[rows] = self._ends(
                whole.x_0[rows],
                whole.x_1[rows],
                [whole.prompts[row] for row in rows],
                window,
                scale,
            )
        edges = self.edges.double()
        return Piece(
            start, end, whole.prompts, edges[windows], edges[windows + 1], torch.tensor(scales)
        )

    def _ends(
        self, x_0: Tensor, x_1: Tensor, prompts: list[str], window: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        model = self.teacher.model
        negative = self.teacher.negative_prompt
        field = GuidedVelocity(
            model,
            model.encode_prompt(prompts),
            None if negative is None else model.encode_prompt(negative),
            scale,
        )
        if self.noised:
            x = torch.lerp(x_0, x_1, self.edges[window].to(x_0)).to(model.device)
        else:
            x = model.initial_state(x_0.to(model.device))
            for before in range(window):
                x = integrate(field, x, self._grid(before), self.teacher.solver).x
        reached = integrate(field, x, self._grid(window), self.teacher.solver).x
        return x.float().cpu(), reached.float().cpu()

    def _grid(self, window: int) -> Tensor:
        low, high = self.edges[window].double(), self.edges[window + 1].double()
        share = float((high - low) / (self.edges[-1] - self.edges[0]))
        steps = max(1, round(self.teacher.num_inference_steps * share))
        return low + (high - low) * uniform(steps)


@dataclass(frozen=True)
class NoiseAlone:
    """Noise and prompts with no latents, for windows that follow the teacher from the noise on.

    Args:
        prompts: As in `OnlineTeacher`.
        latent_shape: [C, h, w].
        seed: Of the run.
    """

    prompts: Sequence[str]
    latent_shape: tuple[int, int, int]
    seed: int

    def __call__(self, numbers: Sequence[int]) -> Piece:
        """The samples of these numbers; their `x_1` is their `x_0`."""
        x_0 = stored_noise(self.seed, numbers, self.latent_shape)
        return Piece.whole(x_0, x_0, [self.prompts[n % len(self.prompts)] for n in numbers])


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuse an empty list.

    Raises:
        InputError: There is none.
    """
    if not prompts:
        raise InputError("there are no prompts: give a file with one a line")


def by_value(values: Sequence[Value]) -> dict[Value, list[int]]:
    """The rows in which each value stands."""
    rows: dict[Value, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(value, []).append(row)
    return rows

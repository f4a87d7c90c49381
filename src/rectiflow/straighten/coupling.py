"""Couplings: which noise is trained to become which latents, as functions of sample numbers.

A training sample lies on a straight `Piece` of a path. What a coupling gives for a number never
depends on the other numbers asked for, nor on what was asked before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rectiflow.models.base import FlowModel
from rectiflow.straighten.times import noise_seed

Schedule = Literal["linear", "cosine", "exponential"]


@dataclass(frozen=True, eq=False)
class Piece:
    """Straight pieces of paths, one a row: from `x_0` at `t_0` to `x_1` at `t_1`."""

    x_0: Tensor
    """float32 [B, C, h, w]: noise, where `t_0` is 0."""
    x_1: Tensor
    """Latents, where `t_1` is 1."""
    prompts: list[str]
    t_0: Tensor
    """float64 [B]."""
    t_1: Tensor
    """float64 [B]."""
    guidance: Tensor | None = None
    """float32 [B]: the guidance scale that made `x_1`, for a network that is told it."""

    @classmethod
    def whole(
        cls, x_0: Tensor, x_1: Tensor, prompts: list[str], guidance: Tensor | None = None
    ) -> Piece:
        """The whole way, from time 0 to time 1."""
        zeros = torch.zeros(len(x_0), dtype=torch.float64)
        return cls(x_0, x_1, prompts, zeros, zeros + 1, guidance)

    @property
    def velocity(self) -> Tensor:
        """`(x_1 - x_0) / (t_1 - t_0)`, float32 [B, C, h, w]."""
        return (self.x_1 - self.x_0) / column(self.t_1 - self.t_0, self.x_0)

    def at(self, t: Tensor) -> Tensor:
        """The states at times [B]."""
        share = column((t - self.t_0) / (self.t_1 - self.t_0), self.x_0)
        return torch.lerp(self.x_0, self.x_1, share)

    def started_from(self, model: FlowModel) -> Piece:
        """The same ends, begun where a field begins: at `t_min`, from `initial_state(x_0)`.

        The field that a diffusion network defines exactly has no time 0. Its sampler sets out from
        noise alone at t_min > 0, where the straight line from x_0 would hold a trace of x_1
        already: this piece is the line that the student is really to follow.
        """
        start = model.initial_state(self.x_0)
        return replace(self, x_0=start, t_0=torch.full_like(self.t_0, model.t_min))


class Coupling(Protocol):
    """A joint law of noise and latents, drawn from by number."""

    def __call__(self, numbers: Sequence[int]) -> Piece:
        """The samples of these numbers, on the CPU; a pure function of each."""
        ...


class Rows(Protocol):
    """What is needed of the pairs of a store (`pair_batch.PairBatch`)."""

    x_0: Tensor
    """float32 [B, C, h, w]."""
    x_1: Tensor
    """Of that shape."""
    prompts: list[str]
    """One a row."""


@dataclass(frozen=True)
class StoredPairs:
    """Pairs of a store, in the order of training: the coupling of reflow and distillation.

    Args:
        samples: The pairs of given sample numbers (`curation.Curated.samples` and its like).
        guidance: The guidance scale they were made with, for a network that is told it.
    """

    samples: Callable[[Sequence[int]], Any]
    guidance: float | None = None

    def __call__(self, numbers: Sequence[int]) -> Piece:
        """The samples of these numbers."""
        found: Rows = self.samples(numbers)
        guidance = None if self.guidance is None else torch.full((len(numbers),), self.guidance)
        return Piece.whole(found.x_0, found.x_1, list(found.prompts), guidance)


@dataclass(frozen=True)
class Independent:
    """The latents of another coupling with noise of their own: flow matching.

    Args:
        inner: Where the latents come from.
        seed: Of the run; sample n's noise is drawn from a seed that it and n make.
    """

    inner: Coupling
    seed: int

    def __call__(self, numbers: Sequence[int]) -> Piece:
        """The samples of these numbers."""
        piece = self.inner(numbers)
        return replace(piece, x_0=fresh_noise(self.seed, numbers, piece.x_0.shape[1:]))


@dataclass(frozen=True)
class Annealed:
    """From independent noise to the coupled one over training, for small students.

    `x_0' = √(1 - β²) x_0 + β ξ` with fresh ξ ~ N(0, I), which has the law of x_0 for every β. β
    falls from 1, flow matching, to 0, reflow. Source: SlimFlow, Zhu et al. 2024, arXiv 2407.12718,
    section 3.1.

    Args:
        inner: The coupling that it ends with.
        seed: Of the run.
        samples: Over how many samples β falls: steps × batch size.
        schedule: `"linear"`: 1 - s; `"cosine"`: (1 + cos πs) / 2, both 0 from s = 1 on;
            `"exponential"`: e^{-s}. s is the share of `samples` gone by.
    """

    inner: Coupling
    seed: int
    samples: int
    schedule: Schedule = "linear"

    def beta(self, number: int) -> float:
        """β of a sample, in [0, 1]."""
        s = number / self.samples
        match self.schedule:
            case "linear":
                return max(0.0, 1 - s)
            case "cosine":
                return (1 + math.cos(math.pi * min(1.0, s))) / 2
            case "exponential":
                return math.exp(-s)

    def __call__(self, numbers: Sequence[int]) -> Piece:
        """The samples of these numbers."""
        piece = self.inner(numbers)
        beta = column(torch.tensor([self.beta(number) for number in numbers]), piece.x_0)
        if not beta.any():
            return piece
        fresh = fresh_noise(self.seed, numbers, piece.x_0.shape[1:])
        return replace(piece, x_0=(1 - beta.square()).sqrt() * piece.x_0 + beta * fresh)


def stored_noise(seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The noise of pairs of a store by index: float32 [B, *shape], each from seed + index."""
    generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def fresh_noise(seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise that no pair of a store has, by number of the sample: float32 [B, *shape]."""
    seeds = [noise_seed(seed, "noise", number) for number in numbers]
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def column(values: Tensor, x: Tensor) -> Tensor:
    """[B] ready to multiply `x` [B, ...]."""
    return values.to(x).reshape(-1, *[1] * (x.ndim - 1))

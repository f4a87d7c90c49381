"""At which times a flow is trained: laws on [0, 1] in closed form, one draw per sample.

Every law is the inverse of its distribution function at a uniform number, and every uniform number
is a function of (seed, what it is for, number of the sample): nothing is shared between samples, so
a batch can be cut, resumed or split over processes and its times stay what they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.path import Scalar

LawName = Literal["uniform", "logit_normal", "u_shaped"]
Law = Callable[[Tensor], Tensor]
"""Uniform numbers in (0, 1) to times in [0, 1], float64, any shape."""

U_SHAPE = 4.0
"""Steepness of the U: its ends are cosh(2) = 3.8 times as dense as its middle."""

Stream = Literal["time", "noise", "steps", "guidance", "window"]
"""What a random number is for; numbers for different ends have nothing to do with each other."""
_STREAMS: tuple[Stream, ...] = ("time", "noise", "steps", "guidance", "window")


def uniforms(seed: int, stream: Stream, numbers: Sequence[int], count: int = 1) -> Tensor:
    """Uniform numbers in (0, 1) of given samples: float64 [B, count].

    By Philox, a counter-based generator (Salmon et al. 2011): the sample's number is its counter.

    Args:
        seed: Of the run.
        stream: What they are for.
        numbers: Of the samples, from 0.
        count: How many for each sample.

    Example:
        >>> both = uniforms(0, "time", [3, 4])
        >>> bool((uniforms(0, "time", [4]) == both[1:]).all())
        True
    """
    key = [seed % 2**64, _STREAMS.index(stream)]
    rows = []
    for number in numbers:
        # A step of the counter is four words, so the sample's number goes into its second word.
        philox = np.random.Philox(key=key, counter=[0, number, 0, 0])
        rows.append(philox.random_raw(count))
    bits = np.array(rows, dtype=np.uint64).reshape(len(rows), count) >> np.uint64(12)
    return torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-52)


def noise_seed(seed: int, stream: Stream, number: int) -> int:
    """A seed for `torch.Generator`, different for each number of a stream below 2³².

    PyTorch's generator on the CPU looks at the low 32 bits of its seed only, so these are counted
    up from a start that seed and stream decide, and never hashed, which would let some collide.
    """
    start = np.random.Philox(key=[seed % 2**64, _STREAMS.index(stream)], counter=[0, 0, 1, 0])
    return (int(start.random_raw()) + number) % 2**32


def uniform() -> Law:
    """Every time alike."""
    return lambda u: u


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Law:
    """`t = sigmoid(mean + std · z)`, z ~ N(0, 1) (SD3, Esser et al. 2024, arXiv 2403.03206, 3.1).

    Args:
        mean: m; above 0 leans towards the data.
        std: s > 0.

    Raises:
        InputError: s is not positive.
    """
    if not std > 0:
        raise InputError(f"the logit-normal's std is {std}: give a positive number")
    return lambda u: torch.sigmoid(mean + std * torch.special.ndtri(u))


def u_shaped(steepness: float = U_SHAPE) -> Law:
    """Density ∝ cosh(a (t - ½)): both ends more often than the middle.

    The law of 2-RF++ (Lee et al. 2024, arXiv 2405.20320, section 4.1; a = 4). It is an even
    mixture of a density ∝ e^{as} on [0, 1] and its mirror image, and the distribution function
    `expm1(as) / expm1(a)` of the first is inverted by `s = log1p(u · expm1(a)) / a`.

    Args:
        steepness: a > 0.

    Raises:
        InputError: a is not positive.
    """
    if not steepness > 0:
        raise InputError(f"the steepness of the U is {steepness}: give a positive number")

    def times(u: Tensor) -> Tensor:
        flipped = u >= 0.5  # one coin, and what is left of u is uniform again
        rest = 2 * u - flipped.to(u)
        s = torch.log1p(rest * math.expm1(steepness)) / steepness
        return torch.where(flipped, 1 - s, s)

    return times


def law(name: LawName, *, mean: float = 0.0, std: float = 1.0) -> Law:
    """A law by name.

    Args:
        name: `"uniform"`, `"logit_normal"` or `"u_shaped"`.
        mean: Of the logit-normal.
        std: Of the logit-normal.

    Raises:
        InputError: There is no such law, or its parameters are impossible.
    """
    match name:
        case "uniform":
            return uniform()
        case "logit_normal":
            return logit_normal(mean, std)
        case "u_shaped":
            return u_shaped()
    raise InputError(f"unknown time law {name!r}: use uniform, logit_normal or u_shaped")


def draw_times(
    law: Law, seed: int, numbers: Sequence[int], low: Scalar = 0.0, high: Scalar = 1.0
) -> Tensor:
    """The times of samples, a law on [0, 1] stretched to where each of them may be: float64 [B].

    Args:
        law: On [0, 1].
        seed: Of the run.
        numbers: Of the samples.
        low: The earliest time, for all or for each [B]: the field's first, or a window's.
        high: The latest.

    Example:
        >>> draw_times(uniform(), 0, [0, 1, 2], 0.25, 0.75).shape
        torch.Size([3])
    """
    return low + (high - low) * law(uniforms(seed, "time", numbers)[:, 0])


def draw_steps(student_steps: Sequence[int], seed: int, numbers: Sequence[int]) -> Tensor:
    """For how many steps each sample trains, each of `student_steps` as often: int64 [B]."""
    choices = torch.tensor(list(student_steps))
    return choices[_index(uniforms(seed, "steps", numbers)[:, 0], len(choices))]


def draw_points(grids: dict[int, Tensor], steps: Tensor, u: Tensor) -> Tensor:
    """A point at which each sample's grid has its student look: float64 [B].

    Args:
        grids: The student's grid [k + 1] for every k in `steps`.
        steps: k of each sample, int64 [B].
        u: Uniform numbers, float64 [B].
    """
    points = [grids[int(k)][int(_index(v, int(k)))] for k, v in zip(steps, u, strict=True)]
    return torch.stack(points).double()


def draw_windows(edges: Tensor, seed: int, numbers: Sequence[int]) -> Tensor:
    """In which of the windows between `edges` [K + 1] each sample trains: int64 [B], from 0."""
    return _index(uniforms(seed, "window", numbers)[:, 0], len(edges) - 1)


def _index(u: Tensor, count: int) -> Tensor:
    return (u * count).long().clamp(max=count - 1)

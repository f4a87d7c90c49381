"""Time grids: where along 0 ≤ t ≤ 1 a solver stands still.

A grid is `t_0 < t_1 < … < t_N`, 0 at noise and 1 at data; step i goes from t_i to t_{i+1}. Grids
are computed in float64 and handed out in float32. Papers and diffusers write σ = 1 - t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rectiflow.errors import InputError

MOST_STEPS = 100_000
GRIDS = ("uniform", "shifted", "dynamic", "diffusers")

# Two grid points closer than this are one point: a step that float32 cannot resolve is no step.
RESOLUTION = 1e-6


def uniform(num_inference_steps: int) -> Tensor:
    """N equal steps, `t_i = i / N`; float64, shape [N + 1].

    Example:
        >>> uniform(4).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    _check_steps(num_inference_steps)
    return torch.linspace(0, 1, num_inference_steps + 1, dtype=torch.float64)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times towards the noise: `σ' = sσ / (1 + (s - 1)σ)`, that is `t' = t / (t + s(1 - t))`.

    Source: SD3, Esser et al. 2024, arXiv 2403.03206, eq. 23.

    Args:
        t: Times in [0, 1], any shape.
        shift: s > 0; 1 leaves the times alone, SD3 uses 3.

    Raises:
        InputError: The shift is not a positive number.
    """
    if not (shift > 0 and math.isfinite(shift)):
        raise InputError(f"shift is {shift}: give a positive number, 1 for no shift")
    return t / (t + shift * (1 - t))


def shifted(num_inference_steps: int, shift: float) -> Tensor:
    """The uniform grid, shifted (the grid SD3 was meant to be sampled on); float64, shape [N + 1].

    Example:
        >>> (1 - shifted(4, shift=3.0)).tolist()
        [1.0, 0.9, 0.75, 0.5, 0.0]
    """
    return shift_time(uniform(num_inference_steps), shift)


def dynamic_mu(
    num_tokens: int,
    *,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """FLUX's μ, the logarithm of the shift: a straight line in the number of image tokens.

    Args:
        num_tokens: Image tokens, (height / 16) · (width / 16) for FLUX.
        base_image_seq_len: The number of tokens at which μ is `base_shift`.
        max_image_seq_len: The number of tokens at which μ is `max_shift`.
        base_shift: μ at `base_image_seq_len`.
        max_shift: μ at `max_image_seq_len`.

    Example:
        >>> dynamic_mu(256), dynamic_mu(4096)
        (0.5, 1.15)
    """
    share = (num_tokens - base_image_seq_len) / (max_image_seq_len - base_image_seq_len)
    return base_shift + share * (max_shift - base_shift)


def dynamic_shift(num_tokens: int) -> float:
    """FLUX's shift `s = exp(μ)` for an image of so many tokens.

    Example:
        >>> round(dynamic_shift(4096), 4)
        3.1582
    """
    return math.exp(dynamic_mu(num_tokens))


def dynamic(num_inference_steps: int, num_tokens: int) -> Tensor:
    """FLUX's grid: σ uniform from 1 to 1/N, shifted by `exp(μ)`, then 0; float64, shape [N + 1]."""
    return shifted(num_inference_steps, dynamic_shift(num_tokens))


def diffusers_default(
    num_inference_steps: int,
    shift: float,
    num_train_timesteps: int = 1000,
    dynamic_shift: bool = False,
) -> Tensor:
    """The grid of diffusers' `FlowMatchEulerDiscreteScheduler` without explicit sigmas, as it is.

    It spaces σ evenly down to an *already shifted* σ_min, shifts it all a second time, and appends
    0. Stock SD3 pipelines run on it, and so did the official FTEdit. A dynamic shift, which is not
    known when the scheduler is made, is not in σ_min.

    Args:
        num_inference_steps: N.
        shift: The scheduler's shift.
        num_train_timesteps: The scheduler's; σ_min before shifting is its inverse.
        dynamic_shift: Whether the shift is dynamic (`use_dynamic_shifting`).

    Returns:
        float64, shape [N + 1].

    Example:
        >>> [round(s, 3) for s in (1 - diffusers_default(4, shift=3.0)).tolist()]
        [1.0, 0.858, 0.602, 0.009, 0.0]
    """
    _check_steps(num_inference_steps)
    t_last = torch.tensor(1 - 1 / num_train_timesteps, dtype=torch.float64)
    if not dynamic_shift:
        t_last = shift_time(t_last, shift)
    t = torch.linspace(0, float(t_last), num_inference_steps, dtype=torch.float64)
    return torch.cat([shift_time(t, shift), t.new_ones(1)])


def active_steps(share: float, num_inference_steps: int) -> int:
    """How many whole steps a share of N covers: `floor(share · N)` of the numbers as written.

    The product in floating point may fall just short of a whole number; scripts that cut it off
    there lose a step.

    Example:
        >>> active_steps(0.29, 100), int(0.29 * 100)
        (29, 28)
    """
    return int(share * num_inference_steps + 1e-9)


def part(grid: Tensor, start: float | int = 0.0, stop: float | int = 1.0) -> Tensor:
    """The part of an ascending grid between two points.

    Args:
        grid: Shape [N + 1].
        start: An `int` is an index into the grid, a `float` a time: the part begins exactly there,
            on a grid point or not.
        stop: The end, likewise. (`1` is the end of the first step, `1.0` is data.)

    Returns:
        `start`, the grid's points strictly between, `stop`. A time beyond the grid is its end.

    Raises:
        InputError: Nothing is left, or an index is outside the grid.

    Example:
        >>> part(uniform(4), 0.4).tolist()
        [0.4, 0.5, 0.75, 1.0]
        >>> part(uniform(4), 1, 3).tolist()
        [0.25, 0.5, 0.75]
    """
    first, last = _time(grid, start), _time(grid, stop)
    if last - first < RESOLUTION:
        raise InputError(f"nothing of the grid lies between start={start} and stop={stop}")
    inside = grid[(grid > first + RESOLUTION) & (grid < last - RESOLUTION)]
    return torch.cat([inside.new_tensor([first]), inside, inside.new_tensor([last])])


def make_grid(
    grid: str | Tensor | Sequence[float],
    num_inference_steps: int | None = None,
    *,
    shift: float = 1.0,
    num_tokens: int | None = None,
    dynamic_shift: bool = False,
    start: float | int = 0.0,
    stop: float | int = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Make, or check, the grid to integrate on.

    Args:
        grid: One of `GRIDS`, or your own times, ascending in [0, 1].
        num_inference_steps: N ≥ 1 of the whole grid, before `start` and `stop`; of your own grid
            it may be left out.
        shift: For `"shifted"` and `"diffusers"`; the others do not use it.
        num_tokens: Image tokens, for `"dynamic"`.
        dynamic_shift: Whether the scheduler computes `shift` from the image, for `"diffusers"`.
        start: Where to begin, as in `part`.
        stop: Where to end, as in `part`.
        dtype: float32, or float64 for exact comparisons.

    Returns:
        An ascending grid, shape [N + 1], on the CPU.

    Raises:
        InputError: The grid is unknown or not ascending in [0, 1], or an argument that it needs
            is missing or wrong.

    Example:
        >>> make_grid("shifted", 2, shift=3.0)
        tensor([0.0000, 0.2500, 1.0000])
        >>> make_grid([0.0, 0.1, 1.0], start=0.05)
        tensor([0.0500, 0.1000, 1.0000])
    """
    if isinstance(grid, str):
        points = _named(grid, num_inference_steps, shift, num_tokens, dynamic_shift)
    else:
        points = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
        check_grid(points)
        if points[0] > points[-1]:
            raise InputError("a grid runs from noise (0) to data (1): reverse it")
        if num_inference_steps not in (None, len(points) - 1):
            raise InputError(
                f"the grid given has {len(points) - 1} steps, not {num_inference_steps}: "
                "leave num_inference_steps out"
            )
    if isinstance(grid, str) and bool((points.diff() < RESOLUTION).any()):
        told = f" (its shift is {shift:g})" if grid in ("shifted", "diffusers") else ""
        raise InputError(
            f"the grid {grid!r}{told} has {len(points) - 1} steps, some of them shorter than "
            f"{RESOLUTION:g}: give fewer steps, or times of your own as the grid"
        )
    result = part(points, start, stop).to(dtype)
    check_grid(result)
    return result


def check_grid(grid: Tensor) -> None:
    """Refuse what cannot be integrated on.

    Raises:
        InputError: Not 1-D with two or more finite points in [0, 1], strictly rising or falling.
    """
    if grid.ndim != 1 or len(grid) < 2:
        raise InputError("a grid is a list of two or more times")
    steps = grid.diff()
    if not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise InputError("the times of a grid must strictly rise (or all fall) and be finite")
    if grid.min() < 0 or grid.max() > 1:
        raise InputError("the times of a grid must lie in [0, 1]")


def _named(
    name: str, steps: int | None, shift: float, num_tokens: int | None, dynamic_shift: bool
) -> Tensor:
    if steps is None:
        raise InputError(f"the grid {name!r} needs num_inference_steps")
    match name:
        case "uniform":
            return uniform(steps)
        case "shifted":
            return shifted(steps, shift)
        case "dynamic":
            if num_tokens is None:
                raise InputError("the grid 'dynamic' needs num_tokens, the number of image tokens")
            return dynamic(steps, num_tokens)
        case "diffusers":
            return diffusers_default(steps, shift, dynamic_shift=dynamic_shift)
    raise InputError(f"unknown grid {name!r}: use one of {', '.join(GRIDS)}, or a list of times")


def _check_steps(num_inference_steps: int) -> None:
    if not 1 <= num_inference_steps <= MOST_STEPS:
        raise InputError(
            f"num_inference_steps is {num_inference_steps}: give 1 or more, up to {MOST_STEPS}"
        )


def _time(grid: Tensor, where: float | int) -> float:
    """The time meant by an index (int) or a time (float), never beyond the grid."""
    if isinstance(where, int):
        if not 0 <= where < len(grid):
            raise InputError(f"{where} is not an index of a grid of {len(grid) - 1} steps")
        return float(grid[where])
    return min(max(where, float(grid[0])), float(grid[-1]))

"""What can be measured on a flow: straightness, curvature, transport cost, whiteness of noise.

All of them are *per dimension*, so that latents of different sizes compare, and come as an
estimate over the batch with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rectiflow.errors import InputError
from rectiflow.flow.grid import check_grid
from rectiflow.flow.solver import Velocity


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over independent samples.

    Example:
        >>> Estimate.over(torch.tensor([1.0, 3.0]))
        2 ± 1
    """

    value: float
    standard_error: float
    """Of `value`; nan for a single sample."""
    samples: Tensor
    """What was averaged, float64, shape [B], on the CPU; for paired comparisons."""

    @classmethod
    def over(cls, samples: Tensor) -> Estimate:
        """The mean of `samples`, shape [B], and its standard error."""
        samples = samples.cpu().double()
        n = len(samples)
        error = float(samples.std()) / math.sqrt(n) if n > 1 else math.nan
        return cls(float(samples.mean()), error, samples)

    def __repr__(self) -> str:
        """The value and its standard error."""
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


def straightness(trajectory: Tensor, grid: Tensor, velocity: Velocity | None = None) -> Estimate:
    """`S = ∫ E‖(Z_1 - Z_0) - v(Z_t, t)‖² dt / d` along the flow's own trajectories; 0 is straight.

    Without a velocity it is S of the polygon through the states, which costs nothing, is never
    more than the flow's S, and tends to it as O(h²). With one, the integral is a trapezoid sum
    over the grid. Either way the states should be accurate (rk4, 20 steps or more): a trajectory of
    one step is straight by definition. On part of a grid, Z_1 - Z_0 is the mean velocity there.
    Source: Liu et al. 2022, arXiv 2209.03003, section 2.2.

    Args:
        trajectory: States, shape [N + 1, B, ...], as `integrate(keep_trajectory=True)` gives them.
        grid: Their times, shape [N + 1], rising or falling.
        velocity: The field, evaluated at all N + 1 states.

    Raises:
        InputError: Trajectory and grid do not match.

    Example:
        >>> grid = torch.tensor([0.0, 0.5, 1.0])
        >>> straightness(torch.tensor([[[0.0]], [[0.5]], [[1.0]]]), grid).value
        0.0
        >>> straightness(torch.tensor([[[0.0]], [[0.0]], [[1.0]]]), grid).value
        1.0
    """
    h = _steps(trajectory, grid)
    chord = (trajectory[-1] - trajectory[0]).cpu() / h.sum()
    if velocity is None:
        velocities, weights = _secants(trajectory, h), h.abs()
    else:
        times = enumerate(zip(trajectory, grid.cpu(), strict=True))
        velocities = torch.stack([velocity(x, t, i).cpu() for i, (x, t) in times])
        weights = torch.nn.functional.pad(h.abs(), (1, 1)).unfold(0, 2, 1).mean(1)
    return Estimate.over(weights @ _mean_square(chord - velocities))


def curvature(trajectory: Tensor, grid: Tensor) -> Estimate:
    """Mean over time of `E‖d²Z_t/dt²‖² / d`; an Euler step errs by `h²/2 · d²Z_t/dt²`.

    By second differences, O(h) accurate. On [0, 1] straightness is at most curvature / π²
    (Wirtinger's inequality).

    Args:
        trajectory: States, shape [N + 1, B, ...] with N ≥ 2.
        grid: Their times, shape [N + 1], rising or falling.

    Raises:
        InputError: Trajectory and grid do not match, or there are fewer than two steps.

    Example:
        >>> grid = torch.tensor([0.0, 0.5, 1.0])
        >>> curvature(grid.square().reshape(3, 1, 1), grid).value
        4.0
    """
    h = _steps(trajectory, grid)
    if len(h) < 2:
        raise InputError("curvature needs a trajectory of two steps or more")
    between = (h[1:] + h[:-1]) / 2
    acceleration = _secants(_secants(trajectory, h), between)
    return Estimate.over(between.abs() @ _mean_square(acceleration) / between.abs().sum())


COSTS: dict[str, Callable[[Tensor], Tensor]] = {  # of a displacement [B, d]
    "l2_squared": lambda z: z.square().mean(1),
    "l2": lambda z: z.square().mean(1).sqrt(),
    # log cosh z = |z| + log(1 + exp(-2|z|)) - log 2 does not overflow
    "log_cosh": lambda z: (z.abs() + softplus(-2 * z.abs()) - math.log(2)).mean(1),
}


def transport_cost(x_0: Tensor, x_1: Tensor, cost: str = "l2_squared") -> Estimate:
    """`E c(x_1 - x_0)` of a coupling, per dimension; reflow never increases it for convex c.

    Source: Liu et al. 2022, arXiv 2209.03003, theorem 3.5.

    Args:
        x_0: Noise, shape [B, ...].
        x_1: The data coupled with it, same shape.
        cost: `"l2_squared"`: ‖z‖²/d; `"l2"`: ‖z‖/√d; `"log_cosh"`: the mean of log cosh z_j.

    Raises:
        InputError: No such cost.

    Example:
        >>> transport_cost(torch.zeros(2, 3), torch.full((2, 3), 2.0)).value
        4.0
    """
    if cost not in COSTS:
        raise InputError(f"unknown cost {cost!r}: use one of {', '.join(COSTS)}")
    return Estimate.over(COSTS[cost]((x_1 - x_0).cpu().double().flatten(1)))


@dataclass(frozen=True)
class NoiseStatistics:
    """How far a tensor is from N(0, I), where the three are 1, 0 and 0."""

    norm: float
    """‖x‖ / √d."""
    kurtosis: float
    """Excess kurtosis of the values about their mean; above 0, heavy tails."""
    autocorrelation: float
    """Of horizontal and vertical neighbours, in [-1, 1] or nearly; above 0, smooth structure."""


def noise_statistics(x: Tensor) -> NoiseStatistics:
    """The statistics of each item of a batch of latents, averaged over the batch.

    Args:
        x: Shape [B, C, h, w]. Of a constant tensor the last two are nan.

    Raises:
        InputError: `x` has another shape.

    Example:
        >>> noise_statistics(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).expand(1, 4, 2, 2))
        NoiseStatistics(norm=1.0, kurtosis=-2.0, autocorrelation=-1.0)
    """
    if x.ndim != 4:
        raise InputError(f"noise statistics need latents [B, C, h, w], not {list(x.shape)}")
    x = x.cpu().double()
    norm = x.flatten(1).square().mean(1).sqrt()
    z = x - x.mean((1, 2, 3), keepdim=True)
    variance = z.flatten(1).square().mean(1)
    kurtosis = z.flatten(1).pow(4).mean(1) / variance.square() - 3
    across, down = z[..., 1:] * z[..., :-1], z[..., 1:, :] * z[..., :-1, :]
    neighbours = torch.cat([across.flatten(1), down.flatten(1)], dim=1).mean(1)
    return NoiseStatistics(
        norm=float(norm.mean()),
        kurtosis=float(kurtosis.mean()),
        autocorrelation=float((neighbours / variance).mean()),
    )


def _steps(trajectory: Tensor, grid: Tensor) -> Tensor:
    """The grid's step sizes, float64 on the CPU, shape [N]."""
    check_grid(grid)
    if len(trajectory) != len(grid):
        raise InputError(f"{len(trajectory)} states do not lie on a grid of {len(grid)} times")
    return grid.cpu().double().diff()


def _secants(states: Tensor, h: Tensor) -> Tensor:
    """Difference quotients of [N + 1, B, ...] over steps [N]; shape [N, B, ...], float64."""
    return states.cpu().double().diff(dim=0) / h.reshape(-1, *[1] * (states.ndim - 1))


def _mean_square(z: Tensor) -> Tensor:
    """`‖z‖² / d` of [N, B, ...]; shape [N, B]."""
    return z.cpu().double().square().flatten(2).mean(2)

"""Fields with known solutions, and inversion schemes by name on any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rectiflow.flow.grid import shifted, uniform
from rectiflow.flow.solver import Velocity, integrate
from rectiflow.invert import SCHEMES, InversionResult, Preset

COUNTS = (32, 48, 64, 96)


def zigzag(steps: int) -> Tensor:
    """Steps of h, 2h, h, 2h, …"""
    h = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(steps)[:steps]
    return torch.cat([torch.zeros(1, dtype=torch.float64), (h / h.sum()).cumsum(0)]).clamp(max=1)


def late(steps: int) -> Tensor:
    """As for a strength below 1: from t = 0.3 on."""
    return 0.3 + 0.7 * uniform(steps)


GRIDS: dict[str, Callable[[int], Tensor]] = {
    "uniform": uniform,
    "shifted": lambda steps: shifted(steps, 3.0),
    "zigzag": zigzag,
    "late": late,
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wild(x: Tensor, t: Tensor, step: int = 0) -> Tensor:
    """Not linear, depends on time, couples the parts of a row, and no row with another."""
    return torch.sin(2 * x + 3 * t) + x.roll(1, -1)


def riccati(x: Tensor, t: Tensor, step: int = 0) -> Tensor:
    """Solved by ``x = x_0 / (1 + x_0 t²)``."""
    return -2 * t * x * x


def solved(x_1: Tensor, t: Tensor | float) -> Tensor:
    """Where `riccati` was at a time, to be at `x_1` at t = 1."""
    x_0 = x_1 / (1 - x_1)
    return x_0 / (1 + x_0 * t**2)


RICCATI_END = torch.tensor([[0.3, 0.4, 0.5], [0.1, 0.2, 0.6]], dtype=torch.float64)


class Recorder:
    """A field, and where it was asked: state, time and step."""

    def __init__(self, field: Velocity = wild) -> None:
        self.field = field
        self.calls: list[tuple[Tensor, Tensor, int]] = []

    def __call__(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        self.calls.append((x, t, step))
        return self.field(x, t, step)


def inverted(
    name: str,
    velocity: Velocity,
    x_1: Tensor,
    grid: Tensor,
    noise: Tensor | None = None,
    **fields: Any,
) -> InversionResult:
    """By the scheme of that name, for an edit that reads all that it finds."""
    reading = {"scheme": name, "compensate": "both", "source_features": "inversion"}
    preset = Preset(reference="none", **(reading | fields))
    return SCHEMES[name].invert(velocity, x_1, grid, preset, noise)


def noise_for(name: str, x_1: Tensor, grid: Tensor) -> Tensor | None:
    """What a scheme is given to start from, if it wants any."""
    scheme = SCHEMES[name]
    if not scheme.noisy:
        return None
    draws = (len(grid) - 1,) if scheme.every_step else ()
    return randn(*draws, *x_1.shape, seed=9)


def generated(name: str, velocity: Velocity, path: InversionResult, grid: Tensor) -> Tensor:
    """The states of the scheme's own generation from the path's beginning, without corrections."""
    solver = SCHEMES[name].solver(path, grid, torch.arange(path.trajectory.shape[1]))
    states = integrate(velocity, path.trajectory[0], grid, solver, keep_trajectory=True).trajectory
    assert states is not None
    return states


def slope(errors: list[float]) -> float:
    """p of error ∝ N^-p over `COUNTS`."""
    return -float(np.polyfit(np.log(COUNTS), np.log(errors), 1)[0])


def order_of_inversion(name: str, make: Callable[[int], Tensor] = uniform) -> float:
    """With which power of h the beginning of the path comes near the true one."""
    errors = []
    for steps in COUNTS:
        grid = make(steps)
        path = inverted(name, riccati, RICCATI_END, grid)
        errors.append(float((path.trajectory[0] - solved(RICCATI_END, grid[0])).norm()))
    return slope(errors)


def order_of_return(name: str, make: Callable[[int], Tensor] = uniform) -> float:
    """With which power of h the image comes back."""
    errors = []
    for steps in COUNTS:
        grid = make(steps)
        path = inverted(name, riccati, RICCATI_END, grid)
        again = generated(name, riccati, path, grid)[-1]
        errors.append(float((again - RICCATI_END).norm()))
    return slope(errors)

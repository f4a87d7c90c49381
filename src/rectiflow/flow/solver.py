"""Solvers of `dx/dt = v(x, t)`: one class per scheme, and the one loop that runs them all.

A solver only knows how to make one step. To add one, subclass `Solver` and list it in `SOLVERS`;
the tests then check its order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from rectiflow.errors import InputError, WorkError
from rectiflow.flow.grid import check_grid

Velocity = Callable[[Tensor, Tensor, int], Tensor]
"""`(x [B, ...], t [], step) -> dx/dt [B, ...]`: step counts the intervals of the grid in use.

It may carry `samples_per_row`, the samples through the network that one row of x costs
(2 under guidance; 1 if absent).
"""

Callback = Callable[[int, Tensor, Tensor], Tensor | None]
"""`(step, t reached, x) -> a state that replaces x, or None`, called after each step."""


class Solver(ABC):
    """One step of a scheme. It has no state: what a step leaves to the next is the `memory`."""

    name: ClassVar[str]
    order: ClassVar[int]
    """p, where the error at a fixed time is O(h^p)."""
    evaluations: ClassVar[int]
    """Velocities per step; of an adaptive solver, the fewest."""
    extra: ClassVar[int] = 0
    """Velocities that the first step asks for beside those."""
    adaptive: ClassVar[bool] = False

    @abstractmethod
    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        """Go from `t` to `t_next`, forwards or backwards.

        Args:
            velocity: The field.
            x: The state at `t`, shape [B, ...].
            t: Where the step begins, shape [], on the CPU.
            t_next: Where it ends, likewise.
            step: The step's number, for the velocity.
            memory: What the last step returned; None on the first.

        Returns:
            The state at `t_next`, and the memory for the next step.
        """


class Euler(Solver):
    """`x + h v(x, t)`. Order 1, one evaluation. Exact in one step if the flow is straight."""

    name, order, evaluations = "euler", 1, 1

    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        return x + (t_next - t) * velocity(x, t, step), None


class Midpoint(Solver):
    """Euler with the velocity of the step's middle. Order 2, two evaluations."""

    name, order, evaluations = "midpoint", 2, 2

    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        h = t_next - t
        middle = x + h / 2 * velocity(x, t, step)
        return x + h * velocity(middle, t + h / 2, step), None


class Heun(Solver):
    """The mean velocity of both ends, the far one by Euler. Order 2, two evaluations."""

    name, order, evaluations = "heun", 2, 2

    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        h = t_next - t
        v = velocity(x, t, step)
        v_next = velocity(x + h * v, t_next, step)
        return x + h / 2 * (v + v_next), None


class RungeKutta4(Solver):
    """The classical scheme of Kutta (1901), not his 3/8 rule. Order 4, four evaluations."""

    name, order, evaluations = "rk4", 4, 4

    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        h = t_next - t
        v_1 = velocity(x, t, step)
        v_2 = velocity(x + h / 2 * v_1, t + h / 2, step)
        v_3 = velocity(x + h / 2 * v_2, t + h / 2, step)
        v_4 = velocity(x + h * v_3, t_next, step)
        return x + h / 6 * (v_1 + 2 * v_2 + 2 * v_3 + v_4), None


class AdamsBashforth2(Solver):
    """Follow the line through this velocity and the last one. Order 2, *one* evaluation.

    `x + h ((1 + r/2) v_i - (r/2) v_{i-1})` with `r = h_i / h_{i-1}`, so any grid will do. Its
    first step is Euler's, whose single O(h²) error does not lower the order. Source: Hairer,
    Nørsett & Wanner, Solving Ordinary Differential Equations I, III.5.
    """

    name, order, evaluations = "ab2", 2, 1

    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        h = t_next - t
        v = velocity(x, t, step)
        if memory is None:
            return x + h * v, (v, h)
        v_last, h_last = memory
        r = h / h_last
        return x + h * ((1 + r / 2) * v - r / 2 * v_last), (v, h)


class FireFlow(Solver):
    """Midpoint with `v(x_i, t_i)` replaced by the velocity at the last step's middle.

    Order 2, *one* evaluation per step and one more in the first: the predictor's error is O(h), so
    the middle is off by O(h²), like the midpoint rule's own. Not Adams–Bashforth, which follows a
    line through two velocities and asks at the step's beginning. Source: FireFlow, Deng et al.
    2024, arXiv 2412.07517.
    """

    name, order, evaluations, extra = "fireflow", 2, 1, 1

    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        h = t_next - t
        v = velocity(x, t, step) if memory is None else memory
        v = velocity(x + h / 2 * v, t + h / 2, step)
        return x + h * v, v


@dataclass(frozen=True)
class DormandPrince(Solver):
    """Dormand–Prince 5(4) with step size control, by torchdiffeq, between the points of the grid.

    Order 5. The grid says where states are wanted, the tolerances say how many steps there are.
    The whole batch shares its steps and its worst row decides them, so a row's result depends on
    its company, within the tolerances. Source: Dormand & Prince 1980.

    Args:
        rtol: Error allowed per step, relative to the state.
        atol: Error allowed per step, absolute.
    """

    rtol: float = 1e-5
    atol: float = 1e-5

    name: ClassVar[str] = "dopri5"
    order: ClassVar[int] = 5
    evaluations: ClassVar[int] = 7
    adaptive: ClassVar[bool] = True

    def step(
        self, velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, step: int, memory: Any
    ) -> tuple[Tensor, Any]:
        from torchdiffeq import odeint  # brings scipy, which no other solver needs

        def worst_row(error: Tensor) -> Tensor:
            return error.flatten(1).square().mean(1).max().sqrt()

        try:
            states = odeint(
                lambda time, state: velocity(state, time, step),
                x,
                torch.stack([t, t_next]).to(x.device),
                rtol=self.rtol,
                atol=self.atol,
                method="dopri5",
                # try the whole interval first: a straight flow then costs one step
                options={"norm": worst_row, "first_step": (t_next - t).abs()},
            )
        except AssertionError as error:  # torchdiffeq's word for a step of 0 or a state of nan
            raise WorkError(
                f"dopri5 failed between t = {float(t):.4f} and {float(t_next):.4f} ({error}): "
                f"loosen rtol = {self.rtol} and atol = {self.atol}, or use another solver"
            ) from error
        return states[-1], None


SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver
    for solver in (
        Euler,
        Midpoint,
        Heun,
        RungeKutta4,
        AdamsBashforth2,
        FireFlow,
        DormandPrince,
    )
}


def make_solver(solver: str | Solver) -> Solver:
    """The solver of that name with its default settings; a solver is returned as it is.

    Raises:
        InputError: No such solver.

    Example:
        >>> make_solver("heun").order
        2
    """
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}: use one of {', '.join(SOLVERS)}")
    return SOLVERS[solver]()


class CountedVelocity:
    """A velocity that counts its NFE: the *samples* that went through the network.

    Example:
        >>> v = CountedVelocity(lambda x, t, step: x)
        >>> _ = v(torch.zeros(3, 2), torch.tensor(0.5), 0)
        >>> v.nfe
        3
    """

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.samples_per_row: int = getattr(velocity, "samples_per_row", 1)
        self.nfe = 0

    def __call__(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        """The velocity, counted."""
        self.nfe += len(x) * self.samples_per_row
        return self.velocity(x, t, step)


@dataclass(frozen=True)
class Solution:
    """Where a flow led: the last state, all of them if they were kept, and what it cost."""

    x: Tensor
    """Shape [B, ...]."""
    trajectory: Tensor | None
    """The states at the grid's points, the first included; shape [N + 1, B, ...]."""
    nfe: int
    """Samples through the network."""


def integrate(
    velocity: Velocity,
    x: Tensor,
    grid: Tensor,
    solver: Solver | str = "euler",
    *,
    callback_on_step_end: Callback | None = None,
    keep_trajectory: bool = False,
) -> Solution:
    """Solve `dx/dt = v(x, t)` along the grid, from its first point to its last.

    Args:
        velocity: The field.
        x: The state at `grid[0]`, shape [B, ...], float32 or float64.
        grid: Times in [0, 1], shape [N + 1]: rising from noise to data, or falling back.
        solver: One of `SOLVERS` or your own.
        callback_on_step_end: Called as `(step, t, x)` with the time and state reached. A tensor
            that it returns replaces the state (and a multistep solver starts afresh).
        keep_trajectory: Keep every state.

    Returns:
        The state at `grid[-1]`, on the device and in the dtype of `x`.

    Raises:
        InputError: The grid cannot be integrated on, or the state is in half precision.

    Example:
        >>> from rectiflow.flow.grid import uniform
        >>> forth = integrate(lambda x, t, step: 2 * t, torch.zeros(1, 1), uniform(4), "heun")
        >>> forth.x, forth.nfe
        (tensor([[1.]]), 8)
    """
    solver = make_solver(solver)
    check_grid(grid)
    if x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"the state of a flow is kept in float32, not {x.dtype}: use x.float()")
    counted = CountedVelocity(velocity)
    memory = None
    states = [x]
    for step, (t, t_next) in enumerate(pairwise(grid.cpu())):
        x, memory = solver.step(counted, x, t, t_next, step, memory)
        if callback_on_step_end is not None:
            replacement = callback_on_step_end(step, t_next, x)
            if replacement is not None:
                x, memory = replacement, None
        if keep_trajectory:
            states.append(x)
    return Solution(x, torch.stack(states) if keep_trajectory else None, counted.nfe)

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torchdiffeq
from scipy.integrate import solve_ivp

from rectiflow.errors import InputError, WorkError
from rectiflow.flow import (
    SOLVERS,
    DormandPrince,
    Euler,
    Solver,
    integrate,
    make_grid,
    make_solver,
    shifted,
    uniform,
)
from tests.flow.gaussians import TwoGaussians

FIXED = [name for name, solver in SOLVERS.items() if not solver.adaptive]
MATRIX = torch.tensor([[-0.3, 1.1, 0.2], [-0.9, 0.1, 0.4], [0.3, -0.5, -0.7]], dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(x: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
    return x @ MATRIX.T


def riccati(x: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
    """x = x_0 / (1 + x_0 t²): depends on time, not linear, all its terms polynomial."""
    return -2 * t * x * x


def zigzag(steps: int) -> torch.Tensor:
    """Steps of h, 2h, h, 2h, …: a multistep scheme that takes them for equal loses its order."""
    h = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(steps)[:steps]
    return torch.cat([torch.zeros(1, dtype=torch.float64), (h / h.sum()).cumsum(0)]).clamp(max=1)


def slope(errors: list[float], counts: list[int]) -> float:
    """p of error ∝ N^-p, by least squares."""
    return -float(np.polyfit(np.log(counts), np.log(errors), 1)[0])


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("make", [uniform, zigzag, lambda n: shifted(n, 3.0)])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_of_every_solver(name, make, backwards):
    x_0 = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    start, end = x_0, x_0 / (1 + x_0)
    counts, errors = [32, 48, 64, 96, 128], []
    for n in counts:
        grid = make(n)
        if backwards:
            error = integrate(riccati, end, grid.flip(0), name).x - start
        else:
            error = integrate(riccati, start, grid, name).x - end
        errors.append(float(error.norm()))
    assert slope(errors, counts) == pytest.approx(SOLVERS[name].order, abs=0.2)


def test_dormand_prince_is_as_exact_as_its_tolerance():
    x_0 = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    solutions = [
        integrate(riccati, x_0, uniform(1), DormandPrince(tol, tol)) for tol in (1e-3, 1e-6, 1e-9)
    ]
    errors = [float((s.x - x_0 / (1 + x_0)).abs().max()) for s in solutions]
    assert errors[0] < 1e-2
    assert errors[1] < 1e-5
    assert errors[2] < 1e-8
    assert errors[0] > errors[1] > errors[2]
    assert solutions[0].nfe < solutions[1].nfe < solutions[2].nfe


@pytest.mark.parametrize(
    ("name", "terms"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]
)
def test_one_step_schemes_are_truncated_exponentials_on_a_linear_field(name, terms):
    x_0, grid = randn(5, 3), zigzag(7)
    expected = x_0
    for h in grid.diff().tolist():
        step = sum(torch.matrix_power(h * MATRIX, k) / math.factorial(k) for k in range(terms + 1))
        expected = expected @ step.T
    torch.testing.assert_close(integrate(linear, x_0, grid, name).x, expected, rtol=0, atol=1e-13)


def test_adams_bashforth_on_a_linear_field_is_its_recurrence():
    x_0, grid = randn(5, 3), zigzag(7)
    h = grid.diff().tolist()
    states = [x_0, x_0 + h[0] * x_0 @ MATRIX.T]
    for i in range(1, 7):
        # integral of the line through (t_{i-1}, v_{i-1}) and (t_i, v_i) from t_i to t_{i+1}
        v_last, v = states[-2] @ MATRIX.T, states[-1] @ MATRIX.T
        states.append(states[-1] + h[i] * v + h[i] ** 2 / 2 * (v - v_last) / h[i - 1])
    ours = integrate(linear, x_0, grid, "ab2", keep_trajectory=True).trajectory
    torch.testing.assert_close(ours, torch.stack(states), rtol=0, atol=1e-13)


def test_fireflow_is_the_midpoint_rule_with_the_last_middles_velocity():
    x, grid = randn(5, 3), zigzag(5)
    velocity, asked = Recorder64(), []
    v = linear(x, grid[0], 0)
    for t, t_next in itertools.pairwise(grid):
        h = t_next - t
        asked.append((x + h / 2 * v, t + h / 2))
        v = linear(*asked[-1], 0)
        x = x + h * v
    ours = integrate(velocity, randn(5, 3), grid, "fireflow").x
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-13)
    assert torch.equal(velocity.calls[0][0], randn(5, 3)) and len(velocity.calls) == 6
    for (state, time), (x_asked, t_asked) in zip(velocity.calls[1:], asked, strict=True):
        torch.testing.assert_close(state, x_asked, rtol=0, atol=1e-13)
        torch.testing.assert_close(time, t_asked, rtol=0, atol=1e-13)


class Recorder64:
    """The linear field, and where it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        self.calls.append((x, t))
        return linear(x, t, step)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("backwards", [False, True])
def test_every_solver_reaches_the_exact_solution_of_a_linear_field(name, backwards):
    x_0, grid = randn(4, 3), uniform(400)
    exact = x_0 @ torch.matrix_exp(-MATRIX if backwards else MATRIX).T
    x = integrate(linear, x_0, grid.flip(0) if backwards else grid, name).x
    error = float((x - exact).abs().max())
    assert error < {1: 1e-2, 2: 1e-4, 4: 1e-9, 5: 1e-4}[SOLVERS[name].order]


@pytest.mark.parametrize(("ours", "theirs"), [("euler", "euler"), ("midpoint", "midpoint")])
def test_torchdiffeq_makes_the_same_steps(ours, theirs):
    data, x_0, grid = TwoGaussians(0.7, 0.4), randn(4, 3), shifted(6, 3.0)
    oracle = torchdiffeq.odeint(lambda t, x: data.velocity(x, t), x_0, grid, method=theirs)
    trajectory = integrate(data.velocity, x_0, grid, ours, keep_trajectory=True).trajectory
    torch.testing.assert_close(trajectory, oracle, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_scipy_agrees(name):
    def field(x: torch.Tensor, t: torch.Tensor, step: int = 0) -> torch.Tensor:
        return torch.sin(3 * x + 2 * t) + x.roll(1, -1)

    x_0 = randn(1, 4)
    oracle = solve_ivp(
        lambda t, x: field(torch.from_numpy(x), torch.tensor(t)).numpy(),
        (0, 1),
        x_0[0].numpy(),
        method="DOP853",
        rtol=1e-12,
        atol=1e-12,
    ).y[:, -1]
    solver = DormandPrince(1e-9, 1e-9) if name == "dopri5" else name
    x = integrate(field, x_0, uniform(200), solver).x
    np.testing.assert_allclose(x[0].numpy(), oracle, rtol=0, atol=1e-7)


def test_the_flow_between_two_gaussians():
    data, x_0, grid = TwoGaussians(0.7, 0.4), randn(4, 3), uniform(100)
    trajectory = integrate(data.velocity, x_0, grid, "rk4", keep_trajectory=True).trajectory
    torch.testing.assert_close(trajectory, data.trajectory(x_0, grid), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_straight_flow_is_exact_in_one_step(name):
    x_0, x_1 = randn(4, 3, seed=1), randn(4, 3, seed=2)
    solution = integrate(lambda x, t, step: x_1 - x_0, x_0, uniform(1), name)
    torch.testing.assert_close(solution.x, x_1, rtol=0, atol=1e-12)
    assert solution.nfe == 4 * (SOLVERS[name].evaluations + SOLVERS[name].extra)


@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_back_along_the_same_grid(name):
    data, x_0, grid = TwoGaussians(0.7, 0.4), randn(4, 3), make_grid("shifted", 100, shift=3.0)
    solver = DormandPrince(1e-8, 1e-8) if name == "dopri5" else name
    there = integrate(data.velocity, x_0, grid, solver, keep_trajectory=True)
    back = integrate(data.velocity, there.x, grid.flip(0), solver, keep_trajectory=True)
    torch.testing.assert_close(back.trajectory.flip(0), there.trajectory, rtol=0, atol=2e-6)
    assert float((there.x - x_0).abs().mean()) > 0.1  # it did go somewhere


@pytest.mark.parametrize("name", FIXED)
def test_a_row_does_not_depend_on_its_company(name):
    x_0, grid = randn(5, 3, 4).float(), make_grid("shifted", 9, shift=3.0)
    whole = integrate(riccati, x_0, grid, name).x
    for row in range(5):
        alone = integrate(riccati, x_0[row : row + 1], grid, name).x[0]
        # A kernel may round the last numbers of a tensor, which fill no register, otherwise.
        torch.testing.assert_close(whole[row], alone, atol=0, rtol=1e-6)


def test_adaptive_rows_depend_on_their_company_only_within_the_tolerance():
    x_0 = randn(5, 3).abs() * torch.tensor([[0.01], [0.1], [1.0], [3.0], [10.0]])
    solver = DormandPrince(1e-7, 1e-7)
    whole = integrate(riccati, x_0, uniform(2), solver).x
    alone = torch.cat([integrate(riccati, row[None], uniform(2), solver).x for row in x_0])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-5)
    # 10 000 easy rows do not hide the hard one
    crowd = torch.cat([x_0[-1:], torch.full((10_000, 3), 1e-3, dtype=torch.float64)])
    hard = integrate(riccati, crowd, uniform(1), solver).x[0]
    torch.testing.assert_close(hard, x_0[-1] / (1 + x_0[-1]), rtol=0, atol=1e-5)


class Recorder:
    """A velocity under guidance that remembers how it was called."""

    samples_per_row = 2

    def __init__(self) -> None:
        self.calls: list[tuple[float, int]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        assert t.ndim == 0
        assert t.dtype == torch.float32
        self.calls.append((float(t), step))
        return x


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_count_and_the_calls(name, backwards):
    velocity, grid = Recorder(), make_grid("uniform", 4)
    grid = grid.flip(0) if backwards else grid
    evaluations, extra = SOLVERS[name].evaluations, SOLVERS[name].extra
    solution = integrate(velocity, torch.ones(3, 2), grid, name)
    assert len(velocity.calls) == 4 * evaluations + extra
    assert solution.nfe == 3 * 2 * (4 * evaluations + extra)
    steps = [s for s in range(4) for _ in range(evaluations + extra * (s == 0))]
    assert [step for _, step in velocity.calls] == steps
    assert velocity.calls[0] == (float(grid[0]), 0)
    if not extra:
        assert [t for t, _ in velocity.calls[::evaluations]] == grid[:-1].tolist()
    for t, step in velocity.calls:  # no solver looks outside its step
        low, high = sorted(grid[step : step + 2].tolist())
        assert low <= t <= high


def test_the_adaptive_count():
    velocity = Recorder()
    solution = integrate(velocity, torch.ones(3, 2), make_grid("uniform", 4), "dopri5")
    assert solution.nfe == 3 * 2 * len(velocity.calls) > 3 * 2 * 4


def test_two_runs_do_not_share_a_count_or_a_memory():
    solver = make_solver("ab2")
    runs = [integrate(riccati, torch.ones(2, 3), uniform(5), solver) for _ in range(2)]
    assert runs[0].nfe == runs[1].nfe == 10
    assert torch.equal(runs[0].x, runs[1].x)


def test_the_trajectory_is_kept_if_asked_for():
    x_0, grid = torch.ones(2, 3), make_grid("uniform", 4)
    kept = integrate(riccati, x_0, grid, keep_trajectory=True)
    assert kept.trajectory.shape == (5, 2, 3)
    assert torch.equal(kept.trajectory[0], x_0)
    assert torch.equal(kept.trajectory[-1], kept.x)
    assert integrate(riccati, x_0, grid).trajectory is None


def test_the_callback_sees_every_step():
    seen = []
    grid = make_grid("shifted", 3, shift=2.0)
    kept = integrate(
        riccati,
        torch.ones(1, 2),
        grid,
        callback_on_step_end=lambda step, t, x: seen.append((step, float(t), x)),
        keep_trajectory=True,
    )
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [t for _, t, _ in seen] == grid[1:].tolist()
    assert torch.equal(torch.stack([x for _, _, x in seen]), kept.trajectory[1:])


@pytest.mark.parametrize("name", FIXED)
def test_a_state_from_the_callback_restarts_the_flow_there(name):
    grid, other = uniform(6), randn(2, 3, seed=5)
    replaced = integrate(
        riccati,
        randn(2, 3),
        grid,
        name,
        callback_on_step_end=lambda step, t, x: other if step == 2 else None,
        keep_trajectory=True,
    )
    assert torch.equal(replaced.trajectory[3], other)
    assert torch.equal(replaced.x, integrate(riccati, other, grid[3:], name).x)


def test_a_solver_of_ones_own():
    class Lazy(Solver):
        name, order, evaluations = "lazy", 0, 0

        def step(self, velocity, x, t, t_next, step, memory):
            return x + 1, None

    solution = integrate(riccati, torch.zeros(1, 1), uniform(3), Lazy())
    assert (solution.x.item(), solution.nfe) == (3.0, 0)


@pytest.mark.parametrize("name", SOLVERS)
def test_the_state_stays_in_float32(name):
    grid = uniform(3)  # float64
    solution = integrate(lambda x, t, step: (x * t).bfloat16(), torch.ones(1, 2), grid, name)
    assert solution.x.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_a_state_in_half_precision_is_refused(dtype):
    with pytest.raises(InputError, match=r"use x.float\(\)"):
        integrate(riccati, torch.ones(1, 2).to(dtype), uniform(3))


def test_a_grid_that_is_none_is_refused():
    with pytest.raises(InputError, match="strictly rise"):
        integrate(riccati, torch.ones(1, 2), torch.tensor([0.0, 0.5, 0.4]))


def test_an_unknown_solver_is_refused():
    with pytest.raises(InputError, match="unknown solver 'dopri8': use one of euler"):
        integrate(riccati, torch.ones(1, 2), uniform(3), "dopri8")
    assert isinstance(make_solver("euler"), Euler)


def test_dormand_prince_says_where_it_failed():
    def blow_up(x: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        return x / (t - 0.6) ** 2

    with pytest.raises(WorkError, match=r"between t = 0.5000 and 1.0000 .* loosen rtol"):
        integrate(blow_up, torch.ones(1, 2), uniform(2), "dopri5")


def test_gradients_flow_through_the_loop():
    k = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = integrate(lambda x, t, step: k * x, torch.ones(1, 1).double(), uniform(50), "rk4").x
    (gradient,) = torch.autograd.grad(x.sum(), k)
    assert gradient.item() == pytest.approx(math.exp(0.3), abs=1e-8)  # d/dk exp(k)

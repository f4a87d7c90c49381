"""The fixed point against closed forms of linear fields, where every iterate is known."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.grid import shifted, uniform
from rectiflow.invert import euler_inversion, fixed_point_inversion, get_preset
from tests.invert.fields import randn

ONE_STEP = torch.tensor([0.0, 1.0], dtype=torch.float64)


class Linear:
    """``v = λ x + b(t)`` with a rate per row, which counts the evaluations of each row."""

    def __init__(self, rates: Tensor, numbers: Tensor | None = None) -> None:
        self.rates = rates
        self.numbers = torch.arange(len(rates)) if numbers is None else numbers
        self.count: Counter[tuple[int, int]] = Counter()

    def __call__(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        self.count.update((step, int(row)) for row in self.numbers)
        return self.rates[:, None] * x + torch.cos(3 * t)

    def select(self, rows: Tensor) -> Linear:
        some = Linear(self.rates[rows], self.numbers[rows])
        some.count = self.count
        return some


def exact_inverse(rates: Tensor, x_1: Tensor, grid: Tensor) -> Tensor:
    states = [x_1]
    for i in reversed(range(len(grid) - 1)):
        h = grid[i + 1] - grid[i]
        states.append((states[-1] - h * torch.cos(3 * grid[i])) / (1 + h * rates[:, None]))
    return torch.stack(states[::-1])


@pytest.mark.parametrize("warm_start", [False, True])
@pytest.mark.parametrize("grid", [uniform(7), shifted(7, 3.0)], ids=["uniform", "shifted"])
def test_converges_to_the_exact_inverse(warm_start: bool, grid: Tensor) -> None:
    rates = torch.tensor([0.3, -0.8, 1.5], dtype=torch.float64)
    x_1 = torch.randn(3, 5, dtype=torch.float64)
    result = fixed_point_inversion(Linear(rates), x_1, grid, iterations=60, warm_start=warm_start)
    torch.testing.assert_close(result.trajectory, exact_inverse(rates, x_1, grid))
    assert result.residuals.max() < 1e-9
    # An exact inverse: generating again gives the image.
    x = result.trajectory[0]
    for i, (t, h) in enumerate(zip(grid[:-1], grid.diff(), strict=True)):
        x = x + h * Linear(rates)(x, t, i)
    torch.testing.assert_close(x, x_1)


def test_error_shrinks_by_h_lambda_with_every_iteration() -> None:
    rates, x_1 = torch.tensor([0.4], dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    exact = exact_inverse(rates, x_1, ONE_STEP)[0]
    for n in range(6):
        result = fixed_point_inversion(Linear(rates), x_1, ONE_STEP, iterations=n)
        error = (-0.4) ** (n + 1) * (x_1 - exact)
        torch.testing.assert_close(result.trajectory[0] - exact, error)
        # The residual is that of the state the velocity was last taken at.
        moved = 1.4 * 0.4**n * (x_1 - exact).norm() / result.trajectory[0].norm()
        assert result.residuals.item() == pytest.approx(moved.item(), rel=1e-5)
        assert result.evaluations.item() == n + 1


def test_average_is_the_mean_of_the_iterates_and_says_so() -> None:
    rates, x_1 = torch.tensor([0.4], dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    exact = exact_inverse(rates, x_1, ONE_STEP)[0]
    result = fixed_point_inversion(Linear(rates), x_1, ONE_STEP, iterations=2, average=True)
    mean = (-0.4 + 0.16 - 0.064) / 3
    torch.testing.assert_close(result.trajectory[0] - exact, mean * (x_1 - exact))
    # The exact residual of the mean of the states that were asked, as the field is linear.
    asked = exact + (1 - 0.4 + 0.16) / 3 * (x_1 - exact)
    moved = (result.trajectory[0] - asked).norm() / result.trajectory[0].norm()
    assert result.residuals.item() == pytest.approx(moved.item(), rel=1e-5)
    last = fixed_point_inversion(Linear(rates), x_1, ONE_STEP, iterations=2)
    assert (last.trajectory[0] - exact).norm() < (result.trajectory[0] - exact).norm()


def test_no_iterations_is_euler_with_the_noisier_time() -> None:
    x_1, grid = torch.randn(2, 3, 4), shifted(6, 3.0).float()

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        return torch.sin(2 * x + t)

    for average in (False, True):
        result = fixed_point_inversion(velocity, x_1, grid, iterations=0, average=average)
        euler = euler_inversion(velocity, x_1, grid, time="noisier")
        assert torch.equal(result.trajectory, euler.trajectory)


def test_rows_are_solved_by_themselves_and_asked_no_more_once_done() -> None:
    rates = torch.tensor([0.0, 0.05, 0.6, 0.9])
    x_1, grid = torch.randn(4, 6), uniform(4).float()
    settings = {"iterations": 12, "tolerance": 1e-4, "warm_start": True}
    field = Linear(rates)
    together = fixed_point_inversion(field, x_1, grid, **settings)
    counted = [[field.count[step, row] for row in range(4)] for step in range(4)]
    assert together.evaluations.tolist() == counted
    assert together.evaluations[:, 1].sum() < together.evaluations[:, 3].sum()
    assert (together.evaluations < 13).all() and (together.residuals <= 1e-4).all()
    for average in (False, True):
        together = fixed_point_inversion(Linear(rates), x_1, grid, average=average, **settings)
        for row in range(4):
            alone = fixed_point_inversion(
                Linear(rates[[row]]), x_1[[row]], grid, average=average, **settings
            )
            assert torch.equal(alone.evaluations[:, 0], together.evaluations[:, row])
            for one, all_ in (  # sums over rows of another number may round otherwise
                (alone.trajectory[:, 0], together.trajectory[:, row]),
                (alone.residuals[:, 0], together.residuals[:, row]),
            ):
                torch.testing.assert_close(one, all_, atol=1e-6, rtol=1e-6)


def test_a_field_that_treats_all_rows_alike_needs_no_select() -> None:
    sizes = []

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        sizes.append(len(x))
        return 0.5 * x * x.abs().amax(1, keepdim=True)

    x_1 = torch.tensor([[0.0, 0.0], [1e-3, 0.0], [1.0, 0.5]])
    result = fixed_point_inversion(velocity, x_1, uniform(2).float(), iterations=9, tolerance=1e-5)
    assert min(sizes) == 1 and sum(sizes) == result.evaluations.sum()


def test_warm_start_saves_evaluations() -> None:
    x_1, grid = torch.randn(2, 16), uniform(15).float()

    def velocity(x: Tensor, t: Tensor, step: int) -> Tensor:
        return torch.tanh(x + t) - 2 * x

    spent = {
        warm: fixed_point_inversion(
            velocity, x_1, grid, iterations=20, tolerance=1e-3, warm_start=warm
        )
        for warm in (False, True)
    }
    assert spent[True].evaluations.sum() < 0.8 * spent[False].evaluations.sum()
    # At a fixed budget, a warm start is as good as one more evaluation.
    fine = fixed_point_inversion(velocity, x_1, grid, iterations=40).trajectory
    errors = {}
    for warm, iterations in ((True, 1), (False, 1), (False, 2)):
        result = fixed_point_inversion(velocity, x_1, grid, iterations=iterations, warm_start=warm)
        errors[warm, iterations] = (result.trajectory[0] - fine[0]).norm().item()
    assert errors[True, 1] < 0.5 * errors[False, 1]
    assert errors[True, 1] < 1.5 * errors[False, 2]


@pytest.mark.parametrize("rate", [1.5, 3.0, 4.0, 10.0, 100.0, -3.0])
def test_iterates_do_not_blow_up_where_the_map_does_not_contract(rate: float) -> None:
    """Undamped, six evaluations would take the error to |hλ|⁶ times its size."""
    rates, x_1 = torch.tensor([rate], dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    exact = exact_inverse(rates, x_1, ONE_STEP)[0]
    result = fixed_point_inversion(Linear(rates), x_1, ONE_STEP, iterations=5)
    error = (result.trajectory[0] - exact).norm() / (x_1 - exact).norm()
    assert error < (0.1 if rate > 0 else 1.1)
    assert result.evaluations.item() == 6


def test_damping_with_many_rates_at_once() -> None:
    """Rates from 0.1 to 5 in one state: no single step length suits all."""
    matrix = torch.diag(torch.linspace(0.1, 5, 20, dtype=torch.float64))
    x_1 = torch.randn(1, 20, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(20) + matrix, x_1[0])
    errors = []
    for iterations in (5, 40, 200):
        result = fixed_point_inversion(
            lambda x, t, step: x @ matrix, x_1, ONE_STEP, iterations=iterations
        )
        errors.append(((result.trajectory[0, 0] - exact).norm() / (x_1[0] - exact).norm()).item())
    assert errors[0] < 1 and errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_the_papers_average_is_never_damped() -> None:
    rates, x_1 = torch.tensor([2.0], dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    exact = exact_inverse(rates, x_1, ONE_STEP)[0]
    result = fixed_point_inversion(Linear(rates), x_1, ONE_STEP, iterations=2, average=True)
    torch.testing.assert_close(result.trajectory[0] - exact, (-2 + 4 - 8) / 3 * (x_1 - exact))


def test_what_is_not_a_number_stays_visible() -> None:
    result = fixed_point_inversion(
        lambda x, t, step: x * torch.nan, torch.ones(1, 2), uniform(3).float(), iterations=4
    )
    assert result.trajectory[:-1].isnan().all()
    assert result.residuals.isnan().all()


def test_stopped_at_the_query_the_velocities_are_those_there() -> None:
    rates, x_1 = torch.tensor([0.0, 0.9, 6.0], dtype=torch.float64), randn(3, 5)
    settings: dict[str, Any] = {"iterations": 3, "tolerance": 1e-3, "warm_start": True}
    for grid in (uniform(5), shifted(5, 3.0), 0.3 + 0.7 * uniform(4)):
        path = fixed_point_inversion(Linear(rates), x_1, grid, stop_at_query=True, **settings)
        assert path.velocities is not None and path.offsets is None
        for i, (t, h) in enumerate(zip(grid[:-1], grid.diff(), strict=True)):
            here, there = path.trajectory[i], path.trajectory[i + 1]
            v = Linear(rates)(here, t, i)
            torch.testing.assert_close(path.velocities[i], v)
            correction = path.correction(grid, i)
            assert correction is not None
            torch.testing.assert_close(correction, there - here - h * v)
            # It is G(y) − y, whose size is the residual's.
            relative = correction.norm(dim=1) / (here + correction).norm(dim=1)
            torch.testing.assert_close(path.residuals[i], relative.float(), rtol=1e-4, atol=1e-7)
        # The rows were done with at different iterations.
        assert (path.evaluations[:, 0] < path.evaluations[:, 2]).any()


def test_stopping_at_the_query_costs_an_iteration_and_no_evaluation() -> None:
    rates, x_1 = torch.tensor([0.4], dtype=torch.float64), randn(1, 4)
    exact = exact_inverse(rates, x_1, ONE_STEP)[0]
    for n in range(4):
        path = fixed_point_inversion(Linear(rates), x_1, ONE_STEP, iterations=n, stop_at_query=True)
        assert path.evaluations.item() == n + 1
        torch.testing.assert_close(path.trajectory[0] - exact, (-0.4) ** n * (x_1 - exact))


def test_elsewhere_the_velocity_is_not_known() -> None:
    x_1, grid = randn(2, 4), uniform(3)
    field = Linear(torch.tensor([0.4, 0.5], dtype=torch.float64))
    for average in (False, True):
        path = fixed_point_inversion(field, x_1, grid, iterations=2, average=average)
        assert path.velocities is None and path.correction(grid, 0) is None
    with pytest.raises(InputError, match="average and stop_at_query exclude each other"):
        get_preset("ftedit", stop_at_query=True)


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("rate", [1.5, 10.0, 100.0])
def test_stopped_at_the_query_where_steps_were_taken_back(rate: float, iterations: int) -> None:
    """The state is then not the last that was asked, and the velocity is still the one there."""
    rates, x_1 = torch.tensor([rate], dtype=torch.float64), randn(1, 4)
    path = fixed_point_inversion(
        Linear(rates), x_1, ONE_STEP, iterations=iterations, stop_at_query=True
    )
    assert path.velocities is not None
    torch.testing.assert_close(
        path.velocities[0], Linear(rates)(path.trajectory[0], ONE_STEP[0], 0)
    )

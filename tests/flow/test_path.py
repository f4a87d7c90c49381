from __future__ import annotations

import itertools
import math

import pytest
import torch

from rectiflow.errors import InputError
from rectiflow.flow import (
    PREDICTIONS,
    AffinePath,
    StraightPath,
    VariancePreservingPath,
    convert,
    from_straight,
    integrate,
    to_straight,
    uniform,
)
from tests.flow.gaussians import TwoGaussians

WEIGHTS = [1e-3, 0.03, 0.5, 0.9, 0.9999995]
ALPHAS = torch.linspace(0.98, 0.02, 30, dtype=torch.float64)
PATHS = {
    "straight": StraightPath(),
    "variance preserving": VariancePreservingPath(ALPHAS),
    "circle": AffinePath(
        lambda t: torch.sin(t * math.pi / 2), lambda t: torch.cos(t * math.pi / 2)
    ),
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth(x_0: torch.Tensor, x_1: torch.Tensor, a: float, b: float) -> dict[str, torch.Tensor]:
    return {
        "epsilon": x_0,
        "sample": x_1,
        "v_prediction": a * x_0 - b * x_1,
        "velocity": x_1 - x_0,
    }


@pytest.mark.parametrize(("source", "target"), list(itertools.product(PREDICTIONS, repeat=2)))
@pytest.mark.parametrize("a", WEIGHTS)
@pytest.mark.parametrize("b", WEIGHTS)
def test_conversions_give_the_definition_and_round_trip(source, target, a, b):
    x_0, x_1 = randn(4, 3, 5, seed=1), randn(4, 3, 5, seed=2)
    x_t, known = a * x_1 + b * x_0, truth(x_0, x_1, a, b)
    there = convert(known[source], x_t, a, b, source=source, target=target)
    torch.testing.assert_close(there, known[target], rtol=0, atol=1e-10)
    back = convert(there, x_t, a, b, source=target, target=source)
    torch.testing.assert_close(back, known[source], rtol=0, atol=1e-10)


def test_every_sample_has_its_own_weights():
    x_t, value = randn(3, 2, 4, 4, seed=1), randn(3, 2, 4, 4, seed=2)
    a, b = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.8, 0.4, 0.3])
    whole = convert(value, x_t, a, b, source="epsilon", target="velocity")
    for i in range(3):
        alone = convert(value[i], x_t[i], a[i], b[i], source="epsilon", target="velocity")
        torch.testing.assert_close(whole[i], alone)
    shaped = convert(
        value, x_t, a.view(3, 1, 1, 1), b.view(3, 1, 1, 1), source="epsilon", target="velocity"
    )
    assert torch.equal(shaped, whole)


def test_the_result_has_the_dtype_of_the_state():
    x = torch.ones(2, 3)
    double = torch.tensor([0.5, 0.6], dtype=torch.float64)
    assert convert(x, x, double, double, source="epsilon", target="sample").dtype == torch.float32
    assert to_straight(x, double, double)[0].dtype == torch.float32


@pytest.mark.parametrize(("source", "a", "b"), [("epsilon", 0.0, 1.0), ("sample", 1.0, 0.0)])
def test_a_prediction_that_determines_nothing_is_refused(source, a, b):
    x = torch.ones(1, 2)
    with pytest.raises(InputError, match="keep a and b above 0"):
        convert(x, x, a, b, source=source, target="velocity")


def test_an_unknown_prediction_is_refused():
    x = torch.ones(1, 2)
    with pytest.raises(InputError, match="'v': use one of epsilon, sample"):
        convert(x, x, 0.5, 0.5, source="v", target="velocity")


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_path_and_its_velocity(path):
    x_0, x_1 = randn(3, 2, seed=1), randn(3, 2, seed=2)
    t, h = torch.tensor([0.11, 0.5, 0.83], dtype=torch.float64), 1e-6
    point = path.sample(x_0, x_1, t)
    a, b = path.coefficients(t)
    torch.testing.assert_close(point.x_t, a[:, None] * x_1 + b[:, None] * x_0)
    difference = (path.sample(x_0, x_1, t + h).x_t - path.sample(x_0, x_1, t - h).x_t) / (2 * h)
    torch.testing.assert_close(point.dx_t, difference, rtol=1e-6, atol=1e-6)
    # knowing x_0 and the state is knowing the velocity
    velocity = path.velocity(x_0, point.x_t, t, source="epsilon")
    torch.testing.assert_close(velocity, point.dx_t, rtol=1e-10, atol=1e-10)


def test_the_straight_path_is_what_it_says():
    x_0, x_1 = randn(2, 3, seed=1), randn(2, 3, seed=2)
    point = StraightPath().sample(x_0, x_1, 0.25)
    torch.testing.assert_close(point.x_t, 0.75 * x_0 + 0.25 * x_1)
    torch.testing.assert_close(point.dx_t, x_1 - x_0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_any_path_becomes_the_straight_one_and_back(path):
    x_0, x_1 = randn(3, 2, seed=1), randn(3, 2, seed=2)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    a, b = path.coefficients(t)
    x_t = path.sample(x_0, x_1, t).x_t
    x, s = to_straight(x_t, a, b)
    torch.testing.assert_close(x, StraightPath().sample(x_0, x_1, s).x_t)
    torch.testing.assert_close(from_straight(x, a, b), x_t)


def test_the_curved_flow_and_the_straight_one_are_one_coupling():
    # the circle's own flow, taken to the straight path at its end, is where the straight flow leads
    data, circle = TwoGaussians(0.7, 0.4), PATHS["circle"]

    def curved(x_t: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        return circle.velocity(data.epsilon(x_t, *circle.coefficients(t)), x_t, t, source="epsilon")

    x_0, grid = randn(4, 3), 0.05 + 0.9 * uniform(200)
    (a_0, b_0), (a_1, b_1) = circle.coefficients(grid[0]), circle.coefficients(grid[-1])
    start = from_straight(data.state(x_0, a_0 / (a_0 + b_0)), a_0, b_0)
    x, s = to_straight(integrate(curved, start, grid, "rk4").x, a_1, b_1)
    torch.testing.assert_close(x, data.state(x_0, s), rtol=0, atol=1e-8)


def test_paths_work_in_inference_mode():
    with torch.inference_mode():
        dx_t = PATHS["circle"].sample(torch.ones(1, 2), torch.zeros(1, 2), 1.0).dx_t
    torch.testing.assert_close(dx_t, torch.full((1, 2), -math.pi / 2))

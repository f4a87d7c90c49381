from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.integrate import quad

from rectiflow.errors import InputError
from rectiflow.flow import (
    COSTS,
    Estimate,
    curvature,
    integrate,
    make_grid,
    noise_statistics,
    shifted,
    straightness,
    transport_cost,
    uniform,
)
from tests.flow.gaussians import TwoGaussians

GAUSSIANS = [TwoGaussians(0.7, 0.4), TwoGaussians(0.0, 2.5), TwoGaussians(-3.0, 1.0)]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normalised(*shape: int) -> torch.Tensor:
    """Noise whose mean square is exactly 1, so that closed forms hold with no sampling error."""
    x = randn(*shape)
    return x / x.square().mean().sqrt()


@pytest.mark.parametrize("data", GAUSSIANS)
@pytest.mark.parametrize("given", [False, True], ids=["polygon", "velocity"])
def test_straightness_between_two_gaussians_is_its_closed_form(data, given):
    x_0, grid = normalised(3, 2, 4), uniform(400)
    trajectory = integrate(data.velocity, x_0, grid, "rk4", keep_trajectory=True).trajectory
    estimate = straightness(trajectory, grid, data.velocity if given else None)
    assert data.straightness == pytest.approx(data.scale * (2 - math.pi / 2))
    assert estimate.value == pytest.approx(data.straightness, rel=1e-4)


@pytest.mark.parametrize("data", GAUSSIANS)
def test_the_closed_form_is_the_integral_it_stands_for(data):
    def speed(t: float) -> float:
        return (t * data.scale**2 - (1 - t)) / float(data.sigma(t))

    value, _ = quad(lambda t: (data.scale - 1 - speed(t)) ** 2, 0, 1)
    assert data.straightness == pytest.approx(value, rel=1e-8)


def test_the_polygon_is_a_lower_bound_of_second_order():
    data, x_0 = TwoGaussians(0.7, 0.4), normalised(4, 5)
    gaps = []
    for n in (50, 100, 200):
        grid = uniform(n)
        gaps.append(data.straightness - straightness(data.trajectory(x_0, grid), grid).value)
    assert min(gaps) > 0
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_straightness_on_any_grid_in_either_direction(given, backwards):
    data, x_0, grid = TwoGaussians(0.7, 0.4), normalised(3, 4), shifted(400, 3.0)
    grid = grid.flip(0) if backwards else grid
    estimate = straightness(data.trajectory(x_0, grid), grid, data.velocity if given else None)
    assert estimate.value == pytest.approx(data.straightness, rel=1e-3)


@pytest.mark.parametrize("given", [False, True])
def test_a_straight_flow_has_no_straightness_to_lose(given):
    x_0, x_1 = randn(4, 3, seed=1), randn(4, 3, seed=2)
    grid = make_grid("shifted", 7, shift=3.0)
    velocity = (lambda x, t, step: x_1 - x_0) if given else None
    trajectory = integrate(lambda x, t, step: x_1 - x_0, x_0, grid, keep_trajectory=True).trajectory
    assert straightness(trajectory, grid, velocity).value < 1e-10
    assert curvature(trajectory, grid).value < 1e-10


def test_on_part_of_a_grid_the_mean_velocity_is_that_of_the_part():
    x_0, grid = randn(4, 3), make_grid("uniform", 6, start=0.5)
    trajectory = integrate(
        lambda x, t, step: torch.ones_like(x), x_0, grid, keep_trajectory=True
    ).trajectory
    assert straightness(trajectory, grid).value < 1e-10


def test_samples_and_standard_error():
    data, grid = TwoGaussians(0.0, 0.4), uniform(300)
    x_0 = randn(5, 6)
    estimate = straightness(data.trajectory(x_0, grid), grid)
    expected = data.straightness * x_0.square().mean(1)  # S of a sample ∝ ‖x_0‖²
    torch.testing.assert_close(estimate.samples, expected, rtol=1e-3, atol=0)
    assert estimate.value == pytest.approx(float(estimate.samples.mean()))
    assert estimate.standard_error == pytest.approx(scipy.stats.sem(estimate.samples.numpy()))


def test_the_standard_error_covers_the_truth():
    # 95 % intervals of 200 means: about 190 of them hold the expectation
    data = TwoGaussians(0.7, 0.4)
    held = 0
    for seed in range(200):
        x_0 = randn(100, 2, seed=seed)
        estimate = transport_cost(x_0, data.state(x_0, 1.0))
        held += abs(estimate.value - data.transport_cost) < 1.96 * estimate.standard_error
    assert 180 <= held <= 199


def test_a_single_sample_has_no_standard_error():
    assert math.isnan(Estimate.over(torch.ones(1)).standard_error)


@pytest.mark.parametrize("data", GAUSSIANS)
def test_curvature_between_two_gaussians(data):
    # Z'' = σ'' x_0 with σ'' = s² / σ³
    expected, _ = quad(lambda t: (data.scale**2 / float(data.sigma(t)) ** 3) ** 2, 0, 1)
    x_0 = normalised(3, 4)
    errors = []
    for n in (400, 800):
        grid = uniform(n)
        trajectory = data.trajectory(x_0, grid)
        estimate = curvature(trajectory, grid)
        errors.append(abs(estimate.value - expected))
        assert straightness(trajectory, grid).value <= estimate.value / math.pi**2
    assert errors[0] < 5e-3 * expected
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("backwards", [False, True])
def test_curvature_of_a_parabola_is_exact_on_any_grid(backwards):
    grid = shifted(9, 3.0)
    grid = grid.flip(0) if backwards else grid
    x_0, acceleration = randn(4, 3, seed=1), randn(4, 3, seed=2)
    trajectory = torch.stack([x_0 + t * t / 2 * acceleration for t in grid])
    samples = curvature(trajectory, grid).samples
    torch.testing.assert_close(samples, acceleration.square().mean(1), rtol=1e-8, atol=0)


def test_measures_refuse_what_does_not_fit():
    with pytest.raises(InputError, match="3 states do not lie on a grid of 4 times"):
        straightness(torch.zeros(3, 1, 2), uniform(3))
    with pytest.raises(InputError, match="two steps or more"):
        curvature(torch.zeros(2, 1, 2), uniform(1))
    with pytest.raises(InputError, match="unknown cost 'l3'"):
        transport_cost(torch.zeros(1, 2), torch.zeros(1, 2), "l3")
    with pytest.raises(InputError, match=r"\[B, C, h, w\], not \[2, 3\]"):
        noise_statistics(torch.zeros(2, 3))


def expected_cost(data: TwoGaussians, cost: str, d: int) -> float:
    """E c(m + (s - 1) z) for z ~ N(0, I_d), with d = 1 but for ‖·‖², ‖·‖ of centred data."""
    k = abs(data.scale - 1)
    if cost == "l2_squared":
        return data.transport_cost
    if cost == "l2":  # E of a χ variable
        return k * math.sqrt(2 / d) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))

    def integrand(z: float) -> float:
        return math.log(math.cosh(data.mean + k * z)) * scipy.stats.norm.pdf(z)

    return quad(integrand, -10, 10)[0]


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("data", [TwoGaussians(0.0, 0.4), TwoGaussians(0.0, 2.5)])
def test_transport_cost_between_two_gaussians(cost, data):
    x_0 = randn(20_000, 3, 2)
    estimate = transport_cost(x_0, data.state(x_0, 1.0), cost)
    assert abs(estimate.value - expected_cost(data, cost, 6)) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.01 * estimate.value


@pytest.mark.parametrize("cost", ["l2_squared", "log_cosh"])
def test_transport_cost_with_a_mean(cost):
    data, x_0 = TwoGaussians(1.5, 0.4), randn(20_000, 4)
    estimate = transport_cost(x_0, data.state(x_0, 1.0), cost)
    assert abs(estimate.value - expected_cost(data, cost, 4)) < 4 * estimate.standard_error


def test_the_flow_costs_less_than_the_independent_coupling():
    data, x_0 = TwoGaussians(0.7, 0.4), randn(2000, 4, seed=1)
    independent = data.mean + data.scale * randn(2000, 4, seed=2)
    for cost in COSTS:
        coupled = transport_cost(x_0, data.state(x_0, 1.0), cost)
        assert coupled.value < transport_cost(x_0, independent, cost).value


def test_log_cosh_does_not_overflow():
    cost = transport_cost(torch.zeros(1, 1), torch.full((1, 1), 1e4), "log_cosh").value
    assert cost == pytest.approx(1e4 - math.log(2))
    small = transport_cost(torch.zeros(1, 1), torch.full((1, 1), 1e-3).double(), "log_cosh").value
    assert small == pytest.approx(5e-7, rel=1e-3)


def test_white_noise_looks_white():
    statistics = noise_statistics(randn(4, 16, 64, 64))
    d = 4 * 16 * 64 * 64
    assert statistics.norm == pytest.approx(1, abs=5 / math.sqrt(2 * d))
    assert statistics.kurtosis == pytest.approx(0, abs=5 * math.sqrt(24 / d))
    assert statistics.autocorrelation == pytest.approx(0, abs=5 / math.sqrt(2 * d))


def test_statistics_of_an_item_do_not_mix_with_its_neighbours():
    x = randn(3, 4, 16, 16) * torch.tensor([0.5, 1.0, 2.0]).reshape(3, 1, 1, 1)
    alone = [noise_statistics(x[i : i + 1]) for i in range(3)]
    together = noise_statistics(x)
    for field in ("norm", "kurtosis", "autocorrelation"):
        mean = np.mean([getattr(a, field) for a in alone])
        assert getattr(together, field) == pytest.approx(mean)


def test_the_norm_is_that_of_the_values():
    x = randn(1, 4, 8, 8) + 3
    expected = float(x.norm()) / math.sqrt(256)
    assert noise_statistics(x).norm == pytest.approx(expected)


@pytest.mark.parametrize("law", ["laplace", "uniform", "t"])
def test_kurtosis_is_scipys(law):
    generator = np.random.default_rng(0)
    draws = {
        "laplace": generator.laplace(2.0, 3.0, 4096),
        "uniform": generator.uniform(-1, 4, 4096),
        "t": generator.standard_t(6, 4096),
    }[law]
    ours = noise_statistics(torch.from_numpy(draws).reshape(1, 4, 32, 32)).kurtosis
    assert ours == pytest.approx(scipy.stats.kurtosis(draws))


def test_autocorrelation_of_moving_averages():
    z = randn(1, 8, 257, 257)
    across = (z[..., 1:] + z[..., :-1])[..., 1:, :]  # neighbours in a row share half
    down = (z[..., 1:, :] + z[..., :-1, :])[..., 1:]
    for x in (across, down):
        assert noise_statistics(x).autocorrelation == pytest.approx(0.25, abs=0.01)
    rough = (z[..., 1:] - z[..., :-1])[..., 1:, :]
    assert noise_statistics(rough).autocorrelation == pytest.approx(-0.25, abs=0.01)


def test_autocorrelation_does_not_leak_between_channels_or_items():
    flat = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1).expand(3, 2, 8, 8)  # constant per channel
    assert noise_statistics(flat).autocorrelation == pytest.approx(1)

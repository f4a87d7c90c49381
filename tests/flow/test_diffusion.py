from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from rectiflow.errors import InputError
from rectiflow.flow import (
    PREDICTIONS,
    StraightenedVelocity,
    StraightPath,
    VariancePreservingPath,
    convert,
    integrate,
    to_straight,
    uniform,
    variance_preserving,
)
from tests.flow.gaussians import TwoGaussians


def ddim(**overrides: object) -> DDIMScheduler:
    """Stable Diffusion's scheduler, its table in float64."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    scheduler = DDIMScheduler(**config | overrides)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


SD = VariancePreservingPath(ddim().alphas_cumprod)


def noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Nothing linear, and sensitive to the timestep."""
    return torch.tanh(0.7 * x_t + torch.sin(timestep / 50)) + 0.3 * x_t.roll(1, -1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_euler_is_ddim_step_for_step(prediction_type, steps):
    scheduler = ddim(prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    velocity = StraightenedVelocity(network, SD, prediction_type)
    grid = SD.grid(scheduler.timesteps)
    x_t = noise()
    start = x_t / sum(variance_preserving(grid[0]))
    ours = integrate(velocity, start, grid, keep_trajectory=True).trajectory
    for i, timestep in enumerate(scheduler.timesteps):
        a, b = variance_preserving(grid[i])
        torch.testing.assert_close(to_straight(x_t, a, b)[0], ours[i], rtol=0, atol=1e-10)
        output = network(x_t, timestep.double())
        x_t = scheduler.step(output, timestep, x_t, eta=0.0).prev_sample
    # set_alpha_to_one: the last step ends on x̂_1, where a = 1 and b = 0
    torch.testing.assert_close(x_t, ours[-1], rtol=0, atol=1e-10)


def test_the_table_of_stable_diffusion():
    assert SD.s_min == pytest.approx(0.0640, abs=5e-5)
    assert SD.s_max == pytest.approx(0.9717, abs=5e-5)
    assert sum(variance_preserving(SD.s_min)).item() == pytest.approx(1.066, abs=5e-4)


def test_the_table_is_met_at_whole_timesteps_and_inverted_between_them():
    alphas = ddim().alphas_cumprod
    k = torch.arange(1000, dtype=torch.float64)
    a, b = SD.coefficients(1 - k / 999)
    torch.testing.assert_close(a.square(), alphas, rtol=1e-10, atol=0)
    torch.testing.assert_close(b.square(), 1 - alphas, rtol=1e-10, atol=0)
    fractional = torch.tensor([0.0, 0.25, 17.5, 500.125, 998.75, 999.0], dtype=torch.float64)
    torch.testing.assert_close(SD.timestep(SD.straight_time(fractional)), fractional)
    assert torch.equal(SD.straight_time(torch.tensor([500])), SD.straight_time([500.0]))
    halfway = SD.straight_time(17.5)
    log_snr = torch.logit(alphas)
    assert 2 * torch.logit(halfway) == pytest.approx(float(log_snr[17] + log_snr[18]) / 2)


def test_straight_time_of_the_path_and_of_the_table_agree():
    t = torch.tensor([0.0, 0.123, 0.5, 1.0], dtype=torch.float64)
    a, b = SD.coefficients(t)
    s = a / (a + b)
    torch.testing.assert_close(SD.straight_time((1 - t) * 999), s)
    torch.testing.assert_close(torch.stack(variance_preserving(s)), torch.stack([a, b]))


def test_beyond_the_table_the_field_is_that_of_its_ends():
    velocity = StraightenedVelocity(network, SD)
    x = noise()
    for outside, end in [(0.0, SD.s_min), (1.0, SD.s_max)]:
        there = velocity(x, torch.tensor(outside, dtype=torch.float64))
        assert torch.equal(there, velocity(x, torch.tensor(end, dtype=torch.float64)))


def test_the_last_step_ends_on_the_predicted_sample():
    x, s = noise(), torch.tensor(SD.s_max, dtype=torch.float64)
    velocity = StraightenedVelocity(network, SD, "sample")
    end = integrate(velocity, x, torch.stack([s, torch.ones_like(s)])).x
    a, b = variance_preserving(s)
    predicted = network((a + b) * x, torch.tensor(0.0))
    torch.testing.assert_close(end, predicted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("t", [0.05, 0.4, 0.93])
def test_a_gaussian_has_the_same_velocity_by_either_path(t):
    data = TwoGaussians(0.7, 0.4)
    a, b = SD.coefficients(t)
    x_t = noise()
    x, s = to_straight(x_t, a, b)
    velocity = convert(data.epsilon(x_t, a, b), x_t, a, b, source="epsilon", target="velocity")
    torch.testing.assert_close(velocity, data.velocity(x, s), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_network_gives_the_flow_between_gaussians(prediction_type):
    data = TwoGaussians(0.7, 0.4)

    def network(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        a, b = SD.coefficients(1 - timestep / 999)
        epsilon = data.epsilon(x_t, a, b)
        return convert(epsilon, x_t, a, b, source="epsilon", target=prediction_type)

    x_0 = noise()
    grid = SD.s_min + (SD.s_max - SD.s_min) * uniform(200)
    velocity = StraightenedVelocity(network, SD, prediction_type)
    end = integrate(velocity, data.state(x_0, SD.s_min), grid, "rk4").x
    torch.testing.assert_close(end, data.state(x_0, SD.s_max), rtol=0, atol=1e-8)


def test_the_cost_of_guidance_is_carried_through():
    class Guided:
        samples_per_row = 2

        def __call__(self, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return x_t

    grid = SD.grid([900, 500, 100])
    assert integrate(StraightenedVelocity(Guided(), SD), noise(), grid).nfe == 2 * 2 * 3


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([0.5], "two or more"),
        ([0.1, 0.5, 0.9], "falling"),
        ([0.9, 0.5, 0.5], "falling"),
        ([0.9, 0.5, 0.0], r"2\*\*-24"),
        ([1.0, 0.5, 0.1], "inside"),
        ([[0.9, 0.5]], "falling list"),
        ([0.9, float("nan"), 0.1], "falling"),
    ],
)
def test_a_wrong_table_is_refused(table, message):
    with pytest.raises(InputError, match=message):
        VariancePreservingPath(table)


def test_float32_is_enough_for_sampling():
    grid = SD.grid(torch.arange(981, 0, -20))
    velocity = StraightenedVelocity(network, SD)
    exact = integrate(velocity, noise(), grid).x
    single = integrate(velocity, noise().float(), grid.float()).x
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-4)


def test_the_straight_path_is_its_own_straightening():
    a, b = StraightPath().coefficients(torch.tensor([0.0, 0.3, 1.0]))
    x, s = to_straight(torch.ones(3, 2), a, b)
    assert torch.equal(x, torch.ones(3, 2))
    assert torch.equal(s, torch.tensor([0.0, 0.3, 1.0]))

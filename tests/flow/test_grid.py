from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from rectiflow.errors import InputError
from rectiflow.flow import (
    GRIDS,
    active_steps,
    check_grid,
    diffusers_default,
    dynamic_mu,
    make_grid,
    part,
    shift_time,
    shifted,
    uniform,
)

ULP = 1.2e-7  # of float32 near 1, where diffusers keeps σ and we keep t


@pytest.mark.parametrize("shift", [1.0, 1.5, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 15, 28, 50])
def test_diffusers_is_the_schedulers_own_grid(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    exact = 1 - diffusers_default(steps, shift)
    torch.testing.assert_close(exact.float(), scheduler.sigmas, rtol=1e-6, atol=1e-9)
    ours = make_grid("diffusers", steps, shift=shift)
    torch.testing.assert_close(1 - ours, scheduler.sigmas, rtol=0, atol=ULP)


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_diffusers_with_a_dynamic_shift_shifts_once(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.set_timesteps(steps, mu=0.7)
    ours = make_grid("diffusers", steps, shift=math.exp(0.7), dynamic_shift=True)
    torch.testing.assert_close(1 - ours, scheduler.sigmas, rtol=0, atol=ULP)


def test_diffusers_with_another_table():
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100, shift=3.0)
    scheduler.set_timesteps(7)
    ours = 1 - diffusers_default(7, 3.0, num_train_timesteps=100)
    torch.testing.assert_close(ours.float(), scheduler.sigmas, rtol=1e-6, atol=1e-9)


def test_diffusers_has_the_faults_of_the_specification():
    sigmas = (1 - make_grid("diffusers", 4, shift=3.0)).tolist()
    assert sigmas == pytest.approx([1, 0.858, 0.602, 0.009, 0], abs=5e-4)
    assert (1 - make_grid("shifted", 4, shift=3.0)).tolist() == pytest.approx(
        [1, 0.9, 0.75, 0.5, 0]
    )


@pytest.mark.parametrize("steps", [1, 4, 28])
def test_shifted_is_what_the_scheduler_does_to_explicit_sigmas(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    ours = 1 - make_grid("shifted", steps, shift=3.0)
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=0, atol=ULP)


@pytest.mark.parametrize("num_tokens", [64, 256, 1024, 4096, 6000])
@pytest.mark.parametrize("steps", [1, 4, 28])
def test_dynamic_is_what_flux_does(num_tokens, steps):
    mu = calculate_shift(num_tokens)
    assert dynamic_mu(num_tokens) == pytest.approx(mu)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = 1 - make_grid("dynamic", steps, num_tokens=num_tokens)
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=0, atol=ULP)


def test_a_shift_undoes_its_inverse_and_one_is_none():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3), t)
    assert torch.equal(shift_time(t, 1.0), t)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 30, 1000])
def test_every_named_grid_is_a_grid(name, steps):
    grid = make_grid(name, steps, shift=3.0, num_tokens=1024)
    check_grid(grid)
    assert grid.dtype == torch.float32
    assert grid.shape == (steps + 1,)
    assert grid[0] == 0
    assert grid[-1] == 1


def test_a_grid_of_ones_own():
    own = [0.0, 0.1, 0.7, 1.0]
    assert make_grid(own).tolist() == pytest.approx(own)
    assert torch.equal(make_grid(torch.tensor(own), 3), torch.tensor(own))
    double = torch.tensor([0.1, 1 / 3, 1.0], dtype=torch.float64)
    assert torch.equal(make_grid(double, dtype=torch.float64), double)


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0, 4, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (1, 3, [0.25, 0.5, 0.75]),
        (0.25, 0.75, [0.25, 0.5, 0.75]),
        (0.3, 0.6, [0.3, 0.5, 0.6]),
        (0.3, 0.4, [0.3, 0.4]),
        (0.1, 2, [0.1, 0.25, 0.5]),
        (-1.0, 2.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_a_part_of_a_grid(start, stop, expected):
    assert make_grid("uniform", 4, start=start, stop=stop).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("steps", [3, 7, 30, 49])
def test_parts_meet(steps):
    grid = shifted(steps, 3.0)
    for i in range(1, steps):
        for where in (i, float(grid[i]), float(grid[i].float())):
            head, tail = part(grid, 0, where), part(grid, where, steps)
            joined = torch.cat([head, tail[1:]])
            torch.testing.assert_close(joined, grid, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(grid="unifrom", num_inference_steps=4), "unknown grid 'unifrom'"),
        (dict(grid="uniform"), "needs num_inference_steps"),
        (dict(grid="uniform", num_inference_steps=0), "give 1 or more"),
        (dict(grid="diffusers", num_inference_steps=-3), "give 1 or more"),
        (dict(grid="dynamic", num_inference_steps=4), "needs num_tokens"),
        (dict(grid="shifted", num_inference_steps=4, shift=0.0), "shift is 0.0"),
        (dict(grid="diffusers", num_inference_steps=4, shift=float("nan")), "shift is nan"),
        (dict(grid="shifted", num_inference_steps=2, shift=1e9), "its shift is 1e.09.* shorter"),
        (dict(grid=[0.0]), "two or more"),
        (dict(grid=torch.zeros(2, 2)), "two or more"),
        (dict(grid=[0.0, 0.5, 0.5, 1.0]), "strictly rise"),
        (dict(grid=[0.0, 0.6, 0.5, 1.0]), "strictly rise"),
        (dict(grid=[0.0, float("nan"), 1.0]), "strictly rise"),
        (dict(grid=[0.0, 500.0, 1000.0]), r"\[0, 1\]"),
        (dict(grid=[-0.1, 1.0]), r"\[0, 1\]"),
        (dict(grid=[1.0, 0.5, 0.0]), "reverse it"),
        (dict(grid=[0.0, 0.5, 1.0], num_inference_steps=3), "has 2 steps, not 3"),
        (dict(grid=[0.0, 0.5, 0.5 + 1e-10, 1.0]), "strictly rise"),  # one point in float32
        (dict(grid="uniform", num_inference_steps=4, start=5), "5 is not an index"),
        (dict(grid="uniform", num_inference_steps=4, start=-1), "-1 is not an index"),
        (dict(grid="uniform", num_inference_steps=4, start=0.5, stop=0.5), "nothing of the grid"),
        (dict(grid="uniform", num_inference_steps=4, start=3, stop=1), "nothing of the grid"),
    ],
)
def test_what_is_no_grid_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        make_grid(**arguments)


def test_uniform_is_exact():
    assert uniform(8).tolist() == [i / 8 for i in range(9)]


def test_a_share_of_the_steps_is_that_of_the_numbers_as_written():
    """Whatever floating point makes of the product; and n of N steps are n."""
    for steps in range(1, 129):
        for percent in range(101):
            assert active_steps(percent / 100, steps) == Fraction(percent, 100) * steps // 1
        assert [active_steps(n / steps, steps) for n in range(steps + 1)] == [*range(steps + 1)]

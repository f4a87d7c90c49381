"""Rectified U-Nets: diffusers' sign, times and steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rectiflow.models import (
    generate_latents,
    initial_noise,
)
from rectiflow.models.schedulers import rectified_scheduler
from tests.tiny_sd import asked, tiny_sd_model

PROMPTS = ["two red apples", "a blue dog on the green background"]


@pytest.mark.parametrize(
    ("steps", "shift"), [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (25, 1.0), (1, 3.0), (4, 3.0)]
)
def test_euler_on_a_rectified_network_is_stock_unipc(steps: int, shift: float) -> None:
    model = tiny_sd_model(rectified=True)
    model.pipeline.scheduler = rectified_scheduler(shift)
    model.pipeline.set_progress_bar_config(disable=True)
    told: list[float] = []
    model.network.register_forward_pre_hook(
        lambda _module, args: told.append(float(args[1].flatten()[0]))
    )
    noise = initial_noise(model, [3, 4], 32, 32)
    arguments = {"num_inference_steps": steps, "guidance_scale": 1.0}
    theirs = model.pipeline(PROMPTS, latents=noise, output_type="latent", **arguments).images
    stock, told[:] = list(told), []
    solution = generate_latents(model, PROMPTS, noise, **arguments)
    torch.testing.assert_close(solution.x, theirs, atol=5e-6, rtol=0)
    assert told == stock == model.pipeline.scheduler.timesteps.tolist()
    assert told[0] == 999
    sigmas = model.pipeline.scheduler.sigmas
    torch.testing.assert_close(1 - model.student_grid(steps), sigmas, atol=2e-7, rtol=0)
    assert solution.nfe == 2 * steps


def test_timesteps_of_a_rectified_network_are_diffusers_integers_at_any_number_of_steps() -> None:
    """Also where 1000 σ is an integer but for rounding."""
    model = tiny_sd_model(rectified=True)
    told: list[Tensor] = []
    model.predict = lambda x_t, timestep, cond: told.append(timestep) or x_t  # type: ignore[method-assign, func-returns-value]
    cond, scheduler = model.encode_prompt("cat"), model.pipeline.scheduler
    for steps in [*range(1, 60), 100, 111, 250, 333, 500, 999]:
        scheduler.set_timesteps(steps)
        told.clear()
        for t in model.student_grid(steps)[:-1]:
            model.velocity(torch.zeros(1, 1, 1, 1), t, cond)
        off = torch.stack(told) - scheduler.timesteps
        assert not off.any(), (steps, off)
        sigmas = 1 - model.student_grid(steps)
        torch.testing.assert_close(sigmas, scheduler.sigmas, atol=3e-7, rtol=0)


def test_a_rectified_network_is_stored_with_diffusers_sign() -> None:
    model = tiny_sd_model(rectified=True)
    x, cond = torch.randn(2, 4, 8, 8), model.encode_prompt(PROMPTS)
    for t, timestep in ((0.0, 999), (0.25, 750), (1.0, 0), (0.9996, 0)):
        expected = -asked(model, x, torch.tensor(timestep), cond)
        torch.testing.assert_close(model.velocity(x, t, cond), expected, atol=1e-6, rtol=0)

"""DDIM inversion against diffusers' `DDIMInverseScheduler`, and against Euler's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from PIL import Image
from torch import Tensor

import rectiflow as rf
from rectiflow.emoji.caption import caption
from rectiflow.emoji.scene import sample
from rectiflow.errors import InputError
from rectiflow.evaluate.edit_scores import pictures
from rectiflow.flow.grid import uniform
from rectiflow.invert import PRESETS, ddim_inversion, euler_inversion, from_seed, get_preset
from rectiflow.invert.inverting import invert_latents
from rectiflow.models import Conditioning, GuidedVelocity, SDModel, initial_noise
from tests.flow.gaussians import TwoGaussians
from tests.invert.fields import GRIDS, Recorder, randn
from tests.tiny import tiny_model
from tests.tiny_sd import asked, tiny_scheduler, tiny_sd_model

STEPS = 10
"""A divisor of their 1000: else not all of their steps begin where the last one ended."""


TRAILING: dict[str, Any] = {"set_alpha_to_one": True, "timestep_spacing": "trailing"}
LEADING: dict[str, Any] = {"timestep_spacing": "leading"}


def theirs(model: SDModel, kind: type, steps: int, spacing: dict[str, Any] = TRAILING) -> Any:
    """A scheduler of diffusers on exactly the model's table, on the timesteps of our grid."""
    given = {"clip_sample": False, **spacing}
    scheduler = kind.from_config(model.pipeline.scheduler.config, **given)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if not scheduler.config.set_alpha_to_one:
        scheduler.initial_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    return scheduler


def inverted_by_diffusers(
    model: SDModel,
    x: Tensor,
    cond: Conditioning,
    time: str,
    steps: int,
    spacing: dict[str, Any] = TRAILING,
) -> list[Tensor]:
    """Their states at their timesteps, the image's first."""
    scheduler = theirs(model, DDIMInverseScheduler, steps, spacing)
    states = [x]
    timesteps = scheduler.timesteps.tolist()
    # A step leads to its timestep; where it begins, the image has none.
    own = [timesteps[0], *timesteps[:-1]]
    for to, at in zip(timesteps, own, strict=True):
        told = torch.tensor(to if time == "noisier" else at)
        output = asked(model, states[-1].to(model.dtype), told, cond).double()
        states.append(scheduler.step(output, to, states[-1]).prev_sample)
    return states


def straight(
    model: SDModel, states: list[Tensor], steps: int, spacing: dict[str, Any] = TRAILING
) -> Tensor:
    """States of a diffusion model, the image's first, on the straight path, the image's last."""
    path = model.diffusion_path
    assert path is not None
    timesteps = theirs(model, DDIMInverseScheduler, steps, spacing).timesteps
    s = path.straight_time(timesteps)
    scale = [1.0, *torch.hypot(s, 1 - s).tolist()]
    return torch.stack([x * by for x, by in zip(states, scale, strict=True)][::-1])


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
@pytest.mark.parametrize("time", ["noisier", "cleaner"])
def test_each_state_is_that_of_diffusers(time: Any, steps: int) -> None:
    model = tiny_sd_model(dtype=torch.float64)
    cond, x_1 = model.encode_prompt(["cat", "dog"]), randn(2, 4, 8, 8)
    path = model.diffusion_path
    assert path is not None
    timesteps = theirs(model, DDIMScheduler, steps).timesteps
    grid = path.grid(timesteps)
    torch.testing.assert_close(grid.float(), model.student_grid(steps))
    ours = ddim_inversion(GuidedVelocity(model, cond), x_1, grid, time=time)
    expected = straight(model, inverted_by_diffusers(model, x_1, cond, time, steps), steps)
    torch.testing.assert_close(ours.trajectory, expected, rtol=0, atol=1e-10)
    assert ours.evaluations.tolist() == [[1, 1]] * steps and ours.residuals.isnan().all()


KINDS = ["epsilon", "v_prediction", "sample"]


CONFIGS: dict[str, dict[str, Any]] = {
    "stable-diffusion": {"set_alpha_to_one": False},
    "alpha-one": {},
    "no-offset": {"set_alpha_to_one": False, "steps_offset": 0},
    "of-the-class": {"steps_offset": 0},
}
LEADING_CASES = [
    (steps, config, kind)
    for steps, config in [(7, name) for name in CONFIGS]
    + [(1, "stable-diffusion"), (60, "stable-diffusion")]
    for kind in KINDS
    # Where the image has no noise at all, theirs divides by zero for it.
    if kind != "sample" or "set_alpha_to_one" in CONFIGS[config]
]


@pytest.mark.parametrize(("steps", "config", "kind"), LEADING_CASES)
def test_the_grid_that_diffusers_has_by_default(steps: int, config: str, kind: str) -> None:
    """`DDIMInverseScheduler.from_config` of the model's scheduler; 7 does not divide 1000."""
    model = tiny_sd_model(kind, dtype=torch.float64)
    # Afterwards: a stock pipeline does not leave steps_offset at 0.
    model.pipeline.scheduler = tiny_scheduler(kind, **CONFIGS[config])
    cond, x_1 = model.encode_prompt("cat"), randn(1, 4, 8, 8)
    states = inverted_by_diffusers(model, x_1, cond, "noisier", steps, LEADING)
    expected = straight(model, states, steps, LEADING)
    path = model.diffusion_path
    assert path is not None
    grid = path.grid(theirs(model, DDIMScheduler, steps, LEADING).timesteps)
    torch.testing.assert_close(grid.float(), model.leading_grid(steps))
    preset = get_preset("ddim", num_inference_steps=steps, grid="leading")
    found = invert_latents(GuidedVelocity(model, cond), x_1, grid, preset)
    torch.testing.assert_close(found.trajectory, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_other_predictions_on_trailing_timesteps(kind: str) -> None:
    """From the second step on: in the image theirs sees no noise, and divides by it."""
    model = tiny_sd_model(kind, dtype=torch.float64)
    cond, x_1 = model.encode_prompt("cat"), randn(1, 4, 8, 8)
    path = model.diffusion_path
    assert path is not None
    grid = path.grid(theirs(model, DDIMScheduler, STEPS).timesteps)
    preset = get_preset("ddim", num_inference_steps=STEPS)
    ours = invert_latents(GuidedVelocity(model, cond), x_1, grid, preset).trajectory
    scheduler = theirs(model, DDIMInverseScheduler, STEPS)
    timesteps = scheduler.timesteps.tolist()
    for step in range(1, STEPS):
        at, to = timesteps[step - 1], timesteps[step]
        s = path.straight_time([at, to])
        scale = torch.hypot(s, 1 - s)
        x_t = ours[STEPS - step] / scale[0]
        output = asked(model, x_t, torch.tensor(to), cond)
        after = scheduler.step(output, to, x_t).prev_sample
        torch.testing.assert_close(ours[STEPS - step - 1], after * scale[1], rtol=0, atol=1e-9)


def test_by_name_in_float32() -> None:
    """999 steps are as many as there may be, from timestep 1 on."""
    model = tiny_sd_model(set_alpha_to_one=False)
    picture, cond = Image.effect_noise((32, 32), 80).convert("RGB"), model.encode_prompt("cat")
    for steps in (7, 30):
        inversion = rf.invert(
            model, picture, "cat", preset="ddim", grid="leading", num_inference_steps=steps
        )
        states = inverted_by_diffusers(
            model, inversion.latents.double(), cond, "noisier", steps, LEADING
        )
        expected = straight(model, states, steps, LEADING)
        error = (inversion.trajectory - expected).abs().max() / expected.abs().max()
        assert error < 1e-4  # of timesteps and states in float32, amplified by the steps
        assert inversion.reconstruct().max_abs_latent < 1e-5
    assert len(model.leading_grid(999)) == 1000
    for steps in (0, 1000):
        with pytest.raises(InputError, match=f"num_inference_steps is {steps} of 1000 timesteps"):
            model.leading_grid(steps)
    with pytest.raises(InputError, match="'leading' is of diffusion models"):
        rf.invert(tiny_model(), picture, "cat", grid="leading")


def test_a_seed_on_leading_timesteps() -> None:
    """What is inverted is what diffusers' DDIM generates from this noise."""
    model = tiny_sd_model()
    cond, steps = model.encode_prompt("cat"), 7
    found = from_seed(
        model, "cat", 3, preset="ddim", grid="leading", num_inference_steps=steps,
        guidance_scale=1.0,
    )  # fmt: skip
    scheduler = theirs(model, DDIMScheduler, steps, LEADING)
    x_t = initial_noise(model, [3], 32, 32).double()
    for timestep in scheduler.timesteps:
        output = asked(model, x_t.float(), timestep, cond).double()
        x_t = scheduler.step(output, timestep, x_t).prev_sample
    assert (found.latents - x_t).abs().max() < 1e-4


def test_the_shipped_model_in_float32() -> None:
    model = rf.load("emoji-sd")
    assert isinstance(model, SDModel)
    scenes = [sample(seed) for seed in (2_000_000, 2_000_001)]
    cond = model.encode_prompt([caption(scene) for scene in scenes])
    x_1 = model.encode_image(pictures(scenes))
    steps = 4
    grid = model.student_grid(steps)
    ours = ddim_inversion(GuidedVelocity(model, cond), x_1, grid)
    states = inverted_by_diffusers(model, x_1.double(), cond, "noisier", steps)
    expected = straight(model, states, steps)
    error = (ours.trajectory - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_told_the_time_of_the_state_it_is_eulers() -> None:
    """But for the first step, where DDIM has no timestep and Euler has a velocity."""
    grid = torch.tensor([0.1, 0.3, 0.7, 0.9], dtype=torch.float64)
    one, other = Recorder(), Recorder()
    ours = ddim_inversion(one, randn(3, 4), grid, time="cleaner").trajectory
    torch.testing.assert_close(ours, euler_inversion(other, randn(3, 4), grid).trajectory)
    assert [(float(t), step) for _, t, step in one.calls] == [(0.9, 2), (0.7, 1), (0.3, 0)]


def test_what_the_network_is_told() -> None:
    grid = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    for time, told in (("noisier", [0.7, 0.3, 0.3]), ("cleaner", [0.7, 0.7, 0.3])):
        field = Recorder()
        ddim_inversion(field, randn(3, 4), grid, time=time)  # type: ignore[arg-type]
        assert [float(t) for _, t, _ in field.calls] == told
    near = Recorder()
    ddim_inversion(near, randn(3, 4), torch.tensor([1e-6, 0.3, 1.0], dtype=torch.float64))
    assert [float(t) for _, t, _ in near.calls] == [0.3, 0.3]
    alone = Recorder()
    ddim_inversion(alone, randn(3, 4), grid[[0, -1]])
    assert [float(t) for _, t, _ in alone.calls] == [1.0]  # there is nothing else


@pytest.mark.parametrize("time", ["noisier", "cleaner"])
@pytest.mark.parametrize("grid", ["uniform", "shifted"])
def test_of_order_one_between_gaussians(grid: str, time: Any) -> None:
    flow = TwoGaussians(0.7, 0.4)
    x_0, errors = randn(8, 3), []
    for steps in (512, 1024):
        points = GRIDS[grid](steps)
        found = ddim_inversion(flow.velocity, flow.state(x_0, 1.0), points, time=time)
        errors.append((found.trajectory[0] - x_0).norm())
    assert 0.85 < float((errors[0] / errors[1]).log2()) < 1.15


def test_noise_that_is_all_there_is_comes_back_exactly() -> None:
    """Data that are one point: x_t = t m + (1 − t) x_0, and ε̂ is right whatever the step is."""

    def point(x: Tensor, t: Tensor, step: int = 0) -> Tensor:
        return (2.0 - x) / (1 - t)

    grid = uniform(7)
    x = 0.8 * 2.0 + 0.2 * randn(5, 3)
    inner = torch.cat([grid[grid < 0.8], torch.tensor([0.8], dtype=torch.float64)])
    found = ddim_inversion(point, x, inner, time="cleaner").trajectory
    torch.testing.assert_close(found[0], randn(5, 3))


def test_the_preset_on_a_picture(tmp_path: Path) -> None:
    model = tiny_sd_model()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    inversion = rf.invert(model, picture, "cat", preset="ddim", num_inference_steps=STEPS)
    assert torch.equal(inversion.grid, model.student_grid(STEPS)) and inversion.nfe == STEPS
    cond = model.encode_prompt("cat")
    states = inverted_by_diffusers(model, inversion.latents.double(), cond, "noisier", STEPS)
    assert (inversion.noise - straight(model, states, STEPS)[0]).abs().max() < 1e-4
    # Statistics are of the diffusion model's own last state, which is what is like N(0, I).
    found = inversion.noise_statistics
    assert found is not None
    assert found.norm == pytest.approx(float(states[-1].square().mean().sqrt()), rel=1e-4)
    # Run forward, without compensation, it is diffusers' DDIM.
    scheduler, x_t = theirs(model, DDIMScheduler, STEPS), states[-1]
    for timestep in scheduler.timesteps:
        output = asked(model, x_t.float(), timestep, cond).double()
        x_t = scheduler.step(output, timestep, x_t).prev_sample
    assert (inversion.reconstruct(compensate=False).latents - x_t).abs().max() < 1e-3
    assert inversion.reconstruct().max_abs_latent < 1e-5
    again = rf.Inversion.load(inversion.save(tmp_path / "x"), model)
    edited = rf.edit(model, again, prompts="dog", preset="ddim")
    assert edited.edit_nfe == STEPS and edited.latents.isfinite().all()


def test_an_image_of_a_seed_and_a_part_of_the_way() -> None:
    model = tiny_sd_model()
    result = rf.edit(
        model,
        source_prompt="cat",
        prompts="cat",
        seed=3,
        preset="ddim",
        num_inference_steps=6,
        guidance_scale=1.0,
    )
    torch.testing.assert_close(result.latents, result.inversion.latents)
    pixels = Image.new("RGB", (32, 32), (200, 30, 30))
    part = rf.invert(model, pixels, "cat", preset="ddim", num_inference_steps=6, strength=0.5)
    assert torch.equal(part.grid, model.student_grid(6)[3:])


def test_it_is_an_inversion_of_flows_too() -> None:
    """In a diffusion model's coordinates; with more steps it comes nearer to the flow's own."""
    model, pixels = tiny_model(), Image.new("RGB", (32, 32), (200, 30, 30))
    errors = []
    for steps in (8, 64):
        found = rf.invert(model, pixels, "cat", preset="ddim", num_inference_steps=steps)
        errors.append(float((found.reconstruct(False).latents - found.latents).norm()))
    assert errors[1] < errors[0] / 3
    assert PRESETS["ddim"].num_inference_steps == 50

"""Stable Diffusion XL as a velocity field, held against diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from rectiflow.flow import integrate
from rectiflow.models import (
    GuidedVelocity,
    SDXLModel,
    generate_latents,
    initial_noise,
    load,
)
from rectiflow.models.schedulers import SCHEDULERS
from tests.tiny import CLIP_LENGTH, WIDTH
from tests.tiny_sd import tiny_sdxl_model

PROMPTS = ["two red apples", "a blue dog on the green background"]


@pytest.mark.parametrize(
    ("solver", "kind", "negative"),
    [
        ("dpmpp", "epsilon", None),
        ("dpmpp", "v_prediction", ["sad face", "car"]),
        ("unipc", "v_prediction", None),
        ("ddim", "v_prediction", ["sad face", "car"]),
    ],
)
def test_generates_what_diffusers_generates(
    solver: str, kind: str, negative: list[str] | None
) -> None:
    """Without a negative prompt, too, where a stock pipeline takes zeros."""
    model = tiny_sdxl_model(kind)
    more = {"clip_sample": False} if solver == "ddim" else {}
    scheduler = getattr(diffusers, SCHEDULERS[solver]).from_config(
        model.pipeline.scheduler.config, **more
    )
    parts = {**model.pipeline.components, "scheduler": scheduler}
    pipeline = type(model.pipeline)(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(model, [3, 4], 32, 48)
    arguments: dict[str, Any] = {
        "negative_prompt": negative,
        "num_inference_steps": 6,
        "guidance_scale": 5.0,
    }
    latents: list[Tensor] = []

    def keep(
        _pipeline: Any, step: int, timestep: int, held: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        latents.append(held["latents"])
        return held

    theirs = pipeline(
        PROMPTS,
        latents=noise,
        height=32,
        width=48,
        output_type="pt",
        callback_on_step_end=keep,
        **arguments,
    ).images
    solution = generate_latents(model, PROMPTS, noise, solver=solver, **arguments)
    assert (solution.x - latents[-1]).abs().max() <= 1e-5 * latents[-1].abs().max()
    torch.testing.assert_close(model.decode(solution.x), theirs, atol=1e-5, rtol=0)
    assert solution.nfe == 2 * 2 * 6


def test_the_network_is_told_the_size_of_the_picture() -> None:
    model = tiny_sdxl_model()
    told: list[dict[str, Any]] = []
    model.network.register_forward_pre_hook(
        lambda _module, _args, kwargs: told.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    cond = model.encode_prompt(PROMPTS)
    model.velocity(torch.randn(2, 4, 8, 12), 0.5, cond)
    assert told[0]["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    assert torch.equal(told[0]["text_embeds"], cond.pooled)


def test_prompts_are_embedded_as_diffusers_does() -> None:
    model = tiny_sdxl_model()
    embeds, none, pooled, none_pooled = model.pipeline.encode_prompt(PROMPTS[0])
    cond = model.encode_prompt([PROMPTS[0], ""])
    assert cond.pooled is not None
    assert torch.equal(cond.embeds, torch.cat([embeds, none]))
    assert torch.equal(cond.pooled, torch.cat([pooled, none_pooled]))
    assert not none.any() and not none_pooled.any()
    assert cond.embeds.shape == (2, CLIP_LENGTH, WIDTH)
    model.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert model.encode_prompt("").embeds.any()
    (clip,) = model.tokenize(PROMPTS)
    assert (clip.name, clip.start, clip.stop) == ("clip", 0, CLIP_LENGTH)


def test_euler_on_the_exact_field_is_ddim() -> None:
    model = tiny_sdxl_model()
    for part in ("unet", "text_encoder", "text_encoder_2"):
        getattr(model.pipeline, part).double()
    path, cond = model.diffusion_path, model.encode_prompt("cat")
    assert path is not None
    scheduler = diffusers.DDIMScheduler.from_config(
        model.pipeline.scheduler.config, timestep_spacing="trailing"
    )
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(4)
    x_t = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    grid = path.grid(scheduler.timesteps)
    start = x_t * torch.hypot(grid[0], 1 - grid[0])
    ours = integrate(GuidedVelocity(model, cond), start, grid).x
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]], dtype=torch.float64)
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            epsilon = model.network(
                x_t,
                timestep,
                encoder_hidden_states=cond.embeds,
                added_cond_kwargs={"text_embeds": cond.pooled, "time_ids": sizes},
                return_dict=False,
            )[0]
        x_t = scheduler.step(epsilon, timestep, x_t).prev_sample
    assert (ours - x_t).abs().max() <= 1e-10 * x_t.abs().max()


def test_a_rectified_one_is_stock_unipc() -> None:
    model = tiny_sdxl_model(rectified=True)
    model.pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(model, [3], 32, 32)
    arguments = {"num_inference_steps": 4, "guidance_scale": 1.0}
    theirs = model.pipeline("cat", latents=noise, output_type="latent", **arguments).images
    ours = generate_latents(model, "cat", noise, **arguments).x
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)


def test_models_come_from_folders(tmp_path: Path) -> None:
    made = tiny_sdxl_model("v_prediction")
    made.pipeline.save_pretrained(tmp_path / "xl")
    model = load(tmp_path / "xl")
    assert isinstance(model, SDXLModel)
    assert (model.family, model.prediction_type) == ("sdxl", "v_prediction")
    assert (model.default_solver, model.default_guidance_scale) == ("dpmpp", 5.0)
    x, cond = torch.randn(1, 4, 8, 8), made.encode_prompt("cat")
    expected = made.velocity(x, 0.4, cond)
    # Loaded weights lie in memory otherwise, so that kernels may sum in another order.
    found = model.velocity(x, 0.4, model.encode_prompt("cat"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    image = torch.full((1, 3, 32, 32), 0.3)
    torch.testing.assert_close(
        model.encode_image(image), made.encode_image(image), rtol=1e-4, atol=1e-5
    )

"""Refinement: held against stock image-to-image pipelines, and its two ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image

import rectiflow
from rectiflow.errors import InputError
from rectiflow.flow import make_grid
from rectiflow.models import FlowModel, fit, generate, initial_noise, to_pil, to_tensor
from rectiflow.models.refine import refine, refine_latents
from tests.tiny import T5_LENGTH, tiny_model
from tests.tiny_flux import tiny_flux_model
from tests.tiny_sd import tiny_sd_model

STEPS = 8
PROMPT, NEGATIVE = "two red apples", "sad face"


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.875])
def test_a_diffusion_model_refines_as_stock_ddim(kind: str, share: float) -> None:
    model = tiny_sd_model(kind)
    path = model.diffusion_path
    assert path is not None
    scheduler = DDIMScheduler.from_config(
        model.pipeline.scheduler.config, timestep_spacing="trailing"
    )
    parts = {**model.pipeline.components, "scheduler": scheduler}
    stock = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    latents, noise = torch.randn(1, 4, 8, 8), initial_noise(model, [5], 32, 32)
    # Where its pipeline begins: a timestep, which is a time of ours.
    begun = model.student_grid(STEPS)[STEPS - int(STEPS * share)]
    solution = refine_latents(
        model,
        latents,
        PROMPT,
        noise,
        strength=1 - float(begun),
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
    )
    theirs = _call(stock, latents, share)
    torch.testing.assert_close(solution.x, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
    assert solution.nfe == 2 * int(STEPS * share)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_sd3_refines_as_stock_does(share: float) -> None:
    model = tiny_model()
    stock = StableDiffusion3Img2ImgPipeline(**model.pipeline.components)
    latents, noise = torch.randn(1, 4, 8, 8), initial_noise(model, [5], 32, 32)
    begun = make_grid("diffusers", STEPS, shift=model.shift)[STEPS - int(STEPS * share)]
    solution = refine_latents(
        model,
        latents,
        PROMPT,
        noise,
        strength=1 - float(begun),
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        grid="diffusers",
    )
    theirs = _call(stock, latents, share, max_sequence_length=T5_LENGTH)
    torch.testing.assert_close(solution.x, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def _call(stock: Any, latents: torch.Tensor, share: float, **more: Any) -> torch.Tensor:
    stock.set_progress_bar_config(disable=True)
    return stock(
        PROMPT,
        image=latents,
        negative_prompt=NEGATIVE,
        strength=share,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **more,
    ).images


MODELS = {
    "sd3": tiny_model,
    "flux": tiny_flux_model,
    "sd": tiny_sd_model,
    "rectified": lambda: tiny_sd_model(rectified=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_ends(name: str) -> None:
    """All strength is generation, to the bit; hardly any leaves the picture as the codec has it."""
    model: FlowModel = MODELS[name]()
    size = model.default_size
    before = picture(size, size)
    settings: dict[str, Any] = {"num_inference_steps": 4, "seed": 9}
    whole = refine(model, before, PROMPT, strength=1.0, **settings)
    assert whole == generate(model, PROMPT, solver="euler", **settings)
    pixels, _ = fit(before, model.size_policy)
    through_codec = to_pil(model.decode(model.encode_image(pixels)))[0]
    (least,) = refine(model, before, PROMPT, strength=1e-5, **settings)
    assert largest_difference(least, through_codec) <= 1
    (some,) = refine(model, before, PROMPT, strength=0.5, **settings)
    assert largest_difference(some, through_codec) > 1
    assert largest_difference(some, whole[0]) > 1


def test_above_the_noisiest_state_nothing_is_left_of_the_picture() -> None:
    model = tiny_sd_model()
    assert 0.05 < model.t_min < 0.1
    settings: dict[str, Any] = {"num_inference_steps": 4, "strength": 0.95}
    one, other = (refine(model, picture(seed=s), PROMPT, **settings) for s in (0, 1))
    assert one == other
    one, other = (refine(model, picture(seed=s), PROMPT, strength=0.9) for s in (0, 1))
    assert one != other


def test_sizes_and_batches() -> None:
    """Pictures of all sizes come back in theirs and in order, whatever goes together."""
    model = tiny_model()
    pictures = [picture(32, 24), picture(32, 32, 1), picture(32, 24, 2), picture(50, 41, 3)]
    prompts = ["cat", "dog", "two red apples", "car"]
    settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "strength": 0.6}
    together = rectiflow.refine(model, pictures, prompts, seed=4, **settings)
    assert [one.size for one in together] == [(32, 24), (32, 32), (32, 24), (50, 41)]
    for i, one in enumerate(together):
        (alone,) = refine(model, pictures[i], prompts[i], seed=4 + i, **settings)
        assert largest_difference(alone, one) <= 1
    kinds = [np.asarray(pictures[0]), to_tensor(pictures[1]), *pictures[2:]]
    paired = refine(model, kinds, prompts, seed=[4, 5, 6, 7], batch_size=1, **settings)
    assert all(largest_difference(*two) <= 1 for two in zip(paired, together, strict=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strength": 0.0}, "strength is 0.0"),
        ({"strength": 1.1}, "strength is 1.1"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"solver": "ddim"}, "the solver ddim begins at noise"),
        ({"prompts": ["a", "b"]}, "2 prompts for 1 pictures"),
        ({"images": []}, "no picture"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"images": [picture()], "prompts": PROMPT}
    with pytest.raises(InputError, match=words):
        refine(tiny_sd_model(), **arguments | given)

"""Refining pictures: back to a little noise on the straight path, and the flow from there.

A one-step model's picture is put under noise, ``x_t = (1 − t) x_0 + t x_1`` at t = 1 − strength,
and another model's guided flow takes it to t = 1 again. This is SDEdit (Meng et al. 2022, arXiv
2108.01073) with the picture's own prompt, and what InstaFlow does with SDXL's refiner. As every
model here is a field, every model refines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rectiflow.arguments import checked
from rectiflow.errors import InputError
from rectiflow.flow.grid import RESOLUTION, part
from rectiflow.flow.solver import Callback, Solution, Solver
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import (
    Seed,
    generate_latents,
    grid_points,
    initial_noise,
    negative_prompts,
    noise_sources,
)
from rectiflow.models.images import fit
from rectiflow.models.picture import Picture, load_image
from rectiflow.models.prompts import as_prompts
from rectiflow.models.schedulers import SCHEDULERS

STRENGTH = 0.5


def check_strength(strength: float) -> None:
    """Refuse a strength outside (0, 1].

    Raises:
        InputError: It is outside, or no number.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}: give a share of noise above 0, at most 1")


def refine_latents(
    model: FlowModel,
    latents: Tensor,
    prompts: str | Sequence[str],
    noise: Tensor,
    *,
    strength: float = STRENGTH,
    negative_prompt: str | Sequence[str] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float = 1.0,
    grid: str | Tensor | Sequence[float] | None = None,
    solver: Solver | str = "euler",
    callback_on_step_end: Callback | None = None,
) -> Solution:
    """Put latents under noise and follow the guided flow of prompts from there.

    Args:
        model: The field; a diffusion model's exact one.
        latents: Of the pictures in this model's codec, float32 [B, C, h, w].
        prompts: One per row, or one for all.
        noise: Draws from N(0, I) of the same shape, as from `initial_noise`.
        strength: The share of noise in the state to begin with: t = 1 - strength. At 1, or where
            the field begins later than that, nothing of the latents is left and this is
            `generate_latents`. (diffusers' strength is the share of the steps, whatever time that
            is; with σ the noise at the step where its pipeline begins, give σ, and the same grid.)
        negative_prompt: As in `generate_latents`.
        num_inference_steps: Of the whole grid, of which those after t are made.
        guidance_scale: As in `generate_latents`.
        true_cfg_scale: As in `generate_latents`.
        grid: As in `generate_latents`; the model's default if None.
        solver: As in `flow.integrate`. Those of `SCHEDULERS` begin at noise: for strength 1 alone.
        callback_on_step_end: As in `flow.integrate`.

    Raises:
        InputError: An argument is wrong.
        WorkError: The network returned something that is not a number.
    """
    check_strength(strength)
    latents, noise = latents.to(model.device), noise.to(model.device)
    start = 1 - strength
    if start <= model.t_min + RESOLUTION:
        state, points = noise, grid
    else:
        if isinstance(solver, str) and solver in SCHEDULERS:
            raise InputError(
                f"the solver {solver} begins at noise alone: use euler, ab2 or heun, or strength 1"
            )
        if num_inference_steps is None and (grid is None or isinstance(grid, str)):
            num_inference_steps = model.default_num_inference_steps
        whole = grid_points(
            model, model.default_grid if grid is None else grid, num_inference_steps, latents
        )
        points, num_inference_steps = part(whole, start), None
        state = torch.lerp(noise, latents, points[0].to(latents))
    return generate_latents(
        model,
        prompts,
        state,
        negative_prompt=negative_prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        grid=points,
        solver=solver,
        callback_on_step_end=callback_on_step_end,
        shown_as="refining",
    )


@checked
def refine(
    model: FlowModel,
    images: Picture | Sequence[Picture],
    prompts: str | Sequence[str],
    *,
    strength: float = STRENGTH,
    negative_prompt: str | Sequence[str] | None = None,
    seed: Seed = 0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float = 1.0,
    grid: str | Tensor | Sequence[float] | None = None,
    solver: Solver | str = "euler",
    callback_on_step_end: Callback | None = None,
    batch_size: int | None = None,
) -> list[Image.Image]:
    """Refine pictures by a model: the less strength, the more stays as it is.

    The pictures go through this model's codec, wherever they come from: what is refined is what
    was seen. At strength 1 the result is `generate`'s with the same seed, solver and size.

    Args:
        model: From `load`; it may be another than the one that made the pictures.
        images: One or a list, of any sizes, as `load_image` takes them; `images.fit` brings them to
            the model's.
        prompts: What they show: one for all or one each.
        strength: In (0, 1], as in `refine_latents`.
        negative_prompt: One for all or one each; the empty prompt if None. Not used at guidance 1.
        seed: Item i is put under the noise of `seed + i`; or one seed per item.
        generator: CPU generators to draw from instead, one per item.
        num_inference_steps: Of the whole path from noise, of which the part after 1 - strength is
            made; the model's default if None.
        guidance_scale: The model's default if None.
        true_cfg_scale: As in `generate`.
        grid: As in `generate_latents`; the model's default if None.
        solver: As in `refine_latents`.
        callback_on_step_end: Called as `(step, t, x)` after each step, for each batch.
        batch_size: The most items that go through the network together; all of a size if None.

    Returns:
        Pictures of the sizes that were given, in their order.

    Raises:
        InputError: An argument is wrong.
        WorkError: The network returned something that is not a number.
    """
    given: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
    pictures = [load_image(one) for one in given]
    prompts = as_prompts(prompts)
    prompts = prompts * len(pictures) if len(prompts) == 1 else prompts
    if not pictures:
        raise InputError("no picture: give one or more")
    if len(prompts) != len(pictures):
        raise InputError(f"{len(prompts)} prompts for {len(pictures)} pictures: give one each")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: give 1 or more")
    check_strength(strength)
    sources = noise_sources(seed, generator, len(pictures))
    negatives = negative_prompts(negative_prompt, len(pictures))
    fitted = [fit(picture, model.size_policy) for picture in pictures]
    refined: dict[int, Image.Image] = {}
    for rows in _batches([pixels.shape for pixels, _ in fitted], batch_size):
        pixels = torch.cat([fitted[row][0] for row in rows])
        height, width = pixels.shape[-2:]
        solution = refine_latents(
            model,
            model.encode_image(pixels),
            [prompts[row] for row in rows],
            initial_noise(model, [sources[row] for row in rows], height, width),
            strength=strength,
            negative_prompt=[negatives[row] for row in rows],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            grid=grid,
            solver=solver,
            callback_on_step_end=callback_on_step_end,
        )
        for number, row in enumerate(rows):
            decoded = model.decode(solution.x[number : number + 1])
            refined[row] = fitted[row][1](decoded)[0]
    return [refined[row] for row in range(len(pictures))]


def _batches(shapes: Sequence[torch.Size], batch_size: int | None) -> list[list[int]]:
    """The numbers of pictures that can go through the network together: those of one size."""
    alike: dict[torch.Size, list[int]] = {}
    for number, shape in enumerate(shapes):
        alike.setdefault(shape, []).append(number)
    return [
        rows[first : first + (batch_size or len(rows))]
        for rows in alike.values()
        for first in range(0, len(rows), batch_size or len(rows))
    ]

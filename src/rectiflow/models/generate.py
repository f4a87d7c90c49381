"""Pictures from prompts: noise, our own float32 grid, any solver."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from rectiflow.arguments import LARGEST_SEED, checked
from rectiflow.errors import InputError, WorkError
from rectiflow.flow.device import sent
from rectiflow.flow.grid import RESOLUTION, make_grid
from rectiflow.flow.solver import Callback, Solution, Solver, integrate
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity, guided
from rectiflow.models.images import to_pil
from rectiflow.models.prompts import Conditioning, as_prompts
from rectiflow.models.schedulers import SCHEDULERS, solve_by_scheduler
from rectiflow.progress import steps

Seed = int | Sequence[int]


def initial_noise(
    model: FlowModel, seeds: Sequence[int | torch.Generator], height: int, width: int
) -> Tensor:
    """One draw from N(0, I) per seed, each on the CPU in float32 from a generator of its own.

    So item i is the same bit for bit whatever the batch, the device or the other items.

    Args:
        model: Whose latents.
        seeds: A seed, or a CPU generator to draw from, per item.
        height: In pixels.
        width: In pixels.

    Returns:
        float32 [B, C, h, w] on the model's device.

    Raises:
        InputError: The model cannot take this size, or a seed is out of range.
    """
    shape = model.latent_shape(height, width)
    for seed in seeds:
        if not (isinstance(seed, torch.Generator) or 0 <= seed <= LARGEST_SEED):
            raise InputError(f"seed is {seed}; from 0 to 2**63 - 1")
    generators = [
        seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        for seed in seeds
    ]
    drawn = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return sent(drawn, model.device)


def generate_latents(
    model: FlowModel,
    prompts: str | Sequence[str] | Conditioning,
    latents: Tensor,
    *,
    negative_prompt: str | Sequence[str] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float = 1.0,
    grid: str | Tensor | Sequence[float] | None = None,
    solver: Solver | str | None = None,
    callback_on_step_end: Callback | None = None,
    keep_trajectory: bool = False,
    shown_as: str | None = None,
) -> Solution:
    """Follow the guided flow of prompts from given noise.

    Args:
        model: The field.
        prompts: One per row of the noise, or one for all; or what the model's `encode_prompt` has
            made of them.
        latents: The noise, float32 [B, C, h, w].
        negative_prompt: One for all or one each, by default the empty one. Unused without guidance.
        num_inference_steps: N; the model's default if None.
        guidance_scale: The model's default if None.
        true_cfg_scale: α of a network that takes the guidance as an input, as in `GuidedVelocity`.
        grid: As in `make_grid`, `"shifted"` with the model's own shift; or `"student"`, the model's
            `student_grid`. The model's default if None. Where its field begins later than at 0,
            so does a grid that goes by a name.
        solver: As in `integrate`, or of the Stable Diffusion family one of `SCHEDULERS`, which
            stand on diffusers' timesteps. The model's default if None, or Euler on a given grid.
        callback_on_step_end: As in `integrate`.
        keep_trajectory: As in `integrate`.
        shown_as: What a progress bar of the steps is called; there is none if None.

    Returns:
        The latents at the grid's end, and their cost. The noise is taken for the state at the
        grid's beginning, or brought there by `initial_state` if that is where the field begins.

    Raises:
        InputError: An argument is wrong.
        WorkError: The network returned something that is not a number.
    """
    if solver is None:
        solver = model.default_solver if grid is None else "euler"
    by_scheduler = isinstance(solver, str) and solver in SCHEDULERS
    if by_scheduler and grid is not None:
        raise InputError(f"the solver {solver} stands on diffusers' timesteps: leave the grid out")
    grid = model.default_grid if grid is None else grid
    if num_inference_steps is None and isinstance(grid, str):
        num_inference_steps = model.default_num_inference_steps
    if guidance_scale is None:
        guidance_scale = model.default_guidance_scale
    cond = prompts if isinstance(prompts, Conditioning) else model.encode_prompt(prompts)
    cond = cond.rows(len(latents))
    negative = None
    alpha = guided(model, cond, guidance_scale, true_cfg_scale)[1]
    count = len(grid) - 1 if num_inference_steps is None else num_inference_steps
    if doubt := model.metadata.doubt(model.name, count, alpha):
        warnings.warn(doubt, stacklevel=2)
    if alpha > 1:
        negative = model.encode_prompt("" if negative_prompt is None else negative_prompt)
    velocity = GuidedVelocity(model, cond, negative, guidance_scale, true_cfg_scale)
    latents = latents.to(model.device)
    with steps(shown_as, count) as velocity.on_step:
        if by_scheduler:
            assert isinstance(solver, str) and num_inference_steps is not None
            solution = solve_by_scheduler(
                velocity,
                latents,
                solver,
                num_inference_steps,
                callback_on_step_end=callback_on_step_end,
                keep_trajectory=keep_trajectory,
            )
        else:
            points = grid_points(model, grid, num_inference_steps, latents)
            begins = model.t_min > 0 and abs(float(points[0]) - model.t_min) < RESOLUTION
            solution = integrate(
                velocity,
                model.initial_state(latents) if begins else latents,
                points,
                solver,
                callback_on_step_end=callback_on_step_end,
                keep_trajectory=keep_trajectory,
            )
    if not torch.isfinite(solution.x).all():
        raise WorkError(
            f"{model.name} returned numbers that are not finite in {model.dtype}: use "
            "dtype=torch.bfloat16 or float32"
        )
    return solution


@checked
def generate(
    model: FlowModel,
    prompts: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    seed: Seed = 0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    grid: str | Tensor | Sequence[float] | None = None,
    solver: Solver | str | None = None,
    callback_on_step_end: Callback | None = None,
    batch_size: int | None = None,
) -> list[Image.Image]:
    """Generate a picture for each prompt.

    Args:
        model: From `load`.
        prompts: One or more.
        negative_prompt: One for all or one each, by default the empty one. Unused without guidance.
        seed: Item i is drawn from `seed + i`; or one seed per item.
        generator: CPU generators to draw from instead, one per item.
        latents: The noise itself instead, float32 [B, C, h, w].
        num_inference_steps: The model's default if None.
        guidance_scale: The model's default if None. Up to 1 is none: nothing goes through the
            network twice.
        true_cfg_scale: α of a network that takes the guidance as an input, as in `GuidedVelocity`.
        height: In pixels; the model's default, or that of `latents`, if None.
        width: Likewise.
        grid: A name or your own times, as in `generate_latents`.
        solver: A name or your own, as in `generate_latents`.
        callback_on_step_end: Called as `(step, t, x)` after each step, for each batch.
        batch_size: The most items that go through the network together; all if None.

    Returns:
        RGB pictures in the order of the prompts.

    Raises:
        InputError: An argument is wrong.
        WorkError: The network returned something that is not a number.
    """
    prompts = as_prompts(prompts)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: give 1 or more")
    if latents is None:
        height = model.default_size if height is None else height
        width = model.default_size if width is None else width
        latents = initial_noise(model, noise_sources(seed, generator, len(prompts)), height, width)
    elif len(latents) != len(prompts):
        raise InputError(f"{len(latents)} latents for {len(prompts)} prompts: give one each")
    elif latents.ndim != 4 or latents.shape[1] != model.channels:
        raise InputError(
            f"latents have shape {list(latents.shape)}: give [{len(prompts)}, {model.channels}, "
            "h, w]"
        )
    negatives = negative_prompts(negative_prompt, len(prompts))
    images: list[Image.Image] = []
    for first in range(0, len(prompts), batch_size or len(prompts)):
        chunk = slice(first, first + (batch_size or len(prompts)))
        solution = generate_latents(
            model,
            prompts[chunk],
            latents[chunk],
            negative_prompt=negatives[chunk],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            grid=grid,
            solver=solver,
            callback_on_step_end=callback_on_step_end,
            shown_as=batch_name("generating", chunk, len(prompts)),
        )
        images += to_pil(model.decode(solution.x))
    return images


def batch_name(what: str, rows: slice, count: int) -> str:
    """What is done to a batch of so many items.

    Example:
        >>> batch_name("generating", slice(0, 8), 5), batch_name("generating", slice(4, 8), 9)
        ('generating', 'generating 5 to 8 of 9')
    """
    if rows.stop - rows.start >= count:
        return what
    return f"{what} {rows.start + 1} to {min(rows.stop, count)} of {count}"


def grid_points(
    model: FlowModel,
    grid: str | Tensor | Sequence[float],
    num_inference_steps: int | None,
    latents: Tensor,
) -> Tensor:
    """The grid that `generate_latents` integrates on.

    Args:
        model: Whose shift, beginning and students' grid go into a grid with a name.
        grid: As in `generate_latents`.
        num_inference_steps: N; None only for a grid that is given as times.
        latents: [B, C, h, w]; a shift may depend on their size.

    Returns:
        Rising times [N + 1] on the CPU.

    Raises:
        InputError: There is no such grid, or it does not fit the number of steps.
    """
    if isinstance(grid, str) and grid == "student":
        assert num_inference_steps is not None
        return model.student_grid(num_inference_steps)
    tokens = latents.shape[-2] * latents.shape[-1] // model.patch**2
    points = make_grid(
        grid,
        num_inference_steps,
        shift=model.shift_for(tokens),
        num_tokens=tokens,
        dynamic_shift=model.dynamic_shift,
    )
    if isinstance(grid, str) and model.t_min > 0:
        points = model.t_min + (1 - model.t_min) * points
    return points


def noise_sources(
    seed: Seed, generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[int | torch.Generator]:
    """What each item's noise is drawn from, as `initial_noise` takes it.

    Args:
        seed: Item i has `seed + i`; or one seed per item. Not used if there is a generator.
        generator: One per item, or one for a single item.
        count: The number of items.

    Raises:
        InputError: There is not one each.
    """
    sources: list[int | torch.Generator]
    if isinstance(generator, torch.Generator):
        sources = [generator]
    elif generator is not None:
        sources = list(generator)
    elif isinstance(seed, int):
        sources = [seed + i for i in range(count)]
    else:
        sources = list(seed)
    if len(sources) != count:
        what = "seeds" if generator is None else "generators"
        raise InputError(f"{len(sources)} {what} for {count} prompts: give one each")
    return sources


def negative_prompts(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    """A negative prompt for each item: the same for all, one each, or the empty prompt.

    Raises:
        InputError: There is another number of them.
    """
    negatives = [""] if negative_prompt is None else as_prompts(negative_prompt)
    if len(negatives) == 1:
        return negatives * count
    if len(negatives) != count:
        raise InputError(f"{len(negatives)} negative prompts for {count} prompts: give one each")
    return negatives

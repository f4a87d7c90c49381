"""Inverting: from an image or a seed to the whole path that a flow would have taken to it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rectiflow.arguments import checked
from rectiflow.errors import WorkError
from rectiflow.flow.grid import make_grid
from rectiflow.invert.features import FeatureStore, RecordingField, wanted_features
from rectiflow.invert.presets import INVERSION_PRESET, Preset, get_preset
from rectiflow.invert.result import InversionResult
from rectiflow.invert.schemes import SCHEMES
from rectiflow.invert.trajectory import Inversion
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import generate_latents, initial_noise
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.images import Restore, fit
from rectiflow.models.picture import Picture, load_image
from rectiflow.models.taps import tapped
from rectiflow.progress import steps


@checked
@torch.no_grad()
def invert(
    model: FlowModel,
    image: Picture,
    source_prompt: str | None = None,
    *,
    preset: str | Preset = INVERSION_PRESET,
    **settings: Any,
) -> Inversion:
    """Find the noise from which the model would generate an image under a prompt.

    Args:
        model: from `rectiflow.load`.
        image: a picture of any size: a file, a Pillow image, an array or a tensor.
        source_prompt: what the image shows; the empty prompt when None.
        preset: a name of `PRESETS` or a `Preset`.
        **settings: fields of the preset to replace, such as ``num_inference_steps=15``.

    Returns:
        The whole path, with what it cost and how well it fits.

    Raises:
        InputError: the image cannot be read, or a setting is wrong.
        WorkError: the network returned something that is not a number.
    """
    chosen = get_preset(preset, model.family, **settings)
    started = time.perf_counter()
    picture = load_image(image)
    pixels, restore = fit(picture, model.size_policy)
    found = from_latents(model, model.encode_image(pixels), restore, source_prompt, preset=chosen)
    return dataclasses.replace(found, picture=picture, seconds=time.perf_counter() - started)


@torch.no_grad()
def from_latents(
    model: FlowModel,
    latents: Tensor,
    restore: Restore,
    source_prompt: str | None = None,
    *,
    preset: str | Preset = INVERSION_PRESET,
    **settings: Any,
) -> Inversion:
    """Invert latents, such as an edit's, which then need not go through the codec again.

    Args:
        model: from `rectiflow.load`.
        latents: ``[1, C, h, w]``, float32.
        restore: the way from the model's picture to the user's, as of the inversion edited from.
        source_prompt: what they show; the empty prompt when None.
        preset: as `invert` takes it.
        **settings: fields of the preset to replace.

    Raises:
        InputError: a setting is wrong.
        WorkError: the network returned something that is not a number.
    """
    chosen = get_preset(preset, model.family, **settings)
    started = time.perf_counter()
    grid = grid_for(model, chosen, latents)
    prompt = source_prompt or ""
    inverted = "" if chosen.inversion_prompt == "empty" else prompt
    velocity = GuidedVelocity(model, model.encode_prompt([inverted]))
    with steps("inverting", len(grid) - 1) as velocity.on_step:
        path = invert_latents(velocity, latents, grid, chosen, seeds=[chosen.noise_seed])
    if not torch.isfinite(path.trajectory).all():
        raise WorkError(f"{model.name} returned numbers that are not finite in {model.dtype}")
    return Inversion(
        model=model,
        path=path,
        grid=grid,
        source_prompt=prompt,
        preset=chosen,
        restore=restore,
        nfe=int(path.evaluations.sum()),
        seconds=time.perf_counter() - started,
    )


@torch.no_grad()
def invert_latents(
    velocity: GuidedVelocity,
    latents: Tensor,
    grid: Tensor,
    preset: Preset,
    *,
    seeds: Sequence[int] = (),
) -> InversionResult:
    """Invert a batch of latents ``[B, C, h, w]`` by a preset's scheme.

    Args:
        velocity: the field of the prompts under which to invert, a row each or one for all.
        latents: of the images.
        grid: rising times, on the CPU.
        preset: settings; those that keep features from the inversion have them recorded.
        seeds: of the noise that a noisy scheme draws, one per image; `noise_seed` for all if empty.
    """
    scheme, model = SCHEMES[preset.scheme], velocity.model
    noise = None
    if scheme.noisy:
        drawn = seeds or [preset.noise_seed] * len(latents)
        draws = draw(drawn, latents, len(grid) - 1 if scheme.every_step else 1)
        noise = draws if scheme.every_step else draws[0]
    wanted = wanted_features(model, preset, len(grid) - 1)
    if not wanted:
        return scheme.invert(velocity, latents, grid, preset, noise)
    store = FeatureStore(wanted, preset.keep_features)
    with tapped(model, wanted) as network:
        field = RecordingField(velocity, network, len(latents), store, scheme.accepts)
        path = scheme.invert(field, latents, grid, preset, noise)
        field.close()
    return dataclasses.replace(path, features=store)


def draw(seeds: Sequence[int], like: Tensor, draws: int) -> Tensor:
    """Draws from N(0, I), one after the other from each row's own seed, on the CPU.

    Args:
        seeds: one per row.
        like: ``[B, ...]``: what one draw looks like, and where it goes.
        draws: n.

    Returns:
        ``[n, B, ...]``; the first is `initial_noise`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = like.shape[1:]
    noises = [
        torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        for _ in range(draws)
    ]
    return torch.stack(noises).to(like.device)


@torch.no_grad()
def from_seed(
    model: FlowModel,
    source_prompt: str,
    seed: int,
    *,
    preset: str | Preset = INVERSION_PRESET,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    **settings: Any,
) -> Inversion:
    """The path of a generated image: no inversion is needed, the flow itself came that way.

    For a preset whose path is no inversion, its own path to the generated image.

    Args:
        model: from `rectiflow.load`.
        source_prompt: what to generate.
        seed: of its noise.
        preset: a name of `PRESETS` or a `Preset`.
        guidance_scale: of the generation; the model's default when None.
        height: in pixels; the model's default when None.
        width: in pixels; the model's default when None.
        **settings: fields of the preset to replace.

    Raises:
        InputError: a setting is wrong, or the model does not take this size.
        WorkError: the network returned something that is not a number.
    """
    chosen = get_preset(preset, model.family, **settings)
    started = time.perf_counter()
    height, width = height or model.default_size, width or model.default_size
    noise = initial_noise(model, [seed], height, width)
    if guidance_scale is None:
        guidance_scale = model.default_guidance_scale
    whole = grid_for(model, dataclasses.replace(chosen, strength=1.0), noise)
    if chosen.grid == "leading":  # diffusers takes the noise for the state at the first timestep
        noise = noise * torch.hypot(whole[0], 1 - whole[0])
    solution = generate_latents(
        model,
        [source_prompt],
        noise,
        guidance_scale=guidance_scale,
        grid=whole,
        keep_trajectory=True,
        shown_as="generating",
    )
    assert solution.trajectory is not None
    grid = grid_for(model, chosen, noise)
    size = (width, height)
    steps, nfe = len(grid) - 1, solution.nfe
    path = InversionResult(
        trajectory=solution.trajectory[-steps - 1 :],
        residuals=torch.zeros(steps, 1),
        evaluations=torch.full((steps, 1), nfe // (len(whole) - 1)),
        scheme="euler",
    )
    if not SCHEMES[chosen.scheme].inverts:
        field = GuidedVelocity(model, model.encode_prompt([source_prompt]))
        path = invert_latents(field, solution.x, grid, chosen)
        nfe += int(path.evaluations.sum())
    return Inversion(
        model=model,
        path=path,
        grid=grid,
        source_prompt=source_prompt,
        preset=chosen,
        restore=Restore(size, size, (0, 0), size),
        nfe=nfe,
        seconds=time.perf_counter() - started,
        seed=seed,
        guidance_scale=guidance_scale,
    )


def grid_for(model: FlowModel, preset: Preset, latents: Tensor) -> Tensor:
    """The times that a preset goes along, for a size of latents, on the CPU."""
    tokens = latents.shape[-2] * latents.shape[-1] // model.patch**2
    steps = preset.num_inference_steps
    of_models = {"student": model.student_grid, "leading": model.leading_grid}
    points = make_grid(
        of_models[preset.grid](steps) if preset.grid in of_models else preset.grid,
        steps,
        shift=model.shift_for(tokens),
        num_tokens=tokens,
        dynamic_shift=model.dynamic_shift,
        start=steps - preset.steps,
    )
    return points

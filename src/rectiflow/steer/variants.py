"""Several variants of one edit, each from noise of its own seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from rectiflow.errors import InputError
from rectiflow.invert.inverting import from_latents
from rectiflow.invert.preset import METHOD_FIELDS, SCHEME_FIELDS, Preset
from rectiflow.invert.presets import PRESETS
from rectiflow.invert.schemes import SCHEMES
from rectiflow.invert.trajectory import Inversion
from rectiflow.models.base import FlowModel
from rectiflow.steer.edit_result import EditResult

T = TypeVar("T")


def draws_noise(preset: Preset, generated: bool = False) -> bool:
    """Whether an edit depends on `noise_seed`.

    Args:
        preset: its settings.
        generated: the source is one that a seed generates, whose path needs no inversion.
    """
    if "noise_seed" in METHOD_FIELDS[preset.method]:
        return True
    inverts = SCHEMES[preset.scheme].inverts
    return "noise_seed" in SCHEME_FIELDS[preset.scheme] and not (generated and inverts)


def check_variants(count: int, preset: Preset, inverted: bool, generated: bool) -> None:
    """Refuse variants that would be one picture several times.

    Args:
        count: how many.
        preset: the settings.
        inverted: an inversion is given, which has settled the scheme.
        generated: the source is one that a seed generates.

    Raises:
        InputError: says what to take instead.
    """
    if count < 1:
        raise InputError(f"num_images_per_prompt is {count}; at least 1")
    if count == 1 or draws_noise(preset, generated):
        return
    noisy = [name for name, one in PRESETS.items() if draws_noise(one, generated)]
    remedy = f"take a preset that draws noise ({', '.join(noisy)})"
    if inverted:
        remedy = f"give the picture, or an inversion made by one that does ({', '.join(noisy)})"
    raise InputError(
        f"{count} variants would be equal, since the scheme {preset.scheme} draws no noise"
        f"{' for what a seed generates' if generated else ''}: {remedy}"
    )


def redrawn(inversion: Inversion, model: FlowModel, noise_seed: int | None) -> Inversion:
    """An inversion whose noise is drawn from another seed; the same one where that is its own.

    Args:
        inversion: given.
        model: the network.
        noise_seed: the seed; None for the inversion's.
    """
    own = inversion.preset
    generated = inversion.seed is not None
    if noise_seed in (None, own.noise_seed) or not draws_noise(own, generated):
        return inversion
    preset = dataclasses.replace(own, noise_seed=noise_seed)
    made = from_latents(
        model, inversion.latents, inversion.restore, inversion.source_prompt, preset=preset
    )
    return dataclasses.replace(
        made,
        picture=inversion.picture,
        seed=inversion.seed,
        guidance_scale=inversion.guidance_scale,
    )


def edit_variants(
    edit: Callable[..., EditResult], count: int, noise_seed: int, diagnose: bool
) -> EditResult:
    """Edit several times from noise of seeds that follow each other, as one result.

    Args:
        edit: `rectiflow.edit` with all that it is told besides.
        count: how many.
        noise_seed: the first.
        diagnose: the first is diagnosed.
    """
    seeds = range(noise_seed, noise_seed + count)
    results = [edit(noise_seed=s, diagnose=diagnose and s == noise_seed) for s in seeds]
    first = results[0]

    def mixed(parts: Sequence[Sequence[T]]) -> list[T]:
        """All variants of the first prompt, then those of the next, as diffusers has them."""
        return [one for row in zip(*parts, strict=True) for one in row]

    mask = first.mask
    if mask is not None and len(mask) > 1:
        mask = np.stack(mixed([list(one.mask) for one in results if one.mask is not None]))
    return dataclasses.replace(
        first,
        images=mixed([one.images for one in results]),
        prompts=mixed([one.prompts for one in results]),
        noise_seeds=list(seeds) * len(first.prompts),
        latents=torch.stack(mixed([list(one.latents) for one in results])),
        alignments=mixed([one.alignments for one in results]),
        mask=mask,
        masks=mixed([one.masks for one in results]),
        inversion_nfe=sum(one.inversion_nfe for one in results),
        inversion_seconds=sum(one.inversion_seconds for one in results),
        edit_nfe=sum(one.edit_nfe for one in results),
        edit_seconds=sum(one.edit_seconds for one in results),
        warnings=list(dict.fromkeys(text for one in results for text in one.warnings)),
    )

"""A walk from noise to noise: pictures between the pictures of given seeds.

Noise in d dimensions lies close to the sphere of radius √d, where its mean does not: between two
draws one goes along the sphere (Shoemake 1985, "Animating rotation with quaternion curves").
Prompts are mixed in their embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from rectiflow.arguments import checked
from rectiflow.errors import InputError
from rectiflow.flow.device import precise, take
from rectiflow.flow.path import as_tensor
from rectiflow.flow.solver import Solution
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import batch_name, generate_latents, initial_noise
from rectiflow.models.images import to_pil
from rectiflow.models.prompts import Conditioning, as_prompts

BATCH = 8
"""Frames that go through network and codec together."""


def slerp(x: Tensor, y: Tensor, share: float | Tensor) -> Tensor:
    """Spherical interpolation of each item: its direction turns evenly, its norm changes evenly.

    `x/|x| · sin((1 − w)θ)/sin θ + y/|y| · sin(wθ)/sin θ`, times `(1 − w)|x| + w|y|`, where θ is the
    angle between the two items.

    Args:
        x: [B, ...], each item not zero.
        y: Likewise.
        share: w in [0, 1], one for all or [B]. At 0 the result is x to the last bit, at 1 it is y.

    Returns:
        In the dtype of `x`, computed in float64 where the device has it.

    Raises:
        InputError: Two items are opposite, so that no way between them is the shortest.

    Example:
        >>> slerp(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), 0.5)
        tensor([[1.4142, 1.4142]])
    """
    exact = precise(x.device)
    a, b = x.to(exact).flatten(1), y.to(exact).flatten(1)
    w = as_tensor(share).to(exact).to(x.device).expand(len(x))[:, None]
    norm_a, norm_b = (item.norm(dim=1, keepdim=True) for item in (a, b))
    a, b = a / norm_a, b / norm_b
    # By its half: the arc cosine of a scalar product loses half the digits of a small angle.
    theta = 2 * torch.atan2((a - b).norm(dim=1, keepdim=True), (a + b).norm(dim=1, keepdim=True))
    if bool((torch.pi - theta < 1e-6).any()):
        raise InputError("two noises are opposite, and no way between them is the shortest")
    near = theta < 1e-6  # where the sphere is flat
    sine = torch.where(near, 1.0, theta.sin())
    weight_a = torch.where(near, 1 - w, ((1 - w) * theta).sin() / sine)
    weight_b = torch.where(near, w, (w * theta).sin() / sine)
    between = (weight_a * a + weight_b * b) * torch.lerp(norm_a, norm_b, w)
    between = between.reshape(x.shape).to(x.dtype)
    w = w.reshape(-1, *[1] * (x.ndim - 1))
    return torch.where(w == 0, x, torch.where(w == 1, y, between))


def walk(stops: Tensor, frames: int) -> Tensor:
    """Points of a way along spheres through given noises, the same share of the way apart.

    Args:
        stops: [K, ...], K ≥ 2.
        frames: F ≥ K; the first is `stops[0]`, the last `stops[-1]`, to the last bit.

    Returns:
        [F, ...].

    Raises:
        InputError: Too few stops or frames.
    """
    if len(stops) < 2:
        raise InputError("a way needs two seeds or more, such as 3,9,12")
    if frames < len(stops):
        raise InputError(f"{frames} frames for {len(stops)} seeds: give {len(stops)} or more")
    last = len(stops) - 1
    # In whole numbers, so that a stop that is met is met exactly.
    places = [divmod(frame * last, frames - 1) for frame in range(frames)]
    legs = torch.tensor([min(leg, last - 1) for leg, _ in places])
    shares = torch.tensor(
        [(leg * (frames - 1) + rest) / (frames - 1) for leg, rest in places], dtype=torch.float64
    )
    return slerp(take(stops, legs), take(stops, legs + 1), shares - legs)


def mix(first: Conditioning, last: Conditioning, shares: Sequence[float]) -> Conditioning:
    """Rows between two prompts, their embeddings mixed in straight lines; the ends are exact.

    Args:
        first: One row.
        last: One row.
        shares: Of the last one, in [0, 1]. A text position counts as a token if it is one in
            either prompt that has a share.
    """
    ends = Conditioning.cat([first, last])
    exact = precise(ends.embeds.device)
    w = torch.tensor(shares, dtype=exact, device=ends.embeds.device)

    def between(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        weight = w.reshape(-1, *[1] * (part.ndim - 1))
        if part.dtype == torch.bool:
            return (part[:1] & (weight < 1)) | (part[1:] & (weight > 0))
        # Written so that a weight of 0 or 1 gives the end itself.
        return ((1 - weight) * part[:1].to(exact) + weight * part[1:].to(exact)).to(part.dtype)

    parts = {field.name: getattr(ends, field.name) for field in dataclasses.fields(ends)}
    embeds = between(parts.pop("embeds"))
    assert embeds is not None
    return Conditioning(embeds, **{name: between(part) for name, part in parts.items()})


@torch.no_grad()
def walk_latents(
    model: FlowModel,
    prompts: str | Sequence[str],
    seeds: Sequence[int],
    frames: int = 24,
    *,
    negative_prompt: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    solver: str | None = None,
    batch_size: int = BATCH,
) -> Solution:
    """The latents of `interpolate`, [frames, C, h, w], and their cost."""
    prompts = as_prompts(prompts)
    if len(prompts) > 2:
        raise InputError(f"{len(prompts)} prompts: give one, or two to go from one to the other")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: give 1 or more")
    height = model.default_size if height is None else height
    width = model.default_size if width is None else width
    noise = walk(initial_noise(model, seeds, height, width), frames)
    ends = model.encode_prompt([prompts[0], prompts[-1]])
    cond = mix(ends[0], ends[1], [frame / (frames - 1) for frame in range(frames)])
    solutions = [
        generate_latents(
            model,
            cond[rows],
            noise[rows],
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            true_cfg_scale=true_cfg_scale,
            solver=solver,
            shown_as=batch_name("generating", rows, frames),
        )
        for rows in (slice(first, first + batch_size) for first in range(0, frames, batch_size))
    ]
    return Solution(torch.cat([s.x for s in solutions]), None, sum(s.nfe for s in solutions))


@checked
def interpolate(
    model: FlowModel,
    prompts: str | Sequence[str],
    seeds: Sequence[int],
    frames: int = 24,
    *,
    negative_prompt: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    solver: str | None = None,
    batch_size: int = BATCH,
) -> list[Image.Image]:
    """Pictures on the way from a seed's picture to the next one's, and on.

    Args:
        model: From `load`: a one-step model, for which a frame is one evaluation, or any other.
        prompts: One, or two: from the first to the last frame the one becomes the other.
        seeds: Two or more; the first frame is the first one's picture, the last the last one's. To
            come back, give the first one once more at the end.
        frames: How many pictures, at least one for each seed.
        negative_prompt: As in `generate`.
        num_inference_steps: The model's default if None.
        guidance_scale: The model's default if None.
        true_cfg_scale: As in `generate`.
        height: In pixels; the model's default if None.
        width: Likewise.
        solver: As in `generate_latents`; the model's default if None.
        batch_size: The most frames that go through network and codec together.

    Returns:
        RGB pictures.

    Raises:
        InputError: An argument is wrong.
        WorkError: The network returned something that is not a number.
    """
    solution = walk_latents(
        model,
        prompts,
        seeds,
        frames,
        negative_prompt=negative_prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        height=height,
        width=width,
        solver=solver,
        batch_size=batch_size,
    )
    return decoded(model, solution.x, batch_size)


def decoded(model: FlowModel, latents: Tensor, batch_size: int = BATCH) -> list[Image.Image]:
    """The pictures of latents [F, C, h, w], so many at a time."""
    return [
        picture for chunk in latents.split(batch_size) for picture in to_pil(model.decode(chunk))
    ]

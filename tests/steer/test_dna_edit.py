"""DNAEdit's editing against the paper's own notation, and what it returns."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rectiflow.invert.presets import PRESETS, Preset
from rectiflow.invert.result import InversionResult
from rectiflow.models import SD3Model
from rectiflow.steer import edit_latents
from tests.steer.edits import (
    GRID,
    OWNERS,
    SHAPE,
    SOURCES,
    STEPS,
    TARGETS,
    ask,
    counting,
    random_path,
    task,
)
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


def preset(guidance: float = 1.0, eta: float = 0.8) -> Preset:
    return dataclasses.replace(PRESETS["dnaedit"], guidance_scale=guidance, eta=eta)


@torch.no_grad()
def true_path(model: SD3Model) -> InversionResult:
    """What the scheme returns at best: each step lands where the field at its offset leads."""
    generator = torch.Generator().manual_seed(3)
    offsets = 0.3 * torch.randn(STEPS, 2, *SHAPE, generator=generator)
    states = [torch.randn(2, *SHAPE, generator=generator)]
    cond = model.encode_prompt(SOURCES)
    for step in range(STEPS):
        v = model.velocity(states[-1] + offsets[step], GRID[step], cond)
        states.append(states[-1] + (GRID[step + 1] - GRID[step]) * v)
    return InversionResult.unsolved(states[::-1], offsets=offsets)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_in_the_papers_notation(model: SD3Model, guidance: float, offsets: bool) -> None:
    """Time is σ = 1 − t from noise 1 to image 0, and the velocity u = −v."""
    path = random_path(offsets)
    with counting(model) as calls:
        edited = edit_latents(model, task(model, path), preset(guidance))
    assert edited.nfe == sum(calls) == 3 * STEPS * int(guidance)
    sigmas = 1 - GRID
    for number, (prompt, owner) in enumerate(zip(TARGETS, OWNERS, strict=True)):
        z, reference = path.trajectory[0, [owner]], path.trajectory[-1, [owner]]
        for step in range(STEPS):
            sigma, change = sigmas[step], sigmas[step + 1] - sigmas[step]
            u_hat = (path.trajectory[step + 1, [owner]] - path.trajectory[step, [owner]]) / change
            d = path.offsets[step, [owner]] if path.offsets is not None else 0.0
            u = -ask(model, prompt, z + d, 1 - sigma, guidance)
            reference = reference + change * (u - u_hat)
            u = 0.8 * u + 0.2 * (z - reference) / sigma
            z = z + change * u
        torch.testing.assert_close(edited.latents[number], z[0], atol=1e-4, rtol=1e-4)


def test_the_same_prompt_returns_the_image(model: SD3Model) -> None:
    path = true_path(model)
    same = task(model, path, SOURCES, (0, 1))
    edited = edit_latents(model, same, preset(eta=1.0)).latents
    torch.testing.assert_close(edited, path.trajectory[-1], atol=1e-5, rtol=0)
    other = edit_latents(model, task(model, path), preset(eta=1.0)).latents
    assert (other - path.trajectory[-1][list(OWNERS)]).abs().max() > 1e-2

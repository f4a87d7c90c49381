"""RF-Inversion's editing: its equation, and both ends of η."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rectiflow.flow.solver import integrate
from rectiflow.invert.presets import PRESETS, Preset
from rectiflow.models import SD3Model
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer import edit_latents
from tests.steer.edits import GRID, OWNERS, STEPS, TARGETS, ask, counting, random_path, task
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


def preset(guidance: float = 1.0, eta: float = 0.9, eta_ratio: float = 0.5) -> Preset:
    return dataclasses.replace(
        PRESETS["rf-inversion"], guidance_scale=guidance, eta=eta, eta_ratio=eta_ratio
    )


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_by_the_equation(model: SD3Model, guidance: float) -> None:
    path = random_path()
    with counting(model) as calls:
        edited = edit_latents(model, task(model, path), preset(guidance))
    assert edited.nfe == sum(calls) == 3 * STEPS * int(guidance)
    for number, (prompt, owner) in enumerate(zip(TARGETS, OWNERS, strict=True)):
        x, image = path.trajectory[0, [owner]], path.trajectory[-1, [owner]]
        for step, t in enumerate(GRID[:-1].tolist()):
            v = ask(model, prompt, x, t, guidance)
            if step < 2:  # half of four steps
                v = 0.1 * v + 0.9 * (image - x) / (1 - t)
            x = x + (GRID[step + 1] - t) * v
        torch.testing.assert_close(edited.latents[number], x[0], atol=1e-5, rtol=1e-4)


def test_drawn_all_the_way_the_image_returns(model: SD3Model) -> None:
    path = random_path()
    edited = edit_latents(model, task(model, path), preset(2.0, eta=1.0, eta_ratio=1.0)).latents
    torch.testing.assert_close(edited, path.trajectory[-1][list(OWNERS)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("nothing", [{"eta": 0.0}, {"eta_ratio": 0.0}])
@torch.no_grad()
def test_not_drawn_it_is_plain_generation(model: SD3Model, nothing: dict[str, float]) -> None:
    path = random_path()
    work = task(model, path)
    edited = edit_latents(model, work, preset(2.0, **nothing)).latents
    velocity = GuidedVelocity(model, work.target, work.negative, 2.0)
    free = integrate(velocity, path.trajectory[0][list(OWNERS)], GRID).x
    torch.testing.assert_close(edited, free, atol=1e-5, rtol=0)

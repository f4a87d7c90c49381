"""Uni-Edit against its equations, and where its mask could break."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from rectiflow.flow.solver import integrate
from rectiflow.invert.presets import PRESETS, Preset
from rectiflow.models import SD3Model
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer import edit_latents
from rectiflow.steer.uni_edit import fused
from tests.steer.edits import (
    GRID,
    OWNERS,
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


def preset(guidance: float = 1.0, omega: float = 5.0) -> Preset:
    return dataclasses.replace(PRESETS["uniedit"], guidance_scale=guidance, omega=omega)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_by_the_equations(model: SD3Model, guidance: float) -> None:
    path = random_path()
    with counting(model) as calls:
        edited = edit_latents(model, task(model, path), preset(guidance, omega=0.7))
    assert edited.nfe == sum(calls) == 2 * 3 * STEPS * int(guidance)
    for number, (prompt, owner) in enumerate(zip(TARGETS, OWNERS, strict=True)):
        x = path.trajectory[0, [owner]]
        for t, t_next in pairwise(GRID):
            v_source = ask(model, SOURCES[owner], x, t, guidance)
            v_target = ask(model, prompt, x, t, guidance)
            heat = (v_target - v_source)[0].abs().mean(0)
            m = (heat - heat.min()) / (heat.max() - heat.min())
            v = m * v_target + (1 - m) * v_source + 0.7 * (1 + m) * (v_target - v_source)
            x = x + (t_next - t) * v
        torch.testing.assert_close(edited.latents[number], x[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_with_equal_prompts_it_is_plain_generation(model: SD3Model, guidance: float) -> None:
    path = random_path()
    same = task(model, path, SOURCES, (0, 1))
    edited = edit_latents(model, same, preset(guidance)).latents
    velocity = GuidedVelocity(model, same.target, same.negative, guidance)
    free = integrate(velocity, path.trajectory[0], GRID).x
    assert edited.isfinite().all()
    torch.testing.assert_close(edited, free, atol=1e-4, rtol=0)


def test_where_the_prompts_agree_the_source_goes_on() -> None:
    """One cell disagrees: there M = 1, elsewhere 0; of two samples, each by itself."""
    v_source = torch.randn(2, 4, 3, 5)
    v_target = v_source.clone()
    v_target[0, :, 1, 2] += 3.0
    v = fused(v_source, v_target, omega=0.5)
    expected = v_source.clone()
    expected[0, :, 1, 2] += 3.0 + 0.5 * 2 * 3.0
    torch.testing.assert_close(v, expected)

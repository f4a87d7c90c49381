"""Uni-Edit against its equations, and where its mask could break."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from rectiflow.flow.solver import integrate
from rectiflow.invert.presets import Preset, get_preset
from rectiflow.models import SD3Model
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer import edit_latents
from rectiflow.steer.uni_edit import disagreement, fused
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


def preset(guidance: float = 1.0, omega: float = 5.0, **given: Any) -> Preset:
    return get_preset("uniedit", guidance_scale=guidance, omega=omega, **given)


@pytest.mark.parametrize("disagreement", ["absolute", "signed"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_by_the_equations(model: SD3Model, guidance: float, disagreement: str) -> None:
    path, kind = random_path(), {"disagreement": disagreement}
    with counting(model) as calls:
        edited = edit_latents(model, task(model, path), preset(guidance, 0.7, **kind))
    assert edited.nfe == sum(calls) == 2 * 3 * STEPS * int(guidance)
    for number, (prompt, owner) in enumerate(zip(TARGETS, OWNERS, strict=True)):
        x = path.trajectory[0, [owner]]
        for t, t_next in pairwise(GRID):
            v_source = ask(model, SOURCES[owner], x, t, guidance)
            v_target = ask(model, prompt, x, t, guidance)
            heat = (v_source - v_target)[0]  # as of noise − data
            heat = (heat.abs() if disagreement == "absolute" else heat).mean(0)
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
    v = fused(v_source, v_target, disagreement(v_target - v_source), omega=0.5)
    expected = v_source.clone()
    expected[0, :, 1, 2] += 3.0 + 0.5 * 2 * 3.0
    torch.testing.assert_close(v, expected)


def test_a_token_has_one_value_of_the_map() -> None:
    """Of a patch, the mean over its cells and channels, where latents are packed."""
    delta = torch.randn(2, 4, 4, 6)
    whole = disagreement(delta, patch=2)
    for sample, found in zip(delta, whole, strict=True):
        means = sample.abs().reshape(4, 2, 2, 3, 2).mean((0, 2, 4))
        expected = (means - means.min()) / (means.max() - means.min())
        torch.testing.assert_close(found[0, ::2, ::2], expected)
        torch.testing.assert_close(found[0, 1::2, 1::2], expected)

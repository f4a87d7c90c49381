"""One subject across prompts: all pictures are from one noise, and the first is left as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import rectiflow as rf
from rectiflow.errors import InputError
from rectiflow.models import SD3Model
from rectiflow.models.generate import generate_latents, initial_noise
from tests.steer.edits import counting
from tests.tiny import tiny_model

PROMPTS = ["a red cat on the left", "a red cat on the blue background", "a sad red cat"]
STEPS = 10


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model(t5=True)


def generated(model: SD3Model, prompts: list[str], guidance: float) -> torch.Tensor:
    """Each by itself, of the noise of seed 5."""
    noise = initial_noise(model, [5], 32, 48)
    made = [
        generate_latents(model, p, noise, num_inference_steps=STEPS, guidance_scale=guidance).x
        for p in prompts
    ]
    return torch.cat(made)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_first_is_as_ever_and_without_controls_so_are_the_others(
    model: SD3Model, guidance: float
) -> None:
    given: dict[str, Any] = {"guidance_scale": guidance, "num_inference_steps": STEPS}
    given |= {"seed": 5, "height": 32, "width": 48}
    held = rf.consistent(model, PROMPTS, **given)
    free = rf.consistent(model, PROMPTS, **given, adaln_ratio=0.0, attention_ratio=0.0)
    expected = generated(model, PROMPTS, guidance)
    for result in (held, free):
        assert result.prompts == PROMPTS and len(result.images) == 3
        assert result.images[0].size == (48, 32)
        torch.testing.assert_close(result.edit.inversion.latents[0], expected[0])
    torch.testing.assert_close(free.edit.latents, expected[1:], atol=1e-4, rtol=1e-4)
    assert (held.edit.latents - expected[1:]).abs().max() > 1e-3


def test_held_to_the_end_the_values_are_the_firsts_own(model: SD3Model) -> None:
    """With the same prompt, whatever is taken over from the first changes nothing."""
    prompts = [PROMPTS[0]] * 2
    given: dict[str, Any] = {"num_inference_steps": STEPS, "adaln_ratio": 1.0}
    result = rf.consistent(model, prompts, seed=2, attention_ratio=1.0, **given)
    lead = result.edit.inversion.latents
    torch.testing.assert_close(result.edit.latents, lead, atol=1e-4, rtol=1e-4)


def test_more_attention_to_the_first_is_nearer_to_it(model: SD3Model) -> None:
    given: dict[str, Any] = {"seed": 3, "num_inference_steps": STEPS, "adaln_ratio": 0.0}
    distances = []
    for ratio in (0.0, 1.0):
        result = rf.consistent(model, PROMPTS, attention_ratio=ratio, **given)
        distances.append((result.edit.latents - result.edit.inversion.latents).norm().item())
    assert distances[1] < distances[0]


def test_cost_and_the_models_own_settings(model: SD3Model) -> None:
    with counting(model) as calls:
        result = rf.consistent(model, PROMPTS, seed=1)
    assert result.nfe == sum(calls)
    preset = result.edit.preset
    assert preset.guidance_scale == model.default_guidance_scale
    assert preset.num_inference_steps == model.default_num_inference_steps
    assert result.images[0].size == (model.default_size,) * 2
    (alone,) = rf.generate(model, PROMPTS[0], seed=1)
    difference = np.asarray(alone).astype(int) - np.asarray(result.images[0]).astype(int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    ("prompts", "given", "message"),
    [
        (PROMPTS[:1], {}, "one prompt has nothing to be consistent with"),
        (["a cat", " "], {}, "prompt 2 is empty"),
        (PROMPTS, {"omega": 1.0}, "omega has no effect"),
        (PROMPTS, {"height": 33}, "33"),
    ],
)
def test_what_is_wrong_is_said(
    model: SD3Model, prompts: list[str], given: dict[str, Any], message: str
) -> None:
    with counting(model) as calls, pytest.raises(InputError, match=message):
        rf.consistent(model, prompts, **given)
    assert not calls

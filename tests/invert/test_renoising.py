"""Renoised paths: FlowEdit's coupling, with kept velocities and features, and what they cost."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.invert import get_preset
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.preset import Preset
from rectiflow.models import SD3Model
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer import EditTask, align, edit_latents
from tests.steer.edits import counting
from tests.tiny import tiny_model

SOURCE = ["a red apple on the left", "two lemons"]
TARGET = ["a green apple on the left", "two red hearts"]
SEEDS = (5, 11)


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


def latents() -> Tensor:
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(3))


def task(model: SD3Model, preset: Preset, targets: list[str] = TARGET) -> EditTask:
    x, source = latents(), model.encode_prompt(SOURCE)
    grid = grid_for(model, preset, x)
    return EditTask(
        path=invert_latents(GuidedVelocity(model, source), x, grid, preset, seeds=SEEDS),
        grid=grid,
        source=source,
        target=model.encode_prompt(targets),
        owners=(0, 1),
        token_maps=torch.stack(
            [align(model, s, t).token_map for s, t in zip(SOURCE, targets, strict=True)]
        ),
        seeds=SEEDS,
    )


def without_controls(**settings: object) -> Preset:
    return get_preset(
        "fast", num_inference_steps=6, adaln_ratio=0.0, attention_ratio=0.0, **settings
    )


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_without_controls_it_is_flowedit(model: SD3Model, strength: float) -> None:
    """Two derivations of one method: beside a path of fresh noise, and from image to image."""
    ours = without_controls(strength=strength)
    theirs = get_preset(
        "flowedit",
        num_inference_steps=6,
        grid="shifted",
        strength=strength,
        guidance_scale=1.0,
        source_guidance_scale=1.0,
    )
    beside = edit_latents(model, task(model, ours), ours)
    between = edit_latents(model, task(model, theirs), theirs)
    torch.testing.assert_close(beside.latents, between.latents, atol=1e-4, rtol=0)
    assert not torch.allclose(beside.latents, latents(), atol=1e-2)


def test_under_guidance_too(model: SD3Model) -> None:
    ours = without_controls(guidance_scale=2.0)
    theirs = get_preset(
        "flowedit",
        num_inference_steps=6,
        grid="shifted",
        strength=1.0,
        guidance_scale=2.0,
        source_guidance_scale=2.0,
    )
    beside = edit_latents(model, task(model, ours), ours)
    between = edit_latents(model, task(model, theirs), theirs)
    torch.testing.assert_close(beside.latents, between.latents, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_sources_own_prompt_returns_the_image(model: SD3Model, guidance: float) -> None:
    preset = get_preset("fast", num_inference_steps=6, guidance_scale=guidance)
    edited = edit_latents(model, task(model, preset, SOURCE), preset)
    assert (edited.latents - latents()).abs().max() < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_kept_features_are_those_of_the_source_beside_it(model: SD3Model, guidance: float) -> None:
    kept = get_preset("fast", num_inference_steps=6, guidance_scale=guidance)
    again = dataclasses.replace(kept, source_features="recompute")
    one = edit_latents(model, task(model, kept), kept)
    other = edit_latents(model, task(model, again), again)
    torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=0)
    # 6 steps of 2 targets; recomputed, 2 sources beside them; under guidance, twice all.
    assert (one.nfe, other.nfe) == ((12, 24) if guidance == 1 else (48, 48))


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, 6),
        # The source runs beside the target, and is asked there.
        ({"guidance_scale": 2.0}, 0),
        ({"source_features": "recompute"}, 0),
        # Its features alone are kept, of the steps that inject them.
        ({"compensate": "source", "attention_ratio": 0.5}, 3),
        ({"compensate": "none", "attention_ratio": 0.5}, 3),
    ],
)
def test_nothing_is_asked_that_no_edit_reads(
    model: SD3Model, given: dict[str, Any], asked: int
) -> None:
    preset = get_preset("fast", num_inference_steps=6, **given)
    with counting(model) as calls:
        path = task(model, preset).path
    assert path.evaluations.tolist() == [[1, 1]] * asked + [[0, 0]] * (6 - asked)
    assert sum(calls) == 2 * asked and (path.velocities is None) == (asked < 6)


@pytest.mark.parametrize("compensate", ["source", "both"])
def test_what_is_kept_changes_the_cost_alone(model: SD3Model, compensate: str) -> None:
    given = {"compensate": compensate, "attention_ratio": 0.5, "num_inference_steps": 6}
    latents, costs = [], []
    for features in ("inversion", "recompute"):
        preset = get_preset("fast", source_features=features, **given)
        with counting(model) as calls:
            latents.append(edit_latents(model, task(model, preset), preset).latents)
        costs.append(sum(calls))
    torch.testing.assert_close(latents[0], latents[1], atol=1e-4, rtol=0)
    assert costs[0] == costs[1]  # of one target a source; of more, keeping is cheaper


def test_every_step_has_noise_of_its_own_from_the_images_seed(model: SD3Model) -> None:
    preset = get_preset("fast", num_inference_steps=6)
    x, grid = latents(), grid_for(model, preset, latents())
    field = GuidedVelocity(model, model.encode_prompt(SOURCE))
    both = invert_latents(field, x, grid, preset, seeds=SEEDS).trajectory
    alone = invert_latents(
        GuidedVelocity(model, model.encode_prompt(SOURCE[1:])), x[1:], grid, preset, seeds=[11]
    ).trajectory
    torch.testing.assert_close(both[:, 1:], alone)
    t = grid[:-1].view(-1, 1, 1, 1, 1)
    noise = (both[:-1] - t * x) / (1 - t)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    flat = noise.flatten(1)
    correlation = torch.corrcoef(flat) - torch.eye(6)
    assert correlation.abs().max() < 0.15

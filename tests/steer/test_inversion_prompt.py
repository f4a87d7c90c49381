"""Inverted under the empty prompt, edited as an image of what the source prompt says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import rectiflow as rf
from rectiflow.errors import InputError
from rectiflow.invert import Inversion, get_preset
from rectiflow.models import SD3Model
from rectiflow.steer import EditTask
from tests.steer.test_written_out import SOURCE, TARGETS, by_hand, token_maps
from tests.tiny import tiny_model

OTHER = "two small cats"
PICTURE = Image.effect_noise((48, 32), 80).convert("RGB")
STEPS = 5


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model(t5=True, medium=True)


def inverted(model: SD3Model, prompt: str = SOURCE, **given: Any) -> Inversion:
    settings = {"preset": "rf-inversion", "num_inference_steps": STEPS} | given
    return rf.invert(model, PICTURE, prompt, **settings)


@pytest.mark.parametrize("preset", ["uniedit", "ftedit"])
def test_the_source_prompt_is_of_the_edit(model: SD3Model, preset: str) -> None:
    one, two = (
        rf.edit(
            model,
            PICTURE,
            source_prompt=prompt,
            prompts=TARGETS[0],
            preset=preset,
            inversion_prompt="empty",
            num_inference_steps=STEPS,
        )
        for prompt in (SOURCE, OTHER)
    )
    assert torch.equal(one.inversion.trajectory, two.inversion.trajectory)
    assert not torch.equal(one.latents, two.latents)


@pytest.mark.parametrize("features", ["recompute", "inversion"])
@pytest.mark.parametrize("compensate", ["none", "source", "both"])
def test_two_branches_from_an_inversion_under_the_empty_prompt(
    model: SD3Model, compensate: str, features: str, tmp_path: Path
) -> None:
    """The source's row is under the source prompt, and so is what the compensation makes up for."""
    saved = inverted(model).save(tmp_path / "inverted.safetensors")
    for inversion in (inverted(model), Inversion.load(saved, model)):
        assert inversion.inverted_prompt == "" and inversion.source_prompt == SOURCE
        result = rf.edit(
            model,
            inversion,
            prompts=TARGETS,
            preset="ftedit",
            scheme="rf_inversion",  # that of the inversion
            negative_prompt="sad",
            adaln_ratio=0.8,
            attention_ratio=0.4,
            compensate=compensate,
            source_features=features,
        )
        task = EditTask(
            path=inversion.path,
            grid=inversion.grid,
            source=model.encode_prompt(SOURCE),
            target=model.encode_prompt(TARGETS),
            owners=(0, 0),
            token_maps=token_maps(model),
            negative=model.encode_prompt("sad"),
        )
        for number, latents in enumerate(result.latents):
            expected = by_hand(model, task, result.preset, number)
            torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


def test_known_velocities_are_of_the_prompt_they_were_found_under(model: SD3Model) -> None:
    """A scheme that knows its velocities, at guidance 1, and an edit that would take them."""
    settings: dict[str, Any] = {"scheme": "query_offset", "method": "two_branch"}
    unprompted = inverted(model, preset="euler", inversion_prompt="empty", **settings)
    assert unprompted.path.velocities is not None
    edit = get_preset(
        "directedit", guidance_scale=1.0, compensate="both", num_inference_steps=STEPS
    )
    results = [
        rf.edit(model, inversion, prompts=SOURCE, preset=edit)
        for inversion in (unprompted, inverted(model, preset="directedit"))
    ]
    for result in results:  # its own prompt: compensation returns the image
        torch.testing.assert_close(result.latents, result.inversion.latents, atol=1e-4, rtol=1e-4)
    first, second = (result.edit_nfe for result in results)
    assert first > second  # what was not found has to be asked


def test_a_generated_picture_is_its_prompts(model: SD3Model, tmp_path: Path) -> None:
    """Its path is no inversion, whatever the preset would invert a picture under."""
    result = rf.edit(
        model,
        seed=3,
        source_prompt=SOURCE,
        prompts=TARGETS[0],
        preset="rf-inversion",
        num_inference_steps=STEPS,
        eta=0.0,
    )
    path = result.inversion.save(tmp_path / "generated.safetensors")
    for inversion in (result.inversion, Inversion.load(path, model)):
        assert inversion.inverted_prompt == SOURCE
        plain = inversion.reconstruct(compensate=False)
        torch.testing.assert_close(plain.latents, inversion.latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("flowedit", "inversion_prompt has no effect on the scheme interpolation"),
        ("dnaedit", "the source's velocities of dna_edit are those of the inversion"),
        ("directedit", "give source_features 'recompute', or leave inversion_prompt out"),
    ],
)
def test_where_it_cannot_be_used_it_is_refused(model: SD3Model, preset: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        get_preset(preset, inversion_prompt="empty")


def test_velocities_of_an_inversion_that_are_of_another_prompt(model: SD3Model) -> None:
    inversion = dataclasses.replace(inverted(model))
    with pytest.raises(InputError, match="invert under the source prompt"):
        rf.edit(model, inversion, prompts=TARGETS[0], preset="dnaedit", scheme="rf_inversion")

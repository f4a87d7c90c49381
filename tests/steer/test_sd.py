"""Inverting and editing with U-Nets, which have no joint attention for controls to act on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from rectiflow.errors import InputError
from rectiflow.invert import invert
from rectiflow.models import FlowModel
from rectiflow.steer import edit
from rectiflow.steer.subject import consistent
from tests.tiny_sd import tiny_sd_model, tiny_sdxl_model


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def a_model(kind: str) -> FlowModel:
    if kind == "sdxl":
        return tiny_sdxl_model("v_prediction")
    return tiny_sd_model("v_prediction", rectified=kind == "rectified")


MODELS = ["sd", "sdxl", "rectified"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("preset", ["exact", "euler"])
def test_inversions_return_their_picture_exactly(kind: str, preset: str) -> None:
    model = a_model(kind)
    inversion = invert(model, picture(), "cat", preset=preset, num_inference_steps=6)
    back = inversion.reconstruct()
    assert (back.latents - inversion.latents).abs().max() <= 1e-7  # the last bit at most
    assert inversion.nfe >= 6
    assert inversion.trajectory.shape[0] == 7
    # A real field was followed: noise is not the picture.
    assert (inversion.trajectory[0] - inversion.latents).abs().max() > 0.1


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "preset", ["euler", "flowedit", "sdedit", "uniedit", "rf-inversion", "dnaedit"]
)
def test_methods_without_attention_controls_edit(kind: str, preset: str) -> None:
    model = a_model(kind)
    settings: dict[str, Any] = {"num_inference_steps": 6, "preset": preset}
    result = edit(model, picture(), source_prompt="a cat", prompts=["a dog", "a car"], **settings)
    assert [image.size for image in result.images] == [(32, 32)] * 2
    first, second = (np.asarray(image, int) for image in result.images)
    assert (first != second).any()  # the prompt is listened to
    assert result.edit_nfe > 0


def test_flowedit_to_the_same_prompt_at_the_same_guidance_changes_nothing() -> None:
    model = a_model("sd")
    result = edit(
        model,
        picture(),
        source_prompt="a cat",
        prompts="a cat",
        preset="flowedit",
        num_inference_steps=6,
        guidance_scale=3.5,
    )
    source = result.inversion.latents
    assert (result.latents - source).abs().max() <= 1e-5 * source.abs().max()


def test_the_two_branches_need_no_attention_at_ratio_zero() -> None:
    model = a_model("sd")
    off = {"adaln_ratio": 0.0, "attention_ratio": 0.0, "num_inference_steps": 4}
    result = edit(model, picture(), source_prompt="cat", prompts="cat", preset="ftedit",
                  compensate="both", guidance_scale=1.0, **off)  # fmt: skip
    source = result.inversion.latents
    assert (result.latents - source).abs().max() <= 1e-5 * source.abs().max()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"preset": "exact"}, "adaln_ratio, attention_ratio"),
        ({"preset": "ftedit", "attention_ratio": 0.0}, "adaln_ratio would"),
        ({"preset": "directedit"}, "attention_ratio would"),
        (
            {"preset": "euler", "mask_threshold": 0.3, "mask_from": "attention"},
            "mask_from attention would",
        ),
        ({"preset": "euler", "windows": {"cat": 0.5}}, "windows would"),
    ],
)
def test_controls_that_have_nothing_to_act_on_are_refused(
    settings: dict[str, Any], named: str
) -> None:
    model = a_model("sd")
    calls: list[int] = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(InputError, match=named) as refusal:
        edit(model, picture(), source_prompt="a cat", prompts="a cat dog", **settings)
    assert "flowedit" in str(refusal.value) and "\n" not in str(refusal.value)
    assert not calls  # before any work


def test_one_subject_in_several_pictures_needs_joint_attention() -> None:
    with pytest.raises(InputError, match="no joint attention"):
        consistent(a_model("sd"), ["a cat", "a cat and a car"])

"""Chains of edits: what a turn is, what equal prompts give back, and how drift is measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import rectiflow as rf
from rectiflow.errors import InputError
from rectiflow.invert import from_latents
from rectiflow.models import SD3Model
from tests.steer.edits import counting
from tests.tiny import tiny_model

APPLE, GREEN, CAT = "a red apple", "a green apple", "a green cat"
FAST: dict[str, Any] = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """Of a size that the model has to pad and resize."""
    return Image.fromarray(skimage.data.coffee()).resize((60, 40))


def decibels(one: Image.Image, other: Image.Image, where: Any = ...) -> float:
    first, second = (np.asarray(image)[where] for image in (one, other))
    if np.array_equal(first, second):
        return np.inf
    return float(peak_signal_noise_ratio(first, second, data_range=255))


@pytest.mark.parametrize("preset", ["exact", "fast", "two-step"])
def test_equal_prompts_give_the_source_back(
    model: SD3Model, photograph: Image.Image, preset: str
) -> None:
    chain = rf.edit_chain(model, photograph, prompts=[APPLE] * 4, preset=preset, **FAST)
    latents = chain.inversion.latents
    assert len(chain.turns) == len(chain.returned) == 3
    for turn in chain.turns:
        torch.testing.assert_close(turn.latents, latents, atol=1e-4, rtol=0)
        assert turn.max_abs_latent == (turn.latents - latents).abs().max() < 1e-4
        assert turn.distances.source > 55  # of rounded pixels


@pytest.mark.parametrize("preset", ["exact", "ftedit", "sdedit"])
def test_a_turn_is_an_edit_of_the_latents_before_it(
    model: SD3Model, photograph: Image.Image, preset: str
) -> None:
    chain = rf.edit_chain(model, photograph, prompts=[APPLE, GREEN, CAT], preset=preset, **FAST)
    given: dict[str, Any] = {"preset": preset, **FAST}
    alone = rf.edit(model, photograph, source_prompt=APPLE, prompts=GREEN, **given)
    assert torch.equal(chain.turns[0].latents, alone.latents)
    assert chain.turns[0].nfe == alone.nfe  # with its inversion
    inversion = from_latents(model, alone.latents, alone.inversion.restore, GREEN, **given)
    assert torch.equal(inversion.latents, alone.latents)
    second = rf.edit(model, inversion, prompts=CAT, preset=chain.preset)
    assert torch.equal(chain.turns[1].latents, second.latents)
    assert np.array_equal(chain.turns[1].image, second.images[0])
    assert chain.prompts == [APPLE, GREEN, CAT]
    assert [image.size for image in chain.images] == [photograph.size] * 2


def test_drift_is_to_the_edit_of_the_original(model: SD3Model, photograph: Image.Image) -> None:
    prompts = [APPLE, GREEN, CAT, APPLE]
    targets = [photograph.rotate(180), None, photograph]
    mask = Image.new("L", photograph.size)
    mask.paste(255, (20, 10, 40, 30))
    mask.paste(128, (0, 0, 10, 10))
    with counting(model) as calls:
        chain = rf.edit_chain(
            model, photograph, prompts=prompts, targets=targets, mask=mask, **FAST
        )
    assert chain.nfe["total"] == sum(calls)
    for part in ("inversion", "editing", "reconstruction"):
        assert chain.nfe[part] == sum(turn.nfe[part] for turn in chain.turns)
    assert chain.nfe["one_shot"] > 0
    codec = chain.inversion.images(chain.inversion.latents)[0]
    black = np.asarray(mask) == 0
    first, second, last = chain.turns
    assert first.drift == np.inf  # it is the one-shot edit
    for turn, target in zip(chain.turns, targets, strict=True):
        shot = rf.edit(model, chain.inversion, prompts=turn.prompt, mask=mask).images[0]
        assert turn.one_shot is not None and np.array_equal(turn.one_shot, shot)
        assert turn.drift is not None
        for image, found in ((turn.image, turn.distances), (shot, turn.one_shot_distances)):
            assert found is not None
            assert found.source == pytest.approx(decibels(image, codec))
            assert found.outside == pytest.approx(decibels(image, codec, black))
            assert found.target == (target and pytest.approx(decibels(image, target)))
    assert second.drift == pytest.approx(decibels(second.image, second.one_shot or codec))
    assert chain.returned == [last]
    without = rf.edit_chain(model, photograph, prompts=prompts[:3], one_shot=False, **FAST)
    assert without.one_shot_nfe == 0 and without.turns[1].drift is None
    assert without.sheet().height < chain.sheet().height


def test_from_a_seed_or_an_inversion(model: SD3Model, photograph: Image.Image) -> None:
    given = {"num_inference_steps": 3, "preset": "euler"}
    chain = rf.edit_chain(model, seed=4, prompts=[APPLE, GREEN, CAT], **given)
    alone = rf.edit(model, seed=4, source_prompt=APPLE, prompts=GREEN, **given)
    assert torch.equal(chain.turns[0].latents, alone.latents)
    assert np.array_equal(chain.source, alone.source)
    inversion = rf.invert(model, photograph, APPLE, **given)
    again = rf.edit_chain(model, inversion, prompts=[APPLE, GREEN, CAT], preset="euler")
    assert again.inversion is inversion and again.preset.num_inference_steps == 3
    with pytest.raises(InputError, match="was made with source_prompt 'a red apple'"):
        rf.edit_chain(model, inversion, prompts=[CAT, GREEN])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": [APPLE]}, "a chain of 1 prompt: give what the image shows, then"),
        ({"prompts": APPLE}, "a chain of 1 prompt"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["", APPLE]}, "the prompt of the source is empty"),
        ({"prompts": [APPLE, GREEN, " "]}, "the prompt of turn 2 is empty"),
        ({"prompts": [APPLE, GREEN], "targets": [None, None]}, "2 targets for 1 turns"),
        (
            {"prompts": [APPLE, GREEN], "targets": [Image.new("RGB", (3, 4))]},
            r"a target is \(3, 4\) and the image \(60, 40\)",
        ),
        ({"prompts": [APPLE, GREEN], "seed": 1}, "give an image or a seed"),
        ({"prompts": [APPLE, GREEN], "preset": "best"}, "preset is 'best'"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(
    model: SD3Model, photograph: Image.Image, given: dict[str, Any], message: str
) -> None:
    with counting(model) as calls, pytest.raises(InputError, match=message):
        rf.edit_chain(model, photograph, **given)
    assert not calls

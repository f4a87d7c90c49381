"""Arguments of a wrong type get one line from every public function."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

import rectiflow as rf
from rectiflow.arguments import check_type
from rectiflow.errors import InputError
from rectiflow.invert import Preset
from rectiflow.models import SD3Model
from tests.tiny import tiny_model

FUNCTIONS = {name: one for name in rf.__all__ if inspect.isfunction(one := getattr(rf, name))}


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_every_public_function(name: str) -> None:
    function = FUNCTIONS[name]
    given = {
        argument: one.kind
        for argument, one in inspect.signature(function).parameters.items()
        if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    }
    assert given
    # The first argument of `edit` is named where several pictures are told apart.
    function = getattr(function, "__wrapped__", function) if name == "edit" else function
    for argument in given:
        with pytest.raises(InputError, match=f"^{argument} is .*: give ") as caught:
            function(**{argument: object()})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "emoji-sd3"}, r"model is a name, 'emoji-sd3': load it first, rectiflow.load"),
        ({"image": 3}, "image is 3: give text, a path, a Pillow image, an array, a tensor"),
        ({"source_prompt": ["a"]}, r"source_prompt is \['a'\]: give text or None"),
        ({"negative_prompt": ["a"]}, r"negative_prompt is \['a'\]: give text or None"),
        ({"prompts": 3}, "prompts is 3: give text or a list of text"),
        ({"prompts": ["a", None]}, r"prompts is \['a', None\]: give text or a list of text"),
        ({"num_inference_steps": "4"}, "num_inference_steps is '4': give a whole number"),
        ({"num_inference_steps": 4.0}, r"num_inference_steps is 4.0: give a whole number"),
        ({"guidance_scale": "2"}, "guidance_scale is '2': give a number"),
        ({"features": "value"}, "features is 'value': give a list of 'query', 'key' or 'value'"),
        ({"average": 1}, "average is 1: give True or False"),
        ({"preset": 3}, "preset is 3: give text, a Preset or None"),
        ({"seed": "3"}, "seed is '3': give a whole number or None"),
        ({"mask": [3]}, r"mask is \[3\]: give text, a path"),
        ({"mask_blur": "3"}, "mask_blur is '3': give a number"),
        (
            {"windows": ["apple"]},
            r"windows is \['apple'\]: give a dictionary from text to a number",
        ),
        ({"windows": {"apple": "x"}}, "windows is .*: give a dictionary from text to a number"),
        ({"noise_seed": 2**70}, r"noise_seed is 1180591620717411303424; at most 2\*\*63 - 1"),
        ({"image": None, "source_prompt": "a", "seed": -1}, "seed is -1; from 0 to"),
        (
            {"mask": np.ones((32, 32)), "mask_blur": 1e9},
            "mask_blur is 1000000000.0; at most the 32 pixels of the image",
        ),
        ({"paste_back": "yes"}, "paste_back is 'yes': give True or False"),
        ({"image": []}, "image is an empty list"),
        (
            {"image": [Image.new("RGB", (8, 8))] * 2, "source_prompt": ["a"]},
            "1 of source_prompt for 2 pictures",
        ),
    ],
)
def test_what_people_give(model: SD3Model, arguments: dict[str, Any], message: str) -> None:
    call = {"model": model, "image": Image.new("RGB", (32, 32)), "prompts": "a cat", **arguments}
    with pytest.raises(InputError, match=f"^{message}") as caught:
        rf.edit(**call)
    assert "\n" not in str(caught.value)


def test_files_of_our_own(model: SD3Model, tmp_path: Path) -> None:
    inversion = rf.invert(model, Image.new("RGB", (32, 32)), "a", num_inference_steps=1)
    for call, message in (
        (lambda: inversion.save(3), "path is 3: give text or a path"),  # type: ignore[arg-type]
        (lambda: rf.Inversion.load(3, model), "path is 3: give text or a path"),  # type: ignore[arg-type]
        (lambda: rf.Inversion.load("x", "tiny"), "model is a name, 'tiny': load it first"),  # type: ignore[arg-type]
        (lambda: rf.PairStore.open(None), "uri is None: give text or a path"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=f"^{message}"):
            call()


def test_a_preset_built_with_a_wrong_type(model: SD3Model) -> None:
    wrong = dataclasses.replace(rf.PRESETS["fast"], num_inference_steps="4")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_inference_steps is '4': give a whole number"):
        rf.invert(model, Image.new("RGB", (32, 32)), preset=wrong)
    chosen = rf.PRESETS["exact"].override({"features": ["key"]})
    assert chosen.features == ("key",) and isinstance(chosen, Preset)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (np.int64(3), int),
        (np.float32(3), float),
        (3, float),
        (Path("x"), str | Path),
        (("a", "b"), Sequence[str]),
        (np.arange(3), Sequence[int]),
        ({"a": 1}, Mapping[str, float]),
        ("key", Literal["query", "key"]),
        (torch.float16, torch.dtype),
    ],
)
def test_what_fits(value: object, hint: Any) -> None:
    check_type("x", value, hint)


def test_pictures_in_a_list_are_edited_one_by_one(model: SD3Model) -> None:
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    given: dict[str, Any] = {"prompts": "a cat", "preset": "euler", "num_inference_steps": 2}
    masks = [Image.new("L", (32, 32), level) for level in (255, 128)]
    found = rf.edit(model, pictures, source_prompt=["a", "b"], mask=masks, **given)
    for result, picture, mask, prompt in zip(found, pictures, masks, "ab", strict=True):
        one = rf.edit(model, picture, source_prompt=prompt, mask=mask, **given)
        assert torch.equal(result.latents, one.latents)
    array = np.asarray(pictures[1])
    (again,) = rf.edit(model, [torch.from_numpy(array.copy()).permute(2, 0, 1)], mask=masks[1],
                       source_prompt="b", **given)  # fmt: skip
    assert torch.equal(again.latents, found[1].latents)

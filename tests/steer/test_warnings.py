"""What an edit says is doubtful: prompts, guidance, and what a model's makers say of it."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

import rectiflow as rf
from rectiflow.invert.presets import get_preset
from rectiflow.models.base import FlowModel
from rectiflow.models.metadata import Metadata
from rectiflow.steer.warnings import edit_warnings
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model

PROMPT, TARGET = "a red apple", "a green apple"


def said(model: FlowModel, negative: str | None = None, prompt: str = PROMPT, **given: Any) -> str:
    """The warnings of an edit of two steps, as one text."""
    values = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    preset = get_preset(given.pop("preset", "exact"), num_inference_steps=2, **given)
    inversion = rf.invert(model, Image.fromarray(values), prompt, preset=preset)
    return "\n".join(edit_warnings(inversion, [TARGET], negative, preset))


@pytest.mark.parametrize(
    ("given", "scale"),
    [
        ({}, "guidance_scale"),
        ({"guidance_scale": 2.0}, None),
        ({"true_cfg_scale": 2.0}, None),
    ],
)
def test_a_negative_prompt_without_guidance(given: dict[str, float], scale: str | None) -> None:
    heard = said(tiny_model(), "sad", **given)
    assert ("has no effect without guidance" in heard) == (scale is not None)
    assert scale is None or f"Raise {scale} " in heard
    assert "negative" not in said(tiny_model())


def test_a_guidance_that_the_network_takes_as_an_input_does_not_push_away() -> None:
    model = tiny_flux_model()
    assert "Raise true_cfg_scale " in said(model, "sad", guidance_scale=3.5)
    assert "negative" not in said(model, "sad", true_cfg_scale=2.0)


def test_no_source_prompt() -> None:
    model = tiny_model()
    for preset in ("exact", "fast", "euler"):
        assert "No source prompt was given" in said(model, prompt="", preset=preset)
        assert "No source prompt" not in said(model, preset=preset)
    # These invert under the empty prompt whatever they are given, and one never asks for it.
    assert "No source prompt" in said(model, prompt="", preset="uniedit", inversion_prompt="empty")
    assert "No source prompt" not in said(model, prompt="", preset="rf-inversion")


def test_words_that_the_model_does_not_know() -> None:
    model = tiny_model()
    model.metadata = Metadata(vocabulary="a red green apple")
    assert "does not know" not in said(model)
    assert f"{model.name} does not know the word 'lemon'" in said(model, prompt="a lemon")
    assert "the word 'sad'" in said(model, "sad", guidance_scale=2.0)


def test_a_model_s_cautions_come_first() -> None:
    model = tiny_flux_model(schnell=True)
    (caution,) = model.cautions
    assert said(model).startswith(caution)
    assert caution not in said(tiny_flux_model())


@pytest.mark.parametrize(
    ("prompt", "read", "remedy"),
    [
        ("a (red:1.3) apple", "(red:1.3)", "words have no weights here"),
        ("a ( small cat : .7 ) left", "( small cat : .7 )", "words have no weights here"),
        ("a ((red)) apple", "((red))", "--window WORD=RATIO"),
        ("a red++ apple", "red++", "words have no weights here"),
        ("a (small cat)- left", ")-", "words have no weights here"),
        ("a cat <lora:ink:0.8>", "<lora:ink:0.8>", "--lora"),
        *((plain, None, None) for plain in (
            "a cat (small, left)", "a watch (at 10:30)", "a picture (4:3)", "a well-known cat",
            "a dark-red apple: two cats", "C+ grade", "a C++ book", "a cat - two dogs",
        )),
    ],
)  # fmt: skip
def test_weights_of_words_are_read_as_text(
    prompt: str, read: str | None, remedy: str | None
) -> None:
    model = tiny_model()
    heard = said(model, prompt=prompt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rf.generate(model, prompt, num_inference_steps=1)
    generated = "\n".join(str(one.message) for one in caught)
    for text in (heard, generated):
        assert ("is read as text" in text) == (read is not None), text
        assert read is None or (f"{read!r} is read as text" in text and str(remedy) in text)

"""Several variants of one edit, each as it is by itself from noise of its own seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import skimage.data
import torch
from PIL import Image

import rectiflow as rf
from rectiflow.errors import InputError
from rectiflow.models import SD3Model
from tests.steer.edits import counting
from tests.tiny import tiny_model

GIVEN: dict[str, Any] = {"prompts": ["a green apple", "a cat"], "num_inference_steps": 3}
SOURCE = "a red apple"


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(skimage.data.coffee()).resize((40, 24))


@pytest.mark.parametrize("preset", ["fast", "sdedit", "rf-inversion", "flowedit", "dnaedit"])
def test_each_variant_is_the_edit_of_its_seed(
    model: SD3Model, photograph: Image.Image, preset: str
) -> None:
    given = GIVEN | {"source_prompt": SOURCE, "preset": preset}
    with counting(model) as calls:
        many = rf.edit(model, photograph, num_images_per_prompt=3, noise_seed=7, **given)
    assert many.nfe["total"] == sum(calls)
    assert many.prompts == ["a green apple"] * 3 + ["a cat"] * 3
    assert many.noise_seeds == [7, 8, 9] * 2 and len(many.images) == len(many.alignments) == 6
    for number, seed in enumerate((7, 8, 9)):
        one = rf.edit(model, photograph, noise_seed=seed, **given)
        torch.testing.assert_close(many.latents[[number, 3 + number]], one.latents)
        assert many.images[3 + number] == one.images[1]
    assert (many.latents[0] - many.latents[1]).abs().max() > 1e-3
    assert len(many.edit_report().edits) == 6


def test_from_a_saved_inversion_too(
    model: SD3Model, photograph: Image.Image, tmp_path: Path
) -> None:
    """The first is the inversion's own and costs nothing again; the others draw theirs."""
    given = GIVEN | {"source_prompt": SOURCE}
    made = rf.invert(model, photograph, SOURCE, preset="fast", num_inference_steps=3)
    saved = rf.Inversion.load(made.save(tmp_path / "x.safetensors"), model)
    many = rf.edit(model, saved, num_images_per_prompt=2, diagnose=True, **given)
    expected = [rf.edit(model, photograph, noise_seed=seed, **given) for seed in (0, 1)]
    for number, one in enumerate(expected):
        torch.testing.assert_close(many.latents[[number, 2 + number]], one.latents)
    assert many.nfe["inversion"] == expected[1].nfe["inversion"] > 0
    assert many.diagnosis is not None and many.source == made.picture
    other = rf.edit(model, saved, noise_seed=1, **given)
    torch.testing.assert_close(other.latents, expected[1].latents)
    assert rf.edit(model, saved, **given).nfe["inversion"] == 0


def test_of_what_a_seed_generates(model: SD3Model) -> None:
    given = GIVEN | {"source_prompt": SOURCE, "seed": 3, "num_images_per_prompt": 2}
    many = rf.edit(model, **given)
    assert (many.latents[0] - many.latents[1]).abs().max() > 1e-3
    with pytest.raises(InputError, match="rf_inversion draws no noise for what a seed generates"):
        rf.edit(model, preset="rf-inversion", **given)


@pytest.mark.parametrize("preset", ["exact", "ftedit", "uniedit"])
def test_variants_that_would_be_equal_are_refused(
    model: SD3Model, photograph: Image.Image, preset: str
) -> None:
    given = GIVEN | {"source_prompt": SOURCE, "num_images_per_prompt": 2}
    with pytest.raises(InputError, match=r"2 variants would be equal.*fast, rf-inversion"):
        rf.edit(model, photograph, preset=preset, **given)
    if preset == "exact":
        inversion = rf.invert(model, photograph, SOURCE, num_inference_steps=3)
        with pytest.raises(InputError, match="give the picture, or an inversion made by one"):
            rf.edit(model, inversion, **given)
    with pytest.raises(InputError, match="num_images_per_prompt is 0; at least 1"):
        rf.edit(model, photograph, **given | {"num_images_per_prompt": 0})

"""What a whole edit may cost, counted by a hook on the network not by our own counter."""

from __future__ import annotations

from typing import Any

import pytest
import skimage.data
from PIL import Image

import rectiflow as rf
from rectiflow.models import SD3Model
from tests.steer.edits import counting
from tests.tiny import tiny_model

# The most network samples of a 30-step edit, in all and of a second target.
BUDGETS = [
    ("fast", 60, 30),
    ("exact", 60, 30),
]
TOLD: dict[str, Any] = {"source_prompt": "a red apple", "num_inference_steps": 30}


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(skimage.data.coffee()).resize((48, 32))


@pytest.mark.parametrize(("preset", "most", "second"), BUDGETS)
def test_one_inversion_and_two_targets(
    model: SD3Model, picture: Image.Image, preset: str, most: int, second: int
) -> None:
    with counting(model) as calls:
        result = rf.edit(model, picture, prompts="a green apple", preset=preset, **TOLD)
    assert sum(calls) == result.nfe["total"]
    assert result.nfe["total"] == result.nfe["inversion"] + result.nfe["editing"]
    assert result.inversion.nfe == result.nfe["inversion"] >= 30
    with counting(model) as calls:
        other = rf.edit(model, result.inversion, prompts="two cats", preset=preset)
    assert sum(calls) == other.nfe["total"] == other.nfe["editing"] <= second
    assert other.nfe["inversion"] == 0  # paid before
    assert result.nfe["total"] <= most


@pytest.mark.parametrize("preset", ["exact", "fast"])
def test_editing_costs_by_the_target(model: SD3Model, picture: Image.Image, preset: str) -> None:
    inversion = rf.invert(model, picture, "a red apple", preset=preset, num_inference_steps=6)
    costs = []
    for targets in (["a green apple"], ["a green apple", "two cats"], ["a", "b", "c", "d"]):
        with counting(model) as calls:
            result = rf.edit(model, inversion, prompts=targets, preset=preset)
        assert sum(calls) == result.nfe["editing"]
        costs.append(sum(calls))
    assert costs == [6, 12, 24]  # nothing of the source again

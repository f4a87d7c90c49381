"""Regions of large pictures at the model's own size, and transparency that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

import rectiflow as rf
from rectiflow.errors import InputError
from rectiflow.models import SD3Model
from rectiflow.models.images import SizePolicy
from rectiflow.models.picture import load_alpha, load_image
from rectiflow.steer.region import region_of
from tests.steer.edits import counting
from tests.tiny import tiny_model

GIVEN: dict[str, Any] = {
    "prompts": "a green apple",
    "source_prompt": "a red apple",
    "num_inference_steps": 3,
}


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


@pytest.fixture(scope="module")
def large() -> Image.Image:
    return Image.fromarray(skimage.data.coffee())  # 600 × 400


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def drawn(size: tuple[int, int], *box: int) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 3, 2),
        (300, 200, 310, 208),
        (590, 390, 600, 400),
        (100, 10, 420, 14),
        (0, 0, 600, 400),
        (7, 90, 8, 391),
    ],
)
@pytest.mark.parametrize("policy", [SizePolicy(8, 128, 64 * 64), SizePolicy(16, 1536, 1024 * 1024)])
def test_a_region_holds_the_mask_and_its_context(
    box: tuple[int, int, int, int], policy: SizePolicy
) -> None:
    left, top, right, bottom = region_of(drawn((600, 400), *box), policy)
    assert 0 <= left <= box[0] and 0 <= top <= box[1]
    assert box[2] <= right <= 600 and box[3] <= bottom <= 400
    width, height = right - left, bottom - top
    assert width >= min(64, 600) and height >= min(64, 400)
    assert max(width, height) <= 2 * min(width, height) + policy.multiple or width == 600
    if max(box[2] - box[0], box[3] - box[1]) <= 42 and policy.multiple == 8:
        assert (width, height) == (64, 64)  # seen as it is, pixel for pixel


@pytest.mark.parametrize("preset", ["fast", "exact"])
def test_the_region_is_edited_as_a_picture_of_its_own(
    model: SD3Model, large: Image.Image, preset: str
) -> None:
    mask = drawn(large.size, 300, 200, 308, 208)
    given = GIVEN | {"preset": preset}
    result = rf.edit(model, large, mask=mask, mask_blur=1.0, crop_to_mask=True, **given)
    assert result.region is not None and result.images[0].size == result.source.size == (600, 400)
    left, top, right, bottom = result.region
    assert (right - left, bottom - top) == (32, 32)  # the model's own
    soft = result.masks[0]
    by_hand = rf.edit(model, large.crop(result.region), mask=soft.crop(result.region),
                      paste_back=True, **given)  # fmt: skip
    assert result.images[0].crop(result.region) == by_hand.images[0]
    black = np.asarray(soft) == 0
    assert np.array_equal(pixels(result.images[0])[black], pixels(large)[black])
    assert not np.array_equal(pixels(result.images[0])[~black], pixels(large)[~black])
    assert not any("enlarged" in text for text in result.warnings)
    half = drawn(large.size, 0, 0, 300, 200)
    whole = rf.edit(model, large, mask=half, **given)
    assert any("600 × 400, and the edit is made at 39 × 26" in text for text in whole.warnings)
    assert any("--crop-to-mask" in text for text in whole.warnings)
    much = rf.edit(model, large, mask=half, crop_to_mask=True, **given)
    assert any(text.startswith("The region is 45") for text in much.warnings)


def test_by_a_derived_mask(model: SD3Model, large: Image.Image) -> None:
    given = GIVEN | {"preset": "euler", "mask_threshold": 0.9, "diagnose": True}
    with counting(model) as calls:
        result = rf.edit(model, large, crop_to_mask=True, **given)
    assert result.nfe["total"] >= sum(calls) * 2 // 3 and result.mask_kind == "velocity"
    black = np.asarray(result.masks[0]) == 0
    assert np.array_equal(pixels(result.images[0])[black], pixels(large)[black])
    report = result.edit_report()
    assert report.reconstruction is not None and report.reconstruction.size == large.size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_to_mask": True}, "crop_to_mask needs a mask: give one, or mask_threshold"),
        ({"image": None, "seed": 1, "mask": Image.new("L", (32, 32), 255), "crop_to_mask": True},
         "crop_to_mask inverts the region by itself: give the picture"),
        ({"keep_alpha": True}, "keep_alpha: nothing of the picture is transparent"),
        ({"image": None, "seed": 1, "keep_alpha": True}, "keep_alpha needs the picture itself"),
    ],
)  # fmt: skip
def test_what_cannot_be(
    model: SD3Model, large: Image.Image, arguments: dict[str, Any], message: str
) -> None:
    with counting(model) as calls, pytest.raises(InputError, match=message):
        rf.edit(model, **{"image": large, **GIVEN, **arguments})
    assert not calls


def test_transparency_is_kept(model: SD3Model, large: Image.Image, tmp_path: Path) -> None:
    """The edit is that of the picture on white; the result on white is that of the edit."""
    small = large.resize((60, 40))
    soft = Image.fromarray(np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1)))
    clear = small.copy()
    clear.putalpha(soft)
    clear.save(tmp_path / "clear.png")
    kept = rf.edit(model, tmp_path / "clear.png", keep_alpha=True, **GIVEN)
    plain = rf.edit(model, tmp_path / "clear.png", **GIVEN)
    (image,) = kept.images
    assert image.mode == kept.source.mode == "RGBA"
    assert np.array_equal(np.asarray(load_alpha(image)), np.asarray(soft))
    share = np.asarray(soft) / 255
    # What is nearly transparent can be no darker than black on white.
    reached = pixels(plain.images[0]) >= 255 * (1 - share)[..., None]
    difference = np.abs(pixels(load_image(image)) - pixels(plain.images[0]))
    assert difference[reached].max() <= 1 and reached[:, 40:].mean() > 0.9
    assert np.abs(pixels(load_image(kept.source)) - pixels(plain.source)).max() <= 1
    assert kept.edit_report().source.mode == "RGB"
    both = rf.edit(model, clear, keep_alpha=True, num_images_per_prompt=2, crop_to_mask=True,
                   mask=drawn(small.size, 30, 10, 40, 20), **GIVEN)  # fmt: skip
    assert [one.mode for one in both.images] == ["RGBA"] * 2 and both.region is not None
    assert both.images[0] != both.images[1]

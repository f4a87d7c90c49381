"""`rf.edit` with masks, pasting back and windows, through pictures of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import rectiflow as rf
from rectiflow.errors import InputError
from rectiflow.models import SD3Model
from tests.steer.edits import counting
from tests.tiny import tiny_model

SOURCE, TARGET = "a red apple on the background", "a green apple on the background"
SHORT: dict[str, Any] = {
    "scheme": "euler",
    "method": "two_branch",
    "source_features": "recompute",
    "num_inference_steps": 3,
}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("exact", {"num_inference_steps": 3}),
    ("fast", {"num_inference_steps": 3}),
    ("euler", {"num_inference_steps": 3}),
    ("ftedit", {"num_inference_steps": 3}),
    ("sdedit", {"num_inference_steps": 3, "method": "flow_edit"}),
    *(
        ("euler", {"num_inference_steps": 3, "method": method})
        for method in ("two_branch", "uni_edit", "dna_edit", "rf_inversion")
    ),
]
"""With presets, and every method behind the plainest path it reads."""


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """Of a size that the model does not take: it is made smaller and padded."""
    return Image.fromarray(skimage.data.coffee()).resize((75, 50))


@pytest.fixture(scope="module")
def drawn(photograph: Image.Image) -> Image.Image:
    mask = Image.new("L", photograph.size)
    mask.paste(255, (0, 0, 30, 50))
    return mask


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(("preset", "given"), METHODS)
def test_outside_of_the_mask_pixels_are_the_sources(
    model: SD3Model,
    photograph: Image.Image,
    drawn: Image.Image,
    preset: str,
    given: dict[str, Any],
    guidance: float,
) -> None:
    def edited(**more: Any) -> rf.EditResult:
        return rf.edit(
            model,
            photograph,
            prompts=[TARGET, "cat"],
            source_prompt=SOURCE,
            preset=preset,
            mask=drawn,
            mask_grow=2,
            mask_blur=1.5,
            guidance_scale=guidance,
            **given,
            **more,
        )

    result = edited(paste_back=True)
    assert result.mask_kind == "given" and len(result.masks) == 2
    mask = np.asarray(result.masks[0])
    assert mask.shape == (50, 75) and (mask[:, 38:] == 0).all() and (mask[:, :25] == 255).all()
    for image in result.images:
        assert np.array_equal(pixels(image)[mask == 0], pixels(photograph)[mask == 0])
        assert not np.array_equal(pixels(image)[mask == 255], pixels(photograph)[mask == 255])
    if guidance == 1 and preset == "exact":  # what is not pasted is what it is without
        free = edited()
        assert torch.equal(free.latents, result.latents)
        assert not np.array_equal(pixels(free.images[0])[mask == 0], pixels(photograph)[mask == 0])


@pytest.mark.parametrize("kind", ["velocity", "attention"])
@pytest.mark.parametrize("scheme", ["euler", "renoising"])
def test_derived_masks_are_pasted_back_too(
    model: SD3Model, photograph: Image.Image, kind: str, scheme: str
) -> None:
    result = rf.edit(
        model,
        photograph,
        prompts=[TARGET, "a red apple"],
        source_prompt=SOURCE,
        mask_threshold=1.0,
        mask_from=kind,
        paste_back=True,
        preset="euler",
        **(SHORT | {"scheme": scheme}),
    )
    assert result.mask_kind == kind and result.mask is not None
    assert result.mask.shape == (2, *(1, *result.latents.shape[-2:]))
    for image, mask in zip(result.images, result.masks, strict=True):
        assert image.size == mask.size == photograph.size
        share = np.asarray(mask)[..., None] / 255
        black = share[..., 0] == 0
        assert np.array_equal(pixels(image)[black], pixels(photograph)[black])
        assert share.std() > 0.01 and not np.array_equal(pixels(image), pixels(photograph))
    if kind == "attention":  # an untrained network's velocities disagree everywhere alike
        assert any((np.asarray(mask) == 0).any() for mask in result.masks)
    report = result.edit_report()
    assert report.settings["mask"] == kind and report.settings["paste_back"] is True
    assert report.edits[0].mask is not None and report.edits[0].mask.shape == (50, 75)


def test_velocities_kept_from_the_inversion_derive_the_same_mask(
    model: SD3Model, photograph: Image.Image
) -> None:
    """Known from the path, they cost nothing; asked for again, they are the same."""
    common: dict[str, Any] = {
        "scheme": "query_offset",
        "method": "two_branch",
        "num_inference_steps": 4,
        "mask_threshold": 0.6,
        "adaln_ratio": 0.5,
        "attention_ratio": 0.5,
        "guidance_scale": 1.0,
    }
    kept, again = (
        rf.edit(
            model,
            photograph,
            prompts=TARGET,
            source_prompt=SOURCE,
            preset="fast",
            source_features=features,
            **common,
        )
        for features in ("inversion", "recompute")
    )
    assert kept.mask is not None and again.mask is not None
    assert np.abs(kept.mask - again.mask).max() < 1e-3
    assert kept.edit_nfe == 4 < again.edit_nfe
    assert kept.mask_kind == "velocity"


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize(("preset", "given"), METHODS)
def test_a_grey_lets_its_share_of_the_change_through(
    model: SD3Model, photograph: Image.Image, preset: str, given: dict[str, Any], steps: int
) -> None:
    """Whatever the method and the number of steps, on latents and, pasted back, in pixels."""
    given = given | {"preset": preset, "num_inference_steps": steps}

    def edited(level: int, **more: Any) -> rf.EditResult:
        mask = Image.new("L", photograph.size, level)
        return rf.edit(
            model, photograph, prompts=TARGET, source_prompt=SOURCE, mask=mask, **given, **more
        )

    white, grey = edited(255), edited(192, paste_back=True)
    change = white.latents - white.inversion.latents
    share = (grey.latents - grey.inversion.latents) / change.where(change.abs() > 1e-2, torch.nan)
    assert change.std() > 0.05
    assert share[~share.isnan()] == pytest.approx(192 / 255, abs=1e-3)
    free, image, source = (pixels(one) for one in (white.images[0], grey.images[0], photograph))
    assert np.abs(image - (source + 192 / 255 * (free - source))).max() <= 0.5 + 1e-4


def test_from_inversions_files_and_seeds(
    model: SD3Model, photograph: Image.Image, drawn: Image.Image, tmp_path: Path
) -> None:
    """An inversion keeps its picture, in its file too; a seed's picture is what was generated."""
    inversion = rf.invert(model, photograph, SOURCE, preset="euler", **SHORT)
    loaded = rf.Inversion.load(inversion.save(tmp_path / "x.safetensors"), model)
    given: dict[str, Any] = {"prompts": TARGET, "preset": "euler", "paste_back": True}
    results = [
        rf.edit(model, source, mask=drawn, source_prompt=SOURCE, **given, **SHORT)
        for source in (photograph, inversion, loaded)
    ]
    for result in results:
        assert np.array_equal(pixels(result.source), pixels(photograph))
        assert np.array_equal(pixels(result.images[0]), pixels(results[0].images[0]))
        assert np.array_equal(pixels(result.images[0])[:, 31:], pixels(photograph)[:, 31:])
    half = Image.new("L", (32, 32))
    half.paste(255, (0, 0, 16, 32))
    seeded = rf.edit(model, seed=3, mask=half, source_prompt=SOURCE, **given, **SHORT)
    assert np.array_equal(pixels(seeded.images[0])[:, 16:], pixels(seeded.source)[:, 16:])
    assert not np.array_equal(pixels(seeded.images[0]), pixels(seeded.source))


def test_without_a_mask(model: SD3Model, photograph: Image.Image) -> None:
    result = rf.edit(
        model, photograph, prompts=TARGET, source_prompt=SOURCE, preset="euler", **SHORT
    )
    assert result.mask_kind == "none" and result.mask is None and result.masks == []
    report = result.edit_report()
    assert report.settings["mask"] == "none" and report.edits[0].mask is None
    assert "windows" not in report.settings


def test_windows(model: SD3Model, photograph: Image.Image) -> None:
    inversion = rf.invert(model, photograph, SOURCE, preset="euler", **SHORT)

    def edited(windows: dict[str, float] | None, ratio: float) -> rf.EditResult:
        return rf.edit(
            model,
            inversion,
            prompts=[TARGET, "cat"],
            preset="euler",
            adaln_ratio=ratio,
            windows=windows,
            **SHORT,
        )

    free, held = edited(None, 0.0), edited({"apple": 1.0}, 0.0)
    assert held.windows == {"apple": 1.0}
    assert held.edit_report().settings["windows"] == {"apple": 1.0}
    assert (held.latents[0] - free.latents[0]).abs().max() > 1e-4
    assert (held.latents[1] - free.latents[1]).abs().max() < 1e-5
    assert held.edit_nfe > free.edit_nfe  # the source's row is needed now
    all_but = edited({"apple": 0.0}, 1.0)
    assert (all_but.latents[0] - edited(None, 1.0).latents[0]).abs().max() > 1e-4


def test_a_seeds_picture_is_generated_under_the_guidance_that_is_given(model: SD3Model) -> None:
    for guidance in (None, 1.0, 3.0):
        result = rf.edit(
            model,
            prompts=TARGET,
            source_prompt=SOURCE,
            seed=5,
            preset="euler",
            guidance_scale=guidance,
            **SHORT,
        )
        assert result.inversion.guidance_scale == guidance or guidance is None
        generated = rf.generate(
            model, SOURCE, seed=5, num_inference_steps=3, guidance_scale=guidance
        )[0]
        assert np.array_equal(pixels(result.source), pixels(generated))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": Image.new("L", (3, 3))}, "the mask is 3 × 3 and the image 75 × 50"),
        ({"mask_blur": 2.0}, "without a mask there is nothing for mask_blur to change"),
        ({"mask_grow": 2, "mask_invert": True}, "nothing for mask_invert, mask_grow to change"),
        ({"mask": Image.new("L", (75, 50), 255), "mask_blur": -1.0}, "mask_blur is -1.0"),
        ({"mask": Image.new("L", (75, 50))}, "the mask is black all over"),
        ({"paste_back": True}, "paste_back needs a mask: give one, or mask_threshold"),
        ({"windows": {"cat": 0.5}}, "'cat' is no word that stays as it is; there are: a, apple"),
        ({"windows": {"apple": 2.0}}, "the window of 'apple' is 2.0; from 0 to 1"),
        (
            {"windows": {"apple": 1.0}, "method": "uni_edit"},
            "windows have no effect on the method uni_edit",
        ),
        ({"mask_from": "attention"}, "mask_from is 'attention' without a mask_threshold"),
        ({"image": None, "seed": 1, "mask": Image.new("L", (75, 50))}, "and the image 32 × 32"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(
    model: SD3Model, photograph: Image.Image, arguments: dict[str, Any], message: str
) -> None:
    call = {
        "image": photograph,
        "prompts": TARGET,
        "source_prompt": SOURCE,
        "preset": "euler",
        "num_inference_steps": 3,
        **arguments,
    }
    with counting(model) as calls, pytest.raises(InputError, match=message) as caught:
        rf.edit(model, **call)
    assert "\n" not in str(caught.value) and not calls

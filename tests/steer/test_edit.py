"""`rf.edit` from a picture, an inversion or a seed, and what it says when something is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

import rectiflow as rf
from rectiflow.errors import InputError, WorkError
from rectiflow.invert import get_preset
from rectiflow.models import SD3Model
from tests.presets import FIXED_POINT
from tests.tiny import tiny_model

PROMPT, TARGET = "a red apple", "a green apple"
SHORT: dict[str, Any] = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(skimage.data.coffee()).resize((60, 40))


@pytest.fixture(scope="module")
def inversion(model: SD3Model, photograph: Image.Image) -> rf.Inversion:
    return rf.invert(model, photograph, PROMPT, **SHORT)


@contextmanager
def counting(model: SD3Model) -> Iterator[list[int]]:
    calls: list[int] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(len(kwargs["hidden_states"]))

    handle = model.network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("preset", ["exact", "fast", "ftedit", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_cost(model: SD3Model, photograph: Image.Image, preset: str, guidance: float) -> None:
    with counting(model) as calls:
        result = rf.edit(
            model,
            photograph,
            prompts=[TARGET, "cat"],
            source_prompt=PROMPT,
            preset=preset,
            guidance_scale=guidance,
            num_inference_steps=4,
        )
    assert result.nfe["total"] == sum(calls)
    assert result.nfe["inversion"] == result.inversion.nfe
    assert result.nfe["total"] == result.nfe["inversion"] + result.nfe["editing"]
    if preset == "euler":  # targets alone
        assert result.nfe == {
            "inversion": 4,
            "editing": 8 * int(guidance),
            "reconstruction": 0,
            "total": 4 + 8 * int(guidance),
        }
    assert [image.size for image in result.images] == [photograph.size] * 2
    assert result.latents.shape[0] == 2 and result.latents.dtype == torch.float32


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_same_prompt_gives_the_picture_back(
    model: SD3Model, inversion: rf.Inversion, guidance: float
) -> None:
    result = rf.edit(
        model,
        inversion,
        prompts=[PROMPT, TARGET],
        negative_prompt="sad",
        guidance_scale=guidance,
        compensate="both",
        mask_threshold=0.0,
    )
    assert (result.latents[0] - inversion.latents[0]).abs().max() < 1e-4
    assert (result.latents[1] - inversion.latents[0]).abs().max() > 1e-2
    decoded = pixels(inversion.images(inversion.latents)[0])
    assert np.abs(pixels(result.images[0]) - decoded).max() <= 1


def test_several_prompts_are_as_one_by_one(model: SD3Model, inversion: rf.Inversion) -> None:
    targets = [TARGET, "two green lemons on the left", ""]
    settings: dict[str, Any] = {"guidance_scale": 2.0, "adaln_ratio": 0.5, "attention_ratio": 0.5}
    together = rf.edit(model, inversion, prompts=targets, **settings)
    for number, target in enumerate(targets):
        alone = rf.edit(model, inversion, prompts=target, **settings)
        assert alone.prompts == [target]
        difference = (alone.latents[0] - together.latents[number]).abs().max()
        assert difference < 1e-5


def test_a_picture_or_its_inversion(
    model: SD3Model, inversion: rf.Inversion, photograph: Image.Image, tmp_path: Path
) -> None:
    photograph.save(tmp_path / "x.png")
    saved = inversion.save(tmp_path / "x.safetensors")
    results = [
        rf.edit(model, image, prompts=TARGET, source_prompt=PROMPT, **settings)
        for image, settings in (
            (photograph, SHORT | {"preset": "exact"}),
            (tmp_path / "x.png", SHORT | {"preset": "exact"}),
            (str(tmp_path / "x.png"), SHORT | {"preset": "exact"}),
            (inversion, {}),
            (rf.Inversion.load(saved, model), SHORT),
        )
    ]
    for result in results:
        # From the file the source's row runs again, in a batch of two: rounding differs.
        torch.testing.assert_close(result.latents, results[0].latents, atol=1e-5, rtol=1e-5)
        assert result.preset == inversion.preset
    assert all(np.array_equal(pixels(r.source), pixels(photograph)) for r in results[:3])


def test_an_inversion_keeps_its_own_settings(model: SD3Model, photograph: Image.Image) -> None:
    """Editing by one method after another's inversion; what was settled then stays."""
    inversion = rf.invert(model, photograph, PROMPT, preset=FIXED_POINT, iterations=2, **SHORT)
    result = rf.edit(model, inversion, prompts=TARGET, preset="ftedit")
    assert result.preset.guidance_scale == 2.0 and result.preset.inject == "all"
    assert (result.preset.num_inference_steps, result.preset.iterations) == (4, 2)
    assert result.preset.grid == "shifted" and not result.preset.average
    for settings, message in (
        ({"num_inference_steps": 30}, "made with num_inference_steps 4 and not 30"),
        ({"grid": "uniform"}, "made with grid 'shifted' and not 'uniform'"),
        ({"source_prompt": "cat"}, "made with source_prompt 'a red apple' and not 'cat'"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            rf.edit(model, inversion, prompts=TARGET, **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="the inversion was made with tiny and not with"):
        rf.edit(tiny_model(seed=1), inversion, prompts=TARGET)
    again = rf.edit(tiny_model(), inversion, prompts=TARGET, num_inference_steps=4)
    assert torch.equal(again.latents, rf.edit(model, inversion, prompts=TARGET).latents)


@pytest.mark.parametrize("preset", ["exact", "fast"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_generated_picture(model: SD3Model, guidance: float, preset: str) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": guidance}
    result = rf.edit(
        model,
        prompts=[PROMPT, TARGET],
        source_prompt=PROMPT,
        seed=5,
        preset=preset,
        compensate="both",
        mask_threshold=0.0,
        **settings,
    )
    # The guidance that is given is that of generating too.
    generated = rf.generate(model, PROMPT, seed=5, num_inference_steps=4, guidance_scale=guidance)[
        0
    ]
    assert np.array_equal(pixels(result.source), pixels(generated))
    assert (result.latents[0] - result.inversion.latents[0]).abs().max() < 1e-4
    assert np.abs(pixels(result.images[0]) - pixels(generated)).max() <= 1
    assert (result.latents[1] - result.inversion.latents[0]).abs().max() > 1e-2
    assert result.inversion.seed == 5 and not result.warnings


def test_the_default_is_fast_or_the_inversions_own(
    model: SD3Model, photograph: Image.Image, inversion: rf.Inversion
) -> None:
    told = {"prompts": TARGET, "source_prompt": PROMPT}
    preset = rf.edit(model, photograph, **told, **SHORT).preset
    assert preset == get_preset("fast", **SHORT)
    assert inversion.preset == get_preset("exact", **SHORT)
    assert rf.edit(model, inversion, **told).preset == inversion.preset
    with pytest.raises(InputError, match="flow_edit makes no use of an inversion"):
        rf.edit(model, inversion, preset="flowedit", **told)


@pytest.mark.parametrize("preset", ["fast", "exact", "ftedit", "flowedit"])
def test_a_diagnosis_is_asked_for_and_counted(
    model: SD3Model, photograph: Image.Image, preset: str
) -> None:
    """By a hook on the network; the edit is the same with and without."""
    told = {"prompts": TARGET, "source_prompt": PROMPT, "preset": preset, **SHORT}
    plain = rf.edit(model, photograph, **told)
    assert plain.diagnosis is None and plain.nfe["reconstruction"] == 0
    with counting(model) as calls:
        result = rf.edit(model, photograph, diagnose=True, **told)
    assert torch.equal(result.latents, plain.latents)
    assert sum(calls) == result.nfe["total"] == sum(list(result.nfe.values())[:-1])
    found = result.diagnosis
    assert found is not None and found.inversion.inverted
    # Two ways forth, and before them the way back where the edit itself took none.
    own = found.inversion is result.inversion
    assert own == (preset in ("exact", "ftedit"))
    assert result.nfe["reconstruction"] == (8 if own else 12)
    assert found.reconstruction.max_abs_latent < 1e-4
    assert found.inversion.noise_statistics is not None
    assert torch.equal(found.inversion.latents, result.inversion.latents)
    report = result.edit_report()
    assert report.reconstruction is not None and report.codec is not None
    assert len(report.compensation) == 4 and report.nfe == result.nfe["total"]


def test_without_a_source_prompt(model: SD3Model, photograph: Image.Image) -> None:
    result = rf.edit(model, photograph, prompts=TARGET, **SHORT)
    assert result.inversion.source_prompt == ""
    assert any("No source prompt was given" in warning for warning in result.warnings)


def test_warnings(model: SD3Model, photograph: Image.Image) -> None:
    long = "red apple " * 15
    with pytest.warns(UserWarning, match="is longer than the 24 tokens"):
        result = rf.edit(
            model,
            photograph,
            prompts=[TARGET, long],
            source_prompt=PROMPT,
            negative_prompt="sad",
            guidance_scale=1.0,
            **SHORT,
        )
    said = "\n".join(result.warnings)
    assert "The negative prompt has no effect without guidance." in said
    assert "is longer than the 24 tokens clip takes: " in said
    assert "No source prompt" not in said
    # An image that is nothing like what the model knows: its noise is not N(0, I).
    black = Image.new("RGB", (32, 32))
    for asked in ({"preset": "exact"}, {"preset": "fast", "diagnose": True}):
        flat = rf.edit(model, black, prompts=TARGET, source_prompt="", **asked, **SHORT)
        assert any("unlike N(0, I)" in warning for warning in flat.warnings)


def test_the_negative_prompt_acts_above_guidance_1(
    model: SD3Model, inversion: rf.Inversion
) -> None:
    def edited(negative: str | None, guidance: float) -> torch.Tensor:
        return rf.edit(
            model,
            inversion,
            prompts=TARGET,
            negative_prompt=negative,
            guidance_scale=guidance,
        ).latents

    assert torch.equal(edited(None, 2.0), edited("", 2.0))
    assert not torch.equal(edited("sad", 2.0), edited("", 2.0))
    assert torch.equal(edited("sad", 1.0), edited(None, 1.0))


def test_outside_of_a_mask_the_latents_are_the_sources(
    model: SD3Model, inversion: rf.Inversion, photograph: Image.Image, tmp_path: Path
) -> None:
    drawn = Image.new("L", photograph.size)
    drawn.paste(255, (0, 0, 20, 40))
    drawn.save(tmp_path / "mask.png")
    for mask in (drawn, tmp_path / "mask.png"):
        result = rf.edit(model, inversion, prompts=[TARGET, "cat"], mask=mask)
        assert result.mask is not None
        outside = torch.from_numpy(result.mask == 0).expand_as(result.latents)
        source = inversion.latents.expand_as(result.latents)
        assert outside.any() and not outside.all()
        assert torch.equal(result.latents[outside], source[outside])
        assert not torch.equal(result.latents, source)


def test_reports(model: SD3Model, inversion: rf.Inversion, tmp_path: Path) -> None:
    result = rf.edit(model, inversion, prompts=[TARGET, "cat"])
    report = result.edit_report(command="rectiflow edit", targets=[result.source, None])
    assert [entry.prompt for entry in report.edits] == [TARGET, "cat"]
    # Nothing that was not asked for, or is not known: no empty plots.
    assert report.residuals == () and report.compensation == () and report.reconstruction is None
    assert report.times == inversion.grid.tolist()
    assert (report.nfe_inversion, report.nfe_editing, report.nfe) == (0, 8, 8)
    rf.report(report, tmp_path / "edit.html")
    assert (tmp_path / "edit.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": None}, "give an image or a seed"),
        ({"seed": 1}, "give an image or a seed"),
        ({"image": None, "seed": 1}, "a seed needs a source_prompt"),
        ({"prompts": []}, "no prompt"),
        ({"preset": "best"}, "preset is 'best'; one of: "),
        ({"steps": 5}, "unknown setting 'steps'; there are: "),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"adaln_ratio": 2}, "adaln_ratio is 2; from 0 to 1"),
        ({"iterations": 2}, "iterations has no effect on the scheme renoising"),
        ({"method": "uni_edit"}, "the method uni_edit begins at a noise, to which the scheme reno"),
        (
            {"preset": "flowedit", "scheme": "euler"},
            "the method flow_edit makes no use of an inversion .scheme euler.: give it the picture",
        ),
        ({"compensate": "all"}, "compensate is 'all'; one of: "),
        ({"image": "nowhere.png"}, "there is no file nowhere.png"),
        ({"mask": "nowhere.png"}, "there is no file nowhere.png"),
        ({"mask": Image.new("L", (3, 3))}, "the mask is 3 × 3 and the image 60 × 40"),
    ],
)
def test_what_is_wrong_gets_one_line(
    model: SD3Model, photograph: Image.Image, arguments: dict[str, Any], message: str
) -> None:
    call = {"image": photograph, "prompts": TARGET, **SHORT, **arguments}
    with pytest.raises(InputError, match=message) as caught:
        rf.edit(model, **call)
    assert "\n" not in str(caught.value)


def test_a_broken_network_is_named(model: SD3Model, inversion: rf.Inversion) -> None:
    broken = tiny_model()
    assert broken.weight_hash == model.weight_hash  # kept from before it broke
    with torch.no_grad():
        broken.network.proj_out.weight.fill_(torch.nan)
    with pytest.raises(WorkError, match="tiny returned numbers that are not finite"):
        rf.edit(broken, inversion, prompts=TARGET)


def test_nothing_is_left_behind(model: SD3Model, inversion: rf.Inversion) -> None:
    state = torch.get_rng_state()
    one = rf.edit(model, inversion, prompts=TARGET, guidance_scale=2.0)
    two = rf.edit(model, inversion, prompts=TARGET, guidance_scale=2.0)
    assert torch.equal(one.latents, two.latents)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.network.modules()
    )

"""Up to 1 there is no guidance, whoever is asked; below 0 there is nothing to ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

import rectiflow as rf
from rectiflow.errors import InputError
from rectiflow.models import FlowModel, generate_latents, initial_noise
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.straighten.export import save_pipeline
from rectiflow.straighten.settings import StraightenConfig
from tests.straighten.pair_making import make, rows
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model
from tests.tiny_sd import tiny_sd_model

NONE = (0.0, 0.4, 1.0)
MAKE: dict[str, Callable[[], FlowModel]] = {
    "sd3": tiny_model,
    "sd": tiny_sd_model,
    "rectified": lambda: tiny_sd_model(rectified=True),
}


@pytest.mark.parametrize(
    ("kind", "solver"),
    [("sd3", "euler"), ("sd", "midpoint"), ("sd", "ddim"), ("sd", "dpmpp"), ("rectified", "euler")],
)
def test_up_to_one_is_the_conditional_field(kind: str, solver: str) -> None:
    """Two prompts are two pictures, at one network sample a step; what it pushes from is unused."""
    model = MAKE[kind]()
    noise = initial_noise(model, [3], 32, 32)
    told: dict[str, Any] = {"solver": solver, "num_inference_steps": 2, "negative_prompt": "sad"}
    one = generate_latents(model, "two lemons", noise, guidance_scale=1.0, **told)
    other = generate_latents(model, "a red heart", noise, guidance_scale=0.0, **told)
    assert not torch.equal(one.x, other.x)
    for scale in NONE:
        again = generate_latents(model, "two lemons", noise, guidance_scale=scale, **told)
        assert torch.equal(again.x, one.x) and again.nfe == one.nfe
    told["true_cfg_scale"] = 0.4  # nor is that any
    assert torch.equal(
        generate_latents(model, "two lemons", noise, guidance_scale=1.0, **told).x, one.x
    )
    guided = generate_latents(model, "two lemons", noise, guidance_scale=1.5, **told)
    assert guided.nfe == 2 * one.nfe and not torch.equal(guided.x, one.x)


@torch.no_grad()
def test_what_a_network_is_told_is_no_guidance_of_ours() -> None:
    model = tiny_flux_model()
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor(0.3), model.encode_prompt("two lemons")
    for told in (0.0, 0.4, 3.5):
        field = GuidedVelocity(model, cond, None, told, 0.4)
        assert field.samples_per_row == 1
        assert torch.equal(field(x, t), model.velocity(x, t, cond.with_guidance(told)))


@pytest.mark.parametrize(
    "preset", ["fast", "exact", "ftedit", "uniedit", "flowedit", "dnaedit", "rf-inversion"]
)
def test_edits(preset: str) -> None:
    """One preset of every method, and of both kinds of paths."""
    model, picture = tiny_model(), Image.effect_noise((32, 32), 80).convert("RGB")
    results = []
    for scale in NONE:
        given: dict[str, Any] = {"preset": preset, "num_inference_steps": 5}
        if preset == "flowedit":
            given["source_guidance_scale"] = scale
        results.append(
            rf.edit(
                model,
                picture,
                source_prompt="two lemons",
                prompts="a red heart",
                guidance_scale=scale,
                negative_prompt="sad",
                **given,
            )
        )
    for result in results[1:]:
        assert torch.equal(result.latents, results[0].latents)
        assert result.nfe == results[0].nfe


def test_pairs(tmp_path: Path) -> None:
    model = tiny_sd_model()
    stores = [tmp_path / str(scale) for scale in NONE]
    for store, scale in zip(stores, NONE, strict=True):
        make(model, store, num=3, guidance_scale=scale)
    first, *others = (rows(store, "x_1") for store in stores)
    assert all(torch.equal(other, first) for other in others)


def test_walks_and_refinements() -> None:
    model = tiny_model()
    picture = rf.generate(model, "two lemons", num_inference_steps=2)[0]
    for make_pictures in (
        lambda scale: rf.interpolate(
            model, "two lemons", seeds=[1, 2], frames=2, num_inference_steps=2, guidance_scale=scale
        ),
        lambda scale: rf.refine(
            model, picture, "two lemons", num_inference_steps=2, guidance_scale=scale
        ),
    ):
        none, half = (make_pictures(scale) for scale in (1.0, 0.5))
        assert [image.tobytes() for image in none] == [image.tobytes() for image in half]


SAID = "guidance_scale is -1.0: give 0 or more; up to 1 is no guidance"


def test_below_zero_there_is_nothing(tmp_path: Path) -> None:
    model, picture = tiny_model(), Image.new("RGB", (32, 32))
    asked: list[Callable[[], object]] = [
        lambda: rf.generate(model, "two lemons", guidance_scale=-1.0),
        lambda: rf.refine(model, picture, "two lemons", guidance_scale=-1.0),
        lambda: rf.edit(model, picture, prompts="two lemons", guidance_scale=-1.0),
        lambda: make(model, tmp_path / "store", guidance_scale=-1.0),
        lambda: save_pipeline(model, tmp_path / "exported", guidance_scale=-1.0),
    ]
    for ask in asked:
        with pytest.raises(InputError, match=SAID):
            ask()
    for name in ("true_cfg_scale", "source_guidance_scale"):
        with pytest.raises(InputError, match=f"{name} is -1.0: give 0 or more"):
            rf.edit(model, picture, prompts="two", preset="flowedit", **{name: -1.0})
    with pytest.raises(ValidationError, match="guidance_scales"):
        StraightenConfig(model="emoji-sd", guidance_scales=(5.0, -1.0))
    assert not [*tmp_path.iterdir()]

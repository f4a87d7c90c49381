"""SDXL's refiner, held against diffusers' own pipeline, and pipelines that begin with a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from PIL import Image
from torch import Tensor

from rectiflow.app.cli import main
from rectiflow.errors import InputError
from rectiflow.models import (
    GuidedVelocity,
    SD3Model,
    SDModel,
    SDXLModel,
    generate_latents,
    initial_noise,
    load,
)
from rectiflow.models.refine import refine, refine_latents
from tests.tiny import CLIP_LENGTH, WIDTH, tiny_sd3
from tests.tiny_sd import tiny_sd, tiny_sdxl, tiny_sdxl_refiner

STEPS = 8
PROMPTS = ["two red apples", "a blue dog"]
SETTINGS: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 3.0}


def stock(model: SDXLModel) -> StableDiffusionXLImg2ImgPipeline:
    """The same parts, stepping as Euler does on the exact field."""
    scheduler = DDIMScheduler.from_config(
        model.pipeline.scheduler.config, timestep_spacing="trailing"
    )
    pipeline = StableDiffusionXLImg2ImgPipeline(
        **{**model.pipeline.components, "scheduler": scheduler},
        requires_aesthetics_score=model.requires_aesthetics_score,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def near(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize("aesthetics", [True, False])
@pytest.mark.parametrize(
    ("kind", "share", "negative"),
    [
        ("epsilon", 0.25, "sad face"),
        ("epsilon", 0.875, None),
        ("v_prediction", 0.5, "sad face"),
    ],
)
def test_it_refines_as_stock_does(
    aesthetics: bool, kind: str, share: float, negative: str | None
) -> None:
    model = SDXLModel(tiny_sdxl_refiner(kind, aesthetics))
    latents, noise = torch.randn(2, 4, 8, 12), initial_noise(model, [5, 6], 32, 48)
    begun = model.student_grid(STEPS)[STEPS - int(STEPS * share)]
    solution = refine_latents(
        model,
        latents,
        PROMPTS,
        noise,
        strength=1 - float(begun),
        negative_prompt=negative,
        **SETTINGS,
    )
    theirs = stock(model)(
        PROMPTS,
        image=latents,
        strength=share,
        negative_prompt=None if negative is None else [negative] * 2,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="latent",
        **SETTINGS,
    ).images
    near(solution.x, theirs)
    assert solution.nfe == 2 * 2 * int(STEPS * share)


@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_from_noise_it_generates_as_stock_does(solver: str) -> None:
    model = SDXLModel(tiny_sdxl_refiner())
    noise = initial_noise(model, [3], 32, 32)
    ours = generate_latents(
        model, "cat", noise, negative_prompt="sad face", grid=None, solver=solver, **SETTINGS
    ).x
    pipeline = stock(model)
    spacing = {} if solver == "euler" else {"timestep_spacing": "leading"}
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **spacing)
    theirs = pipeline(
        "cat",
        image=torch.zeros(1, 4, 8, 8),
        latents=noise,
        strength=1.0,
        negative_prompt="sad face",
        output_type="latent",
        **SETTINGS,
    ).images
    near(ours, theirs)


def test_what_the_network_is_told() -> None:
    """A score of 6 with a prompt, of 2.5 with what guidance leads away from, whatever it says."""
    model = SDXLModel(tiny_sdxl_refiner())
    told: list[dict[str, Tensor]] = []
    model.network.register_forward_pre_hook(
        lambda _module, _args, kwargs: told.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    cond = model.encode_prompt(PROMPTS)
    assert cond.embeds.shape == (2, CLIP_LENGTH, WIDTH // 2)
    good, bad = [32, 48, 0, 0, 6.0], [32, 48, 0, 0, 2.5]
    for negative in (None, model.encode_prompt(PROMPTS[0]), cond):
        field = GuidedVelocity(model, cond, negative, 3.0)
        field(torch.randn(2, 4, 8, 12), torch.tensor(0.5))
        assert told.pop()["time_ids"].tolist() == [bad, bad, good, good]
        field.select(torch.tensor([1]))(torch.randn(1, 4, 8, 12), torch.tensor(0.5))
        both = told.pop()
        assert both["time_ids"].tolist() == [bad, good]
        assert torch.equal(both["text_embeds"][1:], cond[1].pooled)
    model.velocity(torch.randn(2, 4, 8, 12), 0.5, cond)
    assert told.pop()["time_ids"].tolist() == [good, good]
    plain = SDXLModel(tiny_sdxl()).encode_prompt("cat")
    assert plain.as_negative() is plain and plain.negative is None


def test_from_a_folder_and_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_sdxl_refiner().save_pretrained(tmp_path / "refiner")
    tiny_sd(rectified=True).save_pretrained(tmp_path / "fast")
    model = load(tmp_path / "refiner", device="cpu")
    assert isinstance(model, SDXLModel) and model.requires_aesthetics_score
    assert (model.family, model.default_guidance_scale) == ("sdxl", 5.0)
    x, cond = torch.randn(1, 4, 8, 8), model.encode_prompt("cat")
    made = SDXLModel(tiny_sdxl_refiner())
    # Weights elsewhere in memory may go through other kernels.
    found, expected = (one.velocity(x, 0.4, cond) for one in (model, made))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    words = f"generate cat --model {tmp_path / 'fast'} --steps 1 --guidance 1 --device cpu --json"
    refined = f"--refine {tmp_path / 'refiner'} --refine-steps 4 -o {tmp_path / 'out'}"
    assert main([*words.split(), *refined.split()]) == 0
    assert json.loads(capsys.readouterr().out)["refinement"]["guidance_scale"] == 5.0
    before, after = (Image.open(tmp_path / "out" / f"0{kind}.png") for kind in ("", "-refined"))
    (expected,) = refine(made, before, "cat", num_inference_steps=4)
    assert after.convert("RGB").tobytes() == expected.tobytes() != before.convert("RGB").tobytes()


def twins() -> dict[str, tuple[Any, type]]:
    sd, sd3, xl = tiny_sd(), tiny_sd3(t5=True), tiny_sdxl()
    return {
        "sd": (
            StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False),
            SDModel,
        ),
        "sd3": (StableDiffusion3Img2ImgPipeline(**sd3.components), SD3Model),
        "sdxl": (
            StableDiffusionXLImg2ImgPipeline(**xl.components, add_watermarker=False),
            SDXLModel,
        ),
        "one-encoder": (tiny_sdxl_refiner(aesthetics=False), SDXLModel),
    }


@pytest.mark.parametrize("name", ["sd", "sd3", "sdxl", "one-encoder"])
def test_other_pipelines_that_begin_with_a_picture(name: str, tmp_path: Path) -> None:
    """They are what they are as text-to-image pipelines, and as such they are written again."""
    pipeline, family = twins()[name]
    pipeline.save_pretrained(tmp_path)
    assert "Img2Img" in json.loads((tmp_path / "model_index.json").read_text())["_class_name"]
    model = load(tmp_path, device="cpu")
    assert isinstance(model, family)
    assert type(model.pipeline).__name__ == type(pipeline).__name__.replace("Img2Img", "")
    x, cond = torch.randn(1, 4, 8, 8), model.encode_prompt(["cat"])
    expected = family(pipeline, metadata=model.metadata).velocity(x, 0.4, cond)
    # Loaded weights lie in memory otherwise, so that kernels may sum in another order.
    torch.testing.assert_close(model.velocity(x, 0.4, cond), expected, rtol=1e-4, atol=1e-5)


def test_a_refiner_that_says_it_is_none_is_refused(tmp_path: Path) -> None:
    tiny_sdxl_refiner().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(
        json.dumps(index | {"requires_aesthetics_score": False})
    )
    with pytest.raises(InputError, match="does not take 6 numbers beside the prompt"):
        load(tmp_path)

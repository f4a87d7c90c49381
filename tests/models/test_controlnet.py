"""ControlNets: what stock pipelines make with them at equal noise; at one step too."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor

from rectiflow import invert
from rectiflow.errors import InputError
from rectiflow.models import SDModel, SDXLModel, generate, generate_latents
from rectiflow.models.controlnet import with_control
from rectiflow.models.instaflow import InstaFlowModel, to_diffusers_sign
from rectiflow.models.schedulers import make_scheduler
from rectiflow.models.stacked_unet import StackedUNet
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd, tiny_sd_model, tiny_sdxl_model, tiny_unet

PROMPTS, NEGATIVE = ["a red apple", "two dogs"], "blue"


def make_controlnet(unet: UNet2DConditionModel, seed: int = 0, strength: float = 0.3) -> Any:
    """As training begins, from a U-Net; then what begins as zero is made random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8))
        last = controlnet.controlnet_cond_embedding.conv_out
        zero = [last, *controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
        for layer in zero:
            torch.nn.init.normal_(layer.weight, std=strength)
    return controlnet.eval().requires_grad_(False)


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = torch.randint(
        256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed)
    )
    return Image.fromarray(pixels.byte().numpy())


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def close(ours: Tensor, theirs: Tensor) -> bool:
    """To 1e-5 of the largest value."""
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def stock(model: Any, controlnet: Any, image: Any, scheduler: Any, **options: Any) -> Tensor:
    """diffusers' own pipeline of the same parts."""
    parts = model.pipeline.components | {"controlnet": controlnet, "scheduler": scheduler}
    kind: Any = StableDiffusionControlNetPipeline
    more: dict[str, Any] = {"requires_safety_checker": False}
    if isinstance(model, SDXLModel):
        kind, more = StableDiffusionXLControlNetPipeline, {"add_watermarker": False}
        parts.pop("image_encoder", None)
    pipeline = kind(**parts, **more)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS, negative_prompt=[NEGATIVE] * 2, image=image, latents=noise(),
        height=32, width=32, output_type="latent", **options,
    ).images  # fmt: skip


def ours(model: Any, steps: int, guidance: float, **options: Any) -> Tensor:
    return generate_latents(
        model, PROMPTS, noise(), negative_prompt=NEGATIVE, num_inference_steps=steps,
        guidance_scale=guidance, **options,
    ).x  # fmt: skip


@pytest.mark.parametrize(("solver", "scale"), [("dpmpp", 1.0), ("ddim", 0.6)])
def test_it_is_the_stock_pipeline(solver: str, scale: float) -> None:
    model = tiny_sd_model()
    controlnet = make_controlnet(model.network)
    theirs = stock(
        model, controlnet, picture(), make_scheduler(model, solver), num_inference_steps=4,
        guidance_scale=5.0, controlnet_conditioning_scale=scale,
    )  # fmt: skip
    found = ours(with_control(model, controlnet, picture(), scale), 4, 5.0, solver=solver)
    assert close(found, theirs)
    assert (found - ours(model, 4, 5.0, solver=solver)).abs().max() > 1e-2


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (1, 1.5), (4, 1.5)])
def test_rectified_flows_at_one_step_too(steps: int, guidance: float) -> None:
    model = tiny_sd_model(rectified=True)
    controlnet = make_controlnet(model.network)
    theirs = stock(
        model, controlnet, picture(), model.pipeline.scheduler, num_inference_steps=steps,
        guidance_scale=guidance,
    )  # fmt: skip
    found = ours(with_control(model, controlnet, picture()), steps, guidance)
    assert close(found, theirs)
    assert (found - ours(model, steps, guidance)).abs().max() > 1e-2


def test_the_authors_one_step_under_control() -> None:
    """InstaFlow's pipeline with a ControlNet: both networks at time 1000, and x + v."""
    pipeline = tiny_sd()
    controlnet, (height, width) = make_controlnet(pipeline.unet), (32, 32)
    pixels = torch.rand(1, 3, height, width)
    model = InstaFlowModel(pipeline)
    embeds, told = model.encode_prompt(PROMPTS).embeds, torch.full((2,), 1000.0)
    with torch.no_grad():
        down, middle = controlnet(
            noise(), told, embeds, pixels.expand(2, -1, -1, -1), return_dict=False
        )
        v = pipeline.unet(
            noise(), told, embeds, down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample  # fmt: skip
    to_diffusers_sign(pipeline, "instaflow")
    found = ours(with_control(model, controlnet, pixels), 1, 1.0)
    assert torch.allclose(found, noise() + v, atol=1e-5)


def test_sdxl() -> None:
    model = tiny_sdxl_model()
    controlnet = make_controlnet(model.network)
    theirs = stock(
        model, controlnet, picture(), make_scheduler(model, "dpmpp"), num_inference_steps=3,
        guidance_scale=5.0, controlnet_conditioning_scale=1.0,
    )  # fmt: skip
    found = ours(with_control(model, controlnet, picture()), 3, 5.0, solver="dpmpp")
    assert close(found, theirs)


def test_two_controls_add_up() -> None:
    model = tiny_sd_model()
    nets, pictures = (
        [make_controlnet(model.network, seed) for seed in (0, 1)],
        [picture(0), picture(1)],
    )
    theirs = stock(
        model, nets, pictures, make_scheduler(model, "dpmpp"), num_inference_steps=2,
        guidance_scale=5.0, controlnet_conditioning_scale=[1.0, 0.5],
    )  # fmt: skip
    both = with_control(with_control(model, nets[0], pictures[0]), nets[1], pictures[1], 0.5)
    found = ours(both, 2, 5.0, solver="dpmpp")
    assert close(found, theirs)
    assert (found - ours(with_control(model, nets[0], pictures[0]), 2, 5.0)).abs().max() > 1e-2


def test_the_model_itself_is_left_as_it_is() -> None:
    model = tiny_sd_model(rectified=True)
    before, own_hash = ours(model, 2, 1.5), model.weight_hash
    view: Any = with_control(model, make_controlnet(model.network), picture())
    assert issubclass(type(view), SDModel)
    assert (view.name, view.default_size, view.dtype) == (model.name, 32, torch.float32)
    ours(view, 2, 1.5)
    assert torch.equal(ours(model, 2, 1.5), before) and type(model) is SDModel
    # Nothing is added where a ControlNet has learned nothing, or counts for nothing.
    silent = with_control(model, make_controlnet(model.network, strength=0.0), picture())
    assert torch.equal(ours(silent, 2, 1.5), before)
    assert torch.equal(
        ours(with_control(model, make_controlnet(model.network), picture(), 0.0), 2, 1.5), before
    )
    network = view.controls[0].network
    views = [
        view, silent, with_control(model, network, picture(), 0.5),
        with_control(model, network, picture(1)),
    ]  # fmt: skip
    assert len({own_hash, *(one.weight_hash for one in views)}) == 5
    assert model.weight_hash == own_hash


def test_inversion_and_euler_on_the_exact_field() -> None:
    model = tiny_sd_model()
    view: Any = with_control(model, make_controlnet(model.network), picture())
    found = invert(view, picture(2), source_prompt=PROMPTS[0], num_inference_steps=3)
    assert found.reconstruct().max_abs_latent < 1e-4
    x, cond = noise().requires_grad_(True), view.encode_prompt(PROMPTS)
    view.differentiable_velocity(x, 0.5, cond).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_from_a_folder_in_the_models_dtype(tmp_path: Path) -> None:
    model = tiny_sd_model(rectified=True, dtype=torch.bfloat16)
    controlnet = make_controlnet(tiny_unet())
    controlnet.save_pretrained(tmp_path / "control")
    picture().save(tmp_path / "edges.png")
    view: Any = with_control(model, tmp_path / "control", tmp_path / "edges.png")
    assert view.controls[0].network.dtype == torch.bfloat16
    pictures = [
        generate(one, PROMPTS[0], num_inference_steps=1)[0].tobytes() for one in (model, view)
    ]
    assert pictures[0] != pictures[1]


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    model = tiny_sd_model()
    controlnet = make_controlnet(model.network)
    other = make_controlnet(model.network)
    other.register_to_config(cross_attention_dim=99)
    pooling = make_controlnet(model.network)
    pooling.register_to_config(global_pool_conditions=True)
    wrong: list[tuple[Any, Any, str]] = [
        (controlnet, torch.zeros(2, 3, 32, 32), r"of shape \[2, 3, 32, 32\]"),
        (controlnet, tmp_path / "none.png", "no file"),
        (tmp_path / "none", picture(), "there is no ControlNet"),
        (tmp_path, picture(), "cannot be loaded"),
        (other, picture(), "is not for tiny-sd: its cross_attention_dim is 99"),
        (pooling, picture(), "pool"),
        (model.network, picture(), "is no ControlNet"),
    ]
    for network, image, message in wrong:
        with pytest.raises(InputError, match=message) as caught:
            with_control(model, network, image)
        assert "\n" not in str(caught.value)
    view = with_control(model, controlnet, picture(size=(40, 32)))
    with pytest.raises(InputError, match="control image is 40 × 32 and the picture 32 × 32"):
        generate(view, PROMPTS, num_inference_steps=1)
    with pytest.raises(InputError, match="that has a U-Net"):
        with_control(cast(Any, tiny_model()), controlnet, picture())
    pipeline = tiny_sd()
    pipeline.unet = StackedUNet.from_unet(pipeline.unet)
    with pytest.raises(InputError, match="has a StackedUNet"):
        with_control(SDModel(pipeline), controlnet, picture())

"""ONNX of a one-step model: what onnxruntime makes of it is what our one Euler step makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rectiflow.errors import InputError
from rectiflow.flow.solver import integrate
from rectiflow.models import FlowModel
from rectiflow.straighten import onnx
from rectiflow.straighten.card import PROMPT
from rectiflow.straighten.monitor import conditional
from tests.straighten.stock import python
from tests.straighten.test_card import snippet
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd_model, tiny_sdxl_model, tiny_unet

PROMPTS = ["a red apple", "two happy cats", "a dog"]
MODELS = {
    "rectified": lambda: tiny_sd_model(rectified=True),
    "epsilon": tiny_sd_model,
    "v": lambda: tiny_sd_model("v_prediction"),
    "zero-snr": lambda: tiny_sd_model("v_prediction", zero_terminal_snr=True),
    "sample": lambda: tiny_sd_model("sample"),
    "told": lambda: tiny_sd_model(rectified=True, guidance_embedded=True),
    "sdxl": tiny_sdxl_model,
}
installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in onnx.PACKAGES),
    reason="onnx, onnxruntime and onnxscript are an extra",
)


def one_step(model: FlowModel, noise: torch.Tensor) -> torch.Tensor:
    cond = model.encode_prompt(PROMPTS)
    if model.guidance_embeds:
        cond = cond.with_guidance(model.default_guidance_scale)
    start = model.initial_state(noise)
    return integrate(conditional(model, cond), start, model.student_grid(1)).x


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_are_the_model_before_they_are_written(name: str) -> None:
    """Tokens to embeddings, noise to latents in one step, latents to pixels."""
    model = MODELS[name]()
    noise = torch.randn(3, *model.latent_shape(32, 32))
    with torch.no_grad():
        embeds = onnx.TextEncoder(model)(*onnx.tokens(model, PROMPTS))
        known = model.encode_prompt(PROMPTS)
        for found, wanted in zip(embeds, (known.embeds, known.pooled), strict=False):
            assert wanted is not None and torch.allclose(found, wanted, atol=1e-6)
        assert len(embeds) == 1 + (known.pooled is not None)
        latents = onnx.OneStep(model)(noise, *embeds)
        ours = one_step(model, noise)
        assert float((latents - ours).abs().max()) < 1e-5 * float(ours.abs().max())
        assert float((latents - noise).abs().max()) > 0.1
        assert torch.allclose(onnx.Decoder(model)(ours), model.decode(ours), atol=1e-6)


@installed
def test_one_step_in_onnxruntime(tmp_path: Path) -> None:
    """The denoiser of a network of a few layers, with a batch that it was not written with."""
    import onnxruntime

    model = tiny_sd_model()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.pipeline.register_modules(unet=smaller())
    noise = onnx.example_noise(model)
    embeds = model.encode_prompt(PROMPTS).embeds
    part = onnx._Part(
        "denoiser", onnx.OneStep(model), {"noise": noise, "embeds": embeds[:2]}, ("latents",)
    )
    with torch.no_grad(), onnx._quiet():
        part.write(tmp_path)
        part.check(tmp_path)
    runtime = onnxruntime.InferenceSession(
        str(tmp_path / "denoiser.onnx"), providers=["CPUExecutionProvider"]
    )
    for height, width in ((32, 32), (48, 32), (16, 96)):
        noise = torch.randn(3, *model.latent_shape(height, width))
        (latents,) = runtime.run(None, {"noise": noise.numpy(), "embeds": embeds.numpy()})
        ours = one_step(model, noise)
        off = float((torch.from_numpy(latents) - ours).abs().max())
        assert off < 1e-5 * float(ours.abs().max()), (height, width)


@installed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["rectified", "epsilon", "told", "sdxl"])
def test_from_noise_and_tokens_to_pixels(name: str, tmp_path: Path) -> None:
    """The three files one after the other, against the model, at other sizes; and as they say."""
    import onnxruntime

    model = MODELS[name]()
    model.pipeline.save_pretrained(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    files = onnx.export_onnx(model, tmp_path / "onnx")
    assert [file.name for file in files] == ["decoder.onnx", "denoiser.onnx", "text_encoder.onnx"]
    assert {path.name for path in tmp_path.iterdir()} == before | {"onnx"}
    decoder, denoiser, encoder = (
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for file in files
    )
    for count, height, width in ((1, 32, 32), (3, 48, 32), (3, 16, 64)):
        noise = torch.randn(3, *model.latent_shape(height, width))
        expected = model.decode(one_step(model, noise))
        ids = [ids[:count].numpy() for ids in onnx.tokens(model, PROMPTS)]
        embeds = encoder.run(None, dict(zip(("input_ids", "input_ids_2"), ids, strict=False)))
        given = dict(zip(("embeds", "pooled"), embeds, strict=False))
        (latents,) = denoiser.run(None, {"noise": noise[:count].numpy(), **given})
        (images,) = decoder.run(None, {"latents": latents})
        assert images.shape == (count, 3, height, width)
        assert float((torch.from_numpy(images) - expected[:count]).abs().max()) < 1e-4
    # What its README says, at its size and at another one.
    code = snippet((tmp_path / "onnx" / "README.md").read_text())
    given = f"height, width = {model.default_size}, {model.default_size}"
    for size in ((model.default_size, model.default_size), (48, 64)):
        python(code.replace(given, f"height, width = {size[0]}, {size[1]}"), tmp_path)
        noise = np.random.default_rng(0).standard_normal(
            (1, *model.latent_shape(*size)), dtype=np.float32
        )
        cond = model.encode_prompt(PROMPT)
        if model.guidance_embeds:
            cond = cond.with_guidance(model.default_guidance_scale)
        start = model.initial_state(torch.from_numpy(noise))
        ours = integrate(conditional(model, cond), start, model.student_grid(1)).x
        pixels = (255 * model.decode(ours)[0].permute(1, 2, 0)).round().numpy()
        with Image.open(tmp_path / "picture.png") as image:
            assert image.size == size[::-1]
            assert np.abs(np.asarray(image, float) - pixels).max() <= 1


def test_other_families_and_missing_packages_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnx, "PACKAGES", ("torch",))
    with pytest.raises(InputError, match=r"sd3.*Stable Diffusion family"):
        onnx.export_onnx(tiny_model(), tmp_path / "onnx")
    monkeypatch.setattr(onnx, "PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(InputError, match=r'needs no_such_package: pip install "\.\[onnx\]"'):
        onnx.export_onnx(tiny_sd_model(), tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def smaller() -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    config = dict(tiny_unet().config)
    config |= {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
        "block_out_channels": (16,),
    }
    return UNet2DConditionModel.from_config(config).eval().requires_grad_(False)

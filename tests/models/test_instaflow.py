"""Official InstaFlow weights: the authors' sampling loop written out, and stock files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.models import SDModel, generate_latents, load, read_metadata
from rectiflow.models.instaflow import InstaFlowModel, import_instaflow
from tests.tiny import tiny_sd3
from tests.tiny_sd import tiny_sd

PROMPT, NEGATIVE = "a red apple", "a dog"
STEPS = (1, 2, 3, 4, 8)


def official_pipeline() -> StableDiffusionPipeline:
    """Random weights, whose predictions are of the size of velocities and depend on the time."""
    pipeline = tiny_sd(seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in pipeline.unet.time_embedding.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the authors saved theirs: everything as of Stable Diffusion, but for the class."""
    folder = tmp_path_factory.mktemp("official") / "instaflow"
    official_pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "RectifiedFlowPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def imported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("imported") / "model"
    import_instaflow(folder, target, student_steps=(1,))
    return target


def noise() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def official(
    pipeline: StableDiffusionPipeline, times: list[float], lengths: list[float], guidance: float
) -> Tensor:
    """Go on by h v at each of the network's times; the authors' are 1000 (1 - i / N)."""

    def embed(prompt: str) -> Tensor:
        ids = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        return pipeline.text_encoder(ids)[0].repeat(2, 1, 1)

    x, prompted, negative = noise(), embed(PROMPT), embed(NEGATIVE)
    for time, length in zip(times, lengths, strict=True):
        told = torch.ones(2) * time
        v = pipeline.unet(x, told, encoder_hidden_states=prompted).sample
        if guidance != 1:
            v_negative = pipeline.unet(x, told, encoder_hidden_states=negative).sample
            v = v_negative + guidance * (v - v_negative)
        x = x + length * v
    return x


def authors(steps: int, guidance: float, pipeline: Any = None) -> Tensor:
    times = [(1.0 - i / steps) * 1000.0 for i in range(steps)]
    return official(pipeline or official_pipeline(), times, [1 / steps] * steps, guidance)


def ours(model: Any, steps: int, guidance: float) -> Tensor:
    return generate_latents(
        model, PROMPT, noise(), negative_prompt=NEGATIVE, num_inference_steps=steps,
        guidance_scale=guidance,
    ).x  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_it_is_the_authors_loop(folder: Path, guidance: float) -> None:
    model = load(folder, device="cpu")
    assert isinstance(model, InstaFlowModel) and model.family == "sd"
    for steps in STEPS:
        theirs = authors(steps, guidance)
        assert (theirs - noise()).abs().max() > 0.1
        assert torch.allclose(ours(model, steps, guidance), theirs, atol=1e-5)


def test_a_folder_that_says_nothing_needs_to_be_told_of(tmp_path: Path) -> None:
    official_pipeline().save_pretrained(tmp_path)
    told = load(tmp_path, device="cpu", convention="instaflow")
    assert torch.allclose(ours(told, 2, 1.0), authors(2, 1.0), atol=1e-5)
    untold = load(tmp_path, device="cpu")
    assert untold.prediction_type == "epsilon"
    assert (ours(untold, 2, 1.0) - authors(2, 1.0)).abs().max() > 0.1


def test_what_is_imported_is_stock(folder: Path, imported: Path) -> None:
    """Stock diffusers, our model and the authors' sum at the stock scheduler's times agree."""
    stock, model = StableDiffusionPipeline.from_pretrained(imported), load(imported, device="cpu")
    stock.set_progress_bar_config(disable=True)
    assert type(model) is SDModel and model.weight_hash == load(folder, device="cpu").weight_hash
    for steps in (1, 2, 4, 8):
        theirs = stock(
            PROMPT, negative_prompt=NEGATIVE, num_images_per_prompt=2, latents=noise(),
            num_inference_steps=steps, guidance_scale=1.5, height=32, width=32,
            output_type="latent",
        ).images  # fmt: skip
        assert torch.allclose(ours(model, steps, 1.5), theirs, atol=1e-4)
        times = stock.scheduler.timesteps.tolist()
        assert times[0] == 999
        lengths = -np.diff(stock.scheduler.sigmas.numpy())
        expected = official(official_pipeline(), times, lengths.tolist(), 1.5)
        assert torch.allclose(theirs, expected, atol=1e-4)


def test_the_first_time_is_1000_or_999(folder: Path, imported: Path) -> None:
    """The authors' 1000 at first, and stock 999, which is another field."""
    model, stock = load(folder, device="cpu"), load(imported, device="cpu")
    cond, x = model.encode_prompt(PROMPT).rows(2), noise()
    fields = []
    for asked, time in ((model, 1000.0), (stock, 999.0)):
        v = official(official_pipeline(), [time], [1.0], 1.0) - x
        assert torch.allclose(asked.velocity(x, 0.0, cond), v, atol=1e-5)
        fields.append(v)
    assert (fields[0] - fields[1]).abs().max() > 1e-3
    # Elsewhere, at integer times, there is no difference.
    # Weights elsewhere in memory may go through other kernels.
    found, expected = (one.velocity(x, 0.5, cond) for one in (model, stock))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_metadata_and_defaults(folder: Path, imported: Path, tmp_path: Path) -> None:
    one_step, other = load(imported, device="cpu"), load(folder, device="cpu")
    assert read_metadata(imported / "rectiflow.json").student_steps == (1,)
    assert (one_step.default_num_inference_steps, one_step.default_guidance_scale) == (1, 1.0)
    assert (other.default_num_inference_steps, other.default_guidance_scale) == (25, 1.5)
    named = tmp_path / "instaflow_0_9B_from_sd_1_5"
    named.symlink_to(folder)
    assert load(named, device="cpu").default_num_inference_steps == 1


def test_dtype_of_the_import(folder: Path, tmp_path: Path) -> None:
    import_instaflow(folder, tmp_path / "half", dtype=torch.bfloat16)
    kinds = {}
    for part in ("unet", "vae"):
        weights = load_file(tmp_path / "half" / part / "diffusion_pytorch_model.safetensors")
        kinds[part] = {weight.dtype for weight in weights.values()}
    assert kinds == {"unet": {torch.bfloat16}, "vae": {torch.float32}}


@pytest.mark.parametrize("targets", [["to_q", "to_v"], ["conv_out"]])
def test_a_lora_is_on_the_authors_network(folder: Path, tmp_path: Path, targets: list[str]) -> None:
    """Whatever it changes, also where the sign is turned around."""
    pipeline = official_pipeline()
    settings = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    pipeline.unet.add_adapter(settings)
    layers = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    with_lora = authors(2, 1.0, pipeline)
    assert (with_lora - authors(2, 1.0)).abs().max() > 1e-3
    model = load(folder, device="cpu", lora=[tmp_path])
    assert torch.allclose(ours(model, 2, 1.0), with_lora, atol=1e-5)


def test_wrong_use_is_one_line(imported: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in diffusers' convention already"):
        load(imported, convention="instaflow")
    with pytest.raises(InputError, match="is there already"):
        import_instaflow(folder, imported)
    with pytest.raises(InputError, match="unknown convention 'sd'"):
        load(folder, convention="sd")  # type: ignore[arg-type]
    tiny_sd3().save_pretrained(tmp_path / "sd3")
    with pytest.raises(InputError, match="for Stable Diffusion's U-Nets"):
        load(tmp_path / "sd3", convention="instaflow")
    with pytest.raises(InputError, match="in diffusers' convention already"):
        import_instaflow(imported, tmp_path / "new")
    assert not list(tmp_path.glob("*new*"))

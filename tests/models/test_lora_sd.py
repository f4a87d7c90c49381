"""LoRAs for Stable Diffusion's U-Net and text encoder: what stock pipelines make with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.models import generate_latents, load
from tests.tiny_sd import tiny_sd

PROMPT, NEGATIVE = "a red apple", "two dogs"


def write_lora(folder: Path, seed: int, unet: bool = True, text: bool = True) -> Path:
    """A random LoRA of rank 2, its second matrices not zero as at birth."""
    pipeline = tiny_sd()
    kinds = {
        "unet": (pipeline.unet, ["to_q", "to_v", "to_out.0", "ff.net.0.proj", "conv1"], unet),
        "text_encoder": (pipeline.text_encoder, ["q_proj", "v_proj", "fc1"], text),
    }
    layers: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, (part, targets, wanted) in kinds.items():
            if wanted:
                part.add_adapter(
                    LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
                )
                layers[f"{name}_lora_layers"] = get_peft_model_state_dict(part)
    StableDiffusionPipeline.save_lora_weights(folder, **layers)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora-sd")
    tiny_sd().save_pretrained(root / "diffusion")
    tiny_sd(rectified=True).save_pretrained(root / "rectified")
    return {
        "diffusion": root / "diffusion",
        "rectified": root / "rectified",
        "both": write_lora(root / "both", 0),
        "unet": write_lora(root / "unet", 1, text=False),
        "text": write_lora(root / "text", 2, unet=False),
    }


def noise() -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def stock(made: dict[str, Path], model: str, scales: dict[str, float], steps: int) -> Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(made[model])
    if model == "diffusion":
        config = pipeline.scheduler.config
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config)
    for name in scales:
        pipeline.load_lora_weights(made[name].parent, adapter_name=name)
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT, negative_prompt=NEGATIVE, latents=noise(), num_inference_steps=steps,
        guidance_scale=5.0 if model == "diffusion" else 1.0, height=32, width=32,
        output_type="latent",
    ).images  # fmt: skip


def ours(made: dict[str, Path], model: str, scales: dict[str, float], steps: int) -> Tensor:
    loaded = load(
        made[model], lora=[f"{made[name]}@{scale}" for name, scale in scales.items()], device="cpu"
    )
    return generate_latents(
        loaded, PROMPT, noise(), negative_prompt=NEGATIVE, num_inference_steps=steps,
        guidance_scale=5.0 if model == "diffusion" else 1.0,
    ).x  # fmt: skip


@pytest.mark.parametrize(
    ("model", "steps", "scales"),
    [
        ("diffusion", 3, {"both": 1.0}),
        ("diffusion", 3, {"unet": 0.5}),
        ("rectified", 1, {"text": 1.0}),
        ("rectified", 1, {"both": 0.5, "unet": -0.75}),
    ],
)
def test_it_is_the_stock_pipeline(
    made: dict[str, Path], model: str, steps: int, scales: dict[str, float]
) -> None:
    """Many steps of a diffusion model, and one of a rectified flow."""
    theirs, found = stock(made, model, scales, steps), ours(made, model, scales, steps)
    assert (found - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (found - ours(made, model, {}, steps)).abs().max() > 1e-3


def test_a_student_of_one_step_takes_its_teachers_style(made: dict[str, Path]) -> None:
    """The same file fits both: it is added to the same layers, whatever the network predicts."""
    models = [
        load(made[name], lora=[made["both"]], device="cpu") for name in ("diffusion", "rectified")
    ]
    assert models[0].weight_hash == models[1].weight_hash
    assert [model.prediction_type for model in models] == ["epsilon", "velocity"]
    assert models[0].weight_hash != load(made["diffusion"], device="cpu").weight_hash


def test_a_peft_too_old_for_transformers(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.20 imports from peft 0.18 what is not in it, and only for text encoders."""

    def load_adapter(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'peft.utils.transformers_weight_conversion'")

    peft = "transformers.integrations.peft"
    monkeypatch.setattr(f"{peft}.PeftAdapterMixin.load_adapter", load_adapter)
    monkeypatch.setattr(f"{peft}.MIN_PEFT_VERSION", "99.1.0")
    message = (
        rf"^the LoRA {made['text']} needs peft 99.1.0 or newer beside transformers \d.*, and here "
        r"is \d.*: pip install 'peft>=99.1.0' \(.*\.\[lora\]"
    )
    with pytest.raises(InputError, match=message) as caught:
        load(made["diffusion"], lora=[str(made["text"])], device="cpu")
    assert "\n" not in str(caught.value)
    load(made["diffusion"], lora=[str(made["unet"])], device="cpu")

"""LoRA on FLUX while editing: the same velocity as diffusers, and an edit that it changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

import rectiflow as rf
from rectiflow.models import FluxModel, load
from rectiflow.models.metadata import Metadata, write_metadata
from tests.tiny_flux import tiny_flux


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a tiny FLUX, a random LoRA for its double and single blocks)."""
    root = tmp_path_factory.mktemp("flux")
    tiny_flux().save_pretrained(root / "model")
    write_metadata(Metadata(default_size=32), root / "model")
    pipeline = tiny_flux()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(
            r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False
        )
        pipeline.transformer.add_adapter(config)
    layers = get_peft_model_state_dict(pipeline.transformer)
    FluxPipeline.save_lora_weights(root / "lora", transformer_lora_layers=layers)
    return root / "model", root / "lora" / "pytorch_lora_weights.safetensors"


@torch.no_grad()
def velocity(model: FluxModel) -> torch.Tensor:
    shape = model.latent_shape(32, 48)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return model.velocity(x, 0.3, model.encode_prompt("a red apple").with_guidance(2.0))


def test_the_velocity_is_that_of_diffusers(made: tuple[Path, Path]) -> None:
    folder, lora = made
    ours = load(folder, lora=[f"{lora}@0.7"])
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(lora, adapter_name="first")
    pipeline.set_adapters(["first"], [0.7])
    stock = FluxModel(pipeline, metadata=ours.metadata)
    assert isinstance(ours, FluxModel)
    torch.testing.assert_close(velocity(ours), velocity(stock), atol=1e-6, rtol=0)
    bare = load(folder)
    assert isinstance(bare, FluxModel)
    assert (velocity(ours) - velocity(bare)).abs().max() > 1e-3


@pytest.mark.parametrize("preset", ["exact", "fast", "ftedit"])
def test_editing_with_a_lora(made: tuple[Path, Path], preset: str) -> None:
    """Controls act on projections that have LoRA layers in them, and compensation is exact."""
    folder, lora = made
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    results = []
    for loras in ([], [str(lora)]):
        model = load(folder, lora=loras)
        result = rf.edit(
            model,
            picture,
            source_prompt="a red apple",
            prompts="a green apple",
            preset=preset,
            num_inference_steps=6,
        )
        assert result.inversion.reconstruct().max_abs_latent <= 1e-4
        results.append(result.latents)
    assert (results[0] - results[1]).abs().max() > 1e-3

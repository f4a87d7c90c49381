"""Stable Diffusion 1, 2 and XL in one file, in the original layout and in diffusers'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.models import Metadata, SDModel, load, write_metadata
from tests.tiny_sd import tiny_sd, tiny_sdxl

NETWORK = "unet/diffusion_pytorch_model.safetensors"

# CompVis's names of the parts of a U-Net of two levels with one layer each.
PLACES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
IN_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original_unet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `UNet2DConditionModel` in the layout of the first releases."""
    result = {}
    for name, weight in weights.items():
        (place,) = (place for place in PLACES if name.startswith(place + "."))
        inside = name[len(place) + 1 :]
        if ".resnets." in place:
            layer, end = inside.rsplit(".", 1)
            inside = f"{IN_RESNETS[layer]}.{end}"
        result[f"model.diffusion_model.{PLACES[place]}.{inside}"] = weight
    assert len(result) == len(weights)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd") / "base"
    tiny_sd("v_prediction").save_pretrained(path)
    write_metadata(Metadata(default_guidance_scale=3.0), path)
    return path


def assert_same(model: SDModel, other: SDModel) -> None:
    x = torch.randn(1, 4, 8, 8)
    expected = other.velocity(x, 0.4, other.encode_prompt("two red apples"))
    ours = model.velocity(x, 0.4, model.encode_prompt("two red apples"))
    # Weights elsewhere in memory may go through other kernels.
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(x), other.decode(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("original", [True, False])
def test_a_network_alone(folder: Path, tmp_path: Path, original: bool) -> None:
    other = tiny_sd("v_prediction", seed=1).unet
    weights = {name: weight.contiguous() for name, weight in other.state_dict().items()}
    file = tmp_path / "network.safetensors"
    save_file(original_unet(weights) if original else weights, file)
    model, base = load(file, base=folder), load(folder)
    assert isinstance(model, SDModel) and isinstance(base, SDModel)
    assert model.metadata.default_guidance_scale == 3.0
    assert model.prediction_type == "v_prediction"
    assert model.weight_hash != base.weight_hash
    base.network.load_state_dict(weights)
    assert_same(model, base)
    with pytest.raises(InputError, match=r"base= \(--base\)"):
        load(file)


def test_network_and_text_encoder_in_the_original_layout(folder: Path, tmp_path: Path) -> None:
    other = tiny_sd("v_prediction", seed=1)
    text = {
        "text_model." + re.sub(r"^text_model\.", "", name): weight
        for name, weight in other.text_encoder.state_dict().items()
    }
    weights = original_unet(other.unet.state_dict())
    weights |= {f"cond_stage_model.transformer.{name}": weight for name, weight in text.items()}
    file = tmp_path / "whole.safetensors"
    save_file({name: weight.contiguous() for name, weight in weights.items()}, file)
    model = load(file, base=folder)
    assert isinstance(model, SDModel)
    # The codec is the base's, whose seed is another; what was drawn first has the same weights.
    other.vae = load(folder).pipeline.vae
    assert_same(model, SDModel(other))
    with pytest.raises(InputError, match=r"lacks vae|needs the configurations"):
        load(file)


def test_an_xl_network_alone(tmp_path: Path) -> None:
    tiny_sdxl().save_pretrained(tmp_path / "xl")
    other = load_file(tmp_path / "xl" / NETWORK)
    file = tmp_path / "network.safetensors"
    save_file({name: 2 * weight for name, weight in other.items()}, file)
    model = load(file, base=tmp_path / "xl")
    assert model.family == "sdxl"
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, 2 * other[name])


def test_what_only_checks_pictures_is_left_out(folder: Path, tmp_path: Path) -> None:
    """A safety checker that a folder names is neither needed nor loaded."""
    import json
    import shutil

    copy = tmp_path / "checked"
    shutil.copytree(folder, copy)
    index = json.loads((copy / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "requires_safety_checker": True,
    }
    (copy / "model_index.json").write_text(json.dumps(index))
    model = load(copy)
    assert model.pipeline.safety_checker is None
    assert model.weight_hash == load(folder).weight_hash

"""Checkpoints in one file: diffusers' own layout, the original one of SD3, and GGUF."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.models import SD3Model, load, write_metadata
from tests.models.test_load import METADATA
from tests.tiny import tiny_sd3

TELLTALES = {
    "joint_blocks.0.context_block.adaLN_modulation.1.bias": torch.zeros(9216),
    "pos_embed": torch.zeros(1, 36864, 1),
}
"""By the sizes of these diffusers tells SD3's checkpoints from others."""
NETWORK = "transformer/diffusion_pytorch_model.safetensors"
CODEC = "vae/diffusion_pytorch_model.safetensors"

# Stability's names of what stands outside the blocks, and inside them.
OUTSIDE = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
INSIDE = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
STACKED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def original_network(weights: dict[str, Tensor], layers: int = 3) -> dict[str, Tensor]:
    """Weights of an `SD3Transformer2DModel` in the layout of Stability's release."""
    left = dict(weights)
    result = {}

    def move(name: str, theirs: str, swap: bool = False) -> None:
        for end in ("", ".weight", ".bias"):
            if name + end in left:
                weight = left.pop(name + end)
                # They put the shift before the scale.
                result[theirs + end] = weight.roll(len(weight) // 2, 0) if swap else weight

    for name, theirs in OUTSIDE.items():
        move(name, theirs, swap=name == "norm_out.linear")
    for i in range(layers):
        for theirs, names in STACKED.items():
            for end in ("weight", "bias"):
                parts = [left.pop(f"transformer_blocks.{i}.{name}.{end}") for name in names]
                result[f"joint_blocks.{i}.{theirs}.{end}"] = torch.cat(parts)
        for name, theirs in INSIDE.items():
            last = name == "norm1_context.linear" and i == layers - 1
            move(f"transformer_blocks.{i}.{name}", f"joint_blocks.{i}.{theirs}", swap=last)
    move("context_embedder", "context_embedder")
    assert not left
    return {name: weight.contiguous() for name, weight in result.items()}


def original_codec(weights: dict[str, Tensor], blocks: int = 3) -> dict[str, Tensor]:
    """Weights of an `AutoencoderKL` in the layout of the latent diffusion codebase."""
    result = {}
    for name, weight in weights.items():
        theirs = re.sub(
            r"up_blocks\.(\d)", lambda found: f"up_blocks.{blocks - 1 - int(found[1])}", name
        )
        for pattern, replacement in (
            (r"(down|up)_blocks\.(\d)\.resnets\.(\d)", r"\1.\2.block.\3"),
            (r"(down|up)_blocks\.(\d)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
            (r"mid_block\.resnets\.0", "mid.block_1"),
            (r"mid_block\.resnets\.1", "mid.block_2"),
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
        ):
            theirs = re.sub(pattern, replacement, theirs)
        result[theirs] = weight
    return result


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What gives the rest; its own network and codec are others than those of the files."""
    folder = tmp_path_factory.mktemp("single") / "base"
    tiny_sd3(t5=True, seed=1).save_pretrained(folder)
    write_metadata(METADATA, folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_sd3(t5=True).save_pretrained(folder)
    write_metadata(METADATA, folder)
    return folder


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("original", [False, True])
def test_a_network_alone(source: Path, base: Path, tmp_path: Path, original: bool) -> None:
    file = tmp_path / "network.safetensors"
    weights = load_file(source / NETWORK)
    save_file(original_network(weights) if original else weights, file, {"format": "pt"})
    model, expected, rest = load(file, base=base), load(source), load(base)
    assert isinstance(model, SD3Model) and model.name == str(file) and model.metadata == METADATA
    assert same(model.network, expected.network)
    assert not same(model.network, rest.network)
    for part in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        assert same(getattr(model.pipeline, part), getattr(rest.pipeline, part))
    assert not any(module.training for module in model.modules.values())
    half = load(file, base=base, dtype=torch.bfloat16)
    assert half.dtype == half.pipeline.text_encoder.dtype == torch.bfloat16
    assert half.pipeline.vae.dtype == torch.float32


def test_the_base_may_be_an_embedded_model(tmp_path: Path) -> None:
    pipeline = load("emoji-sd3").pipeline
    pipeline.transformer.proj_out.bias.data += 1
    save_file(pipeline.transformer.state_dict(), tmp_path / "n.safetensors", {"format": "pt"})
    model = load(tmp_path / "n.safetensors", base="emoji-sd3")
    assert same(model.network, pipeline.transformer)


def test_network_and_codec_in_one_file(source: Path, base: Path, tmp_path: Path) -> None:
    """The layout of Stability's `sd3_medium.safetensors`."""
    file = tmp_path / "sd3.safetensors"
    network, codec = load_file(source / NETWORK), load_file(source / CODEC)
    weights = {f"model.diffusion_model.{k}": v for k, v in original_network(network).items()}
    weights |= {f"first_stage_model.{k}": v for k, v in original_codec(codec).items()}
    save_file(weights, file, {"format": "pt"})
    model, expected, rest = load(file, base=base, dtype=torch.bfloat16), load(source), load(base)
    assert same(model.network, expected.network.to(torch.bfloat16))
    assert same(model.pipeline.vae, expected.pipeline.vae)  # not rounded on its way
    assert model.pipeline.vae.dtype == torch.float32
    assert same(model.pipeline.text_encoder_3, rest.pipeline.text_encoder_3.to(torch.bfloat16))
    with pytest.raises(InputError, match=r"a kind diffusers cannot tell: .* by base= \(--base\)$"):
        load(file)
    telltales = {f"model.diffusion_model.{name}": weight for name, weight in TELLTALES.items()}
    save_file(weights | telltales, file, {"format": "pt"})
    with pytest.raises(InputError, match=r"stable-diffusion-3.*or of another folder by base="):
        load(file)  # the configurations are on the hub


def test_a_text_encoder_in_the_file(source: Path, base: Path, tmp_path: Path) -> None:
    """As in ComfyUI's checkpoints: here network, codec and T5."""
    file = tmp_path / "all.safetensors"
    weights = {f"model.diffusion_model.{k}": v
               for k, v in original_network(load_file(source / NETWORK)).items()}  # fmt: skip
    weights |= {f"first_stage_model.{k}": v
                for k, v in original_codec(load_file(source / CODEC)).items()}  # fmt: skip
    encoder = load(source).pipeline.text_encoder_3
    weights |= {f"text_encoders.t5xxl.transformer.{k}": v.clone()
                for k, v in encoder.state_dict().items()}  # fmt: skip
    save_file(weights, file, {"format": "pt"})
    model, rest = load(file, base=base), load(base)
    assert same(model.pipeline.text_encoder_3, encoder)
    assert same(model.pipeline.text_encoder, rest.pipeline.text_encoder)
    assert same(model.network, load(source).network)
    assert model.encode_prompt("a red apple").embeds.isfinite().all()


def spoil(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "incomplete":
        del weights["proj_out.weight"]
    elif how == "broken":
        weights["proj_out.weight"][0, 0] = torch.nan
    elif how == "larger":
        weights["proj_out.weight"] = torch.ones(3, 3)
    return weights


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("incomplete", "weights are missing, or have names that diffusers does not know"),
        ("broken", "transformer.proj_out.weight is not finite"),
        ("larger", "cannot be loaded as a StableDiffusion3Pipeline with the rest from .*proj_out"),
    ],
)
def test_damaged_weights(source: Path, base: Path, tmp_path: Path, how: str, message: str) -> None:
    file = tmp_path / "network.safetensors"
    save_file(spoil(load_file(source / NETWORK), how), file, {"format": "pt"})
    with pytest.raises(InputError, match=message) as caught:
        load(file, base=base)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(source: Path, base: Path, tmp_path: Path) -> None:
    def refuses(message: str, *arguments: Any, **keywords: Any) -> None:
        with pytest.raises(InputError, match=message) as caught:
            load(*arguments, **keywords)
        assert "\n" not in str(caught.value)

    network = tmp_path / "network.safetensors"
    weights = original_network(load_file(source / NETWORK))
    save_file(weights | TELLTALES, network)
    refuses(r"no more than a network .* by base= \(--base\), such as stabilityai/stab", network)
    plain = tmp_path / "plain.safetensors"
    save_file({"a.weight": torch.ones(2)}, plain)
    refuses(r"no more than a network in it: .* by base= \(--base\)$", plain)
    refuses("cannot be loaded as a StableDiffusion3Pipeline", plain, base=base)
    refuses("there is no folder ./none", network, base="./none")
    refuses("is a file and no complete pipeline", network, base=network)
    refuses("base is for checkpoints in one file", source, base=base)
    for name in ("model.ckpt", "model.bin", "model.pt"):
        (tmp_path / name).write_bytes(b"")
        refuses(f"{name} is a file of a kind that is not loaded", tmp_path / name, base=base)
    (tmp_path / "cut.safetensors").write_bytes(network.read_bytes()[:50])
    refuses("cut.safetensors is not a safetensors file", tmp_path / "cut.safetensors", base=base)


def test_gguf_without_its_package(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r'pip install "\.\[gguf\]"'):
        load(tmp_path / "model.gguf", base=base)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the package gguf")
def test_a_quantised_network(source: Path, base: Path, tmp_path: Path) -> None:
    """GGUF, 8 bits: near the full network, finite, with a hash, and editable."""
    import gguf

    file = tmp_path / "network.gguf"
    writer = gguf.GGUFWriter(str(file), "sd3")
    for name, weight in original_network(load_file(source / NETWORK)).items():
        values, kind = weight.numpy(), None
        if weight.ndim == 2 and weight.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"by base= \(--base\)"):
        load(file)
    model, full = load(file, base=base), load(base)
    full.pipeline.transformer = load(source).network
    assert model.dtype == torch.float32 and model.weight_hash != full.weight_hash
    assert model.network.context_embedder.weight.dtype == torch.uint8
    x = torch.randn(1, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m.velocity(x, 0.5, m.encode_prompt("a dog")) for m in (model, full))
    assert 0 < (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_a_folder_saved_quantised(source: Path, tmp_path: Path) -> None:
    """Eight-bit weights that only look like tensors of numbers: finite, hashed, computed with."""
    from diffusers import SD3Transformer2DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    pipeline = tiny_sd3(t5=True)
    pipeline.transformer = SD3Transformer2DModel.from_pretrained(
        source,
        subfolder="transformer",
        dtype=torch.float32,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
    )
    pipeline.save_pretrained(tmp_path)
    write_metadata(METADATA, tmp_path)
    model, full = load(tmp_path), load(source)
    assert len({model.weight_hash, load(tmp_path).weight_hash, full.weight_hash}) == 2
    x = torch.randn(1, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (m.velocity(x, 0.5, m.encode_prompt("a dog")) for m in (model, full))
    assert 0 < (ours - theirs).abs().max() < 0.05 * theirs.abs().max()

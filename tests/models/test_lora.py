"""LoRA: the same as diffusers with the same file, seen by hooks, and part of what a model is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from rectiflow.errors import InputError
from rectiflow.models import SD3Model, load, write_metadata
from rectiflow.models.lora import Lora
from tests.models.test_load import METADATA
from tests.tiny import tiny_sd3


def write_lora(folder: Path, seed: int, **sizes: Any) -> Path:
    """A random LoRA of rank 2 for the tiny SD3, its second matrices not zero as at birth."""
    pipeline = tiny_sd3(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        targets = ["to_q", "to_v", "add_v_proj", "to_out.0"]
        pipeline.transformer.add_adapter(
            LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
        )
    layers = get_peft_model_state_dict(pipeline.transformer)
    StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora")
    tiny_sd3(t5=True).save_pretrained(root / "model")
    write_metadata(METADATA, root / "model")
    files = {name: write_lora(root / name, seed) for seed, name in enumerate(("first", "second"))}
    return {"model": root / "model", **files}


def velocity(model: SD3Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *model.latent_shape(32, 24), generator=generator)
    with torch.no_grad():
        return model.velocity(x, 0.3, model.encode_prompt(["a red apple", "a dog"]))


def stock(made: dict[str, Path], scales: dict[str, float]) -> SD3Model:
    """The same LoRAs in diffusers' own pipeline."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(made["model"])
    for name in scales:
        pipeline.load_lora_weights(made[name], adapter_name=name)
    pipeline.set_adapters(list(scales), list(scales.values()))
    return SD3Model(pipeline, metadata=METADATA)


@pytest.mark.parametrize(
    ("lora", "scales"),
    [
        (["first"], {"first": 1.0}),
        (["first@0.5"], {"first": 0.5}),
        (["first@0.5", "second@-1.25"], {"first": 0.5, "second": -1.25}),
    ],
)
def test_the_velocity_is_that_of_diffusers(
    made: dict[str, Path], lora: list[str], scales: dict[str, float]
) -> None:
    model = load(made["model"], lora=[text.replace(n := text.partition("@")[0], str(made[n]))
                                      for text in lora])  # fmt: skip
    ours = velocity(model)
    # Weights elsewhere in memory may go through other kernels.
    torch.testing.assert_close(ours, velocity(stock(made, scales)), rtol=1e-4, atol=1e-5)
    assert (ours - velocity(load(made["model"]))).abs().max() > 1e-3
    assert not any(module.training for module in model.modules.values())


def test_a_folder_is_as_good_as_its_file(made: dict[str, Path]) -> None:
    by_file = load(made["model"], lora=[made["first"]])
    by_folder = load(made["model"], lora=[made["first"].parent])
    assert by_file.weight_hash == by_folder.weight_hash


def test_the_hash_is_of_weights_and_scales(made: dict[str, Path]) -> None:
    first = str(made["first"])
    ways: list[list[str | Path]] = [
        [], [first], [f"{first}@0.5"], [f"{first}@0"], [made["second"]], [first, made["second"]],
    ]  # fmt: skip
    hashes = [load(made["model"], lora=way).weight_hash for way in ways]
    assert len(set(hashes)) == len(ways)
    assert load(made["model"], lora=[f"{first}@1.0"]).weight_hash == hashes[1]


def test_hooks_on_projections_see_the_lora(made: dict[str, Path]) -> None:
    """W x + b + scale B A x, whichever of the layers a control reads."""
    model, plain = load(made["model"], lora=[f"{made['first']}@0.5"]), load(made["model"])
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    layers, own = (
        [attention.to_v, attention.add_v_proj]
        for attention in (m.network.transformer_blocks[0].attn for m in (model, plain))
    )
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    velocity(model)
    assert len(seen) == 2
    for (x, out), module, layer in zip(seen, own, layers, strict=True):
        a, b = layer.lora_A["lora_0"].weight, layer.lora_B["lora_0"].weight
        expected = module(x) + 0.5 * x @ a.T @ b.T
        assert torch.allclose(out, expected, atol=1e-6)
        assert (out - module(x)).abs().max() > 1e-4


def test_editing_with_a_lora(made: dict[str, Path]) -> None:
    """Controls on every step, and the source comes back under the changed field."""
    from rectiflow import edit

    model = load(made["model"], lora=[made["first"]], device="cpu")
    settings = {"num_inference_steps": 3, "attention_ratio": 1.0, "adaln_ratio": 1.0}
    result = edit(model, seed=1, source_prompt="a red apple", prompts="a green apple", **settings)
    assert result.inversion.reconstruct().max_abs_latent < 1e-4
    other = edit(
        load(made["model"]), seed=1, source_prompt="a red apple", prompts="a green apple",
        **settings,
    )  # fmt: skip
    assert result.images != other.images


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("./none.safetensors", "there is no LoRA ./none.safetensors"),
        ("none.safetensors", "there is no LoRA none.safetensors"),
        ("nobody/nothing", "nobody/nothing cannot be loaded into .*tiny"),
        ("@0.5", "write FILE_OR_ID or FILE_OR_ID@SCALE"),
        ("a.safetensors@nan", "write FILE_OR_ID"),
        ("{root}/weights.bin", "no .safetensors file"),
        ("{root}/cut.safetensors", "cut.safetensors cannot be loaded into"),
        ("{root}/other.safetensors", "other.safetensors is not for .*no layer of it fits"),
        ("{root}/network.safetensors", "network.safetensors cannot be loaded into .*LoRA"),
        ("{root}/wide.safetensors", "wide.safetensors cannot be loaded into .*"),
        ("{root}", "has no pytorch_lora_weights.safetensors: name the file .cut.safetensors, "),
    ],
)
def test_wrong_loras_are_one_line(
    made: dict[str, Path], tmp_path: Path, lora: str, message: str
) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(made["first"].read_bytes()[:99])
    layers = {f"unet.mid.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(layers, tmp_path / "other.safetensors")
    save_file({"proj_out.weight": torch.ones(2, 2)}, tmp_path / "network.safetensors")
    layer = "transformer.transformer_blocks.0.attn.to_q.lora"
    wide = {f"{layer}_A.weight": torch.ones(2, 99), f"{layer}_B.weight": torch.ones(99, 2)}
    save_file(wide, tmp_path / "wide.safetensors")
    model = made["model"].rename(made["model"].with_name("tiny"))
    try:
        with pytest.raises(InputError, match=message) as caught:
            load(model, lora=[lora.format(root=tmp_path)])
    finally:
        model.rename(made["model"])
    assert "\n" not in str(caught.value)


def test_without_peft(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name == "peft" else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(InputError, match=r'pip install "\.\[lora\]"'):
        load(made["model"], lora=[made["first"]])
    assert load(made["model"]).name == str(made["model"])


def test_a_peft_too_old_for_diffusers(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.constants.MIN_PEFT_VERSION", "99.1.0")
    message = r"a LoRA needs peft 99.1.0 or newer beside diffusers .*pip install"
    with pytest.raises(InputError, match=message):
        load(made["model"], lora=[made["first"]])


def test_names_with_an_at_sign() -> None:
    assert Lora.parse("style@v2.safetensors") == Lora("style@v2.safetensors", 1.0)
    assert Lora.parse("style@v2.safetensors@0.5") == Lora("style@v2.safetensors", 0.5)

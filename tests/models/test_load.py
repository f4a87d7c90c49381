"""From names and folders to models, and one line for everything that can be wrong with them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file

from rectiflow.errors import InputError
from rectiflow.models import (
    Metadata,
    SD3Model,
    embedded_models,
    generate,
    load,
    read_metadata,
    write_metadata,
)
from tests.tiny import T5_LENGTH, tiny_model, tiny_sd3

NETWORK = "transformer/diffusion_pytorch_model.safetensors"
ENCODER = "text_encoder/model.safetensors"
METADATA = Metadata(
    family="sd3",
    max_sequence_length=T5_LENGTH,
    default_guidance_scale=2.0,
    default_num_inference_steps=3,
    default_size=32,
    licence="Apache-2.0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd3(t5=True).save_pretrained(folder)
    write_metadata(METADATA, folder)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, {"format": "pt"})


def test_saved_and_loaded_is_the_same_model(folder: Path) -> None:
    model = load(folder)
    assert isinstance(model, SD3Model)
    assert (model.name, model.family) == (str(folder), "sd3")
    assert model.metadata == METADATA == read_metadata(folder / "rectiflow.json")
    assert model.dtype == torch.float32
    assert not any(module.training for module in model.modules.values())
    original = tiny_model(t5=True)
    assert load(folder, device="cpu").weight_hash == original.weight_hash
    assert model.default_num_inference_steps == 3
    ours = generate(load(str(folder), device="cpu"), "two red apples")
    assert ours == generate(original, "two red apples", num_inference_steps=3, guidance_scale=2.0)


def test_the_folder_is_a_stock_one(folder: Path) -> None:
    stock = StableDiffusion3Pipeline.from_pretrained(folder)
    assert SD3Model(stock).weight_hash == load(folder, device="cpu").weight_hash


def test_loading_leaves_the_libraries_as_talkative_as_before(folder: Path) -> None:
    before = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    load(folder)
    assert before == (
        diffusers_logging.get_verbosity(),
        diffusers_logging.is_progress_bar_enabled(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_files_are_loaded_into_the_dtype_asked_for(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    pipeline = tiny_sd3(t5=True)
    weight = pipeline.transformer.proj_out.weight.clone()
    pipeline.to(torch.float16).save_pretrained(tmp_path)
    model = load(tmp_path, dtype=dtype, device="cpu")
    assert model.dtype == model.pipeline.text_encoder.dtype == dtype
    assert model.pipeline.vae.dtype == torch.float32
    assert torch.equal(model.network.proj_out.weight, weight.half().to(dtype))


def test_embedded_models_go_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "emoji-tiny")
    (tmp_path / "emoji-clip").mkdir()  # no pipeline
    # `rectiflow.models.load` is the function; the module of that name is reached like this.
    monkeypatch.setattr(sys.modules[load.__module__], "WEIGHTS", tmp_path)
    assert embedded_models() == ["emoji-tiny"]
    assert load("emoji-tiny").name == "emoji-tiny"
    with pytest.raises(InputError, match=r"unknown model 'emoji-big': .*\(emoji-tiny\), a diff"):
        load("emoji-big")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "no folder 'nobody/nothing', the hub cannot be reached, and its cache"),
        ("./nothing", "there is no folder ./nothing"),
        ("/no/where", "there is no folder /no/where"),
        ("emoji-nothing", "unknown model 'emoji-nothing'"),
    ],
)
def test_names_of_nothing(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "model_index.json").unlink(), "no diffusers pipeline: it has no model_ind"),
        (lambda d: (d / "model_index.json").write_text("{"), "model_index.json is not JSON"),
        (
            lambda d: (d / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}'),
            "is a KolorsPipeline, which is not supported: use a StableDiffusion3Pipeline",
        ),
        (lambda d: shutil.rmtree(d / "vae"), "incomplete: the folder vae is missing"),
        (lambda d: shutil.rmtree(d / "tokenizer"), "incomplete: the folder tokenizer is missing"),
        (lambda d: (d / NETWORK).unlink(), "cannot be loaded: .*transformer"),
        (lambda d: (d / ENCODER).unlink(), "cannot be loaded: .*model.safetensors"),
        (lambda d: (d / NETWORK).write_text("version https://git-lfs"), "git lfs pull"),
        (lambda d: (d / ENCODER).write_text("version https://git-lfs"), "git lfs pull"),
        (
            lambda d: change(d / NETWORK, lambda w: w.pop("proj_out.weight")),
            "incomplete .transformer.proj_out.weight is missing",
        ),
        (
            lambda d: change(d / ENCODER, lambda w: w.pop(sorted(w)[0])),
            "incomplete .text_encoder.* is missing",
        ),
        (
            lambda d: change(d / NETWORK, lambda w: w.update({"proj_out.weight": torch.ones(3)})),
            "cannot be loaded: .*proj_out.weight",
        ),
        (
            lambda d: change(d / NETWORK, lambda w: w["proj_out.weight"][0, :1].fill_(torch.nan)),
            "broken .transformer.proj_out.weight is not finite",
        ),
        (
            lambda d: change(d / ENCODER, lambda w: w[sorted(w)[-1]].fill_(torch.inf)),
            "broken .text_encoder.* is not finite",
        ),
        (lambda d: (d / "rectiflow.json").write_text("{"), "rectiflow.json is not JSON"),
        (
            lambda d: (d / "rectiflow.json").write_text(json.dumps({"max_sequence_length": 0})),
            "rectiflow.json: max_sequence_length",
        ),
    ],
)
def test_damaged_folders_get_one_line(
    copy: Path,
    damage: Callable[[Path], object],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(copy)
    with pytest.raises(InputError, match=message) as caught:
        load(copy)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # the line is all there is to read


def test_pickled_weights_are_not_loaded(copy: Path) -> None:
    torch.save(load_file(copy / NETWORK), (copy / NETWORK).with_suffix(".bin"))
    (copy / NETWORK).unlink()
    with pytest.raises(InputError, match="with safetensors weights"):
        load(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "nonsense"}, "device 'nonsense' is not available"),
        ({"device": "cpu", "offload": "model"}, "needs an accelerator"),
        ({"device": "cpu", "offload": "sequential"}, "needs an accelerator"),
        ({"offload": "disk"}, "unknown offload 'disk'"),
    ],
)
def test_arguments_that_do_not_fit(folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(folder, **arguments)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_offloading_changes_where_not_what(folder: Path, offload: Any) -> None:
    reference = load(folder)
    model = load(folder, offload=offload)
    assert model.device.type == reference.device.type != "cpu"
    assert model.weight_hash == reference.weight_hash
    assert generate(model, "cat") == generate(reference, "cat")


def test_a_folder_saved_without_a_t5_loads_without_one(tmp_path: Path) -> None:
    tiny_sd3(t5=False).save_pretrained(tmp_path)
    model = load(str(tmp_path))
    assert model.pipeline.text_encoder_3 is None
    assert model.encode_prompt("a red apple").embeds.isfinite().all()

"""One file of hashes for a folder: embedded, exported, and told from folders from elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from rectiflow.checksums import CHECKSUMS, verify, write_checksums
from rectiflow.errors import InputError
from rectiflow.models.load import WEIGHTS, load
from rectiflow.straighten.export import save_pipeline
from tests.tiny import tiny_model

EMBEDDED = sorted(path for path in WEIGHTS.iterdir() if path.is_dir() and path.name[0] != "_")


@pytest.mark.parametrize("folder", EMBEDDED, ids=lambda path: path.name)
def test_the_hashes_of_embedded_models_are_current(folder: Path, tmp_path: Path) -> None:
    """To write them: python -c "from rectiflow.checksums import *; write_checksums(...)"."""
    assert verify(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    write_checksums(copy)
    assert (copy / CHECKSUMS).read_bytes() == (folder / CHECKSUMS).read_bytes()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    save_pipeline(tiny_model(max_sequence_length=2), folder, dtype=torch.float32)
    return folder


def flip(name: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)

    return change


WEIGHT = "transformer/diffusion_pytorch_model.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (flip(WEIGHT), f"{WEIGHT} is not what was written"),
    "codec": (flip("vae/diffusion_pytorch_model.safetensors"), "is not what was written"),
    "settings": (flip("scheduler/scheduler_config.json"), "is not what was written"),
    "rectiflow.json": (lambda f: (f / "rectiflow.json").unlink(), "rectiflow.json is missing"),
    "senseless": (
        lambda f: (f / "rectiflow.json").write_text("{}"),
        "rectiflow.json is not what was written",
    ),
    "a tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "is missing"),
    "one more": (
        lambda f: (f / "vae/model.safetensors.index.json").write_text("{}"),
        "is not one of the files that checksums.json lists",
    ),
    "not UTF-8": (lambda f: (f / CHECKSUMS).write_bytes(b"\xff"), "is not text in UTF-8"),
    "nested": (lambda f: (f / CHECKSUMS).write_text("[" * 9999), "is nested more than 64 deep"),
    "true": (lambda f: (f / CHECKSUMS).write_text("true"), "holds a bool"),
    "a number": (lambda f: (f / CHECKSUMS).write_text('{"a": 1}'), "is not a list of hashes"),
    "outside": (
        lambda f: (f / CHECKSUMS).write_text(json.dumps({"../../a": "0"})),
        "is not a list of hashes",
    ),
    "a device": (
        lambda f: (f / CHECKSUMS).write_text(json.dumps({"/dev/zero": "0"})),
        "is not a list of hashes",
    ),
    "nothing": (lambda f: (f / CHECKSUMS).write_text("{}"), "is not one of the files that"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(exported: Path, tmp_path: Path, what: str) -> None:
    folder = shutil.copytree(exported, tmp_path / "model")
    change, words = DAMAGE[what]
    change(folder)
    with pytest.raises(InputError) as caught:
        load(folder)
    line = str(caught.value)
    assert words in line and line.startswith(str(folder)) and len(line.splitlines()) == 1
    assert "again" in line  # the remedy


def test_what_is_verified_says_so(exported: Path, tmp_path: Path) -> None:
    assert load(exported).verified
    without = {"text_encoder_3": None, "tokenizer_3": None}
    DiffusionPipeline.from_pretrained(exported, **without)  # which passes over the hashes
    folder = shutil.copytree(exported, tmp_path / "model")
    (folder / "README.md").write_text("a card may be edited")
    (folder / "lora.safetensors").write_text("and things put beside")
    assert load(folder).verified
    (folder / CHECKSUMS).unlink()  # as any folder from elsewhere
    (folder / "lora.safetensors").unlink()
    assert not load(folder).verified

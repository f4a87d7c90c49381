"""What is written into every picture, so that it can be looked up and made again."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from rectiflow._version import __version__

if TYPE_CHECKING:
    from rectiflow.models.base import FlowModel


def of_model(model: FlowModel) -> dict[str, Any]:
    """Which network, with which weights, on what; files and folders by their whole path."""
    parts = model.loaded_with
    if "base" in parts:
        parts = parts | {"base": name_from_anywhere(parts["base"])}
    if "lora" in parts:
        from rectiflow.models.lora import Lora

        loras = [Lora.parse(text) for text in parts["lora"]]
        named = [f"{name_from_anywhere(one.source)}@{one.scale!r}" for one in loras]
        parts = parts | {"lora": named}
    return parts | {
        "model": name_from_anywhere(model.name),
        "weight_hash": model.weight_hash,
        "field_hash": model.field_hash,
        "verified": model.verified,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }


def name_from_anywhere(name: str) -> str:
    """A name; of a file or folder the whole path, so that it is found from any other folder."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def environment(model: FlowModel) -> dict[str, str]:
    """The software and the machine."""
    import diffusers
    import torch
    import transformers

    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "rectiflow": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "weight_hash": model.weight_hash,
        "weight_files": "verified" if model.verified else "unverified: they have no checksums",
    }


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 over the size and the RGB pixels of a picture, whatever file they are in."""
    rgb = image.convert("RGB")
    digest = hashlib.sha256(f"{rgb.width}x{rgb.height}\n".encode())
    digest.update(rgb.tobytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

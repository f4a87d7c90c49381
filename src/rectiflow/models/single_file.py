"""Checkpoints in one file: a whole pipeline, or the network alone with its parts from elsewhere.

diffusers' own loaders read them, so the layouts they know are known here: its own, the original
ones of Stable Diffusion, SD3 and FLUX (which ComfyUI uses too), and GGUF. What the file has comes
from the file, and all else from the *base*, a complete pipeline in a folder or on the hub.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rectiflow.errors import InputError, install
from rectiflow.guarded import opened_tensors
from rectiflow.models.folder import Folder
from rectiflow.models.hub import first_sentence

SUFFIXES = (".safetensors", ".gguf")
UNET = "model.diffusion_model.input_blocks.0.0.weight"
"""The first weight of Stable Diffusion 1, 2 and XL in their original layout."""
CODEC = ("vae.", "first_stage_model.")
ENCODERS = {
    "clip_l": "text_encoders.clip_l.",
    "clip_g": "text_encoders.clip_g.",
    "t5xxl": "text_encoders.t5xxl.",
    "sd": "cond_stage_model.",
    "sdxl_1": "conditioner.embedders.0.",
    "sdxl_2": "conditioner.embedders.1.",
}
"""Where the original layouts keep text encoders: name for them -> prefix of their weights."""
OLDER = {
    "StableDiffusionPipeline": {"text_encoder": "sd"},
    "StableDiffusionXLPipeline": {"text_encoder": "sdxl_1", "text_encoder_2": "sdxl_2"},
    "StableDiffusionXLImg2ImgPipeline": {"text_encoder_2": "sdxl_1"},
}
"""Which of them the parts of pipelines with a U-Net are."""


class Shape(NamedTuple):
    """What diffusers looks at in a weight to tell checkpoints apart."""

    shape: tuple[int, ...]


def check_suffix(file: Path) -> None:
    """Refuse what is neither safetensors nor GGUF.

    Raises:
        InputError: It is of another kind.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{file} is a file of a kind that is not loaded: give a .safetensors or .gguf file "
            "(a .ckpt, .pt or .bin may run code), or a diffusers folder (save_pretrained)"
        )


def open_single_file(
    file: Path, base: Folder | None, families: Collection[str], dtype: torch.dtype
) -> tuple[Any, Folder]:
    """The pipeline of a checkpoint in one file.

    Args:
        file: `.safetensors` or `.gguf`.
        base: What has the rest. None is enough for a file that has all parts; their
            configurations then come from the repository that diffusers knows for its kind.
        families: The pipelines that are understood.
        dtype: Of network and text encoders; the codec is in float32.

    Returns:
        The pipeline, and the base.

    Raises:
        InputError: The file cannot be read, or something is missing; the line says what.
    """
    gguf = file.suffix.lower() == ".gguf"
    if gguf and importlib.util.find_spec("gguf") is None:
        raise InputError(f"{file} needs the package gguf: {install('gguf')}")
    weights = {} if gguf else _header(file)
    has_codec = any(name.startswith(CODEC) for name in weights)
    encoders = {
        key for key, prefix in ENCODERS.items() if any(name.startswith(prefix) for name in weights)
    }
    if base is None:
        base = _known_base(file, weights, families, alone=not has_codec and not encoders)
        _check_whole(file, base, has_codec, encoders)
    try:
        return _open(file, base, dtype, gguf, has_codec, encoders), base
    except InputError:
        raise
    # diffusers has an exception of its own here that derives from Exception alone.
    except Exception as error:
        why = first_sentence(error)
        if isinstance(error, LookupError):  # from inside the conversion of names
            why = "weights are missing, or have names that diffusers does not know"
        raise InputError(
            f"{file} cannot be loaded as a {base.class_name} with the rest from {base.name}: {why}"
        ) from error


def _open(
    file: Path, base: Folder, dtype: torch.dtype, gguf: bool, has_codec: bool, encoders: set[str]
) -> Any:
    import diffusers

    options: dict[str, Any] = {"config": str(base.source), "local_files_only": base.local}
    if base.revision is not None:
        options["revision"] = base.revision
    quantised: dict[str, Any] = {}
    if gguf:
        quantised["quantization_config"] = diffusers.GGUFQuantizationConfig(compute_dtype=dtype)
    part = "unet" if "unet" in base.parts else "transformer"
    network = getattr(diffusers, base.parts[part][1])
    given = {
        part: network.from_single_file(
            str(file), subfolder=part, dtype=dtype, **options, **quantised
        )
    }
    if has_codec:
        codec = getattr(diffusers, base.parts["vae"][1])
        given["vae"] = codec.from_single_file(
            str(file), subfolder="vae", dtype=torch.float32, **options
        )
    if not encoders:
        return base.pipeline(dtype, **given)
    inside = [part for part, key in _encoders(base).items() if key in encoders]
    given |= base.text_encoders(dtype, without=inside)
    if not has_codec:
        codec = getattr(diffusers, base.parts["vae"][1])
        given["vae"] = codec.from_pretrained(
            str(base.source),
            subfolder="vae",
            dtype=torch.float32,
            local_files_only=base.local,
            **base.place_of("vae"),
        )
    kind = getattr(diffusers, base.class_name)
    left_out = base.left_out | base.unused
    return kind.from_single_file(str(file), dtype=dtype, **options, **left_out, **given)


def _header(file: Path) -> dict[str, Shape]:
    """Names and shapes of the weights in a safetensors file, without reading them."""
    with opened_tensors(file) as opened:
        return {name: Shape(tuple(opened.get_slice(name).get_shape())) for name in opened.keys()}


def _encoders(base: Folder) -> dict[str, str]:
    """The text encoders of a base, and what original layouts call them."""
    if base.class_name in OLDER:
        return {part: key for part, key in OLDER[base.class_name].items() if part in base.parts}
    names = {}
    for part, (_, kind) in base.parts.items():
        if part.startswith("text_encoder"):
            clip = "clip_l" if part == "text_encoder" else "clip_g"
            names[part] = clip if kind.startswith("CLIP") else "t5xxl"
    return names


def _known_base(
    file: Path, weights: dict[str, Shape], families: Collection[str], alone: bool
) -> Folder:
    """The repository whose configurations diffusers uses for such a file."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    known: str = ""
    # Shapes it has not seen, of a pruned network say, end in errors of these kinds there.
    with suppress(LookupError, NameError, ValueError):
        known = fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
    # Where it recognises nothing, diffusers takes a file for Stable Diffusion 1.5.
    recognised = known != "" and ("stable-diffusion-v1-5" not in known or UNET in weights)
    if alone or not recognised:
        what = "has no more than a network in it" if alone else "is of a kind diffusers cannot tell"
        such = f", such as {known}" if recognised else ""
        raise InputError(
            f"{file} {what}: give the folder or hub id that has the rest by base= (--base){such}"
        )
    try:
        return Folder(known, known, families)
    except InputError as error:
        raise InputError(
            f"{file} needs the configurations of {known}, or of another folder by base= (--base): "
            f"{error}"
        ) from error


def _check_whole(file: Path, base: Folder, has_codec: bool, encoders: set[str]) -> None:
    """Refuse to fetch gigabytes that nobody asked for."""
    missing = [] if has_codec else ["vae"]
    missing += [part for part, key in _encoders(base).items() if key not in encoders]
    if missing:
        raise InputError(
            f"{file} lacks {', '.join(missing)}: give a folder or hub id that has the rest by "
            f"base= (--base), such as {base.name}"
        )

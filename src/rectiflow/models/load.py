"""From a name, a folder or a hub id to a model, with one clear line when there is none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

from rectiflow.arguments import checked
from rectiflow.errors import InputError, WorkError
from rectiflow.models.base import FlowModel
from rectiflow.models.flux import FluxModel
from rectiflow.models.folder import INDEX, REFINER, Folder
from rectiflow.models.instaflow import (
    PIPELINE,
    InstaFlowModel,
    official_metadata,
    to_diffusers_sign,
)
from rectiflow.models.libraries import quiet_libraries
from rectiflow.models.lora import add_loras
from rectiflow.models.memory import Offload, explanation
from rectiflow.models.qwen_image import QwenImageModel
from rectiflow.models.sd import SDModel
from rectiflow.models.sd3 import SD3Model
from rectiflow.models.sdxl import SDXLModel
from rectiflow.models.single_file import SUFFIXES, check_suffix, open_single_file
from rectiflow.models.weights import check_finite, stored_dtype
from rectiflow.progress import announced

FAMILIES: dict[str, type[FlowModel]] = {
    "StableDiffusion3Pipeline": SD3Model,
    "FluxPipeline": FluxModel,
    "QwenImagePipeline": QwenImageModel,
    "StableDiffusionPipeline": SDModel,
    "StableDiffusionXLPipeline": SDXLModel,
    REFINER: SDXLModel,
    PIPELINE: InstaFlowModel,
}
"""The diffusers pipelines that are understood, and what understands them."""

WEIGHTS = Path(__file__).parents[1] / "weights"


def embedded_models() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(index.parent.name for index in WEIGHTS.glob(f"*/{INDEX}"))


@checked
def load(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    offload: Offload | None = None,
    variant: str | None = None,
    revision: str | None = None,
    base: str | Path | None = None,
    lora: Sequence[str | Path] = (),
    convention: Literal["instaflow"] | None = None,
) -> FlowModel:
    """Load a model, whichever family it is of.

    Args:
        name_or_folder: The name of an embedded model, a folder that a diffusers pipeline was saved
            to, the id of one on the hub (`"stabilityai/stable-diffusion-3.5-medium"`), or a
            checkpoint in one `.safetensors` or `.gguf` file.
        dtype: What network and text encoders compute in; if None, on an accelerator what the
            network is stored in (bfloat16 if that is 8 bits or fewer), on the CPU float32. The
            codec always computes in float32, which costs little and keeps rounding out of the
            reconstruction.
        device: Where; if None, the accelerator there is, else the CPU.
        offload: Keep the weights in main memory and bring to the accelerator one `"model"` at a
            time, or layer after layer (`"sequential"`).
        variant: Of the weight files, as diffusers means it (`"fp16"`).
        revision: Of a model on the hub: a branch, a tag or a commit.
        base: For a checkpoint in one file: the model (a name, a folder or an id) that gives the
            parts the file does not have.
        lora: LoRAs to add, each a file, a folder or a hub id, with `@SCALE` behind it if it is not
            to be 1: `["style.safetensors@0.8"]`. Needs the extra `lora`.
        convention: `"instaflow"` for official InstaFlow weights in a folder that does not say so.

    Returns:
        The model, in evaluation mode, its weights known to be finite.

    Raises:
        InputError: There is no such model, or it cannot be used; the line says why.
        WorkError: The device has not enough memory.
    """
    source, name = _resolve(name_or_folder)
    device = _device(device)
    if offload not in (None, "none", "model", "sequential"):
        raise InputError(f"unknown offload {offload!r}: use none, model or sequential")
    if convention not in (None, "instaflow"):
        raise InputError(f"unknown convention {convention!r}: use instaflow, or none")
    offloads = offload in ("model", "sequential")
    if offloads and device.type == "cpu":
        raise InputError(f"offload={offload!r} needs an accelerator: leave it out on the CPU")
    with quiet_libraries(), announced(f"loading {name}"):
        pipeline, folder = _open(source, name, base, dtype, device, variant, revision)
        add_loras(pipeline, lora, name)
        check_finite({key: m for key, m in pipeline.components.items() if _is_network(m)}, name)
        family, metadata = _family(folder, convention), folder.metadata()
        if family is InstaFlowModel:
            to_diffusers_sign(pipeline, name)
            metadata = official_metadata(metadata, name)
        with _failures(folder):
            model = family(pipeline, name=name, metadata=metadata)
        model.verified = folder.verified
        told = {"base": base and str(base), "lora": [str(one) for one in lora], "variant": variant,
                "revision": revision, "convention": convention}  # fmt: skip
        model.loaded_with = {key: value for key, value in told.items() if value}
        _place(model, device, offload)
    return model


def saved(name_or_folder: str | Path) -> Folder:
    """What a model says of itself, without its weights.

    Args:
        name_or_folder: As `load` takes it, but for checkpoints in one file.

    Raises:
        InputError: There is no such model.
    """
    source, name = _resolve(name_or_folder)
    if isinstance(source, Path) and source.is_file():
        raise InputError(f"{name} is one file, which says nothing of itself: give a folder")
    return Folder(source, name, FAMILIES)


def _resolve(name_or_folder: str | Path) -> tuple[Path | str, str]:
    """(folder or hub id, name to go by)."""
    text = str(name_or_folder)
    if text in embedded_models():
        return WEIGHTS / text, text
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            raise InputError(
                f"{folder} is no diffusers pipeline: it has no {INDEX}; give the folder that "
                "save_pretrained wrote"
            )
        return folder, text
    if folder.is_file():
        check_suffix(folder)
        return folder, text
    if folder.suffix.lower() in SUFFIXES:
        raise InputError(f"there is no file {text}")
    if isinstance(name_or_folder, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        return text, text
    if re.search(r"^[.~]|[/\\]", text):
        raise InputError(f"there is no folder {text}: give the one that save_pretrained wrote")
    known = ", ".join(embedded_models()) or "none"
    raise InputError(
        f"unknown model {text!r}: give an embedded model ({known}), a diffusers folder, or a hub "
        "id like owner/name"
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found or torch.device("cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"device {str(device)!r} is not available: give cpu or an accelerator such as cuda:0, "
            "or leave it out for the one there is"
        ) from error
    return wanted


def _place(model: FlowModel, device: torch.device, offload: Offload | None) -> None:
    try:
        if offload == "model":
            model.pipeline.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            _ = model.weight_hash  # afterwards the weights are out of sight
            model.pipeline.enable_sequential_cpu_offload(device=device)
        else:
            model.pipeline.to(device)
    except torch.OutOfMemoryError as error:
        raise WorkError(explanation(model, device)) from error


def _open(
    source: Path | str,
    name: str,
    base: str | Path | None,
    dtype: torch.dtype | None,
    device: torch.device,
    variant: str | None,
    revision: str | None,
) -> tuple[Any, Folder]:
    """The pipeline, and the folder (or repository) that says what it is."""
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    if isinstance(source, Path) and source.is_file():
        rest = None
        if base is not None:
            place, base_name = _resolve(base)
            if isinstance(place, Path) and place.is_file():
                raise InputError(f"base {place} is a file and no complete pipeline: give a folder")
            rest = Folder(place, base_name, FAMILIES, variant, revision)
        elif variant is not None or revision is not None:
            given = f"--variant {variant}" if variant is not None else f"--revision {revision}"
            raise InputError(
                f"{given} is of a folder or a model on the hub, and {name} is one file: leave it "
                "out, or name with base= (--base) what it is of"
            )
        return open_single_file(source, rest, FAMILIES, dtype or stored_dtype(source))
    if base is not None:
        raise InputError(f"base is for checkpoints in one file, and {name} has all its parts")
    folder = Folder(source, name, FAMILIES, variant, revision)
    with _failures(folder):
        return folder.pipeline(dtype or folder.stored_dtype()), folder


@contextmanager
def _failures(folder: Folder) -> Iterator[None]:
    """Whatever libraries raise about the files of a folder, as one line that names it.

    There is no end to what wrong files make them raise; those in Rust panic, which no `Exception`
    is.
    """
    try:
        yield
    except (InputError, WorkError, MemoryError, torch.OutOfMemoryError, ImportError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise folder.failure(error) from error


def _family(folder: Folder, convention: str | None) -> type[FlowModel]:
    """What understands the pipeline."""
    family = FAMILIES[folder.class_name]
    if convention is None:
        return family
    if not issubclass(family, SDModel):
        raise InputError(
            f"convention=instaflow is for Stable Diffusion's U-Nets, and {folder.name} is a "
            f"{folder.class_name}"
        )
    return InstaFlowModel


def _is_network(component: Any) -> bool:
    return isinstance(component, torch.nn.Module)

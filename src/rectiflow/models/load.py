"""From a name, a folder or a hub id to a model, with one clear line when there is none."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from rectiflow.errors import InputError, WorkError
from rectiflow.models.base import FlowModel
from rectiflow.models.metadata import FILE_NAME, Metadata, read_metadata
from rectiflow.models.sd3 import SD3Model
from rectiflow.models.weights import check_finite

FAMILIES: dict[str, type[FlowModel]] = {"StableDiffusion3Pipeline": SD3Model}
"""The diffusers pipelines that are understood, and what understands them."""

WEIGHTS = Path(__file__).parents[1] / "weights"
INDEX = "model_index.json"

Offload = Literal["none", "model", "sequential"]


def embedded_models() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(index.parent.name for index in WEIGHTS.glob(f"*/{INDEX}"))


def load(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    offload: Offload | None = None,
    variant: str | None = None,
) -> FlowModel:
    """Load a model, whichever family it is of.

    Args:
        name_or_folder: The name of an embedded model, a folder that a diffusers pipeline was saved
            to, or the id of one on the hub (`"stabilityai/stable-diffusion-3.5-medium"`).
        dtype: What network and text encoders compute in. The codec always computes in float32,
            which costs little and keeps rounding out of the reconstruction.
        device: Where; if None, the accelerator there is, else the CPU.
        offload: Keep the weights in main memory and bring to the accelerator one `"model"` at a
            time, or layer after layer (`"sequential"`).
        variant: Of the weight files, as diffusers means it (`"fp16"`).

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
    offloads = offload in ("model", "sequential")
    if offloads and device.type == "cpu":
        raise InputError(f"offload={offload!r} needs an accelerator: leave it out on the CPU")
    pipeline, family = _open(source, name, dtype, variant)
    model = family(pipeline, name=name, metadata=_metadata(source, name))
    check_finite(model.modules, name)
    try:
        if not offloads:
            pipeline.to(device)
        elif offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        else:
            _ = model.weight_hash  # afterwards the weights are out of sight
            pipeline.enable_sequential_cpu_offload(device=device)
    except torch.OutOfMemoryError as error:
        raise WorkError(
            f"{name} does not fit into the memory of {device}: use dtype=torch.bfloat16 or "
            "offload='model'"
        ) from error
    return model


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
        raise InputError(f"{folder} is a file: give a diffusers folder (save_pretrained)")
    if isinstance(name_or_folder, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        return text, text
    known = ", ".join(embedded_models()) or "none"
    raise InputError(
        f"unknown model {text!r}: give an embedded model ({known}), a diffusers folder, or a hub "
        "id like owner/name"
    )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {str(device)!r} is not available: use cpu, or none") from error
    return wanted


def _open(
    source: Path | str, name: str, dtype: torch.dtype, variant: str | None
) -> tuple[Any, type[FlowModel]]:
    import diffusers
    from safetensors import SafetensorError

    try:
        config = diffusers.DiffusionPipeline.load_config(str(source))
        class_name = config["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        if isinstance(source, str):
            raise InputError(
                f"there is no folder {name!r}, and no pipeline of that id could be had from the "
                f"hub ({_first_line(error)})"
            ) from error
        raise InputError(f"{source / INDEX} cannot be read: {_first_line(error)}") from error
    if class_name not in FAMILIES:
        raise InputError(
            f"{name} is a {class_name}, which is not supported: use one of {', '.join(FAMILIES)}"
        )
    try:
        with _quiet_loading():
            pipeline = getattr(diffusers, class_name).from_pretrained(
                str(source),
                dtype={"default": dtype, "vae": torch.float32},
                use_safetensors=True,
                variant=variant,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{name} cannot be loaded: {_first_line(error)} (a complete diffusers folder with "
            "safetensors weights is needed)"
        ) from error
    return pipeline, FAMILIES[class_name]


def _metadata(source: Path | str, name: str) -> Metadata:
    if isinstance(source, Path):
        return read_metadata(source / FILE_NAME)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return read_metadata(Path(hf_hub_download(name, FILE_NAME)))
    except EntryNotFoundError:  # somebody else's checkpoint, or an offline cache of one
        return Metadata()


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars for the seconds that loading takes."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [
        library
        for library in (diffusers_logging, transformers_logging)
        if library.is_progress_bar_enabled()
    ]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

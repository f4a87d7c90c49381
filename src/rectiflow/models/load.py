"""From a name, a folder or a hub id to a model, with one clear line when there is none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch

from rectiflow.errors import InputError, WorkError
from rectiflow.models.base import FlowModel
from rectiflow.models.libraries import quiet_libraries
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
    with quiet_libraries():
        pipeline, family, metadata = _open(source, name, dtype, variant)
        check_finite({key: m for key, m in pipeline.components.items() if _is_network(m)}, name)
        model = family(pipeline, name=name, metadata=metadata)
        _place(model, device, offload)
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
        raise InputError(f"device {str(device)!r} is not available: use cpu, or none") from error
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
        raise WorkError(
            f"{model.name} does not fit into the memory of {device}: use dtype=torch.bfloat16 or "
            "offload='model'"
        ) from error


def _open(
    source: Path | str, name: str, dtype: torch.dtype, variant: str | None
) -> tuple[Any, type[FlowModel], Metadata]:
    import diffusers
    from safetensors import SafetensorError

    local = isinstance(source, Path) or not _hub_answers(source)
    options = {"use_safetensors": True, "variant": variant, "local_files_only": local}
    config = _index(source, name, local)
    class_name = config["_class_name"]
    try:
        encoders = _text_encoders(source, name, config, dtype=dtype, **options)
        pipeline = getattr(diffusers, class_name).from_pretrained(
            str(source),
            dtype={"default": dtype, "vae": torch.float32},
            **_left_out(config),
            **encoders,
            **options,
        )
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{name} cannot be loaded: {_first_sentence(error)} (a complete diffusers folder with "
            "safetensors weights is needed)"
        ) from error
    return pipeline, FAMILIES[class_name], _metadata(source, local)


def _left_out(config: dict[str, Any]) -> dict[str, None]:
    """The parts a folder was saved without, an SD3's T5 say, which diffusers wants to be told."""
    return {name: None for name, kind in config.items() if kind == [None, None]}


def _index(source: Path | str, name: str, local: bool) -> dict[str, Any]:
    """`model_index.json`, known to name a family of ours and, in a folder, parts that are there."""
    from diffusers import DiffusionPipeline

    try:
        config: dict[str, Any] = DiffusionPipeline.load_config(str(source), local_files_only=local)
    except (OSError, ValueError) as error:
        if isinstance(source, str):
            why = "the hub cannot be reached" if local else _first_sentence(error)
            raise InputError(
                f"there is no folder {name!r}, and no pipeline of that id could be had from the "
                f"hub ({why})"
            ) from error
        raise InputError(f"{source / INDEX} cannot be read: {_first_sentence(error)}") from error
    class_name = config.get("_class_name")
    if class_name not in FAMILIES:
        raise InputError(
            f"{name} is a {class_name}, which is not supported: use a {', '.join(FAMILIES)}"
        )
    if isinstance(source, Path):
        # transformers makes up a tokenizer where there are no files of one.
        for part, kind in config.items():
            if isinstance(kind, list) and kind[0] and not (source / part).is_dir():
                raise InputError(f"{name} is incomplete: the folder {part} is missing")
    return config


def _text_encoders(
    source: Path | str, name: str, config: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """The text encoders, loaded apart because a pipeline would not say that weights are missing."""
    import transformers

    encoders = {}
    for part, kind in config.items():
        if part.startswith("text_encoder") and isinstance(kind, list) and kind[0]:
            encoders[part], info = getattr(transformers, kind[1]).from_pretrained(
                str(source), subfolder=part, output_loading_info=True, **options
            )
            if info["missing_keys"]:
                missing = sorted(info["missing_keys"])[0]
                raise InputError(
                    f"{name}: the weights are incomplete ({part}.{missing} is missing)"
                )
    return encoders


def _hub_answers(name: str) -> bool:
    """Whether the hub can be asked; if not, what has been downloaded before is used at once."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is neither a folder {name!r} nor such a model on the hub (to see a private "
            "one, log in)"
        ) from error
    except Exception:  # offline; the client's HTTP library, hence its errors, change by version
        return False
    return True


def _metadata(source: Path | str, local: bool) -> Metadata:
    if isinstance(source, Path):
        return read_metadata(source / FILE_NAME)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return read_metadata(Path(hf_hub_download(source, FILE_NAME, local_files_only=local)))
    except EntryNotFoundError:  # somebody else's checkpoint, or an offline copy of one
        return Metadata()


def _is_network(component: Any) -> bool:
    return isinstance(component, torch.nn.Module)


def _first_sentence(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(". ")[0].rstrip(".")

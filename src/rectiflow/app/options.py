"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.invert.presets import Preset
    from rectiflow.models.base import FlowModel

DEFAULT_MODEL = "emoji-sd3"
LARGEST_SEED = 2**63 - 1


class Dtype(StrEnum):
    """What a network computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class OffloadTo(StrEnum):
    """How weights that wait for their turn are kept."""

    none = "none"
    model = "model"
    sequential = "sequential"


AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON alone on stdout; all else goes to stderr.")
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="An embedded model, a diffusers folder, a .safetensors or .gguf file, or a hub id "
        "such as stabilityai/stable-diffusion-3.5-medium.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="What gives the parts that a model in one file does not have.",
        show_default=False,
    ),
]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE_OR_ID[@SCALE]", help="A LoRA to add; repeatable.", show_default=False
    ),
]
Offload = Annotated[
    OffloadTo,
    typer.Option(
        help="Keep weights in main memory, and bring to the accelerator one model at a time or "
        "layer after layer: slower, for little memory."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="Where to compute; by default the accelerator there is, else the CPU."),
]
NetworkDtype = Annotated[Dtype, typer.Option("--dtype", help="What the network computes in.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_SEED, help="Of the noise.", show_default=False)
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Steps from noise to image.", show_default=False)
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", help="Classifier-free guidance; 1 is none.", show_default=False),
]
PresetName = Annotated[
    str | None,
    typer.Option("--preset", help="Settings of a method; `rectiflow models` lists them."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the preset; repeatable."),
]


def load_model(
    name: str,
    dtype: Dtype,
    device: str | None,
    *,
    offload: OffloadTo = OffloadTo.none,
    base: str | None = None,
    lora: list[str] | None = None,
) -> FlowModel:
    """The model that the options name."""
    import torch

    from rectiflow.models.load import load

    return load(
        name,
        dtype=getattr(torch, dtype.value),
        device=device,
        offload=offload.value,
        base=base,
        lora=lora or (),
    )


def parts_of(name: str, base: str | None, lora: list[str] | None) -> dict[str, Any]:
    """What a record has to say of a model beyond a name: files, base and LoRAs, from anywhere.

    Args:
        name: of the model; kept where it is a file.
        base: as `load_model` was given it.
        lora: likewise.
    """
    from rectiflow.models.lora import Lora as Parsed

    found: dict[str, Any] = {}
    if Path(name).expanduser().is_file():
        found["model"] = _from_anywhere(name)
    if base is not None:
        found["base"] = _from_anywhere(base)
    if lora:
        parsed = [Parsed.parse(text) for text in lora]
        found["lora"] = [f"{_from_anywhere(one.source)}@{one.scale!r}" for one in parsed]
    return found


def _from_anywhere(name: str) -> str:
    """A path that is there as an absolute one; other names as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def preset_of(
    name: str | None,
    assignments: list[str] | None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> tuple[Preset, list[str]]:
    """The preset that the options describe, and the fields that were set one by one.

    Every field is of its type and in its range.

    Raises:
        InputError: there is no such preset or field, or a value does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    from rectiflow.invert.presets import Preset, get_preset
    from rectiflow.straighten.config import override

    settings = override({}, assignments or [])
    if steps is not None:
        settings["num_inference_steps"] = steps
    if guidance is not None:
        settings["guidance_scale"] = guidance
    preset = get_preset(name or "exact", **dict.fromkeys(settings))  # refuses unknown names
    try:
        changed = TypeAdapter(Preset).validate_python(dataclasses.asdict(preset) | settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--set {first['loc'][0]}: {first['msg']}") from None
    for field, value in dataclasses.asdict(changed).items():
        if isinstance(value, float):
            check_finite(field, value)
    changed.check()
    return changed, list(settings)


def check_finite(name: str, value: float | None) -> None:
    """Refuse infinity and NaN.

    Raises:
        InputError: the value is neither None nor a number.
    """
    if value is not None and not math.isfinite(value):
        raise InputError(f"{name} is {value}: give a finite number")


def output_folder(folder: Path) -> Path:
    """Make a folder and see that files can be written to it, before any work is done.

    Raises:
        InputError: it cannot be made, or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}): choose another folder with -o"
        ) from error
    return folder


def output_file(file: Path, suffix: str) -> Path:
    """See that a file of a certain kind can be written.

    Raises:
        InputError: another suffix, a folder, or one that cannot be written to.
    """
    if file.suffix.lower() != suffix:
        raise InputError(f"-o {file} should end in {suffix}")
    if file.is_dir():
        raise InputError(f"-o {file} is a folder: give a file")
    output_folder(file.parent)
    return file


def whole(settings: Preset) -> dict[str, Any]:
    """All fields of a preset, as JSON data."""
    return dataclasses.asdict(settings)

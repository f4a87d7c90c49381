"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import tempfile
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow import arguments
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.invert.presets import Preset
    from rectiflow.models.base import FlowModel

DEFAULT_MODEL = "emoji-sd3"
WEIGHTS = ("base", "lora", "variant", "revision")
"""What says which weights of a model, as options and as arguments of `load`."""
LARGEST_SEED = arguments.LARGEST_SEED
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of pictures that are written (`report.metadata.FORMATS`)."""
UNWRITTEN = (".avif", ".bmp", ".gif", ".heic", ".html", ".jp2", ".json", ".jxl", ".mp4", ".pdf",
             ".safetensors", ".svg", ".tif", ".tiff", ".zip")  # fmt: skip
"""Those of other files, which nobody would give a folder."""


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
MODEL_HELP = (
    "An embedded model, a diffusers folder, a .safetensors or .gguf file, or a hub id such as "
    "stabilityai/stable-diffusion-3.5-medium."
)
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
Variant = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Of the weight files of a folder or hub id: fp16.", show_default=False
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Of a hub id: a branch, a tag or a commit.", show_default=False
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
NetworkDtype = Annotated[
    Dtype | None,
    typer.Option(
        help="What the network computes in.  [default: on an accelerator what the checkpoint is "
        "stored in, on the CPU float32]",
        show_default=False,
    ),
]
Seed = Annotated[
    int | None, typer.Option(min=0, max=LARGEST_SEED, help="Of the noise.", show_default=False)
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Steps from noise to image.", show_default=False)
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance", min=0, help="Classifier-free guidance; up to 1 is none.", show_default=False
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Settings of a method; `rectiflow models` lists them. An inversion that was saved "
        "has its own.  [default: fast]",
        show_default=False,
    ),
]
Diagnose = Annotated[
    bool,
    typer.Option(
        "--diagnose",
        help="Also take each image to its noise and back, with and without compensation: how well "
        "the model knows it. It takes network samples, and they are counted.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the preset; repeatable."),
]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What the options of `takes_model` say; those that a command does not have are left alone."""

    model: str | None = None
    models: list[str] | None = None
    base: str | None = None
    lora: list[str] | None = None
    variant: str | None = None
    revision: str | None = None
    device: str | None = None
    dtype: Dtype | None = None
    offload: OffloadTo | None = None

    @property
    def given(self) -> list[str]:
        """The names of the options that were given, and differ from their defaults."""
        off = (None, OffloadTo.none)
        return [one.name for one in dataclasses.fields(self) if getattr(self, one.name) not in off]

    @property
    def weights(self) -> dict[str, Any]:
        """Which weights, beside the model's name: what was given of base, lora, …, for `load`."""
        given = {name: getattr(self, name) for name in WEIGHTS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def words(self) -> list[str]:
        """The options, as words of a command line; those of their default left out."""
        words: list[str] = []
        for name in self.given:
            value = getattr(self, name)
            option = "--model" if name == "models" else f"--{name}"
            if (name, value) in (("model", DEFAULT_MODEL), ("dtype", Dtype.float32)):
                continue
            for one in value if isinstance(value, list) else [value]:
                words += [option, str(one)]
        return words

    def load(self, name: str | None = None, **defaults: Any) -> FlowModel:
        """Load the model.

        Args:
            name: instead of the option's.
            **defaults: of `rectiflow.load`, for what no option says.
        """
        from rectiflow.progress import announced

        with announced("loading PyTorch and diffusers"):
            import torch

            from rectiflow.models.load import load

        given: dict[str, Any] = dict(self.weights)
        if self.device is not None:
            given["device"] = self.device
        if self.dtype is not None:
            given["dtype"] = getattr(torch, self.dtype.value)
        if self.offload is not None:
            given["offload"] = self.offload.value
        return load(name or self.model or DEFAULT_MODEL, **defaults | given)


def takes_model(
    default: str | None = DEFAULT_MODEL,
    *,
    help: str = MODEL_HELP,
    several: bool = False,
    without: Sequence[str] = (),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command all options that say which model, and how it is loaded.

    The command has a parameter ``model: ModelOptions`` in the place where help is to list them.

    Args:
        default: of ``--model``; None where something else says it.
        help: of ``--model``.
        several: ``--model`` may be given more than once; the other options are for all of them.
        without: names of options that mean nothing to this command, or are said elsewhere.
    """
    name = typer.Option("--model", "-m", help=help, show_default=default is not None)
    declared: dict[str, tuple[Any, Any]] = {
        "models" if several else "model": (
            Annotated[list[str] | None if several else str | None, name],
            default,
        ),
        "base": (Base, None),
        "lora": (Lora, None),
        "variant": (Variant, None),
        "revision": (Revision, None),
        "device": (Device, None),
        "dtype": (NetworkDtype, None),
        "offload": (Offload, OffloadTo.none),
    }
    declared = {name: how for name, how in declared.items() if name not in without}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) or None for name in declared}
            command(**given, model=ModelOptions(**chosen))

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            if parameter.name != "model":
                parameters.append(parameter)
                continue
            parameters += [
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind
                )
                for name, (kind, value) in declared.items()
            ]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def preset_of(
    name: str | None,
    assignments: list[str] | None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    default: str | None = None,
    reused: bool = False,
) -> tuple[Preset, list[str]]:
    """The preset that the options describe, and the fields that were set one by one.

    Every field is of its type, in its range, and has an effect.

    Args:
        name: of the preset.
        assignments: ``FIELD=VALUE``, of the fields that are set one by one.
        steps: likewise.
        guidance: likewise.
        default: the preset where none is named; that of an edit if None.
        reused: an inversion that was saved is edited. Where no preset is named the settings are
            its own, and it is by them that a field has an effect or none.

    Raises:
        InputError: there is no such preset or field, or a value does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    from rectiflow.invert.presets import DEFAULT_PRESET, INVERSION_PRESET, Preset, get_preset
    from rectiflow.straighten.config import override

    settings = override({}, assignments or [])
    if steps is not None:
        settings["num_inference_steps"] = steps
    if guidance is not None:
        settings["guidance_scale"] = guidance
    default = default or (INVERSION_PRESET if reused else DEFAULT_PRESET)
    preset = get_preset(name or default, **dict.fromkeys(settings))  # refuses unknown names
    try:
        changed = TypeAdapter(Preset).validate_python(dataclasses.asdict(preset) | settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--set {first['loc'][0]}: {first['msg']}") from None
    for field, value in dataclasses.asdict(changed).items():
        if isinstance(value, float):
            check_finite(field, value)
    changed.check()
    if name or not reused:
        changed.check_used(settings)
    return changed, list(settings)


def preset_on(model: FlowModel, preset: Preset, name: str | None, named: list[str]) -> Preset:
    """What `preset_of` returned, once the model is known, whose family may have its own settings.

    Args:
        model: the network.
        preset: as the options describe it.
        name: as it was given.
        named: the fields that were set one by one; they stay.
    """
    from rectiflow.invert.presets import get_preset, on_family

    if name is None or on_family(name, model.family) == name:
        return preset
    return get_preset(name, model.family, **{field: getattr(preset, field) for field in named})


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


def output_file(file: Path, *suffixes: str) -> Path:
    """See that a file of one of several kinds can be written.

    Raises:
        InputError: another suffix, a folder, or one that cannot be written to.
    """
    if file.suffix.lower() not in suffixes:
        raise InputError(f"-o {file} should end in {' or '.join(suffixes)}")
    if file.is_dir():
        raise InputError(f"-o {file} is a folder: give a file")
    output_folder(file.parent)
    return file


def is_picture(output: Path) -> bool:
    """Whether an output is the name of one picture, and not of a folder.

    Raises:
        InputError: it is a folder with such a name, or of a kind that is not written.
    """
    suffix = output.suffix.lower()
    if suffix in UNWRITTEN and not output.is_dir():
        raise InputError(f"-o {output}: give a folder, or a file in {', '.join(PICTURES)}")
    if suffix in PICTURES and output.is_dir():
        raise InputError(f"-o {output} is a folder: give a file, or another folder")
    return suffix in PICTURES


def whole(settings: Preset) -> dict[str, Any]:
    """All fields of a preset, as JSON data."""
    return dataclasses.asdict(settings)

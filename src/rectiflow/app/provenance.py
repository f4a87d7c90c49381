"""``rectiflow info`` and ``replay``: what made a picture, and the same again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from rectiflow.app import options, record
from rectiflow.app.console import one_line, session
from rectiflow.app.edit_job import Around
from rectiflow.app.generating_pictures import paint
from rectiflow.app.generating_refined import repaint
from rectiflow.app.outputs import Outputs, Overwrite
from rectiflow.app.results import source_hash
from rectiflow.errors import InputError, WorkError

if TYPE_CHECKING:
    from rectiflow.models.base import FlowModel
    from rectiflow.steer import EditResult

Picture = Annotated[
    Path, typer.Argument(metavar="PICTURE", help="A picture rectiflow has written.")
]


def info(picture: Picture, as_json: options.AsJson = False) -> None:
    """Say what made a picture: prompt, seed, settings, model."""
    with session(as_json) as terminal:
        from rectiflow.report import read_picture

        made = read_picture(picture)
        terminal.result(made, "\n".join(_lines(made)))


def _lines(made: dict[str, Any], indent: str = "") -> list[str]:
    """Nested settings, one on a line; what is unset is left out."""
    lines = []
    for key, value in made.items():
        if isinstance(value, dict):
            lines += [f"{indent}{one_line(key)}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and all(isinstance(v, float) for v in value):
            lines.append(
                f"{indent}{one_line(key)}: {len(value)} times from {value[0]:g} to {value[-1]:g}"
            )
        elif value is not None:
            lines.append(f"{indent}{one_line(key)}: {one_line(str(value))}")
    return lines


@options.takes_model(None, help="Where the model is now, if it has moved.", without=("dtype",))
def replay(
    *,
    picture: Picture,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the new picture to this file."),
    ] = None,
    overwrite: Overwrite = False,
    model: options.ModelOptions,
    as_json: options.AsJson = False,
) -> None:
    """Make a picture again and compare the pixels.

    It is made from what is kept inside it (and, for an edit, from its source).
    The exit code is 0 if the pixels are identical, and 1 if they are not.
    """
    with session(as_json) as terminal:
        from rectiflow.models.picture import load_image
        from rectiflow.report import read_picture, save_picture
        from rectiflow.report.metadata import as_saved

        made = read_picture(picture)
        command = made.get("command")
        if command == "generate --sheet":
            raise InputError(
                f"{picture} is a sheet: replay one of the pictures on it, after `rectiflow "
                "generate --pick` has written it"
            )
        if command in ("chain", "generate --consistent", "invert"):
            raise InputError(
                f"{picture} is one of several that `rectiflow {command}` made together: run that "
                "again with what `rectiflow info` tells of it"
            )
        if command not in ("edit", "generate"):
            raise InputError(f"{picture} was not made by a model: there is nothing to replay")
        old = load_image(picture)
        if output is not None:
            options.output_file(output, *options.PICTURES)
            outputs = Outputs(output.parent, [output.name], overwrite=overwrite, reads=(picture,))
        try:
            loaded = model.load(model.model or made["model"], **_recorded(made))
            _check_weights(loaded, made, picture)
            new = _again(loaded, made, picture)
            if "refinement" in made:
                alike = options.ModelOptions(device=model.device, offload=model.offload)
                about = made["refinement"]
                refiner = alike.load(about["model"], **_recorded(about))
                _check_weights(refiner, made["refinement"], picture)
                new = repaint(refiner, new, made)[0]
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{picture} was written by version {made.get('version')} and lacks what a replay "
                f"needs ({one_line(str(error))}); `rectiflow info` shows what is there"
            ) from error
        if output is not None:
            save_picture(new, outputs.file(output.name), made)
            outputs.finish()
        worst = _largest_difference(old, load_image(as_saved(new, picture)))
        data = {
            "picture": str(picture),
            "identical": worst == 0,
            "max_difference": worst,
            "replay": None if output is None else str(output),
        }
        if worst == 0:
            terminal.result(data, "identical: every pixel is the same")
            return
        terminal.result(data, f"not identical: pixels differ by up to {worst} of 255")
    raise WorkError(
        f"{picture} could not be made again to the pixel: device, number of threads or library "
        "versions differ from those it was made with"
    )


def _recorded(made: dict[str, Any]) -> dict[str, Any]:
    """What the model was loaded with, as arguments of `load`."""
    import torch

    parts = {name: made[name] for name in ("convention", *options.WEIGHTS) if name in made}
    return parts | {"dtype": getattr(torch, options.Dtype(made["dtype"]).value)}


def _check_weights(model: FlowModel, made: dict[str, Any], picture: Path) -> None:
    if made["weight_hash"] != model.weight_hash:
        raise InputError(
            f"{picture} was made with weights {made['weight_hash'][:12]}, and {model.name} has "
            f"{model.weight_hash[:12]}: give the model it was made with by --model"
        )
    if made.get("field_hash", model.field_hash) != model.field_hash:
        raise InputError(
            f"{picture} was made with these weights under other settings (prediction type, "
            f"schedule, scaling, tokenizer) than {model.name} has: put them back, or give --model"
        )


def _again(model: FlowModel, made: dict[str, Any], picture: Path) -> Image.Image:
    if made["command"] == "generate":
        return paint(model, made)[0]
    import rectiflow
    from rectiflow.invert import Inversion, Preset, diagnosis_of

    settings = made["settings"] | {"features": tuple(made["settings"]["features"])}
    source = _source(model, made, picture)
    preset = Preset(**settings)
    if made["role"] == "reconstruction":
        if made.get("crop_to_mask"):
            raise InputError(
                f"{picture} shows how a region came back, beside its edit: replay the edit"
            )
        return diagnosis_of(_inversion(model, source, made, preset)).reconstruction.image
    if source is None:
        source = _inversion(model, source, made, preset)
    more: dict[str, Any] = {
        one.name: made[one.name] for one in dataclasses.fields(Around) if one.name in made
    }
    if isinstance(source, Inversion) and source.preset.noise_seed != preset.noise_seed:
        more["noise_seed"] = preset.noise_seed
    result: EditResult = rectiflow.edit(
        model,
        source,
        prompts=made["prompts"],
        # A saved inversion knows its own.
        source_prompt=made["source_prompt"],
        negative_prompt=made["negative_prompt"],
        preset=preset,
        mask=_mask(made),
        **more,
    )
    return result.images[made["number"] - 1]


def _inversion(model: FlowModel, source: Any, made: dict[str, Any], preset: Any) -> Any:
    from rectiflow.invert import Inversion, from_seed, invert

    if isinstance(source, Inversion):
        return source
    if source is None:
        return from_seed(
            model,
            made["source_prompt"],
            made["seed"],
            preset=preset,
            guidance_scale=made["source_guidance"],
        )
    return invert(model, source, made["source_prompt"], preset=preset)


def _source(model: FlowModel, made: dict[str, Any], picture: Path) -> Any:
    """The source of an edit, known to be the same: an image, an inversion, or None for a seed."""
    from rectiflow.invert import Inversion
    from rectiflow.models.picture import load_image

    if made["source"] is None:
        return None
    original = Path(made["source"])
    if original.suffix == ".safetensors":
        if not original.is_file() or record.file_hash(original) != made["source_hash"]:
            raise InputError(f"the inversion {original} is gone or has changed: put it back")
        return Inversion.load(original, model)
    for candidate in (original, picture.parent / "source.png"):
        if candidate.is_file():
            found = load_image(candidate)
            if source_hash(candidate, found) == made["source_hash"]:
                return candidate if made.get("keep_alpha") else found
    raise InputError(
        f"the source {original} is gone or has changed, and so has source.png beside {picture}: "
        "put one of them back"
    )


def _mask(made: dict[str, Any]) -> Path | None:
    if made["mask"] is None:
        return None
    mask = Path(made["mask"])
    if not mask.is_file() or record.file_hash(mask) != made["mask_hash"]:
        raise InputError(f"the mask {mask} is gone or has changed: put it back")
    return mask


def _largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Of any channel of any pixel, 0 to 255; pictures of different sizes differ by 255."""
    from PIL import ImageChops

    if one.size != other.size:
        return 255
    extrema = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).getextrema()
    return int(max(high for _, high in extrema))  # type: ignore[misc]

"""``rectiflow edit``: invert a picture, steer it, and report."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from rectiflow.app import options, record
from rectiflow.app.console import Session, command_line, evaluations, session
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.invert import Inversion, Preset, Reconstruction
    from rectiflow.models.base import FlowModel
    from rectiflow.steer import EditResult

INVERSION_FIELDS = (
    "num_inference_steps",
    "grid",
    "scheme",
    "iterations",
    "tolerance",
    "average",
    "warm_start",
    "time",
)
"""The fields of a preset that are settled once an image has been inverted."""


def edit(
    context: typer.Context,
    to: Annotated[
        list[str],
        typer.Option("--to", help="What the image should show instead; repeat for more edits."),
    ],
    image: Annotated[
        Path | None,
        typer.Argument(help="An image of any size, or an inversion saved by `rectiflow invert`."),
    ] = None,
    source_prompt: Annotated[
        str | None,
        typer.Option("--from", help="What the image shows now.", show_default=False),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option(help="What guidance pushes away from.", show_default=False),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="An image of the same size, white where the edit may change it.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the pictures and the report.")
    ] = Path("out"),
    seed: options.Seed = None,
    model: options.ModelName = options.DEFAULT_MODEL,
    preset: options.PresetName = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    settings: options.Settings = None,
    device: options.Device = None,
    dtype: options.NetworkDtype = options.Dtype.float32,
    as_json: options.AsJson = False,
) -> None:
    """Edit an image by changing its prompt.

    What the prompt did not change stays. The folder gets source.png, reconstruction.png, edit-1.png, ... and report.html. With --seed
    instead of an image, what the model generates from --from is edited.
    """
    with session(as_json) as terminal:
        chosen = options.preset_of(preset, settings, steps=steps, guidance=guidance)
        if (image is None) == (seed is None):
            raise InputError("give an image or --seed, one of the two")
        reused = image is not None and image.suffix == ".safetensors"
        picture = _read(image, mask) if image is not None and not reused else None
        options.output_folder(output)
        loaded = options.load_model(model, dtype, device)
        source: Image.Image | Inversion | None = picture
        if image is not None and reused:
            from rectiflow.invert import Inversion

            source = Inversion.load(image, loaded)
            given = {a.partition("=")[0] for a in settings or []}
            given |= {"num_inference_steps"} if steps is not None else set()
            given |= {"guidance_scale"} if guidance is not None else set()
            chosen = for_inversion(chosen, source, given, named=preset is not None)
        result, exact, plain = run(
            loaded,
            source,
            chosen,
            terminal=terminal,
            prompts=to,
            source_prompt=source_prompt,
            negative_prompt=negative,
            mask=mask,
            seed=seed,
        )
        origin = None if image is None else (image, picture)
        made = about(loaded, result, negative, origin, mask, preset)
        images = write_pictures(output, result, exact, made)
        report = result.edit_report(
            reconstruction=(exact, plain),
            command=command_line(context),
            environment=record.environment(loaded),
        )
        report = dataclasses.replace(report, warnings=terminal.warnings)
        from rectiflow.report import write_edit_report

        write_edit_report(report, output / "report.html")
        data = as_data(result, exact, plain, made, images, terminal.warnings)
        terminal.result(data, summary(data, output))


def _read(image: Path, mask: Path | None) -> Image.Image:
    """The picture, and a look at the mask before an hour has been spent on inverting."""
    from rectiflow.models.images import load_image

    picture = load_image(image)
    if mask is not None:
        drawn = load_image(mask)
        if drawn.size != picture.size:
            raise InputError(
                f"the mask {mask} is {drawn.width} × {drawn.height} and the image "
                f"{picture.width} × {picture.height}: they must be of one size"
            )
    return picture


def for_inversion(preset: Preset, inversion: Inversion, given: set[str], named: bool) -> Preset:
    """The preset to edit a saved inversion with: how it was inverted is settled.

    Args:
        preset: what the options describe.
        inversion: the saved one.
        given: names of the fields that the options set one by one.
        named: whether the options name a preset; else the inversion's own is used.

    Raises:
        InputError: a field was set to another value than the inversion was made with.
    """
    settled = {name: getattr(inversion.preset, name) for name in INVERSION_FIELDS}
    for name in given & set(INVERSION_FIELDS):
        if getattr(preset, name) != settled[name]:
            raise InputError(
                f"the inversion was made with {name} {settled[name]}, not "
                f"{getattr(preset, name)}: leave it out, or invert again"
            )
    if named:
        return dataclasses.replace(preset, **settled)
    free = {name: getattr(preset, name) for name in given if name not in INVERSION_FIELDS}
    return dataclasses.replace(inversion.preset, **free)


def run(
    model: FlowModel,
    source: Image.Image | Path | Inversion | None,
    preset: Preset,
    *,
    terminal: Session,
    **arguments: Any,
) -> tuple[EditResult, Reconstruction, Reconstruction]:
    """An edit and the source's reconstruction with and without compensation, with progress."""
    import rectiflow

    with evaluations(model, "inverting") as bar:

        def show(step: int, *_: object) -> None:
            bar.set_description(f"editing, step {step + 1} of {preset.num_inference_steps}")

        result = rectiflow.edit(
            model, source, preset=preset, callback_on_step_end=show, **arguments
        )
        bar.set_description("reconstructing")
        exact, plain = result.inversion.reconstruct(), result.inversion.reconstruct(False)
    for warning in result.warnings:
        terminal.warn(warning)
    return result, exact, plain


def method_name(name: str | None, preset: Preset) -> str:
    """The preset's name, marked where fields were replaced."""
    from rectiflow.invert.presets import PRESETS

    if name is None:
        name = next((n for n, known in PRESETS.items() if known.reference == preset.reference), "")
    return name if PRESETS.get(name) == preset else f"{name}, changed"


def about(
    model: FlowModel,
    result: EditResult,
    negative_prompt: str | None,
    origin: tuple[Path, Image.Image | None] | None,
    mask: Path | None,
    preset: str | None = None,
) -> dict[str, Any]:
    """What is kept in every picture of an edit, enough to make it again.

    Args:
        model: the network.
        result: the edit.
        negative_prompt: as it was given.
        origin: the source's file and, unless that is an inversion, its picture.
        mask: its file.
        preset: its name, if one was given.
    """
    image, picture = origin or (None, None)
    return record.of_model(model) | {
        "command": "edit",
        "source_prompt": result.inversion.source_prompt,
        "prompts": result.prompts,
        "negative_prompt": negative_prompt,
        "method": method_name(preset, result.preset),
        "settings": options.whole(result.preset),
        "grid": result.inversion.grid.tolist(),
        "seed": result.inversion.seed,
        "source": None if image is None else str(image.resolve()),
        "source_hash": source_hash(image, picture),
        "mask": None if mask is None else str(mask.resolve()),
        "mask_hash": None if mask is None else record.file_hash(mask),
    }


def source_hash(image: Path | None, picture: Image.Image | None) -> str | None:
    """What tells later whether a source is still the one that was edited."""
    if picture is not None:
        return record.pixel_hash(picture)
    return None if image is None else record.file_hash(image)


def write_pictures(
    folder: Path, result: EditResult, exact: Reconstruction, made: dict[str, Any]
) -> list[str]:
    """Write source, reconstruction and edits; the names of the edits."""
    from rectiflow.report import save_png

    inversion = result.inversion
    about_source: dict[str, Any] = {"command": "source", "source": made["source"]}
    if inversion.seed is not None:
        about_source = {
            **{key: made[key] for key in ("model", "weight_hash", "dtype", "device")},
            "command": "generate",
            "prompt": inversion.source_prompt,
            "negative_prompt": None,
            "seed": inversion.seed,
            "num_inference_steps": inversion.preset.num_inference_steps,
            "guidance_scale": inversion.preset.guidance_scale,
            "grid": inversion.preset.grid,
            "method": "euler",
            "height": result.source.height,
            "width": result.source.width,
        }
    save_png(result.source, folder / "source.png", about_source)
    save_png(exact.image, folder / "reconstruction.png", made | {"role": "reconstruction"})
    names = []
    for number, (image, prompt) in enumerate(zip(result.images, result.prompts, strict=True), 1):
        names.append(f"edit-{number}.png")
        about = {"role": "edit", "number": number, "prompt": prompt}
        save_png(image, folder / names[-1], made | about)
    return names


def as_data(
    result: EditResult,
    exact: Reconstruction,
    plain: Reconstruction,
    made: dict[str, Any],
    images: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    """The JSON of an edit; a PSNR of equal pictures is infinite, which JSON writes as null."""
    from rectiflow.report.pictures import psnr

    inversion, count = result.inversion, len(result.images)
    codec = inversion.images(inversion.latents)[0]
    shown = ("source_prompt", "negative_prompt", "seed", "source", "mask")
    return {
        "model": inversion.model.name,
        "preset": made["method"],
        "settings": made["settings"]
        | {key: made[key] for key in (*shown, "dtype", "device", "weight_hash")},
        "inversion": inversion_data(inversion) | {"compensation": float(exact.compensation.max())},
        "reconstruction": {
            "max_abs_latent": exact.max_abs_latent,
            "uncompensated_psnr": psnr(plain.image, codec),
            "psnr": psnr(exact.image, result.source),
            "psnr_codec": psnr(codec, result.source),
        },
        "edits": [
            {
                "prompt": prompt,
                "image": image,
                "nfe": result.edit_nfe // count,
                "seconds": result.edit_seconds / count,
            }
            for prompt, image in zip(result.prompts, images, strict=True)
        ],
        "nfe": result.nfe,
        "seconds": inversion.seconds + result.edit_seconds,
        "report": "report.html",
        "warnings": warnings,
    }


def inversion_data(inversion: Inversion) -> dict[str, Any]:
    """What an inversion cost and how good it is."""
    return {
        "nfe": inversion.nfe,
        "seconds": inversion.seconds,
        "noise": dataclasses.asdict(inversion.noise_statistics),
        "residual": inversion.residual,
    }


def summary(data: dict[str, Any], folder: Path) -> str:
    """An edit in a few lines."""
    nfe, kept = data["nfe"], data["reconstruction"]
    lines = [f"{folder / edit['image']}: {edit['prompt']}" for edit in data["edits"]]
    lines += [
        f"{nfe['total']} network samples ({nfe['inversion']} to invert, {nfe['editing']} to edit) "
        f"in {data['seconds']:.1f} s",
        f"source reconstructed: {_decibels(kept['psnr'])} (codec alone: "
        f"{_decibels(kept['psnr_codec'])}; without compensation "
        f"{_decibels(kept['uncompensated_psnr'])} to the codec's)",
        f"report: {folder / data['report']}",
    ]
    return "\n".join(lines)


def _decibels(psnr: float) -> str:
    return "identical" if math.isinf(psnr) else f"{psnr:.1f} dB"

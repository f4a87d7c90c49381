"""``rectiflow edit``: invert a picture, steer it, and report."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from rectiflow.app import options, record, results
from rectiflow.app.console import Session, command_line, evaluations, session
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.invert import Inversion, Preset, Reconstruction
    from rectiflow.models.base import FlowModel
    from rectiflow.steer import EditResult


def edit(
    context: typer.Context,
    to: Annotated[
        list[str],
        typer.Option(
            "--to",
            metavar="PROMPT",
            help="What the image should show instead; repeat for more edits.",
        ),
    ],
    image: Annotated[
        Path | None,
        typer.Argument(help="An image of any size, or an inversion saved by `rectiflow invert`."),
    ] = None,
    source_prompt: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="PROMPT", help="What the image shows now.", show_default=False
        ),
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

    What the prompt did not change stays. The folder gets source.png, reconstruction.png,
    edit-1.png, ... and report.html. With --seed instead of an image, what the model generates
    from --from is edited.
    """
    with session(as_json) as terminal:
        chosen, named = options.preset_of(preset, settings, steps=steps, guidance=guidance)
        if (image is None) == (seed is None):
            raise InputError("give an image or --seed, one of the two")
        if seed is not None and not source_prompt:
            raise InputError('--seed needs --from "...": what should be generated and then edited?')
        _check_kept(output, len(to), image, mask)
        reused = image is not None and image.suffix == ".safetensors"
        picture = _read(image, mask) if image is not None and not reused else None
        options.output_folder(output)
        loaded = options.load_model(model, dtype, device)
        source: Image.Image | Inversion | None = picture
        replaced: dict[str, Any] = {}
        if image is not None and reused:
            from rectiflow.invert import Inversion

            source = Inversion.load(image, loaded)
            # What was set one by one must not contradict the inversion; the rest is its own.
            replaced = {name: getattr(chosen, name) for name in named}
            chosen = source.preset if preset is None else chosen
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
            **replaced,
        )
        origin = None if image is None else (image, picture)
        made = results.about(loaded, result, negative, origin, mask, preset)
        images = results.write_pictures(output, result, exact, made)
        report = result.edit_report(
            reconstruction=(exact, plain),
            command=command_line(context),
            environment=record.environment(loaded),
        )
        report = dataclasses.replace(report, warnings=terminal.warnings)
        from rectiflow.report import write_edit_report

        write_edit_report(report, output / "report.html")
        data = results.as_data(result, exact, plain, made, images, terminal.warnings)
        terminal.result(data, results.summary(data, output))


def _check_kept(output: Path, edits: int, *inputs: Path | None) -> None:
    """Refuse to write over what is read: the picture to edit is often a result itself."""
    names = {"source.png", "reconstruction.png", *(f"edit-{n + 1}.png" for n in range(edits))}
    written = {(output / name).resolve() for name in names}
    for file in inputs:
        if file is not None and file.resolve() in written:
            raise InputError(f"{file} would be overwritten: choose another folder with -o")


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

    with evaluations(model, "inverting") as bar, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the result has them all, in full

        def show(step: int, *_: object) -> None:
            bar.set_description(f"editing, step {step + 1}")

        result = rectiflow.edit(
            model, source, preset=preset, callback_on_step_end=show, **arguments
        )
        bar.set_description("reconstructing")
        exact, plain = result.inversion.reconstruct(), result.inversion.reconstruct(False)
    for warning in result.warnings:
        terminal.warn(warning)
    return result, exact, plain

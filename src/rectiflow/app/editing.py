"""``rectiflow edit``: invert a picture, steer it, and report."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from rectiflow.app import options, record, results
from rectiflow.app.console import Session, command_line, session
from rectiflow.app.edit_job import Around, Job, check, check_alone, read, windows_of
from rectiflow.app.outputs import Outputs, Overwrite
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.invert import Inversion, Preset
    from rectiflow.models.base import FlowModel
    from rectiflow.steer import EditResult


KEPT_IN = {"memory": "the device's memory", "cpu": "main memory", "disk": "a temporary folder"}
WORTH_SAYING = 256 * 2**20
"""Bytes of kept features from which on a run says so, however much memory is free."""
CONSIDERABLE = 0.1
"""Likewise, the share of what is free."""


@options.takes_model()
def edit(
    *,
    context: typer.Context,
    to: Annotated[
        list[str] | None,
        typer.Option(
            "--to",
            metavar="PROMPT",
            help="What the image should show instead; repeat for more edits.",
            show_default=False,
        ),
    ] = None,
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
            help="An image of the same size: white, or opaque on transparent, where the edit may "
            "change it, grey where it may by that share.",
            show_default=False,
        ),
    ] = None,
    mask_invert: Annotated[
        bool, typer.Option("--mask-invert", help="The mask is black where the edit may change it.")
    ] = False,
    mask_resize: Annotated[
        bool, typer.Option("--mask-resize", help="Stretch a mask of another size.")
    ] = False,
    mask_grow: Annotated[
        int | None,
        typer.Option(help="Pixels by which the mask's white spreads.", show_default=False),
    ] = None,
    mask_blur: Annotated[
        float | None,
        typer.Option(help="Pixels over which its edges soften then.", show_default=False),
    ] = None,
    paste_back: Annotated[
        bool,
        typer.Option("--paste-back", help="Outside the mask, keep the image's pixels to the bit."),
    ] = False,
    crop_to_mask: Annotated[
        bool,
        typer.Option(
            "--crop-to-mask",
            help="Edit the mask's region alone at the model's own size, and put it back into the "
            "image: for large photographs.",
        ),
    ] = False,
    keep_alpha: Annotated[
        bool,
        typer.Option("--keep-alpha", help="Give the results the transparency of the image."),
    ] = False,
    num_images: Annotated[
        int,
        typer.Option(
            "--num-images",
            "-n",
            min=1,
            help="Variants of each edit, with noise of noise_seed, noise_seed + 1, ...",
        ),
    ] = 1,
    window: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WORD=RATIO",
            help="Hold an unchanged word over this share of the steps; repeatable.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="The share of the steps that are gone, from the image's end; 1 is all of them.",
            show_default=False,
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--batch",
            metavar="FILE.csv",
            help="Edit many: a row each of image,from,to"
            "[,negative,mask,seed,preset,num_images,output]. The same command again goes on where "
            "it stopped.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the pictures and the report, or of one edit a .png, .jpg or .webp "
            "file; of --batch, for a folder each and the results.",
        ),
    ] = Path("out"),
    report: Annotated[
        bool,
        typer.Option("--report", help="Beside a picture that -o names, write its report (.html)."),
    ] = False,
    overwrite: Overwrite = False,
    seed: options.Seed = None,
    model: options.ModelOptions,
    preset: options.PresetName = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    settings: options.Settings = None,
    diagnose: options.Diagnose = False,
    as_json: options.AsJson = False,
) -> None:
    """Edit an image by changing its prompt.

    What the prompt did not change stays. The folder gets source.png, edit-1.png, ...,
    report.html and, with --diagnose, reconstruction.png. With --seed instead of an image, what the
    model generates from --from is edited.
    """
    with session(as_json, resumable=table is not None) as terminal:

        def choose(name: str | None, reused: bool) -> tuple[Preset, list[str]]:
            given = [*(settings or []), *([] if strength is None else [f"strength={strength}"])]
            return options.preset_of(name, given, steps=steps, guidance=guidance, reused=reused)

        if table is not None:
            given = {"IMAGE": image, "--to": to, "--from": source_prompt, "--negative": negative,
                     "--mask": mask, "--seed": seed, "--mask-grow": mask_grow,
                     "--mask-blur": mask_blur, "--paste-back": paste_back,
                     "--crop-to-mask": crop_to_mask, "--keep-alpha": keep_alpha,
                     "--num-images": num_images > 1, "--window": window,
                     "--report": report}  # fmt: skip
            check_alone(given)
            from rectiflow.app.batch import run_batch

            drawn = Around(mask_invert, mask_resize)
            run_batch(table, output, choose, preset, model, terminal, diagnose, drawn, overwrite)
            return
        if not to:
            raise InputError('give --to "...": what should the image show instead?')
        chosen, named = choose(preset, image is not None and image.suffix == ".safetensors")
        job = Job(
            image, seed, source_prompt, to, negative, mask, output, chosen, preset, named,
            Around(mask_invert, mask_resize, mask_grow or 0, mask_blur or 0.0, paste_back,
                   crop_to_mask, keep_alpha, windows_of(window or [])),
            diagnose, num_images, report,
        )  # fmt: skip
        check(job)
        picture = read(job)
        outputs = job.outputs(overwrite)
        _, data = perform(model.load(), job, picture, command_line(context), terminal, outputs)
        terminal.result(data, results.summary(data, job.folder))


def perform(
    model: FlowModel,
    job: Job,
    picture: Image.Image | None,
    command: str,
    terminal: Session,
    outputs: Outputs,
    inversion: Inversion | None = None,
) -> tuple[EditResult, dict[str, Any]]:
    """Do an edit and write all of it to its folder.

    Args:
        model: the network.
        job: what to do.
        picture: of the image, from `read`.
        command: what the report says it was made by.
        terminal: for warnings.
        outputs: from `Job.outputs`.
        inversion: of the same source under the same prompt and preset, to be used again.

    Returns:
        The result, and its JSON.
    """
    source: Image.Image | Path | Inversion | None = inversion or picture
    chosen = options.preset_on(model, job.preset, job.preset_name, job.named)
    seed, replaced = job.seed, {}
    if job.reused and inversion is None:
        from rectiflow.invert import Inversion as Saved

        assert job.image is not None
        source = Saved.load(job.image, model)
        # What was set one by one must not contradict the inversion; the rest is its own.
        replaced = {name: getattr(chosen, name) for name in job.named}
        chosen = source.preset if job.preset_name is None else chosen
    elif seed is not None and "guidance_scale" in job.named:
        replaced = {"guidance_scale": chosen.guidance_scale}  # the picture's own too
    if job.around.keep_alpha and picture is not None:
        source = job.image  # the picture that was read is on white
    result = run(
        model,
        source,
        chosen,
        terminal=terminal,
        prompts=job.prompts,
        source_prompt=job.source_prompt,
        negative_prompt=job.negative,
        mask=job.mask,
        seed=None if inversion is not None else seed,
        diagnose=job.diagnose,
        num_images_per_prompt=job.num_images,
        **dataclasses.asdict(job.around),
        **replaced,
    )
    if inversion is not None and picture is not None:
        result = dataclasses.replace(result, source=picture)
    origin = None if job.image is None else (job.image, picture)
    made = results.about(model, result, job.negative, origin, job.mask, job.preset_name)
    made |= dataclasses.asdict(job.around)
    single = job.output.name if job.single else None
    images = results.write_pictures(outputs.file, result, made, single)
    if job.page is not None:
        from rectiflow.report import write_edit_report

        report = result.edit_report(command=command, environment=record.environment(model))
        report = dataclasses.replace(report, warnings=terminal.warnings)
        write_edit_report(report, outputs.file(job.page))
    outputs.finish()
    return result, results.as_data(result, made, images, job.page, terminal.warnings)


def run(
    model: FlowModel,
    source: Image.Image | Path | Inversion | None,
    preset: Preset,
    *,
    terminal: Session,
    **arguments: Any,
) -> EditResult:
    """An edit with its warnings."""
    import rectiflow
    from rectiflow.models.memory import out_of_memory_explained

    if isinstance(source, Image.Image):
        _say_what_is_kept(model, source, preset, terminal)
    with (
        warnings.catch_warnings(),
        out_of_memory_explained(model),
    ):
        warnings.simplefilter("ignore")  # the result has them all, in full
        result = rectiflow.edit(model, source, preset=preset, **arguments)
    for warning in result.warnings:
        terminal.warn(warning)
    return result


def _say_what_is_kept(
    model: FlowModel, picture: Image.Image, preset: Preset, terminal: Session
) -> None:
    """How much of the source's features a run will keep, before it begins, if it is much."""
    from rectiflow.invert.features import kept_bytes
    from rectiflow.models.images import fitted_size

    size = kept_bytes(model, preset, *fitted_size(picture, model.size_policy))
    if size and size >= min(WORTH_SAYING, CONSIDERABLE * _free(model, preset.keep_features)):
        terminal.note(
            f"keeping {size / 2**20:.0f} MiB of the source's features in "
            f"{KEPT_IN[preset.keep_features]}",
            once="keep_features",
        )


def _free(model: FlowModel, where: str) -> int:
    """Free bytes where features are kept."""
    import torch

    from rectiflow.models.memory import free_memory

    if where == "disk":
        return shutil.disk_usage(tempfile.gettempdir()).free
    return free_memory(torch.device("cpu") if where == "cpu" else model.device)[0]

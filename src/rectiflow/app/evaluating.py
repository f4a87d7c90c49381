"""``rectiflow evaluate``: the suites, their figures and pictures."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rectiflow.app import edit_options, emoji_edits, options, pie_bench
from rectiflow.app.console import Session, command_line, session
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from rectiflow.models.base import FlowModel


class Suite(StrEnum):
    """What can be evaluated."""

    emoji_models = "emoji-models"
    emoji_edits = "emoji-edits"
    pie_bench = "pie-bench"


def evaluate(
    context: typer.Context,
    suite: Annotated[
        Suite,
        typer.Argument(
            help="emoji-models: are the embedded models any good; "
            "emoji-edits: how close methods come to known right answers; "
            "pie-bench: a method on PIE-Bench's pictures, in any number of sittings."
        ),
    ],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Fewer pictures or edits.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for figures and pictures.", show_default=False),
    ] = None,
    model: options.ModelName = options.DEFAULT_MODEL,
    device: options.Device = None,
    dtype: options.NetworkDtype = options.Dtype.float32,
    as_json: options.AsJson = False,
    data: pie_bench.Data = None,
    make_data: pie_bench.MakeData = None,
    preset: pie_bench.PresetName = None,
    settings: pie_bench.Settings = None,
    workers: pie_bench.Workers = None,
    shard: pie_bench.Shard = None,
    metrics: pie_bench.Metrics = None,
    dino: pie_bench.Dino = None,
    clip: pie_bench.Clip = None,
    lpips_weights: pie_bench.LpipsWeights = None,
    methods: edit_options.Methods = None,
    first_seed: edit_options.FirstSeed = None,
    batch_size: edit_options.BatchSize = None,
    masks: edit_options.Masks = None,
    tuned: edit_options.Tuned = None,
    tune: edit_options.Tune = False,
    ablations: edit_options.Ablations = False,
    processes: edit_options.Processes = None,
) -> None:
    """Measure models or methods, on held-out scenes or PIE-Bench."""
    only_pie = pie_bench.PieOptions(
        data, make_data, preset, settings, workers, shard, metrics, dino, clip, lpips_weights
    )
    only_edits = edit_options.EditOptions(
        methods, first_seed, batch_size, masks, tuned, tune, ablations, processes
    )
    with session(as_json) as terminal:
        if suite is not Suite.emoji_edits and only_edits != edit_options.EditOptions():
            raise InputError(f"{suite.value} takes no option of emoji-edits: leave it out")
        if suite is Suite.pie_bench:
            pie_bench.pie_bench(
                terminal,
                only_pie,
                model=model,
                dtype=dtype,
                device=device,
                output=output,
                limit=limit,
            )
            return
        if only_pie != pie_bench.PieOptions():
            raise InputError(f"{suite.value} takes no option of pie-bench: leave it out")
        if suite is Suite.emoji_edits:
            emoji_edits.emoji_edits(
                terminal,
                only_edits,
                model=model,
                dtype=dtype,
                device=device,
                output=output,
                limit=limit,
                command=command_line(context),
            )
            return
        if output is not None:
            options.output_folder(output)
        _models(terminal, options.load_model(model, dtype, device), limit, output)


def _models(terminal: Session, model: FlowModel, limit: int | None, output: Path | None) -> None:
    from rectiflow.evaluate.emoji_models import evaluate_emoji_models

    figures, sheet = evaluate_emoji_models(model, limit=limit)
    if output is not None:
        of_default = model.name == options.DEFAULT_MODEL
        name = "emoji-models" if of_default else f"emoji-models-{Path(model.name).name}"
        emoji_edits.write_json(figures, output / f"{name}.json")
        _save(sheet, output / f"{name}.png")
    judged = figures["judge"]
    terminal.result(
        figures,
        f"codec {figures['vae_psnr']:.2f} dB, CLIP top-1 {figures['clip_top1']:.1%}\n"
        f"of {figures['samples']} pictures: emoji {judged['emoji']:.1%}, background "
        f"{judged['background']:.1%}, count {judged['count']:.1%}",
    )


def _save(image: Image.Image, file: Path) -> None:
    unfinished = file.with_name(file.name + ".tmp")
    image.save(unfinished, format="PNG")
    unfinished.replace(file)

"""``rectiflow evaluate``: the suites, their figures and pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import coco, edit_options, emoji_edits, options, pie_bench
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
    coco = "coco"


# Those of several suites; the others stand beside what they are for.
Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="pie-bench: folder with mapping_file.json and annotation_images/. coco: folder with "
        "annotations/ and val2017/ or val2014/.",
        show_default=False,
    ),
]
MakeData = Annotated[
    Path | None,
    typer.Option(
        "--make-data",
        help="pie-bench, coco: write such a folder of --limit edits or scenes of the emoji world, "
        "nothing else.",
        show_default=False,
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="pie-bench, coco: only make the I-th of N shares of the pictures, for machines that "
        "share a disk; run again without it to measure.",
        show_default=False,
    ),
]
Clip = Annotated[
    str | None,
    typer.Option(
        help="pie-bench, coco: folder or hub id of a CLIP: openai/clip-vit-large-patch14 for "
        "published figures of pie-bench, laion/CLIP-ViT-g-14-laion2B-s12B-b42K of coco, "
        "emoji-clip for the emoji world.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="emoji-edits, coco: edits or pictures at a time. By default 20 and 8.",
        show_default=False,
    ),
]


def evaluate(
    context: typer.Context,
    suite: Annotated[
        Suite,
        typer.Argument(
            help="emoji-models: are the embedded models any good; "
            "emoji-edits: how close methods come to known right answers; "
            "pie-bench: a method on PIE-Bench's pictures, in any number of sittings; "
            "coco: a model on COCO's captions, likewise."
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
    data: Data = None,
    make_data: MakeData = None,
    preset: pie_bench.PresetName = None,
    settings: pie_bench.Settings = None,
    workers: pie_bench.Workers = None,
    shard: Shard = None,
    metrics: pie_bench.Metrics = None,
    dino: pie_bench.Dino = None,
    clip: Clip = None,
    lpips_weights: pie_bench.LpipsWeights = None,
    methods: edit_options.Methods = None,
    first_seed: edit_options.FirstSeed = None,
    batch_size: BatchSize = None,
    masks: edit_options.Masks = None,
    tuned: edit_options.Tuned = None,
    tune: edit_options.Tune = False,
    ablations: edit_options.Ablations = False,
    processes: edit_options.Processes = None,
    split: coco.Split = None,
    ids: coco.Ids = None,
    steps: coco.Steps = None,
    guidance: coco.Guidance = None,
    solver: coco.Solver = None,
    seed: coco.Seed = None,
    inception_weights: coco.InceptionWeights = None,
) -> None:
    """Measure models or methods on held-out scenes, PIE-Bench, COCO."""
    pie_options = pie_bench.PieOptions(
        data, make_data, preset, settings, workers, shard, metrics, dino, clip, lpips_weights
    )
    edit_choices = edit_options.EditOptions(
        methods, first_seed, batch_size, masks, tuned, tune, ablations, processes
    )
    coco_options = coco.CocoOptions(
        data=data,
        make_data=make_data,
        split=split,
        ids=ids,
        shard=shard,
        batch_size=batch_size,
        steps=steps,
        guidance=guidance,
        solver=solver,
        seed=seed,
        clip=clip,
        inception_weights=inception_weights,
    )
    given = {
        Suite.pie_bench: pie_options,
        Suite.emoji_edits: edit_choices,
        Suite.coco: coco_options,
    }
    common: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "device": device,
        "output": output,
        "limit": limit,
    }
    with session(as_json) as terminal:
        _refuse_others(suite, given)
        if suite is Suite.pie_bench:
            pie_bench.pie_bench(terminal, pie_options, **common)
            return
        if suite is Suite.coco:
            coco.coco(terminal, coco_options, **common)
            return
        if suite is Suite.emoji_edits:
            line = command_line(context)
            emoji_edits.emoji_edits(terminal, edit_choices, **common, command=line)
            return
        if output is not None:
            options.output_folder(output)
        _models(terminal, options.load_model(model, dtype, device), limit, output)


def _refuse_others(suite: Suite, given: Mapping[Suite, Any]) -> None:
    """Refuse an option that only other suites take."""
    own = {field.name for field in dataclasses.fields(given[suite])} if suite in given else set()
    for chosen in given.values():
        for field in dataclasses.fields(chosen):
            if field.name in own or getattr(chosen, field.name) == field.default:
                continue
            owners = [other.value for other, its in given.items() if hasattr(its, field.name)]
            flag = "set" if field.name == "settings" else field.name.replace("_", "-")
            raise InputError(
                f"{suite.value} takes no --{flag} (an option of {' and '.join(owners)}): "
                "leave it out"
            )


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

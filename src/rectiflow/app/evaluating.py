"""``rectiflow evaluate``: the suites, their figures and pictures."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options, pie_bench
from rectiflow.app.console import Session, json_text, session
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from rectiflow.models.base import FlowModel


class Suite(StrEnum):
    """What can be evaluated."""

    emoji_models = "emoji-models"
    emoji_edits = "emoji-edits"
    pie_bench = "pie-bench"


def evaluate(
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
) -> None:
    """Measure models or editing methods on held-out scenes, or on PIE-Bench."""
    only_pie = pie_bench.PieOptions(
        data, make_data, preset, settings, workers, shard, metrics, dino, clip, lpips_weights
    )
    with session(as_json) as terminal:
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
        if output is not None:
            options.output_folder(output)
        loaded = options.load_model(model, dtype, device)
        if suite is Suite.emoji_models:
            _models(terminal, loaded, limit, output)
        else:
            _edits(terminal, loaded, limit, output)


def _models(terminal: Session, model: FlowModel, limit: int | None, output: Path | None) -> None:
    from rectiflow.evaluate.emoji_models import evaluate_emoji_models

    figures, sheet = evaluate_emoji_models(model, limit=limit)
    if output is not None:
        _write(figures, output / "emoji-models.json")
        _save(sheet, output / "emoji-models.png")
    judged = figures["judge"]
    terminal.result(
        figures,
        f"codec {figures['vae_psnr']:.2f} dB, CLIP top-1 {figures['clip_top1']:.1%}\n"
        f"of {figures['samples']} pictures: emoji {judged['emoji']:.1%}, background "
        f"{judged['background']:.1%}, count {judged['count']:.1%}",
    )


def _edits(terminal: Session, model: FlowModel, limit: int | None, output: Path | None) -> None:
    from rectiflow.evaluate.emoji_edits import evaluate_emoji_edits

    figures, pictures = evaluate_emoji_edits(model, limit=limit)
    if output is not None:
        _write(figures, output / "emoji-edits.json")
        _write_pictures(pictures, output)
        _save(_sheet(pictures), output / "emoji-edits.png")
    lines = [f"{figures['n']} edits; PSNR to the true target, network samples, seconds per edit"]
    lines += [
        f"  {name:10} {entry['target_psnr']:6.2f} dB {entry['nfe']:7.1f} {entry['seconds']:7.2f} s"
        for name, entry in figures["methods"].items()
    ]
    lines += [
        f"  {name}: {entry['mean']:+.2f} dB, 95 % interval {entry['low']:+.2f} to "
        f"{entry['high']:+.2f}"
        for name, entry in figures["paired"].items()
    ]
    terminal.result(figures, "\n".join(lines))


def _write(figures: dict[str, Any], file: Path) -> None:
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(json_text(figures) + "\n", encoding="utf-8")
    unfinished.replace(file)


def _write_pictures(pictures: dict[str, Tensor], output: Path) -> None:
    """Every method's results, numbered as the edits are."""
    from rectiflow.models.images import to_pil

    for method, images in pictures.items():
        folder = options.output_folder(output / method)
        for number, image in enumerate(to_pil(images), start=1):
            _save(image, folder / f"{number:03d}.png")


def _sheet(pictures: dict[str, Tensor]) -> Image.Image:
    """A row per edit, a column per method; what doing nothing and the codec give at its ends."""
    from rectiflow.report.sheet import contact_sheet

    methods = sorted(pictures, key=lambda name: (name != "nothing") + (name == "bound"))
    columns = [pictures[method].permute(0, 2, 3, 1).numpy() for method in methods]
    cells = [cell for row in zip(*columns, strict=True) for cell in row]
    captions = methods * len(columns[0])
    return contact_sheet(cells, columns=len(methods), captions=captions)


def _save(image: Image.Image, file: Path) -> None:
    unfinished = file.with_name(file.name + ".tmp")
    image.save(unfinished, format="PNG")
    unfinished.replace(file)

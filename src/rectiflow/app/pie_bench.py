"""``rectiflow evaluate pie-bench``: its options, and what it prints."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rectiflow.app import options
from rectiflow.app.console import Session, session
from rectiflow.app.suites import Limit, Output, Shard, share_of, write_json
from rectiflow.errors import InputError


class Variant(StrEnum):
    """Which metrics are computed."""

    both = "both"
    quirk = "quirk"
    corrected = "corrected"


# Metric → heading and factor, as papers print them.
COLUMNS = {
    "structure_distance": ("structure ×10³", 1e3),
    "background_psnr": ("PSNR", 1.0),
    "background_lpips": ("LPIPS ×10³", 1e3),
    "background_mse": ("MSE ×10⁴", 1e4),
    "background_ssim": ("SSIM ×10²", 1e2),
    "clip_whole": ("CLIP", 1.0),
    "clip_edited": ("CLIP edited", 1.0),
}


def _make_data(terminal: Session, folder: Path, limit: int | None) -> None:
    """Write edits of the emoji world as a PIE-Bench folder."""
    from rectiflow.evaluate.pie_bench_emoji import make_emoji_pie

    n = 120 if limit is None else limit
    make_emoji_pie(options.output_folder(folder), n)
    terminal.result({"data": str(folder), "n": n}, f"{n} edits in {folder}")


@options.takes_model()
def pie_bench(
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder with mapping_file.json and annotation_images/.", show_default=False
        ),
    ] = None,
    output: Output = None,
    limit: Limit = None,
    preset: options.PresetName = None,
    settings: options.Settings = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1, help="Processes that edit side by side, each with its own copy of the model."
        ),
    ] = 1,
    shard: Shard = None,
    metrics: Annotated[
        Variant,
        typer.Option(help="quirk is what its authors compute, corrected what one would expect."),
    ] = Variant.both,
    dino: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of DINO: facebook/dino-vitb8 for published figures.",
            show_default=False,
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of a CLIP: openai/clip-vit-large-patch14 for published "
            "figures, emoji-clip for the emoji world.",
            show_default=False,
        ),
    ] = None,
    lpips_weights: Annotated[
        Path | None,
        typer.Option(help="safetensors file of LPIPS with SqueezeNet.", show_default=False),
    ] = None,
    make_data: Annotated[
        Path | None,
        typer.Option(
            help="Write such a folder of --limit edits of the emoji world, nothing else.",
            show_default=False,
        ),
    ] = None,
    model: options.ModelOptions,
    as_json: options.AsJson = False,
) -> None:
    """Measure a method on PIE-Bench, in several sittings.

    Results that are there are not made again; when all are, they are measured.
    """
    with session(as_json, resumable=True) as terminal:
        if make_data is not None:
            _make_data(terminal, make_data, limit)
            return
        if data is None:
            raise InputError("pie-bench needs --data, the folder with mapping_file.json in it")
        if output is None:
            raise InputError("pie-bench needs -o, a folder for the results")
        share = share_of(shard)
        chosen, _ = options.preset_of(preset, settings)
        from rectiflow.evaluate.pie_bench import Run, make_results, measure, write_tables
        from rectiflow.evaluate.pie_bench_data import read_pie_bench
        from rectiflow.evaluate.pie_bench_metrics import VARIANTS, load_networks
        from rectiflow.invert.presets import DEFAULT_PRESET

        folder, name = options.output_folder(output), preset or DEFAULT_PRESET
        run = Run(read_pie_bench(data, limit), chosen, name, folder)
        loaded = model.load()
        # Before the pictures are made: a network that cannot be loaded is found at once.
        networks = load_networks(dino, clip, lpips_weights, loaded.device)
        left = make_results(loaded, run, workers=workers, shard=share or (1, 1))
        if share is not None:
            done = len(run.data.edits) - len(left)
            terminal.result(
                {"method": run.name, "shard": list(share), "done": done, "left": len(left)},
                f"{run.name}: {done} of {len(run.data.edits)} results are there; when all are, "
                "the same command without --shard measures them",
            )
            return
        if networks.missing:
            terminal.warn(
                f"not given, so not measured: {', '.join(networks.missing)}; see --dino, --clip "
                "and --lpips-weights"
            )
        variants = VARIANTS if metrics is Variant.both else (metrics.value,)
        figures, rows = measure(run, networks, variants)
        write_tables(run, figures, rows)
        write_json(run.folder / "figures.json", figures)
        terminal.result(figures, summary(figures))


def summary(figures: dict[str, Any]) -> str:
    """A line per variant under a line of headings."""
    variants = [variant for variant in ("quirk", "corrected") if variant in figures]
    found = figures[variants[0]]
    shown = [name for name in COLUMNS if name in found]
    backgrounds = found["background_psnr"]["n"]
    lines = [
        f"{figures['method']}: {figures['n']} pictures ({backgrounds} with a background), "
        f"{figures['nfe']:.1f} network samples each",
        f"{'':10}" + "".join(f"{COLUMNS[name][0]:>16}" for name in shown),
    ]
    for variant in variants:
        cells = [_cell(figures[variant][name]["mean"], COLUMNS[name][1]) for name in shown]
        lines.append(f"{variant:10}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _cell(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{factor * value:.2f}"

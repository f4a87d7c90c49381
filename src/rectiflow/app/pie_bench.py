"""``rectiflow evaluate pie-bench``: its options, and what it prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from rectiflow.app import options
from rectiflow.app.console import Session, json_text
from rectiflow.errors import InputError


class Variant(StrEnum):
    """Which metrics are computed."""

    both = "both"
    quirk = "quirk"
    corrected = "corrected"


Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="pie-bench: folder with mapping_file.json and annotation_images/.",
        show_default=False,
    ),
]
MakeData = Annotated[
    Path | None,
    typer.Option(
        "--make-data",
        help="pie-bench: write such a folder of --limit edits of the emoji world, nothing else.",
        show_default=False,
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="pie-bench: the method; `rectiflow models` lists them. By default exact.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="pie-bench: replace a field of the preset; repeatable.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="pie-bench: processes that edit side by side, each with its own copy of the model.",
        show_default=False,
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="pie-bench: only make the I-th of N shares of the results, for machines that share a "
        "disk; run again without it to measure.",
        show_default=False,
    ),
]
Metrics = Annotated[
    Variant | None,
    typer.Option(
        help="pie-bench: quirk is what its authors compute, corrected what one would expect. "
        "By default both.",
        show_default=False,
    ),
]
Dino = Annotated[
    str | None,
    typer.Option(
        help="pie-bench: folder or hub id of DINO: facebook/dino-vitb8 for published figures.",
        show_default=False,
    ),
]
Clip = Annotated[
    str | None,
    typer.Option(
        help="pie-bench: folder or hub id of a CLIP: openai/clip-vit-large-patch14 for published "
        "figures, emoji-clip for the emoji world.",
        show_default=False,
    ),
]
LpipsWeights = Annotated[
    Path | None,
    typer.Option(
        "--lpips-weights",
        help="pie-bench: safetensors file of LPIPS with SqueezeNet.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class PieOptions:
    """The options that only pie-bench takes, as they were given."""

    data: Path | None = None
    make_data: Path | None = None
    preset: str | None = None
    settings: list[str] | None = None
    workers: int | None = None
    shard: str | None = None
    metrics: Variant | None = None
    dino: str | None = None
    clip: str | None = None
    lpips_weights: Path | None = None


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


def make_data(terminal: Session, folder: Path, limit: int | None) -> None:
    """Write edits of the emoji world as a PIE-Bench folder."""
    from rectiflow.evaluate.pie_bench_emoji import make_emoji_pie

    n = 120 if limit is None else limit
    make_emoji_pie(options.output_folder(folder), n)
    terminal.result({"data": str(folder), "n": n}, f"{n} edits in {folder}")


def pie_bench(
    terminal: Session,
    given: PieOptions,
    *,
    model: str,
    dtype: options.Dtype,
    device: str | None,
    output: Path | None,
    limit: int | None,
) -> None:
    """Make what results are missing, then measure all of them."""
    if given.make_data is not None:
        make_data(terminal, given.make_data, limit)
        return
    if given.data is None:
        raise InputError("pie-bench needs --data, the folder with mapping_file.json in it")
    if output is None:
        raise InputError("pie-bench needs -o, a folder for the results")
    share = _shard(given.shard)
    chosen, _ = options.preset_of(given.preset, given.settings)
    from rectiflow.evaluate.pie_bench import Run, make_results, measure, write_tables
    from rectiflow.evaluate.pie_bench_data import read_pie_bench
    from rectiflow.evaluate.pie_bench_metrics import VARIANTS, load_networks

    pictures = read_pie_bench(given.data, limit)
    run = Run(pictures, chosen, given.preset or "exact", options.output_folder(output))
    loaded = options.load_model(model, dtype, device)
    # Before the pictures are made: a network that cannot be loaded is found at once.
    networks = load_networks(given.dino, given.clip, given.lpips_weights, loaded.device)
    left = make_results(loaded, run, workers=given.workers or 1, shard=share or (1, 1))
    if share is not None:
        done = len(run.data.edits) - len(left)
        terminal.result(
            {"method": run.name, "shard": list(share), "done": done, "left": len(left)},
            f"{run.name}: {done} of {len(run.data.edits)} results are there; when all are, the "
            "same command without --shard measures them",
        )
        return
    if networks.missing:
        terminal.warn(
            f"not given, so not measured: {', '.join(networks.missing)}; see --dino, --clip and "
            "--lpips-weights"
        )
    variants = VARIANTS if given.metrics in (None, Variant.both) else (given.metrics.value,)
    figures, rows = measure(run, networks, variants)
    write_tables(run, figures, rows)
    file = run.folder / "figures.json"
    unfinished = file.with_name(file.name + ".tmp")
    unfinished.write_text(json_text(figures) + "\n", encoding="utf-8")
    unfinished.replace(file)
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


def _shard(text: str | None) -> tuple[int, int] | None:
    """(I, N) of "I/N"."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"--shard is {text!r}: give I/N with I from 1 to N, such as 1/4")
    return int(found[1]), int(found[2])

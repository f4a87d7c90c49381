"""``rectiflow evaluate emoji-edits``: what it writes and what it prints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rectiflow.app import edit_options, options
from rectiflow.app.console import Session, command_line, session
from rectiflow.app.edit_options import EditOptions
from rectiflow.app.outputs import Outputs, Overwrite
from rectiflow.app.suites import BatchSize, Limit, Output, write_json
from rectiflow.errors import InputError
from rectiflow.files import write_csv, write_whole
from rectiflow.guarded import read_json

if TYPE_CHECKING:
    from rectiflow.evaluate.emoji_edits import Benchmark
    from rectiflow.models.base import FlowModel


@options.takes_model()
def emoji_edits(
    *,
    context: typer.Context,
    limit: Limit = None,
    output: Output = None,
    overwrite: Overwrite = False,
    methods: edit_options.Methods = None,
    masks: edit_options.Masks = None,
    tuned: edit_options.Tuned = None,
    tune: edit_options.Tune = False,
    ablations: edit_options.Ablations = False,
    first_seed: edit_options.FirstSeed = None,
    batch_size: BatchSize = None,
    processes: edit_options.Processes = 1,
    update: edit_options.Update = False,
    model: options.ModelOptions,
    as_json: options.AsJson = False,
) -> None:
    """Measure editing methods against known right answers.

    What an output folder has is not made again.
    """
    given = EditOptions(
        methods, first_seed, batch_size, masks, tuned, tune, ablations, processes, update
    )
    with session(as_json, resumable=output is not None) as terminal:
        given.check()
        chosen = _chosen(tuned)
        outputs = None if output is None else _outputs(output, given, overwrite)
        loaded = model.load()
        if tune:
            _tune(terminal, given, _bench(loaded, given, output, tuning=True), outputs, limit)
        elif ablations:
            _ablations(terminal, given, _bench(loaded, given, output), outputs, limit)
        else:
            _table(terminal, given, loaded, chosen, outputs, limit, command_line(context))


def _outputs(output: Path, given: EditOptions, overwrite: bool) -> Outputs:
    """Where the files go, known to be free or ours."""
    name = _names(given)[0]
    names = [f"{name}.json", f"{name}.csv"]
    names += [] if given.update else [f"{name}-per-edit.csv", f"{name}.html"]
    if given.tune:
        names = ["tuning.json"]
    if given.ablations:
        names = [f"ablations/*{ending}" for ending in (".json", ".csv", ".svg")]
    # An update is of what is there.
    return Outputs(output, names, overwrite=overwrite or given.update)


def _names(given: EditOptions) -> list[str]:
    """Of the table, and of the other one, with masks or without."""
    names = ["emoji-edits", "emoji-edits-masked"]
    return names[::-1] if given.masks is edit_options.Masked.given else names


def _chosen(file: Path | None) -> dict[str, dict[str, Any]]:
    from rectiflow.evaluate.edit_tuning import chosen

    if file is None:
        return {}
    return chosen(read_json(file, None))


def _bench(
    model: FlowModel, given: EditOptions, output: Path | None, *, tuning: bool = False
) -> Benchmark:
    from rectiflow.evaluate.emoji_edits import BATCH, REPORTED_SEED, TUNING_SEED, Benchmark

    first_seed = TUNING_SEED if tuning else REPORTED_SEED
    return Benchmark(
        model,
        folder=None if output is None else output / "parts",
        first_seed=first_seed if given.first_seed is None else given.first_seed,
        batch_size=given.batch_size or BATCH,
        masks="none" if given.masks is None else given.masks.value,
    )


def _table(
    terminal: Session,
    given: EditOptions,
    model: FlowModel,
    chosen: dict[str, dict[str, Any]],
    outputs: Outputs | None,
    limit: int | None,
    command: str,
) -> None:
    from dataclasses import replace

    from rectiflow.evaluate.edit_page import edits_page
    from rectiflow.evaluate.edit_table import (
        evaluate_emoji_edits,
        per_edit,
        per_method,
        table,
        updated,
    )
    from rectiflow.evaluate.edit_workers import work_ahead
    from rectiflow.evaluate.emoji_edits import cases, chosen_methods
    from rectiflow.evaluate.emoji_models import load_clip
    from rectiflow.models.load import WEIGHTS

    clip = WEIGHTS / "emoji-clip"
    output = None if outputs is None else outputs.folder
    bench = replace(_bench(model, given, output), clip=load_clip(clip))
    rows = chosen_methods(model, given.names, chosen)
    name, other = _names(given)
    known = None
    if given.update:  # what cannot be put together is found before the work
        known = _known(output, name)
        updated(known, table(bench, {}, {}, cases(limit, bench.first_seed)))
    work_ahead(bench, list(rows.items()), limit, given.processes, clip)
    figures, parts, edits = evaluate_emoji_edits(bench, rows, limit=limit)
    shown = figures if known is None else updated(known, figures)
    if outputs is not None:
        write_json(outputs.file(f"{name}.json"), shown)
        write_csv(outputs.file(f"{name}.csv"), per_method(shown))
        if known is None:
            write_csv(outputs.file(f"{name}-per-edit.csv"), per_edit(parts, edits))
            tables = [figures, *_comparable(outputs.folder / f"{other}.json", figures)]
            page = edits_page(tables, parts, edits, command=command)
            write_whole(outputs.file(f"{name}.html"), page)
        outputs.finish(whole=known is None)
    terminal.result(shown, table_text(shown))


def _known(output: Path | None, name: str) -> dict[str, Any]:
    """The table that is there."""
    file = None if output is None else output / f"{name}.json"
    if file is None or not file.is_file():
        raise InputError(f"--update needs -o with a table {name}.json: make it without --update")
    known: dict[str, Any] = read_json(file)
    return known


def _comparable(file: Path, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The table made with or without masks before, if it is of the same edits and model."""
    if not file.exists():
        return []
    known = read_json(file)
    same = ("n", "seeds", "weight_hash", "dtype")
    return [known] if all(known.get(key) == figures[key] for key in same) else []


def table_text(figures: dict[str, Any]) -> str:
    """The table as it is printed."""
    width = max(len(name) for name in figures["methods"])
    lines = [
        f"{figures['n']} edits, masks {figures['masks']}; PSNR to the true target (95 % interval), "
        "squared error inside and outside the edit, network samples and seconds per edit"
    ]
    for name, entry in figures["methods"].items():
        low, high = entry["intervals"]["target_psnr"]
        outside = "-" if entry["outside_mse"] is None else f"{entry['outside_mse']:.4f}"
        lines.append(
            f"  {name:{width}} {entry['target_psnr']:6.2f} dB ({low:.2f} to {high:.2f}) "
            f"{entry['inside_mse']:.4f} {outside:>6} {entry['nfe']:6.1f} {entry['seconds']:6.2f} s"
        )
    lines += [
        f"  {name}: {entry['mean']:+.2f} dB, 95 % interval {entry['low']:+.2f} to "
        f"{entry['high']:+.2f}"
        for name, entry in figures["paired"].items()
    ]
    return "\n".join(lines)


def _tune(
    terminal: Session,
    given: EditOptions,
    bench: Benchmark,
    outputs: Outputs | None,
    limit: int | None,
) -> None:
    from rectiflow.evaluate.edit_tuning import LIMIT, choices, tune
    from rectiflow.evaluate.edit_workers import work_ahead

    n = LIMIT if limit is None else limit
    jobs = [(name, preset) for name, tried in choices(given.names).items() for _, preset in tried]
    work_ahead(bench, jobs, n, given.processes)
    figures = tune(bench, given.names, limit=n)
    if outputs is not None:
        write_json(outputs.file("tuning.json"), figures)
        outputs.finish()
    width = max(len(name) for name in figures["methods"])
    lines = [f"{figures['n']} tuning edits; PSNR to the true target, published and chosen"]
    lines += [
        f"  {name:{width}} {entry['published']:6.2f} {entry['target_psnr']:6.2f} dB  "
        f"{setting_text(entry['chosen'])}"
        for name, entry in figures["methods"].items()
    ]
    terminal.result(figures, "\n".join(lines))


def setting_text(settings: dict[str, Any]) -> str:
    """Settings on a line.

    Example:
        >>> setting_text({"eta": 0.5, "strength": 0.8})
        'eta=0.5 strength=0.8'
    """
    return " ".join(f"{name}={value}" for name, value in settings.items()) or "as published"


def _ablations(
    terminal: Session,
    given: EditOptions,
    bench: Benchmark,
    outputs: Outputs | None,
    limit: int | None,
) -> None:
    from rectiflow.evaluate.edit_ablations import ABLATIONS, LIMIT, ablate, bench_for
    from rectiflow.evaluate.edit_plots import ablation_plots
    from rectiflow.evaluate.edit_workers import work_ahead
    from rectiflow.report.figures import save_figure

    n = LIMIT if limit is None else limit
    found: dict[str, Any] = {}
    lines: list[str] = []
    for name, ablation in ABLATIONS.items():
        work_ahead(bench_for(bench, name), ablation.jobs, n, given.processes)
        done = ablate(bench, name, limit=n)
        found[name] = done.figures
        if outputs is not None:
            write_json(outputs.file(f"ablations/{name}.json"), done.figures)
            write_csv(outputs.file(f"ablations/{name}.csv"), done.rows)
            for shown, plot in ablation_plots(done.figures).items():
                ending = "" if shown == "target_psnr" else f"-{shown.replace('_', '-')}"
                save_figure(plot, outputs.file(f"ablations/{name}{ending}.svg"))
        lines += _ablation_text(name, done.figures["series"].values())
    if outputs is not None:
        outputs.finish()
    terminal.result({"n": n, "ablations": found}, "\n".join(lines))


def _ablation_text(name: str, series: Iterable[Any]) -> list[str]:
    return [name, *(f"  {entry['sentence']}" for entry in series)]

"""``rectiflow demo``: the main job on the embedded default, beside its right answers."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import editing, options, record, results
from rectiflow.app.console import Session, command_line, session
from rectiflow.app.edit_job import Around
from rectiflow.app.outputs import Outputs, Overwrite

if TYPE_CHECKING:
    from rectiflow.emoji.edits import EditCase
    from rectiflow.models.base import FlowModel
    from rectiflow.report import EditReport

NAMES = ("source.png", "edit-1.png", "target.png", "reconstruction.png", "report.html")
"""Of the files of a case."""
SIZE = 64
"""Side of the world's pictures."""

CASES: tuple[tuple[str, int], ...] = (
    ("object", 1_000_000),
    ("color", 1_000_000),
    ("quantity", 1_000_000),
    ("content", 1_000_000),
    ("background", 1_000_000),
    ("style", 1_000_000),
    ("add", 1_000_000),
    ("text", 1_000_000),
)
"""Kind and seed of each edit: of the tuning seeds, so the benchmark's stay unseen."""

INTRODUCTION = (
    "Each picture is edited by changing its caption; what the caption did not change should stay. "
    "The pictures come from a small world in which the right answer to every edit is known; it is "
    "shown beside ours."
)


@options.takes_model()
def demo(
    *,
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the report.")] = Path(
        "demo"
    ),
    overwrite: Overwrite = False,
    model: options.ModelOptions,
    preset: options.PresetName = None,
    diagnose: options.Diagnose = False,
    as_json: options.AsJson = False,
) -> None:
    """Edit bundled pictures in eight ways, beside the right answers.

    It takes about two minutes of processor time and ends with a report to look at.
    """
    with session(as_json) as terminal:
        from rectiflow.emoji.edits import sample_edit
        from rectiflow.progress import progress
        from rectiflow.report import write_gallery

        started = time.perf_counter()
        chosen, _ = options.preset_of(preset, None)
        names = [f"cases/{kind}/{name}" for kind, _ in CASES for name in NAMES]
        outputs = Outputs(output, [*names, "report.html"], overwrite=overwrite)
        loaded = model.load()
        chosen = options.preset_on(loaded, chosen, preset, [])
        shown: list[EditReport] = []
        spent: Counter[str] = Counter()
        entries: list[dict[str, Any]] = []
        for kind, seed in progress(CASES, desc="edits", unit="edit", leave=False):
            folder = output / "cases" / kind
            case = sample_edit(kind, seed)
            report, entry = _case(loaded, case, folder, chosen, terminal, diagnose, outputs)
            spent.update(entry["nfe"])
            shown.append(report)
            entries.append(entry | {"kind": kind, "seed": seed})
            for key in ("image", "report"):
                entries[-1][key] = str((folder / entry[key]).relative_to(output))
        page = write_gallery(
            shown,
            outputs.file("report.html"),
            title="Eight edits with known answers",
            introduction=INTRODUCTION,
            links=[entry["report"] for entry in entries],
            command=command_line(context),
            environment=record.environment(loaded),
        )
        outputs.finish()
        seconds = time.perf_counter() - started
        data = {
            "model": loaded.name,
            "preset": results.method_name(preset, chosen),
            "cases": entries,
            "nfe": dict(spent),
            "seconds": seconds,
            "report": page.name,
            "warnings": terminal.warnings,
        }
        lines = [
            f"{entry['kind']:10} {entry['target_psnr']:5.1f} dB to the right answer "
            f"(doing nothing: {entry['nothing_psnr']:.1f} dB)  {entry['prompt']}"
            for entry in entries
        ]
        lines.append(f"{len(entries)} edits: {results.samples(dict(spent))} in {seconds:.0f} s")
        lines.append(f"report: {page}  ({page.resolve().as_uri()})")
        terminal.result(data, "\n".join(lines))


def _case(
    model: FlowModel,
    case: EditCase,
    folder: Path,
    preset: Any,
    terminal: Session,
    diagnose: bool,
    outputs: Outputs,
) -> tuple[EditReport, dict[str, Any]]:
    """One edit with pictures and a report of its own."""
    from rectiflow.emoji.render import render
    from rectiflow.report import save_png, write_edit_report
    from rectiflow.report.pictures import psnr

    source, target = render(case.source, SIZE), render(case.target, SIZE)
    result = editing.run(
        model,
        source,
        preset,
        terminal=terminal,
        prompts=[case.target_prompt],
        source_prompt=case.source_prompt,
        diagnose=diagnose,
    )
    made = results.about(model, result, None, (folder / "source.png", source), None)
    made |= dataclasses.asdict(Around())

    def place(name: str) -> Path:
        return outputs.file(f"cases/{case.kind}/{name}")

    (image,) = results.write_pictures(place, result, made, None)
    save_png(target, place("target.png"), {"command": "source", "prompt": case.target_prompt})
    report = result.edit_report(
        command=_command(model, case, folder, made["method"], diagnose),
        title=f"{case.kind.capitalize()}: {case.target_prompt}",
        kind=case.kind,
        targets=[target],
        environment=record.environment(model),
    )
    write_edit_report(report, place("report.html"))
    return report, {
        "source_prompt": case.source_prompt,
        "prompt": case.target_prompt,
        "image": image,
        "report": "report.html",
        "target_psnr": psnr(result.images[0], target),
        "nothing_psnr": psnr(source, target),
        "nfe": result.nfe,
        "seconds": result.seconds["total"],
    }


def _command(model: FlowModel, case: EditCase, folder: Path, preset: str, diagnose: bool) -> str:
    """What makes this edit again by itself."""
    from rectiflow.invert.presets import DEFAULT_PRESET

    words = ["rectiflow", "edit", str(folder / "source.png")]
    words += ["--from", case.source_prompt, "--to", case.target_prompt]
    words += ["--preset", preset] if preset != DEFAULT_PRESET else []
    words += ["--diagnose"] if diagnose else []
    words += ["--model", model.name] if model.name != options.DEFAULT_MODEL else []
    return shlex.join(words)

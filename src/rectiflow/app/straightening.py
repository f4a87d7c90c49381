"""``rectiflow reflow`` and ``rectiflow distill``: from a store of pairs to a straighter flow."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rectiflow.app import options, run_options
from rectiflow.app.console import Session, session
from rectiflow.errors import InputError
from rectiflow.files import check_begun

if TYPE_CHECKING:
    from rectiflow.straighten.phases import Outcome

Kind = Literal["reflow", "distill"]
Settings = dict[str, Any]

Pairs = Annotated[
    str | None,
    typer.Option(metavar="URI", help="The store of pairs to train on.", show_default=False),
]
takes_model = options.takes_model(
    None,
    help="What to begin as: the teacher that made the pairs, or a student of it.  [default: the "
    "teacher]",
    # accelerate says where it is trained, and mixed_precision in what.
    without=("device", "dtype", "offload"),
)
Configuration = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="NAME|FILE",
        help="A named configuration (instaflow-preliminary, instaflow-0.9b, instaflow-1.7b, toy) "
        "or a YAML file of settings.",
        show_default=False,
    ),
]
OnlyPhase = Annotated[
    str | None,
    typer.Option("--phase", help="Run one phase of the configuration only.", show_default=False),
]
AnyTeacher = Annotated[
    bool, typer.Option("--any-teacher", help="Accept pairs that another teacher made.")
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="Folder of the run.  [default: runs/COMMAND]", show_default=False
    ),
]


@takes_model
def reflow(
    *,
    pairs: Pairs = None,
    model: options.ModelOptions,
    config: Configuration = None,
    settings: run_options.Assignments = None,
    phase: OnlyPhase = None,
    any_teacher: AnyTeacher = False,
    resume: run_options.Resume = "latest",
    max_minutes: run_options.MaxMinutes = None,
    output: RunFolder = None,
    export: run_options.Export = None,
    as_json: options.AsJson = False,
) -> None:
    """Straighten a flow on pairs of noise and images.

    The same command again goes on where it stopped. The run's folder gets its configuration, a
    log, sheets of samples and checkpoints, and in the end the model. SIGTERM, SIGUSR1 and Ctrl-C
    leave a checkpoint, and exit code 75 says that the run is to be gone on with; a second Ctrl-C
    stops at once. With more --set steps a finished run goes on, too.
    """
    given = _given(config, settings, pairs, model, any_teacher)
    _straighten("reflow", given, config, phase, resume, max_minutes, output, export, as_json)


@takes_model
def distill(
    *,
    pairs: Pairs = None,
    model: options.ModelOptions,
    config: Configuration = None,
    settings: run_options.Assignments = None,
    phase: OnlyPhase = None,
    any_teacher: AnyTeacher = False,
    resume: run_options.Resume = "latest",
    max_minutes: run_options.MaxMinutes = None,
    output: RunFolder = None,
    export: run_options.Export = None,
    as_json: options.AsJson = False,
) -> None:
    """Teach a flow to take one step, or a few.

    It learns to go from noise to its pair's image at once.

    The same command again goes on where it stopped. The run's folder gets its configuration, a
    log, sheets of samples and checkpoints, and in the end the model. SIGTERM, SIGUSR1 and Ctrl-C
    leave a checkpoint, and exit code 75 says that the run is to be gone on with; a second Ctrl-C
    stops at once. With more --set steps a finished run goes on, too.
    """
    given = _given(config, settings, pairs, model, any_teacher)
    _straighten("distill", given, config, phase, resume, max_minutes, output, export, as_json)


def _straighten(
    kind: Kind,
    given: Settings,
    config: str | None,
    phase: str | None,
    resume: str,
    max_minutes: float | None,
    output: Path | None,
    export: Path | None,
    as_json: bool,
) -> None:
    with session(as_json, resumable=True) as terminal:
        from accelerate import PartialState

        from rectiflow.straighten.export import check_folder
        from rectiflow.straighten.phases import (
            check_phases,
            export_model,
            plan_phases,
            run_phases,
        )

        started = time.perf_counter()
        run = output or Path("runs") / kind
        recipe = None if config is None or _is_file(config) else config
        if phase is not None and recipe is None:
            raise InputError("--phase is for named configurations: name one with --config")
        plans = plan_phases(kind, given, run, recipe, phase)
        check_phases(plans, resume)  # before anything is written
        if export is not None:
            check_folder(export)
            options.output_folder(export.parent)

        check_begun(run, *run_options.MARKS)
        options.output_folder(run)
        outcomes = run_phases(
            plans,
            wanted=resume,
            max_minutes=max_minutes,
        )
        last = outcomes[-1]
        taken = len(outcomes) == len(plans) and last.finished
        finished = taken and plans[-1].over(last.config)
        exported = None
        if not PartialState().is_main_process:  # of torchrun's
            run_options.leave_together(taken)
            return
        if export is not None and finished:
            export_model(plans[-1], export)
            exported = str(export)
        data = {
            "kind": kind,
            "run": str(run),
            "phases": [_told(outcome) for outcome in outcomes],
            "finished": finished,
            "model": str(plans[-1].model) if finished else None,
            "export": exported,
            "seconds": time.perf_counter() - started,
            "warnings": terminal.warnings,
        }
        _report(terminal, data)
        run_options.leave_together(taken)


def _given(
    config: str | None,
    assignments: list[str] | None,
    pairs: str | None,
    model: options.ModelOptions,
    any_teacher: bool,
) -> Settings:
    """What options and a file of settings say; a named configuration comes in by phases."""
    given: Settings = {}
    if config is not None and _is_file(config):
        from rectiflow.settings_file import read_yaml

        given = read_yaml(Path(config))
    given = run_options.assigned(given, assignments)
    named = {"pairs": pairs, "model": model.model, "base": model.base, "loras": model.lora,
             "variant": model.variant, "revision": model.revision}  # fmt: skip
    given |= {key: value for key, value in named.items() if value is not None}
    if any_teacher:
        given["any_teacher"] = True
    return given


def _is_file(config: str) -> bool:
    return config.endswith((".yaml", ".yml")) or Path(config).is_file()


def _told(outcome: Outcome) -> dict[str, Any]:
    return {
        "name": outcome.name,
        "run": str(outcome.run),
        "step": outcome.step,
        "steps": outcome.config.steps,
        "finished": outcome.finished,
        "resumed_from": outcome.resumed_from,
        "loss": run_options.last_of(outcome.run, "loss"),
        "measures": outcome.measures,
        "seconds": outcome.seconds,
    }


def _report(terminal: Session, data: dict[str, Any]) -> None:
    lines = [
        f"{phase['run']}: step {phase['step']} of {phase['steps']}" for phase in data["phases"]
    ]
    if data["phases"][-1]["finished"] and not data["finished"]:
        lines[-1] += "; the same command without torchrun writes its model"
    elif not data["finished"]:
        lines[-1] += "; the same command goes on from here"
    else:
        lines.append(f"model: {data['export'] or data['model']}")
    terminal.result(data, "\n".join(lines))

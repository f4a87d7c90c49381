"""``rectiflow train``: a recipe, from nothing or from where it was left, to a model folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options, run_options
from rectiflow.app.console import session
from rectiflow.app.outputs import Overwrite
from rectiflow.errors import InputError
from rectiflow.files import check_begun
from rectiflow.stopping import time_limit

if TYPE_CHECKING:
    from rectiflow.straighten.config import TrainConfig
    from rectiflow.straighten.trainer import Trainer


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="emoji-vae, emoji-clip, emoji-sd3 or emoji-sd; or leave it to --config."
        ),
    ] = None,
    settings: run_options.Assignments = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of settings.", show_default=False)
    ] = None,
    resume: run_options.Resume = "latest",
    max_minutes: run_options.MaxMinutes = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run.  [default: runs/RECIPE]"),
    ] = None,
    export: run_options.Export = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--init-from", help="Model folder to start from, not at random.", show_default=False
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a model by a recipe.

    The same command again goes on where it stopped. The run's folder gets its configuration, a
    log, samples and checkpoints. SIGTERM, SIGUSR1 and Ctrl-C leave a checkpoint, and exit code 75
    says that the run is to be gone on with; a second Ctrl-C stops at once.
    """
    with session(as_json, resumable=True) as terminal:
        started = time.perf_counter()
        given = _given(recipe, config, settings, init_from)
        run = output or Path("runs") / str(given["recipe"])
        chosen = _configuration(given, run)
        check_begun(run, *run_options.MARKS)
        options.output_folder(run)
        if export is not None:
            exported = run_options.export_to(export, overwrite)
        with time_limit(max_minutes or None):  # 0 is for one step
            trainer = _trainer(chosen, run)
            resumed = trainer.resume(resume)
        begun = trainer.step
        spent = (time.perf_counter() - started) / 60
        trainer.train(None if max_minutes is None else max(0.0, max_minutes - spent))
        finished = trainer.step >= chosen.steps
        if not trainer.main:  # of several processes one writes and speaks
            run_options.leave_together(finished)
            return
        if trainer.stopped and not finished:
            export = None  # there may be no time for it
        if export is not None:
            run_options.export(trainer, exported)
        data = {
            "recipe": chosen.recipe,
            "run": str(run),
            "resumed_from": begun if resumed else None,
            "step": trainer.step,
            "steps": chosen.steps,
            "finished": finished,
            "loss": run_options.last_of(run, "loss"),
            "export": None if export is None else str(export),
            "seconds": time.perf_counter() - started,
            "warnings": terminal.warnings,
        }
        words = f"{run}: step {trainer.step} of {chosen.steps}"
        if not finished:
            words += "; the same command goes on from here"
        terminal.result(data, words if export is None else f"{words}\nmodel: {export}")
        run_options.leave_together(finished)


def _given(
    recipe: str | None, config: Path | None, assignments: list[str] | None, init_from: Path | None
) -> dict[str, Any]:
    """What file and options say, the latter winning; always with a known recipe."""
    from rectiflow.emoji.recipes import RECIPES
    from rectiflow.settings_file import read_yaml

    given = {} if config is None else read_yaml(config)
    recipe = recipe or given.get("recipe")
    if recipe is None:
        raise InputError(f"name a recipe, one of {', '.join(RECIPES)}, or a --config that does")
    if recipe not in RECIPES:
        raise InputError(f"unknown recipe {recipe!r}: one of {', '.join(RECIPES)}")
    if given.setdefault("recipe", recipe) != recipe:
        raise InputError(f"{config} is for the recipe {given['recipe']}, not {recipe}")
    given = run_options.assigned(given, assignments)
    if given["recipe"] != recipe:
        raise InputError(f"--set recipe={given['recipe']} contradicts {recipe}: name it once")
    if init_from is not None:
        given["init_from"] = str(init_from)
    return given


def _configuration(given: dict[str, Any], run: Path) -> TrainConfig:
    """The validated configuration; of a run that exists already its own, lengthened at most."""
    from rectiflow.emoji.recipes import RECIPES
    from rectiflow.straighten.continuing import continued

    return continued(RECIPES[given["recipe"]][0], given, run)


def _trainer(config: TrainConfig, run: Path) -> Trainer:
    from rectiflow.emoji.recipes import build_task
    from rectiflow.models.inspection import inspect_folder
    from rectiflow.straighten.trainer import Trainer

    for name in ("init_from", "vae", "clip", "teacher"):
        folder = getattr(config, name, None)
        if isinstance(folder, Path) and not folder.is_dir():
            raise InputError(f"{name}: there is no folder {folder}; train it, or --set {name}=...")
        if isinstance(folder, Path):
            inspect_folder(folder)
    return Trainer(build_task(config), config, run)

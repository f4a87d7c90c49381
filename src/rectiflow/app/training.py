"""``rectiflow train``: a recipe, from nothing or from where it was left, to a model folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rectiflow.app import options
from rectiflow.app.console import session
from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.straighten.config import TrainConfig
    from rectiflow.straighten.trainer import Trainer

CHANGEABLE = {
    "steps",
    "decay_steps",
    "compile",
    "log_every",
    "checkpoint_minutes",
    "sample_minutes",
    "keep_last",
}
"""What may change between the sittings of one run without making it another run."""


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="emoji-vae, emoji-clip or emoji-sd3; or leave it to --config."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a setting; repeatable."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of settings.", show_default=False)
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume_from_checkpoint", help="latest, or the name of a checkpoint of the run."
        ),
    ] = "latest",
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Stop after this long, to be resumed.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the run.  [default: runs/RECIPE]"),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Write the model to this folder at the end.", show_default=False),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--init-from", help="Model folder to start from, not at random.", show_default=False
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Train a model by a recipe.

    The same command again goes on where it stopped. The run's folder gets its configuration, a
    log, samples and checkpoints.
    """
    with session(as_json) as terminal:
        started = time.perf_counter()
        given = _given(recipe, config, settings, init_from)
        run = output or Path("runs") / str(given["recipe"])
        chosen = _configuration(given, run)
        options.output_folder(run)
        if export is not None:
            _check_export(export)
        trainer = _trainer(chosen, run)
        resumed = _resume(trainer, resume)
        begun = trainer.step
        trainer.train(max_minutes)
        if export is not None:
            _export(trainer, export)
        data = {
            "recipe": chosen.recipe,
            "run": str(run),
            "resumed_from": begun if resumed else None,
            "step": trainer.step,
            "steps": chosen.steps,
            "finished": trainer.step >= chosen.steps,
            "loss": _last_loss(run),
            "export": None if export is None else str(export),
            "seconds": time.perf_counter() - started,
            "warnings": terminal.warnings,
        }
        words = f"{run}: step {trainer.step} of {chosen.steps}"
        if not data["finished"]:
            words += "; the same command goes on from here"
        terminal.result(data, words if export is None else f"{words}\nmodel: {export}")


def _given(
    recipe: str | None, config: Path | None, assignments: list[str] | None, init_from: Path | None
) -> dict[str, Any]:
    """What file and options say, the latter winning; always with a known recipe."""
    import yaml

    from rectiflow.emoji.recipes import RECIPES
    from rectiflow.straighten.config import override

    given = {} if config is None else _read_yaml(config)
    recipe = recipe or given.get("recipe")
    if recipe is None:
        raise InputError(f"name a recipe, one of {', '.join(RECIPES)}, or a --config that does")
    if recipe not in RECIPES:
        raise InputError(f"unknown recipe {recipe!r}: one of {', '.join(RECIPES)}")
    if given.setdefault("recipe", recipe) != recipe:
        raise InputError(f"{config} is for the recipe {given['recipe']}, not {recipe}")
    try:
        given = override(given, assignments or [])
    except yaml.YAMLError:
        raise InputError(f"--set {' '.join(assignments or [])}: a value is not YAML") from None
    if given["recipe"] != recipe:
        raise InputError(f"--set recipe={given['recipe']} contradicts {recipe}: name it once")
    if init_from is not None:
        given["init_from"] = str(init_from)
    return given


def _read_yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no settings: write one `key: value` per line")
    return content


def _configuration(given: dict[str, Any], run: Path) -> TrainConfig:
    """The validated configuration; of a run that exists already its own, lengthened at most."""
    from rectiflow.emoji.recipes import RECIPES
    from rectiflow.straighten.config import validate

    kind = RECIPES[given["recipe"]][0]
    asked = validate(kind, given)
    saved = run / "config.yaml"
    if not saved.is_file():
        return asked
    before = _read_yaml(saved)
    if before.get("recipe") != asked.recipe:
        raise InputError(f"{run} is a run of {before.get('recipe')}: choose another folder with -o")
    kept = validate(kind, before)
    wanted, had = asked.model_dump(mode="json"), kept.model_dump(mode="json")
    for key in given:
        if key not in CHANGEABLE and wanted[key] != had[key]:
            raise InputError(
                f"{run} was begun with {key} {had[key]} and not {wanted[key]}: leave the setting "
                "out to go on with it, or choose another folder with -o"
            )
    return validate(kind, before | {key: given[key] for key in given if key in CHANGEABLE})


def _trainer(config: TrainConfig, run: Path) -> Trainer:
    from rectiflow.emoji.recipes import build_task
    from rectiflow.straighten.trainer import Trainer

    for name in ("init_from", "vae", "clip"):
        folder = getattr(config, name, None)
        if isinstance(folder, Path) and not folder.is_dir():
            raise InputError(f"{name}: there is no folder {folder}; train it, or --set {name}=...")
    return Trainer(build_task(config), config, run)


def _resume(trainer: Trainer, wanted: str) -> bool:
    from safetensors import SafetensorError

    try:
        return trainer.resume(wanted)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"the checkpoint {wanted} of {trainer.run} is damaged ({error}): remove its folder to "
            "go on from the one before"
        ) from error


def _check_export(folder: Path) -> None:
    """A folder that is new, empty, or a model already: nothing else is to be written into."""
    if folder.is_dir() and any(folder.iterdir()):
        if not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
            raise InputError(f"--export {folder} has other things in it: give a new folder")
    options.output_folder(folder.parent)


def _export(trainer: Trainer, folder: Path) -> None:
    """Write the model under another name first; what else is in the folder stays."""
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    trainer.export(unfinished)
    for file in sorted(unfinished.rglob("*")):
        if file.is_file():
            target = folder / file.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    shutil.rmtree(unfinished)


def _last_loss(run: Path) -> float | None:
    log = run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return json.loads(lines[-1])["loss"] if lines else None

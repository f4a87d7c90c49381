"""Phases of training, one after the other: each begins as what the one before has become.

A phase is a run of its own in a folder of its own, with its configuration, log and checkpoints; it
is over when its model, of as many steps as are asked for, lies in the folder `model`, which is
written whole or not at all. Run again, phases that are over are passed by, the one that was stopped
goes on, and one that is asked for more steps goes on from its last checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rectiflow.errors import InputError
from rectiflow.models.base import FlowModel
from rectiflow.models.load import embedded_models
from rectiflow.settings_file import read_yaml
from rectiflow.straighten import checkpoint
from rectiflow.straighten.assembly import assemble, loaded
from rectiflow.straighten.continuing import continued
from rectiflow.straighten.reading import PairStore
from rectiflow.straighten.recipes import get_recipe
from rectiflow.straighten.settings import StraightenConfig
from rectiflow.straighten.straightening import StraightenTask
from rectiflow.straighten.trainer import Trainer
from rectiflow.straighten.training_record import MODEL, read_record, steps_taken

FIRST = ("base", "loras", "variant", "revision")
"""What says which weights the first phase begins with; the others begin as its model."""


@dataclass(frozen=True)
class Plan:
    """One phase to be run.

    Args:
        name: Of the phase.
        run: Its folder.
        configure: The validated configuration, given the folder of the model it begins as (None:
            its own setting decides). Called when the phase's turn comes.
    """

    name: str
    run: Path
    configure: Callable[[Path | None], StraightenConfig]

    @property
    def model(self) -> Path:
        """Where its model will be."""
        return self.run / MODEL

    def over(self, config: StraightenConfig, wanted: str | None = "latest") -> bool:
        """Whether its model is there, of the steps that are asked for.

        Args:
            config: What `configure` gives.
            wanted: The checkpoint to go on from: one from before the end is gone back to.

        Raises:
            InputError: there is no such checkpoint, or the phase has taken more steps than it is
                asked for, or is asked for more and has no checkpoint to go on from.
        """
        found = checkpoint.to_go_on_from(self.run, wanted, config.steps)
        taken = steps_taken(self.run)
        if taken is None:
            return False
        if taken != config.steps and found is None:
            raise InputError(
                f"{self.run} has a model of {taken} steps and no checkpoint to go on from, and "
                f"{config.steps} are asked for: leave them at {taken}, or choose another folder "
                "with -o"
            )
        back = wanted != "latest" and found is not None and checkpoint.step_of(found) < taken
        return taken == config.steps and not back

    @property
    def begun(self) -> bool:
        """Whether there is anything of it."""
        return (self.run / "config.yaml").is_file()


def plan_phases(
    kind: str, given: dict[str, Any], run: Path, recipe: str | None = None, only: str | None = None
) -> list[Plan]:
    """The phases of a job.

    Args:
        kind: `reflow` or `distill`.
        given: Settings of `StraightenConfig`, for every phase; they go before a recipe's.
        run: The folder of the run; of several phases each has a folder in it.
        recipe: A named configuration; None for one phase of the settings alone.
        only: The one phase of it to run.

    Raises:
        InputError: There is no such recipe or phase, or the settings are for something else.
    """
    if given.get("kind", kind) not in (kind, "flow_matching"):
        raise InputError(f"kind {given['kind']} is for `rectiflow {given['kind']}`")
    if recipe is None:
        settings = {"recipe": kind, "kind": kind} | given
        return [Plan(kind, run, partial(_configure, settings, run))]
    plans = []
    for part in get_recipe(recipe).of_kind(kind, only):
        settings = {"recipe": f"{recipe}/{part.name}"} | part.settings | given
        folder = run / part.name
        plans.append(Plan(part.name, folder, partial(_configure, settings, folder)))
    return plans


@dataclass
class Outcome:
    """How far a phase has come."""

    name: str
    run: Path
    config: StraightenConfig
    step: int
    resumed_from: int | None = None
    stopped: bool = False
    """By a signal."""
    seconds: float = 0.0
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether it took all its steps."""
        return self.step >= self.config.steps


def check_phases(plans: Sequence[Plan], wanted: str | None = "latest") -> int:
    """See that every phase's settings are possible, before the first is run.

    Args:
        plans: In order.
        wanted: The checkpoint to go on from.

    Returns:
        The number of the phase that `wanted` is a checkpoint of: the first that is not over, or
        the last.

    Raises:
        InputError: One is not; the line says which setting.
    """
    configs: list[StraightenConfig] = []
    before: Path | None = None
    for plan in plans:
        configs.append(plan.configure(before))
        before = plan.model
    taken = [steps_taken(plan.run) for plan in plans]
    wanting = [n for n, config in enumerate(configs) if taken[n] != config.steps]
    current = wanting[0] if wanting else len(plans) - 1
    for number, (plan, config) in enumerate(zip(plans, configs, strict=True)):
        over = plan.over(config, wanted if number == current else "latest")
        following = [later for later in plans[number + 1 :] if later.begun]
        if not over and taken[number] is not None and following:
            raise InputError(
                f"{following[0].run} began as the model of {plan.name} after {taken[number]} "
                f"steps, and {plan.name} is asked to go on to {config.steps}: choose another "
                "folder with -o, or name the phase to be trained with --phase"
            )
    return current


def run_phases(
    plans: Sequence[Plan],
    *,
    model: FlowModel | None = None,
    wanted: str | None = "latest",
    max_minutes: float | None = None,
) -> list[Outcome]:
    """Run phases to their end, until a signal, or for as long as there is time.

    Args:
        plans: In order.
        model: What the first begins as, if it is loaded already.
        wanted: The checkpoint to go on from, of the first phase that is not over or of the last.
        max_minutes: For all of them together.

    Returns:
        One for each phase that has been begun, the last of them perhaps not finished.

    Raises:
        InputError: A phase is not possible, or its checkpoint is of another run.
        WorkError: A phase failed.
    """
    current = check_phases(plans, wanted)
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    outcomes: list[Outcome] = []
    before: Path | None = None
    for number, plan in enumerate(plans):
        config = plan.configure(before)
        begin = wanted if number == current else "latest"
        if plan.over(config, begin):
            outcomes.append(Outcome(plan.name, plan.run, config, config.steps))
            before = plan.model
            continue
        if outcomes and deadline is not None and time.monotonic() >= deadline:
            break
        outcomes.append(_run(plan, config, model if before is None else None, begin, deadline))
        if outcomes[-1].stopped or not plan.over(config):
            break
        before = plan.model
    return outcomes


def export_model(plan: Plan, folder: Path) -> None:
    """Write the model of a phase that is over, in half precision, with its record and card.

    Args:
        plan: The phase.
        folder: A new one.
    """
    from rectiflow.straighten.export import save_pipeline

    record = read_record(plan.model) or {}
    model = loaded(str(plan.model))
    steps = tuple(model.metadata.student_steps or ())
    save_pipeline(model, folder, dtype=torch.float16, record=record, student_steps=steps)


def _configure(settings: dict[str, Any], run: Path, before: Path | None) -> StraightenConfig:
    """The configuration of a phase that begins as the model in `before`, if there is one."""
    if before is not None:
        rest = {key: value for key, value in settings.items() if key not in FIRST}
        settings = rest | {"model": str(before)}
    elif "model" not in settings:
        saved = run / "config.yaml"
        begun_as = read_yaml(saved).get("model") if saved.is_file() else None
        settings = settings | {"model": begun_as or _teacher_of(settings)}
    return continued(StraightenConfig, settings, run)


def _teacher_of(settings: dict[str, Any]) -> str:
    """The model that made the pairs."""
    pairs = settings.get("pairs")
    if pairs is None:
        raise InputError(
            "no pairs: name a store with --pairs, or with --model a teacher, and with --set "
            "prompts=FILE the prompts of pairs that it makes on the fly"
        )
    name = PairStore.open(pairs).manifest.model
    # A store does not say where on its maker's machine a folder was.
    if name not in embedded_models() and "/" not in name:
        raise InputError(f"{pairs} was made by {name}: say where that is, with --model FOLDER")
    return name


def _run(
    plan: Plan,
    config: StraightenConfig,
    model: FlowModel | None,
    wanted: str | None,
    deadline: float | None,
) -> Outcome:
    started = time.perf_counter()
    task, identity = assemble(config, model)
    plan.run.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(task, config, plan.run, identity)
    resumed_from = trainer.step if trainer.resume(wanted) else None
    left = None if deadline is None else max(0.0, deadline - time.monotonic()) / 60
    trainer.train(left)
    outcome = Outcome(plan.name, plan.run, config, trainer.step, resumed_from, trainer.stopped)
    if outcome.finished:
        _keep(plan, trainer, task)
    outcome.seconds = time.perf_counter() - started
    outcome.measures = dict(task.latest)
    return outcome


def _keep(plan: Plan, trainer: Trainer, task: StraightenTask) -> None:
    """Write the averaged weights in full precision: the next phase loses nothing.

    Weights that are split over processes stay in the checkpoint, until the same command is run by
    one process.
    """
    if trainer.config.fsdp and trainer.accelerator.num_processes > 1:
        return
    with trainer.learner.averaged():
        if trainer.main:
            task.record["ran"] = trainer.learner.ran
            if task.config.measure_every:
                task.measure()
            task.export(plan.model, torch.float32)
    trainer.accelerator.wait_for_everyone()

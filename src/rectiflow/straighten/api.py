"""Reflow and distillation as functions: a model and its pairs in, a student out."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rectiflow.arguments import checked
from rectiflow.errors import WorkError
from rectiflow.models.base import FlowModel
from rectiflow.straighten.assembly import loaded
from rectiflow.straighten.finished import facts
from rectiflow.straighten.phases import FIRST, plan_phases, run_phases
from rectiflow.straighten.training_record import read_record, short_name


@checked
def reflow(
    model: FlowModel | str,
    pairs: str | Path | None = None,
    *,
    config: str | None = None,
    run: str | Path | None = None,
    max_minutes: float | None = None,
    **settings: Any,
) -> FlowModel:
    """Straighten a flow on pairs of its noise and what it made of it.

    Args:
        model: The teacher, or an earlier student; it is left as it is.
        pairs: Address of the store; without one, `prompts=` names those of pairs made on the fly.
        config: A named configuration, whose reflow phases are run.
        run: Folder of the run. Called again with the same, it goes on where it stopped; without
            one, nothing is kept.
        max_minutes: Stop after this long.
        **settings: Of `StraightenConfig`.

    Returns:
        The student, its averaged weights in float32, with its lineage (`record`).

    Raises:
        InputError: The settings or the pairs do not fit.
        WorkError: Training failed, or `max_minutes` were not enough.
    """
    return _straighten("reflow", model, pairs, config, run, max_minutes, settings)


@checked
def distill(
    model: FlowModel | str,
    pairs: str | Path | None = None,
    *,
    config: str | None = None,
    run: str | Path | None = None,
    max_minutes: float | None = None,
    **settings: Any,
) -> FlowModel:
    """Teach a flow to go from noise to its pair's latents in one step, or in `student_steps`.

    Args:
        model: As in `reflow`.
        pairs: As in `reflow`.
        config: A named configuration, whose distillation phases are run.
        run: As in `reflow`.
        max_minutes: As in `reflow`.
        **settings: As in `reflow`.

    Returns:
        As `reflow`.

    Raises:
        InputError: As in `reflow`.
        WorkError: As in `reflow`.
    """
    return _straighten("distill", model, pairs, config, run, max_minutes, settings)


def _straighten(
    kind: str,
    model: FlowModel | str,
    pairs: str | Path | None,
    config: str | None,
    run: str | Path | None,
    max_minutes: float | None,
    settings: dict[str, Any],
) -> FlowModel:
    begun_as = model if isinstance(model, str) else model.name
    given = settings | {"model": begun_as}
    if isinstance(model, FlowModel):  # for when the run is taken up again
        told = {"loras" if key == "lora" else key: v for key, v in model.loaded_with.items()}
        given |= {key: value for key, value in told.items() if key in FIRST}
    if pairs is not None:
        given["pairs"] = str(pairs)
    begun = None if isinstance(model, str) else model
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(passing) if run is None else Path(run)
        plans = plan_phases(kind, given, folder, config)
        outcomes = run_phases(plans, model=begun, max_minutes=max_minutes)
        last = outcomes[-1]
        if len(outcomes) < len(plans) or not last.finished:
            raise WorkError(
                f"{last.name} is at step {last.step} of {last.config.steps}: call again with the "
                "same run to go on"
            )
        student = loaded(str(plans[-1].model))
        record = read_record(plans[-1].model) or {}
        student.record = record | {"run": facts(plans[-1].run, last.config, last.step)}
        if run is None:  # its folder goes, and what it descends from must not be looked for there
            student.name = f"{kind} of {short_name(Path(begun_as))}"
        return student

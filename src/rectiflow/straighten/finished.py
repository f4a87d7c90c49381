"""The student of a run, from its folder alone: its pairs and its teacher's own need not be there.

A run that took all its steps has its model in a folder; of one that did not, or at an earlier
checkpoint, the student is begun again as the run's configuration says and given the checkpoint's
averaged weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rectiflow.errors import InputError
from rectiflow.models.base import FlowModel
from rectiflow.models.identity import difference
from rectiflow.models.load import load
from rectiflow.settings_file import read_yaml
from rectiflow.straighten import checkpoint
from rectiflow.straighten.card import made_for_few_steps
from rectiflow.straighten.config import validate
from rectiflow.straighten.metrics_log import read_log
from rectiflow.straighten.settings import StraightenConfig
from rectiflow.straighten.student import begin
from rectiflow.straighten.training_record import MODEL, begun_record, read_record, steps_taken

CONFIG = "config.yaml"
CURVE = 50
"""Points of the loss that a record keeps."""


@dataclass(frozen=True, eq=False)
class Student:
    """What a run made.

    Args:
        model: With the averaged weights, in float32; a LoRA is still beside them.
        record: Where it comes from, for `save_pipeline`.
        student_steps: The numbers of steps it was made for.
        step: After how many steps of training.
    """

    model: FlowModel
    record: dict[str, Any]
    student_steps: tuple[int, ...]
    step: int


def find_run(folder: Path) -> Path | None:
    """The folder of the run itself; None if it is no run.

    Of several phases it is the one that no other begins as.

    Raises:
        InputError: It cannot be told which of several.
    """
    if (folder / CONFIG).is_file():
        return folder
    phases = [path.parent for path in sorted(folder.glob(f"*/{CONFIG}"))]
    begun = {Path(str(read_yaml(run / CONFIG).get("model"))).resolve() for run in phases}
    last = [run for run in phases if (run / MODEL).resolve() not in begun]
    if len(last) > 1:
        names = ", ".join(run.name for run in last)
        raise InputError(f"{folder} has several runs ({names}): name the folder of one")
    return last[0] if last else None


def load_student(
    run: Path, wanted: str | None = None, device: str | torch.device | None = "cpu"
) -> Student:
    """The student of a run.

    Args:
        run: From `find_run`.
        wanted: `"latest"` or the name of a checkpoint; None for the model of a run that is over,
            and else the latest.
        device: Where to load it.

    Raises:
        InputError: There is no such checkpoint, it is damaged, or the run cannot be begun again;
            the line says why.
    """
    config = _configuration(run)
    if wanted is None and steps_taken(run) == config.steps:
        model = load(run / MODEL, dtype=torch.float32, device=device)
        record = (read_record(run / MODEL) or {}) | {"run": facts(run, config, config.steps)}
        return Student(model, record, config_steps(config), config.steps)
    found = checkpoint.resolve(run, wanted or "latest")
    if found is None:
        raise InputError(f"{run} has no checkpoint yet: train first")
    state = checkpoint.load(found)
    model = load(config.model, dtype=torch.float32, device=device, **config.loaded_with)
    identity = _identity(state, model, found)
    student = begin(
        model,
        start=config.start,
        stacked=config.stacked,
        keep_middle=config.keep_middle,
        guidance_embedded=config.guidance_embedded,
        lora=config.lora,
        seed=config.seed,
    )
    _install(student, state, found)
    step = int(state["progress"]["step"])
    record = begun_record(identity, model) | {
        "config": config.model_dump(mode="json"),
        "run": facts(run, config, step),
        "ran": state["progress"].get("ran", []),
    }
    student.network.eval()
    return Student(student, record, config_steps(config), step)


def config_steps(config: StraightenConfig) -> tuple[int, ...]:
    """The numbers of steps that a run makes its student for; none if it only straightens."""
    if not made_for_few_steps(config.model_dump(mode="json")):
        return ()
    return (config.windows,) if config.windows else tuple(config.student_steps)


def facts(run: Path, config: StraightenConfig, step: int) -> dict[str, Any]:
    """What a run's log says up to a step: the loss, thinned, and the last measures."""
    log = run / "log.jsonl"
    entries = [entry for entry in read_log(log) if entry["step"] <= step]
    losses = [[e["step"], e["loss"]] for e in entries if e.get("loss") is not None]
    found: dict[str, Any] = {"step": step, "samples": step * config.batch_size}
    if losses:
        thinned = losses[:: -(-len(losses) // CURVE)]
        found |= {"loss": losses[-1][1], "losses": thinned}
    measured = [entry["measures"] for entry in entries if "measures" in entry]
    if measured:
        found["measures"] = measured[-1]
    return found


def _configuration(run: Path) -> StraightenConfig:
    settings = read_yaml(run / CONFIG)
    if "kind" not in settings or "model" not in settings:
        recipe = settings.get("recipe")
        raise InputError(
            f"{run} is a run of {recipe}, not of reflow or distill: its model is written by "
            f"rectiflow train {recipe} -o {run} --export FOLDER"
        )
    return validate(StraightenConfig, settings)


def _identity(state: dict[str, Any], model: FlowModel, found: Path) -> dict[str, Any]:
    try:
        identity: dict[str, Any] = state["progress"]["identity"]
        known = identity["model"]
    except KeyError as error:
        raise InputError(
            f"{found} does not say what it was begun as ({error} is missing)"
        ) from error
    if known != model.weight_hash:
        raise InputError(
            f"{found} was begun as a model with the weights {known[:12]}, and {model.name} has "
            f"{model.weight_hash[:12]}: put the old model back in its place"
        )
    if words := difference(identity.get("identity"), model.identity, "the checkpoint", model.name):
        raise InputError(f"{found} was begun as another field ({words}): put that back")
    return identity


def _install(student: FlowModel, state: dict[str, Any], found: Path) -> None:
    """Put a checkpoint's averaged weights into a student that was just begun."""
    trained = [weight for weight in student.network.parameters() if weight.requires_grad]
    averaged = state["ema"]["shadow_params"]
    shapes = [[tuple(weight.shape) for weight in group] for group in (trained, averaged)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{found} is of another network than its {CONFIG} describes: has it been edited?"
        )
    with torch.no_grad():
        for weight, value in zip(trained, averaged, strict=True):
            weight.copy_(value)

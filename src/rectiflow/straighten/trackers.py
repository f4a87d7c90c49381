"""Trackers of accelerate (Weights & Biases, Trackio): a run's figures where a team looks at them.

They are told what the run's log.jsonl is told, and keep it. They cannot forget: of a run that was
killed and resumed, what was reported after the checkpoint is there a second time, or left out,
as the tracker has it. `log.jsonl` is the record.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rectiflow.errors import InputError, install
from rectiflow.files import write_whole

PROJECT = "rectiflow"
ID = "tracker-id"
"""The file with which a run that is resumed is the same run to a tracker."""


def check_tracker(name: str) -> None:
    """Raise InputError if a tracker lacks its package."""
    if importlib.util.find_spec(name) is None:
        raise InputError(
            f"report_to {name} needs the package {name}: {install(name)}, or set "
            "report_to to [jsonl]"
        )


def open_tracker(name: str, run: Path, settings: Mapping[str, Any]) -> Any:
    """Start a tracker of accelerate, or take up where the run stopped.

    Args:
        name: As in `report_to`.
        run: The run's folder, which is there.
        settings: The run's, to be shown beside its figures.

    Raises:
        InputError: It does not start; the line says why.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    file = run / ID
    if not file.is_file():
        write_whole(file, uuid.uuid4().hex[:12] + "\n")
    identity = file.read_text(encoding="utf-8").strip()
    told: dict[str, Any] = {"resume": "allow", "name": f"{run.resolve().name}-{identity}"}
    if name == "wandb":
        told |= {"id": identity, "dir": str(run)}
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **told)
        tracker.start()
        tracker.store_init_configuration(dict(settings))
    except Exception as error:  # of whatever kind the tracker's own library has
        remedy = "; WANDB_MODE=offline keeps it here" if name == "wandb" else ""
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"report_to {name} does not start ({why}){remedy}") from error
    return tracker

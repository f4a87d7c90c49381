"""Where a trained model comes from, in a file of its folder: settings, ancestors, measures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rectiflow.guarded import read_json
from rectiflow.models.base import FlowModel
from rectiflow.models.folder import INDEX

FILE_NAME = "training.json"
MODEL = "model"
"""What the folder of a run's model is called."""


def short_name(folder: Path) -> str:
    """What a model's folder is called: the last part, or that of the run whose model it is."""
    return folder.parent.name if folder.name == MODEL and folder.parent.name else folder.name


def steps_taken(run: Path) -> int | None:
    """How many steps the model of a run has been trained for; None if the run has no model yet.

    Raises:
        InputError: as in `read_record`.
    """
    record = read_record(run / MODEL) if (run / MODEL / INDEX).is_file() else None
    steps: int | None = (record or {}).get("config", {}).get("steps")
    return steps


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Write the record into a model's folder."""
    text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a model's folder; None if there is none.

    Raises:
        InputError: It is there and is not a record.
    """
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    found: dict[str, Any] = read_json(file)
    return found


def record_of(model: FlowModel) -> dict[str, Any] | None:
    """The record that a model carries, or else that of its folder; None if there is neither.

    Raises:
        InputError: As `read_record`.
    """
    if model.record is not None:
        return model.record
    folder = Path(model.name).expanduser()
    return read_record(folder) if folder.is_dir() else None


def begun_record(identity: Mapping[str, Any], model: FlowModel) -> dict[str, Any]:
    """What the model of a run says of where it comes from.

    Args:
        identity: Of the run, as `assemble` gives it.
        model: What the run began as.

    Returns:
        `began_as`, what else the run depends on, the weight hashes of all `ancestors` with what is
        known of their fields (`identities`), and the record of the model `before`.
    """
    before = dict(record_of(model) or {})
    fields = {**before.pop("identities", {}), identity["model"]: identity.get("identity")}
    known = [*before.get("ancestors", []), identity["model"]]
    pairs = dict(identity.get("pairs", {}))
    if pairs:
        known.append(pairs["weight_hash"])
        fields.setdefault(pairs["weight_hash"], pairs.pop("identity", None))
    record: dict[str, Any] = {
        "began_as": {"model": model.name, "weight_hash": identity["model"]},
        "ancestors": list(dict.fromkeys(known)),
        "identities": {weights: field for weights, field in fields.items() if field is not None},
    }
    if pairs:
        record["pairs"] = pairs
    if "teacher" in identity:
        record["teacher"] = identity["teacher"]
    return record | ({"before": before} if before else {})

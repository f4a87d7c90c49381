"""What a benchmark of edits has done so far: a file per method and settings, grown batch by batch.

A file's name says the method and a hash of its settings, so nothing made otherwise is ever mixed
with it, several processes can work in one folder, and a killed run goes on where it was.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.evaluate.edit_scores import Columns
from rectiflow.guarded import Unreadable
from rectiflow.invert.preset import Preset
from rectiflow.sealed import load_sealed, save_sealed

_BARE = Preset(reference="")


@dataclass(frozen=True)
class Part:
    """The first n results of a method."""

    images: Tensor
    """uint8 ``[n, 3, H, W]``."""
    columns: Columns
    """A figure of every edit by name, each ``[n]``; `nfe` and `seconds` among them."""

    def __len__(self) -> int:
        """How many results there are."""
        return len(self.images)

    def first(self, n: int) -> Part:
        """The first n of them."""
        return Part(self.images[:n], {name: values[:n] for name, values in self.columns.items()})

    def plus(self, other: Part) -> Part:
        """These, and then others."""
        return Part(
            torch.cat([self.images, other.images]),
            {
                name: np.concatenate([values, other.columns[name]])
                for name, values in self.columns.items()
            },
        )


@dataclass(frozen=True)
class Made:
    """What results depend on."""

    method: Preset | str
    """Settings, or the name of a reference, which has none."""
    conditions: Mapping[str, Any]
    """All else, as JSON data: model, dtype, seeds, batches, metrics."""

    @property
    def settings(self) -> dict[str, Any]:
        """The method's settings as JSON data, without the words about them."""
        if isinstance(self.method, str):
            return {"reference": self.method}
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self.method)))
        del fields["reference"]
        return fields

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that are not a field's default: a field that is new changes nothing."""
        return {
            name: value
            for name, value in self.settings.items()
            if name == "reference" or value != _default(name)
        }

    def file(self, folder: Path, name: str) -> Path:
        """Where its results are kept."""
        text = json.dumps([self.changed, dict(self.conditions)], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name).strip('-')}-{digest}.safetensors"


def _default(name: str) -> Any:
    return json.loads(json.dumps(getattr(_BARE, name, None)))


def write_part(part: Part, made: Made, file: Path) -> None:
    """Write results under a temporary name, and rename them into place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"column.{name}": torch.from_numpy(v) for name, v in part.columns.items()}
    about = {"settings": made.settings, "conditions": dict(made.conditions)}
    save_sealed(file, {"images": part.images, **tensors}, about)


def read_part(made: Made, file: Path) -> Part | None:
    """The results in a file; None if there are none, or if they were made with other settings.

    Raises:
        InputError: the file is damaged.
    """
    if not file.exists():
        return None
    try:
        tensors, about = load_sealed(file, earlier=True)
        # The name holds what differs from the defaults; the defaults themselves may have moved.
        known = {name: _default(name) for name in made.settings} | about["settings"]
        if known != made.settings or about["conditions"] != dict(made.conditions):
            return None
    except (Unreadable, KeyError, TypeError) as error:
        raise InputError(f"{file} is damaged ({error}): delete it and run again") from error
    columns = {
        name.removeprefix("column."): tensor.numpy()
        for name, tensor in tensors.items()
        if name.startswith("column.")
    }
    return Part(tensors["images"], columns)

"""What every training run is told, validated; recipes extend it with their own fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rectiflow.errors import InputError


class TrainConfig(BaseModel):
    """The settings of one run; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    seed: int = 0
    init_from: Path | None = None
    """Model folder to start from instead of random weights; half precision will do."""
    steps: int = Field(default=10_000, gt=0)
    batch_size: int = Field(default=64, gt=0)
    """Global batch: samples per step over all processes."""
    learning_rate: float = Field(default=1e-3, gt=0)
    muon_learning_rate: float | None = Field(default=None, gt=0)
    """When set, hidden matrices are trained by Muon at this rate and the rest by AdamW."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    """The last steps over which the rate falls to zero as 1 − √; constant before them, so that
    a run can be lengthened after the fact without changing what it has done."""
    grad_clip: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    compile: bool = False
    log_every: int = Field(default=20, gt=0)
    checkpoint_minutes: float = Field(default=5, gt=0)
    sample_minutes: float = Field(default=10, gt=0)
    keep_last: int = Field(default=2, gt=0)

    def dump(self, path: Path) -> None:
        """Write the full configuration as YAML."""
        path.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


Config = TypeVar("Config", bound=TrainConfig)


def override(settings: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply ``key=value`` assignments (``a.b=c`` reaches into nested settings).

    Raises:
        InputError: an assignment without ``=``.
    """
    settings = dict(settings)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment!r} is not of the form key=value")
        *parents, leaf = key.split(".")
        place = settings
        for parent in parents:
            inner = place.get(parent) or {}
            if not isinstance(inner, dict):
                raise InputError(f"--set {assignment!r}: {parent!r} is one value, not a group")
            place[parent] = dict(inner)
            place = place[parent]
        place[leaf] = yaml.safe_load(value)
    return settings


def validate(kind: type[Config], settings: dict[str, Any]) -> Config:
    """Build a configuration of the given kind.

    Raises:
        InputError: names the first key that does not fit, and why.
    """
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"config key {where!r}: {first['msg']}") from None

"""What every training run is told, validated; recipes extend it with their own fields."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rectiflow.errors import InputError, nearest
from rectiflow.files import write_whole
from rectiflow.settings_file import dump_yaml, parse_yaml

Beta = Annotated[float, Field(ge=0, lt=1)]
MOST_COUNT, MOST_SEED = 10**12, 2**63 - 1
"""More than anybody needs, and few enough for all that is computed from them."""
Reporter = Literal["jsonl", "tensorboard", "wandb", "trackio"]


class TrainConfig(BaseModel):
    """The settings of one run; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    CHANGEABLE: ClassVar[frozenset[str]] = frozenset(
        {
            "steps",
            "decay_steps",
            "micro_batch_size",
            "gradient_accumulation_steps",
            "gradient_checkpointing",
            "fsdp",
            "compile",
            "prefetch",
            "log_every",
            "measure_every",
            "report_to",
            "save_every",
            "checkpoint_minutes",
            "sample_minutes",
            "keep_last",
        }
    )
    """What may change between the sittings of one run: how long it is, how its work is cut up and
    how it is looked at, but not what is learnt."""

    recipe: str
    seed: int = 0
    init_from: Path | None = None
    """Model folder to start from instead of random weights; half precision will do."""
    steps: int = Field(default=10_000, gt=0)
    batch_size: int = Field(default=64, gt=0)
    """Global batch: samples per step over all processes and micro-batches."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """At most so many samples at once through the network of a process; the gradients of a step's
    micro-batches are added up. None takes a process's share of the batch whole."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    """The same, said as the number of micro-batches of a step; `batch_size` stays the whole."""
    gradient_checkpointing: bool = False
    """Compute activations twice rather than keep them."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """adamw8bit keeps its state in 8 bits and needs the package bitsandbytes."""
    learning_rate: float = Field(default=1e-3, gt=0)
    muon_learning_rate: float | None = Field(default=None, gt=0)
    """When set, hidden matrices are trained by Muon at this rate and the rest by `optimizer`."""
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    """The last steps over which the rate falls to zero as 1 − √; constant before them, so that
    a run can be lengthened after the fact without changing what it has done."""
    grad_clip: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """The largest decay of the averaged weights, which are kept in float32. After n steps it is
    (1 + n) / (10 + n) at most, or as `ema_warmup` says."""
    ema_warmup: bool = False
    """Let the decay after n steps be 1 − (1 + n / ema_inv_gamma)^−ema_power at most."""
    ema_inv_gamma: float = Field(default=1.0, gt=0)
    ema_power: float = Field(default=2 / 3, gt=0)
    ema_start: int = Field(default=0, ge=0)
    """The average is the weights themselves until this step."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """fp16 scales the loss, and skips the steps whose gradients overflow."""
    fsdp: bool = False
    """Split weights, gradients and optimiser state over the processes, if there are several."""
    compile: bool = False
    prefetch: bool | None = None
    """Make the next batch in a thread while the network works on this one, where the task allows
    it; None does so beside an accelerator, but not on a CPU, where both want the same cores."""
    log_every: int = Field(default=20, gt=0)
    measure_every: int = Field(default=0, ge=0)
    """Steps between the task's own measurements of the averaged weights; 0 for none."""
    report_to: tuple[Reporter, ...] = ("jsonl",)
    """Where figures go: the run's log.jsonl, TensorBoard files in its folder `tensorboard`, and
    Weights & Biases or Trackio, as accelerate offers them."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints, beside those by the clock; 0 for none."""
    checkpoint_minutes: float = Field(default=5, gt=0)
    sample_minutes: float = Field(default=10, gt=0)
    keep_last: int = Field(default=2, gt=0)

    @model_validator(mode="after")
    def _whole_numbers_in_range(self) -> Self:
        for name in type(self).model_fields:
            most = MOST_SEED if name.endswith("seed") else MOST_COUNT
            value = getattr(self, name)
            if isinstance(value, int) and abs(value) > most:
                raise ValueError(f"{name} is {value}: at most {most}")
        return self

    @model_validator(mode="after")
    def _one_way_to_cut_a_batch(self) -> Self:
        if self.micro_batch_size is not None and self.gradient_accumulation_steps > 1:
            raise ValueError("give micro_batch_size or gradient_accumulation_steps, not both")
        if self.gradient_accumulation_steps > self.batch_size:
            raise ValueError("more gradient_accumulation_steps than samples in batch_size")
        return self

    def dump(self, path: Path) -> None:
        """Write the full configuration as YAML; a file that is there is replaced whole."""
        write_whole(path, dump_yaml(self.model_dump(mode="json")))


Config = TypeVar("Config", bound=TrainConfig)


def override(settings: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Apply ``key=value`` assignments (``a.b=c`` reaches into nested settings).

    Raises:
        InputError: an assignment without ``=``, or whose value is not YAML.
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
        try:
            place[leaf] = parse_yaml(value)
        except InputError as error:
            raise InputError(f"--set {assignment!r}: the value is {error}") from None
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
        what = f"config key {where!r}" if where else "config"
        why = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            why = f"there is no such setting{_meant(kind, where)}"
        elif isinstance(first["input"], str | int | float | bool):
            why += f", not {first['input']!r}"
        raise InputError(f"{what}: {why}") from None


ELSEWHERE = {
    "lr": "learning_rate",
    "train_batch_size": "batch_size, of all processes together",
    "per_device_train_batch_size": "micro_batch_size; batch_size is of all processes together",
    "max_train_steps": "steps",
    "max_steps": "steps",
    "num_train_steps": "steps",
    "num_train_epochs": "steps",
    "iterations": "steps",
    "lr_warmup_steps": "warmup_steps",
    "lr_scheduler": "decay_steps, the last steps over which the rate falls",
    "max_grad_norm": "grad_clip",
    "gradient_clip_val": "grad_clip",
    "checkpointing_steps": "save_every",
    "save_steps": "save_every",
    "checkpoints_total_limit": "keep_last",
    "save_total_limit": "keep_last",
    "validation_steps": "measure_every",
    "eval_steps": "measure_every",
    "logging_steps": "log_every",
    "adam_beta1": "betas, both of them",
    "adam_beta2": "betas, both of them",
    "adam_weight_decay": "weight_decay",
    "use_8bit_adam": "optimizer=adamw8bit",
    "use_ema": "ema_decay; weights are always averaged",
    "precision": "mixed_precision",
    "dtype": "mixed_precision",
    "bf16": "mixed_precision=bf16",
    "fp16": "mixed_precision=fp16",
    "torch_compile": "compile",
    "dataloader_num_workers": "prefetch",
    "resolution": "height and width",
    "rank": "lora_rank",
    "pretrained_model_name_or_path": "model",
    "pretrained_teacher_model": "teacher",
    "loss_type": "loss",
    "huber_c": "huber",
    "guidance_scale": "guidance_scales",
    "output_dir": "the option -o",
    "resume_from_checkpoint": "the option --resume_from_checkpoint",
    "max_minutes": "the option --max-minutes",
}
"""What settings of diffusers', accelerate's and other training scripts are called here."""


def _meant(kind: type[TrainConfig], name: str) -> str:
    """The setting that somebody may have meant, as the end of a line."""
    known = kind.model_fields
    there = ELSEWHERE.get(name.lower().replace("-", "_"), "")
    target = re.match(r"\w+", there)
    if target and (target[0] in known or there.startswith("the option")):
        return f"; did you mean {there}?"
    return nearest(name, known)

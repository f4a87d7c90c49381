"""What the training loop trains: a network, its batches, and how its progress is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rectiflow.errors import InputError
from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.metrics_log import check_reporters


class Task(Protocol):
    """What is trained, on what, and how its progress is looked at.

    Optional beside these: ``measure() -> dict[str, float]``, figures of the averaged weights, which
    are in place; ``enable_gradient_checkpointing()``; and ``thread_safe = True``, if `batch` may
    be called from another thread while everything else goes on.
    """

    network: nn.Module
    """Everything that is trained; its forward takes a batch and returns the loss per sample, or
    one loss for all, where samples are compared and a batch cannot be cut up. Parameters that
    need no gradient are neither averaged nor saved."""

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The samples of the given indices; a pure function of them."""
        ...

    def draw_samples(self, path: Path) -> None:
        """Write a picture of what the network can do now (its EMA weights are in place)."""
        ...

    def export(self, folder: Path) -> None:
        """Write the model as an ordinary diffusers or transformers folder (EMA in place)."""
        ...


def check_offers(task: Task, config: TrainConfig) -> None:
    """Refuse early what would fail late.

    Raises:
        InputError: the configuration asks for what the task or the installation does not offer.
    """
    check_reporters(config.report_to)
    wanted = {
        "measure_every": (config.measure_every > 0, "measure"),
        "gradient_checkpointing": (config.gradient_checkpointing, "enable_gradient_checkpointing"),
    }
    for key, (asked, method) in wanted.items():
        if asked and not hasattr(task, method):
            raise InputError(f"config key {key!r}: the recipe {config.recipe} does not offer it")
    if config.fsdp and config.optimizer != "adamw":
        raise InputError(f"fsdp does not go with optimizer {config.optimizer}: take adamw")
    trained = [p for p in task.network.parameters() if p.requires_grad]
    if not trained:
        raise InputError(f"the recipe {config.recipe} leaves nothing to be trained")
    if config.mixed_precision == "fp16" and any(p.dtype == torch.float16 for p in trained):
        raise InputError("mixed_precision fp16 needs weights in float32: load the model in float32")

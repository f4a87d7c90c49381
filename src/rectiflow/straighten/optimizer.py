"""The optimisers of a run and the course of their learning rate."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn

from rectiflow.errors import InputError, install
from rectiflow.straighten.config import TrainConfig


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Warm-up, constant, then 1 − √ decay to zero (arXiv 2405.18392), as a factor in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    into_decay = step - (config.steps - config.decay_steps)
    if config.decay_steps and into_decay > 0:
        return warm * (1 - math.sqrt(into_decay / config.decay_steps))
    return warm


def warn_of_rate(config: TrainConfig) -> None:
    """Warn where warm-up and decay leave no step at the whole learning rate."""
    if config.warmup_steps + config.decay_steps <= config.steps:
        return
    if config.warmup_steps > config.steps:
        what = f"warmup_steps {config.warmup_steps} is longer than the run of {config.steps} steps"
    else:
        what = (
            f"warmup_steps {config.warmup_steps} and decay_steps {config.decay_steps} are more "
            f"than the {config.steps} steps of the run"
        )
    most = max(learning_rate_factor(config, step) for step in range(config.steps))
    warnings.warn(
        f"{what}: the learning rate reaches {most:.2g} of {config.learning_rate:g} at most; give "
        "fewer with --set warmup_steps=...",
        stacklevel=2,
    )


def optimizers(network: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The chosen optimiser for all that is trained, or for what Muon leaves (see the config).

    Raises:
        InputError: adamw8bit without the package bitsandbytes.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if p.ndim == 2 and min(p.shape) > 16 and "embed" not in name]
    chosen = {id(p) for p in hidden} if config.muon_learning_rate else set()
    rest = [p for _, p in named if id(p) not in chosen]
    result = [_plain(rest, config)] if rest else []
    if config.muon_learning_rate and hidden:
        result.append(
            torch.optim.Muon(
                hidden,
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return result


def _plain(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(parameters, lr=rate, weight_decay=decay)
    if config.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise InputError(
                "optimizer adamw8bit needs the package bitsandbytes: "
                f"{install('bitsandbytes')}, or take optimizer adamw"
            ) from None
        result: torch.optim.Optimizer = AdamW8bit(
            parameters, lr=rate, betas=config.betas, weight_decay=decay
        )
        return result
    # One fused pass over the weights: on a CPU five times as fast as tensor by tensor.
    return torch.optim.AdamW(
        parameters, lr=rate, betas=config.betas, weight_decay=decay, fused=True
    )

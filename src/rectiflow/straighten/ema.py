"""The average of a network's weights over training, in float32 whatever the network's dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rectiflow.straighten.config import TrainConfig


class Ema(EMAModel):
    """diffusers' averaged weights with its decay rules, kept in float32 and moved in one pass.

    Of weights that are split over processes each process averages its own part.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: TrainConfig) -> None:
        super().__init__(
            parameters,
            decay=config.ema_decay,
            update_after_step=config.ema_start,
            use_ema_warmup=config.ema_warmup,
            inv_gamma=config.ema_inv_gamma,
            power=config.ema_power,
        )
        self.to(dtype=torch.float32)

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move the average towards the weights: `s ← d s + (1 − d) p`."""
        self.optimization_step += 1
        decay = self.get_decay(self.optimization_step)
        self.cur_decay_value = decay
        weights = [p if p.dtype == torch.float32 else p.float() for p in parts(parameters)]
        torch._foreach_lerp_(parts(self.shadow_params), weights, 1 - decay)

    @contextmanager
    def in_place(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Put the average in the place of the weights, and the weights back at the end."""
        kept = [p.clone() for p in parts(parameters)]
        self._copy(parts(self.shadow_params), parameters)
        try:
            yield
        finally:
            self._copy(kept, parameters)

    @torch.no_grad()
    def _copy(self, source: Sequence[Tensor], parameters: Iterable[nn.Parameter]) -> None:
        for target, tensor in zip(parts(parameters), source, strict=True):
            target.copy_(tensor)


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors without their history; of one that is split, this process's part."""
    return [(t.to_local() if isinstance(t, DTensor) else t).detach() for t in tensors]

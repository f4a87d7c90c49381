"""One step of training: loss, gradients, weights, averaged weights.

Nothing in a step waits for the device, nor for other processes beyond the sum of the gradients:
losses and gradient norms are kept as tensors, to be looked at now and then. (fp16 is the
exception: whether its gradients overflowed has to be known before the weights are moved.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rectiflow.errors import InputError, WorkError
from rectiflow.straighten import processes
from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.ema import Ema
from rectiflow.straighten.feed import made_ahead, micro_batches
from rectiflow.straighten.optimizer import learning_rate_factor, optimizers
from rectiflow.straighten.task import Task

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_LOSS_SCALE = 1e-4

Feed = Any
"""A generator of (number of samples, batch)."""


class Learner:
    """The network of a task and everything that changes while it is trained."""

    def __init__(self, task: Task, config: TrainConfig) -> None:
        self.task, self.config = task, config
        self.accelerator = processes.start(config)
        self.agreed = processes.Agreement(self.accelerator)
        self.device = self.accelerator.device
        self.step, self.skipped = 0, 0
        self.ran: list[dict[str, Any]] = []  # how, and from which step on
        self.losses: list[Tensor] = []  # since they were last reported
        self.norms: list[Tensor] = []
        self.parts = len(self._micro_batches(0))
        task.network.to(self.device)
        if config.gradient_checkpointing:
            task.enable_gradient_checkpointing()  # type: ignore[attr-defined]
        self.network: Any = processes.prepare(
            self.accelerator, task.network, config.fsdp, config.compile
        )
        self.parameters = [p for p in task.network.parameters() if p.requires_grad]
        self.optimizers = optimizers(task.network, config)
        self.base_rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.ema = Ema(self.parameters, config)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.mixed_precision == "fp16"
        )

    def feed(self) -> Feed:
        """The micro-batches of the steps to come, in turn."""

        def make(indices: Sequence[int]) -> tuple[int, dict[str, Tensor]]:
            batch = self.task.batch(indices)
            if self.device.type != "cpu":  # so that the copy waits for nothing
                batch = {
                    name: value.pin_memory() if value.device.type == "cpu" else value
                    for name, value in batch.items()
                }
            return len(indices), batch

        steps = range(self.step, self.config.steps)
        parts = (part for step in steps for part in self._micro_batches(step))
        wanted = self.config.prefetch
        if wanted is None:
            wanted = self.device.type != "cpu"
        ahead = wanted and getattr(self.task, "thread_safe", False)
        return made_ahead(make, parts, ahead)

    def learn(self, feed: Feed) -> None:
        """Take a step."""
        config, share = self.config, self.config.batch_size / self.accelerator.num_processes
        self._seed()
        losses = []
        for part in range(self.parts):
            size, batch = next(feed)
            batch = {
                name: value.to(self.device, non_blocking=True) for name, value in batch.items()
            }
            last = part == self.parts - 1
            with processes.adding_up(self.accelerator, self.network, last):
                with self._autocast():
                    found: Tensor = self.network(**batch)
                if found.ndim == 0 and size != config.batch_size:
                    raise InputError(
                        "this recipe compares the samples of a batch with each other, which "
                        "cannot be cut up: train in one process without micro-batches"
                    )
                loss = found.float().mean()
                if size != share:
                    loss = loss * (size / share)
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        self.losses.append(torch.stack(losses).sum() if self.parts > 1 else losses[0])
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.scaler.is_enabled() and not norm.isfinite():
            self.skipped += 1
        else:
            self.norms.append(norm)
            self._update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.step += 1

    def _update(self) -> None:
        factor = learning_rate_factor(self.config, self.step)
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        self.ema.step(self.parameters)

    def require_finite(self, *more: Tensor) -> None:
        """Stop before weights that a bad loss or gradient has spoilt replace good ones.

        Raises:
            WorkError: a loss or gradient norm since the last report, or of `more`, is not finite.
        """
        again = "the last checkpoint is as it was; begin another run with a lower learning rate"
        losses = [*self.losses, *more]
        if losses and not torch.stack(losses).isfinite().all():
            raise WorkError(f"the loss is not a number by step {self.step}: {again}")
        if self.norms and not torch.stack(self.norms).isfinite().all():
            raise WorkError(f"the gradient is not a number by step {self.step}: {again}")
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_LOSS_SCALE:
            raise WorkError(
                f"the gradient overflows at any loss scale by step {self.step}: {again}, or with "
                "mixed_precision bf16"
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place, whole in this process, and no dropout."""
        modes = {module: module.training for module in self.task.network.modules()}
        with self.ema.in_place(self.parameters), processes.assembled(self.task.network):
            self.task.network.eval()
            try:
                yield
            finally:
                for module, training in modes.items():
                    module.training = training

    def _seed(self) -> None:
        """Dropout's draws depend on the step alone, not on what was drawn before it."""
        seed = (self.config.seed * 1_000_003 + self.step) * 4099 + self.accelerator.process_index
        torch.default_generator.manual_seed(seed % 2**63)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed % 2**63)

    def _autocast(self) -> Any:
        dtype = DTYPES.get(self.config.mixed_precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _micro_batches(self, step: int) -> list[Sequence[int]]:
        who = self.accelerator.process_index, self.accelerator.num_processes
        return micro_batches(self.config, step, *who)

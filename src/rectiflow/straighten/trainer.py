"""The one training loop: flow matching, diffusion, codecs, reflow and distillation alike.

What differs between them is a `Task`: where a batch comes from and what its loss is. A batch is a
pure function of the indices of its samples, and every random draw comes from a sample's own seed,
so a run that is killed and resumed, or split over processes, sees the same samples and noise.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from rectiflow.errors import WorkError
from rectiflow.straighten import checkpoint
from rectiflow.straighten.config import TrainConfig


class Task(Protocol):
    """What is trained, on what, and how its progress is looked at."""

    network: nn.Module
    """Everything that is trained; its forward takes a batch and returns the loss per sample."""

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The samples of the given indices; a pure function of them."""
        ...

    def draw_samples(self, path: Path) -> None:
        """Write a picture of what the network can do now (its EMA weights are in place)."""
        ...

    def export(self, folder: Path) -> None:
        """Write the model as an ordinary diffusers or transformers folder (EMA in place)."""
        ...


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Warm-up, constant, then 1 − √ decay to zero (arXiv 2405.18392), as a factor in [0, 1]."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    into_decay = step - (config.steps - config.decay_steps)
    if config.decay_steps and into_decay > 0:
        return warm * (1 - math.sqrt(into_decay / config.decay_steps))
    return warm


def optimizers(network: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if p.ndim == 2 and min(p.shape) > 16 and "embed" not in name]
    chosen = {id(p) for p in hidden} if config.muon_learning_rate else set()
    rest = [p for _, p in named if id(p) not in chosen]
    result: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            rest,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
    ]
    if config.muon_learning_rate:
        result.append(
            torch.optim.Muon(
                hidden,
                lr=config.muon_learning_rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return result


class Trainer:
    """Runs a task to its last step, from wherever it was left."""

    def __init__(self, task: Task, config: TrainConfig, run: Path) -> None:
        self.task, self.config, self.run = task, config, run
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.device = self.accelerator.device
        task.network.to(self.device)
        self.parameters = [p for p in task.network.parameters() if p.requires_grad]
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, foreach=True)
        self.optimizers = optimizers(task.network, config)
        self.base_rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        network = torch.compile(task.network) if config.compile else task.network
        self.network: Any = self.accelerator.prepare_model(network)
        self.step = 0
        self.stopped = False

    def resume(self, wanted: str | None = "latest") -> bool:
        """Continue from a checkpoint of this run; False when there is none."""
        found = checkpoint.resolve(self.run, wanted)
        if found is None:
            return False
        state = checkpoint.load(found)
        self.task.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.device)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = int(state["progress"]["step"])
        return True

    def save(self) -> None:
        """Write a checkpoint of the present step."""
        state = {
            "network": dict(self.task.network.state_dict()),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": {"step": self.step},
        }
        checkpoint.save(self.run, self.step, state, self.config.keep_last)

    def train(self, max_minutes: float | None = None) -> None:
        """Train until the last step, the time limit or a SIGTERM; a checkpoint is left each time.

        Raises:
            WorkError: the loss is not finite; the last checkpoint is untouched.
        """
        config, main = self.config, self.accelerator.is_main_process
        self.run.mkdir(parents=True, exist_ok=True)
        if main:
            config.dump(self.run / "config.yaml")
        previous = signal.signal(signal.SIGTERM, self._stop)
        started = saved = drawn = time.monotonic()
        first, recent = self.step, (started, self.step)
        running: list[Tensor] = []
        progress = tqdm(
            total=config.steps, initial=self.step, unit="step", disable=None if main else True
        )
        try:
            while self.step < config.steps and not self.stopped:
                running.append(self._train_step())  # the losses since the last look
                self.step += 1
                progress.update()
                now = time.monotonic()
                if self.step % config.log_every == 0 or self.step == config.steps:
                    rate = (self.step - recent[1]) * config.batch_size / (now - recent[0])
                    self._log(progress, running, rate)
                    running, recent = [], (now, self.step)
                if main and now - saved > 60 * config.checkpoint_minutes:
                    self._require_finite(running)
                    self.save()
                    saved = now
                if main and now - drawn > 60 * config.sample_minutes:
                    self._draw()
                    drawn = now
                if max_minutes is not None and now - started > 60 * max_minutes:
                    break
        finally:
            progress.close()
            signal.signal(signal.SIGTERM, previous)
        if main and self.step > first:
            self._require_finite(running)
            self.save()
            self._draw()

    def export(self, folder: Path) -> None:
        """Write the EMA weights as the task's model folder."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            self.task.export(folder)
        finally:
            self.ema.restore(self.parameters)

    def _train_step(self) -> Tensor:
        config, accelerator = self.config, self.accelerator
        start = self.step * config.batch_size
        indices = range(start, start + config.batch_size)
        mine = indices[accelerator.process_index :: accelerator.num_processes]
        batch = {name: value.to(self.device) for name, value in self.task.batch(mine).items()}
        with accelerator.autocast():
            loss: Tensor = self.network(**batch).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(self.parameters, config.grad_clip)
        factor = learning_rate_factor(config, self.step)
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.parameters)
        return loss.detach()

    def _log(self, progress: tqdm[Any], losses: list[Tensor], rate: float) -> None:
        mean = self.accelerator.reduce(torch.stack(losses).mean(), "mean")
        self._require_finite([mean])
        loss = float(mean)
        if not self.accelerator.is_main_process:
            return
        record = {
            "step": self.step,
            "samples": self.step * self.config.batch_size,
            "loss": loss,
            "learning_rate_factor": learning_rate_factor(self.config, self.step - 1),
            "samples_per_second": round(rate, 1),
            "time": round(time.time()),
        }
        with (self.run / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        progress.set_postfix(loss=f"{loss:.4f}", samples_per_second=f"{rate:.0f}")

    def _require_finite(self, losses: Sequence[Tensor]) -> None:
        """Stop before weights that a bad loss has spoilt replace good ones."""
        if losses and not torch.stack(list(losses)).isfinite().all():
            raise WorkError(
                f"the loss is not a number by step {self.step}; resume from the last checkpoint "
                f"in {self.run} with a lower learning rate"
            )

    def _draw(self) -> None:
        folder = self.run / "samples"
        folder.mkdir(exist_ok=True)
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            self.task.draw_samples(folder / f"{self.step:07d}.png")
        finally:
            self.ema.restore(self.parameters)

    def _stop(self, *_: object) -> None:
        self.stopped = True

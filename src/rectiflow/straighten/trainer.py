"""The one training loop: flow matching, diffusion, codecs, reflow and distillation alike.

What differs between them is a `Task`: where a batch comes from and what its loss is. A batch is a
pure function of the indices of its samples, and every random draw comes from a sample's own seed,
so a run that is killed and resumed, or split over processes, sees the same samples and noise.

Nothing in a step waits for the device or for other processes, beyond the sum of the gradients:
losses and gradient norms are kept as tensors and looked at every `log_every` steps and before
anything is saved.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rectiflow.errors import InputError, WorkError
from rectiflow.straighten import checkpoint, processes, run_state
from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.ema import Ema
from rectiflow.straighten.feed import made_ahead, micro_batches
from rectiflow.straighten.metrics_log import MetricsLog, check_reporters
from rectiflow.straighten.optimizer import learning_rate_factor, optimizers

__all__ = ["Task", "Trainer", "learning_rate_factor", "optimizers"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_LOSS_SCALE = 1e-4


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


class Trainer:
    """Runs a task to its last step, from wherever it was left.

    Args:
        task: What is trained.
        config: How.
        run: Folder of the run: configuration, log, samples, checkpoints.
        identity: What the run depends on beside its configuration, by name: the hash of the model
            it starts from, of its pairs' manifest. It is saved, and must be the same on resuming.

    Raises:
        InputError: the configuration asks for what the task, the machine or the installation
            does not offer.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        run: Path,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.task, self.config, self.run = task, config, run
        self.identity = dict(identity or {})
        self._check_offers()
        self.accelerator = processes.start(config.fsdp, config.mixed_precision)
        self.main = self.accelerator.is_main_process
        self.device = self.accelerator.device
        self.parts = len(self._micro_batches(0))
        task.network.to(self.device)
        if config.gradient_checkpointing:
            task.enable_gradient_checkpointing()  # type: ignore[attr-defined]
        network = torch.compile(task.network) if config.compile else task.network
        self.network: Any
        self.network, self.optimizers = processes.prepare(
            self.accelerator, network, optimizers(task.network, config)
        )
        self.parameters = [p for p in task.network.parameters() if p.requires_grad]
        self.base_rates = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.ema = Ema(self.parameters, config)
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=config.mixed_precision == "fp16"
        )
        self.step, self.skipped = 0, 0
        self.losses: list[Tensor] = []  # since the last line of the log
        self.norms: list[Tensor] = []
        self.resumed = self.stopped = False

    def resume(self, wanted: str | None = "latest") -> bool:
        """Continue from a checkpoint of this run; False when there is none.

        Raises:
            InputError: there is no such checkpoint, it is damaged, or it is of a run with another
                model, other data or another configuration.
        """
        found = checkpoint.resolve(self.run, wanted)
        if found is not None:
            run_state.restore(self, checkpoint.load(found), found)
            self.resumed = True
        return found is not None

    def save(self) -> None:
        """Write a checkpoint of the present step; all processes call it, the first writes."""
        state = run_state.collect(self)
        if self.main:
            checkpoint.save(self.run, self.step, state, self.config.keep_last)

    def train(self, max_minutes: float | None = None) -> None:
        """Train until the last step, the time limit or a SIGTERM; a checkpoint is left each time.

        Checkpoints later than the one that was resumed from are removed.

        Raises:
            InputError: the run has checkpoints and none of them was resumed from.
            WorkError: the loss or a gradient is not finite, a checkpoint could not be written, or
                another process is gone; the last checkpoint is untouched.
        """
        with processes.together(self.accelerator), self._sitting() as reports:
            self._train(reports, max_minutes)
            self.accelerator.wait_for_everyone()

    def export(self, folder: Path) -> None:
        """Write the EMA weights as the task's model folder, from the first process.

        Raises:
            InputError: the weights are split over processes.
        """
        if self.config.fsdp and self.accelerator.num_processes > 1:
            raise InputError("weights split by fsdp are exported by one process: without torchrun")
        if self.main:
            with self._averaged():
                self.task.export(folder)

    def _train(self, reports: MetricsLog | None, max_minutes: float | None) -> None:
        config = self.config
        started = saved = drawn = time.monotonic()
        first, last_save, recent = self.step, self.step, (started, self.step)
        if config.measure_every and not self.step and not self.resumed:
            self._report(reports, None, 0.0)
        # Wishes that hang on a clock or a signal are put to all processes now and then only.
        every = 1 if self.accelerator.num_processes == 1 else config.log_every
        feed = self._feed()
        with tqdm(
            total=config.steps,
            initial=self.step,
            unit="step",
            disable=None if self.main else True,
        ) as progress:
            while self.step < config.steps:
                self._train_step(feed)
                self.step += 1
                progress.update()
                now, last = time.monotonic(), self.step == config.steps
                if self.step % config.log_every == 0 or self._is_measured() or last:
                    rate = (self.step - recent[1]) * config.batch_size / (now - recent[0])
                    self._report(reports, progress, rate)
                    recent = (time.monotonic(), self.step)
                stop = save = draw = False
                if self.step % every == 0:
                    over = max_minutes is not None and now - started > 60 * max_minutes
                    stop, save, draw = processes.agreed(
                        self.accelerator,
                        (
                            self.stopped or (self.main and over),
                            self.main and now - saved > 60 * config.checkpoint_minutes,
                            self.main and now - drawn > 60 * config.sample_minutes,
                        ),
                    )
                if save or (config.save_every and self.step % config.save_every == 0):
                    self._save(reports)
                    saved, last_save = now, self.step
                if draw:
                    self._draw(reports)
                    drawn = now
                if stop:
                    break
            feed.close()
        if self.step > first:
            if last_save != self.step:
                self._save(reports)
            self._draw(reports)

    def _train_step(self, feed: Iterator[tuple[int, dict[str, Tensor]]]) -> None:
        config, share = self.config, self.config.batch_size / self.accelerator.num_processes
        self._seed()
        losses = []
        for part in range(self.parts):
            size, batch = next(feed)
            batch = {
                name: value.to(self.device, non_blocking=True) for name, value in batch.items()
            }
            last = part == self.parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self.network):
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
        norm = processes.whole(nn.utils.clip_grad_norm_(self.parameters, config.grad_clip))
        if self.scaler.is_enabled() and not norm.isfinite():
            self.skipped += 1
        else:
            self.norms.append(norm)
            self._update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.update()

    def _update(self) -> None:
        factor = learning_rate_factor(self.config, self.step)
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        self.ema.step(self.parameters)

    def _seed(self) -> None:
        """Dropout's draws depend on the step alone, not on what was drawn before it."""
        seed = (self.config.seed * 1_000_003 + self.step) * 4099 + self.accelerator.process_index
        torch.default_generator.manual_seed(seed % 2**63)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed % 2**63)

    def _autocast(self) -> Any:
        dtype = DTYPES.get(self.config.mixed_precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def _micro_batches(self, step: int) -> list[Sequence[int]]:
        who = self.accelerator.process_index, self.accelerator.num_processes
        return micro_batches(self.config, step, *who)

    def _feed(self) -> Any:
        def make(indices: Sequence[int]) -> tuple[int, dict[str, Tensor]]:
            batch = self.task.batch(indices)
            if self.device.type == "cuda":
                batch = {name: value.pin_memory() for name, value in batch.items()}
            return len(indices), batch

        steps = range(self.step, self.config.steps)
        parts = (part for step in steps for part in self._micro_batches(step))
        ahead = self.config.prefetch and getattr(self.task, "thread_safe", False)
        return made_ahead(make, parts, ahead)

    def _is_measured(self) -> bool:
        every = self.config.measure_every
        return bool(every) and (self.step % every == 0 or self.step == self.config.steps)

    def _report(self, reports: MetricsLog | None, progress: tqdm[Any] | None, rate: float) -> None:
        """A line of the log: what has been since the last one."""
        record: dict[str, Any] = {
            "step": self.step,
            "samples": self.step * self.config.batch_size,
            "loss": None,
        }
        if self.losses:
            mean = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean")
            self.require_finite(mean)
            record |= {
                "loss": float(mean),
                "gradient_norm": float(torch.stack(self.norms).mean()) if self.norms else None,
                "learning_rate_factor": learning_rate_factor(self.config, self.step - 1),
                "samples_per_second": round(rate, 1),
            }
        if self.scaler.is_enabled():
            record |= {"loss_scale": self.scaler.get_scale(), "skipped_steps": self.skipped}
        self.losses, self.norms = [], []
        if self._is_measured() and (measures := self._measure()):
            record["measures"] = measures
            if progress is not None and not progress.disable:
                figures = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
                progress.write(f"step {self.step}: {figures}")
        record["time"] = round(time.time())
        if reports is not None:
            reports.write(record)
        if progress is not None:
            progress.set_postfix(
                loss=f"{record['loss']:.4f}", samples_per_second=f"{rate:.0f}", refresh=False
            )

    def require_finite(self, *more: Tensor) -> None:
        """Stop before weights that a bad loss or gradient has spoilt replace good ones."""
        again = (
            f"the last checkpoint in {self.run} is as it was: begin another run with a lower "
            "learning rate"
        )
        if more or self.losses:
            if not torch.stack([*self.losses, *more]).isfinite().all():
                raise WorkError(f"the loss is not a number by step {self.step}; {again}")
        if self.norms and not torch.stack(self.norms).isfinite().all():
            raise WorkError(f"the gradient is not a number by step {self.step}; {again}")
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_LOSS_SCALE:
            raise WorkError(
                f"the gradient overflows at any loss scale by step {self.step}; {again}, or with "
                "mixed_precision bf16"
            )

    def _save(self, reports: MetricsLog | None) -> None:
        self.require_finite()
        if reports is not None:
            reports.flush()
        self.save()

    def _measure(self) -> dict[str, float]:
        with self._averaged():
            if not self.main:
                return {}
            measures = self.task.measure()  # type: ignore[attr-defined]
            return {name: float(value) for name, value in measures.items()}

    def _draw(self, reports: MetricsLog | None) -> None:
        self.require_finite()
        with self._averaged():
            if self.main:
                folder = self.run / "samples"
                folder.mkdir(exist_ok=True)
                path = folder / f"{self.step:07d}.png"
                self.task.draw_samples(path)
                if reports is not None:
                    reports.picture(path, self.step)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place, whole in this process, and no dropout."""
        modes = {module: module.training for module in self.task.network.modules()}
        with self.ema.in_place(self.parameters), processes.assembled(self.task.network):
            self.task.network.eval()
            try:
                yield
            finally:
                for module, training in modes.items():
                    module.training = training

    @contextmanager
    def _sitting(self) -> Iterator[MetricsLog | None]:
        """The run's folder as the present step left it, its reports open; SIGTERM asks to stop."""
        reports = None
        if self.main:
            if not self.resumed and not self.step and checkpoint.checkpoints(self.run):
                raise InputError(
                    f"{self.run} has checkpoints: go on from them, or choose another folder"
                )
            self.run.mkdir(parents=True, exist_ok=True)
            checkpoint.tidy(self.run)
            checkpoint.drop_after(self.run, self.step)
            self.config.dump(self.run / "config.yaml")
            begun = self.step if self.resumed or self.step else -1
            reports = MetricsLog(self.run, self.config.report_to, begun)
        here = threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGTERM, self._stop) if here else None
        try:
            yield reports
        finally:
            if here:
                signal.signal(signal.SIGTERM, previous)
            if reports is not None:
                reports.close()

    def _check_offers(self) -> None:
        """Refuse early what would fail late."""
        config, network = self.config, self.task.network
        check_reporters(config.report_to)
        wanted = {
            "measure": config.measure_every > 0,
            "enable_gradient_checkpointing": config.gradient_checkpointing,
        }
        for method, asked in wanted.items():
            if asked and not hasattr(self.task, method):
                key = "measure_every" if method == "measure" else "gradient_checkpointing"
                raise InputError(
                    f"config key {key!r}: the recipe {config.recipe} has no such thing"
                )
        trained = [p for p in network.parameters() if p.requires_grad]
        if not trained:
            raise InputError(f"the recipe {config.recipe} leaves nothing to be trained")
        if config.mixed_precision == "fp16" and any(p.dtype == torch.float16 for p in trained):
            raise InputError(
                "mixed_precision fp16 needs weights in float32: load the model in float32"
            )

    def _stop(self, *_: object) -> None:
        self.stopped = True

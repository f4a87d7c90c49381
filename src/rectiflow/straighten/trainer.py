"""The one training loop: flow matching, diffusion, codecs, reflow and distillation alike.

What differs between them is a `Task`: where a batch comes from and what its loss is. A batch is a
pure function of the indices of its samples, and every random draw comes from a sample's own seed,
so a run that is killed and resumed, or split over processes, sees the same samples and noise.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rectiflow.errors import InputError, WorkError
from rectiflow.files import unfinished_folder
from rectiflow.progress import progress
from rectiflow.stopping import Request, on_request
from rectiflow.straighten import checkpoint, processes, run_lock, run_state
from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.ema import Ema
from rectiflow.straighten.learner import Learner
from rectiflow.straighten.metrics_log import MetricsLog
from rectiflow.straighten.optimizer import learning_rate_factor, optimizers, warn_of_rate
from rectiflow.straighten.task import Task, check_offers

__all__ = ["Task", "Trainer", "learning_rate_factor", "optimizers"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a quota, a limit on the size of files."""


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
        self.identity = json.loads(json.dumps(dict(identity or {})))
        check_offers(task, config)
        self.learner = Learner(task, config)
        self.accelerator = self.learner.accelerator
        self.main: bool = self.accelerator.is_main_process
        self.resumed = False
        self.stopped = False
        """Whether a signal asked any process to stop."""
        self._request = Request()

    @property
    def step(self) -> int:
        """How many steps have been taken."""
        return self.learner.step

    @property
    def ema(self) -> Ema:
        """The averaged weights."""
        return self.learner.ema

    def resume(self, wanted: str | None = "latest") -> bool:
        """Continue from a checkpoint of this run; False when there is none.

        Raises:
            InputError: there is no such checkpoint, it is damaged, or it is of a run with another
                model, other data or another configuration, or of more steps than this one's.
        """
        found = checkpoint.to_go_on_from(self.run, wanted, self.config.steps)
        if found is None:
            return False
        state = checkpoint.load(found)
        try:
            run_state.restore(self.learner, self.identity, state, found)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"the checkpoint {found} is damaged ({error}): remove its folder to go on from "
                "the one before"
            ) from error
        self.resumed = True
        return True

    def save(self) -> None:
        """Write a checkpoint of the present step; all processes call it, the first writes."""
        state = run_state.collect(self.learner, self.identity)
        if self.main:
            checkpoint.save(self.run, self.step, state, self.config.keep_last)

    def train(self, max_minutes: float | None = None) -> None:
        """Train until the last step, the time limit or a signal; a checkpoint is left each time.

        Signals are SIGTERM, SIGINT and SIGUSR1, to any of the processes; they are heeded after the
        step. Checkpoints later than the one that was resumed from are removed.

        Raises:
            InputError: the run has checkpoints and none of them was resumed from, or another job
                is at work in its folder.
            KeyboardInterrupt: a second Ctrl-C; the last checkpoint is untouched.
            WorkError: the loss or a gradient is not finite, a checkpoint could not be written, or
                another process is gone; the last checkpoint is untouched.
        """
        try:
            with (
                processes.together(self.accelerator),
                on_request() as self._request,
                self._sitting() as reports,
            ):
                self._train(reports, max_minutes)
                self._ask()
                self.accelerator.wait_for_everyone()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise WorkError(
                f"cannot write in {self.run} ({error.strerror}): its checkpoints are as they were; "
                "make room on the disk and go on with the same command"
            ) from error

    def export(self, folder: Path) -> None:
        """Write the EMA weights as the task's model folder, from the first process.

        Raises:
            InputError: the weights are split over processes.
        """
        if self.config.fsdp and self.accelerator.num_processes > 1:
            raise InputError("weights split by fsdp are exported by one process: without torchrun")
        if self.main:
            with self.learner.averaged():
                self.task.export(folder)

    def _train(self, reports: MetricsLog | None, max_minutes: float | None) -> None:
        config, learner = self.config, self.learner
        if self.main:
            warn_of_rate(config)
        started = saved = drawn = time.monotonic()
        first, last_save, recent = self.step, self.step, (started, self.step)
        if config.measure_every and not self.step and not self.resumed:
            self._report(reports, None, 0.0)
        if learner.losses and self._is_reported():  # by a sitting that had no time for it
            self._report(reports, None, 0.0)
            self._save(reports)
        if self.step < config.steps:
            self._say_how()
        feed = learner.feed()
        with progress(
            desc=config.recipe,
            total=config.steps,
            initial=self.step,
            unit="step",
            disable=not self.main,
        ) as bar:
            while self.step < config.steps:
                learner.learn(feed)
                bar.update()
                now = time.monotonic()
                over, save, draw = self._ask(
                    max_minutes is not None and now - started > 60 * max_minutes,
                    now - saved > 60 * config.checkpoint_minutes,
                    now - drawn > 60 * config.sample_minutes,
                )
                if self.stopped:
                    break
                if self._is_reported():
                    rate = (self.step - recent[1]) * config.batch_size / (now - recent[0])
                    self._report(reports, bar, rate)
                    recent = (time.monotonic(), self.step)
                if save or (config.save_every and self.step % config.save_every == 0):
                    self._save(reports)
                    saved, last_save = now, self.step
                if draw:
                    self._draw(reports)
                    drawn = now
                if over:
                    break
            feed.close()
        if self.step > first and last_save != self.step:
            self._save(reports)
        if self.stopped:
            return
        # A run that was killed after its last checkpoint may lack the last picture.
        lacking = self.main and not self._picture.is_file()
        if self.step > first or learner.agreed(lacking)[0]:
            self._draw(reports)

    def _ask(self, *wishes: bool) -> list[bool]:
        """Agree with the other processes: on a stop if any has had a signal, and on wishes of the
        first, whose clock counts.
        """
        mine = [self.main and wish for wish in wishes]
        stopped, *granted = self.learner.agreed(bool(self._request.asked), *mine)
        self.stopped = self.stopped or stopped
        return granted

    def _say_how(self) -> None:
        """Note down by how many processes, where and how precisely steps are taken from here."""
        how = {
            "processes": self.accelerator.num_processes,
            "device": self.learner.device.type,
            "mixed_precision": self.config.mixed_precision,
        }
        ran = self.learner.ran
        if not ran or {**ran[-1], "from_step": 0} != {"from_step": 0, **how}:
            ran.append({"from_step": self.step, **how})

    def _is_reported(self) -> bool:
        step, last = self.step, self.config.steps
        return step % self.config.log_every == 0 or self._is_measured() or step == last

    def _is_measured(self) -> bool:
        every = self.config.measure_every
        return bool(every) and (self.step % every == 0 or self.step == self.config.steps)

    def _report(self, reports: MetricsLog | None, bar: Any, rate: float) -> None:
        """A line of the log: what has been since the last one."""
        record: dict[str, Any] = {
            "step": self.step,
            "samples": self.step * self.config.batch_size,
            "loss": None,
        }
        learner = self.learner
        if learner.losses:
            mean = self.accelerator.reduce(torch.stack(learner.losses).mean(), "mean")
            learner.require_finite(mean)
            norm = float(torch.stack(learner.norms).mean()) if learner.norms else None
            record |= {
                "loss": float(mean),
                "gradient_norm": norm,
                "learning_rate_factor": learning_rate_factor(self.config, self.step - 1),
                "samples_per_second": round(rate, 1),
            }
            learner.losses, learner.norms = [], []
        if learner.scaler.is_enabled():
            record |= {
                "loss_scale": learner.scaler.get_scale(),
                "skipped_steps": learner.skipped,
            }
        if self._is_measured() and (measures := self._measure()):
            record["measures"] = measures
            if bar is not None and sys.stderr.isatty():
                figures = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
                bar.write(f"step {self.step}: {figures}")
        record["time"] = round(time.time())
        if reports is not None:
            reports.write(record)
        if bar is not None:
            bar.set_postfix(
                loss=f"{record['loss']:.4f}", samples_per_second=f"{rate:.0f}", refresh=False
            )

    def _save(self, reports: MetricsLog | None) -> None:
        self.learner.require_finite()
        if reports is not None:
            reports.flush()
        self.save()

    def _measure(self) -> dict[str, float]:
        with self.learner.averaged():
            if not self.main:
                return {}
            measures = self.task.measure()  # type: ignore[attr-defined]
            return {name: float(value) for name, value in measures.items()}

    def _draw(self, reports: MetricsLog | None) -> None:
        self.learner.require_finite()
        with self.learner.averaged():
            if self.main:
                path = self._picture
                unfinished = unfinished_folder(path)
                self.task.draw_samples(unfinished / path.name)
                for drawn in unfinished.iterdir():
                    os.replace(drawn, path)
                unfinished.rmdir()
                if reports is not None:
                    reports.picture(path, self.step)

    @property
    def _picture(self) -> Path:
        """Where the sheet of the present step is, once it is drawn."""
        return self.run / "samples" / f"{self.step:07d}.png"

    @contextmanager
    def _sitting(self) -> Iterator[MetricsLog | None]:
        """The run's folder, this job's alone, as the present step left it, its reports open."""
        if not self.main:
            yield None
            return
        if not self.resumed and not self.step and checkpoint.checkpoints(self.run):
            raise InputError(
                f"{self.run} has checkpoints: go on from them, or choose another folder"
            )
        self.run.mkdir(parents=True, exist_ok=True)
        with run_lock.held(self.run):
            checkpoint.tidy(self.run)
            checkpoint.drop_after(self.run, self.step)
            self.config.dump(self.run / "config.yaml")
            begun = self.step if self.resumed or self.step else -1
            settings = self.config.model_dump(mode="json")
            reports = MetricsLog(self.run, self.config.report_to, begun, settings)
            try:
                yield reports
            finally:
                reports.close()

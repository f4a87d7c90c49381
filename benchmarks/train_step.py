"""What a training step costs beside a bare PyTorch loop on the same model, measured in one run.

    python benchmarks/train_step.py [--widths 32 64] [--batch-size 8] [--steps 20] [--json]

Both train a U-Net of Stable Diffusion's class on the same batches: the bare loop with the same
fused AdamW, gradient clipping, averaged weights and autocast, and nothing else; the trainer with
its log, its checks and its clock. Blocks of steps of the one and of the other take turns inside
one training run, so that a noisy machine troubles both alike; the ratios are those of the medians.
Beside the wall's clock that of the processor is read, which other programs trouble less.
`--prefetch` makes the batches costlier and compares the trainer with and without its thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.learner import Learner
from rectiflow.straighten.trainer import Trainer

LIMIT = 1.10
TEXT_WIDTH, TEXT_LENGTH = 64, 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Measure, print a line or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", type=int, nargs=2, default=[32, 64])
    parser.add_argument("--size", type=int, default=16, help="side of the latents")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="per block")
    parser.add_argument("--repeats", type=int, default=7, help="blocks of either")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--prefetch", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        **vars(options),
    }
    record.pop("json")
    record |= prefetching(options) if options.prefetch else overhead(options)
    if options.json:
        print(json.dumps(record, indent=2))
        return
    print(f"{record['machine']}, {options.threads} thread(s), {record['date']}")
    if options.prefetch:
        print(
            f"trainer without prefetching {record['plain_ms']:.1f} ms a step, with it "
            f"{record['prefetched_ms']:.1f} ms: {record['ratio']:.3f} ×"
        )
        return
    print(
        f"{record['parameters'] / 1e6:.2f}M parameters: bare loop {record['bare_wall_ms']:.1f} ms "
        f"a step, trainer {record['trainer_wall_ms']:.1f} ms: {record['ratio_wall']:.3f} × (limit "
        f"{LIMIT:.2f}); processor time {record['ratio_cpu']:.3f} ×"
    )


class Objective(nn.Module):
    """Flow matching with a small U-Net."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        torch.manual_seed(options.seed)
        self.unet = UNet2DConditionModel(
            sample_size=options.size,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=tuple(options.widths),
            layers_per_block=1,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=8,
            norm_num_groups=16,
        )

    def forward(self, x_0: Tensor, x_1: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The squared error of the velocity, per sample."""
        time_ = t[:, None, None, None]
        x_t = torch.lerp(x_0, x_1, time_)
        velocity = self.unet(x_t, 1000 * (1 - t), text, return_dict=False)[0]
        return (velocity.float() - (x_0 - x_1)).square().mean((1, 2, 3))


class Task:
    """The objective on random latents; `before_step` is called with the number of each step."""

    def __init__(self, options: argparse.Namespace, before_step: Callable[[int], None]) -> None:
        self.options, self.before_step = options, before_step
        self.network: nn.Module = Objective(options)
        self.thread_safe = False

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Noise and latents of the samples' own seeds."""
        self.before_step(indices[0] // self.options.batch_size)
        return batch(indices, self.options.size)

    def draw_samples(self, path: Path) -> None:
        """Nothing is drawn."""

    def export(self, folder: Path) -> None:
        """Nothing is exported."""


def batch(indices: Sequence[int], size: int) -> dict[str, Tensor]:
    """Noise, latents, times and text of the samples' own seeds."""
    generators = [torch.Generator().manual_seed(index) for index in indices]

    def drawn(*shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    return {
        "x_0": drawn(4, size, size),
        "x_1": drawn(4, size, size),
        "t": drawn().sigmoid(),
        "text": drawn(TEXT_LENGTH, TEXT_WIDTH),
    }


def configuration(options: argparse.Namespace, steps: int) -> TrainConfig:
    """The trainer's settings: as they come, but no checkpoint inside the run."""
    return TrainConfig(
        recipe="benchmark",
        seed=options.seed,
        steps=steps,
        batch_size=options.batch_size,
        mixed_precision=options.mixed_precision,
        prefetch=True,  # where the task is thread-safe
        checkpoint_minutes=1e6,
        sample_minutes=1e6,
    )


class BareLoop:
    """The loop that everybody writes."""

    def __init__(self, options: argparse.Namespace, config: TrainConfig) -> None:
        self.options, self.config, self.step = options, config, 0
        self.network = Objective(options)
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.scaler = torch.amp.GradScaler("cpu", enabled=config.mixed_precision == "fp16")

    def train(self, steps: int) -> None:
        """So many steps."""
        dtype = DTYPES.get(self.config.mixed_precision)
        for _ in range(steps):
            start = self.step * self.options.batch_size
            samples = batch(range(start, start + self.options.batch_size), self.options.size)
            with torch.autocast("cpu", dtype) if dtype else nullcontext():
                loss = self.network(**samples).mean()
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - self.config.ema_decay)
            self.step += 1


def overhead(options: argparse.Namespace) -> dict[str, Any]:
    """The trainer beside the bare loop."""
    steps = options.steps
    config = configuration(options, steps * (options.repeats + 1) + 1)
    bare = BareLoop(options, config)
    bare_times: list[Times] = []
    trainer_times: list[Times] = []
    resumed = now()

    def before_step(step: int) -> None:
        """Between the blocks of the trainer's run: a block of the bare loop."""
        nonlocal resumed
        if step % steps:
            return
        begun = now()
        if step:
            trainer_times.append(begun.since(resumed))
        bare.train(steps)
        resumed = now()
        bare_times.append(resumed.since(begun))

    task = Task(options, before_step)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(task, config, Path(folder)).train()
    # The first block of either warms up; the bare loop has one more at the end.
    blocks = {"trainer": trainer_times[1:], "bare": bare_times[1:-1]}
    record: dict[str, Any] = {"parameters": sum(p.numel() for p in task.network.parameters())}
    for name, times in blocks.items():
        for clock in ("wall", "cpu"):
            each = [1000 * getattr(block, clock) / steps for block in times]
            record[f"{name}_{clock}_ms"] = statistics.median(each)
            record[f"{name}_{clock}_ms_each"] = each
    for clock in ("wall", "cpu"):
        record[f"ratio_{clock}"] = record[f"trainer_{clock}_ms"] / record[f"bare_{clock}_ms"]
    return record | {"limit": LIMIT}


class Times(NamedTuple):
    """Seconds of the wall's clock and of this process's processors."""

    wall: float
    cpu: float

    def since(self, before: Times) -> Times:
        """What has passed."""
        return Times(self.wall - before.wall, self.cpu - before.cpu)


def now() -> Times:
    """The time."""
    return Times(time.perf_counter(), time.process_time())


class CostlyTask(Task):
    """Batches that take about as long as a small network's step."""

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Noise that is drawn and sorted again and again."""
        samples = super().batch(indices)
        torch.randn(400_000).sort()
        return samples


def prefetching(options: argparse.Namespace) -> dict[str, Any]:
    """The trainer without and with a thread that makes its batches, run by run in turns."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.repeats):
        for ahead, found in times.items():
            task = CostlyTask(options, lambda step: None)
            task.thread_safe = ahead
            learner = Learner(task, configuration(options, options.steps + 1))
            feed = learner.feed()
            learner.learn(feed)
            started = time.perf_counter()
            for _ in range(options.steps):
                learner.learn(feed)
            found.append((time.perf_counter() - started) / options.steps)
            feed.close()
    plain, prefetched = (1000 * statistics.median(found) for found in times.values())
    return {"plain_ms": plain, "prefetched_ms": prefetched, "ratio": prefetched / plain}


if __name__ == "__main__":
    main()

"""A task small enough to train in a test: flow matching from noise to that noise turned by 90°.

Run as a program, it trains in the folder it is given and can be killed at any moment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rectiflow.straighten import checkpoint
from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.trainer import Trainer


class Objective(nn.Module):
    def __init__(self, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.Linear(width, 2)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        x_t = torch.lerp(x_0, x_1, t)
        prediction = self.network(self.dropout(torch.cat([x_t, t], 1)))
        return (prediction.float() - (x_1 - x_0)).square().mean(1)


class ToyTask:
    def __init__(
        self,
        poison_step: int | None = None,
        poison: float = torch.nan,
        width: int = 32,
        dropout: float = 0.0,
    ) -> None:
        self.network: nn.Module = Objective(width, dropout)
        self.poison_step, self.poison = poison_step, poison
        self.thread_safe = False
        self.calls: list[list[int]] = []

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        self.calls.append(list(indices))
        rows = []
        for index in indices:
            generator = torch.Generator().manual_seed(index)
            rows.append(torch.randn(3, generator=generator))
        drawn = torch.stack(rows)
        x_1 = drawn[:, :2] @ torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
        if self.poison_step is not None and indices[0] // 16 == self.poison_step:
            x_1 = x_1 * self.poison
        return {"x_0": drawn[:, :2], "x_1": x_1, "t": torch.sigmoid(drawn[:, 2:])}

    def draw_samples(self, path: Path) -> None:
        path.write_bytes(b"")

    def measure(self) -> dict[str, float]:
        """The loss of held-out samples; draws at random, as a careless task might."""
        torch.randn(3)
        assert not self.network.training
        with torch.no_grad():
            return {"held_out": float(self.network(**self.batch(range(10**6, 10**6 + 8))).mean())}

    def export(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.Tensor.numpy(self.network.state_dict()["network.0.bias"]).tofile(folder / "bias.bin")


def config(**settings: object) -> TrainConfig:
    defaults: dict[str, object] = {
        "recipe": "toy",
        "steps": 60,
        "batch_size": 16,
        "warmup_steps": 5,
        "decay_steps": 20,
        "muon_learning_rate": 1e-2,
        "log_every": 1,
        "checkpoint_minutes": 1e-9,  # after every step
    }
    return TrainConfig.model_validate(defaults | settings)


def records(run: Path) -> list[dict[str, object]]:
    """The lines of a log without what depends on the clock."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    clock = ("time", "samples_per_second")
    return [{name: v for name, v in line.items() if name not in clock} for line in lines]


def losses(run: Path) -> dict[int, float]:
    """The last logged loss of every step."""
    lines = (run / "log.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.checkpoints(run)[-1])["network"]


def same_end(run: Path, other: Path) -> None:
    """Weights, averages, optimisers and everything else of the last checkpoints, bit for bit."""
    one, two = (checkpoint.checkpoints(folder)[-1] for folder in (run, other))
    assert one.name == two.name
    states = checkpoint.load(one), checkpoint.load(two)
    for state in states:
        del state["progress"]["config"]  # how a run is looked at may differ
    for part in states[0]:
        a, b = (checkpoint.flatten(state[part]) for state in states)
        assert a[1] == b[1]
        for name, tensor in a[0].items():
            assert torch.equal(tensor, b[0][name]), (part, name)


def start(work: Callable[[], object], **environment: str) -> int:
    """Do something in a process of its own, without the seconds of importing; its id.

    It exits with 0, or with 1 and the error's last line in the file $ERRORS.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= environment
        work()
        code = 0
    except BaseException as error:
        if "ERRORS" in environment:
            Path(environment["ERRORS"]).write_text(f"{type(error).__name__}: {error}")
        else:
            traceback.print_exc()
    finally:
        os._exit(code)


def kill_after(child: int, seconds: float) -> bool:
    """SIGKILL a process after a while; whether it was still there."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


class SlowTask(ToyTask):
    """Whose steps take so many seconds, and are written down as they begin."""

    def __init__(self, seconds: float, begun: Path) -> None:
        super().__init__()
        self.seconds, self.begun = seconds, begun

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        self.begun.write_text(str(indices[0] // 16))
        time.sleep(self.seconds)
        return super().batch(indices)


if __name__ == "__main__":
    torch.set_num_threads(1)
    settings = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    run = Path(sys.argv[1])
    task = ToyTask()
    if seconds := float(os.environ.get("TOY_SECONDS", 0)):
        task = SlowTask(seconds, run.with_name("begun"))
    trainer = Trainer(task, config(**settings), run)
    trainer.resume()
    trainer.train()
    sys.exit(75 if trainer.stopped else 0)

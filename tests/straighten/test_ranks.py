"""Two processes train what one trains; the first alone writes; the loss of one ends the run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

from rectiflow.errors import InputError
from rectiflow.straighten import checkpoint, processes
from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.trainer import Trainer
from tests.straighten.toy import ToyTask, config, records, start

PLAIN: dict[str, object] = {"muon_learning_rate": None, "checkpoint_minutes": 9, "steps": 30}


def two(work: Callable[[int], object], folder: Path) -> list[int]:
    """Start two processes of one group as torchrun does; their ids."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    children = []
    for rank in range(2):

        def member(rank: int = rank) -> None:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            work(rank)

        children.append(
            start(
                member,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
                ERRORS=str(folder / f"errors-{rank}"),
            )
        )
    return children


def codes(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def errors(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("errors-*")))


def close(run: Path, other: Path) -> None:
    """The same curve, weights and averages to 1e-5."""
    for one, another in zip(records(run), records(other), strict=True):
        assert one["step"] == another["step"]
        assert one["loss"] == pytest.approx(another["loss"], abs=1e-5)
    states = [checkpoint.load(checkpoint.checkpoints(folder)[-1]) for folder in (run, other)]
    for name, tensor in states[0]["network"].items():
        torch.testing.assert_close(tensor, states[1]["network"][name], rtol=0, atol=1e-5)
    averages = [state["ema"]["shadow_params"] for state in states]
    torch.testing.assert_close(*averages, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, and a small checkpoint interval to resume from."""
    run = tmp_path_factory.mktemp("one")
    Trainer(BlocksTask(), config(**PLAIN, log_every=4, measure_every=10), run).train()
    return run


class Blocks(nn.Module):
    """A network with a list of blocks, which FSDP splits one by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 32), nn.Linear(32, 2)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        h = self.first(torch.cat([torch.lerp(x_0, x_1, t), t], 1))
        for block in self.blocks:
            h = h + block(nn.functional.silu(h))
        return (self.scale * self.last(h) - (x_1 - x_0)).square().mean(1)


class BlocksTask(ToyTask):
    def __init__(self) -> None:
        super().__init__()
        self.network = Blocks()


@pytest.mark.parametrize(
    "settings",
    [{}, {"micro_batch_size": 3}, {"fsdp": True}, {"fsdp": True, "gradient_accumulation_steps": 2}],
    ids=["ddp", "ddp, micro-batches", "fsdp", "fsdp, micro-batches"],
)
def test_two_processes_give_the_curve_of_one(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    """Stopped in the middle of what the log reports, too, and gone on with."""
    monkeypatch.setattr(processes, "SMALLEST_UNIT", 1)
    given = config(**PLAIN, **settings, log_every=4, measure_every=10, save_every=6, keep_last=9)
    run = tmp_path / "two"

    def work(rank: int) -> None:
        opened = []
        trainer = Trainer(BlocksTask(), given, run)
        assert trainer.accelerator.num_processes == 2
        if rank:  # whatever the second writes is seen
            sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)
        trainer.train()
        again = Trainer(BlocksTask(), given, run)
        assert again.resume("checkpoint-18" if "fsdp" in settings else "checkpoint-12")
        again.train()
        written = [args[0] for args in opened if str(args[0]).startswith(str(run)) and args[2] & 3]
        assert not written, written

    assert codes(two(work, tmp_path)) == [0, 0], errors(tmp_path)
    close(one, run)
    measures = [[r["measures"] for r in records(r) if "measures" in r] for r in (one, run)]
    for mine, theirs in zip(*measures, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_one_process_goes_on_with_what_two_began(one: Path, tmp_path: Path) -> None:
    given: dict[str, object] = {**PLAIN, "log_every": 4, "save_every": 6, "keep_last": 9}

    def work(rank: int) -> None:
        Trainer(
            BlocksTask(), config(**given, fsdp=True, measure_every=10), tmp_path / "run"
        ).train()

    assert codes(two(work, tmp_path)) == [0, 0], errors(tmp_path)
    trainer = Trainer(BlocksTask(), config(**given, measure_every=10), tmp_path / "run")
    assert trainer.resume("checkpoint-18")
    trainer.train()
    close(one, tmp_path / "run")
    with pytest.raises(InputError, match="without torchrun"):
        trainer.config = TrainConfig(recipe="toy", fsdp=True)
        trainer.accelerator = type("Two", (), {"num_processes": 2})()
        trainer.export(tmp_path / "out")


def test_a_process_that_dies_ends_the_run_with_one_line(tmp_path: Path) -> None:
    given = config(**PLAIN | {"steps": 100_000}, save_every=50)
    children = two(lambda rank: Trainer(ToyTask(), given, tmp_path / "run").train(), tmp_path)
    while not checkpoint.checkpoints(tmp_path / "run"):
        time.sleep(0.02)
    os.kill(children[1], signal.SIGKILL)
    assert codes(children) == [1, -signal.SIGKILL]
    error = errors(tmp_path)
    assert error.startswith("WorkError: process 0 of 2 has lost another one")
    assert "the same command goes on" in error and len(error.splitlines()) == 1
    trainer = Trainer(ToyTask(), config(**PLAIN | {"steps": 100_000}), tmp_path / "run")
    assert trainer.resume() and trainer.step % 50 == 0


def test_all_processes_stop_together_and_are_gone_on_with(one: Path, tmp_path: Path) -> None:
    """A signal to one of them ends the step in both, however seldom they look at the loss."""
    given = config(**PLAIN, log_every=4, measure_every=10)

    def work(rank: int) -> None:
        trainer = Trainer(BlocksTask(), given, tmp_path / "run")
        if rank == 1 and not trainer.resume():
            batch = trainer.task.batch

            def stopping(indices: list[int]) -> dict[str, Tensor]:
                if indices[0] > 9 * 16:  # of the last step before a measurement
                    os.kill(os.getpid(), signal.SIGUSR1)
                return batch(indices)

            trainer.task.batch = stopping  # type: ignore[method-assign, assignment]
        else:
            trainer.resume()
        trainer.train()
        assert trainer.stopped is (trainer.step < 30)
        print(trainer.step, file=(tmp_path / f"step-{rank}").open("w"))

    assert codes(two(work, tmp_path)) == [0, 0], errors(tmp_path)
    assert [(tmp_path / f"step-{rank}").read_text() for rank in range(2)] == ["10\n", "10\n"]
    assert codes(two(work, tmp_path)) == [0, 0], errors(tmp_path)
    close(one, tmp_path / "run")


def test_a_loss_that_is_not_a_number_in_one_process_stops_both(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        task = ToyTask(poison_step=8 if rank else None)
        Trainer(task, config(**PLAIN, save_every=1, log_every=20), tmp_path / "run").train()

    assert codes(two(work, tmp_path)) == [1, 1]
    assert "is not a number by step 9" in errors(tmp_path)
    assert checkpoint.checkpoints(tmp_path / "run")[-1].name == "checkpoint-8"


@pytest.mark.slow
def test_torchrun(one: Path, tmp_path: Path) -> None:
    """The real launcher; what two processes do is tested above without it."""
    settings = {**PLAIN, "log_every": 4}
    words = ["-m", "tests.straighten.toy", str(tmp_path / "two"), json.dumps(settings)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, *words], check=True, capture_output=True, text=True)
    Trainer(ToyTask(), config(**settings), tmp_path / "one").train()
    close(tmp_path / "one", tmp_path / "two")
    assert len((tmp_path / "two/log.jsonl").read_text().splitlines()) == 8


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_that_is_told_to_stop_leaves_a_checkpoint(tmp_path: Path, signum: int) -> None:
    """Within its own 30 seconds, in steps of 3, with nothing to report for a long time."""
    settings = {**PLAIN, "steps": 8, "log_every": 1000, "decay_steps": 0, "measure_every": 0}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    torchrun += ["--master_port", "0", "--standalone", "-m", "tests.straighten.toy"]

    def begin(folder: str, seconds: float) -> subprocess.Popen[bytes]:
        (tmp_path / folder).mkdir(exist_ok=True)
        words = [*torchrun, str(tmp_path / folder / "run"), json.dumps(settings)]
        environment = os.environ | {"TOY_SECONDS": str(seconds)}
        return subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)

    process = begin("stopped", 3.0)
    try:
        while not (tmp_path / "stopped" / "begun").exists():
            time.sleep(0.1)
            assert process.poll() is None
        asked = time.monotonic()
        process.send_signal(signum)
        assert process.wait(60) != 0
        assert time.monotonic() - asked < 25
    finally:
        process.kill()
    (found,) = checkpoint.checkpoints(tmp_path / "stopped" / "run")
    assert 1 <= checkpoint.step_of(found) <= 3
    assert begin("stopped", 0.01).wait(120) == 0
    assert begin("whole", 0.01).wait(120) == 0
    close(tmp_path / "stopped" / "run", tmp_path / "whole" / "run")

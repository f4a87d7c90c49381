from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rectiflow.errors import InputError, WorkError
from rectiflow.straighten import checkpoint
from rectiflow.straighten.config import TrainConfig, override, validate
from rectiflow.straighten.trainer import Trainer, learning_rate_factor, optimizers
from tests.straighten.toy import ToyTask, config


def losses(run: Path) -> dict[int, float]:
    """The last logged loss of every step."""
    lines = (run / "log.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.checkpoints(run)[-1])["network"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken")
    Trainer(ToyTask(), config(), run).train()
    return run


def test_training_lowers_the_loss(unbroken: Path) -> None:
    curve = losses(unbroken)
    assert len(curve) == 60
    assert sum(curve[s] for s in range(51, 61)) < 0.75 * sum(curve[s] for s in range(1, 11))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(unbroken: Path, tmp_path: Path) -> None:
    """kill −9 at random moments, through real processes, until the run is done."""
    moments = random.Random(0)
    command = [sys.executable, "-m", "tests.straighten.toy", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for _ in range(2):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        before = checkpoint.checkpoints(tmp_path)[-1:]
        while process.poll() is None and checkpoint.checkpoints(tmp_path)[-1:] == before:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert losses(tmp_path) == losses(unbroken)
    for name, tensor in final_weights(tmp_path).items():
        assert torch.equal(tensor, final_weights(unbroken)[name]), name


def test_resuming_from_a_named_checkpoint(unbroken: Path, tmp_path: Path) -> None:
    Trainer(ToyTask(), config(steps=30, decay_steps=0), tmp_path).train()
    trainer = Trainer(ToyTask(), config(steps=40, decay_steps=0), tmp_path)
    assert trainer.resume("checkpoint-30")
    assert trainer.step == 30
    with pytest.raises(InputError, match="checkpoint-7"):
        trainer.resume("checkpoint-7")


def test_a_longer_run_repeats_the_constant_part_of_a_shorter_one(
    unbroken: Path, tmp_path: Path
) -> None:
    Trainer(ToyTask(), config(steps=40, decay_steps=5), tmp_path).train()
    short, long = losses(tmp_path), losses(unbroken)
    assert [short[step] for step in range(1, 36)] == [long[step] for step in range(1, 36)]


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    # Checkpoints after every step, a look at the loss only now and then.
    trainer = Trainer(ToyTask(poison_step=8), config(log_every=20), tmp_path)
    with pytest.raises(WorkError, match="lower learning rate"):
        trainer.train()
    assert checkpoint.checkpoints(tmp_path)[-1].name == "checkpoint-8"
    assert all(tensor.isfinite().all() for tensor in final_weights(tmp_path).values())


def test_a_time_limit_leaves_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(ToyTask(), config(checkpoint_minutes=9), tmp_path)
    trainer.train(max_minutes=0)
    assert trainer.step == 1
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]


def test_export_uses_the_averaged_weights_and_puts_the_others_back(tmp_path: Path) -> None:
    trainer = Trainer(ToyTask(), config(), tmp_path / "run")
    trainer.train()
    bias = trainer.task.network.state_dict()["network.0.bias"].clone()
    trainer.export(tmp_path / "out")
    exported = torch.frombuffer(
        bytearray((tmp_path / "out/bias.bin").read_bytes()), dtype=torch.float32
    )
    assert torch.equal(trainer.task.network.state_dict()["network.0.bias"], bias)
    assert torch.allclose(exported, trainer.ema.shadow_params[1])
    assert not torch.allclose(exported, bias)


def test_schedule_warms_up_holds_and_decays_to_zero() -> None:
    plan = config(steps=100, warmup_steps=10, decay_steps=40)
    factors = [learning_rate_factor(plan, step) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:61] == [1.0] * 52
    assert factors[70] == pytest.approx(1 - (10 / 40) ** 0.5)
    assert factors[100] == pytest.approx(0.0)
    assert factors[60:] == sorted(factors[60:], reverse=True)


def test_muon_takes_the_hidden_matrices_only() -> None:
    task = ToyTask()
    adamw, muon = optimizers(task.network, config())
    shapes = [tuple(p.shape) for p in muon.param_groups[0]["params"]]
    assert shapes == [(32, 32)]
    assert (
        sum(p.numel() for p in adamw.param_groups[0]["params"])
        == sum(p.numel() for p in task.network.parameters()) - 32 * 32
    )
    assert len(optimizers(task.network, config(muon_learning_rate=None))) == 1


def test_checkpoints_are_whole_or_absent_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    state = {
        "part": {"tensor": torch.arange(3.0), "step": 4, "nested": [{"x": torch.ones(2)}, "a"]}
    }
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, state, keep_last=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-2",
        "checkpoint-10",
    ]
    assert not list(tmp_path.glob(".*"))
    loaded = checkpoint.load(tmp_path / "checkpoint-10")["part"]
    assert torch.equal(loaded["tensor"], torch.arange(3.0))
    assert loaded["step"] == 4
    assert loaded["nested"][1] == "a"
    assert torch.equal(loaded["nested"][0]["x"], torch.ones(2))


def test_settings_are_validated() -> None:
    with pytest.raises(InputError, match="learning_rat"):
        validate(TrainConfig, {"recipe": "toy", "learning_rat": 1})
    with pytest.raises(InputError, match="steps"):
        validate(TrainConfig, {"recipe": "toy", "steps": 0})
    with pytest.raises(InputError, match="key=value"):
        override({}, ["steps"])
    with pytest.raises(InputError, match="not a group"):
        override({"a": 1}, ["a.b=2"])
    assert override({"a": {"b": 1}}, ["a.b=2", "c=[1, 2]"]) == {"a": {"b": 2}, "c": [1, 2]}

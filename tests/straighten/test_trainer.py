from __future__ import annotations

import os
import random
import re
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rectiflow.errors import InputError, WorkError
from rectiflow.straighten import checkpoint
from rectiflow.straighten.config import ELSEWHERE, TrainConfig, override, validate
from rectiflow.straighten.optimizer import warn_of_rate
from rectiflow.straighten.settings import StraightenConfig
from rectiflow.straighten.trainer import Trainer, learning_rate_factor, optimizers
from tests.straighten.toy import (
    ToyTask,
    config,
    final_weights,
    kill_after,
    losses,
    records,
    same_end,
    start,
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken")
    Trainer(ToyTask(), config(checkpoint_minutes=9), run).train()
    return run


def test_training_lowers_the_loss(unbroken: Path) -> None:
    curve = losses(unbroken)
    assert len(curve) == 60
    assert sum(curve[s] for s in range(51, 61)) < 0.75 * sum(curve[s] for s in range(1, 11))


KILLED: dict[str, dict[str, object]] = {
    "checkpoints after every step": {},
    "few checkpoints, a rare log, measures": {
        "checkpoint_minutes": 9,
        "save_every": 4,
        "log_every": 7,
        "measure_every": 10,
    },
    "micro-batches, made ahead": {"micro_batch_size": 5, "prefetch": True, "keep_last": 1},
}


@pytest.mark.parametrize("kind", KILLED)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, kind: str) -> None:
    """kill −9 at random moments, of real processes, until the run is done."""
    moments = random.Random(kind)
    settings = config(**KILLED[kind])

    def work() -> None:
        task = ToyTask(dropout=0.1)
        task.thread_safe = settings.prefetch is True
        trainer = Trainer(task, settings, tmp_path / "killed")
        trainer.resume()
        trainer.train()

    _, status = os.waitpid(
        start(lambda: Trainer(ToyTask(dropout=0.1), settings, tmp_path / "whole").train()), 0
    )
    assert status == 0
    kills = 0
    for _ in range(8):
        child = start(work)
        before = checkpoint.checkpoints(tmp_path / "killed")[-1:]
        while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if checkpoint.checkpoints(tmp_path / "killed")[-1:] != before:
                break
            time.sleep(0.002)
        kills += kill_after(child, moments.uniform(0, 0.08))
    _, status = os.waitpid(start(work), 0)
    assert status == 0 and kills > 0
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    same_end(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*"))


def test_resuming_from_a_named_checkpoint(unbroken: Path, tmp_path: Path) -> None:
    Trainer(ToyTask(), config(steps=30, decay_steps=0, checkpoint_minutes=9), tmp_path).train()
    trainer = Trainer(ToyTask(), config(steps=40, decay_steps=0), tmp_path)
    assert trainer.resume("checkpoint-30")
    assert trainer.step == 30
    with pytest.raises(InputError, match="checkpoint-7"):
        trainer.resume("checkpoint-7")


def test_a_longer_run_repeats_the_constant_part_of_a_shorter_one(
    unbroken: Path, tmp_path: Path
) -> None:
    Trainer(ToyTask(), config(steps=40, decay_steps=5, checkpoint_minutes=9), tmp_path).train()
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
    assert not (tmp_path / "samples").exists()
    assert all(tensor.isfinite().all() for tensor in final_weights(tmp_path).values())


def test_a_time_limit_leaves_a_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(ToyTask(), config(checkpoint_minutes=9), tmp_path)
    trainer.train(max_minutes=0)
    assert trainer.step == 1
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]


def test_export_uses_the_averaged_weights_and_puts_the_others_back(tmp_path: Path) -> None:
    trainer = Trainer(ToyTask(), config(checkpoint_minutes=9), tmp_path / "run")
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


def test_settings_are_validated() -> None:
    with pytest.raises(InputError, match="learning_rat"):
        validate(TrainConfig, {"recipe": "toy", "learning_rat": 1})
    with pytest.raises(InputError, match="steps"):
        validate(TrainConfig, {"recipe": "toy", "steps": 0})
    with pytest.raises(InputError, match="micro_batch_size or gradient_accumulation_steps"):
        validate(
            TrainConfig,
            {"recipe": "toy", "micro_batch_size": 1, "gradient_accumulation_steps": 2},
        )
    with pytest.raises(InputError, match="more gradient_accumulation_steps than samples"):
        validate(TrainConfig, {"recipe": "toy", "batch_size": 2, "gradient_accumulation_steps": 3})
    with pytest.raises(InputError, match="not 'many'"):
        validate(TrainConfig, {"recipe": "toy", "steps": "many"})
    with pytest.raises(InputError, match="key=value"):
        override({}, ["steps"])
    with pytest.raises(InputError, match=r"--set 'betas=\[1': the value is not YAML"):
        override({}, ["betas=[1"])
    with pytest.raises(InputError, match="not a group"):
        override({"a": 1}, ["a.b=2"])
    assert override({"a": {"b": 1}}, ["a.b=2", "c=[1, 2]"]) == {"a": {"b": 2}, "c": [1, 2]}


def test_settings_are_read_as_they_are_written() -> None:
    """`no` is no boolean, and 1e-4 is a number."""
    words = ["mixed_precision=no", "learning_rate=1e-4", "compile=no", "fsdp=on", "steps=1_000"]
    found = validate(TrainConfig, override({"recipe": "toy"}, words))
    assert (found.mixed_precision, found.learning_rate) == ("no", 1e-4)
    assert (found.compile, found.fsdp, found.steps) == (False, True, 1000)
    with pytest.raises(InputError, match=r"steps.*not '1:30'"):
        validate(TrainConfig, override({"recipe": "toy"}, ["steps=1:30"]))


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [
        (TrainConfig, "lr", "learning_rate?"),
        (TrainConfig, "learning-rate", "learning_rate?"),
        (TrainConfig, "train_batch_size", "batch_size, of all processes together?"),
        (TrainConfig, "max_train_steps", "steps?"),
        (TrainConfig, "lr_warmup_steps", "warmup_steps?"),
        (TrainConfig, "max_grad_norm", "grad_clip?"),
        (TrainConfig, "checkpointing_steps", "save_every?"),
        (TrainConfig, "output_dir", "the option -o?"),
        (TrainConfig, "wamup_steps", "warmup_steps?"),
        (StraightenConfig, "rank", "lora_rank?"),
        (StraightenConfig, "pretrained_model_name_or_path", "model?"),
        (StraightenConfig, "guidance_scale", "guidance_scales?"),
    ],
)
def test_unknown_settings_name_the_one_that_was_meant(
    kind: type[TrainConfig], name: str, meant: str
) -> None:
    with pytest.raises(InputError) as found:
        validate(kind, {"recipe": "toy", name: 1, "model": "emoji-sd", "prompts": "a.txt"})
    line = str(found.value)
    assert line == f"config key {name!r}: there is no such setting; did you mean {meant}"


def test_every_name_that_is_offered_is_a_setting() -> None:
    known = {name for kind in (TrainConfig, StraightenConfig) for name in kind.model_fields}
    for name, there in ELSEWHERE.items():
        assert name not in TrainConfig.model_fields
        assert there.startswith("the option -") or re.split("[=,; ]", there)[0] in known
    with pytest.raises(InputError, match=r"no such setting$"):
        validate(TrainConfig, {"recipe": "toy", "rank": 4})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 2, "warmup_steps": 8, "decay_steps": 0}, "longer than the run.* 0.25 of 0.001"),
        ({"steps": 8, "warmup_steps": 5, "decay_steps": 4}, "warmup_steps 5 and decay_steps 4"),
        ({"steps": 8, "warmup_steps": 4, "decay_steps": 4}, None),
    ],
)
def test_a_warm_up_that_the_run_does_not_end_is_warned_of(
    tmp_path: Path, settings: dict[str, object], words: str | None
) -> None:
    given = config(**settings, checkpoint_minutes=9)
    if words is None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_rate(given)
        return
    with pytest.warns(UserWarning, match=words):
        Trainer(ToyTask(), given, tmp_path).train()


def test_a_gradient_that_is_not_a_number_stops_the_run_too(tmp_path: Path) -> None:
    """The loss is finite (zero), its slope at zero is not."""

    class Steep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
            calm = self.w.square().sum() * x_1.square().sum(1)
            return calm.sqrt() if (x_1 == 0).all() else calm

    task = ToyTask(poison_step=5, poison=0.0)
    task.network = Steep()
    trainer = Trainer(task, config(log_every=20, muon_learning_rate=None), tmp_path)
    with pytest.raises(WorkError, match=r"gradient is not a number by step 6.*lower learning rate"):
        trainer.train()
    assert checkpoint.checkpoints(tmp_path)[-1].name == "checkpoint-5"
    assert all(tensor.isfinite().all() for tensor in final_weights(tmp_path).values())


def test_measures_see_the_averaged_weights_and_change_nothing(
    unbroken: Path, tmp_path: Path
) -> None:
    trainer = Trainer(ToyTask(), config(measure_every=25, checkpoint_minutes=9), tmp_path)
    trainer.train()
    assert losses(tmp_path) == {0: None} | losses(unbroken)
    measured = {line["step"]: line["measures"] for line in records(tmp_path) if "measures" in line}
    assert list(measured) == [0, 25, 50, 60]
    with trainer.learner.averaged():
        assert measured[60] == trainer.task.measure()  # type: ignore[attr-defined]
    assert trainer.task.network.training
    same_end(tmp_path, unbroken)

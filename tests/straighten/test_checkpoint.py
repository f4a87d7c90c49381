"""Checkpoints survive what can happen to a process and a disk, and say so when they have not."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rectiflow.checksums import write_checksums
from rectiflow.errors import InputError, WorkError
from rectiflow.straighten import checkpoint
from rectiflow.straighten.trainer import Trainer
from tests.straighten.toy import Objective, ToyTask, config, start


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def state(value: float) -> dict[str, Any]:
    return {"network": {"w": torch.full((1000,), value)}, "progress": {"step": int(value)}}


def test_checkpoints_are_whole_or_absent_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    part = {"tensor": torch.arange(3.0), "step": 4, "nested": [{"x": torch.ones(2)}, "a"]}
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, {"part": part}, keep_last=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2"]
    loaded = checkpoint.load(tmp_path / "checkpoint-10")["part"]
    assert torch.equal(loaded["tensor"], torch.arange(3.0))
    assert loaded["step"] == 4
    assert loaded["nested"][1] == "a"
    assert torch.equal(loaded["nested"][0]["x"], torch.ones(2))


def test_tied_weights_are_kept_once_and_parts_of_larger_tensors_as_what_they_are(
    tmp_path: Path,
) -> None:
    module = nn.Module()
    module.a, module.b = nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False)
    module.b.weight = module.a.weight
    row = torch.arange(1000.0).reshape(10, 100)[3]
    checkpoint.save(tmp_path, 1, {"n": {**module.state_dict(), "row": row}}, keep_last=1)
    size = (tmp_path / "checkpoint-1/n.safetensors").stat().st_size
    assert 4 * 2600 < size < 4 * 2600 + 1000
    loaded = checkpoint.load(tmp_path / "checkpoint-1")["n"]
    assert torch.equal(loaded["a.weight"], module.a.weight)
    assert torch.equal(loaded["b.weight"], module.a.weight)
    assert torch.equal(loaded["row"], row)


def die_at(name: str, count: int) -> None:
    """Let the count-th call of an `os` function be the moment of a kill −9."""
    original: Callable[..., Any] = getattr(os, name)
    calls = 0

    def dying(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    setattr(os, name, dying)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(
    ("name", "count"), [("fsync", 1), ("fsync", 4), ("fsync", 5), ("replace", 1), ("replace", 2)]
)
def test_a_kill_while_writing_leaves_the_one_before_or_the_new_one(
    tmp_path: Path, step: int, name: str, count: int
) -> None:
    """Step 1 is written again over the checkpoint that is there, step 2 beside it."""
    checkpoint.save(tmp_path, 1, state(1.0), keep_last=1)

    def work() -> None:
        die_at(name, count)
        checkpoint.save(tmp_path, step, state(step + 0.5), keep_last=1)

    _, status = os.waitpid(start(work), 0)
    assert os.WIFSIGNALED(status)
    found = checkpoint.resolve(tmp_path, "latest")
    assert found is not None
    value = checkpoint.load(found)["network"]["w"][0].item()
    assert value in (1.0, step + 0.5)
    checkpoint.save(tmp_path, 3, state(3.0), keep_last=1)
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_is_whole(tmp_path: Path) -> None:
    task = ToyTask(width=64)
    Trainer(task, config(steps=3), tmp_path / "run").train()
    before = {f: f.read_bytes() for f in (tmp_path / "run/checkpoint-3").iterdir()}

    def work() -> None:
        trainer = Trainer(ToyTask(width=64), config(steps=4), tmp_path / "run")
        trainer.resume()
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        trainer.train()

    _, status = os.waitpid(start(work, ERRORS=str(tmp_path / "errors")), 0)
    assert os.waitstatus_to_exitcode(status) == 1
    error = (tmp_path / "errors").read_text()
    assert error.startswith("WorkError: cannot write") and len(error.splitlines()) == 1
    assert "File too large" in error and "checkpoint-3 is untouched" in error
    assert {f: f.read_bytes() for f in (tmp_path / "run/checkpoint-3").iterdir()} == before
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    assert not (tmp_path / "run/checkpoint-4").exists()
    trainer = Trainer(ToyTask(width=64), config(steps=4), tmp_path / "run")
    assert trainer.resume() and trainer.step == 3


def test_a_checkpoint_that_cannot_be_written_at_all(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(WorkError, match="there was none before it"):
        checkpoint.save(tmp_path / "run", 1, state(1.0), keep_last=1)


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no checksums"])
def test_damage_is_named_with_the_remedy(tmp_path: Path, damage: str) -> None:
    Trainer(ToyTask(), config(steps=2), tmp_path).train()
    file = tmp_path / "checkpoint-2/network.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "changed":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        (file.parent / "checksums.json").unlink()
    with pytest.raises(InputError, match=r"checkpoint-2 is damaged .* remove its folder") as caught:
        Trainer(ToyTask(), config(steps=4), tmp_path).resume()
    assert len(str(caught.value).splitlines()) == 1
    for file in (tmp_path / "checkpoint-2").iterdir():
        file.unlink()
    (tmp_path / "checkpoint-2").rmdir()
    assert Trainer(ToyTask(), config(steps=4), tmp_path).resume()


def test_checkpoints_of_the_first_versions_are_read(tmp_path: Path) -> None:
    """They held the step alone of a run's progress, and no loss scaler."""
    Trainer(ToyTask(), config(steps=6, decay_steps=0), tmp_path / "new").train()
    Trainer(ToyTask(), config(steps=3, decay_steps=0), tmp_path / "old").train()
    old = tmp_path / "old/checkpoint-3"
    (old / "scaler.safetensors").unlink()
    skeleton = {"dict": [["step", {"value": 3}]]}
    save_file({}, old / "progress.safetensors", {"skeleton": json.dumps(skeleton)})
    write_checksums(old)
    trainer = Trainer(ToyTask(), config(steps=6, decay_steps=0), tmp_path / "old")
    assert trainer.resume() and trainer.step == 3
    trainer.train()
    assert [json.loads(line)["step"] for line in (tmp_path / "old/log.jsonl").open()] == [
        *range(1, 7)
    ]
    new = load_file(tmp_path / "new/checkpoint-6/network.safetensors")
    for name, tensor in load_file(tmp_path / "old/checkpoint-6/network.safetensors").items():
        assert torch.equal(tensor, new[name]), name


def test_another_model_or_configuration_is_refused_by_name(tmp_path: Path) -> None:
    identity = {"start": "sha256:aa", "pairs": {"num": 4, "shape": (4, 8)}}
    Trainer(ToyTask(), config(steps=2), tmp_path, identity).train()

    def resume(task: ToyTask | None = None, changed: object = None, **settings: object) -> None:
        before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
        given = config(**{"steps": 4, **settings})
        try:
            Trainer(task or ToyTask(), given, tmp_path, changed or identity).resume()  # type: ignore[arg-type]
        finally:
            assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before

    with pytest.raises(InputError, match="start was 'sha256:aa' and is now 'sha256:bb'"):
        resume(changed=identity | {"start": "sha256:bb"})
    with pytest.raises(InputError, match=r"pairs was .* and is now None"):
        resume(changed={"start": "sha256:aa"})
    with pytest.raises(InputError, match=r"learning_rate was 0.001 and is now 0.002"):
        resume(learning_rate=2e-3)
    with pytest.raises(InputError, match=r"shape of network.0.bias was \(32,\) .* \(48,\)"):
        resume(ToyTask(width=48))
    longer = ToyTask()
    longer.network.more = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"the weight more.bias"):
        resume(longer)
    resume(log_every=5, gradient_accumulation_steps=2, save_every=3, keep_last=4)


def test_a_run_that_is_there_is_not_begun_again_over_it(tmp_path: Path) -> None:
    Trainer(ToyTask(), config(steps=2), tmp_path).train()
    with pytest.raises(InputError, match="has checkpoints"):
        Trainer(ToyTask(), config(steps=2), tmp_path).train()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_going_on_from_an_older_checkpoint_takes_the_later_ones_away(tmp_path: Path) -> None:
    short = {"decay_steps": 0, "save_every": 2, "checkpoint_minutes": 9, "keep_last": 9}
    Trainer(ToyTask(), config(steps=6, **short), tmp_path).train()
    trainer = Trainer(ToyTask(), config(steps=5, **short), tmp_path)
    assert trainer.resume("checkpoint-2")
    assert names(tmp_path)[:3] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    trainer.train()
    assert names(tmp_path)[:3] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_only_what_is_trained_is_saved(tmp_path: Path) -> None:
    """A LoRA of rank 2 by peft on the toy's hidden layer."""
    from peft import LoraConfig, inject_adapter_in_model

    def task() -> ToyTask:
        toy = ToyTask(width=256)
        settings = LoraConfig(r=2, target_modules=["network.2"], init_lora_weights=False)
        torch.manual_seed(1)
        inject_adapter_in_model(settings, toy.network)
        return toy

    short = {"muon_learning_rate": None, "checkpoint_minutes": 9}
    trainer = Trainer(task(), config(steps=4, **short), tmp_path)
    frozen = trainer.task.network.state_dict()["network.0.weight"].clone()
    trainer.train()
    assert torch.equal(trainer.task.network.state_dict()["network.0.weight"], frozen)
    saved = checkpoint.load(tmp_path / "checkpoint-4")
    assert {tuple(t.shape) for t in saved["network"].values()} == {(2, 256), (256, 2)}
    assert len(saved["ema"]["shadow_params"]) == len(saved["optimizers"][0]["state"]) == 2
    whole = sum(4 * p.numel() for p in Objective(256).parameters())
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint-4").iterdir())
    assert size < 4 * 4 * 2 * 512 + 10_000 < whole / 4
    again = Trainer(task(), config(steps=4, **short), tmp_path)
    assert again.resume()
    for name, tensor in trainer.task.network.state_dict().items():
        assert torch.equal(again.task.network.state_dict()[name], tensor), name

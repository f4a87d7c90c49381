"""The step: how it is cut up, in which precision, by which optimiser, and its averages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from rectiflow.errors import InputError, WorkError
from rectiflow.straighten import checkpoint
from rectiflow.straighten.ema import Ema
from rectiflow.straighten.feed import micro_batches
from rectiflow.straighten.trainer import Trainer
from tests.straighten.toy import (
    ToyTask,
    config,
    final_weights,
    losses,
    records,
    same_end,
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("unbroken")
    Trainer(ToyTask(), config(checkpoint_minutes=9), run).train()
    return run


@pytest.mark.parametrize(
    "cut", [{"micro_batch_size": 5}, {"gradient_accumulation_steps": 3}, {"micro_batch_size": 1}]
)
def test_micro_batches_give_the_curve_of_whole_batches(
    tmp_path: Path, cut: dict[str, object]
) -> None:
    plain: dict[str, object] = {"muon_learning_rate": None, "checkpoint_minutes": 9}
    Trainer(ToyTask(), config(**plain), tmp_path / "whole").train()
    task = ToyTask()
    Trainer(task, config(**plain, **cut), tmp_path / "cut").train()
    assert {len(call) for call in task.calls} <= {1, 4, 5, 6}
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "cut")
    assert two == pytest.approx(one, abs=1e-5)
    other = final_weights(tmp_path / "cut")
    for name, tensor in final_weights(tmp_path / "whole").items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5)


def test_every_sample_of_a_step_is_seen_once_whoever_works_on_it() -> None:
    for ranks, settings in [
        (1, {}),
        (2, {"micro_batch_size": 3}),
        (3, {"gradient_accumulation_steps": 2}),
    ]:
        parts = [micro_batches(config(**settings), 7, rank, ranks) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1
        assert sorted(i for part in parts for micro in part for i in micro) == [*range(112, 128)]
    with pytest.raises(InputError, match="batch_size 16 is too small for 17 processes"):
        micro_batches(config(), 0, 16, 17)


def test_batches_made_ahead_are_the_same_in_the_same_order(unbroken: Path, tmp_path: Path) -> None:
    task = ToyTask()
    task.thread_safe = True
    Trainer(task, config(prefetch=True, checkpoint_minutes=9), tmp_path).train()
    assert task.calls == [[*range(16 * step, 16 * step + 16)] for step in range(60)]
    assert losses(tmp_path) == losses(unbroken)


def test_an_error_in_a_batch_made_ahead_is_seen(tmp_path: Path) -> None:
    class Failing(ToyTask):
        thread_safe = True

        def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
            if indices[0] == 48:
                raise InputError("shard 3 is damaged")
            return super().batch(indices)

    trainer = Trainer(Failing(), config(prefetch=True), tmp_path)
    trainer.task.thread_safe = True  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="shard 3"):
        trainer.train()
    assert checkpoint.checkpoints(tmp_path)[-1].name in ("checkpoint-2", "checkpoint-3")


def test_a_loss_that_compares_samples_is_not_cut_up(tmp_path: Path) -> None:
    class Comparing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
            return (self.w * x_1).std()

    task = ToyTask()
    task.network = Comparing()
    Trainer(task, config(steps=2, muon_learning_rate=None), tmp_path / "whole").train()
    cut = config(steps=2, muon_learning_rate=None, micro_batch_size=8)
    with pytest.raises(InputError, match="cannot be cut up"):
        Trainer(task, cut, tmp_path / "cut").train()


def test_averages_are_those_of_diffusers_and_in_float32(tmp_path: Path) -> None:
    """Against EMAModel with warm-up, fed the same bf16 weights converted to float32."""
    settings = config(
        ema_warmup=True, ema_power=0.75, ema_inv_gamma=2.0, ema_start=2, ema_decay=0.9
    )
    weight = nn.Parameter(torch.randn(100).bfloat16())
    ours = Ema([weight], settings)
    as_float = nn.Parameter(weight.detach().float())
    theirs = EMAModel(
        [as_float], 0.9, use_ema_warmup=True, power=0.75, inv_gamma=2.0, update_after_step=2
    )
    for _ in range(20):
        with torch.no_grad():
            weight.add_(0.01 * torch.randn(100).bfloat16())
            as_float.copy_(weight)
        ours.step([weight])
        theirs.step([as_float])
    assert ours.shadow_params[0].dtype == torch.float32
    torch.testing.assert_close(ours.shadow_params, theirs.shadow_params, rtol=0, atol=1e-6)
    with ours.in_place([weight]):
        assert torch.equal(weight, ours.shadow_params[0].bfloat16())
    assert torch.equal(weight.float(), as_float)


def test_what_a_task_does_not_offer_is_refused(tmp_path: Path) -> None:
    class Plain:
        network: nn.Module = nn.Linear(2, 2)

    with pytest.raises(InputError, match="gradient_checkpointing"):
        Trainer(ToyTask(), config(gradient_checkpointing=True), tmp_path)
    with pytest.raises(InputError, match="measure_every"):
        Trainer(Plain(), config(measure_every=1), tmp_path)  # type: ignore[arg-type]
    frozen = ToyTask()
    frozen.network.requires_grad_(False)
    with pytest.raises(InputError, match="nothing to be trained"):
        Trainer(frozen, config(), tmp_path)
    with pytest.raises(InputError, match="fsdp does not go with mixed_precision fp16"):
        Trainer(ToyTask(), config(fsdp=True, mixed_precision="fp16"), tmp_path)
    with pytest.raises(InputError, match="fsdp does not go with optimizer adafactor"):
        Trainer(ToyTask(), config(fsdp=True, optimizer="adafactor"), tmp_path)


def test_adamw8bit_names_its_package(tmp_path: Path) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match=r"bitsandbytes.*\.\[bitsandbytes\]"):
            Trainer(ToyTask(), config(optimizer="adamw8bit"), tmp_path)
    else:
        pytest.skip("bitsandbytes is here")


def test_adafactor_trains_and_resumes(tmp_path: Path) -> None:
    short: dict[str, object] = {"optimizer": "adafactor", "muon_learning_rate": None}
    short |= {"steps": 12, "learning_rate": 0.02, "save_every": 5, "checkpoint_minutes": 9}
    Trainer(ToyTask(), config(**short), tmp_path / "whole").train()
    Trainer(ToyTask(), config(**short), tmp_path / "broken").train(max_minutes=0)
    again = Trainer(ToyTask(), config(**short), tmp_path / "broken")
    assert again.resume() and again.step == 1
    again.train()
    same_end(tmp_path / "whole", tmp_path / "broken")


def test_half_precision_skips_steps_that_overflow_and_resumes(tmp_path: Path) -> None:
    """A step whose loss is finite but whose scaled gradients are not."""
    settings = config(mixed_precision="fp16", steps=12, save_every=6, checkpoint_minutes=9)
    Trainer(ToyTask(poison_step=4, poison=30.0), settings, tmp_path / "whole").train()
    lines = {line["step"]: line for line in records(tmp_path / "whole")}
    scales = [lines[step]["loss_scale"] for step in range(1, 13)]
    assert scales[3] == 2.0**16 and scales[4] == 2.0**15 == scales[11]
    assert lines[4]["skipped_steps"] == 0 and lines[12]["skipped_steps"] == 1
    assert lines[5]["gradient_norm"] is None
    broken = tmp_path / "broken"
    Trainer(ToyTask(poison_step=4, poison=30.0), settings, broken).train()
    again = Trainer(ToyTask(poison_step=4, poison=30.0), settings, broken)
    assert again.resume("checkpoint-6")
    assert again.learner.scaler.get_scale() == 2.0**15
    again.train()
    assert records(broken) == records(tmp_path / "whole")
    same_end(broken, tmp_path / "whole")


def test_half_precision_gives_up_on_gradients_that_always_overflow(tmp_path: Path) -> None:
    trainer = Trainer(ToyTask(), config(mixed_precision="fp16", checkpoint_minutes=9), tmp_path)
    trainer.learner.scaler.load_state_dict(
        trainer.learner.scaler.state_dict() | {"scale": 2.0**-20}
    )
    with pytest.raises(WorkError, match=r"overflows at any loss scale .* bf16"):
        trainer.train()
    assert not checkpoint.checkpoints(tmp_path)


def test_bf16_trains(unbroken: Path, tmp_path: Path) -> None:
    Trainer(ToyTask(), config(mixed_precision="bf16", checkpoint_minutes=9), tmp_path).train()
    one, two = losses(unbroken), losses(tmp_path)
    assert one != two
    assert two == pytest.approx(one, rel=0.05)

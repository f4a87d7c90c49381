"""Training on a device that is not the CPU, as `accelerator_cases.py` has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from rectiflow.emoji import latents, sd, sd3
from rectiflow.emoji.recipes import RECIPES as EMOJI
from rectiflow.emoji.recipes import build_task
from rectiflow.straighten.assembly import assemble
from rectiflow.straighten.config import validate
from rectiflow.straighten.learner import Learner
from rectiflow.straighten.pair_maker import make_pairs
from rectiflow.straighten.settings import StraightenConfig
from rectiflow.straighten.trainer import Trainer
from tests.device.fake import FakeTensor, Log, is_pinned, watched
from tests.device.placed import PROMPTS, on
from tests.tiny_sd import tiny_sd_model


class Training:
    """Runs of a tiny model on pairs that it made, on either device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device, self.runs = folder, device, 0
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text("\n".join(PROMPTS))
        given: dict[str, Any] = {"num_inference_steps": 2, "shard_size": 8, "batch_size": 8}
        self.store = str(folder / "pairs")
        make_pairs(on(device, tiny_sd_model), PROMPTS, self.store, num=20, **given)

    def __call__(
        self, where: str | torch.device, run: str | None = None, **given: Any
    ) -> tuple[Trainer, Log, list[float]]:
        self.runs += 1
        settings = {"model": "tiny-sd", "pairs": self.store, "held_out": 2, "batch_size": 4}
        settings |= {"log_every": 1, "warmup_steps": 1, "measure_every": 0, "held_out_steps": 2}
        settings |= {"steps": 2} | given
        if settings["pairs"] is None:  # made on the fly
            settings |= {"prompts": self.prompts, "num_inference_steps": 2}
            settings |= {"height": 32, "width": 32, "solver": "euler"}
        config = validate(StraightenConfig, settings)
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        with mock.patch.object(PartialState, "default_device", torch.device(where)):
            task, identity = assemble(config, on(torch.device(where), tiny_sd_model))
            trainer = Trainer(task, config, self.folder / (run or f"run-{self.runs}"), identity)
            trainer.resume()
            with watched() as log:
                trainer.train()
        lines = (trainer.run / "log.jsonl").read_text().splitlines()
        losses = [entry["loss"] for entry in map(json.loads, lines) if entry.get("loss")]
        return trainer, log, losses


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Training:
    return Training(tmp_path_factory.mktemp("training"), device)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "flow_matching"},
        {"kind": "reflow", "anneal_steps": 2, "prefetch": True, "measure_every": 2},
        {"kind": "reflow", "batch_size": 8, "gradient_accumulation_steps": 2},
        {"kind": "reflow", "guidance_embedded": True},
        {"kind": "reflow", "lora_rank": 2},
        {"kind": "reflow", "pairs": None},
        {"kind": "reflow", "pairs": None, "windows": 2},
        {"kind": "reflow", "mixed_precision": "bf16"},
        {"kind": "reflow", "mixed_precision": "fp16"},
        {"kind": "distill", "student_steps": [1, 2]},
        {"kind": "distill", "loss": "lpips_huber", "lpips_weights": "emoji-clip"},
        {"kind": "distill", "stacked": "separate"},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_training(training: Training, given: dict[str, Any]) -> None:
    """What stopped every run at its first step: a batch with a part that cannot be pinned."""
    trainer, _, losses = training(training.device, **given)
    learner = trainer.learner
    weights = [*learner.parameters, *trainer.ema.shadow_params]
    assert all(isinstance(weight, FakeTensor) for weight in map(torch.Tensor.detach, weights))
    assert {weight.dtype for weight in weights} == {torch.float32}
    _, _, expected = training("cpu", **given)
    # What autocast lowers is another list on every device.
    assert losses == pytest.approx(expected, rel=1e-2 if "mixed_precision" in given else 1e-4)


@pytest.mark.parametrize("kind", ["reflow", "distill"])
def test_a_step_waits_for_nothing_and_its_batch_is_pinned(
    training: Training, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reports: logs, checkpoints and measures are what is waited for."""
    waits, seen, feed = [], [], Learner.feed

    def watched_feed(learner: Learner) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        for size, batch in feed(learner):
            seen.append(batch)
            yield size, batch

    monkeypatch.setattr(Learner, "feed", watched_feed)
    for steps in (4, 8):
        _, log, _ = training(training.device, kind=kind, steps=steps, log_every=100)
        waits.append({place: n for place, n in log.waits.items() if "checkpoint" not in place})
    assert waits[0] == waits[1]
    assert len(seen) == 12
    assert all(is_pinned(part) for batch in seen for part in batch.values())


def test_a_run_is_resumed_on_the_device(training: Training) -> None:
    _, _, whole = training(training.device, kind="reflow", steps=4)
    training(training.device, "broken", kind="reflow", steps=2)
    _, _, resumed = training(training.device, "broken", kind="reflow", steps=4)
    assert resumed == pytest.approx(whole, rel=1e-5)


RECIPES: dict[str, dict[str, Any]] = {
    "emoji-clip": {"text_layers": 1, "vision_layers": 1},
    "emoji-vae": {"block_out_channels": (8, 8, 8), "perceptual_weight": 0.1},
    "emoji-sd3": {"num_layers": 1},
    "emoji-sd": {"widths": (16, 16), "head_width": 8, "distinct": 64},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_train(
    recipe: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first step to samples and export."""
    monkeypatch.setattr(latents, "load_chunk", lambda *_: torch.zeros(1000, 4, 16, 16).half())
    for module in (sd, sd3):
        monkeypatch.setattr(module, "SAMPLES", 2)
    kind = EMOJI[recipe][0]
    given = RECIPES[recipe] | {"steps": 1, "batch_size": 4, "warmup_steps": 0, "decay_steps": 0}
    if "latents" in kind.model_fields:
        given |= {"latents": tmp_path, "scenes": 1000}
    task, config = build_task(validate(kind, given)), validate(kind, given)
    trainer = Trainer(task, config, tmp_path / "run")
    trainer.train()
    task.draw_samples(tmp_path / "samples.png")
    task.export(tmp_path / "model")
    assert (tmp_path / "samples.png").is_file() and any((tmp_path / "model").iterdir())

"""Paths on a device that is not the CPU: where each tensor is, in which dtype, what waits.

The device is `tests.device.fake`: PyTorch dispatches to it as to an accelerator, and it refuses
what one refuses. Its numbers are the CPU's, so results are compared with the CPU's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

import rectiflow as rf
from rectiflow.errors import InputError
from rectiflow.invert.features import FeatureStore
from rectiflow.invert.preset import METHOD_FIELDS
from rectiflow.invert.presets import PRESETS, on_family
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import generate_latents, initial_noise
from rectiflow.straighten.assembly import assemble
from rectiflow.straighten.config import validate
from rectiflow.straighten.learner import Learner
from rectiflow.straighten.pair_maker import make_pairs
from rectiflow.straighten.settings import StraightenConfig
from rectiflow.straighten.trainer import Trainer
from tests.device.fake import FakeTensor, Log, fake_accelerator, is_pinned, watched
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model
from tests.tiny_qwen import tiny_qwen_model
from tests.tiny_sd import tiny_sd_model, tiny_sdxl_model

MODELS: dict[str, Callable[[], FlowModel]] = {
    "sd": tiny_sd_model,
    "sdxl": tiny_sdxl_model,
    "sd3": lambda: tiny_model(t5=True, medium=True),
    "flux": tiny_flux_model,
    "qwen": tiny_qwen_model,
}
PROMPTS = ["a red cat", "two apples"]


@pytest.fixture
def device() -> Iterator[torch.device]:
    with fake_accelerator() as found:
        yield found


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    return Image.fromarray(pixels)


def on(device: torch.device, make: Callable[[], FlowModel]) -> FlowModel:
    model = make()
    model.pipeline.to(device)
    return model


def numbers(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, FakeTensor), "a result of the device is on the CPU"
    return tensor.raw


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the order of sums, which diffusers' choice of kernels by device decides."""
    assert found.dtype == expected.dtype == torch.float32
    scale = float(expected.abs().max())
    torch.testing.assert_close(numbers(found), expected, rtol=0, atol=2e-4 * scale)


def avoidable(log: Log) -> dict[str, int]:
    """Waits without those of diffusers' Qwen-Image network, which copies its rotary frequencies in
    every call."""
    network = "copy to the device at models/qwen_image.py"
    return {place: n for place, n in log.waits.items() if not place.startswith(network)}


@pytest.mark.parametrize("name", MODELS)
def test_generating_waits_for_nothing_in_a_step(device: torch.device, name: str) -> None:
    ours, theirs = MODELS[name](), on(device, MODELS[name])

    def generated(model: FlowModel, steps: int) -> torch.Tensor:
        noise = initial_noise(model, [0, 1], 32, 32)
        given = {"num_inference_steps": steps, "guidance_scale": 3.0, "solver": "euler"}
        return generate_latents(model, PROMPTS, noise, **given).x

    close(generated(theirs, 3), generated(ours, 3))
    waits = []
    for steps in (3, 6):
        with watched() as log:
            generated(theirs, steps)
        waits.append(avoidable(log))
    assert waits[0] == waits[1]


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.endswith("-flux")])
def test_every_preset(device: torch.device, picture: Image.Image, name: str, preset: str) -> None:
    """Its numbers are the CPU's, and no step waits, whatever acts in it."""
    given: dict[str, Any] = {"source_prompt": "a red cat", "preset": preset}
    chosen = PRESETS[on_family(preset, name)]
    ratios = {"adaln_ratio", "attention_ratio", "eta_ratio"} & set(METHOD_FIELDS[chosen.method])
    given |= {ratio: 0.5 for ratio in ratios if getattr(chosen, ratio)}
    theirs = on(device, MODELS[name])
    results, waits = [], []
    for model, steps in ((MODELS[name](), 2), (theirs, 2), (theirs, 6)):
        given["num_inference_steps"] = steps
        try:
            with watched() as log:
                results.append(rf.edit(model, picture, prompts=["a blue cat", "a dog"], **given))
            waits.append(avoidable(log))
        except InputError as error:
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1] and "joint attention" in results[0]
        return
    close(results[1].latents, results[0].latents)
    assert results[0].nfe == results[1].nfe
    assert waits[1] == waits[2]
    trajectory = results[1].inversion.trajectory
    assert isinstance(trajectory, FakeTensor) and trajectory.dtype == torch.float32


@pytest.mark.parametrize("keep", ["memory", "cpu", "disk"])
def test_kept_features_and_masks(
    device: torch.device, picture: Image.Image, keep: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight steps: of fewer the preset keeps nothing."""
    handed, kept, get, put = [], [], FeatureStore.get, FeatureStore.put

    def watched_put(store: FeatureStore, step: int, *rest: Any) -> None:
        put(store, step, *rest)
        found = [part for key, parts in store._kept.items() for part in parts.values()]
        kept.extend((isinstance(part, FakeTensor), is_pinned(part)) for part in found)

    def watched_get(store: FeatureStore, *rest: Any) -> torch.Tensor:
        handed.append(get(store, *rest))
        return handed[-1]

    monkeypatch.setattr(FeatureStore, "put", watched_put)
    monkeypatch.setattr(FeatureStore, "get", watched_get)
    mask = Image.new("L", picture.size)
    mask.paste(255, (0, 0, 16, 32))
    results = []
    for model in (tiny_model(), on(device, tiny_model)):
        handed.clear()
        kept.clear()
        given: dict[str, Any] = {"source_prompt": "a red cat", "num_inference_steps": 8}
        given |= {"source_features": "inversion", "keep_features": keep, "mask": mask}
        results.append(rf.edit(model, picture, prompts=["a blue cat"], preset="fast", **given))
    close(results[1].latents, results[0].latents)
    assert kept and set(kept) == {(keep == "memory", keep == "cpu")}
    assert handed and all(isinstance(part, FakeTensor) for part in handed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_float32(
    device: torch.device, picture: Image.Image, dtype: torch.dtype
) -> None:
    model = tiny_model()
    model.pipeline.to(dtype)
    model.pipeline.to(device)
    result = rf.edit(
        model, picture, source_prompt="a cat", prompts=["a dog"], num_inference_steps=2
    )
    assert model.dtype == dtype and result.latents.dtype == torch.float32


class Training:
    """Runs of a tiny model on pairs that it made, on either device."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device, self.runs = folder, device, 0
        given: dict[str, Any] = {"num_inference_steps": 2, "shard_size": 8, "batch_size": 8}
        self.store = str(folder / "pairs")
        make_pairs(on(device, tiny_sd_model), PROMPTS, self.store, num=20, **given)

    def __call__(
        self, where: str | torch.device, run: str | None = None, **given: Any
    ) -> tuple[Trainer, Log, list[float]]:
        self.runs += 1
        settings = {"model": "tiny-sd", "pairs": self.store, "held_out": 2, "batch_size": 4}
        settings |= {"log_every": 2, "warmup_steps": 1, "measure_every": 0, "held_out_steps": 2}
        config = validate(StraightenConfig, settings | {"steps": 4} | given)
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


@pytest.fixture
def training(tmp_path: Path, device: torch.device) -> Training:
    return Training(tmp_path, device)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "reflow"},
        {"kind": "distill", "student_steps": [1, 2]},
        {"kind": "flow_matching"},
        {"kind": "reflow", "anneal_steps": 2, "prefetch": True},
        {"kind": "reflow", "batch_size": 8, "gradient_accumulation_steps": 2},
        {"kind": "distill", "loss": "lpips_huber", "lpips_weights": "emoji-clip"},
        {"kind": "reflow", "guidance_embedded": True},
        {"kind": "reflow", "lora_rank": 2},
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
    assert losses == pytest.approx(expected, rel=1e-4)


def test_a_step_waits_for_nothing_and_its_batch_is_pinned(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reports: logs, checkpoints and measures are what is waited for."""
    waits, seen, feed = [], [], Learner.feed

    def watched_feed(learner: Learner) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        for size, batch in feed(learner):
            seen.append(batch)
            yield size, batch

    monkeypatch.setattr(Learner, "feed", watched_feed)
    for steps in (4, 8):
        _, log, _ = training(training.device, kind="reflow", steps=steps, log_every=100)
        waits.append({place: n for place, n in log.waits.items() if "checkpoint" not in place})
    assert waits[0] == waits[1]
    assert len(seen) == 12
    assert all(is_pinned(part) for batch in seen for part in batch.values())


def test_a_run_is_resumed_on_the_device(training: Training) -> None:
    _, _, whole = training(training.device, kind="reflow", steps=4)
    training(training.device, "broken", kind="reflow", steps=2)
    _, _, resumed = training(training.device, "broken", kind="reflow", steps=4)
    assert resumed == pytest.approx(whole, rel=1e-5)

"""Paths on a device that is not the CPU: where each tensor is, in which dtype, what waits.

The device is `tests.device.fake`: PyTorch dispatches to it as to an accelerator, and it refuses
what one refuses, float64 among it. Its numbers are the CPU's, so results are compared with the
CPU's own. Nothing may wait in a step but what is named in `avoidable`, and by its nature a fixed
point with a tolerance, features kept on disk, and dopri5.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import rectiflow as rf
from rectiflow.app.inventory import _devices
from rectiflow.app.record import of_model
from rectiflow.errors import InputError
from rectiflow.evaluate import metrics
from rectiflow.flow.measure import straightness, transport_cost
from rectiflow.invert.features import FeatureStore
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.preset import METHOD_FIELDS, Preset
from rectiflow.invert.presets import PRESETS, TWINS, on_family
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models.base import FlowModel
from rectiflow.models.controlnet import with_control
from rectiflow.models.generate import generate_latents, initial_noise
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.load import _place
from tests.device.fake import FakeTensor, is_pinned, watched
from tests.device.placed import MODELS, PROMPTS, avoidable, both, close, on
from tests.models.test_controlnet import make_controlnet
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd_model

EDITS = [
    (name, preset) for preset in PRESETS if not preset.endswith("-flux") for name in ("sd", "sd3")
]
EDITS += [("flux", preset) for preset in ("fast", "ftedit", "fireflow", *TWINS)]
EDITS += [("sdxl", "euler"), ("sdxl", "flowedit"), ("qwen", "fast"), ("qwen", "uniedit")]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_that_of_the_checkpoint_and_on_the_cpu_float32(
    device: torch.device, tmp_path: Path, stored: torch.dtype
) -> None:
    pipeline = tiny_model().pipeline
    pipeline.transformer.to(stored)
    pipeline.save_pretrained(tmp_path)
    assert rf.load(tmp_path, device="cpu").dtype == torch.float32
    assert rf.load(tmp_path, device=device).dtype == stored
    model = rf.load(tmp_path)  # the accelerator there is
    assert (model.device.type, model.dtype) == (device.type, stored)
    assert model.pipeline.vae.dtype == torch.float32
    assert of_model(model)["dtype"] == str(stored).removeprefix("torch.")
    asked = torch.float16 if stored == torch.float32 else torch.float32
    assert rf.load(tmp_path, dtype=asked).dtype == asked
    assert "stored in" in _devices()


@pytest.mark.parametrize("name", MODELS)
def test_generating_waits_for_nothing_in_a_step(device: torch.device, name: str) -> None:
    ours, theirs = both(device, name)

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


@pytest.mark.parametrize("solver", ["dpmpp", "unipc", "ddim"])
def test_schedulers_and_a_control_picture(
    device: torch.device, picture: Image.Image, solver: str
) -> None:
    """A ControlNet that is on the CPU is brought to where its model is."""
    found = []
    for model in both(device, "sd"):
        control = with_control(model, make_controlnet(tiny_sd_model().network), picture, 0.6)
        noise = initial_noise(model, [0, 1], 32, 32)
        given = {"num_inference_steps": 3, "guidance_scale": 3.0, "solver": solver}
        found.append(generate_latents(control, PROMPTS, noise, **given).x)
    close(found[1], found[0])


@pytest.mark.parametrize(("name", "preset"), EDITS)
def test_every_preset(device: torch.device, picture: Image.Image, name: str, preset: str) -> None:
    """Its numbers are the CPU's, and no step waits, whatever acts in it."""
    given: dict[str, Any] = {"source_prompt": "a red cat", "preset": preset}
    chosen = PRESETS[on_family(preset, name)]
    ratios = {"adaln_ratio", "attention_ratio", "eta_ratio"} & set(METHOD_FIELDS[chosen.method])
    given |= {ratio: 0.5 for ratio in ratios if getattr(chosen, ratio)}
    ours, theirs = both(device, name)
    results, waits = [], []
    for model, steps in ((ours, 2), (theirs, 2), (theirs, 4)):
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


SETTINGS: dict[str, dict[str, Any]] = {
    "main memory": {"source_features": "inversion", "keep_features": "cpu"},
    "by velocity": {"mask_threshold": 0.5},
    "by attention": {"mask_threshold": 0.5, "mask_from": "attention"},
    "windows": {"windows": {"red": 0.75}},
    "fixed point": {"scheme": "fixed_point", "iterations": 2, "source_features": "inversion"},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_an_edit(device: torch.device, picture: Image.Image, setting: str) -> None:
    """More steps in which features are kept, a mask is gathered, words are held: no more waits."""
    given: dict[str, Any] = {"source_prompt": "a red cat", "prompts": ["a red dog"]}
    given |= {"adaln_ratio": 0.5, "attention_ratio": 0.5, **SETTINGS[setting]}
    ours, theirs = both(device, "sd3")
    results, waits = [], []
    for model, steps in ((ours, 4), (theirs, 4), (theirs, 8)):
        with watched() as log:
            results.append(rf.edit(model, picture, num_inference_steps=steps, **given))
        waits.append(avoidable(log))
    close(results[1].latents, results[0].latents)
    assert waits[1] == waits[2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(device: torch.device, scheme: str) -> None:
    """There and back, a row per image."""
    found, waits = [], []
    model: FlowModel
    ours, theirs = both(device, "sd3")
    for model, steps in ((ours, 2), (theirs, 2), (theirs, 4)):
        preset = Preset(
            reference="", scheme=scheme, num_inference_steps=steps, adaln_ratio=0, attention_ratio=0
        )
        latents = initial_noise(model, [0, 1], 32, 32)
        field = GuidedVelocity(model, model.encode_prompt(PROMPTS))
        grid = grid_for(model, preset, latents)
        with watched() as log:
            path = invert_latents(field, latents, grid, preset)
            solver, x, memory = SCHEMES[scheme].solver(path, grid, [1, 0]), path.trajectory[0], None
            for step in range(steps):
                x, memory = solver.step(field, x, grid[step], grid[step + 1], step, memory)
        found.append((path.trajectory, x))
        waits.append(avoidable(log))
    for part, expected in zip(found[1], found[0], strict=True):
        close(part, expected)
    assert waits[1] == waits[2]


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_off_loading(device: torch.device, picture: Image.Image, offload: Any) -> None:
    """Weights wait on the CPU, and everything else is where it always is."""
    ours, given = both(device, "sd3")[0], {"source_prompt": "a red cat", "prompts": ["a blue cat"]}
    theirs = MODELS["sd3"]()
    _place(theirs, device, offload)
    weight = next(theirs.network.parameters())
    assert weight.device.type == ("cpu" if offload == "model" else "meta")
    results = [
        rf.edit(model, picture, num_inference_steps=2, mask_threshold=0.5, **given)
        for model in (ours, theirs)
    ]
    close(results[1].latents, results[0].latents)


def _chained(model: FlowModel, picture: Image.Image) -> list[Image.Image]:
    prompts = ["a red cat", "a blue cat", "a red cat"]
    return rf.edit_chain(model, picture, prompts=prompts, num_inference_steps=2).images


JOBS: dict[str, Callable[[FlowModel, Image.Image], list[Image.Image]]] = {
    "chain": _chained,
    "refine": lambda m, p: rf.refine(m, [p, p], PROMPTS, strength=0.6, num_inference_steps=4),
    "interpolate": lambda m, p: rf.interpolate(
        m, PROMPTS, [0, 1], frames=3, num_inference_steps=2, height=32, width=32
    ),
    "consistent": lambda m, p: rf.consistent(m, PROMPTS, num_inference_steps=2).images,
    "diagnosis": lambda m, p: [
        rf.edit(
            m, p, prompts="a dog", num_inference_steps=2, diagnose=True
        ).diagnosis.reconstruction.image  # type: ignore[union-attr]
    ],
}


@pytest.mark.parametrize("job", JOBS)
def test_pictures(device: torch.device, picture: Image.Image, job: str) -> None:
    expected, found = (JOBS[job](model, picture) for model in both(device, "sd3"))
    for one, other in zip(found, expected, strict=True):
        apart = np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)
        assert np.abs(apart).max() <= 1  # a rounding


def test_measures(device: torch.device) -> None:
    """In float64 on the CPU, whatever they are given."""
    states = torch.randn(4, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    grid, mask = torch.linspace(0, 1, 4), torch.rand(2, 1, 16, 16) > 0.5
    ours = [states, states.sigmoid(), mask]
    theirs = [part.to(device) for part in ours]

    def measured(states: torch.Tensor, images: torch.Tensor, mask: torch.Tensor) -> list[Any]:
        field = straightness(states, grid, lambda x, t, step: t * x)
        found = [straightness(states, grid).value, field.value]
        found += [transport_cost(states[0], states[1], cost).value for cost in ("l2", "log_cosh")]
        a, b = images[:2]
        found += [metric(a, b).tolist() for metric in (metrics.mse, metrics.psnr, metrics.ssim)]
        found += [
            metrics.masked_psnr(a, b, mask).tolist(),
            metrics.masked_ssim(a, b, mask).tolist(),
        ]
        return found

    for one, other in zip(measured(*theirs), measured(*ours), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


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

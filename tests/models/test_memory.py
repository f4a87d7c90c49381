"""Memory: exact where it can be, a line with remedies where it runs out, and off-loading."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

from rectiflow.errors import WorkError
from rectiflow.models import generate, load
from rectiflow.models.memory import (
    Offload,
    estimate,
    explanation,
    offload_of,
    out_of_memory_explained,
)
from rectiflow.models.sd3 import SD3Model
from tests.tiny import tiny_model

place = sys.modules[load.__module__]._place
CPU = torch.device("cpu")


def test_weights_are_counted_to_the_byte(tmp_path: Path) -> None:
    """Against the files diffusers writes, less their headers."""
    model = tiny_model(t5=True)
    model.pipeline.save_pretrained(tmp_path)
    counted = estimate(model).weights
    assert set(counted) == {
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    }
    for name in ("transformer", "vae"):
        file = tmp_path / name / "diffusion_pytorch_model.safetensors"
        raw = file.read_bytes()
        header = int.from_bytes(raw[:8], "little")
        assert counted[name] == len(raw) - 8 - header
    half = estimate(tiny_model(t5=True, dtype=torch.bfloat16)).weights
    assert half["transformer"] * 2 == counted["transformer"] and half["vae"] == counted["vae"]


def test_the_path_is_counted_to_the_byte() -> None:
    from rectiflow import invert

    model = tiny_model()
    image = generate(model, "cat", num_inference_steps=1, height=40, width=24)[0]
    inversion = invert(model, image, "cat", num_inference_steps=3)
    stored = inversion.trajectory.nbytes
    assert estimate(model, 40, 24, num_inference_steps=3).path == stored


def test_activations_grow_with_rows_and_pixels() -> None:
    model = tiny_model()
    small, large = estimate(model, 32, 32), estimate(model, 64, 64)
    assert estimate(model, 32, 32, rows=4).network == 2 * small.network
    assert large.codec == 4 * small.codec and large.path == 4 * small.path
    assert small.on_device("sequential") < small.on_device("model") < small.on_device("none")
    assert small.on_device("none") - small.on_device("model") == sum(small.weights.values()) - max(
        small.weights.values()
    )
    assert "transformer" in small.sentence() and "--offload sequential" in small.sentence()


def fails(model: SD3Model, error: BaseException) -> str:
    """The line, with the error raised by a layer in the middle of a real evaluation."""

    def hook(*_: Any) -> None:
        raise error

    handle = model.network.transformer_blocks[1].register_forward_pre_hook(hook)
    try:
        with pytest.raises(WorkError) as caught, out_of_memory_explained(model):
            generate(model, "a cat", num_inference_steps=2)
    finally:
        handle.remove()
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_what_is_needed_what_there_is_and_what_to_do() -> None:
    model = tiny_model(t5=True)
    line = fails(model, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    total = sum(estimate(model).weights.values())
    assert f"the weights of tiny take {total / 1e3:.1f} kB (transformer " in line
    assert " GB are free; try, in this order: --dtype bfloat16, a smaller image" in line
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        assert fails(model, error) == pytest.approx(line) or "not enough memory" in line
    half = fails(tiny_model(dtype=torch.bfloat16), torch.OutOfMemoryError("out of memory"))
    assert half.endswith("try, in this order: a smaller image")


def test_other_failures_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_explained(tiny_model()):
        raise RuntimeError("shapes do not fit")


@pytest.mark.parametrize(
    ("offload", "remedies"),
    [
        (None, "--dtype bfloat16, --offload model, --offload sequential, a smaller image"),
        ("model", "--dtype bfloat16, --offload sequential, a smaller image"),
        ("sequential", "--dtype bfloat16, a smaller image"),
    ],
)
def test_remedies_in_use_are_not_advised(
    monkeypatch: pytest.MonkeyPatch, offload: Offload | None, remedies: str
) -> None:
    model = tiny_model()
    before = estimate(model)
    place(model, CPU, offload)
    assert offload_of(model) == (offload or "none")
    assert estimate(model) == before  # wherever the weights are
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (10**8, 24 * 10**9))
    line = explanation(model, torch.device("meta"))  # for a device that is no CPU
    assert line.endswith(f"100.0 MB of 24.0 GB are free; try, in this order: {remedies}")


def test_a_model_kept_in_main_memory_is_the_same_field() -> None:
    """Off-loading by diffusers' own hooks, here from the CPU to the CPU: all of it but the gain."""
    reference, model = tiny_model(t5=True), tiny_model(t5=True)
    place(model, CPU, "model")
    assert model.device.type == "cpu" and len(model.pipeline._all_hooks) == 5
    assert generate(model, "a dog", num_inference_steps=2) == generate(
        reference, "a dog", num_inference_steps=2
    )
    assert model.weight_hash == reference.weight_hash


def test_layer_after_layer_is_the_same_field() -> None:
    """Weights are on no device but while their layer computes; hooks on layers still see all.

    By the hooks of accelerate that diffusers installs. It names its device with a number, which
    they do not take for the CPU's, so that here they are installed by hand.
    """
    reference, model = tiny_model(), tiny_model()
    conditions = reference.encode_prompt(["a dog", "a cat"])
    assert model.weight_hash == reference.weight_hash
    for module in model.modules.values():
        cpu_offload(module, CPU)
    assert offload_of(model) == "sequential"
    assert all(weight.is_meta for weight in model.network.parameters())
    assert model.weight_hash == reference.weight_hash and model.dtype == torch.float32
    seen: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}
    for name, one in (("ours", model), ("theirs", reference)):
        layer = one.network.transformer_blocks[0].attn.to_v
        layer.register_forward_hook(lambda _, __, out, name=name: seen[name].append(out))
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        ours, theirs = (m.velocity(x, 0.4, conditions) for m in (model, reference))
        # Weights elsewhere in memory may go through other kernels.
        torch.testing.assert_close(model.decode(ours), reference.decode(ours), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["ours"][0], seen["theirs"][0], rtol=1e-4, atol=1e-5)
    assert all(weight.is_meta for weight in model.network.parameters())


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_the_device_asked_for_is_the_one_that_computes(offload: Offload) -> None:
    model = tiny_model()
    place(model, torch.device("cpu", 0), offload)
    assert model.device == model.pipeline._offload_device == torch.device("cpu", 0)

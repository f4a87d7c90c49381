"""Tiny models on the fake accelerator and on the CPU, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from rectiflow.models.base import FlowModel
from tests.device.fake import FakeTensor, Log
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


def on(device: torch.device, make: Callable[[], FlowModel]) -> FlowModel:
    model = make()
    model.pipeline.to(device)
    return model


@cache
def both(device: torch.device, name: str) -> tuple[FlowModel, FlowModel]:
    """The same model on the CPU and on a device; not to be changed."""
    return MODELS[name](), on(device, MODELS[name])


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
    every call, and of pictures, of which a warning may look at one more."""
    others = ("copy to the device at models/qwen_image.py", "copy to the CPU at models/images.py")
    return {place: n for place, n in log.waits.items() if not place.startswith(others)}

"""How much memory a model and an edit take, and what to do where there is too little."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import nn

from rectiflow.errors import WorkError
from rectiflow.models.base import FlowModel
from rectiflow.models.weights import stored_tensors

Offload = Literal["none", "model", "sequential"]

STREAMS = 12
"""Tensors of the size of a token stream that are alive in a block: the state, its normalised copy,
queries, keys, values, what attention returns, and the four times wider inside of the feed-forward
(attention scores are never stored). An estimate, not a measurement.
"""
CODEC_STREAMS = 3
"""Feature maps alive at full resolution in the codec's last upsampling; likewise."""


@dataclass(frozen=True)
class MemoryEstimate:
    """What an edit needs, in bytes."""

    weights: dict[str, int]
    """Of each network of the pipeline, in the dtypes they are in; exact."""
    largest_layer: int
    """The largest weights of any one layer."""
    network: int
    """Activations of one evaluation of the network; roughly."""
    codec: int
    """Activations of decoding; roughly."""
    path: int
    """The stored trajectory, float32 `[N + 1, B, C, h, w]`; exact."""

    def on_device(self, offload: Offload = "none") -> int:
        """What the device has to hold at once; under offloading the weights wait elsewhere.

        Args:
            offload: As for `load`.
        """
        weights = {
            "none": sum(self.weights.values()),
            "model": max(self.weights.values(), default=0),
            "sequential": self.largest_layer,
        }[offload]
        return weights + max(self.network, self.codec) + self.path

    def sentence(self) -> str:
        """All of it in one line."""
        return (
            f"weights {_gigabytes(sum(self.weights.values()))} ({_parts(self.weights)}); an edit "
            f"needs about {_gigabytes(self.on_device())}, "
            f"{_gigabytes(self.on_device('model'))} with --offload model, "
            f"{_gigabytes(self.on_device('sequential'))} with --offload sequential"
        )


def estimate(
    model: FlowModel,
    height: int | None = None,
    width: int | None = None,
    *,
    rows: int = 2,
    num_inference_steps: int | None = None,
) -> MemoryEstimate:
    """What editing images of a size takes.

    Args:
        model: From `load`; wherever its weights are.
        height: In pixels; the model's default if None.
        width: Likewise.
        rows: Samples that go through the network together: 2 are a source and a target without
            guidance, 4 with it.
        num_inference_steps: The model's default if None.

    Raises:
        InputError: The model cannot take this size.
    """
    height, width = height or model.default_size, width or model.default_size
    channels, h, w = model.latent_shape(height, width)
    config = model.network.config
    levels = config.get("block_out_channels")  # of a U-Net, which is largest at the first
    features = levels[0] if levels else config.num_attention_heads * config.attention_head_dim
    text = sum(segment.length for segment in model.tokenize(""))
    tokens = h * w // model.patch**2 + text
    maps = getattr(model.pipeline.vae.config, "block_out_channels", None) or (128, 128)
    steps = num_inference_steps or model.default_num_inference_steps
    return MemoryEstimate(
        weights={name: _bytes(module) for name, module in model.modules.items()},
        largest_layer=max(
            (
                _bytes(layer)
                for module in model.modules.values()
                for layer in module.modules()
                if not any(layer.children())
            ),
            default=0,
        ),
        network=rows * tokens * features * STREAMS * model.dtype.itemsize,
        codec=height * width * maps[min(1, len(maps) - 1)] * CODEC_STREAMS * 4,
        path=(steps + 1) * channels * h * w * 4,
    )


@contextmanager
def out_of_memory_explained(model: FlowModel) -> Iterator[None]:
    """Make one useful line of it when memory runs out inside.

    Args:
        model: What was computing.

    Raises:
        WorkError: Memory ran out; says what is needed, what there is, and what to do, in order.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise WorkError(explanation(model, model.device)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how PyTorch or Python says so: on the CPU it is a bare `RuntimeError`."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    found = re.search("out of memory|can't allocate memory", str(error), re.IGNORECASE)
    return isinstance(error, RuntimeError) and found is not None


def explanation(model: FlowModel, device: torch.device) -> str:
    """The line for a model that does not fit onto a device, or whose work does not.

    Args:
        model: Its weights may be anywhere.
        device: Where there was too little.
    """
    weights = {name: _bytes(module) for name, module in model.modules.items()}
    free, total = free_memory(device)
    remedies = [] if model.dtype.itemsize < 4 else ["--dtype bfloat16"]
    if device.type != "cpu":
        used = offload_of(model)
        remedies += {
            "none": ["--offload model", "--offload sequential"],
            "model": ["--offload sequential"],
            "sequential": [],
        }[used]
    remedies.append("a smaller image")
    return (
        f"not enough memory on {device}: the weights of {model.name} take "
        f"{_gigabytes(sum(weights.values()))} ({_parts(weights)}) and {_gigabytes(free)} of "
        f"{_gigabytes(total)} are free; try, in this order: {', '.join(remedies)}"
    )


def offload_of(model: FlowModel) -> Offload:
    """How a model's weights are kept, read from the hooks that bring them to the device."""
    # diffusers remembers the hooks of one way, and accelerate leaves weights on meta in the other.
    if getattr(model.pipeline, "_all_hooks", None):
        return "model"
    return "sequential" if any(p.is_meta for p in model.network.parameters()) else "none"


def free_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes of a device."""
    if device.type == "cpu":
        memory = psutil.virtual_memory()
        return memory.available, memory.total
    free, total = torch.accelerator.get_memory_info(device)
    return free, total


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(
        part.numel() * part.itemsize for tensor in tensors for _, part in stored_tensors("", tensor)
    )


def _parts(weights: dict[str, int]) -> str:
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {_gigabytes(size)}" for name, size in ordered)


def _gigabytes(size: int) -> str:
    """Bytes for people.

    Example:
        >>> _gigabytes(23_400_000_000), _gigabytes(1_250_000), _gigabytes(900)
        ('23.4 GB', '1.2 MB', '0.9 kB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e3:.1f} kB"

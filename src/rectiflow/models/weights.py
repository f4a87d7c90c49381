"""Looking at weights: their hash, and whether they are numbers at all."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rectiflow.errors import InputError


def weight_hash(modules: Mapping[str, nn.Module]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all weights, in hexadecimal.

    It depends neither on the device nor on the memory layout. LoRA layers count, and so does the
    scale of each, which is no weight.

    Example:
        >>> weight_hash({"a": nn.Identity()})[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, weight in _weights(modules):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        raw = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
    for name, scale in _adapter_scales(modules):
        digest.update(f"{name} {scale!r}\n".encode())
    return digest.hexdigest()


def check_finite(modules: Mapping[str, nn.Module], source: str) -> None:
    """Refuse weights that are missing, or have NaN or infinity in them.

    Raises:
        InputError: One line naming `source` and the weight.
    """
    for name, weight in _weights(modules):
        if weight.is_meta:
            raise InputError(f"{source}: the weights are incomplete ({name} is missing)")
        if not weight.is_floating_point() or weight.numel() == 0:
            continue
        # PyTorch has no comparisons for its types of one byte.
        number = weight.detach().float() if weight.itemsize == 1 else weight.detach()
        least, most = torch.aminmax(number)  # one pass, and NaN comes through
        if not (torch.isfinite(least) and torch.isfinite(most)):
            raise InputError(
                f"{source}: the weights are broken ({name} is not finite): download them again, "
                "or take an earlier checkpoint"
            )


def stored_dtype(file: Path) -> torch.dtype:
    """What most numbers in a file of weights are: float32, float16, or else bfloat16.

    Of kinds that networks do not compute in (8 bits, GGUF) that is what they are unpacked to.

    Raises:
        InputError: It is not a safetensors file.
    """
    if file.suffix.lower() == ".gguf":
        return torch.bfloat16
    counted: Counter[str] = Counter()
    try:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():
                part = opened.get_slice(name)
                counted[part.get_dtype()] += math.prod(part.get_shape())
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file} is not a safetensors file: {error}") from error
    most = max(counted, key=counted.__getitem__, default="F32")
    return {"F32": torch.float32, "F16": torch.float16}.get(most, torch.bfloat16)


def _weights(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for module_name, module in sorted(modules.items()):
        for name, weight in sorted(module.state_dict().items()):
            if isinstance(weight, Tensor):  # quantised layers keep notes beside their weights
                yield from stored_tensors(f"{module_name}.{name}", weight)


def stored_tensors(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A weight by name; of a quantised one, which only looks like a tensor, what it is kept in.

    Args:
        name: What to call it; parts are named after it.
        weight: A parameter or buffer.
    """
    if not is_traceable_wrapper_subclass(weight):
        yield name, weight
        return
    for part in sorted(weight.__tensor_flatten__()[0]):
        yield from stored_tensors(f"{name}.{part}", getattr(weight, part))


def _adapter_scales(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, float]]:
    """What peft multiplies the contribution of each active LoRA layer by."""
    for module_name, module in sorted(modules.items()):
        for name, layer in module.named_modules():
            scaling = getattr(layer, "scaling", None)
            if hasattr(layer, "active_adapters") and isinstance(scaling, dict):
                for adapter in layer.active_adapters:
                    if adapter in scaling:
                        yield f"{module_name}.{name}.{adapter}", float(scaling[adapter])

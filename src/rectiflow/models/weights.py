"""Looking at weights: their hash, and whether they are numbers at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from rectiflow.errors import InputError


def weight_hash(modules: Mapping[str, nn.Module]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all weights, in hexadecimal.

    It depends neither on the device nor on the memory layout.

    Example:
        >>> weight_hash({"a": nn.Identity()})[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, weight in _weights(modules):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        raw = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().tobytes())
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
        least, most = torch.aminmax(weight.detach())  # one pass, and NaN comes through
        if not (torch.isfinite(least) and torch.isfinite(most)):
            raise InputError(
                f"{source}: the weights are broken ({name} is not finite): download them again, "
                "or take an earlier checkpoint"
            )


def _weights(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for module_name, module in sorted(modules.items()):
        for name, weight in sorted(module.state_dict().items()):
            yield f"{module_name}.{name}", weight

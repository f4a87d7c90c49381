"""What the host knows, brought to a device without waiting for the device.

A list of row numbers or a time that is copied to a device waits for all the work that is queued
there. Rows are therefore taken by slices, times filled in by a kernel, and grids stay on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

RowNumbers = Sequence[int] | Tensor
"""Which rows of a batch, as the host knows them: a list, or int64 on the CPU."""


def take(x: Tensor, rows: RowNumbers, dim: int = 0) -> Tensor:
    """``x[rows]`` for numbers that are on the host; `x` itself where those are all of its rows.

    Args:
        x: On any device.
        rows: Any of them, any number of times.
        dim: Where the rows are.

    Example:
        >>> take(torch.tensor([1.0, 2.0, 3.0]), [2, 0, 1, 1]).tolist()
        [3.0, 1.0, 2.0, 2.0]
    """
    numbers = _numbers(rows)
    if numbers == list(range(x.shape[dim])):
        return x
    if not numbers:
        return x.narrow(dim, 0, 0)
    pieces, first = [], 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            pieces.append(x.narrow(dim, numbers[first], i - first))
            first = i
    return torch.cat(pieces, dim)


def replaced(x: Tensor, rows: RowNumbers, new: Tensor) -> Tensor:
    """`x` with other values in some of its rows, whose numbers are on the host; a new tensor.

    Example:
        >>> replaced(torch.zeros(3), [2, 0], torch.tensor([1.0, 2.0])).tolist()
        [2.0, 0.0, 1.0]
    """
    numbers = _numbers(rows)
    if numbers == list(range(len(x))):
        return new
    parts = list(x.unbind())
    for number, part in zip(numbers, new.unbind(), strict=True):
        parts[number] = part
    return torch.stack(parts)


def time_for(t: Tensor | float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A time, or one per row, where the states `x` are.

    Example:
        >>> time_for(0.25, torch.zeros(2, 3), torch.float32)
        tensor(0.2500)
    """
    if isinstance(t, Tensor) and (t.ndim or t.device == x.device):
        return t.to(x.device, dtype)
    return torch.full((), float(t), dtype=dtype, device=x.device)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on its way to a device, from pinned memory."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


@cache
def precise(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none, as Apple's have not.

    Example:
        >>> precise(torch.device("cpu"))
        torch.float64
    """
    try:
        return torch.empty(0, dtype=torch.float64, device=device).dtype
    except TypeError:
        return torch.float32


def _numbers(rows: RowNumbers) -> list[int]:
    found: list[int] = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    return found

"""Rows of a coupling: noise, latents, and what each pair of them is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """A pair (x_0, x_1); a DataLoader stacks several into one of batches."""

    index: int  # type: ignore[assignment]  # of tuples it is a method
    """In its store."""
    prompt: str
    seed: int
    """Of the noise."""
    x_0: Tensor
    """Noise, float32 [C, h, w]."""
    x_1: Tensor
    """Latents, float32 [C, h, w]."""


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Pairs (x_0, x_1), one a row, on the CPU as a store gives them."""

    index: Tensor
    """Of each pair in its store, int64 [B]."""
    x_0: Tensor
    """Noise, float32 [B, C, h, w]."""
    x_1: Tensor
    """Latents, float32 [B, C, h, w]; the store has them in float16."""
    prompts: list[str]
    seed: Tensor
    """Of each row's noise, int64 [B]; what an inverted pair's noise would have been drawn from."""
    cost: Tensor
    """`‖x_1 - x_0‖² / d` as it was measured when the pair was made, float32 [B]."""
    numbers: Tensor | None = None
    """Of each sample in the run, int64 [B]; None where pairs were asked for by index."""

    def __len__(self) -> int:
        """B."""
        return len(self.prompts)

    def pair(self, place: int) -> Pair:
        """One row."""
        index, seed = int(self.index[place]), int(self.seed[place])
        return Pair(index, self.prompts[place], seed, self.x_0[place], self.x_1[place])

    def rows(self, places: Sequence[int]) -> PairBatch:
        """Some of the rows, in the order of `places`."""
        at = torch.as_tensor(places, dtype=torch.int64)
        chosen = self._with(lambda values: values[at])
        return replace(chosen, prompts=[self.prompts[int(place)] for place in at])

    def mirror_(self, which: Sequence[bool]) -> PairBatch:
        """Exchange left and right, in place, of the rows `which` names, noise and latents alike."""
        for x in (self.x_0, self.x_1):
            for row, chosen in zip(x, which, strict=True):
                if chosen:
                    row.copy_(row.flip(-1))
        return self

    def to(self, device: torch.device | str) -> PairBatch:
        """The same on a device."""
        return self._with(lambda values: values.to(device))

    def pin_memory(self) -> PairBatch:
        """The same in page-locked memory; a DataLoader with pin_memory=True calls this."""
        return self._with(Tensor.pin_memory)

    def _with(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        return replace(
            self,
            index=change(self.index),
            x_0=change(self.x_0),
            x_1=change(self.x_1),
            seed=change(self.seed),
            cost=change(self.cost),
            numbers=None if self.numbers is None else change(self.numbers),
        )


def joined(batches: Sequence[PairBatch]) -> PairBatch:
    """The rows of several batches, one batch after the other.

    Args:
        batches: One or more, of one latent shape; all with numbers or none.
    """
    numbers = [batch.numbers for batch in batches if batch.numbers is not None]
    return PairBatch(
        index=torch.cat([batch.index for batch in batches]),
        x_0=torch.cat([batch.x_0 for batch in batches]),
        x_1=torch.cat([batch.x_1 for batch in batches]),
        prompts=[prompt for batch in batches for prompt in batch.prompts],
        seed=torch.cat([batch.seed for batch in batches]),
        cost=torch.cat([batch.cost for batch in batches]),
        numbers=torch.cat(numbers) if len(numbers) == len(batches) else None,
    )

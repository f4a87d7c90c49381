"""Which pairs are trained on and how: longest ones dropped, mirror images, stores mixed.

All of it is a function of the pair's index or of the sample's number alone, so a run with it can be
resumed and split as one without. Source of the options: 2-RF++ (Lee et al. 2024, arXiv 2405.20320),
which mixes real images with their inversions, and SlimFlow (Zhu et al. 2024, arXiv 2407.12718),
which mirrors pairs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from rectiflow.errors import InputError
from rectiflow.straighten.order import PairOrder, shuffled
from rectiflow.straighten.pair_batch import PairBatch, joined
from rectiflow.straighten.reading import PairStore

BLOCK = 1024
"""Samples among which those of two stores are shuffled."""
_FLIPS, _MIX = 0x5EED0003, 0x5EED0004
_SIDED = re.compile(r"\b(left|right|leftmost|rightmost)\b", re.IGNORECASE)


class PairSource(Protocol):
    """Samples by their number in the run."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, h, w]."""
        ...

    def samples(self, numbers: Sequence[int]) -> PairBatch:
        """The samples of these numbers; a pure function of each."""
        ...


def keep_pairs(store: PairStore, drop_longest: float = 0.0, held_out: int = 0) -> NDArray[np.bool_]:
    """Which pairs to train on: not the longest, not those held out; for `PairOrder(keep=)`.

    A long way from noise to latents tends to be a bad sample of the teacher, and is what the
    student errs most on. The stored cost decides, ties by index; of `n` pairs that are not held
    out, exactly `floor(drop_longest · n)` are dropped.

    Args:
        store: Whose pairs; its costs are read, a few bytes a pair.
        drop_longest: Share, in [0, 1).
        held_out: How many of the last readable pairs are never trained on.

    Returns:
        bool [the store's num]; False also for pairs that cannot be read.

    Raises:
        InputError: A value is out of its range, or no pair is left.
    """
    if not 0 <= drop_longest < 1:
        raise InputError(f"drop_longest is {drop_longest}: give a share from 0 to below 1")
    readable = np.concatenate([np.arange(r.start, r.stop) for r in store.ranges])
    if not 0 <= held_out < len(readable):
        raise InputError(f"{held_out} pairs cannot be held out of {len(readable)}: hold out fewer")
    trained = readable[: len(readable) - held_out]
    dropped = int(_fraction(drop_longest) * len(trained))
    if dropped:
        # Stable, with NaN as the longest of all: costs of pairs that went wrong.
        order = np.argsort(store.costs()[trained].numpy(), kind="stable")
        trained = trained[order[: len(trained) - dropped]]
    keep = np.zeros(store.manifest.num, dtype=bool)
    keep[trained] = True
    return keep


@dataclass(frozen=True)
class Curated:
    """A store in the order of training, some of its pairs mirrored.

    Args:
        store: Whose pairs.
        order: Of the samples.
        flip: With which probability a sample is mirrored, its noise and its latents together: a
            mirrored pair is a pair again, N(0, I) having no sides. Never one whose prompt says left
            or right.
        seed: Of the flips.

    Example:
        >>> from rectiflow.straighten.order import PairOrder
        >>> def curated(store: PairStore) -> Curated:
        ...     keep = keep_pairs(store, drop_longest=0.1)
        ...     return Curated(store, PairOrder(store, seed=0, keep=keep), flip=0.5)
    """

    store: PairStore
    order: PairOrder
    flip: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip is {self.flip}: give a probability from 0 to 1")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, h, w]."""
        return tuple(self.store.manifest.latent_shape)

    def samples(self, numbers: Sequence[int]) -> PairBatch:
        """The samples of these numbers."""
        found = self.store.pairs(self.order.indices(numbers).tolist())
        found = replace(found, numbers=torch.as_tensor(list(numbers), dtype=torch.int64))
        return found.mirror_(self._flipped(numbers, found.prompts)) if self.flip else found

    def _flipped(self, numbers: Sequence[int], prompts: Sequence[str]) -> list[bool]:
        coins = [_uniform(self.seed, number) < self.flip for number in numbers]
        sided = [_SIDED.search(prompt) is not None for prompt in prompts]
        return [coin and not side for coin, side in zip(coins, sided, strict=True)]


@dataclass(frozen=True)
class Mixed:
    """Samples of two sources at a given share: real images with their inversions among pairs.

    Of any first `k · BLOCK` samples exactly `floor(share · k · BLOCK)` are of `other`, and which
    they are is shuffled within each block. Each source is asked for its samples 0, 1, 2, …, none
    left out: its own epochs stay whole.

    Args:
        main: The pairs of the teacher.
        other: What is mixed in; may be `Mixed` itself.
        share: Of `other`, in (0, 1).
        seed: Of the shuffle.

    Raises:
        InputError: The latents differ in shape, or `share` is out of its range.
    """

    main: PairSource
    other: PairSource
    share: float
    seed: int = 0
    _blocks: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InputError(f"the share of what is mixed in is {self.share}: between 0 and 1")
        if tuple(self.main.latent_shape) != tuple(self.other.latent_shape):
            raise InputError(
                f"latents of {list(self.main.latent_shape)} and {list(self.other.latent_shape)} "
                "cannot be mixed: make both stores with one model and size"
            )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, h, w]."""
        return tuple(self.main.latent_shape)

    def place(self, number: int) -> tuple[bool, int]:
        """Whether sample `number` is of `other`, and its number there (or in `main`)."""
        block, within = divmod(number, BLOCK)
        slot = block * BLOCK + int(self._block(block)[within])
        share = _fraction(self.share)
        before = int(share * slot)  # of `other`, among slots before this one
        if int(share * (slot + 1)) > before:
            return True, before
        return False, slot - before

    def samples(self, numbers: Sequence[int]) -> PairBatch:
        """The samples of these numbers."""
        places = [self.place(number) for number in numbers]
        rows, parts = [], []
        for source, is_other in ((self.main, False), (self.other, True)):
            mine = [row for row, (other, _) in enumerate(places) if other is is_other]
            if mine:
                parts.append(source.samples([places[row][1] for row in mine]))
                rows += mine
        batch = joined(parts).rows(np.argsort(rows).tolist())
        return replace(batch, numbers=torch.as_tensor(list(numbers), dtype=torch.int64))

    def _block(self, block: int) -> NDArray[np.int64]:
        known = self._blocks.get(block)
        if known is None:
            known = shuffled(BLOCK, self.seed, _MIX, block)
            if len(self._blocks) > 8:
                self._blocks.clear()
            self._blocks[block] = known
        return known


def _uniform(seed: int, number: int) -> float:
    """A number in [0, 1) that the run's seed and the sample's number decide."""
    philox = np.random.Philox(key=[seed % 2**64, _FLIPS], counter=[0, number, 0, 0])
    return (int(philox.random_raw()) >> 11) * 2.0**-53


def _fraction(share: float) -> Fraction:
    """A share as it was typed, 0.1 being a tenth, so that its multiples are exact."""
    return Fraction(share).limit_denominator(10**6)

"""In which order pairs are trained on: a shuffle that is a pure function of the sample's number.

Sample `n` of a run is the same pair whoever asks for it, when, and after what: so a run resumes at
any sample, and any number of ranks and workers share it by their own numbers, without a word
between them. Files are read in few large pieces, so the shuffle has two levels: the shards of an
epoch are shuffled and cut into groups, and the pairs of a group are shuffled together. While a
group lasts, no shard outside of it is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rectiflow.errors import InputError

BUFFER_SHARDS = 16
"""Shards whose pairs are shuffled together, unless told otherwise."""
_REMEMBERED = 4
"""Groups, and epochs, whose shuffles are kept; they can always be made again."""

# What a stream of random numbers is for. Times and noise of training have streams of their own, on
# other counters.
_SHARDS, _PAIRS = 0x5EED0001, 0x5EED0002


class Sharded(Protocol):
    """What has pairs in shards: a `PairStore`."""

    @property
    def ranges(self) -> Sequence[range]:
        """The indices of each shard's pairs."""
        ...


class PairOrder:
    """Number of a sample -> index of a pair; every kept pair once in every epoch.

    Args:
        store: Whose pairs.
        seed: Of the shuffle.
        buffer_shards: Shards of which pairs are shuffled together: more mix better, and that many
            should fit into the store's cache.
        keep: Which pairs take part, bool [the largest index + 1] or more; all if None.

    Raises:
        InputError: No pair is left, or `buffer_shards` is less than 1.

    Example:
        >>> from types import SimpleNamespace
        >>> store = SimpleNamespace(ranges=[range(0, 4), range(4, 8), range(8, 10)])
        >>> order = PairOrder(store, seed=0, buffer_shards=2)
        >>> sorted(order.index(number) for number in range(10, 20)) == list(range(10))
        True
    """

    def __init__(
        self,
        store: Sharded,
        seed: int,
        buffer_shards: int = BUFFER_SHARDS,
        keep: Tensor | NDArray[np.bool_] | None = None,
    ) -> None:
        if buffer_shards < 1:
            raise InputError(f"buffer_shards is {buffer_shards}: give 1 or more")
        self.seed, self.buffer_shards = seed, buffer_shards
        wanted = None if keep is None else np.asarray(keep, dtype=bool)
        shards = [_kept(indices, wanted) for indices in store.ranges]
        self._shards = [pairs for pairs in shards if len(pairs)]
        self.kept = sum(map(len, self._shards))
        """Pairs of an epoch."""
        if not self.kept:
            raise InputError("no pair is left to train on: drop fewer, or use another store")
        self._epochs: dict[int, tuple[list[NDArray[np.int64]], NDArray[np.int64]]] = {}
        self._groups: dict[tuple[int, int], NDArray[np.int64]] = {}

    def index(self, number: int) -> int:
        """The pair of sample `number`, from 0."""
        return int(self.indices([number])[0])

    def indices(self, numbers: Sequence[int]) -> NDArray[np.int64]:
        """The pairs of samples, int64 [B]."""
        found = np.empty(len(numbers), np.int64)
        for row, number in enumerate(numbers):
            epoch, place = divmod(int(number), self.kept)
            if epoch < 0:
                raise InputError(f"there is no sample {number}: they are numbered from 0")
            groups, ends = self._epoch(epoch)
            group = int(np.searchsorted(ends, place, side="right"))
            first = int(ends[group - 1]) if group else 0
            found[row] = self._group(epoch, group, groups[group])[place - first]
        return found

    def shards_of(self, epoch: int) -> list[list[int]]:
        """The first kept index of every shard, group after group, as an epoch reads them."""
        return [[int(self._shards[s][0]) for s in group] for group in self._epoch(epoch)[0]]

    # Threads may make the same thing twice and find the same; so there is no lock, which a forked
    # worker could wait for for ever.

    def _epoch(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """Which shards each group of an epoch has, and where it ends in the epoch."""
        known = self._epochs.get(epoch)
        if known is None:
            order = shuffled(len(self._shards), self.seed, _SHARDS, epoch)
            cuts = range(0, len(order), self.buffer_shards)
            groups = [order[cut : cut + self.buffer_shards] for cut in cuts]
            sizes = [sum(len(self._shards[s]) for s in group) for group in groups]
            known = groups, np.cumsum(sizes)
            _remember(self._epochs, epoch, known)
        return known

    def _group(self, epoch: int, group: int, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pairs of a group in their order."""
        known = self._groups.get((epoch, group))
        if known is None:
            pairs = np.concatenate([self._shards[s] for s in shards])
            known = pairs[shuffled(len(pairs), self.seed, _PAIRS, epoch, group)]
            _remember(self._groups, (epoch, group), known)
        return known

    def __getstate__(self) -> dict[str, Any]:
        """What a loader's worker needs, without what it can make again."""
        return self.__dict__ | {"_epochs": {}, "_groups": {}}


def shuffled(count: int, seed: int, *stream: int) -> NDArray[np.int64]:
    """A permutation of `range(count)` that `seed` and `stream` (two or three numbers) decide.

    By sorting the words of Philox, a counter-based generator (Salmon et al. 2011), which are the
    same in every release of numpy; what `Generator.permutation` and `torch.randperm` make of them
    is not promised to be.

    Args:
        count: How many.
        seed: Of the run.
        *stream: What the permutation is for; the first below 2⁶⁴, as the others.

    Example:
        >>> sorted(int(i) for i in shuffled(4, 0, 7, 0))
        [0, 1, 2, 3]
    """
    what, *place = stream
    philox = np.random.Philox(
        key=[seed % 2**64, what], counter=[0, *place, *[0] * (3 - len(place))]
    )
    return np.argsort(philox.random_raw(count), kind="stable").astype(np.int64)


def _kept(indices: range, keep: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    pairs = np.arange(indices.start, indices.stop, dtype=np.int64)
    if keep is None:
        return pairs
    if len(keep) < indices.stop:
        raise InputError(f"keep speaks of {len(keep)} pairs, and the store has {indices.stop}")
    return pairs[keep[pairs]]


def _remember(known: dict[Any, Any], key: Any, value: Any) -> None:
    if len(known) >= _REMEMBERED:
        known.clear()
    known[key] = value

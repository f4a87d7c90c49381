"""Reading a store of pairs: any rows of it, checked, with the noise drawn again from its seeds."""

from __future__ import annotations

import operator
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import RLock
from typing import Any, Literal, overload

import torch
from torch import Tensor

from rectiflow.arguments import checked
from rectiflow.errors import InputError
from rectiflow.guarded import parse_json
from rectiflow.straighten.folder import Folder
from rectiflow.straighten.manifest import (
    COMPLETE,
    Manifest,
    read_manifest,
    read_prompts,
    shard_name,
    sidecar_name,
)
from rectiflow.straighten.opened_shard import (
    AGAIN,
    CorruptShard,
    OpenShard,
    Vouched,
    check_noise,
    noise,
    open_shard,
    read_costs,
)
from rectiflow.straighten.pair_batch import Pair, PairBatch

__all__ = ["CorruptShard", "Pair", "PairBatch", "PairStore"]

CACHE_BYTES = 2 * 2**30
"""Of shards that are kept open, unless told otherwise; local ones are mapped, not copied."""
_READERS = 8
"""Shards that are looked at side by side, where all of them are."""

OnCorrupt = Literal["raise", "skip"]


class PairStore:
    """The pairs of a store, by index; made by `PairStore.open`.

    A shard's checksum, and that of the noise its seeds give, are compared when it is first touched:
    what comes out is what was written, or an error that names the file. May be used by several
    threads, and by the worker processes of a DataLoader.
    """

    manifest: Manifest
    """What the pairs follow from: teacher, guidance, solver, shape, seeds."""
    prompts: list[str]
    """The distinct prompts; pair i has `prompts[i % len(prompts)]`."""
    ranges: list[range]
    """The indices of the pairs of each readable shard, in order."""
    skipped: dict[int, CorruptShard]
    """What is wrong with each shard left out by `on_corrupt="skip"`."""

    def __init__(self, folder: Folder, cache_bytes: int) -> None:
        """Read what is there; `open` decides what to make of it."""
        self.uri, self.cache_bytes = folder.uri, cache_bytes
        self.manifest = read_manifest(folder)
        self.prompts = read_prompts(folder, self.manifest)
        names = folder.names()
        self.checksums = _checksums(folder) if COMPLETE in names else None
        """Of every shard's file, as the finished store lists them; None before."""
        self.skipped = {}
        self.missing = {
            number: missing
            for number in range(self.manifest.num_shards)
            if (missing := {shard_name(number), sidecar_name(number)} - names)
        }
        """The files that a shard lacks."""
        self._vouched: dict[int, Vouched] = {}
        self._forget()
        self._range_over(set(range(self.manifest.num_shards)) - set(self.missing))

    @classmethod
    @checked
    def open(
        cls,
        uri: str | Path,
        *,
        on_corrupt: OnCorrupt = "raise",
        allow_incomplete: bool = False,
        cache_bytes: int = CACHE_BYTES,
    ) -> PairStore:
        """Open a store.

        Args:
            uri: A folder, or any address that fsspec knows.
            on_corrupt: With `"raise"` a missing shard is an error now, and a corrupt one when it is
                touched. With `"skip"` all shards are checked now, which reads the whole store, and
                those that fail are left out with a warning each: the order of training is then the
                same however often it is resumed.
            allow_incomplete: Read what is there of a store that is still being made.
            cache_bytes: How much of shards to keep open; at least one is.

        Raises:
            InputError: There is no store, it is not complete, a shard is missing, or none is left.
        """
        if on_corrupt not in ("raise", "skip"):
            raise InputError(f"unknown on_corrupt {on_corrupt!r}: use raise or skip")
        store = cls(Folder(uri), cache_bytes)
        manifest, missing = store.manifest, store.missing
        if store.checksums is None and not allow_incomplete:
            there = manifest.num_shards - len(missing)
            raise InputError(
                f"{store.uri} is not complete, with {there} of {manifest.num_shards} shards: run "
                "the same `rectiflow pairs` command again to finish it, or read what is there with "
                "allow_incomplete=True"
            )
        if store.checksums is not None:
            for number, names in missing.items():
                fault = CorruptShard.of(store.uri, number, min(names), "is missing")
                if on_corrupt == "raise":
                    raise fault
                store._skip(number, fault)
        if on_corrupt == "skip":
            for number, error in store.check().items():
                store._skip(number, error)
        if not store.ranges:
            faults = [str(fault) for fault in store.skipped.values()]
            raise InputError(f"{store.uri} has no shard that can be read" + _first(faults))
        return store

    def __len__(self) -> int:
        """How many pairs can be read; `manifest.num` unless shards are left out."""
        return sum(map(len, self.ranges))

    @overload
    def __getitem__(self, place: int) -> Pair: ...
    @overload
    def __getitem__(self, place: slice) -> list[Pair]: ...
    def __getitem__(self, place: int | slice) -> Pair | list[Pair]:
        """A pair by its place among those that can be read, counted and sliced as in a list.

        The place is the pair's `index`, unless shards are left out. For many pairs at once `pairs`
        is faster, and for training `PairDataset`, which reads shard after shard.

        Raises:
            IndexError: There is no such place.
            CorruptShard: As of `pairs`.
        """
        count = len(self)
        places = range(count)[place if isinstance(place, slice) else operator.index(place)]
        if isinstance(places, int):
            return self.pairs([self._index(places)]).pair(0)
        batch = self.pairs([self._index(number) for number in places])
        return [batch.pair(row) for row in range(len(batch))]

    def pairs(self, indices: Sequence[int]) -> PairBatch:
        """Pairs by index, in the order given.

        Args:
            indices: Each in one of `ranges`; repetitions are allowed.

        Returns:
            x_0 and x_1 in float32 on the CPU, x_0 drawn again from the seeds (of inverted pairs:
            as stored).

        Raises:
            InputError: There is no such pair.
            CorruptShard: A shard is missing or not what was written; an `InputError` too.
        """
        manifest, shape = self.manifest, self.manifest.latent_shape
        rows = [int(index) for index in indices]
        seeds = [manifest.seed(index) for index in rows]
        x_1, cost = torch.empty(len(rows), *shape), torch.empty(len(rows))
        inverted = manifest.kind == "inverted"
        x_0 = torch.empty(len(rows), *shape) if inverted else noise(seeds, shape)
        for number, places in self._by_shard(rows).items():
            shard = self.shard(number).shard
            first = manifest.shard_range(number).start
            # Row after row: indexing would first copy to float16, and then to float32.
            for place in places:
                row = rows[place] - first
                x_1[place].copy_(shard.x_1[row])
                cost[place] = shard.cost[row]
                if shard.x_0 is not None:
                    x_0[place].copy_(shard.x_0[row])
        return PairBatch(
            index=torch.tensor(rows, dtype=torch.int64),
            x_0=x_0,
            x_1=x_1,
            prompts=[self.prompts[manifest.prompt_index(index)] for index in rows],
            seed=torch.tensor(seeds, dtype=torch.int64),
            cost=cost,
        )

    def shard(self, number: int) -> OpenShard:
        """A shard, checked when it is first touched, and then kept while there is room.

        Raises:
            CorruptShard: It is missing, or not what was written.
        """
        if self._pid != os.getpid():
            self._forget()  # a forked worker: another process may have held the lock
        with self._lock:
            opened = self._open.get(number)
            if opened is None:
                opened = self._checked(number)
                self._open[number] = opened
                while self._room() < 0 and len(self._open) > 1:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return opened

    def costs(self) -> Tensor:
        """`‖x_1 - x_0‖² / d` of every pair, float32 [num]; NaN where a pair cannot be read.

        Reads these alone, not the latents, and so without their checksum: that is compared when a
        pair is read.

        Raises:
            CorruptShard: A shard is missing, or too damaged to find them.
        """
        costs = torch.full((self.manifest.num,), torch.nan)
        numbers = [r.start // self.manifest.shard_size for r in self.ranges]
        folder = self._folder
        read: Callable[[int], Tensor] = lambda number: read_costs(folder, self.manifest, number)  # noqa: E731
        with ThreadPoolExecutor(_READERS) as threads:
            for number, found in zip(numbers, threads.map(read, numbers), strict=True):
                indices = self.manifest.shard_range(number)
                costs[indices.start : indices.stop] = found
        return costs

    def check(self, seen: Callable[[int], None] = lambda number: None) -> dict[int, CorruptShard]:
        """Read and check every shard; what is wrong with those that fail, by number.

        Afterwards they count as touched, for copies in the workers of a DataLoader as well.

        Args:
            seen: Called with the number of each shard that has been looked at, for progress.
        """
        faults: dict[int, CorruptShard] = {}
        numbers = [r.start // self.manifest.shard_size for r in self.ranges]
        with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as threads:
            for number, fault in zip(numbers, threads.map(self._fault, numbers), strict=True):
                if fault is not None:
                    faults[number] = fault
                seen(number)
        return faults

    def _fault(self, number: int) -> CorruptShard | None:
        try:
            self._checked(number)
        except CorruptShard as error:
            return error
        return None

    def _checked(self, number: int) -> OpenShard:
        """A shard from its file, compared with all that is said of it."""
        if number in self.skipped:
            raise self.skipped[number]
        if number in self.missing:
            raise CorruptShard.of(self.uri, number, min(self.missing[number]), "is missing")
        known, name = self._vouched.get(number), shard_name(number)
        opened = open_shard(self._folder, self.manifest, number, known)
        if self.checksums is not None and self.checksums.get(name) != opened.sha256:
            fault = f"is another file than {COMPLETE} lists"
            raise CorruptShard.of(self.uri, number, name, fault)
        if known is None or known[1] != opened.sha256:
            check_noise(self._folder, self.manifest, number, opened)
        self._vouched[number] = opened.vouched
        return opened

    def _index(self, place: int) -> int:
        """Of the pair at a place."""
        if len(self) == self.manifest.num:
            return place
        for indices in self.ranges:
            if place < len(indices):
                return indices[place]
            place -= len(indices)
        raise IndexError(place)

    def _by_shard(self, rows: Iterable[int]) -> dict[int, list[int]]:
        """The places in a batch that each shard fills."""
        found: dict[int, list[int]] = {}
        for place, index in enumerate(rows):
            if not 0 <= index < self.manifest.num:
                raise InputError(f"{self.uri} has no pair {index}: it has {self.manifest.num}")
            found.setdefault(index // self.manifest.shard_size, []).append(place)
        return found

    def _skip(self, number: int, fault: CorruptShard) -> None:
        self.skipped[number] = fault
        self._range_over({r.start // self.manifest.shard_size for r in self.ranges} - {number})
        warnings.warn(
            f"{fault.file} of {self.uri} {fault.fault}; its pairs are left out", stacklevel=3
        )

    def _range_over(self, shards: set[int]) -> None:
        self.ranges = [self.manifest.shard_range(number) for number in sorted(shards)]

    def _room(self) -> int:
        return self.cache_bytes - sum(opened.nbytes for opened in self._open.values())

    def _forget(self) -> None:
        """Begin in this process with nothing open."""
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = RLock()
        self._folder = Folder(self.uri)
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: no lock, no open file."""
        mine = ("_open", "_lock", "_folder", "_pid")
        return {name: value for name, value in self.__dict__.items() if name not in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _checksums(folder: Folder) -> dict[str, str]:
    """What `complete.json` says of each shard."""
    try:
        found = parse_json(folder.read(COMPLETE) or b"", COMPLETE)["shards"]
        return {str(name): str(checksum) for name, checksum in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder.uri}/{COMPLETE} is damaged: remove it, and {AGAIN}") from error


def _first(faults: Sequence[str]) -> str:
    return f"; the first: {faults[0]}" if faults else f": {AGAIN}"

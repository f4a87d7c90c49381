"""What is in a store of pairs: counts, bytes, statistics, transport cost, duplicates, damage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectiflow.errors import InputError
from rectiflow.flow.measure import Estimate, NoiseStatistics
from rectiflow.straighten.folder import Folder
from rectiflow.straighten.manifest import Manifest, shard_name
from rectiflow.straighten.opened_shard import CorruptShard
from rectiflow.straighten.reading import PairStore
from rectiflow.straighten.tally import Channels, Tally

LIMIT = 4096
"""Pairs of which statistics are taken, unless told otherwise."""
_SHOWN = 8
_GROUPS = 20
"""Groups of duplicates, and other lists of indices, are cut at this many."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found."""

    uri: str
    manifest: Manifest
    complete: bool
    """Whether the store says that all of it is there."""
    shards: int
    """Shards that are there and sound, of `manifest.num_shards`."""
    pairs: int
    """Pairs in them, of `manifest.num`."""
    bytes: int
    """Of all files of the store."""
    bytes_per_pair: float
    """Of all files, by pair in a shard that is there."""
    latent_bytes: int
    """Of one x_1 in float16."""
    faults: list[str]
    """What is missing or damaged, a line each that names the file and the remedy."""
    unfinished: list[str]
    """Shards that a store that is not complete lacks."""
    other_versions: dict[str, dict[str, str]]
    """Shards that other versions of the libraries made than the store was begun with, and which."""
    examined: int
    """Pairs that the figures below are of, spread evenly over the store."""
    transport_cost: dict[str, Estimate]
    """E c(x_1 - x_0) per dimension, by the names of `flow.measure.COSTS`."""
    x_0: Channels
    x_1: Channels
    noise: NoiseStatistics | None
    """Whether x_0 looks like N(0, I); None if there is no pair."""
    duplicate_seeds: list[list[int]] = field(default_factory=list)
    """Groups of pairs with the same x_0, twenty at most."""
    duplicate_images: list[list[int]] = field(default_factory=list)
    """Groups of pairs with the same x_1 to the last bit, twenty at most."""
    num_duplicate_seeds: int = 0
    """Pairs that could go without losing an x_0."""
    num_duplicate_images: int = 0
    """Pairs that could go without losing an x_1."""
    pairs_per_prompt: tuple[int, int] = (0, 0)
    """The least and the most."""
    repeated_prompts: dict[str, int] = field(default_factory=dict)
    """Prompts that the list holds more than once, and how often, twenty at most."""
    shortest: list[tuple[int, float]] = field(default_factory=list)
    """Index and stored cost of the pairs with the smallest, ascending."""
    longest: list[tuple[int, float]] = field(default_factory=list)
    """Likewise of the largest, descending."""

    sample: list[int] = field(default_factory=list)
    """Eight sound pairs, at most, from all over the store: to be looked at."""

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON data."""
        costs = {
            name: {"value": cost.value, "standard_error": cost.standard_error}
            for name, cost in self.transport_cost.items()
        }
        return {
            **{key: value for key, value in self.__dict__.items() if key not in _NESTED},
            "manifest": self.manifest.model_dump(mode="json"),
            "transport_cost": costs,
            "x_0": self.x_0.__dict__,
            "x_1": self.x_1.__dict__,
            "noise": None if self.noise is None else self.noise.__dict__,
        }


_NESTED = ("manifest", "transport_cost", "x_0", "x_1", "noise")


def inspect(
    uri: str | Path,
    *,
    limit: int | None = LIMIT,
    extremes: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Inspection:
    """Read a store, finished or not, and say what is in it.

    Every shard is read and checked whatever the limit, and nothing that is wrong with one stops it.

    Args:
        uri: A folder, or any address that fsspec knows.
        limit: Pairs to take statistics of; all if None.
        extremes: How many of the longest and of the shortest pairs to name.
        progress: Called with the number of shards done, and of all, after each.

    Raises:
        InputError: There is no store, or its manifest or prompt list cannot be read.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: give 1 or more")
    folder = Folder(uri)
    store = PairStore(folder, cache_bytes=0)
    manifest = store.manifest
    tally = Tally(manifest, _chosen(store, limit))
    faults: list[str] = []
    unfinished: list[str] = []
    others: dict[str, dict[str, str]] = {}
    for number in range(manifest.num_shards):
        try:
            opened = store.shard(number)
            tally.add(opened, manifest.shard_range(number))
            if opened.versions is not None:
                others[shard_name(number)] = opened.versions
        except CorruptShard as fault:
            # What a store that is still being made does not have yet is not damaged.
            absent = store.checksums is None and number in store.missing
            (unfinished if absent else faults).append(str(fault))
        progress(number + 1, manifest.num_shards)
    size = sum(int(found.get("size") or 0) for found in folder.fs.ls(folder.root, detail=True))
    indices, costs = tally.indices, tally.costs
    seeds, num_seeds = _duplicates(tally.starts, indices)
    images, num_images = _duplicates(tally.ends, indices)
    order = np.argsort(costs, kind="stable")
    by_cost = [
        (int(indices[i]), float(costs[i])) for i in (*order[:extremes], *order[::-1][:extremes])
    ]
    shown = min(extremes, len(order))
    repeats = {prompt: n for prompt, n in Counter(store.prompts).most_common(_GROUPS) if n > 1}
    return Inspection(
        uri=store.uri,
        manifest=manifest,
        complete=store.checksums is not None,
        shards=tally.shards,
        pairs=len(indices),
        bytes=size,
        bytes_per_pair=size / len(indices) if len(indices) else math.nan,
        latent_bytes=2 * math.prod(manifest.latent_shape),
        faults=faults,
        unfinished=unfinished,
        other_versions=others,
        examined=tally.examined,
        transport_cost=tally.transport_cost(),
        x_0=tally.x_0.channels(),
        x_1=tally.x_1.channels(),
        noise=tally.noise_statistics(),
        duplicate_seeds=seeds,
        duplicate_images=images,
        num_duplicate_seeds=num_seeds,
        num_duplicate_images=num_images,
        pairs_per_prompt=_pairs_per_prompt(manifest, indices),
        repeated_prompts=repeats,
        shortest=by_cost[:shown],
        longest=by_cost[shown:],
        sample=indices[_spread(len(indices), _SHOWN)].tolist(),
    )


def _chosen(store: PairStore, limit: int | None) -> NDArray[np.bool_]:
    """Which pairs to take statistics of, of those that are there: bool [num]."""
    there = np.concatenate([np.arange(0), *(np.arange(r.start, r.stop) for r in store.ranges)])
    chosen = np.zeros(store.manifest.num, dtype=bool)
    chosen[there if limit is None else there[_spread(len(there), limit)]] = True
    return chosen


def _spread(count: int, most: int) -> NDArray[np.int64]:
    """`most` of `range(count)`, one at a random place in each of as many equal parts.

    At even distances they would keep step with the prompts, which come round and round.
    """
    if most >= count:
        return np.arange(count)
    words = np.random.Philox(key=0).random_raw(most)
    within = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return ((np.arange(most) + within) * count / most).astype(np.int64)


def _duplicates(
    prints: NDArray[np.uint64], indices: NDArray[np.int64]
) -> tuple[list[list[int]], int]:
    """The first groups of pairs that share a fingerprint, and how many pairs are too many."""
    unique, place, counts = np.unique(prints, return_inverse=True, return_counts=True)
    shared = np.flatnonzero(counts[place] > 1)
    groups: dict[int, list[int]] = {}
    for row in shared:
        key = int(place[row])
        if key in groups or len(groups) < _GROUPS:
            groups.setdefault(key, []).append(int(indices[row]))
    return list(groups.values()), len(prints) - len(unique)


def _pairs_per_prompt(manifest: Manifest, indices: NDArray[np.int64]) -> tuple[int, int]:
    counts = np.bincount(indices % manifest.num_prompts, minlength=manifest.num_prompts)
    return int(counts.min()), int(counts.max())

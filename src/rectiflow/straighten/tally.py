"""What is added up over the shards of a store, one after the other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rectiflow.flow.measure import COSTS, Estimate, NoiseStatistics, noise_statistics
from rectiflow.straighten.manifest import Manifest
from rectiflow.straighten.opened_shard import OpenShard, noise

_ROWS = 64
"""Pairs that are measured at a time."""
_SEEDS = 2**32
"""PyTorch's generator on the CPU looks at this much of a seed."""


@dataclass(frozen=True)
class Channels:
    """Of the values of one end of the pairs."""

    mean: list[float]
    """Per channel."""
    std: list[float]
    """Per channel."""
    not_finite: int
    """Pairs with a value that is infinite or NaN; they are left out of the figures."""


class Tally:
    """Counts, fingerprints and statistics of pairs.

    Args:
        manifest: Of the store.
        chosen: Which pairs to take statistics of, bool [num]; all are counted.
    """

    def __init__(self, manifest: Manifest, chosen: NDArray[np.bool_]) -> None:
        self.manifest, self.chosen = manifest, chosen
        self.shards = 0
        """Shards added."""
        self.x_0, self.x_1 = Moments(), Moments()
        self._indices = [np.empty(0, np.int64)]
        self._costs = [np.empty(0, np.float32)]
        self._starts = [np.empty(0, np.uint64)]
        self._ends = [np.empty(0, np.uint64)]
        self._samples: dict[str, list[Tensor]] = {name: [] for name in COSTS}
        self._noise: list[tuple[int, NoiseStatistics]] = []

    @property
    def indices(self) -> NDArray[np.int64]:
        """The pairs added, int64 [n]."""
        return np.concatenate(self._indices)

    @property
    def costs(self) -> NDArray[np.float32]:
        """Their stored costs, float32 [n]."""
        return np.concatenate(self._costs)

    @property
    def starts(self) -> NDArray[np.uint64]:
        """A fingerprint of each one's x_0, uint64 [n]."""
        return np.concatenate(self._starts)

    @property
    def ends(self) -> NDArray[np.uint64]:
        """A fingerprint of each one's x_1, uint64 [n]."""
        return np.concatenate(self._ends)

    @property
    def examined(self) -> int:
        """Pairs that the statistics are of, those that are not finite included."""
        return self.x_1.count + self.x_1.not_finite

    def add(self, opened: OpenShard, indices: range) -> None:
        """One more shard, with these pairs."""
        shard, manifest = opened.shard, self.manifest
        self.shards += 1
        self._indices.append(np.arange(indices.start, indices.stop))
        self._costs.append(shard.cost.numpy().copy())
        self._ends.append(_fingerprints(shard.x_1))
        if shard.x_0 is None:
            seeds = [manifest.seed(i) % _SEEDS for i in indices]
            self._starts.append(np.array(seeds, np.uint64))
        else:
            self._starts.append(_fingerprints(shard.x_0))
        rows = np.flatnonzero(self.chosen[indices.start : indices.stop])
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            if shard.x_0 is None:
                seeds = [manifest.seed(indices.start + int(row)) for row in part]
                x_0 = noise(seeds, manifest.latent_shape)
            else:
                x_0 = shard.x_0[part].float()
            self._measure(x_0, shard.x_1[part].float())

    def transport_cost(self) -> dict[str, Estimate]:
        """Each cost over the pairs that were measured."""
        return {
            name: Estimate.over(torch.cat(samples))
            for name, samples in self._samples.items()
            if samples
        }

    def noise_statistics(self) -> NoiseStatistics | None:
        """Their mean over the pairs that were measured."""
        total = sum(n for n, _ in self._noise)
        if not total:
            return None
        names = ("norm", "kurtosis", "autocorrelation")
        means = {k: sum(n * getattr(s, k) for n, s in self._noise) / total for k in names}
        return NoiseStatistics(**means)

    def _measure(self, x_0: Tensor, x_1: Tensor) -> None:
        finite = self.x_0.add(x_0) & self.x_1.add(x_1)
        if not finite.any():
            return
        x_0, x_1 = x_0[finite], x_1[finite]
        self._noise.append((len(x_0), noise_statistics(x_0)))
        displacement = (x_1 - x_0).double().flatten(1)
        for name, cost in COSTS.items():
            self._samples[name].append(cost(displacement))


class Moments:
    """Mean and standard deviation per channel, in float64."""

    def __init__(self) -> None:
        self.count = 0
        """Finite pairs."""
        self.not_finite = 0
        self._values = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, x: Tensor) -> Tensor:
        """Add pairs [B, C, h, w]; which of them are finite, bool [B]."""
        finite = x.flatten(1).isfinite().all(1)
        self.not_finite += int((~finite).sum())
        self.count += int(finite.sum())
        x = x[finite].double()
        self._values += x[:, 0].numel()
        self._sum = self._sum + x.sum((0, 2, 3))
        self._squares = self._squares + x.square().sum((0, 2, 3))
        return finite

    def channels(self) -> Channels:
        """What was added up."""
        if not self._values:
            return Channels([], [], self.not_finite)
        mean = torch.as_tensor(self._sum) / self._values
        variance = torch.as_tensor(self._squares) / self._values - mean.square()
        return Channels(mean.tolist(), variance.clamp(min=0).sqrt().tolist(), self.not_finite)


def _fingerprints(x: Tensor) -> NDArray[np.uint64]:
    """64 bits of a hash of the bytes of each row, uint64 [n]."""
    digests = [hashlib.blake2b(row.numpy().data, digest_size=8).digest() for row in x]
    return np.frombuffer(b"".join(digests), np.uint64)

"""Pairs for a training loop of one's own: a DataLoader's dataset, split over ranks and workers.

The loop of this package numbers its samples itself and needs none of this. Here the same numbers
are dealt out in batches: batch `k` has the samples from `k · batch_size`, of which rank `r` of `R`
gets every R-th, and worker `w` of `W` makes every W-th batch. A DataLoader takes batches from its
workers in turn, so what a rank sees does not depend on the number of its workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rectiflow.errors import InputError, WorkError
from rectiflow.straighten.curation import PairSource
from rectiflow.straighten.pair_batch import PairBatch


class PairDataset(IterableDataset[PairBatch]):
    """Batches of samples in the order of a run, resumable at any sample.

    Iterating goes on from where the dataset is, and never ends unless `samples` says so. In a
    DataLoader it makes whole batches, so `batch_size=None` there; `loader` makes such a one, and
    also keeps account of what was handed out, which a worker process cannot.

    Args:
        source: Where samples come from: `Curated` or `Mixed`.
        batch_size: Samples of a step, of all ranks together.
        rank: Of this process.
        ranks: Of all processes that train together.
        samples: Stop before this number; the last batch may be smaller, and is left out for a rank
            that has no part in it. With several ranks give a multiple of `batch_size`.

    Raises:
        InputError: A rank would get nothing, or a number is out of its range.

    Example:
        >>> def train(source: PairSource) -> None:
        ...     dataset = PairDataset(source, batch_size=64)
        ...     dataset.load_state_dict({"next_sample": 1280})
        ...     for batch in dataset.loader(num_workers=2):
        ...         ...                          # a step with batch.x_0, batch.x_1, batch.prompts
        ...         state = dataset.state_dict()  # goes on with the sample after this batch
    """

    def __init__(
        self,
        source: PairSource,
        batch_size: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        samples: int | None = None,
    ) -> None:
        if not 0 <= rank < ranks:
            raise InputError(f"rank {rank} of {ranks}: ranks are numbered from 0")
        if batch_size < ranks:
            raise InputError(f"batch_size {batch_size} gives some of {ranks} ranks nothing")
        if samples is not None and samples < 0:
            raise InputError(f"samples is {samples}: give 0 or more, or None for no end")
        self.source, self.batch_size = source, batch_size
        self.rank, self.ranks, self.samples = rank, ranks, samples
        self.next_sample = 0
        """The first sample, of all ranks, that has not been handed out."""

    def __iter__(self) -> Iterator[PairBatch]:
        """The batches of this rank, and of this worker where there are several."""
        worker = get_worker_info()
        start = self.next_sample
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for turn in count(first, step):
            begin = start + turn * self.batch_size
            end = begin + self.batch_size
            if self.samples is not None:
                end = min(end, self.samples)
            mine = range(begin, end)[self.rank :: self.ranks]
            if begin >= end:
                return
            if mine:
                batch = self.source.samples(mine)
                if worker is None:
                    self.advance(batch)
                yield batch

    def advance(self, batch: PairBatch) -> None:
        """Take note that a batch was handed out: `state_dict` goes on after it.

        Called by `loader`, and by iterating without a DataLoader; only a loop around a DataLoader
        of its own with workers has to.

        Args:
            batch: The latest one, in order.
        """
        assert batch.numbers is not None
        ahead = int(batch.numbers[0]) - self.rank + self.batch_size
        self.next_sample = ahead if self.samples is None else min(ahead, self.samples)

    def loader(self, num_workers: int = 0, **options: Any) -> Iterator[PairBatch]:
        """The batches from a DataLoader, with account of how far they have been handed out.

        Args:
            num_workers: Processes that read ahead; 0 for none.
            **options: More for the DataLoader, such as `prefetch_factor` and `pin_memory`.

        Raises:
            InputError: A sample cannot be read, in whichever process; the line says why.
        """
        made = DataLoader(_Told(self), batch_size=None, num_workers=num_workers, **options)
        for batch in made:
            if isinstance(batch, Exception):
                raise batch
            self.advance(batch)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on after the last batch; the same on all ranks."""
        return {"next_sample": self.next_sample}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved state; ranks, workers and the batch size may be others than before."""
        self.next_sample = int(state["next_sample"])


class _Told(IterableDataset[PairBatch | Exception]):
    """A dataset whose errors come as its last item, one line each.

    What a worker raises, PyTorch wraps into a page of text from which no cause can be caught.
    """

    def __init__(self, dataset: PairDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[PairBatch | Exception]:
        try:
            yield from self.dataset
        except (InputError, WorkError) as error:
            yield error

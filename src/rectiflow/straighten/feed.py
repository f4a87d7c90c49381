"""How a step's samples are cut up, and made while the network still works on those before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from rectiflow.errors import InputError
from rectiflow.straighten.config import TrainConfig

Made = TypeVar("Made")


def micro_batches(config: TrainConfig, step: int, rank: int, ranks: int) -> list[Sequence[int]]:
    """The sample numbers that one process sends through its network in a step, in turn.

    Samples are numbered through the run: step `n` has those from `n × batch_size`, whoever works
    on them. Every process gets the same number of micro-batches.

    Raises:
        InputError: there are fewer samples than processes and micro-batches.

    Example:
        >>> config = TrainConfig(recipe="toy", batch_size=8, micro_batch_size=2)
        >>> [list(numbers) for numbers in micro_batches(config, 1, rank=1, ranks=2)]
        [[9, 11], [13, 15]]
    """
    start = step * config.batch_size
    mine = range(start, start + config.batch_size)[rank::ranks]
    most = -(-config.batch_size // ranks)
    size = config.micro_batch_size or -(-most // config.gradient_accumulation_steps)
    parts = -(-most // size)
    cut = [mine[i * len(mine) // parts : (i + 1) * len(mine) // parts] for i in range(parts)]
    if not all(cut):
        raise InputError(
            f"batch_size {config.batch_size} is too small for {ranks} processes with {parts} "
            "micro-batches each: take a larger one, or fewer of them"
        )
    return list(cut)


def made_ahead(
    make: Callable[[Sequence[int]], Made], parts: Iterable[Sequence[int]], ahead: bool
) -> Iterator[Made]:
    """Make one part after the other; `ahead` makes the next in a thread while this one is used.

    The order of the calls is the same either way, and never are there two at a time.
    """
    if not ahead:
        yield from map(make, parts)
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, "batch", lambda: torch.set_num_threads(threads)) as thread:
        pending = None
        for part in parts:
            following = thread.submit(make, part)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()

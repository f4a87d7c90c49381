"""How far the making of pairs is, on a terminal, in a notebook and in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from rectiflow.progress import progress
from rectiflow.straighten.store_writer import PairProgress


@contextmanager
def progress_bar(worker: int, num_workers: int) -> Iterator[Callable[[PairProgress], None]]:
    """A bar with pairs a second, the time left and bytes.

    Args:
        worker: Which writer's, from 0.
        num_workers: How many there are.

    Yields:
        What `make_pairs` is to call after each batch.
    """
    name = "pairs" if num_workers == 1 else f"pairs, writer {worker + 1} of {num_workers}"
    with progress(desc=name, unit=" pairs", leave=False, position=worker) as bar:
        made = 0

        def show(now: PairProgress) -> None:
            nonlocal made
            if bar.disable:
                return
            # What was there before is no measure of how fast the rest will be.
            before = now.done - now.made - bar.initial
            bar.total = now.total
            bar.initial += before
            bar.n += before
            bar.last_print_n += before
            if now.bytes:
                bar.set_postfix_str(tqdm.format_sizeof(now.bytes, "B", 1000), refresh=False)
            bar.update(now.made - made)
            made = now.made

        yield show

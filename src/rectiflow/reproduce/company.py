"""Several processes of one command on one study."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from rectiflow.reproduce.study import Item
from rectiflow.reproduce.workshop import Workshop


def work_together(
    workshop: Workshop,
    items: Sequence[Item],
    processes: int,
    max_minutes: float | None,
    told: Callable[[str], None],
) -> list[Item]:
    """Make items by several processes, each with its share of the CPU's threads.

    Args:
        workshop: Where.
        items: As in `Workshop.work`.
        processes: How many, this one among them.
        max_minutes: As in `Workshop.work`.
        told: Is given this process's lines; the others are silent.

    Returns:
        The items that are not there at the end.

    Raises:
        InputError: As what fails here; what fails in another process, this one tries again.
        WorkError: Likewise.
    """
    before = torch.get_num_threads()
    threads = max(1, before // processes)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_help, args=(workshop, items, threads, max_minutes), daemon=True)
        for _ in range(processes - 1)
    ]
    for process in others:
        process.start()
    torch.set_num_threads(threads)
    try:
        left = workshop.work(items, max_minutes=max_minutes, told=told)
        if max_minutes is not None or not left:
            for process in others:
                process.join()  # whose time is up as well, or who finds nothing more to do
    finally:
        torch.set_num_threads(before)
        for process in others:
            process.terminate()
    return [item for item in items if not workshop.there(item)]


def _help(
    workshop: Workshop, items: Sequence[Item], threads: int, max_minutes: float | None
) -> None:
    """What another process does, for as long as the first one lives."""
    torch.set_num_threads(threads)
    with suppress(KeyboardInterrupt):  # which the first process tells of
        workshop.work(items, max_minutes=max_minutes, told=_while_parent_lives)


def _while_parent_lives(line: str) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit  # it was killed, and may be running again by now

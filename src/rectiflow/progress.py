"""How far long work is: a bar on a terminal, and a line every so often in a pipe or a batch job."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

QUIET = ContextVar("quiet", default=False)
"""Whether nothing is shown, in this context (`--quiet`)."""
FIRST, LONGEST = 10.0, 30.0
"""Seconds before the first line, and at most between two; the time between them doubles."""
SOON = 2.0
"""Seconds for which work of one call says nothing."""


class _Lines(tqdm):
    """Counts as tqdm does, and writes whole lines."""

    disable: bool

    def __init__(self, iterable: Iterable[Any] | None, **given: Any) -> None:
        self._wait, self._said = FIRST, given.get("initial", 0)
        self._due = time.monotonic() + FIRST
        shape = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {elapsed} so far, {remaining} left"
        super().__init__(
            iterable, **given | {"bar_format": shape + "{postfix}", "mininterval": min(1.0, FIRST)}
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = time.monotonic()
        if now >= self._due and self.n > max(self._said, self.initial):
            self._said, self._wait = self.n, min(2 * self._wait, LONGEST)
            self._due = now + self._wait
            self.fp.write(f"{self}\n")

    def clear(self, nolock: bool = False) -> None:
        """A line stays."""

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def progress(iterable: Iterable[Any] | None = None, **given: Any) -> tqdm[Any]:
    """A tqdm, with its arguments, that suits where stderr goes.

    Args:
        iterable: What is gone through, if that is how the work goes.
        **given: `desc`, `total`, `unit` and the like; `disable=True` is silent.
    """
    kind: type[tqdm[Any]] = tqdm if sys.stderr.isatty() else _Lines
    if "ipykernel" in sys.modules:  # a notebook, which has bars of its own
        kind = importlib.import_module("tqdm.auto").tqdm
    return kind(iterable, **{"disable": QUIET.get()} | given)


@contextmanager
def steps(what: str | None, total: int) -> Iterator[Callable[..., None]]:
    """A bar of the steps of one call, if that takes longer than `SOON`.

    Args:
        what: Is done in them; None is silent.
        total: How many there are.

    Yields:
        What takes the number of each step, in any order and more than once.
    """
    if what is None:
        yield lambda step, *_: None
        return
    seen: set[int] = set()
    with progress(desc=what, total=total, unit="step", leave=False, delay=SOON) as bar:

        def took(step: int, *_: Any) -> None:
            seen.add(step)
            bar.update(len(seen) - bar.n)

        yield took
        bar.update(total - bar.n)


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Say what is done where it takes longer than `SOON`; without a terminal, than `LONGEST`."""

    def say() -> None:
        tqdm.write(f"rectiflow: {what} …", file=sys.stderr)

    timer = threading.Timer(SOON if sys.stderr.isatty() else LONGEST, say)
    timer.daemon = True
    if not QUIET.get():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()

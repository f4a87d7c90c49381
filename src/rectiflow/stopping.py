"""Being told to stop and to go on later: by a scheduler, or by Ctrl-C.

SIGTERM, SIGINT, SIGUSR1 and the end of a `time_limit` are alike. Work that can be gone on with
either looks at `Request.asked` between two of its parts (`on_request`), or loses the part it is at
(`at_once`). A signal that the process was started to ignore is left ignored.
"""

from __future__ import annotations

import _thread
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GO_ON_LATER = 75
"""Exit code of work that is not finished and that the same command goes on with: EX_TEMPFAIL of
sysexits.h, "try again later"."""
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGXCPU")
    if hasattr(signal, name)
]
_TIME_LIMIT: int = getattr(signal, "SIGXCPU", signal.SIGTERM)
"""What a `time_limit` sends to its own process, and batch systems to one whose time is over."""
_ONE_PRESS = 1.0
"""Seconds within which a launcher passes on a Ctrl-C that the process has had already."""


class Stopped(KeyboardInterrupt):
    """Told to stop; what was done is kept, and the same command goes on from there."""


class Request:
    """Whether there was a signal in the block of `on_request`."""

    asked = ""
    """What asked first: the name of a signal, or a time limit."""

    def heed(self) -> None:
        """Raise `Stopped` if there was one."""
        if self.asked:
            raise Stopped(self.asked)


@contextmanager
def on_request() -> Iterator[Request]:
    """In this block signals only ask to stop; a second Ctrl-C interrupts it all the same."""
    request = Request()
    first_press: float | None = None

    def ask(number: int, _: FrameType | None) -> None:
        nonlocal first_press
        request.asked = request.asked or _name(number)
        if number == signal.SIGINT:
            now = time.monotonic()
            first_press = now if first_press is None else first_press
            if now - first_press > _ONE_PRESS:
                raise KeyboardInterrupt

    with _handled(ask):
        yield request


@contextmanager
def at_once() -> Iterator[None]:
    """In this block a signal raises `Stopped`, wherever it is."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(_name(number))

    with _handled(stop):
        yield


@contextmanager
def time_limit(minutes: float | None) -> Iterator[None]:
    """After so many minutes this block is told to stop as by a signal; `Stopped` where none heeds.

    Args:
        minutes: of the clock; None is no limit.
    """
    if minutes is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(_name(number))

    if minutes <= 0:
        stop(_TIME_LIMIT, None)
    timer = threading.Timer(60 * minutes, _thread.interrupt_main, [_TIME_LIMIT])
    timer.daemon = True
    before = signal.signal(_TIME_LIMIT, stop)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(_TIME_LIMIT, before)


@contextmanager
def with_workers() -> Iterator[None]:
    """Where this block is interrupted, end the processes that this one has started.

    A pool would wait for all that they were given.
    """
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _name(number: int) -> str:
    return "its time limit" if number == _TIME_LIMIT else signal.Signals(number).name


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Only the main thread can be interrupted."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        known = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {n: had for n, had in known.items() if had not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, had in before.items():
            signal.signal(number, had)

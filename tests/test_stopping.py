"""Signals ask to stop, or stop at once; they are heeded where the block says, and nowhere else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from rectiflow import stopping
from rectiflow.stopping import Stopped, at_once, on_request, time_limit, with_workers

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_what_was_there_before_is_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    with on_request() as request:
        request.heed()
        send(number)
        send(signal.SIGTERM)
        assert request.asked == number.name
        with pytest.raises(Stopped, match=number.name):
            request.heed()
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_or_stops_at_once(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt, match=number.name), at_once():
        with on_request() as request:
            send(number)
        assert request.asked
        send(number)
        raise AssertionError


def test_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not one that a launcher passes on at the same moment."""
    with on_request() as request:
        send(signal.SIGINT)
        send(signal.SIGINT)
        monkeypatch.setattr(stopping, "_ONE_PRESS", 0.0)
        with pytest.raises(KeyboardInterrupt) as found:
            send(signal.SIGINT)
        assert not isinstance(found.value, Stopped) and request.asked


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As nohup, and a shell's background jobs have it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_request() as request, at_once():
            send(signal.SIGINT)
        assert not request.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_not_interrupted() -> None:
    found = []

    def work() -> None:
        with on_request() as request:
            found.append(request.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [""]


def test_workers_end_with_the_one_who_waits_for_them() -> None:
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with pytest.raises(Stopped), at_once(), ProcessPoolExecutor(1, mp_context=context) as pool:
        with with_workers():
            pool.submit(time.sleep, 100)
            time.sleep(0.2)
            send(signal.SIGTERM)
    assert time.monotonic() - started < 50


def test_a_time_limit_asks_where_signals_are_heeded() -> None:
    before = signal.getsignal(signal.SIGXCPU)
    with time_limit(0.2 / 60), on_request() as request:
        time.sleep(0.5)
        assert request.asked == "its time limit"
    with pytest.raises(Stopped, match="its time limit"), time_limit(0.1 / 60):
        time.sleep(0.3)
        raise AssertionError
    with pytest.raises(Stopped), time_limit(0):
        raise AssertionError
    with time_limit(None), time_limit(0.2 / 60):
        pass
    time.sleep(0.4)
    assert signal.getsignal(signal.SIGXCPU) == before

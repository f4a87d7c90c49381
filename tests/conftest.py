"""What every test runs under: one thread, no network, fixed seeds."""

from __future__ import annotations

import gc
import os
import random
import signal
import sys

import pytest

# Before anything imports torch. Two spinning threads make tiny models 10 to 30 times slower than
# one, and the hub's helpers retry for half a minute where there is no network. The commands that
# tests start as subprocesses inherit all of it.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
    "NO_COLOR": "1",
}

# A shell starts what runs in the background with Ctrl-C ignored, and so would be every process that
# a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of garbage collections, and make those fewer."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """Seed the global generators, of those libraries only that a test has already imported.

    The package itself draws from explicit generators; these seeds are for the tests' own draws.
    """
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.manual_seed(0)

"""A campaign: cases by number from a seed, in a process of its own that is watched from outside.

python -m tests.fuzz.campaign --seed 0 --count 1000 [--only store,png]
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SHARES = {
    "store": 22, "checkpoint": 18, "inversion": 20, "png": 14, "exported": 12, "foreign": 4,
    "texts": 6, "lines": 4,
}  # fmt: skip
MOST_SECONDS, MOST_BYTES = 20.0, 2 * 2**30


def attempt(target: Any, rng: random.Random, folder: Path) -> tuple[str, str, str]:
    """One case: what was done, what came of it (refused, read, traceback, silent), and more."""
    from rectiflow.errors import InputError, WorkError

    try:
        what, run = target.case(rng, folder)
    except Exception as error:
        return "", "broken", repr(error)
    out = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(out),
        ):
            warnings.simplefilter("ignore")
            run()
    except (InputError, WorkError) as error:
        if len(str(error).splitlines()) != 1:
            return what, "traceback", f"more than one line: {error!r}"
        return what, "refused", str(error)
    except AssertionError as error:
        return what, "silent", str(error)
    except SystemExit:
        return what, "read", ""
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return what, "traceback", f"{error!r:.300} {traceback.format_exc()[-700:]}"
    return what, "read", ""


def kind_of(rng: random.Random, only: list[str]) -> str:
    """Which target a case is of."""
    shares = {name: share for name, share in SHARES.items() if not only or name in only}
    return rng.choices(list(shares), list(shares.values()))[0]


def _work(pipe: Connection, seed: int, first: int, count: int, only: list[str]) -> None:
    """In the watched process: report the number of each case before it, and its end after it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.stdin = open(os.devnull)
    import torch

    from tests.fuzz.targets import targets

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        known = targets(Path(temporary) / "whole")
        for number in range(first, count):
            rng = random.Random(f"{seed} {number}")
            kind = kind_of(rng, only)
            pipe.send((number, kind, None))
            pipe.send((number, kind, attempt(known[kind], rng, Path(temporary) / "case")))
    pipe.send(None)


def campaign(seed: int, count: int, only: list[str]) -> dict[str, Any]:
    """Run the cases, a new process after each that had to be ended."""
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    bad: list[dict[str, Any]] = []
    slowest = 0.0
    context = multiprocessing.get_context("spawn")
    first = 0
    while first < count:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work, args=(theirs, seed, first, count, only), daemon=True
        )
        process.start()
        theirs.close()
        base, running, begun = 0, None, time.monotonic()
        while True:
            try:
                said = ours.recv() if ours.poll(0.2) else ()
            except EOFError:
                said = ("died",)
            if said is None:
                first = count
                break
            if said and said != ("died",):
                number, kind, outcome = said
                if outcome is None:
                    running, begun = (number, kind), time.monotonic()
                    base = base or _resident(process.pid)
                else:
                    slowest = max(slowest, time.monotonic() - begun)
                    what, came, more = outcome
                    outcomes[kind][came] += 1
                    if came in ("traceback", "silent", "broken"):
                        bad.append(
                            {
                                "number": number,
                                "kind": kind,
                                "what": what,
                                "came": came,
                                "more": more,
                            }
                        )
                    running, first = None, number + 1
                continue
            over = "died" if said else ""
            if running and time.monotonic() - begun > MOST_SECONDS:
                over = "hang"
            if running and _resident(process.pid) - base > MOST_BYTES:
                over = "memory"
            if over:
                process.kill()
                process.join()
                if running is None:
                    raise RuntimeError("the process ended between cases")
                outcomes[running[1]][over] += 1
                bad.append({"number": running[0], "kind": running[1], "came": over})
                first = running[0] + 1
                break
        process.join(timeout=30)
    return {"seed": seed, "count": count, "slowest": slowest, "outcomes": outcomes, "bad": bad}


def _resident(pid: int | None) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    found = campaign(given.seed, given.count, [name for name in given.only.split(",") if name])
    print(json.dumps(found, indent=1))
    return bool(found["bad"])


if __name__ == "__main__":
    sys.exit(main())

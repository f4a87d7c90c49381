"""The cases of `accelerator_cases.py` and `training_cases.py`, in a process of their own.

Once a process has differentiated on another device, PyTorch lets no child that it forks
differentiate at all, and other tests fork.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CASES = [Path(__file__).with_name(f"{name}_cases.py") for name in ("accelerator", "training")]


@pytest.mark.timeout(900)
def test_all_cases_on_an_accelerator_that_is_not_there() -> None:
    """To run one of them: ``pytest tests/device/accelerator_cases.py -k NAME``."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-W",
        "ignore",
        *map(str, CASES),
    ]
    done = subprocess.run(command, cwd=CASES[0].parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout

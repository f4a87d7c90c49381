"""Importing the package and asking for help are instant; torchvision is never pulled in."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rectiflow

HEAVY = ("accelerate", "diffusers", "matplotlib", "torch", "torchvision", "transformers")

# CPU seconds, not wall-clock ones, so that a busy machine does not fail the test; the best of
# three, so that the first run's compilation of bytecode does not either.
BUDGET_S = 0.5

REPORT = f"""
import atexit, sys, time
def report():
    heavy = sorted(set({HEAVY!r}) & set(sys.modules))
    print("\\nHEAVY", *heavy, file=sys.stderr)
    print("SECONDS", time.process_time(), file=sys.stderr)
atexit.register(report)
"""

HELP = """
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="rectiflow")
sys.argv = ["rectiflow", "--help"]
script.load()()
"""


def heavy_modules_and_seconds(code: str) -> tuple[list[str], float, str]:
    """Run ``code`` in a fresh interpreter: heavy modules it imported, CPU seconds, its output."""
    done = subprocess.run(
        [sys.executable, "-c", REPORT + code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *_, heavy, seconds = done.stderr.strip().splitlines()
    return heavy.split()[1:], float(seconds.split()[1]), done.stdout


@pytest.mark.parametrize("code", ["import rectiflow", "import rectiflow; dir(rectiflow)", HELP])
def test_light(code: str) -> None:
    runs = [heavy_modules_and_seconds(code) for _ in range(3)]
    assert runs[0][0] == []
    assert min(seconds for _, seconds, _ in runs) < BUDGET_S


def test_help_names_the_commands() -> None:
    _, _, text = heavy_modules_and_seconds(HELP)
    for command in ("demo", "edit", "generate", "invert", "train", "evaluate"):
        assert command in text


def test_every_public_name_loads() -> None:
    assert set(rectiflow.__all__) == {*rectiflow._PUBLIC, "__version__"}
    assert set(rectiflow.__all__) <= set(dir(rectiflow))
    for name, module in rectiflow._PUBLIC.items():
        assert getattr(rectiflow, name) is getattr(importlib.import_module(module), name)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'inverse'"):
        _ = rectiflow.inverse


@pytest.mark.parametrize("order", ["room first", "function first"])
def test_a_room_does_not_shadow_the_function_of_its_name(order: str) -> None:
    """`rectiflow.invert` is the function, whatever has been imported before."""
    lines = ["import rectiflow"]
    for room in ("invert", "report"):
        steps = [f"import rectiflow.{room}", f"assert callable(rectiflow.{room})"]
        lines += [*(steps if order == "room first" else reversed(steps)), steps[1]]
    code = "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torchvision_is_not_required() -> None:
    """Follow what the default install pulls in, distribution by distribution."""
    required_by: dict[tuple[str, str], str] = {}
    queue = [("rectiflow", "")]
    while queue:
        name, extra = queue.pop()
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
                continue
            for wanted in ("", *requirement.extras):
                dependency = (canonicalize_name(requirement.name), wanted)
                if dependency not in required_by:
                    required_by[dependency] = name
                    queue.append(dependency)
    names = {name for name, _ in required_by}
    assert {"torch", "diffusers", "transformers"} <= names
    assert "torchvision" not in names, required_by

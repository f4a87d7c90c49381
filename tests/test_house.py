"""The rules of the house that a machine can check (CONTRIBUTING.md), read from the source.

Every file below ``src/rectiflow`` is parsed; only the docstring check imports anything.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import rectiflow

PACKAGE = Path(rectiflow.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a room imports only from the rooms before it.
ROOMS = (
    "flow",
    "report",
    "models",
    "straighten",
    "invert",
    "steer",
    "emoji",
    "evaluate",
    "reproduce",
    "app",
)
# The public face, which names modules of every room but imports them only on first use.
FACE = {"rectiflow", "rectiflow.__main__"}

# What a room must do without: the mathematics knows tensors alone, a report is made from plain
# data, and a pretrained network is reached through `models` by those that use one.
PRETRAINED = {"accelerate", "diffusers", "transformers"}
FOREIGN = {
    "flow": PRETRAINED | {"PIL", "matplotlib", "safetensors", "typer"},
    "report": PRETRAINED | {"safetensors", "torch", "typer"},
    "invert": PRETRAINED | {"typer"},
    "steer": PRETRAINED | {"typer"},
}
FOREIGN_EVERYWHERE = {"cloudpickle", "dill", "joblib", "pickle", "shelve", "torchvision"}

MOST_LINES = 400


class Import(NamedTuple):
    """One imported module (``a.b``; for ``from a import b`` both ``a`` and ``a.b``)."""

    line: int
    module: str


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """The room a module of ours belongs to; None for a leaf beside the rooms."""
    _, _, inside = module.partition(".")
    first = inside.partition(".")[0]
    return first if first in ROOMS else None


def imports(module: str, tree: ast.AST, *, is_package: bool = False) -> Iterator[Import]:
    """Every import in ``tree``: at the top, inside functions and for type checkers alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = module.split(".")
                above = above[: len(above) - node.level + is_package]
                source = ".".join([*above, source] if source else above)
            for alias in node.names:
                if source == "rectiflow":
                    # A room, a leaf module or a public name, which stands for where it lives.
                    yield Import(
                        node.lineno, rectiflow._PUBLIC.get(alias.name, f"rectiflow.{alias.name}")
                    )
                else:
                    yield Import(node.lineno, source)


def violations(module: str, tree: ast.AST, *, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of ``module``."""
    found = []
    room = room_of(module)
    for line, imported in imports(module, tree, is_package=is_package):
        top = imported.partition(".")[0]
        if top != "rectiflow":
            if top in FOREIGN_EVERYWHERE or top in FOREIGN.get(room or "", ()):
                found.append(f"{module}:{line} imports {imported}, which is not for this room")
        elif imported == "rectiflow":
            if room != "app":
                found.append(f"{module}:{line} imports the public face, which is above it")
        elif (other := room_of(imported)) is None:
            continue
        elif room is None:
            found.append(f"{module}:{line}, a leaf beside the rooms, imports {imported}")
        elif ROOMS.index(other) > ROOMS.index(room):
            found.append(f"{module}:{line}: {room} may not import {imported}, which is above it")
    return found


@functools.cache
def parsed() -> list[tuple[Path, str, ast.Module]]:
    return [
        (file, name_of(file), ast.parse(file.read_text(encoding="utf-8"), str(file)))
        for file in FILES
    ]


def docstrings(tree: ast.AST) -> set[int]:
    """The identities of the docstring nodes in ``tree``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str()) as text), *_]:
                    found.add(id(text))
    return found


def test_every_folder_is_a_room() -> None:
    folders = {file.parent.relative_to(PACKAGE).parts[:1] for file in FILES} - {()}
    assert {folder for (folder,) in folders} <= set(ROOMS)


def test_rooms_import_only_from_below() -> None:
    found = [
        violation
        for file, module, tree in parsed()
        if module not in FACE
        for violation in violations(module, tree, is_package=file.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("rectiflow.invert.euler", "from rectiflow.flow.solver import Euler", True),
        ("rectiflow.invert.euler", "from rectiflow.invert.trajectory import Inversion", True),
        ("rectiflow.invert.euler", "from rectiflow.errors import InputError", True),
        ("rectiflow.invert.euler", "from rectiflow import errors", True),
        ("rectiflow.invert.euler", "from rectiflow import InputError", True),
        ("rectiflow.invert.euler", "from rectiflow import load", True),
        ("rectiflow.invert.euler", "from rectiflow import edit", False),
        ("rectiflow.invert.euler", "import rectiflow.steer.edit", False),
        ("rectiflow.invert.euler", "import rectiflow as rf", False),
        ("rectiflow.invert.euler", "from ..steer import edit", False),
        ("rectiflow.invert.euler", "from .trajectory import Inversion", True),
        ("rectiflow.invert.euler", "def f():\n    from rectiflow.app import cli", False),
        ("rectiflow.flow.path", "from diffusers import SD3Transformer2DModel", False),
        ("rectiflow.models.sd3", "from diffusers import SD3Transformer2DModel", True),
        ("rectiflow.report.html", "import torch.nn", False),
        ("rectiflow.app.cli", "import rectiflow as rf", True),
        ("rectiflow.errors", "from rectiflow.flow import grid", False),
        ("rectiflow.models.load", "import pickle", False),
    ],
)
def test_the_order_is_really_checked(module: str, source: str, allowed: bool) -> None:
    assert (violations(module, ast.parse(source)) == []) is allowed


def test_no_device_is_named() -> None:
    """Devices come from the caller or from ``torch.accelerator``, so that any kind works."""
    found = []
    for _, module, tree in parsed():
        prose = docstrings(tree)
        for node in ast.walk(tree):
            match node:
                case ast.Constant(value=str(text)) if id(node) not in prose:
                    named = re.fullmatch(r"cuda(:\d+)?", text)
                case ast.Attribute(attr="cuda"):
                    named = True
                case _:
                    named = False
            if named:
                found.append(f"{module}:{node.lineno}")
    assert not found, f"a device is hard-coded in {', '.join(found)}; use torch.accelerator"


def test_nothing_is_pickled() -> None:
    """Weights and pairs are safetensors; a pickle runs whatever code its author put there."""
    found = []
    for _, module, tree in parsed():
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=ast.Name(id="torch"), attr="load" | "save"):
                    found.append(f"{module}:{node.lineno} torch.{node.attr}")
                case ast.ImportFrom(module="torch", names=names) if {"load", "save"} & {
                    alias.name for alias in names
                }:
                    found.append(f"{module}:{node.lineno} from torch import load, save")
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    found.append(f"{module}:{node.value.lineno} allow_pickle=True")
    assert not found, f"use safetensors in {', '.join(found)}"


def test_the_citation_names_this_version() -> None:
    citation = (PACKAGE.parent.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {rectiflow.__version__}\n" in citation


def test_files_are_short() -> None:
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    long = {name: length for name, length in lengths.items() if length > MOST_LINES}
    assert not long, f"more than {MOST_LINES} lines, so more than one idea: {long}"


@pytest.mark.parametrize("room", [room for room in ROOMS if (PACKAGE / room).is_dir()])
def test_the_public_names_of_a_room_exist_and_are_documented(room: str) -> None:
    module = importlib.import_module(f"rectiflow.{room}")
    assert module.__doc__, f"rectiflow.{room} has no docstring"
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            # A dataclass without a docstring is given its signature as one.
            written = value.__doc__ and not value.__doc__.startswith(f"{name}(")
            assert written, f"rectiflow.{room}.{name} has no docstring"

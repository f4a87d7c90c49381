"""Rectified flows: straighten a pretrained model's velocity field, invert it, steer it.

Every public name is reached from here and loads on first use (PEP 562), so that
``import rectiflow`` costs milliseconds and neither torch nor diffusers is imported before
it is needed. To publish a name, add one line to `_PUBLIC` and its import for type checkers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from rectiflow._version import __version__

if TYPE_CHECKING:
    from rectiflow.errors import InputError, WorkError
    from rectiflow.invert import Inversion, invert
    from rectiflow.models.controlnet import with_control
    from rectiflow.models.generate import generate
    from rectiflow.models.instaflow import import_instaflow
    from rectiflow.models.latent_walk import interpolate
    from rectiflow.models.load import load
    from rectiflow.models.refine import refine
    from rectiflow.report import report
    from rectiflow.steer import PRESETS, EditResult, consistent, edit_chain
    from rectiflow.steer.edit import edit
    from rectiflow.straighten.api import distill, reflow
    from rectiflow.straighten.pair_maker import make_pairs
    from rectiflow.straighten.prompt_list import load_prompts
    from rectiflow.straighten.reading import PairStore

__all__ = [
    "PRESETS",
    "EditResult",
    "InputError",
    "Inversion",
    "PairStore",
    "WorkError",
    "__version__",
    "consistent",
    "distill",
    "edit",
    "edit_chain",
    "generate",
    "import_instaflow",
    "interpolate",
    "invert",
    "load",
    "load_prompts",
    "make_pairs",
    "refine",
    "reflow",
    "report",
    "with_control",
]

# Public name -> the module that defines it.
_PUBLIC = {
    "load": "rectiflow.models.load",
    "generate": "rectiflow.models.generate",
    "refine": "rectiflow.models.refine",
    "interpolate": "rectiflow.models.latent_walk",
    "with_control": "rectiflow.models.controlnet",
    "import_instaflow": "rectiflow.models.instaflow",
    "invert": "rectiflow.invert",
    "Inversion": "rectiflow.invert",
    "edit": "rectiflow.steer",
    "EditResult": "rectiflow.steer",
    "edit_chain": "rectiflow.steer",
    "consistent": "rectiflow.steer",
    "PRESETS": "rectiflow.steer",
    "make_pairs": "rectiflow.straighten.pair_maker",
    "load_prompts": "rectiflow.straighten.prompt_list",
    "PairStore": "rectiflow.straighten.reading",
    "reflow": "rectiflow.straighten.api",
    "distill": "rectiflow.straighten.api",
    "report": "rectiflow.report",
    "InputError": "rectiflow.errors",
    "WorkError": "rectiflow.errors",
}


class _Package(ModuleType):
    """This package, with public names that the import of a room cannot shadow.

    ``invert`` and ``report`` name both a room and a function. Whenever such a room is first
    imported, Python binds the submodule onto its parent, and ``rectiflow.invert(...)`` would
    work or not depending on what was imported before. The public name always wins; the room is
    reached as ``from rectiflow.invert import ...``.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _PUBLIC and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a type checker that saw it would accept every misspelt name

    def __getattr__(name: str) -> object:
        """Import the public name ``name`` and keep it for the next time."""
        if name not in _PUBLIC:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Name the public face as well as what is loaded, for completion."""
    return sorted({*globals(), *__all__})

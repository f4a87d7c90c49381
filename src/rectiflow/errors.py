"""The two ways a command can fail, each with one line that names the thing and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The input or the usage is wrong (exit code 2)."""


class WorkError(RuntimeError):
    """The input was fine and the work failed (exit code 1)."""


def install(extra: str) -> str:
    """How one of the package's extras is installed, as a part of a line; there is no release yet.

    Example:
        >>> install("lora")
        'pip install ".[lora]" in a clone of rectiflow'
    """
    return f'pip install ".[{extra}]" in a clone of rectiflow'


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like a wrong one, as the end of a line; nothing if none is like it.

    Example:
        >>> nearest("learning_rat", ["steps", "learning_rate"])
        '; did you mean learning_rate?'
    """
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(known), 1)
    return f"; did you mean {found[0]}?" if found else ""

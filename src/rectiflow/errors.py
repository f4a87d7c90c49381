"""The two ways a command can fail, each with one line that names the thing and the remedy."""

from __future__ import annotations


class InputError(ValueError):
    """The input or the usage is wrong (exit code 2)."""


class WorkError(RuntimeError):
    """The input was fine and the work failed (exit code 1)."""

"""Tables in Markdown, and figures in their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rectiflow.reproduce.claims import shown
from rectiflow.reproduce.figures import Estimate


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of Markdown; empty if it has no rows."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def value(figure: Estimate | None, digits: int = 2, factor: float = 1) -> str:
    """A figure with its interval; a dash where there is none."""
    return "–" if figure is None else shown(figure.scaled(factor), digits)

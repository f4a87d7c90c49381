"""Pictures, plots and pages from plain data: numbers, strings, arrays and images, never models.

`rectiflow.report.edit_report` says what a report is made of and writes it; `metadata` keeps in a
PNG what made it; `sheet` and `figures` draw contact sheets and plots. matplotlib and jinja2 are
imported only when something is drawn or written.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Protocol, runtime_checkable

from rectiflow.arguments import checked
from rectiflow.report.edit_report import (
    Alignment,
    EditEntry,
    EditReport,
    Noise,
    write_edit_report,
    write_gallery,
)
from rectiflow.report.metadata import read_picture, read_png, save_picture, save_png

__all__ = [
    "Alignment",
    "EditEntry",
    "EditReport",
    "Noise",
    "Reportable",
    "read_picture",
    "read_png",
    "report",
    "save_picture",
    "save_png",
    "write_edit_report",
    "write_gallery",
]


@runtime_checkable
class Reportable(Protocol):
    """A result that knows how to describe itself in plain data."""

    def edit_report(self) -> EditReport:
        """What the report of this result is made of."""
        ...


@checked
def report(result: Reportable | EditReport, path: str | PathLike[str]) -> Path:
    """Write the report of an edit as one HTML file that needs nothing else, and return its path.

    Args:
        result: What `rectiflow.edit` returned, or the plain data of a report.
        path: The file to write, for example ``edit.html``.
    """
    data = result if isinstance(result, EditReport) else result.edit_report()
    return write_edit_report(data, path)

"""The record beside a page: its figures outlive the folder in which they were taken."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rectiflow._version import __version__
from rectiflow.errors import InputError
from rectiflow.reproduce.workshop import Workshop

Row = dict[str, Any]
Gap = tuple[str, str, str, str, float, float]
"""Row, figure, other row and its figure; the mean difference and half of its interval."""


@dataclass(frozen=True)
class Record:
    """What was made for a page, and what was measured.

    Args:
        study: Its name.
        size: How much of it.
        dtype: Of the networks.
        dates: The days of which its rows are.
        machine: The last day's processor.
        torch: Its version.
        rectiflow: Its version.
        made: Fingerprints of all items that were there, by name.
        rows: Figures by row.
        gaps: Differences of rows, picture by picture; of single pictures nothing else is kept.
        claims: As `page.write` returns them.
    """

    study: str
    size: str
    dtype: str
    dates: tuple[str, ...]
    machine: str
    torch: str
    rectiflow: str
    made: dict[str, str]
    rows: dict[str, Row]
    gaps: tuple[Gap, ...] = ()
    claims: dict[str, dict[str, str]] | None = None

    @classmethod
    def of(
        cls,
        workshop: Workshop,
        rows: dict[str, Row],
        gaps: Iterable[Gap],
        claims: dict[str, dict[str, str]],
        before: Record | None = None,
    ) -> Record:
        """Of what lies in a workshop, and of what an earlier record has beside it."""
        there = {item.name for item in workshop.study.items if workshop.there(item)}
        if before is not None:
            there |= before.made.keys()
        today = datetime.date.today().isoformat()
        return cls(
            *_kind(workshop),
            tuple(sorted({*(before.dates if before else ()), today})),
            platform.machine(),
            str(torch.__version__),
            __version__,
            {name: mark for name, mark in workshop.fingerprints.items() if name in there},
            rows,
            tuple(gaps),
            claims,
        )

    def still(self, workshop: Workshop) -> Record:
        """What of it follows from the study and the models as they are now.

        Raises:
            InputError: It is of another study, size or dtype.
        """
        theirs, ours = (self.study, self.size, self.dtype), _kind(workshop)
        if theirs != ours:
            raise InputError(
                f"--amend: the page is of {' '.join(theirs)} and not of {' '.join(ours)}: "
                "give another --page, or the options it was written with"
            )
        now = workshop.fingerprints
        made = {name: mark for name, mark in self.made.items() if now.get(name) == mark}
        rows = {name: row for name, row in self.rows.items() if name in made}
        gaps = tuple(gap for gap in self.gaps if gap[0] in rows and gap[2] in rows)
        return Record(**vars(self) | {"made": made, "rows": rows, "gaps": gaps})

    def json(self) -> str:
        """What is written into the file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def read(cls, file: Path) -> Record:
        """A record that was written.

        Raises:
            InputError: There is none, or the file is none.
        """
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            gaps = tuple((*map(str, gap[:4]), *map(float, gap[4:])) for gap in found["gaps"])
            return cls(**found | {"dates": tuple(found["dates"]), "gaps": gaps})
        except FileNotFoundError as error:
            raise InputError(f"--amend: there is no {file}: leave --amend out") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--amend: {file} is not the record of a page ({type(error).__name__}: {error}): "
                "restore it, or leave --amend out"
            ) from error


def _kind(workshop: Workshop) -> tuple[str, str, str]:
    study = workshop.study
    return study.name, study.size, str(workshop.dtype).removeprefix("torch.")

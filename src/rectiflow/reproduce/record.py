"""The record beside a page: its figures outlive the folder in which they were taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rectiflow.errors import InputError
from rectiflow.guarded import Missing, Unreadable, read_bytes
from rectiflow.reproduce.study import Store, Student
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
        made: Fingerprints of all items that were there, by name.
        rows: Figures by row.
        gaps: Differences of rows, picture by picture; of single pictures nothing else is kept.
        sheet: Fingerprints of the rows whose pictures are beside the page, by name.
        claims: As `page.write` returns them.
    """

    study: str
    size: str
    dtype: str
    made: dict[str, str]
    rows: dict[str, Row]
    gaps: tuple[Gap, ...]
    sheet: dict[str, str]
    claims: dict[str, dict[str, str]]

    @classmethod
    def of(
        cls,
        workshop: Workshop,
        rows: dict[str, Row],
        gaps: Iterable[Gap],
        sheet: Mapping[str, str],
        claims: dict[str, dict[str, str]],
        before: Record | None = None,
    ) -> Record:
        """Of the rows of a page, and what of its pairs and students is or was there."""
        earlier = before.made if before else {}

        def made(name: str) -> bool:
            item = workshop.study.item(name)
            if isinstance(item, Store | Student):
                return name in earlier or workshop.there(item)
            return name in rows

        return cls(
            *_kind(workshop),
            {name: mark for name, mark in workshop.fingerprints.items() if made(name)},
            rows,
            tuple(gaps),
            dict(sheet),
            claims,
        )

    def still(self, workshop: Workshop) -> Record:
        """What of it follows from the study and the models as they are now.

        Nor is there any more what was compared with a row that has changed: its figures are, but
        those of its single pictures are not.

        Raises:
            InputError: It is of another study, size or dtype.
        """
        self.check(workshop)
        now = workshop.fingerprints
        same = {name for name, mark in self.made.items() if now.get(name) == mark}
        lost = {
            name
            for one, _, other, *_ in self.gaps
            for name in (one, other)
            if not {one, other} <= same
        }
        made = {name: mark for name, mark in self.made.items() if name in same - lost}
        rows = {name: row for name, row in self.rows.items() if name in made}
        gaps = tuple(gap for gap in self.gaps if gap[0] in rows and gap[2] in rows)
        return replace(self, made=made, rows=rows, gaps=gaps)

    def check(self, workshop: Workshop) -> None:
        """See that it is of a study, size and dtype.

        Raises:
            InputError: It is of others.
        """
        theirs, ours = (self.study, self.size, self.dtype), _kind(workshop)
        if theirs != ours:
            raise InputError(
                f"the page is of {' '.join(theirs)} and not of {' '.join(ours)}: give another "
                "--page, or the options it was written with"
            )

    def circumstances(self) -> str:
        """When, on what and with what its rows were measured."""

        def values(key: str) -> str:
            # A row that another version wrote may not say.
            return ", ".join(sorted({str(row.get(key, "unknown")) for row in self.rows.values()}))

        if not self.rows:
            return "nothing is measured yet"
        versions = (f"{name} {values(name)}" for name in ("torch", "rectiflow"))
        return ", ".join((values("date"), values("machine"), *versions))

    def json(self) -> str:
        """What is written into the file."""
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"

    @classmethod
    def read(cls, file: Path) -> Record:
        """A record that was written.

        Raises:
            InputError: There is none, or the file is none.
        """
        try:
            return _ADAPTER.validate_json(read_bytes(file))
        except Missing as error:
            raise InputError(f"there is no {file}, the record of a page, to amend") from error
        except (Unreadable, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{file} is not the record of a page ({reason}): restore or remove it"
            ) from error


_ADAPTER = TypeAdapter(Record)


def _kind(workshop: Workshop) -> tuple[str, str, str]:
    study = workshop.study
    return study.name, study.size, str(workshop.dtype).removeprefix("torch.")

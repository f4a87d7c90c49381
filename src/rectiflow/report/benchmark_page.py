"""The page of a benchmark of edits: tables, a heat table by kind, cases chosen by their rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from rectiflow.report.html import _environment
from rectiflow.report.pictures import picture


@dataclass(frozen=True)
class Table:
    """Cells in words, under headings."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    """By the name of the row."""


@dataclass(frozen=True)
class HeatTable:
    """Numbers, each as dark as it is good within its column."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float]]
    scaled_by: Sequence[str]
    """The rows whose least and largest number are the ends of a column's colours."""

    @property
    def cells(self) -> dict[str, list[tuple[str, float]]]:
        """Text and colour, from 0 to 1, of all cells by row."""
        ends = []
        for column in range(len(self.columns)):
            values = [self.rows[name][column] for name in self.scaled_by or self.rows]
            ends.append((min(values), max(values)))
        return {
            name: [
                (f"{value:.1f}", min(1.0, max(0.0, (value - low) / (high - low or 1.0))))
                for value, (low, high) in zip(values, ends, strict=True)
            ]
            for name, values in self.rows.items()
        }


@dataclass(frozen=True)
class Case:
    """One edit and what methods made of it."""

    rank: str
    """Which it is, and of how many."""
    source_prompt: str
    target_prompt: str
    pictures: Sequence[tuple[str, Image.Image, str]]
    """Each with its name and a remark."""


@dataclass(frozen=True)
class CaseGroup:
    """Cases of like rank."""

    title: str
    cases: Sequence[Case]


@dataclass(frozen=True)
class BenchmarkPage:
    """All that the page says."""

    title: str
    introduction: str
    facts: Mapping[str, str]
    tables: Sequence[Table]
    heat: HeatTable
    choice: str
    """How the cases were chosen."""
    groups: Sequence[CaseGroup]
    command: str


def benchmark_page(page: BenchmarkPage) -> str:
    """The page as HTML that needs nothing else."""
    groups = [
        (
            group.title,
            [
                (
                    case,
                    [
                        (picture(image, f"{name}: {case.target_prompt}"), name, remark)
                        for name, image, remark in case.pictures
                    ],
                )
                for case in group.cases
            ],
        )
        for group in page.groups
    ]
    return _environment().get_template("benchmark.html.j2").render(page=page, groups=groups)

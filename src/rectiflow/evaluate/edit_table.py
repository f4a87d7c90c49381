"""The table of the benchmark of edits: all methods side by side, as JSON data and as CSV rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rectiflow.emoji.edits import KINDS, EditCase
from rectiflow.errors import InputError
from rectiflow.evaluate.edit_parts import Part
from rectiflow.evaluate.edit_scores import paired, summary, tied
from rectiflow.evaluate.emoji_edits import Benchmark, cases
from rectiflow.invert.presets import Preset

OURS = ("fast", "exact")
"""What every other method is compared with."""


def evaluate_emoji_edits(
    bench: Benchmark, rows: Mapping[str, str | Preset], *, limit: int | None = None
) -> tuple[dict[str, Any], dict[str, Part], list[EditCase]]:
    """Run methods over the benchmark.

    Args:
        bench: the model, and where results are kept.
        rows: what to compare, by name, from `chosen_methods`.
        limit: how many edits; all when None.

    Returns:
        The figures as design.md's JSON has them, each method's results, and the edits.
    """
    edits = cases(limit, bench.first_seed)
    parts = {name: bench.run(edits, method, name) for name, method in rows.items()}
    return table(bench, rows, parts, edits), parts, edits


def table(
    bench: Benchmark,
    rows: Mapping[str, str | Preset],
    parts: Mapping[str, Part],
    edits: Sequence[EditCase],
) -> dict[str, Any]:
    """The figures of results that are there."""
    kinds = np.array([case.kind for case in edits])
    return about(bench, edits) | {
        "masks": bench.masks,
        "methods": {
            name: summary(part.columns, kinds) | {"settings": bench.made(rows[name]).settings}
            for name, part in parts.items()
        },
        "paired": pairs(parts),
    }


def about(bench: Benchmark, edits: Sequence[EditCase]) -> dict[str, Any]:
    """What all figures of a benchmark have to say first."""
    return {
        "n": len(edits),
        "seeds": [bench.first_seed, bench.first_seed + -(-len(edits) // len(KINDS)) - 1],
        "model": bench.model.name,
        "weight_hash": bench.model.weight_hash,
        "dtype": str(bench.model.dtype).removeprefix("torch."),
        "batch_size": bench.batch_size,
    }


def pairs(parts: Mapping[str, Part]) -> dict[str, dict[str, float]]:
    """``exact − X`` and ``fast − X`` of `target_psnr` for every other method X."""
    return {
        f"{ours} - {rival}": paired(
            parts[ours].columns["target_psnr"], parts[rival].columns["target_psnr"]
        )
        for ours in OURS
        if ours in parts
        for rival in parts
        if rival not in (ours, "bound")
    }


def updated(known: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """A table with the rows of a new one in it.

    A paired difference between a row that has changed and one that was not measured again is not
    known, and goes; a row that comes out as it was keeps its differences.

    Args:
        known: the table as it was.
        figures: some rows, measured on the same edits by the same model.

    Raises:
        InputError: they are of other edits, or of another model, dtype or batch size.
    """
    same = ("n", "seeds", "weight_hash", "dtype", "batch_size", "masks")
    for name in same:
        if known.get(name) != figures[name]:
            raise InputError(
                f"the table that is there has {name} {known.get(name)!r} and not "
                f"{figures[name]!r}: only rows measured alike go together"
            )
    before, new = known["methods"], figures["methods"]
    changed = {
        name
        for name, entry in new.items()
        if name not in before
        or any(entry[key] != before[name][key] for key in ("nfe", "intervals", "by_kind"))
    }
    kept = {
        pair: found
        for pair, found in known["paired"].items()
        if not {*pair.split(" - ", 1)} & changed
    }
    return {**known, "methods": {**before, **new}, "paired": {**kept, **figures["paired"]}}


def ties(figures: Mapping[str, Any], ours: str) -> list[str]:
    """Methods that the figures do not tell apart from ours: the paired interval has 0 in it."""
    start = f"{ours} - "
    return [
        name.removeprefix(start)
        for name, difference in figures["paired"].items()
        if name.startswith(start) and tied(difference)
    ]


def per_edit(parts: Mapping[str, Part], edits: Sequence[EditCase]) -> list[dict[str, Any]]:
    """A row per edit and method; None where an edit has no such figure."""
    return [
        {
            "edit": number,
            "kind": case.kind,
            "seed": case.seed,
            "source_prompt": case.source_prompt,
            "target_prompt": case.target_prompt,
            "method": name,
            **{
                column: None if np.isnan(values[number - 1]) else float(values[number - 1])
                for column, values in part.columns.items()
            },
        }
        for number, case in enumerate(edits, start=1)
        for name, part in parts.items()
    ]


def per_method(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per method: every mean with its interval, and the means by kind."""
    rows = []
    for name, entry in figures["methods"].items():
        row: dict[str, Any] = {"method": name}
        for figure, value in entry.items():
            if isinstance(value, int | float) or value is None:
                row[figure] = value
                low, high = entry["intervals"].get(figure, (None, None))
                if figure not in ("outside_n", "seconds"):
                    row |= {f"{figure}_low": low, f"{figure}_high": high}
        rows.append(row | {f"target_psnr_{kind}": v for kind, v in entry["by_kind"].items()})
    return rows

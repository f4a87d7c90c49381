"""``emoji-edits.html``: the table in words, by kind in colours, and the best, median, worst cases.

Cases are chosen by the rank of one method's `target_psnr`, which the page states; nobody's eye has
a say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rectiflow.emoji.edits import EditCase
from rectiflow.emoji.render import render
from rectiflow.evaluate.edit_parts import Part
from rectiflow.evaluate.edit_scores import SIZE
from rectiflow.evaluate.edit_table import OURS, ties
from rectiflow.evaluate.emoji_edits import REFERENCES
from rectiflow.report.benchmark_page import (
    BenchmarkPage,
    Case,
    CaseGroup,
    HeatTable,
    Table,
    benchmark_page,
)

SHOWN = 3
"""Cases of each rank."""
# Figure → heading, digits and factor.
COLUMNS = {
    "target_psnr": ("PSNR to the true target, dB", 2, 1.0),
    "inside_mse": ("MSE inside ×10³", 1, 1e3),
    "outside_mse": ("MSE outside ×10³", 2, 1e3),
    "outside_psnr": ("PSNR outside, dB", 2, 1.0),
    "outside_ssim": ("SSIM outside", 4, 1.0),
    "outside_feature_distance": ("feature distance outside", 3, 1.0),
    "feature_distance": ("feature distance", 3, 1.0),
    "clip_score": ("CLIP score", 1, 1.0),
    "nfe": ("network samples", 1, 1.0),
    "seconds": ("seconds", 2, 1.0),
}


def edits_page(
    tables: Sequence[Mapping[str, Any]],
    parts: Mapping[str, Part],
    edits: Sequence[EditCase],
    *,
    command: str,
) -> str:
    """The page as HTML.

    Args:
        tables: figures as `evaluate_emoji_edits` returns them: first those of `parts`, then any
            made with other masks.
        parts: the results.
        edits: what they are results of.
        command: what made them.
    """
    figures = tables[0]
    ranked = next((name for name in OURS if name in parts), list(parts)[-1])
    shown = [*(_table(one) for one in tables), *(_paired(one) for one in tables if one["paired"])]
    order = np.argsort(-parts[ranked].columns["target_psnr"], kind="stable")
    page = BenchmarkPage(
        title="Edits with known answers",
        introduction=(
            f"{figures['n']} edits of the emoji world through {len(parts) - _references(parts)} "
            "methods, each compared with the true target pixel by pixel."
        ),
        facts={
            "model": figures["model"],
            "dtype": figures["dtype"],
            "scene seeds": f"{figures['seeds'][0]} to {figures['seeds'][1]}",
            "masks": figures["masks"],
            "weights": figures["weight_hash"][:12],
        },
        tables=shown,
        heat=_heat(figures),
        choice=(
            f"Chosen by the rank of {ranked}'s PSNR to the true target among all "
            f"{len(edits)} edits."
        ),
        groups=[
            CaseGroup(title, [_case(place, order, parts, edits) for place in places])
            for title, places in _places(len(edits)).items()
        ],
        command=command,
    )
    return benchmark_page(page)


def _places(n: int) -> dict[str, list[int]]:
    """Which ranks, counted from 0, are shown; each once."""
    count = min(SHOWN, n)
    first = (n - count) // 2
    groups = {
        "Best": range(count),
        "Median": range(first, first + count),
        "Worst": range(n - count, n),
    }
    seen: set[int] = set()
    found = {}
    for title, places in groups.items():
        found[title] = [place for place in places if place not in seen]
        seen.update(places)
    return {title: places for title, places in found.items() if places}


def _references(names: Mapping[str, Any]) -> int:
    return sum(name in names for name in REFERENCES)


def _table(figures: Mapping[str, Any]) -> Table:
    known = next(iter(figures["methods"].values()))
    columns = {name: heading for name, heading in COLUMNS.items() if name in known}
    rows = {}
    for method, entry in figures["methods"].items():
        cells = []
        for name, (_, digits, factor) in columns.items():
            cells.append(_cell(entry[name], entry["intervals"].get(name), digits, factor))
        rows[method] = cells
    outside = known["outside_n"]
    return Table(
        title=_titled("All methods", figures),
        note=(
            f"Means with 95 % bootstrap intervals over {figures['n']} edits. Outside is where the "
            f"true target is the source; {figures['n'] - outside} edits change everything and have "
            "none. nothing is the source through the codec, bound the true target through it."
        ),
        columns=[heading for heading, _, _ in columns.values()],
        rows=rows,
    )


def _titled(what: str, figures: Mapping[str, Any]) -> str:
    told = "told where the edit belongs" if figures["masks"] == "given" else "without masks"
    return f"{what}, {told}"


def _cell(value: float | None, interval: Sequence[float] | None, digits: int, factor: float) -> str:
    if value is None:
        return "–"
    text = f"{value * factor:.{digits}f}"
    if interval is None or interval[0] == interval[1]:
        return text
    low, high = (f"{end * factor:.{digits}f}" for end in interval)
    return f"{text} ({low} to {high})"


def _paired(figures: Mapping[str, Any]) -> Table:
    compared = [ours for ours in OURS if any(n.startswith(f"{ours} - ") for n in figures["paired"])]
    rivals = dict.fromkeys(name.partition(" - ")[2] for name in figures["paired"])
    rows = {}
    for rival in rivals:
        found = (figures["paired"].get(f"{ours} - {rival}") for ours in compared)
        rows[rival] = [
            f"{one['mean']:+.2f} ({one['low']:+.2f} to {one['high']:+.2f})" if one else "–"
            for one in found
        ]
    tied = ties(figures, compared[0])
    return Table(
        title=_titled("Paired differences", figures),
        note=(
            "PSNR to the true target in dB, mean difference per edit with its 95 % interval. Not "
            f"told apart from {compared[0]}: {', '.join(tied) if tied else 'none'}."
        ),
        columns=[f"{ours} minus it" for ours in compared],
        rows=rows,
    )


def _heat(figures: Mapping[str, Any]) -> HeatTable:
    methods = figures["methods"]
    kinds = list(next(iter(methods.values()))["by_kind"])
    return HeatTable(
        title="By kind of edit",
        note=(
            "Mean PSNR to the true target, dB; the darker, the better among the methods for that "
            "kind."
        ),
        columns=kinds,
        rows={name: [entry["by_kind"][kind] for kind in kinds] for name, entry in methods.items()},
        scaled_by=[name for name in methods if name not in REFERENCES],
    )


def _case(place: int, order: Any, parts: Mapping[str, Part], edits: Sequence[EditCase]) -> Case:
    index = int(order[place])
    case = edits[index]
    made = [
        (name, _image(part.images[index]), f"{part.columns['target_psnr'][index]:.1f} dB")
        for name, part in parts.items()
        if name not in REFERENCES
    ]
    return Case(
        rank=f"Rank {place + 1} of {len(edits)}: {case.kind}, seed {case.seed}",
        source_prompt=case.source_prompt,
        target_prompt=case.target_prompt,
        pictures=[
            ("source", render(case.source, SIZE), ""),
            ("true target", render(case.target, SIZE), ""),
            *made,
        ],
    )


def _image(pixels: Tensor) -> Image.Image:
    """A picture of uint8 ``[3, H, W]``."""
    assert pixels.dtype == torch.uint8
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())

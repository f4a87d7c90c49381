"""The paper's ablations, around `fast`'s and `ftedit`'s settings: one setting at a time.

FTEdit (arXiv 2411.15843) varies the iterations of its inversion, takes their average or the last,
compensates no row, the source's or both, and injects over more or fewer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rectiflow.evaluate.edit_parts import Part
from rectiflow.evaluate.edit_scores import Column, interval, paired, summary, tied
from rectiflow.evaluate.edit_table import about
from rectiflow.evaluate.emoji_edits import Benchmark, cases
from rectiflow.invert.presets import PRESETS, Preset

LIMIT = 24

Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Ablation:
    """One setting, its values, and the presets around which it is varied."""

    setting: str
    """A field of `Preset`."""
    label: str
    """Of the axis."""
    values: Sequence[Any]
    series: Mapping[str, tuple[str, Overrides]]
    """By name: the preset, and what else is set in it."""
    reconstruct: bool = False
    """Whether to measure the uncompensated reconstruction too."""

    def preset(self, series: str, value: Any) -> Preset:
        """The settings of one point."""
        name, overrides = self.series[series]
        return PRESETS[name].override({**overrides, self.setting: value})

    @property
    def jobs(self) -> list[tuple[str, Preset]]:
        """All points: the preset's name, and the settings."""
        return [
            (name, self.preset(label, value))
            for label, (name, _) in self.series.items()
            for value in self.values
        ]


_AROUND: dict[str, tuple[str, Overrides]] = {"fast": ("fast", {}), "ftedit": ("ftedit", {})}
# Without a tolerance and from the same start, so that the axis is what is really done.
_ITERATED = {
    "scheme": "fixed_point",
    "source_features": "recompute",
    "tolerance": 0.0,
    "stop_at_query": False,
}

ABLATIONS: dict[str, Ablation] = {
    "iterations": Ablation(
        "iterations",
        "fixed-point iterations in a step of the inversion",
        range(7),
        {
            "fast's controls, last": ("fast", {**_ITERATED, "warm_start": True}),
            "ftedit, last": ("ftedit", {**_ITERATED, "average": False}),
            "ftedit, average": ("ftedit", {**_ITERATED, "average": True}),
        },
        reconstruct=True,
    ),
    "compensation": Ablation(
        "compensate", "rows that are compensated", ("none", "source", "both"), _AROUND
    ),
    "attention-ratio": Ablation(
        "attention_ratio",
        "share of the steps in which attention features are injected",
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
        _AROUND,
    ),
    "adaln-ratio": Ablation(
        "adaln_ratio",
        "share of the steps in which unchanged words keep the source's features",
        (0.0, 0.1, 0.3, 0.6, 1.0),
        _AROUND,
    ),
    "steps": Ablation("num_inference_steps", "steps", (4, 8, 15, 30, 50), _AROUND),
}


@dataclass(frozen=True)
class Ablated:
    """What an ablation gave."""

    figures: dict[str, Any]
    """As JSON data."""
    rows: list[dict[str, Any]] = field(repr=False)
    """As a table, a row per point."""


def bench_for(bench: Benchmark, name: str) -> Benchmark:
    """The benchmark that measures what an ablation shows."""
    return replace(bench, reconstruct=ABLATIONS[name].reconstruct)


def ablate(bench: Benchmark, name: str, *, limit: int = LIMIT) -> Ablated:
    """Run one ablation.

    Args:
        bench: every point is kept in its folder as it is done.
        name: one of ABLATIONS.
        limit: edits for each point.

    Returns:
        ``{"n", …, "setting", "label", "series": {NAME: {"points": [{"value", "target_psnr", "low",
        "high", …}], "best", "ties", "sentence"}}}`` and the same points as rows.
    """
    ablation = ABLATIONS[name]
    bench = bench_for(bench, name)
    edits = cases(limit, bench.first_seed)
    kinds = np.array([case.kind for case in edits])
    series: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for label, (base, _) in ablation.series.items():
        parts = {
            value: bench.run(edits, ablation.preset(label, value), base)
            for value in ablation.values
        }
        points = [_point(value, part, kinds) for value, part in parts.items()]
        series[label] = {"points": points} | verdict(
            label, {value: part.columns["target_psnr"] for value, part in parts.items()}
        )
        rows += [{"series": label} | point for point in points]
    figures = about(bench, edits) | {
        "ablation": name,
        "setting": ablation.setting,
        "label": ablation.label,
        "series": series,
    }
    return Ablated(figures, rows)


def _point(value: Any, part: Part, kinds: Any) -> dict[str, Any]:
    figures = summary(part.columns, kinds)
    low, high = figures["intervals"]["target_psnr"]
    point = {"value": value, "target_psnr": figures["target_psnr"], "low": low, "high": high}
    point |= {name: figures[name] for name in ("inside_mse", "outside_mse", "nfe", "seconds")}
    if "reconstruction_psnr" in part.columns:
        low, high = interval(part.columns["reconstruction_psnr"])
        point["reconstruction_psnr"] = figures["reconstruction_psnr"]
        point |= {"reconstruction_low": low, "reconstruction_high": high}
    return point


def verdict(label: str, measured: Mapping[Any, Column]) -> dict[str, Any]:
    """Which value is best, which are not told apart from it, and both in a sentence.

    Args:
        label: of the series.
        measured: `target_psnr` of the same edits, by value.
    """
    best = max(measured, key=lambda value: float(measured[value].mean()))
    behind = {
        value: paired(measured[best], psnr) for value, psnr in measured.items() if value != best
    }
    ties = [value for value, difference in behind.items() if tied(difference)]
    apart = [value for value in behind if value not in ties]
    sentence = f"{label}: best at {best} ({measured[best].mean():.2f} dB); "
    if ties:
        sentence += (
            f"{_listed(ties)} {'is' if len(ties) == 1 else 'are'} not told apart from it "
            "(the paired 95 % interval has 0 in it)"
        )
    else:
        sentence += "every other value is worse (paired 95 % intervals leave out 0)"
    if apart:
        worst = max(apart, key=lambda value: behind[value]["mean"])
        low, high = behind[worst]["low"], behind[worst]["high"]
        sentence += (
            f"; at {worst} it loses {behind[worst]['mean']:.2f} dB ({low:.2f} to {high:.2f})"
        )
    return {"best": best, "ties": ties, "sentence": sentence + "."}


def _listed(values: Sequence[Any]) -> str:
    *head, last = map(str, values)
    return f"{', '.join(head)} and {last}" if head else last

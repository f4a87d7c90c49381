"""Tuning: every method gets its published setting and the same number of others to choose from.

Candidates are data. They are tried on tuning seeds, which no reported figure is of, and the one
with the best mean `target_psnr` is chosen; the published setting may well be it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rectiflow.errors import InputError
from rectiflow.evaluate.edit_scores import summary
from rectiflow.evaluate.edit_table import about
from rectiflow.evaluate.emoji_edits import Benchmark, cases
from rectiflow.invert.presets import PRESETS, Preset

LIMIT = 24
BUDGET = 8
"""Candidates of every method beside its published setting."""

Overrides = dict[str, Any]


def _grid(**values: Sequence[Any]) -> list[Overrides]:
    """All combinations of some values, the last named running fastest.

    Example:
        >>> _grid(a=(1, 2), b=(3,))
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    combined: list[Overrides] = [{}]
    for name, choices in values.items():
        combined = [known | {name: choice} for known in combined for choice in choices]
    return combined


PLAIN = {"guidance_scale": 1.0}
"""Published guidance is that of large models, where it is an input of the network or sharpens."""
SHIFTED = {"grid": "shifted"}
"""Of methods published on diffusers' own grid for Stable Diffusion 3, whose last step is next to
nothing: one step more."""
FLOWEDIT = SHIFTED | PLAIN | {"source_guidance_scale": 1.0, "num_inference_steps": 30}
UNIEDIT = SHIFTED | {"inversion_prompt": "source"}
DIRECTEDIT = SHIFTED | PLAIN | {"time": "cleaner", "last_block": False}

CANDIDATES: dict[str, list[Overrides]] = {
    "exact": _grid(attention_ratio=(0.2, 0.35, 0.4))
    + _grid(adaln_ratio=(0.0, 0.15))
    + [{"features": ("value",)}, {"first_site": 0.5}, {"guidance_scale": 1.25}],
    "fast": _grid(attention_ratio=(0.15, 0.25, 0.3))
    + _grid(adaln_ratio=(0.0, 0.15))
    + [{"features": ("key", "value")}, {"first_site": 0.5}, {"guidance_scale": 1.25}],
    "ftedit": _grid(
        guidance_scale=(1.0,), adaln_ratio=(0.0, 0.07, 0.3), attention_ratio=(0.15, 0.35)
    )
    + _grid(
        guidance_scale=(1.0, 1.5), adaln_ratio=(0.07,), attention_ratio=(0.35,), inject=("image",)
    ),
    "euler": _grid(guidance_scale=(1.25, 1.5, 2.0))
    + _grid(num_inference_steps=(15, 60))
    + _grid(strength=(0.8, 0.9))
    + [{"time": "noisier"}],
    "sdedit": _grid(strength=(0.3, 0.4, 0.5, 0.6, 0.7, 0.9))
    + _grid(strength=(0.5, 0.7), guidance_scale=(2.0,)),
    "rf-inversion": _grid(guidance_scale=(1.0,), gamma=(0.2, 0.5), eta=(0.6, 0.9))
    + _grid(guidance_scale=(1.0,), gamma=(0.2, 0.5), eta_ratio=(0.5,))
    + _grid(guidance_scale=(1.0, 1.5), gamma=(0.0,)),
    "rf-solver": _grid(
        guidance_scale=(1.0,), first_site=(0.0, 39 / 57), attention_ratio=(0.1, 0.2, 0.35)
    )
    + _grid(
        guidance_scale=(1.0,), first_site=(0.0,), attention_ratio=(0.2, 0.35), inject=("image",)
    ),
    "fireflow": _grid(
        guidance_scale=(1.0,), num_inference_steps=(30,), attention_ratio=(0.1, 0.2, 0.35)
    )
    + _grid(
        guidance_scale=(1.0,),
        num_inference_steps=(15, 30),
        attention_ratio=(0.35,),
        first_site=(0.0,),
        inject=("image",),
    )
    + _grid(guidance_scale=(1.0,), num_inference_steps=(8,), attention_ratio=(0.125, 0.25, 0.375)),
    "uniedit": [UNIEDIT | other for other in _grid(omega=(0.5, 1.0, 2.0), strength=(0.6, 0.8))]
    + [UNIEDIT | {"omega": 0.5, "num_inference_steps": 30} | o for o in _grid(strength=(0.8, 0.9))],
    "flowedit": [FLOWEDIT | other for other in _grid(strength=(0.8, 0.9, 0.95, 1.0))]
    + [FLOWEDIT | other for other in _grid(guidance_scale=(1.5,), strength=(0.8, 0.9))]
    + [FLOWEDIT | {"strength": 0.9, "n_avg": 2}]
    + [FLOWEDIT | {"strength": 0.9, "guidance_scale": 1.25}],
    "dnaedit": [
        SHIFTED | PLAIN | other for other in _grid(strength=(0.675, 0.85, 1.0), eta=(0.8, 1.0))
    ]
    + _grid(grid=("shifted",), guidance_scale=(1.5,), strength=(0.85,), eta=(0.8, 1.0)),
    "directedit": [DIRECTEDIT | other for other in _grid(attention_ratio=(0.1, 0.2))]
    + [
        DIRECTEDIT | {"inject": "image"} | other
        for other in (
            *_grid(attention_ratio=(0.0, 0.1, 0.2, 0.35, 0.45)),
            {"attention_ratio": 0.35, "first_site": 0.5},
        )
    ],
    "two-step": _grid(attention_ratio=(0.2, 0.45), adaln_ratio=(0.0, 0.07))
    + _grid(attention_ratio=(0.35,), adaln_ratio=(0.0, 0.15))
    + [{"features": ("key", "value")}, {"first_site": 0.5}],
}
"""What is tried of every method that is tuned, beside what was published."""


def choices(
    methods: Sequence[str] | None = None,
    candidates: Mapping[str, Sequence[Overrides]] = CANDIDATES,
) -> dict[str, list[tuple[Overrides, Preset]]]:
    """What is tried of each method, the published setting first.

    Raises:
        InputError: a method has no candidates, or a candidate is not one of its settings.
    """
    names = list(candidates) if methods is None else list(methods)
    for name in names:
        if name not in candidates:
            raise InputError(f"{name} has no candidates; those that do: {', '.join(candidates)}")
    return {
        name: [(settings, PRESETS[name].override(settings)) for settings in ({}, *candidates[name])]
        for name in names
    }


def tune(
    bench: Benchmark,
    methods: Sequence[str] | None = None,
    *,
    limit: int = LIMIT,
    candidates: Mapping[str, Sequence[Overrides]] = CANDIDATES,
) -> dict[str, Any]:
    """Try all candidates of methods, and choose the best of each.

    Args:
        bench: with tuning seeds. Every candidate is kept in its folder as it is done.
        methods: some of `candidates`; all of them when None.
        limit: edits for each candidate.
        candidates: to choose from.

    Returns:
        ``{"n", "seeds", …, "budget", "methods": {NAME: {"candidates": [{"settings", "target_psnr",
        "intervals", "inside_mse", "outside_mse", "nfe"}], "chosen": {…}, "target_psnr"}}}``, the
        published setting first, as ``{}``.

    Raises:
        InputError: a method has no candidates, or a candidate is not one of its settings.
    """
    tried = choices(methods, candidates)
    edits = cases(limit, bench.first_seed)
    kinds = np.array([case.kind for case in edits])
    found: dict[str, Any] = {}
    for name, presets in tried.items():
        entries = []
        for settings, preset in presets:
            figures = summary(bench.run(edits, preset, name).columns, kinds)
            shown = ("target_psnr", "inside_mse", "outside_mse", "nfe", "seconds")
            entries.append(
                {"settings": settings}
                | {figure: figures[figure] for figure in shown}
                | {"interval": figures["intervals"]["target_psnr"]}
            )
        best = max(entries, key=lambda entry: entry["target_psnr"])
        found[name] = {
            "chosen": best["settings"],
            "target_psnr": best["target_psnr"],
            "published": entries[0]["target_psnr"],
            "candidates": entries,
        }
    return about(bench, edits) | {"budget": BUDGET, "methods": found}


def chosen(tuned: Any) -> dict[str, Overrides]:
    """The settings that tuning chose, by method, from what `tune` returned and a file kept.

    Raises:
        InputError: this is not a result of tuning.
    """
    try:
        return {name: dict(entry["chosen"]) for name, entry in tuned["methods"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError("this is no result of --tune: make one with --tune -o DIR") from None

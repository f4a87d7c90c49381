"""The table of `docs/choosing.md`: what each choice did, from the figures of the reproduction."""

from __future__ import annotations

from typing import Any

Tried = tuple[tuple[str, str], ...]
"""What was tried, and the row of the reproduction that has its figure."""
SEEDS = (0, 1, 2)
DISTANCE, ERROR = "Fréchet distance", "one-step error"

CHOICES: tuple[tuple[str, str, Tried], ...] = (
    (
        "teacher's guidance, 1024 pairs",
        f"{DISTANCE} in 8 steps",
        tuple((f"α {alpha}", f"2rf-of-1024-alpha-{alpha}-at-8") for alpha in (2.0, 5.0, 8.0)),
    ),
    (
        "number of pairs, α 5",
        f"{DISTANCE} in 8 steps",
        (
            ("256", "2rf-of-256-alpha-5.0-at-8"),
            ("1024", "2rf-of-1024-alpha-5.0-at-8"),
            ("8192", "paper-2rf-0-at-8"),
        ),
    ),
    (
        "guidance of the 2-rectified flow",
        f"{DISTANCE} in 8 steps",
        tuple((f"α {alpha}", f"alpha-{alpha}-at-8") for alpha in (1.0, 1.5, 2.0, 3.0, 5.0)),
    ),
    (
        "start of reflow",
        ERROR,
        (("re-used weights", "flow-paper-2rf-0"), ("exact", "flow-2rf-start-exact")),
    ),
    (
        "time law of reflow",
        ERROR,
        (
            ("uniform", "flow-paper-2rf-0"),
            ("u-shaped", "flow-2rf-time-u-shaped"),
            ("logit-normal", "flow-2rf-time-logit-normal"),
            ("one step's alone", "flow-2rf-time-grid"),
        ),
    ),
    (
        "loss of reflow",
        ERROR,
        (("L2", "flow-paper-2rf-0"), ("pseudo-Huber", "flow-2rf-loss-huber")),
    ),
    (
        "optimiser",
        ERROR,
        (("AdamW", "flow-paper-2rf-0"), ("Muon beside it", "flow-2rf-optimizer-muon")),
    ),
    (
        "pairs of reflow",
        ERROR,
        (
            ("as they are", "flow-paper-2rf-0"),
            ("half mirrored", "flow-2rf-curation-flip"),
            ("without the longest tenth", "flow-2rf-curation-longest"),
            ("annealed from independent noise", "flow-2rf-coupling-annealed"),
        ),
    ),
    (
        "reflow before distillation, 19 200 samples",
        f"{DISTANCE} in one step",
        (("with", "paper-one-{seed}-at-1"), ("without", "paper-direct-{seed}-at-1")),
    ),
    (
        "reflow before distillation, 140 800 samples",
        f"{DISTANCE} in one step",
        (("with", "emoji-instaflow-at-1"), ("without", "emoji-direct-at-1")),
    ),
    (
        "steps at use, `emoji-2rf`",
        DISTANCE,
        tuple((str(k), f"emoji-2rf-at-{k}") for k in (1, 2, 4, 8, 25)),
    ),
    (
        "steps at use, student of one step",
        DISTANCE,
        tuple((str(k), f"paper-one-0-at-{k}") for k in (1, 2, 4, 8)),
    ),
    (
        "steps at use, student of 1, 2, 4 and 8",
        DISTANCE,
        tuple((str(k), f"k-step-at-{k}") for k in (1, 2, 4, 8)),
    ),
)


def choices_table(figures: dict[str, Any]) -> str:
    """Each choice with what was tried and its figure; what was not run is left out."""
    lines = ["| choice | by | measured |", "|---|---|---|"]
    for choice, by, tried in CHOICES:
        found = [(label, _value(figures["rows"], row)) for label, row in tried]
        said = [f"{label}: {value}" for label, value in found if value is not None]
        if len(said) > 1:
            lines.append(f"| {choice} | {by} | {', '.join(said)} |")
    return "\n".join(lines)


def _value(rows: dict[str, Any], name: str) -> str | None:
    """The figure of a row; the mean of those seeds that were run where it has several."""
    names = dict.fromkeys(name.format(seed=seed) for seed in SEEDS)
    found = [rows[one] for one in names if one in rows]
    if not found:
        return None
    if "error:1" in found[0]:
        return f"{sum(row['error:1']['mean'] for row in found) / len(found):.4f}"
    return f"{sum(row['frechet_of_first']['value'] for row in found) / len(found):.2f}"

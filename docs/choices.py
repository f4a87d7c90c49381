"""The table of `docs/choosing.md`: what each choice did, from the figures of the reproduction."""

from __future__ import annotations

from rectiflow.reproduce.figures import Figures
from rectiflow.reproduce.labels import by_seed
from rectiflow.reproduce.record import Record
from rectiflow.reproduce.tables import value

Tried = tuple[tuple[str, str], ...]
"""What was tried, and the row of the reproduction that has its figure."""
DISTANCE, ERROR = "Fréchet distance", "one-step error"
MEASURES = {
    DISTANCE: ("frechet", 2),
    ERROR: ("error:1", 4),
    f"{DISTANCE} of 5000": ("frechet_of_all", 2),
}
"""What they are called among the figures, and how many digits are shown."""

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
        "after distillation, 3072 samples by LPIPS in `emoji-clip`'s features",
        f"{DISTANCE} in one step",
        (("without", "emoji-instaflow-at-1"), ("with", "emoji-instaflow-clip-at-1")),
    ),
    (
        "optimiser",
        ERROR,
        (
            ("AdamW", "flow-paper-2rf-0"),
            ("Muon beside it", "flow-2rf-optimizer-muon"),
            ("Muon and pseudo-Huber", "flow-2rf-huber-muon"),
        ),
    ),
    *(
        (
            f"batch and rate, {words} of the samples, without reflow",
            ERROR,
            (
                ("32", f"flow-paper-direct-of-1-in-{share}"),
                ("8 at twice the rate", f"flow-small-batch-direct-of-1-in-{share}"),
                ("… with Muon and pseudo-Huber", f"flow-tuned-direct-of-1-in-{share}"),
            ),
        )
        for share, words in ((3, "a third"), (5, "a fifth"))
    ),
    *(
        (
            f"batch and rate, {words} of the samples, after reflow",
            f"{DISTANCE} in one step",
            (
                ("32", f"paper-one-of-1-in-{share}-at-1"),
                ("8 at twice the rate", f"small-batch-one-of-1-in-{share}-at-1"),
                ("… with Muon and pseudo-Huber", f"tuned-one-of-1-in-{share}-at-1"),
            ),
        )
        for share, words in ((3, "a third"), (5, "a fifth"))
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
        "reflow before distillation, 19 200 samples, on 8192 pairs",
        f"{DISTANCE} in one step",
        (("with", "many-pairs-one-0-at-1"), ("without", "paper-direct-0-at-1")),
    ),
    (
        "reflow before distillation, 19 200 samples, on 1024 pairs",
        f"{DISTANCE} in one step",
        (("with", "few-pairs-one-0-at-1"), ("without", "few-pairs-direct-0-at-1")),
    ),
    (
        "reflow before distillation, 140 800 samples",
        f"{DISTANCE} of 5000 in one step",
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


def choices_table(record: Record) -> str:
    """Each choice with what was tried and its figure; what was not run is left out."""
    figures = Figures(record.rows)
    lines = ["| choice | by | measured |", "|---|---|---|"]
    for choice, by, tried in CHOICES:
        key, digits = MEASURES[by.partition(",")[0].partition(" in ")[0]]
        found = {label: figures.over(_seeds(row), key) for label, row in tried}
        said = [f"{label}: {value(one, digits)}" for label, one in found.items() if one is not None]
        if len(said) > 1:
            lines.append(f"| {choice} | {by} | {', '.join(said)} |")
    return "\n".join(lines)


def _seeds(row: str) -> list[str]:
    """The rows of all training seeds of one, of which most have one only."""
    kind, at, steps = row.partition("-at-")
    return [name + at + steps for name in by_seed(kind)]

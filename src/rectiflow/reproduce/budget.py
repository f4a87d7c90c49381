"""How few training samples other settings need for the one-step error of the paper's recipe."""

from __future__ import annotations

from dataclasses import dataclass

from rectiflow.reproduce.figures import Estimate, Figures
from rectiflow.reproduce.instaflow import SEEDS, SHARES
from rectiflow.reproduce.study import Study, trained_samples
from rectiflow.reproduce.tables import table, value


@dataclass(frozen=True)
class Trained:
    """A way to train a one-step student.

    Args:
        label: What tables call it.
        students: One for each training seed.
        share: It sees one in so many of the samples of the paper's recipe; None if it is none of
            those that are compared with it.
    """

    label: str
    students: tuple[str, ...]
    share: int | None = None


PAPER = Trained("the paper's recipe", tuple(f"paper-one-{seed}" for seed in SEEDS))
SHORT = {
    "paper-one": "the paper's recipe",
    "paper-direct": "direct distillation",
    "few-pairs-direct": "direct distillation on 1024 pairs",
    "muon-one": "the paper's recipe with Muon",
    "muon-reflow": "reflow alone, u-shaped times, Muon",
    "muon-direct": "direct distillation with Muon",
    "small-batch-one": "the paper's recipe in batches of 8 at twice the rate",
    "small-batch-direct": "direct distillation in batches of 8 at twice the rate",
    "tuned-one": "the paper's recipe in batches of 8, pseudo-Huber, Muon",
    "tuned-direct": "direct distillation in batches of 8, pseudo-Huber, Muon",
}
"""With a share of the samples."""
WAYS = (
    PAPER,
    Trained("direct distillation", tuple(f"paper-direct-{seed}" for seed in SEEDS)),
    Trained(
        "the paper's recipe, distilled on 8192 pairs",
        tuple(f"many-pairs-one-{seed}" for seed in SEEDS),
    ),
    Trained("the paper's recipe, distilled on 1024 pairs", ("few-pairs-one-0",)),
    Trained("… without reflow", ("few-pairs-direct-0",)),
    *(
        Trained(f"{label}, one in {share}", (f"{kind}-of-1-in-{share}",), share)
        for share in SHARES
        for kind, label in SHORT.items()
    ),
    Trained("exact start, u-shaped times", ("one-0",)),
    Trained("… without reflow", ("direct-0",)),
    Trained("`emoji-instaflow`", ("emoji-instaflow",)),
    Trained("… without reflow", ("emoji-direct",)),
)
FIGURES = {
    "one-step error": ("flow-{}", "error:1", 4),
    "Fréchet distance": ("{}-at-1", "frechet", 2),
}
"""A figure's rows, its name and how many digits are shown."""


def section(study: Study, figures: Figures) -> str:
    """The table, and for each share what came nearest to the paper's recipe; empty without rows."""
    rows = []
    for way in WAYS:
        found = [_of(figures, way, name) for name in FIGURES]
        if found[0] is not None:
            total = trained_samples(study, way.students[0])
            digits = (digits for *_, digits in FIGURES.values())
            cells = (value(one, places) for one, places in zip(found, digits, strict=True))
            rows.append((way.label, str(total), *cells))
    text = table(("one-step student", "samples", *FIGURES), rows)
    if not text:
        return ""
    said = [
        line for name in FIGURES for share in SHARES if (line := _nearest(figures, name, share))
    ]
    return f"""## Fewer samples for the same error

The error is that of one step against the teacher's own latents on the held-out pairs, as above;
samples are those of all training since the teacher.

{text}

{chr(10).join(line for line in said if line)}""".strip()


def _of(figures: Figures, way: Trained, name: str) -> Estimate | None:
    row, figure, _ = FIGURES[name]
    return figures.over([row.format(student) for student in way.students], figure)


def _nearest(figures: Figures, name: str, share: int) -> str:
    """Which way with a share of the samples has least of a figure, and whether it is enough."""
    base, digits = _of(figures, PAPER, name), FIGURES[name][2]
    found = {
        way: one
        for way in WAYS
        if way.share == share and (one := _of(figures, way, name)) is not None
    }
    if base is None or not found:
        return ""
    best = min(found, key=lambda way: found[way].mean)
    reached = [way for way in found if found[way].mean <= base.mean]
    others = [way.label.removesuffix(f", one in {share}") for way in found if way not in reached]
    return (
        f"- {name}, one in {share} of the samples: "
        f"{'**reached**' if reached else '**not reached**'}; least by "
        f"{best.label.removesuffix(f', one in {share}')}, {value(found[best], digits)} "
        f"(the paper's recipe with all of them {value(base, digits)})"
        + (f"; not by: {', '.join(others)}." if others else ".")
    )

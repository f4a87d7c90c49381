"""The page of a study: verdicts, tables, plots and pictures, all from its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rectiflow.files import write_whole
from rectiflow.reproduce import budget, drawings
from rectiflow.reproduce.claims import Verdict, all_claims, seeded
from rectiflow.reproduce.figures import Figures
from rectiflow.reproduce.instaflow import ALPHAS, K_STEPS, OTHER_PAIRS, SHARES, TRAILING
from rectiflow.reproduce.labels import OPTIONS, REFLOWS, by_seed
from rectiflow.reproduce.measuring import COMPARED, FEW_STEPS
from rectiflow.reproduce.record import Record
from rectiflow.reproduce.study import Store, Student, Study
from rectiflow.reproduce.tables import table, value
from rectiflow.reproduce.workshop import Workshop


def write(
    workshop: Workshop, file: Path, before: Record | None = None
) -> dict[str, dict[str, str]]:
    """Write the page, its pictures and its record, from what is there.

    Args:
        workshop: The study.
        file: The page, Markdown; pictures go into a folder of its name beside it.
        before: An earlier record, of which is taken what the workshop does not have.

    Raises:
        InputError: That is of another study, size or dtype.

    Returns:
        By letter `{"claim", "verdict", "sentence"}`.
    """
    before = before.still(workshop) if before else None
    figures = Figures.read(workshop, before)
    verdicts = all_claims(figures)
    pictures = drawings.draw_all(workshop, figures, file.with_suffix(""))
    shown = before.sheet if before else {}
    sheet = drawings.draw_sheet(workshop, figures, file.with_suffix("") / SHEET_FILE, shown)
    if sheet:
        pictures[SHEET_FILE] = "Equal captions and noise in every column"
    tables = [
        _pictures_table(figures),
        _seeds_table(figures),
        _variations_table(workshop.study, figures),
        _pairs_table(workshop.study, figures),
        budget.section(workshop.study, figures),
    ]
    claims = {
        verdict.key: {
            "claim": verdict.claim,
            "verdict": verdict.verdict,
            "sentence": verdict.sentence,
        }
        for verdict in verdicts
    }
    gaps = [(*cell, *other, *gap) for (cell, other), gap in figures.gaps.items()]
    record = Record.of(workshop, figures.rows, gaps, sheet, claims, before)
    sections = [
        _head(workshop.study, record),
        _verdict_table(verdicts),
        *(f"![{words}]({file.stem}/{name})" for name, words in pictures.items()),
        *tables,
        _not_run(workshop.study, record),
    ]
    write_whole(record_of(file), record.json(), shared=True)
    write_whole(file, "\n\n".join(section for section in sections if section) + "\n", shared=True)
    return claims


def record_of(file: Path) -> Path:
    """Where the record of a page lies: in the folder of its pictures."""
    return file.with_suffix("") / "figures.json"


def _head(study: Study, record: Record) -> str:
    made = [item for item in study.items if item.name in record.made]
    samples = sum(item.samples for item in made if isinstance(item, Student))
    pairs = sum(item.num for item in made if isinstance(item, Store))
    return f"""# InstaFlow on the embedded world

Written by `rectiflow reproduce {study.name} --size {study.size} --dtype {record.dtype}`
({record.circumstances()}).
The teacher is `emoji-sd`, a U-Net of 4.8 M parameters; {pairs} pairs were made and {samples}
samples trained on. It is the paper's experiment (Liu et al. 2023, arXiv 2309.06380) in the size of
a world of emoji: signs and rankings can be compared with the paper's, figures cannot.

*The paper's recipe* is what it does, not its sizes: re-used weights, uniform times, L2, AdamW.
Rates and batches are this project's, and pairs of the 2-rectified flow are made without guidance.
{PAIRS[study.size]}
*Fréchet distance* is that of two Gaussians in the features of `emoji-clip`, between pictures drawn
for held-out captions (the first 1000 of a row, where it has more) and 5000 true pictures; it is not
FID, and depends on the number of pictures.
*Emoji, background, count* are shares of up to 600 pictures that the sprite judge reads as their
captions say. S(Z) and transport cost are per dimension of a latent, on held-out noise. ± is half a
95 % interval: over training seeds (Student's t) where a row has several, else over pictures or
trajectories. Every model draws from the same noise for the same captions."""


def _verdict_table(verdicts: Sequence[Verdict]) -> str:
    rows = [(f"({v.key}) {v.claim}", v.published, f"**{v.verdict}**", v.sentence) for v in verdicts]
    return "## The paper's claims\n\n" + table(("claim", "published", "here", "by"), rows)


def _quality(figures: Figures, label: str, names: Sequence[str]) -> tuple[str, ...] | None:
    """A row of pictures' figures, of one model or of several seeds; None if none is there."""
    there = [name for name in names if name in figures.rows]
    if not there:
        return None
    first = figures.rows[there[0]]
    return (
        label,
        str(first["num_inference_steps"]),
        str(first["n"]),
        str(len(there)),
        value(figures.over(there, "frechet")),
        value(figures.over(there, "frechet_of_all")) if first["n"] > COMPARED else "",
        value(figures.over(there, "clip_score"), 3),
        *(value(figures.over(there, key), 1, 100) for key in ("emoji", "background", "count")),
        value(figures.over(there, "likeness:teacher-at-25"), 1, 1e3),
    )


SHEET_FILE = "pictures.png"
PAIRS = {
    "small": "All are trained on 1024 pairs.",
    "full": """Reflow and direct distillation have 8192 pairs where nothing else is said,
distillation after reflow 2048; those that ship have 8192 for everything.""",
}
"""What is said of their number."""
QUALITY = (
    "model",
    "steps",
    "pictures",
    "seeds",
    "Fréchet distance",
    "of all",
    "CLIP score",
    "emoji %",
    "background %",
    "count %",
    "to the teacher's picture ×10³",
)


def _pictures_table(figures: Figures) -> str:
    singles = [
        *(("teacher, DPM-Solver++, α 5", f"teacher-at-{k}") for k in (25, 8, 4, 2, 1)),
        *(
            (f"teacher, {solver} on trailing timesteps, α 5", f"teacher-{solver}-trailing-at-{k}")
            for solver in TRAILING
            for k in (4, 2)
        ),
        *(("`emoji-2rf`", f"emoji-2rf-at-{k}") for k in (25, 8, 4, 2, 1)),
        ("`emoji-instaflow`", "emoji-instaflow-at-1"),
        ("… and then by the distance in emoji-clip's features", "emoji-instaflow-clip-at-1"),
        ("direct distillation of as many samples", "emoji-direct-at-1"),
    ]
    rows = [_quality(figures, label, [name]) for label, name in singles]
    text = table(QUALITY, [row for row in rows if row])
    return f"## The models that ship\n\n{text}" if text else ""


def _seeds_table(figures: Figures) -> str:
    kinds = {
        "paper-2rf": "2-rectified flow, the paper's recipe",
        "paper-one": "… distilled",
        "paper-direct": "direct distillation, re-used weights",
        "2rf": "2-rectified flow, exact start, u-shaped times",
        "one": "… distilled",
        "direct": "direct distillation, exact start",
        "many-pairs-one": "the paper's recipe, distilled on 8192 pairs",
        "few-pairs-one": "the paper's recipe, distilled on 1024 pairs",
        "few-pairs-direct": "direct distillation on 1024 pairs",
    }
    rows = [_quality(figures, label, seeded(kind)) for kind, label in kinds.items()]
    more = {
        **{
            f"paper-{kind}-of-1-in-{share}-at-1": f"{words}, one in {share} of the samples"
            for share in SHARES
            for kind, words in (("one", "the paper's recipe"), ("direct", "direct distillation"))
        },
        **{f"k-step-at-{k}": "student of 1, 2, 4 and 8 steps" for k in K_STEPS},
        **{f"paper-one-0-at-{k}": "one-step student, seed 0" for k in K_STEPS[1:]},
        "stacked-at-1": "distilled, stacked, after reflow",
        "single-direct-at-1": "distilled, single, without reflow",
        "stacked-direct-at-1": "distilled, stacked, without reflow",
    }
    rows += [_quality(figures, label, [name]) for name, label in more.items()]
    rows += [
        _quality(figures, f"`emoji-2rf`, α {alpha}", [f"alpha-{alpha}-at-{steps}"])
        for steps in (1, 8)
        for alpha in ALPHAS
    ]
    text = table(QUALITY, [row for row in rows if row])
    return f"## At equal training, over seeds, and one setting at a time\n\n{text}" if text else ""


def _variations_table(study: Study, figures: Figures) -> str:
    """Reflow by other laws of time, losses and pairs: straightness, and errors of few steps."""
    rows = []
    for name, label in REFLOWS.items():
        there = [row for one in by_seed(name) if (row := f"flow-{one}") in figures.rows]
        if not there:
            continue
        student = study.item(name)
        assert isinstance(student, Student)
        errors = [value(figures.over(there, f"error:{k}"), 3) for k in FEW_STEPS]
        straight = value(figures.over(there, "straightness"), 4)
        cost = value(figures.over(there, "transport_cost"), 3)
        rows.append((label, str(student.samples), str(len(there)), straight, cost, *errors))
    teachers = {"flow-teacher": "the teacher, α 5", "flow-teacher-alpha-1": "the teacher, α 1"}
    for row, label in reversed(teachers.items()):
        if straight_teacher := figures.of(row, "straightness"):
            cost = value(figures.of(row, "transport_cost"), 3)
            rows.insert(0, (label, "–", "1", value(straight_teacher, 4), cost, *4 * ("–",)))
    steps = [f"error, {k} step{'s' * (k > 1)}" for k in FEW_STEPS]
    text = table(("reflow", "samples", "seeds", "S(Z)", "transport cost", *steps), rows)
    if not text:
        return ""
    return f"""## Reflow, one setting at a time

The error of k steps is the mean square, per dimension, between where k Euler steps end and the
teacher's own latents (25 steps of DPM-Solver++) on 256 held-out pairs.

{text}

{_options(figures)}"""


def _options(figures: Figures) -> str:
    """What a changed setting does to the error of one step and of eight, in words."""
    lines = []
    for k in (1, 8):
        said: dict[str, list[str]] = {"less": [], "more": [], "even": []}
        for name, words in OPTIONS.items():
            cells, others = (
                [(f"flow-{one}", f"error:{k}") for one in by_seed(student)]
                for student in (name, "paper-2rf-0")
            )
            gap = figures.difference(cells, others)
            if gap is not None:
                kind = "less" if gap.high < 0 else "more" if gap.low > 0 else "even"
                seeds = f", {gap.n} seeds" if gap.n > 1 else ""
                said[kind].append(f"{words} ({gap.mean:+.4f} ± {gap.half:.4f}{seeds})")
        if not any(said.values()):
            continue
        start = f"Beside the paper's recipe of the same training seeds, in {k} step{'s' * (k > 1)}"
        parts = {"less": "err less", "more": "err more", "even": "are not told apart"}
        listed = "; ".join(f"{parts[key]}: {', '.join(said[key]) or 'none'}" for key in parts)
        lines.append(f"- {start} {listed}.")
    return "\n".join(lines)


def _pairs_table(study: Study, figures: Figures) -> str:
    """Reflow on other pairs of the teacher."""
    rows = []
    for name in ("paper-2rf-0", *(f"2rf-of-{num}-alpha-{alpha}" for num, alpha in OTHER_PAIRS)):
        student = study.item(name)
        row = f"{name}-at-8"
        if row not in figures.rows or not isinstance(student, Student) or student.pairs is None:
            continue
        store = study.item(student.pairs)
        assert isinstance(store, Store)
        flow = f"flow-{name}"
        rows.append(
            (
                str(store.num),
                str(store.guidance_scale),
                value(figures.of(flow, "straightness"), 4),
                value(figures.of(flow, "transport_cost"), 3),
                *(value(figures.of(flow, f"error:{k}"), 3) for k in (1, 8)),
                value(figures.of(row, "frechet")),
                value(figures.of(row, "clip_score"), 3),
            )
        )
    head = [
        "pairs",
        "their α",
        "S(Z)",
        "transport cost",
        "error, 1 step",
        "error, 8 steps",
        "Fréchet distance, 8 steps",
        "CLIP score",
    ]
    text = table(head, rows)
    return f"## Reflow on other pairs of the teacher\n\n{text}" if text else ""


def _not_run(study: Study, record: Record) -> str:
    missing = [item.name for item in study.items if item.name not in record.made]
    if not missing:
        return ""
    return "## Not run\n\n" + ", ".join(f"`{name}`" for name in missing) + "."

"""The sections on straightening: what it costs, and what came of it."""

from __future__ import annotations

import json
from pathlib import Path

from tables import goals_table, percent

from rectiflow.reproduce.record import Record

REPRODUCTION = Path(__file__).parent / "reproduction/figures.json"
SHIPPED = {
    "teacher-at-25": "`emoji-sd`, DPM-Solver++, guidance 5",
    "emoji-2rf-at-25": "`emoji-2rf`",
    "emoji-instaflow-at-1": "`emoji-instaflow`",
    "emoji-direct-at-1": "direct distillation of as many samples",
}
"""Rows of the reproduction that the README shows."""
INVERTING = (
    (
        "inversion-error",
        "`rectiflow evaluate inversion-error --model emoji-sd --model emoji-2rf --model emoji-sd3 "
        "--limit 24 --dtype bfloat16`",
        "held-out scenes; how many times as much by geometric means over them",
    ),
    (
        "straight-edits",
        "`rectiflow evaluate straight-edits --guidance 1 --dtype bfloat16` with `-m` emoji-sd, "
        "emoji-2rf and the study's 2-rectified flow of pairs at guidance 2",
        "edits",
    ),
    (
        "guided/straight-edits",
        "`rectiflow evaluate straight-edits --dtype bfloat16`, at guidance 1.5",
        "edits",
    ),
)
"""Records, the commands that write them, and what was counted."""


def straightening_section(results: Path) -> str:
    """What the parts of straightening cost beside their networks, if it was measured."""
    pairs, step = results / "pairs-cost.json", results / "train-step-cost.json"
    if not (pairs.exists() and step.exists()):
        return ""
    of_pairs, of_step = json.loads(pairs.read_text()), json.loads(step.read_text())
    rows = [("making pairs, time beside the bare network", of_pairs["overhead"], 1.05)]
    rows += [
        (f"bytes of a pair beside its float16 latents, {name}", ratio, 1.02)
        for name, ratio in of_pairs["bytes_per_pair"].items()
    ]
    rows += [
        ("a training step beside a bare PyTorch loop", of_step["ratio_wall"], 1.10),
        ("… in processor time", of_step["ratio_cpu"], 1.10),
    ]
    table = goals_table(
        [(name, f"{value:.4f} ×", f"≤ {limit:.2f} ×") for name, value, limit in rows]
    )
    return f"""
## What straightening costs beside its network

`python benchmarks/pairs.py --json` ({of_pairs["date"]}, {of_pairs["machine"]},
{of_pairs["threads"]} thread(s), median of {of_pairs["repeats"]} stores of {of_pairs["num"]} pairs,
`{of_pairs["model"]}`) and `python benchmarks/train_step.py --json` ({of_step["date"]},
{of_step["threads"]} thread(s), medians of {of_step["repeats"]} blocks of {of_step["steps"]} steps,
{of_step["parameters"] / 1e6:.1f} M parameters), each in turns with its bare counterpart.

{table}
"""


def one_step_table(figures: Record, rows: tuple[str, ...] = tuple(SHIPPED)) -> str:
    """The straightened models beside their teacher and direct distillation, as far as measured."""
    if not set(rows) & set(figures.rows):
        return ""
    lines = [
        "| model | steps | Fréchet distance (emoji-clip features, 5000) | CLIP score | "
        "right emoji | background | count |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in rows:
        row = figures.rows.get(name)
        if row is None:
            continue
        judged = row["judge"]
        low, high = judged["interval"]["emoji"]
        lines.append(
            f"| {SHIPPED[name]} | {row['num_inference_steps']} | {row['frechet_emoji_clip']:.2f} | "
            f"{row['clip_score']['mean']:.3f} | {percent(judged['emoji'])} "
            f"({100 * low:.1f}–{100 * high:.1f}) | {percent(judged['background'])} | "
            f"{percent(judged['count'])} |"
        )
    return "\n".join(lines)


def one_step_section(results: Path) -> str:
    """The straightened models, if the reproduction was run; and the latency of a picture."""
    figures = reproduction()
    if figures is None:
        return ""
    text = f"""
## One step

From [reproduction.md](reproduction.md) ({figures.circumstances()},
{figures.dtype}): equal captions and noise, the judge on 600 pictures with 95 % intervals.

{one_step_table(figures) or "Not measured yet."}
"""
    file = results / "one-step-latency.json"
    if file.exists():
        record = json.loads(file.read_text())
        table = goals_table([("a picture in one step", f"{record['ratio']:.3f} ×", "≤ 1.10 ×")])
        text += f"""
`python benchmarks/one_step.py --json` ({record["date"]}, {record["machine"]}, {record["threads"]}
thread(s), medians of {record["repeats"]} in turns, `{record["model"]}`): text encoder, U-Net and
decoder bare; stock diffusers' pipeline in the same run {record["stock_ratio"]:.3f} ×.

{table}
"""
    return text


def inverting_section(results: Path) -> str:
    """What an inversion step is off by, and what straightness does for edits, if measured."""
    parts = []
    for name, command, words in INVERTING:
        file = results / f"{name}.json"
        if file.exists():
            figures = json.loads(file.read_text())
            plots = "\n".join(
                f"![{plot.stem.replace('-', ' ')}](results/{plot.relative_to(results)})"
                for plot in sorted(results.glob(f"{name}-*.svg"))
            )
            said = "\n".join(f"- {sentence}" for sentence in figures["sentences"])
            parts.append(f"{command} ({figures['n']} {words}):\n\n{plots}\n\n{said}\n")
    return "\n## Inverting straight and curved flows\n\n" + "\n".join(parts) if parts else ""


def reproduction() -> Record | None:
    """The record of the reproduction; None if it was not run."""
    return Record.read(REPRODUCTION) if REPRODUCTION.exists() else None

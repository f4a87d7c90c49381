"""Write `docs/figures.md`, the README's figures and its picture from what the commands measured.

    rectiflow evaluate emoji-models --dtype bfloat16 -o docs/results
    rectiflow evaluate emoji-edits --tune --dtype bfloat16 -o docs/results
    rectiflow evaluate emoji-edits --tuned docs/results/tuning.json --dtype bfloat16 -o docs/results
    rectiflow evaluate emoji-edits --masks given --dtype bfloat16 -o docs/results
    rectiflow evaluate emoji-edits --ablations --dtype bfloat16 -o docs/results
    rectiflow demo -o demo
    python docs/figures.py

`make figures` runs what it needs; tables that were not made are left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from choices import choices_table
from PIL import Image
from straightened import (
    SHIPPED,
    inverting_section,
    one_step_section,
    one_step_table,
    reproduction,
    straightening_section,
)
from tables import goals_table, percent

from rectiflow.evaluate.edit_table import OURS, ties
from rectiflow.report.sheet import contact_sheet

DOCS = Path(__file__).parent
ROOT = DOCS.parent
KIND_NAMES = {"random": "random mix", "text": "visual text"}


def models_table(figures: dict[str, Any]) -> str:
    rows = [
        ("codec, PSNR of encode–decode", f"{figures['vae_psnr']:.2f} dB", "≥ 32 dB"),
        ("CLIP, caption among 100", percent(figures["clip_top1"]), "≥ 95 %"),
        *judged(figures),
    ]
    return goals_table(rows)


def judged(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the judge says of a model's pictures, beside what was to be reached."""
    goals = {"emoji": "≥ 80 %", "background": "≥ 95 %", "count": "≥ 85 %"}
    return [(f"right {name}", percent(figures["judge"][name]), goals[name]) for name in goals]


def circumstances(figures: dict[str, Any]) -> str:
    details = figures["details"]
    return f"{details['date']}, {details['device']}, {details['threads']} threads"


def diffusion_section(figures: dict[str, Any]) -> str:
    """The embedded diffusion model."""
    details = figures["details"]
    return f"""
`rectiflow evaluate emoji-models --model emoji-sd --dtype bfloat16`
({circumstances(figures)}): the same captions by the diffusion model,
{details["num_inference_steps"]} steps of DPM-Solver++, guidance {details["guidance_scale"]}.

{goals_table(judged(figures))}
"""


def edits_table(figures: dict[str, Any], rows: dict[str, Any] | None = None) -> str:
    """The methods, or some rows of them, each with what it keeps and what it costs."""
    lines = [
        "| method | PSNR to the true target | error inside the edit ×10³ | outside ×10³ | "
        "PSNR outside | network samples |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in (rows or figures["methods"]).items():
        psnr = with_interval(entry, "target_psnr", 2, 1, " dB")
        inside = with_interval(entry, "inside_mse", 1, 1e3)
        outside = with_interval(entry, "outside_mse", 2, 1e3)
        kept = with_interval(entry, "outside_psnr", 1, 1, " dB")
        lines.append(f"| `{name}` | {psnr} | {inside} | {outside} | {kept} | {entry['nfe']:.0f} |")
    return "\n".join(lines)


def best_rows(figures: dict[str, Any]) -> dict[str, Any]:
    """Each method at its published or its tuned settings, the better ones; ours as shipped."""
    methods, best = figures["methods"], {}
    for name, entry in methods.items():
        base = name.removesuffix(" (tuned)")
        known = methods.get(f"{base} (tuned)", entry)
        other = methods.get(base, entry)
        worse = min((known, other), key=lambda row: row["target_psnr"])
        if (entry is not worse or known is other) and base not in OURS:
            best[name] = entry
        elif name in OURS:
            best[name] = entry
    return best


def overhead_section(results: Path) -> str:
    """What an edit costs beside its network, if it was measured."""
    file = results / "edit-overhead.json"
    if not file.exists():
        return ""
    record = json.loads(file.read_text())
    lines = [
        "| shape | preset | network samples | second target | time beside the bare network | "
        "limit | peak memory beside the bare network |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['shape']} | `{row['preset']}` | {row['nfe']} | {row['second_nfe']} | "
            f"{row['overhead']:.3f} × | {row['limit']:.2f} × | "
            f"{row['edit_mib']:.0f} MiB, {row['network_mib']:.0f} MiB |"
        )
    table = "\n".join(lines)
    return f"""
## What an edit costs beside its network

`python benchmarks/edit.py --json` ({record["date"]}, {record["machine"]}, {record["threads"]}
thread(s), median of {record["repeats"]}, float32): a whole 30-step edit, codec and text encoders
included, over as many bare calls of the network, in turns.

{table}
"""


def with_interval(
    entry: dict[str, Any], figure: str, digits: int, factor: float, unit: str = ""
) -> str:
    """A mean and half the width of its 95 % interval."""
    if entry[figure] is None:
        return "–"
    low, high = entry["intervals"][figure]
    half = (high - low) / 2 * factor
    return f"{entry[figure] * factor:.{digits}f} ± {half:.{digits}f}{unit}"


def paired_list(figures: dict[str, Any], ours: tuple[str, ...] = OURS) -> str:
    """Each of ours against every other method."""
    return "\n".join(
        f"- `{name}`: {entry['mean']:+.2f} dB, 95 % interval {entry['low']:+.2f} to "
        f"{entry['high']:+.2f}"
        for name, entry in figures["paired"].items()
        if name.partition(" - ")[0] in ours
    )


def ties_sentence(figures: dict[str, Any]) -> str:
    """What the figures do not tell apart from one of ours that was compared with all others."""
    sentences = []
    for ours in OURS:
        rivals = {name for name in figures["methods"] if name not in (ours, "bound")}
        if {f"{ours} - {rival}" for rival in rivals} <= {*figures["paired"]}:
            tied = ", ".join(f"`{name}`" for name in ties(figures, ours)) or "no method"
            sentences.append(f"Not told apart from `{ours}` (the interval has 0 in it): {tied}.")
    return "\n".join(sentences)


def masked_section(results: Path) -> str:
    """The table of methods that were told where the edit belongs, if it was made."""
    file = results / "emoji-edits-masked.json"
    if not file.exists():
        return ""
    figures = json.loads(file.read_text())
    return f"""
### Told where the edit belongs

The same command with `--masks given`: every method gets the true mask of the edit. A mask changes
more than a method does, so this table is not to be compared with the one above.

{edits_table(figures)}

{ties_sentence(figures)}
"""


def ablations_section(results: Path) -> str:
    """What the ablations showed, in the sentences that follow from their figures."""
    files = sorted((results / "ablations").glob("*.json"))
    if not files:
        return ""
    blocks = []
    for file in files:
        figures = json.loads(file.read_text())
        sentences = "\n".join(f"- {entry['sentence']}" for entry in figures["series"].values())
        blocks.append(
            f"{figures['label'].capitalize()} (`{figures['setting']}`, {figures['n']} edits):\n\n"
            f"![PSNR to the true target](results/ablations/{file.stem}.svg)\n\n{sentences}"
        )
    return (
        "\n## Ablations\n\n`rectiflow evaluate emoji-edits --ablations -o docs/results`: one "
        "setting of `fast` and of `ftedit` at a time.\n\n" + "\n\n".join(blocks) + "\n"
    )


def kinds_table(figures: dict[str, Any]) -> str:
    methods = figures["methods"]
    kinds = next(iter(methods.values()))["by_kind"]
    lines = ["| kind | " + " | ".join(f"`{name}`" for name in methods) + " |"]
    lines.append("|---|" + "---|" * len(methods))
    for kind in kinds:
        values = " | ".join(f"{entry['by_kind'][kind]:.1f}" for entry in methods.values())
        lines.append(f"| {KIND_NAMES.get(kind, kind)} | {values} |")
    return "\n".join(lines)


def fill(file: Path, block: str) -> None:
    """Put a block of figures between a file's markers."""
    text = re.sub(
        r"(<!-- figures:.*?-->\n).*?(<!-- /figures -->)",
        lambda match: match[1] + "\n" + block + "\n\n" + match[2],
        file.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    file.write_text(text, encoding="utf-8")


def demo_picture(demo: Path) -> None:
    """Sources, our edits and the true answers, in three rows."""
    cases = sorted((demo / "cases").iterdir())
    rows = [
        np.asarray(Image.open(case / f"{name}.png").convert("RGB"), dtype=np.float32) / 255
        for name in ("source", "edit-1", "target")
        for case in cases
    ]
    contact_sheet(rows, columns=len(cases), scale=2).save(DOCS / "pictures/demo.png", optimize=True)


SECTIONS = (
    masked_section,
    ablations_section,
    overhead_section,
    straightening_section,
    one_step_section,
    inverting_section,
)


def main() -> None:
    models = json.loads((DOCS / "results/emoji-models.json").read_text())
    edits = json.loads((DOCS / "results/emoji-edits.json").read_text())
    details, results = models["details"], DOCS / "results"
    made = circumstances(models)
    diffusion = json.loads((results / "emoji-models-emoji-sd.json").read_text())
    first, last = edits["seeds"]
    table = models_table(models)
    page = f"""# Figures

Written by `make figures`; each table is what one command printed.

## The embedded models

`rectiflow evaluate emoji-models --dtype bfloat16` ({made}):
{models["samples"]} captions of held-out scenes,
{details["num_inference_steps"]} steps, guidance {details["guidance_scale"]}. The judge matches
templates of the sprite sheet and knows nothing that was learned.

{table}
{diffusion_section(diffusion)}
## Editing

`rectiflow evaluate emoji-edits --dtype {edits["dtype"]}` (the network's dtype; states are float32):
{edits["n"]} edits, scene seeds {first} to {last} of each of the
twelve kinds, pictures compared with the true target in [0, 1]. `nothing` is the source through the
codec, `bound` the true target through the codec. Published settings of every method; rows marked
(tuned) have the best of the same number of settings each, the published one and eight others, tried
on 24 edits of the seeds from 1 000 000 (`--tune`). `fast` and `exact` are as shipped: that search
would have `fast` inject keys beside values, for +0.13 dB there and twice the features to keep. ± is
half the width of a 95 % interval (bootstrap over edits).

{edits_table(edits)}

{ties_sentence(edits)}

Paired differences of the PSNR to the true target (bootstrap over edits):

{paired_list(edits)}

PSNR to the true target by kind of edit, dB:

{kinds_table(edits)}
{"".join(section(results) for section in SECTIONS)}"""
    (DOCS / "figures.md").write_text(page, encoding="utf-8")
    straightened = reproduction()
    one_step = one_step_table(straightened) if straightened else ""
    blocks = (edits_table(edits, best_rows(edits)), ties_sentence(edits), table, one_step)
    fill(
        ROOT / "README.md",
        "\n\n".join(block for block in blocks if block),
    )
    for name in ("emoji-vae", "emoji-clip", "emoji-sd3"):
        fill(ROOT / "src/rectiflow/weights" / name / "README.md", f"{table}\n\n{made}.")
    card = ROOT / "src/rectiflow/weights/emoji-sd/README.md"
    fill(card, f"{goals_table(judged(diffusion))}\n\n{circumstances(diffusion)}.")
    if straightened:
        fill(DOCS / "choosing.md", choices_table(straightened))
        for name in ("emoji-2rf", "emoji-instaflow"):
            rows = tuple(row for row in SHIPPED if row.startswith(("teacher", name)))
            card = ROOT / "src/rectiflow/weights" / name / "README.md"
            shown = one_step_table(straightened, rows) or "Not measured yet."
            fill(card, f"{shown}\n\n{straightened.circumstances()}.")
    demo_picture(ROOT / "demo")


if __name__ == "__main__":
    main()

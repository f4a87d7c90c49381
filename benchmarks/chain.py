"""How far editing in turns drifts, on chains whose right answers are known.

    python benchmarks/chain.py [--limit 24] [--preset fast] [--dtype bfloat16] [--json]

Prints a row per turn (colour, then background, then style): PSNR to the right answer of the chain
and of one edit of the original, what the chain loses with its 95 % interval, and the drift.
"""

from __future__ import annotations

import argparse
import json

import torch

from rectiflow import load
from rectiflow.evaluate.emoji_chains import measure_chains


def main() -> None:
    """Measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    model = load("emoji-sd3", dtype=getattr(torch, given.dtype))
    rows = measure_chains(model, given.preset, limit=given.limit, num_inference_steps=given.steps)
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    print("| turn | chain, dB | one shot, dB | the chain loses | drift, dB | samples |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        lost, drift = row["lost"], row["drift"]
        print(
            f"| {row['turn']}, {row['kind']} | {row['target_psnr']:.1f} | "
            f"{row['one_shot_psnr']:.1f} | {lost['mean']:.1f} ({lost['low']:.1f} to "
            f"{lost['high']:.1f}) | {'same' if drift is None else f'{drift:.1f}'} | "
            f"{row['nfe']:.0f} |"
        )


if __name__ == "__main__":
    main()

"""Inverting and editing with a straightened flow, beside the one that it was straightened from.

Along a straight trajectory the velocity is the same everywhere, so the one that an inversion knows
is the one that it looks for: the less S(Z), the fewer steps should bring a picture back and carry
an edit. Nothing here says that they do; the figures do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rectiflow.emoji.caption import caption
from rectiflow.emoji.edits import EditCase
from rectiflow.emoji.scene import sample
from rectiflow.errors import InputError
from rectiflow.evaluate.edit_parts import Part
from rectiflow.evaluate.edit_scores import paired
from rectiflow.evaluate.emoji_edits import BATCH, REPORTED_SEED, Benchmark, cases
from rectiflow.evaluate.flow_quality import flow_samples
from rectiflow.evaluate.inversion_error import estimate, kind
from rectiflow.invert.presets import PRESETS, Preset
from rectiflow.models.base import FlowModel
from rectiflow.straighten.training_record import short_name

STEPS = (2, 4, 8, 15, 25)
LIMIT = 48
GUIDANCE = 1.5
"""Of the target prompt: InstaFlow's for a 2-rectified flow (arXiv 2309.06380)."""

_PLAIN: dict[str, Any] = {"grid": "student"}
METHODS: dict[str, Preset] = {
    # Euler's inversion on a diffusion model's timesteps is DDIM's at the time of the state.
    "euler": PRESETS["euler"].override(_PLAIN),
    "ddim": PRESETS["ddim"].override(_PLAIN),
    "query-offset": PRESETS["directedit"].override(
        _PLAIN | {"time": "cleaner", "attention_ratio": 0.0}
    ),
    "flowedit": PRESETS["flowedit"].override(
        _PLAIN | {"strength": 0.8, "source_guidance_scale": 1.0}
    ),
}
"""Those that need no joint attention: the velocity at the time of the state, DDIM as scripts have
it, an inversion that is exact by one evaluation a step, and none."""
RECONSTRUCTED = ("euler", "ddim")
"""Whose round trip is worth a figure; the others' is exact."""
FIGURES = ("target_psnr", "inside_mse", "outside_mse", "reconstruction_psnr", "nfe")


@torch.no_grad()
def evaluate_straight_editing(
    models: Sequence[FlowModel],
    *,
    steps: Sequence[int] = STEPS,
    methods: Sequence[str] = tuple(METHODS),
    guidance_scale: float = GUIDANCE,
    limit: int = LIMIT,
    first_seed: int = REPORTED_SEED,
    batch_size: int = BATCH,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Edit the benchmark's pictures with each model, in each number of steps.

    Args:
        models: a teacher first, and what was straightened from it.
        steps: numbers of steps of a whole way.
        methods: names of `METHODS`.
        guidance_scale: of the target prompt, for every model.
        limit: edits, and trajectories that S(Z) is measured on.
        first_seed: of the edits.
        batch_size: edits at a time.
        folder: where finished parts are kept, and taken up again.

    Returns:
        ``{"n", "seeds", "guidance_scale", "references", "models": {NAME: {"kind", "weight_hash",
        "straightness": {"mean", "low", "high"}, "steps": {N: {METHOD: {FIGURE: {"mean", "low",
        "high"}}}}}}, "paired", "sentences"}`` with differences of each model from the first, per
        edit. `reconstruction_psnr` is that of the uncompensated round trip against the codec's own.

    Raises:
        InputError: there is no such method, or no model.
    """
    if not models:
        raise InputError("no model to evaluate: give one or more")
    for name in methods:
        if name not in METHODS:
            raise InputError(f"no method {name!r}; there are: {', '.join(METHODS)}")
    presets = {name: METHODS[name].override({"guidance_scale": guidance_scale}) for name in methods}
    edits = cases(limit, first_seed)
    seeds = range(first_seed, first_seed + limit)
    captions = [caption(sample(seed)) for seed in seeds]
    rows: dict[str, dict[str, Part]] = {}
    found: dict[str, Any] = {}
    references: dict[str, Any] = {}
    for model in models:
        bench = Benchmark(model, folder, None, first_seed, batch_size)
        if not references:
            for name in ("nothing", "bound"):
                references[name] = estimate(bench.run(edits, name, name).columns["target_psnr"])
        rows[model.name], by_steps = {}, {}
        for count in steps:
            by_steps[str(count)] = {
                name: _figures(part, edits)
                for name, part in _parts(bench, edits, presets, count, rows[model.name])
            }
        flow = flow_samples(model, captions, seeds, batch_size=batch_size)
        found[model.name] = {
            "kind": kind(model),
            "weight_hash": model.weight_hash,
            "straightness": estimate(flow["straightness"]),
            "steps": by_steps,
        }
    figures: dict[str, Any] = {
        "n": len(edits),
        "seeds": [edits[0].seed, edits[-1].seed],
        "guidance_scale": guidance_scale,
        "references": references,
        "models": found,
        "paired": _paired(rows),
    }
    figures["sentences"] = sentences(figures)
    return figures


def _parts(
    bench: Benchmark,
    edits: Sequence[EditCase],
    presets: Mapping[str, Preset],
    count: int,
    rows: dict[str, Part],
) -> list[tuple[str, Part]]:
    """The results of all methods in a number of steps; put among the rows as well."""
    made = []
    for name, plain in presets.items():
        strength = max(plain.strength, 1 / count)  # one step at least
        preset = plain.override({"num_inference_steps": count, "strength": strength})
        known = dataclasses.replace(bench, reconstruct=name in RECONSTRUCTED)
        part = known.run(edits, preset, f"{name} {count}")
        made.append((name, part))
        rows[f"{name}, {count}"] = part
    return made


def _figures(part: Part, edits: Sequence[EditCase]) -> dict[str, Any]:
    known = {name: part.columns[name] for name in FIGURES if name in part.columns}
    columns = {name: values[~np.isnan(values)] for name, values in known.items()}
    return {name: estimate(values) for name, values in columns.items() if len(values)}


def _paired(rows: Mapping[str, Mapping[str, Part]]) -> dict[str, Any]:
    """What each model has more than the first, per edit."""
    teacher, *others = rows
    return {
        f"{model} - {teacher}": {
            point: {
                name: paired(part.columns[name], rows[teacher][point].columns[name])
                for name in ("target_psnr", "reconstruction_psnr")
                if name in part.columns
            }
            for point, part in rows[model].items()
        }
        for model in others
    }


def sentences(figures: Mapping[str, Any]) -> list[str]:
    """What follows from the figures, a sentence for each model beside the first."""
    models = figures["models"]
    teacher, *others = models
    said = []
    for model in others:
        found = figures["paired"][f"{model} - {teacher}"]
        s, before = (models[name]["straightness"]["mean"] for name in (model, teacher))
        ours, first = (short_name(Path(name)) for name in (model, teacher))
        text = f"S(Z) is {s:.3g} for {ours} and {before:.3g} for {first}. "
        trips = {point: pair["reconstruction_psnr"] for point, pair in found.items()
                 if "reconstruction_psnr" in pair}  # fmt: skip
        edits = {point: pair["target_psnr"] for point, pair in found.items()}
        text += _told("A round trip", trips) + " " + _told("An edit", edits)
        said.append(text)
    return said


def _told(what: str, pairs: Mapping[str, Mapping[str, float]]) -> str:
    """How often differences are decided for one side, and the largest and smallest of them."""
    if not pairs:
        return f"{what} was not measured."
    better = [point for point, pair in pairs.items() if pair["low"] > 0]
    worse = [point for point, pair in pairs.items() if pair["high"] < 0]
    ends = [max(pairs, key=lambda p: pairs[p]["mean"]), min(pairs, key=lambda p: pairs[p]["mean"])]
    shown = "; ".join(
        f"{pairs[p]['mean']:+.2f} dB by {p} steps (95 % interval {pairs[p]['low']:+.2f} to "
        f"{pairs[p]['high']:+.2f})"
        for p in dict.fromkeys(ends)
    )
    return (
        f"{what} is nearer to its target with it in {len(better)} of {len(pairs)} settings and "
        f"farther in {len(worse)}: between {shown}."
    )

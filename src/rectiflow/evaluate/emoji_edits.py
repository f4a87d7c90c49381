"""The emoji benchmark of editing: fixed edits whose right answer is known to the pixel.

Every method inverts the same pictures and edits them towards the same prompts; what it makes is
compared with the true target. Differences between methods are paired per edit: the spread between
edits is ten times the difference between methods.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from rectiflow.emoji.edits import KINDS, EditCase, sample_edit
from rectiflow.emoji.render import render_array
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.presets import PRESETS, Preset
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer.alignment import align
from rectiflow.steer.editing import edit_latents
from rectiflow.steer.task import EditTask

SIZE = 64
TUNING_SEED = 1_000_000
REPORTED_SEED = 2_000_000
PER_KIND = 10
BATCH = 20
NO_OUTSIDE = 0.98
"""An edit whose mask covers more than this share of the picture has no outside."""
REFERENCES = ("nothing", "bound")
"""The source through the codec, and the true target through the codec."""

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """One method's figures, an entry per edit."""

    target_psnr: NDArray[np.float64]
    """The whole result against the true target, dB."""
    inside_mse: NDArray[np.float64]
    outside_mse: NDArray[np.float64]
    """NaN for an edit without an outside."""
    nfe: NDArray[np.float64]
    """Network samples per edit, inversion included."""
    seconds: float
    """Per edit, in batches of BATCH."""


def cases(limit: int | None = None, first_seed: int = REPORTED_SEED) -> list[EditCase]:
    """The benchmark's edits, kind after kind in turn, so that any first n are balanced.

    Args:
        limit: how many; 10 of each kind when None.
        first_seed: reported figures use 2 000 000 and above, tuning 1 000 000 and above.
    """
    wanted = PER_KIND * len(KINDS) if limit is None else limit
    seeds = range(first_seed, first_seed + -(-wanted // len(KINDS)))
    return [sample_edit(kind, seed) for seed in seeds for kind in KINDS][:wanted]


def pictures(scenes: Sequence[Any]) -> Tensor:
    """Pictures of scenes, float32 ``[B, 3, 64, 64]`` in [0, 1]."""
    stacked = np.stack([render_array(scene, SIZE) for scene in scenes])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def edit_cases(
    model: FlowModel, batch: Sequence[EditCase], preset: Preset
) -> tuple[Tensor, NDArray[np.float64]]:
    """Invert and edit a batch of cases by a preset.

    Returns:
        The results, ``[B, 3, 64, 64]`` in [0, 1], and the network samples each cost.
    """
    latents = model.encode_image(pictures([case.source for case in batch]))
    grid = grid_for(model, preset, latents)
    source = model.encode_prompt([case.source_prompt for case in batch])
    empty = model.encode_prompt([""])
    inverted = source if preset.inversion_prompt == "source" else empty
    seeds = tuple(case.seed for case in batch)
    path = invert_latents(GuidedVelocity(model, inverted), latents, grid, preset, seeds=seeds)
    alignments = [align(model, case.source_prompt, case.target_prompt) for case in batch]
    task = EditTask(
        path=path,
        grid=grid,
        source=source,
        target=model.encode_prompt([case.target_prompt for case in batch]),
        owners=tuple(range(len(batch))),
        token_maps=torch.stack([alignment.token_map for alignment in alignments]),
        negative=empty,
        seeds=seeds,
    )
    edited = edit_latents(model, task, preset)
    nfe = path.evaluations.sum(0).double().numpy() + edited.nfe / len(batch)
    return model.decode(edited.latents).cpu(), nfe


def run_method(
    model: FlowModel, edits: Sequence[EditCase], method: str | Preset, name: str = ""
) -> tuple[Tensor, Scores]:
    """All results of a method (a preset, or one of REFERENCES), and their scores."""
    results, costs = [], []
    started = time.perf_counter()
    for batch in _batches(edits, name or str(method)):
        if method == "nothing" or method == "bound":
            shown = [case.source if method == "nothing" else case.target for case in batch]
            results.append(model.decode(model.encode_image(pictures(shown))).cpu())
            costs.append(np.zeros(len(batch)))
        else:
            preset = PRESETS[method] if isinstance(method, str) else method
            images, nfe = edit_cases(model, batch, preset)
            results.append(images)
            costs.append(nfe)
    seconds = (time.perf_counter() - started) / len(edits)
    images = torch.cat(results)
    return images, score(images, edits, np.concatenate(costs), seconds)


def score(
    images: Tensor, edits: Sequence[EditCase], nfe: NDArray[np.float64], seconds: float
) -> Scores:
    """Compare results ``[n, 3, 64, 64]`` with the true targets."""
    targets = pictures([case.target for case in edits])
    errors = (images - targets).square().mean(1).double().numpy()
    masks = np.stack([case.mask(SIZE) for case in edits])
    inside = np.array([error[mask].mean() for error, mask in zip(errors, masks, strict=True)])
    outside = np.array(
        [
            error[~mask].mean() if mask.mean() < NO_OUTSIDE else np.nan
            for error, mask in zip(errors, masks, strict=True)
        ]
    )
    psnr = -10 * np.log10(np.maximum(errors.mean((1, 2)), 1e-12))
    return Scores(psnr, inside, outside, nfe, seconds)


def evaluate_emoji_edits(
    model: FlowModel,
    *,
    limit: int | None = None,
    methods: Sequence[str] = ("euler", "ftedit", "exact"),
    first_seed: int = REPORTED_SEED,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Run methods over the benchmark.

    Returns:
        The figures as design.md's JSON has them, and each method's pictures.
    """
    edits = cases(limit, first_seed)
    pictured, scores = {}, {}
    for method in (*REFERENCES, *methods):
        pictured[method], scores[method] = run_method(model, edits, method)
    kinds = np.array([case.kind for case in edits])
    rivals = [name for name in scores if name not in ("exact", "bound")]
    figures = {
        "n": len(edits),
        "seeds": [first_seed, first_seed + -(-len(edits) // len(KINDS)) - 1],
        "model": model.name,
        "weight_hash": model.weight_hash,
        "methods": {name: _summary(result, kinds) for name, result in scores.items()},
        "paired": {
            f"exact - {rival}": paired(scores["exact"].target_psnr, scores[rival].target_psnr)
            for rival in rivals
            if "exact" in scores
        },
    }
    return figures, pictured


def paired(one: NDArray[np.float64], other: NDArray[np.float64]) -> dict[str, float]:
    """Mean difference per edit with its 95 % interval (bootstrap over edits, 10 000 draws)."""
    difference = one - other
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(difference), (10_000, len(difference)))
    low, high = np.quantile(difference[draws].mean(1), (0.025, 0.975))
    return {"mean": float(difference.mean()), "low": float(low), "high": float(high)}


def _summary(scores: Scores, kinds: NDArray[np.str_]) -> dict[str, Any]:
    known = ~np.isnan(scores.outside_mse)
    return {
        "target_psnr": float(scores.target_psnr.mean()),
        "inside_mse": float(scores.inside_mse.mean()),
        "outside_mse": float(scores.outside_mse[known].mean()) if known.any() else None,
        "outside_n": int(known.sum()),
        "nfe": float(scores.nfe.mean()),
        "seconds": scores.seconds,
        "by_kind": _by_kind(scores.target_psnr, kinds),
    }


def _by_kind(values: NDArray[np.float64], kinds: NDArray[np.str_]) -> Mapping[str, float]:
    return {str(kind): float(values[kinds == kind].mean()) for kind in dict.fromkeys(kinds)}


def _batches(edits: Sequence[EditCase], name: str) -> Iterator[Sequence[EditCase]]:
    starts = range(0, len(edits), BATCH)
    for start in tqdm(starts, desc=name, disable=None, unit="batch"):
        yield edits[start : start + BATCH]

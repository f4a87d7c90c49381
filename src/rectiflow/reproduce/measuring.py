"""The rows of a study: pictures of held-out captions, and trajectories from held-out noise."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rectiflow.emoji.vae import HELD_OUT
from rectiflow.evaluate.clip_features import image_features
from rectiflow.evaluate.emoji_models import load_clip
from rectiflow.evaluate.flow_quality import described, flow_quality
from rectiflow.evaluate.frechet import GaussianStatistics, frechet_estimate
from rectiflow.evaluate.picture_quality import draw, reference_statistics, score_pictures
from rectiflow.models.load import WEIGHTS, load
from rectiflow.models.prompts import Conditioning
from rectiflow.reproduce.study import Flow, Pictures, Store
from rectiflow.reproduce.training import captions
from rectiflow.straighten import monitor
from rectiflow.straighten.reading import PairStore

if TYPE_CHECKING:
    from rectiflow.models.base import FlowModel
    from rectiflow.reproduce.workshop import Workshop

REFERENCE = 5000
"""True pictures that Fréchet distances are measured against, whatever the number of drawn ones."""
COMPARED = 1000
"""Fréchet distances are also taken of so many, since those of unequal numbers do not compare."""
BATCH = 50
FEW_STEPS = (1, 2, 4, 8)


def measure_pictures(workshop: Workshop, row: Pictures) -> None:
    """Draw a row's pictures, keep them, and write its figures.

    Picture i has the caption of the held-out scene i and noise of that scene's seed: all rows have
    the same.
    """
    seeds = range(HELD_OUT, HELD_OUT + row.num)
    model = load(workshop.model(row.model), dtype=workshop.dtype)
    if row.spacing is not None:
        model.pipeline.scheduler.register_to_config(timestep_spacing=row.spacing)
    started = time.perf_counter()
    drawn = draw(
        model,
        seeds,
        num_inference_steps=row.num_inference_steps,
        guidance_scale=row.guidance_scale,
        solver=row.solver,
        grid=None if row.solver else "student",
        batch_size=BATCH,
    )
    seconds = time.perf_counter() - started
    clip = load_clip(WEIGHTS / "emoji-clip")
    reference = _reference(workshop)
    scores = score_pictures(drawn, seeds, clip=clip, reference=reference, judged=row.judged)
    first = frechet_estimate(image_features(clip, drawn[:COMPARED]), reference)
    figures = scores.summary() | {
        "frechet_of_first": {
            "n": min(COMPARED, row.num),
            "value": first.value,
            "standard_error": first.standard_error,
        },
        "likeness": {name: _likeness(workshop, drawn, name) for name in row.against},
    }
    file = workshop.path(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    _keep(file.with_suffix(".npz"), drawn)
    _write(
        file,
        figures
        | {
            "model": row.model,
            "num_inference_steps": row.num_inference_steps,
            "guidance_scale": row.guidance_scale,
            "solver": row.solver or "euler",
            "seconds_drawing": seconds,
            **_circumstances(workshop, model),
        },
    )


def pictures(workshop: Workshop, name: str) -> NDArray[np.uint8]:
    """The pictures of a row, uint8 [N, 64, 64, 3]."""
    item = workshop.study.item(name)
    assert isinstance(item, Pictures)
    with np.load(workshop.path(item).with_suffix(".npz")) as kept:
        found: NDArray[np.uint8] = kept["pictures"]
    return found


def measure_flow(workshop: Workshop, row: Flow) -> None:
    """Follow held-out noise accurately; how straight that is, how far, and what few steps miss."""
    seeds = range(HELD_OUT, HELD_OUT + row.num)
    model = load(workshop.model(row.model), dtype=workshop.dtype)
    figures: dict[str, Any] = {}
    if row.straight:
        figures |= flow_quality(
            model, captions(seeds), seeds, guidance_scale=row.guidance_scale, batch_size=BATCH
        )
    if row.pairs is not None:
        store = workshop.study.item(row.pairs)
        assert isinstance(store, Store)
        figures["pair_error"] = few_step_errors(model, PairStore.open(workshop.path(store)))
    _write(
        workshop.path(row),
        figures | {"model": row.model, **_circumstances(workshop, model)},
    )


@torch.no_grad()
def few_step_errors(model: FlowModel, store: PairStore) -> dict[str, dict[str, Any]]:
    """How far k Euler steps end from the latents of pairs, by k: mean squares per dimension."""
    found: dict[str, list[float]] = {str(k): [] for k in FEW_STEPS}
    for first in range(0, store.manifest.num, BATCH):
        batch = store.pairs(range(first, min(first + BATCH, store.manifest.num)))
        cond: Conditioning = model.encode_prompt(batch.prompts)
        for k in FEW_STEPS:
            end = monitor.few_steps(model, cond, batch.x_0.to(model.device), k)
            found[str(k)] += monitor.mean_square(end - batch.x_1.to(end)).tolist()
    return {k: described(errors) for k, errors in found.items()}


def _likeness(workshop: Workshop, drawn: NDArray[np.uint8], name: str) -> dict[str, Any]:
    """Mean squared distance of pixels in [0, 1] from another row's pictures of the same seeds."""
    other = pictures(workshop, name)
    n = min(len(drawn), len(other))
    a, b = (x[:n].astype(np.float64).reshape(n, -1) / 255 for x in (drawn, other))
    return described(np.square(a - b).mean(axis=1))


def _reference(workshop: Workshop) -> GaussianStatistics:
    """The statistics of true pictures; computed once for a folder."""
    file = workshop.folder / "reference.safetensors"
    if file.is_file():
        return GaussianStatistics.load(file)
    seeds = range(HELD_OUT, HELD_OUT + REFERENCE)
    found = reference_statistics(load_clip(WEIGHTS / "emoji-clip"), seeds)
    found.save(file)
    return found


def _circumstances(workshop: Workshop, model: FlowModel) -> dict[str, Any]:
    return {
        "weight_hash": model.weight_hash,
        "dtype": str(workshop.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _keep(file: Path, drawn: NDArray[np.uint8]) -> None:
    unfinished = file.with_name(f".{file.name}.tmp")
    with unfinished.open("wb") as opened:
        np.savez_compressed(opened, pictures=drawn)
    unfinished.replace(file)


def _write(file: Path, figures: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)

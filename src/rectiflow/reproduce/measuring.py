"""The rows of a study: pictures of held-out captions, and trajectories from held-out noise."""

from __future__ import annotations

import datetime
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rectiflow._version import __version__
from rectiflow.emoji.vae import HELD_OUT
from rectiflow.evaluate.clip_features import image_features
from rectiflow.evaluate.emoji_models import load_clip
from rectiflow.evaluate.flow_quality import described, flow_samples
from rectiflow.evaluate.frechet import GaussianStatistics, frechet_estimate
from rectiflow.evaluate.picture_quality import draw, reference_statistics, score_pictures
from rectiflow.files import replacing, write_whole
from rectiflow.models.load import WEIGHTS, load
from rectiflow.models.prompts import Conditioning
from rectiflow.reproduce.study import CLIP, Flow, Pictures, Store
from rectiflow.reproduce.training import captions
from rectiflow.straighten import monitor
from rectiflow.straighten.reading import PairStore
from rectiflow.straighten.text_cache import remembering_prompts

if TYPE_CHECKING:
    from rectiflow.models.base import FlowModel
    from rectiflow.reproduce.workshop import Workshop

REFERENCE = 5000
"""True pictures that Fréchet distances are measured against, whatever the number of drawn ones."""
COMPARED = 1000
"""Fréchet distances are also taken of so many, since those of unequal numbers do not compare."""
CHUNK = 500
"""Pictures that are kept together while a row is drawn."""
BATCH = 50
MARK = "fingerprint.txt"
"""What a row's kept pictures follow from."""
FEW_STEPS = (1, 2, 4, 8)


def measure_pictures(workshop: Workshop, row: Pictures) -> None:
    """Draw a row's pictures, keep them, and write its figures.

    Picture i has the caption of the held-out scene i and noise of that scene's seed: all rows have
    the same.
    """
    model = load(workshop.model(row.model), dtype=workshop.dtype)
    drawn = _drawn(workshop, row, model)
    seeds = range(HELD_OUT, HELD_OUT + row.num)
    clip = load_clip(WEIGHTS / CLIP)
    reference = _reference(workshop)
    scores = score_pictures(drawn, seeds, clip=clip, reference=reference, judged=row.judged)
    first = frechet_estimate(image_features(clip, drawn[:COMPARED]), reference)
    likeness = {name: _distances(drawn, pictures(workshop, name)) for name in row.against}
    columns = scores.columns | {f"likeness:{name}": found for name, found in likeness.items()}
    _keep(_samples_file(workshop, row), columns)
    figures = scores.summary() | {
        "frechet_of_first": {
            "n": min(COMPARED, row.num),
            "value": first.value,
            "standard_error": first.standard_error,
            "left_out": list(first.left_out),
        },
        "likeness": {name: described(found) for name, found in likeness.items()},
        "model": row.model,
        "num_inference_steps": row.num_inference_steps,
        "guidance_scale": row.guidance_scale,
        "solver": row.solver or "euler",
    }
    _write(workshop.path(row), figures | _circumstances(workshop, model))


def _drawn(workshop: Workshop, row: Pictures, model: FlowModel) -> NDArray[np.uint8]:
    """A row's pictures, `CHUNK` at a time; those that a killed process has kept are taken up.

    Unless the row, or the model that drew them, has changed since.
    """
    folder, now = workshop.pictures(row.name), workshop.fingerprints[row.name]
    mark = folder / MARK
    if not mark.is_file() or mark.read_text(encoding="utf-8") != now:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(now, encoding="utf-8")
    if row.spacing is not None:
        model.pipeline.scheduler.register_to_config(timestep_spacing=row.spacing)
    with remembering_prompts(model):
        for first, file in _chunks(workshop, row):
            if not file.is_file():
                last = min(first + CHUNK, row.num)
                drawn = draw(
                    model,
                    range(HELD_OUT + first, HELD_OUT + last),
                    num_inference_steps=row.num_inference_steps,
                    guidance_scale=row.guidance_scale,
                    solver=row.solver,
                    grid=None if row.solver else "student",
                    batch_size=BATCH,
                )
                _keep(file, {"pictures": drawn})
    return pictures(workshop, row.name)


def pictures(workshop: Workshop, name: str, limit: int | None = None) -> NDArray[np.uint8]:
    """The pictures of a row, or the first of them, uint8 [N, 64, 64, 3]."""
    item = workshop.study.item(name)
    assert isinstance(item, Pictures)
    parts = []
    for first, file in _chunks(workshop, item):
        if limit is None or first < limit:
            with np.load(file) as kept:
                parts.append(kept["pictures"])
    return np.concatenate(parts)[:limit]


def has_pictures(workshop: Workshop, name: str) -> bool:
    """Whether the first pictures of a row lie in the folder."""
    mark = workshop.pictures(name) / MARK
    if not mark.is_file() or mark.read_text(encoding="utf-8") != workshop.fingerprints[name]:
        return False
    return (workshop.pictures(name) / f"{0:05d}.npz").is_file()


def _chunks(workshop: Workshop, row: Pictures) -> list[tuple[int, Path]]:
    """The number of the first picture of each chunk, and its file."""
    folder = workshop.pictures(row.name)
    return [(first, folder / f"{first:05d}.npz") for first in range(0, row.num, CHUNK)]


def samples(workshop: Workshop, row: Pictures | Flow) -> dict[str, NDArray[np.float64]]:
    """Figures of every picture or trajectory of a row, [N] each; rows of equal seeds make pairs."""
    with np.load(_samples_file(workshop, row)) as kept:
        return {name: kept[name] for name in kept.files}


def _samples_file(workshop: Workshop, row: Pictures | Flow) -> Path:
    return workshop.path(row).with_suffix(".samples.npz")


def measure_flow(workshop: Workshop, row: Flow) -> None:
    """Follow held-out noise accurately; how straight that is, how far, and what few steps miss."""
    seeds = range(HELD_OUT, HELD_OUT + row.num)
    model = load(workshop.model(row.model), dtype=workshop.dtype)
    figures: dict[str, Any] = {"model": row.model, "guidance_scale": row.guidance_scale}
    columns: dict[str, NDArray[np.float64]] = {}
    if row.straight:
        columns = flow_samples(
            model, captions(seeds), seeds, guidance_scale=row.guidance_scale, batch_size=BATCH
        )
        figures |= {name: described(found) for name, found in columns.items()}
    if row.pairs is not None:
        store = workshop.study.item(row.pairs)
        assert isinstance(store, Store)
        errors = few_step_errors(model, PairStore.open(workshop.path(store)))
        figures |= {name: described(found) for name, found in errors.items()}
        columns |= errors
    _keep(_samples_file(workshop, row), columns)
    _write(workshop.path(row), figures | _circumstances(workshop, model))


@torch.no_grad()
def few_step_errors(model: FlowModel, store: PairStore) -> dict[str, NDArray[np.float64]]:
    """How far k Euler steps end from the latents of each pair: `error:k`, mean squares."""
    found: dict[str, list[float]] = {f"error:{k}": [] for k in FEW_STEPS}
    for first in range(0, store.manifest.num, BATCH):
        batch = store.pairs(range(first, min(first + BATCH, store.manifest.num)))
        cond: Conditioning = model.encode_prompt(batch.prompts)
        for k in FEW_STEPS:
            end = monitor.few_steps(model, cond, batch.x_0.to(model.device), k)
            found[f"error:{k}"] += monitor.mean_square(end - batch.x_1.to(end)).tolist()
    return {name: np.array(errors) for name, errors in found.items()}


def _distances(drawn: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean squared distance of pixels in [0, 1], picture by picture of equal seeds, [N]."""
    n = min(len(drawn), len(other))
    a, b = (x[:n].astype(np.float64).reshape(n, -1) / 255 for x in (drawn, other))
    found: NDArray[np.float64] = np.square(a - b).mean(axis=1)
    return found


def _reference(workshop: Workshop) -> GaussianStatistics:
    """The statistics of true pictures; computed once for a folder."""
    file = workshop.reference
    if file.is_file():
        return GaussianStatistics.load(file)
    seeds = range(HELD_OUT, HELD_OUT + REFERENCE)
    found = reference_statistics(load_clip(WEIGHTS / CLIP), seeds)
    found.save(file)
    return found


def _circumstances(workshop: Workshop, model: FlowModel) -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
        "torch": str(torch.__version__),
        "rectiflow": __version__,
        "weight_hash": model.weight_hash,
        "dtype": str(workshop.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _keep(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished, unfinished.open("wb") as opened:
        np.savez_compressed(opened, **arrays)  # type: ignore[arg-type]


def _write(file: Path, figures: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(figures, indent=2) + "\n")

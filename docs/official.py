"""What it does to a result where a preset and official code differ on purpose.

    python docs/official.py --count 4

writes `docs/results/official.json`: of each difference in `docs/methods.md` that the embedded
models can show, ``‖ours − theirs‖ / ‖theirs‖`` of the edited latents (of the noise, for DDIM), its
median and its largest value over edits of the benchmark's seeds. Theirs is written out here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rectiflow as rf
from rectiflow.emoji.edits import EditCase, sample_edit
from rectiflow.evaluate.edit_scores import pictures
from rectiflow.evaluate.emoji_edits import invert_cases
from rectiflow.invert import ddim_inversion, get_preset
from rectiflow.models import FlowModel, GuidedVelocity, SDModel
from rectiflow.steer import EditTask, edit_latents
from rectiflow.steer.alignment import NOTHING

RESULTS = Path(__file__).parent / "results" / "official.json"
FIRST_SEED = 2_000_000
KINDS = ("object", "delete", "color", "background")


def apart(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Median and largest relative distance over rows."""
    away = (ours - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
    return {"n": len(away), "median": float(away.median()), "max": float(away.max())}


def cases(kinds: tuple[str, ...], count: int) -> list[EditCase]:
    return [sample_edit(kind, FIRST_SEED + n) for n in range(count) for kind in kinds]


def leaking(model: FlowModel, task: EditTask, batch: list[EditCase]) -> EditTask:
    """FTEdit's aligner: behind its last word the target takes whatever stands at that position."""
    maps = task.token_maps.clone()
    for row, case in enumerate(batch):
        for segment in model.tokenize([case.source_prompt, case.target_prompt]):
            for place in range(segment.length):
                if segment.pad_mask[1][place] and maps[row, segment.start + place] == NOTHING:
                    maps[row, segment.start + place] = segment.start + place
    return dataclasses.replace(task, token_maps=maps)


def token_maps(model: FlowModel, count: int) -> dict[str, float]:
    batch, preset = cases(("delete",), count), get_preset("ftedit")
    task = invert_cases(model, batch, preset)
    other = leaking(model, task, batch)
    return apart(
        edit_latents(model, task, preset).latents, edit_latents(model, other, preset).latents
    )


@torch.no_grad()
def rf_inversion_times(model: FlowModel, count: int) -> dict[str, float]:
    """The inversion of diffusers' community pipeline: its k-th step from the image has the length
    of the k-th from the noise, and the network and the controller are told σ = k / (N + 1).
    """
    batch, preset = cases(KINDS, count), get_preset("rf-inversion")
    task = invert_cases(model, batch, preset)
    at_noise = invert_cases(model, batch, preset.override({"gamma": 1.0}))
    y, x, empty = at_noise.trajectory[0], task.trajectory[-1], model.encode_prompt("")
    steps = pairwise(1 - task.grid)
    for k, (sigma, following) in enumerate(steps):
        told = k / (task.steps + 1)
        u = -model.velocity(x, 1 - told, empty.rows(len(x)))
        x = x + (sigma - following) * (u + preset.gamma * ((y - x) / (1 - told) - u))
    states = task.trajectory.clone()
    states[0] = x
    other = dataclasses.replace(task, path=dataclasses.replace(task.path, trajectory=states))
    return apart(
        edit_latents(model, task, preset).latents, edit_latents(model, other, preset).latents
    )


def uniedit_maps(model: FlowModel, count: int) -> dict[str, float]:
    preset = get_preset("uniedit")
    task = invert_cases(model, cases(KINDS, count), preset)
    signed = preset.override({"disagreement": "signed"})
    return apart(
        edit_latents(model, task, preset).latents, edit_latents(model, task, signed).latents
    )


@torch.no_grad()
def trailing_ddim(model: SDModel, count: int, steps: int) -> dict[str, float]:
    """`DDIMInverseScheduler` on trailing timesteps that do not divide the table."""
    from diffusers import DDIMInverseScheduler

    batch = cases(KINDS, count)
    x = model.encode_image(pictures([case.source for case in batch]))
    cond = model.encode_prompt([case.source_prompt for case in batch])
    grid = model.student_grid(steps)
    ours = ddim_inversion(GuidedVelocity(model, cond), x, grid).trajectory[0]
    scheduler = DDIMInverseScheduler.from_config(
        model.pipeline.scheduler.config,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        x = scheduler.step(model.predict(x, timestep, cond), timestep, x).prev_sample
    return apart(ours, x * torch.hypot(grid[0], 1 - grid[0]))


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--count", type=int, default=4, help="edits of each kind")
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    flow, diffusion = rf.load("emoji-sd3"), rf.load("emoji-sd")
    assert isinstance(diffusion, SDModel)
    found: dict[str, Any] = {
        "ftedit: token maps of deletions": token_maps(flow, given.count),
        "rf-inversion: times of the inversion": rf_inversion_times(flow, given.count),
        "uniedit: signed map": uniedit_maps(flow, given.count),
        "ddim: trailing, 30 steps": trailing_ddim(diffusion, given.count, 30),
        "ddim: trailing, 50 steps": trailing_ddim(diffusion, given.count, 50),
    }
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

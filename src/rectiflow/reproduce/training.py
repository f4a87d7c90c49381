"""Stores and students of a study, by the functions behind `rectiflow pairs`, reflow and distill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rectiflow.emoji.caption import caption
from rectiflow.emoji.scene import sample
from rectiflow.emoji.vae import HELD_OUT
from rectiflow.files import write_whole
from rectiflow.models.load import load
from rectiflow.reproduce.study import Settings, Store, Student
from rectiflow.stopping import Stopped
from rectiflow.straighten.pair_maker import make_pairs
from rectiflow.straighten.phases import plan_phases, run_phases

if TYPE_CHECKING:
    from rectiflow.reproduce.workshop import Workshop

BATCH = 64


def captions(seeds: Sequence[int]) -> list[str]:
    """The captions of the embedded world's scenes."""
    return [caption(sample(seed)) for seed in seeds]


def make_store(workshop: Workshop, store: Store) -> None:
    """Make a store of pairs, or what it still lacks.

    Pair i has the caption of scene i and the seed i; held-out ones both counted from `HELD_OUT`.
    """
    first = HELD_OUT if store.held_out else 0
    make_pairs(
        load(workshop.model(store.teacher), dtype=workshop.dtype),
        captions(range(first, first + store.num)),
        workshop.path(store),
        num=store.num,
        guidance_scale=store.guidance_scale,
        solver=store.solver,
        num_inference_steps=store.num_inference_steps,
        seed=first,
        batch_size=BATCH,
    )


def train(workshop: Workshop, student: Student) -> None:
    """Train a student, or go on with it; phases that are over are passed by.

    Raises:
        Stopped: A signal or a time limit asked to stop; there is a checkpoint.
    """
    model = workshop.model(student.begins)
    for number, phase in enumerate(student.phases, 1):
        folder = workshop.phase(student, number)
        kind = phase["kind"]
        given = _given(workshop, student, phase) | {"model": model}
        plans = plan_phases(kind, given, folder)
        outcome = run_phases(plans)[-1]
        if outcome.stopped:
            raise Stopped("a signal")
        model = str(plans[-1].model)


def _given(workshop: Workshop, student: Student, phase: Settings) -> Settings:
    """The settings of a phase, with what they leave to the workshop."""
    precision = "bf16" if workshop.dtype == torch.bfloat16 else "no"
    given = {"mixed_precision": precision} | phase
    if student.pairs is not None:
        store = workshop.study.item(student.pairs)
        assert isinstance(store, Store)
        given["pairs"] = str(workshop.path(store))
    else:
        given["prompts"] = prompts_file(workshop.folder)
    return given


def prompts_file(folder: Path, count: int = 8192) -> str:
    """A file of training captions, for students that make pairs on the fly."""
    file = folder / "prompts.txt"
    if not file.is_file():
        write_whole(file, "\n".join(captions(range(count))) + "\n", shared=True)
    return str(file)

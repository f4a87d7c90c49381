"""Chains of edits whose right answers are known, turn by turn: how far do they drift?

Each chain changes a colour, then the background, then the style; what a turn should show is the
scene with all changes so far. The drift is what editing in turns loses against one edit of the
original with all changes at once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rectiflow.emoji.caption import caption
from rectiflow.emoji.edits import edit, sample_edit
from rectiflow.emoji.render import render
from rectiflow.emoji.scene import Scene
from rectiflow.evaluate.edit_scores import Column, interval, paired
from rectiflow.evaluate.emoji_edits import REPORTED_SEED
from rectiflow.invert.presets import Preset
from rectiflow.models.base import FlowModel
from rectiflow.progress import progress
from rectiflow.steer import edit_chain

KINDS = ("color", "background", "style")
"""What the turns change, in this order."""
MOST = 120.0
"""Decibels that pictures have at most, so that a mean over equal ones is finite."""


@dataclass(frozen=True)
class ChainCase:
    """One chain and its right answers."""

    scenes: tuple[Scene, ...]
    """The source, then what each turn should show."""
    seed: int

    @property
    def prompts(self) -> list[str]:
        """What each scene shows."""
        return [caption(scene) for scene in self.scenes]


def sample_chain(seed: int, kinds: Sequence[str] = KINDS) -> ChainCase:
    """The chain of a seed.

    Args:
        seed: below 1 000 000 for training, to 1 999 999 for tuning, from there for reported
            figures.
        kinds: of the turns; the first draws a scene that suits it, which has to suit the others.

    Raises:
        InputError: no such kind, or the scene does not suit a later turn.

    Example:
        >>> for prompt in sample_chain(2_000_001).prompts:
        ...     print(prompt)
        a blue square on a red background
        a yellow square on a red background
        a yellow square on a beach
        a yellow square on a beach, as a pencil sketch
    """
    first = sample_edit(kinds[0], seed)
    scenes, rng = [first.source, first.target], random.Random(f"chain {seed}")
    for kind in kinds[1:]:
        scenes.append(edit(scenes[-1], kind, rng).target)
    return ChainCase(tuple(scenes), seed)


def measure_chains(
    model: FlowModel,
    preset: str | Preset | None = None,
    *,
    limit: int = 24,
    first_seed: int = REPORTED_SEED,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Run chains and one-shot edits, and compare both with the right answers.

    Args:
        model: of the emoji world.
        preset: as `edit_chain` takes it.
        limit: how many chains.
        first_seed: of the first chain; the others count on from it.
        **settings: fields of the preset to replace.

    Returns:
        A row per turn: `kind`; `target_psnr` of the chain and `one_shot_psnr`, means in dB to the
        right answer; `lost`, the mean difference of the two with its 95 % interval (`edit_scores`);
        `drift`, the mean PSNR of one to the other, None for the first turn, in which they are the
        same; `nfe` of a turn.

    Raises:
        InputError: a setting is wrong.
        WorkError: the network returned something that is not a number.
    """
    found: list[list[tuple[float, ...]]] = []
    for seed in progress(range(first_seed, first_seed + limit), desc="chains"):
        case = sample_chain(seed)
        pictures = [render(scene, model.default_size) for scene in case.scenes]
        chain = edit_chain(
            model,
            pictures[0],
            prompts=case.prompts,
            targets=pictures[1:],
            preset=preset,
            **settings,
        )
        rows: list[tuple[float, ...]] = []
        for turn in chain.turns:
            assert turn.one_shot_distances is not None and turn.drift is not None
            values = (turn.distances.target, turn.one_shot_distances.target, turn.drift)
            rows.append((*(min(MOST, value or 0.0) for value in values), turn.nfe["total"]))
        found.append(rows)
    columns = np.array(found, dtype=np.float64)  # [chains, turns, figures]
    return [_row(kind, number, columns[:, number]) for number, kind in enumerate(KINDS)]


def _row(kind: str, number: int, figures: Column) -> dict[str, Any]:
    turns, one_shot, drift, nfe = figures.T
    return {
        "turn": number + 1,
        "kind": kind,
        "target_psnr": float(turns.mean()),
        "interval": list(interval(turns)),
        "one_shot_psnr": float(one_shot.mean()),
        "lost": paired(one_shot, turns),
        "drift": float(drift.mean()) if number else None,
        "nfe": float(nfe.mean()),
    }

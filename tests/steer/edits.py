"""Edits of latents to test editing methods on: a batch of two sources and three targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rectiflow.invert.result import InversionResult
from rectiflow.models.base import FlowModel
from rectiflow.models.prompts import Conditioning
from rectiflow.steer import EditTask, align

SOURCES = ("a red apple on the blue background", "two small cats")
TARGETS = ("a green lemon on the blue background", "a red apple", "two big cats left")
OWNERS = (0, 0, 1)
NEGATIVE = "sad"
GRID = torch.tensor([0.2, 0.3, 0.45, 0.8, 1.0])
STEPS = len(GRID) - 1
SHAPE = (4, 8, 12)


def random_path(offsets: bool = False) -> InversionResult:
    """Of two images: states that no network made, so that nothing is right by accident."""
    generator = torch.Generator().manual_seed(7)
    states = torch.randn(STEPS + 1, 2, *SHAPE, generator=generator)
    shifts = torch.randn(STEPS, 2, *SHAPE, generator=generator) if offsets else None
    return InversionResult.unsolved(list(states.flip(0)), offsets=shifts)


def task(
    model: FlowModel,
    path: InversionResult,
    targets: Sequence[str] = TARGETS,
    owners: Sequence[int] = OWNERS,
    sources: Sequence[str] = SOURCES,
    **given: Any,
) -> EditTask:
    """An edit of a path's images."""
    pairs = zip(targets, owners, strict=True)
    return EditTask(
        path=path,
        grid=GRID,
        source=model.encode_prompt(sources),
        target=model.encode_prompt(targets),
        owners=tuple(owners),
        token_maps=torch.stack([align(model, sources[o], t).token_map for t, o in pairs]),
        negative=model.encode_prompt(NEGATIVE),
        **given,
    )


def single(model: FlowModel, path: InversionResult, number: int, **given: Any) -> EditTask:
    """The target of this number by itself."""
    owner = OWNERS[number]
    own = InversionResult(
        trajectory=path.trajectory[:, [owner]],
        residuals=path.residuals[:, [owner]],
        evaluations=path.evaluations[:, [owner]],
        offsets=None if path.offsets is None else path.offsets[:, [owner]],
    )
    return task(model, own, [TARGETS[number]], [0], [SOURCES[owner]], **given)


def ask(
    model: FlowModel, prompt: str, x: Tensor, t: Tensor | float, guidance: float = 1.0
) -> Tensor:
    """``v(x, t)`` of one row ``[1, ...]`` under classifier-free guidance, as the books have it."""
    cond: Conditioning = model.encode_prompt(prompt)
    v = model.velocity(x, t, cond)
    if guidance == 1:
        return v
    return guidance * v + (1 - guidance) * model.velocity(x, t, model.encode_prompt(NEGATIVE))


@contextmanager
def counting(model: FlowModel) -> Iterator[list[int]]:
    """The rows of each call of the network."""
    calls: list[int] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(len(kwargs["hidden_states"]))

    handle = model.network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()

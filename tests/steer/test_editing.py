"""Edits on latents: what targets owe their sources, what an edit costs, masks, batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.flow.solver import integrate
from rectiflow.invert import Preset, get_preset
from rectiflow.invert.features import text_points
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.result import InversionResult
from rectiflow.models import SD3Model
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer import AdaLNReplacement, EditTask, align, controlled, edit_latents
from rectiflow.steer.controls import Rows
from rectiflow.steer.masks import DerivedMask, latent_mask
from rectiflow.steer.task import Edited
from tests.presets import FIXED_POINT
from tests.tiny import tiny_model

STEPS = 6
SOURCES = ("a red apple on the blue background", "two small cats")
TARGETS = ("a green lemon on the blue background", "a red apple", "two big cats left")
OWNERS = (0, 0, 1)
EVERYTHING: dict[str, Any] = {
    "adaln_ratio": 1.0,
    "attention_ratio": 0.5,
    "inject": "all",
    "features": ("value", "key"),
}
NOTHING: dict[str, Any] = {"adaln_ratio": 0.0, "attention_ratio": 0.0, "mask_threshold": 0.0}


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model(t5=True, medium=True)


def settings(**given: Any) -> Preset:
    """Everything that matters is said, so that tuned presets do not change these tests."""
    given = {"num_inference_steps": STEPS, "grid": "shifted", "guidance_scale": 1.0} | given
    given = {"scheme": "fixed_point", "method": "two_branch"} | given
    given = {"source_features": "recompute"} | given
    return get_preset(FIXED_POINT, **({"compensate": "both"} | NOTHING | given))


@pytest.fixture(scope="module")
def trajectory(model: SD3Model) -> Tensor:
    """Of two sources, inverted badly on purpose: one Euler step each."""
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))
    preset = settings(scheme="euler")
    grid = grid_for(model, preset, latents)
    with torch.no_grad():
        velocity = GuidedVelocity(model, model.encode_prompt(SOURCES))
        return invert_latents(velocity, latents, grid, preset).trajectory


def task(
    model: SD3Model,
    trajectory: Tensor,
    sources: Sequence[str] = SOURCES,
    targets: Sequence[str] = TARGETS,
    owners: Sequence[int] = OWNERS,
) -> EditTask:
    pairs = zip(targets, owners, strict=True)
    maps = [align(model, sources[owner], target).token_map for target, owner in pairs]
    return EditTask(
        path=InversionResult.unsolved([*trajectory.flip(0)]),
        grid=grid_for(model, settings(), trajectory[0]),
        source=model.encode_prompt(sources),
        target=model.encode_prompt(targets),
        owners=tuple(owners),
        token_maps=torch.stack(maps),
        negative=model.encode_prompt("sad"),
    )


@contextmanager
def counting(model: SD3Model) -> Iterator[list[int]]:
    calls: list[int] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(len(kwargs["hidden_states"]))

    handle = model.network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("controls", [NOTHING, EVERYTHING], ids=["free", "controlled"])
def test_the_same_prompt_gives_the_source_back(
    model: SD3Model, trajectory: Tensor, guidance: float, controls: dict[str, Any]
) -> None:
    same = task(model, trajectory, targets=SOURCES, owners=(0, 1))
    preset = settings(guidance_scale=guidance, **controls)
    assert (edit_latents(model, same, preset).latents - trajectory[-1]).abs().max() < 1e-4
    without = edit_latents(model, same, dataclasses.replace(preset, compensate="none"))
    assert (without.latents - trajectory[-1]).abs().max() > 1e-2
    other = edit_latents(model, task(model, trajectory), preset).latents
    assert (other - trajectory[-1][list(OWNERS)]).abs().max() > 1e-2


@torch.no_grad()
def reference(model: SD3Model, work: EditTask, preset: Preset, target: int) -> Tensor:
    """One target by the equations: one row at a time, features replaced where due."""
    owner = work.owners[target]
    source_row, target_row = work.source[owner], work.target[target]
    assert work.negative is not None
    source = work.trajectory[0, [owner]]
    x = source
    steps = len(work.grid) - 1
    until = int(preset.adaln_ratio * steps + 1e-9)
    replaced = AdaLNReplacement(work.token_maps[[target]], until, text_points(model))

    def guided(conditional: Tensor, state: Tensor, t: Tensor) -> Tensor:
        assert work.negative is not None
        unconditional = model.velocity(state, t, work.negative)
        return preset.guidance_scale * conditional + (1 - preset.guidance_scale) * unconditional

    for step in range(steps):
        t, h = work.grid[step], work.grid[step + 1] - work.grid[step]
        if preset.compensate != "none":
            source = work.trajectory[step, [owner]]
        with controlled(model, [replaced]) as network:
            both = model.encode_prompt([SOURCES[owner], TARGETS[target]])
            pair = network.velocity(torch.cat([source, x]), t, both, step, Rows((1,), (0,), (0,)))
        v_source = guided(model.velocity(source, t, source_row), source, t)
        v_target = guided(pair[1:], x, t)
        if preset.compensate == "both":
            v_target = v_target + (work.trajectory[step + 1, [owner]] - source) / h - v_source
        source, x = source + h * v_source, x + h * v_target
    assert len(target_row) == 1
    return x[0]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("adaln_ratio", [0.0, 0.5])
@pytest.mark.parametrize("compensate", ["none", "source", "both"])
def test_compensation_by_the_equations(
    model: SD3Model, trajectory: Tensor, compensate: str, adaln_ratio: float, guidance: float
) -> None:
    work = task(model, trajectory)
    preset = settings(compensate=compensate, adaln_ratio=adaln_ratio, guidance_scale=guidance)
    edited = edit_latents(model, work, preset).latents
    for target in (0, 2):
        expected = reference(model, work, preset, target)
        torch.testing.assert_close(edited[target], expected, atol=1e-4, rtol=0)


def test_with_nothing_asked_for_the_target_is_generated_from_the_noise(
    model: SD3Model, trajectory: Tensor
) -> None:
    work = task(model, trajectory)
    for guidance in (1.0, 2.0):
        preset = settings(compensate="none", guidance_scale=guidance)
        edited = edit_latents(model, work, preset)
        with torch.no_grad():
            velocity = GuidedVelocity(model, work.target, work.negative, guidance)
            free = integrate(velocity, trajectory[0][list(OWNERS)], work.grid)
        torch.testing.assert_close(edited.latents, free.x, atol=1e-5, rtol=0)
        assert edited.nfe == free.nfe and edited.mask is None


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("compensate", ["none", "source", "both"])
def test_together_is_as_one_by_one(
    model: SD3Model, trajectory: Tensor, compensate: str, guidance: float
) -> None:
    """Several targets of several sources in one batch, against one edit at a time."""
    preset = settings(compensate=compensate, guidance_scale=guidance, **EVERYTHING)
    together = edit_latents(model, task(model, trajectory), preset).latents
    for number, (target, owner) in enumerate(zip(TARGETS, OWNERS, strict=True)):
        single = task(model, trajectory[:, [owner]], [SOURCES[owner]], [target], [0])
        alone = edit_latents(model, single, preset).latents
        torch.testing.assert_close(alone[0], together[number], atol=1e-5, rtol=0)


# Rows per step of the network, for 2 sources and 3 targets.
COSTS: list[tuple[dict[str, Any], float, int]] = [
    # Nothing reads the sources: they are not evaluated.
    ({"compensate": "source"}, 1.0, 3 * STEPS),
    ({"compensate": "source"}, 2.0, 6 * STEPS),
    ({"compensate": "none"}, 1.0, 3 * STEPS),
    # Features alone are read: the sources need no unconditional row.
    ({"compensate": "source", "adaln_ratio": 1.0}, 1.0, 5 * STEPS),
    ({"compensate": "source", "adaln_ratio": 1.0}, 2.0, 8 * STEPS),
    ({"compensate": "source", "attention_ratio": 0.5}, 1.0, 3 * STEPS + 2 * 3),
    # The source's guided velocity is needed.
    ({"compensate": "both"}, 1.0, 5 * STEPS),
    ({"compensate": "both"}, 2.0, 10 * STEPS),
    ({"compensate": "none", "adaln_ratio": 0.5}, 2.0, 6 * STEPS + 4 * 3),
]


@pytest.mark.parametrize(("given", "guidance", "expected"), COSTS)
def test_cost(
    model: SD3Model, trajectory: Tensor, given: dict[str, Any], guidance: float, expected: int
) -> None:
    work = task(model, trajectory)
    with counting(model) as calls:
        edited = edit_latents(model, work, settings(guidance_scale=guidance, **given))
    assert edited.nfe == sum(calls) == expected
    assert len(calls) == STEPS  # all rows of a step go together


def masked(model: SD3Model, trajectory: Tensor, mask: Tensor, **given: Any) -> Edited:
    work = dataclasses.replace(task(model, trajectory), mask=mask)
    return edit_latents(model, work, settings(**given))


@pytest.mark.parametrize("compensate", ["none", "source", "both"])
def test_outside_a_given_mask_nothing_moves(
    model: SD3Model, trajectory: Tensor, compensate: str
) -> None:
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., 2:6, 3:9] = 1
    edited = masked(model, trajectory, mask, compensate=compensate, guidance_scale=2.0)
    source = trajectory[-1][list(OWNERS)]
    outside = (mask == 0).expand_as(source)
    assert torch.equal(edited.latents[outside], source[outside])
    assert (edited.latents - source)[~outside].abs().max() > 1e-2
    assert edited.mask is mask
    # A mask per target, everything allowed, nothing allowed.
    each = torch.stack([torch.zeros(1, 8, 12), torch.ones(1, 8, 12), mask[0]])
    result = masked(model, trajectory, each, compensate=compensate, guidance_scale=2.0).latents
    whole = edit_latents(
        model, task(model, trajectory), settings(compensate=compensate, guidance_scale=2.0)
    ).latents
    assert torch.equal(result[0], source[0])
    torch.testing.assert_close(result[1], whole[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(result[2], edited.latents[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize("compensate", ["none", "source", "both"])
def test_a_derived_mask_returns_the_rest_to_the_source(
    model: SD3Model, trajectory: Tensor, compensate: str
) -> None:
    work = task(model, trajectory)
    with counting(model) as calls:
        edited = edit_latents(model, work, settings(compensate=compensate, mask_threshold=0.9))
    assert edited.nfe == sum(calls)
    assert edited.mask is not None and edited.mask.shape == (3, 1, 8, 12)
    source = trajectory[-1][list(OWNERS)]
    outside = (edited.mask == 0).expand_as(source)
    assert outside.any() and not outside.all()
    assert torch.equal(edited.latents[outside], source[outside])


def test_a_mask_that_is_given_goes_before_a_derived_one(
    model: SD3Model, trajectory: Tensor
) -> None:
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., :4] = 1
    both = masked(model, trajectory, mask, mask_threshold=0.5)
    given = masked(model, trajectory, mask)
    assert torch.equal(both.latents, given.latents) and both.nfe == given.nfe


def test_the_disagreement_is_between_the_states_of_the_same_moment(
    model: SD3Model, trajectory: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under `compensate="none"` the source goes on while a mask is gathered; with one prompt for
    both there is then nothing to disagree about.
    """
    seen: list[float] = []
    monkeypatch.setattr(DerivedMask, "add", lambda self, heat: seen.append(float(heat.abs().max())))
    monkeypatch.setattr(DerivedMask, "mask", lambda self: torch.ones(1, 1, 8, 12))
    monkeypatch.setattr("rectiflow.steer.masks.MASK_STEPS", 1.0)
    same = task(model, trajectory, targets=SOURCES, owners=(0, 1))
    edit_latents(model, same, settings(compensate="none", mask_threshold=0.5))
    assert len(seen) == STEPS and max(seen) < 1e-5


def test_a_cell_counts_if_any_of_its_pixels_does() -> None:
    mask = torch.zeros(1, 1, 16, 24)
    mask[..., 5, 9] = 1.0
    cells = latent_mask(mask, (1, 4, 4, 6))
    assert cells.nonzero().tolist() == [[0, 0, 1, 2]] and cells.max() == 1.0


def test_the_callback_sees_every_step(model: SD3Model, trajectory: Tensor) -> None:
    work, seen = task(model, trajectory), []
    edited = edit_latents(
        model, work, settings(), lambda step, t, x: seen.append((step, float(t), x))
    )
    assert [(step, t) for step, t, _ in seen] == list(enumerate(work.grid[1:].tolist()))
    assert torch.equal(seen[-1][2], edited.latents)

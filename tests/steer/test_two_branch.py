"""Two branches: kept features for recomputed ones, what either costs, and every scheme's solver."""

from __future__ import annotations

import copy
import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.flow.solver import AdamsBashforth2, Midpoint, Solver
from rectiflow.invert import Preset, get_preset
from rectiflow.invert.euler import EulerInversion
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.result import InversionResult
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models import SD3Model
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer import EditTask, edit_latents
from rectiflow.steer.task import Edited
from tests.steer import edits
from tests.steer.edits import OWNERS, SOURCES, TARGETS, counting
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model

STEPS = 5
ROWS = len(TARGETS)
QUERY: dict[str, Any] = {
    "scheme": "fixed_point",
    "iterations": 1,
    "warm_start": True,
    "stop_at_query": True,
}
UNEVEN = QUERY | {"iterations": 6, "tolerance": 3e-2}
SOLVED = QUERY | {"iterations": 60, "tolerance": 1e-6}
OFFSET = {"scheme": "query_offset"}


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model(t5=True)


def settings(scheme: dict[str, Any], **given: Any) -> Preset:
    """Everything that matters is said, so that tuned presets do not change these tests."""
    chosen: dict[str, Any] = {
        "compensate": "both",
        "adaln_ratio": 0.6,
        "attention_ratio": 0.4,
        "source_features": "inversion",
    }
    return get_preset(
        Preset(reference="none", num_inference_steps=STEPS), **(chosen | scheme | given)
    )


def inverted(model: FlowModel, preset: Preset) -> tuple[InversionResult, Tensor]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, model.channels, 8, 12, generator=generator)
    latents[1] *= 0.2  # rows that are hard to different degrees
    grid = grid_for(model, preset, latents)
    velocity = GuidedVelocity(model, model.encode_prompt(SOURCES))
    return invert_latents(velocity, latents, grid, preset), grid


def work(model: FlowModel, preset: Preset, **given: Any) -> EditTask:
    """Three targets of two sources, inverted as the preset says."""
    path, grid = inverted(model, preset)
    return dataclasses.replace(edits.task(model, path, **given), grid=grid)


def cost(model: FlowModel, task: EditTask, preset: Preset) -> tuple[Edited, int]:
    """The edit, and the rows that went through the network as a hook on it sees them."""
    with counting(model) as calls:
        edited = edit_latents(model, task, preset)
    assert edited.nfe == sum(calls)
    return edited, sum(calls)


def recomputed(preset: Preset) -> Preset:
    return dataclasses.replace(preset, source_features="recompute")


def assert_same(one: Edited, two: Edited) -> None:
    torch.testing.assert_close(one.latents, two.latents, atol=1e-4, rtol=0)


def assert_as_alone(model: FlowModel, task: EditTask, preset: Preset, edited: Edited) -> None:
    """Each target by itself comes to what it came to in company."""
    for number, (target, owner) in enumerate(zip(TARGETS, OWNERS, strict=True)):
        path = InversionResult.unsolved([*task.trajectory[:, [owner]].flip(0)])
        if (store := task.path.features) is not None:
            path = dataclasses.replace(path, features=copy.copy(store))
            own = {k: {p: f[[owner]] for p, f in kept.items()} for k, kept in store._kept.items()}
            assert path.features is not None
            path.features._kept = own
        alone = edits.task(model, path, [target], [0], [SOURCES[owner]])
        found = edit_latents(model, dataclasses.replace(alone, grid=task.grid), preset)
        torch.testing.assert_close(found.latents[0], edited.latents[number], atol=1e-5, rtol=0)


# A source that runs free leaves its path unless the path is exact, as these are.
@pytest.mark.parametrize(
    ("scheme", "compensate"),
    [
        (QUERY, "source"),
        (QUERY, "both"),
        (UNEVEN, "source"),
        (UNEVEN, "both"),
        (SOLVED, "none"),
        (OFFSET, "none"),
        (OFFSET, "source"),
        (OFFSET, "both"),
    ],
)
def test_kept_features_do_what_recomputed_ones_do(
    model: SD3Model, scheme: dict[str, Any], compensate: str
) -> None:
    preset = settings(scheme, compensate=compensate)
    task = work(model, preset)
    if scheme is UNEVEN:
        evaluations = task.path.evaluations
        assert (evaluations[:, 0] != evaluations[:, 1]).any()
    kept, samples = cost(model, task, preset)
    again, more = cost(model, task, recomputed(preset))
    assert_same(kept, again)
    assert samples == STEPS * ROWS < more
    free, _ = cost(model, task, dataclasses.replace(preset, adaln_ratio=0.0, attention_ratio=0.0))
    assert (free.latents - kept.latents).abs().max() > 1e-3  # the features matter


@pytest.mark.parametrize("compensate", ["none", "source", "both"])
def test_under_guidance(model: SD3Model, compensate: str) -> None:
    """The sources' guided velocity is not known from the inversion; features are."""
    preset = settings(OFFSET, compensate=compensate, guidance_scale=2.0)
    task = work(model, preset)
    kept, samples = cost(model, task, preset)
    again, more = cost(model, task, recomputed(preset))
    if compensate != "none":  # guided, a free source is not on its path any more
        assert_same(kept, again)
    assert samples <= more
    if compensate == "both":
        assert samples == more == STEPS * 2 * (ROWS + 2)
        same = work(model, preset, targets=SOURCES, owners=(0, 1))
        assert (edit_latents(model, same, preset).latents - same.trajectory[-1]).abs().max() < 1e-4
    else:
        assert samples == STEPS * 2 * ROWS


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_it_is_all_one_where_features_are_kept(model: SD3Model, where: str) -> None:
    preset = settings(QUERY, keep_features=where)
    task, memory = work(model, preset), settings(QUERY)
    expected = edit_latents(model, work(model, memory), memory)
    assert torch.equal(edit_latents(model, task, preset).latents, expected.latents)
    store = task.path.features
    assert store is not None
    if where == "disk":
        assert store._folder is not None
        folder = Path(store._folder.name)
        assert folder.exists()
        del store, task
        gc.collect()
        assert not folder.exists()


WANTING: dict[str, dict[str, Any]] = {
    "longer": {"attention_ratio": 0.8},
    "longest": {"adaln_ratio": 1.0},
    "keys": {"features": ("value", "key")},
    "text": {"inject": "all"},
}


@pytest.mark.parametrize("compensate", ["none", "source", "both"])
@pytest.mark.parametrize("more", WANTING)
def test_what_was_not_kept_is_computed_again(model: SD3Model, more: str, compensate: str) -> None:
    """An inversion is used again by an edit that wants more of it than was recorded."""
    recorded = settings(OFFSET, compensate=compensate)
    task = work(model, recorded)
    preset = dataclasses.replace(recorded, **WANTING[more])
    assert task.path.features is not None
    lacking = {"longer": 2, "longest": 2, "keys": 2, "text": 2}[more]  # of 5 steps
    edited, samples = cost(model, task, preset)
    again, everything = cost(model, task, recomputed(preset))
    assert_same(edited, again)
    assert samples == STEPS * ROWS + 2 * lacking
    assert everything > samples


def test_a_path_without_features_computes_them(model: SD3Model) -> None:
    """Read from a file, say: it has the velocities, and not the features."""
    preset = settings(OFFSET)
    task = work(model, preset)
    bare = dataclasses.replace(task, path=dataclasses.replace(task.path, features=None))
    edited, samples = cost(model, bare, preset)
    assert_same(edited, edit_latents(model, task, preset))
    assert samples == STEPS * ROWS + 2 * 3  # text for three steps, values within them


@pytest.mark.parametrize("source_features", ["recompute", "inversion"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_prompt_gives_the_source_back(
    model: SD3Model, scheme: Any, source_features: Any
) -> None:
    for guidance in (1.0, 2.0):
        preset = settings(
            {"scheme": scheme}, source_features=source_features, guidance_scale=guidance
        )
        task = work(model, preset, targets=SOURCES, owners=(0, 1))
        edited, _ = cost(model, task, preset)
        assert (edited.latents - task.trajectory[-1]).abs().max() < 1e-4


@pytest.mark.parametrize("source_features", ["recompute", "inversion"])
def test_a_network_with_guidance_as_input_gives_the_source_back(source_features: str) -> None:
    """Inversion ran with another input, so what it found cannot stand for the guided source."""
    flux = tiny_flux_model()
    preset = settings(OFFSET, source_features=source_features, guidance_scale=3.0)
    for true_cfg_scale in (1.0, 2.0):
        chosen = dataclasses.replace(preset, true_cfg_scale=true_cfg_scale)
        task = work(flux, chosen, targets=SOURCES, owners=(0, 1))
        edited, _ = cost(flux, task, chosen)
        assert (edited.latents - task.trajectory[-1]).abs().max() < 1e-4


class Generated(EulerInversion):
    """Euler's inversion, generated by a solver of higher order."""

    def __init__(self, solver: type[Solver]) -> None:
        self.made = solver

    def solver(self, path: InversionResult, grid: Tensor, rows: Tensor) -> Solver:
        return self.made()


@pytest.mark.parametrize("compensate", ["none", "source", "both"])
@pytest.mark.parametrize(("solver", "evaluations"), [(Midpoint, 2), (AdamsBashforth2, 1)])
def test_solvers_with_inner_evaluations_and_with_memory(
    model: SD3Model,
    monkeypatch: pytest.MonkeyPatch,
    solver: type[Solver],
    evaluations: int,
    compensate: str,
) -> None:
    """Sources leave the batch once they are no longer needed, and a solver's memory with them."""
    monkeypatch.setitem(SCHEMES, "euler", Generated(solver))
    preset = settings({"scheme": "euler"}, compensate=compensate, source_features="recompute")
    task = work(model, preset)
    edited, samples = cost(model, task, preset)
    with_source = STEPS if compensate == "both" else 3  # text for three steps of five
    assert samples == evaluations * (STEPS * ROWS + 2 * with_source)
    assert_as_alone(model, task, preset, edited)
    if compensate == "none":  # by the solver alone, where no control acts
        free = dataclasses.replace(preset, adaln_ratio=0.0, attention_ratio=0.0)
        x, memory, field = (
            task.trajectory[0][list(OWNERS)],
            None,
            GuidedVelocity(model, task.target),
        )
        for step in range(STEPS):
            x, memory = solver().step(field, x, task.grid[step], task.grid[step + 1], step, memory)
        torch.testing.assert_close(edit_latents(model, task, free).latents, x, atol=1e-5, rtol=0)


def test_sources_that_come_in_later_find_no_memory(
    model: SD3Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of the first two steps are kept and those of the next two are wanted as well."""
    monkeypatch.setitem(SCHEMES, "euler", Generated(AdamsBashforth2))
    recorded = settings({"scheme": "euler"}, compensate="source", adaln_ratio=0.0)
    task = work(model, recorded)
    preset = dataclasses.replace(recorded, attention_ratio=0.8)
    edited, samples = cost(model, task, preset)
    assert samples == STEPS * ROWS + 2 * 2
    assert_as_alone(model, task, preset, edited)


@pytest.mark.parametrize("compensate", ["none", "source", "both"])
def test_a_derived_mask_with_kept_features(model: SD3Model, compensate: str) -> None:
    preset = settings(OFFSET, compensate=compensate, mask_threshold=0.9)
    task = work(model, preset)
    kept, samples = cost(model, task, preset)
    again, more = cost(model, task, recomputed(preset))
    assert kept.mask is not None and again.mask is not None and kept.mask.shape == (3, 1, 8, 12)
    torch.testing.assert_close(kept.mask, again.mask, atol=1e-3, rtol=0)
    torch.testing.assert_close(kept.latents, again.latents, atol=1e-3, rtol=0)
    assert samples == (STEPS * ROWS if compensate != "none" else more) <= more
    outside = (kept.mask == 0).expand_as(kept.latents)
    assert outside.any() and not outside.all()
    assert torch.equal(kept.latents[outside], task.trajectory[-1][list(OWNERS)][outside])

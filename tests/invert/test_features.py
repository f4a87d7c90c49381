"""Features kept from an inversion: which, of which evaluation, where, and what they weigh."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.invert import Preset, get_preset
from rectiflow.invert.features import (
    FeatureStore,
    attention_points,
    recorded_bytes,
    text_points,
    wanted_features,
)
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.result import InversionResult
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.taps import Point, every_point, tapped
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model

STEPS = 5
PROMPTS = ("a red apple on the blue background", "two small cats")
QUERY: dict[str, Any] = {
    "scheme": "fixed_point",
    "iterations": 1,
    "tolerance": 0.0,
    "warm_start": True,
    "stop_at_query": True,
}
UNEVEN = QUERY | {"iterations": 6, "tolerance": 3e-2}
"""Rows are done with a step at different iterations."""
SCHEMES: dict[str, dict[str, Any]] = {
    "query": QUERY,
    "uneven": UNEVEN,
    "offset": {"scheme": "query_offset"},
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd3", "flux"])
def model(request: pytest.FixtureRequest) -> FlowModel:
    return tiny_model(t5=True) if request.param == "sd3" else tiny_flux_model()


@pytest.fixture(scope="module")
def sd3() -> FlowModel:
    return tiny_model()


def settings(scheme: dict[str, Any], **given: Any) -> Preset:
    """Text for four steps of five, keys and values for two."""
    kept: dict[str, Any] = {
        "adaln_ratio": 0.8,
        "attention_ratio": 0.4,
        "features": ("key", "value"),
        "source_features": "inversion",
    }
    return get_preset(
        Preset(reference="none", num_inference_steps=STEPS), **(scheme | kept | given)
    )


def inverted(model: FlowModel, preset: Preset) -> tuple[InversionResult, Tensor]:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, model.channels, 8, 12, generator=generator)
    # Two rows that are hard to different degrees.
    latents[1] *= 0.2
    grid = grid_for(model, preset, latents)
    velocity = GuidedVelocity(model, model.encode_prompt(PROMPTS))
    return invert_latents(velocity, latents, grid, preset), grid


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kept_is_what_the_generating_step_would_find(model: FlowModel, scheme: str) -> None:
    """At `x_i` plus the offset if there is one, row by row, at every point and step wanted."""
    preset = settings(SCHEMES[scheme])
    path, grid = inverted(model, preset)
    store, wanted = path.features, wanted_features(model, preset, STEPS)
    assert store is not None and store.wanted == wanted
    texts, values = text_points(model), attention_points(model, preset)
    assert wanted == dict.fromkeys(texts, 4) | dict.fromkeys(values, 2)
    if scheme == "uneven":
        assert (path.evaluations[:, 0] != path.evaluations[:, 1]).any()
    cond = GuidedVelocity(model, model.encode_prompt(PROMPTS)).cond
    for step in range(STEPS):
        points = [point for point, steps in wanted.items() if step < steps]
        assert store.points(step) == points
        found: dict[Point, Tensor] = {}
        x, t = path.trajectory[step], grid[step]
        if path.offsets is not None:
            x, t = x + path.offsets[step], grid[step + (preset.time == "cleaner")]
        with tapped(model, points) as network:
            v = network.velocity(x, t, cond, lambda p, f, into=found: into.setdefault(p, f))
        assert path.velocities is not None
        torch.testing.assert_close(path.velocities[step], v, atol=1e-4, rtol=1e-4)
        for point in points:
            torch.testing.assert_close(
                store.get(step, 0, point, CPU), found[point], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("scheme", ["query", "offset"])
def test_recording_changes_nothing(model: FlowModel, scheme: str) -> None:
    kept, _ = inverted(model, settings(SCHEMES[scheme]))
    plain, _ = inverted(model, settings(SCHEMES[scheme], source_features="recompute"))
    assert plain.features is None and kept.features is not None
    assert torch.equal(kept.trajectory, plain.trajectory)
    assert torch.equal(kept.evaluations, plain.evaluations)
    modules = model.network.modules()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize("inject", ["image", "all"])
def test_the_estimate_is_the_real_size(model: FlowModel, inject: str) -> None:
    preset = settings(QUERY, inject=inject, first_site=0.5)
    path, _ = inverted(model, preset)
    assert path.features is not None
    text = model.encode_prompt("").embeds.shape[1]
    wanted = wanted_features(model, preset, STEPS)
    size = recorded_bytes(model, wanted, image_tokens=24, text_tokens=text, rows=2)
    assert size == path.features.nbytes > 0


def test_in_half_precision_it_is_half_as_large() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    preset = settings(QUERY)
    path, _ = inverted(model, preset)
    assert path.features is not None
    text = model.encode_prompt("").embeds.shape[1]
    wanted = wanted_features(model, preset, STEPS)
    size = recorded_bytes(model, wanted, image_tokens=24, text_tokens=text, rows=2)
    assert size == path.features.nbytes
    assert path.trajectory.dtype == torch.float32


def test_nothing_is_kept_that_nobody_will_want(sd3: FlowModel) -> None:
    for given in (
        {"source_features": "recompute"},
        {"adaln_ratio": 0.0, "attention_ratio": 0.0},
        {"adaln_ratio": 0.1, "attention_ratio": 0.1},  # no step of five
    ):
        preset = settings(QUERY, **given)
        assert wanted_features(sd3, preset, STEPS) == {}
        assert inverted(sd3, preset)[0].features is None


def test_the_disk_holds_the_same_and_is_left_clean(sd3: FlowModel) -> None:
    stores = {}
    for where in ("memory", "cpu", "disk"):
        path, _ = inverted(sd3, settings(QUERY, keep_features=where))
        assert path.features is not None
        stores[where] = path.features
    for step in range(4):
        for point in stores["memory"].points(step):
            expected = stores["memory"].get(step, 0, point, CPU)
            for where in ("cpu", "disk"):
                assert torch.equal(stores[where].get(step, 0, point, CPU), expected)
    disk = stores.pop("disk")
    assert disk.nbytes == 0 and disk._folder is not None
    folder = Path(disk._folder.name)
    assert len(list(folder.iterdir())) == 4  # a file for each step in which something is wanted
    del disk, path
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_store_by_itself(where: Any) -> None:
    """It has copies; a step's last evaluation stands for those after it."""
    one, two = Point(0, "text"), Point(1, "value", "image")
    store = FeatureStore({one: 2, two: 1}, where)
    features = torch.randn(2, 3, 4, 8)  # of two evaluations
    for inner in range(2):
        given = features[inner].clone()
        store.put(0, inner, one, given)
        store.put(0, inner, two, given.mul_(2))
    assert store.points(0) == [one, two] and store.points(1) == [one] and not store.points(2)
    assert not store.covers(1, [one])  # wanted, and nothing has come
    store.seal(0)
    assert store.covers(0, [one]) and store.covers(0, [one, two]) and store.covers(0, [])
    assert not store.covers(0, [one, Point(1, "key", "image")])
    for asked, kept in ((0, 0), (1, 1), (2, 1)):
        assert torch.equal(store.get(0, asked, one, CPU), features[kept])
        assert torch.equal(store.get(0, asked, two, CPU), 2 * features[kept])


def test_points_by_preset(model: FlowModel) -> None:
    sites = len(model.attention_sites())
    assert text_points(model) == [Point(site, "text") for site in range(sites)]
    preset = settings(QUERY, inject="all", features=("query", "value"), first_site=0.5)
    kinds: list[tuple[Any, Any]] = [(f, s) for f in ("query", "value") for s in ("image", "text")]
    assert attention_points(model, preset) == every_point(model, kinds, 0.5)
    assert min(point.site for point in attention_points(model, preset)) == int(sites * 0.5)

"""What every inversion scheme owes, whatever its equations."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from torch import Tensor

import rectiflow as rf
from rectiflow.invert import SCHEMES, Inversion, Preset, get_preset
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.preset import SCHEME_FIELDS, SchemeName
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import initial_noise
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.models.taps import tapped
from tests.invert.fields import GRIDS, Recorder, generated, inverted, noise_for, randn, wild
from tests.steer.edits import counting
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model

EXACT = ("query_offset", "two_step", "dna")
"""Which return without compensation, under the prompt and guidance of the inversion."""
NOISY = [name for name, scheme in SCHEMES.items() if scheme.noisy]
STEPS = 5
PROMPTS = ("a red apple", "two cats on the left", "a happy dog")
SIZES = {"square": (32, 32), "wide": (50, 30)}


@functools.cache
def network(family: str = "sd3") -> FlowModel:
    return tiny_model() if family == "sd3" else tiny_flux_model()


def path_of(name: str, grid: Tensor, rows: int = 3, velocity: Any = wild) -> Any:
    x_1 = randn(rows, 4)
    return inverted(name, velocity, x_1, grid, noise_for(name, x_1, grid))


def test_every_name_that_a_preset_may_give_is_there() -> None:
    assert set(SCHEMES) == set(get_args(SchemeName))
    assert all(scheme.name == name for name, scheme in SCHEMES.items())
    assert set(SCHEME_FIELDS) <= set(SCHEMES)
    # A scheme that draws noise reads its seed, and no other does.
    assert {name for name, fields in SCHEME_FIELDS.items() if "noise_seed" in fields} == set(NOISY)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCHEMES)
def test_result(name: str, grid: str) -> None:
    points, velocity = GRIDS[grid](STEPS), Recorder()
    path = path_of(name, points, velocity=velocity)
    assert path.trajectory.shape == (STEPS + 1, 3, 4)
    assert path.trajectory.dtype == torch.float64 and path.trajectory.isfinite().all()
    assert torch.equal(path.trajectory[-1], randn(3, 4))
    assert path.residuals.shape == path.evaluations.shape == (STEPS, 3)
    assert path.evaluations.sum() == sum(len(x) for x, _, _ in velocity.calls)
    assert path.scheme is None and path.features is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCHEMES)
def test_one_step_and_half_precision_answers(name: str, dtype: torch.dtype) -> None:
    grid, x_1 = torch.tensor([0.4, 1.0], dtype=dtype), randn(2, 4).to(dtype)
    noise = noise_for(name, x_1, grid)
    path = inverted(
        name,
        lambda x, t, step: wild(x, t).bfloat16(),
        x_1,
        grid,
        None if noise is None else noise.to(dtype),
    )
    assert path.trajectory.dtype == dtype and path.trajectory.shape == (2, 2, 4)
    assert torch.equal(path.trajectory[-1], x_1)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_row_does_not_depend_on_its_company(name: str) -> None:
    points = GRIDS["shifted"](STEPS)
    x_1 = randn(3, 4)
    noise = noise_for(name, x_1, points)
    path = inverted(name, wild, x_1, points, noise)
    again = generated(name, wild, path, points)
    for row in range(3):
        drawn = None if noise is None else noise[..., [row], :]
        alone = inverted(name, wild, x_1[[row]], points, drawn)
        torch.testing.assert_close(alone.trajectory[:, 0], path.trajectory[:, row])
        back = generated(name, wild, alone, points)
        torch.testing.assert_close(back[:, 0], again[:, row])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SCHEMES)
def test_velocities_and_offsets_are_those_of_the_generating_step(name: str, grid: str) -> None:
    """Where a result has them; and the correction is what compensation adds to that step."""
    points = GRIDS[grid](STEPS)
    path = path_of(name, points)
    solver = SCHEMES[name].solver(path, points, torch.arange(3))
    if path.velocities is None:
        assert path.offsets is None and path.correction(points, 0) is None
        return
    assert path.velocities.shape == (STEPS, 3, 4)
    for step in range(STEPS):
        here, there, velocity = path.trajectory[step], path.trajectory[step + 1], Recorder()
        landed, _ = solver.step(velocity, here, points[step], points[step + 1], step, None)
        ((x, t, _),) = velocity.calls
        offset = 0 if path.offsets is None else path.offsets[step]
        torch.testing.assert_close(x, here + offset)
        torch.testing.assert_close(wild(x, t), path.velocities[step])
        torch.testing.assert_close(path.correction(points, step), there - landed)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", EXACT)
def test_exact_schemes_return_along_their_states(name: str, grid: str) -> None:
    points = GRIDS[grid](12)
    path = path_of(name, points)
    again = generated(name, wild, path, points)
    torch.testing.assert_close(again, path.trajectory, rtol=0, atol=1e-10)


def settings(name: str, **given: Any) -> Preset:
    return get_preset("euler", scheme=name, num_inference_steps=STEPS, **given)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SCHEMES)
def test_pictures_come_back(name: str, size: str, strength: float, tmp_path: Path) -> None:
    model, picture = network(), Image.effect_noise(SIZES[size], 80).convert("RGB")
    preset = settings(name, strength=strength)
    with counting(model) as calls:
        inversion = rf.invert(model, picture, PROMPTS[0], preset=preset)
    assert inversion.nfe == sum(calls)
    steps = 3 if strength == 0.6 else STEPS
    assert len(inversion.grid) == steps + 1
    assert (float(inversion.grid[0]) == 0) is (strength == 1)
    with counting(model) as calls:
        again = inversion.reconstruct()
    assert again.nfe == sum(calls)
    assert again.max_abs_latent <= 1e-4
    free = inversion.reconstruct(compensate=False)
    if name in EXACT:
        assert free.max_abs_latent <= 1e-4 and again.compensation.max() <= 1e-4
    loaded = Inversion.load(inversion.save(tmp_path / "x"), model)
    for compensate, before in ((True, again), (False, free)):
        latents = loaded.reconstruct(compensate=compensate).latents
        torch.testing.assert_close(latents, before.latents, atol=1e-5, rtol=0)
    assert again.image.size == picture.size


EACH = {
    "euler": 1,
    "query_offset": 1,
    "two_step": 1,
    "midpoint": 2,
    "fireflow": 1,
    "uni_inv": 1,
    "rf_inversion": 1,
    "dna": 1,
    "interpolation": 0,
    "renoising": 1,
}


@pytest.mark.parametrize("name", EACH)
def test_cost(name: str) -> None:
    """Per image: N, twice as much, or one more."""
    path = path_of(name, GRIDS["shifted"](STEPS))
    more = 1 if name in ("fireflow", "uni_inv") else 0
    assert path.evaluations.sum(0).tolist() == [EACH[name] * STEPS + more] * 3
    forth = Recorder()
    generated(name, forth, path, GRIDS["shifted"](STEPS))
    expected = {"midpoint": 2 * STEPS, "fireflow": STEPS + 1, "two_step": STEPS - 1}
    assert len(forth.calls) == expected.get(name, STEPS)


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("name", NOISY)
def test_noise_is_the_images_own_whatever_the_batch(name: str, family: str) -> None:
    model, seeds = network(family), (11, 12, 13)
    preset = settings(name)
    latents = torch.randn(3, model.channels, 8, 12)
    grid = grid_for(model, preset, latents)
    cond = model.encode_prompt(list(PROMPTS))
    whole = invert_latents(GuidedVelocity(model, cond), latents, grid, preset, seeds=seeds)
    for row, seed in enumerate(seeds):
        field = GuidedVelocity(model, cond[row])
        alone = invert_latents(field, latents[[row]], grid, preset, seeds=[seed])
        torch.testing.assert_close(
            alone.trajectory[:, 0], whole.trajectory[:, row], atol=1e-5, rtol=0
        )
        if name in ("interpolation", "renoising"):  # nothing of the model in it
            first = initial_noise(model, [seed], 8 * model.factor, 12 * model.factor)
            torch.testing.assert_close(alone.trajectory[0], first)
    other = invert_latents(GuidedVelocity(model, cond), latents, grid, preset, seeds=(11, 12, 14))
    same = (other.trajectory[0] - whole.trajectory[0]).abs().amax((1, 2, 3)) < 1e-5
    assert same.tolist() == [True, True, False]
    # Without seeds, the preset's for all.
    shared = invert_latents(
        GuidedVelocity(model, cond[0]), latents[[0, 0]], grid, settings(name, noise_seed=11)
    )
    torch.testing.assert_close(shared.trajectory[:, 0], whole.trajectory[:, 0], atol=1e-5, rtol=0)


RECORDED = ("euler", "query_offset", "two_step", "midpoint", "fireflow", "uni_inv", "dna")


@torch.no_grad()
@pytest.mark.parametrize("name", RECORDED)
def test_features_are_kept_of_the_evaluations_that_count(name: str) -> None:
    """Of all of a step, or of those that stand for the generating step's own."""
    model = network()
    preset = settings(name, adaln_ratio=1.0, attention_ratio=0.6, source_features="inversion")
    latents = torch.randn(2, 4, 8, 12)
    grid = grid_for(model, preset, latents)
    field = GuidedVelocity(model, model.encode_prompt(list(PROMPTS[:2])))
    store = invert_latents(field, latents, grid, preset, seeds=[1, 2]).features
    velocity = Recorder(field)
    noise = None
    if SCHEMES[name].noisy:
        noise = initial_noise(model, [1, 2], 8 * model.factor, 12 * model.factor)
    path = SCHEMES[name].invert(velocity, latents, grid, preset, noise)
    assert store is not None
    asked: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for x, t, step in velocity.calls:
        asked.setdefault(step, []).append((x, t))
    if SCHEMES[name].accepts:
        asked = {step: calls[-1:] for step, calls in asked.items()}
    kept = Counter(step for step, _ in store._kept)
    assert kept == {step: len(calls) for step, calls in asked.items()}
    for step, calls in asked.items():
        points = store.points(step)
        for inner, (x, t) in enumerate(calls):
            found: dict[Any, Tensor] = {}
            with tapped(model, points) as tap:
                tap.velocity(x, t, field.cond, lambda p, f, into=found: into.setdefault(p, f))
            for point in points:
                torch.testing.assert_close(
                    store.get(step, inner, point, latents.device),
                    found[point],
                    atol=1e-4,
                    rtol=1e-4,
                )
    if name not in EXACT:
        return
    # What the generating step asks is what was kept.
    forth = Recorder(field)
    solver = SCHEMES[name].solver(path, grid, torch.arange(2))
    x, memory = path.trajectory[0], None
    for step in range(STEPS):
        x, memory = solver.step(forth, x, grid[step], grid[step + 1], step, memory)
    for x, t, step in forth.calls:
        (kept_x, kept_t) = asked[step][-1]
        torch.testing.assert_close(x, kept_x, atol=1e-4, rtol=0)
        assert t == kept_t

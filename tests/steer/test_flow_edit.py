"""FlowEdit against its algorithm, its noise, and what it returns when nothing is to change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rectiflow.errors import InputError
from rectiflow.flow.solver import integrate
from rectiflow.invert import get_preset
from rectiflow.invert.presets import PRESETS, Preset
from rectiflow.models import SD3Model
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer import edit_latents
from tests.steer.edits import (
    GRID,
    OWNERS,
    SHAPE,
    SOURCES,
    STEPS,
    TARGETS,
    ask,
    counting,
    random_path,
    single,
    task,
)
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model

SEEDS = (11, 12)


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model()


def preset(**given: Any) -> Preset:
    plain = {"guidance_scale": 1.0, "source_guidance_scale": 1.0}
    return dataclasses.replace(PRESETS["flowedit"], **(plain | given))


@pytest.mark.parametrize("guidances", [(1.0, 1.0), (1.5, 3.0), (1.0, 2.0)])
@pytest.mark.parametrize(("n_avg", "n_min"), [(1, 0), (2, 1)])
@torch.no_grad()
def test_by_the_algorithm(
    model: SD3Model, guidances: tuple[float, float], n_avg: int, n_min: int
) -> None:
    path = random_path()
    own, other = guidances
    chosen = preset(source_guidance_scale=own, guidance_scale=other, n_avg=n_avg, n_min=n_min)
    with counting(model) as calls:
        edited = edit_latents(model, task(model, path, seeds=SEEDS), chosen)
    per_draw = 2 * (1 if own == 1 else 2) + 3 * (1 if other == 1 else 2)
    assert (
        sum(calls)
        == edited.nfe
        == ((STEPS - n_min) * n_avg * per_draw + n_min * 3 * (1 if other == 1 else 2))
    )
    for number, (prompt, owner) in enumerate(zip(TARGETS, OWNERS, strict=True)):
        draws = torch.Generator().manual_seed(SEEDS[owner])
        image = path.trajectory[-1, [owner]]
        z_edit, z = image, image
        for step in range(STEPS):
            t, h = GRID[step], GRID[step + 1] - GRID[step]
            if step < STEPS - n_min:
                delta = torch.zeros_like(image)
                for _ in range(n_avg):
                    noise = torch.randn(1, *SHAPE, generator=draws)
                    z_source = t * image + (1 - t) * noise
                    z_target = z_edit + z_source - image
                    delta += ask(model, prompt, z_target, t, other)
                    delta -= ask(model, SOURCES[owner], z_source, t, own)
                z = z_edit = z_edit + h * delta / n_avg
            else:
                if step == STEPS - n_min:
                    noise = torch.randn(1, *SHAPE, generator=draws)
                    z = z_edit + t * image + (1 - t) * noise - image
                z = z + h * ask(model, prompt, z, t, other)
        torch.testing.assert_close(edited.latents[number], z[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_where_nothing_is_to_change_the_image_returns(
    model: SD3Model, kind: str, guidance: float
) -> None:
    network = model if kind == "sd3" else tiny_flux_model()
    path = random_path()
    same = task(network, path, SOURCES, (0, 1), seeds=SEEDS)
    for given in ({}, {"n_avg": 2}):
        chosen = preset(guidance_scale=guidance, source_guidance_scale=guidance, **given)
        edited = edit_latents(network, same, chosen).latents
        torch.testing.assert_close(edited, path.trajectory[-1], atol=1e-5, rtol=0)
    other = preset(guidance_scale=guidance + 1, source_guidance_scale=guidance)
    assert (edit_latents(network, same, other).latents - path.trajectory[-1]).abs().max() > 1e-3


@torch.no_grad()
def test_a_network_with_a_guidance_input_is_told_each_prompts_own() -> None:
    """FLUX.1-dev: no second sample per row; a true guidance beside it is the same for both."""
    flux = tiny_flux_model()
    path = random_path()
    work = task(flux, path, seeds=SEEDS)
    chosen = preset(source_guidance_scale=1.5, guidance_scale=5.5)
    with counting(flux) as calls:
        edited = edit_latents(flux, work, chosen)
    assert edited.nfe == sum(calls) == 5 * STEPS
    z, image = path.trajectory[-1, [1]], path.trajectory[-1, [1]]
    draws = torch.Generator().manual_seed(SEEDS[1])
    for step in range(STEPS):
        t, h = GRID[step], GRID[step + 1] - GRID[step]
        z_source = t * image + (1 - t) * torch.randn(1, *SHAPE, generator=draws)
        v_source = flux.velocity(z_source, t, flux.encode_prompt(SOURCES[1]).with_guidance(1.5))
        asked = flux.encode_prompt(TARGETS[2]).with_guidance(5.5)
        z = z + h * (flux.velocity(z + z_source - image, t, asked) - v_source)
    torch.testing.assert_close(edited.latents[2], z[0], atol=1e-5, rtol=1e-4)
    same = task(flux, path, SOURCES, (0, 1), seeds=SEEDS)
    twice = preset(guidance_scale=2.0, source_guidance_scale=2.0, true_cfg_scale=1.5)
    with counting(flux) as calls:
        edited = edit_latents(flux, same, twice)
    assert edited.nfe == sum(calls) == 8 * STEPS
    torch.testing.assert_close(edited.latents, path.trajectory[-1], atol=1e-5, rtol=0)


def test_the_noise_of_an_image_is_its_own(model: SD3Model) -> None:
    path = random_path()
    chosen = preset(n_min=1)
    together = edit_latents(model, task(model, path, seeds=SEEDS), chosen).latents
    for number, owner in enumerate(OWNERS):
        alone = edit_latents(model, single(model, path, number, seeds=(SEEDS[owner],)), chosen)
        torch.testing.assert_close(alone.latents[0], together[number], atol=1e-5, rtol=0)
    again = edit_latents(model, task(model, path, seeds=SEEDS), chosen).latents
    assert torch.equal(again, together)
    # Without seeds of their own, all draw from the preset's.
    seeded = dataclasses.replace(chosen, noise_seed=5)
    torch.testing.assert_close(
        edit_latents(model, task(model, path), seeded).latents,
        edit_latents(model, task(model, path, seeds=(5, 5)), chosen).latents,
    )


@torch.no_grad()
def test_plain_sampling_all_the_way_is_sdedit(model: SD3Model) -> None:
    path = random_path()
    work = task(model, path, seeds=SEEDS)
    edited = edit_latents(model, work, preset(n_min=STEPS)).latents
    noise = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    noised = GRID[0] * path.trajectory[-1] + (1 - GRID[0]) * torch.stack(noise)
    velocity = GuidedVelocity(model, work.target)
    free = integrate(velocity, noised[list(OWNERS)], GRID).x
    torch.testing.assert_close(edited, free, atol=1e-5, rtol=0)


def test_more_plain_steps_than_steps() -> None:
    with pytest.raises(InputError, match="n_min is 30; at most the 24 steps that are gone"):
        get_preset("flowedit-flux", n_min=30)

"""What every preset owes, whatever its scheme and method: `rf.edit` with each of them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

import rectiflow as rf
from rectiflow.invert import PRESETS, Preset, get_preset
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.invert.schemes import SCHEMES
from rectiflow.models.base import FlowModel
from rectiflow.models.guidance import GuidedVelocity
from rectiflow.steer import METHODS, Edited, EditTask, align, edit_latents
from tests.steer.edits import OWNERS, SOURCES, TARGETS, counting
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model

PROMPT, TARGET, OTHER = "a red apple", "a green apple", "two cats on the left"
STEPS = 10
"""Few, but enough that every control of every preset has a step."""
FAMILIES = ("sd3", "flux")


@functools.cache
def network(family: str) -> FlowModel:
    return tiny_model(t5=True) if family == "sd3" else tiny_flux_model()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(skimage.data.coffee()).resize((60, 40))


def edited(family: str, source: Any, name: str, **given: Any) -> rf.EditResult:
    if not isinstance(source, rf.Inversion):
        given = {"num_inference_steps": STEPS, "source_prompt": PROMPT} | given
    return rf.edit(network(family), source, **({"prompts": TARGET, "preset": name} | given))


def test_every_preset_names_what_is_there() -> None:
    for name, preset in PRESETS.items():
        assert preset.scheme in SCHEMES and preset.method in METHODS, name
        preset.check()


@pytest.mark.parametrize(
    ("name", "family"),
    [
        # Where there is one for each family, it is tried on its own.
        (name, family)
        for name in PRESETS
        for family in FAMILIES
        if not (f"{name}-flux" in PRESETS and family == "flux")
        and not (name.endswith("-flux") and family == "sd3")
    ],
)
def test_cost_and_company(photograph: Image.Image, name: str, family: str) -> None:
    """The network samples that are reported are those of the network; prompts do not mix."""
    with counting(network(family)) as calls:
        both = edited(family, photograph, name, prompts=[TARGET, OTHER])
    assert both.nfe["total"] == sum(calls) and both.nfe["editing"] > 0
    assert [image.size for image in both.images] == [photograph.size] * 2
    assert both.latents.isfinite().all() and both.latents.dtype == torch.float32
    for number, prompt in enumerate(both.prompts):
        alone = edited(family, both.inversion, name, prompts=prompt)
        torch.testing.assert_close(alone.latents[0], both.latents[number], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_mask_callback_and_report(photograph: Image.Image, name: str) -> None:
    mask = Image.new("L", photograph.size)
    mask.paste(255, (20, 10, 40, 30))
    seen: list[tuple[int, float, Tensor]] = []
    result = edited(
        "sd3",
        photograph,
        name,
        mask=mask,
        callback_on_step_end=lambda step, t, x: seen.append((step, float(t), x)),
    )
    assert result.mask is not None
    source = result.inversion.latents
    outside = (torch.from_numpy(result.mask) == 0).expand_as(source)
    assert outside.any() and torch.equal(result.latents[outside], source[outside])
    assert not torch.equal(result.latents[~outside], source[~outside])
    times = result.inversion.grid[1:].tolist()
    assert [(step, t) for step, t, _ in seen] == list(enumerate(times))
    assert torch.equal(seen[-1][2], result.latents)
    assert result.edit_report().preset == f"{name}, changed"


@pytest.mark.parametrize("name", PRESETS)
def test_guidance_takes_a_negative_prompt(photograph: Image.Image, name: str) -> None:
    inversion = edited("sd3", photograph, name).inversion
    sad, happy, none = (
        edited("sd3", inversion, name, negative_prompt=negative, guidance_scale=guidance).latents
        for negative, guidance in (("sad", 3.0), ("happy", 3.0), ("sad", 1.0))
    )
    assert not torch.equal(sad, happy) and not torch.equal(sad, none)


@pytest.mark.parametrize(
    "name", ["rf-inversion", "flowedit", "flowedit-flux", "dnaedit", "dnaedit-flux", "sdedit"]
)
def test_noise_is_the_seeds(photograph: Image.Image, name: str) -> None:
    first, again, other = (
        edited("sd3", photograph, name, noise_seed=seed).latents for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@torch.no_grad()
def batch(preset: Preset, sources: list[int], targets: list[int]) -> Edited:
    """Two non-square images and three targets in one batch, or some of them."""
    model = network("sd3")
    images = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(2))[sources]
    prompts = [SOURCES[number] for number in sources]
    inverted = [""] * len(prompts) if preset.inversion_prompt == "empty" else prompts
    seeds = tuple(20 + number for number in sources)
    grid = grid_for(model, preset, images)
    velocity = GuidedVelocity(model, model.encode_prompt(inverted))
    path = invert_latents(velocity, images, grid, preset, seeds=seeds)
    owners = [sources.index(OWNERS[number]) for number in targets]
    pairs = zip(targets, owners, strict=True)
    maps = [align(model, prompts[o], TARGETS[n]).token_map for n, o in pairs]
    work = EditTask(
        path=path,
        grid=grid,
        source=model.encode_prompt(prompts),
        target=model.encode_prompt([TARGETS[number] for number in targets]),
        owners=tuple(owners),
        token_maps=torch.stack(maps),
        seeds=seeds,
    )
    return edit_latents(model, work, preset)


@pytest.mark.parametrize("name", PRESETS)
def test_images_do_not_mix(name: str) -> None:
    preset = get_preset(name, num_inference_steps=STEPS)
    if preset.tolerance:
        # Rows stop one by one, each within the tolerance: the same, but not to rounding.
        preset = dataclasses.replace(preset, tolerance=0.0, iterations=2)
    together = batch(preset, [0, 1], [0, 1, 2]).latents
    for number, owner in enumerate(OWNERS):
        alone = batch(preset, [owner], [number]).latents[0]
        torch.testing.assert_close(alone, together[number], atol=2e-4, rtol=1e-3)


RETURNS: list[tuple[str, dict[str, Any]]] = [
    ("exact", {"compensate": "both"}),
    ("fast", {"compensate": "both"}),
    ("directedit", {"guidance_scale": 1.0}),
    ("two-step", {}),
    ("flowedit", {"guidance_scale": 4.0, "source_guidance_scale": 4.0}),
    ("dnaedit", {"guidance_scale": 1.0, "eta": 1.0}),
    ("rf-inversion", {"eta": 1.0, "eta_ratio": 1.0}),
]
"""Settings under which a method is exact."""


@pytest.mark.parametrize(("name", "given"), RETURNS, ids=[name for name, _ in RETURNS])
def test_an_exact_method_returns_the_image_for_its_own_prompt(
    photograph: Image.Image, name: str, given: dict[str, Any]
) -> None:
    result = edited("sd3", photograph, name, prompts=PROMPT, **given)
    torch.testing.assert_close(result.latents, result.inversion.latents, atol=2e-4, rtol=1e-4)


PUBLISHED = [
    # preset, family, samples of the inversion and of editing one image by one prompt
    ("rf-solver", "flux", 2 * 30, 2 * 30),
    ("fireflow", "flux", 8 + 1, 8 + 1),
    ("rf-inversion", "flux", 28, 28),
    ("uniedit", "flux", 9 + 1, 2 * 9),
    ("uniedit", "sd3", 9 + 1, 2 * 9),
    ("flowedit", "sd3", 0, 4 * 33),
    ("flowedit-flux", "flux", 0, 2 * 24),
    ("dnaedit", "sd3", 27, 2 * 27),
    ("dnaedit-flux", "flux", 24, 24),
    ("directedit", "sd3", 30, 2 * 30),
    ("two-step", "sd3", 30, 29),  # its first step asks nothing
    ("sdedit", "sd3", 0, 22),
]


@pytest.mark.parametrize(("name", "family", "inverting", "editing"), PUBLISHED)
def test_published_settings_cost_what_they_should(
    photograph: Image.Image, name: str, family: str, inverting: int, editing: int
) -> None:
    steps = PRESETS[name].num_inference_steps
    result = edited(family, photograph, name, num_inference_steps=steps)
    assert result.preset == get_preset(name, family)
    assert result.nfe == {
        "inversion": inverting,
        "editing": editing,
        "reconstruction": 0,
        "total": inverting + editing,
    }


@pytest.mark.parametrize("name", ["rf-inversion", "uniedit", "flowedit", "dnaedit"])
def test_a_generated_picture_is_edited(name: str) -> None:
    """Its path was found by no scheme: it has no offsets, and no velocities are known."""
    result = rf.edit(
        network("sd3"),
        prompts=TARGET,
        source_prompt=PROMPT,
        seed=4,
        preset=name,
        num_inference_steps=4,
        strength=1.0,
    )
    assert result.latents.isfinite().all()
    assert not torch.equal(result.latents, result.inversion.latents)

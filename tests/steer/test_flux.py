"""Inverting and steering FLUX.1: against its network written out, and as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch import Tensor

import rectiflow as rf
from rectiflow.models import Conditioning, FluxModel
from rectiflow.models.taps import Point, every_point, tapped
from rectiflow.steer import align
from tests.presets import FIXED_POINT
from tests.steer.reference_flux import Features, reference_velocity
from tests.tiny_flux import tiny_flux_model

SOURCE = "a red apple on the left"
TARGETS = ("a red cat on the left", "one apple")
STEPS = 5
T = 0.3
DOUBLE, SINGLE = 2, 3
KINDS = [("text", "text")] + [(k, s) for k in ("query", "key", "value") for s in ("image", "text")]
GUIDANCE: dict[str, dict[str, Any]] = {
    "off": {"guidance_scale": 1.0},
    "input": {"guidance_scale": 3.0},
    "both": {"guidance_scale": 3.0, "true_cfg_scale": 2.0},
}


@pytest.fixture(scope="module", params=["dev", "schnell"])
def model(request: pytest.FixtureRequest) -> FluxModel:
    return tiny_flux_model(schnell=request.param == "schnell")


@pytest.fixture(scope="module")
def dev() -> FluxModel:
    return tiny_flux_model()


@pytest.fixture(scope="module")
def inversion(model: FluxModel) -> rf.Inversion:
    """One that leaves compensation something to do."""
    return rf.invert(model, picture(), SOURCE, preset="ftedit", num_inference_steps=STEPS)


def picture(width: int = 48, height: int = 32) -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()).resize((width, height))


def batch(model: FluxModel) -> tuple[Tensor, Conditioning]:
    x = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    cond = model.encode_prompt([SOURCE, *TARGETS])
    return x, cond.with_guidance(3.0) if model.guidance_embeds else cond


def plain(model: FluxModel) -> Tensor:
    x, cond = batch(model)
    return model.velocity(x, T, cond)


def hooks(model: FluxModel) -> dict[str, int]:
    return {
        name: count
        for name, module in model.network.named_modules()
        if (count := len(module._forward_hooks) + len(module._forward_pre_hooks))
    }


def changed(features: Tensor) -> Tensor:
    """Something of each token, so that a shift by one shows; the first row stays."""
    result = features.clone()
    result[1:] = features[:1] * torch.linspace(0.5, 1.5, features.shape[1])[:, None]
    return result


def oracle(points: Iterable[Point], change: Callable[[Tensor], Tensor] = changed) -> Features:
    chosen = set(points)

    def replace(site: int, kind: str, stream: str, features: Tensor) -> Tensor:
        here = Point(site, kind, stream) in chosen  # type: ignore[arg-type]
        return change(features) if here else features

    return replace


# Taps: reading and replacing at every hook point.


def test_the_reference_is_the_network(model: FluxModel) -> None:
    torch.testing.assert_close(reference_velocity(model, *split(model)), plain(model))


def split(model: FluxModel) -> tuple[Tensor, float, Conditioning]:
    x, cond = batch(model)
    return x, T, cond


@pytest.mark.parametrize(("feature", "stream"), KINDS)
@pytest.mark.parametrize(
    "sites", [range(DOUBLE), range(DOUBLE, DOUBLE + SINGLE), range(DOUBLE + SINGLE)]
)
def test_features_are_replaced_where_they_are_asked_for(
    model: FluxModel, sites: range, feature: Any, stream: Any
) -> None:
    points = [Point(site, feature, stream) for site in sites]
    x, cond = batch(model)
    with tapped(model, points) as network:
        found = network.velocity(x, torch.tensor(T), cond, lambda point, f: changed(f))
    expected = reference_velocity(model, x, T, cond, oracle(points))
    torch.testing.assert_close(found, expected)
    before = plain(model)
    assert torch.equal(found[0], before[0]) and (found - before).abs().amax((1, 2, 3))[1] > 1e-3


def test_all_points_at_once(model: FluxModel) -> None:
    points = every_point(model, KINDS)  # type: ignore[arg-type]
    assert len(points) == len(set(points)) == (DOUBLE + SINGLE) * len(KINDS)
    x, cond = batch(model)
    with tapped(model, points) as network:
        found = network.velocity(x, torch.tensor(T), cond, lambda point, f: changed(f))
    torch.testing.assert_close(found, reference_velocity(model, x, T, cond, oracle(points)))


def test_what_a_tap_is_shown(dev: FluxModel) -> None:
    """Each point once, with the tokens of its stream, as the written-out network has them."""
    points = every_point(dev, KINDS)  # type: ignore[arg-type]
    x, cond = batch(dev)
    seen: dict[Point, Tensor] = {}
    expected: dict[Point, Tensor] = {}

    def look(point: Point, features: Tensor) -> Tensor:
        assert point not in seen
        seen[point] = features
        return features

    def write(site: int, kind: Any, stream: Any, features: Tensor) -> Tensor:
        expected[Point(site, kind, stream)] = features
        return features

    with tapped(dev, points) as network:
        assert torch.equal(network.velocity(x, torch.tensor(T), cond, look), plain(dev))
    reference_velocity(dev, x, T, cond, write)
    assert set(seen) == set(points) == set(expected)
    for point in points:
        torch.testing.assert_close(seen[point], expected[point])
        tokens = 24 if point.stream == "image" else cond.embeds.shape[1]
        assert seen[point].shape == (3, tokens, 32)


def test_without_a_tap_the_network_is_untouched_to_the_last_bit(model: FluxModel) -> None:
    before = plain(model)
    x, cond = batch(model)
    with tapped(model, every_point(model, KINDS)) as network:  # type: ignore[arg-type]
        assert hooks(model)
        assert torch.equal(plain(model), before)
        assert torch.equal(network.velocity(x, torch.tensor(T), cond), before)
        with pytest.raises(ZeroDivisionError):
            network.velocity(x, torch.tensor(T), cond, lambda point, f: f / (1 // 0))
        assert torch.equal(plain(model), before)
    assert not hooks(model) and torch.equal(plain(model), before)


def test_hooks_are_only_where_they_are_needed(dev: FluxModel) -> None:
    with tapped(dev, every_point(dev, [("value", "image"), ("value", "text")], first=0.4)):
        assert hooks(dev) == {f"single_transformer_blocks.{i}.attn.to_v": 1 for i in range(SINGLE)}
    with tapped(dev, [Point(1, "text"), Point(2, "text")]):
        names = ("transformer_blocks.1.attn", "single_transformer_blocks.0.attn")
        assert hooks(dev) == dict.fromkeys(names, 1)


# Whole inversions.


@pytest.mark.parametrize("preset", ["exact", "fast", "ftedit", "euler"])
@pytest.mark.parametrize("size", [(48, 32), (24, 56), (301, 200)])
def test_a_picture_comes_back_exactly(model: FluxModel, size: tuple[int, int], preset: str) -> None:
    inversion = rf.invert(model, picture(*size), SOURCE, preset=preset, num_inference_steps=STEPS)
    again = inversion.reconstruct()
    assert again.max_abs_latent <= 1e-4
    assert again.image.size == size
    decoded = np.asarray(inversion.images(inversion.latents)[0]).astype(int)
    assert np.abs(np.asarray(again.image) - decoded).max() <= 1
    assert inversion.trajectory.dtype == torch.float32


def test_a_solved_inversion_needs_no_compensation(model: FluxModel) -> None:
    inversion = rf.invert(
        model,
        picture(),
        SOURCE,
        preset=FIXED_POINT,
        num_inference_steps=STEPS,
        iterations=60,
        tolerance=1e-7,
    )
    assert inversion.reconstruct(compensate=False).max_abs_latent < 1e-4


def test_inversion_is_told_guidance_one_and_walks_the_models_grid(dev: FluxModel) -> None:
    told: set[float] = set()

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        told.update(kwargs["guidance"].tolist())

    handle = dev.network.register_forward_pre_hook(note, with_kwargs=True)
    inversion = rf.invert(dev, picture(), SOURCE, num_inference_steps=4, guidance_scale=3.0)
    handle.remove()
    assert told == {1.0}
    shift, t = dev.shift_for(24), torch.linspace(0, 1, 5)
    torch.testing.assert_close(inversion.grid, t / (t + shift * (1 - t)))


# Whole edits.


def edit(model: FluxModel, *prompts: str, **settings: Any) -> Any:
    everything = {"adaln_ratio": 0.8, "attention_ratio": 0.4, "num_inference_steps": STEPS}
    return rf.edit(
        model,
        settings.pop("image", None) or picture(),
        source_prompt=SOURCE,
        prompts=list(prompts),
        **(everything | settings),
    )


def told(model: FluxModel, cond: Conditioning, scale: float) -> Conditioning:
    return cond.with_guidance(scale) if model.guidance_embeds else cond


def by_hand(model: FluxModel, result: Any, target: str, negative: str) -> Tensor:
    """FTEdit's algorithm 2 for one target: all rows in every step, no hook, no shortcut."""
    preset, path, grid = result.preset, result.inversion.trajectory, result.inversion.grid
    alpha = preset.true_cfg_scale
    if not model.guidance_embeds:
        alpha = preset.guidance_scale if alpha == 1 else alpha
    # A source that follows its stored path is read as it was inverted, without guidance.
    source_scale = 1.0 if preset.compensate == "source" else preset.guidance_scale
    scales = (source_scale, preset.guidance_scale) * 2
    prompts = (negative, negative, SOURCE, target)
    cond = Conditioning.cat(
        [
            told(model, model.encode_prompt(prompt), scale)
            for prompt, scale in zip(prompts, scales, strict=True)
        ]
    )
    mapping = align(model, SOURCE, target).token_map.tolist()
    source = edited = path[0]
    for step in range(STEPS):
        if preset.compensate != "none":
            source = path[step]
        texts, attentions = step < 4, step < 2  # ratios 0.8 and 0.4 of 5 steps

        def replace(
            site: int, kind: str, stream: str, features: Tensor, on: Any = (texts, attentions)
        ) -> Tensor:
            result = features.clone()
            if kind == "text" and on[0]:
                for place, match in enumerate(mapping):
                    if match != -1:
                        result[3, place] = features[2, match]
            touched = stream == "image" or preset.inject == "all"
            if kind in preset.features and on[1] and touched:
                result[3] = features[2]
            return result

        rows = torch.cat([source, edited, source, edited])
        v = reference_velocity(model, rows, float(grid[step]), cond, replace)
        v_source, v_target = (v[:2] + alpha * (v[2:] - v[:2])).split(1)
        h = grid[step + 1] - grid[step]
        if preset.compensate == "both":
            v_target = v_target + (path[step + 1] - source) / h - v_source
        source, edited = source + h * v_source, edited + h * v_target
    return edited[0]


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("compensate", ["none", "source", "both"])
@pytest.mark.parametrize(
    ("inject", "features"), [("image", ("value",)), ("all", ("query", "key", "value"))]
)
def test_edits_by_the_equations(
    model: FluxModel,
    inversion: rf.Inversion,
    inject: str,
    features: tuple[str, ...],
    compensate: str,
    guidance: str,
) -> None:
    result = edit(
        model,
        *TARGETS,
        image=inversion,
        negative_prompt="sad",
        preset="ftedit",
        compensate=compensate,
        inject=inject,
        features=features,
        **GUIDANCE[guidance],
    )
    for latents, target in zip(result.latents, TARGETS, strict=True):
        expected = by_hand(model, result, target, "sad")
        torch.testing.assert_close(latents, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("preset", ["exact", "fast", "ftedit"])
def test_the_sources_own_prompt_gives_the_source_back(
    model: FluxModel, preset: str, guidance: str
) -> None:
    result = edit(model, SOURCE, preset=preset, compensate="both", **GUIDANCE[guidance])
    assert (result.latents - result.inversion.latents).abs().max() < 1e-4


@pytest.mark.parametrize("preset", ["exact", "fast", "ftedit"])
def test_targets_do_not_depend_on_each_other(model: FluxModel, preset: str) -> None:
    inversion = rf.invert(model, picture(), SOURCE, preset=preset, num_inference_steps=STEPS)

    def edited(*prompts: str) -> Tensor:
        latents: Tensor = rf.edit(model, inversion, prompts=prompts, preset=preset).latents
        return latents

    together = edited(*TARGETS, SOURCE)
    for latents, target in zip(together, (*TARGETS, SOURCE), strict=True):
        torch.testing.assert_close(latents[None], edited(target), atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_edits_are_as_large_as_their_pictures_and_leave_no_hook(model: FluxModel) -> None:
    result = edit(model, *TARGETS, image=picture(200, 301), preset="exact")
    assert [image.size for image in result.images] == [(200, 301)] * 2
    result = rf.edit(model, seed=3, source_prompt=SOURCE, prompts=TARGETS, num_inference_steps=4)
    assert [image.size for image in result.images] == [(32, 32)] * 2
    assert not hooks(model)


def test_the_evaluations_are_those_that_are_reported(dev: FluxModel) -> None:
    for guidance in GUIDANCE.values():
        rows: list[int] = []
        handle = dev.network.register_forward_hook(
            lambda module, args, output, rows=rows: rows.append(len(output[0]))
        )
        result = edit(dev, *TARGETS, preset="exact", **guidance)
        handle.remove()
        assert sum(rows) == result.nfe["total"]


@pytest.mark.parametrize("schnell", [False, True])
def test_in_half_precision(schnell: bool) -> None:
    model = tiny_flux_model(schnell, dtype=torch.bfloat16)
    inversion = rf.invert(model, picture(), SOURCE, preset="ftedit", num_inference_steps=STEPS)
    assert inversion.reconstruct().max_abs_latent <= 1e-4
    for guidance in GUIDANCE.values():
        given = {"image": inversion, "preset": "ftedit", "compensate": "both", **guidance}
        latents = edit(model, SOURCE, TARGETS[0], **given).latents
        assert latents.dtype == torch.float32 and torch.isfinite(latents).all()
        assert not torch.equal(latents, latents.bfloat16().float())
        # Compensation is in float32: with the source's prompt the source still comes back.
        assert (latents[0] - inversion.latents[0]).abs().max() < 1e-4
        assert (latents[1] - latents[0]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_network_honours_controls_installed_later(regional: bool, backend: str) -> None:
    model = tiny_flux_model()
    before, expected = plain(model), edit(model, *TARGETS, guidance_scale=3.0).latents
    network = model.network
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    for module in blocks if regional else [network]:
        module.compile(backend=backend)
    torch.testing.assert_close(plain(model), before)
    found = edit(model, *TARGETS, guidance_scale=3.0).latents
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(plain(model), before)
    assert not hooks(model)

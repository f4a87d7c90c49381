"""Inverting and steering Qwen-Image: against its network written out, and as a whole."""

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
from rectiflow.models import Conditioning, GuidedVelocity, QwenImageModel
from rectiflow.models.taps import Point, every_point, tapped
from rectiflow.steer import align
from tests.steer.reference_qwen import Features, reference_guided, reference_velocity
from tests.tiny_qwen import TEXT_LENGTH, tiny_qwen_model

SOURCE = "a red apple on the left"
TARGETS = ("a red cat on the left", "one apple")
NEGATIVE = "sad face and two small cat heart"
"""Prompts of three lengths: 6, 2 and 7 words."""
STEPS = 5
T = 0.3
SITES = 3
CLOSE = 1e-4
"""The fastest wave of time turns by 1000σ: the last bit of σ is 6e-5 of a radian there."""
KINDS = [("text", "text")] + [(k, s) for k in ("query", "key", "value") for s in ("image", "text")]


@pytest.fixture(scope="module")
def model() -> QwenImageModel:
    return tiny_qwen_model()


def picture(width: int = 48, height: int = 32) -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()).resize((width, height))


def batch(model: QwenImageModel) -> tuple[Tensor, Conditioning]:
    x = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    return x, model.encode_prompt([SOURCE, *TARGETS])


def plain(model: QwenImageModel) -> Tensor:
    x, cond = batch(model)
    return model.velocity(x, T, cond)


def hooks(model: QwenImageModel) -> dict[str, int]:
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


@pytest.mark.parametrize("size", [(8, 12), (10, 6)])
def test_the_reference_is_the_network(model: QwenImageModel, size: tuple[int, int]) -> None:
    _, cond = batch(model)
    x = torch.randn(3, 4, *size)
    found = model.velocity(x, T, cond)
    torch.testing.assert_close(reference_velocity(model, x, T, cond), found, atol=CLOSE, rtol=0)
    both = GuidedVelocity(model, cond, model.encode_prompt(NEGATIVE), guidance_scale=3.0)
    unguided = reference_velocity(model, x, T, model.encode_prompt([NEGATIVE] * 3))
    expected = reference_guided(unguided, found, 3.0)
    torch.testing.assert_close(both(x, torch.tensor(T)), expected, atol=CLOSE, rtol=0)


def test_attention_sites_are_all_attentions_in_their_order(model: QwenImageModel) -> None:
    sites, order = model.attention_sites(), []
    assert [site.fused for site in sites] == [False] * SITES
    handles = [
        site.attention.register_forward_pre_hook(lambda module, _: order.append(module))
        for site in sites
    ]
    plain(model)
    for handle in handles:
        handle.remove()
    assert order == [site.attention for site in sites]
    assert order == [block.attn for block in model.network.transformer_blocks]


@pytest.mark.parametrize(("feature", "stream"), KINDS)
@pytest.mark.parametrize("sites", [(0,), range(SITES)])
def test_features_are_replaced_where_they_are_asked_for(
    model: QwenImageModel, sites: Iterable[int], feature: Any, stream: Any
) -> None:
    points = [Point(site, feature, stream) for site in sites]
    x, cond = batch(model)
    with tapped(model, points) as network:
        found = network.velocity(x, torch.tensor(T), cond, lambda point, f: changed(f))
    expected = reference_velocity(model, x, T, cond, oracle(points))
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)
    before = plain(model)
    assert torch.equal(found[0], before[0]) and (found - before).abs().amax((1, 2, 3))[1] > 1e-3


def test_what_a_tap_is_shown(model: QwenImageModel) -> None:
    """Each point once, with the tokens of its stream, as the written-out network has them."""
    points = every_point(model, KINDS)  # type: ignore[arg-type]
    assert len(points) == SITES * len(KINDS)
    x, cond = batch(model)
    seen: dict[Point, Tensor] = {}
    expected: dict[Point, Tensor] = {}

    def look(point: Point, features: Tensor) -> Tensor:
        assert point not in seen
        seen[point] = features
        return features

    def write(site: int, kind: Any, stream: Any, features: Tensor) -> Tensor:
        expected[Point(site, kind, stream)] = features
        return features

    with tapped(model, points) as network:
        assert torch.equal(network.velocity(x, torch.tensor(T), cond, look), plain(model))
    reference_velocity(model, x, T, cond, write)
    assert set(seen) == set(points) == set(expected)
    for point in points:
        torch.testing.assert_close(seen[point], expected[point], atol=CLOSE, rtol=0)
        tokens = 24 if point.stream == "image" else TEXT_LENGTH
        assert seen[point].shape == (3, tokens, 32)


def test_without_a_tap_the_network_is_untouched_to_the_last_bit(model: QwenImageModel) -> None:
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


def test_hooks_are_only_where_they_are_needed(model: QwenImageModel) -> None:
    with tapped(model, [Point(1, "text"), Point(2, "value", "image"), Point(2, "key", "text")]):
        names = ("1.attn", "2.attn.to_v", "2.attn.add_k_proj")
        assert hooks(model) == {f"transformer_blocks.{name}": 1 for name in names}


# Whole inversions and edits.


@pytest.mark.parametrize("preset", ["exact", "fast", "ftedit", "euler"])
def test_a_picture_comes_back_exactly(model: QwenImageModel, preset: str) -> None:
    inversion = rf.invert(model, picture(61, 38), SOURCE, preset=preset, num_inference_steps=STEPS)
    again = inversion.reconstruct()
    assert again.max_abs_latent <= 1e-4 and again.image.size == (61, 38)
    decoded = np.asarray(inversion.images(inversion.latents)[0]).astype(int)
    assert np.abs(np.asarray(again.image) - decoded).max() <= 1


def test_inversion_walks_the_grid_of_the_pictures_size(model: QwenImageModel) -> None:
    inversion = rf.invert(model, picture(61, 38), SOURCE, grid="shifted", num_inference_steps=3)
    tokens = inversion.latents.shape[-2] * inversion.latents.shape[-1] // 4
    shift, t = model.shift_for(tokens), torch.linspace(0, 1, 4)
    torch.testing.assert_close(inversion.grid, t / (t + shift * (1 - t)))


def edit(model: QwenImageModel, *prompts: str, **settings: Any) -> Any:
    everything = {"adaln_ratio": 0.8, "attention_ratio": 0.4, "num_inference_steps": STEPS}
    return rf.edit(
        model,
        settings.pop("image", None) or picture(),
        source_prompt=SOURCE,
        prompts=list(prompts),
        **(everything | settings),
    )


def by_hand(model: QwenImageModel, result: Any, target: str) -> Tensor:
    """FTEdit's algorithm 2 for one target: all rows in every step, no hook, no shortcut."""
    preset, path, grid = result.preset, result.inversion.trajectory, result.inversion.grid
    cond = model.encode_prompt([NEGATIVE, NEGATIVE, SOURCE, target])
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
        v_source, v_target = reference_guided(v[:2], v[2:], preset.guidance_scale).split(1)
        h = grid[step + 1] - grid[step]
        if preset.compensate == "both":
            v_target = v_target + (path[step + 1] - source) / h - v_source
        source, edited = source + h * v_source, edited + h * v_target
    return edited[0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("compensate", ["none", "source", "both"])
@pytest.mark.parametrize(
    ("inject", "features"), [("image", ("value",)), ("all", ("query", "key", "value"))]
)
def test_edits_by_the_equations(
    model: QwenImageModel,
    inject: str,
    features: tuple[str, ...],
    compensate: str,
    guidance: float,
) -> None:
    """Several targets at once; their prompts, the source's and the negative differ in length."""
    result = edit(
        model,
        *TARGETS,
        negative_prompt=NEGATIVE,
        preset="ftedit",  # an inversion that leaves compensation something to do
        iterations=1,
        compensate=compensate,
        inject=inject,
        features=features,
        guidance_scale=guidance,
    )
    for latents, target in zip(result.latents, TARGETS, strict=True):
        expected = by_hand(model, result, target)
        torch.testing.assert_close(latents, expected, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("preset", ["exact", "ftedit"])
def test_the_sources_own_prompt_gives_the_source_back(
    model: QwenImageModel, preset: str, guidance: float
) -> None:
    result = edit(model, SOURCE, preset=preset, compensate="both", guidance_scale=guidance)
    assert (result.latents - result.inversion.latents).abs().max() < 1e-4


@pytest.mark.parametrize("preset", ["exact", "fast", "ftedit"])
def test_targets_do_not_depend_on_each_other(model: QwenImageModel, preset: str) -> None:
    inversion = rf.invert(model, picture(), SOURCE, preset=preset, num_inference_steps=STEPS)

    def edited(*prompts: str) -> Tensor:
        latents: Tensor = rf.edit(model, inversion, prompts=prompts, preset=preset).latents
        return latents

    together = edited(*TARGETS, "a red apple and a red cat on the left background")
    for latents, target in zip(together, TARGETS, strict=False):
        torch.testing.assert_close(latents[None], edited(target), atol=CLOSE, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-2
    assert not hooks(model)


def test_the_evaluations_are_those_that_are_reported(model: QwenImageModel) -> None:
    for guidance in (1.0, 4.0):
        rows: list[int] = []
        handle = model.network.register_forward_hook(
            lambda module, args, output, rows=rows: rows.append(len(output[0]))
        )
        result = edit(model, *TARGETS, preset="exact", guidance_scale=guidance)
        handle.remove()
        assert sum(rows) == result.nfe["total"]


def test_in_half_precision() -> None:
    model = tiny_qwen_model(dtype=torch.bfloat16)
    inversion = rf.invert(model, picture(), SOURCE, preset="ftedit", num_inference_steps=STEPS)
    assert inversion.reconstruct().max_abs_latent <= 1e-4
    for guidance in (1.0, 3.0):
        given = {"image": inversion, "preset": "ftedit", "compensate": "both"}
        latents = edit(model, SOURCE, TARGETS[0], guidance_scale=guidance, **given).latents
        assert latents.dtype == torch.float32 and torch.isfinite(latents).all()
        # Compensation is in float32: with the source's prompt the source still comes back.
        assert (latents[0] - inversion.latents[0]).abs().max() < 1e-4
        assert (latents[1] - latents[0]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("regional", [False, True])
def test_a_compiled_network_honours_controls_installed_later(regional: bool) -> None:
    model = tiny_qwen_model()
    before, expected = plain(model), edit(model, *TARGETS, guidance_scale=3.0).latents
    network = model.network
    for module in network.transformer_blocks if regional else [network]:
        module.compile(backend="eager")
    torch.testing.assert_close(plain(model), before)
    found = edit(model, *TARGETS, guidance_scale=3.0).latents
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)
    torch.testing.assert_close(plain(model), before)
    assert not hooks(model)

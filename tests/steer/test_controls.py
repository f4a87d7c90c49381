"""Controls against an independent implementation of the network, and what they leave untouched."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.invert import get_preset
from rectiflow.invert.features import attention_points, text_points, wanted_features
from rectiflow.invert.inverting import grid_for
from rectiflow.invert.result import InversionResult
from rectiflow.models import SD3Model
from rectiflow.models.base import Conditioning
from rectiflow.models.taps import Point, every_point, tapped
from rectiflow.steer import (
    AdaLNReplacement,
    AttentionInjection,
    EditTask,
    align,
    controlled,
    edit_latents,
)
from rectiflow.steer.controls import Control, Rows
from rectiflow.steer.two_branch import controls_of
from rectiflow.steer.windows import word_steps
from tests.steer.reference import reference_velocity
from tests.tiny import tiny_model

SOURCE, TARGET = "a red apple on the blue background", "a green lemon on the blue background"
KINDS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3-t5": {"t5": True},
    "medium": {"medium": True, "t5": True},
    "large": {"large": True},
}
T = 0.3
ROWS = Rows(targets=(3,), sources=(2,), pairs=(0,))
"""Of a batch [uncond source, uncond target, cond source, cond target]."""


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> SD3Model:
    return tiny_model(**KINDS[request.param])


@pytest.fixture(scope="module")
def sd3() -> SD3Model:
    return tiny_model()


def batch(model: SD3Model) -> tuple[Tensor, Conditioning]:
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
    return x, model.encode_prompt(["", "", SOURCE, TARGET])


def token_maps(model: SD3Model) -> Tensor:
    return align(model, SOURCE, TARGET).token_map[None]


def adaln(model: SD3Model, maps: Tensor, steps: int = 1) -> AdaLNReplacement:
    return AdaLNReplacement(maps, steps, text_points(model))


def injection(model: SD3Model, steps: int = 1, **chosen: Any) -> AttentionInjection:
    return AttentionInjection(steps, attention_points(model, get_preset("ftedit", **chosen)))


def everything(model: SD3Model, steps: int = 5) -> list[Control]:
    attention = injection(model, steps, features=("query", "key", "value"))
    return [adaln(model, token_maps(model), steps), attention]


def plain(model: SD3Model) -> Tensor:
    x, cond = batch(model)
    return model.velocity(x, torch.tensor(T), cond)


def under(model: SD3Model, *controls: Control, step: int = 0, rows: Rows = ROWS) -> Tensor:
    x, cond = batch(model)
    with controlled(model, controls) as network:
        return network.velocity(x, torch.tensor(T), cond, step, rows)


def hooks(model: SD3Model) -> dict[str, int]:
    return {
        name: count
        for name, module in model.network.named_modules()
        if (count := len(module._forward_hooks) + len(module._forward_pre_hooks))
    }


def copied(model: SD3Model) -> Any:
    """AdaLN replacement by the letter: one token after the other."""
    mapping = token_maps(model)[0].tolist()

    def replace(features: Tensor) -> Tensor:
        result = features.clone()
        for position, source in enumerate(mapping):
            if source != -1:
                result[3, position] = features[2, source]
        return result

    return replace


@torch.no_grad()
def test_the_reference_is_the_network(model: SD3Model) -> None:
    x, cond = batch(model)
    torch.testing.assert_close(reference_velocity(model, x, T, cond), plain(model))


@torch.no_grad()
def test_adaln_replacement(model: SD3Model) -> None:
    x, cond = batch(model)
    expected = reference_velocity(model, x, T, cond, text=copied(model))
    result = under(model, adaln(model, token_maps(model)))
    torch.testing.assert_close(result, expected)
    assert (result[3] - plain(model)[3]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("inject", ["image", "all"])
@pytest.mark.parametrize("features", [("value",), ("key",), ("query",), ("key", "query", "value")])
def test_attention_injection(model: SD3Model, inject: Any, features: tuple[Any, ...]) -> None:
    def projected(kind: str, stream: str, made: Tensor) -> Tensor:
        if kind not in features or (stream == "text" and inject == "image"):
            return made
        return torch.cat([made[:3], made[2:3]])

    x, cond = batch(model)
    expected = reference_velocity(model, x, T, cond, projected=projected)
    result = under(model, injection(model, inject=inject, features=features))
    torch.testing.assert_close(result, expected)
    assert (result[3] - plain(model)[3]).abs().max() > 1e-4


@torch.no_grad()
def test_both_at_once(model: SD3Model) -> None:
    x, cond = batch(model)

    def projected(kind: str, stream: str, made: Tensor) -> Tensor:
        return torch.cat([made[:3], made[2:3]])

    expected = reference_velocity(model, x, T, cond, copied(model), projected)
    torch.testing.assert_close(under(model, *everything(model)), expected)


@torch.no_grad()
def test_other_rows_are_untouched_to_the_last_bit(model: SD3Model) -> None:
    before, after = plain(model), under(model, *everything(model))
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3], after[3])


@torch.no_grad()
def test_several_targets_of_several_sources(sd3: SD3Model) -> None:
    """Rows are mixed up on purpose; each target gets its own map and its own source."""
    prompts = [TARGET, "cat", SOURCE, "two cats", "a red heart on the blue background"]
    x, cond = torch.randn(5, 4, 8, 8), sd3.encode_prompt(prompts)
    pairs = [(0, 2), (4, 2), (3, 1)]
    maps = torch.stack([align(sd3, prompts[s], prompts[t]).token_map for t, s in pairs])
    controls = [adaln(sd3, maps), injection(sd3, inject="image")]
    rows = Rows(targets=(0, 3, 4), sources=(2, 1, 2), pairs=(0, 2, 1))
    with controlled(sd3, controls) as network:
        together = network.velocity(x, torch.tensor(T), cond, 0, rows)
    for pair, (target, source) in enumerate(pairs):
        own = [adaln(sd3, maps[[pair]]), injection(sd3, inject="image")]
        with controlled(sd3, own) as network:
            some = [source, target]
            alone = network.velocity(
                x[some], torch.tensor(T), cond[some], 0, Rows((1,), (0,), (0,))
            )
        torch.testing.assert_close(alone[1], together[target], atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_controls_nothing_changes_before_inside_and_after(model: SD3Model) -> None:
    before = plain(model)
    assert torch.equal(before, under(model))
    controls = everything(model, steps=2)
    assert torch.equal(before, under(model, *controls, step=2))
    assert torch.equal(before, under(model, *controls, rows=Rows((), (), ())))
    with controlled(model, controls):
        assert torch.equal(before, plain(model))  # the model itself, within the block
        assert hooks(model)
    assert torch.equal(before, plain(model)) and not hooks(model)
    with pytest.raises(RuntimeError, match="on purpose"), controlled(model, controls):
        raise RuntimeError("on purpose")
    assert torch.equal(before, plain(model)) and not hooks(model)
    # An exception in the middle of the network, with controls acting.
    x, cond = batch(model)
    with controlled(model, controls) as network:
        with pytest.raises(RuntimeError):
            network.velocity(x[:, :3], torch.tensor(T), cond, 0, ROWS)
        assert torch.equal(before, plain(model))
    assert torch.equal(before, plain(model)) and not hooks(model)


def test_where_hooks_are(model: SD3Model) -> None:
    blocks = len(model.network.transformer_blocks)
    names = ("to_v", "to_k", "add_v_proj", "add_k_proj")
    for first, begin in ((0.0, 0), (0.5, (blocks - 1) // 2)):
        with controlled(model, [injection(model, features=("value", "key"), first_site=first)]):
            places = hooks(model)
        assert places == {
            f"transformer_blocks.{i}.attn.{name}": 1
            for i in range(begin, blocks - 1)
            for name in names
        }
    with controlled(model, [adaln(model, token_maps(model))]):
        places = hooks(model)
    assert places == {f"transformer_blocks.{i}.attn": 1 for i in range(blocks - 1)}
    with controlled(model, []):
        assert not hooks(model)


@torch.no_grad()
def test_hooks_of_others_stay(sd3: SD3Model) -> None:
    seen = []
    attention = sd3.network.transformer_blocks[0].attn
    handle = attention.register_forward_hook(lambda *args: seen.append(1))
    try:
        under(sd3, *everything(sd3))
        plain(sd3)
        assert len(seen) == 2 and list(hooks(sd3).values()) == [1]
    finally:
        handle.remove()


@torch.no_grad()
def test_a_rule_of_ones_own_sees_every_hook_point(sd3: SD3Model) -> None:
    """A control may ask for any feature, not only for those that the ready-made ones take."""
    seen: list[Point] = []
    x, _ = batch(sd3)
    tokens = {"text": sd3.encode_prompt("").embeds.shape[1], "image": x[0, 0].numel() // 4}
    kinds: list[tuple[Any, Any]] = [("text", "text"), ("key", "text"), ("query", "image")]
    wanted = every_point(sd3, kinds)

    class Watcher:
        steps = 1
        points = wanted

        def replace(
            self, point: Point, target: Tensor, source: Tensor, pairs: Sequence[int], step: int
        ) -> Tensor:
            assert target.shape == source.shape == (1, tokens[point.stream], 32)
            assert tuple(pairs) == (0,) and step == 0
            seen.append(point)
            return target

    assert torch.equal(under(sd3, Watcher()), plain(sd3))
    assert len(seen) == len(set(seen)) == 6 and set(seen) == set(wanted)


@torch.no_grad()
def test_kept_features_take_the_place_of_the_sources_row(model: SD3Model) -> None:
    """What was read of the source in another batch steers a target that is alone."""
    x, cond = batch(model)
    controls = everything(model)
    points = [point for control in controls for point in control.points]
    kept: dict[Point, Tensor] = {}
    with tapped(model, points) as network:
        network.velocity(x[2:3], torch.tensor(T), cond[[2]], lambda p, f: kept.setdefault(p, f))
    assert set(kept) == set(points)
    rows = Rows(targets=(0,), sources=(), pairs=(0,))
    with controlled(model, controls) as network:
        assert network.points(0) == set(points) and not network.points(5)
        alone = network.velocity(x[3:], torch.tensor(T), cond[[3]], 0, rows, kept.__getitem__)
    torch.testing.assert_close(alone[0], under(model, *controls)[3], atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_word_is_held_until_its_own_step(model: SD3Model) -> None:
    x, cond = batch(model)
    maps = token_maps(model)
    until = torch.arange(maps.shape[1])[None] % 4
    control = AdaLNReplacement(maps, 3, text_points(model), until)
    for step in range(3):

        def text(features: Tensor, step: int = step) -> Tensor:
            result = features.clone()
            for position, source in enumerate(maps[0].tolist()):
                if source != -1 and step < position % 4:
                    result[3, position] = features[2, source]
            return result

        expected = reference_velocity(model, x, T, cond, text=text)
        torch.testing.assert_close(under(model, control, step=step), expected)
    assert torch.equal(under(model, control, step=3), plain(model))


@torch.no_grad()
def test_in_half_precision() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    before, after = plain(model), under(model, *everything(model))
    assert after.dtype == torch.float32 and torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3], after[3]) and torch.isfinite(after).all()


def test_one_rule_for_every_share_of_the_steps(sd3: SD3Model) -> None:
    """0.29 of 100 steps are 29, where a product in floating point is 28.999…"""
    steps = 100
    preset = get_preset("ftedit", num_inference_steps=steps, adaln_ratio=0.29, attention_ratio=0.29)
    assert len(grid_for(sd3, preset.override({"strength": 0.29}), torch.zeros(1, 4, 8, 8))) == 30
    source, target = "a red apple on the left", "a red cat on the left"
    found = align(sd3, source, target)
    path = InversionResult.unsolved([*torch.randn(steps + 1, 1, 4, 8, 8)])
    work = EditTask(
        path=path,
        grid=torch.linspace(0, 1, steps + 1),
        source=sd3.encode_prompt(source),
        target=sd3.encode_prompt(target),
        owners=(0,),
        token_maps=found.token_map[None],
    )
    assert [control.steps for control in controls_of(sd3, preset, work)] == [29, 29]
    kept = dataclasses.replace(preset, source_features="inversion")
    assert set(wanted_features(sd3, kept, steps).values()) == {29}
    whole = preset.override({"adaln_ratio": 1.0})
    held = word_steps(sd3, [target], work.token_maps, {"left": 0.29}, whole)
    assert held.unique().tolist() == [0, 29, 100]
    drawn = get_preset("rf-inversion", num_inference_steps=steps, eta=1.0, eta_ratio=0.29)
    states: list[Tensor] = []
    edit_latents(sd3, work, drawn, lambda step, t, x: states.append(x))
    image, noise = path.trajectory[-1], path.trajectory[0]
    straight = [
        torch.allclose(x, torch.lerp(noise, image, t), atol=1e-4)
        for x, t in zip(states, work.grid[1:], strict=True)
    ]
    assert straight == [True] * 29 + [False] * 71


@torch.no_grad()
def test_a_control_ends_after_its_steps(sd3: SD3Model) -> None:
    for step in range(4):
        acts = not torch.equal(under(sd3, *everything(sd3, steps=3), step=step), plain(sd3))
        assert acts == (step < 3)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_network_honours_controls_installed_later(regional: bool, backend: str) -> None:
    model = tiny_model()
    before, expected = plain(model), under(model, *everything(model))
    network = model.network
    for module in network.transformer_blocks if regional else [network]:
        module.compile(backend=backend)
    compiled = plain(model)
    torch.testing.assert_close(compiled, before)
    torch.testing.assert_close(under(model, *everything(model)), expected)
    assert torch.equal(under(model, *everything(model), step=5), compiled)
    assert torch.equal(plain(model), compiled) and not hooks(model)


@pytest.mark.slow
@torch.no_grad()
def test_a_network_compiled_under_controls_is_itself_again_afterwards() -> None:
    model = tiny_model()
    before, expected = plain(model), under(model, *everything(model))
    model.network.compile(backend="eager")
    torch.testing.assert_close(under(model, *everything(model)), expected)
    torch.testing.assert_close(under(model, *everything(model), step=5), before)
    torch.testing.assert_close(plain(model), before)
    torch.testing.assert_close(under(model, *everything(model)), expected)

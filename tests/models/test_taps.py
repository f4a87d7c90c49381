"""Taps: every point of the network read and replaced, against the network written out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.models import SD3Model
from rectiflow.models.prompts import Conditioning
from rectiflow.models.taps import Point, every_point, tapped
from tests.steer.reference import reference_velocity
from tests.tiny import tiny_model

MODELS: dict[str, dict[str, Any]] = {
    "sd3": {},
    "sd3-t5": {"t5": True},
    "medium": {"medium": True, "t5": True},
    "large": {"large": True},
}
KINDS: list[tuple[Any, Any]] = [("text", "text")]
KINDS += [(kind, stream) for kind in ("query", "key", "value") for stream in ("image", "text")]
SITES = 2  # of the three blocks the last has no text stream to go on with
T = 0.3


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> SD3Model:
    return tiny_model(**MODELS[request.param])


@pytest.fixture(scope="module")
def sd3() -> SD3Model:
    return tiny_model()


def batch(model: SD3Model) -> tuple[Tensor, Conditioning]:
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    return x, model.encode_prompt(["a red apple", "two small cats"])


def plain(model: SD3Model) -> Tensor:
    x, cond = batch(model)
    return model.velocity(x, T, cond)


def hooks(model: SD3Model) -> set[str]:
    modules = model.network.named_modules()
    return {name for name, m in modules if m._forward_hooks or m._forward_pre_hooks}


def written_out(model: SD3Model, tap: Callable[[Point, Tensor], Tensor]) -> Tensor:
    """The velocity by the network written out, which passes each kind of point site by site."""
    passed: Counter[tuple[Any, Any]] = Counter()

    def projected(kind: Any, stream: Any, features: Tensor) -> Tensor:
        site = passed[kind, stream]
        passed[kind, stream] += 1
        return tap(Point(site, kind, stream), features)

    x, cond = batch(model)
    return reference_velocity(
        model, x, T, cond, lambda text: projected("text", "text", text), projected
    )


def changed(features: Tensor) -> Tensor:
    """Something of each token, so that a shift by one shows; the first row stays."""
    result = features.clone()
    result[1:] = features[:1] * torch.linspace(0.5, 1.5, features.shape[1])[:, None]
    return result


@torch.no_grad()
def test_every_point_is_read(model: SD3Model) -> None:
    seen: dict[Point, Tensor] = {}
    expected: dict[Point, Tensor] = {}

    def read(into: dict[Point, Tensor]) -> Callable[[Point, Tensor], Tensor]:
        def tap(point: Point, features: Tensor) -> Tensor:
            assert point not in into  # once in an evaluation
            into[point] = features.clone()
            return features

        return tap

    x, cond = batch(model)
    points = every_point(model, KINDS)
    assert len(points) == SITES * len(KINDS)
    with tapped(model, points) as network:
        v = network.velocity(x, T, cond, read(seen))
    assert torch.equal(v, plain(model))  # reading changes nothing
    written_out(model, read(expected))
    assert set(seen) == set(points) == set(expected)
    for point in points:
        torch.testing.assert_close(seen[point], expected[point], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("site", range(SITES))
@pytest.mark.parametrize(("feature", "stream"), KINDS)
def test_every_point_is_replaced(model: SD3Model, feature: Any, stream: Any, site: int) -> None:
    place = Point(site, feature, stream)
    x, cond = batch(model)
    with tapped(model, [place]) as network:
        v = network.velocity(x, T, cond, lambda point, features: changed(features))
    expected = written_out(
        model, lambda point, features: changed(features) if point == place else features
    )
    torch.testing.assert_close(v, expected, atol=1e-5, rtol=1e-4)
    before = plain(model)
    assert torch.equal(v[0], before[0]) and (v[1] - before[1]).abs().max() > 1e-4


@torch.no_grad()
def test_a_tap_replaces_at_all_points_at_once(model: SD3Model) -> None:
    x, cond = batch(model)
    with tapped(model, every_point(model, KINDS)) as network:
        v = network.velocity(x, T, cond, lambda point, features: changed(features))
    expected = written_out(model, lambda point, features: changed(features))
    torch.testing.assert_close(v, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_without_a_tap_nothing_changes(model: SD3Model) -> None:
    x, cond = batch(model)
    before = plain(model)
    with tapped(model, every_point(model, KINDS)) as network:
        assert torch.equal(network.velocity(x, T, cond), before)
        assert torch.equal(plain(model), before)  # the model itself
        network.velocity(x, T, cond, lambda point, features: 0 * features)
        assert torch.equal(network.velocity(x, T, cond), before)
    assert torch.equal(plain(model), before) and not hooks(model)


@torch.no_grad()
def test_after_an_exception_nothing_is_left(sd3: SD3Model) -> None:
    x, cond = batch(sd3)
    before = plain(sd3)

    def give_up(point: Point, features: Tensor) -> Tensor:
        raise NotImplementedError

    with tapped(sd3, every_point(sd3, KINDS)) as network:
        for _ in range(2):
            with pytest.raises(NotImplementedError):
                network.velocity(x, T, cond, give_up)
        assert torch.equal(network.velocity(x, T, cond), before)  # the tap is gone
        assert torch.equal(plain(sd3), before)
    with pytest.raises(KeyboardInterrupt), tapped(sd3, every_point(sd3, KINDS)):
        raise KeyboardInterrupt
    assert torch.equal(plain(sd3), before) and not hooks(sd3)


def test_a_site_that_is_not_there_leaves_no_hook(sd3: SD3Model) -> None:
    """Hooks already made go when making a later one fails."""
    broken = Point(1, "nothing", "image")  # type: ignore[arg-type]
    with pytest.raises(KeyError), tapped(sd3, [Point(0, "text"), broken]):
        pass
    assert not hooks(sd3)


@pytest.mark.parametrize(
    ("point", "module"),
    [
        (Point(0, "text"), "transformer_blocks.0.attn"),
        (Point(1, "query", "image"), "transformer_blocks.1.attn.to_q"),
        (Point(0, "key", "image"), "transformer_blocks.0.attn.to_k"),
        (Point(1, "value", "image"), "transformer_blocks.1.attn.to_v"),
        (Point(0, "query", "text"), "transformer_blocks.0.attn.add_q_proj"),
        (Point(1, "key", "text"), "transformer_blocks.1.attn.add_k_proj"),
        (Point(0, "value", "text"), "transformer_blocks.0.attn.add_v_proj"),
    ],
)
def test_hooks_are_only_at_the_points_asked_for(model: SD3Model, point: Point, module: str) -> None:
    with tapped(model, [point, point]):
        assert hooks(model) == {module}
    with tapped(model, []):
        assert not hooks(model)
    assert not hooks(model)


@torch.no_grad()
def test_two_taps_at_a_time(sd3: SD3Model) -> None:
    """One inside the other: the silent one stays silent."""
    x, cond = batch(sd3)
    place = Point(0, "value", "image")
    with tapped(sd3, [place]) as outer, tapped(sd3, [place]) as inner:
        one = outer.velocity(x, T, cond, lambda point, features: changed(features))
        two = inner.velocity(x, T, cond, lambda point, features: changed(features))
        assert torch.equal(one, two) and not torch.equal(one, plain(sd3))
    assert not hooks(sd3)


@pytest.mark.parametrize(
    ("first", "sites"), [(0.0, {0, 1}), (0.5, {1}), (0.49, {0, 1}), (1.0, set())]
)
def test_the_first_share_of_sites_is_left_out(sd3: SD3Model, first: float, sites: set[int]) -> None:
    points = every_point(sd3, KINDS, first)
    assert {point.site for point in points} == sites
    assert len(points) == len(sites) * len(KINDS) == len(set(points))

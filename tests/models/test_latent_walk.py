"""Walks from noise to noise: the sphere's closed forms, and pictures at both ends."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import geometric_slerp

import rectiflow
from rectiflow.errors import InputError
from rectiflow.models import Conditioning, FlowModel, generate
from rectiflow.models.latent_walk import interpolate, mix, slerp, walk, walk_latents
from tests.tiny import tiny_model
from tests.tiny_qwen import tiny_qwen_model
from tests.tiny_sd import tiny_sd_model


def test_on_a_circle() -> None:
    """Angles and norms change evenly."""
    angles = torch.tensor([0.3, 2.9], dtype=torch.float64)
    x, y = (
        r * torch.stack([a.cos(), a.sin()])[None] for r, a in zip((1.5, 4.0), angles, strict=True)
    )
    for w in (0.0, 0.2, 0.5, 0.9, 1.0):
        (found,) = slerp(x, y, w)
        angle, norm = torch.lerp(*angles, w), 1.5 + w * 2.5
        expected = norm * torch.stack([angle.cos(), angle.sin()])
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_items_against_scipy() -> None:
    x, y = torch.randn(2, 3, 4, 5, 6)
    shares = torch.tensor([0.1, 0.5, 0.8])
    found = slerp(x, y, shares)
    for item in range(3):
        a, b = (v[item].double().flatten().numpy() for v in (x, y))
        norms = [np.linalg.norm(v) for v in (a, b)]
        w = float(shares[item])
        expected = geometric_slerp(a / norms[0], b / norms[1], w)
        expected = expected * ((1 - w) * norms[0] + w * norms[1])
        np.testing.assert_allclose(found[item].flatten(), expected, atol=1e-6)


def test_a_draw_stays_a_draw() -> None:
    """The mean of two draws is too small by √2; what lies between them on the sphere is not."""
    x, y = torch.randn(2, 1, 4, 64, 64)
    assert float((x + y).std() / 2) == pytest.approx(1 / math.sqrt(2), abs=0.02)
    assert float(slerp(x, y, 0.5).std()) == pytest.approx(1, abs=0.02)


def test_ends_and_special_cases() -> None:
    x, y = torch.randn(2, 2, 3, 3)
    assert torch.equal(slerp(x, y, 0.0), x) and torch.equal(slerp(x, y, 1.0), y)
    torch.testing.assert_close(slerp(x, x, 0.3), x)
    torch.testing.assert_close(slerp(x, 3 * x, 0.5), 2 * x)
    near = x + 1e-4 * y
    torch.testing.assert_close(slerp(x, near, 0.5), (x + near) / 2, atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="opposite"):
        slerp(x, -2 * x, 0.5)


def test_a_walk_passes_its_stops() -> None:
    stops = torch.randn(3, 4, 2, 2)
    points = walk(stops, 9)
    assert len(points) == 9
    assert torch.equal(points[[0, 4, 8]], stops)
    torch.testing.assert_close(points[5:6], slerp(stops[1:2], stops[2:], 0.25))
    points = walk(stops, 6)  # passes between the frames
    assert torch.equal(points[[0, -1]], stops[[0, -1]])
    torch.testing.assert_close(points[2:3], slerp(stops[:1], stops[1:2], 0.8))
    assert torch.equal(walk(stops, 3), stops)
    assert torch.equal(walk(stops[:2], 2), stops[:2])
    for few, frames in ((stops[:1], 5), (stops, 2)):
        with pytest.raises(InputError, match=r"give|needs"):
            walk(few, frames)


def test_prompts_are_mixed_evenly_and_end_exactly() -> None:
    first, last = (
        Conditioning(torch.randn(1, 3, 4), torch.randn(1, 2), torch.tensor([mask]))
        for mask in ([True, True, False], [True, False, True])
    )
    between = mix(first, last, [0.0, 0.25, 1.0])
    assert torch.equal(between.embeds[[0, 2]], torch.cat([first.embeds, last.embeds]))
    torch.testing.assert_close(between.embeds[1:2], 0.75 * first.embeds + 0.25 * last.embeds)
    assert between.pooled is not None and first.pooled is not None and last.pooled is not None
    torch.testing.assert_close(between.pooled[1:2], 0.75 * first.pooled + 0.25 * last.pooled)
    assert between.mask is not None
    assert between.mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 1]]


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@pytest.mark.parametrize(
    ("model", "solver"),
    [
        (tiny_model, None),
        (tiny_sd_model, "dpmpp"),
        (tiny_sd_model, "euler"),
        (lambda: tiny_sd_model(rectified=True), None),
        (tiny_qwen_model, None),
    ],
)
def test_the_ends_are_the_seeds_pictures(model: Any, solver: str | None) -> None:
    field: FlowModel = model()
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 2.0, "solver": solver}
    seeds, prompts = [3, 11, 4], ["cat", "two red apples"]
    frames = rectiflow.interpolate(field, prompts, seeds, 5, batch_size=2, **settings)
    assert len(frames) == 5
    for frame, prompt, seed in ((0, "cat", 3), (-1, "two red apples", 4)):
        (alone,) = generate(field, prompt, seed=seed, **settings)
        assert largest_difference(frames[frame], alone) <= 1
    still = interpolate(field, "cat", seeds, 5, **settings)
    (passed,) = generate(field, "cat", seed=11, **settings)
    assert largest_difference(still[2], passed) <= 1
    assert largest_difference(still[1], passed) > 1
    assert walk_latents(field, "cat", seeds, 5, **settings).nfe == 5 * 2 * 2
    assert walk_latents(field, "cat", seeds, 4, **settings | {"guidance_scale": 1.0}).nfe == 4 * 2


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="3 prompts"):
        interpolate(model, ["a", "b", "c"], [1, 2])
    with pytest.raises(InputError, match="two seeds or more"):
        interpolate(model, "a", [1])
    with pytest.raises(InputError, match="1 frames for 2 seeds"):
        interpolate(model, "a", [1, 2], 1)
    with pytest.raises(InputError, match="batch_size is 0"):
        interpolate(model, "a", [1, 2], batch_size=0)

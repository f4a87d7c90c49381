"""RF-Inversion: its equation in the paper's own time, both ends of γ, the prompt and the time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rectiflow.invert import euler_inversion, get_preset, invert
from rectiflow.invert.inverting import grid_for, invert_latents
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import initial_noise
from rectiflow.models.guidance import GuidedVelocity
from tests.invert.fields import GRIDS, Recorder, inverted, randn, wild
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model

STEPS = 6
X_1, NOISE = randn(3, 4), randn(3, 4, seed=1)


@pytest.mark.parametrize("grid", GRIDS)
def test_fully_drawn_it_goes_straight_to_the_noise(grid: str) -> None:
    """From any image, whatever the field says."""
    points = GRIDS[grid](STEPS)
    path = inverted("rf_inversion", wild, X_1, points, NOISE, gamma=1.0)
    for x, t in zip(path.trajectory, points, strict=True):
        torch.testing.assert_close(x, (1 - t) * NOISE + t * X_1)
    if points[0] == 0:
        torch.testing.assert_close(path.trajectory[0], NOISE)


@pytest.mark.parametrize("grid", GRIDS)
def test_not_drawn_it_is_eulers_inversion(grid: str) -> None:
    points = GRIDS[grid](STEPS)
    path = inverted("rf_inversion", wild, X_1, points, NOISE, gamma=0.0)
    euler = euler_inversion(wild, X_1, points, time="cleaner")
    assert torch.equal(path.trajectory, euler.trajectory)


@pytest.mark.parametrize("gamma", [0.3, 0.5])
def test_in_the_papers_time(gamma: float) -> None:
    """There s goes from 0, the image, to 1, the noise, and the field points to the noise."""
    points = GRIDS["shifted"](STEPS)
    path = inverted("rf_inversion", wild, X_1, points, NOISE, gamma=gamma)
    times, y = 1 - points.flip(0), X_1
    for number, (s, s_next) in enumerate(pairwise(times)):
        u = -wild(y, 1 - s)
        towards_the_noise = (NOISE - y) / (1 - s)
        y = y + (s_next - s) * (u + gamma * (towards_the_noise - u))
        torch.testing.assert_close(path.trajectory[STEPS - 1 - number], y)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_networks_time_is_that_of_the_state(grid: str) -> None:
    points, velocity = GRIDS[grid](STEPS), Recorder()
    path = inverted("rf_inversion", velocity, X_1, points, NOISE)
    assert [step for _, _, step in velocity.calls] == [5, 4, 3, 2, 1, 0]
    for x, t, step in velocity.calls:
        assert torch.equal(x, path.trajectory[step + 1]) and t == points[step + 1] > 0
    assert path.evaluations.tolist() == [[1, 1, 1]] * STEPS
    assert path.residuals.isnan().all() and path.velocities is None


@pytest.mark.parametrize("make", [tiny_model, tiny_flux_model])
def test_no_prompt_while_inverting(make: Callable[[], FlowModel]) -> None:
    model = make()
    picture = Image.effect_noise((48, 32), 80).convert("RGB")
    settings: dict[str, Any] = {"preset": "rf-inversion", "num_inference_steps": 4}
    one = invert(model, picture, "a red apple", **settings)
    other = invert(model, picture, "", **settings)
    assert torch.equal(one.trajectory, other.trajectory) and one.source_prompt == "a red apple"
    prompted = invert(model, picture, "a red apple", inversion_prompt="source", **settings)
    assert not torch.equal(one.trajectory, prompted.trajectory)
    assert one.noise_statistics is not None


def test_towards_the_noise_of_the_images_own_seed() -> None:
    model = tiny_model()
    latents: Tensor = torch.randn(2, 4, 8, 12)
    preset = get_preset("rf-inversion", num_inference_steps=4, gamma=1.0)
    field = GuidedVelocity(model, model.encode_prompt(""))
    path = invert_latents(field, latents, grid_for(model, preset, latents), preset, seeds=[7, 8])
    expected = initial_noise(model, [7, 8], 32, 48)
    torch.testing.assert_close(path.trajectory[0], expected)

"""Interpolation: the straight path, and a model that is not asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rectiflow.flow.solver import Euler
from rectiflow.invert import SCHEMES, from_seed
from rectiflow.models.generate import initial_noise
from tests.invert.fields import GRIDS, inverted, randn
from tests.tiny import tiny_model

X_1, NOISE = randn(3, 4), randn(3, 4, seed=1)


def never(x: Tensor, t: Tensor, step: int) -> Tensor:
    raise AssertionError("the field was asked")


@pytest.mark.parametrize("grid", GRIDS)
def test_states_lie_on_the_straight_path(grid: str) -> None:
    points = GRIDS[grid](5)
    path = inverted("interpolation", never, X_1, points, NOISE)
    assert len(path.trajectory) == 6
    for x, t in zip(path.trajectory, points, strict=True):
        torch.testing.assert_close(x, (1 - t) * NOISE + t * X_1)
    assert torch.equal(path.trajectory[-1], X_1)
    if points[0] == 0:
        assert torch.equal(path.trajectory[0], NOISE)
    assert path.evaluations.tolist() == [[0, 0, 0]] * 5
    assert path.residuals.isnan().all() and path.velocities is None and path.offsets is None
    solver = SCHEMES["interpolation"].solver(path, points, torch.arange(3))
    assert isinstance(solver, Euler)


def test_a_generated_image_is_noised_anew() -> None:
    """SDEdit forgets the noise that an image was made from."""
    model = tiny_model()
    settings: dict[str, Any] = {"strength": 1.0, "num_inference_steps": 4, "noise_seed": 5}
    made = from_seed(model, "red apple", 3, preset="sdedit", **settings)
    plain = from_seed(model, "red apple", 3, preset="euler", num_inference_steps=4)
    torch.testing.assert_close(made.latents, plain.latents)
    assert made.nfe == plain.nfe  # nothing beside the generation
    assert torch.equal(made.noise, initial_noise(model, [5], 32, 32))
    assert made.noise_statistics is None

"""DNAEdit's inversion against the paper's own notation, and what its offsets and velocities are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.invert.fields import GRIDS, Recorder, generated, inverted, randn, wild

STEPS = 6
X_1, NOISE = randn(3, 4), randn(3, 4, seed=1)


@pytest.mark.parametrize("grid", GRIDS)
def test_in_the_papers_notation(grid: str) -> None:
    """σ = 1 − t from the image at 0 to the noise at 1, and u = −v points to the noise."""
    points = GRIDS[grid](STEPS)
    path = inverted("dna", wild, X_1, points, NOISE)
    assert path.offsets is not None and path.velocities is not None
    sigmas, z, s = 1 - points, X_1, NOISE
    for i in reversed(range(STEPS)):
        sigma_c, sigma_n = sigmas[i + 1], sigmas[i]
        z_star = z + (sigma_n - sigma_c) / (1 - sigma_c) * (s - z)
        u_hat = -wild(z_star, 1 - sigma_n)
        delta = (z_star - z) / (sigma_n - sigma_c) - u_hat
        z = z_star - delta * (sigma_n - sigma_c)
        s = s - delta * (1 - sigma_c)
        torch.testing.assert_close(path.trajectory[i], z)
        torch.testing.assert_close(path.offsets[i], delta * (sigma_n - sigma_c))
        torch.testing.assert_close(path.velocities[i], -u_hat)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_remembered_velocities_lead_back(grid: str) -> None:
    points, velocity = GRIDS[grid](STEPS), Recorder()
    path = inverted("dna", velocity, X_1, points, NOISE)
    assert path.offsets is not None and path.velocities is not None
    for i, h in enumerate(points.diff()):
        replayed = path.trajectory[i] + h * path.velocities[i]
        torch.testing.assert_close(replayed, path.trajectory[i + 1])
        correction = path.correction(points, i)
        assert correction is not None and correction.abs().max() < 1e-12
        # The field said so beside the path, at the path's time there.
        said = wild(path.trajectory[i] + path.offsets[i], points[i])
        torch.testing.assert_close(path.velocities[i], said)
    assert [step for _, _, step in velocity.calls] == [5, 4, 3, 2, 1, 0]
    for x, t, i in velocity.calls:
        torch.testing.assert_close(x, path.trajectory[i] + path.offsets[i])
        assert t == points[i]
    assert path.evaluations.tolist() == [[1, 1, 1]] * STEPS


@pytest.mark.parametrize("grid", GRIDS)
def test_generated_with_its_offsets_it_is_exact(grid: str) -> None:
    points, velocity = GRIDS[grid](STEPS), Recorder()
    path = inverted("dna", wild, X_1, points, NOISE)
    again = generated("dna", velocity, path, points)
    torch.testing.assert_close(again, path.trajectory)
    assert len(velocity.calls) == STEPS


def test_the_refined_noise_is_where_the_last_velocity_points() -> None:
    """``S = x_i − t_i v_i``: after the first step, a guess is a step with the last velocity."""
    points, velocity = GRIDS["shifted"](STEPS), Recorder()
    path = inverted("dna", velocity, X_1, points, NOISE)
    assert path.velocities is not None
    t = points[STEPS - 1]
    torch.testing.assert_close(velocity.calls[0][0], t * X_1 + (1 - t) * NOISE)
    for x, _, i in velocity.calls[1:]:
        h = points[i + 1] - points[i]
        torch.testing.assert_close(x, path.trajectory[i + 1] - h * path.velocities[i + 1])


def test_noise_that_the_field_points_to_needs_no_alignment() -> None:
    def straight(x: Tensor, t: Tensor, step: int) -> Tensor:
        return X_1 - NOISE

    points = GRIDS["zigzag"](STEPS)
    path = inverted("dna", straight, X_1, points, NOISE)
    assert path.offsets is not None and path.offsets.abs().max() < 1e-12
    for x, t in zip(path.trajectory, points, strict=True):
        torch.testing.assert_close(x, (1 - t) * NOISE + t * X_1)

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from rectiflow.errors import InputError
from rectiflow.evaluate.frechet import (
    GaussianStatistics,
    frechet_distance,
    frechet_estimate,
    jackknife_error,
)

RNG = np.random.default_rng


def gaussian(mean: np.ndarray, covariance: np.ndarray) -> GaussianStatistics:
    return GaussianStatistics(mean, covariance, 1000)


def test_statistics_are_numpys_and_merge() -> None:
    rows = RNG(0).normal(1e3, 1, (30, 4))  # far from 0, where sums of squares would lose digits
    whole = GaussianStatistics.of(rows)
    np.testing.assert_allclose(whole.covariance, np.cov(rows, rowvar=False), rtol=1e-9)
    merged = GaussianStatistics.of(rows[:1]).merge(GaussianStatistics.of(rows[1:7]))
    merged = merged.merge(GaussianStatistics.of(rows[7:]))
    assert merged.count == 30
    np.testing.assert_allclose(merged.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-9)


def test_gaussians_with_common_axes_have_a_closed_form() -> None:
    axes = np.linalg.qr(RNG(0).normal(size=(5, 5)))[0]
    one, two = np.array([4.0, 1, 9, 0, 2]), np.array([1.0, 1, 16, 3, 0])  # of lower rank, too
    a = gaussian(np.zeros(5), axes @ np.diag(one) @ axes.T)
    b = gaussian(np.full(5, 2.0), axes @ np.diag(two) @ axes.T)
    expected = 20 + float(np.square(np.sqrt(one) - np.sqrt(two)).sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_two_dimensional_gaussians_have_a_closed_form() -> None:
    # In the plane tr √M = √(tr M + 2 √det M), which needs no root of a matrix.
    x = RNG(1).normal(size=(2, 2, 2))
    one, two = x[0] @ x[0].T, x[1] @ x[1].T
    product = one @ two
    cross = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    expected = np.trace(one + two) - 2 * cross
    found = frechet_distance(gaussian(np.zeros(2), one), gaussian(np.zeros(2), two))
    assert found == pytest.approx(expected, rel=1e-9)


class Flat(nn.Module):
    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).double()


def test_it_is_torchmetrics_fid_of_the_same_features() -> None:
    images = torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    images[30:] = images[30:] ** 2
    metric = FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    metric.update(images[:30], real=True)
    metric.update(images[30:], real=False)
    rows = images.flatten(1).numpy()
    found = frechet_estimate(rows[30:], GaussianStatistics.of(rows[:30])).value
    assert found == pytest.approx(float(metric.compute()), rel=1e-6)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = RNG(0).normal(size=12)
    left_out = [np.delete(values, j).mean() for j in range(12)]
    assert jackknife_error(left_out) == pytest.approx(values.std(ddof=1) / math.sqrt(12))


def test_the_error_tells_how_much_the_distance_scatters() -> None:
    reference = gaussian(np.zeros(3), np.eye(3))
    draws = RNG(0).normal(0.5, 1.5, (60, 200, 3))
    found = [frechet_estimate(rows, reference) for rows in draws]
    scatter = np.std([estimate.value for estimate in found], ddof=1)
    said = np.sqrt(np.mean([estimate.standard_error**2 for estimate in found]))
    assert said == pytest.approx(scatter, rel=0.3)  # each is known to a tenth


def test_files_give_back_the_numbers_and_their_digest(tmp_path: Path) -> None:
    found = GaussianStatistics.of(RNG(0).normal(size=(9, 4)))
    path = tmp_path / "new" / "reference.safetensors"
    found.save(path)
    again = GaussianStatistics.load(path, found.digest())
    assert again.digest() == found.digest() and again.count == 9
    np.testing.assert_array_equal(again.covariance, found.covariance)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    moved = GaussianStatistics(found.mean + 1e-15, found.covariance, 9)
    assert moved.digest() != found.digest()
    with pytest.raises(InputError, match="other reference statistics"):
        GaussianStatistics.load(path, moved.digest())


def test_what_has_no_distance_is_refused(tmp_path: Path) -> None:
    three = GaussianStatistics.of(np.eye(3))
    with pytest.raises(InputError, match="two or more"):
        frechet_distance(three, GaussianStatistics.of(np.ones((1, 3))))
    with pytest.raises(InputError, match="do not compare"):
        frechet_distance(three, GaussianStatistics.of(np.eye(2)))
    with pytest.raises(InputError, match="3 or more"):
        frechet_estimate(np.eye(2, 3), three)
    with pytest.raises(InputError, match="finite"):
        GaussianStatistics.of([[math.nan]])
    with pytest.raises(InputError, match="there is no file"):
        GaussianStatistics.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    with pytest.raises(InputError, match="holds no statistics"):
        GaussianStatistics.load(tmp_path / "text")

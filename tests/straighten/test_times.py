"""Time laws against their distribution functions, and draws against each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from rectiflow.errors import InputError
from rectiflow.straighten import times

N = 20_000


def drawn(law: times.Law, t_min: float = 0.0, t_max: float = 1.0) -> np.ndarray:
    return times.draw_times(law, 3, range(N), t_min, t_max).numpy()


def test_uniform_numbers_are_uniform_and_streams_are_independent() -> None:
    u = times.uniforms(7, "time", range(N), 2)
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    for column in u.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-3
    other = times.uniforms(7, "noise", range(N))[:, 0]
    another = times.uniforms(8, "time", range(N))[:, 0]
    for pair in ((u[:, 0], u[:, 1]), (u[:, 0], other), (u[:, 0], another)):
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 4 / N**0.5
    assert len(u[:, 0].unique()) == N


def test_the_u_shaped_law_has_the_density_it_is_said_to_have() -> None:
    """Against a numerical integral of cosh(4 (t - ½)), not against its closed form."""
    grid = np.linspace(0, 1, 2001)
    cumulative = integrate.cumulative_simpson(np.cosh(4 * (grid - 0.5)), x=grid, initial=0)

    def cdf(t: np.ndarray) -> np.ndarray:
        return np.interp(t, grid, cumulative / cumulative[-1])

    sample = drawn(times.u_shaped())
    assert stats.kstest(sample, cdf).pvalue > 1e-3
    assert stats.kstest(sample, "uniform").pvalue < 1e-12  # the test can tell
    ends = np.mean((sample < 0.05) | (sample > 0.95))
    middle = np.mean(abs(sample - 0.5) < 0.05)
    assert ends / middle == pytest.approx(
        np.sinh(2) / np.sinh(0.2) - np.sinh(1.8) / np.sinh(0.2), rel=0.1
    )


def test_the_logit_normal_law() -> None:
    sample = drawn(times.logit_normal(0.4, 1.3))
    assert stats.kstest(np.log(sample / (1 - sample)), stats.norm(0.4, 1.3).cdf).pvalue > 1e-3


def test_times_stay_inside_the_field() -> None:
    for law in (times.uniform(), times.u_shaped(), times.logit_normal(0, 3)):
        sample = drawn(law, 0.064, 0.9717)
        assert sample.min() >= 0.064 and sample.max() <= 0.9717
        assert sample.min() < 0.08 and sample.max() > 0.95
    assert stats.kstest((drawn(times.uniform(), 0.2, 0.7) - 0.2) / 0.5, "uniform").pvalue > 1e-3


def test_a_sample_has_its_time_whatever_the_batch() -> None:
    law = times.u_shaped()
    whole = times.draw_times(law, 1, range(100))
    assert torch.equal(torch.cat([times.draw_times(law, 1, [i]) for i in range(100)]), whole)
    assert torch.equal(times.draw_times(law, 1, range(1, 100, 2)), whole[1::2])
    assert not torch.equal(times.draw_times(law, 2, range(100)), whole)


def test_every_sample_can_have_an_interval_of_its_own() -> None:
    low = torch.linspace(0, 0.9, N, dtype=torch.float64)
    drawn_times = times.draw_times(times.uniform(), 0, range(N), low, low + 0.1)
    assert stats.kstest(((drawn_times - low) / 0.1).numpy(), "uniform").pvalue > 1e-3


def test_seeds_of_noise_do_not_collide() -> None:
    numbers = {*range(5000), *range(0, 2**32, 2**32 // 5000)}
    seeds = {times.noise_seed(0, "noise", number) for number in numbers}
    assert len(seeds) == len(numbers) > 9000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert times.noise_seed(0, "noise", 5) != times.noise_seed(1, "noise", 5)
    assert times.noise_seed(0, "noise", 5) != times.noise_seed(0, "time", 5)


def test_steps_and_points_of_a_student_are_drawn_evenly() -> None:
    steps = times.draw_steps([1, 2, 4], 0, range(6000))
    counts = [int((steps == k).sum()) for k in (1, 2, 4)]
    assert sum(counts) == 6000
    assert stats.chisquare(counts).pvalue > 1e-3
    grids = {k: torch.linspace(0.1, 1, k + 1) for k in (1, 2, 4)}
    points = times.draw_points(grids, steps, times.uniforms(0, "time", range(6000))[:, 0])
    for k in (1, 2, 4):
        seen, counts_of = points[steps == k].unique(return_counts=True)
        assert torch.equal(seen, grids[k][:-1].double())  # never the end: nothing is asked there
        if k > 1:
            assert stats.chisquare(counts_of.numpy()).pvalue > 1e-3
    windows = times.draw_windows(torch.linspace(0, 1, 5), 0, range(4000))
    assert stats.chisquare(windows.bincount(minlength=4).numpy()).pvalue > 1e-3
    assert int(windows.max()) == 3


def test_impossible_laws_are_refused() -> None:
    with pytest.raises(InputError, match="std"):
        times.logit_normal(0, 0)
    with pytest.raises(InputError, match="steepness"):
        times.u_shaped(0)
    with pytest.raises(InputError, match="sideways"):
        times.law("sideways")  # type: ignore[arg-type]

"""Figures with their intervals: of one row, and of several training seeds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from rectiflow.reproduce.figures import Estimate, Figures, over_seeds
from rectiflow.reproduce.instaflow import instaflow
from rectiflow.reproduce.workshop import Workshop
from tests.reproduce.rows import figures, flow, mean, pictures


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_the_interval_over_seeds_is_students(n: int) -> None:
    values = np.random.default_rng(n).normal(3, 2, n)
    found = over_seeds([Estimate(float(value), 0.5) for value in values])
    assert found is not None and found.n == n
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.half == pytest.approx((high - low) / 2, rel=1e-3)
    assert found.low + found.high == pytest.approx(2 * values.mean())


def test_one_seed_keeps_its_own_interval_and_none_is_none() -> None:
    assert over_seeds([Estimate(1.0, 0.5)]) == Estimate(1.0, 0.5, 1)
    assert over_seeds([]) is None


def test_below_is_for_the_whole_interval() -> None:
    assert Estimate(1, 0.4).below(Estimate(2, 0.5))
    assert not Estimate(1, 0.5).below(Estimate(2, 0.5))
    assert not Estimate(2, 0.4).below(Estimate(1, 0.5))


ROW = {
    **pictures(7.0, {"teacher-at-25": 0.25}),
    "judge": {"emoji": 0.5, "interval": {"emoji": [0.4, 0.6]}},
}
FLOW = flow(0.75, 1.5, {"1": 0.3, "4": 0.2})


@pytest.mark.parametrize(
    ("name", "figure", "value", "half"),
    [
        ("a", "frechet", 7.0, 2.262 * 0.1),
        ("a", "frechet_of_all", 17.0, 2.262 * 0.05),
        ("a", "clip_score", 0.5, 1.96 * 0.01),
        ("a", "likeness:teacher-at-25", 0.25, 1.96 * 0.0001),
        ("a", "emoji", 0.5, 0.1),
        ("f", "straightness", 0.75, 1.96 * 0.1),
        ("f", "transport_cost", 1.5, 1.96 * 0.1),
        ("f", "error:4", 0.2, 1.96 * 0.1),
    ],
)
def test_a_figure_of_a_row(name: str, figure: str, value: float, half: float) -> None:
    found = figures({"a": ROW, "f": FLOW}).of(name, figure)
    assert found is not None
    assert (found.mean, found.half) == (pytest.approx(value), pytest.approx(half))


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("nothing", "frechet"),
        ("a", "likeness:other"),
        ("without", "emoji"),
        ("f", "error:8"),
        ("without", "straightness"),
        ("errors", "transport_cost"),
    ],
)
def test_what_was_not_measured_is_none(name: str, figure: str) -> None:
    errors = {"error:1": mean(1.0), "model": "m"}
    rows = {"a": ROW, "f": FLOW, "without": pictures(1.0), "errors": errors}
    assert figures(rows).of(name, figure) is None


def test_over_takes_the_seeds_that_are_there() -> None:
    found = figures({"a-0": pictures(1.0), "a-2": pictures(3.0)})
    two = found.over(["a-0", "a-1", "a-2"], "frechet")
    assert two is not None and (two.mean, two.n) == (2.0, 2)
    one = found.over(["a-0", "a-1"], "frechet")
    assert one == found.of("a-0", "frechet")
    assert found.over(["a-1"], "frechet") is None


def test_an_unknown_figure_is_an_error() -> None:
    with pytest.raises(KeyError):
        figures({"a": ROW}).of("a", "beauty")


def test_differences_are_taken_in_pairs() -> None:
    """What all samples share cancels; of several seeds the means differ by t."""
    shared = np.random.default_rng(0).normal(size=200)
    rows = {name: flow(1.0, 1.0) for name in ("a", "b")}
    rows["a"]["samples"] = {"straightness": shared + 1}
    rows["b"]["samples"] = {"straightness": shared + np.linspace(0, 0.2, 200)}
    gap = figures(rows).difference([("a", "straightness")], [("b", "straightness")])
    assert gap is not None and gap.n == 1
    test = stats.ttest_rel(shared + 1, shared + np.linspace(0, 0.2, 200)).confidence_interval()
    # Of 200 samples the normal distribution stands for t.
    assert gap.mean == pytest.approx((test.low + test.high) / 2)
    assert gap.half == pytest.approx((test.high - test.low) / 2, rel=0.01)
    one, two = [4.0, 6.0, 8.5], [3.0, 4.0, 6.0]
    rows = {f"one-{i}": pictures(value) for i, value in enumerate(one)}
    rows |= {f"two-{i}": pictures(value) for i, value in enumerate(two)}
    cells = [[(f"{kind}-{i}", "frechet") for i in range(3)] for kind in ("one", "two")]
    gap = figures(rows).difference(*cells)
    ends = stats.ttest_rel(one, two).confidence_interval()
    assert gap is not None and gap.n == 3
    assert [gap.low, gap.high] == pytest.approx([ends.low, ends.high], abs=1e-3)


def test_a_share_keeps_the_ends_of_its_interval() -> None:
    row = ROW | {"judge": {"emoji": 0.95, "interval": {"emoji": [0.88, 0.98]}}}
    found = figures({"a": row}).of("a", "emoji")
    assert found is not None and (found.low, found.high) == (0.88, 0.98)
    assert found.scaled(100).ends == (88, 98)


def test_the_rows_that_are_there_are_read(tmp_path: Path) -> None:
    """Of the study, and nothing that lies beside them or was made for another."""
    place = Workshop(instaflow("small"), tmp_path, torch.float32)
    for folder in ("figures", "made"):
        (tmp_path / folder).mkdir()
    for name in ("teacher-at-25", "flow-teacher", "flow-2rf-0", "of-another-study"):
        (tmp_path / "figures" / f"{name}.json").write_text(json.dumps({"called": name}))
        np.savez(tmp_path / "figures" / f"{name}.samples.npz", a=np.ones(2))
        print_of = {**place.fingerprints, "flow-2rf-0": "another"}.get(name, "")
        (tmp_path / "made" / name).write_text(print_of)
    found = Figures.read(place)
    assert found.rows == {n: {"called": n} for n in ("teacher-at-25", "flow-teacher")}

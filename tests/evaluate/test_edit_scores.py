from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap

from rectiflow.emoji.edits import KINDS
from rectiflow.evaluate.edit_scores import (
    CLIP_METRICS,
    METRICS,
    interval,
    paired,
    pictures,
    score,
    summary,
    tied,
)
from rectiflow.evaluate.emoji_edits import cases
from rectiflow.evaluate.emoji_models import load_clip
from rectiflow.models.load import WEIGHTS


def test_scores_by_hand() -> None:
    edits = cases(12)
    targets = pictures([case.target for case in edits])
    wrong = targets.clone()
    wrong[0] += 0.1  # everywhere: 20 dB
    masks = [torch.from_numpy(case.mask(64)) for case in edits]
    wrong[1] = torch.where(masks[1], wrong[1] + 0.5, wrong[1])  # inside only
    wrong[2] = torch.where(masks[2], wrong[2], wrong[2] + 0.1)  # outside only
    scores = score(wrong, edits)
    assert tuple(scores) == METRICS
    assert scores["target_psnr"][0] == pytest.approx(20, abs=1e-4)
    assert scores["inside_mse"][1] == pytest.approx(0.25, rel=1e-5)
    assert scores["outside_mse"][1] == 0
    assert scores["outside_psnr"][1] == pytest.approx(120)
    assert scores["outside_ssim"][1] == pytest.approx(1)
    assert scores["target_psnr"][1] == pytest.approx(
        -10 * np.log10(0.25 * masks[1].float().mean().item()), abs=1e-3
    )
    assert scores["inside_mse"][2] == 0
    assert scores["outside_psnr"][2] == pytest.approx(20, abs=1e-4)
    for index, mask in enumerate(masks):
        assert np.isnan(scores["outside_mse"][index]) == (mask.float().mean() >= 0.98)
        assert np.isnan(scores["outside_ssim"][index]) == (mask.float().mean() >= 0.98)


def test_a_clip_sees_what_is_right_and_where() -> None:
    edits = cases(12)
    clip = load_clip(WEIGHTS / "emoji-clip")
    sources, targets = (
        pictures([getattr(case, side) for case in edits]) for side in ("source", "target")
    )
    right, unchanged = score(targets, edits, clip), score(sources, edits, clip)
    assert tuple(right) == (*METRICS, *CLIP_METRICS)
    assert np.all(right["feature_distance"] < 1e-6)
    assert np.all(unchanged["feature_distance"] > 1e-3)
    # Sources differ from the targets inside alone, up to what is too faint to count as edited.
    known = ~np.isnan(unchanged["outside_feature_distance"])
    inside = unchanged["feature_distance"][known]
    assert np.all(unchanged["outside_feature_distance"][known] < 0.1 * inside)
    assert right["clip_score"].mean() > unchanged["clip_score"].mean() + 5


def test_intervals_are_those_of_an_independent_bootstrap() -> None:
    values = np.random.default_rng(3).exponential(1, 60)
    expected = bootstrap((values,), np.mean, method="percentile", random_state=1)
    low, high = interval(values)
    width = high - low
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.05 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.05 * width)
    assert interval(values) == (low, high)


def test_paired_intervals() -> None:
    rng = np.random.default_rng(1)
    other = rng.normal(20, 5, 200)
    better = other + rng.normal(1, 0.5, 200)
    found = paired(better, other)
    assert found["low"] < 1 < found["high"] and not tied(found)
    # The normal interval of the differences, not of the ten times wider values.
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.2)
    same = paired(other, other)
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0} and tied(same)


def test_a_summary_leaves_out_what_has_no_outside() -> None:
    kinds = np.array([*KINDS, *KINDS])
    psnr = np.arange(24.0)
    outside = np.where(psnr % 2 == 0, psnr, np.nan)
    columns = {"target_psnr": psnr, "inside_mse": psnr / 100, "outside_mse": outside}
    found = summary(columns | {"nfe": psnr, "seconds": np.ones(24)}, kinds)
    assert found["outside_n"] == 12 and found["outside_mse"] == 11
    assert found["by_kind"]["random"] == 6 and list(found["by_kind"]) == list(KINDS)
    low, high = found["kind_intervals"]["random"]
    assert (low, high) == (0, 12)
    nowhere = summary({**columns, "outside_mse": np.full(24, np.nan)}, kinds)
    assert nowhere["outside_mse"] is None and "outside_mse" not in nowhere["intervals"]

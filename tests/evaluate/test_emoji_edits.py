from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from rectiflow.emoji.edits import KINDS
from rectiflow.evaluate.emoji_edits import (
    REPORTED_SEED,
    cases,
    edit_cases,
    evaluate_emoji_edits,
    paired,
    pictures,
    score,
)
from rectiflow.invert.presets import get_preset
from tests.tiny import tiny_model


def test_the_benchmark_is_ten_of_each_kind_and_its_beginning_is_balanced() -> None:
    edits = cases()
    assert Counter(case.kind for case in edits) == dict.fromkeys(KINDS, 10)
    assert [case.kind for case in cases(12)] == list(KINDS)
    assert cases(30) == edits[:30]
    assert not {case.source for case in edits} & {case.source for case in cases(120, 1_000_000)}
    assert REPORTED_SEED == 2_000_000


def test_scores_by_hand() -> None:
    edits = cases(12)
    targets = pictures([case.target for case in edits])
    wrong = targets.clone()
    wrong[0] += 0.1  # everywhere: 20 dB
    masks = [torch.from_numpy(case.mask(64)) for case in edits]
    wrong[1] = torch.where(masks[1], wrong[1] + 0.5, wrong[1])  # inside only
    scores = score(wrong, edits, np.zeros(12), 0.0)
    assert scores.target_psnr[0] == pytest.approx(20, abs=1e-4)
    assert scores.inside_mse[1] == pytest.approx(0.25, rel=1e-5)
    assert scores.outside_mse[1] == 0
    assert scores.target_psnr[1] == pytest.approx(
        -10 * np.log10(0.25 * masks[1].float().mean().item()), abs=1e-3
    )
    style = list(KINDS).index("style")
    if masks[style].float().mean() > 0.98:
        assert np.isnan(scores.outside_mse[style])


def test_paired_intervals() -> None:
    rng = np.random.default_rng(1)
    other = rng.normal(20, 5, 200)
    better = other + rng.normal(1, 0.5, 200)
    interval = paired(better, other)
    assert interval["low"] < 1 < interval["high"]
    # The normal interval of the differences, not of the ten times wider values.
    assert interval["high"] - interval["low"] == pytest.approx(2 * 1.96 * 0.5 / 200**0.5, rel=0.2)
    same = paired(other, other)
    assert same == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_case_fares_the_same_in_any_company() -> None:
    model = tiny_model(max_sequence_length=2)
    edits = cases(3)
    preset = get_preset("exact", num_inference_steps=3)
    together, cost = edit_cases(model, edits, preset)
    for index, case in enumerate(edits):
        alone, alone_cost = edit_cases(model, [case], preset)
        torch.testing.assert_close(alone[0], together[index], atol=1e-4, rtol=0)
        assert alone_cost[0] == pytest.approx(cost[index])


def test_figures_name_every_method_and_pair_the_default_with_each() -> None:
    model = tiny_model(max_sequence_length=2)
    figures, shown = evaluate_emoji_edits(model, limit=2)
    assert list(figures["methods"]) == ["nothing", "bound", "euler", "ftedit", "exact"]
    assert set(figures["paired"]) == {"exact - nothing", "exact - euler", "exact - ftedit"}
    # Euler: one evaluation a step each way. FTEdit: three, then two prompts with guidance and the
    # source's row where a control reads it, which its AdaLN replacement does in every step.
    assert figures["methods"]["euler"]["nfe"] == 60
    assert figures["methods"]["ftedit"]["nfe"] == 30 * 3 + 30 * 3
    assert all(len(images) == 2 for images in shown.values())

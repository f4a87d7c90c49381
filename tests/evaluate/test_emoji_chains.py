"""Chains whose right answers are known: what is drawn, and what is measured of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from rectiflow.emoji.render import render
from rectiflow.evaluate.emoji_chains import KINDS, measure_chains, sample_chain
from rectiflow.report.pictures import psnr
from rectiflow.steer import edit, edit_chain
from tests.tiny import tiny_model


def test_each_turn_changes_what_it_should_and_keeps_the_rest() -> None:
    for seed in range(2_000_000, 2_000_024):
        case = sample_chain(seed)
        assert case == sample_chain(seed) and len(case.scenes) == len(KINDS) + 1
        first, coloured, moved, drawn = case.scenes
        assert dataclasses.replace(coloured, items=first.items) == first != coloured
        assert dataclasses.replace(moved, background=first.background) == coloured != moved
        assert dataclasses.replace(drawn, style=first.style) == moved != drawn
        assert len(set(case.prompts)) == 4


def test_what_is_measured_is_the_chain_and_the_one_shot_edit() -> None:
    model = tiny_model()
    given = {"preset": "euler", "num_inference_steps": 2}
    rows = measure_chains(model, limit=2, first_seed=1_000_000, **given)
    assert [row["kind"] for row in rows] == list(KINDS)
    turns, shots, drifts = [], [], []
    for seed in (1_000_000, 1_000_001):
        case = sample_chain(seed)
        source, target = (render(case.scenes[i], model.default_size) for i in (0, 3))
        chain = edit_chain(model, source, prompts=case.prompts, one_shot=False, **given)
        shot = edit(model, source, source_prompt=case.prompts[0], prompts=case.prompts[3], **given)
        turns.append(psnr(chain.images[2], target))
        shots.append(psnr(shot.images[0], target))
        drifts.append(psnr(chain.images[2], shot.images[0]))
    assert rows[0]["drift"] is None and rows[0]["lost"]["mean"] == 0
    assert rows[2]["target_psnr"] == pytest.approx(np.mean(turns))
    assert rows[2]["one_shot_psnr"] == pytest.approx(np.mean(shots))
    assert rows[2]["drift"] == pytest.approx(np.mean(drifts))
    assert rows[2]["lost"]["mean"] == pytest.approx(np.mean(shots) - np.mean(turns))
    assert rows[2]["nfe"] == 2 + 2

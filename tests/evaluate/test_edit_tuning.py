from __future__ import annotations

import json

import numpy as np
import pytest

from rectiflow.errors import InputError
from rectiflow.evaluate.edit_ablations import ABLATIONS, verdict
from rectiflow.evaluate.edit_tuning import BUDGET, CANDIDATES, choices, chosen
from rectiflow.invert.presets import PRESETS


@pytest.mark.parametrize("name", list(CANDIDATES))
def test_every_method_has_the_same_number_of_settings_to_choose_from(name: str) -> None:
    tried = choices([name])[name]
    assert len(tried) == 1 + BUDGET
    assert tried[0] == ({}, PRESETS[name])
    presets = [preset for _, preset in tried]
    assert all(presets.count(preset) == 1 for preset in presets)  # none is wasted
    json.dumps([settings for settings, _ in tried])


def test_what_tuning_chose_is_read_back() -> None:
    found = {"methods": {"euler": {"chosen": {"guidance_scale": 2.0}, "candidates": []}}}
    assert chosen(json.loads(json.dumps(found))) == {"euler": {"guidance_scale": 2.0}}
    for wrong in ([], {}, {"methods": {"euler": {}}}, {"methods": {"euler": {"chosen": 3}}}):
        with pytest.raises(InputError, match="--tune"):
            chosen(wrong)
    with pytest.raises(InputError, match="no candidates"):
        choices(["nothing"])


@pytest.mark.parametrize("name", list(ABLATIONS))
def test_ablations_vary_one_setting_of_ours_and_of_the_papers(name: str) -> None:
    ablation = ABLATIONS[name]
    assert {base for base, _ in ablation.series.values()} == {"fast", "ftedit"}
    for label in ablation.series:
        presets = [ablation.preset(label, value) for value in ablation.values]
        assert [getattr(preset, ablation.setting) for preset in presets] == [*ablation.values]
    assert len(ablation.jobs) == len(ablation.series) * len(ablation.values)


def test_a_verdict_names_the_best_its_ties_and_the_worst() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(20, 5, 60)
    noise = rng.normal(0, 0.5, 60)
    found = verdict("exact", {0.1: base, 0.2: base + noise - noise.mean() - 0.01, 0.5: base - 1})
    assert found["best"] == 0.1 and found["ties"] == [0.2]
    assert found["sentence"].startswith(f"exact: best at 0.1 ({base.mean():.2f} dB); 0.2 is not")
    assert found["sentence"].endswith("at 0.5 it loses 1.00 dB (1.00 to 1.00).")
    alone = verdict("exact", {1: base, 2: base - 1, 3: base - 2})
    assert "every other value is worse" in alone["sentence"] and "at 3" in alone["sentence"]

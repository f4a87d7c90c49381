"""Which solver makes pairs where none is named."""

from __future__ import annotations

from pathlib import Path

import rectiflow as rf
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd_model


def test_the_solver_is_the_models_own(tmp_path: Path) -> None:
    for model, solver in ((tiny_model(), "euler"), (tiny_sd_model(), "dpmpp")):
        store = tmp_path / solver
        rf.make_pairs(model, "a cat", store, num_inference_steps=2, height=32, width=32)
        assert rf.PairStore.open(store).manifest.solver == solver

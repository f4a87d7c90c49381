"""What models of runs are called, in stores and cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from rectiflow.straighten.card import phase
from rectiflow.straighten.training_record import short_name


@pytest.mark.parametrize(
    ("folder", "name"),
    [("runs/2rf/model", "2rf"), ("runs/2rf", "2rf"), ("2rf", "2rf"), ("model", "model")],
)
def test_a_runs_model_is_called_as_its_run(folder: str, name: str) -> None:
    assert short_name(Path(folder)) == name


@pytest.mark.parametrize("muon", [None, 5e-4])
def test_a_card_names_every_optimiser(muon: float | None) -> None:
    config = {"steps": 2, "batch_size": 3, "optimizer": "adamw", "learning_rate": 3e-4}
    record = {"config": config | {"muon_learning_rate": muon, "kind": "reflow"}}
    (said,) = (str(value) for what, value in phase(record)["rows"] if what == "optimiser")
    assert said.startswith("adamw, learning rate 0.0003")
    assert ("Muon, 0.0005" in said) == (muon is not None)

"""What a run reports belongs to its steps, each once, whatever happened on the way."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rectiflow.errors import InputError
from rectiflow.straighten.metrics_log import MetricsLog, forget_after
from rectiflow.straighten.trainer import Trainer
from tests.straighten.toy import ToyTask, config, records


def lines(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_after_a_step_and_half_lines_are_forgotten(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    forget_after(log, 3)
    assert not log.exists()
    log.write_text("".join(json.dumps({"step": s, "loss": s / 3}) + "\n" for s in range(0, 8, 2)))
    whole = log.read_bytes()
    forget_after(log, 6)
    assert log.read_bytes() == whole
    log.write_bytes(whole + b'{"step": 4, "lo')
    forget_after(log, 5)
    assert lines(log) == [0, 2, 4]
    assert [*tmp_path.iterdir()] == [log]
    forget_after(log, -1)
    assert log.read_bytes() == b""


def test_numbers_that_json_cannot_write_are_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, ["jsonl"], -1)
    log.write({"step": 1, "loss": 0.5, "measures": {"a": float("nan"), "b": 1.0}})
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "loss": 0.5,
        "measures": {"a": None, "b": 1.0},
    }


def test_reports_of_a_resumed_run_are_those_of_an_unbroken_one(tmp_path: Path) -> None:
    """It stops between two lines of the log, so that losses wait in the checkpoint."""
    settings = config(log_every=7, checkpoint_minutes=9, save_every=5, keep_last=9)
    Trainer(ToyTask(), settings, tmp_path / "whole").train()
    broken = tmp_path / "broken"
    Trainer(ToyTask(), settings, broken).train()
    again = Trainer(ToyTask(), settings, broken)
    assert again.resume("checkpoint-25")
    again.train()
    assert lines(broken / "log.jsonl") == [*range(7, 60, 7), 60]
    assert records(broken) == records(tmp_path / "whole")


def test_tensorboard_files_hold_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Drawing(ToyTask):
        def draw_samples(self, path: Path) -> None:
            Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(path)

    settings = config(
        steps=12,
        measure_every=4,
        report_to=["jsonl", "tensorboard"],
        save_every=5,
        checkpoint_minutes=9,
    )
    Trainer(Drawing(), settings, tmp_path).train()
    again = Trainer(Drawing(), settings, tmp_path)
    assert again.resume("checkpoint-10")
    again.train()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    by_step = {event.step: event.value for event in events.Scalars("train/loss")}
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, 13)]
    logged = records(tmp_path)
    assert by_step == pytest.approx({line["step"]: line["loss"] for line in logged if line["step"]})
    measured = {event.step: event.value for event in events.Scalars("measures/held_out")}
    expected = {r["step"]: r["measures"]["held_out"] for r in logged if "measures" in r}  # type: ignore[index]
    assert measured == pytest.approx(expected) and list(expected) == [0, 4, 8, 12]
    (picture,) = events.Images("samples")
    assert (picture.step, picture.width, picture.height) == (12, 6, 4)


def test_a_missing_tensorboard_is_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # what Python does where there is none
    with pytest.raises(InputError, match=r"pip install 'rectiflow\[tensorboard\]'"):
        Trainer(ToyTask(), config(report_to=["tensorboard"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()

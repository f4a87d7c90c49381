"""What a run reports belongs to its steps, each once, whatever happened on the way."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from rectiflow.errors import InputError
from rectiflow.straighten import metrics_log, trackers
from rectiflow.straighten.config import TrainConfig
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


class Drawing(ToyTask):
    def draw_samples(self, path: Path) -> None:
        Image.fromarray(np.full((4, 6, 3), 200, np.uint8)).save(path)


def resumed_run(folder: Path, report_to: str) -> TrainConfig:
    """Of twelve steps, the last two of them taken twice; its settings."""
    settings = config(
        steps=12,
        measure_every=4,
        report_to=["jsonl", report_to],
        save_every=5,
        checkpoint_minutes=9,
    )
    Trainer(Drawing(), settings, folder).train()
    again = Trainer(Drawing(), settings, folder)
    assert again.resume("checkpoint-10")
    again.train()
    return settings


def test_tensorboard_files_hold_every_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    resumed_run(tmp_path, "tensorboard")
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


class Stub(GeneralTracker):
    """What accelerate asks of a tracker, and what one was told."""

    name, requires_logging_directory = "wandb", False
    told: ClassVar[list[Stub]] = []

    def __init__(self, run_name: str, **options: Any) -> None:
        super().__init__()
        self.options, self.settings, self.open = options | {"project": run_name}, {}, False
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, tuple[int, ...]]] = []
        Stub.told.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        self.open = True

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.logged.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.pictures += [(step, image.shape) for image in values["samples"]]

    def finish(self) -> None:
        self.open = False


def test_a_tracker_of_accelerate_is_told_what_the_log_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Stub)
    monkeypatch.setattr(trackers, "check_tracker", lambda name: None)
    monkeypatch.setattr(metrics_log, "check_tracker", lambda name: None)
    monkeypatch.setattr(Stub, "told", [])
    settings = resumed_run(tmp_path, "wandb")
    first, second = Stub.told
    assert not first.open and not second.open
    # The same run, although it is another process's.
    assert first.options == second.options and first.options["project"] == "rectiflow"
    assert first.options["resume"] == "allow" and len(first.options["id"]) == 12
    assert first.settings["learning_rate"] == settings.learning_rate
    assert [step for step, _ in second.logged] == [11, 12]
    assert first.pictures == [(12, (4, 6, 3))]
    logged = {line["step"]: line for line in records(tmp_path)}
    for step, values in [*first.logged[:11], *second.logged]:
        if step:
            assert values["train/loss"] == pytest.approx(logged[step]["loss"])
        measures: Any = logged[step].get("measures", {})
        assert {name for name in values if name.startswith("measures/")} == {
            f"measures/{name}" for name in measures
        }


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_without_a_network_it_stays_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own: they leave threads and services behind."""
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    program = f"""
from pathlib import Path
from tests.straighten.test_metrics_log import Drawing, Trainer, config
settings = config(steps=4, report_to=["jsonl", {name!r}])
Trainer(Drawing(), settings, Path("run")).train()
"""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pattern = "run/wandb/offline-run-*/run-*.wandb" if name == "wandb" else "trackio/*.db*"
    told = b"".join(file.read_bytes() for file in tmp_path.glob(pattern))
    assert b"train/loss" in told


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_tracker_is_named_before_anything_is_done(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=rf"needs the package {name}: pip install") as caught:
        Trainer(ToyTask(), config(report_to=[name]), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Silent(Stub):
        def start(self) -> None:
            raise RuntimeError("No API key\nconfigured")

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Silent)
    with pytest.raises(InputError, match=r"does not start .No API key configured.*WANDB_MODE"):
        trackers.open_tracker("wandb", tmp_path, {})


def test_a_missing_tensorboard_is_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # what Python does where there is none
    with pytest.raises(InputError, match=r'pip install "\.\[tensorboard\]"'):
        Trainer(ToyTask(), config(report_to=["tensorboard"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""A run that is told to stop, and two jobs in one folder: real processes, real signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from rectiflow import progress
from rectiflow.errors import InputError
from rectiflow.straighten import checkpoint, run_lock
from rectiflow.straighten.trainer import Trainer
from tests.straighten.toy import SlowTask, ToyTask, config, records, same_end, start

RARE = config(checkpoint_minutes=9, log_every=10, measure_every=10, decay_steps=0)


class Told(ToyTask):
    """Gets signals at the batch of a step."""

    def __init__(self, step: int, *signals: int) -> None:
        super().__init__()
        self.step, self.signals = step, signals

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        if indices[0] == self.step * 16:
            for number in self.signals:
                os.kill(os.getpid(), number)
        return super().batch(indices)


def ends(work: Callable[[], object], folder: Path) -> tuple[int, str]:
    """Its code, and its error if it has one."""
    file = folder / "errors"
    file.unlink(missing_ok=True)
    _, status = os.waitpid(start(work, ERRORS=str(file)), 0)
    return os.waitstatus_to_exitcode(status), file.read_text() if file.exists() else ""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    Trainer(ToyTask(), RARE, run).train()
    return run


@pytest.mark.parametrize(
    ("step", "signals"),
    [
        (12, [signal.SIGTERM]),
        (12, [signal.SIGINT]),
        (12, [signal.SIGUSR1]),
        (19, [signal.SIGUSR1, signal.SIGTERM]),  # the step that is to be measured next
        (59, [signal.SIGTERM]),
    ],
)
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on(
    whole: Path, tmp_path: Path, step: int, signals: list[int]
) -> None:
    """As one that was never stopped, its log included."""

    def told() -> None:
        trainer = Trainer(Told(step, *signals), RARE, tmp_path)
        trainer.train()
        assert trainer.stopped and trainer.step == step + 1

    def goes_on() -> None:
        trainer = Trainer(ToyTask(), RARE, tmp_path)
        assert trainer.resume() and trainer.step == step + 1
        trainer.train()
        assert not trainer.stopped

    assert ends(told, tmp_path) == (0, "")
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [f"checkpoint-{step + 1}"]
    assert not (tmp_path / "samples").exists()  # which may take longer than there is
    assert ends(goes_on, tmp_path) == (0, "")
    assert records(tmp_path) == records(whole)
    same_end(tmp_path, whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    child = start(
        lambda: Trainer(SlowTask(4.0, tmp_path / "begun"), RARE, tmp_path / "run").train(),
        ERRORS=str(tmp_path / "errors"),
    )
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    time.sleep(1.2)
    asked = time.monotonic()
    os.kill(child, signal.SIGINT)
    os.waitpid(child, 0)
    assert time.monotonic() - asked < 2
    assert (tmp_path / "errors").read_text() == "KeyboardInterrupt: "
    assert not checkpoint.checkpoints(tmp_path / "run")


def test_a_time_for_checkpoints_is_kept_however_seldom_there_is_a_log(tmp_path: Path) -> None:
    given = config(steps=5, log_every=1000, checkpoint_minutes=1e-9, keep_last=9, decay_steps=0)
    Trainer(ToyTask(), given, tmp_path).train()
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_two_jobs_in_one_folder_are_noticed(tmp_path: Path) -> None:
    """Until the first ends, however it ends; nothing of it is touched, and no lock is left."""
    run = tmp_path / "run"
    child = start(lambda: Trainer(SlowTask(0.2, tmp_path / "begun"), config(), run).train())
    try:
        while not checkpoint.checkpoints(run):
            time.sleep(0.01)
        second = Trainer(ToyTask(), config(), run)
        second.resume()
        with pytest.raises(InputError, match=rf"another job .*\(process {child} of .*-o$"):
            second.train()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (run / run_lock.NAME).exists()
    second.resume()
    second.train()
    assert second.step == 60 and not (run / run_lock.NAME).exists()


def test_without_locks_there_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with run_lock.held(tmp_path), run_lock.held(tmp_path):
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(run_lock, "fcntl", None)
    with run_lock.held(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_batch_job_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "LONGEST", 0.0)
    given = config(steps=4, decay_steps=0, checkpoint_minutes=9)
    Trainer(SlowTask(0.01, tmp_path / "begun"), given, tmp_path / "run").train()
    *_, line = capsys.readouterr().err.splitlines()
    for words in ("toy: 4 of 4, ", "step/s, ", " so far, ", " left, loss=", "samples_per_second="):
        assert words in line

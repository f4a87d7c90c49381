"""Training that is stopped, lengthened, shortened or gone back in, from the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rectiflow.models import load
from rectiflow.straighten import checkpoint
from rectiflow.straighten.training_record import read_record
from tests.app.conftest import Done, Run
from tests.app.forks import Forks, told
from tests.app.script import PAIRS, files, same
from tests.straighten.toy import records


@pytest.fixture
def words(script_teacher: Path, script_whole: Path, tmp_path: Path) -> list[str]:
    """A reflow of ten steps, each kept."""
    os.chdir(tmp_path)
    given = ["reflow", "--model", str(script_teacher / "tiny")]
    given += [
        "--pairs",
        str(script_whole / "pairs-1"),
        "--config",
        str(script_teacher / "short.yaml"),
    ]
    return [*given, "--set", "measure_every=0", "--set", "keep_last=99", "--set", "save_every=1"]


def taken(done: Done) -> list[int]:
    assert done.code == 0, done
    return [phase["step"] for phase in done.data["phases"]]


def test_a_finished_run_goes_on_to_more_steps_as_if_they_had_been_asked_for_at_once(
    run: Run, words: list[str]
) -> None:
    assert taken(run(*words, "-o", "r", "--set", "steps=4", "--json")) == [4]
    before = load("r/model", device="cpu").weight_hash
    done = run(*words, "-o", "r", "--set", "steps=6")
    assert "r: step 6 of 6" in done.out
    assert [line["step"] for line in records(Path("r"))] == [3, 4, 6]
    assert taken(run(*words, "-o", "w", "--set", "steps=6", "--json")) == [6]
    after = load("r/model", device="cpu").weight_hash
    assert after == load("w/model", device="cpu").weight_hash != before
    record = read_record(Path("r/model"))
    assert record is not None and record["config"]["steps"] == 6
    assert record["ran"] == [
        {"from_step": 0, "processes": 1, "device": "cpu", "mixed_precision": "no"}
    ]
    card = Path("r/model/README.md").read_text()
    assert "| processes | 1 (cpu) |" in card and "| precision | no |" in card
    # Not asked for anything, it is what it is.
    bare = [word for word in words if word != "--set" and "=" not in word]
    assert taken(run(*bare, "-o", "r", "--set", "steps=6", "--json")) == [6]


def test_a_run_is_not_made_shorter_than_it_is(run: Run, words: list[str]) -> None:
    run(*words, "-o", "r", "--set", "steps=4")
    before = {file: file.read_bytes() for file in map(Path("r").joinpath, files(Path("r")))}
    done = run(*words, "-o", "r", "--set", "steps=3")
    done.refuses("r has taken 4 steps, and 3 are asked for", "checkpoint-3", "-o")
    nonsense = ("--resume_from_checkpoint", "nonsense")
    run(*words, "-o", "r", "--set", "steps=4", *nonsense).refuses("no checkpoint 'nonsense' in r")
    assert before == {file: file.read_bytes() for file in map(Path("r").joinpath, files(Path("r")))}
    # Asked to go back it does, and ends as one that was never longer.
    back = ("--resume_from_checkpoint", "checkpoint-2", "--json")
    done = run(*words, "-o", "r", "--set", "steps=3", *back)
    assert taken(done) == [3] and done.data["phases"][0]["resumed_from"] == 2
    run(*words, "-o", "w", "--set", "steps=3")
    assert load("r/model", device="cpu").weight_hash == load("w/model", device="cpu").weight_hash
    assert records(Path("r")) == records(Path("w"))
    for found in checkpoint.checkpoints(Path("r")):
        for file in found.iterdir():
            file.unlink()
        found.rmdir()
    run(*words, "-o", "r", "--set", "steps=4").refuses("a model of 3 steps and no checkpoint")
    assert taken(run(*words, "-o", "r", "--set", "steps=3", "--json")) == [3]


def test_a_run_that_was_stopped_while_it_was_lengthened(run: Run, words: list[str]) -> None:
    run(*words, "-o", "r", "--set", "steps=2")
    done = run(*words, "-o", "r", "--set", "steps=9", "--max-minutes", 0, "--json")
    assert done.code == 75 and not done.data["finished"]
    assert [(p["step"], p["steps"], p["finished"]) for p in done.data["phases"]] == [(3, 9, False)]
    assert done.data["model"] is None
    record = read_record(Path("r/model"))  # as long as there is no other
    assert record is not None and record["config"]["steps"] == 2
    exported = run("export", "r", "-o", "e", "--json")
    assert exported.code == 0
    record = read_record(Path("e"))
    assert record is not None and record["run"]["step"] == 3


def test_phases_have_steps_of_their_own(
    run: Run, words: list[str], script_teacher: Path, script_whole: Path
) -> None:
    given = ["distill", "--model", str(script_teacher / "tiny"), "--config", "toy", "-o", "d"]
    given += ["--pairs", str(script_whole / "pairs-1"), "--set", "measure_every=0"]
    given += ["--set", "held_out=0", "--set", "batch_size=2", "--set", "save_every=1", "--json"]
    assert taken(run(*given, "--set", "steps=2")) == [2, 2]
    # The first is what the second began as.
    run(*given, "--set", "steps=3").refuses(
        "d/distill-clip began as the model of distill-l2 after 2", "--phase"
    )
    alone = ("--set", "steps=3", "--phase", "distill-clip")
    run(*given, *alone).refuses("begun with model d/distill-l2/model", "leave the setting out")
    one = run("distill", *given[3:], *alone)
    assert taken(one) == [3] and one.data["model"] == "d/distill-clip/model"
    record = read_record(Path("d/distill-clip/model"))
    assert record is not None and record["config"]["model"] == "d/distill-l2/model"
    # A checkpoint is of the phase that is gone on with, and not of those after it.
    run(*given, "-o", "f", "--set", "steps=3", "--max-minutes", 0)
    named = run(*given, "-o", "f", "--set", "steps=3", "--resume_from_checkpoint", "checkpoint-1")
    assert taken(named) == [3, 3]
    assert [phase["resumed_from"] for phase in named.data["phases"]] == [1, None]


def test_train_is_not_made_shorter_either(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "emoji-vae", "--set", "batch_size=2", "--set", "block_out_channels=[8,8,8]"]
    run(*words, "--set", "steps=2")
    run("train", "emoji-vae", "--set", "steps=1").refuses("has taken 2 steps, and 1 are asked for")
    done = run("train", "emoji-vae", "--set", "steps=4", "--max-minutes", 0)
    assert done.code == 75 and "step 3 of 4; the same command goes on" in done.out


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("pairs", signal.SIGTERM),
        ("reflow", signal.SIGUSR1),
        pytest.param("pairs", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("pairs", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("reflow", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("reflow", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_told_to_stop_and_gone_on_with(
    kind: str,
    number: int,
    script_whole: Path,
    script_teacher: Path,
    forks: Forks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By exit code 75, and nothing that was done is done again or is otherwise in the end."""
    monkeypatch.chdir(tmp_path)
    out = Path("out") / ("pairs-1" if kind == "pairs" else kind)
    if kind == "pairs":
        words = ["pairs", "--prompts", str(script_teacher / "prompts.txt"), "--out", str(out)]
        words += ["--solver", "dpmpp", "--guidance", "5", "--num", "24", *PAIRS.split()]
        words[words.index("--keep-seconds") + 1] = "1000"
    else:
        words = ["reflow", "--pairs", str(script_whole / "pairs-1"), "-o", str(out)]
        words += ["--config", str(script_teacher / "short.yaml")]
    words += ["--model", str(script_teacher / "tiny"), "--json"]
    shards = "shard-000001.*" if kind == "pairs" else "checkpoint-4"
    log = tmp_path / "log"
    code = told(words, lambda: list(out.glob(shards)), number, log)
    if code == 0:
        pytest.skip("it was faster than the signal")
    assert code == 75, log.read_text()
    if kind == "pairs":
        name = signal.Signals(number).name
        assert log.read_text() == (
            f"rectiflow: stopped by {name}: the same command goes on from what is there\n"
        )
    else:
        (phase,) = json.loads(log.read_text())["phases"]
        assert phase["step"] == checkpoint.step_of(checkpoint.checkpoints(out)[-1]) < 14
    kept = [file for file in out.rglob("*") if file.is_file()]
    done = forks(*words, cwd=tmp_path)
    assert done.code == 0, done
    if kind == "pairs":
        rows = 4 * len(
            list(f for f in kept if f.name.startswith("shard-0") and f.suffix == ".json")
        )
        assert json.loads(done.out)["made"] <= 24 - rows
        same(out, script_whole / "pairs-1")
    else:
        assert json.loads(done.out)["phases"][0]["resumed_from"] == phase["step"]
        assert records(out) == records(script_whole / kind)
        weights = "model/unet/diffusion_pytorch_model.safetensors"
        assert (out / weights).read_bytes() == (script_whole / kind / weights).read_bytes()


def accelerate(*options: str) -> dict[str, Any]:
    """What `accelerate launch` sets for its process, by the real one."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    words += ["--num_machines", "1", *options, "-m", "json.tool", "--help"]
    probe = "import json, os; print(json.dumps(dict(os.environ)))"
    words = [*words[: words.index("-m", 3)], "--no_python", sys.executable, "-c", probe]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_the_configuration_wins_over_accelerate_launch(
    script_whole: Path, script_teacher: Path, forks: Forks, tmp_path: Path
) -> None:
    """Bit for bit what runs without it, and a line that says so."""
    environment = accelerate("--mixed_precision", "bf16", "--dynamo_backend", "eager")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    words = ["reflow", "--pairs", script_whole / "pairs-1", "-o", "reflow", "--json"]
    words += ["--config", script_teacher / "short.yaml", "--model", script_teacher / "tiny"]
    done = forks(*words, cwd=tmp_path, env=environment)
    assert done.code == 0, done
    first, second = json.loads(done.out)["warnings"]
    assert "accelerate launch says mixed_precision bf16, and the run's own setting holds" in first
    assert "mixed_precision is no; change it with --set mixed_precision=" in first
    assert "dynamo_backend eager" in second and "compile is False" in second
    assert records(tmp_path / "reflow") == records(script_whole / "reflow")
    card = (tmp_path / "reflow" / "model" / "README.md").read_text()
    assert "| precision | no |" in card and "| processes | 1 (cpu) |" in card
    fsdp = os.environ | {"ACCELERATE_USE_FSDP": "true"}
    done = forks(*words, "--set", "steps=15", cwd=tmp_path, env=fsdp)
    assert done.code == 2 and "launch without --use_fsdp" in done.err

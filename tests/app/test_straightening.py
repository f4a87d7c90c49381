"""Reflow and distillation from the command line, on a tiny model and pairs that it really made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from rectiflow.errors import InputError, WorkError
from rectiflow.models import load
from rectiflow.straighten.api import distill, reflow
from rectiflow.straighten.pair_maker import make_pairs
from rectiflow.straighten.training_record import read_record
from tests.app.conftest import Run
from tests.tiny import tiny_sd3
from tests.tiny_sd import tiny_sd

PROMPTS = ["a red apple", "two cats", "a happy dog"]
SHORT = {
    "batch_size": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "held_out": 2,
    "held_out_steps": 2,
    "measure_every": 2,
    "log_every": 1,
}


def short(**more: object) -> list[str]:
    """As options."""
    return [word for k, v in (SHORT | more).items() for word in ("--set", f"{k}={json.dumps(v)}")]


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, `other` of its family, `sd3` of another, and the teacher's `pairs`."""
    folder = tmp_path_factory.mktemp("world")
    tiny_sd().save_pretrained(folder / "teacher")
    tiny_sd(seed=1).save_pretrained(folder / "other")
    tiny_sd3().save_pretrained(folder / "sd3")
    make_pairs(
        load(folder / "teacher", device="cpu"),
        PROMPTS,
        folder / "pairs",
        num=16,
        guidance_scale=2.0,
        num_inference_steps=3,
        shard_size=6,
        batch_size=6,
    )
    return folder


def test_reflow_then_distill(run: Run, world: Path, cwd: Path) -> None:
    words = ("--pairs", world / "pairs", "--model", world / "teacher", *short(steps=3))
    first = run("reflow", *words, "-o", "r", "--export", "two-rf", "--json").data
    assert first["finished"] and first["model"] == "r/model" and first["export"] == "two-rf"
    (phase,) = first["phases"]
    assert phase["step"] == 3 and phase["resumed_from"] is None and phase["loss"] > 0
    assert {"straightness", "transport_cost", "1_step_pair_error"} <= set(phase["measures"])
    assert list(Path("r/samples").glob("*.png"))
    # The teacher's hash is among the ancestors: its pairs go on being the student's.
    teacher = load(world / "teacher", device="cpu")
    for folder in ("r/model", "two-rf"):
        record = read_record(Path(folder))
        assert record is not None and teacher.weight_hash in record["ancestors"]
        assert record["config"]["kind"] == "reflow"
    words = ("--pairs", world / "pairs", "--model", "two-rf", *short(steps=2, measure_every=0))
    second = run("distill", *words, "-o", "d", "--export", "student", "--json").data
    assert second["finished"]
    stock = DiffusionPipeline.from_pretrained("student", dtype=torch.float32)
    image = stock("a red apple", num_inference_steps=1, guidance_scale=1.0, output_type="np")
    assert image.images.shape == (1, 32, 32, 3)
    assert load("student", device="cpu").metadata.student_steps == (1,)


def test_a_run_goes_on_and_is_not_another(run: Run, world: Path, cwd: Path) -> None:
    words = ("reflow", "--pairs", world / "pairs", "--model", world / "teacher", "-o", "r")
    first = run(*words, *short(steps=2), "--json").data
    run(*words, *short(steps=2, learning_rate=1e-4)).refuses("learning_rate 0.001 and not 0.0001")
    run(*words[:3], "--model", world / "other", "-o", "r").refuses("model", "other")
    # Finished, it is passed by; nothing is trained again.
    again = run(*words, "--json").data
    assert again["finished"] and again["phases"][0]["step"] == 2
    assert again["model"] == first["model"]


def test_a_named_configuration_runs_phase_after_phase(run: Run, world: Path, cwd: Path) -> None:
    words = ["distill", "--pairs", world / "pairs", "--model", world / "teacher"]
    words += ["--config", "toy", *short(steps=2, measure_every=0)]
    found = run(*words, "-o", "d", "--json").data
    assert [phase["name"] for phase in found["phases"]] == ["distill-l2", "distill-clip"]
    assert found["finished"] and found["model"] == "d/distill-clip/model"
    record = read_record(Path("d/distill-clip/model"))
    assert record is not None and record["config"]["model"] == "d/distill-l2/model"
    assert record["config"]["loss"] == "lpips"
    first = load("d/distill-l2/model", device="cpu").weight_hash
    assert first in record["ancestors"]
    run(*words, "-o", "e", "--phase", "third").refuses("distill-clip")
    one = run(*words, "-o", "f", "--phase", "distill-l2", "--json").data
    assert [phase["name"] for phase in one["phases"]] == ["distill-l2"]


def test_pairs_made_on_the_fly(run: Run, world: Path, cwd: Path) -> None:
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    given = {"prompts": "prompts.txt", "num_inference_steps": 2, "guidance_scales": [1.0, 2.0]}
    words = ("reflow", "--model", world / "teacher", *short(steps=2, measure_every=0, **given))
    found = run(*words, "--set", "guidance_embedded=true", "-o", "o", "--json").data
    assert found["finished"]
    assert load("o/model", device="cpu").guidance_embeds
    found = run(*words, "--set", "windows=2", "-o", "w", "--json").data
    assert found["finished"]
    assert load("w/model", device="cpu").metadata.student_steps == (2,)
    run("reflow", "--model", world / "teacher").refuses("--pairs", "prompts=FILE")


def test_wrong_input_is_one_line_and_leaves_nothing(run: Run, world: Path, cwd: Path) -> None:
    pairs = ("--pairs", world / "pairs", "--model", world / "teacher")
    run("reflow", *pairs[:2]).refuses("made by teacher", "--model FOLDER")
    run("reflow", *pairs, "--set", "speed=1").refuses("speed")
    run("reflow", *pairs, "--set", "steps=few").refuses("steps")
    run("reflow", *pairs, "--config", "instaflow-9b").refuses("instaflow-9b", "toy")
    run("reflow", *pairs, "--config", "toy", "--phase", "x").refuses("x")
    run("reflow", *pairs, "--phase", "x").refuses("--config")
    run("reflow", *pairs, "--set", "kind=distill").refuses("rectiflow distill")
    run("distill", *pairs, "--set", "loss=lpips").refuses("lpips_weights")
    run("distill", *pairs, "--config", "instaflow-0.9b").refuses("lpips_weights")
    run("distill", *pairs, *short(loss="lpips", lpips_weights="w")).refuses("no w")
    run("reflow", "--pairs", "nowhere").refuses("nowhere")
    run("reflow", *pairs[:2], "--model", "nowhere/at/all").refuses("nowhere")
    run("reflow", *pairs[:2], "--model", world / "other").refuses("other weights", "--any-teacher")
    run("reflow", *pairs[:2], "--model", world / "sd3").refuses("family sd ", "sd3")
    run("reflow", *pairs, "--set", "held_out=16").refuses("held out")
    Path("full").mkdir()
    Path("full/letter.txt").write_text("dear")
    run("reflow", *pairs, "--export", "full").refuses("other things")
    assert not list(Path().rglob("config.yaml")) and not list(Path().rglob("checkpoint-*"))


def test_another_teachers_pairs_on_request(run: Run, world: Path, cwd: Path) -> None:
    words = ("reflow", "--pairs", world / "pairs", "--model", world / "other", "--any-teacher")
    assert run(*words, *short(steps=1, measure_every=0), "-o", "r", "--json").data["finished"]


def test_a_file_of_settings(run: Run, world: Path, cwd: Path) -> None:
    pairs = ("--pairs", world / "pairs")
    Path("c.yaml").write_text(json.dumps(SHORT | {"steps": 1, "model": str(world / "teacher")}))
    found = run("reflow", "--config", "c.yaml", *pairs, "-o", "r", "--json").data
    assert found["finished"] and found["phases"][0]["steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True])
def test_two_processes(run: Run, world: Path, cwd: Path, split: bool) -> None:
    """One result on stdout, one model; split weights are written by one process afterwards."""
    given = {"steps": 3, "fsdp": split, "measure_every": 0, "held_out": 0}
    words = ["reflow", "--pairs", world / "pairs", "--model", world / "teacher", *short(**given)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", "-m", "rectiflow", *map(str, words), "-o", "two", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    data = json.loads(done.stdout)
    assert data["finished"] is not split and data["phases"][0]["finished"]
    if split:
        assert run(*words, "-o", "two", "--json").data["finished"]
    run(*words, "-o", "one", "--json")
    x = torch.randn(1, 4, 8, 8)
    ends = []
    for folder in ("one", "two"):
        model = load(f"{folder}/model", device="cpu")
        ends.append(model.velocity(x, 0.5, model.encode_prompt("a cat")))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-4)


def test_the_same_as_functions(world: Path, cwd: Path) -> None:
    quick = SHORT | {"measure_every": 0}
    teacher = load(world / "teacher", device="cpu")
    before = {name: p.clone() for name, p in teacher.network.named_parameters()}
    two = reflow(teacher, world / "pairs", run="r", steps=2, **quick)
    assert all(torch.equal(before[n], p) for n, p in teacher.network.named_parameters())
    assert any(not torch.equal(before[n], p) for n, p in two.network.named_parameters())
    one = distill(two, world / "pairs", steps=1, start="reuse", **quick)
    assert one.prediction_type == "velocity"
    again = reflow(teacher, world / "pairs", run="r", steps=2, **quick)
    assert again.weight_hash == two.weight_hash
    larger = distill(
        two, world / "pairs", steps=1, stacked="separate", loss="pseudo_huber", **quick
    )
    assert len(larger.network.unets) == 2
    with pytest.raises(WorkError, match="call again"):
        reflow(teacher, world / "pairs", steps=3, max_minutes=0, **quick)
    with pytest.raises(InputError, match="speed"):
        reflow(teacher, world / "pairs", speed=1)

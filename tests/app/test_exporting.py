"""``rectiflow export``: from a run or a model to a folder for stock diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rectiflow.models import load
from rectiflow.straighten.finished import find_run, load_student
from rectiflow.straighten.pair_maker import make_pairs
from rectiflow.straighten.training_record import read_record
from tests.app.conftest import Run
from tests.straighten.stock import python
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
    "save_every": 2,
}


def short(**more: object) -> list[str]:
    """As options."""
    return [word for k, v in (SHORT | more).items() for word in ("--set", f"{k}={json.dumps(v)}")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`teacher`, `pairs` and `run`, a distillation of 4 steps with a LoRA in 2 steps, over."""
    from rectiflow.app.cli import main

    folder = tmp_path_factory.mktemp("world")
    tiny_sd().save_pretrained(folder / "teacher")
    teacher = load(folder / "teacher", device="cpu")
    make_pairs(
        teacher, PROMPTS, folder / "pairs", num=12, guidance_scale=1.0, num_inference_steps=2
    )
    words = ["distill", "--pairs", folder / "pairs", "--model", folder / "teacher"]
    words += [*short(steps=4, lora_rank=2, student_steps=[1, 2]), "-o", folder / "run"]
    assert main([str(word) for word in words]) == 0
    return folder


@pytest.fixture
def world(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to spoil, which the teacher's name still means; and the working directory."""
    shutil.copytree(finished / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_comes_out_as_it_was_trained(run: Run, world: Path) -> None:
    data = run("export", "run", "-o", "out", "--dtype", "float32", "--json").data
    assert data["step"] == 4 and data["student_steps"] == [1, 2] and data["family"] == "sd"
    assert data["dtype"] == "float32" and data["folder"] == "out" and data["onnx"] == []
    # The finished model, and what the last checkpoint's averaged weights give, are the same.
    assert load("out", device="cpu").weight_hash == load("run/model", device="cpu").weight_hash
    latest = run("export", "run", "-o", "b", "--checkpoint", "latest", "--dtype", "float32")
    assert latest.code == 0
    a, b = load("out", device="cpu"), load("b", device="cpu")
    teacher = tiny_sd().unet.state_dict()
    assert any(not torch.equal(w, teacher[key]) for key, w in a.network.state_dict().items())
    for key, weight in a.network.state_dict().items():
        assert torch.allclose(b.network.state_dict()[key], weight, atol=1e-7)
    for folder in ("out", "b"):
        record = read_record(Path(folder))
        assert record is not None and record["config"]["lora_rank"] == 2
        assert record["run"]["step"] == 4 and record["run"]["samples"] == 16
        assert [step for step, _ in record["run"]["losses"]] == [1, 2, 3, 4]
        assert "1_step_pair_error" in record["run"]["measures"]
        assert record["pairs"]["num"] == 12 and record["ancestors"]
    assert "4 × 4 = 16 samples" in Path("out/README.md").read_text()
    # In stock diffusers.
    code = "from diffusers import DiffusionPipeline as P\np = P.from_pretrained('out')\n"
    code += "print(p('a red apple', num_inference_steps=1, guidance_scale=1).images[0].size)"
    assert "(32, 32)" in python(code, world)


def test_an_earlier_checkpoint(run: Run, world: Path) -> None:
    """It needs neither the pairs nor a run that is over."""
    shutil.rmtree(world / "run" / "model")
    data = run("export", "run", "-o", "early", "--checkpoint", "checkpoint-2", "--json").data
    assert data["step"] == 2
    record = read_record(Path("early"))
    assert record is not None and record["run"]["samples"] == 8
    assert [step for step, _ in record["run"]["losses"]] == [1, 2]
    state = load_student(world / "run", "checkpoint-2")
    late = load_student(world / "run")
    assert late.step == 4
    pairs = zip(state.model.network.parameters(), late.model.network.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_model_as_it_is(run: Run, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = run("export", finished / "teacher", "-o", out, "--dtype", "bfloat16", "--json").data
    assert data["step"] is None and data["student_steps"] == []
    model = load(out, device="cpu")
    assert model.prediction_type == "epsilon" and model.metadata.student_steps is None
    teacher = tiny_sd().unet.state_dict()
    for key, weight in model.network.state_dict().items():
        assert torch.equal(weight, teacher[key].bfloat16().float())
    steps = ("--steps", "1", "--steps", "4")
    again = run("export", finished / "teacher", "-o", out, *steps, "--json").data
    assert again["student_steps"] == [1, 4] and again["dtype"] == "float16"


def test_what_cannot_be_exported_is_one_line(
    run: Run, world: Path, finished: Path, tmp_path: Path
) -> None:
    def refused(*words: object, saying: str) -> None:
        run("export", *words, "-o", "out").refuses(saying)
        assert not Path("out").exists() and not Path(".out.tmp").exists()

    refused("nowhere", saying="unknown model 'nowhere'")
    refused("run", "--checkpoint", "checkpoint-3", saying="there are: checkpoint-2, checkpoint-4")
    refused(finished / "teacher", "--checkpoint", "latest", saying="--checkpoint is for runs")
    refused(finished / "pairs", saying="no run (no config.yaml) and no model")
    weights = world / "run" / "checkpoint-4" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused("run", "--checkpoint", "latest", saying="ema.safetensors is not what was written")
    shutil.rmtree(world / "run" / "checkpoint-4")
    text = (world / "run" / "config.yaml").read_text()
    changed = text.replace("lora_rank: 2", "lora_rank: 3")
    (world / "run" / "config.yaml").write_text(changed)
    refused("run", "--checkpoint", "latest", saying="another network than its config.yaml")
    tiny_sd(seed=1).save_pretrained(tmp_path / "other")
    changed = text.replace(str(finished / "teacher"), str(tmp_path / "other"))
    (world / "run" / "config.yaml").write_text(changed)
    refused("run", "--checkpoint", "latest", saying="put the old model back in its place")
    shutil.rmtree(world / "run" / "checkpoint-2")
    refused("run", "--checkpoint", "latest", saying="no checkpoint yet")
    (world / "run" / "config.yaml").write_text("recipe: emoji-vae\nsteps: 1\n")
    refused("run", "--checkpoint", "latest", saying="rectiflow train emoji-vae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    run("export", finished / "teacher", "-o", "full").refuses("other things", "letter.txt")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_onnx_is_for_one_family(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    tiny_sd3().save_pretrained(tmp_path / "sd3")
    run("export", tmp_path / "sd3", "-o", tmp_path / "out", "--onnx").refuses("family sd3")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_onnx_beside_it(run: Run, finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    data = run("export", finished / "run", "-o", tmp_path / "out", "--onnx", "--json").data
    assert data["onnx"] == [f"onnx/{n}.onnx" for n in ("decoder", "denoiser", "text_encoder")]
    # An export with ONNX files beside it is an export, and is replaced.
    again = run("export", finished / "run", "-o", tmp_path / "out", "--json").data
    assert again["onnx"] == [] and not (tmp_path / "out" / "onnx").exists()


def test_of_several_phases_it_is_the_last(tmp_path: Path) -> None:
    for name, model in (("b", "teacher"), ("a", str(tmp_path / "b" / "model"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"model: {model}\n")
    assert find_run(tmp_path) == tmp_path / "a"
    assert find_run(tmp_path / "b") == tmp_path / "b"
    (tmp_path / "empty").mkdir()
    assert find_run(tmp_path / "empty") is None

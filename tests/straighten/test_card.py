"""The model card: its snippet runs as it stands, and what it says is what was done."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from rectiflow.models import Metadata
from rectiflow.straighten.export import save_pipeline
from tests.straighten.stock import python
from tests.tiny import tiny_model
from tests.tiny_sd import tiny_sd_model

MANIFEST = {
    "model": "owner/teacher",
    "weight_hash": "abcdef" * 10,
    "solver": "dpmpp",
    "num_inference_steps": 25,
    "guidance_scale": 5.0,
    "num": 1000,
    "num_prompts": 77,
    "prompts_sha256": "123456" * 10,
    "base_seed": 42,
}


def record(**config: Any) -> dict[str, Any]:
    settings = {
        "kind": "distill",
        "recipe": "distill",
        "steps": 300,
        "batch_size": 16,
        "student_steps": [1],
        "loss": "pseudo_huber",
        "seed": 7,
        "start": "exact",
        "optimizer": "adamw",
        "learning_rate": 1e-4,
    }
    return {
        "began_as": {"model": "owner/teacher", "weight_hash": "abcdef" * 10},
        "pairs": MANIFEST,
        "config": settings | config,
        "measures": {"straightness": 0.0123, "1_step_pair_error": 0.25, "4_step_error": 0.5},
    }


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def snippet(text: str) -> str:
    match = re.search("```python\n(.*?)```", text, re.DOTALL)
    assert match is not None
    return match[1]


def test_the_snippets_run_as_they_stand(tmp_path: Path) -> None:
    """In the folder where the model is, and nothing else of ours: one step, half precision."""
    student = tiny_sd_model(rectified=True, metadata=Metadata(default_size=24))
    save_pipeline(student, tmp_path / "student", record=record(), student_steps=(1,))
    flow = tiny_model(t5=True)
    save_pipeline(
        flow,
        tmp_path / "flow",
        dtype=torch.float32,
        record=record(student_steps=[4]),
        student_steps=(4,),
    )
    codes = []
    for name in ("student", "flow"):
        code = snippet((tmp_path / name / "README.md").read_text())
        assert "guidance_scale=1," in code
        codes.append(code.replace("picture.png", f"{name}.png"))
    assert "num_inference_steps=1," in codes[0] and "height=24," in codes[0]
    assert "dtype" not in codes[0]
    assert "sigmas=[1 - i / 4 for i in range(4)]," in codes[1]
    python("\n".join(codes), tmp_path)
    with Image.open(tmp_path / "student.png") as image:
        assert image.size == (24, 24)
    with Image.open(tmp_path / "flow.png") as image:
        assert image.size == (32, 32)


def test_what_it_says(tmp_path: Path) -> None:
    model = tiny_sd_model(rectified=True, metadata=Metadata(licence="CreativeML-OpenRAIL-M"))
    before = record(kind="reflow", recipe="reflow", steps=500, time_law="u_shaped")
    given = record() | {"before": before}
    given["run"] = {"step": 200, "samples": 3200, "loss": 0.03125, "losses": [[200, 0.03125]]}
    save_pipeline(model, tmp_path / "out", record=given, student_steps=(1, 4))
    text = (tmp_path / "out" / "README.md").read_text()
    assert front(text) == {
        "license": "creativeml-openrail-m",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "owner/teacher",
        "tags": ["rectiflow", "rectified-flow", "one-step"],
    }
    for words in (
        "# out\n",
        "makes a picture in 1 step, without guidance: a student of owner/teacher",
        "### 1. reflow",
        "500 × 16 = 8000 samples",
        "### 2. distill",
        "200 × 16 = 3200 samples",  # what the run did, not what it was going to do
        "| loss at the end | 0.03125 |",
        "| loss | pseudo_huber |",
        "| times | u_shaped |",
        "| seed | 7 |",
        "1000 of teacher (weights `abcdefabcdef`): 25 steps of dpmpp, guidance 5.0, 77 prompts",
        "seeds from 42",
        "| S(Z), straightness (0 is straight) | 0.0123 |",
        "| error of 1 step against the pairs | 0.25 |",
        "| error of 4 steps against its accurate solution | 0.5 |",
        "Made for 1, 4 steps.",
        "with one step, 999",
        "CreativeML-OpenRAIL-M",
        f"torch {torch.__version__}",
    ):
        assert words in text, words
    assert "None" not in text


def test_a_flow_that_is_only_straightened_is_not_called_a_student(tmp_path: Path) -> None:
    save_pipeline(tiny_sd_model(), tmp_path / "out", record=record(kind="reflow"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "straightened by reflow from owner/teacher" in text
    assert "num_inference_steps=25," in snippet(text) and "guidance_scale=1," in snippet(text)
    assert "Made for" not in text and "one-step" not in front(text)["tags"]
    assert "license" not in front(text) and "does not name it" in text


@pytest.mark.parametrize("path", ["/home/someone/models/teacher", "runs/long/way/teacher"])
def test_a_local_teacher_is_no_base_model_and_its_path_stays_here(
    path: str, tmp_path: Path
) -> None:
    given = record() | {"began_as": {"model": path, "weight_hash": "0" * 64}}
    given["pairs"] = MANIFEST | {"model": path}
    save_pipeline(tiny_sd_model(), tmp_path / "out", record=given, student_steps=(1,))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in front(text) and path not in text
    assert "| begun as | teacher, weights `000000000000` (start: exact) |" in text


def test_a_model_that_was_not_trained_here(tmp_path: Path) -> None:
    model = tiny_sd_model("v_prediction")
    model.name = "owner/teacher"
    save_pipeline(model, tmp_path / "out", dtype=torch.bfloat16)
    text = (tmp_path / "out" / "README.md").read_text()
    assert front(text)["base_model"] == "owner/teacher" and "## Training" not in text
    assert "guidance_scale=7.5," in snippet(text) and "files are in bfloat16" in text
    assert "The network predicts v_prediction of a diffusion" in text

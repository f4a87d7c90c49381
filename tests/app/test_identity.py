"""The same weights under other settings are another teacher: stores, runs, inversions."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rectiflow as rf
from rectiflow.app.cli import main
from rectiflow.errors import InputError
from rectiflow.straighten.export import save_pipeline
from rectiflow.straighten.training_record import read_record
from tests.app.conftest import Run
from tests.tiny import tiny_sd3
from tests.tiny_sd import tiny_sd

SCHEDULER = "scheduler/scheduler_config.json"
PAIRS = ("--num", 8, "--shard-size", 2, "--batch-size", 2, "--steps", 2, "--size", 32)
TRAIN = {"steps": 4, "batch_size": 2, "held_out": 0, "measure_every": 0, "log_every": 1}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    tiny_sd().save_pretrained(folder / "sd")
    tiny_sd3().save_pretrained(folder / "sd3")
    return folder


@pytest.fixture
def teacher(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be edited."""
    shutil.copytree(kept / "sd", tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    return Path("teacher")


def edit(file: Path, **settings: Any) -> dict[str, Any]:
    """What was there before."""
    before: dict[str, Any] = json.loads(file.read_text())
    file.write_text(json.dumps(before | settings))
    return before


Pairs = Callable[..., Any]


def making(*words: object) -> list[str]:
    """The command that makes the pairs, in the teacher's folder's."""
    Path("prompts.txt").write_text("a red cat\ntwo apples\n")
    given = ("--prompts", "prompts.txt", "--model", "teacher", "--out", "store", *PAIRS)
    return ["pairs", *map(str, (*given, *words))]


@pytest.fixture
def pairs(run: Run) -> Pairs:
    return lambda *words: run(*making(*words))


@pytest.fixture(scope="module")
def first_half(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of which the first of two workers has made its part."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(kept / "sd", folder / "teacher")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(making("--worker", "1/2")) == 0
    return folder / "store"


@pytest.fixture
def begun(first_half: Path, teacher: Path) -> Path:
    """A copy beside the teacher."""
    return Path(shutil.copytree(first_half, "store"))


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        (
            SCHEDULER,
            {"prediction_type": "v_prediction"},
            f"prediction_type: epsilon in the store, v_prediction in teacher/{SCHEDULER}",
        ),
        (SCHEDULER, {"beta_end": 0.02}, "beta_end: 0.012 in the store, 0.02 in teacher/"),
        (
            SCHEDULER,
            {"rescale_betas_zero_snr": True},
            "alphas_cumprod: [0.99915, 0.675432, 0.277669, 0.0566234, 0.00466",
        ),
        (SCHEDULER, {"use_karras_sigmas": True}, "use_karras_sigmas: false in the store, true in"),
        (
            "vae/config.json",
            {"scaling_factor": 0.18215},
            "scaling_factor: 1.5 in the store, 0.18215 in teacher/vae/config.json",
        ),
        (
            "unet/config.json",
            {"attention_head_dim": 4},
            "attention_head_dim: 2 in the store, 4 in teacher/unet/config.json",
        ),
        (
            "tokenizer/tokenizer_config.json",
            {"model_max_length": 20},
            "length: 24 in the store, 20",
        ),
    ],
)
def test_two_workers_and_a_teacher_edited_between_them(
    pairs: Pairs, begun: Path, teacher: Path, file: str, change: dict[str, Any], words: str
) -> None:
    before = {path: path.read_bytes() for path in begun.iterdir()}
    edit(teacher / file, **change)
    pairs("--worker", "2/2").refuses(
        "store was begun with the same weights as another field", words
    )
    assert {path: path.read_bytes() for path in begun.iterdir()} == before


def test_notes_that_change_no_picture_are_no_other_field(
    pairs: Pairs, begun: Path, teacher: Path
) -> None:
    edit(teacher / SCHEDULER, _diffusers_version="0.10.0", trained_betas=None)
    edit(teacher / "text_encoder/config.json", architectures=["X"], transformers_version="4.0")
    edit(teacher / "unet/config.json", _name_or_path="/home/me/unet")
    assert pairs("--worker", "2/2", "--json").data["complete"]


def test_old_stores_go_on_and_stay_as_they_are(
    pairs: Pairs, run: Run, begun: Path, teacher: Path
) -> None:
    """Of format 1, whose teacher is known by its weights alone."""
    manifest = begun / "manifest.json"
    said = json.loads(manifest.read_text())
    del said["identity"]
    text = json.dumps(said | {"format": 1}, indent=2, sort_keys=True)
    manifest.write_text(text)
    edit(teacher / SCHEDULER, prediction_type="v_prediction")  # nobody can know
    assert pairs("--worker", "2/2", "--json").data["complete"]
    assert manifest.read_text() == text
    assert "not recorded: the teacher is known by" in run("pairs", "inspect", "store").out
    words = [word for k, v in TRAIN.items() for word in ("--set", f"{k}={v}")]
    assert run("reflow", "--pairs", "store", "--model", teacher, *words, "-o", "r").code == 0


def test_training_asks_for_the_teachers_field_too(pairs: Pairs, run: Run, teacher: Path) -> None:
    """Of the pairs when it begins, and of the model when it goes on."""
    assert pairs().code == 0
    shutil.copytree(teacher, "other")
    edit(Path("other") / SCHEDULER, prediction_type="v_prediction")
    words = [word for k, v in TRAIN.items() for word in ("--set", f"{k}={v}")]
    train = ("reflow", "--pairs", "store", *words)
    run(*train, "--model", "other", "-o", "r").refuses(
        "store has pairs of the same weights as another field",
        "--any-teacher",
        f"prediction_type: epsilon in the store, v_prediction in other/{SCHEDULER}",
    )
    begun = (*train, "--model", teacher, "-o", "r")
    assert run(*begun, "--max-minutes", 0, "--json").data["finished"] is False
    was = edit(teacher / SCHEDULER, beta_start=0.001)
    run(*begun, "--any-teacher").refuses("--any-teacher")
    (teacher / SCHEDULER).write_text(json.dumps(was))
    found = run(*begun, "--json").data
    assert found["finished"] and found["phases"][0]["resumed_from"]
    # A student goes on learning from its teacher's pairs, if they are of the teacher it had.
    again = ("distill", "--pairs", "store", "--model", "r/model", *words)
    store = Path("store/manifest.json")
    text = store.read_text()
    store.write_text(text.replace('"scheduler.beta_end": 0.012', '"scheduler.beta_end": 0.011'))
    run(*again, "-o", "d").refuses("beta_end: 0.011 in the store, 0.012 in teacher/scheduler/")
    store.write_text(text)
    assert run(*again, "-o", "d").code == 0


def test_a_run_is_resumed_as_the_same_field(pairs: Pairs, run: Run, teacher: Path) -> None:
    assert pairs().code == 0
    words = [word for k, v in TRAIN.items() for word in ("--set", f"{k}={v}")]
    begun = ("reflow", "--pairs", "store", "--any-teacher", "--model", teacher, *words, "-o", "r")
    assert run(*begun, "--max-minutes", 0, "--json").data["finished"] is False
    edit(teacher / SCHEDULER, prediction_type="v_prediction")
    said = f"prediction_type: epsilon in the checkpoint, v_prediction in teacher/{SCHEDULER}"
    run(*begun).refuses("is of another run", said)
    run("export", "r", "-o", "out").refuses("was begun as another field", said)


def test_a_saved_inversion_is_edited_as_the_same_field(
    run: Run, kept: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kept / "sd3", "m")
    made = ("--model", "m", "--prompt", "a red cat", "--steps", 2)
    assert run("invert", photo, *made, "-o", "i.safetensors").code == 0
    edited = ("edit", "i.safetensors", "--model", "m", "--to", "a dog", "-o", "out")
    assert run(*edited).code == 0
    edit(Path("m") / SCHEDULER, shift=1.0)
    run(*edited).refuses(
        "i.safetensors was made by the same weights as another field",
        f"shift: 3.0 in i.safetensors, 1.0 in m/{SCHEDULER}",
    )


def test_students_without_a_run_know_where_they_come_from(pairs: Pairs, teacher: Path) -> None:
    assert pairs().code == 0
    begun = rf.load(teacher, device="cpu")
    reflowed = rf.reflow(begun, "store", **TRAIN)
    one_step = rf.distill(reflowed, "store", **TRAIN)
    assert one_step.name == "distill of reflow of teacher"
    record, weights = one_step.record, (begun.weight_hash, reflowed.weight_hash)
    assert record is not None and record["config"]["kind"] == "distill"
    assert record["before"]["config"]["kind"] == "reflow" and record["before"]["run"]["loss"]
    assert record["began_as"] == {"model": reflowed.name, "weight_hash": weights[1]}
    assert record["before"]["began_as"]["weight_hash"] == weights[0]
    assert set(weights) == set(record["ancestors"]) == set(record["identities"])
    # Nothing in it is of a folder that is gone, and a folder of it says the same.
    assert not [text for text in strings(record) if Path(text).is_absolute()]
    save_pipeline(one_step, Path("out"), record=record, student_steps=(1,))
    assert read_record(Path("out")) == record
    card = Path("out/README.md").read_text()
    assert "reflow of teacher" in card and tempfile.gettempdir() not in card


def strings(data: Any) -> list[str]:
    if isinstance(data, dict):
        return [text for key, value in data.items() for text in (key, *strings(value))]
    if isinstance(data, list):
        return [text for value in data for text in strings(value)]
    return [data] if isinstance(data, str) else []


def test_pictures_and_batches_are_known_by_the_field_too(
    run: Run, kept: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kept / "sd3", "m")
    assert run("generate", "a red cat", "--model", "m", "--steps", 1, "-o", "drawn").code == 0
    Path("rows.csv").write_text(f"image,from,to,output\n{photo},a cat,a dog,one\n")
    batch = ("edit", "--batch", "rows.csv", "--model", "m", "--steps", 2, "-o", "out", "--json")
    assert run(*batch).data["done"] == 1
    assert run(*batch).data["skipped"] == 1
    edit(Path("m") / SCHEDULER, shift=1.0)
    run("replay", "drawn/0.png").refuses("0.png was made with these weights under other settings")
    assert run(*batch).data["done"] == 1


def test_one_prompt_is_one_and_numbers_are_none(kept: Path, tmp_path: Path) -> None:
    model = rf.load(kept / "sd", device="cpu")
    given: dict[str, Any] = {"num_inference_steps": 1, "height": 32, "width": 32}
    made = rf.make_pairs(model, "a cat", tmp_path / "store", **given)
    assert (made.manifest.num, made.manifest.num_prompts) == (1, 1)
    assert rf.PairStore.open(tmp_path / "store").prompts == ["a cat"]
    for wrong in ([1, 2], 7, Path("prompts.txt"), b"a cat", ["a cat", None]):
        with pytest.raises(InputError, match=r"give text|is not a prompt"):
            rf.make_pairs(model, wrong, tmp_path / "other", **given)  # type: ignore[arg-type]

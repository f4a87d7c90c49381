"""The command line with a Stable Diffusion model: its own solver, and what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest

import rectiflow as rf
from rectiflow.models import Metadata, write_metadata
from tests.app.conftest import Run
from tests.tiny_sd import tiny_sd


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_sd("v_prediction").save_pretrained(folder)
    write_metadata(Metadata(family="sd", default_num_inference_steps=3), folder)
    return folder


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_generate_and_replay(run: Run, diffusion: Path, cwd: Path) -> None:
    words = ("generate", "two red cats", "--model", diffusion, "--seed", 7, "--json")
    data = run(*words, "-o", "own.png").data
    assert data["nfe"] == 3 * 2
    settings = data["settings"]
    assert (settings["method"], settings["grid"]) == ("dpmpp", None)
    assert settings["guidance_scale"] == 7.5
    assert run("replay", "own.png").code == 0
    for solver in ("unipc", "ddim"):
        assert run(*words, "--solver", solver, "-o", f"{solver}.png").data["nfe"] == 3 * 2
    data = run(*words, "--solver", "heun", "-o", "ours.png").data
    assert (data["nfe"], data["settings"]["grid"]) == (3 * 2 * 2, "student")
    assert run("replay", "ours.png").code == 0
    run("generate", "x", "--model", diffusion, "--steps", 2000).refuses("give 1 to 1000")


def test_edits(run: Run, diffusion: Path, photo: Path, cwd: Path) -> None:
    edit = ("edit", photo, "--from", "a cat", "--to", "a dog", "--model", diffusion)
    run(*edit, "-o", "refused").refuses("no joint attention", "flowedit")
    assert not Path("refused").exists() or not any(Path("refused").iterdir())
    done = run(*edit, "--preset", "flowedit", "--steps", 4, "-o", "out")
    assert done.code == 0, done
    assert Path("out/edit-1.png").is_file() and Path("out/report.html").is_file()


def test_other_families_name_their_solvers(run: Run, model: Path, cwd: Path) -> None:
    run("generate", "x", "--model", model, "--solver", "dpmpp").refuses("is a flow: use euler")


def test_a_student_of_few_steps_is_warned_of_many(
    run: Run, photo: Path, cwd: Path, recwarn: pytest.WarningsRecorder
) -> None:
    tiny_sd(rectified=True).save_pretrained("student")
    write_metadata(Metadata(family="sd", student_steps=(1, 2)), Path("student"))
    said = "student is made for 1, 2 steps at guidance 1, and this is 30 steps at guidance 7.5"
    words = ("generate", "a cat", "--model", "student", "--json", "-n", 2)
    done = run(*words, "--steps", 30, "--guidance", 7.5)
    assert done.code == 0 and done.err.count(f"warning: {said}") == 1
    (found,) = done.data["warnings"]
    assert found.startswith(said)
    for meant in ((), ("--steps", 2), ("--guidance", 0.5)):
        assert run(*words, *meant).data["warnings"] == []
    (found,) = run(*words, "--steps", 3).data["warnings"]
    assert "and this is 3 steps:" in found and "7.5" not in found
    edit = ("edit", photo, "--from", "a cat", "--to", "a dog", "--model", "student", "--steps", 4)
    done = run(*edit, "--preset", "flowedit", "-o", "out", "--json")
    assert any("and this is 4 steps" in one for one in done.data["warnings"])
    rf.generate(rf.load("student", device="cpu"), "a cat", num_inference_steps=1, guidance_scale=3)
    assert "and this is at guidance 3:" in str(recwarn.pop(UserWarning).message)

"""The command line with a Stable Diffusion model: its own solver, and what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest

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

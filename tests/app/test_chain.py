"""Chains, one subject under several prompts and reconstructions from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rectiflow as rf
from rectiflow.app.outputs import MANIFEST
from rectiflow.models import load
from rectiflow.report import read_png
from rectiflow.report.pictures import psnr
from tests.app.conftest import Run

APPLE, GREEN, CAT = "a red apple", "a green apple", "a green cat"
FAST = ("--steps", 3)


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_chain_and_its_files(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    words = ["chain", photo, "--from", APPLE, "--to", GREEN, "--to", CAT, "--to", APPLE]
    words += ["--one-shot", "--model", model, *FAST, "--json", "-o", "out"]
    data = run(*words).data
    folder = cwd / "out"
    assert data == json.loads((folder / "chain.json").read_text(encoding="utf-8"))
    kinds = ("turn", "one-shot")
    names = {f"{kind}-{number}.png" for kind in kinds for number in (1, 2, 3)}
    assert {file.name for file in folder.iterdir()} == names | {
        "source.png", "sheet.png", "chain.json", MANIFEST,
    }  # fmt: skip
    assert [turn["prompt"] for turn in data["turns"]] == [GREEN, CAT, APPLE]
    assert [turn["returns"] for turn in data["turns"]] == [False, False, True]
    assert data["turns"][0]["drift"] is None  # of equal pictures it is infinite
    chain = rf.edit_chain(load(model), photo, prompts=[APPLE, GREEN, CAT, APPLE],
                          num_inference_steps=3)  # fmt: skip
    for number, (entry, turn) in enumerate(zip(data["turns"], chain.turns, strict=True), 1):
        picture, shot = (Image.open(folder / f"{kind}-{number}.png") for kind in kinds)
        assert np.array_equal(picture, turn.image) and picture.size == Image.open(photo).size
        if number > 1:
            assert entry["drift"] == pytest.approx(psnr(picture, shot))
        assert entry["psnr"]["source"] == pytest.approx(turn.distances.source)
        assert entry["nfe"] == turn.nfe
    assert data["nfe"] == chain.nfe
    made = read_png(folder / "turn-2.png")
    assert made["prompts"] == [APPLE, GREEN, CAT, APPLE] and made["number"] == 2


def test_a_chain_for_people_from_a_seed_and_from_an_inversion(
    run: Run, model: Path, photo: Path, cwd: Path
) -> None:
    words = ("--to", GREEN, "--to", APPLE, "--model", model)
    done = run("chain", "--seed", 3, "--from", APPLE, *words, *FAST)
    assert done.code == 0, done
    assert f"out/turn-1.png: {GREEN} (∞ (identical) to one shot)" in done.out
    assert "back at the source: " in done.out and "all turns: out/sheet.png" in done.out
    assert not list(cwd.glob("out/one-shot*")) and "None" not in done.out
    saved = ("-o", "photo.safetensors", "--model", model, *FAST, "--preset", "fast")
    assert run("invert", photo, "--prompt", APPLE, *saved).code == 0
    done = run("chain", "photo.safetensors", *words, "--json")
    assert done.code == 0, done
    assert done.data["preset"] == "fast, changed" and done.data["inversion"]["nfe"] > 0
    assert done.data["settings"]["prompts"] == [APPLE, GREEN, APPLE]


def test_wrong_chains_are_one_line(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    told = run("chain", "--help").out
    assert "Example:\n    rectiflow chain" in told and "--one-shot" in told
    small = ("--model", model, *FAST)
    run("chain", photo, "--from", APPLE).refuses("give --to")
    run("chain", photo, "--to", GREEN).refuses("a chain needs --from")
    run("chain", "--from", APPLE, "--to", GREEN).refuses("give an image or --seed")
    run("chain", photo, "--from", APPLE, "--to", "", *small).refuses("the prompt of turn 1 is")
    run("chain", "none.png", "--from", APPLE, "--to", GREEN).refuses("none.png")
    run("chain", "out/turn-1.png", "--from", APPLE, "--to", GREEN).refuses("be overwritten")
    assert not list(cwd.glob("out/*.png"))


def test_one_subject(run: Run, model: Path, cwd: Path) -> None:
    given = ("--consistent", "--seed", 5, "--model", model, "--json", "--guidance", 3)
    done = run("generate", APPLE, GREEN, CAT, *given, "--set", "attention_ratio=0.7")
    assert done.code == 0, done
    assert [entry["image"] for entry in done.data["images"]] == ["5-1.png", "5-2.png", "5-3.png"]
    result = rf.consistent(
        load(model), [APPLE, GREEN, CAT], seed=5, guidance_scale=3.0, attention_ratio=0.7
    )
    for number, image in enumerate(result.images, 1):
        assert np.array_equal(Image.open(f"out/5-{number}.png"), image)
    assert done.data["nfe"] == result.nfe
    run("generate", APPLE, GREEN, "--model", model).refuses("several prompts are for --consistent")
    run("generate", APPLE, "--consistent").refuses("--consistent needs two prompts or more")
    run("generate", APPLE, GREEN, "--consistent", "-n", 2).refuses("does not take --count")
    run("generate", APPLE, GREEN, "--consistent", "-o", "x.png").refuses("give a folder")
    run("generate", APPLE, "--set", "attention_ratio=1").refuses("--set is for --consistent")


def test_reconstruct_only(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    words = ("invert", photo, "--prompt", APPLE, "--model", model, *FAST, "-o", "i.safetensors")
    done = run(*words, "--reconstruct", "back/again.png", "--json")
    assert done.code == 0, done
    kept = done.data["reconstruction"]
    files = [kept.pop("image"), kept.pop("uncompensated")]
    assert files == ["back/again.png", "back/again-uncompensated.png"]
    assert set(kept) == {"max_abs_latent", "uncompensated_psnr", "psnr", "psnr_codec"}
    inversion = rf.Inversion.load("i.safetensors", load(model))
    exact, plain = inversion.reconstruct(), inversion.reconstruct(False)
    assert np.array_equal(Image.open(files[0]), exact.image)
    assert np.array_equal(Image.open(files[1]), plain.image)
    assert kept["max_abs_latent"] == exact.max_abs_latent < 1e-4
    source, codec = Image.open(photo), inversion.images(inversion.latents)[0]
    assert kept["psnr"] == pytest.approx(psnr(exact.image, source))
    assert kept["psnr_codec"] == pytest.approx(psnr(codec, source))
    told = run(*words, "--reconstruct", "again.png").out
    assert "again.png: " in told and "largest latent error" in told and "codec alone" in told
    run(*words, "--reconstruct", "again.gif").refuses("should end in one of .png")
    run(*words, "--reconstruct", "back").refuses("should end in one of .png")
    Image.open(photo).save("again-uncompensated.png")
    run("invert", "again-uncompensated.png", "--reconstruct", "again.png").refuses("overwritten")

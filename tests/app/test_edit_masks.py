"""``rectiflow edit`` with masks, windows, strength and pasting back, and their replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.app.conftest import Run

EDIT = ["--from", "a red apple", "--to", "a green apple", "--preset", "euler", "--steps", "3"]


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mask(cwd: Path, photo: Path) -> Path:
    drawn = Image.new("L", Image.open(photo).size)
    drawn.paste(255, (0, 0, 12, drawn.height))
    drawn.save(cwd / "mask.png")
    return cwd / "mask.png"


def test_pasted_back_and_replayed(
    run: Run, model: Path, photo: Path, mask: Path, cwd: Path
) -> None:
    options = ["--mask", mask, "--mask-grow", "2", "--mask-blur", "1.5", "--paste-back"]
    options += ["--window", "apple=1.0", "--strength", "0.67"]
    done = run("edit", photo, *EDIT, *options, "-m", model, "--json")
    assert done.code == 0, done
    data = done.data
    assert data["mask"] == "given"
    settings = data["settings"]
    assert (settings["mask_grow"], settings["mask_blur"]) == (2, 1.5)
    assert settings["paste_back"] is True and settings["windows"] == {"apple": 1.0}
    assert settings["strength"] == 0.67 and data["inversion"]["nfe"] == 2
    edited, source = (
        np.asarray(Image.open(file).convert("RGB")) for file in (cwd / "out/edit-1.png", photo)
    )
    assert np.array_equal(edited[:, 20:], source[:, 20:])
    assert not np.array_equal(edited[:, :12], source[:, :12])
    assert "paste back" in (cwd / "out/report.html").read_text().replace("_", " ")
    assert run("replay", "out/edit-1.png", "--json").data["identical"] is True


def test_a_transparent_mask_of_another_size_turned_round(
    run: Run, model: Path, photo: Path, mask: Path, cwd: Path
) -> None:
    """Opaque where the image is to stay: the same as painted white where it may change."""
    width, height = Image.open(photo).size
    drawn = np.zeros((2 * height, 2 * width, 4), np.uint8)
    drawn[:, 24:] = (255, 0, 0, 255)
    Image.fromarray(drawn).save(cwd / "red.png")
    options = [*EDIT, "--paste-back", "-m", model]
    run("edit", photo, *options, "--mask", "red.png").refuses(
        "--mask-resize", "the mask red.png is"
    )
    done = run(
        "edit", photo, *options, "--mask", "red.png", "--mask-resize", "--mask-invert", "--json"
    )
    assert done.code == 0, done
    assert done.data["settings"]["mask_invert"] is True
    assert run("replay", "out/edit-1.png", "--json").data["identical"] is True
    found = np.asarray(Image.open("out/edit-1.png"))
    run("edit", photo, *options, "--mask", mask)
    expected = np.asarray(Image.open("out/edit-1.png"))
    far = np.r_[:10, 14:width]  # its edge is softened by resizing
    assert np.array_equal(found[:, 14:], expected[:, 14:]) and found.shape == expected.shape
    assert np.abs(found[:, far].astype(int) - expected[:, far]).mean() < 8
    Image.new("L", (width, height)).save("black.png")
    for command in ("edit", "chain"):
        run(command, photo, *EDIT, "--mask", "black.png", "-m", model).refuses(
            "black.png is black all"
        )


def test_variants_are_numbered_named_and_replayed(
    run: Run, model: Path, photo: Path, cwd: Path
) -> None:
    words = ["--from", "a red apple", "--to", "a green apple", "--to", "a cat", "-m", model]
    done = run("edit", photo, *words, "--steps", "3", "-n", "2", "--json")
    assert done.code == 0, done
    edits = [(edit["image"], edit["prompt"], edit["noise_seed"]) for edit in done.data["edits"]]
    assert edits == [
        ("edit-1.png", "a green apple", 0),
        ("edit-2.png", "a green apple", 1),
        ("edit-3.png", "a cat", 0),
        ("edit-4.png", "a cat", 1),
    ]
    for number in (2, 3):
        assert run("replay", f"out/edit-{number}.png", "--json").data["identical"] is True
    run("invert", photo, "--prompt", "a red apple", "--preset", "fast", "--steps", "3",
        "-o", "x.safetensors", "-m", model)  # fmt: skip
    saved = run("edit", "x.safetensors", *words[2:], "-n", "2", "-o", "saved", "--json")
    assert saved.code == 0, saved
    assert run("replay", "saved/edit-4.png", "--json").data["identical"] is True
    one, other = (np.asarray(Image.open(f"{f}/edit-4.png")).astype(int) for f in ("out", "saved"))
    assert np.abs(one - other).max() <= 1  # features are kept of one, and asked again of another
    run("edit", photo, *words, "--preset", "exact", "-n", "2").refuses("2 variants would be equal")


def test_a_region_and_transparency(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    large = Image.open(photo).resize((400, 240))
    mask = Image.new("L", large.size)
    mask.paste(255, (200, 100, 210, 108))
    mask.save("spot.png")
    clear = large.copy()
    clear.putalpha(mask.point(lambda value: 55 + 200 * value // 255))
    clear.save("clear.png")
    options = ["--mask", "spot.png", "--crop-to-mask", "--keep-alpha", "--diagnose", "-m", model]
    done = run("edit", "clear.png", *EDIT, *options, "--json")
    assert done.code == 0, done
    assert done.data["settings"]["crop_to_mask"] is done.data["settings"]["keep_alpha"] is True
    with Image.open("out/edit-1.png") as edited, Image.open("out/reconstruction.png") as back:
        assert edited.mode == "RGBA" and edited.size == back.size == large.size
        assert np.array_equal(np.asarray(edited)[..., 3], np.asarray(clear)[..., 3])
    assert run("replay", "out/edit-1.png", "--json").data["identical"] is True
    run("replay", "out/reconstruction.png").refuses("replay the edit")
    run("edit", photo, *EDIT, "--keep-alpha", "-m", model).refuses("is transparent")
    jpeg = run("edit", "clear.png", *EDIT, "--keep-alpha", "-o", "a.jpg", "-m", model)
    jpeg.refuses("a.jpg holds no transparency")


def test_derived_masks_are_named(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    for kind, options in (
        ("none", []),
        ("velocity", ["--set", "mask_threshold=0.5"]),
        ("attention", ["--set", "mask_threshold=0.5", "--set", "mask_from=attention"]),
    ):
        done = run("edit", photo, *EDIT, *options, "-m", model, "--json")
        assert done.code == 0 and done.data["mask"] == kind, done


def test_from_a_saved_inversion(run: Run, model: Path, photo: Path, mask: Path, cwd: Path) -> None:
    run("invert", photo, "--prompt", "a red apple", "--preset", "euler", "--steps", "3",
        "-o", "x.safetensors", "-m", model)  # fmt: skip
    done = run("edit", "x.safetensors", "--to", "a green apple", "--mask", mask, "--paste-back",
               "-m", model, "--json")  # fmt: skip
    assert done.code == 0, done
    edited, source = (
        np.asarray(Image.open(file).convert("RGB")) for file in (cwd / "out/edit-1.png", photo)
    )
    assert np.array_equal(edited[:, 12:], source[:, 12:])


def test_a_seeds_guidance_is_replayed(run: Run, model: Path, cwd: Path) -> None:
    for guidance in ([], ["--guidance", "1.5"]):
        done = run("edit", "--seed", "3", *EDIT, *guidance, "-m", model, "--diagnose", "--json")
        assert done.code == 0, done
        for file in ("out/edit-1.png", "out/reconstruction.png", "out/source.png"):
            assert run("replay", file, "--json").data["identical"] is True, (file, guidance)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--paste-back"], ("--paste-back needs a mask",)),
        (["--mask-blur", "2"], ("without a mask there is nothing for --mask-blur to change",)),
        (["--window", "apple"], ("--window 'apple'", "WORD=RATIO")),
        (["--window", "=0.5"], ("WORD=RATIO",)),
        (["--window", "cat=0.5"], ("'cat' is no word that stays", "there are: a, apple")),
        (["--strength", "2"], ("strength is 2", "from 0 to 1")),
        (["--strength", "0.1"], ("strength 0.1 of 3 steps leaves none",)),
    ],
)
def test_what_is_wrong_is_one_line(
    run: Run, model: Path, photo: Path, cwd: Path, options: list[str], words: tuple[str, ...]
) -> None:
    run("edit", photo, *EDIT, *options, "-m", model).refuses(*words)


def test_not_with_a_table(run: Run, model: Path, cwd: Path) -> None:
    run("edit", "--batch", "x.csv", "--paste-back", "-m", model).refuses("leave out --paste-back")
    run("edit", "--batch", "x.csv", "-n", "3", "-m", model).refuses("leave out --num-images")

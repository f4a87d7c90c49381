"""Editing, inverting and generating from the command line, and what they leave behind."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rectiflow.app.outputs import MANIFEST
from rectiflow.models import load
from rectiflow.report import read_png
from tests.app.conftest import Run

FAST = ("--steps", 3)


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_edit_writes_what_it_says(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    words = ["edit", photo, "--from", "a red cat", "--to", "a blue cat", "--to", "", "--json"]
    done = run(*words, "--model", model, *FAST, "--set", "attention_ratio=0.5", "-o", "out")
    assert done.code == 0
    data = done.data
    assert set(data) == {
        "model", "preset", "settings", "inversion", "edits", "nfe", "seconds", "report", "warnings",
        "mask",
    }  # fmt: skip
    assert data["mask"] == "none"
    assert set(data["inversion"]) == {"nfe", "seconds"}  # what was not asked for is not there
    assert data["nfe"] == {"inversion": 3, "editing": 6, "reconstruction": 0, "total": 9}
    assert data["settings"]["attention_ratio"] == 0.5 and data["preset"] == "fast, changed"
    assert [edit["prompt"] for edit in data["edits"]] == ["a blue cat", ""]
    folder = cwd / "out"
    names = {"source.png", "edit-1.png", "edit-2.png", "report.html", MANIFEST}
    assert {file.name for file in folder.iterdir()} == names
    assert Image.open(folder / "edit-1.png").size == Image.open(photo).size
    made = read_png(folder / "edit-1.png")
    assert made["weight_hash"] == load(model).weight_hash == data["settings"]["weight_hash"]
    assert made["prompt"] == "a blue cat" and made["source"] == str(photo)
    assert len(made["grid"]) == 4 and made["settings"]["num_inference_steps"] == 3
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "rectiflow edit" in page and "a blue cat" in page
    assert "Residual" not in page and "Reconstruction" not in page  # no empty section


@pytest.mark.parametrize("preset", ["fast", "exact", "ftedit"])
def test_a_diagnosis_is_in_the_json_and_the_page(
    run: Run, model: Path, photo: Path, cwd: Path, preset: str
) -> None:
    words = ["edit", photo, "--from", "a red cat", "--to", "a blue cat", "--preset", preset]
    data = run(*words, "--model", model, *FAST, "--diagnose", "--json").data
    solved = preset == "ftedit"  # the others do not know their residuals: they are not NaN
    known = {"nfe", "seconds", "noise", "compensation"} | ({"residual"} if solved else set())
    assert set(data["inversion"]) == known
    assert set(data["inversion"]["noise"]) == {"norm", "kurtosis", "autocorrelation"}
    kept = data["reconstruction"]
    assert set(kept) == {"max_abs_latent", "uncompensated_psnr", "psnr", "psnr_codec"}
    assert kept["max_abs_latent"] < 1e-4
    assert kept["psnr"] == pytest.approx(kept["psnr_codec"], abs=0.01)  # of rounded pixels
    assert Path("out/reconstruction.png").is_file()
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert ("Residual of the inversion" in page) == solved
    assert "Velocity compensation" in page and "Reconstruction" in page
    assert f"{data['nfe']['reconstruction']} reconstructing" in page


def test_a_summary_for_people(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    done = run("edit", photo, "--from", "a cat", "--to", "a dog", "--model", model, *FAST)
    assert done.code == 0
    assert "out/edit-1.png: a dog" in done.out and "report: out/report.html" in done.out
    assert "network samples" in done.out and "NaN" not in done.out


def test_warnings_are_a_line_each(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    long = "a red cat on the left and " * 9
    done = run("edit", photo, "--to", long, "--model", model, *FAST, "--json")
    assert done.code == 0
    lines = done.err.splitlines()
    assert lines and all(line.startswith("rectiflow: warning: ") for line in lines)
    assert len(lines) == len(set(lines)) == len(done.data["warnings"])
    assert "left out" in done.err and "No source prompt" in done.err


def test_prompts_too_long_are_said_by_every_command(
    run: Run, model: Path, photo: Path, cwd: Path
) -> None:
    long = "a red cat on the left and " * 9
    for words in (("generate", long), ("invert", photo, "--prompt", long, "-o", "i.safetensors")):
        done = run(*words, "--model", model, "--steps", 1, "--json")
        assert done.code == 0
        lines = done.err.splitlines()
        assert all(line.startswith("rectiflow: warning: the prompt 'a red cat") for line in lines)
        assert len(lines) == len(done.data["warnings"]) == 2  # CLIP's and T5's limits
    done = run("generate", "a", "--negative", "b", "--guidance", 1, "--model", model)
    assert done.code == 0 and "no effect without guidance" in done.err


def test_what_is_read_is_not_written_over(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    edit = ("--from", "a cat", "--to", "a dog", "--model", model, "--steps", 1)
    assert run("edit", photo, *edit).code == 0
    before = Path("out/edit-1.png").read_bytes()
    run("edit", "out/edit-1.png", *edit).refuses("out/edit-1.png would be overwritten", "-o")
    run("edit", photo, "--mask", "out/source.png", *edit).refuses("out/source.png")
    assert Path("out/edit-1.png").read_bytes() == before
    assert run("edit", "out/edit-1.png", *edit, "-o", "second").code == 0
    assert run("replay", "second/edit-1.png").code == 0


def test_out_of_memory_is_one_line(
    run: Run, model: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rectiflow.app import generating_pictures

    def paint(*_: object) -> None:
        raise RuntimeError("[enforce fail at alloc.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(generating_pictures, "paint", paint)
    run("generate", "a cat", "--model", model).refuses("not enough memory", code=1)


@pytest.mark.parametrize("which", ["edit-1.png", "edit-2.png", "reconstruction.png"])
def test_replay_of_an_edit_is_identical(
    run: Run, model: Path, photo: Path, cwd: Path, which: str
) -> None:
    """Also when only the copy of the source is left."""
    original = Image.open(photo)
    original.save("mine.png")
    words = ("--from", "a cat", "--to", "a dog", "--to", "a red dog", "--guidance", 2)
    mask = Image.new("L", original.size, 255)
    mask.paste(0, (0, 0, 20, 24))
    mask.save("mask.png")
    run("edit", "mine.png", *words, "--mask", "mask.png", "--model", model, *FAST, "--diagnose")
    Path("mine.png").unlink()
    done = run("replay", f"out/{which}", "--json", "-o", "again.png")
    assert done.code == 0 and done.data["identical"] and done.data["max_difference"] == 0
    again, before = Image.open("again.png"), Image.open(f"out/{which}")
    assert np.array_equal(np.asarray(again), np.asarray(before))
    Path("out/source.png").unlink()
    run("replay", f"out/{which}").refuses("put one of them back")


def test_a_generated_image_is_edited_and_replayed(run: Run, model: Path, cwd: Path) -> None:
    words = ("--from", "a cat", "--to", "a dog", "--model", model, *FAST)
    data = run("edit", "--seed", 4, *words, "--diagnose", "--json").data
    assert data["settings"]["seed"] == 4 and data["reconstruction"]["psnr"] is None  # infinite
    for name in ("source.png", "edit-1.png"):
        assert run("replay", f"out/{name}").code == 0
    run("edit", "--seed", 4, "--to", "a dog", "--model", model).refuses("--from")
    run("edit", "--seed", 4, "--from", "", "--to", "a dog", "--model", model).refuses("--from")


def test_an_inversion_is_reused(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    words = ("invert", photo, "--prompt", "a cat", "--model", model, *FAST, "-o", "a.safetensors")
    data = run(*words, "--json").data
    assert data["file"] == "a.safetensors" and data["inversion"]["nfe"] > 0
    edit = ("edit", "a.safetensors", "--to", "a dog", "--model", model)
    edited = run(*edit, "--guidance", 2, "--json").data
    assert edited["inversion"]["nfe"] == data["inversion"]["nfe"]
    assert edited["nfe"]["inversion"] == 0  # paid by the other command
    assert edited["settings"]["guidance_scale"] == 2
    assert edited["settings"]["num_inference_steps"] == 3
    assert run("replay", "out/edit-1.png").code == 0
    run(*edit, "--preset", "ftedit").refuses("query_offset", "fixed_point", "leave --preset out")
    run(*edit, "--steps", 9).refuses("--steps 3")
    run(*edit, "--from", "a lemon").refuses("a lemon")
    Path("bad.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:999])
    run("edit", "bad.safetensors", "--to", "a", "--model", model).refuses("not a saved inversion")
    other = model / "transformer" / "diffusion_pytorch_model.safetensors"
    run("edit", other, "--to", "a", "--model", model).refuses("not a saved inversion")
    run("edit", "no.safetensors", "--to", "a", "--model", model).refuses("no.safetensors")
    Image.new("L", (5, 5)).save("small.png")
    run(*edit, "--mask", "small.png").refuses("5 × 5", "40 × 24")
    Path("a.safetensors").write_bytes(b"")
    run("replay", "out/edit-1.png").refuses("has changed")


def test_generate_and_replay(run: Run, model: Path, cwd: Path) -> None:
    words = ("generate", "two red cats", "--model", model, "--seed", 7, "--solver", "heun")
    data = run(*words, "-n", 2, "--negative", "a dog", "-o", "many", "--json").data
    assert [entry["image"] for entry in data["images"]] == ["7.png", "8.png"]
    assert data["nfe"] == 2 * 3 * 2 * 2  # pictures, steps, Heun, guidance
    assert run("replay", "many/8.png").code == 0
    data = run(*words, "--height", 40, "--width", 24, "-o", "one.png", "--json").data
    assert Image.open("one.png").size == (24, 40) and data["images"][0]["seed"] == 7
    assert "prompt: two red cats" in run("info", "one.png").out
    assert run("info", "one.png", "--json").data["method"] == "heun"
    run(*words, "--height", 41).refuses("multiples of 8")
    run("generate", "x", "--model", model, "--solver", "magic").refuses("euler, midpoint")
    run("generate", "x", "--model", model, "--steps", 0).refuses("0")
    assert run("generate", "", "--model", model, "-o", "empty.png").code == 0


def test_a_replay_that_differs_says_so(run: Run, model: Path, cwd: Path) -> None:
    from rectiflow.report import save_png

    run("generate", "a cat", "--model", model, "-o", "a.png")
    made = read_png("a.png")
    changed = Image.open("a.png").convert("RGB")
    changed.putpixel((0, 0), (1, 2, 3))
    save_png(changed, "b.png", made)
    done = run("replay", "b.png", "--json")
    assert done.code == 1 and not done.data["identical"] and done.data["max_difference"] > 0
    save_png(changed, "c.png", made | {"weight_hash": "0" * 64})
    run("replay", "c.png").refuses("--model")
    save_png(changed, "d.png", {"command": "generate", "version": "0.0.1"})
    run("replay", "d.png").refuses("0.0.1")
    changed.save("e.png")
    run("replay", "e.png").refuses("does not say what made it")


def test_pictures_of_every_kind(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    """Read as anyone looking at them would expect; the result has the size they are seen at."""
    rgb = Image.open(photo).convert("RGB")
    rgb.convert("CMYK").save("cmyk.jpg")
    rgba = rgb.convert("RGBA")
    rgba.putalpha(Image.new("L", rgb.size, 0))
    rgba.save("alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    rgb.save("turned.jpg", exif=exif)
    Image.new("RGB", (1, 1), "red").save("pixel.png")
    sizes = {"cmyk.jpg": (40, 24), "alpha.png": (40, 24), "turned.jpg": (24, 40)}
    for name, size in (sizes | {"pixel.png": (1, 1)}).items():
        words = ("edit", name, "--from", "a cat", "--to", "a dog", "--model", model, "--steps", 1)
        assert run(*words, "-o", "of").code == 0, name
        assert Image.open("of/edit-1.png").size == size
    run("edit", "alpha.png", "--from", "a", "--to", "b", "--model", model, "--steps", 1)
    assert np.asarray(Image.open("out/source.png")).min() == 255


def test_fifty_megapixels(run: Run, model: Path, cwd: Path) -> None:
    Image.new("1", (10_000, 5_000), 1).save("large.png")
    words = ("invert", "large.png", "--model", model, "--steps", 1, "-o", "l.safetensors")
    data = run(*words, "--json").data
    assert math.isfinite(data["inversion"]["noise"]["norm"])


def test_wrong_pictures_are_one_line(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    def edit(image: object, *more: object) -> None:
        nonlocal done
        done = run("edit", image, "--to", "a", "--model", model, *FAST, *more)

    done = run("cite")
    edit("none.png")
    done.refuses("there is no file none.png")
    edit(cwd)
    done.refuses("is a folder")
    Path("text.png").write_text("no picture")
    edit("text.png")
    done.refuses("text.png is not an image")
    Path("cut.png").write_bytes(photo.read_bytes()[:200])
    edit("cut.png")
    done.refuses("cut.png")
    Image.new("L", (5, 5)).save("small.png")
    edit(photo, "--mask", "small.png")
    done.refuses("5 × 5", "40 × 24")
    edit(photo, "--mask", "none.png")
    done.refuses("none.png")
    edit(photo, "-o", "text.png")
    done.refuses("text.png is there", "--overwrite")
    edit(photo, "-o", "text.png/inside")
    done.refuses("cannot write to")
    run("info", photo).refuses("does not say what made it")
    run("info", "text.png").refuses("text.png")
    run("invert", photo, "-o", "x.pt", "--model", model).refuses(".safetensors")
    assert not (cwd / "out").exists() or not os.listdir(cwd / "out")


def test_a_lora_on_every_command(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    """It changes what is made, is written down from anywhere, and an inversion knows its own."""
    from tests.models.test_lora import write_lora

    file = write_lora(cwd / "style", seed=1)
    plain = ("--model", model, "--steps", 1)
    words = (*plain, "--lora", "style/pytorch_lora_weights.safetensors@0.5")
    run("generate", "a cat", *plain, "-o", "plain.png")
    run("generate", "a cat", *words, "-o", "styled.png")
    assert not np.array_equal(Image.open("plain.png"), Image.open("styled.png"))
    assert read_png("styled.png")["lora"] == [f"{file}@0.5"]
    assert run("replay", "styled.png").code == 0
    assert "lora" not in read_png("plain.png")
    assert run("invert", photo, "--prompt", "a cat", *words, "-o", "i.safetensors").code == 0
    assert run("edit", "i.safetensors", "--to", "a dog", *words[:2], *words[4:]).code == 0
    run("edit", "i.safetensors", "--to", "a dog", "--model", model).refuses(
        "weights", "invert again"
    )
    run("generate", "a cat", *plain, "--lora", "none.safetensors").refuses("there is no LoRA none")


def test_a_network_in_one_file(run: Run, model: Path, cwd: Path) -> None:
    from shutil import copyfile

    copyfile(model / "transformer" / "diffusion_pytorch_model.safetensors", "n.safetensors")
    words = ("generate", "a cat", "--steps", 1, "--model")
    run(*words, "n.safetensors").refuses("--base")
    run(*words, model, "--base", model).refuses("base is for checkpoints in one file")
    assert run(*words, "n.safetensors", "--base", model, "-o", "a.png").code == 0
    run(*words, model, "-o", "b.png")
    # Weights lie otherwise in the memory of another file: a pixel may be rounded the other way.
    np.testing.assert_allclose(
        np.asarray(Image.open("a.png"), int), np.asarray(Image.open("b.png"), int), atol=1
    )
    made = read_png("a.png")
    assert (made["model"], made["base"]) == (str(cwd / "n.safetensors"), str(model))
    assert run("replay", "a.png").code == 0
    run(*words, "m.safetensors", "--base", model).refuses("there is no file m.safetensors")


def test_offloading_needs_an_accelerator(run: Run, model: Path, photo: Path, cwd: Path) -> None:
    for offload in ("model", "sequential"):
        words = ("--model", model, "--device", "cpu", "--offload", offload)
        for command in (
            ("generate", "a cat"),
            ("invert", photo, "-o", "i.safetensors"),
            ("edit", photo, "--to", "a dog"),
        ):
            run(*command, *words).refuses(f"offload='{offload}' needs an accelerator")
    run("generate", "a cat", "--offload", "disk").refuses("--offload")


def test_what_to_do_where_memory_runs_out(
    run: Run, model: Path, photo: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of real calls of the network."""
    import torch
    from diffusers import SD3Transformer2DModel

    def forward(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(SD3Transformer2DModel, "forward", forward)
    for command in (
        ("generate", "a cat"),
        ("invert", photo, "-o", "i.safetensors"),
        ("edit", photo, "--from", "a cat", "--to", "a dog"),
    ):
        run(*command, "--model", model).refuses(
            "not enough memory on cpu", "weights of", "--dtype bfloat16, a smaller image", code=1
        )


def test_wrong_models_are_one_line(run: Run, model: Path, cwd: Path) -> None:
    from shutil import copytree

    import torch
    from safetensors.torch import load_file, save_file

    def generate(name: object) -> None:
        nonlocal done
        done = run("generate", "a cat", "--model", name)

    done = run("cite")
    generate("emoji-sd9")
    done.refuses("emoji-sd9")
    generate(cwd)
    done.refuses("model_index.json")
    generate("./nowhere")
    done.refuses("there is no folder ./nowhere")
    file = "transformer/diffusion_pytorch_model.safetensors"
    without = copytree(model, cwd / "without")
    (without / file).unlink()
    generate(without)
    done.refuses("without")
    broken = copytree(model, cwd / "broken")
    weights = load_file(broken / file)
    name = next(name for name, weight in weights.items() if weight.is_floating_point())
    weights[name] = torch.full_like(weights[name], torch.nan)
    save_file(weights, broken / file, {"format": "pt"})
    generate(broken)
    done.refuses("not finite")
    run("generate", "a", "--model", model, "--device", "abacus").refuses("abacus")

"""Every command that loads a model takes every option that says which, and how it is loaded."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

import rectiflow as rf
from rectiflow.app.cli import app
from rectiflow.report import read_png
from rectiflow.straighten.finished import load_student
from tests.app.conftest import Run
from tests.app.test_straightening import short
from tests.models.test_lora_sd import write_lora
from tests.tiny import tiny_sd3
from tests.tiny_sd import tiny_sd

NO_MODEL = {"train", "reproduce", "models", "doctor", "info", "cite", "evaluate"}
"""Commands that load none that the user names (`train` has a recipe, `reproduce` a study)."""

WITHOUT = {
    # accelerate says where, and the setting mixed_precision in what.
    "reflow": {"device", "dtype", "offload"},
    "distill": {"device", "dtype", "offload"},
    # The argument is the model, --dtype that of the files, and nothing is computed.
    "export": {"model", "device", "offload"},
    # The picture, or the store, says in what.
    "replay": {"dtype"},
    "pairs inspect": {"dtype"},
}
ALL = {"model", "base", "lora", "variant", "revision", "device", "dtype", "offload"}


def commands(group: Any = None, before: str = "") -> Iterator[tuple[str, Any]]:
    """(`pairs inspect`, the command), of everything that the command line has."""
    for name, command in (group or typer.main.get_command(app)).commands.items():
        yield f"{before}{name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")


LOADING = [name for name, _ in commands() if name not in NO_MODEL]

Words = Callable[[Path], list[object]]
MINIMAL: dict[str, Words] = {
    "demo": lambda at: ["-o", at / "out"],
    "edit": lambda at: [at / "photo.png", "--from", "a", "--to", "b", "-o", at / "out"],
    "chain": lambda at: [at / "photo.png", "--from", "a", "--to", "b", "-o", at / "out"],
    "generate": lambda at: ["a", "-o", at / "out"],
    "invert": lambda at: [at / "photo.png", "--prompt", "a", "-o", at / "i.safetensors"],
    "pairs": lambda at: ["--prompts", at / "prompts.txt", "--out", at / "store"],
    "pairs inspect": lambda at: [at / "pairs", "-o", at / "out"],
    "reflow": lambda at: ["--set", f"prompts={at / 'prompts.txt'}", "-o", at / "run"],
    "distill": lambda at: ["--set", f"prompts={at / 'prompts.txt'}", "-o", at / "run"],
    "export": lambda at: [at / "half", "-o", at / "out"],
    "replay": lambda at: [at / "made.png"],
    "evaluate emoji-models": lambda at: [],
    "evaluate emoji-edits": lambda at: ["--limit", 1],
    "evaluate pie-bench": lambda at: ["--data", at / "pie", "-o", at / "out"],
    "evaluate coco": lambda at: ["--data", at / "coco", "-o", at / "out"],
    "evaluate inversion-error": lambda at: [],
    "evaluate straight-edits": lambda at: [],
}
"""What a command needs beside its model."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, photo: Path) -> Path:
    """`half`, a model of which there are only fp16 files, and what the commands need."""
    from rectiflow.app.cli import main

    at = tmp_path_factory.mktemp("world")
    tiny_sd3().save_pretrained(at / "half", variant="fp16")
    shutil.copyfile(photo, at / "photo.png")
    (at / "prompts.txt").write_text("a red apple\ntwo cats\n")
    chosen: list[object] = ["--model", at / "half", "--variant", "fp16"]
    for words in (
        ["generate", "a", *chosen, "--steps", 1, "-o", at / "made.png"],
        ["pairs", "--prompts", at / "prompts.txt", "--out", at / "pairs", "--steps", 1, *chosen],
        ["evaluate", "pie-bench", "--make-data", at / "pie", "--limit", 1],
        ["evaluate", "coco", "--make-data", at / "coco", "--limit", 3],
    ):
        assert main([str(word) for word in words]) == 0
    return at


@pytest.fixture
def words(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """A command with its model, run where nothing else is."""
    monkeypatch.chdir(tmp_path)

    def of(name: str, *more: object) -> list[object]:
        named = [] if name == "export" else ["--model", world / "half"]
        return [*name.split(), *MINIMAL[name](world), *named, *more]

    return of


def test_every_command_has_the_options() -> None:
    assert NO_MODEL | set(MINIMAL) == {name for name, _ in commands()}, "say what it loads"
    for name, command in commands():
        there = {option for param in command.params for option in param.opts}
        expected = set() if name in NO_MODEL else ALL - WITHOUT.get(name, set())
        found = {option for option in ALL if f"--{option}" in there}
        if name in NO_MODEL | {"export"}:
            found.discard("dtype")
        assert found == expected - ({"dtype"} if name == "export" else set()), name


def test_nothing_in_the_command_line_loads_a_model_by_other_means() -> None:
    """But for `doctor`, which loads the embedded ones."""
    for file in Path(rf.__file__).parent.glob("app/*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "rectiflow.models.load":
                loads = "load" in {alias.name for alias in node.names}
                assert not loads or file.name in ("options.py", "inventory.py"), file


@pytest.mark.parametrize("name", LOADING)
def test_the_options_reach_the_model(name: str, run: Run, words: Words, world: Path) -> None:
    if name not in ("replay", "pairs inspect"):  # whose picture, or store, knows or does without
        run(*words(name)).refuses("variant fp16 alone", "--variant fp16")
    run(*words(name, "--variant", "bf16")).refuses("no weight files of the variant bf16", "fp16")
    run(*words(name, "--variant", "fp16", "--base", "emoji-sd3")).refuses("base is for checkpoints")
    run(*words(name, "--revision", "v1")).refuses("revision v1 is of a model on the hub")
    run(*words(name, "--variant", "fp16", "--lora", "none.safetensors")).refuses(
        "there is no LoRA none.safetensors"
    )
    if "offload" not in WITHOUT.get(name, set()):
        run(*words(name, "--variant", "fp16", "--device", "cpu", "--offload", "model")).refuses(
            "offload='model' needs an accelerator"
        )


def test_a_variant_is_the_same_model_and_is_recorded(run: Run, world: Path, tmp_path: Path) -> None:
    tiny_sd3().save_pretrained(tmp_path / "plain")
    plain = rf.load(tmp_path / "plain", device="cpu")
    half = rf.load(world / "half", variant="fp16", device="cpu")
    assert half.weight_hash == plain.weight_hash
    assert read_png(world / "made.png")["variant"] == "fp16"
    assert run("replay", world / "made.png").code == 0
    # As in diffusers, a part that has none of the variant gives the files it has.
    shutil.copytree(world / "half", tmp_path / "mixed")
    for part in ("text_encoder", "vae"):
        for file in (tmp_path / "mixed" / part).glob("*.fp16.safetensors"):
            file.rename(file.with_name(file.name.replace(".fp16", "")))
    mixed = rf.load(tmp_path / "mixed", variant="fp16", device="cpu")
    assert mixed.weight_hash == plain.weight_hash


def test_a_student_of_a_network_in_one_file_with_a_lora(run: Run, tmp_path: Path) -> None:
    """Through `reflow`, its checkpoint, and `export`: what is trained are the merged weights."""
    tiny_sd().save_pretrained(tmp_path / "whole")
    network = tmp_path / "network.safetensors"
    shutil.copyfile(tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors", network)
    lora = f"{write_lora(tmp_path / 'style', 1, text=False)}@0.5"
    chosen = ("--model", network, "--base", tmp_path / "whole", "--lora", lora)
    (tmp_path / "prompts.txt").write_text("a red apple\ntwo cats\n")
    store = tmp_path / "pairs"
    made = run("pairs", *chosen, "--prompts", tmp_path / "prompts.txt", "-n", 8, "--steps", 1,
               "--out", store)  # fmt: skip
    assert made.code == 0, made.err
    # A rate at which nothing is learnt, so that the student is the teacher.
    still = short(steps=2, learning_rate=1e-30, measure_every=0, held_out=0)
    done = run("reflow", *chosen, "--pairs", store, *still, "-o", tmp_path / "run", "--json")
    assert done.code == 0 and done.data["finished"], done.err

    teacher = rf.load(network, base=tmp_path / "whole", lora=[lora], device="cpu")
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = teacher.velocity(x, 0.3, teacher.encode_prompt(["a red apple", "two cats"]))
    assert run("export", tmp_path / "run", "-o", tmp_path / "out", "--dtype", "float32").code == 0
    settings = {"steps": 1, "learning_rate": 1e-30, "measure_every": 0, "held_out": 0}
    in_python = rf.reflow(teacher, store, run=tmp_path / "run-2", batch_size=4, **settings)
    for student in (rf.load(tmp_path / "out", device="cpu"), load_student(tmp_path / "run").model,
                    load_student(tmp_path / "run", "latest").model, in_python,
                    load_student(tmp_path / "run-2", "latest").model):  # fmt: skip
        found = student.velocity(x, 0.3, student.encode_prompt(["a red apple", "two cats"]))
        # The LoRA's sum is formed in another order than beside the weights.
        assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
    run("export", tmp_path / "run", "-o", tmp_path / "other", "--lora", lora).refuses(
        "--lora is for models"
    )


def test_workers_load_the_model_as_it_was_loaded(world: Path, tmp_path: Path) -> None:
    """What another process of a benchmark does first, here; it is refused where hashes differ."""
    from rectiflow.evaluate import edit_workers, pie_bench

    model = rf.load(world / "half", variant="fp16", device="cpu")
    described = edit_workers._Described(
        model=model.name,
        loaded_with=model.loaded_with,
        dtype=model.dtype,
        device="cpu",
        weight_hash=model.weight_hash,
        folder=tmp_path,
        clip=None,
        first_seed=0,
        batch_size=1,
        masks="none",
        reconstruct=False,
    )
    edit_workers._work(described, [], 1)
    told = model.loaded_with | {"dtype": model.dtype, "device": "cpu"}
    run: Any = None
    pie_bench._work((model.name, told, model.weight_hash), run, [], torch.get_num_threads())

"""Straightening with bad input, on a full disk, to no number: one line, and nothing overwritten."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from rectiflow.checksums import write_checksums
from tests.app.forks import Ended, Forks
from tests.app.script import SETTINGS, same
from tests.straighten.stores import make_store
from tests.tiny_sd import tiny_sd

WEIGHTS = "diffusion_pytorch_model.safetensors"


def says(done: Ended, code: int, *words: str) -> None:
    """One line on stderr with these words, and nothing on stdout."""
    assert done.code == code, done
    assert done.out == "" and done.err.count("\n") == 1, done
    assert done.err.startswith("rectiflow: error: ")
    for word in words:
        assert word in done.err, done.err


def hashes(folder: Path) -> dict[str, str]:
    """Of every file below."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


@pytest.fixture
def out(script_whole: Path, tmp_path: Path) -> Path:
    """What the script left, to be damaged."""
    return Path(shutil.copytree(script_whole, tmp_path / "out"))


@pytest.fixture
def train(script_teacher: Path, forks: Forks, tmp_path: Path) -> Callable[..., Ended]:
    """The script's reflow or distillation, or another one into another folder."""

    def call(kind: str, *words: object, fsize: int | None = None, **changes: object) -> Ended:
        given: dict[str, object] = {
            "reflow": {"model": script_teacher / "tiny", "pairs": "out/pairs-1"},
            "distill": {"model": "out/2rf", "pairs": "out/pairs-2"},
        }[kind]
        given |= {"config": script_teacher / "short.yaml", "output": f"out/{kind}"} | changes
        options = [word for key, value in given.items() for word in (f"--{key}", value)]
        return forks(kind, *options, *words, cwd=tmp_path, fsize=fsize)

    return call


def truncated(out: Path, teacher: Path) -> None:
    shard = out / "pairs-1" / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def without_a_shard(out: Path, teacher: Path) -> None:
    (out / "pairs-1" / "shard-000001.safetensors").unlink()


def with_other_prompts(out: Path, teacher: Path) -> None:
    prompts = out / "pairs-1" / "prompts.jsonl.gz"
    prompts.write_bytes(
        gzip.compress(gzip.decompress(prompts.read_bytes()).replace(b"red", b"odd"))
    )


def gone(out: Path, teacher: Path) -> None:
    shutil.rmtree(out / "pairs-1")


def of_other_latents(out: Path, teacher: Path) -> None:
    gone(out, teacher)
    make_store(out / "pairs-1", family="sd", latent_shape=(8, 6, 8))


def of_another_teacher(out: Path, teacher: Path) -> None:
    manifest = out / "pairs-1" / "manifest.json"
    said = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(said | {"weight_hash": "0" * 64}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, ("out/pairs-1/shard-000001.safetensors", "rectiflow pairs")),
        (without_a_shard, ("out/pairs-1/shard-000001.safetensors", "rectiflow pairs")),
        (with_other_prompts, ("out/pairs-1/prompts.jsonl.gz", "again with the same command")),
        (gone, ("no store of pairs at out/pairs-1",)),
        (of_other_latents, ("out/pairs-1", "[8, 6, 8]", "make pairs")),
        (of_another_teacher, ("out/pairs-1", "--any-teacher")),
    ],
)
def test_pairs_that_are_not_to_be_trained_on(
    damage: Callable[[Path, Path], None],
    words: tuple[str, ...],
    out: Path,
    script_teacher: Path,
    train: Callable[..., Ended],
) -> None:
    damage(out, script_teacher)
    before = hashes(out)
    says(train("reflow", output="out/another"), 2, *words)
    if damage is truncated:  # which shows when the shard's turn comes
        assert not list((out / "another").glob("checkpoint-*"))
        shutil.rmtree(out / "another")
    assert hashes(out) == before


def test_settings_nobody_knows(out: Path, train: Callable[..., Ended], tmp_path: Path) -> None:
    before = hashes(out)
    for content, words in (
        (yaml.safe_dump(SETTINGS | {"learning_rat": 1}), ("learning_rat",)),
        (yaml.safe_dump(SETTINGS | {"steps": "many"}), ("steps",)),
        ("- steps", ("other.yaml",)),
        ("steps: [", ("other.yaml",)),
    ):
        (tmp_path / "other.yaml").write_text(content)
        for output in ("out/another", "out/reflow"):
            says(train("reflow", config=tmp_path / "other.yaml", output=output), 2, *words)
    says(train("reflow", config=tmp_path / "none.yaml", output="out/another"), 2, "none.yaml")
    assert hashes(out) == before


def test_a_run_does_not_go_on_as_another_model(out: Path, train: Callable[..., Ended]) -> None:
    """In the same place, with the same record, lie other weights than it was begun with."""
    other = {"pairs": "out/pairs-1", "output": "out/another"}  # of what they both descend from
    assert train("distill", "--max-minutes", 0, **other).code == 75
    file = out / "2rf" / "unet" / WEIGHTS
    weights = load_file(file)
    weights["conv_in.bias"] += 0.01
    save_file(weights, file, {"format": "pt"})
    write_checksums(out / "2rf")
    before = hashes(out)
    done = train("distill", **other)
    says(done, 2, "out/another/checkpoint-", "is of another run: model was", "another folder")
    assert hashes(out) == before


def test_other_weights_where_the_teacher_was(
    out: Path, train: Callable[..., Ended], tmp_path: Path
) -> None:
    shutil.rmtree(out / "reflow" / "model")
    tiny_sd(seed=1).save_pretrained(tmp_path / "other")
    before = hashes(out)
    says(train("reflow", model=tmp_path / "other"), 2, "out/reflow", "model", "choose another")
    says(train("reflow", model="other", output="out/a"), 2, "out/pairs-1", "--any-teacher")
    assert hashes(out) == before


def test_a_truncated_checkpoint(out: Path, script_whole: Path, train: Callable[..., Ended]) -> None:
    """The remedy that the line names is one."""
    shutil.rmtree(out / "reflow" / "model")
    file = out / "reflow" / "checkpoint-14" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    before = hashes(out)
    says(train("reflow"), 2, "out/reflow/checkpoint-14", "ema.safetensors", "remove its folder")
    assert hashes(out) == before
    shutil.rmtree(out / "reflow" / "checkpoint-14")
    assert train("reflow").code == 0
    again, whole = hashes(out / "reflow" / "model"), hashes(script_whole / "reflow" / "model")
    assert again["unet/" + WEIGHTS] == whole["unet/" + WEIGHTS]


def test_a_full_disk_while_training(
    out: Path, script_whole: Path, train: Callable[..., Ended]
) -> None:
    """No file fits that is larger than so: the settings, the last checkpoint, then the model."""
    new = {"output": "out/another"}
    says(train("reflow", **new, fsize=500), 1, "cannot write in out/another", "make room")
    assert hashes(out / "another") == {}
    shutil.rmtree(out / "another")
    shutil.rmtree(out / "reflow" / "model")
    shutil.rmtree(out / "reflow" / "checkpoint-14")
    before = hashes(out)
    says(
        train("reflow", fsize=100_000), 1, "out/reflow/checkpoint-14", "checkpoint-12 is untouched"
    )
    after = hashes(out)
    assert after.pop("reflow/log.jsonl") and before.pop("reflow/log.jsonl")
    assert after == before
    assert train("reflow").code == 0
    same(out, script_whole)
    shutil.rmtree(out / "reflow" / "model")
    before = hashes(out)
    says(train("reflow", fsize=100_000), 1, "out/reflow/model", "make room")
    assert hashes(out) == before


def test_the_last_sheet_is_drawn_by_whoever_comes_next(
    out: Path, script_whole: Path, train: Callable[..., Ended]
) -> None:
    """A kill came after the last checkpoint, in the middle of drawing."""
    shutil.rmtree(out / "reflow" / "model")
    sheet = out / "reflow" / "samples" / "0000014.png"
    left = sheet.with_name(f".{sheet.name}-{'0' * 16}.tmp")
    left.mkdir()
    sheet.rename(left / sheet.name)
    assert train("reflow").code == 0
    same(out, script_whole)


def test_a_full_disk_while_exporting(out: Path, forks: Forks, tmp_path: Path) -> None:
    """What a kill had put aside for an export that never came is there again, too."""
    before = hashes(out)
    (out / "one-step").rename(out / ".one-step.old")
    for folder in ("out/new", "out/one-step"):
        done = forks("export", "out/distill", "-o", folder, cwd=tmp_path, fsize=100_000)
        says(done, 1, folder)
    assert hashes(out) == before


def test_a_loss_that_is_not_a_number(out: Path, train: Callable[..., Ended]) -> None:
    diverging = ("--set", "learning_rate=1e30", "--set", "log_every=1", "--set", "save_every=1")
    before = hashes(out)
    says(train("reflow", *diverging, output="out/another"), 1, "not a number", "learning rate")
    after = {name: sha for name, sha in hashes(out).items() if not name.startswith("another/")}
    assert after == before
    kept = hashes(out / "another")
    says(train("reflow", *diverging, output="out/another"), 1, "not a number", "learning rate")
    assert {name: sha for name, sha in hashes(out / "another").items() if "checkp" in name} == {
        name: sha for name, sha in kept.items() if "checkp" in name
    }

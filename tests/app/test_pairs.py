"""`rectiflow pairs`: killed, resumed, by several writers, and what it refuses."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rectiflow.app import cli
from tests.app.conftest import Done, Run

NUM, SHARD = 24, 5
WORDS = ("--num", NUM, "--shard-size", SHARD, "--batch-size", 3, "--steps", 2, "--size", 32)
PROMPTS = "a red cat\ntwo apples\na dog\n"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text(PROMPTS)
    return file


Make = Callable[..., Done]


@pytest.fixture
def make(run: Run, model: Path, prompts: Path) -> Make:
    def call(*words: object, **options: object) -> Done:
        given = {"model": model, "prompts": prompts} | options
        named = [word for key, value in given.items() for word in (f"--{key}", value)]
        return run("pairs", *WORDS, *named, *words)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: Path) -> Path:
    """A store made without any interruption; tests only read it."""
    store = tmp_path_factory.mktemp("pairs") / "store"
    assert cli.main(words_for(model, prompts, store)) == 0
    return store


def words_for(model: Path, prompts: Path, store: Path, *more: object) -> list[str]:
    given = ("--model", model, "--prompts", prompts, "--out", store)
    return [str(word) for word in ("pairs", *given, *WORDS, *more)]


def test_a_store_and_what_is_said_of_it(make: Make, whole: Path, tmp_path: Path) -> None:
    done = make("--json", out=tmp_path / "store")
    assert done.code == 0 and done.err == ""
    data = done.data
    assert data["complete"] and data["made"] == data["pairs"] == data["num"] == NUM
    assert data["shards"] == 5 and (data["worker"], data["num_workers"]) == (1, 1)
    settings = data["settings"]
    assert (settings["solver"], settings["guidance_scale"]) == ("euler", 5.0)
    assert settings["latent_shape"] == [4, 8, 8] and settings["num_prompts"] == 3
    assert data["bytes"] == sum(
        len(file) for name, file in contents(whole).items() if name.startswith("shard")
    )
    assert contents(tmp_path / "store") == contents(whole)
    again = make(out=tmp_path / "store")
    assert again.code == 0 and f"{NUM} pairs, complete (0 made now" in again.out


def test_writers(make: Make, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each its share by --worker; then the two of torchrun, the first of which alone speaks."""
    store = tmp_path / "store"
    assert "the store waits for the others" in make("--worker", "2/3", out=store).out
    assert not make("--worker", "3/3", "--json", out=store).data["complete"]
    assert make("--worker", "1/3", "--json", out=store).data["complete"]
    assert contents(store) == contents(whole)
    store = tmp_path / "ranks"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert make("--json", out=store) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert make("--json", out=store).data["complete"]
    assert contents(store) == contents(whole)


def store_when(store: Path, news: int, running: Callable[[], bool]) -> None:
    """Wait until so many files have come to a store, or its writer has ended."""
    there = len(os.listdir(store)) if store.exists() else 0
    deadline = time.monotonic() + 100
    while running() and time.monotonic() < deadline:
        if store.exists() and len(os.listdir(store)) >= there + news:
            return
        time.sleep(0.001)


class Fork:
    """A command in a fork of this process, which has imported everything already."""

    def __init__(self, words: list[str]) -> None:
        self.status: int | None = None
        self.pid = os.fork()
        if not self.pid:
            code = 99
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                code = cli.main(words)
            finally:
                os._exit(code)

    def running(self) -> bool:
        pid, status = os.waitpid(self.pid, os.WNOHANG) if self.status is None else (self.pid, 0)
        if self.status is None and pid:
            self.status = status
        return self.status is None

    def kill(self) -> bool:
        """kill -9; whether it came before the end."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitpid(self.pid, 0)[1]
        return os.WIFSIGNALED(self.status)

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        return os.waitstatus_to_exitcode(self.status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("keep", [0, 30])
def test_killed_at_random_moments(
    make: Make, model: Path, prompts: Path, whole: Path, tmp_path: Path, keep: int
) -> None:
    store, rng, kills = tmp_path / "store", random.Random(), 0
    for news in (1, 2, 4):
        fork = Fork(words_for(model, prompts, store, "--keep-seconds", keep))
        store_when(store, news, fork.running)
        time.sleep(rng.uniform(0, 0.03))
        kills += fork.kill()
    done = make("--keep-seconds", keep, "--json", out=store)
    assert done.data["complete"] and kills
    assert contents(store) == contents(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_writers_at_the_same_time(model: Path, prompts: Path, whole: Path, tmp_path: Path) -> None:
    """Three with a share each, and a fourth that does all of it again; one of them is killed."""
    store = tmp_path / "store"
    shares = ["1/3", "2/3", "3/3", "1/1"]
    forks = [
        Fork(words_for(model, prompts, store, "--worker", share, "--keep-seconds", 0))
        for share in shares
    ]
    store_when(store, 6, forks[1].running)
    forks[1].kill()
    assert [fork.wait() for fork in (forks[0], *forks[2:])] == [0, 0, 0]
    assert contents(store) == contents(whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_full_disk(make: Make, model: Path, prompts: Path, tmp_path: Path) -> None:
    """No file may be larger than 16 kB, as on a disk with no more room: a shard does not fit."""
    store, said = tmp_path / "store", tmp_path / "said"
    larger = ("--size", 64, "--shard-size", NUM, "--steps", 1)
    child = os.fork()
    if not child:
        code = 99
        try:
            with said.open("w") as sys.stderr:
                resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))
                code = cli.main(words_for(model, prompts, store, *larger))
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    line = (
        f"rectiflow: error: cannot write {store}/shard-000000.safetensors (File too large): make "
        "room, and the same command goes on from here\n"
    )
    assert said.read_text() == line
    assert set(contents(store)) == {"manifest.json", "prompts.jsonl.gz"}
    for folder in (store, tmp_path / "unbroken"):
        assert make(*larger, "--json", out=folder).data["complete"]
    assert contents(store) == contents(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("--solver", "heun"), "was begun with solver 'euler', and 'heun' is asked for"),
        (("--guidance", "1.5"), "was begun with --guidance 5.0, and 1.5 is asked for"),
        (("--steps", "4"), "was begun with --steps 2, and 4 is asked for"),
        (("--num", "50"), "was begun with num 24, and 50 are asked for"),
        (("--size", "32x40"), "was begun with width 32, and 40 is asked for"),
        (("--dtype", "bfloat16"), "was begun with dtype 'float32', and 'bfloat16' is asked for"),
        (("--prompts", "emoji:3"), "was begun with another prompt list, of 3 prompts"),
        (("--model", "emoji-sd3"), "is of another teacher, tiny with weight_hash"),
    ],
)
def test_other_settings_are_refused(
    make: Make, whole: Path, change: tuple[str, str], line: str
) -> None:
    before = contents(whole)
    make(*change, out=whole).refuses(str(whole), line)
    assert contents(whole) == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("--prompts", "none.txt"), "there is no file of prompts none.txt"),
        (("--prompts", "emoji:none"), "--prompts emoji:none: give emoji:COUNT"),
        (("--prompts", "emoji:0"), "give emoji:COUNT"),
        (("--prompts", "some/captions"), "some/captions"),
        (("--solver", "dpmm"), "unknown solver 'dpmm'"),
        (("--size", "big"), "--size big: give pixels, such as 512, or HEIGHTxWIDTH"),
        (("--size", "33"), "must both be multiples of 8"),
        (("--worker", "0/3"), "--worker 0/3: give K/N with K from 1 to N"),
        (("--worker", "2"), "--worker 2: give K/N"),
        (("--guidance", "nan"), "'--guidance'"),
        (("--num", "0"), "'--num'"),
        (("--out", "nowhere://pairs"), "nowhere://pairs: Protocol not known: nowhere"),
        (("--out", "/proc/pairs"), "cannot write to /proc/pairs ("),
        (("--out", "/dev/full"), "/dev/full is a file: give a folder"),
        (("--images", "."), "--images come with their own captions: leave out --prompts"),
    ],
)
def test_bad_input(make: Make, tmp_path: Path, change: tuple[str, str], line: str) -> None:
    make("--out", tmp_path / "store", *change).refuses(line)
    assert not (tmp_path / "store").exists()


def test_what_is_missing_is_said(run: Run, model: Path, tmp_path: Path) -> None:
    run("pairs", "--prompts", "emoji:3").refuses("--out is missing")
    run("pairs", "--out", tmp_path / "store").refuses("--prompts is missing")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    run("pairs", "--out", tmp_path / "s", "--prompts", empty).refuses("empty.txt has no prompts")
    empty.write_bytes(b"a cat\n\xff")
    run("pairs", "--out", tmp_path / "s", "--prompts", empty).refuses("empty.txt, line 2: it is")
    (tmp_path / "thesis.txt").write_text("mine")
    run("pairs", "--out", tmp_path, "--prompts", "emoji:3").refuses("holds something else")
    assert set(os.listdir(tmp_path)) == {"empty.txt", "thesis.txt"}


def test_captions_of_the_embedded_world(run: Run, model: Path, tmp_path: Path) -> None:
    from rectiflow.emoji.caption import caption
    from rectiflow.emoji.scene import sample
    from rectiflow.straighten.folder import Folder
    from rectiflow.straighten.manifest import read_manifest, read_prompts

    store = tmp_path / "store"
    words = ("--prompts", "emoji:4", "--out", store, "--steps", 1, "--batch-size", 4)
    done = run("pairs", "--model", model, *words, "--json")
    assert done.data["num"] == 4
    folder = Folder(store)
    assert read_prompts(folder, read_manifest(folder)) == [caption(sample(i)) for i in range(4)]


def test_real_images(run: Run, model: Path, tmp_path: Path) -> None:
    """From a folder with captions beside, and the same from a table."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, text in enumerate(["a red cat", "two apples\n"]):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    table = tmp_path / "table.csv"
    table.write_text("image,caption\nphotos/0.png,a red cat\nphotos/1.png,two apples\n")
    words = ("--model", model, "--steps", 2, "--size", 32, "--json")
    for source, store in ((folder, "a"), (table, "b")):
        done = run("pairs", *words, "--images", source, "--out", tmp_path / store)
        assert done.data["complete"] and done.data["num"] == 2
        settings = done.data["settings"]
        assert (settings["kind"], settings["solver"]) == ("inverted", "rk4")
        assert settings["guidance_scale"] == 1
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def refused(source: Path, line: str) -> None:
        run("pairs", *words, "--images", source, "--out", tmp_path / "c").refuses(line)
        assert not (tmp_path / "c").exists()

    (folder / "1.txt").write_text(" ")
    refused(folder, "1.txt is empty: write a caption into it")
    (folder / "1.txt").unlink()
    refused(folder, "1.png has no caption: write one into 1.txt")
    (folder / "1.png").write_text("no picture")
    refused(table, "photos/1.png is not an image")
    (folder / "1.png").unlink()
    refused(table, "there is no file")
    table.write_text("file,caption\na.png,a red cat\n")
    refused(table, "has no column image: the first line should be image,prompt")
    refused(tmp_path / "none.csv", "there is no file")
    refused(tmp_path / "none", "give a folder of pictures, or a .csv file")
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", "has no pictures")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_twenty_kills(model: Path, prompts: Path, whole: Path, tmp_path: Path) -> None:
    """By one writer or several; a store that gets complete loses most of its files again."""
    store, rng, kills = tmp_path / "store", random.Random(), 0
    while kills < 20:
        share = rng.choice(["1/1", "1/1", "1/2", "2/2", "2/3"])
        keep = rng.choice([0, 30])
        words = words_for(model, prompts, store, "--worker", share, "--keep-seconds", keep)
        fork = Fork(words)
        store_when(store, rng.choice([1, 1, 2, 4]), fork.running)
        time.sleep(rng.uniform(0, 0.03))
        kills += fork.kill()
        assert fork.wait() in (0, -signal.SIGKILL)
        if (store / "complete.json").exists():
            assert contents(store).items() >= contents(whole).items()
            (store / "complete.json").unlink()
            for file in sorted(store.iterdir()):
                if file.name != "manifest.json" and rng.random() < 0.7:
                    file.unlink()
    assert cli.main(words_for(model, prompts, store)) == 0
    assert contents(store) == contents(whole)


@pytest.mark.slow
def test_ranks_of_torchrun(model: Path, prompts: Path, whole: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    # Without the -- torchrun takes --num for one of its own options.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    words = words_for(model, prompts, store, "--json")
    done = subprocess.run(
        [*launch, "-m", "rectiflow", "--", *words], stdout=subprocess.PIPE, text=True, check=True
    )
    assert json.loads(done.stdout)["num_workers"] == 2
    assert contents(store) == contents(whole)


def test_a_store_goes_on_with_other_versions_when_told_to(
    make: Make, run: Run, whole: Path, tmp_path: Path
) -> None:
    """Those that were installed may be gone; each shard says what made it."""
    store = tmp_path / "store"
    assert make("--worker", "1/2", out=store).code == 0
    manifest = store / "manifest.json"
    text = manifest.read_text()
    import diffusers

    here = f'"diffusers": "{diffusers.__version__}"'
    assert here in text
    manifest.write_text(text.replace(here, '"diffusers": "0.42.0.old"'))
    before = contents(store)
    make("--worker", "2/2", out=store).refuses(
        f"was begun with diffusers 0.42.0.old, and {diffusers.__version__} is installed",
        "install diffusers==0.42.0.old, or let this version",
        "--allow-other-versions",
    )
    assert contents(store) == before
    assert make("--worker", "2/2", "--allow-other-versions", "--json", out=store).data["complete"]
    sidecars = {file.name: json.loads(file.read_text()) for file in store.glob("shard*.json")}
    assert [bool(sidecars[name].get("versions")) for name in sorted(sidecars)] == [
        False,
        True,
    ] * 2 + [False]
    words = run("pairs", "inspect", store).out
    assert "shard-000001, shard-000003 by torch" in words and diffusers.__version__ in words
    # With its own versions nothing has to be allowed, and nothing is said.
    names = [name for name in contents(whole) if name.endswith(".safetensors")]
    assert {n: contents(store)[n] for n in names} == {n: contents(whole)[n] for n in names}


def test_a_list_in_json_is_the_same_store(make: Make, whole: Path, tmp_path: Path) -> None:
    listed = tmp_path / "p.json"
    listed.write_text(json.dumps([{"caption": p} for p in [*PROMPTS.splitlines(), " "]]))
    done = make("--json", out=tmp_path / "store", prompts=listed)
    assert contents(tmp_path / "store") == contents(whole)
    assert done.data["warnings"] == [f"{listed}: 1 prompt is blank and skipped"]

"""``rectiflow evaluate coco`` on a tiny model: drawn in sittings, killed, measured, refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rectiflow.evaluate.coco_data import read_coco
from tests.app.conftest import Run
from tests.app.forks import Forks
from tests.tiny_sd import tiny_sd

N = 24


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path, run: Run) -> Path:
    folder = tmp_path / "coco"
    made = run("evaluate", "coco", "--make-data", folder, "--limit", N, "--json")
    assert made.code == 0 and made.data == {"data": str(folder), "n": N}
    return folder


def pictures(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (output / "pictures").glob("*.png")}


def test_shards_then_figures(run: Run, sd: Path, data: Path, tmp_path: Path) -> None:
    words = ["evaluate", "coco", "--data", data, "--model", sd, "--device", "cpu", "--limit", 6]
    words += ["--steps", 2, "--guidance", 1, "--solver", "euler", "--seed", 5, "--batch-size", 2]
    words += ["-o", tmp_path / "out"]
    shard = run(*words, "--shard", "2/2", "--json").data
    assert (shard["done"], shard["left"], shard["made"]) == (2, 4, 2)
    done = run(*words, "--clip", "emoji-clip")
    assert done.code == 0, done
    first, *lines = done.out.splitlines()
    assert "6 pictures of val2017, 2 steps of euler, guidance 1, 2 network samples" in first
    assert [line.partition(":")[0] for line in lines] == [
        "Fréchet distance in features of emoji-clip",
        "CLIP score (cosine, emoji-clip)",
        "FID",
    ]
    few = "6 pictures are too few for features of 128 dimensions"
    assert "warning: Fréchet distance" in done.err and few in done.err
    assert lines[-1] == "FID: left out: needs --inception-weights"
    again = run(*words, "--clip", "emoji-clip", "--json").data
    assert again == json.loads((tmp_path / "out" / "figures.json").read_text())
    assert few in again["metrics"]["frechet_clip"]["caution"]
    assert [few in one for one in again["warnings"]] == [True]
    assert again["sitting"]["made"] == 0 and again["sitting"]["seconds_per_picture"] is None
    assert again["ids_hash"] == read_coco(data).first(6).ids_hash
    assert again["n"] == 6 and again["resizer"]["filter"] == "bicubic"
    assert len(again["metrics"]["frechet_clip"]["reference_hash"]) == 64
    with (tmp_path / "out" / "per-image.csv").open() as opened:
        assert [int(row["seed"]) for row in csv.DictReader(opened)] == list(range(5, 11))
    run(*words, "--steps", 3).refuses("num inference steps", "choose another folder")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_a_list_of_ids_and_captions(
    run: Run, sd: Path, data: Path, tmp_path: Path, kind: str
) -> None:
    """In its order, an image twice, without the folder's own annotations."""
    known = read_coco(data).images
    rows = [(known[i].id, f'words {n}, "quoted"') for n, i in enumerate((4, 0, 4, 2))]
    file = tmp_path / f"list.{kind}"
    objects = [{"image_id": i, "caption": caption} for i, caption in rows]
    if kind in ("csv", "tsv"):
        with file.open("w", newline="") as opened:
            writer = csv.writer(opened, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("image_id", "caption"), *rows])
    elif kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, objects)) + "\n\n")
    else:
        file.write_text(json.dumps({"annotations": objects}))
    shutil.rmtree(data / "annotations")
    words = ["evaluate", "coco", "--data", data, "--captions", file, "--model", sd]
    words += ["--device", "cpu", "--steps", 1, "-o", tmp_path / "out"]
    done = run(*words, "--json")
    assert done.code == 0, done.err
    assert (done.data["n"], done.data["selection"]) == (4, "given with captions")
    four, nought, two = (known[i].id for i in (4, 0, 2))
    assert set(pictures(tmp_path / "out")) == {
        f"{name}.png" for name in (four, nought, f"{four}-2", two)
    }
    with (tmp_path / "out" / "per-image.csv").open() as opened:
        assert [(int(row["id"]), row["caption"]) for row in csv.DictReader(opened)] == rows
    run(*words, "--ids", file).refuses("leave out --ids")
    file.write_text(file.read_text().replace("words 0", "other words"))
    run(*words).refuses("list hash", "choose another folder")


def test_a_killed_run_goes_on_to_the_same_end(
    run: Run, forks: Forks, sd: Path, data: Path, tmp_path: Path
) -> None:
    words = ["evaluate", "coco", "--data", data, "--model", sd, "--device", "cpu"]
    words += ["--steps", 6, "--guidance", 1, "--solver", "euler", "--batch-size", 1]
    output = tmp_path / "out"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = forks.start(*words, "-o", output, **pipes)
    while process.poll() is None and not pictures(output):
        time.sleep(0.002)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = pictures(output)
    assert 0 < len(before) < N
    resumed = run(*words, "-o", output, "--json").data
    assert resumed["sitting"]["made"] == N - len(before)
    assert run(*words, "-o", tmp_path / "whole").code == 0
    assert pictures(output) == pictures(tmp_path / "whole")
    assert len(pictures(output)) == N


def test_the_command_refuses_in_a_line(run: Run, data: Path, tmp_path: Path) -> None:
    given = ["--data", data, "-o", tmp_path / "out"]
    (tmp_path / "ids").write_text("1\n")
    (tmp_path / "twice.csv").write_text("id,caption\n1,a cat\n1,a cat\n")
    (tmp_path / "wrong.csv").write_text("id,caption\n1,a cat\nx,a cat\n")
    (tmp_path / "other.json").write_text('{"123": "a cat"}')
    (tmp_path / "cut.jsonl").write_text('{"id": 1')
    for words, remedy in (
        (["coco", "-o", tmp_path], "--data"),
        (["coco", "--data", data], "-o"),
        (["coco", "--data", tmp_path, "-o", tmp_path], "annotations/"),
        (["coco", *given, "--shard", "3/2"], "1/4"),
        (["coco", *given, "--split", "train2017"], "val2017 or val2014"),
        (["coco", *given, "--split", "val2014"], "is not there: unpack"),
        (["coco", *given, "--ids", tmp_path / "ids"], "no image 1"),
        (["coco", *given, "--captions", tmp_path / "none.csv"], "none.csv cannot be read"),
        (["coco", *given, "--captions", tmp_path / "ids"], "give a .csv, .tsv"),
        (["coco", *given, "--captions", tmp_path / "twice.csv"], "with one caption twice"),
        (["coco", *given, "--captions", tmp_path / "wrong.csv"], "row 2 has no image id"),
        (["coco", *given, "--captions", tmp_path / "other.json"], "no picture of image 123"),
        (["coco", *given, "--captions", tmp_path / "cut.jsonl"], "is not JSON"),
        (["coco", *given, "--limit", "2"], "3 or more"),
        (["coco", *given, "--guidance", "nan"], "--guidance"),
        (["coco", *given, "--inception-weights", tmp_path / "none.pth"], "6726825d"),
        (["coco", "--make-data", data], "choose another folder"),
    ):
        run("evaluate", *words).refuses(remedy)
    assert not (tmp_path / "out" / "settings.json").exists()

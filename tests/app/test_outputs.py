"""What is there already: not ours is never touched, ours is replaced as a set, nothing is stale."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rectiflow.app.outputs import MANIFEST, Outputs
from rectiflow.errors import InputError
from rectiflow.report import read_picture
from tests.app.conftest import Run

FOREIGN = b"somebody's"


def names(folder: str | Path = "out") -> set[str]:
    found = {str(file.relative_to(folder)) for file in Path(folder).rglob("*") if file.is_file()}
    return {name for name in found if Path(name).name != MANIFEST}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def words(model: Path, photo: Path) -> dict[str, list[object]]:
    """Command lines that write `name`, their outputs left out."""
    small = ["--model", model, "--steps", 1]
    edit = ["edit", photo, "--from", "a cat", "--to", "a dog", *small]
    return {
        "source.png": [*edit, "-o", "."],
        "report.html": [*edit, "-o", "."],
        "one.webp": [*edit, "-o", "one.webp"],
        "one.html": [*edit, "-o", "one.png", "--report"],
        "chain.json": ["chain", *edit[1:], "-o", "."],
        "last.jpg": ["chain", *edit[1:], "-o", "last.jpg"],
        "mine.png": ["generate", "a cat", *small, "-o", "mine.png"],
        "walk.png": ["generate", "a cat", *small, "--interpolate", "1,2", "--frames", 2,
                     "-o", "walk.png"],
        "i.safetensors": ["invert", photo, *small, "-o", "i.safetensors"],
        "back.png": ["invert", photo, *small, "--reconstruct", "back.png"],
        "back-uncompensated.png": ["invert", photo, *small, "--reconstruct", "back.png"],
        "report.html ": ["demo", "--model", model, "-o", "."],
        "cases/add/source.png": ["demo", "--model", model, "-o", "."],
        "emoji-models.png": ["evaluate", "emoji-models", "-o", "."],
        "emoji-edits.csv": ["evaluate", "emoji-edits", "-o", "."],
        "ablations/steps.csv": ["evaluate", "emoji-edits", "--ablations", "-o", "."],
        "tuning.json": ["evaluate", "emoji-edits", "--tune", "-o", "."],
        "inversion-error-steps.svg": ["evaluate", "inversion-error", "-o", "."],
        "straight-edits.json": ["evaluate", "straight-edits", "-o", "."],
        "page.md": ["reproduce", "instaflow", "-o", "study", "--page", "page.md"],
        "vae/config.json": ["train", "emoji-vae", "-o", "run", "--export", "vae"],
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["source.png", "report.html", "one.webp", "one.html", "chain.json", "last.jpg", "mine.png",
     "walk.png", "i.safetensors", "back.png", "back-uncompensated.png", "report.html ",
     "cases/add/source.png", "emoji-models.png", "emoji-edits.csv", "ablations/steps.csv",
     "tuning.json", "inversion-error-steps.svg", "straight-edits.json", "page.md",
     "vae/config.json"],
)  # fmt: skip
def test_what_is_not_ours_is_refused_before_any_work(
    run: Run, words: dict[str, list[object]], name: str
) -> None:
    file = Path(name.strip())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(FOREIGN)
    run(*words[name]).refuses(file.name, "--overwrite")
    assert file.read_bytes() == FOREIGN and names(".") == {str(file)}


@pytest.mark.parametrize(
    "command",
    [["train", "emoji-vae"], ["reproduce", "instaflow", "--page", "page.md"],
     ["evaluate", "coco", "--make-data"], ["evaluate", "pie-bench", "--make-data"]],
)  # fmt: skip
def test_folders_of_long_work_are_its_own(run: Run, command: list[str]) -> None:
    Path("full").mkdir()
    Path("full/log.jsonl").write_bytes(FOREIGN)
    option = [] if command[-1] == "--make-data" else ["-o"]
    run(*command, *option, "full").refuses("full has other things in it (log.jsonl)")
    assert names("full") == {"log.jsonl"}


def test_overwrite_insists(run: Run, words: dict[str, list[object]]) -> None:
    for name in ("source.png", "mine.png"):
        Path(name).write_bytes(FOREIGN)
        assert run(*words[name], "--overwrite").code == 0
        assert Path(name).read_bytes() != FOREIGN
        assert run(*words[name]).code == 0, "it is ours now"


def test_a_file_of_ours_that_was_changed_is_theirs(
    run: Run, words: dict[str, list[object]]
) -> None:
    assert run(*words["mine.png"]).code == 0
    assert run(*words["mine.png"], "--seed", 3).code == 0
    assert read_picture("mine.png")["seed"] == 3
    picture = Image.open("mine.png").convert("RGB")
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save("mine.png")
    before = Path("mine.png").read_bytes()
    run(*words["mine.png"]).refuses("mine.png", "--overwrite")
    assert Path("mine.png").read_bytes() == before


def test_a_link_is_nobodys(run: Run, words: dict[str, list[object]]) -> None:
    Path("victim.png").write_bytes(FOREIGN)
    Path("mine.png").symlink_to("victim.png")
    run(*words["mine.png"]).refuses("mine.png")
    assert run(*words["mine.png"], "--overwrite").code == 0
    assert Path("victim.png").read_bytes() == FOREIGN and not Path("mine.png").is_symlink()


def test_a_set_is_replaced_whole(run: Run, words: dict[str, list[object]]) -> None:
    """What an earlier, longer edit left goes; what is somebody's stays, changed or not."""
    edit = words["source.png"][:-1]
    assert run(*edit, "out", "--to", "a bird", "--to", "a fish", "--diagnose").code == 0
    Path("out/notes.txt").write_bytes(FOREIGN)
    Image.new("RGB", (4, 4)).save("out/edit-3.png")
    run(*edit, "other")  # elsewhere: nothing goes
    assert "edit-2.png" in names()
    assert run(*edit, "out").code == 0
    kept = {"notes.txt", "edit-3.png"}
    assert names() == {"source.png", "edit-1.png", "report.html"} | kept
    # A chain replaces the source, so the edit of the former one goes with it.
    assert run("chain", *edit[1:], "out").code == 0
    assert names() == {"source.png", "turn-1.png", "sheet.png", "chain.json"} | kept


def test_what_is_read_does_not_go_with_its_set(run: Run, words: dict[str, list[object]]) -> None:
    edit = words["source.png"][:-1]
    assert run(*edit, "out", "--to", "a bird").code == 0
    again = ["edit", "out/edit-2.png", *edit[2:], "out"]
    run(*again, "--overwrite").refuses("out/edit-2.png would be overwritten")
    assert "edit-2.png" in names()


def test_generate_numbers_on(run: Run, model: Path) -> None:
    words = ["generate", "a cat", "--model", model, "--steps", 1]
    first, second = (run(*words, "--json", "-n", 2).data["images"] for _ in range(2))
    assert [entry["image"] for entry in first] == ["0.png", "1.png"]
    assert [entry["image"] for entry in second] == ["0-run2.png", "1-run2.png"]
    before = {name: Path("out", name).read_bytes() for name in names()}
    run(*words, "--seed", 1)
    assert names() - before.keys() == {"1-run3.png"}
    assert all(Path("out", name).read_bytes() == data for name, data in before.items())
    for _ in range(2):
        run(*words, "--interpolate", "1,2", "--frames", 2, "-o", "films")
        run(*words, "a dog", "--consistent", "-o", "both")
    assert names("films") == {"walk.gif", "walk-run2.gif"}
    assert names("both") == {"0-1.png", "0-2.png", "0-1-run2.png", "0-2-run2.png"}


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".webp", ".JPG"])
def test_a_picture_is_written_as_its_name_says(
    run: Run, words: dict[str, list[object]], ending: str
) -> None:
    edit = words["source.png"][:-1]
    done = run(*edit, f"a{ending}", "--json")
    assert done.code == 0 and done.data["edits"][0]["image"] == f"a{ending}"
    assert done.data["report"] is None and names(".") == {f"a{ending}"}
    with Image.open(f"a{ending}") as picture:
        kinds = {".png": "PNG", ".webp": "WEBP"}
        assert picture.format == kinds.get(ending, "JPEG")
        found = np.asarray(picture.convert("RGB"), np.float32)
    run(*edit, "folder")
    exact = np.asarray(Image.open("folder/edit-1.png"), np.float32)
    # JPEG is lossy, and noise is the worst it can be given.
    assert np.abs(found - exact).mean() < (0.01 if ending in kinds else 8)
    assert read_picture(f"a{ending}")["prompt"] == "a dog"
    assert "prompt: a dog" in run("info", f"a{ending}").out
    assert run("replay", f"a{ending}").code == 0


def test_a_report_beside_a_picture(run: Run, words: dict[str, list[object]]) -> None:
    edit = words["source.png"][:-1]
    assert run(*edit, "a.png", "--report").code == 0
    assert names(".") == {"a.png", "a.html"}
    assert run(*edit, "a.png").code == 0
    assert names(".") == {"a.png"}, "the report would be of another edit"
    chain = ["chain", *edit[1:], "b.webp", "--to", "a bird"]
    data = run(*chain, "--report", "--json").data
    assert names(".") == {"a.png", "b.webp", "b.json"}
    assert [turn["image"] for turn in data["turns"]] == [None, "b.webp"]
    assert json.loads(Path("b.json").read_text()) == data
    assert read_picture("b.webp")["prompt"] == "a bird"
    run(*edit, "out", "--report").refuses("--report")
    run(*edit, "a.png", "--to", "a bird").refuses("2 edits do not fit into a.png")
    run(*chain, "--one-shot").refuses("--one-shot", "b.webp")
    run(*edit, "a.tiff").refuses("a.tiff", ".png, .jpg, .jpeg, .webp")


def test_killed_and_begun_again(model: Path, photo: Path) -> None:
    """What a kill leaves is ours, whole or not, and goes with the rest of its set."""
    words = ["edit", photo, "--from", "a cat", "--model", model, "--steps", "1", "-o", "out"]
    for n in range(40):
        words += ["--to", f"a dog {n}"]
    command = [sys.executable, "-m", "rectiflow", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not Path("out/edit-3.png").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("out/report.html").exists()
    from rectiflow.app.cli import main

    assert main([str(word) for word in words[: words.index("--to") + 2]]) == 0
    assert names() == {"source.png", "edit-1.png", "report.html"}


def test_a_damaged_list_says_of_nothing_that_it_is_ours(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path, ["a.txt"])
    outputs.file("a.txt").write_text("ours")
    outputs.finish()
    Outputs(tmp_path, ["a.txt"])
    whole = (tmp_path / MANIFEST).read_text()
    for text in ("", "[]", '{"sets": 3}', '{"sets": [[1]]}', "[" * 5000, '{"sets": [{"a": 1}]}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(InputError, match="--overwrite"):
            Outputs(tmp_path, ["a.txt"])
    (tmp_path / "victim.txt").write_text("ours")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / MANIFEST).write_text(whole.replace("a.txt", "../victim.txt"))
    outputs = Outputs(inside, ["b.txt"])
    outputs.file("b.txt").write_text("")
    outputs.finish()
    assert (tmp_path / "victim.txt").exists()


def test_a_table_that_was_shortened_leaves_nothing(run: Run, model: Path, photo: Path) -> None:
    Image.open(photo).save("one.png")
    lines = ["image,from,to,output", "one.png,a cat,a dog,a", "one.png,a cat,a fish,b/c"]
    table = Path("edits.csv")
    table.write_text("\n".join(lines))
    words = ["edit", "--batch", table, "--model", model, "--steps", 1, "-o", "out"]
    assert run(*words).code == 0
    Path("out/b/notes.txt").write_bytes(FOREIGN)
    table.write_text("\n".join(lines[:2]))
    done = run(*words)
    assert "1 done before" in done.out and "no longer has b/c" in done.err
    rows = list(csv.DictReader(Path("out/results.csv").open()))
    assert [row["output"] for row in rows] == ["a"]
    assert len(Path("out/results.jsonl").read_text().splitlines()) == 1
    row = {"a/source.png", "a/edit-1.png", "a/report.html"}
    assert names() == {*row, "b/notes.txt", "results.csv", "results.jsonl"}


@pytest.mark.parametrize("name", ["results.csv", "Results.jsonl", MANIFEST, "results.csv/a"])
def test_a_row_is_no_file_of_the_table(run: Run, photo: Path, name: str) -> None:
    Image.open(photo).save("one.png")
    Path("edits.csv").write_text(f"image,from,to,output\none.png,a cat,a dog,{name}\n")
    run("edit", "--batch", "edits.csv").refuses("line 2", name)


def test_all_rows_are_looked_at_before_the_first_is_made(
    run: Run, model: Path, photo: Path
) -> None:
    Image.open(photo).save("one.png")
    Image.new("L", (5, 5), 255).save("small.png")
    words = ["edit", "--batch", "edits.csv", "--model", model, "--steps", 1]
    invert = ["invert", photo, "--prompt", "a cat", "--model", model, "--steps", 1]
    assert run(*invert, "-o", "i.safetensors").code == 0
    good = "image,from,to,mask,preset,seed,output\none.png,a cat,a dog,,,,a\n"
    for row, said in (
        ("one.png,a cat,a dog,small.png,,,b", ["5 × 5"]),
        ("i.safetensors,,a dog,small.png,,,b", ["5 × 5"]),
        (",a cat,a dog,small.png,,3,b", ["5 × 5"]),
        ("i.safetensors,,a dog,,ftedit,,b", ["query_offset", "fixed_point"]),
        ("i.safetensors,a dog,a dog,,,,b", ["with from 'a cat'"]),
    ):
        Path("edits.csv").write_text(f"{good}{row}\n")
        run(*words).refuses("line 3", *said)
        assert not Path("out/a/source.png").exists(), "the first row was made"
    Path("out/b").mkdir()
    Path("out/b/source.png").write_bytes(FOREIGN)
    Path("edits.csv").write_text(f"{good}one.png,a cat,a bird,,,,b\n")
    run(*words).refuses("line 3", "out/b/source.png", "--overwrite")
    assert not Path("out/a/source.png").exists()

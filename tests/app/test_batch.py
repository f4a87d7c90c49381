"""A table of edits: checked whole, done once, and gone on with after a kill."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.app.conftest import Done, Run
from tests.app.forks import told

STEPS = ("--steps", 2)


@pytest.fixture
def table(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three edits of two pictures, beside them, and the shell elsewhere."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.open(photo).save(folder / "one.png")
    Image.open(photo).rotate(180).save(folder / "two.png")
    (folder / "edits.csv").write_text(
        "image,from,to,negative,output\n"
        "one.png,a cat,a dog,,\n"
        'two.png,a cat,"a big, red dog",a heart,\n'
        "one.png,a cat,a lemon,,fruit/lemon\n"
    )
    monkeypatch.chdir(tmp_path)
    return folder / "edits.csv"


def batch(run: Run, table: Path, model: Path, *more: object) -> Done:
    return run("edit", "--batch", table, "--model", model, *STEPS, "-o", "out", *more)


def log(folder: str = "out") -> list[dict[str, Any]]:
    lines = Path(folder, "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pixels(file: str | Path) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(file))


def test_rows_are_done_once(run: Run, table: Path, model: Path) -> None:
    """Each as `edit` would do it by itself; the third from the inversion of the first."""
    done = batch(run, table, model, "--json")
    assert done.code == 0, done.err
    data = done.data
    assert (data["done"], data["skipped"], data["failed"]) == (3, 0, 0)
    assert [row["output"] for row in data["rows"]] == ["0001", "0002", "fruit/lemon"]
    assert [row["shared_inversion"] for row in data["rows"]] == [False, False, True]
    assert data["rows"] == log() and [row["row"] for row in log()] == [2, 3, 4]
    costs = {"inversion": 2, "editing": 2, "reconstruction": 0, "total": 4}
    assert data["rows"][0]["nfe"] == data["rows"][1]["nfe"] == costs
    assert data["rows"][2]["nfe"] == costs | {"inversion": 0, "total": 2}
    assert data["nfe"] == {"inversion": 4, "editing": 6, "reconstruction": 0, "total": 10}
    with Path("out/results.csv").open(encoding="utf-8", newline="") as file:
        shown = list(csv.DictReader(file))
    assert [row["to"] for row in shown] == ["a dog", "a big, red dog", "a lemon"]
    assert {row["status"] for row in shown} == {"done"}
    columns = ("nfe_inversion", "nfe_editing", "nfe_reconstruction", "nfe")
    costs_shown = [tuple(row[name] for name in columns) for row in shown]
    assert costs_shown == [("2", "2", "0", "4")] * 2 + [("0", "2", "0", "2")]
    alone = ("edit", "data/one.png", "--from", "a cat", "--to", "a lemon", "--model", model)
    single = run(*alone, *STEPS, "-o", "alone", "--json").data
    for name in ("source.png", "edit-1.png"):
        assert np.array_equal(pixels(f"alone/{name}"), pixels(f"out/fruit/lemon/{name}"))
    assert {file.name for file in Path("out/fruit/lemon").iterdir()} == {
        file.name for file in Path("alone").iterdir()
    }
    assert single["nfe"] == costs
    assert run("replay", "out/fruit/lemon/edit-1.png").code == 0

    before = {file: file.stat().st_mtime_ns for file in Path("out").rglob("*.png")}
    again = batch(run, table, model, "--json").data
    assert (again["done"], again["skipped"], again["nfe"]["total"]) == (0, 3, 0)
    assert again["rows"] == data["rows"] == log()
    assert before == {file: file.stat().st_mtime_ns for file in Path("out").rglob("*.png")}

    # A row or a picture: what is no longer the same is done again, and only that.
    table.write_text(table.read_text().replace("a dog", "a yellow dog"))
    Image.open("data/two.png").rotate(180).save("data/two.png")
    changed = batch(run, table, model)
    assert changed.code == 0 and "2 done, 1 done before, 0 failed" in changed.out


def test_other_settings_are_other_edits(run: Run, table: Path, model: Path) -> None:
    table.write_text("image,from,to\none.png,a cat,a dog\n")
    for settings, expected in (
        ((), "1 done, 0 done before"),
        (("--diagnose",), "1 done, 0 done before"),
        (("--set", "adaln_ratio=1"), "1 done, 0 done before"),
        (("--set", "adaln_ratio=1.0"), "0 done, 1 done before"),
    ):
        assert expected in batch(run, table, model, *settings).out


def test_a_broken_off_line_costs_one_row(run: Run, table: Path, model: Path) -> None:
    table.write_text("image,from,to\none.png,a cat,a dog\none.png,a cat,a lemon\n")
    batch(run, table, model)
    file = Path("out/results.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    assert "1 done, 1 done before" in batch(run, table, model).out
    assert [entry["output"] for entry in log()] == ["0001", "0002"]


def test_seeds_masks_and_presets_by_row(run: Run, table: Path, model: Path) -> None:
    mask = Image.new("L", (40, 24), 0)
    mask.paste(255, (8, 4, 24, 20))
    ImageOps.invert(mask).resize((80, 48)).save("data/mask.png")
    table.write_text(
        "to,from,image,seed,mask,preset,num_images\n"
        "a dog,a cat,,3,,,2\n"
        "a dog,a cat,one.png,,mask.png,euler,\n"
    )
    small = batch(run, table, model)
    small.refuses("line 3", "is 80 × 48 and the image 40 × 24")
    masks = ("--mask-resize", "--mask-invert")
    rows = batch(run, table, model, *masks, "--json").data["rows"]
    assert "--mask-invert --mask-resize" in Path("out/0002/report.html").read_text("utf-8")
    assert rows[0]["image"] is None and rows[1]["status"] == "done"
    variants = [np.asarray(Image.open(f"out/0001/edit-{n}.png")) for n in (1, 2)]
    assert not np.array_equal(*variants)
    assert log()[0]["variants"] == ["0001/edit-2.png"] and not log()[-1]["variants"]
    assert "-n 2" in Path("out/0001/report.html").read_text(encoding="utf-8")
    assert "--seed 3" in Path("out/0001/report.html").read_text(encoding="utf-8")
    from rectiflow.report import read_png

    assert read_png("out/0001/edit-1.png")["seed"] == 3
    assert read_png("out/0002/edit-1.png")["mask"] == str(Path("data/mask.png").resolve())
    assert read_png("out/0002/edit-1.png")["method"].startswith("euler")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,from,to\none.png,a cat,\n", ("line 2", "to is empty")),
        ("image,from,to\none.png,a cat,a dog\nnone.png,a,b\n", ("line 3", "none.png")),
        ("image,from,to\n,a cat,a dog\n", ("line 2", "give an image or --seed")),
        ("image,from,to,seed\n,,a dog,1\n", ("line 2", "--from")),
        ("image,from,to,seed\none.png,a cat,a dog,1\n", ("line 2", "one of the two")),
        ("image,from,to,seed\n,a cat,a dog,-1\n", ("line 2", "seed -1")),
        ("image,from,to,preset\none.png,a,b,best\n", ("line 2", "preset is 'best'")),
        ("image,from,to,mask\none.png,a,b,none.png\n", ("line 2", "none.png")),
        ("image,from,to,num_images\none.png,a,b,0\n", ("line 2", "the num_images 0 is not")),
        ("image,from,to\nedits.csv,a,b\n", ("line 2", "edits.csv is not an image")),
        ("image,from,to,output\none.png,a,b,../x\n", ("line 2", "../x")),
        ("image,from,to,output\none.png,a,b,x\none.png,a,c,X\n", ("line 2", "another row's")),
        ("image,from,to,output\none.png,a,b,0002\none.png,a,c,\n", ("line 2", "another row's")),
        ("image,from,to\none.png,a cat,a big, red dog\n", ("line 2", "quote cells")),
        ("image,from,to\none.png,a cat\n", ("line 2", "quote cells")),
        ("image,from,prompt\none.png,a,b\n", ("a column 'prompt'", "image,from,to")),
        ("image,to\none.png,b\n", ("lacks the column from",)),
        ("image,from,to\n", ("no rows",)),
        ("", ("lacks the column image",)),
        ('image,from,to\none.png,"a,b\n', ("edits.csv",)),
    ],
)
def test_a_wrong_table_is_one_line_before_any_work(
    run: Run, table: Path, text: str, words: tuple[str, ...]
) -> None:
    table.write_text(text)
    # No such model: were it looked for before the table, the line would be about it.
    run("edit", "--batch", table, "--model", "./none", "-o", "out").refuses("edits.csv", *words)
    assert not Path("out").exists()


def test_what_the_table_says_is_not_said_beside_it(run: Run, table: Path) -> None:
    words = ("edit", "--batch", table)
    run(*words, "--to", "a dog", "--seed", 1).refuses("--batch takes", "leave out --to, --seed")
    run(*words[:1], "a.png", *words[1:]).refuses("leave out IMAGE")
    run(*words, "--mask", "m.png", "--from", "a", "--negative", "b").refuses(
        "leave out --from, --negative, --mask"
    )
    run("edit", "--batch", "none.csv").refuses("cannot read none.csv")


def test_rows_that_fail_do_not_stop_the_others(run: Run, table: Path, model: Path) -> None:
    """A picture that breaks off in the middle begins like a whole one."""
    whole = Path("data/one.png").read_bytes()
    Path("data/one.png").write_bytes(whole[: len(whole) // 2])
    done = batch(run, table, model, "--json")
    assert done.code == 1
    assert (done.data["done"], done.data["failed"]) == (1, 2)
    assert [row["status"] for row in done.data["rows"]] == ["failed", "done", "failed"]
    last = done.err.splitlines()[-1]
    assert last.startswith("rectiflow: error: 2 of 3 rows failed (line 2: ") and "line 4" in last
    Path("data/one.png").write_bytes(whole)
    again = batch(run, table, model, "--json")
    assert again.code == 0 and again.data["done"] == 2 and again.data["skipped"] == 1


def test_killed_and_run_again(run: Run, table: Path, model: Path) -> None:
    """Nothing is lost and nothing is done twice."""
    rows = [f"one.png,a cat,a {color} dog" for color in ("red", "green", "blue", "yellow")]
    table.write_text("\n".join(["image,from,to", *rows, ""]))
    words = ["edit", "--batch", str(table), "-o", "out", "--model", str(model), "--steps", "2"]
    file, said = Path("out/results.jsonl"), Path("said")

    def begun() -> bool:
        return file.is_file() and bool(file.read_bytes())

    assert told(words, begun, signal.SIGKILL, said) == -signal.SIGKILL, said.read_text()
    finished = [entry["output"] for entry in log()]
    assert 1 <= len(finished) < 4, "it was killed between the first row and the last"
    before = {name: Path("out", name, "edit-1.png").stat().st_mtime_ns for name in finished}
    data = run(*words, "--json").data
    assert data["skipped"] == len(finished) and data["done"] == 4 - len(finished)
    assert [entry["output"] for entry in log()] == ["0001", "0002", "0003", "0004"]
    assert before == {n: Path("out", n, "edit-1.png").stat().st_mtime_ns for n in finished}

"""`rectiflow reproduce`, as far as it goes without training anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rectiflow.reproduce.claims import CLAIMS, MISSING
from rectiflow.reproduce.instaflow import instaflow
from rectiflow.reproduce.study import Flow, Pictures
from rectiflow.reproduce.workshop import Workshop
from tests.app.conftest import Run
from tests.reproduce.rows import SAMPLES, flow


def test_help(run: Run) -> None:
    done = run("reproduce", "--help")
    assert done.code == 0 and not done.err
    for word in (
        "instaflow",
        "--size",
        "--only",
        "--processes",
        "--max-minutes",
        "--amend",
        "--json",
    ):
        assert word in done.out


def test_no_time_says_what_is_missing(run: Run, tmp_path: Path) -> None:
    folder, page = tmp_path / "work", tmp_path / "pages" / "page.md"
    words = ("reproduce", "instaflow", "-o", folder, "--page", page, "--max-minutes", 0)
    done = run(*words, "--json")
    assert done.code == 75
    items = [item.name for item in instaflow("small").items]
    data = done.data
    assert data["missing"] == items
    assert (data["paper"], data["size"], data["page"]) == ("instaflow", "small", str(page))
    assert data["folder"] == str(folder) and data["seconds"] >= 0 and data["warnings"] == []
    assert list(data["claims"]) == [key for key, *_ in CLAIMS]
    for claim in data["claims"].values():
        assert claim.keys() == {"claim", "verdict", "sentence"} and claim["verdict"] == MISSING
    assert "## Not run" in page.read_text(encoding="utf-8")
    for part in ("pairs", "students", "figures", "locks"):
        assert not (folder / part).exists()
    text = run(*words)
    assert text.code == 75 and text.out.rstrip().endswith(str(page))
    assert f"{len(items)} items are not there" in text.out


def test_only_some_of_it(run: Run, tmp_path: Path) -> None:
    words = ("-o", tmp_path / "work", "--page", tmp_path / "page.md", "--max-minutes", 0, "--json")
    done = run("reproduce", "instaflow", "--only", "teacher", "--only", "paper-one", *words)
    expected = [item.name for item in instaflow("small").only(["teacher", "paper-one"])]
    assert done.data["missing"] == expected and len(expected) < len(instaflow("small").items)


def test_the_folder_of_another_size_or_dtype_is_refused(run: Run, tmp_path: Path) -> None:
    folder, page, other = tmp_path / "work", tmp_path / "page.md", tmp_path / "other.md"
    words = ("reproduce", "instaflow", "-o", folder, "--max-minutes", 0)
    assert run(*words, "--page", page).code == 75
    words = (*words, "--page", other)
    run(*words, "--size", "full").refuses(str(folder), "instaflow small float32", "-o")
    run(*words, "--dtype", "bfloat16").refuses(str(folder), "instaflow small float32", "-o")
    assert not other.exists()
    assert [file.name for file in folder.iterdir()] == ["study.txt"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothing"], "nothing"),
        (["instaflow", "--only", "wrong"], "--only wrong"),
        (["instaflow", "--size", "huge"], "--size"),
        (["instaflow", "--processes", "0"], "--processes"),
        (["instaflow", "--max-minutes", "-1"], "--max-minutes"),
    ],
)
def test_wrong_words(run: Run, tmp_path: Path, words: list[str], expected: str) -> None:
    out = ("-o", tmp_path / "work", "--page", tmp_path / "page.md")
    run("reproduce", *words, *out).refuses(expected)
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    page = tmp_path / "file" / "page.md"
    run("reproduce", "instaflow", "-o", tmp_path / "work", "--page", page).refuses(str(page.parent))


def test_the_record_beside_the_page(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    words = ("-o", tmp_path / "work", "--page", page, "--max-minutes", 0, "--json")
    done = run("reproduce", "instaflow", *words)
    record = json.loads((tmp_path / "page" / "figures.json").read_text(encoding="utf-8"))
    assert record["claims"] == done.data["claims"] and record["rows"] == {}
    assert (record["study"], record["size"], record["dtype"]) == ("instaflow", "small", "float32")


def test_amending_a_page(run: Run, tmp_path: Path) -> None:
    """What the record has is neither made again nor lost; `--only` makes it again."""
    page, record = tmp_path / "page.md", tmp_path / "page" / "figures.json"
    work = ("-o", tmp_path / "work", "--page", page, "--max-minutes", 0, "--json")
    run("reproduce", "instaflow", *work, "--amend").refuses(str(record), "no")
    assert not list(tmp_path.iterdir())
    run("reproduce", "instaflow", *work)
    study = instaflow("small")
    kept = json.loads(record.read_text(encoding="utf-8"))
    place = Workshop(study, tmp_path / "work", torch.float32)
    kept["made"] = {item.name: place.fingerprints[item.name] for item in study.items[:-1]}
    flows = [item.name for item in study.items if isinstance(item, Flow)]
    about = {"date": "2001-02-03", "machine": "m", "torch": "2", "rectiflow": "0"}
    kept["rows"] = {name: flow(0.123, 1.5) | about for name in flows}
    for row in kept["rows"].values():
        row.pop(SAMPLES)
    rows = [name for name in kept["made"] if isinstance(study.item(name), Pictures)]
    for name in rows:  # of which it has nothing
        del kept["made"][name]
    record.write_text(json.dumps(kept), encoding="utf-8")
    missing = [*rows, study.items[-1].name]
    done = run("reproduce", "instaflow", *work, "--amend")
    assert done.data["missing"] == [item.name for item in study.only(missing)]
    again = json.loads(record.read_text(encoding="utf-8"))
    assert again["rows"] == kept["rows"] and again["made"] == kept["made"]
    text = page.read_text(encoding="utf-8")
    assert "0.123" in text and "(2001-02-03, m, torch 2, rectiflow 0)" in text
    assert text.endswith("## Not run\n\n" + ", ".join(f"`{name}`" for name in missing) + ".\n")
    first = study.items[0].name
    done = run("reproduce", "instaflow", *work, "--amend", "--only", first)
    assert done.data["missing"] == [first]


@pytest.mark.parametrize("more", [[], ["--amend"]])
def test_the_page_of_another_size_or_dtype_is_refused(
    run: Run, tmp_path: Path, more: list[str]
) -> None:
    page = tmp_path / "page.md"
    words = ("--page", page, "--max-minutes", 0)
    run("reproduce", "instaflow", "-o", tmp_path / "work", *words)
    before = page.read_bytes(), (tmp_path / "page" / "figures.json").read_bytes()
    for other in (["--size", "full"], ["--dtype", "bfloat16"]):
        done = run("reproduce", "instaflow", "-o", tmp_path / "new", *words, *other, *more)
        done.refuses("instaflow small float32 and not of instaflow", "--page")
    assert (page.read_bytes(), (tmp_path / "page" / "figures.json").read_bytes()) == before
    assert not (tmp_path / "new").exists()
    (tmp_path / "page" / "figures.json").write_text("{")
    done = run("reproduce", "instaflow", "-o", tmp_path / "work", *words, *more)
    done.refuses("figures.json is not the record of a page")

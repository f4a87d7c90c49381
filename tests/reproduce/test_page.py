"""The page: of what is there, tables that are tables, pictures that exist, replaced whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

from rectiflow.reproduce import page
from rectiflow.reproduce.claims import CLAIMS
from rectiflow.reproduce.drawings import SHEET
from rectiflow.reproduce.instaflow import instaflow
from rectiflow.reproduce.labels import OPTIONS, by_seed
from rectiflow.reproduce.measuring import CHUNK, MARK
from rectiflow.reproduce.study import Flow, Pictures, Student
from rectiflow.reproduce.workshop import Workshop
from tests.reproduce.rows import SAMPLES, Row, flow, pictures

ERRORS = {
    **dict.fromkeys(by_seed("paper-2rf-0"), 1.2),
    **dict.fromkeys(by_seed("2rf-loss-huber"), 2.2),
    "2rf-curation-flip": 1.2,
}
"""Of few steps, where it is not 0.2."""


def hand_made(folder: Path) -> Workshop:
    """The full study with every row, whose figures are made by hand, and no student."""
    study = instaflow("full")
    place = Workshop(study, folder, torch.float32)
    for name in ("figures", "made"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for item in study.items:
        row: Row
        match item:
            case Pictures():
                near = dict.fromkeys(item.against, 0.1)
                share = 0.5 if item.judged else None
                row = pictures(10 + 20 / item.num_inference_steps, near, share)
                row |= {"n": item.num, "num_inference_steps": item.num_inference_steps}
            case Flow():
                error = ERRORS.get(item.model, 0.2)
                errors = {str(k): error for k in (1, 2, 4, 8)} if item.pairs else {}
                row = flow(0.5, 1.5, errors)
                if not item.straight:
                    row = {key: row[key] for key in row if key not in ("straightness", "l2")}
            case _:
                continue
        columns = row.pop(SAMPLES, {})
        row |= {"date": "2026-01-02", "machine": "m", "torch": "2", "rectiflow": "0"}
        (folder / "figures" / f"{item.name}.json").write_text(json.dumps(row))
        np.savez(folder / "figures" / f"{item.name}.samples.npz", **columns)
        (folder / "made" / item.name).write_text(place.fingerprints[item.name])
        if item.name in SHEET and isinstance(item, Pictures):
            place.pictures(item.name).mkdir(parents=True)
            (place.pictures(item.name) / MARK).write_text(place.fingerprints[item.name])
            for first in range(0, item.num, CHUNK):
                # Of one colour each: noise takes seconds to write as PNG.
                drawn = rng.integers(0, 256, (9, 1, 1, 3), np.uint8).repeat(64, 1).repeat(64, 2)
                np.savez(place.pictures(item.name) / f"{first:05d}.npz", pictures=drawn)
    return place


def tables(text: str) -> list[list[list[str]]]:
    """The cells of every table by row, the rule below the head left out."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    assert all(set("".join(table[1])) == {"-"} for table in found if table)
    return [[table[0], *table[2:]] for table in found if table]


def checked(file: Path) -> str:
    """The page's text, which is sound Markdown with pictures that are there."""
    text = file.read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert sum(token.type == "table_open" for token in tokens) == len(tables(text))
    for table in tables(text):
        assert {len(row) for row in table} == {len(table[0])}, table
        assert all(row[0] for row in table)
    inside = [child for token in tokens for child in token.children or []]
    links = [str(child.attrs["src"]) for child in inside if child.type == "image"]
    assert text.count("![") == len(links)
    for link in links:
        assert (file.parent / link).stat().st_size > 100
        if link.endswith(".png"):
            with Image.open(file.parent / link) as picture:
                picture.verify()
    assert not list(file.parent.rglob(".*.tmp"))
    return text


def test_the_page_of_a_small_study(whole: Workshop, tmp_path: Path) -> None:
    """Of a study that has more than was made: that is named, and nothing else is."""
    more = (Pictures("2rf-0-at-1", "2rf-0", 1), Flow("flow-teacher", "emoji-sd"))
    study = dataclasses.replace(whole.study, items=(*whole.study.items, *more))
    verdicts = page.write(Workshop(study, whole.folder), tmp_path / "page.md")
    text = checked(tmp_path / "page.md")
    assert text.endswith("## Not run\n\n`2rf-0-at-1`, `flow-teacher`.\n")
    samples = sum(item.samples for item in study.items if isinstance(item, Student))
    assert f"{samples}\nsamples" in text and " 13 pairs" in text.replace("\n", " ")
    assert list(verdicts) == [key for key, *_ in CLAIMS]
    page.write(whole, tmp_path / "page.md")
    assert "Not run" not in checked(tmp_path / "page.md")


def test_the_page_of_the_full_study(tmp_path: Path) -> None:
    place = hand_made(tmp_path / "work")
    verdicts = page.write(place, tmp_path / "page.md")
    text = checked(tmp_path / "page.md")
    claims, ships, seeds, variations, others, budget = tables(text)
    assert [row[0].partition(" ")[0] for row in claims[1:]] == [f"({key})" for key in verdicts]
    assert [row[2] for row in claims[1:]] == [f"**{v['verdict']}**" for v in verdicts.values()]
    (teacher,) = (row for row in ships if row[:2] == ["teacher, DPM-Solver++, α 5", "25"])
    assert teacher[2:6] == ["5000", "1", "10.80 ± 0.23", "20.80 ± 0.11"]
    assert teacher[7] == "50.0 (40.0–60.0)"
    (chain,) = (row for row in seeds if row[0] == "direct distillation, re-used weights")
    assert chain[1:5] == ["1", "1000", "3", "30.00 ± 0.00"] and chain[-1] == "100.0 ± 0.0"
    (paper,) = (row for row in budget if row[0] == "the paper's recipe")
    assert paper[1] == str(2 * 300 * 32) and paper[2:] == ["0.2000 ± 0.0000", "30.00 ± 0.00"]
    assert len(variations) > 12
    assert [row[:2] for row in others[1:3]] == [["8192", "5.0"], ["256", "5.0"]]
    assert text.count("![") == 5
    told = next(
        line for line in text.splitlines() if line.startswith("- Beside the paper's recipe")
    )
    less, more, even = told.partition(" err less: ")[2].split("; ")
    assert "u-shaped times (-1.0000 ± 0." in less and less.count("(") == len(OPTIONS) - 2
    assert more.startswith("err more: pseudo-Huber (+1.0000 ± 0.0000, 3 seeds)")
    assert even.startswith("are not told apart: half of the pairs mirrored (+0.0000 ± 0.0000).")
    made = {item.name for item in place.study.items if not place.there(item)}
    listed = text.partition("## Not run")[2]
    assert made == {part.strip("`., \n") for part in listed.split(",")}


def test_with_any_single_row(tmp_path: Path) -> None:
    """Whatever comes first, there is a page of it."""
    place = hand_made(tmp_path / "work")
    rows = sorted((tmp_path / "work" / "made").iterdir())
    kept = [(file, file.read_bytes()) for file in rows]
    for file in rows:
        file.unlink()
    for file, data in kept[::7]:
        file.write_bytes(data)
        page.write(place, tmp_path / "page.md")
        assert f"`{file.name}`" not in checked(tmp_path / "page.md").partition("## Not run")[2]
        file.unlink()


def test_the_page_is_replaced_whole(whole: Workshop, tmp_path: Path) -> None:
    """Or not at all: here its record cannot be written."""
    file = tmp_path / "page.md"
    file.write_text("as it was")
    (tmp_path / "page" / "figures.json").mkdir(parents=True)
    with pytest.raises(OSError):
        page.write(whole, file)
    assert file.read_text() == "as it was"
    (tmp_path / "page" / "figures.json").rmdir()
    page.write(whole, file)
    assert "as it was" not in checked(file)

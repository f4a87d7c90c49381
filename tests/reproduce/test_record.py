"""What a page's record keeps: enough to write the page again, and to go on without the folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rectiflow.errors import InputError
from rectiflow.reproduce import drawings, page
from rectiflow.reproduce.figures import Figures
from rectiflow.reproduce.instaflow import instaflow
from rectiflow.reproduce.measuring import MARK
from rectiflow.reproduce.record import Record
from rectiflow.reproduce.study import Flow, Study
from rectiflow.reproduce.workshop import Workshop
from tests.reproduce.test_page import checked, hand_made

SHIPS = "flow-emoji-2rf", "straightness"
TEACHER = "flow-teacher", "straightness"


@pytest.fixture(scope="module")
def whole_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, Path]:
    """A full study and its page; tests only read them."""
    folder = tmp_path_factory.mktemp("recorded")
    place, file = hand_made(folder / "work"), folder / "page.md"
    page.write(place, file)
    return place, file


Recorded = tuple[Workshop, Path, Record]


@pytest.fixture
def recorded(whole_page: tuple[Workshop, Path], tmp_path: Path) -> Recorded:
    """The study, a copy of its page, and the record of that."""
    place, written = whole_page
    file = Path(shutil.copy(written, tmp_path))
    shutil.copytree(written.with_suffix(""), file.with_suffix(""))
    return place, file, Record.read(page.record_of(file))


def elsewhere(folder: Path, study: Study | None = None) -> Workshop:
    return Workshop(study or instaflow("full"), folder / "elsewhere", torch.float32)


def copy_row(place: Workshop, other: Workshop, name: str) -> None:
    for kept in place.folder.glob(f"*/{name}*"):
        if kept.name in (name, f"{name}.json", f"{name}.samples.npz"):
            target = other.folder / kept.relative_to(place.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(kept, target)


def test_the_page_from_the_record_alone(recorded: Recorded, tmp_path: Path) -> None:
    """Every number of it, differences of single pictures among them."""
    _, file, record = recorded
    text, before = checked(file), record.json()
    other = elsewhere(tmp_path)
    page.write(other, file, record)
    assert checked(file) == text
    again = Record.read(page.record_of(file))
    assert again.json() == before and len(again.gaps) > 20
    assert not other.folder.exists()


def test_without_the_record_there_is_nothing(recorded: Recorded, tmp_path: Path) -> None:
    _, file, _ = recorded
    page.write(elsewhere(tmp_path), file)
    assert checked(file).count("**not run**") == 8


def test_a_row_of_the_folder_counts_before_the_record_s(recorded: Recorded, tmp_path: Path) -> None:
    """A difference is the record's until single pictures of both rows are there."""
    place, _, record = recorded
    other = elsewhere(tmp_path)
    before = Figures.read(place).difference([SHIPS], [TEACHER])
    assert before is not None
    copy_row(place, other, SHIPS[0])
    figures = other.folder / "figures" / SHIPS[0]
    row = json.loads(figures.with_suffix(".json").read_text())
    row["straightness"]["mean"] += 1
    figures.with_suffix(".json").write_text(json.dumps(row))
    columns = Figures.read(place).samples[SHIPS[0]]
    columns["straightness"] = columns["straightness"] + 1
    np.savez(figures.with_suffix(".samples.npz"), **columns)  # type: ignore[arg-type]
    found = Figures.read(other, record)
    mean = found.of(*SHIPS)
    assert mean is not None and mean.mean == row["straightness"]["mean"]
    assert found.difference([SHIPS], [TEACHER]) == before
    copy_row(place, other, TEACHER[0])
    after = Figures.read(other, record).difference([SHIPS], [TEACHER])
    assert after is not None and after.mean == pytest.approx(before.mean + 1)


def changed(study: Study, name: str) -> Study:
    """A study of which one row, of a flow, is of another number of trajectories."""
    items = (
        dataclasses.replace(item, num=3) if item.name == name and isinstance(item, Flow) else item
        for item in study.items
    )
    return dataclasses.replace(study, items=tuple(items))


def test_rows_that_no_longer_follow_from_the_study_are_left(
    recorded: Recorded, tmp_path: Path
) -> None:
    """And what was compared with them, since of single pictures nothing is kept."""
    place, file, record = recorded
    other = elsewhere(tmp_path, changed(place.study, TEACHER[0]))
    still = record.still(other)
    partners = {gap[0] for gap in record.gaps if gap[2] == TEACHER[0]}
    assert partners == {SHIPS[0]}
    assert record.made.keys() - still.made.keys() == {TEACHER[0], *partners}
    assert record.rows.keys() - still.rows.keys() == {TEACHER[0], *partners}
    assert still.gaps and not any(TEACHER[0] in gap for gap in still.gaps)
    page.write(other, file, record)
    missing = checked(file).partition("## Not run")[2]
    assert all(f"`{name}`" in missing for name in (TEACHER[0], *partners))


def test_each_row_has_its_own_day_and_machine(recorded: Recorded, tmp_path: Path) -> None:
    """Those of the rows count, not those of who writes the page."""
    _, file, record = recorded
    for number, row in enumerate(record.rows.values()):
        row |= {"date": f"2001-02-0{1 + number % 2}", "machine": "abacus", "torch": "9.9"}
    other = elsewhere(tmp_path)
    page.write(other, file, record)
    text = checked(file)
    assert "(2001-02-01, 2001-02-02, abacus, torch 9.9, rectiflow " in text
    del record.rows[TEACHER[0]]["date"]
    assert record.circumstances().startswith("2001-02-01, 2001-02-02, unknown, abacus, torch 9.9")
    page.write(other, file)
    assert "(nothing is measured yet)" in checked(file)


def test_a_row_that_ends_while_the_page_is_written_is_not_recorded(
    recorded: Recorded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes it after the figures were read: the next page has it."""
    place, file, _ = recorded
    late = elsewhere(tmp_path)
    drawn = drawings.draw_all

    def draw(*words: Any) -> dict[str, str]:
        copy_row(place, late, TEACHER[0])
        return drawn(*words)

    monkeypatch.setattr(drawings, "draw_all", draw)
    page.write(late, file)
    record = Record.read(page.record_of(file))
    assert late.there(late.study.item(TEACHER[0])) and not record.rows and not record.made


def test_the_sheet_stays_as_long_as_it_is_of_the_same_rows(
    recorded: Recorded, tmp_path: Path
) -> None:
    place, file, record = recorded
    sheet = file.with_suffix("") / page.SHEET_FILE
    before = sheet.read_bytes()
    other = elsewhere(tmp_path)
    page.write(other, file, record)
    assert sheet.read_bytes() == before and "(page/pictures.png)" in checked(file)
    # Pictures that are not the row's: nothing is drawn of them.
    name = "teacher-at-25"
    shutil.copytree(place.pictures(name), other.pictures(name))
    (other.pictures(name) / MARK).write_text("of something else")
    page.write(other, file, record)
    assert sheet.read_bytes() == before
    rows = {key: row for key, row in record.rows.items() if key != name}
    made = {key: mark for key, mark in record.made.items() if key != name}
    page.write(other, file, dataclasses.replace(record, rows=rows, made=made))
    assert not sheet.exists() and "pictures.png" not in checked(file)


WHOLE = {
    **dict.fromkeys(("study", "size", "dtype"), "x"),
    **{name: {} for name in ("made", "rows", "sheet", "claims")},
    "gaps": [],
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": []},
        {"made": ["a"]},
        {"rows": {"flow-teacher": None}},
        {"gaps": [["flow-teacher", "x"]]},
        {"gaps": [["a", "b", "c", "d", "e", 0]]},
        {"study": 1},
    ],
)
def test_parts_of_a_record_that_are_none(tmp_path: Path, wrong: dict[str, Any]) -> None:
    file = tmp_path / "figures.json"
    file.write_text(json.dumps(WHOLE))
    assert Record.read(file).rows == {}
    file.write_text(json.dumps(WHOLE | wrong))
    with pytest.raises(InputError, match=r"figures\.json is not the record of a page"):
        Record.read(file)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_what_is_no_record(tmp_path: Path, text: str) -> None:
    file = tmp_path / "figures.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"figures\.json is not the record of a page"):
        Record.read(file)


def test_another_study_s_record(recorded: Recorded, tmp_path: Path) -> None:
    _, _, record = recorded
    small = Workshop(instaflow("small"), tmp_path / "elsewhere", torch.float32)
    with pytest.raises(InputError, match="instaflow full float32 and not of instaflow small"):
        record.still(small)

"""What a page's record keeps: enough to write the page again, and to go on without the folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from rectiflow.errors import InputError
from rectiflow.reproduce import page
from rectiflow.reproduce.figures import Figures
from rectiflow.reproduce.instaflow import instaflow
from rectiflow.reproduce.record import Record
from rectiflow.reproduce.study import Flow, Study
from rectiflow.reproduce.workshop import Workshop
from tests.reproduce.test_page import checked, hand_made

SHIPS = "flow-emoji-2rf", "straightness"
TEACHER = "flow-teacher", "straightness"


def recorded(folder: Path) -> tuple[Workshop, Path, Record]:
    """A full study, its page, and the record of that."""
    place, file = hand_made(folder / "work"), folder / "page.md"
    page.write(place, file)
    return place, file, Record.read(page.record_of(file))


def elsewhere(folder: Path, study: Study | None = None) -> Workshop:
    return Workshop(study or instaflow("full"), folder / "elsewhere", torch.float32)


def copy_row(place: Workshop, other: Workshop, name: str) -> None:
    for kept in place.folder.glob(f"*/{name}*"):
        if kept.name in (name, f"{name}.json", f"{name}.samples.npz"):
            target = other.folder / kept.relative_to(place.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(kept, target)


def test_the_page_from_the_record_alone(tmp_path: Path) -> None:
    """Every number of it, differences of single pictures among them."""
    _, file, record = recorded(tmp_path)
    text, before = checked(file), record.json()
    other = elsewhere(tmp_path)
    page.write(other, file, record.still(other))
    assert checked(file) == text
    again = Record.read(page.record_of(file))
    assert again.json() == before and len(again.gaps) > 20
    assert not other.folder.exists()


def test_without_the_record_there_is_nothing(tmp_path: Path) -> None:
    _, file, _ = recorded(tmp_path)
    page.write(elsewhere(tmp_path), file)
    assert checked(file).count("**not run**") == 8


def test_a_row_of_the_folder_counts_before_the_record_s(tmp_path: Path) -> None:
    """What else was compared with the row it takes the place of is no longer known."""
    place, _, record = recorded(tmp_path)
    other = elsewhere(tmp_path)
    copy_row(place, other, SHIPS[0])
    same = Figures.read(other, record)
    expected = Figures.read(place).difference([SHIPS], [TEACHER])
    assert expected is not None and same.difference([SHIPS], [TEACHER]) == expected
    file = other.folder / "figures" / f"{SHIPS[0]}.json"
    row = json.loads(file.read_text())
    row["straightness"]["mean"] += 1
    file.write_text(json.dumps(row))
    found = Figures.read(other, record)
    mean = found.of(*SHIPS)
    assert mean is not None and mean.mean == row["straightness"]["mean"]
    assert found.difference([SHIPS], [TEACHER]) is None
    copy_row(place, other, TEACHER[0])
    assert Figures.read(other, record).difference([SHIPS], [TEACHER]) is not None


def test_rows_that_no_longer_follow_from_the_study_are_left(tmp_path: Path) -> None:
    _, _, record = recorded(tmp_path)
    study = instaflow("full")
    items = tuple(
        dataclasses.replace(item, num=3)
        if item.name == TEACHER[0] and isinstance(item, Flow)
        else item
        for item in study.items
    )
    other = elsewhere(tmp_path, dataclasses.replace(study, items=items))
    still = record.still(other)
    assert record.made.keys() - still.made.keys() == {TEACHER[0]}
    assert record.rows.keys() - still.rows.keys() == {TEACHER[0]}
    assert still.gaps and not any(TEACHER[0] in gap for gap in still.gaps)


def test_days_are_added(tmp_path: Path) -> None:
    place, file, record = recorded(tmp_path)
    page.write(place, file, dataclasses.replace(record, dates=("2001-02-03",)))
    assert f"(2001-02-03, {record.dates[0]}, " in checked(file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"gaps": [1], "dates": []}', '{"gaps": [[1]]}'])
def test_what_is_no_record(tmp_path: Path, text: str) -> None:
    file = tmp_path / "figures.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"figures\.json is not the record of a page"):
        Record.read(file)


def test_another_study_s_record(tmp_path: Path) -> None:
    _, _, record = recorded(tmp_path)
    small = Workshop(instaflow("small"), tmp_path / "elsewhere", torch.float32)
    with pytest.raises(InputError, match="instaflow full float32 and not of instaflow small"):
        record.still(small)

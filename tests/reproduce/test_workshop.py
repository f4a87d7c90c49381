"""A study worked on: once, again, by two, after kill -9, and for no time at all."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rectiflow.emoji.caption import caption
from rectiflow.emoji.scene import sample
from rectiflow.emoji.vae import HELD_OUT
from rectiflow.errors import InputError
from rectiflow.models.load import load
from rectiflow.reproduce.company import work_together
from rectiflow.reproduce.measuring import pictures
from rectiflow.reproduce.study import Study
from rectiflow.reproduce.workshop import Workshop, check_folder
from rectiflow.stopping import Stopped, time_limit
from rectiflow.straighten.learner import Learner
from rectiflow.straighten.pair_source import Generated
from rectiflow.straighten.reading import PairStore
from tests.reproduce.toy_study import MADE, contents, ended, fork, names, weights, workshop


def test_everything_is_there(whole: Workshop) -> None:
    assert all(whole.there(item) for item in whole.study.items)
    assert load(whole.model("one-0")).network is not None
    drawn = pictures(whole, "one-0-at-1")
    assert drawn.shape == (3, 64, 64, 3)
    np.testing.assert_array_equal(pictures(whole, "one-0-at-1", 2), drawn[:2])


def test_pairs_are_of_their_scenes(whole: Workshop) -> None:
    """Training pairs of the first, held-out ones of the held-out; noise by the same seeds."""
    for name, first in (("pairs-teacher", 0), ("pairs-held-out", HELD_OUT)):
        item = whole.study.item(name)
        assert item is not None
        store = PairStore.open(whole.path(item))
        batch = store.pairs(range(store.manifest.num))
        assert batch.prompts == [caption(sample(first + i)) for i in range(store.manifest.num)]
        noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(first))
        torch.testing.assert_close(batch.x_0[0].float(), noise, rtol=0, atol=1e-2)


def test_rows_are_compared_picture_by_picture(whole: Workshop) -> None:
    """Mean squares of pixels in [0, 1], over the same seeds."""
    a, b = (pictures(whole, name).astype(float) / 255 for name in ("one-0-at-1", "teacher-at-25"))
    each = np.square(a - b).reshape(len(a), -1).mean(1)
    row = json.loads((whole.folder / "figures" / "one-0-at-1.json").read_text())
    assert row["likeness"]["teacher-at-25"]["mean"] == pytest.approx(each.mean())
    assert row["frechet_of_first"]["n"] == row["n"] == 3 and row["judge"]["n"] == 1


def test_done_again_it_changes_nothing(whole: Workshop) -> None:
    parts = ("pairs", "students", "figures")
    before, said = contents(whole.folder, *parts), list[str]()
    assert whole.work(whole.study.items, told=said.append) == []
    assert contents(whole.folder, *parts) == before and not said


def test_no_time_makes_nothing(teacher: Path, tmp_path: Path) -> None:
    place = Workshop(workshop(teacher, tmp_path).study, tmp_path / "work")
    said: list[str] = []
    waiting = place.work(place.study.items, max_minutes=0, told=said.append)
    assert names(waiting) == names(place.study.items)
    assert not said and not place.folder.exists()


def test_training_stops_when_its_time_is_over_and_goes_on(
    whole: Workshop, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("pairs/pairs-teacher", "pairs/pairs-of-2rf-0", "students/2rf-0", "made"):
        shutil.copytree(whole.folder / part, tmp_path / part)
    (tmp_path / "made/one-0").unlink()
    place = workshop(teacher, tmp_path)
    (one,) = (item for item in place.study.items if item.name == "one-0")
    assert place.ready(one)
    learn = Learner.learn

    def last_in_time(learner: Learner, feed: Any) -> None:
        learn(learner, feed)
        time.sleep(4)  # past the limit

    monkeypatch.setattr(Learner, "learn", last_in_time)
    with pytest.raises(Stopped), time_limit(0.05):
        place.make(one)
    monkeypatch.undo()
    assert not place.there(one)
    place.make(one)
    assert place.there(one)
    made = weights(tmp_path)
    assert made and made == {file: weights(whole.folder)[file] for file in made}


def killed_when(child: int, begun: Path) -> bool:
    """kill -9 a process as soon as a file is there; False if it was over."""
    while not begun.exists():
        found, _ = os.waitpid(child, os.WNOHANG)
        if found:
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


def test_killed_on_the_way(whole: Workshop, teacher: Path, tmp_path: Path) -> None:
    """In a store, in a student's steps, between its phases, in a row: to the same bytes."""
    place, said = workshop(teacher, tmp_path), tmp_path / "said.txt"
    for begun in (
        "locks/pairs-teacher.lock",
        "students/2rf-0/checkpoint-1",
        "students/one-0-phase-1/model",
        "pictures/teacher-at-25/00000.npz",
    ):
        assert killed_when(fork(place, place.study.items, said), tmp_path / begun), begun
        assert not all(place.there(item) for item in place.study.items)
    assert place.work(place.study.items) == []
    assert weights(tmp_path) == weights(whole.folder)
    for row in ("one-0-at-1", "teacher-at-25"):
        np.testing.assert_array_equal(pictures(place, row), pictures(whole, row))


def test_two_share_the_work(whole: Workshop, teacher: Path, tmp_path: Path) -> None:
    place = workshop(teacher, tmp_path)
    said = [tmp_path / f"said-{i}.txt" for i in range(2)]
    children = [fork(place, place.study.items, file) for file in said]
    assert [ended(child) for child in children] == [0, 0]
    lines = [line for file in said if file.exists() for line in file.read_text().splitlines()]
    done = Counter(m[1] for line in lines if (m := re.match(r"(\S+): there after", line)))
    assert done == Counter(names(place.study.items))
    assert weights(tmp_path) == weights(whole.folder)


def test_training_that_was_told_to_stop_ends_the_work(
    whole: Workshop, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGTERM does it: the trainer keeps what it has, and nothing is begun again."""
    for part in ("pairs/pairs-teacher", "made/pairs-teacher"):
        copy = shutil.copytree if (whole.folder / part).is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        copy(whole.folder / part, tmp_path / part)
    place, said = workshop(teacher, tmp_path), list[str]()

    def stopped(*_: object) -> None:
        raise Stopped("SIGTERM")

    monkeypatch.setattr("rectiflow.reproduce.training.train", stopped)
    items = [item for item in place.study.items if item.name in ("pairs-teacher", "2rf-0")]
    with pytest.raises(Stopped):
        place.work(items, told=said.append)
    assert len(said) == 2 and "2rf-0: stopped" in said[1] and not place.there(items[1])


def test_pairs_are_made_for_as_long_as_there_is_time(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end with the limit, in the middle of a store, and the next time goes on there."""
    place = workshop(teacher, tmp_path)
    store = place.study.items[0]
    whole_pairs, batches = Generated.pairs, list[int]()

    def slow(self: Generated, indices: range) -> object:
        batches.append(indices[0])
        time.sleep(0.5)
        return whole_pairs(self, indices)

    monkeypatch.setattr("rectiflow.reproduce.training.BATCH", 1)
    monkeypatch.setattr(Generated, "pairs", slow)
    started = time.monotonic()
    assert place.work([store], max_minutes=1.2 / 60) == [store]
    assert time.monotonic() - started < 10 and 1 <= len(batches) < 4
    monkeypatch.setattr(Generated, "pairs", whole_pairs)
    assert place.work([store]) == [] and place.there(store)


def test_what_another_has_in_hand_is_passed_by(teacher: Path, tmp_path: Path) -> None:
    place = workshop(teacher, tmp_path)
    first, second, third = place.study.items[:3]
    (tmp_path / "locks").mkdir()
    with (tmp_path / "locks" / f"{first.name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        said: list[str] = []
        waiting = place.work([second], told=said.append)
        assert not waiting and place.there(second)
        # What is left waits for the first, and is not begun.
        left = place.work([first, third], max_minutes=0.01, told=said.append)
        assert names(left) == [first.name, third.name]
    assert all(line.startswith(second.name) for line in said)


@pytest.mark.slow
def test_a_company_of_two_processes(whole: Workshop, teacher: Path, tmp_path: Path) -> None:
    place = workshop(teacher, tmp_path)
    threads = torch.get_num_threads()
    assert work_together(place, place.study.items, 2, None, lambda line: None) == []
    assert torch.get_num_threads() == threads
    assert weights(tmp_path) == weights(whole.folder)


def test_a_company_has_no_time_either(teacher: Path, tmp_path: Path) -> None:
    place = workshop(teacher, tmp_path)
    waiting = work_together(place, place.study.items, 1, 0, lambda line: None)
    assert names(waiting) == names(place.study.items)


def test_what_has_changed_is_made_again_or_refused(
    whole: Workshop, teacher: Path, tmp_path: Path
) -> None:
    """Rows are made again, and those that rest on them; what took training is left alone."""
    shutil.copytree(whole.folder, tmp_path / "work")
    items = list(whole.study.items)
    (at,) = (i for i, item in enumerate(items) if item.name == "teacher-at-25")
    items[at] = dataclasses.replace(items[at], guidance_scale=3.0)
    place = Workshop(Study("instaflow", "small", tuple(items)), tmp_path / "work")
    changed = [item.name for item in items if not place.there(item)]
    assert changed == ["teacher-at-25", "one-0-at-1"]
    assert place.work(items) == []
    assert not np.array_equal(pictures(place, "teacher-at-25"), pictures(whole, "teacher-at-25"))
    assert np.array_equal(pictures(place, "one-0-at-1"), pictures(whole, "one-0-at-1"))
    (at,) = (i for i, item in enumerate(items) if item.name == "pairs-teacher")
    items[at] = dataclasses.replace(items[at], guidance_scale=3.0)
    place = Workshop(Study("instaflow", "small", tuple(items)), tmp_path / "work")
    # The line's own advice is followed, item by item, and helps.
    for name in MADE:
        with pytest.raises(InputError, match=rf"{name} was made when it, .*: remove it") as raised:
            place.work(items)
        shutil.rmtree(str(raised.value).split(" was made")[0])
    assert place.work(items) == []
    assert weights(place.folder).keys() == weights(whole.folder).keys()
    assert weights(place.folder) != weights(whole.folder)


def test_pictures_of_another_model_are_not_taken_up(
    whole: Workshop, teacher: Path, tmp_path: Path
) -> None:
    """A row that was killed while it drew, and whose model has changed since."""
    shutil.copytree(whole.folder, tmp_path / "work")
    for file in ("made/one-0-at-1", "figures/one-0-at-1.json"):
        (tmp_path / "work" / file).unlink()
    place = Workshop(whole.study, tmp_path / "work")
    (row,) = (item for item in place.study.items if item.name == "one-0-at-1")
    chunk = place.pictures(row.name) / "00000.npz"
    kept = chunk.stat().st_mtime_ns
    place.make(row)
    assert chunk.stat().st_mtime_ns == kept
    mark = place.pictures(row.name) / "fingerprint.txt"
    mark.write_text("another model's", encoding="utf-8")
    place.make(row)
    assert chunk.stat().st_mtime_ns > kept
    assert mark.read_text(encoding="utf-8") == place.fingerprints[row.name]


def test_other_weights_of_the_same_name_are_another_model(teacher: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(teacher, tmp_path / "teacher"))
    before = workshop(copied, tmp_path / "work").fingerprints
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    after = workshop(copied, tmp_path / "work").fingerprints
    assert all(before[name] != after[name] for name in before if name != "emoji-clip")


def test_a_folder_is_of_one_study(tmp_path: Path) -> None:
    small, full = Study("instaflow", "small", ()), Study("instaflow", "full", ())
    folder = tmp_path / "new"
    for _ in range(2):
        check_folder(folder, small, torch.float32)
    for study, dtype in ((full, torch.float32), (small, torch.bfloat16)):
        with pytest.raises(InputError, match=r"is of instaflow small float32 and not of") as raised:
            check_folder(folder, study, dtype)
        assert "\n" not in str(raised.value) and "-o" in str(raised.value)

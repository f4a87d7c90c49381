"""Where a study is worked on: a folder that any number of processes fill, each item once.

An item is there when a mark with its fingerprint is; what is half made goes on where it stopped.
Processes keep out of each other's way by locks that end with the process that holds them.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from rectiflow.errors import InputError
from rectiflow.files import check_begun, write_whole
from rectiflow.models.load import WEIGHTS
from rectiflow.reproduce.study import CLIP, Flow, Item, Pictures, Store, Student, Study
from rectiflow.stopping import Stopped, time_limit

WAIT = 2.0
"""Seconds until a process looks again whether another has finished what it needs."""


@dataclass(frozen=True)
class Workshop:
    """A study and its folder.

    Args:
        study: What is to be made.
        folder: Where.
        dtype: Of networks, while pairs are made and figures taken; students are trained in mixed
            precision if it is bfloat16.
    """

    study: Study
    folder: Path
    dtype: torch.dtype = torch.float32

    def path(self, item: Item) -> Path:
        """Where an item lies or will lie."""
        match item:
            case Store():
                return self.folder / "pairs" / item.name
            case Student():
                return self.folder / "students" / item.name
            case _:
                return self.folder / "figures" / f"{item.name}.json"

    def model(self, name: str) -> str:
        """What `load` takes for a model of the study, or one from elsewhere."""
        item = self.study.item(name)
        if isinstance(item, Student):
            return str(self.phase(item, len(item.phases)) / "model")
        return name

    def phase(self, student: Student, number: int) -> Path:
        """The run of a student's phase, from 1; the last one's folder is the student's own."""
        folder = self.path(student)
        if number == len(student.phases):
            return folder
        return folder.with_name(f"{folder.name}-phase-{number}")

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """What every item follows from, by name: itself, and the fingerprints of what it needs.

        Those of models from elsewhere follow from their weights, where these lie in a folder.
        """
        found: dict[str, str] = {}

        def of(name: str) -> str:
            if name not in found:
                item = self.study.item(name)
                parts = [repr(item), *map(of, item.needs)] if item else _weights(name)
                found[name] = hashlib.sha256("\n".join(parts).encode()).hexdigest()
            return found[name]

        for item in self.study.items:
            of(item.name)
        return found

    def there(self, item: Item) -> bool:
        """Whether an item is finished, and is the one that the study now asks for."""
        mark = self._mark(item)
        return mark.is_file() and mark.read_text(encoding="utf-8") == self.fingerprints[item.name]

    def _mark(self, item: Item) -> Path:
        return self.folder / "made" / item.name

    def ready(self, item: Item) -> bool:
        """Whether all that an item needs is there."""
        needed = [self.study.item(name) for name in item.needs]
        return all(other is None or self.there(other) for other in needed)

    def make(self, item: Item) -> None:
        """Make an item, or go on with it.

        Raises:
            Stopped: It was told to stop, or its time is over.
        """
        from rectiflow.reproduce import measuring, training

        mark = self._mark(item)
        if mark.is_file():
            self._forget(item)
        match item:
            case Store():
                training.make_store(self, item)
            case Student():
                training.train(self, item)
            case Pictures():
                measuring.measure_pictures(self, item)
            case Flow():
                measuring.measure_flow(self, item)
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_whole(mark, self.fingerprints[item.name])

    def _forget(self, item: Item) -> None:
        """Make room for an item that has changed.

        Raises:
            InputError: It took long to make, and is left as it is.
        """
        if isinstance(item, Store | Student) and self.path(item).exists():
            raise InputError(
                f"{self.path(item)} was made when it, or what it is made from, was described "
                "otherwise: remove it, or give another folder with -o"
            )
        if isinstance(item, Student):  # of which the phases before the last one may be left
            for number in range(1, len(item.phases)):
                shutil.rmtree(self.phase(item, number), ignore_errors=True)
        self.path(item).unlink(missing_ok=True)
        self._mark(item).unlink()

    def pictures(self, row: str) -> Path:
        """The folder of a row's pictures."""
        return self.folder / "pictures" / row

    @property
    def reference(self) -> Path:
        """The statistics of true pictures in the features that rows are measured in."""
        return self.folder / f"reference-{self.fingerprints[CLIP][:12]}.safetensors"

    def work(
        self,
        items: Sequence[Item],
        *,
        max_minutes: float | None = None,
        told: Callable[[str], None] = lambda line: None,
    ) -> list[Item]:
        """Make what is not there, as far as time and other processes allow.

        Args:
            items: In the order of preference; all that they need is among them.
            max_minutes: Stop after this long; what is half made is gone on with the next time.
            told: Is given a line for each item.

        Returns:
            Those that are not there at the end.
        """
        started = time.monotonic()
        try:
            with time_limit(max_minutes):
                while waiting := [item for item in items if not self.there(item)]:
                    if self._make_one(waiting, told) is None:
                        time.sleep(WAIT)  # all that is ready is in other hands
        except Stopped:
            if max_minutes is None or time.monotonic() - started < 60 * max_minutes:
                raise  # it was a signal
        return [item for item in items if not self.there(item)]

    def _make_one(self, waiting: Sequence[Item], told: Callable[[str], None]) -> Item | None:
        """Make the first item that is ready and free, None if there is none."""
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        for item in waiting:
            if not self.ready(item):
                continue
            try:
                with FileLock(locks / f"{item.name}.lock", timeout=0):
                    if self.there(item):
                        return item
                    started = time.perf_counter()
                    told(f"{item.name} …")
                    how = "stopped"
                    try:
                        self.make(item)
                        how = "there"
                    finally:
                        told(f"{item.name}: {how} after {time.perf_counter() - started:.0f} s")
                    return item
            except Timeout:
                continue
        return None


def _weights(name: str) -> list[str]:
    """What a model from elsewhere is told by: its name, and its weights if they are in a folder."""
    folder = WEIGHTS / name if (WEIGHTS / name).is_dir() else Path(name)
    files = sorted(folder.rglob("*.safetensors"))
    return [name, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]


def check_folder(folder: Path, study: Study, dtype: torch.dtype) -> None:
    """See that a folder is this study's, or new; what it is is written into it.

    Raises:
        InputError: Something else was begun in it.
    """
    mark = folder / "study.txt"
    text = f"{study.name} {study.size} {str(dtype).removeprefix('torch.')}\n"
    if mark.is_file():
        there = mark.read_text(encoding="utf-8")
        if there != text:
            raise InputError(
                f"{folder} is of {there.strip()} and not of {text.strip()}: give another folder "
                "with -o, or the options it was begun with"
            )
        return
    check_begun(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(mark, text, shared=True)

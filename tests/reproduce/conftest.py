"""The tiny study, made once; tests only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rectiflow.reproduce.workshop import Workshop
from tests.reproduce.toy_study import workshop, write_teacher
from tests.workers import made_once


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "study-teacher", write_teacher)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Workshop:
    """Made by one process that nothing stopped."""

    def make(folder: Path) -> None:
        place = workshop(teacher, folder)
        assert place.work(place.study.items) == []

    return workshop(teacher, made_once(tmp_path_factory, "study-whole", make))

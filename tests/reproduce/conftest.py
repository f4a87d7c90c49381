"""The tiny study, made once; tests only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rectiflow.reproduce.workshop import Workshop
from tests.reproduce.toy_study import workshop, write_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Workshop:
    """Made by one process that nothing stopped."""
    place = workshop(teacher, tmp_path_factory.mktemp("whole"))
    assert place.work(place.study.items) == []
    return place

"""A teacher, and a store that it made."""

from __future__ import annotations

from pathlib import Path

import pytest

from rectiflow.models.base import FlowModel
from tests.straighten.pair_making import NUM, contents, make
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> FlowModel:
    return tiny_model()


@pytest.fixture(scope="module")
def whole(model: FlowModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store made without any interruption; tests only read it."""
    store = tmp_path_factory.mktemp("pairs") / "store"
    done = make(model, store)
    assert done.complete and done.made == done.total == NUM and not done.remade
    return store


@pytest.fixture
def begun(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, data in contents(whole).items():
        (copy / name).write_bytes(data)
    return copy

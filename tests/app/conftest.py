"""A tiny model in a folder, pictures, and the command line called as a function."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from rectiflow.app.cli import main
from rectiflow.models import Metadata, write_metadata
from tests.app import script
from tests.app.forks import Forks
from tests.tiny import T5_LENGTH, tiny_sd3
from tests.workers import made_once


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Stdout, which must be JSON and nothing else."""
        return json.loads(self.out)

    def refuses(self, *words: str, code: int = 2) -> None:
        """One line on stderr with these words, and nothing on stdout."""
        assert self.code == code, self
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("rectiflow: error: "), self.err
        for word in words:
            assert word in lines[0], self.err
        assert not self.out


Run = Callable[..., Done]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd3(t5=True).save_pretrained(folder)
    metadata = Metadata(
        family="sd3",
        max_sequence_length=T5_LENGTH,
        default_guidance_scale=2.0,
        default_num_inference_steps=3,
        default_size=32,
    )
    write_metadata(metadata, folder)
    return folder


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("photos") / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    Image.fromarray(pixels).save(file)
    return file


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: object) -> Done:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Commands in processes of their own."""
    opened = Forks()
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def script_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, "script-teacher", script.write_teacher)


@pytest.fixture(scope="session")
def script_whole(
    tmp_path_factory: pytest.TempPathFactory, script_teacher: Path, forks: Forks
) -> Path:
    """What the script leaves if nothing stops it; tests only read it."""

    def make(folder: Path) -> None:
        script.from_start_to_end(folder, script_teacher, forks.command)

    return made_once(tmp_path_factory, "script-whole", make) / "out"

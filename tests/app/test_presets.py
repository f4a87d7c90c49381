"""A preset's name on the command line stands for what was published for the model's family."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from rectiflow.invert import PRESETS
from rectiflow.models import Metadata, write_metadata
from rectiflow.report import read_png
from tests.app.conftest import Run
from tests.tiny import T5_LENGTH
from tests.tiny_flux import tiny_flux

FEW = ("--steps", 4)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "flux"
    tiny_flux().save_pretrained(folder)
    write_metadata(Metadata(max_sequence_length=T5_LENGTH, default_size=32), folder)
    return folder


def test_edit_chain_and_invert_take_the_familys(
    run: Run, flux: Path, photo: Path, tmp_path: Path
) -> None:
    expected = dataclasses.replace(PRESETS["dnaedit-flux"], num_inference_steps=4, strength=0.675)
    words = ("--model", flux, "--preset", "dnaedit", *FEW, "--set", "strength=0.675", "--json")
    two = ("--from", "a red cat", "--to", "a blue cat")
    edited = run("edit", photo, *two, *words, "-o", tmp_path / "out")
    chained = run("chain", photo, *two, *words, "-o", tmp_path / "chain")
    inverted = run(
        "invert", photo, "--prompt", "a red cat", *words, "-o", tmp_path / "a.safetensors"
    )
    for done in (edited, chained, inverted):
        assert done.code == 0, done.err
        assert done.data["preset"] == "dnaedit-flux, changed"
        for field in ("guidance_scale", "grid", "strength", "num_inference_steps"):
            assert done.data["settings"][field] == getattr(expected, field), field
    assert read_png(tmp_path / "out" / "edit-1.png")["method"] == "dnaedit-flux, changed"


def test_rows_of_a_table_too(run: Run, flux: Path, photo: Path, tmp_path: Path) -> None:
    table = tmp_path / "edits.csv"
    table.write_text(f"image,from,to,preset\n{photo},a red cat,a blue cat,flowedit\n")
    done = run("edit", "--batch", table, "--model", flux, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    (picture,) = (tmp_path / "out").glob("*/edit-1.png")
    made = read_png(picture)
    assert made["method"] == "flowedit-flux" and made["settings"]["guidance_scale"] == 5.5

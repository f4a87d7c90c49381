from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import rectiflow
from rectiflow.errors import InputError
from rectiflow.report.metadata import read_png, save_png
from tests.report.samples import drawing

SETTINGS = {
    "prompt": 'two "lemons" 🍋 <b>\nnext line ünï',
    "seed": 7,
    "grid": [0.0, 0.25, 1.0],
    "method": "exact",
    "model": "emoji-sd3",
    "weight_hash": "9f2c",
    "negative_prompt": None,
    "nested": {"a": [True, 1e-300]},
}


def test_round_trip(tmp_path: Path) -> None:
    path = save_png(drawing(0), tmp_path / "new" / "a.png", SETTINGS)
    assert read_png(path) == SETTINGS | {"version": rectiflow.__version__}
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(drawing(0)))
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_a_recorded_version_stays(tmp_path: Path) -> None:
    path = save_png(drawing(0), tmp_path / "a.png", {"version": "0.0.9"})
    assert read_png(path) == {"version": "0.0.9"}


def test_long_settings(tmp_path: Path) -> None:
    settings = {"grid": np.linspace(0, 1, 20_000).tolist()}
    assert read_png(save_png(drawing(0), tmp_path / "a.png", settings))["grid"] == settings["grid"]


def test_pictures_that_do_not_say(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(InputError, match="there is no file"):
        read_png(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read as a PNG"):
        read_png(path)
    drawing(0).save(path, format="JPEG")
    with pytest.raises(InputError, match="cannot be read as a PNG"):
        read_png(path)
    drawing(0).save(path)
    with pytest.raises(InputError, match="does not say what made it"):
        read_png(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_png(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "null", ""])
def test_damaged_settings(tmp_path: Path, text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("rectiflow", text)
    drawing(0).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(InputError, match="damaged"):
        read_png(tmp_path / "a.png")


def test_a_truncated_file(tmp_path: Path) -> None:
    path = save_png(drawing(0), tmp_path / "a.png", SETTINGS)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError):
        read_png(path)

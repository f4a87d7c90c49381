"""Films between the pictures of seeds: GIF, MP4 and sheets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

import rectiflow
from rectiflow.errors import InputError
from rectiflow.models import load
from rectiflow.report import animation, read_png
from tests.app.conftest import Run


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def coloured(count: int, side: int = 32) -> list[Image.Image]:
    """Flat pictures, a colour each."""
    colours = [(17 * n % 256, 255 - 13 * n % 256, 40 * n % 256) for n in range(count)]
    return [Image.new("RGB", (side, side), colour) for colour in colours]


def frames_of(file: str) -> list[Image.Image]:
    with Image.open(file) as opened:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]


def test_a_film(run: Run, model: Path, cwd: Path) -> None:
    words = ("generate", "cat", "dog", "--model", model, "--interpolate", "3,9,3", "--json")
    data = run(*words, "--frames", 5).data
    assert (data["image"], data["frames"], data["seeds"]) == ("walk.gif", 5, [3, 9, 3])
    assert data["nfe"] == 5 * 3 * 2
    found = frames_of("out/walk.gif")
    expected = rectiflow.interpolate(load(model), ["cat", "dog"], [3, 9, 3], 5)
    assert [frame.size for frame in found] == [(256, 256)] * 5
    for frame, picture in zip(found, expected, strict=True):
        # 256 colours for all: near on average, whatever single pixels lose.
        big = picture.resize((256, 256), Image.Resampling.NEAREST)
        assert np.abs(np.asarray(frame, float) - np.asarray(big, float)).mean() < 16
    run(*words, "--frames", 5, "-o", "walk.png")
    assert read_png("walk.png")["prompts"] == ["cat", "dog"]
    assert Image.open("walk.png").width == 3 * (128 + 2)
    run("replay", "walk.png").refuses("is a sheet")


def test_gif(tmp_path: Path) -> None:
    """Exact colours where they are few; all frames shown equally long, for ever."""
    file = str(tmp_path / "a.gif")
    pictures = coloured(9)
    animation.save_gif([*pictures, pictures[-1]], file, fps=8)
    with Image.open(file) as opened:
        assert opened.info["loop"] == 0
        lengths = []
        for number in range(opened.n_frames):
            opened.seek(number)
            lengths.append(opened.info["duration"])
    assert sum(lengths) == 10 * 120  # two that are the same may become one, twice as long
    for frame, picture in zip(frames_of(file), pictures, strict=False):
        assert frame.getpixel((5, 5)) == picture.getpixel((0, 0))
    assert not list(tmp_path.glob("*.tmp"))
    assert animation.enlarged(Image.new("RGB", (300, 10))).size == (300, 10)
    for fps in (0.5, 51, float("nan")):
        with pytest.raises(InputError, match="fps"):
            animation.save_gif(pictures, file, fps=fps)


def test_mp4_without_the_extra(run: Run, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(animation, "find_spec", lambda name: None)
    words = ("generate", "a", "--interpolate", "3,9", "-o", "x.mp4")
    run(*words).refuses("imageio-ffmpeg", '".[video]"', ".gif")
    assert not any(cwd.iterdir())


def test_mp4(tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    pictures = coloured(12)
    file = animation.save_mp4(pictures, tmp_path / "a.mp4", fps=8)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    reader = ffmpeg.read_frames(str(file))
    about = next(reader)
    assert about["size"] == (256, 256) and about["fps"] == 8
    shown = [np.frombuffer(frame, np.uint8).reshape(256, 256, 3) for frame in reader]
    assert len(shown) == 12
    for frame, picture in zip(shown, pictures, strict=True):
        assert np.abs(frame[128, 128].astype(int) - np.asarray(picture)[0, 0]).max() < 16

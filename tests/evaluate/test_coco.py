"""COCO with a tiny model: drawn, interrupted, resumed, shared out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rectiflow.errors import InputError
from rectiflow.evaluate.coco import PICTURES, Run, make_pictures
from rectiflow.evaluate.coco_data import read_coco
from rectiflow.evaluate.coco_emoji import make_emoji_coco
from rectiflow.models.base import FlowModel
from rectiflow.models.generate import generate
from rectiflow.report import read_png
from tests.tiny_sd import tiny_sd_model

N = 7


@pytest.fixture(scope="module")
def model() -> FlowModel:
    return tiny_sd_model()


@pytest.fixture(scope="module")
def unbroken(model: FlowModel, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All pictures in one sitting, in batches of three."""
    folder = tmp_path_factory.mktemp("coco")
    make_emoji_coco(folder, N)
    run = Run(read_coco(folder), tmp_path_factory.mktemp("whole"), 2, 1.5, "euler", seed=100)
    sitting = make_pictures(model, run, batch_size=3)
    assert (sitting.made, sitting.left) == (N, 0) and sitting.seconds
    return run


def pictures(run: Run) -> dict[str, bytes]:
    """Every file of pictures, nothing unfinished among them."""
    return {file.name: file.read_bytes() for file in (run.output / PICTURES).iterdir()}


def test_pictures_are_those_of_generate(model: FlowModel, unbroken: Run) -> None:
    images = unbroken.data.images
    assert set(pictures(unbroken)) == {f"{image.id}.png" for image in images}
    alone = generate(
        model,
        [image.caption for image in images[:3]],
        seed=100,
        num_inference_steps=2,
        guidance_scale=1.5,
        solver="euler",
    )
    for number, (image, picture) in enumerate(zip(images[:3], alone, strict=True)):
        with Image.open(unbroken.file(image)) as written:
            assert np.array_equal(np.asarray(written), np.asarray(picture))
        made = read_png(unbroken.file(image))
        assert made["seed"] == 100 + number and made["nfe"] == 4
        assert made["prompt"] == image.caption


def test_what_exists_is_not_made_again(model: FlowModel, unbroken: Run, tmp_path: Path) -> None:
    """Killed in the middle of a batch, while a file was written: the same in the end."""
    run = dataclasses.replace(unbroken, output=tmp_path)
    make_pictures(model, run, batch_size=3)
    for image in run.data.images[4:]:
        run.file(image).unlink()
    picture = run.file(run.data.images[4])
    unfinished = picture.with_name(f".{picture.name}-{'0' * 16}.tmp")
    unfinished.write_bytes(b"half a picture")
    kept = {image.id: run.file(image).stat().st_mtime_ns for image in run.data.images[:4]}
    sitting = make_pictures(model, run, batch_size=3)
    assert (sitting.made, sitting.left) == (3, 0)
    assert not unfinished.exists()
    assert kept == {image.id: run.file(image).stat().st_mtime_ns for image in run.data.images[:4]}
    assert pictures(run) == pictures(unbroken)
    again = make_pictures(model, run, batch_size=3)
    assert (again.made, again.seconds) == (0, None)


def test_shards_are_the_whole(model: FlowModel, unbroken: Run, tmp_path: Path) -> None:
    run = dataclasses.replace(unbroken, output=tmp_path)
    second = make_pictures(model, run, batch_size=3, shard=(2, 2))
    assert (second.made, second.left) == (3, 4)
    first = make_pictures(model, run, batch_size=3, shard=(1, 2))
    assert (first.made, first.left) == (4, 0)
    assert pictures(run) == pictures(unbroken)


def test_a_longer_run_goes_on_from_a_shorter_one(
    model: FlowModel, unbroken: Run, tmp_path: Path
) -> None:
    run = dataclasses.replace(unbroken, output=tmp_path)
    make_pictures(model, dataclasses.replace(run, data=run.data.first(3)), batch_size=3)
    assert make_pictures(model, run, batch_size=3).made == N - 3
    assert pictures(run) == pictures(unbroken)


@pytest.mark.parametrize("what", ["steps", "seed", "solver", "weights", "list"])
def test_pictures_of_other_settings_are_not_mixed(
    model: FlowModel, unbroken: Run, what: str
) -> None:
    changed = {
        "steps": dataclasses.replace(unbroken, num_inference_steps=3),
        "seed": dataclasses.replace(unbroken, seed=0),
        "solver": dataclasses.replace(unbroken, solver="heun"),
        "list": dataclasses.replace(
            unbroken, data=read_coco(unbroken.data.folder, ids=[2_000_001, 2_000_000])
        ),
    }
    other = tiny_sd_model(seed=1) if what == "weights" else model
    before = pictures(unbroken)
    with pytest.raises(InputError, match="choose another folder") as raised:
        make_pictures(other, changed.get(what, unbroken), batch_size=3)
    name = {"steps": "num inference steps", "seed": "first seed", "solver": "method"}
    assert name.get(what, {"weights": "weight hash"}.get(what, "list hash")) in str(raised.value)
    assert pictures(unbroken) == before


def test_a_refused_setting_leaves_nothing(model: FlowModel, unbroken: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none"):
        make_pictures(model, dataclasses.replace(unbroken, output=tmp_path, solver="none"))
    assert not list(tmp_path.iterdir())

"""COCO's folder: which pictures and captions, and what is said of a wrong one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rectiflow.emoji.caption import caption
from rectiflow.emoji.scene import sample
from rectiflow.errors import InputError
from rectiflow.evaluate.coco_data import draw_ids, read_coco
from rectiflow.evaluate.coco_emoji import make_emoji_coco
from rectiflow.evaluate.coco_list import read_ids
from rectiflow.models.picture import load_image

IMAGES = [
    {"id": 77, "file_name": "000000000077.jpg"},
    {"id": 9, "file_name": "000000000009.jpg"},
    {"id": 139, "file_name": "000000000139.jpg"},
]
ANNOTATIONS = [
    {"id": 31, "image_id": 77, "caption": "later"},
    {"id": 8, "image_id": 139, "caption": "a room \n with a  clock. "},
    {"id": 30, "image_id": 77, "caption": "A gray picture"},
    {"id": 5, "image_id": 9, "caption": "two plates"},
    {"id": 700, "image_id": 9, "caption": "also later"},
]


def write(
    folder: Path, data: Any = None, split: str = "val2017", images: list[dict[str, Any]] = IMAGES
) -> Path:
    """A folder as COCO's; the picture of image 77 is gray, that of 9 wide."""
    (folder / "annotations").mkdir(parents=True)
    (folder / split).mkdir()
    data = {"info": {}, "images": images, "annotations": ANNOTATIONS} if data is None else data
    (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(data))
    for image in images:
        mode, size = ("L", (40, 30)) if image["id"] == 77 else ("RGB", (48, 20))
        Image.new(mode, size, 128).save(folder / split / image["file_name"])
    return folder


def test_ids_in_order_and_the_first_caption_of_each(tmp_path: Path) -> None:
    coco = read_coco(write(tmp_path / "coco"))
    assert coco.split == "val2017"
    assert [(image.id, image.number, image.caption) for image in coco.images] == [
        (9, 0, "two plates"),
        (77, 1, "A gray picture"),
        (139, 2, "a room with a clock."),
    ]
    assert load_image(coco.images[1].picture).mode == "RGB"
    assert coco.ids_hash == hashlib.sha256(b"9\n77\n139\n").hexdigest()
    words = b"two plates\nA gray picture\na room with a clock.\n"
    assert coco.captions_hash == hashlib.sha256(words).hexdigest()


def test_hashes_name_what_is_used_and_the_whole_list(tmp_path: Path) -> None:
    folder = write(tmp_path / "coco")
    whole, given = read_coco(folder), read_coco(folder, ids=[139, 9])
    assert [image.id for image in given.images] == [139, 9]
    assert [image.number for image in given.images] == [0, 1]
    assert len({whole.ids_hash, whole.first(2).ids_hash, given.ids_hash}) == 3
    assert whole.first(2).list_hash == whole.list_hash != given.list_hash
    file = folder / "annotations" / "captions_val2017.json"
    file.write_text(file.read_text().replace("two plates", "three plates"))
    other = read_coco(folder)
    assert other.ids_hash == whole.ids_hash
    assert other.captions_hash != whole.captions_hash and other.list_hash != whole.list_hash


def test_the_draw_of_val2014_is_pinned(tmp_path: Path) -> None:
    """By SHA-256 of the decimal id, so the order of the file does not matter."""
    by_hand = sorted(range(1000), key=lambda i: hashlib.sha256(f"{i}".encode()).hexdigest())
    assert draw_ids(reversed(range(1000)), 1000) == by_hand
    assert draw_ids(range(1000), 7) == by_hand[:7]
    assert draw_ids([42, 73, 74, 133, 136, 139], 3) == [136, 42, 139]
    coco = read_coco(write(tmp_path / "coco", split="val2014"))
    assert [image.id for image in coco.images] == draw_ids([9, 77, 139], 3)
    assert coco.selection.endswith("the first 30000 in the order of sha256(id) (there are only 3)")


def test_two_splits_side_by_side(tmp_path: Path) -> None:
    folder = write(tmp_path / "coco")
    write(tmp_path / "b", split="val2014")
    for part in ("annotations/captions_val2014.json", "val2014"):
        (tmp_path / "b" / part).rename(folder / part)
    with pytest.raises(InputError, match="--split"):
        read_coco(folder)
    assert read_coco(folder, "val2014").split == "val2014"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "'images'"),
        ({"images": []}, "no images"),
        ({"images": [*IMAGES, IMAGES[0]], "annotations": []}, "77 is there twice"),
        ({"images": IMAGES}, "'annotations'"),
        ({"images": [{"id": "9", "file_name": "a.jpg"}], "annotations": []}, "id of images"),
        ({"images": [{"id": 9, "file_name": "../a.jpg"}], "annotations": []}, "leaves"),
        ({"images": IMAGES, "annotations": ANNOTATIONS[:3]}, "9 has no caption"),
        ({"images": IMAGES, "annotations": [{"id": 1, "image_id": 9}]}, "caption of annot"),
    ],
)
def test_what_is_wrong_with_captions_is_said(tmp_path: Path, data: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_coco(write(tmp_path / "coco", data))


def test_what_is_wrong_with_files_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="captions_val2017"):
        read_coco(tmp_path)
    folder = write(tmp_path / "coco")
    with pytest.raises(InputError, match="no image 8"):
        read_coco(folder, ids=[9, 8])
    picture = folder / "val2017" / "000000000009.jpg"
    picture.write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        read_coco(folder)
    picture.unlink()
    with pytest.raises(InputError, match="is missing"):
        read_coco(folder)
    (folder / "annotations" / "captions_val2017.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_coco(folder)


def test_lists_of_ids(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text("139\n\n 9 \n")
    assert read_ids(file) == [139, 9]
    for text, said in (("9\nx\n", "line 2"), ("9\n9\n", "twice"), ("\n", "no ids"), ("-1", "no i")):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            read_ids(file)
    with pytest.raises(InputError, match="cannot be read"):
        read_ids(tmp_path / "none")


def test_the_emoji_world_in_this_format(tmp_path: Path) -> None:
    make_emoji_coco(tmp_path, 3)
    coco = read_coco(tmp_path)
    assert [image.id for image in coco.images] == [2_000_000, 2_000_001, 2_000_002]
    assert [image.caption for image in coco.images] == [
        caption(sample(image.id)) for image in coco.images
    ]
    assert load_image(coco.images[0].picture).size == (64, 64)
    with pytest.raises(InputError, match="there already"):
        make_emoji_coco(tmp_path, 3)

"""PIE-Bench's format: masks, prompts, what is refused, and a folder of it from the emoji world."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rectiflow.emoji.edits import sample_edit
from rectiflow.emoji.render import render_array
from rectiflow.errors import InputError
from rectiflow.evaluate.pie_bench_data import (
    MAPPING,
    PICTURES,
    decode_mask,
    encode_mask,
    read_pie_bench,
)
from rectiflow.evaluate.pie_bench_emoji import make_emoji_pie


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pie")
    make_emoji_pie(folder, 24)
    return folder


def test_a_mask_is_decoded_pixel_by_pixel() -> None:
    rng = np.random.default_rng(0)
    runs = [
        int(n)
        for pair in zip(rng.integers(0, 262144, 40), rng.integers(0, 3000, 40), strict=True)
        for n in pair
    ]
    runs += [262000, 5000]  # beyond the last pixel
    wanted = np.zeros((512, 512), bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        for place in range(start, min(start + length, 512 * 512)):
            wanted[place // 512, place % 512] = True
    for place in range(512):
        wanted[0, place] = wanted[511, place] = wanted[place, 0] = wanted[place, 511] = True
    assert np.array_equal(decode_mask(runs), wanted)


def test_masks_survive_encoding() -> None:
    """All but the border, which always belongs to the edit."""
    rng = np.random.default_rng(0)
    for density in (0, 0.02, 0.5, 1):
        mask = rng.random((512, 512)) < density
        runs = encode_mask(mask)
        assert all(type(number) is int for number in runs)
        found = decode_mask(runs)
        assert np.array_equal(found[1:-1, 1:-1], mask[1:-1, 1:-1])
        assert found[[0, -1]].all() and found[:, [0, -1]].all()
    assert encode_mask(np.zeros((4, 4), bool)) == []


def test_the_emoji_folder_has_the_published_format(data: Path) -> None:
    mapping = json.loads((data / MAPPING).read_text())
    assert len(mapping) == 24
    fields = (
        "image_path original_prompt editing_prompt editing_instruction editing_type_id "
        "blended_word mask"
    ).split()
    for key, entry in mapping.items():
        assert key.isdigit() and len(key) == 12
        assert list(entry) == fields
        assert entry["editing_type_id"] in list("0123456789")
        assert all(isinstance(entry[name], str) for name in fields[:-1])
        with Image.open(data / PICTURES / entry["image_path"]) as image:
            assert image.size == (512, 512) and image.mode == "RGB"
    assert {entry["editing_type_id"] for entry in mapping.values()} == set("0123456789")


def test_the_emoji_folder_holds_the_worlds_own_edits(data: Path) -> None:
    bench = read_pie_bench(data)
    for number, kind in (
        (1, "object"),
        (2, "add"),
        (6, "color"),
        (8, "background"),
        (10, "quantity"),
    ):
        case, entry = sample_edit(kind, 2_000_000), bench.edits[number]
        assert (entry.source_prompt, entry.target_prompt) == (
            case.source_prompt,
            case.target_prompt,
        )
        pixels = np.asarray(Image.open(entry.picture))
        assert np.array_equal(pixels[::8, ::8], render_array(case.source, 64))
        assert np.array_equal(pixels, pixels[::8, ::8].repeat(8, 0).repeat(8, 1))
        assert np.array_equal(entry.mask()[4::8, 4::8], case.mask())
        assert entry.kind == (number if number < 10 else 0)


def test_brackets_mark_what_changes_and_are_stripped(data: Path) -> None:
    entry = list(json.loads((data / MAPPING).read_text()).values())[10]
    assert entry["original_prompt"] == "[two] rabbits on a yellow background"
    assert entry["editing_prompt"] == "[three] rabbits on a yellow background"
    assert entry["blended_word"] == "two three"
    for edit in read_pie_bench(data).edits:
        assert not set("[]") & set(edit.source_prompt + edit.target_prompt)


def test_a_limit_takes_the_first_and_keeps_the_hash(data: Path) -> None:
    whole, part = read_pie_bench(data), read_pie_bench(data, 5)
    assert part.edits == whole.edits[:5]
    assert part.mapping_hash == whole.mapping_hash


def test_existing_data_is_not_written_over(data: Path) -> None:
    with pytest.raises(InputError, match="choose another folder"):
        make_emoji_pie(data, 1)


Damage = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda e: e.pop("mask"), "mask is not a list"),
        (lambda e: e.update(mask=[1, 2, 3]), "mask is not a list"),
        (lambda e: e.update(mask=[-1, 2]), "mask is not a list"),
        (lambda e: e.update(editing_type_id="10"), "editing_type_id is '10'"),
        (lambda e: e.update(original_prompt=None), "original_prompt is not a text"),
        (lambda e: e.update(image_path="../../a.png"), "leaves annotation_images/"),
        (lambda e: e.update(image_path="/a.png"), "leaves annotation_images/"),
        (lambda e: e.update(image_path="none.png"), "none.png .* is missing"),
    ],
)
def test_a_bad_entry_is_named(data: Path, tmp_path: Path, damage: Damage, words: str) -> None:
    mapping = json.loads((data / MAPPING).read_text())
    damage(next(iter(mapping.values())))
    (tmp_path / MAPPING).write_text(json.dumps(mapping))
    (tmp_path / PICTURES).symlink_to(data / PICTURES)
    with pytest.raises(InputError, match=words) as raised:
        read_pie_bench(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"a": 1}'])
def test_a_bad_mapping_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MAPPING).write_text(text)
    with pytest.raises(InputError, match=MAPPING):
        read_pie_bench(tmp_path)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="is no PIE-Bench folder"):
            read_pie_bench(folder)


def test_pictures_of_another_size_are_refused(data: Path, tmp_path: Path) -> None:
    key, entry = next(iter(json.loads((data / MAPPING).read_text()).items()))
    (tmp_path / MAPPING).write_text(json.dumps({key: entry | {"image_path": "a.png"}}))
    (tmp_path / PICTURES).mkdir()
    Image.new("RGB", (512, 500)).save(tmp_path / PICTURES / "a.png")
    with pytest.raises(InputError, match="512 × 500"):
        read_pie_bench(tmp_path)
    (tmp_path / PICTURES / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_pie_bench(tmp_path)

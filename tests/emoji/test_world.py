"""Sprites, scenes, captions and the renderer."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rectiflow.emoji.caption import caption
from rectiflow.emoji.render import LUMA, apply_style, background, paste, render, render_array
from rectiflow.emoji.scene import BACKGROUNDS, PATTERNS, STYLES, Item, Scene, sample
from rectiflow.emoji.sprites import CELL, COLUMNS, GROUPS, SHEET, SPRITES, sprite

SEEDS = range(1_000_000, 1_000_500)


def test_the_sheet_carries_its_copyright_and_licence() -> None:
    with Image.open(SHEET) as sheet:
        assert sheet.size == (COLUMNS * CELL, -(-len(SPRITES) // COLUMNS) * CELL)
        assert "Google LLC" in sheet.info["Copyright"]
        assert "SPDX-License-Identifier: OFL-1.1" in sheet.info["License"]


def test_sprites_are_many_named_once_and_drawn() -> None:
    assert len(SPRITES) >= 100
    assert sum(map(len, GROUPS.values())) == len(SPRITES)  # no name in two groups
    assert len({s.plural for s in SPRITES.values()}) == len(SPRITES)
    assert len({s.character for s in SPRITES.values()}) == len(SPRITES)
    assert [s.index for s in SPRITES.values()] == list(range(len(SPRITES)))
    assert len({sprite(name).tobytes() for name in SPRITES}) == len(SPRITES)
    for name in SPRITES:
        assert re.fullmatch(r"[a-z]+( [a-zA-Z]+)*", name)
        coverage = (sprite(name)[..., 3] > 128).mean()
        assert 0.1 < coverage <= 1, name


def test_a_seed_gives_the_same_scene_and_the_same_bytes() -> None:
    for seed in SEEDS[:50]:
        assert sample(seed) == sample(seed)
        assert render_array(sample(seed)).tobytes() == render_array(sample(seed)).tobytes()
    assert len({sample(seed) for seed in SEEDS}) == len(SEEDS)


def test_scenes_show_everything_there_is() -> None:
    scenes = [sample(seed) for seed in range(1_000_000, 1_006_000)]
    items = [item for scene in scenes for item in scene.items]
    assert {item.emoji for item in items} == set(SPRITES)
    assert {item.pattern for item in items} == set(PATTERNS)
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    assert {scene.style for scene in scenes} == set(STYLES)
    assert {len(scene.items) for scene in scenes} == {1, 2, 3}


def test_pictures_of_two_sizes_show_the_same() -> None:
    for seed in SEEDS[:30]:
        scene = replace(sample(seed), style="plain")
        small, large = render_array(scene, 64), render_array(scene, 128)
        assert small.shape == (64, 64, 3) and large.shape == (128, 128, 3)
        halved = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
        assert np.abs(halved - small).mean() < 6  # of 255: a pixel's rounding of place and size


def test_render_is_an_rgb_picture_of_the_array() -> None:
    scene = sample(1_000_000)
    picture = render(scene, 64)
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), render_array(scene, 64))


@pytest.mark.parametrize("corner", [(-5, -5), (60, 60), (-5, 60), (200, 0), (0, -200)])
def test_what_hangs_over_the_edge_is_cut(corner: tuple[int, int]) -> None:
    canvas = np.zeros((64, 64, 3), np.float32)
    paste(canvas, np.ones((10, 10, 4), np.float32), *corner)
    rows, columns = (len(range(max(0, start), min(64, start + 10))) for start in corner)
    assert canvas.sum() == 3 * rows * columns


def test_background_has_its_colour_shade_and_horizon() -> None:
    flat = background(Scene((), "black", shade=(-30, 1, 2)), 8)
    np.testing.assert_allclose(flat * 255, np.broadcast_to((0, 25, 30), flat.shape), atol=1e-4)
    meadow = background(Scene((), "meadow", horizon=0.5), 8) * 255
    np.testing.assert_allclose(meadow[3, 0], (158, 208, 238), atol=1e-4)
    np.testing.assert_allclose(meadow[4, 0], (104, 166, 72), atol=1e-4)


def test_styles() -> None:
    canvas = background(Scene((), "meadow"), 8)
    assert apply_style(canvas, "plain") is canvas
    gray = apply_style(canvas, "gray")
    np.testing.assert_allclose(gray, np.repeat((canvas @ LUMA)[..., None], 3, -1))
    sepia = apply_style(canvas, "sepia")
    assert (sepia[..., 0] >= sepia[..., 1]).all() and (sepia[..., 1] > sepia[..., 2]).all()
    sketch = apply_style(canvas, "sketch")
    assert sketch[0, 0, 0] == pytest.approx(0.96) and sketch.min() < 0.96
    with pytest.raises(KeyError, match="charcoal"):
        apply_style(canvas, "charcoal")


# What the captions of the world must say, checked by hand.
CAPTIONS = [
    (Scene((Item("lemon"), Item("lemon"), Item("key")), "blue"),
     "two lemons and a key on a blue background"),
    (Scene((Item("orange heart"),), "orange"), "an orange heart on an orange background"),
    (Scene((Item("snail", mirrored=True), Item("snail")), "beach"),
     "a snail facing right and a snail facing left on a beach"),
    (Scene((Item("cactus"), Item("lion"), Item("cactus")), "night"),
     "a cactus, a lion and a cactus at night"),
    (Scene((Item("grape bunch"),) * 3, "meadow"), "three grape bunches in a meadow"),
    (Scene((Item("avocado", pattern="striped"),), "pink", style="gray"),
     "a striped avocado on a pink background, in black and white"),
    (Scene((Item("fish", upside_down=True),), "white", style="sketch"),
     "an upside-down fish facing left on a white background, as a pencil sketch"),
    (Scene((Item("letter A"), Item("letter A")), "white", style="sepia"),
     "two letters A on a white background, in sepia"),
    (Scene((), "black"), "nothing on a black background"),
]  # fmt: skip


@pytest.mark.parametrize(("scene", "expected"), CAPTIONS)
def test_captions_by_hand(scene: Scene, expected: str) -> None:
    assert caption(scene) == expected


def test_nuisance_is_never_in_a_caption() -> None:
    for seed in SEEDS:
        scene = sample(seed)
        moved = replace(
            scene,
            shade=(0, 0, 0),
            horizon=0.5,
            items=tuple(replace(i, x=0.1, y=0.1, scale=0.2, tilt=-8) for i in scene.items),
        )
        assert caption(moved) == caption(scene)
        assert not re.search(r"tilt|small|large|behind|below|above|corner", caption(scene))
        assert len(caption(scene).split()) <= 24

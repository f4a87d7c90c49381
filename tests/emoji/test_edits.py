from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rectiflow.emoji.caption import caption
from rectiflow.emoji.edits import COLOURED, KINDS, EditCase, edit, sample_edit
from rectiflow.emoji.render import render_array
from rectiflow.emoji.scene import (
    BACKGROUNDS,
    LAYOUTS,
    MAX_TILT,
    PATTERNS,
    STYLES,
    Item,
    Scene,
    _clashes,
)
from rectiflow.emoji.sprites import GROUPS, SPRITES
from rectiflow.errors import InputError

SEEDS = range(1_000_000, 1_000_200)
# These change items and nothing else; the others leave every item alone.
ITEM_KINDS = ("object", "add", "delete", "content", "pose", "color", "material", "quantity", "text")


@pytest.fixture(scope="module")
def cases() -> dict[str, list[EditCase]]:
    return {kind: [sample_edit(kind, seed) for seed in SEEDS] for kind in KINDS}


def slot_of(item: Item, layout: tuple) -> int | None:
    for index, (x, y, wander, smallest, largest) in enumerate(layout):
        near = max(abs(item.x - x), abs(item.y - y)) <= wander
        if near and smallest <= item.scale <= largest:
            return index
    return None


def assert_can_be_drawn(scene: Scene) -> None:
    """Every rule of `draw_scene`, said again from the outside."""
    assert scene.background in BACKGROUNDS and scene.style in STYLES
    assert any(
        None not in (slots := [slot_of(item, layout) for item in scene.items])
        and slots == sorted(set(slots))
        and len(layout) - (len(layout) > 1) <= len(slots)
        for layout in LAYOUTS
    )
    for item in scene.items:
        assert item.emoji in SPRITES and item.pattern in PATTERNS
        assert abs(item.tilt) <= MAX_TILT and item.tilt % 4 == 0
        assert SPRITES[item.emoji].directional or not item.mirrored
        assert not _clashes(item.emoji, scene.background)
        assert not (item.upside_down and item.pattern != "plain")
        if len(scene.items) > 1:
            assert not item.upside_down and item.pattern == "plain"


def test_there_are_the_ten_kinds_of_pie_bench_and_two_more() -> None:
    assert len(KINDS) == 12 and KINDS[-2:] == ("quantity", "text")


@pytest.mark.parametrize("kind", KINDS)
def test_both_scenes_could_have_been_drawn(cases: dict[str, list[EditCase]], kind: str) -> None:
    for case in cases[kind]:
        assert case.kind == kind
        assert case.source.style == "plain"
        assert_can_be_drawn(case.source)
        assert_can_be_drawn(case.target)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_differ_and_are_short(cases: dict[str, list[EditCase]], kind: str) -> None:
    for case in cases[kind]:
        assert case.source_prompt == caption(case.source)
        assert case.target_prompt == caption(case.target)
        assert case.source_prompt != case.target_prompt
        assert max(len(case.source_prompt.split()), len(case.target_prompt.split())) <= 24


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_bytes(kind: str) -> None:
    one, two = sample_edit(kind, 2_000_001), sample_edit(kind, 2_000_001)
    assert one == two
    assert one.mask().tobytes() == two.mask().tobytes()
    assert len({sample_edit(kind, seed).source for seed in SEEDS[:20]}) > 15


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_where_the_pictures_differ(
    cases: dict[str, list[EditCase]], kind: str, size: int
) -> None:
    for case in cases[kind][:40]:
        mask = case.mask(size)
        assert mask.shape == (size, size) and mask.dtype == bool
        assert mask.mean() >= 0.005
        difference = np.abs(
            render_array(case.source, size).astype(int) - render_array(case.target, size)
        ).max(axis=-1)
        assert (difference[mask] > 2).all()
        assert (difference[~mask] <= 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_edited_stays(cases: dict[str, list[EditCase]], kind: str) -> None:
    for case in cases[kind]:
        source, target = case.source, case.target
        assert (source.shade, source.horizon) == (target.shade, target.horizon)
        if kind in ("background", "style"):
            assert source.items == target.items
        elif kind in ITEM_KINDS:
            assert (source.background, source.style) == (target.background, target.style)
            gone = Counter(source.items) - Counter(target.items)
            new = Counter(target.items) - Counter(source.items)
            assert (gone.total(), new.total()) in {
                "add": [(0, 1)],
                "delete": [(1, 0)],
                "quantity": [(0, 1), (1, 0)],
            }.get(kind, [(1, 1)])


@pytest.mark.parametrize("kind", ("object", "content", "color", "text", "pose", "material"))
def test_a_changed_item_keeps_its_place_size_and_tilt(
    cases: dict[str, list[EditCase]], kind: str
) -> None:
    for case in cases[kind]:
        for before, after in zip(case.source.items, case.target.items, strict=True):
            assert (before.x, before.y, before.scale, before.tilt) == (
                after.x,
                after.y,
                after.scale,
                after.tilt,
            )


def changed(case: EditCase) -> tuple[Item, Item]:
    pairs = zip(case.source.items, case.target.items, strict=True)
    (pair,) = ((before, after) for before, after in pairs if before != after)
    return pair


def test_each_kind_does_what_its_name_says(cases: dict[str, list[EditCase]]) -> None:
    for case in cases["content"]:
        assert {item.emoji for item in changed(case)} <= set(GROUPS["face"])
    for case in cases["color"]:
        before, after = changed(case)
        assert any(before.emoji in family and after.emoji in family for family in COLOURED)
    for case in cases["text"]:
        before, after = changed(case)
        assert before.emoji.split()[0] == after.emoji.split()[0] in ("digit", "letter")
    for case in cases["material"]:
        before, after = changed(case)
        assert replace(before, pattern=after.pattern) == after != before
    for case in cases["object"]:
        before, after = changed(case)
        assert not any(before.emoji in f and after.emoji in f for f in COLOURED)
    for case in cases["quantity"]:
        assert len({item.emoji for item in (*case.source.items, *case.target.items)}) == 1
    for case in cases["background"]:
        assert case.source.background != case.target.background
    assert {case.target.style for case in cases["style"]} == set(STYLES[1:])
    for case in cases["random"]:
        mixed = [case.source.background != case.target.background, case.target.style != "plain"]
        items = Counter(case.source.items) - Counter(case.target.items)
        items += Counter(case.target.items) - Counter(case.source.items)
        assert sum(mixed) + items.total() >= 2


def test_a_pose_is_mirrored_upside_down_or_the_other_thumb(
    cases: dict[str, list[EditCase]],
) -> None:
    seen = set()
    for case in cases["pose"]:
        before, after = changed(case)
        if before.emoji != after.emoji:
            assert {before.emoji, after.emoji} == {"thumb up", "thumb down"}
            seen.add("hand")
        elif before.mirrored != after.mirrored:
            assert replace(before, mirrored=after.mirrored) == after
            seen.add("mirrored")
        else:
            assert replace(before, upside_down=not before.upside_down) == after
            seen.add("upside down")
    assert seen == {"hand", "mirrored", "upside down"}


def test_an_edit_of_a_scene_that_does_not_suit_says_so() -> None:
    lemon = Scene((Item("lemon"),))
    with pytest.raises(InputError, match="'content' does not suit 'a lemon on a white background'"):
        edit(lemon, "content", random.Random(0))
    with pytest.raises(InputError, match="unknown kind of edit 'colour'"):
        edit(lemon, "colour", random.Random(0))
    with pytest.raises(InputError, match="unknown kind"):
        sample_edit("colour", 0)


def test_an_edit_of_a_given_scene() -> None:
    heart = Scene((Item("red heart", tilt=8),), background="blue", shade=(1, 2, 3))
    case = edit(heart, "color", random.Random(0))
    assert case.source is heart
    assert case.target.items[0].emoji not in ("red heart", "blue heart")
    assert edit(heart, "color", random.Random(0)) == case

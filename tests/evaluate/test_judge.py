from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from rectiflow.emoji.edits import sample_edit
from rectiflow.emoji.render import render, render_array
from rectiflow.emoji.scene import BACKGROUNDS, STYLES, Item, Scene, draw_scene, sample
from rectiflow.emoji.sprites import GROUPS
from rectiflow.errors import InputError
from rectiflow.evaluate.judge import Found, Verdict, agrees, judge
from rectiflow.evaluate.setting import possible_styles, read_setting

RIGHT = {"emoji": True, "background": True, "count": True}


def single(emoji: str, background: str = "white", **kwargs: object) -> Scene:
    return Scene((Item(emoji, scale=0.55, tilt=4, **kwargs),), background)  # type: ignore[arg-type]


def accuracy(seeds: range) -> dict[str, float]:
    answers = [agrees(judge(render(sample(seed))), sample(seed)) for seed in seeds]
    return {key: sum(answer[key] for answer in answers) / len(answers) for key in RIGHT}


def test_true_renders_are_read_right() -> None:
    assert min(accuracy(range(1_000_000, 1_000_020)).values()) >= 0.95


@pytest.mark.slow
def test_true_renders_of_held_out_seeds_are_read_right_in_99_of_100() -> None:
    assert min(accuracy(range(2_000_000, 2_000_300)).values()) >= 0.99


def test_a_scene_is_read_to_its_nuisance() -> None:
    scene = sample_edit("add", 1_000_000).target
    verdict = judge(render(scene))
    assert verdict.residual < 0.01
    for item in scene.items:
        found = min(verdict.items, key=lambda f: abs(f.x - item.x) + abs(f.y - item.y))
        assert found.emoji == item.emoji
        assert abs(found.x - item.x) < 0.02 and abs(found.y - item.y) < 0.02
        assert abs(found.scale - item.scale) < 0.02 and abs(found.tilt - item.tilt) <= 4
        assert found.mirrored == item.mirrored
        assert found.score > 0.95


@pytest.mark.parametrize("group", ["heart", "circle", "square", "book", "face", "hand", "key"])
def test_the_members_of_a_group_are_told_apart(group: str) -> None:
    for emoji in GROUPS[group]:
        verdict = judge(render(single(emoji, "meadow")))
        assert [found.emoji for found in verdict.items] == [emoji]
        for other in GROUPS[group]:
            assert agrees(verdict, single(other, "meadow"))["emoji"] == (other == emoji)


def test_another_emoji_of_the_group_is_wrong() -> None:
    for seed in range(1_000_000, 1_000_012):
        rng = random.Random(seed)
        scene = draw_scene(rng, style="plain")
        index = rng.randrange(len(scene.items))
        item = scene.items[index]
        group = next(names for names in GROUPS.values() if item.emoji in names)
        other = rng.choice([name for name in group if name != item.emoji])
        items = list(scene.items)
        items[index] = replace(item, emoji=other)
        changed = replace(scene, items=tuple(items))
        said = agrees(judge(render(changed)), scene)
        assert not said["emoji"] and said["count"] and said["background"]


def test_one_more_or_one_fewer_is_wrong() -> None:
    for seed in range(1_000_000, 1_000_006):
        case = sample_edit("quantity", seed)
        verdict = judge(render(case.target))
        assert agrees(verdict, case.target) == RIGHT
        assert agrees(verdict, case.source) == {"emoji": False, "background": True, "count": False}


def test_another_background_or_style_is_wrong() -> None:
    for kind in ("background", "style"):
        for seed in range(1_000_000, 1_000_006):
            case = sample_edit(kind, seed)
            verdict = judge(render(case.target))
            assert agrees(verdict, case.target) == RIGHT
            assert not agrees(verdict, case.source)["background"]


def test_an_empty_scene_has_nothing_in_it() -> None:
    for name in BACKGROUNDS:
        verdict = judge(render(Scene((), name, shade=(6, -6, 3))))
        assert (verdict.count, verdict.background, verdict.style) == (0, name, "plain")


def test_patterns_and_upside_down_are_seen() -> None:
    for pattern in ("striped", "dotted"):
        (found,) = judge(render(single("pear", "blue", pattern=pattern))).items
        assert (found.emoji, found.pattern) == ("pear", pattern)
    (found,) = judge(render(single("pear", "blue", upside_down=True))).items
    assert (found.emoji, found.upside_down) == ("pear", True)


def blurred(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(0.8))


def noisy(picture: Image.Image) -> Image.Image:  # 30 dB
    noise = np.random.default_rng(0).normal(0, 255 * 10 ** (-30 / 20), (64, 64, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def off_colour(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.clip(np.asarray(picture) * 0.94 + 6, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("spoil", [blurred, noisy, off_colour])
def test_spoilt_pictures_are_read_all_the_same(spoil: object) -> None:
    scenes = [draw_scene(random.Random(seed), style="plain") for seed in range(10)]
    right = [agrees(judge(spoil(render(scene))), scene) == RIGHT for scene in scenes]  # type: ignore[operator]
    assert sum(right) >= 9


def test_without_colour_what_looks_alike_passes() -> None:
    sketch = replace(single("red heart", "green"), style="sketch")
    verdict = judge(render(sketch))
    assert verdict.style == "sketch"
    assert agrees(verdict, sketch) == RIGHT
    assert agrees(verdict, replace(single("blue heart", "pink"), style="sketch")) == RIGHT
    assert not agrees(verdict, replace(single("red circle", "pink"), style="sketch"))["emoji"]
    assert not agrees(verdict, replace(sketch, background="meadow"))["background"]
    gray = replace(single("black heart", "white"), style="gray")
    assert not agrees(judge(render(gray)), replace(single("white heart"), style="gray"))["emoji"]


@pytest.mark.parametrize("style", STYLES)
def test_setting(style: str) -> None:
    right = []
    for seed in range(1_000_000, 1_000_050):
        scene = replace(sample(seed), style=style)
        pixels = render_array(scene).astype(np.float32) / np.float32(255)
        assert style in possible_styles(pixels)
        right.append(scene.background in read_setting(pixels, style).backgrounds)
    # In a sketch, items at both edges can pass for a horizon.
    assert sum(right) >= (48 if style == "sketch" else 50)


def found(*like: str) -> Found:
    return Found(like[0], 0.5, 0.5, 0.5, 0, False, False, "plain", 1.0, like)


def test_agreement_matches_names_one_to_one() -> None:
    hearts = (found("red heart", "blue heart"), found("red heart"))
    verdict = Verdict("white", "gray", hearts, ("white", "yellow"), 0.0)

    def scene(*names: str, background: str = "yellow") -> Scene:
        return Scene(tuple(map(Item, names)), background, style="gray")

    assert agrees(verdict, scene("red heart", "blue heart")) == RIGHT
    assert agrees(verdict, scene("red heart", "red heart")) == RIGHT
    assert not agrees(verdict, scene("blue heart", "blue heart"))["emoji"]
    assert agrees(verdict, scene("red heart", background="red")) == {
        "emoji": False,
        "background": False,
        "count": False,
    }


def test_other_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="64 × 64"):
        judge(Image.new("RGB", (128, 128)))
    with pytest.raises(InputError, match="RGB"):
        judge(Image.new("L", (64, 64)))

"""Windows of words: which tokens they are, until when they are held, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.invert import Preset, get_preset
from rectiflow.models import FlowModel, SD3Model
from rectiflow.steer import align, edit_latents
from rectiflow.steer.windows import check_windows, word_steps
from tests.steer import edits
from tests.steer.edits import OWNERS, SOURCES, TARGETS, random_path
from tests.tiny import tiny_model
from tests.tiny_flux import tiny_flux_model
from tests.tiny_qwen import tiny_qwen_model

SOURCE = "a red apple on the background"
TARGET = "a green Apple, on the background"


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model(t5=True)


def preset(**given: float) -> Preset:
    return get_preset(
        Preset(reference="none", scheme="euler", num_inference_steps=10),
        **({"adaln_ratio": 0.3, "attention_ratio": 0.0} | given),
    )


def held(
    model: FlowModel, windows: dict[str, float], targets: tuple[str, ...] = (TARGET,)
) -> tuple[Tensor, Tensor]:
    maps = torch.stack([align(model, SOURCE, target).token_map for target in targets])
    return word_steps(model, targets, maps, windows, preset()), maps


def by_piece(model: FlowModel, target: str, row: Tensor) -> list[tuple[str, int]]:
    """Every piece of the prompt that a token spells, and its steps."""
    pieces = [piece for part in model.tokenize([target]) for piece in part.words[0]]
    return [(p, n) for p, n in zip(pieces, row.tolist(), strict=True) if p]


def test_every_token_of_a_word_is_held_as_long_as_it_says(model: SD3Model) -> None:
    target = "a green apple on the background"
    found, maps = held(model, {"APPLE": 0.5, "background": 0.0, "the": 1.0}, (target,))
    one = [("a", 3), ("green", 0), ("apple", 5), ("on", 3), ("the", 10), ("background", 0)]
    assert by_piece(model, target, found[0]) == one * 2  # of CLIP and of T5
    assert not found[maps == -1].any()
    padding = torch.tensor([m for s in model.tokenize([target]) for m in s.pad_mask[0]])
    assert (found[0][padding & (maps[0] != -1)] == 3).all()


@pytest.mark.parametrize("family", [tiny_flux_model, tiny_qwen_model])
def test_in_other_families(family: type) -> None:
    model = family()
    target = "a green apple on the background"
    found, _ = held(model, {"apple": 1.0}, (target,))
    pieces = dict(by_piece(model, target, found[0]))
    assert pieces["apple"] == 10 and pieces["on"] == 3 and pieces["green"] == 0


def test_words_of_several_tokens_and_phrases(model: SD3Model) -> None:
    """Case and punctuation do not matter, and a word may be spelled by many tokens."""
    source, target = "a zebra, on left", "big zebra, on left"
    maps = align(model, source, target).token_map[None]
    steps = word_steps(model, [target], maps, {"Zebra": 0.8, "on left": 0.1}, preset())[0]
    spelled = by_piece(model, target, steps)
    zebra = [n for piece, n in spelled if piece in set("zebra") and n != 3]
    assert len(zebra) >= 5 and set(zebra) == {8}
    assert [n for piece, n in spelled if piece in ("on", "left")] == [1] * 4


def test_a_word_may_stay_in_some_targets_only(model: SD3Model) -> None:
    targets = ("a green apple on the background", "a red lemon", "cat")
    found, maps = held(model, {"apple": 1.0, "red": 0.0}, targets)
    assert dict(by_piece(model, targets[0], found[0]))["apple"] == 10
    assert dict(by_piece(model, targets[1], found[1]))["red"] == 0
    assert set(found[2].tolist()) <= {0, 3}
    assert torch.equal(found[2] == 3, maps[2] != -1)


def test_what_is_refused(model: SD3Model) -> None:
    target = "a green apple on the background"
    for word in ("green", "red", "cat", "apple on cat"):
        with pytest.raises(InputError) as caught:
            held(model, {"on": 1.0, word: 0.5}, (target,))
        assert str(caught.value) == (
            f"{word!r} is no word that stays as it is; there are: a, apple, on, the, background"
        )
    with pytest.raises(InputError, match="there are: none"):
        held(model, {"on": 1.0}, ("cat",))
    for ratio in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="the window of 'on' is "):
            check_windows({"on": ratio}, preset())
    with pytest.raises(InputError, match="a window needs a word"):
        check_windows({" ": 0.5}, preset())
    other = dataclasses.replace(preset(), method="uni_edit")
    with pytest.raises(InputError, match="no effect on the method uni_edit"):
        check_windows({"on": 0.5}, other)
    check_windows({}, other)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_windows_like_the_ratio_are_the_ratio(model: SD3Model, guidance: float) -> None:
    """All words at a ratio is that ratio for padding too; other windows give other pictures."""
    given = dataclasses.replace(
        preset(adaln_ratio=0.5, guidance_scale=guidance), num_inference_steps=4
    )
    plain = edits.task(model, random_path())
    results = []
    for windows in ({}, {"a": 0.5, "apple": 0.5}, {"apple": 1.0}, {"apple": 0.0}):
        steps = word_steps(model, TARGETS, plain.token_maps, windows, given)
        task = dataclasses.replace(plain, token_steps=steps)
        results.append(edit_latents(model, task, given).latents)
    assert torch.equal(results[0], edit_latents(model, plain, given).latents)
    assert torch.equal(results[0], results[1])
    assert len(SOURCES) == 2 and TARGETS[1] == "a red apple" and OWNERS[1] == 0
    for other in results[2:]:
        moved = (other - results[0]).abs().amax((1, 2, 3))
        assert moved[1] > 1e-4 and moved[[0, 2]].max() < 1e-4  # only it keeps its apple

"""Alignment of prompts: by hand, by an independent search, and on both tokenizers."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from rectiflow.models import SD3Model
from rectiflow.steer import align, needleman_wunsch
from tests.tiny import CLIP_LENGTH, T5_LENGTH, tiny_model

NO = -1


@pytest.fixture(scope="module")
def model() -> SD3Model:
    return tiny_model(t5=True)


def clip_map(model: SD3Model, source: str, target: str) -> list[int]:
    return align(model, source, target).token_map[:CLIP_LENGTH].tolist()


def t5_map(model: SD3Model, source: str, target: str) -> list[int]:
    """In the T5's own positions."""
    entries = align(model, source, target).token_map[CLIP_LENGTH:].tolist()
    return [NO if entry == NO else entry - CLIP_LENGTH for entry in entries]


# Positions: 0 is CLIP's beginning, each word of the tiny vocabulary is one token, then the end.
BY_HAND = {
    "the same": ("a red apple", "a red apple", [0, 1, 2, 3, 4]),
    "replace": ("a red apple", "a green apple", [0, 1, NO, 3, 4]),
    "replace all": ("cat", "dog", [0, NO, 2]),
    "insert": ("red apple", "red big happy apple", [0, 1, NO, NO, 2, 3]),
    "insert in front": ("apple", "two red apple", [0, NO, NO, 1, 2]),
    "delete": ("a big red apple", "a apple", [0, 1, 4, 5]),
    "delete the end": ("apple on the left", "apple", [0, 1, 5]),
    "repeat in the target": ("red heart", "red red heart", [0, 1, NO, 2, 3]),
    "repeat in the source": ("red red heart", "red heart", [0, 1, 3, 4]),
    "swap": ("cat dog", "dog cat", [0, 2, NO, 3]),
    "empty source": ("", "red apple", [0, NO, NO, 1]),
    "empty target": ("red apple", "", [0, 3]),
    "both empty": ("", "", [0, 1]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(model: SD3Model, case: str) -> None:
    source, target, expected = BY_HAND[case]
    source_length = len(source.split()) + 2
    # Padding maps to itself where the source is padded too, and to nothing where it has words.
    padding = [i if i >= source_length else NO for i in range(len(expected), CLIP_LENGTH)]
    assert clip_map(model, source, target) == expected + padding


def test_the_t5_is_aligned_by_itself(model: SD3Model) -> None:
    """It has no beginning, its end is a token, and its positions are its own."""
    assert t5_map(model, "red apple on the left", "green apple") == (
        [NO, 1, 5] + [NO] * 3 + list(range(6, T5_LENGTH))
    )
    assert t5_map(model, "red apple", "red small apple") == [0, NO, 1, 2, *range(4, T5_LENGTH)]


def test_the_map_is_laid_out_like_the_embeddings(model: SD3Model) -> None:
    for chosen in (model, tiny_model(), tiny_model(max_sequence_length=7)):
        token_map = align(chosen, "red apple", "red cat").token_map
        assert token_map.dtype == torch.int64
        assert token_map.shape == chosen.encode_prompt("cat").embeds.shape[1:2]


def test_without_a_t5_its_positions_map_to_themselves() -> None:
    token_map = align(tiny_model(), "red apple on the left", "cat").token_map
    assert token_map[CLIP_LENGTH:].tolist() == list(range(CLIP_LENGTH, CLIP_LENGTH + T5_LENGTH))


@pytest.mark.parametrize("target", ["", "apple", "big", "a red"])
def test_a_deletion_does_not_leak(model: SD3Model, target: str) -> None:
    """No position of the target, padding above all, takes a word that was deleted."""
    source = "two small green apples and a big red apple on the left"
    prompts = [source, target]
    token_map = align(model, source, target).token_map.tolist()
    for segment in model.tokenize(prompts):
        for i in range(segment.length):
            match = token_map[segment.start + i]
            if match == NO:
                continue
            match -= segment.start
            assert 0 <= match < segment.length
            assert segment.ids[0][match] == segment.ids[1][i]
            assert segment.pad_mask[0][match] == segment.pad_mask[1][i]


def test_prompts_beyond_the_limit_are_aligned_as_they_are_cut(model: SD3Model) -> None:
    source = "red apple " * 20 + "dog"
    target = "green " + "red apple " * 20
    with pytest.warns(UserWarning) as said:
        model.encode_prompt(source)
    assert "is longer than the 24 tokens clip takes" in str(said[0].message)
    assert "is longer than the 12 tokens t5 takes" in str(said[1].message)
    clip = clip_map(model, source, target)
    assert clip[:3] == [0, NO, 1] and clip[-1] == CLIP_LENGTH - 1
    assert clip[2:-1] == list(range(1, CLIP_LENGTH - 2))
    short = clip_map(model, source, "red cat")
    assert short == [0, 1, NO, CLIP_LENGTH - 1] + [NO] * (CLIP_LENGTH - 4)


def test_words_for_the_report(model: SD3Model) -> None:
    found = align(model, "a big red apple", "a green apple left")
    assert found.source_words == ("a", "big", "red", "apple")
    assert found.target_words == ("a", "green", "apple", "left")
    assert found.kept == ((0, 0), (3, 2))
    assert align(model, "", "cat").kept == ()


def longest(source: tuple[int, ...], target: tuple[int, ...]) -> int:
    """Length of the longest common subsequence, by plain recursion."""

    @cache
    def best(i: int, j: int) -> int:
        if i == len(source) or j == len(target):
            return 0
        found = max(best(i + 1, j), best(i, j + 1))
        if source[i] == target[j]:
            found = max(found, 1 + best(i + 1, j + 1))
        return found

    return best(0, 0)


def alignments(
    source: tuple[int, ...], target: tuple[int, ...]
) -> set[tuple[tuple[int, int], ...]]:
    """All ways to match equal tokens in order, as pairs (target, source) from the end."""
    found: set[tuple[tuple[int, int], ...]] = {()}
    for j, token in enumerate(target):
        for i, other in enumerate(source):
            if token == other:
                rest = alignments(source[:i], target[:j])
                found |= {((j, i), *pairs) for pairs in rest}
    return found


def test_against_independent_searches() -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(300):
        small = case < 120
        lengths = torch.randint(0, 6 if small else 40, (2,), generator=generator).tolist()
        source, target = (
            tuple(torch.randint(0, 3 if small else 8, (n,), generator=generator).tolist())
            for n in lengths
        )
        mapping = needleman_wunsch(source, target)
        matched = [(j, i) for j, i in enumerate(mapping) if i != NO]
        assert len(mapping) == len(target)
        assert all(source[i] == target[j] for j, i in matched)
        assert [i for _, i in matched] == sorted({i for _, i in matched})
        assert len(matched) == longest(source, target)
        if small:
            # The tie rule: from the end, insertions first and deletions next push each match as
            # far to the front as can be, the target's position before the source's.
            candidates = alignments(source, target)
            most = max(map(len, candidates))
            assert tuple(matched[::-1]) == min(c for c in candidates if len(c) == most)

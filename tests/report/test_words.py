from __future__ import annotations

import pytest

from rectiflow.report import Alignment, Noise
from rectiflow.report.words import alignment_in_words, columns, judge_noise, number, setting


def shown(source: str, target: str, kept: list[tuple[int, int]]) -> list[tuple[str, str, str]]:
    return [
        (c.state, c.source, c.target)
        for c in columns(Alignment(source.split(), target.split(), kept))
    ]


def test_replacing_inserting_and_deleting() -> None:
    assert shown("a red car", "a blue car", [(0, 0), (2, 2)]) == [
        ("kept", "a", "a"),
        ("replaced", "red", "blue"),
        ("kept", "car", "car"),
    ]
    assert shown("a car", "a fast car !", [(0, 0), (1, 2)]) == [
        ("kept", "a", "a"),
        ("added", "", "fast"),
        ("kept", "car", "car"),
        ("added", "", "!"),
    ]
    assert shown("no red car", "car", [(2, 0)]) == [
        ("removed", "no", ""),
        ("removed", "red", ""),
        ("kept", "car", "car"),
    ]


def test_unequal_replacement_and_empty_prompts() -> None:
    assert shown("x y", "z", []) == [("replaced", "x", "z"), ("removed", "y", "")]
    assert shown("", "z", []) == [("added", "", "z")]
    assert shown("", "", []) == []
    assert alignment_in_words([]) == "0 tokens kept. Removed: nothing. Added: nothing."


@pytest.mark.parametrize(
    ("noise", "levels"),
    [
        (Noise(1.0, 0.0, 0.0), ["good", "good", "good"]),
        (Noise(0.9, -0.5, 0.1), ["fair", "fair", "fair"]),
        (Noise(2.0, 9.0, -0.9), ["poor", "poor", "poor"]),
    ],
)
def test_noise_is_judged(noise: Noise, levels: list[str]) -> None:
    assert [judgement.level for judgement in judge_noise(noise)] == levels


def test_noise_is_judged_by_what_is_usual_of_the_model_where_that_is_known() -> None:
    """Nothing of a picture it knows is poor, and what has no range says nothing by itself."""
    usual = {"norm": (0.4, 0.8)}
    known, unknown = (judge_noise(Noise(norm, 3.0, 0.4, usual)) for norm in (0.6, 1.0))
    assert [judgement.level for judgement in known] == ["fair", "fair", "fair"]
    assert [judgement.level for judgement in unknown] == ["poor", "fair", "fair"]
    assert known[0].words == "somewhat off: too weak, as of images the model knows"
    assert unknown[0].words == "unlike images the model knows: 0.4 to 0.8"
    assert "clearly" not in " ".join(judgement.words for judgement in known)


def test_numbers() -> None:
    assert number(-0.5) == "−0.5"
    assert number(1.5e9) == "1.5 × 10⁹"
    assert number(float("nan")) == "not a number"
    assert number(0.0) == "0"
    assert setting([]) == "—"
    assert setting({"a": None, "b": 0.1}) == "a: —, b: 0.1"

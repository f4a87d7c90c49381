"""Numbers, prompts and statistics as a reader wants to see them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rectiflow.report.edit_report import Alignment, Noise

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float, digits: int = 3) -> str:
    """A number in `digits` significant digits, with × 10ⁿ where it is very large or small.

    Example:
        >>> number(1234), number(0.25), number(3.21e-6), number(float("inf"))
        ('1234', '0.25', '3.21 × 10⁻⁶', '∞')
    """
    if isinstance(value, int | np.integer):
        return str(value).replace("-", "−")
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return text.replace("-", "−")


def decibels(value: float) -> str:
    """A PSNR with its unit.

    Example:
        >>> decibels(21.347), decibels(float("inf"))
        ('21.3 dB', '∞ (identical)')
    """
    return "∞ (identical)" if value == math.inf else f"{value:.1f} dB".replace("-", "−")


def samples(
    inversion: int = 0, editing: int = 0, reconstruction: int = 0, one_shot: int = 0
) -> str:
    """What network samples went to; what took none is left out.

    Example:
        >>> samples(30, 30), samples(editing=30, reconstruction=90)
        ('30 inverting, 30 editing', '30 editing, 90 reconstructing')
    """
    parts = {
        "inverting": inversion,
        "editing": editing,
        "reconstructing": reconstruction,
        "to compare with one shot": one_shot,
    }
    return ", ".join(f"{count} {what}" for what, count in parts.items() if count)


def duration(seconds: float) -> str:
    """A time span.

    Example:
        >>> duration(0.42), duration(8.13), duration(754)
        ('0.42 s', '8.1 s', '12 min 34 s')
    """
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def setting(value: object) -> str:
    """The value of a setting.

    Example:
        >>> setting(True), setting(None), setting((0.5, 1)), setting("exact")
        ('yes', '—', '0.5, 1', 'exact')
    """
    match value:
        case None | "":
            return "—"
        case bool():
            return "yes" if value else "no"
        case int():
            return str(value)
        case float():
            return number(value, 6)
        case list() | tuple():
            return ", ".join(setting(item) for item in value) or "—"
        case Mapping():
            return ", ".join(f"{key}: {setting(item)}" for key, item in value.items()) or "—"
        case _:
            return str(value)


@dataclass(frozen=True)
class Column:
    """One place in two aligned prompts: a source token above, a target token below."""

    state: Literal["kept", "replaced", "removed", "added"]
    source: str = ""
    target: str = ""


def columns(alignment: Alignment) -> list[Column]:
    """Both prompts as columns in reading order.

    Where tokens were removed and others added at the same place, they share columns.

    Example:
        >>> [c.state for c in columns(Alignment(["a", "red", "car"], ["a", "car", "!"],
        ...                                     [(0, 0), (2, 1)]))]
        ['kept', 'removed', 'kept', 'added']
    """
    made: list[Column] = []
    i = j = 0
    ends = (len(alignment.source), len(alignment.target))
    for next_i, next_j in [*alignment.kept, ends]:
        while i < next_i or j < next_j:
            source = alignment.source[i] if i < next_i else ""
            target = alignment.target[j] if j < next_j else ""
            state = (
                "replaced" if i < next_i and j < next_j else "removed" if i < next_i else "added"
            )
            made.append(Column(state, source, target))  # type: ignore[arg-type]
            i, j = min(i + 1, next_i), min(j + 1, next_j)
        if (next_i, next_j) != ends:
            made.append(Column("kept", alignment.source[i], alignment.target[j]))
            i, j = i + 1, j + 1
    return made


def alignment_in_words(made: list[Column]) -> str:
    """What the columns show, for those who do not see them."""
    removed = [c.source for c in made if c.source and c.state != "kept"]
    added = [c.target for c in made if c.target and c.state != "kept"]
    kept = sum(c.state == "kept" for c in made)
    return (
        f"{kept} {'token' if kept == 1 else 'tokens'} kept. "
        f"Removed: {' '.join(removed) or 'nothing'}. Added: {' '.join(added) or 'nothing'}."
    )


@dataclass(frozen=True)
class Judgement:
    """One statistic beside what it would be for true noise, and what that means."""

    name: str
    value: str
    ideal: str
    words: str
    level: Literal["good", "fair", "poor"]


def _level(deviation: float, fair: float, poor: float) -> Literal["good", "fair", "poor"]:
    if not math.isfinite(deviation) or abs(deviation) > poor:
        return "poor"
    return "fair" if abs(deviation) > fair else "good"


def judge_noise(noise: Noise) -> list[Judgement]:
    """The statistics of inverted noise beside those of N(0, I), in plain words.

    Of images that a model knows it ends at noise that is not N(0, I) either. Where it is known at
    which, only what is unlike that is poor.
    """
    judgements = []
    for key, name, ideal, fair, poor, high, low in (
        ("norm", "Norm", 1, 0.05, 0.15, "too strong", "too weak"),
        ("kurtosis", "Excess kurtosis", 0, 0.3, 1.0, "outliers", "flat, few large values"),
        (
            "autocorrelation",
            "Neighbour correlation",
            0,
            0.05,
            0.2,
            "the image still shows in it",
            "neighbours alternate",
        ),
    ):
        value = getattr(noise, key)
        level = _level(value - ideal, fair, poor)
        ends = (noise.usual or {}).get(key)
        if not math.isfinite(value):
            words = "cannot be computed"
        elif ends is not None and not ends[0] <= value <= ends[1]:
            words = f"unlike images the model knows: {number(ends[0])} to {number(ends[1])}"
            level = "poor"
        elif level == "good":
            words = "like true noise"
        else:
            level = level if noise.usual is None else "fair"
            words = f"{'somewhat' if level == 'fair' else 'clearly'} off: "
            words += high if value > ideal else low
            words += ", as of images the model knows" if ends else ""
        judgements.append(Judgement(name, number(value), str(ideal), words, level))
    return judgements

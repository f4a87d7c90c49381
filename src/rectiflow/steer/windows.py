"""Control windows of words: until when an unchanged word of a target is held to the source's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.grid import active_steps
from rectiflow.invert.preset import METHOD_FIELDS, Preset
from rectiflow.models.base import FlowModel, TokenSegment
from rectiflow.steer.alignment import NOTHING


def check_windows(windows: Mapping[str, float], preset: Preset) -> None:
    """Refuse windows that cannot be or that a method does not know.

    Raises:
        InputError: a ratio is out of range, or the method does not hold words.
    """
    for word, ratio in windows.items():
        if not word.split():
            raise InputError("a window needs a word")
        if not (math.isfinite(ratio) and 0 <= ratio <= 1):
            raise InputError(
                f"the window of {word!r} is {ratio}; from 0 to 1, a share of the steps"
            )
    if windows and "adaln_ratio" not in METHOD_FIELDS[preset.method]:
        raise InputError(
            f"windows have no effect on the method {preset.method}, which holds no words: "
            "leave them out"
        )


def word_steps(
    model: FlowModel,
    targets: Sequence[str],
    token_maps: Tensor,
    windows: Mapping[str, float],
    preset: Preset,
) -> Tensor:
    """Until which step each token of each target is held.

    Args:
        model: whose tokenizers.
        targets: T prompts.
        token_maps: int64 ``[T, L]``, from `align`.
        windows: of words or phrases, whatever their case, each place where they stand: the share
            of the steps over which they are held; `adaln_ratio` for all others. The last one that
            names a word counts.
        preset: whose `adaln_ratio`, and whose number of steps.

    Returns:
        int64 ``[T, L]``, 0 for tokens that have no counterpart; for `EditTask.token_steps`.

    Raises:
        InputError: a window is of a word that stays in none of the targets.
    """
    steps = preset.steps
    held = torch.full_like(token_maps, active_steps(preset.adaln_ratio, steps))
    kept = token_maps != NOTHING
    segments = model.tokenize(list(targets))
    known: dict[str, None] = {}
    found = dict.fromkeys(windows, False)
    for row, target in enumerate(targets):
        words = target.split()
        tokens = [_tokens_of_words(segment, row, words) for segment in segments]
        places = [sorted(set().union(*(part[k] for part in tokens))) for k in range(len(words))]
        stays = [bool(place) and bool(kept[row, place].any()) for place in places]
        bare = [_bare(word) for word in words]
        known |= {word: None for word, stay in zip(bare, stays, strict=True) if stay and word}
        for name, ratio in windows.items():
            phrase = [_bare(word) for word in name.split()]
            for start in range(len(words) - len(phrase) + 1):
                span = range(start, start + len(phrase))
                if bare[start : start + len(phrase)] == phrase and any(stays[k] for k in span):
                    found[name] = True
                    held[row, [place for k in span for place in places[k]]] = active_steps(
                        ratio, steps
                    )
    for name, there in found.items():
        if not there:
            raise InputError(
                f"{name!r} is no word that stays as it is; there are: {', '.join(known) or 'none'}"
            )
    return held.where(kept, 0)


def _bare(word: str) -> str:
    """A word without its case, and without the punctuation around it."""
    return re.sub(r"^\W+|\W+$", "", word).casefold() or word.casefold()


def _tokens_of_words(segment: TokenSegment, row: int, words: Sequence[str]) -> list[set[int]]:
    """Of each word of a prompt, the positions in the text stream that spell a part of it."""
    spelled = "".join(words)
    owners = [number for number, word in enumerate(words) for _ in word]
    places: list[set[int]] = [set() for _ in words]
    end = 0
    for position, piece in enumerate(segment.words[row]):
        letters = "".join(piece.split())
        if letters:
            start = spelled.find(letters, end)
            if start < 0:  # a tokenizer that writes it otherwise than the prompt does
                continue
            end = start + len(letters)
            for owner in set(owners[start:end]):
                places[owner].add(segment.start + position)
    return places

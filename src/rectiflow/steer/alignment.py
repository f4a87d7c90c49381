"""Which tokens of a target prompt are unchanged, and where they stand in the source prompt.

A token map has one entry per position of the text stream: the source position whose feature an
unchanged target token takes, or −1 for a token that keeps its own.

FTEdit's official code fills up a target that is shorter than its source by whatever stands at the
same positions of the source, words that were deleted among them, and fails at a prompt longer than
a tokenizer takes. Neither is so here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rectiflow.models.base import FlowModel, TokenSegment

NOTHING = -1
"""In a token map: this target position has no counterpart."""


@dataclass(frozen=True)
class Alignment:
    """Two prompts laid side by side."""

    token_map: Tensor
    """int64 ``[L]``: for each target position the source position, or `NOTHING`."""
    source_words: tuple[str, ...]
    """The source prompt in the pieces its first tokenizer sees."""
    target_words: tuple[str, ...]
    kept: tuple[tuple[int, int], ...]
    """Pairs (source piece, target piece) that are the same word in the same role."""


def needleman_wunsch(source: Sequence[int], target: Sequence[int]) -> list[int]:
    """Globally align two sequences (match 1, mismatch −1, gap 0) and map target to source.

    With these scores the alignment is a longest common subsequence. Ties are broken, tracing back
    from the end, by preferring a target insertion, then a source deletion, then a match: of two
    equal source tokens the earlier one is taken.

    Returns:
        For each target position the matching source position, or `NOTHING`.

    Example:
        >>> needleman_wunsch([7, 8, 9], [7, 5, 9, 9])
        [0, -1, 2, -1]
    """
    rows, columns = len(source) + 1, len(target) + 1
    score = [[0] * columns for _ in range(rows)]
    for i in range(1, rows):
        for j in range(1, columns):
            diagonal = score[i - 1][j - 1] + (1 if source[i - 1] == target[j - 1] else -1)
            score[i][j] = max(diagonal, score[i - 1][j], score[i][j - 1])
    mapping = [NOTHING] * len(target)
    i, j = len(source), len(target)
    while i and j:
        if score[i][j] == score[i][j - 1]:
            j -= 1
        elif score[i][j] == score[i - 1][j]:
            i -= 1
        else:  # neither gap explains the score, so it is a match
            i, j = i - 1, j - 1
            mapping[j] = i
    return mapping


def segment_map(segment: TokenSegment, source: int, target: int) -> list[int]:
    """The token map of one tokenizer's stretch, in positions relative to its start.

    Real tokens are aligned with real tokens; a padding position maps to the same position if the
    source has padding there too, else to nothing: a shorter target must not receive the words
    that were deleted.

    Args:
        segment: the tokens of several prompts.
        source: index of the source prompt in it.
        target: index of the target prompt in it.
    """
    source_real = [i for i in range(segment.length) if not segment.pad_mask[source][i]]
    target_real = [i for i in range(segment.length) if not segment.pad_mask[target][i]]
    aligned = needleman_wunsch(
        [segment.ids[source][i] for i in source_real],
        [segment.ids[target][i] for i in target_real],
    )
    mapping = [i if segment.pad_mask[source][i] else NOTHING for i in range(segment.length)]
    for position, match in zip(target_real, aligned, strict=True):
        mapping[position] = NOTHING if match == NOTHING else source_real[match]
    return mapping


def align(model: FlowModel, source_prompt: str, target_prompt: str) -> Alignment:
    """Align two prompts on a model's text stream, each tokenizer by itself.

    A prompt too long for a tokenizer is aligned as it is cut; `encode_prompt` warns of it.
    """
    segments = model.tokenize([source_prompt, target_prompt])
    maps = [segment_map(segment, source=0, target=1) for segment in segments]
    token_map = [
        NOTHING if match == NOTHING else segment.start + match
        for segment, mapping in zip(segments, maps, strict=True)
        for match in mapping
    ]
    first = segments[0]
    source_places = [i for i, word in enumerate(first.words[0]) if word]
    target_places = [i for i, word in enumerate(first.words[1]) if word]
    kept = tuple(
        (source_places.index(maps[0][place]), index)
        for index, place in enumerate(target_places)
        if maps[0][place] in source_places
    )
    return Alignment(
        token_map=torch.tensor(token_map),
        source_words=tuple(first.words[0][i] for i in source_places),
        target_words=tuple(first.words[1][i] for i in target_places),
        kept=kept,
    )

"""Prompts on their way into a network: as embeddings, and as tokens on positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rectiflow.errors import InputError


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Embedded prompts, one per row.

    Example:
        >>> two = Conditioning(torch.zeros(2, 5, 8), torch.zeros(2, 4))
        >>> len(two), len(two[[0, 0, 1]]), len(two.repeat(2)), len(Conditioning.cat([two, two[0]]))
        (2, 3, 4, 3)
    """

    embeds: Tensor
    """One feature per text token, shape [B, L, D], in the text encoders' dtype."""
    pooled: Tensor
    """One feature per prompt, shape [B, P]."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.embeds)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Conditioning:
        """Choose rows, in any order and any number of times; one index gives one row."""
        if isinstance(rows, int):
            rows = [rows]
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows, device=self.embeds.device)
        return Conditioning(self.embeds[rows], self.pooled[rows])

    def repeat(self, times: int) -> Conditioning:
        """The whole batch several times over: rows a, b become a, b, a, b."""
        return Conditioning(self.embeds.repeat(times, 1, 1), self.pooled.repeat(times, 1))

    def rows(self, count: int) -> Conditioning:
        """This batch if it has `count` rows; one row is given to all of them.

        Raises:
            InputError: The batch has another number of rows.
        """
        if len(self) == count:
            return self
        if len(self) == 1:
            return self.repeat(count)
        raise InputError(f"{len(self)} prompts for {count} images: give one for all or one each")

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack the rows of several batches."""
        return Conditioning(
            torch.cat([part.embeds for part in parts]), torch.cat([part.pooled for part in parts])
        )


@dataclass(frozen=True)
class TokenSegment:
    """What stands on a stretch of the text stream: the tokens of one tokenizer, for each prompt."""

    name: str
    """Whose tokens: `"clip"`, `"t5"`."""
    start: int
    """The first position in `Conditioning.embeds`."""
    length: int
    """The number of positions."""
    ids: list[list[int]]
    """Token ids per prompt, padding included: `length` each."""
    words: list[list[str]]
    """The piece of the prompt that each token adds: side by side they spell it, without spaces.
    Empty for special tokens, padding, and the further bytes of a character.
    """
    pad_mask: list[list[bool]]
    """True where a position is padding."""
    special: frozenset[int]
    """Ids that stand for no text: begin, end, padding."""
    cut: list[str]
    """What was left out of each prompt because it is too long; empty if nothing was."""

    @property
    def truncated(self) -> list[bool]:
        """Whether each prompt was too long for this tokenizer."""
        return [bool(cut) for cut in self.cut]

    @property
    def stop(self) -> int:
        """The first position after the segment."""
        return self.start + self.length


def as_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list.

    Raises:
        InputError: There is none.
    """
    result = [prompts] if isinstance(prompts, str) else list(prompts)
    if not result:
        raise InputError("no prompt: give one or more (an empty string is a prompt)")
    return result

"""Prompts on their way into a network: as embeddings, and as tokens on positions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.device import RowNumbers, take

SYNTAX = (
    (re.compile(r"<lora:[^<>]*>"), "not as a LoRA: load it with lora=['FILE@SCALE'] (--lora)"),
    (
        re.compile(r"\([^()]*[^()\d:]:\s*\d*\.?\d+\s*\)|\(\([^()]*\)\)|\w{2,}\+\+|\)[+-]+"),
        "since words have no weights here: leave it out. Raise guidance_scale (--guidance) for "
        "more of the whole prompt, give negative_prompt (--negative) what to push away from, and, "
        "in an edit, hold a word with windows (--window WORD=RATIO)",
    ),
)
"""What other programs make of a prompt, and what to do instead."""


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
    pooled: Tensor | None = None
    """One feature per prompt, shape [B, P]; None if the family has none."""
    mask: Tensor | None = None
    """True where there is a token, shape [B, L]; None if the family attends to padding too."""
    guidance: Tensor | None = None
    """The guidance scale that a guidance-embedded network is told, float32 [B]."""
    negative: Tensor | None = None
    """True where the prompt is what guidance leads away from, bool [B]; None if the network is not
    told."""

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.embeds)

    def __getitem__(self, rows: int | slice | RowNumbers) -> Conditioning:
        """Choose rows, in any order and any number of times; one index gives one row."""
        if isinstance(rows, slice) or (
            isinstance(rows, Tensor) and rows.device == self.embeds.device
        ):
            chosen = rows
            return self._each(lambda part: part[chosen])
        numbers = [rows] if isinstance(rows, int) else rows
        return self._each(lambda part: take(part, numbers))

    def repeat(self, times: int) -> Conditioning:
        """The whole batch several times over: rows a, b become a, b, a, b."""
        return self._each(lambda part: part.repeat(times, *[1] * (part.ndim - 1)))

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

    def with_guidance(self, scale: float) -> Conditioning:
        """The same prompts, the network to be told this guidance scale."""
        told = torch.full((len(self),), scale, dtype=torch.float32, device=self.embeds.device)
        return dataclasses.replace(self, guidance=told)

    def as_negative(self) -> Conditioning:
        """The same prompts as what guidance leads away from; nothing new if that is not told."""
        if self.negative is None:
            return self
        return dataclasses.replace(self, negative=torch.ones_like(self.negative))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Change every part that is there."""
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        changed: list[Any] = [None if part is None else change(part) for part in parts]
        return Conditioning(*changed)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack the rows of several batches, which have the same parts."""
        names = [field.name for field in dataclasses.fields(Conditioning)]
        columns = ([getattr(part, name) for part in parts] for name in names)
        stacked: list[Any] = [
            None if column[0] is None else torch.cat(column) for column in columns
        ]
        return Conditioning(*stacked)


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


def doubt_of_syntax(prompt: str) -> str | None:
    """What of a prompt other programs would take for an instruction, and here is text; else None.

    Example:
        >>> doubt_of_syntax("a (red:1.3) apple")
        "'(red:1.3)' is read as text, ...
        >>> doubt_of_syntax("a red apple (at 10:30)")
    """
    for pattern, remedy in SYNTAX:
        if found := pattern.search(prompt):
            return f"{found.group()!r} is read as text, {remedy}"
    return None


def as_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list.

    Raises:
        InputError: There is none, or one is not text.
    """
    if isinstance(prompts, str):
        return [prompts]
    many = isinstance(prompts, Sequence) and not isinstance(prompts, bytes)
    for prompt in prompts if many else [prompts]:
        if not isinstance(prompt, str):
            raise InputError(f"{prompt!r} is not a prompt: give text, or a list of it")
    result = list(prompts)
    if not result:
        raise InputError("no prompt: give one or more (an empty string is a prompt)")
    return result

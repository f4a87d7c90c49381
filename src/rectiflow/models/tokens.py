"""Tokens on the positions of a text stream, and what to say when a prompt does not fit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rectiflow.models.prompts import TokenSegment, doubt_of_syntax

if TYPE_CHECKING:
    from rectiflow.models.base import FlowModel


def segment(
    name: str, tokenizer: Any, prompts: Sequence[str], start: int, length: int
) -> TokenSegment:
    """Tokenize as diffusers' pipelines do, and find for every token its piece of the prompt.

    Args:
        name: What to call the segment.
        tokenizer: Of transformers, a fast one.
        prompts: To be tokenized.
        start: The segment's first position in the text stream.
        length: The number of its positions; longer prompts are cut, shorter ones padded.
    """
    ids, words, pad_mask, cut = [], [], [], []
    for prompt in prompts:
        tokens = tokenizer(
            prompt,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_offsets_mapping=True,
        )
        pieces, end = [], 0
        for first, last in tokens.offset_mapping:
            pieces.append(prompt[max(first, end) : last].strip())
            end = max(end, last)
        ids.append(list(tokens.input_ids))
        words.append(pieces)
        pad_mask.append([not attended for attended in tokens.attention_mask])
        # Where there is padding nothing was cut, and a second look is not needed.
        fits = any(pad_mask[-1]) or len(tokenizer(prompt, verbose=False).input_ids) <= length
        cut.append("" if fits else prompt[end:].strip())
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    special = frozenset(mark for mark in marks if mark is not None)  # not unk: it stands for text
    return TokenSegment(name, start, length, ids, words, pad_mask, special, cut)


def warn_of_prompts(model: FlowModel, prompts: Sequence[str]) -> None:
    """Warn of prompts too long for a tokenizer, of words the model does not know, and of weights.

    To be called from an `encode_prompt` under `torch.no_grad`: it is its caller that is named.
    """
    found = [
        f"the prompt {_shorten(prompt)!r} is longer than the {part.length} "
        f"tokens {part.name} takes: {_shorten(cut)!r} is left out"
        for part in model.tokenize(prompts)
        for prompt, cut in zip(prompts, part.cut, strict=True)
        if cut
    ]
    found += filter(None, (doubt_of_syntax(one) for one in prompts))
    found += filter(None, (model.metadata.doubt_of_words(model.name, one) for one in prompts))
    for text in found:
        warnings.warn(text, stacklevel=4)  # past ourselves and torch.no_grad's wrapper


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Keep a pipeline from logging for each of its tokenizers what `warn_of_prompts` has said."""
    logger = logging.getLogger(type(pipeline).__module__)
    # A filter, since a new level makes all loggers of the process forget theirs: milliseconds.
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _shorten(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

"""The world's CLIP tokenizer: every word of its captions is one token, any other text is bytes."""

from __future__ import annotations

import functools

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from rectiflow.emoji.caption import NUMBERS, SETTINGS, STYLE_WORDS
from rectiflow.emoji.scene import BACKGROUNDS, PATTERNS
from rectiflow.emoji.sprites import SPRITES

KNOWS = "small scenes of emoji, 64 × 64 pixels"
"""What the models of the world were trained on."""
MAX_LENGTH = 28
"""Positions of a prompt, start and end included."""
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def words() -> list[str]:
    """Every word a caption can hold, and what people may add to one, in a fixed order."""
    phrases = [sprite.name for sprite in SPRITES.values()]
    phrases += [sprite.plural for sprite in SPRITES.values()]
    phrases += [*NUMBERS, *SETTINGS.values(), *STYLE_WORDS.values(), *BACKGROUNDS, *PATTERNS]
    phrases += ["a an and on in at background facing left right upside down nothing , -"]
    return list(dict.fromkeys(word for phrase in phrases for word in phrase.lower().split()))


@functools.cache
def build_tokenizer() -> CLIPTokenizer:
    """The tokenizer, made from the word list alone, so the same wherever it is made."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    bpe.train_from_iterator(words(), trainer)
    learned = bpe.get_vocab()
    # CLIP's own layout: bytes, bytes that end a word, merges, the two special tokens.
    pieces = [*alphabet, *(byte + WORD_END for byte in alphabet)]
    known = set(pieces)
    pieces += [piece for piece in sorted(learned, key=learned.__getitem__) if piece not in known]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, START, END])}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=_merges(bpe),
        model_max_length=MAX_LENGTH,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )


def _merges(bpe: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]

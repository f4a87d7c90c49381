"""A pipeline with the silent T5 is the pipeline without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from rectiflow.emoji.silent_t5 import silent_encoder, silent_tokenizer
from tests.tiny import tiny_sd3


def picture(pipeline: StableDiffusion3Pipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "two lemons, and a key",
        num_inference_steps=2,
        height=32,
        width=32,
        max_sequence_length=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images


def test_stock_loading_gives_the_same_picture_as_no_t5_at_all(tmp_path: Path) -> None:
    without = tiny_sd3(t5=False)
    width = without.transformer.config.joint_attention_dim
    parts = dict(without.components) | {
        "text_encoder_3": silent_encoder(width),
        "tokenizer_3": silent_tokenizer(3),
    }
    StableDiffusion3Pipeline(**parts).save_pretrained(tmp_path)
    stock = StableDiffusion3Pipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert stock.text_encoder_3 is not None
    # Weights elsewhere in memory may go through other kernels.
    np.testing.assert_allclose(picture(stock), picture(without), rtol=0, atol=1e-4)


def test_the_tokenizer_hears_nothing() -> None:
    tokenizer = silent_tokenizer(4)
    for text in ("", "a", "two\nlines", "🍎 and more words than there are positions for"):
        assert tokenizer(text, padding="max_length", truncation=True).input_ids == [1, 0, 0, 0]

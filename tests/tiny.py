"""Tiny random Stable Diffusion 3 pipelines, made offline in a moment, of the real classes.

`tiny_sd3()` gives a diffusers pipeline and `tiny_model()` the same as a rectiflow model:
3 joint blocks of width 32 (2 heads), 4 latent channels, codec factor 4, patch 2, native size
32 × 32 pixels, sizes in multiples of 8 up to 96, 24 CLIP positions. The tokenizers are home-made:
every word of `WORDS` is one token (of CLIP, and of T5), anything else falls apart into bytes.
The same arguments give the same weights, bit for bit, and nothing global is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from rectiflow.models import Metadata, SD3Model

WORDS = (
    "a and one two three red green blue yellow apple apples lemon lemons cat dog heart hearts car "
    "on the background happy sad face left right big small"
).split()
CLIP_LENGTH = 24
T5_LENGTH = 12
WIDTH = 32


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Bytes, and merges that make each of `WORDS` one token."""
    characters = sorted(_byte_characters())
    vocabulary = [*characters, *(c + "</w>" for c in characters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        # The word's own pieces carry it whole: what another word's merges did is undone first.
        pieces = [*word[:-1], word[-1] + "</w>"]
        for merge in merges:
            pieces = _apply(merge, pieces)
        while len(pieces) > 1:
            merge = (pieces[0], pieces[1])
            merges.append(merge)
            vocabulary.append("".join(merge))
            pieces = _apply(merge, pieces)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(
        vocab=ids, merges=merges, model_max_length=CLIP_LENGTH, pad_token=pad_token
    )


def t5_tokenizer() -> T5Tokenizer:
    """A unigram vocabulary of `WORDS`, letters and digits."""
    characters = "▁abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    vocabulary += [(c, -8.0) for c in characters]
    vocabulary += [("▁" + word, -3.0) for word in WORDS if len(word) > 1]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def tiny_sd3(
    t5: bool = False,
    medium: bool = False,
    seed: int = 0,
    *,
    large: bool = False,
    tiny_codec: bool = False,
    shift: float = 3.0,
) -> StableDiffusion3Pipeline:
    """A random pipeline in evaluation mode, float32, on the CPU.

    Args:
        t5: With a T5 encoder; else those positions are zeros.
        medium: Like SD3.5-medium: a second attention in the first block, normalised q and k.
        seed: Of the weights.
        large: Like SD3.5-large: normalised q and k only.
        tiny_codec: `AutoencoderTiny` instead of `AutoencoderKL`.
        shift: The scheduler's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components: dict[str, Any] = {
            "transformer": SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                caption_projection_dim=WIDTH,
                pooled_projection_dim=WIDTH,
                pos_embed_max_size=12,
                dual_attention_layers=(0,) if medium else (),
                qk_norm="rms_norm" if medium or large else None,
            ),
            "vae": _tiny_codec() if tiny_codec else _codec(),
            "text_encoder": _clip(clip_tokenizer()),
            "text_encoder_2": _clip(clip_tokenizer(pad_token="!")),
            "text_encoder_3": _t5() if t5 else None,
        }
    for component in components.values():
        if component is not None:
            component.eval().requires_grad_(False)
    return StableDiffusion3Pipeline(
        **components,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def tiny_model(
    t5: bool = False,
    medium: bool = False,
    seed: int = 0,
    *,
    max_sequence_length: int = T5_LENGTH,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> SD3Model:
    """`tiny_sd3` as a model.

    Args:
        t5: As in `tiny_sd3`.
        medium: As in `tiny_sd3`.
        seed: As in `tiny_sd3`.
        max_sequence_length: T5 positions.
        dtype: Of network and text encoders; the codec stays in float32.
        **kwargs: More for `tiny_sd3`.
    """
    pipeline = tiny_sd3(t5, medium, seed, **kwargs)
    if dtype != torch.float32:
        for name, component in pipeline.components.items():
            if isinstance(component, torch.nn.Module) and name != "vae":
                component.to(dtype)
    return SD3Model(
        pipeline, name="tiny", metadata=Metadata(max_sequence_length=max_sequence_length)
    )


def _codec() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5,
        shift_factor=0.1,
    )


def _tiny_codec() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
        scaling_factor=1.2,
        shift_factor=0.05,
    )


def _clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH // 2,
        intermediate_size=WIDTH,
        projection_dim=WIDTH // 2,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=4.0,
    )
    return CLIPTextModelWithProjection(config)


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=WIDTH,
        d_kv=16,
        d_ff=WIDTH,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def _byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + i) for i in range(len(others))]


def _apply(merge: tuple[str, str], pieces: list[str]) -> list[str]:
    """What byte-pair encoding makes of `pieces` with one merge."""
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == merge:
            result[-1] += piece
        else:
            result.append(piece)
    return result

"""Tiny random Qwen-Image pipelines, made offline in a moment, of the real classes.

`tiny_qwen()` gives a diffusers pipeline and `tiny_qwen_model()` the same as a rectiflow model:
3 blocks of width 32 (2 heads), 4 latent channels, codec factor 4, patch 2, native size 32 × 32
pixels, sizes in multiples of 8. The tokenizer is home-made: every word of `tests.tiny.WORDS` and of
the pipeline's template is one token, so the template's beginning has its 34 as with Qwen's own;
anything else falls apart into bytes. The same arguments give the same weights, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from rectiflow.models import Metadata
from rectiflow.models.qwen_image import QwenImageModel
from tests.tiny import WIDTH, WORDS, _apply, _byte_characters

TEXT_LENGTH = 20
TEMPLATE_WORDS = (
    "system user assistant Describe the image by detailing color shape size texture quantity text "
    "spatial relationships of objects and background"
).split()
DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 8,
    "max_image_seq_len": 96,
    "base_shift": 0.4,
    "max_shift": 1.3,
}
"""The tiny model's shift: another line than Qwen-Image's own, as its pictures have other sizes."""
MEAN, STD = [-0.1, 0.05, 0.2, 0.0], [0.3, 0.5, 0.4, 0.6]
"""Of the latents of the tiny codec, by channel."""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, and merges that make each word one token, with and without a space before it."""
    vocabulary = sorted(_byte_characters())
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys([*WORDS, *TEMPLATE_WORDS]):
        for spelled in (word, "Ġ" + word):
            # The word's own pieces carry it whole: what another word's merges did is undone first.
            pieces = list(spelled)
            for merge in merges:
                pieces = _apply(merge, pieces)
            while len(pieces) > 1:
                merge = (pieces[0], pieces[1])
                merges.append(merge)
                vocabulary.append("".join(merge))
                pieces = _apply(merge, pieces)
    vocabulary += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    ids = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    return Qwen2Tokenizer(
        vocab=ids,
        merges=merges,
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=1000,
    )


def tiny_qwen(seed: int = 0, **scheduler: Any) -> QwenImagePipeline:
    """A random pipeline in evaluation mode, float32, on the CPU.

    Args:
        seed: Of the weights.
        **scheduler: The scheduler's settings instead of a dynamic shift.
    """
    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components: dict[str, Any] = {
            "transformer": _network(),
            "vae": _codec(),
            "text_encoder": _text_encoder(len(tokenizer)),
        }
    for component in components.values():
        component.eval().requires_grad_(False)
    pipeline = QwenImagePipeline(
        **components,
        scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or DYNAMIC)),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_qwen_model(
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, Any] | None = None,
    **scheduler: Any,
) -> QwenImageModel:
    """`tiny_qwen` as a model of 20 text positions and a native size of 32.

    Args:
        seed: As in `tiny_qwen`.
        dtype: Of network and text encoder; the codec stays in float32.
        metadata: More for the metadata.
        **scheduler: As in `tiny_qwen`.
    """
    pipeline = tiny_qwen(seed, **scheduler)
    for name in ("transformer", "text_encoder"):
        pipeline.components[name].to(dtype)
    known = {"max_sequence_length": TEXT_LENGTH, "default_size": 32} | (metadata or {})
    return QwenImageModel(pipeline, name="tiny qwen", metadata=Metadata(**known))


def _network() -> QwenImageTransformer2DModel:
    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    # So that a mistake in time, text, mask or place shows: larger than they come. The embedding of
    # time less so, since it makes a thousandfold of the rounding of σ, which diffusers' pipeline
    # multiplies and divides by 1000.
    for name, weight in network.named_parameters():
        if weight.ndim == 2:
            gain = 0.6 if name.startswith("time_text_embed") else 1.5 if "_mod" in name else 1.2
            torch.nn.init.xavier_uniform_(weight, gain=gain)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
        else:
            torch.nn.init.normal_(weight, mean=1.0, std=0.2)  # of the norms
    return network


def _codec() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=MEAN,
        latents_std=STD,
    )


def _text_encoder(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config)

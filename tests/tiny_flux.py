"""Tiny random FLUX.1 pipelines, made offline in a moment, of the real classes.

`tiny_flux()` gives a diffusers pipeline and `tiny_flux_model()` the same as a rectiflow model:
2 double and 3 single blocks of width 32 (2 heads), 4 latent channels, codec factor 4, patch 2,
native size 32 × 32 pixels, sizes in multiples of 8, a CLIP of 24 tokens for the pooled feature.
The tokenizers are those of `tests.tiny`. The same arguments give the same weights, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from rectiflow.models import FluxModel, Metadata
from tests.tiny import CLIP_LENGTH, T5_LENGTH, WIDTH, clip_tokenizer, t5_tokenizer

DYNAMIC = {"base_image_seq_len": 8, "max_image_seq_len": 96, "base_shift": 0.4, "max_shift": 1.3}
"""The shift of the tiny dev: another line than FLUX's own, as its pictures have other sizes."""


def tiny_flux(
    schnell: bool = False, seed: int = 0, *, double: int = 2, single: int = 3, **scheduler: Any
) -> FluxPipeline:
    """A random pipeline in evaluation mode, float32, on the CPU.

    Args:
        schnell: Like FLUX.1-schnell: no guidance input, a fixed shift of 1.
        seed: Of the weights.
        double: Double blocks.
        single: Single blocks.
        **scheduler: The scheduler's settings instead of those of the kind.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components: dict[str, Any] = {
            "transformer": _network(not schnell, double, single),
            "vae": _codec(),
            "text_encoder": _clip(),
            "text_encoder_2": _t5(),
        }
    for component in components.values():
        component.eval().requires_grad_(False)
    settings = {} if schnell else {"use_dynamic_shifting": True, "shift": 3.0, **DYNAMIC}
    pipeline = FluxPipeline(
        **components,
        scheduler=FlowMatchEulerDiscreteScheduler(**(settings | scheduler)),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux_model(
    schnell: bool = False,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, Any] | None = None,
    **scheduler: Any,
) -> FluxModel:
    """`tiny_flux` as a model of 12 T5 positions and a native size of 32.

    Args:
        schnell: As in `tiny_flux`.
        seed: As in `tiny_flux`.
        dtype: Of network and text encoders; the codec stays in float32.
        metadata: More for the metadata.
        **scheduler: As in `tiny_flux`.
    """
    pipeline = tiny_flux(schnell, seed, **scheduler)
    if dtype != torch.float32:
        for name in ("transformer", "text_encoder", "text_encoder_2"):
            pipeline.components[name].to(dtype)
    known = {"max_sequence_length": T5_LENGTH, "default_size": 32} | (metadata or {})
    return FluxModel(pipeline, name="tiny flux", metadata=Metadata(**known))


def _network(guidance_embeds: bool, double: int, single: int) -> FluxTransformer2DModel:
    network = FluxTransformer2DModel(
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH // 2,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    # As they come, weights of a network as small as this let hardly anything through.
    for name, weight in network.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.xavier_uniform_(weight, gain=0.4 if name.startswith("proj_out") else 1.0)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
        else:
            torch.nn.init.normal_(weight, mean=1.0, std=0.2)  # of the norms of queries and keys
    return network


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
        scaling_factor=0.6,
        shift_factor=0.12,
    )


def _clip() -> CLIPTextModel:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH // 2,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=4.0,
    )
    return CLIPTextModel(config)


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

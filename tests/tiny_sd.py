"""Tiny random Stable Diffusion pipelines, made offline in a moment, of the real classes.

`tiny_sd()` gives a `StableDiffusionPipeline` and `tiny_sd_model()` the same as a rectiflow model,
`tiny_sdxl()` and `tiny_sdxl_model()` their XL kin, `tiny_sdxl_refiner()` its refiner's pipeline: a
U-Net of 8 × 8 latents with 4 channels and cross-attention, codec factor 4, native size 32 × 32
pixels, and the tokenizer of `tests.tiny`.
The same arguments give the same weights, bit for bit, and nothing global is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from rectiflow.models import Conditioning, Metadata, SDModel, SDXLModel
from rectiflow.models.schedulers import rectified_scheduler
from tests.tiny import CLIP_LENGTH, WIDTH, _clip, _codec, clip_tokenizer

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
"""Stable Diffusion's."""


def tiny_scheduler(
    prediction_type: str = "epsilon", zero_terminal_snr: bool = False, **schedule: Any
) -> DDIMScheduler:
    """Stable Diffusion's schedule, or another."""
    return DDIMScheduler(
        **{**SCHEDULE, "clip_sample": False, "steps_offset": 1, **schedule},
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
    )


def tiny_sd(
    prediction_type: str = "epsilon",
    rectified: bool = False,
    zero_terminal_snr: bool = False,
    seed: int = 0,
    *,
    guidance_embedded: bool = False,
    **schedule: Any,
) -> StableDiffusionPipeline:
    """A random pipeline in evaluation mode, float32, on the CPU.

    Args:
        prediction_type: What the network is said to predict.
        rectified: It predicts noise - data of a rectified flow instead.
        zero_terminal_snr: The schedule is rescaled so that the last ᾱ is zero.
        seed: Of the weights.
        guidance_embedded: The network takes the guidance scale as an input.
        **schedule: Of the `DDIMScheduler`, such as ``beta_schedule="linear"``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": tiny_unet(time_cond_proj_dim=16 if guidance_embedded else None),
            "vae": tiny_vae(),
            "text_encoder": tiny_text_encoder(),
        }
    for part in parts.values():
        part.eval().requires_grad_(False)
    return StableDiffusionPipeline(
        **parts,
        tokenizer=clip_tokenizer(),
        scheduler=rectified_scheduler()
        if rectified
        else tiny_scheduler(prediction_type, zero_terminal_snr, **schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sd_model(
    prediction_type: str = "epsilon",
    rectified: bool = False,
    zero_terminal_snr: bool = False,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Metadata | None = None,
    **kwargs: Any,
) -> SDModel:
    """`tiny_sd` as a model.

    Args:
        prediction_type: As in `tiny_sd`.
        rectified: As in `tiny_sd`.
        zero_terminal_snr: As in `tiny_sd`.
        seed: As in `tiny_sd`.
        dtype: Of network and text encoder; the codec stays in float32.
        metadata: As of `SDModel`.
        **kwargs: More for `tiny_sd`.
    """
    pipeline = tiny_sd(prediction_type, rectified, zero_terminal_snr, seed, **kwargs)
    if dtype != torch.float32:
        pipeline.unet.to(dtype)
        pipeline.text_encoder.to(dtype)
    return SDModel(pipeline, name="tiny-sd", metadata=metadata)


def tiny_sdxl(
    prediction_type: str = "epsilon", rectified: bool = False, seed: int = 0
) -> StableDiffusionXLPipeline:
    """A random SDXL pipeline: two text encoders, sizes and a pooled feature.

    Args:
        prediction_type: As in `tiny_sd`.
        rectified: As in `tiny_sd`.
        seed: Of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": tiny_unet(
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + WIDTH // 2,
            ),
            "vae": tiny_vae(),
            "text_encoder": _clip(clip_tokenizer()),
            "text_encoder_2": _clip(clip_tokenizer(pad_token="!")),
        }
    for part in parts.values():
        part.eval().requires_grad_(False)
    return StableDiffusionXLPipeline(
        **parts,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        scheduler=rectified_scheduler() if rectified else tiny_scheduler(prediction_type),
        add_watermarker=False,
    )


def tiny_sdxl_model(
    prediction_type: str = "epsilon", rectified: bool = False, seed: int = 0
) -> SDXLModel:
    """`tiny_sdxl` as a model."""
    return SDXLModel(tiny_sdxl(prediction_type, rectified, seed), name="tiny-sdxl")


def tiny_sdxl_refiner(
    prediction_type: str = "epsilon", aesthetics: bool = True, seed: int = 0
) -> StableDiffusionXLImg2ImgPipeline:
    """A random pipeline with the parts of SDXL's refiner: the second text encoder alone.

    Args:
        prediction_type: As in `tiny_sd`.
        aesthetics: The network is told an aesthetic score instead of the wanted size.
        seed: Of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": tiny_unet(
                cross_attention_dim=WIDTH // 2,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=(5 if aesthetics else 6) * 8 + WIDTH // 2,
            ),
            "vae": tiny_vae(),
            "text_encoder_2": _clip(clip_tokenizer(pad_token="!")),
        }
    for part in parts.values():
        part.eval().requires_grad_(False)
    return StableDiffusionXLImg2ImgPipeline(
        **parts,
        text_encoder=None,
        tokenizer=None,
        tokenizer_2=clip_tokenizer(pad_token="!"),
        scheduler=tiny_scheduler(prediction_type),
        requires_aesthetics_score=aesthetics,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def tiny_unet(cross_attention_dim: int = WIDTH, **config: Any) -> UNet2DConditionModel:
    """A U-Net with cross-attention at 8 × 8 and 4 × 4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=8,
        **config,
    )


def tiny_vae() -> AutoencoderKL:
    """That of `tests.tiny` without a shift of latents, of which these pipelines know nothing."""
    vae = _codec()
    vae.register_to_config(shift_factor=None)
    return vae


def tiny_text_encoder() -> CLIPTextModel:
    """Two layers of CLIP."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=4.0,
    )
    return CLIPTextModel(config)


def asked(model: SDModel, x_t: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
    """The network as a stock pipeline asks it."""
    with torch.no_grad():
        return model.network(x_t, timestep, encoder_hidden_states=cond.embeds, return_dict=False)[0]

"""FLUX.1: `FluxPipeline` around `FluxTransformer2DModel`, dev and schnell.

Conventions of the family: the network's time is σ = 1 - t (it multiplies by 1000 itself, and the
guidance scale too), and it predicts noise - data. It sees latents packed, 2 × 2 cells to a token;
everywhere else they are [B, 16, h, w]. Positions are rotary: (0, row, column) of image tokens, zero
of text tokens. The text stream is T5's alone; CLIP gives one pooled feature. The double blocks have
two streams, the single blocks one, [text, image]. The grid's shift grows with the number of image
tokens (dev), or is fixed (schnell). Source: Black Forest Labs 2024, its code and diffusers'
pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rectiflow.flow.device import time_for
from rectiflow.flow.grid import dynamic_mu
from rectiflow.models import codec
from rectiflow.models.base import AttentionSite, FlowModel, joint_site
from rectiflow.models.prompts import Conditioning, TokenSegment, as_prompts
from rectiflow.models.tokens import quiet, segment, warn_of_prompts

PATCH = 2
"""Latent cells per token, along one side: diffusers packs them outside the network."""

LONGEST = 128
"""Tokens along the longest side. Rotary positions have no end, but FLUX.1 was made for up to two
megapixels: this is 2048 pixels, at which a picture of two to one has as many."""

FEW_STEPS = 8
"""A network recommended for at most so many steps is taken to be distilled for them."""


class FluxModel(FlowModel):
    """FLUX.1-dev, which takes a guidance scale as an input, or FLUX.1-schnell, which does not.

    Args:
        pipeline: A `FluxPipeline`, its networks in evaluation mode.
        name: What the model is called in reports and saved files.
        metadata: What its folder says about its use.
    """

    family: ClassVar[str] = "flux"
    packed: ClassVar[bool] = True
    text_first: ClassVar[bool] = True

    @property
    def network(self) -> Any:
        """The `FluxTransformer2DModel`."""
        return self.pipeline.transformer

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along one side: 8."""
        return self.pipeline.vae_scale_factor

    @property
    def patch(self) -> int:
        """Latent cells per image token, along one side."""
        return PATCH

    @property
    def largest(self) -> int:
        """The longest side we take, in pixels: 2048."""
        return LONGEST * self.multiple

    @property
    def channels(self) -> int:
        """Channels of a latent, before packing."""
        return self.network.config.in_channels // PATCH**2

    @property
    def default_size(self) -> int:
        """Side of the square image the network was made for, in pixels: 1024."""
        return self.metadata.default_size or self.pipeline.default_sample_size * self.factor

    @property
    def default_guidance_scale(self) -> float:
        """From the metadata, else 3.5 for dev.

        It is 1 for schnell, where diffusers' examples say 0: a pipeline that gives the number to
        nobody. Here it would be α of classifier-free guidance, and 1 is none.
        """
        if self.metadata.default_guidance_scale is not None:
            return self.metadata.default_guidance_scale
        return 3.5 if self.guidance_embeds else 1.0

    @property
    def default_num_inference_steps(self) -> int:
        """From the metadata, else 28 for dev and 4 for schnell."""
        if self.metadata.default_num_inference_steps is not None:
            return self.metadata.default_num_inference_steps
        return 28 if self.guidance_embeds else 4

    @property
    def shift(self) -> float:
        """The scheduler's shift; of a shift that depends on the size, that of the default size."""
        return self.shift_for((self.default_size // self.multiple) ** 2)

    def shift_for(self, num_tokens: int) -> float:
        """The scheduler's shift for an image of so many tokens: exp(μ) if it is dynamic."""
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = dynamic_mu(num_tokens, **{key: config[key] for key in keys})
        return mu if config.time_shift_type == "linear" else math.exp(mu)

    @property
    def max_sequence_length(self) -> int:
        """T5 positions: from the metadata, else 512 for dev and 256 for schnell, as made."""
        return self.metadata.max_sequence_length or (512 if self.guidance_embeds else 256)

    @property
    def guidance_embeds(self) -> bool:
        """Whether the network takes a guidance scale as an input: true of dev."""
        return self.network.config.guidance_embeds

    @property
    def cautions(self) -> tuple[str, ...]:
        """That a network distilled for few steps is no field to follow backwards."""
        steps = self.default_num_inference_steps
        if steps > FEW_STEPS:
            return ()
        return (
            f"{self.name} is distilled to generate in {steps} steps, and between them it is hardly "
            "a flow: inversion through it is unreliable. The image still comes back, by "
            "compensation, but edits may go wrong; FLUX.1-dev is the model for them.",
        )

    def encode_image(self, images: Tensor) -> Tensor:
        """The latents [B, 16, h, w] of images [B, 3, H, W] in [0, 1]: the posterior's mode."""
        self.latent_shape(*images.shape[-2:])
        return codec.encode(self.pipeline.vae, images, self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """The images [B, 3, H, W] in [0, 1] of latents [B, 16, h, w]."""
        return codec.decode(self.pipeline.vae, latents, self.device)

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        """Embed prompts by the pipeline's own `encode_prompt`, each distinct one by itself.

        What is too long for T5 is cut, with a warning. What is too long for CLIP alone (77 tokens)
        is not: T5 reads it, and CLIP's one feature is of the beginning, as in every FLUX pipeline.
        """
        prompts = as_prompts(prompts)
        distinct = list(dict.fromkeys(prompts))
        warn_of_prompts(self, distinct)
        with quiet(self.pipeline):  # it has just been said, and better
            embedded = [
                self.pipeline.encode_prompt(
                    prompt=prompt,
                    prompt_2=None,
                    device=self.device,
                    max_sequence_length=self.max_sequence_length,
                )
                for prompt in distinct
            ]
        once = Conditioning.cat([Conditioning(embeds, pooled) for embeds, pooled, _ in embedded])
        return once[[distinct.index(prompt) for prompt in prompts]]

    def tokenize(self, prompts: str | Sequence[str]) -> list[TokenSegment]:
        """The T5 tokens: CLIP has no positions in the text stream."""
        tokenizer, length = self.pipeline.tokenizer_2, self.max_sequence_length
        return [segment("t5", tokenizer, as_prompts(prompts), 0, length)]

    def differentiable_velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        """`v = -u(x, 1 - t)` in float32, from one call of the network.

        dev is told `cond.guidance`; 1, the guidance of inversion, where that is not given.
        """
        assert cond.pooled is not None
        dtype = self.dtype
        sigma = 1 - time_for(t, x, torch.float32)
        guidance = None
        if self.guidance_embeds:
            guidance = sigma.new_ones(len(x)) if cond.guidance is None else cond.guidance
        (u,) = self.network(
            hidden_states=_pack(x).to(dtype),
            timestep=sigma.expand(len(x)),
            guidance=guidance,
            encoder_hidden_states=cond.embeds.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            img_ids=_positions(x),
            txt_ids=sigma.new_zeros(cond.embeds.shape[1], 3),
            return_dict=False,
        )
        return -_unpack(u.float(), x.shape[-2] // PATCH)

    def attention_sites(self) -> list[AttentionSite]:
        """Those of all double blocks, then of all single blocks, where the streams are fused.

        Unlike SD3, no block is made without a text stream going out: what leaves the last one is
        merely not looked at. It is a site like the others, since its text, too, is attended to,
        and since methods that share the values of the last single blocks mean it.
        """
        double = [joint_site(block.attn) for block in self.network.transformer_blocks]
        single = [_fused_site(block.attn) for block in self.network.single_transformer_blocks]
        return double + single


def _fused_site(attention: Any) -> AttentionSite:
    """The site of a single block's attention, whose one stream is [text, image]."""
    return AttentionSite(
        attention,
        image={"query": attention.to_q, "key": attention.to_k, "value": attention.to_v},
        text=None,
    )


def _pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] as tokens [B, h/2 · w/2, 4C], in each of them channel by channel."""
    b, c, h, w = latents.shape
    cells = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * PATCH**2)


def _unpack(tokens: Tensor, rows: int) -> Tensor:
    """The inverse of `_pack`: [B, C, h, w] of so many rows of tokens."""
    b, count, width = tokens.shape
    cells = tokens.reshape(b, rows, count // rows, width // PATCH**2, PATCH, PATCH)
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _positions(latents: Tensor) -> Tensor:
    """(0, row, column) of each image token, float32 [h/2 · w/2, 3]."""
    # Made where they are used: a copy from the CPU would make every step wait.
    rows, columns = (
        torch.arange(side // PATCH, dtype=torch.float32, device=latents.device)
        for side in latents.shape[-2:]
    )
    return torch.cartesian_prod(rows.new_zeros(1), rows, columns)

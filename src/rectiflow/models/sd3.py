"""Stable Diffusion 3 and 3.5: `StableDiffusion3Pipeline` around `SD3Transformer2DModel`.

Conventions of the family: the network's time is 1000σ with σ = 1 - t, and it predicts
noise - data. Joint attention concatenates [image, text]. The text stream is the CLIP positions
(both encoders side by side in the features), then the T5 positions, which are zeros where there is
no T5. Source: Esser et al. 2024, arXiv 2403.03206, and diffusers' pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rectiflow.flow.device import time_for
from rectiflow.models import codec
from rectiflow.models.base import AttentionSite, FlowModel, joint_site
from rectiflow.models.prompts import Conditioning, TokenSegment, as_prompts
from rectiflow.models.tokens import quiet, segment, warn_of_prompts

MAX_SEQUENCE_LENGTH = 256
"""T5 positions where the model's metadata does not say: diffusers' default."""


class SD3Model(FlowModel):
    """SD3, SD3.5-medium (with its second, image-only attention) or SD3.5-large; with or without T5.

    Args:
        pipeline: A `StableDiffusion3Pipeline`, its networks in evaluation mode.
        name: What the model is called in reports and saved files.
        metadata: What its folder says about its use.
    """

    family: ClassVar[str] = "sd3"
    text_first: ClassVar[bool] = False

    @property
    def network(self) -> Any:
        """The `SD3Transformer2DModel`."""
        return self.pipeline.transformer

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along one side: 8 for Stability's codec."""
        return self.pipeline.vae_scale_factor

    @property
    def patch(self) -> int:
        """Latent cells per image token, along one side."""
        return self.network.config.patch_size

    @property
    def largest(self) -> int:
        """The longest side the position table allows, in pixels."""
        return self.network.config.pos_embed_max_size * self.multiple

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.network.config.in_channels

    @property
    def default_size(self) -> int:
        """Side of the square image the network was made for, in pixels."""
        return self.metadata.default_size or self.network.config.sample_size * self.factor

    @property
    def default_guidance_scale(self) -> float:
        """From the metadata, else from the model card of SD3, SD3.5-large or SD3.5-medium."""
        if self.metadata.default_guidance_scale is not None:
            return self.metadata.default_guidance_scale
        return self._recommended()[0]

    @property
    def default_num_inference_steps(self) -> int:
        """From the metadata, else from the model card of SD3, SD3.5-large or SD3.5-medium."""
        return self.metadata.default_num_inference_steps or self._recommended()[1]

    @property
    def shift(self) -> float:
        """The scheduler's shift (3 for SD3 and SD3.5)."""
        return float(self.pipeline.scheduler.config.shift)

    @property
    def max_sequence_length(self) -> int:
        """T5 positions in the text stream, there also without a T5."""
        return self.metadata.max_sequence_length or MAX_SEQUENCE_LENGTH

    def encode_image(self, images: Tensor) -> Tensor:
        """The latents [B, C, h, w] of images [B, 3, H, W] in [0, 1]: the posterior's mode."""
        self.latent_shape(*images.shape[-2:])
        return codec.encode(self.pipeline.vae, images, self.device)

    def decode(self, latents: Tensor) -> Tensor:
        """The images [B, 3, H, W] in [0, 1] of latents [B, C, h, w]."""
        return codec.decode(self.pipeline.vae, latents, self.device)

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        """Embed prompts by the pipeline's own `encode_prompt`, each distinct one by itself."""
        prompts = as_prompts(prompts)
        distinct = list(dict.fromkeys(prompts))
        warn_of_prompts(self, distinct)
        with quiet(self.pipeline):  # it has just been said, and better
            embedded = [
                self.pipeline.encode_prompt(
                    prompt=prompt,
                    prompt_2=None,
                    prompt_3=None,
                    device=self.device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.max_sequence_length,
                )
                for prompt in distinct
            ]
        once = Conditioning.cat([Conditioning(embeds, pooled) for embeds, _, pooled, _ in embedded])
        return once[[distinct.index(prompt) for prompt in prompts]]

    def tokenize(self, prompts: str | Sequence[str]) -> list[TokenSegment]:
        """The CLIP tokens (both encoders share the positions), then those of the T5."""
        prompts = as_prompts(prompts)
        clip = segment(
            "clip", self.pipeline.tokenizer, prompts, 0, self.pipeline.tokenizer_max_length
        )
        length = self.max_sequence_length
        if self.pipeline.text_encoder_3 is not None:
            return [clip, segment("t5", self.pipeline.tokenizer_3, prompts, clip.stop, length)]
        count = len(prompts)
        empty = TokenSegment(
            name="t5",
            start=clip.stop,
            length=length,
            ids=[[0] * length for _ in range(count)],
            words=[[""] * length for _ in range(count)],
            pad_mask=[[True] * length for _ in range(count)],
            special=frozenset({0}),
            cut=[""] * count,
        )
        return [clip, empty]

    def differentiable_velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        """`v = -u(x, 1000 (1 - t))` in float32, from one call of the network."""
        dtype = self.dtype
        assert cond.pooled is not None
        sigma = 1 - time_for(t, x, torch.float32)
        (u,) = self.network(
            hidden_states=x.to(dtype),
            timestep=(sigma * self.pipeline.scheduler.config.num_train_timesteps).expand(len(x)),
            encoder_hidden_states=cond.embeds.to(dtype),
            pooled_projections=cond.pooled.to(dtype),
            return_dict=False,
        )
        return -u.float()

    def attention_sites(self) -> list[AttentionSite]:
        """Those of all blocks but the last, after which the text stream ends; SD3.5-medium's
        `attn2` sees no text and is left alone.
        """
        blocks = (block for block in self.network.transformer_blocks if not block.context_pre_only)
        return [joint_site(block.attn) for block in blocks]

    def ending_site(self) -> AttentionSite | None:
        """That of the last block."""
        return joint_site(self.network.transformer_blocks[-1].attn)

    def _recommended(self) -> tuple[float, int]:
        """Guidance and steps of the model cards, by what tells the checkpoints apart."""
        config = self.network.config
        if config.dual_attention_layers:
            return 4.5, 40  # SD3.5-medium
        if config.qk_norm is not None:
            return 3.5, 28  # SD3.5-large
        return 7.0, 28  # SD3-medium

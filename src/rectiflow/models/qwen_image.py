"""Qwen-Image: `QwenImagePipeline` around `QwenImageTransformer2DModel`.

Conventions of the family: the network's time is σ = 1 - t (it multiplies by 1000 itself), and it
predicts noise - data. It sees latents packed, 2 × 2 cells to a token; everywhere else they are
[B, 16, h, w]. The codec is one of videos, of which a picture is the only frame. Text is what
Qwen2.5-VL makes of the prompt within a template, whose beginning is dropped; a prompt has as many
positions as it has tokens, and the rest of the stream is masked, so a row's velocity depends
neither on the padding nor on the other rows. All blocks have two streams, [text, image] in
attention. Guidance keeps the norm of the conditional velocity, token by token. Source: Wu et al.
2025, arXiv 2508.02324, and diffusers' pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from rectiflow.flow.device import time_for
from rectiflow.flow.grid import dynamic_mu
from rectiflow.models.base import AttentionSite, FlowModel, joint_site
from rectiflow.models.prompts import Conditioning, TokenSegment, as_prompts
from rectiflow.models.tokens import warn_of_prompts

PATCH = 2
"""Latent cells per token, along one side: diffusers packs them outside the network."""

LONGEST = 128
"""Tokens along the longest side. Rotary positions go further, but the makers' shift is laid out for
up to 8192 tokens: this is 2048 pixels, at which a picture of two to one has as many."""

MAX_SEQUENCE_LENGTH = 512
"""Positions of the text stream where the model's metadata does not say: diffusers' default."""


class QwenImageModel(FlowModel):
    """Qwen-Image: 20 billion parameters, guided by true classifier-free guidance.

    Args:
        pipeline: A `QwenImagePipeline`, its networks in evaluation mode.
        name: What the model is called in reports and saved files.
        metadata: What its folder says about its use.
    """

    family: ClassVar[str] = "qwen-image"
    packed: ClassVar[bool] = True
    text_first: ClassVar[bool] = True

    @property
    def network(self) -> Any:
        """The `QwenImageTransformer2DModel`."""
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
        """Channels of a latent, before packing: 16."""
        return self.network.config.in_channels // PATCH**2

    @property
    def default_size(self) -> int:
        """Side of the square image that diffusers' pipeline makes by default, in pixels: 1024."""
        return self.metadata.default_size or self.pipeline.default_sample_size * self.factor

    @property
    def default_guidance_scale(self) -> float:
        """From the metadata, else 4, diffusers' `true_cfg_scale`."""
        if self.metadata.default_guidance_scale is not None:
            return self.metadata.default_guidance_scale
        return 4.0

    @property
    def default_num_inference_steps(self) -> int:
        """From the metadata, else 50."""
        return self.metadata.default_num_inference_steps or 50

    @property
    def shift(self) -> float:
        """The shift for the default size."""
        return self.shift_for((self.default_size // self.multiple) ** 2)

    def shift_for(self, num_tokens: int) -> float:
        """The scheduler's shift for an image of so many tokens: exp(μ) if it is dynamic.

        Its `shift_terminal`, by which diffusers draws out a grid so that the last step begins at
        σ = 0.02, depends on the number of steps; it is no shift, and a grid of one's own takes it.
        """
        config = self.pipeline.scheduler.config
        if not config.use_dynamic_shifting:
            return float(config.shift)
        keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = dynamic_mu(num_tokens, **{key: config[key] for key in keys})
        return mu if config.time_shift_type == "linear" else math.exp(mu)

    @property
    def max_sequence_length(self) -> int:
        """Positions of the text stream: from the metadata, else 512."""
        return self.metadata.max_sequence_length or MAX_SEQUENCE_LENGTH

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """The latents [B, 16, h, w] of images [B, 3, H, W] in [0, 1]: the posterior's mode."""
        self.latent_shape(*images.shape[-2:])
        vae = self.pipeline.vae
        frames = (2 * images - 1).to(self.device, vae.dtype)[:, :, None]
        raw = vae.encode(frames).latent_dist.mode()[:, :, 0].float()
        mean, std = self._statistics(raw)
        return (raw - mean) / std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The images [B, 3, H, W] in [0, 1] of latents [B, 16, h, w]."""
        vae = self.pipeline.vae
        latents = latents.to(self.device).float()
        mean, std = self._statistics(latents)
        frames = (latents * std + mean).to(vae.dtype)[:, :, None]
        images = vae.decode(frames, return_dict=False)[0][:, :, 0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        """Embed prompts by the pipeline's own `encode_prompt`, each distinct one by itself.

        Prompts of all lengths get the same number of positions; those without a token are zeros
        and masked.
        """
        prompts = as_prompts(prompts)
        distinct = list(dict.fromkeys(prompts))
        warn_of_prompts(self, distinct)
        length, embedded = self.max_sequence_length, []
        for prompt in distinct:
            embeds, _ = self.pipeline.encode_prompt(
                prompt, device=self.device, max_sequence_length=length
            )
            count = embeds.shape[1]
            padded = functional.pad(embeds, (0, 0, 0, length - count))
            mask = torch.arange(length, device=embeds.device) < count
            embedded.append(Conditioning(padded, mask=mask[None]))
        once = Conditioning.cat(embedded)
        return once[[distinct.index(prompt) for prompt in prompts]]

    def tokenize(self, prompts: str | Sequence[str]) -> list[TokenSegment]:
        """The prompt's tokens and those of the template's end, which spell no word of it."""
        pipeline, length = self.pipeline, self.max_sequence_length
        template, drop = pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx
        before, tokenizer = template.index("{}"), pipeline.tokenizer
        ids, words, pad_mask, cut = [], [], [], []
        for prompt in as_prompts(prompts):
            tokens = tokenizer(template.format(prompt), return_offsets_mapping=True, verbose=False)
            pieces, end = [], 0
            for _, last in tokens.offset_mapping[drop : drop + length]:
                # What follows the prompt is cut off by the slice: it is the template's.
                stop = max(last - before, end)
                pieces.append(prompt[end:stop].strip())
                end = stop
            padding = length - len(pieces)
            ids.append(
                [*tokens.input_ids[drop : drop + length]] + [tokenizer.pad_token_id] * padding
            )
            words.append(pieces + [""] * padding)
            pad_mask.append([False] * len(pieces) + [True] * padding)
            cut.append(prompt[end:].strip())
        special = frozenset(tokenizer.all_special_ids)
        return [TokenSegment("qwen2.5-vl", 0, length, ids, words, pad_mask, special, cut)]

    def differentiable_velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        """`v = -u(x, 1 - t)` in float32, from one call of the network."""
        dtype = self.dtype
        rows, columns = (side // PATCH for side in x.shape[-2:])
        sigma = 1 - time_for(t, x, torch.float32)
        tokens = functional.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)
        (u,) = self.network(
            hidden_states=tokens.to(dtype),
            timestep=sigma.expand(len(x)),
            encoder_hidden_states=cond.embeds.to(dtype),
            encoder_hidden_states_mask=cond.mask,
            img_shapes=[[(1, rows, columns)]] * len(x),
            return_dict=False,
        )
        cells = u.float().transpose(1, 2).unflatten(2, (rows, columns))
        return -functional.pixel_shuffle(cells, PATCH)

    def combine(self, unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
        """The guided velocity [B, C, h, w], each token brought to the norm it has in `guided`."""
        sharp = super().combine(unguided, guided, scale)
        ratio = _token_norms(guided) / _token_norms(sharp)
        return sharp * functional.interpolate(ratio, scale_factor=PATCH, mode="nearest")

    def attention_sites(self) -> list[AttentionSite]:
        """Those of all blocks; of the last one, too, text leaves, and is merely not looked at."""
        return [joint_site(block.attn) for block in self.network.transformer_blocks]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The codec's mean and deviation of each channel, [16, 1, 1]."""
        config = self.pipeline.vae.config
        mean, std = like.new_tensor([config.latents_mean, config.latents_std])[:, :, None, None]
        return mean, std


def _token_norms(velocity: Tensor) -> Tensor:
    """The norm of each token's velocity, 2 × 2 cells of all channels: [B, 1, h/2, w/2]."""
    return functional.pixel_unshuffle(velocity, PATCH).norm(dim=1, keepdim=True)

"""Stable Diffusion XL: `StableDiffusionXLPipeline` around `UNet2DConditionModel`.

Two CLIP encoders, their features side by side in one text stream, and the second one's pooled
feature. The U-Net is told sizes beside them: of the original picture, where it was cropped, and of
the wanted picture; here the picture's own size, uncropped, as diffusers does where nothing is said.
Source: Podell et al. 2023, arXiv 2307.01952, and diffusers' pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rectiflow.models.prompts import Conditioning, TokenSegment, as_prompts
from rectiflow.models.tokens import quiet, segment, warn_of_cuts
from rectiflow.models.unet import UNetModel


class SDXLModel(UNetModel):
    """SDXL's base model, or a rectified flow of that kind; see `UNetModel`."""

    family: ClassVar[str] = "sdxl"
    _usual_guidance: ClassVar[float] = 5.0

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        """Embed prompts by the pipeline's own `encode_prompt`, each distinct one by itself.

        The empty prompt is all zeros where the pipeline's `force_zeros_for_empty_prompt` says so:
        the network was trained with that.
        """
        prompts = as_prompts(prompts)
        distinct = list(dict.fromkeys(prompts))
        warn_of_cuts(distinct, self.tokenize(distinct))
        with quiet(self.pipeline):  # it has just been said, and better
            once = Conditioning.cat([self._embed(prompt) for prompt in distinct])
        return once[[distinct.index(prompt) for prompt in prompts]]

    def tokenize(self, prompts: str | Sequence[str]) -> list[TokenSegment]:
        """The CLIP tokens, whose positions both encoders share."""
        # A refiner-like pipeline has the second one only.
        tokenizer = self.pipeline.tokenizer or self.pipeline.tokenizer_2
        return [segment("clip", tokenizer, as_prompts(prompts), 0, tokenizer.model_max_length)]

    def added_conditions(self, x_t: Tensor, cond: Conditioning) -> dict[str, Any]:
        """The pooled feature, and the sizes."""
        assert cond.pooled is not None
        height, width = (side * self.factor for side in x_t.shape[-2:])
        sizes = x_t.new_tensor([[height, width, 0, 0, height, width]]).to(self.dtype)
        added = {"text_embeds": cond.pooled.to(self.dtype), "time_ids": sizes.repeat(len(x_t), 1)}
        return {"added_cond_kwargs": added}

    def _embed(self, prompt: str) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=False
        )
        if prompt == "" and self.pipeline.config.force_zeros_for_empty_prompt:
            return Conditioning(torch.zeros_like(embeds), torch.zeros_like(pooled))
        return Conditioning(embeds, pooled)

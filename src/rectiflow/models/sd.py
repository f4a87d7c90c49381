"""Stable Diffusion 1.x and 2.x: `StableDiffusionPipeline` around `UNet2DConditionModel`.

One CLIP encoder, whose last hidden states the U-Net's cross-attention looks up; `unet` has the
conventions of time and prediction. Source: Rombach et al. 2022, arXiv 2112.10752, and diffusers'
pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from rectiflow.models.prompts import Conditioning, TokenSegment, as_prompts
from rectiflow.models.tokens import quiet, segment, warn_of_prompts
from rectiflow.models.unet import UNetModel


class SDModel(UNetModel):
    """Stable Diffusion 1.x or 2.x, or a rectified flow of that kind; see `UNetModel`."""

    family: ClassVar[str] = "sd"

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        """Embed prompts by the pipeline's own `encode_prompt`, each distinct one by itself."""
        prompts = as_prompts(prompts)
        distinct = list(dict.fromkeys(prompts))
        warn_of_prompts(self, distinct)
        with quiet(self.pipeline):  # it has just been said, and better
            embedded = [
                self.pipeline.encode_prompt(
                    prompt,
                    device=self.device,
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=False,
                )[0]
                for prompt in distinct
            ]
        once = Conditioning(torch.cat(embedded))
        return once[[distinct.index(prompt) for prompt in prompts]]

    def tokenize(self, prompts: str | Sequence[str]) -> list[TokenSegment]:
        """The CLIP tokens."""
        tokenizer = self.pipeline.tokenizer
        return [segment("clip", tokenizer, as_prompts(prompts), 0, tokenizer.model_max_length)]

"""Stable Diffusion XL: `StableDiffusionXLPipeline` around `UNet2DConditionModel`.

Two CLIP encoders, their features side by side in one text stream, and the second one's pooled
feature. The U-Net is told sizes beside them: of the original picture, where it was cropped, and of
the wanted picture; here the picture's own size, uncropped, as diffusers does where nothing is said.
The refiner, a `StableDiffusionXLImg2ImgPipeline`, has the second encoder alone, and in the place of
the wanted size its U-Net is told an aesthetic score, a low one beside a negative prompt.
Source: Podell et al. 2023, arXiv 2307.01952, and diffusers' pipelines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.models.metadata import Metadata
from rectiflow.models.prompts import Conditioning, TokenSegment, as_prompts
from rectiflow.models.tokens import quiet, segment, warn_of_prompts
from rectiflow.models.unet import UNetModel

AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
"""What a refiner is told with a prompt and with a negative one: diffusers' defaults."""


class SDXLModel(UNetModel):
    """SDXL's base model or refiner, or a rectified flow of that kind; see `UNetModel`.

    Raises:
        InputError: As there; or the U-Net is told other numbers than the pipeline says.
    """

    family: ClassVar[str] = "sdxl"
    _usual_guidance: ClassVar[float] = 5.0

    def __init__(
        self, pipeline: Any, *, name: str = "unnamed", metadata: Metadata | None = None
    ) -> None:
        super().__init__(pipeline, name=name, metadata=metadata)
        config, pooled = self.network.config, pipeline.text_encoder_2.config.projection_dim
        numbers = 5 if self.requires_aesthetics_score else 6
        width = numbers * (config.addition_time_embed_dim or 0) + pooled
        if width != config.projection_class_embeddings_input_dim:
            raise InputError(
                f"{name}: its U-Net does not take {numbers} numbers beside the prompt: let "
                "model_index.json say requires_aesthetics_score of a refiner, which is a "
                "StableDiffusionXLImg2ImgPipeline, and of nothing else"
            )

    @property
    def requires_aesthetics_score(self) -> bool:
        """Whether the U-Net is told an aesthetic score, as SDXL's refiner is."""
        return bool(self.pipeline.config.get("requires_aesthetics_score"))

    @torch.no_grad()
    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        """Embed prompts by the pipeline's own `encode_prompt`, each distinct one by itself.

        The empty prompt is all zeros where the pipeline's `force_zeros_for_empty_prompt` says so:
        the network was trained with that.
        """
        prompts = as_prompts(prompts)
        distinct = list(dict.fromkeys(prompts))
        warn_of_prompts(self, distinct)
        with quiet(self.pipeline):  # it has just been said, and better
            once = Conditioning.cat([self._embed(prompt) for prompt in distinct])
        return once[[distinct.index(prompt) for prompt in prompts]]

    def tokenize(self, prompts: str | Sequence[str]) -> list[TokenSegment]:
        """The CLIP tokens, whose positions both encoders share."""
        # A refiner has the second one only.
        tokenizer = self.pipeline.tokenizer or self.pipeline.tokenizer_2
        return [segment("clip", tokenizer, as_prompts(prompts), 0, tokenizer.model_max_length)]

    def added_conditions(self, x_t: Tensor, cond: Conditioning) -> dict[str, Any]:
        """The pooled feature, the sizes, and a refiner's score in the place of the last of them."""
        assert cond.pooled is not None
        height, width = (side * self.factor for side in x_t.shape[-2:])
        # Filled in where they are used: a copy from the CPU would make every step wait.
        sizes = (height, width, 0, 0, height, width)
        told = torch.stack([x_t.new_full((len(x_t),), size) for size in sizes], 1)
        if cond.negative is not None:
            score = torch.where(cond.negative, NEGATIVE_AESTHETIC_SCORE, AESTHETIC_SCORE)
            told = torch.cat([told[:, :4], score[:, None].to(told)], 1)
        added = {"text_embeds": cond.pooled.to(self.dtype), "time_ids": told.to(self.dtype)}
        return {"added_cond_kwargs": added}

    def _embed(self, prompt: str) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=False
        )
        if prompt == "" and self.pipeline.config.force_zeros_for_empty_prompt:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        score = self.requires_aesthetics_score
        negative = torch.zeros(1, dtype=torch.bool, device=embeds.device) if score else None
        return Conditioning(embeds, pooled, negative=negative)

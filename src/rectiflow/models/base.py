"""The protocol: a pretrained network as a velocity field, with prompts, codec and hook points.

This is where diffusers' conventions end: above it t = 0 is noise and t = 1 is data, states are
float32, pixels lie in [0, 1] and a velocity points from noise to data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rectiflow.models.images import SizePolicy
from rectiflow.models.metadata import Metadata
from rectiflow.models.prompts import Conditioning, TokenSegment
from rectiflow.models.weights import weight_hash

__all__ = [
    "AttentionSite",
    "Conditioning",
    "FlowModel",
    "Projection",
    "TokenSegment",
    "joint_site",
]

Projection = Literal["query", "key", "value"]


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """An attention in which text and image meet: a place to read and to steer, as data."""

    attention: nn.Module
    """Called with keywords: the image stream as `hidden_states` and the normalised, modulated text
    stream as `encoder_hidden_states`, [B, L, D]; where the streams are fused, one stream of both as
    `hidden_states`, text before image if the model is `text_first`.
    """
    image: Mapping[Projection, nn.Module]
    """The linear maps of image features to queries, keys and values, before norm and rotation; of
    the fused stream, where the streams are fused."""
    text: Mapping[Projection, nn.Module] | None
    """Those of text features; None where the streams are fused."""

    @property
    def fused(self) -> bool:
        """Whether text and image are one stream here (the single blocks of FLUX)."""
        return self.text is None


def joint_site(attention: Any) -> AttentionSite:
    """The site of a joint attention by the names diffusers gives its parts in every family."""
    return AttentionSite(
        attention,
        image={"query": attention.to_q, "key": attention.to_k, "value": attention.to_v},
        text={
            "query": attention.add_q_proj,
            "key": attention.add_k_proj,
            "value": attention.add_v_proj,
        },
    )


class FlowModel(ABC):
    """A text-to-image network as a velocity field, with its text encoders and codec.

    Args:
        pipeline: The diffusers pipeline that owns the components; it is used, never changed.
        name: What the model is called in reports and saved files.
        metadata: What its folder says about its use.
    """

    family: ClassVar[str]
    text_first: ClassVar[bool]
    """Whether joint attention concatenates [text, image] rather than [image, text]."""

    def __init__(
        self, pipeline: Any, *, name: str = "unnamed", metadata: Metadata | None = None
    ) -> None:
        self.pipeline = pipeline
        self.name = name
        self.metadata = metadata or Metadata()
        self._dtype: tuple[tuple[nn.Module, torch.dtype], torch.dtype] | None = None

    # What the network is.

    @property
    @abstractmethod
    def network(self) -> Any:
        """The network, a module of diffusers: hooks that must see every evaluation go here."""

    @property
    def device(self) -> torch.device:
        """Where the network computes (under offloading, where it will be brought to)."""
        return torch.device(self.pipeline._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the network computes in; states and velocities are float32 all the same."""
        # diffusers looks at every parameter each time, which costs as much as a small block does.
        network = self.network
        seen = (network, next(network.parameters()).dtype)
        if self._dtype is None or self._dtype[0] != seen:
            self._dtype = (seen, network.dtype)
        return self._dtype[1]

    @cached_property
    def weight_hash(self) -> str:
        """SHA-256 over the weights of network, codec and text encoders, as they are loaded.

        Computed on first use and kept: it names the model as it was then. A network loaded in
        another dtype is another velocity field and has another hash.
        """
        return weight_hash(self.modules)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The pipeline's networks by name."""
        components = self.pipeline.components
        return {name: part for name, part in components.items() if isinstance(part, nn.Module)}

    # Sizes and defaults.

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels per latent cell, along one side."""

    @property
    @abstractmethod
    def patch(self) -> int:
        """Latent cells per image token, along one side."""

    @property
    @abstractmethod
    def largest(self) -> int:
        """The longest side of an image the network has positions for, in pixels."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of a latent."""

    @property
    @abstractmethod
    def default_size(self) -> int:
        """Side of the square image the network was made for, in pixels."""

    @property
    @abstractmethod
    def default_guidance_scale(self) -> float:
        """The guidance its makers recommend."""

    @property
    @abstractmethod
    def default_num_inference_steps(self) -> int:
        """The number of steps its makers recommend."""

    @property
    @abstractmethod
    def shift(self) -> float:
        """The shift of the time grid its scheduler is configured with."""

    def shift_for(self, num_tokens: int) -> float:
        """The shift for an image of so many tokens: FLUX's depends on it, others' do not."""
        return self.shift

    @property
    def cautions(self) -> tuple[str, ...]:
        """What to know before trusting an inversion or an edit by this model: whole sentences."""
        return ()

    @property
    def multiple(self) -> int:
        """Heights and widths are multiples of this, in pixels."""
        return self.factor * self.patch

    @property
    def size_policy(self) -> SizePolicy:
        """How images of other sizes are brought to this model; for `images.fit`."""
        return SizePolicy(multiple=self.multiple, largest=self.largest, area=self.default_size**2)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """The shape [C, h, w] of the latent of an image.

        Raises:
            InputError: The network cannot take an image of this size.
        """
        self.size_policy.check(height, width)
        return self.channels, height // self.factor, width // self.factor

    # Images and prompts.

    @abstractmethod
    def encode_image(self, images: Tensor) -> Tensor:
        """The latents of images: the mode of the posterior, normalised as the network sees them.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Returns:
            float32 [B, C, h, w] on the model's device; the same for the same images, always.

        Raises:
            InputError: The network cannot take images of this size.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents [B, C, h, w]: float32 [B, 3, H, W] in [0, 1]."""

    @abstractmethod
    def encode_prompt(self, prompts: str | Sequence[str]) -> Conditioning:
        """Embed prompts, each distinct one once and by itself.

        By itself, so that its embedding is the same to the last bit whatever else is asked for:
        a stored inversion depends on it. A prompt that is too long is cut, with a warning.
        """

    @abstractmethod
    def tokenize(self, prompts: str | Sequence[str]) -> list[TokenSegment]:
        """The tokens on every position of the text stream, segment after segment."""

    # The field.

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor | float, cond: Conditioning) -> Tensor:
        """`v(x, t | c)`, from one call of the network on exactly the rows given.

        Args:
            x: States, [B, C, h, w].
            t: Time in [0, 1], 0 at noise: one for all rows, or [B].
            cond: B rows.

        Returns:
            float32 [B, C, h, w], pointing from noise to data.
        """

    # Guidance.

    @property
    def guidance_embeds(self) -> bool:
        """Whether the network takes a guidance scale as an input (FLUX.1-dev), `guidance_scale`;
        classifier-free guidance is then `true_cfg_scale`, as in diffusers.
        """
        return False

    def combine(self, unguided: Tensor, guided: Tensor, scale: float) -> Tensor:
        """The guided velocity, `v(∅) + α (v(c) - v(∅))`, [B, C, h, w]."""
        return unguided + scale * (guided - unguided)

    # Hook points, for controls.

    @abstractmethod
    def attention_sites(self) -> list[AttentionSite]:
        """The attentions whose text stream goes on to a next block, in order."""

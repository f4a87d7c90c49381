"""Attention sites: where in a network text and image meet, as data for hooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

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

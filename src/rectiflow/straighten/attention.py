"""Attention by plain matrix products while a U-Net is trained on a CPU."""

from __future__ import annotations

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn


def use_plain_attention(network: nn.Module) -> None:
    """Replace PyTorch's fused attention in a U-Net on the CPU, where it has not been replaced yet.

    There the backward pass of the fused kernel takes a quarter of a training step of `emoji-sd`,
    and matrix products a tenth; elsewhere the fused kernel is the fast one. The result is the same
    but for rounding.
    """
    for unet in network.modules():
        if isinstance(unet, UNet2DConditionModel) and unet.device.type == "cpu":
            unet.set_attn_processor(
                {
                    name: AttnProcessor() if isinstance(processor, AttnProcessor2_0) else processor
                    for name, processor in unet.attn_processors.items()
                }
            )

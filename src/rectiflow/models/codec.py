"""diffusers' codecs: pixels to latents as a network sees them, and back.

A latent `z` of the codec goes through the network as `(z - shift_factor) · scaling_factor`; both
are in the codec's own configuration, for SD3, FLUX and their small stand-ins alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode(vae: Any, images: Tensor, device: torch.device) -> Tensor:
    """The normalised latents of images: the mode of the posterior, so always the same.

    Args:
        vae: `AutoencoderKL` or `AutoencoderTiny`.
        images: [B, 3, H, W] in [0, 1].
        device: Where the codec computes.

    Returns:
        float32 [B, C, h, w] on that device.
    """
    encoded = vae.encode((2 * images - 1).to(device, vae.dtype))
    # AutoencoderTiny has no posterior.
    latents = encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latents
    return (latents.float() - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: Any, latents: Tensor, device: torch.device) -> Tensor:
    """The images of normalised latents.

    Args:
        vae: As in `encode`.
        latents: [B, C, h, w].
        device: Where the codec computes.

    Returns:
        float32 [B, 3, H, W] in [0, 1].
    """
    return differentiable_decode(vae, latents, device).clamp(0, 1)


def differentiable_decode(vae: Any, latents: Tensor, device: torch.device) -> Tensor:
    """The images of normalised latents, with gradients: for losses that look at pictures.

    Args:
        vae: As in `encode`.
        latents: [B, C, h, w].
        device: Where the codec computes.

    Returns:
        float32 [B, 3, H, W], a little outside [0, 1] at places: cut there, no gradient would come
        through.
    """
    raw = latents.to(device).float() / vae.config.scaling_factor + _shift(vae)
    images = vae.decode(raw.to(vae.dtype), return_dict=False)[0]
    return images.float() / 2 + 0.5


def _shift(vae: Any) -> float:
    return vae.config.shift_factor or 0.0

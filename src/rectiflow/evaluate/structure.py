"""Structure distance: how differently two pictures resemble themselves, seen by DINO.

Tumanyan et al., Splicing ViT Features (arXiv 2201.00424), equations 4 and 5: the keys of a
vision transformer's last block, all heads together and the class token included, are compared
with one another by their cosine; the distance is the mean squared difference of the two tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
KEY_PROJECTIONS = ("k_proj", "key")
"""What versions of transformers call the map of features to keys."""


@torch.no_grad()
def structure_distance(dino: Any, a: Tensor, b: Tensor, *, quirk: bool) -> Tensor:
    """Structure distance of each pair, ``[B]``.

    Args:
        dino: a `ViTModel` of transformers; PIE-Bench uses ``facebook/dino-vitb8``.
        a: ``[B, 3, H, W]`` in [0, 1].
        b: the same.
        quirk: as PIE-Bench's authors compute it. They normalise pixels of [0, 255] by the mean
            and deviation of pixels in [0, 1], so that DINO is given values around 500, and
            resize without antialiasing (torchvision 0.13). Otherwise pixels are in range and
            antialiased.
    """
    distances = []
    for pair in zip(a, b, strict=True):  # one by one: a table has 785² entries
        tables = [_self_similarity(dino, image[None], quirk) for image in pair]
        distances.append((tables[0] - tables[1]).square().mean())
    return torch.stack(distances).cpu()


def _self_similarity(dino: Any, image: Tensor, quirk: bool) -> Tensor:
    """Cosines between the keys of all tokens, ``[1, T, T]``."""
    size = dino.config.image_size
    pixels = image.float().cpu() * (255 if quirk else 1)
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=not quirk)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    keys = F.normalize(_keys(dino, ((pixels - mean) / std).to(dino.device)), dim=-1)
    return keys @ keys.mT


def _keys(dino: Any, pixels: Tensor) -> Tensor:
    """The keys of the last block, ``[1, T, D]``."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        kept.append(output.float())

    handle = _key_projection(dino).register_forward_hook(keep)
    try:
        dino(pixels)
    finally:
        handle.remove()
    return kept[0]


def _key_projection(dino: nn.Module) -> nn.Module:
    named = dino.named_modules()
    return [part for name, part in named if name.rpartition(".")[2] in KEY_PROJECTIONS][-1]

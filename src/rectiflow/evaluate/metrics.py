"""How far apart pictures are, an entry per picture: the metrics that the benchmarks share.

Pictures are float tensors ``[B, 3, H, W]`` in [0, 1]; masks are ``[B, 1, H, W]``, 1 (or True)
where the edit belongs. *Inside* and *outside* are the two sides of a mask; a picture that has
nothing on the side asked for gets NaN, to be left out of a mean with its n stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from rectiflow.models.images import to_pil

if TYPE_CHECKING:
    from rectiflow.evaluate.emoji_models import Clip


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each pair, ``[B]``."""
    return (a - b).square().mean((1, 2, 3))


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, ``[B]``: ``−10 log10 MSE``.

    Example:
        >>> psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)).item()
        20.00
    """
    return _decibels(mse(a, b))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each pair, ``[B]``: Gaussian window of 11 pixels, σ = 1.5.

    These are the defaults of torchmetrics (borders reflected, and then all pixels count).
    """
    return _ssim_map(a, b).mean((1, 2, 3))


def masked_mse(a: Tensor, b: Tensor, mask: Tensor, *, inside: bool) -> Tensor:
    """Mean squared error over the pixels of one side of the mask, ``[B]``.

    Example:
        >>> a, b, mask = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2)
        >>> b[..., 0, 0] = mask[..., 0, 0] = 1
        >>> [masked_mse(a, b, mask, inside=side).item() for side in (True, False)]
        [1.0, 0.0]
    """
    return _mean_over((a - b).square(), _side(mask, inside))


def masked_psnr(a: Tensor, b: Tensor, mask: Tensor, *, inside: bool = False) -> Tensor:
    """Peak signal-to-noise ratio over the pixels of one side of the mask in dB, ``[B]``."""
    return _decibels(masked_mse(a, b, mask, inside=inside))


def masked_ssim(a: Tensor, b: Tensor, mask: Tensor, *, inside: bool = False) -> Tensor:
    """Structural similarity over the pixels of one side of the mask, ``[B]``.

    A window reaches over the mask's edge: there, both pictures are given the pixels of `b` (the
    reference), so that what happens on the other side has no say.
    """
    kept = _side(mask, inside)
    return _mean_over(_ssim_map(torch.where(kept, a, b), b), kept)


@torch.no_grad()
def clip_score(clip: Clip, images: Tensor, texts: Sequence[str]) -> Tensor:
    """CLIP score of each picture and its text, ``[B]`` in [0, 100]: ``max(100 cos, 0)``.

    Hessel et al., CLIPScore (arXiv 2104.08718), scaled as torchmetrics does. Pictures go through
    8 bits and the CLIP's own preprocessing; longer texts than it has positions for are cut.

    Args:
        clip: from `load_clip`.
        images: ``[B, 3, H, W]`` in [0, 1].
        texts: B of them.
    """
    pixels = clip.processor(images=to_pil(images), return_tensors="pt")
    tokens = clip.tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=clip.model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    )
    device = clip.model.device
    output = clip.model(
        pixel_values=pixels["pixel_values"].to(device),
        input_ids=tokens["input_ids"].to(device),
        attention_mask=tokens["attention_mask"].to(device),
    )
    image, text = (
        F.normalize(embeds.float(), dim=-1) for embeds in (output.image_embeds, output.text_embeds)
    )
    return (100 * (image * text).sum(-1)).clamp_min(0).cpu()


@torch.no_grad()
def feature_distance(clip: Clip, a: Tensor, b: Tensor) -> Tensor:
    """How differently a CLIP's vision tower sees each pair, ``[B]``, from 0 to 4.

    ``mean over layers and tokens of |f/|f| − g/|g||²``, f and g being a token's features after a
    layer: LPIPS (arXiv 1801.03924) without trained weights, on transformer features. Its scale is
    the CLIP's own; figures of different CLIPs do not compare.
    """
    layers = zip(_features(clip, a), _features(clip, b), strict=True)
    return torch.stack([(f - g).square().sum(-1).mean(-1) for f, g in layers]).mean(0).cpu()


def _features(clip: Clip, images: Tensor) -> list[Tensor]:
    """Unit token features after every layer of the vision tower, ``[B, tokens, D]`` each."""
    size = clip.model.config.vision_config.image_size
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (clip.processor.image_mean, clip.processor.image_std)
    )
    pixels = ((images.clamp(0, 1).cpu() - mean) / std).to(clip.model.device, clip.model.dtype)
    output = clip.model.vision_model(pixel_values=pixels, output_hidden_states=True)
    return [F.normalize(state.float(), dim=-1) for state in output.hidden_states[1:]]


def _decibels(error: Tensor) -> Tensor:
    return -10 * error.log10()


def _ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of every pixel and channel, ``[B, 3, H, W]``."""
    result = structural_similarity_index_measure(
        a, b, data_range=1.0, reduction="none", return_full_image=True
    )
    return result[1]


def _side(mask: Tensor, inside: bool) -> Tensor:
    return mask.bool() if inside else ~mask.bool()


def _mean_over(values: Tensor, kept: Tensor) -> Tensor:
    """Mean of ``[B, 3, H, W]`` over the kept pixels ``[B, 1, H, W]``; NaN where there are none."""
    count = kept.sum((1, 2, 3)) * values.shape[1]
    total = torch.where(kept, values, 0).cpu().double().sum((1, 2, 3))
    return (total / count.cpu()).to(values)

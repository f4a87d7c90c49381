"""What a CLIP says of pictures: features to compare piles of them by, and the CLIP score.

Pictures are uint8 [N, H, W, 3], as a picture file has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rectiflow.errors import InputError

if TYPE_CHECKING:
    from rectiflow.evaluate.emoji_models import Clip

BATCH = 100

Pictures = Sequence[Image.Image] | NDArray[np.uint8]
"""RGB pictures of one size, or uint8 [N, H, W, 3]."""


def as_array(pictures: Pictures) -> NDArray[np.uint8]:
    """Pictures as uint8 [N, H, W, 3].

    Raises:
        InputError: There are none, or they differ in size or are not RGB.
    """
    if isinstance(pictures, np.ndarray):
        array = pictures
    elif len({picture.size for picture in pictures}) == 1:
        array = np.stack([np.asarray(picture) for picture in pictures])
    else:
        raise InputError("pictures to be measured are one or more, all of one size")
    if array.ndim != 4 or array.shape[-1] != 3 or array.dtype != np.uint8 or len(array) == 0:
        raise InputError(
            f"pictures to be measured are RGB in 8 bits, not {array.dtype} {list(array.shape)}"
        )
    return array


@torch.no_grad()
def image_features(clip: Clip, pictures: Pictures, batch_size: int = BATCH) -> NDArray[np.float32]:
    """The image embeddings of a CLIP: projected, and not brought to unit length.

    Their length is kept because a Fréchet distance takes them for Gaussian, which points on a
    sphere are not; Inception's features of the FID are not normalised either.

    Args:
        clip: From `load_clip`; the pictures go through its own preprocessing.
        pictures: N of them.
        batch_size: How many go through the network together.

    Returns:
        float32 [N, D].
    """
    batches = _pixels(clip, as_array(pictures), batch_size)
    return torch.cat([_image_embeddings(clip, pixels) for pixels in batches]).numpy()


def clip_scores(
    clip: Clip,
    features: NDArray[np.float32],
    captions: Sequence[str],
    batch_size: int = BATCH,
) -> NDArray[np.float64]:
    """The CLIP score of each picture: the cosine of its embedding and its caption's.

    In [-1, 1], not times 100 and not clamped at 0. Source: Radford et al. 2021, arXiv 2103.00020;
    as a score InstaFlow, arXiv 2309.06380.

    Args:
        clip: From `load_clip`.
        features: Of N pictures, by `image_features`.
        captions: N texts; longer ones than the CLIP has positions for are cut.
        batch_size: How many captions go through the network together.

    Returns:
        float64 [N].

    Raises:
        InputError: There is not one caption for each picture.
    """
    if len(features) != len(captions):
        raise InputError(f"{len(captions)} captions for {len(features)} pictures: give one each")
    texts = text_features(clip, captions, batch_size)
    images, words = (F.normalize(torch.from_numpy(x).double(), dim=1) for x in (features, texts))
    return (images * words).sum(1).numpy()


@torch.no_grad()
def text_features(
    clip: Clip, captions: Sequence[str], batch_size: int = BATCH
) -> NDArray[np.float32]:
    """The text embeddings of a CLIP, projected, not of unit length: float32 [N, D]."""
    distinct = list(dict.fromkeys(captions))
    place = {text: row for row, text in enumerate(distinct)}
    embedded = [
        _text_embeddings(clip, distinct[start : start + batch_size])
        for start in range(0, len(distinct), batch_size)
    ]
    return torch.cat(embedded)[[place[text] for text in captions]].numpy()


def _pixels(clip: Clip, pictures: NDArray[np.uint8], batch_size: int) -> Iterator[Tensor]:
    """Batches as the vision tower takes them, float32 [B, 3, S, S]."""
    side = int(clip.model.config.vision_config.image_size)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (clip.processor.image_mean, clip.processor.image_std)
    )
    for start in range(0, len(pictures), batch_size):
        some = pictures[start : start + batch_size]
        if some.shape[1:3] == (side, side):
            # What the processor does when there is nothing to resize, many times as fast.
            pixels = torch.from_numpy(some.copy()).permute(0, 3, 1, 2).float() / 255
            yield (pixels - mean) / std
        else:
            images = [Image.fromarray(picture) for picture in some]
            yield clip.processor(images=images, return_tensors="pt")["pixel_values"]


def _image_embeddings(clip: Clip, pixels: Tensor) -> Tensor:
    model = clip.model
    seen = model.vision_model(pixel_values=pixels.to(model.device, model.dtype))
    embedded: Tensor = model.visual_projection(seen.pooler_output)
    return embedded.float().cpu()


def _text_embeddings(clip: Clip, captions: list[str]) -> Tensor:
    model = clip.model
    # One length for all, so that a batch's longest caption does not matter to the others.
    tokens = clip.tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    ).to(model.device)
    read = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    embedded: Tensor = model.text_projection(read.pooler_output)
    return embedded.float().cpu()

"""Pictures as tensors and back, and any size brought to one that a model takes.

The size policy: a size that the model supports, of between a quarter of and twice its native area,
is used as it is. Any other picture is resized, keeping its proportions, to about the native area
(less where the longest side would not fit), and padded by repeating its edge to the next supported
size. The result is cropped back and resized to the source's own size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rectiflow.errors import InputError

RESAMPLE = Image.Resampling.LANCZOS


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as float32 [1, 3, H, W] in [0, 1].

    Example:
        >>> to_tensor(Image.new("RGB", (3, 2), (255, 0, 51))).amax((0, 2, 3)).tolist()
        [1.0, 0.0, 0.2]
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return pixels.permute(2, 0, 1)[None].float() / 255


def to_pil(images: Tensor) -> list[Image.Image]:
    """Tensors [B, 3, H, W] in [0, 1], clamped, as pictures.

    Example:
        >>> to_pil(torch.ones(2, 3, 4, 5))[0].size
        (5, 4)
    """
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return [Image.fromarray(p.numpy()) for p in pixels.permute(0, 2, 3, 1).contiguous()]


@dataclass(frozen=True)
class SizePolicy:
    """Which sizes a model takes, and where any other is sent.

    Example:
        >>> policy = SizePolicy(multiple=16, largest=1536, area=1024 * 1024)
        >>> policy.supports(1024, 768), policy.supports(1000, 768)
        (True, False)
    """

    multiple: int
    """Heights and widths are multiples of this, in pixels."""
    largest: int
    """The longest side, in pixels."""
    area: int
    """The native area, in pixels."""

    def supports(self, height: int, width: int) -> bool:
        """Whether the model takes this size."""
        return all(
            side % self.multiple == 0 and 0 < side <= self.largest for side in (height, width)
        )

    def check(self, height: int, width: int) -> None:
        """Refuse a size that the model does not take.

        Raises:
            InputError: One line naming the sizes that it does take.
        """
        if not self.supports(height, width):
            raise InputError(
                f"height {height} and width {width} must both be multiples of {self.multiple}, "
                f"from {self.multiple} to {self.largest}"
            )

    def suits(self, height: int, width: int) -> bool:
        """Whether a picture of this size is used as it is."""
        near = self.area / 4 <= height * width <= 2 * self.area
        return near and self.supports(height, width)


@dataclass(frozen=True)
class Restore:
    """Where a picture was put for a model, and the way back. Sizes are (width, height).

    Called with tensors [B, 3, H, W] of the fitted size, it gives pictures of the source's size.
    """

    source_size: tuple[int, int]
    content_size: tuple[int, int]
    """What the whole source was resized to."""
    offset: tuple[int, int]
    """Left and top padding, in pixels."""
    size: tuple[int, int]
    """The size the model sees."""

    def __call__(self, images: Tensor) -> list[Image.Image]:
        """Crop and resize the model's pictures back to the source's size."""
        (left, top), (width, height) = self.offset, self.content_size
        content = to_pil(images[..., top : top + height, left : left + width])
        if self.content_size == self.source_size:
            return content
        return [picture.resize(self.source_size, RESAMPLE) for picture in content]

    def fit(self, image: Image.Image) -> Tensor:
        """Put a picture of the source's size where the source was put: float32 [1, 3, H, W]."""
        if self.content_size != self.source_size:
            image = image.resize(self.content_size, RESAMPLE)
        return self._pad(to_tensor(image))

    def fit_mask(self, mask: Image.Image) -> Tensor:
        """Put a grey mask of the source's size there too: float32 [1, 1, H, W], white is 1."""
        assert mask.mode == "L" and mask.size == self.source_size
        grey = mask
        if self.content_size != self.source_size:
            grey = grey.resize(self.content_size, Image.Resampling.BOX)
        return self._pad(to_tensor(grey)[:, :1])

    def _pad(self, content: Tensor) -> Tensor:
        (left, top), (width, height) = self.offset, self.content_size
        right, bottom = self.size[0] - left - width, self.size[1] - top - height
        return torch.nn.functional.pad(content, (left, right, top, bottom), mode="replicate")


def fit(image: Image.Image, policy: SizePolicy) -> tuple[Tensor, Restore]:
    """Bring a picture to a size the model takes, as this module's policy says.

    Args:
        image: Of any size, from one pixel on.
        policy: The model's (`model.size_policy`).

    Returns:
        float32 [1, 3, H, W] in [0, 1], and the way back.

    Example:
        >>> policy = SizePolicy(multiple=8, largest=128, area=64 * 64)
        >>> fitted, restore = fit(Image.new("RGB", (300, 200)), policy)
        >>> fitted.shape, restore(fitted)[0].size
        (torch.Size([1, 3, 56, 80]), (300, 200))
    """
    restore = placed(image.size, policy)
    return restore.fit(image), restore


def fitted_size(image: Image.Image, policy: SizePolicy) -> tuple[int, int]:
    """(height, width) of what `fit` makes of a picture."""
    width, height = placed(image.size, policy).size
    return height, width


def placed(source: tuple[int, int], policy: SizePolicy) -> Restore:
    """Where `fit` puts a picture of a size, ``(width, height)``."""
    width, height = source
    if policy.suits(height, width):
        return Restore(source, source, (0, 0), source)
    scale = min(math.sqrt(policy.area / (width * height)), policy.largest / max(width, height))
    content = (max(1, round(width * scale)), max(1, round(height * scale)))
    size = tuple(math.ceil(side / policy.multiple) * policy.multiple for side in content)
    offset = ((size[0] - content[0]) // 2, (size[1] - content[1]) // 2)
    return Restore(source, content, offset, (size[0], size[1]))

"""Masks: where an edit may act, as drawn or as the network says, and back to pixels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from rectiflow.errors import InputError
from rectiflow.flow.grid import active_steps
from rectiflow.models.images import Restore, to_tensor
from rectiflow.models.picture import Picture, load_mask

MASK_STEPS = 0.3
"""Share of the steps over which a derived mask is gathered before it is used."""
WHITE = 0.99
"""From here on a pixel of a mask counts as white; JPEG files rarely say 1."""
LEAST = 0.02
"""A mask that lets through less than this share of the edit, wherever it is, changes nothing."""
UNLIKE = 0.02
"""From this relative difference on, two sizes are of another shape."""


class Gathered:
    """A mask that is found out in the first steps and used from the last of them on.

    Args:
        threshold: cells whose evidence is below half this share of the largest are 0, and those
            above it are 1.
        steps: of the editing.
    """

    def __init__(self, threshold: float, steps: int) -> None:
        self.threshold = threshold
        self.steps = max(1, active_steps(MASK_STEPS, steps))

    def wants(self, step: int) -> bool:
        """Whether this step's evidence is to be added."""
        return step < self.steps

    def ready(self, step: int) -> bool:
        """Whether the mask can be used from this step on."""
        return step >= self.steps - 1

    def cut(self, heat: Tensor) -> Tensor:
        """Evidence ``[T, 1, h, w]``, at least 0, as a mask, smoothed over neighbouring cells."""
        heat = F.avg_pool2d(F.pad(heat, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        heat = heat / heat.amax((2, 3), keepdim=True).clamp_min(1e-12)
        return ((heat - 0.5 * self.threshold) / (0.5 * self.threshold)).clamp(0, 1)


class DerivedMask(Gathered):
    """Where two prompts disagree about the velocity is where an edit belongs.

    The disagreement ``mean_channels |v_target − v_source|`` is averaged over the first steps,
    smoothed over neighbouring cells, and cut at a share of its largest value (after DiffEdit,
    arXiv 2210.11427, whose noise estimates become velocities here).
    """

    def __init__(self, threshold: float, steps: int) -> None:
        super().__init__(threshold, steps)
        self._maps: list[Tensor] = []

    def add(self, disagreement: Tensor) -> None:
        """Add the difference of the velocities ``[T, C, h, w]`` in one step."""
        self._maps.append(disagreement.abs().mean(1, keepdim=True))

    def mask(self) -> Tensor:
        """1 where the edit belongs, 0 where the source stays, soft between: ``[T, 1, h, w]``."""
        return self.cut(torch.stack(self._maps).mean(0))


def read_mask(
    mask: Picture,
    size: tuple[int, int],
    *,
    grow: int = 0,
    blur: float = 0.0,
    invert: bool = False,
    resize: bool = False,
) -> Image.Image:
    """A mask as it was given, in grey: turned round, grown and then blurred.

    Args:
        mask: white where the edit may act, or opaque where it has transparent parts (`load_mask`).
        size: of the picture, ``(width, height)``.
        grow: pixels by which white spreads, in a disc.
        blur: standard deviation of a Gaussian in pixels, cut at three of them: from there on
            black is still exactly 0.
        invert: black where the edit may act.
        resize: stretch a mask of another size.

    Raises:
        InputError: it cannot be read, has another size or nothing white in it, or `grow` or `blur`
            is negative or not finite.
    """
    for name, value in (("mask_grow", grow), ("mask_blur", blur)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value}; pixels, at least 0")
    if int(grow) != grow:
        raise InputError(f"mask_grow is {grow}; whole pixels")
    if blur > max(size):
        raise InputError(f"mask_blur is {blur}; at most the {max(size)} pixels of the image")
    called = f"the mask {mask}" if isinstance(mask, str | Path) else "the mask"
    grey = load_mask(mask)
    if grey.size != size:
        both = f"{called} is {grey.width} × {grey.height} and the image {size[0]} × {size[1]}"
        if not resize:
            raise InputError(f"{both}: make it of that size, or stretch it (--mask-resize)")
        if abs(math.log(grey.width * size[1] / (grey.height * size[0]))) > UNLIKE:
            warnings.warn(f"{both}, of another shape: it is stretched", stacklevel=2)
        grey = grey.resize(size, Image.Resampling.BILINEAR)
    if invert:
        grey = ImageOps.invert(grey)
    brightest = int(grey.getextrema()[1])  # type: ignore[arg-type]
    if not brightest:
        shade = "white" if invert else "black"
        raise InputError(
            f"{called} is {shade} all over, so that nothing may change: paint where the edit may "
            "act, or turn the mask round (--mask-invert)"
        )
    if brightest < 128:
        warnings.warn(
            f"{called} is {brightest} of 255 where it is brightest: no more than "
            f"{brightest / 255:.0%} of the edit comes through",
            stacklevel=2,
        )
    if not (grow or blur):
        return grey
    cells = to_tensor(grey)[:, :1]
    return _as_grey(_blurred(_grown(cells, min(int(grow), sum(size))), blur))


def mask_cells(mask: Image.Image, restore: Restore, shape: Sequence[int]) -> Tensor:
    """A grey mask of the picture's size on latents ``[..., h, w]``: ``[1, 1, h, w]``.

    Raises:
        InputError: next to nothing of it is left there.
    """
    cells = latent_mask(restore.fit_mask(mask), shape)
    if cells.max() < LEAST:
        raise InputError(
            f"the mask lets {cells.max().item():.1%} of the edit through at the "
            f"{restore.size[0]} × {restore.size[1]} the model sees: make it larger "
            "(--mask-grow), or edit its region alone (--crop-to-mask)"
        )
    return cells


def latent_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A pixel mask ``[B, 1, H, W]`` at the latents' size ``[..., h, w]``.

    A cell with a white pixel is white, so that nothing drawn is lost; others are as grey as their
    pixels are on average, so that soft edges stay soft.
    """
    size = (shape[-2], shape[-1])
    hard = F.adaptive_max_pool2d((mask >= WHITE).to(mask.dtype), size)
    return torch.maximum(hard, F.adaptive_avg_pool2d(mask, size))


def open_cells(mask: Tensor) -> Tensor:
    """1 where a mask is above 0: where an edit goes its own way, step by step.

    How far it gets there is not for the steps: going back by a share in each of them would leave
    next to nothing after many. See `blended`.
    """
    return (mask > 0).to(mask.dtype)


def blended(edited: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    """``source + mask (edited − source)``, exactly either of them where the mask is 0 or 1.

    So a grey g lets through g of the change, whatever the method and the number of steps.
    """
    return torch.lerp(source, edited, mask)


def picture_masks(mask: Tensor, restore: Restore) -> list[Image.Image]:
    """Masks of latents ``[T, 1, h, w]`` in the picture's own pixels, interpolated between cells."""
    width, height = restore.size
    pixels = F.interpolate(mask.float().cpu(), size=(height, width), mode="bilinear")
    (left, top), (width, height) = restore.offset, restore.content_size
    content = pixels[..., top : top + height, left : left + width]
    # Not the restoring of pictures: its filter overshoots, and black has to stay black.
    return [
        _as_grey(one).resize(restore.source_size, Image.Resampling.BILINEAR)
        for one in content[:, None]
    ]


def pasted(edited: Image.Image, source: Image.Image, mask: Image.Image) -> Image.Image:
    """The edited picture with the source's pixels where the mask is black, mixed where it is grey.

    Args:
        edited: RGB.
        source: RGB, of the same size.
        mask: grey, of the same size; 0 gives the source's pixel to the bit, 255 the edited one.
    """
    share = np.asarray(mask, dtype=np.float32)[..., None] / 255
    below, above = (np.asarray(one, dtype=np.float32) for one in (source, edited))
    return Image.fromarray((below + share * (above - below)).round().astype(np.uint8))


def _grown(cells: Tensor, radius: int) -> Tensor:
    """The largest value in a disc around each pixel, row by row of the disc."""
    height, found = cells.shape[-2], cells
    for down in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        half = math.isqrt(radius**2 - down**2)
        widened = F.max_pool2d(cells, (1, 2 * half + 1), 1, (0, half)) if half else cells
        shifted = torch.zeros_like(cells)
        shifted[..., max(down, 0) : height + min(down, 0), :] = widened[
            ..., max(-down, 0) : height - max(down, 0), :
        ]
        found = torch.maximum(found, shifted)
    return found


def _blurred(cells: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur; beyond the border the edge goes on."""
    reach = math.ceil(3 * sigma)
    if not reach:
        return cells
    weights = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights = weights / weights.sum()
    cells = F.conv2d(
        F.pad(cells, (reach, reach, 0, 0), mode="replicate"), weights[None, None, None]
    )
    cells = F.pad(cells, (0, 0, reach, reach), mode="replicate")
    return F.conv2d(cells, weights[None, None, :, None])


def _as_grey(cells: Tensor) -> Image.Image:
    """``[1, 1, H, W]`` in [0, 1] as a grey picture."""
    return Image.fromarray((cells[0, 0] * 255).round().clamp(0, 255).to(torch.uint8).numpy())

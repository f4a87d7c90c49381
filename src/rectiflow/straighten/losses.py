"""How far a student is from its target: per sample, per dimension, in latents or in pictures.

A loss takes a residual, or two latents, [B, ...] and gives [B]. Losses of pictures decode a few
rows at a time and forget what that took until it is needed again, so that any batch fits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rectiflow.errors import InputError
from rectiflow.models.base import FlowModel
from rectiflow.models.load import WEIGHTS

LossName = Literal["l2", "pseudo_huber", "lpips", "lpips_huber"]
PERCEPTUAL = ("lpips", "lpips_huber")

MISSING_WEIGHTS = (
    "loss lpips needs weights: --set lpips_weights=FILE, LPIPS in safetensors, or the folder of a "
    "CLIPModel"
)

HUBER = 0.00054
"""c / d of the pseudo-Huber loss (Lee et al. 2024, arXiv 2405.20320, section 4.2)."""

PictureDistance = Callable[[Tensor, Tensor], Tensor]
"""Two sets of pictures [B, 3, H, W] about [0, 1] to a distance each, [B]; differentiable."""


def l2(residual: Tensor) -> Tensor:
    """`‖z‖² / d` of residuals [B, ...]; float32 [B].

    Example:
        >>> l2(torch.tensor([[3.0, 4.0]]))
        tensor([12.5000])
    """
    return residual.float().flatten(1).square().mean(1)


def pseudo_huber(residual: Tensor, c: float = HUBER) -> Tensor:
    """`(√(‖z‖² + (cd)²) - cd) / d` of residuals [B, d...]: squared when small, linear when large.

    Below `‖z‖ = cd` it tends to `‖z‖² / (2 c d²)`, above it to `‖z‖ / d`.

    Args:
        residual: z.
        c: The turning point, per dimension.

    Returns:
        float32 [B].
    """
    z = residual.float().flatten(1)
    turn = c * z.shape[1]
    # √(s + t²) - t without subtracting two numbers that are nearly equal.
    square = z.square().sum(1)
    return square / ((square + turn**2).sqrt() + turn) / z.shape[1]


class Perceptual:
    """A distance of pictures, between latents.

    Args:
        model: Whose codec decodes them.
        distance: Of the pictures.
        chunk: Rows decoded at a time.

    Raises:
        InputError: The model has no codec that can be differentiated.
    """

    def __init__(self, model: FlowModel, distance: PictureDistance, chunk: int = 4) -> None:
        self.decode = decoder(model)
        self.distance = distance
        self.chunk = chunk

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of the pictures of latents `a` and `b`, [B, C, h, w]: float32 [B].

        Gradients reach `a` alone: `b` is the target.
        """
        rows = zip(a.split(self.chunk), b.detach().split(self.chunk), strict=True)
        found: list[Any] = [checkpoint(self._pair, x, y, use_reentrant=False) for x, y in rows]
        return torch.cat(found)

    def _pair(self, a: Tensor, b: Tensor) -> Tensor:
        # Codecs and features are in float32 and not the training's business: no autocast here.
        with torch.autocast(a.device.type, enabled=False):
            with torch.no_grad():
                target = self.decode(b)
            return self.distance(self.decode(a.float()), target).float()


def decoder(model: FlowModel) -> Callable[[Tensor], Tensor]:
    """Latents to pictures with gradients.

    Raises:
        InputError: The model's codec is not an image autoencoder of diffusers.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny

    from rectiflow.models import codec

    vae = getattr(model.pipeline, "vae", None)
    if not isinstance(vae, AutoencoderKL | AutoencoderTiny):
        raise InputError(
            f"loss lpips looks at pictures, and {model.name} has no codec that can be "
            "differentiated: use loss=l2 or pseudo_huber"
        )
    return lambda latents: codec.differentiable_decode(vae, latents, model.device)


def picture_distance(weights: Path | None, device: torch.device) -> PictureDistance:
    """The distance that a file or folder of weights gives.

    Args:
        weights: LPIPS in a safetensors file (`models.lpips.load_lpips`), or the folder of a
            `CLIPModel`, whose vision features then make the distance; `emoji-clip` by its name.
        device: Where it computes.

    Raises:
        InputError: There are none, or they are of neither kind.
    """
    from rectiflow.models.lpips import load_lpips

    if weights is None:
        raise InputError(MISSING_WEIGHTS)
    if not weights.exists() and (WEIGHTS / weights).is_dir():
        weights = WEIGHTS / weights
    if weights.is_dir():
        return ClipDistance.load(weights).to(device)
    if not weights.is_file():
        raise InputError(f"lpips_weights: there is no {weights}")
    return load_lpips(weights).to(device)


class ClipDistance(nn.Module):
    """LPIPS on a CLIP's image tower: squared differences of its unit features, layer by layer.

    The features of a layer are made unit vectors token by token, as LPIPS does it place by place
    (Zhang et al. 2018, arXiv 1801.03924); there are no weights of channels to be learned, so all
    count 1, and layers are averaged.

    Args:
        clip: A `CLIPModel`; its image tower is used and never trained.
        mean: Of pixels in [0, 1], by channel, as its image processor has it.
        std: Likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, clip: Any, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.vision = clip.vision_model.float().eval().requires_grad_(False)
        self.side = int(clip.config.vision_config.image_size)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @classmethod
    def load(cls, folder: Path) -> ClipDistance:
        """From a folder with a `CLIPModel` and its image processor.

        Raises:
            InputError: The folder holds something else.
        """
        from transformers import CLIPImageProcessorPil, CLIPModel

        from rectiflow.models.inspection import inspect_folder
        from rectiflow.models.libraries import quiet_libraries

        if folder.is_dir():
            inspect_folder(folder)
        try:
            with quiet_libraries():
                clip = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
                processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(f"lpips_weights: {folder} does not hold a CLIPModel") from error
        return cls(clip, list(processor.image_mean), list(processor.image_std))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of each pair of pictures [B, 3, H, W] about [0, 1]: [B], in [0, 4]."""
        pairs = list(zip(self._unit(a), self._unit(b), strict=True))
        return torch.stack([(f - g).square().sum(-1).mean(1) for f, g in pairs]).mean(0)

    def _unit(self, images: Tensor) -> list[Tensor]:
        x = images.to(self.mean.device).float()
        if x.shape[-2:] != (self.side, self.side):
            size = (self.side, self.side)
            x = nn.functional.interpolate(x, size, mode="bilinear", antialias=True)
        x = (x - self.mean) / self.std
        layers = self.vision(pixel_values=x, output_hidden_states=True).hidden_states[1:]
        # Inside the root, so that a token of zeros has a gradient.
        return [f / (f.square().sum(-1, keepdim=True) + 1e-8).sqrt() for f in layers]

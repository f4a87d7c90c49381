"""`emoji-vae`: the codec of the embedded world, an `AutoencoderKL` with 4 × 16 × 16 latents.

The loss is L1 + squared error on pixels, a distance of `emoji-clip`'s features where
`perceptual_weight` asks for it, and a weak KL term. A quarter of the weight goes to
reconstructing the half-size picture from the averaged latents: latents that survive averaging
carry structure rather than high frequencies, which is what a flow model learns first (after
"Improving the Diffusability of Autoencoders", arXiv 2502.14831).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor, nn

from rectiflow.emoji.render import render_array
from rectiflow.emoji.scene import sample
from rectiflow.errors import InputError
from rectiflow.models.load import WEIGHTS
from rectiflow.report.sheet import contact_sheet
from rectiflow.straighten.config import TrainConfig
from rectiflow.straighten.losses import ClipDistance

SIZE = 64
HELD_OUT = 2_000_000
"""First seed of the scenes that no training and no tuning has seen."""


class VaeConfig(TrainConfig):
    """Recipe `emoji-vae`."""

    recipe: str = "emoji-vae"
    seed: int = 0
    steps: int = Field(default=8000, gt=0)
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    weight_decay: float = 1e-4
    decay_steps: int = 2000
    ema_decay: float = 0.998
    block_out_channels: tuple[int, ...] = (32, 64, 96)
    latent_channels: int = 4
    kl_weight: float = 2e-4
    squared_weight: float = 4.0
    half_size_weight: float = 0.25
    perceptual_weight: float = Field(default=0.0, ge=0)
    """Weight of `ClipDistance` between the picture and its reconstruction."""
    clip: Path = WEIGHTS / "emoji-clip"
    """Folder of the `CLIPModel` whose image tower makes that distance."""
    decoder_only: bool = False
    """Freeze the encoder: the latents, and every model trained on them, stay as they are."""
    anchor_weight: float = Field(default=0.0, ge=0)
    """Keep latents near those of `init_from`, so that models trained on them still hold: weight
    of the squared distance between the two encoders' means, in units of the latents' variance."""


def scenes(seeds: Sequence[int], size: int = SIZE) -> Tensor:
    """The pictures of scene seeds, float32 ``[B, 3, size, size]`` in [0, 1]."""
    pictures = np.stack([render_array(sample(seed), size) for seed in seeds])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """The untrained codec of a configuration."""
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


class _Objective(nn.Module):
    def __init__(self, vae: AutoencoderKL, config: VaeConfig) -> None:
        super().__init__()
        self.vae, self.config = vae, config
        # A plain tuple, so that the anchor is neither trained nor saved.
        self.anchor = (copy.deepcopy(vae.encoder).requires_grad_(False),)
        perceptual = config.perceptual_weight > 0
        self.perceptual = (ClipDistance.load(config.clip),) if perceptual else ()

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        config = self.config
        pixels = 2 * images - 1
        mean, log_variance = self.vae.encoder(pixels).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 4)
        z = mean + noise * torch.exp(0.5 * log_variance)
        output = self.vae.decoder(z).float()
        loss = self._distance(output, pixels)
        for distance in self.perceptual:
            loss = loss + config.perceptual_weight * distance.to(images.device)(
                output / 2 + 0.5, images
            )
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        loss = loss + config.kl_weight * kl.mean(dim=(1, 2, 3))
        if config.anchor_weight:
            drift = mean - self.anchor[0].to(pixels.device)(pixels).float().chunk(2, dim=1)[0]
            drift = drift * self.vae.config.scaling_factor
            loss = loss + config.anchor_weight * drift.square().mean(dim=(1, 2, 3))
        if config.half_size_weight:
            half = self.vae.decoder(F.avg_pool2d(z[::2], 2)).float()
            half_loss = self._distance(half, F.avg_pool2d(pixels[::2], 2)).mean()
            loss = loss + config.half_size_weight * half_loss
        return loss

    def _distance(self, output: Tensor, target: Tensor) -> Tensor:
        error = output - target
        per_pixel = error.abs() + self.config.squared_weight * error.square()
        return per_pixel.mean(dim=(1, 2, 3))


class VaeTask:
    """Reconstruction of random scenes."""

    def __init__(self, config: VaeConfig) -> None:
        self.config = config
        torch.manual_seed(config.seed)
        self.vae = build_vae(config)
        if config.init_from is not None:
            start = AutoencoderKL.from_pretrained(config.init_from, dtype=torch.float32)
            self.vae.load_state_dict(start.state_dict())
            self.vae.register_to_config(**latent_statistics(start))
        elif config.decoder_only:
            raise InputError(
                "decoder_only needs init_from: which codec's decoder is to be trained?"
            )
        self.vae.to(memory_format=torch.channels_last)
        self.vae.encoder.requires_grad_(not config.decoder_only)
        self.network: nn.Module = _Objective(self.vae, config)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        images = scenes([index % 1_000_000 for index in indices])
        side = SIZE // 2 ** (len(self.config.block_out_channels) - 1)
        shape = (self.config.latent_channels, side, side)
        noise = torch.stack([torch.randn(shape, generator=_generator(i)) for i in indices])
        return {"images": images.contiguous(memory_format=torch.channels_last), "noise": noise}

    @torch.no_grad()
    def draw_samples(self, path: Path) -> None:
        originals = scenes(range(HELD_OUT, HELD_OUT + 16))
        latents = self.vae.encode((2 * originals - 1).to(self.vae.device)).latent_dist.mode()
        decoded = (self.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).cpu()
        rows = torch.cat([originals, decoded]).permute(0, 2, 3, 1).numpy()
        contact_sheet(rows, columns=16, scale=2).save(path)

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Write the codec in half precision with the scale and shift of its latents.

        One scale and one shift for all channels: whitening each would make a flow model spend
        itself on whichever channel carries the finest detail.
        """
        if self.config.init_from is None:
            latents = torch.cat([self._latents(start) for start in range(0, 512, 64)])
            self.vae.register_to_config(
                scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean())
            )
        shipped = build_vae(self.config)
        shipped.register_to_config(**latent_statistics(self.vae))
        shipped.load_state_dict(self.vae.state_dict())
        shipped.half().save_pretrained(folder)

    def _latents(self, start: int) -> Tensor:
        images = (2 * scenes(range(start, start + 64)) - 1).to(self.vae.device)
        latents: Tensor = self.vae.encode(images).latent_dist.mode()
        return latents


def latent_statistics(vae: AutoencoderKL) -> dict[str, float]:
    """The scale and shift that a codec's configuration gives its latents."""
    return {name: vae.config[name] for name in ("scaling_factor", "shift_factor")}


def _generator(index: int) -> torch.Generator:
    return torch.Generator().manual_seed(index)
